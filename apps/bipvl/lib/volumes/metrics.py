"""Dice, Hausdorff distance and surface Dice of each class, computed by MONAI in millimetres.

Empty masks: a class absent from both volumes is not counted (NaN in all three). A class present in only one of them has
Dice 0 and surface Dice 0; its Hausdorff distance is undefined and not counted (NaN), because any finite stand-in would
be arbitrary and infinity would hide every other case. The number of cases counted, `n`, therefore stands beside each
mean: an HD95 over fewer cases than the Dice says that some masks were missing.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
from monai.metrics import compute_dice, compute_hausdorff_distance, compute_surface_dice
from rich.table import Table
from torch import Tensor

from lib.tasks import Task
from lib.volumes.reading import align_label, encode, read_volume

METRICS = ("dice", "hd95", "nsd")


@dataclass(frozen=True)
class Row:
    """One class of one case: Dice, HD95 in mm, surface Dice, and voxels of both masks. NaN if not counted."""

    case: str
    name: str
    dice: float
    hd95: float
    nsd: float
    prediction_voxels: int
    reference_voxels: int


@dataclass(frozen=True)
class Statistic:
    """Mean and standard deviation (n in the denominator) over what is counted; NaN if n is 0."""

    mean: float
    std: float
    n: int


def evaluate_case(task: Task, prediction: Path, reference: Path, case: str, tolerance: float = 2.0) -> list[Row]:
    """Score a predicted label file against a reference label file of the same image.

    Raises:
        ValueError: a file cannot be read, has unknown label values, or the two lie on different grids.
    """
    target = read_volume(reference)
    found = align_label(read_volume(prediction), target)
    affine = target.affine.numpy()
    spacing = np.linalg.norm(affine[:3, :3], axis=0).tolist()
    return evaluate_volumes(task, found.numpy()[0], target.numpy()[0], spacing, case, tolerance)


def evaluate_volumes(
    task: Task,
    prediction: np.ndarray,
    reference: np.ndarray,
    spacing: Sequence[float],
    case: str = "",
    tolerance: float = 2.0,
) -> list[Row]:
    """Score a predicted label volume against a reference on the same grid, one row per class of the task.

    Args:
        prediction: (H, W, D) label values, as files hold them; regions are formed from them if classes overlap.
        reference: the same.
        spacing: voxel size along the three axes, mm.
        tolerance: of the surface Dice, mm: surface voxels this near to the other surface count as agreeing.

    Raises:
        ValueError: different shapes, or unknown label values.
    """
    if prediction.shape != reference.shape:
        raise ValueError(f"case {case!r}: prediction {prediction.shape}, reference {reference.shape}: shapes differ")
    found = _masks(prediction, task, f"prediction of case {case!r}")
    target = _masks(reference, task, f"reference of case {case!r}")
    return evaluate_masks(task.classes, found, target, spacing, case, tolerance)


def dice_of_classes(task: Task, prediction: np.ndarray, reference: np.ndarray, case: str = "") -> dict[str, float]:
    """Dice of each class of the task: what `evaluate_volumes` says, without the distances, which take longer.

    Raises:
        ValueError: as `evaluate_volumes`.
    """
    if prediction.shape != reference.shape:
        raise ValueError(f"case {case!r}: prediction {prediction.shape}, reference {reference.shape}: shapes differ")
    found = _masks(prediction, task, f"prediction of case {case!r}")
    target = _masks(reference, task, f"reference of case {case!r}")
    result = {}
    for name, p, r in zip(task.classes, found, target, strict=True):
        voxels = int(p.sum()) + int(r.sum())
        result[name] = 2 * int((p & r).sum()) / voxels if voxels else math.nan
    return result


def evaluate_masks(
    names: Sequence[str],
    found: Sequence[Tensor] | Tensor,
    target: Sequence[Tensor] | Tensor,
    spacing: Sequence[float],
    case: str = "",
    tolerance: float = 2.0,
) -> list[Row]:
    """Score boolean masks (H, W, D), a predicted and a reference one for each name; else as `evaluate_volumes`."""
    spacing = [float(s) for s in spacing]
    rows = []
    for name, p, r in zip(names, found, target, strict=True):
        voxels = int(p.sum()), int(r.sum())
        dice = hd95 = nsd = math.nan
        if all(voxels):
            # Distances only need the box around both masks; a voxel of margin keeps their surfaces closed.
            p, r = _crop(p, r)
            dice = float(compute_dice(p, r))
            hd95 = float(compute_hausdorff_distance(p, r, include_background=True, percentile=95, spacing=spacing))
            nsd = float(compute_surface_dice(p, r, [tolerance], include_background=True, spacing=spacing))
        elif any(voxels):
            dice = nsd = 0.0
        rows.append(Row(case, name, dice, hd95, nsd, *voxels))
    return rows


def summary(rows: Sequence[Row]) -> dict[str, dict[str, Statistic]]:
    """Class name to metric to its statistic over cases; under `mean`, the statistic over the classes' means."""
    result: dict[str, dict[str, Statistic]] = {}
    for name in dict.fromkeys(row.name for row in rows):
        mine = [row for row in rows if row.name == name]
        result[name] = {m: _statistic([getattr(row, m) for row in mine]) for m in METRICS}
    result["mean"] = {m: _statistic([s[m].mean for s in result.values()]) for m in METRICS}
    return result


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """One line per row. What is not counted is an empty field."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([f.name for f in fields(Row)])
        writer.writerows(["" if v != v else v for v in asdict(row).values()] for row in rows)


def write_json(rows: Sequence[Row], path: Path) -> None:
    """`{"rows": […], "summary": {class: {metric: {mean, std, n}}}}`; what is not counted is null."""
    statistics = {name: {m: _plain(asdict(s)) for m, s in values.items()} for name, values in summary(rows).items()}
    data = {"rows": [_plain(asdict(row)) for row in rows], "summary": statistics}
    path.write_text(json.dumps(data, indent=2, allow_nan=False), encoding="utf-8")


def table(rows: Sequence[Row]) -> Table:
    """Mean ± standard deviation of each class, with the number of cases counted."""
    result = Table("class", "DSC", "HD95 mm", "NSD")
    for name, values in summary(rows).items():
        if name == "mean":
            result.add_section()
        result.add_row(name, *(_cell(values[m], 3 if m != "hd95" else 1) for m in METRICS))
    return result


def _masks(volume: np.ndarray, task: Task, source: str) -> list[Tensor]:
    encoded = encode(torch.as_tensor(volume.astype(np.float32))[None], task, source)
    if task.overlapping:
        return [mask > 0 for mask in encoded]
    return [encoded[0] == i for i in range(1, task.out_channels)]


def _crop(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """(1, 1, …) masks in the box around both, with one voxel of background on every side."""
    index = (first | second).nonzero()
    low, high = index.amin(0).tolist(), (index.amax(0) + 1).tolist()
    box = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
    pad = (1,) * 6
    return (
        torch.nn.functional.pad(first[box].float(), pad)[None, None],
        torch.nn.functional.pad(second[box].float(), pad)[None, None],
    )


def _statistic(values: Sequence[float]) -> Statistic:
    counted = [v for v in values if not math.isnan(v)]
    if not counted:
        return Statistic(math.nan, math.nan, 0)
    return Statistic(float(np.mean(counted)), float(np.std(counted)), len(counted))


def _plain(values: dict) -> dict:
    return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in values.items()}


def _cell(value: Statistic, digits: int) -> str:
    return f"{value.mean:.{digits}f} ± {value.std:.{digits}f} (n={value.n})" if value.n else "-"
