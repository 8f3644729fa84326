"""The second stage of a round: a refiner for the network that the round has chosen, which stays as it is.

It learns from simulated corrections (`.training`) of the round's training cases. On a case that the version before had
not been trained on, the errors of that version are those that people really had to correct: they are corrected, too.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from lib.interaction.evidence import Reach
from lib.interaction.prompts import asked_before
from lib.model.nets import BiPVLSeg
from lib.model.nets.refiner import Refiner
from lib.model.refining import fresh
from lib.stores.cases import CLICKS
from lib.tasks import Task
from lib.trainers.refiner.cases import Segmented, segmented, with_errors_of
from lib.trainers.refiner.clicks import known_labels
from lib.trainers.refiner.training import train_refiner
from lib.volumes.transforms import apply, load

logger = logging.getLogger(__name__)

CASES = 40  # that it learns from, at most
BYTES = 2 * 2**30  # of what is kept of them, at most

Told = Callable[[str, int, int], None]  # what is done, how much of it, of how much; may raise to stop


@dataclass(frozen=True)
class Network:
    """A frozen network and its task."""

    model: BiPVLSeg
    task: Task


def train_stage(
    network: Network,
    cases: Sequence[Mapping[str, Any]],
    steps: int,
    seed: int,
    start: Refiner | None = None,
    before: Network | None = None,
    seen: Sequence[str] = (),
    told: Told = lambda *_: None,
) -> tuple[Refiner, dict[str, Any]]:
    """Train a refiner for a network.

    Args:
        network: on the device to use; it is not changed.
        cases: that it was trained on, with `id`, `image`, `label`; at most `CASES` of them, chosen by the seed, are
            used, and only while what is kept of them fits into `BYTES`.
        steps: simulated corrections.
        seed: of everything random.
        start: to go on from, if it fits the network.
        before: the version that the round started from.
        seen: the cases that it, or an ancestor, was trained on.
        told: hears how it goes; may raise to stop.

    Returns:
        The refiner, on the CPU, and what the manifest says of it.

    Raises:
        ValueError: nothing to learn from.
    """
    refiner = fresh(network.model, seed)
    warm = start is not None and _same(refiner, start)
    if warm:
        assert start is not None
        refiner.load_state_dict(start.state_dict())
    elif start is not None:
        logger.info("Refiner: that of the version before does not fit this network; it starts afresh")
    known = _prepared(network, cases, seed, before, seen, told)
    losses: dict[str, float] = {}

    def note(step: int, means: dict[str, float]) -> None:
        losses.update(means)
        told("Refiner", step, steps)
        logger.info("Refiner, step %d/%d: loss %.4f, without it %.4f", step, steps, means["refiner"], means["evidence"])

    train_refiner(refiner, known, steps, seed, Reach(), note)
    real = sum(bool(case.errors) for case in known)
    logger.info("Refiner: learned from %d case(s), %d of them with errors of the version before", len(known), real)
    return refiner.eval(), {
        **{"steps": steps, "cases": len(known), "real_errors": real, "asked": sum(bool(case.asked) for case in known)},
        **{"warm": warm, "losses": losses},
    }


def _same(refiner: Refiner, start: Refiner) -> bool:
    shapes = [{name: tensor.shape for name, tensor in net.state_dict().items()} for net in (refiner, start)]
    return shapes[0] == shapes[1]


def _prepared(
    network: Network,
    cases: Sequence[Mapping[str, Any]],
    seed: int,
    before: Network | None,
    seen: Sequence[str],
    told: Told,
) -> list[Segmented]:
    """The cases as the network sees them, with what the version before made of those that were new to it."""
    order = np.random.default_rng(seed).permutation(len(cases))[:CASES].tolist()
    found: list[Segmented] = []
    size = 0
    for number, place in enumerate(order):
        told("Cases for the refiner", number, len(order))
        case = cases[place]
        with torch.no_grad():
            own = segmented(network.model.eval(), network.task, case, _image(network.task, case))
            own = _of_people(own, network.task, case)
            if before is not None and str(case["id"]) not in seen:
                own = with_errors_of(own, before.model.eval(), before.task, _image(before.task, case))
        if not own.margins:  # drawn for regions alone: no label is told from the others
            continue
        size += own.nbytes
        if found and size > BYTES:
            logger.info("Refiner: %d of %d cases fit into memory", len(found), len(order))
            break
        found.append(own)
    if not found:
        raise ValueError("no training case has a label that a refiner could learn from")
    return found


def _of_people(case: Segmented, task: Task, given: Mapping[str, Any]) -> Segmented:
    """Only the labels that a partial label was drawn for, and what was prompted while it was drawn."""
    known = known_labels(task, given.get("annotated"))
    records = [r for r in given.get(CLICKS) or () if isinstance(r, dict) and r.get("task", task.name) == task.name]
    return replace(
        case,
        margins={label: margin for label, margin in case.margins.items() if label in known},
        asked=asked_before(records, known, case.truth.shape),
    )


def _image(task: Task, case: Mapping[str, Any]) -> Any:
    return apply(load(task, label=False), {"image": case["image"]})["image"]
