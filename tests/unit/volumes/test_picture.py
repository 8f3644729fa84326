"""Pictures: the right size, the right place, the right colour, whatever the orientation of the files."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from matplotlib.image import imread
from nibabel import orientations
from typer.testing import CliRunner

from lib.app.cli.commands import app
from lib.volumes.picture import GAP, LEGEND_LINE, ROW_LIMIT, TITLE, WIDTH, picture
from support.helpers import read_nifti, tiny_overlapping_task, tiny_task, write_nifti

# RAS, 40 x 30 x 20 voxels of 1 x 1 x 2 mm; one block of liver (value 1): on the patient's right, in front, below.
SHAPE, SPACING = (40, 30, 20), (1.0, 1.0, 2.0)
LIVER = tuple(tiny_task().labels["liver"].color)
AFFINE = np.diag([*SPACING, 1.0])


def image_array() -> np.ndarray:
    return np.random.default_rng(0).integers(-100, 200, SHAPE).astype(np.int16)


def label_array() -> np.ndarray:
    label = np.zeros(SHAPE, np.uint8)
    label[28:36, 20:28, 2:6] = 1
    return label


def turned(array: np.ndarray, codes: str) -> tuple[np.ndarray, np.ndarray]:
    """The same volume with its axes stored as `codes`, and its affine."""
    change = orientations.ornt_transform(orientations.axcodes2ornt("RAS"), orientations.axcodes2ornt(codes))
    return orientations.apply_orientation(array, change), AFFINE @ orientations.inv_ornt_aff(change, SHAPE)


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    image = write_nifti(tmp_path / "image.nii.gz", image_array(), AFFINE)
    return image, write_nifti(tmp_path / "label.nii.gz", label_array(), AFFINE)


def pixels(path: Path) -> np.ndarray:
    return np.round(imread(path)[..., :3] * 255).astype(int)


def places_of(colour: tuple[int, ...], rendered: np.ndarray) -> np.ndarray:
    return np.argwhere((rendered == colour).all(-1))


# The volume is 40 x 30 x 40 mm: three planes side by side are 40 + 40 + 30 mm wide, a row is 40 mm high.
SCALE = min((WIDTH - 4 * GAP) / 110, ROW_LIMIT / 40)
ROW = TITLE + round(40 * SCALE) + GAP


def test_size_and_places(files, tmp_path):
    out = tmp_path / "new folder" / "picture.png"
    picture(tiny_task(), files[0], {"Reference": files[1]}, out)
    rendered = pixels(out)
    assert rendered.shape == (2 * ROW + LEGEND_LINE + GAP, WIDTH, 3)

    liver = places_of(LIVER, rendered)
    assert len(liver) > 100
    assert liver[:, 0].min() >= ROW, "the first row is the plain image"
    left = (WIDTH - round(110 * SCALE) - 2 * GAP) // 2
    axial, coronal, sagittal = (left, left + round(40 * SCALE) + GAP, left + 2 * (round(40 * SCALE) + GAP))
    panels = liver[liver[:, 0] < 2 * ROW]  # without the legend

    def expected(start: int, extent: tuple[float, float]) -> tuple[float, float]:
        return start + extent[0] * SCALE, start + extent[1] * SCALE

    # The patient's right (x 28..36 mm of 40) is 4..12 mm from the left edge of the axial and coronal planes, what lies
    # in front (y 20..28 of 30) is 2..10 mm from the left edge of the sagittal one.
    for start, stop, extent in (
        (axial, coronal, (4, 12)),
        (coronal, sagittal, (4, 12)),
        (sagittal, WIDTH, (2, 10)),
    ):
        columns = panels[(panels[:, 1] >= start) & (panels[:, 1] < stop), 1]
        assert (columns.min(), columns.max() + 1) == pytest.approx(expected(start, extent), abs=2)
    # z 4..12 mm of 40 is 28..36 mm from the top of the coronal plane; y 20..28 of 30 is 2..10 mm from the top of the
    # axial one, which is 30 mm high and centred in the row.
    rows = panels[(panels[:, 1] >= coronal) & (panels[:, 1] < sagittal), 0]
    assert (rows.min(), rows.max() + 1) == pytest.approx(expected(ROW + TITLE, (28, 36)), abs=2)
    rows = panels[panels[:, 1] < coronal, 0]
    assert (rows.min(), rows.max() + 1) == pytest.approx(expected(ROW + TITLE, (7, 15)), abs=2)


def test_inside_the_mask_the_scan_stays_visible(files, tmp_path):
    picture(tiny_task(), files[0], {"Reference": files[1]}, tmp_path / "out.png")
    rendered = pixels(tmp_path / "out.png")
    axial_centre = (ROW + TITLE + round(11 * SCALE), round((WIDTH - 110 * SCALE - 2 * GAP) / 2 + 8 * SCALE))
    inside = rendered[axial_centre[0] - 5 : axial_centre[0] + 5, axial_centre[1] - 5 : axial_centre[1] + 5]
    assert not (inside == LIVER).all(-1).any()
    assert not (inside[..., 0] == inside[..., 1]).all(), "coloured, not grey"


@pytest.mark.parametrize("codes", ["LPS", "PSR", "IAL"])
def test_orientation_of_the_files_changes_nothing(files, tmp_path, codes):
    picture(tiny_task(), files[0], {"Reference": files[1]}, tmp_path / "ras.png")
    label = write_nifti(tmp_path / "turned-label.nii.gz", *turned(label_array(), codes))
    picture(tiny_task(), files[0], {"Reference": label}, tmp_path / "label.png")
    image = write_nifti(tmp_path / "turned-image.nii.gz", *turned(image_array(), codes))
    picture(tiny_task(), image, {"Reference": label}, tmp_path / "both.png")
    assert np.array_equal(pixels(tmp_path / "ras.png"), pixels(tmp_path / "label.png"))
    assert np.array_equal(pixels(tmp_path / "ras.png"), pixels(tmp_path / "both.png"))


def test_without_masks_only_the_image(files, tmp_path):
    picture(tiny_task(), files[0], {}, tmp_path / "out.png")
    rendered = pixels(tmp_path / "out.png")
    assert rendered.shape == (ROW + GAP, WIDTH, 3)
    grey = rendered[TITLE:-GAP]
    assert (grey[..., 0] == grey[..., 1]).all()


def test_an_empty_first_mask_shows_the_middle(files, tmp_path):
    empty = write_nifti(tmp_path / "empty.nii.gz", np.zeros(SHAPE, np.uint8), AFFINE)
    picture(tiny_task(), files[0], {"Model": empty}, tmp_path / "out.png")
    assert pixels(tmp_path / "out.png").shape == (2 * ROW + GAP, WIDTH, 3)


def test_first_channel_and_raw_labels_of_an_overlapping_task(tmp_path):
    task = tiny_overlapping_task()
    image = write_nifti(tmp_path / "image.nii.gz", np.stack([image_array() + 101] * 4, -1), AFFINE)
    label = write_nifti(tmp_path / "label.nii.gz", label_array() * 3, AFFINE)
    picture(task, image, {"Reference": label}, tmp_path / "out.png")
    assert len(places_of(tuple(task.labels["enhancing tumour"].color), pixels(tmp_path / "out.png"))) > 100


def test_refusals(files, tmp_path):
    wrong_grid = write_nifti(tmp_path / "shifted.nii.gz", label_array(), AFFINE + np.eye(4, k=3) * 5)
    with pytest.raises(ValueError, match=r"shifted\.nii\.gz: not on the grid"):
        picture(tiny_task(), files[0], {"Model": wrong_grid}, tmp_path / "out.png")
    unknown = write_nifti(tmp_path / "unknown.nii.gz", label_array() * 9, AFFINE)
    with pytest.raises(ValueError, match=r"unknown\.nii\.gz: unknown label values 9; .*1 \(liver\)"):
        picture(tiny_task(), files[0], {"Model": unknown}, tmp_path / "out.png")
    assert not (tmp_path / "out.png").exists()


def test_command(files, tmp_path):
    out = tmp_path / "out.png"
    arguments = ["picture", str(files[0]), "--task", "quickstart", "--out", str(out)]
    result = CliRunner().invoke(app, [*arguments, "--mask", f"Model={files[1]}", "--mask", f"Reference={files[1]}"])
    assert result.exit_code == 0, result.output
    assert pixels(out).shape == (3 * ROW + LEGEND_LINE + GAP, WIDTH, 3)
    result = CliRunner().invoke(app, [*arguments, "--mask", str(files[1])])
    assert result.exit_code == 2
    assert "title=file" in result.output


def test_nibabel_agrees_on_the_turned_files(files, tmp_path):
    """The helper of this test file itself: what it writes as PSR is the same volume."""
    path = write_nifti(tmp_path / "psr.nii.gz", *turned(label_array(), "PSR"))
    assert nib.aff2axcodes(read_nifti(path).affine) == ("P", "S", "R")
    canonical = nib.as_closest_canonical(read_nifti(path))
    assert np.array_equal(np.asarray(canonical.dataobj), label_array())
    assert np.allclose(canonical.affine, AFFINE)
