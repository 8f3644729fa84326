"""Checks of what clients send before it enters the store: files and their parameters."""

from __future__ import annotations

import gzip
import json
import re
import zlib
from math import prod
from pathlib import Path
from typing import Any

import nrrd
import torch
from monai.data import MetaTensor

from lib.volumes.folders import SUFFIXES
from lib.volumes.nifti import SUFFIXES as NIFTI_SUFFIXES
from lib.volumes.nifti import is_nifti, true_suffix
from lib.volumes.reading import align_label, read_header, read_volume

# A .mhd file is a header without voxels.
SUFFIXES_RECEIVED = tuple(s for s in SUFFIXES if s != ".mhd")
HEADER_BYTES = 1 << 20
MAX_BYTES_PER_VOXEL = 32
SAME_MM = 1e-3  # what programs lose of an affine when they write it


def suffix_of(path: Path) -> str:
    """The extension of a file sent by a client; of NIfTI that which its content ought to have.

    Raises:
        ValueError: naming the valid ones.
    """
    suffix = next((s for s in SUFFIXES_RECEIVED if path.name.lower().endswith(s)), None)
    if suffix in NIFTI_SUFFIXES and path.is_file():
        return true_suffix(path)
    if suffix is None:
        found = "".join(path.suffixes)[-20:] or "none"
        raise ValueError(f"file extension {found!r}; valid are {', '.join(SUFFIXES_RECEIVED)}")
    return suffix


def plain(info: Any) -> dict[str, Any]:
    """What a client or a task says about a file, as data that any JSON reader accepts: NaN becomes null.

    Raises:
        ValueError: not an object.
    """
    if info is None:
        return {}
    if not isinstance(info, dict):
        raise ValueError(f"expected an object with what is known, found {str(info)[:80]!r}")
    return json.loads(json.dumps(info, default=str), parse_constant=lambda _: None)


def check_image_file(path: Path) -> None:
    """Whether a file is a volume, as far as its header says.

    Raises:
        ValueError: saying why not, without the server's path.
    """
    try:
        _check_self_contained(path)
        shape = tuple(read_header(path).shape[1:])
        if len(shape) != 3 or min(shape) < 2:
            raise ValueError(f"not a volume: shape {shape}; expected three axes of at least 2 voxels")
    except ValueError as error:
        raise ValueError(str(error).replace(str(path), "the image")) from error


def same_volume(one: Path, other: Path) -> bool:
    """Whether two files show the same voxels at the same places.

    Raises:
        ValueError: one of them cannot be read.
    """
    first, second = read_volume(one), read_volume(other)
    return torch.equal(first.as_tensor(), second.as_tensor()) and torch.allclose(
        first.affine, second.affine, rtol=0, atol=SAME_MM
    )


def check_label_file(path: Path, image: Path, case: str) -> MetaTensor:
    """A label (1, H, W, D) in its image's voxel order, if the file is whole and on the grid of its image. Empty labels
    are: they teach what background is.

    Raises:
        ValueError: saying why not, without the server's paths.
    """
    try:
        suffix_of(path)
        _check_self_contained(path)
        grid = read_header(image)
        if is_nifti(path) and true_suffix(path) == ".nii.gz":
            _check_gzip(path, HEADER_BYTES + MAX_BYTES_PER_VOXEL * prod(grid.shape[1:]))
        _check_layers(path)
        label = read_header(path)
        # Before anything of the size that a header claims is read or turned.
        if sorted(label.shape[1:]) != sorted(grid.shape[1:]) or label.shape[0] != 1:
            raise ValueError(
                f"the label is not on the grid of its image: shape {tuple(label.shape[1:])} with {label.shape[0]} "
                f"channel(s) against {tuple(grid.shape[1:])}"
            )
        return align_label(read_volume(path), grid)
    except ValueError as error:
        reason = str(error).replace(str(path), "the label").replace(f"its image {image}", f"its image {case!r}")
        reason = reason.replace(str(image), f"image {case!r}")
        raise ValueError(reason) from error


def _check_layers(path: Path) -> None:
    """3D Slicer keeps segments that overlap in layers, a fourth axis that comes first in its files."""
    try:
        sizes = list(nrrd.read_header(str(path))["sizes"]) if path.name.lower().endswith(".nrrd") else []
    except (nrrd.NRRDError, OSError, KeyError, ValueError):
        return  # reading it says why
    if len(sizes) == 4:
        raise ValueError(
            f"{path}: has {sizes[0]} layers, as overlapping segments do; a voxel can have one class only "
            "(3D Slicer: switch off Allow Overlapping Segmentations in the settings of MONAI Label)"
        )


def _check_self_contained(path: Path) -> None:
    """NRRD and MetaImage headers can name another file for the voxels, which could be any file of this machine."""
    name = path.name.lower()
    if not name.endswith((".nrrd", ".mha", ".mhd")) or not path.is_file():
        return
    with path.open("rb") as file:
        start = file.read(HEADER_BYTES)
    if name.endswith(".nrrd"):
        header = re.split(rb"\r?\n\r?\n", start, maxsplit=1)[0]
        foreign = re.search(rb"(?im)^\s*data\s*file\s*:", header) is not None
    else:
        element = re.search(rb"(?im)^\s*ElementDataFile\s*=[ \t]*(\S*)", start)
        foreign = element is not None and element[1] != b"LOCAL"
    if foreign:
        raise ValueError(f"{path}: the voxels are in another file; send one file with header and voxels")


def _check_gzip(path: Path, most: int) -> None:
    """Readers stop at the last voxel; damage shows in the checksum after it."""
    total = 0
    try:
        with gzip.open(path) as file:
            while block := file.read(1 << 20):
                total += len(block)
                if total > most:
                    raise ValueError(f"{path}: holds far more data than its header says")
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{path}: damaged or cut off: {error}") from error
