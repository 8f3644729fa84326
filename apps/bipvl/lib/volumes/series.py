"""A DICOM series as a volume: one grid for the image that the network reads and for the segments drawn on it.

The volume's axes are the series' columns, rows and slices; slices are in order of their position along the normal, as
3D Slicer, OHIF and ITK have them. Distances are millimetres, affines are RAS+ as in NIfTI.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import SimpleITK as sitk
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.errors import BytesLengthException
from pydicom.uid import UID

from lib.volumes.itk import LPS_TO_RAS

PLACED = ("Rows", "Columns", "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing")
REQUIRED = ("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", *PLACED)
UNREADABLE = (ValueError, TypeError, OverflowError, LookupError, NotImplementedError, BytesLengthException)  # of a tag
COUNTS = {"ImagePositionPatient": 3, "ImageOrientationPatient": 6, "PixelSpacing": 2}
UNEVEN = 0.05  # share of the distance between slices by which one may lie off: rounding in headers, no more
TILT = 0.1  # voxels that the last slice may be shifted within its plane against the first
ANGLE = 1e-3  # largest difference of a direction cosine between slices


class SeriesError(ValueError):
    """A series that is not a volume; the message says why, `status` is the HTTP status of an answer that tells it."""

    status = 400


@dataclass(frozen=True)
class Volume:
    """The grid of a series, and its headers.

    headers: one per slice, in the order of the third axis.
    affine: (4, 4), voxel indices to RAS+ millimetres.
    """

    headers: tuple[Dataset, ...]
    affine: np.ndarray

    @property
    def shape(self) -> tuple[int, int, int]:
        first = self.headers[0]
        return int(first.Columns), int(first.Rows), len(self.headers)


def read_headers(folder: Path) -> Volume:
    """The volume that a folder of one series' files holds.

    Raises:
        SeriesError: a tag is missing, or the slices are not an even stack.
    """
    return volume_of([dcmread(file, stop_before_pixels=True) for file in sorted(folder.glob("*.dcm"))])


def read_folder(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """The volume that a folder with the files of one series shows, under the same conditions as a series of an archive.

    Files that are not DICOM, or not images, are passed over. Missing identifiers are not missed: no SEG is made.

    Returns:
        Rescaled values (columns, rows, slices), and the affine.

    Raises:
        SeriesError: no series or several, a tag is missing, or the slices are not an even stack.
    """
    found = _series_in(folder)
    if not found:
        inside = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
        hint = f"; its sub folders are {', '.join(inside[:5])}{', …' * (len(inside) > 5)}" if inside else ""
        raise SeriesError(f"the folder holds no DICOM image{hint}")
    if len(found) > 1:
        shown = "; ".join(_summary(headers) for headers in found.values())
        raise SeriesError(f"the folder holds {len(found)} series, expected one: {shown}")
    (headers,) = found.values()
    volume = volume_of(headers, PLACED)
    return _stack(volume, [Path(str(ds.filename)) for ds in volume.headers]), volume.affine


def _series_in(folder: Path) -> dict[str, list[Dataset]]:
    """Headers of the images directly in a folder, by series."""
    found: dict[str, list[Dataset]] = {}
    for file in sorted(entry for entry in folder.iterdir() if entry.is_file()):
        try:
            ds = dcmread(file, stop_before_pixels=True, force=True)
            if ds.get("Rows"):
                found.setdefault(str(ds.get("SeriesInstanceUID", "")), []).append(ds)
        except Exception:  # not DICOM: read by force, a file can break off anywhere
            continue
    return found


def _summary(headers: Sequence[Dataset]) -> str:
    first = headers[0]
    words = [str(first.get(name, "")) for name in ("Modality", "SeriesDescription")]
    number = f"series {first.get('SeriesNumber', '?')}"
    return (
        f"{', '.join([number, *(w for w in words if w)])} ({len(headers)} files, e.g. {Path(str(first.filename)).name})"
    )


def volume_of(headers: Sequence[Dataset], required: Sequence[str] = REQUIRED) -> Volume:
    """The volume of a series' headers, in any order.

    Args:
        required: keywords of the tags that every slice must have.

    Raises:
        SeriesError: a tag is missing, or the slices are not an even stack.
    """
    for ds in headers:
        _check_slice(ds, required)
    if len(headers) < 2:
        raise SeriesError(f"{_name(headers[0]) if headers else 'the series'}: expected at least two slices")
    first = headers[0]
    orientation = np.array(first.ImageOrientationPatient, float)
    for ds in headers[1:]:
        same = (ds.Rows, ds.Columns) == (first.Rows, first.Columns)
        same &= np.allclose(np.array(ds.PixelSpacing, float), np.array(first.PixelSpacing, float), rtol=1e-4)
        if not same or np.abs(np.array(ds.ImageOrientationPatient, float) - orientation).max() > ANGLE:
            raise SeriesError(f"{_name(ds)}: the slices differ in size, pixel spacing or orientation: not a volume")
    row, column = orientation[:3], orientation[3:]
    normal = np.cross(row, column)
    if abs(np.linalg.norm(normal) - 1) > 0.01:
        raise SeriesError(f"{_name(first)}: ImageOrientationPatient {orientation.tolist()}: not a right angle")
    ordered = sorted(headers, key=lambda ds: float(np.dot(normal, np.array(ds.ImagePositionPatient, float))))
    places = np.array([[float(x) for x in ds.ImagePositionPatient] for ds in ordered])
    step = (places[-1] - places[0]) / (len(ordered) - 1)
    _check_even(places @ normal, float(step @ normal), first)
    spacing = [float(x) for x in first.PixelSpacing]  # of rows, of columns
    shift = max(abs(step @ row) / spacing[1], abs(step @ column) / spacing[0]) * (len(ordered) - 1)
    if shift > TILT:
        raise SeriesError(f"{_name(first)}: the slices are sheared by {shift:.1f} voxels (gantry tilt): resample first")
    lps = np.eye(4)
    lps[:3] = np.column_stack([row * spacing[1], column * spacing[0], step, places[0]])
    return Volume(tuple(ordered), LPS_TO_RAS @ lps)


def _check_slice(ds: Dataset, required: Sequence[str]) -> None:
    """Raises SeriesError if a file is not a slice of a volume, with what it is instead."""
    if int(_read(ds, "NumberOfFrames") or 1) > 1 or "Enhanced" in _kind(ds):
        raise SeriesError(
            f"{_name(ds)}: a multi-frame image ({_kind(ds)}), which holds many slices in one file: export the series "
            "with one file per slice"
        )
    for name in required:
        if _read(ds, name) not in (None, "", []):
            continue
        if "Secondary Capture" in _kind(ds):
            what = "a screenshot"
        elif "Image Storage" not in _kind(ds):
            what = "not an image"
        else:
            raise SeriesError(f"{_name(ds)}: the DICOM tag {name} is missing or empty")
        raise SeriesError(f"{_name(ds)}: {what} ({_kind(ds)}): keep it in a series of its own, apart from the slices")
    for name, count in COUNTS.items():
        if not _are_numbers(_read(ds, name), count):
            raise SeriesError(f"{_name(ds)}: the DICOM tag {name} is not {count} numbers, but {_read(ds, name)}")


def _are_numbers(values: Any, count: int) -> bool:
    try:
        return np.shape(values) == (count,) and bool(np.isfinite(np.array(values, float)).all())
    except ValueError:  # such as one with a comma
        return False


def _read(ds: Dataset, name: str) -> Any:
    """The value of a tag, None if it is missing.

    Raises:
        SeriesError: not a value of its kind.
    """
    try:
        return ds.get(name)
    except UNREADABLE as error:
        raise SeriesError(f"{_name(ds)}: the DICOM tag {name} cannot be read: {error}") from error


def _kind(ds: Dataset) -> str:
    """What a file says that it is, in words."""
    return UID(str(ds.get("SOPClassUID") or "CT Image Storage")).name


def _check_even(positions: np.ndarray, step: float, first: Dataset) -> None:
    """`positions`: of the slices along the normal, in order."""
    gaps = np.diff(positions)
    if step <= 0 or (gaps < 0.01 * step).any():
        raise SeriesError(f"{_name(first)}: several slices at one position: the series holds more than one volume")
    off = np.abs(positions - positions[0] - step * np.arange(len(positions))).max()
    if off > UNEVEN * step or np.abs(gaps - step).max() > UNEVEN * step:
        raise SeriesError(
            f"{_name(first)}: slices are missing or unevenly spaced: distances from {gaps.min():.3f} to "
            f"{gaps.max():.3f} mm"
        )


def write_nifti(files: dict[str, Path], volume: Volume, target: Path) -> None:
    """Write the image of a series: rescaled values, on the grid of the volume.

    Args:
        files: SOP instance UID to the slice's file, of any transfer syntax that GDCM reads.

    Raises:
        SeriesError: pixels that cannot be read, or that are not grey values.
    """
    voxels = _stack(volume, [files[str(ds.SOPInstanceUID)] for ds in volume.headers])
    image = nib.Nifti1Image(voxels, volume.affine)
    image.set_qform(volume.affine, code=1)
    image.set_sform(volume.affine, code=1)
    image.header.set_xyzt_units("mm", "sec")
    nib.save(image, target)


def _stack(volume: Volume, files: Sequence[Path]) -> np.ndarray:
    """Rescaled values (columns, rows, slices) of slices in the volume's order."""
    slices = []
    for ds, file in zip(volume.headers, files, strict=True):
        slices.append(_pixels(file, _name(ds)))
        if slices[-1].shape != volume.shape[1::-1]:
            raise SeriesError(f"{_name(ds)}: expected grey values of {volume.shape[1::-1]}, found {slices[-1].shape}")
    kind: Any = np.result_type(*slices)
    if kind.kind == "f":
        kind = np.dtype(np.float32)
    elif kind.itemsize == 8:  # NIfTI has 64-bit integers, viewers do not
        kind = np.dtype(np.int32)
    return np.stack(slices).astype(kind).transpose(2, 1, 0)


def _pixels(file: Path, name: str) -> np.ndarray:
    """Rescaled values (rows, columns)."""
    reader = sitk.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileName(str(file))
    try:
        pixels = sitk.GetArrayFromImage(reader.Execute())
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise SeriesError(f"{name}: the pixels cannot be read: {reason}") from error
    return pixels[0] if pixels.ndim == 3 and pixels.shape[0] == 1 else pixels


def _name(ds: Dataset) -> str:
    try:
        number = ds.get("InstanceNumber", "?")
    except UNREADABLE:
        number = "?"
    return f"series {ds.get('SeriesInstanceUID', '?')}, slice {number}"
