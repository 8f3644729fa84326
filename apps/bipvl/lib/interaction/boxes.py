"""Boxes of voxels: the part of a volume that an answer may change."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

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
