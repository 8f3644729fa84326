"""What a refiner sees of a box: image, margin, masks, and clicks as maps."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lib.interaction.evidence import distance, path_lengths, scaled
from lib.interaction.prompts import Prompts

CHANNELS = 8  # besides the decoder's features
NEAR = 2.5  # mm at which the near map of a click has fallen to exp(-1/2)
FAR = 12.0  # likewise of its far map, along ways through like tissue
WEIGHT = 1.0  # of intensities on such ways (`lib.interaction.evidence.Reach`)
MOST = 6.0  # log odds of the margin; more says nothing more


def guidance(
    margin: np.ndarray,
    image: np.ndarray,
    mask: np.ndarray,
    others: np.ndarray,
    spacing: Sequence[float],
    prompts: Prompts,
) -> np.ndarray:
    """Eight maps of a box: (CHANNELS, h, w, d) float32.

    0 the image (mean of its channels, in standard deviations), 1 the margin / 3, 2 the class's present mask, 3 where
    other classes are, 4 and 5 nearness to a prompt inside and outside, 6 and 7 likewise along geodesic ways, far.

    Args:
        margin: (h, w, d) log odds.
        image: (channels, h, w, d).
        mask, others: (h, w, d) boolean.
        spacing: mm per voxel.
        prompts: in voxels of the box.
    """
    seen = scaled(image)
    ways = [path_lengths(seen, spacing, points, WEIGHT) for points in (prompts.inside, prompts.outside)]
    straight = [distance(points, margin.shape, spacing) for points in (prompts.inside, prompts.outside)]
    maps = [seen.mean(0), np.clip(margin, -MOST, MOST) / 3, mask, others]
    maps += [np.exp(-0.5 * (way / NEAR) ** 2) for way in straight]
    maps += [np.exp(-0.5 * (way / FAR) ** 2) for way in ways]
    return np.stack([np.asarray(part, np.float32) for part in maps])
