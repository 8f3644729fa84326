"""Boxes of voxels: the part of a volume that an answer may change."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import ndimage

from lib.options import shown

Box = tuple[slice, slice, slice]


def around(points: np.ndarray, reach: float, spacing: Sequence[float], shape: Sequence[int]) -> Box:
    """The box that holds all points and what lies within `reach` mm of them along each axis, cut at the volume's edge.

    Args:
        points: (n, 3) voxels, at least one.
        spacing: mm per voxel.
        shape: of the volume, in voxels.
    """
    margin = np.ceil(reach / np.asarray(spacing, float)).astype(int)
    low = np.maximum(points.min(0) - margin, 0)
    high = np.minimum(points.max(0) + margin + 1, shape)
    return tuple(slice(int(a), int(b)) for a, b in zip(low, high, strict=True))  # type: ignore[return-value]


def corner(box: Box) -> tuple[int, int, int]:
    """Its first voxel."""
    return tuple(part.start for part in box)  # type: ignore[return-value]


def of_numbers(given: Any, shape: Sequence[int], to_voxels: np.ndarray | None = None) -> Box | None:
    """A box that a person drew, as clients send it: [i0, i1, j0, j1, k0, k1], both ends belong to it, in either order.
    What sticks out of the image is cut off. None if none was drawn.

    Args:
        shape: of the image, in voxels.
        to_voxels: (4, 4), if the numbers are not voxels.

    Raises:
        ValueError: no six numbers, or a box beside the image.
    """
    if given is None or given == []:
        return None
    if not isinstance(given, (list, tuple)) or len(given) != 6 or not all(_number(n) for n in given):
        raise ValueError(f"roi: expected [i0, i1, j0, j1, k0, k1], got {shown(given)}")
    corners = np.asarray(given, float).reshape(3, 2).T
    if to_voxels is not None:
        corners = corners @ to_voxels[:3, :3].T + to_voxels[:3, 3]
    low, high = (np.clip(np.rint(ends(corners, axis=0)), -1, shape).astype(int) for ends in (np.min, np.max))
    if (high < 0).any() or (low >= shape).any():
        ends = ", ".join(f"0 to {size - 1}" for size in shape)
        raise ValueError(f"roi: the box {shown(given)} is beside the image; valid are {ends}")
    return tuple(
        slice(max(0, int(a)), int(b) + 1) for a, b in zip(low, np.minimum(high, np.subtract(shape, 1)), strict=True)
    )  # type: ignore[return-value]


def common(one: Box, other: Box | None) -> Box:
    """What two boxes share; they must share something."""
    if other is None:
        return one
    ends = [(max(a.start, b.start), min(a.stop, b.stop)) for a, b in zip(one, other, strict=True)]
    assert all(start < stop for start, stop in ends), "boxes that share nothing"
    return tuple(slice(*pair) for pair in ends)  # type: ignore[return-value]


def holds(box: Box, points: np.ndarray) -> np.ndarray:
    """(n,) boolean: which of some voxels (n, 3) are in a box."""
    low, high = ([getattr(part, end) for part in box] for end in ("start", "stop"))
    return ((points >= low) & (points < high)).all(1)


def of_change(moved: np.ndarray) -> Box:
    """The box of the true voxels of a map; its first voxel if none is."""
    found = ndimage.find_objects(moved.view(np.uint8))
    return found[0] if found else (slice(0, 1),) * 3


def _number(value: Any) -> bool:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number of hundreds of digits
        return False
