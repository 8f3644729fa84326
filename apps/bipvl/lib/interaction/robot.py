"""A robot that corrects masks as people do: where the largest error is, in its middle, or somewhat beside it.

Source of the sampling: nnInteractive (Isensee et al., arXiv 2503.08373) and the competitions before it: the largest
connected error, its innermost voxel. The sloppy user is ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from lib.interaction import boxes
from lib.interaction.regions import NEIGHBOURS


@dataclass(frozen=True)
class Correction:
    """One interaction: the voxels (n, 3) that were pointed at, and whether they belong to the class. `error` is the
    connected error that it answers, a boolean map."""

    points: np.ndarray
    belongs: bool
    error: np.ndarray


def largest_error(mask: np.ndarray, truth: np.ndarray) -> np.ndarray | None:
    """The largest connected part of the voxels that are wrong in one way, missing or too many; None if none is."""
    best: np.ndarray | None = None
    most = 0
    for wrong in (truth & ~mask, mask & ~truth):
        parts, count = ndimage.label(wrong, structure=NEIGHBOURS)
        if count:
            sizes = np.bincount(parts.ravel())[1:]
            if sizes.max() > most:
                most, best = int(sizes.max()), parts == sizes.argmax() + 1
    return best


def depth_of(error: np.ndarray, spacing: Sequence[float]) -> np.ndarray:
    """How deep each voxel lies in an error, in mm from the nearest voxel outside it; the volume's edge is outside."""
    return ndimage.distance_transform_edt(np.pad(error, 1), sampling=spacing)[1:-1, 1:-1, 1:-1]


def click(
    mask: np.ndarray,
    truth: np.ndarray,
    spacing: Sequence[float],
    sloppy: np.random.Generator | None = None,
    miss: tuple[float, float] = (2.0, 6.0),
) -> Correction | None:
    """The next click of a user, None if nothing is wrong.

    Args:
        mask, truth: boolean, of one shape.
        spacing: mm per voxel.
        sloppy: of a user who misses the middle by `miss` mm, and stays within the error if anything of it is there.
    """
    # All that counts lies in the box of what is wrong: on a large volume the rest would take most of the time.
    box = boxes.of_change(mask != truth)
    error = largest_error(mask[box], truth[box])
    if error is None:
        return None
    depth = depth_of(error, spacing)
    point = np.array(np.unravel_index(depth.argmax(), depth.shape))
    if sloppy is not None:
        places = np.argwhere(error)
        away = np.linalg.norm((places - point) * np.asarray(spacing), axis=1)
        reached = sloppy.uniform(*miss)
        point = places[np.abs(away - min(reached, float(away.max()))).argmin()]
    point = point + boxes.corner(box)
    whole = np.zeros(mask.shape, bool)
    whole[box] = error
    return Correction(point[None], bool(truth[tuple(point)]), whole)


def scribble(
    mask: np.ndarray,
    truth: np.ndarray,
    spacing: Sequence[float],
    choose: np.random.Generator,
    length: float = 15.0,
) -> Correction | None:
    """A short stroke in the largest error, in the slice of its innermost voxel; None if nothing is wrong.

    The stroke follows the error's longest way in that slice, through its middle, for at most `length` mm.
    """
    found = click(mask, truth, spacing)
    if found is None:
        return None
    start = found.points[0]
    plane = found.error[..., start[2]]
    inner = ndimage.distance_transform_edt(np.pad(plane, 1), sampling=spacing[:2])[1:-1, 1:-1]
    places = np.argwhere(plane & (inner >= 0.5 * inner[tuple(start[:2])]))
    offset = (places - start[:2]) * np.asarray(spacing[:2])
    near = np.linalg.norm(offset, axis=1) <= length / 2
    places, offset = places[near], offset[near]
    if len(places) > 2:
        _, _, axes = np.linalg.svd(offset - offset.mean(0), full_matrices=False)
        along, across = offset @ axes[0], offset @ axes[1]
        thin = np.abs(across) <= max(spacing[:2]) * 0.75 + choose.uniform(0, 0.5)
        places = places[thin | (np.abs(along) < 1e-9)]
    stroke = np.column_stack([places, np.full(len(places), start[2])])
    stroke = np.unique(np.concatenate([stroke, start[None]]), axis=0)
    return Correction(stroke, found.belongs, found.error)
