"""A refiner and the version it belongs to: how it is kept in the version's checkpoint, and how it answers.

It stands beside the network's weights, which it never touches: a version with a refiner draws the same first mask, bit
for bit, as without it, and versions from before there were refiners stay valid.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from lib.interaction.answer import Refine, Settings
from lib.interaction.memory import Trained
from lib.model.checkpoints import CheckpointError, brief
from lib.model.nets import BiPVLSeg
from lib.model.nets.refiner import Refiner
from lib.tasks import Task

logger = logging.getLogger(__name__)

KEY = "refiner"  # in a checkpoint

Way = Literal["evidence", "refiner"]
WAYS: tuple[Way, ...] = ("evidence", "refiner")
# A refiner has learned where the border runs: a cut after it would move it again. It sees boxes as large as those that
# it learned from (`lib.trainers.refiner.training.HALF`).
SETTINGS: dict[Way, Settings] = {"evidence": Settings(), "refiner": Settings(smooth=0.0, around=16.0)}


@dataclass(frozen=True)
class Kept:
    """The refiner of a version.

    answers: whether it answered clicks on the round's validation cases better than the evidence alone: it then answers
        unless a request asks for the other way.
    """

    refiner: Refiner
    answers: bool

    @property
    def way(self) -> Way:
        """Which way the version answers by itself."""
        return "refiner" if self.answers else "evidence"

    @property
    def trained(self) -> Trained:
        """As a session keeps it."""
        return Trained(partial(refining, self.refiner), self.answers)


def fresh(model: BiPVLSeg, seed: int) -> Refiner:
    """An untrained refiner for the features and texts of a network; global random numbers stay as they are."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Refiner(model.vision.feature_width, model.project_text.out_features)


def to_entry(refiner: Refiner, answers: bool = False) -> dict[str, Any]:
    """What a checkpoint keeps under `KEY`: plain data and tensors."""
    weights = {name: tensor.detach().cpu().clone() for name, tensor in refiner.state_dict().items()}
    return {"widths": list(refiner.widths), "weights": weights, "answers": answers}


def restore_refiner(checkpoint: dict[str, Any], model: BiPVLSeg, path: Path | str = "checkpoint") -> Kept | None:
    """The refiner of a checkpoint, in evaluation mode; None if it has none.

    Args:
        model: the checkpoint's network.
        path: for messages.

    Raises:
        CheckpointError: one that does not fit the network, or whose weights are not finite.
    """
    entry = checkpoint.get(KEY)
    if entry is None:
        return None
    try:
        widths = [int(width) for width in entry["widths"]]
        refiner = Refiner(model.vision.feature_width, model.project_text.out_features, widths)
        refiner.load_state_dict(entry["weights"])
        answers = bool(entry["answers"])
    except Exception as error:  # what an uploaded file may hold fails in many ways
        raise CheckpointError(f"{path}: the refiner does not fit: {brief(error)}") from error
    if not all(torch.isfinite(tensor).all() for tensor in refiner.state_dict().values()):
        raise CheckpointError(f"{path}: the weights of the refiner hold NaN or infinity")
    return Kept(refiner.eval(), answers)


def usable_refiner(checkpoint: dict[str, Any], model: BiPVLSeg, path: Path) -> Kept | None:
    """The refiner of a version; None if it has none, or one that does not fit, which the log says. The version draws
    its masks all the same."""
    try:
        return restore_refiner(checkpoint, model, path)
    except CheckpointError as error:
        logger.error("%s; clicks are answered without it", error)
        return None


def refining(refiner: Refiner, text: Tensor, spacing: Sequence[float]) -> Refine:
    """What a refiner adds to the margin of one class, as `lib.interaction.answer.answer` asks for it.

    Args:
        text: (P,), of the class.
        spacing: mm per voxel.
    """

    @torch.no_grad()
    def refine(maps: np.ndarray, features: np.ndarray) -> np.ndarray:
        given = (torch.from_numpy(np.ascontiguousarray(part, np.float32))[None] for part in (maps, features))
        return refiner(*given, text[None].float(), spacing)[0].numpy()

    return refine


def text_of_labels(text: Tensor, task: Task) -> dict[str, Tensor]:
    """Class vectors (C, P) to those of the labels that annotators draw: a label's own class, or the smallest region
    that holds it."""
    if task.regions is None:
        return dict(zip(task.classes, text, strict=True))
    found = {}
    for name in task.labels:
        own = [i for i, region in enumerate(task.regions.values()) if name in region.labels]
        sizes = [len(list(task.regions.values())[i].labels) for i in own]
        found[name] = text[own[int(np.argmin(sizes))]] if own else text.mean(0)
    return found
