"""NIfTI files: opened by what they hold, whatever their name says, and placed where ITK, and so 3D Slicer, places them.

A header can place its image twice, by a quaternion (qform) and by a matrix (sform), and in metres or micrometres. ITK
takes the matrix if it is the scanner's or nearly equal to the quaternion, else the quaternion, and converts to
millimetres; nibabel always prefers the matrix, and ignores the unit. The two agree on nearly all files, but where they
do not, annotators see what ITK takes. ITK itself is asked, so that there is only one rule.
"""

from __future__ import annotations

import gzip
import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from lib.volumes import itk

logger = logging.getLogger(__name__)

SUFFIXES = (".nii.gz", ".nii")
GZIP = b"\x1f\x8b"
MILLIMETRES = {1: 1000.0, 3: 0.001}  # NIfTI's codes for metres and micrometres
# How files begin: the size of the header.
NIFTI1 = (348).to_bytes(4, "little"), (348).to_bytes(4, "big")
NIFTI2 = (540).to_bytes(4, "little"), (540).to_bytes(4, "big")
ANY_LENGTH = np.float64(-np.inf)  # of a rounded quaternion, which may be longer than 1


class _Header1(nib.Nifti1Header):
    quaternion_threshold = ANY_LENGTH


class _Header2(nib.Nifti2Header):
    quaternion_threshold = ANY_LENGTH


class _Image1(nib.Nifti1Image):
    header_class = _Header1


class _Image2(nib.Nifti2Image):
    header_class = _Header2


def is_nifti(path: str | Path) -> bool:
    """Whether the name says so."""
    return str(path).lower().endswith(SUFFIXES)


def true_suffix(path: Path) -> str:
    """`.nii.gz` if the file is compressed, else `.nii`, whatever its name says."""
    with path.open("rb") as file:
        return SUFFIXES[file.read(2) != GZIP]


def open_nifti(path: str | Path) -> Any:
    """The file as nibabel's image, its voxels not yet read.

    Raises:
        ValueError: not a NIfTI file.
        Whatever nibabel and gzip raise on a damaged one.
    """
    path = Path(path)
    suffix = true_suffix(path)
    packed = suffix == ".nii.gz"
    with gzip.open(path) if packed else path.open("rb") as file:
        start = file.read(4)
        if start not in NIFTI1 + NIFTI2:
            raise ValueError("not a NIfTI file, whatever its name says")
        kind = _Image2 if start in NIFTI2 else _Image1
        if packed != path.name.lower().endswith(".gz"):  # nibabel goes by the name
            _tell_name(path, suffix)
            return kind.from_bytes(start + file.read())
    return kind.from_filename(path)


def affine_of(path: str | Path) -> np.ndarray:
    """Voxels to RAS millimetres (4, 4), as ITK places the image; a sheared matrix, which ITK refuses, as it stands."""
    with _named_for_itk(Path(path)) as name:
        try:
            return itk.read_header(name)[1]
        except itk.ITKError:
            image = open_nifti(path)
            return _scaled(image.header.get_best_affine(), unit(image.header))


def forms(path: str | Path) -> dict[str, np.ndarray]:
    """Every affine by which some program may place the image, by name, that which ITK takes first.

    Empty for what is not a NIfTI file.
    """
    if not is_nifti(path) or not Path(path).is_file():
        return {}
    header = open_nifti(path).header
    taken = affine_of(path)
    found = {name: getattr(header, f"get_{name}")() for name in ("qform", "sform") if int(header[f"{name}_code"])}
    found = found or {"a header without qform and sform, as nibabel reads it": header.get_base_affine()}
    scale = unit(header)
    named = {name: _scaled(form, scale) for name, form in found.items()}
    if scale != 1:
        named |= {f"{name} without its unit": form for name, form in found.items()}
    return {"as ITK reads it": taken, **named}


def unit(header: Any) -> float:
    """Millimetres in the header's unit of length; no unit counts as millimetres."""
    return MILLIMETRES.get(int(header["xyzt_units"]) & 7, 1.0)


def _scaled(affine: np.ndarray, factor: float) -> np.ndarray:
    return np.diag([factor, factor, factor, 1.0]) @ affine


@contextmanager
def _named_for_itk(path: Path) -> Iterator[Path]:
    """ITK goes by the name's ending, and by names in UTF-8: a file that is named otherwise is read through a link."""
    suffix = true_suffix(path)
    if path.name.endswith(suffix) and str(path).isprintable():
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        link = Path(folder) / f"image{suffix}"
        link.symlink_to(path.resolve())
        yield link


@lru_cache(maxsize=1024)
def _tell_name(path: Path, suffix: str) -> None:
    held = "compressed" if suffix == ".nii.gz" else "not compressed"
    logger.warning("%s is %s: other programs may not open it; rename it to end in %s", path, held, suffix)
