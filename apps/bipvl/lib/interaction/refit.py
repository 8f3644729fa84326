"""Re-fit of one class on a few corrected voxels: what must be added to its kernel so that they come out right."""

from __future__ import annotations

import numpy as np
from scipy.special import expit

STEPS = 20  # of Newton's method; it converges in less than ten
TOLERANCE = 1e-6


def refit(features: np.ndarray, margin: np.ndarray, belongs: np.ndarray, weight: np.ndarray, pull: float) -> np.ndarray:
    """The change d of a class's kernel that minimises

        sum_i weight_i · log(1 + exp(-y_i · (margin_i + d · f_i)))  +  pull / 2 · |d|²        y_i = ±1

    by Newton's method with a line search. The head is linear in the decoder's features, so a kernel changed by d has
    the margin + d · f everywhere. Without voxels d is zero: the answer is the text's.

    Source: logistic regression with an offset and a ridge around it (Hoerl & Kennard 1970; le Cessie & van
    Houwelingen 1992).

    Args:
        features: (n, width), with a constant column where the bias may move too.
        margin: (n,), log odds of the class as it is.
        belongs: (n,) boolean.
        weight: (n,), how much each voxel counts.
        pull: towards the kernel as it is, above 0.

    Returns:
        (width,) float64.
    """
    f, m, w = (np.asarray(x, np.float64) for x in (features, margin, weight))
    sign = np.where(belongs, 1.0, -1.0)
    d = np.zeros(f.shape[1])

    def loss(change: np.ndarray) -> float:
        return float((w * np.logaddexp(0, -sign * (m + f @ change))).sum() + pull / 2 * change @ change)

    now = loss(d)
    for _ in range(STEPS):
        p = expit(m + f @ d)
        gradient = f.T @ (w * (p - belongs)) + pull * d
        curvature = (f * (w * p * (1 - p))[:, None]).T @ f + pull * np.eye(len(d))
        step = np.linalg.solve(curvature, gradient)
        size = 1.0
        while (then := loss(d - size * step)) > now - 1e-4 * size * gradient @ step and size > 1e-6:
            size /= 2
        if now - then < TOLERANCE * max(1.0, abs(now)):
            break
        d, now = d - size * step, then
    return d
