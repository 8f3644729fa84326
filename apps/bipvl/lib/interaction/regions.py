"""What of a new mask is taken over: what a click asks for and what hangs together with it, and nothing else."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

NEIGHBOURS = np.ones((3, 3, 3), bool)  # voxels that touch by a face, an edge or a corner


def connected(change: np.ndarray, seeds: np.ndarray) -> np.ndarray:
    """The connected parts of a boolean map that hold one of the seed voxels, (n, 3)."""
    parts, count = ndimage.label(change, structure=NEIGHBOURS)
    if not count or not len(seeds):
        return np.zeros(change.shape, bool)
    wanted = np.zeros(count + 1, bool)
    wanted[parts[tuple(seeds.T)]] = True
    wanted[0] = False
    return wanted[parts]


def obey(before: np.ndarray, wanted: np.ndarray, inside: np.ndarray, outside: np.ndarray) -> np.ndarray:
    """A mask that follows the clicks: every clicked voxel is as clicked, and everything else is as it was but for the
    parts of the change that hang together with a click of their kind.

    Args:
        before, wanted: boolean masks of one shape.
        inside, outside: (n, 3) clicked voxels.

    Returns:
        A new boolean mask.
    """
    wanted = wanted.copy()
    wanted[tuple(outside.T)] = False
    wanted[tuple(inside.T)] = True
    after = before.copy()
    after[connected(wanted & ~before, inside)] = True
    after[connected(before & ~wanted, outside)] = False
    return after


def free(labels: np.ndarray, value: int, inside: np.ndarray) -> np.ndarray:
    """Where a class may be: other classes keep their voxels, unless a click lies on one of theirs.

    Args:
        labels: the map as it is; 0 is background.
        value: of the class.
        inside: (n, 3) voxels that were clicked as the class's: classes under them may lose voxels, others may not.
    """
    return np.isin(labels, np.unique(np.append(labels[tuple(inside.T)], [0, value])))


def put(labels: np.ndarray, value: int, wanted: np.ndarray, inside: np.ndarray, outside: np.ndarray) -> np.ndarray:
    """A label map after the clicks on one class: `obey`, and other classes keep what is not `free`. What the class
    loses is background.

    Args:
        labels: the map as it is.
        value: of the class.
        wanted: the class's mask as the clicks make it.
        inside, outside: (n, 3) clicked voxels.

    Returns:
        A new map of the same type.
    """
    before = labels == value
    after = obey(before, wanted & free(labels, value, inside), inside, outside)
    result = np.where(before & ~after, 0, labels).astype(labels.dtype)
    result[after] = value
    return result
