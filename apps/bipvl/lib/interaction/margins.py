"""How sure a model is of each class, kept small: log odds against the best rival, in half precision, in a box."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lib.interaction.boxes import Box
from lib.tasks import Task
from lib.volumes.transforms import restore_box

LIMIT = 10.0  # log odds; more than that says nothing more
FAINT = -6.0  # log odds, 0.25%: what lies outside the box of a class is at or below this everywhere
EDGE = 2  # voxels of the network kept around the box

# What of a volume's `meta` says where its file and the network's grid lie.
META = ("affine", "original_affine", "spatial_shape")


@dataclass(frozen=True)
class Margin:
    """Log odds of one class.

    values: (h, w, d) float16, of the box.
    start: first voxel of the box on the network's grid.
    shape: of the network's grid.
    """

    values: Tensor
    start: tuple[int, int, int]
    shape: tuple[int, int, int]

    @property
    def nbytes(self) -> int:
        return self.values.numel() * self.values.element_size()

    def on(self, meta: Mapping[str, Any], box: Box) -> np.ndarray:
        """Log odds on a box of the file's grid, float32; below `FAINT` wherever nothing is kept.

        Args:
            meta: `affine` (of the network's grid), `original_affine`, `spatial_shape`.
        """
        return _restored(self.values[None], self.start, meta, box)[0]


@dataclass(frozen=True)
class Features:
    """What a refiner reads besides: the decoder's features, and the text vector (P,) of each label.

    values: (width, h, w, d) float16, of a box of the network's grid; start: its first voxel.
    """

    values: Tensor
    start: tuple[int, int, int]
    text: Mapping[str, Tensor]

    @property
    def nbytes(self) -> int:
        return self.values.numel() * self.values.element_size()

    def on(self, meta: Mapping[str, Any], box: Box) -> np.ndarray:
        """(width, …) float32 on a box of the file's grid; `meta` as for `Margin.on`. Far from every label the values
        at the edge of what is kept."""
        return _restored(self.values, self.start, meta, box)


def features_near(
    values: Tensor, text: Mapping[str, Tensor], known: Mapping[str, Margin], spacing: Sequence[float], reach: float
) -> Features:
    """Keep the features in the box of all margins, and so many mm around it.

    Args:
        values: (width, h, w, d) float16, of the whole grid.
        text: vector (P,) of each label.
        known: the margins of the labels.
        spacing: of the grid, mm per voxel.
        reach: mm.
    """
    pad = np.ceil(reach / np.asarray(spacing, float)).astype(int)
    low = np.min([m.start for m in known.values()], axis=0) - pad
    high = np.max([np.add(m.start, m.values.shape) for m in known.values()], axis=0) + pad
    low, high = np.maximum(low, 0), np.minimum(high, values.shape[1:])
    i, j, k = (slice(int(a), int(b)) for a, b in zip(low, high, strict=True))
    return Features(values[:, i, j, k].clone(), (i.start, j.start, k.start), text)


def _restored(values: Tensor, start: Sequence[int], meta: Mapping[str, Any], box: Box) -> np.ndarray:
    """Maps (channels, …) of a box of the network's grid that begins at `start`, on a box of the file's grid."""
    moved = torch.as_tensor(meta["affine"], dtype=torch.float64).clone()
    moved[:3, 3] += moved[:3, :3] @ torch.tensor(start, dtype=torch.float64)
    return restore_box(values, {**meta, "affine": moved}, box)


def margins(probabilities: Tensor, task: Task) -> dict[str, Margin]:
    """The margin of each label that annotators draw.

    Exclusive classes: log p_c - log max of the others and the background. Overlapping ones: a label is compared with
    every other label and the background by the log probability that all regions are as it needs them.

    Args:
        probabilities: (channels, h, w, d) of a prediction.
        task: its classes.
    """
    row: Callable[[int], Tensor]
    if task.overlapping:
        assert task.regions is not None
        sets = [set(region.labels) for region in task.regions.values()]
        outcomes = [None, *task.labels]
        row = lambda n: _together(probabilities, [outcomes[n] in names for names in sets])  # noqa: E731
    else:
        outcomes = [None, *task.classes]
        row = lambda n: probabilities[n].float().clamp_min(1e-8).log()  # noqa: E731
    # The best and the second best outcome of each voxel give every outcome its best rival.
    best = row(0)
    second, winner = torch.full_like(best, -torch.inf), torch.zeros(best.shape, dtype=torch.uint8)
    for n in range(1, len(outcomes)):
        value = row(n)
        second = torch.maximum(second, torch.minimum(best, value))
        winner[value > best] = n
        best = torch.maximum(best, value)
    found = {}
    for n, name in enumerate(outcomes):
        if name is not None:
            found[name] = _kept((row(n) - torch.where(winner == n, second, best)).clamp(-LIMIT, LIMIT))
    return found


def _together(probabilities: Tensor, member: list[bool]) -> Tensor:
    """Log probability that each region holds a voxel or not, as `member` says."""
    parts = [p.float() if inside else 1 - p.float() for p, inside in zip(probabilities, member, strict=True)]
    return torch.stack([part.clamp_min(1e-8).log() for part in parts]).sum(0)


def _kept(margin: Tensor) -> Margin:
    shape = tuple(margin.shape)
    shown = margin > FAINT
    if not shown.any():
        shown[0, 0, 0] = True
    ranges = []
    for axis in range(3):
        found = shown.any(dim=tuple(a for a in range(3) if a != axis)).nonzero()
        ranges.append((max(0, int(found.min()) - EDGE), min(shape[axis], int(found.max()) + EDGE + 1)))
    part = margin[tuple(slice(*ends) for ends in ranges)].half().cpu().clone()
    return Margin(part, tuple(ends[0] for ends in ranges), shape)  # type: ignore[arg-type]
