"""Dice, HD95 and surface Dice on masks whose values follow from counting."""

from __future__ import annotations

import csv
import json
import math

import numpy as np
import pytest
from rich.console import Console

from lib.volumes.metrics import Row, evaluate_case, evaluate_volumes, summary, table, write_csv, write_json
from support.helpers import label, tiny_overlapping_task, tiny_task, write_nifti

SPACING = (1.0, 1.0, 1.0)


def cube(start: tuple[int, ...], value: int = 1, size: int = 10, shape: int = 30) -> np.ndarray:
    volume = np.zeros((shape,) * 3, np.uint8)
    x, y, z = start
    volume[x : x + size, y : y + size, z : z + size] = value
    return volume


def score(prediction: np.ndarray, reference: np.ndarray, spacing=SPACING, tolerance: float = 2.0) -> Row:
    (row,) = evaluate_volumes(tiny_task(labels={"liver": label(1)}), prediction, reference, spacing, "c", tolerance)
    return row


def test_equal_masks():
    row = score(cube((5, 5, 5)), cube((5, 5, 5)))
    assert (row.dice, row.hd95, row.nsd) == (1, 0, 1)
    assert row.prediction_voxels == row.reference_voxels == 1000


def test_overlapping_cubes():
    """Cubes of side 10, shifted by 4: the overlap is 6·10·10 of 1000 voxels each."""
    row = score(cube((5, 5, 5)), cube((9, 5, 5)))
    assert row.dice == pytest.approx(0.6)
    assert row.hd95 == pytest.approx(4)


@pytest.mark.parametrize(("axis", "spacing"), [(0, (1, 1, 1)), (0, (2.5, 1, 1)), (1, (1, 0.5, 1)), (2, (1, 1, 8))])
def test_hausdorff_distance_is_in_millimetres_along_each_axis(axis, spacing):
    start = [3, 3, 3]
    start[axis] += 15  # disjoint, and the face far away is a tenth of the surface: within the upper five per cent too
    row = score(cube((3, 3, 3)), cube(tuple(start)), spacing)
    assert row.hd95 == pytest.approx(15 * spacing[axis])
    assert row.dice == 0


def test_surface_dice_at_the_tolerance():
    """Two plates one voxel thick, 3 mm apart: no surface voxel agrees below 3 mm, every one at 3 mm."""
    first, second = np.zeros((20, 20, 20), np.uint8), np.zeros((20, 20, 20), np.uint8)
    first[5, 4:16, 4:16] = 1
    second[7, 4:16, 4:16] = 1
    spacing = (1.5, 1.0, 1.0)
    assert score(first, second, spacing, 2.9).nsd == 0
    assert score(first, second, spacing, 3.0).nsd == 1
    assert score(first, second, spacing).hd95 == pytest.approx(3)


def test_surface_dice_counts_both_surfaces():
    """A plate of 144 voxels, found together with a second plate of 144 voxels 10 mm off: 288 of 432 agree."""
    reference = np.zeros((20, 20, 20), np.uint8)
    reference[4, 4:16, 4:16] = 1
    prediction = reference.copy()
    prediction[14, 4:16, 4:16] = 1
    row = score(prediction, reference)
    assert row.nsd == pytest.approx(288 / 432)
    assert row.dice == pytest.approx(2 * 144 / 432)


def test_masks_at_the_border_of_the_volume():
    inner, outer = cube((5, 5, 5)), cube((0, 0, 0), shape=10)
    assert score(outer, outer).nsd == 1
    moved = np.zeros_like(outer)
    moved[:7] = 1
    assert score(outer, moved).hd95 == pytest.approx(3)
    # the same masks with background around them
    bigger = np.zeros_like(inner)
    bigger[5:12, 5:15, 5:15] = 1
    assert score(inner, bigger).hd95 == score(outer, moved).hd95
    assert score(inner, bigger).nsd == score(outer, moved).nsd


def test_empty_masks():
    nothing, something = np.zeros((30, 30, 30), np.uint8), cube((5, 5, 5))
    row = score(nothing, nothing)
    assert math.isnan(row.dice) and math.isnan(row.hd95) and math.isnan(row.nsd)
    for prediction, reference in [(nothing, something), (something, nothing)]:
        row = score(prediction, reference)
        assert (row.dice, row.nsd) == (0, 0)
        assert math.isnan(row.hd95)


def test_classes_by_name():
    task = tiny_task(labels={"aorta": label(1, file_values=[820]), "liver": label(2), "spleen": label(3)})
    reference = cube((3, 3, 3), 1).astype(np.uint16) * 820 + cube((15, 15, 15), 2)
    prediction = cube((3, 3, 3), 1) + cube((17, 15, 15), 2)
    rows = {r.name: r for r in evaluate_volumes(task, prediction, reference, SPACING, "c")}
    assert rows["aorta"].dice == 1
    assert rows["liver"].dice == pytest.approx(0.8)
    assert math.isnan(rows["spleen"].dice)


