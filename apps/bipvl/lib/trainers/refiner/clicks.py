"""How well a version answers clicks: a robot user corrects some labels of some cases that the version is scored on.

The answers are the app's own (`lib.interaction.respond`). What a robot costs is bounded: the first `cases` cases, of
each at most `LABELS` labels that its reference shows, five clicks each.
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from monai.data import MetaTensor

from lib.interaction.answer import Settings
from lib.interaction.prompts import Prompts
from lib.interaction.respond import respond
from lib.interaction.robot import click
from lib.model.nets.refiner import Refiner
from lib.model.predict import Prediction
from lib.model.refining import SETTINGS, Way, refining
from lib.tasks import Task
from lib.trainers.refiner.cases import Segmented, as_segmented

logger = logging.getLogger(__name__)

CLICKS = (0, 1, 3, 5)  # after which Dice counts
LABELS = 4  # of a case at most

Curves = dict[str, dict[str, list[float]]]  # case id to label to Dice after each of `CLICKS`
Told = Callable[[int, int], None]  # cases done, cases in all; may raise to stop


class Robot:
    """A robot user of one version, at the cases that it is scored on.

    Args:
        cases: how many cases at most; 0: none.
        total: how many cases there will be.
        ways: to answer.
        refiner: of the version, for the way `refiner`.
        told: hears of the cases; may raise to stop.

    `curves` holds what came out, way by way. What goes wrong with a case is logged, and costs that case alone.
    """

    def __init__(
        self,
        cases: int,
        total: int,
        ways: Sequence[Way] = ("evidence",),
        refiner: Refiner | None = None,
        told: Told = lambda *_: None,
    ) -> None:
        assert refiner is not None or "refiner" not in ways
        self.cases, self.ways, self.refiner, self.told = min(cases, total), tuple(ways), refiner, told
        self.curves: dict[Way, Curves] = {way: {} for way in self.ways}
        self._done = 0

    @property
    def needs_features(self) -> bool:
        """Whether the next prediction must keep the decoder's features."""
        return "refiner" in self.ways and self._done < self.cases

    def prediction(self, task: Task, case: Mapping[str, Any], image: MetaTensor, found: Prediction) -> None:
        """Correct what was predicted for the next case.

        Args:
            task: the version's.
            case: `id`, `image`, `label` and, if the label is partial, `annotated`.
            image: preprocessed.
            found: with features if `needs_features` says so.
        """
        if self._done >= self.cases:
            return
        self.told(self._done, self.cases)
        try:
            seen = as_segmented(found, task, case, image)
            labels = chosen(seen, known_labels(task, case.get("annotated")))
            both: dict[Way, dict[str, list[float]]] = {}
            for way in self.ways:
                refiner = self.refiner if way == "refiner" else None
                both[way] = {label: curve(seen, label, refiner) for label in labels}
            for way, curves in both.items():
                self.curves[way][seen.name] = curves
        except Exception:  # a round must not fail for it
            logger.exception("Case %s is not clicked on", case.get("id"))
        self._done += 1
        self.told(self._done, self.cases)


def known_labels(task: Task, annotated: Sequence[str] | None) -> list[str]:
    """The labels that a label file was drawn for; None: all."""
    known = None if annotated is None else set(task.named(annotated))
    return [label for label in task.labels if known is None or label in known]


def chosen(case: Segmented, known: Sequence[str]) -> list[str]:
    """At most `LABELS` of the labels that a case's reference shows; which ones depends on the case's name, so that all
    get their turn and two versions are asked the same."""
    present = set(np.unique(case.truth).tolist())
    shown = [label for label in known if case.values[label] in present]
    start = zlib.crc32(case.name.encode()) % len(shown) if len(shown) > LABELS else 0
    return [*shown[start:], *shown[:start]][:LABELS]


def curve(case: Segmented, label: str, refiner: Refiner | None) -> list[float]:
    """Dice of one label after each of `CLICKS` of a user who clicks the middle of the largest error; once nothing is
    wrong, the last value stays.

    Args:
        refiner: that answers; None: evidence and cut do.
    """
    value, truth = case.values[label], case.truth == case.values[label]
    labels, points = case.labels, {True: np.zeros((0, 3), np.int64), False: np.zeros((0, 3), np.int64)}
    found = [dice(labels == value, truth)]
    for _ in range(max(CLICKS)):
        correction = click(labels == value, truth, case.spacing)
        if correction is None:
            break
        points[correction.belongs] = np.concatenate([points[correction.belongs], correction.points])
        labels = answered(case, label, Prompts(points[True], points[False]), refiner)
        found.append(dice(labels == value, truth))
    return [found[min(clicks, len(found) - 1)] for clicks in CLICKS]


def answered(
    case: Segmented, label: str, prompts: Prompts, refiner: Refiner | None, settings: Settings | None = None
) -> np.ndarray:
    """The map (H, W, D) as the app answers prompts on one label of a case's first mask.

    Args:
        refiner: that answers; None: evidence and cut do.
        settings: None for the app's own.
    """
    margin = case.margins[label]
    settings = settings or SETTINGS["evidence" if refiner is None else "refiner"]
    return respond(
        case.labels,
        case.values[label],
        case.image,
        case.spacing,
        prompts,
        settings,
        lambda box: margin.on(case.meta, box),
        case.features_in if refiner is not None or settings.pull else None,
        refine=None if refiner is None else refining(refiner, case.text[label], case.spacing),
    )[0]


def dice(mask: np.ndarray, truth: np.ndarray) -> float:
    """2 |A ∩ B| / (|A| + |B|), 1 if both are empty."""
    size = int(mask.sum()) + int(truth.sum())
    return round(2 * int((mask & truth).sum()) / size, 4) if size else 1.0
