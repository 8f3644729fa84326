"""Where a model still doubts: the places of an image that deserve a look, in order.

A voxel is doubtful if the binary entropy of its class, that is, of being of it or not,

    H(p) = −p · log2(p) − (1 − p) · log2(1 − p)

is at least `LEAST`. Its class is the most probable one; where classes overlap, the one of the largest entropy. Such
voxels form a thin shell around every structure, which hangs together and would be one place. So it is cut up: where the
doubt around a voxel is largest (a Gaussian mean), a place begins, and it takes the doubtful voxels of the class that
hang together with that voxel within `REACH`, or within twice its depth where the shell is thick. Then the next one,
from what is left. How often such places hold errors is measured in docs/research/explanation.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from lib.interaction import boxes
from lib.interaction.boxes import Box
from lib.tasks import Task
from lib.volumes.itk import LPS_TO_RAS

LEAST = 0.7  # bits; probabilities of about 0.19 to 0.81
REACH = 8.0  # mm from the middle of a place to its end
SPREAD = 3.0  # mm, sigma of the Gaussian
SMALLEST = 27.0  # mm³, a cube of 3 mm: what is smaller is noise
FEWEST = 8  # voxels, likewise
MOST = 10  # places of an image
TRIES = 200  # places that are looked at, those that are too small counted
PART = 32  # slices that are looked at at once
CHANCE = 1e-3  # of depth in mm against the Gaussian mean: it only decides between voxels that are alike
NEIGHBOURS = np.ones((3, 3, 3), bool)


class Place(NamedTuple):
    """Where a model doubts, on the grid of its probabilities.

    row: of the class, from 0. rival: of the class that is the likeliest instead; None: none of them.
    voxel: the middle of the place, one of its voxels. box: what holds all of them.
    volume: mm³. entropy: mean binary entropy of the class, bits, at most 1. probability: mean, of the class.
    """

    row: int
    rival: int | None
    voxel: tuple[int, int, int]
    box: Box
    volume: float
    entropy: float
    probability: float


def doubts(probabilities: Tensor, overlapping: bool, spacing: Sequence[float], most: int = MOST) -> list[Place]:
    """The places of an image where the model doubts most, those with the most doubt (volume times entropy) first.

    Args:
        probabilities: (channels, h, w, d), background first unless classes overlap.
        overlapping: no background channel; a voxel may be of several classes.
        spacing: mm of the grid.
        most: how many places at most.

    >>> p = torch.full((2, 9, 9, 9), 0.0)
    >>> p[0], p[1, 2:7, 2:7, 2:7] = 1.0, 0.5  # 125 voxels that may as well be of the class
    >>> p[0] -= p[1]
    >>> [(place.voxel, place.volume, place.entropy) for place in doubts(p, False, (1.0, 1.0, 1.0))]
    [((4, 4, 4), 125.0, 1.0)]
    """
    entropy, row = _doubt(probabilities, overlapping)
    unsure = entropy >= LEAST
    if not unsure.any():
        return []
    crop = boxes.of_change(unsure)
    start = boxes.corner(crop)
    classes = probabilities if overlapping else probabilities[1:]
    places = []
    for middle, region in _regions(np.where(unsure, entropy, 0)[crop], row[crop], spacing, most):
        voxels = region + start
        i, j, k = torch.from_numpy(voxels.T)
        low, high = voxels.min(0), voxels.max(0) + 1
        number = int(row[tuple(voxels[0])])
        place = Place(
            row=number,
            rival=None if overlapping else _rival(probabilities[:, i, j, k].float().mean(1), number),
            voxel=tuple(int(n) for n in middle + start),  # type: ignore[arg-type]
            box=tuple(slice(int(a), int(b)) for a, b in zip(low, high, strict=True)),  # type: ignore[arg-type]
            volume=len(voxels) * math.prod(spacing),
            entropy=float(entropy[tuple(voxels.T)].mean()),
            probability=float(classes[number, i, j, k].mean()),
        )
        places.append(place)
    return sorted(places, key=lambda place: -place.volume * place.entropy)


def _doubt(probabilities: Tensor, overlapping: bool) -> tuple[np.ndarray, np.ndarray]:
    """Binary entropy of each voxel's class in bits, and the class: (h, w, d) each."""
    entropies, rows = [], []
    for p in probabilities.split(PART, dim=1):
        entropy, row = (_binary(p) if overlapping else p[1:]).max(0)
        entropies.append(entropy if overlapping else _binary(entropy))
        rows.append(row.short())
    return torch.cat(entropies).cpu().numpy(), torch.cat(rows).cpu().numpy()


def _binary(p: Tensor) -> Tensor:
    p = p.float().clamp(0, 1)
    return (torch.special.entr(p) + torch.special.entr(1 - p)) / math.log(2)


def _rival(means: Tensor, row: int) -> int | None:
    """The likeliest other channel of a place, as a class."""
    others = means.clone()
    others[row + 1] = -1
    best = int(others.argmax())
    return best - 1 if best else None


