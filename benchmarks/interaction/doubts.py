"""Whether the places where a model doubts hold its errors."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import ndimage

from lib.infers.explain.doubts import described, doubts
from lib.model.nets import BiPVLSeg
from lib.model.predict import predict
from lib.stores.uploads.names import to_task_values, whole_numbers
from lib.tasks import Task
from lib.volumes.reading import align_label, read_volume
from lib.volumes.transforms import restore

FIRST = (1, 3, 5, 10)
NEAR = 4.0  # mm from the error's nearest voxel
DRAWS = 100
THICK = np.ones((2, 2, 2), bool)  # an error that holds no such cube is the usual blur of a border
NEIGHBOURS = np.ones((3, 3, 3), bool)


class Looked(NamedTuple):
    """Of one case: for each of `FIRST`, whether that many places reach the largest error, and the share of draws in
    which as many random voxels of the mask's border do; places; how many middles are wrong. The first two are None if
    there is no error of two voxels in thickness."""

    reached: list[bool] | None
    chance: list[float] | None
    places: int
    wrong: int


def look(mask: np.ndarray, truth: np.ndarray, voxels: Sequence[Sequence[int]], spacing: Sequence[float]) -> Looked:
    """Compare a mask's places with its errors.

    Args:
        mask, truth: (H, W, D) label values.
        voxels: the middles of the places, in order.
        spacing: mm.
    """
    error = mask != truth
    wrong = sum(bool(error[tuple(voxel)]) for voxel in voxels)
    parts, count = ndimage.label(ndimage.binary_opening(error, THICK), structure=NEIGHBOURS)
    if not count:
        return Looked(None, None, len(voxels), wrong)
    largest = np.bincount(parts.ravel())[1:].argmax() + 1
    away = ndimage.distance_transform_edt(parts != largest, sampling=spacing)
    near = [bool(away[tuple(voxel)] <= NEAR) for voxel in voxels]
    border = np.argwhere((mask > 0) & ~ndimage.binary_erosion(mask > 0))
    close = away[tuple(border.T)] <= NEAR
    generator = np.random.default_rng(0)
    chance = [float(np.mean(generator.choice(close, (DRAWS, n)).any(1))) if len(close) else 0.0 for n in FIRST]
    return Looked([any(near[:n]) for n in FIRST], chance, len(voxels), wrong)


def examined(model: BiPVLSeg, task: Task, cases: Sequence[dict[str, str]], volumes: Iterable[Any]) -> list[Looked]:
    """Of each case; `volumes` are the cases preprocessed."""
    model.eval()
    found = []
    for case, data in zip(cases, volumes, strict=True):
        image, volume = data["image"], read_volume(case["image"])
        probabilities = predict(model, image, task).probabilities
        places = described(doubts(probabilities, task.overlapping, task.spacing), task, image.meta)
        given = whole_numbers(align_label(read_volume(case["label"]), volume).numpy()[0])
        spacing = np.linalg.norm(volume.affine.numpy()[:3, :3], axis=0).tolist()
        mask, truth = restore(probabilities, image, task), to_task_values(given, None, task)
        found.append(look(mask, truth, [place["voxel"] for place in places], spacing))
    return found


def summary(found: Sequence[Looked]) -> dict[str, Any]:
    """Means over cases."""
    reached, chance = ([one for one in both if one] for both in ([f.reached for f in found], [f.chance for f in found]))
    shares = [np.array(both).mean(0).round(3).tolist() for both in (reached, chance)]
    return {
        "cases": len(found),
        "with a thick error": len(reached),
        "places": round(float(np.mean([one.places for one in found])), 1),
        "middles that are wrong": round(sum(one.wrong for one in found) / max(1, sum(one.places for one in found)), 3),
        "largest error reached": dict(zip(map(str, FIRST), shares[0], strict=True)),
        "by chance": dict(zip(map(str, FIRST), shares[1], strict=True)),
    }
