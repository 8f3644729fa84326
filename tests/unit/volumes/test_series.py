"""Series as volumes: the grid that a viewer sees, and a plain answer if there is none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from typer.testing import CliRunner

from lib.app.cli.commands import app
from lib.volumes.reading import read_volume
from lib.volumes.series import SeriesError, Volume, read_headers, volume_of, write_nifti
from support.dicom.dicoms import AXIAL, make_series, with_uids
from support.helpers import read_nifti
from support.training import OPTIONS

OBLIQUE = (0.8, 0.6, 0.0, -0.48, 0.64, 0.6)
GRIDS: dict[str, dict[str, Any]] = {
    "axial": {},
    "feet first": {"descending": True},
    "patient turned over": {"orientation": (-1, 0, 0, 0, -1, 0)},
    "coronal": {"orientation": (1, 0, 0, 0, 0, -1)},
    "sagittal": {"orientation": (0, 1, 0, 0, 0, -1)},
    "oblique": {"orientation": OBLIQUE},
}


def converted(folder: Path) -> tuple[Volume, nib.Nifti1Image]:
    volume = read_headers(folder)
    files = {str(pydicom.dcmread(f, stop_before_pixels=True).SOPInstanceUID): f for f in folder.glob("*.dcm")}
    target = folder.parent / f"{folder.name}.nii.gz"
    write_nifti(files, volume, target)
    image = read_nifti(target)
    assert isinstance(image, nib.Nifti1Image)
    return volume, image


def as_itk_reads(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Voxels and RAS affine by the reader that 3D Slicer and MONAI Label build on."""
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    image = reader.Execute()
    affine = np.eye(4)
    affine[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    return sitk.GetArrayFromImage(image).transpose(2, 1, 0), np.diag([-1, -1, 1, 1]) @ affine


@pytest.mark.parametrize("name", GRIDS)
def test_image_is_what_itk_reads(name: str, tmp_path: Path) -> None:
    make_series(tmp_path / "s", **GRIDS[name])
    volume, image = converted(tmp_path / "s")
    voxels, affine = as_itk_reads(tmp_path / "s")
    assert image.shape == volume.shape == (9, 7, 5)
    np.testing.assert_array_equal(np.asarray(image.dataobj), voxels)
    np.testing.assert_allclose(volume.affine, affine, atol=1e-5)
    np.testing.assert_allclose(image.affine, affine, atol=1e-4)  # NIfTI keeps 32 bits
    assert image.get_data_dtype() == np.int16


def test_voxel_lies_where_its_pixel_does(tmp_path: Path) -> None:
    """By hand: column 2 at 1.5 mm, row 3 at 0.8 mm, slice 4 at 3 mm from (-20, 11, 4) LPS."""
    make_series(tmp_path / "s")
    volume, _ = converted(tmp_path / "s")
    np.testing.assert_allclose(volume.affine @ [2, 3, 4, 1], [20 - 3, -11 - 2.4, 4 + 12, 1], atol=1e-9)


def test_real_series_is_what_itk_reads(real_data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "crlm"
    folder.mkdir()
    for file in sorted((real_data / "dicom_ct" / "crlm-ct-1004").iterdir()):
        (folder / f"{file.stem}.dcm").symlink_to(file)
    _, image = converted(folder)
    voxels, affine = as_itk_reads(folder)
    np.testing.assert_array_equal(np.asarray(image.dataobj), voxels)
    np.testing.assert_allclose(image.affine, affine, atol=1e-4)
    assert image.shape == (512, 512, 41)
    assert int(np.asarray(image.dataobj).min()) == -3024  # padding, which the task clips


def test_jpeg_2000_series_is_read_and_its_label_fits(real_data: Path, tmp_path: Path) -> None:
    """The label that came with the series is stored LAS, the series is LPS."""
    with_uids(real_data / "dicom_ct" / "ts-example-dicom-j2k", tmp_path / "s")
    compressed = pydicom.dcmread(tmp_path / "s" / "0.dcm").file_meta.TransferSyntaxUID
    assert compressed.is_compressed
    _, image = converted(tmp_path / "s")
    label = read_nifti(real_data / "dicom_ct" / "ts-example-dicom_label-ts117.nii.gz")
    assert nib.aff2axcodes(label.affine) == ("L", "A", "S")
    turned = label.as_reoriented(
        nib.orientations.ornt_transform(nib.io_orientation(label.affine), nib.io_orientation(image.affine))
    )
    np.testing.assert_allclose(turned.affine, image.affine, atol=1e-2)
    # Bone, wherever the label says vertebra, is denser than the rest of the body.
    voxels, values = np.asarray(image.dataobj), np.asarray(turned.dataobj)
    assert voxels.min() < -900 < 200 < voxels.max()
    assert voxels[values > 0].mean() > voxels[values == 0].mean() + 100


@pytest.mark.parametrize("name", ["ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "Rows"])
def test_missing_tag_is_named(name: str, tmp_path: Path) -> None:
    make_series(tmp_path / "s", without=(name,))
    with pytest.raises(SeriesError, match=f"the DICOM tag {name} is missing"):
        read_headers(tmp_path / "s")


def test_what_is_among_the_slices_is_named(tmp_path: Path) -> None:
    """A screenshot that a workstation added to the series, a report, and a file of many slices."""
    slices, screenshot, report, frames = headers(tmp_path), *(pydicom.Dataset() for _ in range(3))
    for ds, kind in (
        (screenshot, "1.2.840.10008.5.1.4.1.1.7"),
        (report, "1.2.840.10008.5.1.4.1.1.88.33"),
        (frames, "1.2.840.10008.5.1.4.1.1.2.1"),
    ):
        ds.SOPClassUID, ds.SOPInstanceUID, ds.InstanceNumber = kind, "1.2.3", 9
        ds.StudyInstanceUID, ds.SeriesInstanceUID = slices[0].StudyInstanceUID, slices[0].SeriesInstanceUID
    screenshot.Rows = screenshot.Columns = 512
    frames.NumberOfFrames = 40
    for ds, text in (
        (screenshot, r"slice 9: a screenshot \(Secondary Capture Image Storage\): keep it in a series of its own"),
        (report, r"slice 9: not an image \(Comprehensive SR Storage\)"),
        (frames, r"slice 9: a multi-frame image \(Enhanced CT Image Storage\).* one file per slice"),
    ):
        with pytest.raises(SeriesError, match=text):
            volume_of([*slices, ds])


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("PixelSpacing", b"0,8\\1,5 ", "the DICOM tag PixelSpacing is not 2 numbers, but .*0,8"),
        ("Rows", b"x", "the DICOM tag Rows cannot be read"),
        ("ImagePositionPatient", b"1\\2 ", "the DICOM tag ImagePositionPatient is not 3 numbers"),
        ("ImageOrientationPatient", b"1\\0\\0\\0\\1\\nan", "the DICOM tag ImageOrientationPatient is not 6 numbers"),
    ],
)
def test_numbers_that_are_none_are_named(name: str, value: bytes, text: str, tmp_path: Path) -> None:
    slices, tag = headers(tmp_path), pydicom.tag.Tag(pydicom.datadict.tag_for_keyword(name))
    slices[2][tag] = pydicom.dataelem.RawDataElement(
        tag, "US" if name == "Rows" else "DS", len(value), value, 0, False, True
    )
    with pytest.raises(SeriesError, match=rf"slice 3: {text}"):
        volume_of(slices)


def headers(tmp_path: Path, **more: object) -> list[pydicom.Dataset]:
    make_series(tmp_path / "s", **more)  # type: ignore[arg-type]
    return list(read_headers(tmp_path / "s").headers)


def test_gap_is_refused(tmp_path: Path) -> None:
    slices = headers(tmp_path)
    with pytest.raises(SeriesError, match=r"missing or unevenly spaced: distances from 3.000 to 6.000 mm"):
        volume_of([*slices[:2], *slices[3:]])


def test_two_volumes_in_one_series_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SeriesError, match="more than one volume"):
        volume_of(headers(tmp_path) * 2)


def test_gantry_tilt_is_refused(tmp_path: Path) -> None:
    slices = headers(tmp_path)
    for k, ds in enumerate(slices):
        ds.ImagePositionPatient = [-20, 11 + 0.5 * k, 4 + 3 * k]
    with pytest.raises(SeriesError, match=r"sheared by 2.5 voxels \(gantry tilt\)"):
        volume_of(slices)


def test_mixed_orientations_are_refused(tmp_path: Path) -> None:
    slices = headers(tmp_path)
    slices[2].ImageOrientationPatient = list(OBLIQUE)
    with pytest.raises(SeriesError, match="differ in size, pixel spacing or orientation"):
        volume_of(slices)


def test_rounded_positions_are_taken(tmp_path: Path) -> None:
    slices = headers(tmp_path, spacing=(1.0, 1.0, 2.5), orientation=AXIAL)
    for ds in slices:
        ds.ImagePositionPatient = [round(float(x), 1) for x in ds.ImagePositionPatient]
    assert volume_of(slices).shape == (9, 7, 5)


def test_one_slice_is_no_volume(tmp_path: Path) -> None:
    with pytest.raises(SeriesError, match="at least two slices"):
        volume_of(headers(tmp_path)[:1])


def test_slopes_of_single_slices_are_applied(tmp_path: Path) -> None:
    """MR and PET scale every slice on its own."""
    make_series(tmp_path / "s", modality="MR")
    files = sorted((tmp_path / "s").glob("*.dcm"))
    raw = {}
    for number, file in enumerate(files):
        ds = pydicom.dcmread(file)
        ds.RescaleSlope, ds.RescaleIntercept = 0.5 + number, number
        raw[str(ds.SOPInstanceUID)] = ds.pixel_array * (0.5 + number) + number
        ds.save_as(file)
    volume, image = converted(tmp_path / "s")
    expected = np.stack([raw[str(ds.SOPInstanceUID)] for ds in volume.headers]).transpose(2, 1, 0)
    np.testing.assert_allclose(np.asarray(image.dataobj), expected, rtol=1e-6)


# Folders on the command line ------------------------------------------------------------------------------------------


def test_folder_is_read_as_its_series(tmp_path: Path) -> None:
    """Whatever else is in the folder."""
    make_series(tmp_path / "s")
    _, image = converted(tmp_path / "s")
    (tmp_path / "s" / "README.txt").write_text("notes " * 100)
    (tmp_path / "s" / "thumbs").mkdir()
    read = read_volume(tmp_path / "s")
    np.testing.assert_array_equal(read[0].numpy(), np.asarray(image.dataobj))
    np.testing.assert_allclose(read.affine, image.affine, atol=1e-4)


def test_folder_without_identifiers_is_read(tmp_path: Path) -> None:
    make_series(tmp_path / "s", without=("SeriesInstanceUID", "StudyInstanceUID", "FrameOfReferenceUID"))
    assert read_volume(tmp_path / "s").shape == (1, 9, 7, 5)


def broken(folder: Path, how: str) -> Path:
    make_series(folder)
    files = sorted(folder.iterdir(), key=lambda f: int(pydicom.dcmread(f).InstanceNumber))
    ds = pydicom.dcmread(files[2])
    if how == "missing":
        files[2].unlink()
    elif how == "doubled":
        ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
        ds.save_as(folder / "again.dcm")
    elif how == "localizer":
        ds.ImageOrientationPatient = [1, 0, 0, 0, 0, -1]
        ds.save_as(folder / "localizer.dcm")
    elif how == "two series":
        make_series(folder, modality="MR")
    elif how == "above":
        folder.rename(folder.with_name("series"))
        folder.mkdir()
        folder.with_name("series").rename(folder / "series")
    return folder


REFUSED = {
    "missing": r"missing or unevenly spaced: distances from 3.000 to 6.000 mm",
    "doubled": "several slices at one position: the series holds more than one volume",
    "localizer": "the slices differ in size, pixel spacing or orientation",
    "two series": r"holds 2 series, expected one: series 1, (CT|MR) \(5 files, e.g. .*; series 1, (MR|CT) \(5 files",
    "above": "the folder holds no DICOM image; its sub folders are series",
}


@pytest.mark.parametrize("how", REFUSED)
def test_folder_that_is_not_one_volume_is_refused(how: str, tmp_path: Path) -> None:
    folder = broken(tmp_path / "s", how)
    with pytest.raises(ValueError, match=f"{folder}: cannot be read as an image: .*{REFUSED[how]}"):
        read_volume(folder)


def test_command_line_refuses_what_an_archive_would(tmp_path: Path) -> None:
    folders = [broken(tmp_path / how, how) for how in ("missing", "localizer", "doubled")]
    make_series(tmp_path / "good", (24, 24, 12))
    arguments = ["infer", *folders, tmp_path / "good", "--task", "quickstart", "--out", tmp_path / "out", *OPTIONS]
    result = CliRunner().invoke(app, [str(a) for a in (*arguments, "--model-dir", tmp_path / "model")])
    assert result.exit_code == 1
    output = " ".join(result.output.split())
    for folder, words in zip(
        folders, ("from 3.000 to 6.000 mm", "differ in size", "more than one volume"), strict=True
    ):
        assert f"{folder.name}: cannot be read as an image" in output and words in output
    # The others are segmented, each on its own grid.
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["good.nii.gz", "good.json"][::-1]
    np.testing.assert_allclose(
        read_nifti(tmp_path / "out" / "good.nii.gz").affine, read_volume(tmp_path / "good").affine, atol=1e-4
    )

    # As cases, too: the good one is scored, here against its own mask.
    cases = [{"image": name, "label": "out/good.nii.gz"} for name in ("missing", "good")]
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    arguments = [
        "evaluate",
        "--data",
        tmp_path / "cases.json",
        "--task",
        "quickstart",
        "--out",
        tmp_path / "e",
        *OPTIONS,
    ]
    result = CliRunner().invoke(app, [str(a) for a in (*arguments, "--model-dir", tmp_path / "model")])
    assert result.exit_code == 1 and "missing: " in result.output
    rows = (tmp_path / "e" / "metrics.csv").read_text().splitlines()[1:]
    assert rows and all("good" in row for row in rows)
