"""The strategies behind *Next Sample*, as MONAI Label calls them.

The contract of each: never a labelled image, None if none is left, the same pick for the same seed, whatever the order
in which the datastore lists its images, and the reported score is that of the returned image. Cases that others work on
are left out by the store that a strategy gets (`lib.activelearning.leases.Offer`).
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lib.activelearning.ranking import RANKINGS, Ranking, choose
from lib.activelearning.scoring import cache
from lib.activelearning.scoring.cache import CaseScores
from lib.options import Choice, Number, OptionTable
from lib.upstream import Strategy

SEED = Number("seed", -1, "seed of the random choices; below 0: a new one each time")
DESCRIPTIONS = {
    "uncertainty": "The case whose mask the model is least sure of (predictive entropy over the foreground)",
    "alignment": "The case where text and image agree least (low class-wise alignment)",
    "diverse": "The case that looks least like those already labelled (farthest in V_4)",
    "combined": "First in the mean rank of uncertainty, alignment and diverse",
}


class _Unlabelled(Strategy):
    """What all share: the candidates, and a table of options."""

    options = OptionTable()

    def info(self) -> dict[str, Any]:
        return {"description": self.description, "config": self.config()}

    def config(self) -> dict[str, Any]:
        """Options as clients show them."""
        return self.options.offer()

    def __call__(self, request: Mapping[str, Any], datastore: Any) -> dict[str, Any] | None:
        """The image to annotate next, under `id`; None if there is none.

        Raises:
            ValueError: an option that cannot be used.
        """
        asked = self.options.full(request)
        cases = sorted(set(datastore.get_unlabeled_images(request.get("label_tag"), request.get("labels"))))
        return self.pick(cases, asked, datastore) if cases else None

    def pick(self, cases: list[str], request: Mapping[str, Any], datastore: Any) -> dict[str, Any]:
        raise NotImplementedError


class First(_Unlabelled):
    """In the order of the names."""

    def __init__(self) -> None:
        super().__init__("The first case in the order of the names")

    def pick(self, cases: list[str], request: Mapping[str, Any], datastore: Any) -> dict[str, Any]:
        return {"id": cases[0], "method": "first"}


class Random(_Unlabelled):
    """Any case, each with the same chance. Without a seed, cases that were never offered come first, so that whoever
    skips a case with *Next Sample* is not given it again at once."""

    def __init__(self) -> None:
        super().__init__("Any case, those that were never offered first")
        self.options = OptionTable(SEED)

    def pick(self, cases: list[str], request: Mapping[str, Any], datastore: Any) -> dict[str, Any]:
        seed = _seed(request)
        if seed is None:
            cases = [case for case in cases if not datastore.get_image_info(case).get("strategy")] or cases
        return {"id": random.Random(seed).choice(cases), "method": "random"}


class Ranked(_Unlabelled):
    """The case that a ranking puts first, by the scores that are kept in the images' infos.

    Scores of different versions are not compared: those of the version count that has scored most of the free cases,
    the served one if two have scored as many. Without any, the choice is random, and the answer says so.

    Args:
        name: of the strategy.
        ranking: what makes a case worth annotating.
        models: names of the tasks served, the default first.
        served: the served version of a model, 0 if there is none.
    """

    def __init__(self, name: str, ranking: Ranking, models: Sequence[str], served: Callable[[str], int]) -> None:
        super().__init__(DESCRIPTIONS[name])
        self.name, self.ranking, self.served = name, ranking, served
        self.options = next_case_options(models)

    def pick(self, cases: list[str], request: Mapping[str, Any], datastore: Any) -> dict[str, Any]:
        model = request["model"]
        served, infos = self.served(model), {case: datastore.get_image_info(case) for case in cases}
        version, scores = _most(infos, model, served)
        if not scores:
            picked = random.Random(_seed(request)).choice(cases)
            return {"id": picked, "method": "random", "note": _why_random(self.name, model, served)}
        known = _known(datastore, model, version)
        ((case, value),) = choose(self.ranking, scores, list(known.values()))
        note = _note(model, version, served, len(scores), len(cases))
        return {
            "id": case,
            "method": self.name,
            "score": round(value, 6),
            "version": version,
            "scored": len(scores),
            "note": note,
        }


def strategies(models: Sequence[str], served: Callable[[str], int], default: str = "random") -> dict[str, Strategy]:
    """All strategies by name, the default first: clients preselect the first."""
    found: dict[str, Strategy] = {"random": Random(), "first": First()}
    found |= {name: Ranked(name, ranking, models, served) for name, ranking in RANKINGS.items()}
    return {default: found[default], **found}


def next_case_options(models: Sequence[str]) -> OptionTable:
    """The table of `POST /activelearning/<strategy>`: of those that rank; `random` has the seed alone, `first` nothing.

    Args:
        models: names of the tasks served, the default first.
    """
    first = next(iter(models), "")
    said, what = "the first task", "whose scores count, if the server has several tasks"
    return OptionTable(Choice("model", first, what, said, choices=tuple(models), what="model"), SEED)


def _seed(request: Mapping[str, Any]) -> int | None:
    seed = request["seed"]
    return None if seed < 0 else seed


def _most(infos: Mapping[str, Mapping[str, Any]], model: str, served: int) -> tuple[int, dict[str, CaseScores]]:
    """The version that has scored most of the cases, and their scores by it; only vectors of one width go together."""
    found: dict[int, dict[str, CaseScores]] = {}
    for case, info in infos.items():
        version, scores = cache.version_of(info, model), cache.scores_of(info, model)
        if version is not None and scores is not None:
            found.setdefault(version, {})[case] = scores
    if not found:
        return 0, {}
    version = max(found, key=lambda v: (len(found[v]), v == served, v))
    width = Counter(s.vector.size for s in found[version].values()).most_common(1)[0][0]
    return version, {case: s for case, s in found[version].items() if s.vector.size == width}


def _known(datastore: Any, model: str, version: int) -> dict[str, CaseScores]:
    """Scores, by the same version, of the cases that are labelled or that others work on."""
    found = {}
    for case in sorted({*datastore.get_labeled_images(), *getattr(datastore, "taken", ())}):
        try:
            info = datastore.get_image_info(case)
        except ValueError:  # leased, and gone since
            continue
        scores = cache.scores_of(info, model)
        if scores is not None and cache.version_of(info, model) == version:
            found[case] = scores
    return found


def _why_random(name: str, model: str, served: int) -> str:
    if not served:
        return f"{name}: {model} has no published version yet, so nothing can be scored; chosen at random"
    return f"{name}: version {served} of {model} has scored none of the free cases yet; chosen at random"


def _note(model: str, version: int, served: int, scored: int, cases: int) -> str:
    parts = []
    if version != served:
        parts.append(
            f"these are scores of version {version} of {model}; version {served} has scored fewer cases so far"
        )
    if scored < cases:
        parts.append(f"{scored} of {cases} free cases are scored")
    return "; ".join(parts)
