"""How far a click speaks: the more a voxel is like the clicked one and the nearer it lies, the more it follows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage
from skimage.graph import MCP_Geometric

LEAST_SPREAD = 1e-3  # of intensities; below it an image counts as flat


@dataclass(frozen=True)
class Reach:
    """How evidence falls off.

    distance: mm at which it has fallen to exp(-1/2), in tissue like the clicked one.
    intensity: how many mm a difference of one standard deviation of the box counts per mm of way.
    gain: of the margin (log odds) at the click itself, at least.
    firm: times the margin that speaks against a click, if that is more: a click overrules even a model that is sure.
    """

    distance: float = 5.0
    intensity: float = 1.0
    gain: float = 3.0
    firm: float = 1.25


def scaled(image: np.ndarray) -> np.ndarray:
    """Intensities (channels, h, w, d) as standard deviations from each channel's mean."""
    flat = image.reshape(len(image), -1).astype(np.float32)
    spread = np.maximum(flat.std(1, keepdims=True), LEAST_SPREAD)
    return ((flat - flat.mean(1, keepdims=True)) / spread).reshape(image.shape)


def path_lengths(image: np.ndarray, spacing: Sequence[float], points: np.ndarray, weight: float) -> np.ndarray:
    """The geodesic distance of each voxel from the nearest of some voxels, (h, w, d) float32, in mm.

    A way through tissue that differs from the clicked voxels by x standard deviations, in the mean of the channels, is
    (1 + weight * x) times as long. Without points it is infinite everywhere.

    Source: geodesic distance on images, Criminisi, Sharp, Blake: "GeoS", ECCV 2008.

    Args:
        image: (channels, h, w, d), the intensities in standard deviations.
        points: (n, 3) voxels within the image.
    """
    shape = image.shape[1:]
    if not len(points):
        return np.full(shape, np.inf, np.float32)
    # What the clicked tissue looks like: the nearest click decides where several are given.
    nearest = _nearest(points, shape, spacing)
    smooth = ndimage.median_filter(image, size=(1, 3, 3, 1))
    cost = 1 + weight * np.abs(smooth - smooth[:, nearest[0], nearest[1], nearest[2]]).mean(0)
    lengths, _ = MCP_Geometric(cost, sampling=tuple(spacing)).find_costs([tuple(p) for p in points])
    return lengths.astype(np.float32)


def evidence(
    margin: np.ndarray,
    image: np.ndarray,
    spacing: Sequence[float],
    inside: np.ndarray,
    outside: np.ndarray,
    reach: Reach,
) -> np.ndarray:
    """What the clicks add to the class's margin: (h, w, d) float32, positive for the class, negative against it.

    exp(-g² / 2 distance²) · gain of the geodesic distance g from the clicks of either kind; the nearer kind decides
    where both speak.

    Args:
        margin: (h, w, d), log odds before the clicks.
        image: (channels, h, w, d), the intensities in standard deviations.
        inside, outside: (n, 3) voxels.
    """
    found = np.zeros(margin.shape, np.float32)
    nearest = np.full(margin.shape, np.inf)
    for points, sign in ((inside, 1.0), (outside, -1.0)):
        if len(points):
            way = path_lengths(image, spacing, points, reach.intensity)
            gain = np.maximum(reach.gain, -sign * reach.firm * margin[_nearest(points, margin.shape, spacing)])
            found = np.where(way < nearest, sign * gain * np.exp(-0.5 * (way / reach.distance) ** 2), found)
            nearest = np.minimum(nearest, way)
    return found.astype(np.float32)


def _nearest(points: np.ndarray, shape: Sequence[int], spacing: Sequence[float]) -> tuple[np.ndarray, ...]:
    """The indices of the nearest of some voxels, in mm as the crow flies: three arrays (h, w, d)."""
    away = _elsewhere(points, shape)
    return tuple(ndimage.distance_transform_edt(away, sampling=spacing, return_distances=False, return_indices=True))


def distance(points: np.ndarray, shape: Sequence[int], spacing: Sequence[float]) -> np.ndarray:
    """(h, w, d) float, mm from the nearest of some voxels; infinite without any."""
    if not len(points):
        return np.full(tuple(shape), np.inf)
    return ndimage.distance_transform_edt(_elsewhere(points, shape), sampling=spacing)


def _elsewhere(points: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """(h, w, d) boolean: all voxels but some."""
    away = np.ones(tuple(shape), bool)
    away[tuple(points.T)] = False
    return away
