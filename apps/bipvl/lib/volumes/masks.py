"""Masks as files: NIfTI with exactly the geometry of their image, and NRRD for 3D Slicer.

ITK writes NRRD too, but loads its image library at the first file: 15 s in which an annotator waits.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nibabel
import nrrd
import numpy as np

from lib.tasks import Label
from lib.volumes.nifti import is_nifti, open_nifti

SUFFIXES = (".nii", ".nii.gz", ".nrrd", ".seg.nrrd")
GEOMETRY_FIELDS = (
    *("qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z"),
    *("srow_x", "srow_y", "srow_z"),
)
LPS_FROM_RAS = np.array([-1.0, -1.0, 1.0])
GZIP_LEVEL = 1  # a mask is long runs of one value: higher levels cost time and gain nothing


def write_mask(path: Path, mask: np.ndarray, affine: np.ndarray, source: str, labels: Mapping[str, Label]) -> None:
    """Write a mask in the format of the path's suffix, one of `SUFFIXES`.

    Args:
        mask: (H, W, D) integers, 0 for background.
        affine: voxels to RAS millimetres.
        source: the image's file; if it is NIfTI, a NIfTI mask copies its geometry.
        labels: names, values and colours, which a `.seg.nrrd` carries.
    """
    if path.name.endswith(".nrrd"):
        _write_nrrd(path, mask, affine, labels if path.name.endswith(".seg.nrrd") else {})
    else:
        nibabel.save(_nifti(mask, affine, source), path)


def _write_nrrd(path: Path, mask: np.ndarray, affine: np.ndarray, labels: Mapping[str, Label]) -> None:
    header: dict[str, Any] = {
        "space": "left-posterior-superior",
        "space directions": affine[:3, :3].T * LPS_FROM_RAS,  # one row per axis of the array
        "space origin": affine[:3, 3] * LPS_FROM_RAS,
        "kinds": ["domain"] * 3,
        "encoding": "gzip",
    }
    for number, (name, label) in enumerate(labels.items()):
        header |= {
            f"Segment{number}_ID": name,
            f"Segment{number}_Name": name,
            f"Segment{number}_LabelValue": str(label.value),
            f"Segment{number}_Layer": "0",
            f"Segment{number}_Color": " ".join(f"{c / 255:.6g}" for c in label.color),
            f"Segment{number}_Extent": " ".join(f"0 {n - 1}" for n in mask.shape),
        }
    nrrd.write(str(path), mask, header, index_order="F", compression_level=GZIP_LEVEL)


def _nifti(mask: np.ndarray, affine: np.ndarray, source: str) -> nibabel.Nifti1Image:
    """The geometry of a NIfTI source is copied field by field, both forms and the unit: whichever of them a program
    goes by, it shows the mask on the image. An affine that the header keeps as a quaternion would also change in the
    last digits if it were written as a matrix."""
    if not is_nifti(source):
        image = nibabel.Nifti1Image(mask, affine)
        image.set_qform(affine, code=1)
        image.set_sform(affine, code=1)
        image.header.set_xyzt_units("mm")
        return image
    geometry = open_nifti(source).header
    header = nibabel.Nifti1Header()
    header.set_data_dtype(mask.dtype)
    header.set_data_shape(mask.shape)
    header["pixdim"][:4] = geometry["pixdim"][:4]
    header["xyzt_units"] = geometry["xyzt_units"]
    for name in GEOMETRY_FIELDS:
        header[name] = geometry[name]
    _shorten_quaternion(header)
    return nibabel.Nifti1Image(mask, None, header)


def _shorten_quaternion(header: nibabel.Nifti1Header) -> None:
    """A rounded quaternion can be longer than 1, which nibabel refuses to read; ITK shortens it when it reads."""
    parts = ("quatern_b", "quatern_c", "quatern_d")
    length = float(np.linalg.norm([float(header[name]) for name in parts]))
    if length > 1:
        for name in parts:
            header[name] = float(header[name]) / length