def test_overlapping_classes_are_scored_as_regions():
    """Edema called enhancing tumour: the whole tumour is right, the regions inside are not."""
    task = tiny_overlapping_task()
    reference = cube((5, 5, 5), 1)
    reference[5:10, 5:15, 5:15] = 3
    rows = {r.name: r for r in evaluate_volumes(task, cube((5, 5, 5), 3), reference, SPACING)}
    assert rows["whole tumour"].dice == 1
    assert rows["tumour core"].dice == rows["enhancing core"].dice == pytest.approx(2 * 500 / 1500)


def test_bad_volumes():
    task = tiny_task()
    with pytest.raises(ValueError, match="case 'x'.*shapes differ"):
        evaluate_volumes(task, np.zeros((3, 3, 3)), np.zeros((3, 3, 4)), SPACING, "x")
    with pytest.raises(ValueError, match="reference of case 'x': unknown label values 77"):
        evaluate_volumes(task, np.zeros((3, 3, 3)), np.full((3, 3, 3), 77), SPACING, "x")


def test_files_with_their_own_spacing_and_orientation(tmp_path):
    """The prediction is stored mirrored; the affine, not the array, says where it is."""
    task = tiny_task(labels={"liver": label(1)})
    affine = np.diag([2.0, 1.0, 3.0, 1.0])
    reference = write_nifti(tmp_path / "reference.nii.gz", cube((5, 5, 5)), affine)
    mirror = np.diag([-1.0, 1.0, 1.0, 1.0])
    mirror[0, 3] = 29
    write_nifti(tmp_path / "prediction.nii.gz", cube((9, 5, 5))[::-1], affine @ mirror)
    (row,) = evaluate_case(task, tmp_path / "prediction.nii.gz", reference, "a")
    assert row.case == "a" and row.dice == pytest.approx(0.6) and row.hd95 == pytest.approx(8)
    other = write_nifti(tmp_path / "other.nii.gz", cube((5, 5, 5)), np.eye(4))
    with pytest.raises(ValueError, match="not on the grid"):
        evaluate_case(task, other, reference, "a")


ROWS = [
    Row("a", "liver", 0.8, 4.0, 0.5, 10, 10),
    Row("b", "liver", 0.6, 2.0, 0.7, 10, 10),
    Row("a", "aorta", 0.0, math.nan, 0.0, 0, 10),
    Row("b", "aorta", math.nan, math.nan, math.nan, 0, 0),
]


def test_summary():
    result = summary(ROWS)
    assert list(result) == ["liver", "aorta", "mean"]
    liver = result["liver"]["dice"]
    assert (liver.mean, liver.std, liver.n) == (pytest.approx(0.7), pytest.approx(0.1), 2)
    assert result["aorta"]["dice"].n == 1 and result["aorta"]["dice"].mean == 0
    assert result["aorta"]["hd95"].n == 0 and math.isnan(result["aorta"]["hd95"].mean)
    assert result["mean"]["dice"].mean == pytest.approx(0.35)
    assert result["mean"]["hd95"].mean == 3 and result["mean"]["hd95"].n == 1


def test_files_written(tmp_path):
    write_csv(ROWS, tmp_path / "m.csv")
    with (tmp_path / "m.csv").open(newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert [line["name"] for line in lines] == ["liver", "liver", "aorta", "aorta"]
    assert lines[0]["dice"] == "0.8" and lines[2]["hd95"] == "" and lines[2]["dice"] == "0.0"
    write_json(ROWS, tmp_path / "m.json")
    data = json.loads((tmp_path / "m.json").read_text(encoding="utf-8"))
    assert data["rows"][2]["hd95"] is None and data["rows"][0]["case"] == "a"
    assert data["summary"]["mean"]["dice"]["mean"] == pytest.approx(0.35)
    assert data["summary"]["aorta"]["hd95"] == {"mean": None, "std": None, "n": 0}


def test_table_shows_means_and_what_was_counted():
    console = Console(width=100, color_system=None)
    with console.capture() as capture:
        console.print(table(ROWS))
    lines = {line.split("│")[1].strip(): line for line in capture.get().splitlines() if line.startswith("│")}
    assert "0.700 ± 0.100 (n=2)" in lines["liver"] and "3.0 ± 1.0 (n=2)" in lines["liver"]
    assert "0.000 ± 0.000 (n=1)" in lines["aorta"] and "│ - " in lines["aorta"]
    assert "0.350" in lines["mean"]
