"""A graph cut on image and margin, with clicked voxels as hard seeds."""

from __future__ import annotations

import numpy as np
import numpymaxflow
from scipy.special import expit


def graph_cut(
    image: np.ndarray, margin: np.ndarray, inside: np.ndarray, outside: np.ndarray, smooth: float, spread: float
) -> np.ndarray:
    """The mask of least energy: -log probability of each voxel, and `smooth` · exp(-(difference of intensities)² / 2
    spread²) for each pair of neighbours with different labels. Seeds cannot change sides.

    Source: Boykov & Jolly, "Interactive graph cuts", ICCV 2001; the solver is numpymaxflow's.

    Args:
        image: (h, w, d), in standard deviations.
        margin: (h, w, d), log odds of the class.
        inside, outside: (n, 3) voxels.

    Returns:
        (h, w, d) boolean.
    """
    p = expit(margin).astype(np.float32)
    seeds = np.zeros((2, *image.shape), np.float32)
    seeds[0][tuple(outside.T)] = 1
    seeds[1][tuple(inside.T)] = 1
    given = np.ascontiguousarray(image[None], np.float32)
    cut = numpymaxflow.maxflow_interactive(given, np.stack([1 - p, p]), seeds, smooth, spread, connectivity=6)
    return np.asarray(cut) > 0.5
