"""Errors injected into masks, and into the images under them: shifted, grown and mirrored, on the network's grid."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.ndimage import distance_transform_edt
from torch import Tensor

SHIFTS = (6.0, 9.0, 15.0)  # mm in the slice
GROWTHS = (3.0, 6.0, 9.0)
MARGIN = 3.0  # mm around an organ that its filling is not taken from


@dataclass(frozen=True)
class Injected:
    """A mask with an error; `came_from` (3, n): where the content of each of its voxels, in order, was before."""

    kind: str
    mask: Tensor
    came_from: Tensor


def errors(mask: Tensor, spacing: Sequence[float]) -> Iterator[Injected]:
    """Errors of one mask, (h, w, d) boolean and not empty: shifts to four sides, growth within the slices, the mirror
    image left to right within the image (an error of orientation) and within the mask's own box."""
    at = torch.nonzero(mask).T
    for mm in SHIFTS:
        for axis, sign in ((0, 1), (0, -1), (1, 1), (1, -1)):
            step = torch.zeros(3, 1, dtype=torch.long)
            step[axis] = sign * round(mm / spacing[axis])
            yield _moved(f"shift {mm:.0f} mm", mask, at, at + step)
    away, nearest = _nearest(mask, spacing)
    for mm in GROWTHS:
        grown = away <= mm + 1e-3
        yield Injected(f"growth {mm:.0f} mm", grown, nearest[:, grown])
    low, high = int(at[0].min()), int(at[0].max())
    for kind, total in (("mirror in image", len(mask) - 1), ("mirror in box", low + high)):
        other = at.clone()
        other[0] = total - at[0]
        yield _moved(kind, mask, at, other)


def painted(image: Tensor, mask: Tensor, error: Injected, spacing: Sequence[float]) -> Tensor:
    """The image (channels, h, w, d) in which the organ under `mask` looks as the error says; where it was and no longer
    is lies what surrounded it."""
    away, _ = _nearest(mask, spacing)
    surrounding = away > MARGIN + 1e-3
    _, nearest = _nearest(surrounding, spacing)
    result = image.clone()
    x, y, z = nearest[:, mask]
    result[:, mask] = image[:, x, y, z]
    x, y, z = error.came_from
    result[:, error.mask] = image[:, x, y, z]
    return result


def _moved(kind: str, mask: Tensor, at: Tensor, to: Tensor) -> Injected:
    size = torch.tensor(mask.shape)[:, None]
    kept = ((to >= 0) & (to < size)).all(0)
    source = torch.zeros(3, *mask.shape, dtype=torch.long)
    result = torch.zeros_like(mask)
    x, y, z = to[:, kept]
    result[x, y, z] = True
    source[:, x, y, z] = at[:, kept]
    return Injected(kind, result, source[:, result])


def _nearest(mask: Tensor, spacing: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Distance of each voxel to the mask within its slice, mm, and the place of the nearest voxel of the mask. Slices
    without the mask are far from it."""
    far = (spacing[0], spacing[1], 1e4)
    away, places = distance_transform_edt(~mask.numpy(), sampling=far, return_indices=True)
    return torch.from_numpy(away), torch.from_numpy(places.astype(np.int64))
