"""Files as ITK, and so 3D Slicer, reads them: where their voxels lie, and the voxels of NRRD and MetaImage files.

What ITK assumes, we assume with it: an NRRD file without a named space is in LPS, and its unit is the millimetre.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import SimpleITK as sitk

HEADER_BYTES = 1 << 16  # in which the field stands, if it does
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])

# They bypass the log and reach the terminal without the name of the case.
sitk.ProcessObject.SetGlobalWarningDisplay(False)


class ITKError(ValueError):
    """ITK cannot read a file; the message is ITK's, without addresses."""


def read_header(path: str | Path) -> tuple[tuple[int, ...], np.ndarray]:
    """Shape (channels, x, y, z) and affine (4, 4), voxels to RAS millimetres, without reading voxels.

    Raises:
        ITKError: the header cannot be read.
    """
    reader = sitk.ImageFileReader()
    try:
        reader.SetFileName(str(path))
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise ITKError(_reason(error)) from error
    size, components = reader.GetSize(), reader.GetNumberOfComponents()
    affine = _affine(reader.GetDirection(), reader.GetSpacing(), reader.GetOrigin())
    if len(size) == 4 and components == 1:  # the fourth axis holds channels, as in NIfTI
        return (size[3], *size[:3]), affine
    return (components, *size), affine


def read(path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """Voxels (channels, x, y, z) and affine (4, 4), voxels to RAS millimetres.

    Raises:
        ITKError: the file cannot be read, or is cut off.
    """
    try:
        image = sitk.ReadImage(str(path))
    except RuntimeError as error:
        raise ITKError(_reason(error)) from error
    voxels = sitk.GetArrayFromImage(image).T  # reversed: components, if several, come first
    if image.GetNumberOfComponentsPerPixel() == 1:
        voxels = np.moveaxis(voxels, 3, 0) if voxels.ndim == 4 else voxels[None]
    return voxels, _affine(image.GetDirection(), image.GetSpacing(), image.GetOrigin())


def names_space(path: Path) -> bool:
    """Whether the header of an NRRD file says in which space its directions are."""
    with path.open("rb") as file:
        header = re.split(rb"\r?\n\r?\n", file.read(HEADER_BYTES), maxsplit=1)[0]
    return re.search(rb"(?im)^space\s*:", header) is not None


def _affine(direction: tuple[float, ...], spacing: tuple[float, ...], origin: tuple[float, ...]) -> np.ndarray:
    """ITK's three numbers for n axes as one matrix for the first three; an absent third axis has millimetre steps."""
    n = len(spacing)
    k = min(n, 3)
    affine = np.eye(4)
    affine[:k, :k] = (np.array(direction).reshape(n, n) * spacing)[:k, :k]
    affine[:k, 3] = origin[:k]
    return LPS_TO_RAS @ affine


def _reason(error: RuntimeError) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    last = re.sub(r"^(sitk::ERROR|ITK ERROR): |\w+\(0x[0-9a-f]+\): ", "", lines[-1]) if lines else type(error).__name__
    return re.sub(r"\w+\(0x[0-9a-f]+\): ", "", last)