def _regions(
    doubt: np.ndarray, row: np.ndarray, spacing: Sequence[float], most: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The middle (3,) and the voxels (n, 3) of each place that is not too small, in the order in which they are found.

    Args:
        doubt: (h, w, d) entropy, 0 where there is none.
        row: (h, w, d) the class.
        spacing: mm.
        most: how many at most.
    """
    free = doubt > 0
    # What lies past the edge is known no better than what is certain.
    depth = ndimage.distance_transform_edt(np.pad(free, 1), sampling=spacing)[1:-1, 1:-1, 1:-1]
    around = ndimage.gaussian_filter(doubt, [SPREAD / mm for mm in spacing], mode="constant")
    score = (around + CHANCE * depth)[free]
    order = np.argwhere(free)[np.argsort(-score, kind="stable")]
    least = max(FEWEST, SMALLEST / math.prod(spacing))
    tries = found = 0
    for middle in order:
        if not free[tuple(middle)]:
            continue
        if tries == TRIES or found == most:
            return
        tries += 1
        reach = max(REACH, 2 * float(depth[tuple(middle)]))
        box = boxes.around(middle[None], reach, spacing, doubt.shape)
        offsets = np.ogrid[box]
        distance = sum(((grid - n) * mm) ** 2 for grid, n, mm in zip(offsets, middle, spacing, strict=True))
        same = free[box] & (row[box] == row[tuple(middle)]) & (distance <= reach**2)
        pieces, _ = ndimage.label(same, structure=NEIGHBOURS)
        start = np.array(boxes.corner(box))
        region = np.argwhere(pieces == pieces[tuple(middle - start)]) + start
        free[tuple(region.T)] = False
        if len(region) >= least:
            found += 1
            yield middle, region


def described(places: Sequence[Place], task: Task, meta: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Places as clients read them, on the grid of the file.

    Args:
        task: whose classes they are of.
        meta: `affine` (of the grid that they were found on), `original_affine`, `spatial_shape`.

    Returns:
        For each place `id`; `label`, which a person would correct; `class`, the model's; `instead`, what it may be
        otherwise; `voxel` and `box` ([first, last] along each axis) in voxels of the file; `centre` and `corners` in
        DICOM's millimetres; `extent`, mm along each axis, `volume` in mm³, `entropy` in bits, `probability` of the
        class; `why`, a sentence.
    """
    affine, original = (np.asarray(meta[key], float) for key in ("affine", "original_affine"))
    shape = np.array([int(n) for n in meta["spatial_shape"][:3]])
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    to_file, to_lps = np.linalg.inv(original) @ affine, LPS_TO_RAS @ original
    found: dict[str, dict[str, Any]] = {}
    for place in places:
        name = task.classes[place.row]
        label = _label(name, task)
        last = [part.stop - 1 for part in place.box]
        sizes = [part.stop - part.start for part in place.box]
        corners = np.array(np.meshgrid(*zip(boxes.corner(place.box), last, strict=True))).reshape(3, -1).T
        voxel = _moved(np.array([place.voxel]), to_file, shape)[0]
        ends = _moved(corners, to_file, shape)
        low, high = ends.min(0), ends.max(0)
        instead = "background" if place.rival is None else task.classes[place.rival]
        entry = {
            "id": "-".join(str(n) for n in (task.label_values[label], *voxel)),
            "label": label,
            "class": name,
            "instead": "not" if task.overlapping else instead,
            "voxel": voxel.tolist(),
            "box": np.stack([low, high], 1).tolist(),
            "centre": _millimetres(voxel, to_lps),
            "corners": [_millimetres(low, to_lps), _millimetres(high, to_lps)],
            "extent": [round(float(n * mm), 1) for n, mm in zip(sizes, spacing, strict=True)],
            "volume": round(place.volume, 1),
            "entropy": round(place.entropy, 3),
            "probability": round(place.probability, 3),
        }
        entry["why"] = f"The model is {place.probability:.0%} sure of {name}."
        if not task.overlapping:
            entry["why"] = f"{entry['why'][:-1]}; {instead} comes next."
        found.setdefault(entry["id"], entry)
    return list(found.values())


def _label(name: str, task: Task) -> str:
    """What a person would draw to change a class: of a region, the label that no smaller region has."""
    if not task.overlapping:
        return name
    assert task.regions is not None
    own = set(task.regions[name].labels)
    smaller = [set(region.labels) for region in task.regions.values() if set(region.labels) < own]
    left = own.difference(*smaller) or own
    return next(label for label in task.labels if label in left)


def _moved(voxels: np.ndarray, affine: np.ndarray, shape: np.ndarray) -> np.ndarray:
    """The nearest voxels (n, 3) of another grid."""
    return np.clip(np.rint(voxels @ affine[:3, :3].T + affine[:3, 3]), 0, shape - 1).astype(int)


def _millimetres(voxel: np.ndarray, affine: np.ndarray) -> list[float]:
    return [round(float(mm), 3) for mm in affine[:3, :3] @ voxel + affine[:3, 3]]
