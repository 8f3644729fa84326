"""Reading volumes and labels from files, with every check that a user's data can fail.

What a file holds is judged by its affine and by the task's tables of values, never by the order of its axes or classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import cast

import nibabel as nib
import numpy as np
import torch
from monai.data import MetaTensor
from monai.data.utils import correct_nifti_header_if_necessary
from monai.transforms import LoadImage, Orientation
from nibabel.orientations import aff2axcodes
from torch import Tensor

from lib.tasks import Task

AXIS_CODES = (("L", "R"), ("P", "A"), ("I", "S"))
GRID_TOLERANCE = 0.1  # voxels that corners of a label's grid may lie off its image's: rounding in headers, no more
MAX_VALUE = 65535


def read_volume(path: str | Path) -> MetaTensor:
    """Read a NIfTI or NRRD file or a DICOM folder.

    Returns:
        (channels, H, W, D) float32, or fewer axes for what is no volume, with the affine in RAS+ millimetres.

    Raises:
        ValueError: the file is missing, empty or cannot be read.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path}: does not exist")
    if path.is_file() and path.stat().st_size == 0:
        raise ValueError(f"{path}: cannot be read as an image: the file has zero bytes")
    try:
        return LoadImage(ensure_channel_first=True)(path)
    except Exception as error:  # readers raise anything on broken files: EOFError, zlib.error, ITK exceptions
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"{path}: cannot be read as an image: {reason[0]}") from error


def read_header(path: str | Path) -> MetaTensor:
    """What `read_volume` returns, but with zeros in place of voxels where the format allows to skip them (NIfTI).

    Raises:
        ValueError: as `read_volume`; a file that ends too early is not noticed.
    """
    path = Path(path)
    if not path.name.endswith((".nii", ".nii.gz")) or not path.is_file():
        return read_volume(path)
    try:
        # As MONAI's reader does, which rebuilds the affine of a file whose header gives two voxel sizes.
        header = correct_nifti_header_if_necessary(cast(nib.Nifti1Image, nib.load(path)))
    except Exception as error:
        raise ValueError(f"{path}: cannot be read as an image: {error}") from error
    shape = (*header.shape[3:4], *header.shape[:3]) if len(header.shape) == 4 else (1, *header.shape)
    # One number stands for all voxels, so that no memory is taken.
    return MetaTensor(torch.zeros(()).expand(shape), affine=header.affine, meta={"filename_or_obj": str(path)})


def check_grid(path: str | Path, shape: Sequence[int], affine: np.ndarray, task: Task) -> None:
    """Check an image's header: `shape` is (channels, H, W, D).

    Raises:
        ValueError: empty, 2-D, another number of channels than the task's, or an unusable affine.
    """
    spatial = tuple(int(n) for n in shape[1:])
    if 0 in shape:
        raise ValueError(f"{path}: empty volume, shape {spatial}")
    if len(spatial) != 3 or min(spatial) < 2:
        raise ValueError(f"{path}: not a volume: shape {spatial}; expected three axes of at least 2 voxels")
    if shape[0] != len(task.channels):
        raise ValueError(
            f"{path}: found {shape[0]} channel{'s' * (shape[0] != 1)}, task {task.name!r} expects "
            f"{len(task.channels)}: {', '.join(task.channels)}"
        )
    _check_affine(path, affine)


def check_image(image: MetaTensor, task: Task) -> None:
    """Check header and voxels of an image that `read_volume` returned.

    Raises:
        ValueError: as `check_grid`, or voxels that are not finite, or all of one value.
    """
    path = source_of(image)
    check_grid(path, image.shape, image.affine.numpy(), task)
    voxels = image.as_tensor()
    bad = int((~torch.isfinite(voxels)).sum())
    if bad:
        raise ValueError(f"{path}: {bad} of {voxels.numel()} voxels are NaN or infinite")
    if voxels.min() == voxels.max():
        raise ValueError(f"{path}: empty volume, every voxel is {float(voxels.min()):g}")


def align_label(label: MetaTensor, image: MetaTensor) -> MetaTensor:
    """Turn a label (1, ...) stored in any orientation to its image's voxel order; no value is interpolated.

    Raises:
        ValueError: the label has several channels, or covers another grid than the image.
    """
    if label.ndim != 4 or label.shape[0] != 1:
        found = f"shape {tuple(label.shape)}"
        raise ValueError(f"{source_of(label)}: expected a label with one channel and three axes, found {found}")
    _check_affine(source_of(label), label.affine.numpy())
    codes = "".join(aff2axcodes(image.affine.numpy()))
    turned = cast(MetaTensor, Orientation(axcodes=codes, labels=AXIS_CODES)(label))
    corners = np.array([[*c, 1] for c in np.ndindex(2, 2, 2)]) * [*np.subtract(image.shape[1:], 1), 1]
    to_image = np.linalg.solve(image.affine.numpy(), turned.affine.numpy())
    off = float(np.abs(corners @ to_image.T - corners).max())
    if turned.shape[1:] != image.shape[1:] or not off <= GRID_TOLERANCE:
        raise ValueError(
            f"{source_of(label)}: not on the grid of its image {source_of(image)}: shape {tuple(label.shape[1:])} "
            f"against {tuple(image.shape[1:])}, corners up to {off:.3g} voxels apart; affine "
            f"{label.affine.numpy().round(4).tolist()} against {image.affine.numpy().round(4).tolist()}"
        )
    turned.affine = image.affine
    return turned


def encode(values: Tensor, task: Task, source: str = "label") -> Tensor:
    """Label values as files hold them to the channels of the network, by name.

    Args:
        values: (1, H, W, D) values of `task.value_names`, 0 for background.
        source: what to name in an error.

    Returns:
        float32, (1, H, W, D) class indices with 0 for background; where classes overlap (C, H, W, D) of 0 and 1.

    Raises:
        ValueError: values that the task does not know.
    """
    names = list(task.labels)
    table = torch.full((MAX_VALUE + 1,), -1)
    table[0] = 0
    for value, name in task.value_names.items():
        table[value] = names.index(name) + 1
    whole = values.long()
    whole[(whole != values) | (whole < 0) | (whole > MAX_VALUE)] = MAX_VALUE + 1
    index = torch.cat([table, torch.tensor([-1])]).to(values.device)[whole]
    if (index < 0).any():
        unknown = torch.unique(values[index < 0]).tolist()
        shown = ", ".join(f"{v:g}" for v in unknown[:10]) + (", …" if len(unknown) > 10 else "")
        valid = ", ".join(f"{value} ({name})" for value, name in task.value_names.items())
        raise ValueError(f"{source}: unknown label values {shown}; task {task.name!r} knows 0 (background), {valid}")
    if task.regions is None:
        return index.float()
    members = [[False, *(name in region.labels for name in names)] for region in task.regions.values()]
    return torch.tensor(members, device=values.device)[:, index[0]].float()


def source_of(volume: MetaTensor) -> str:
    """The file that a volume was read from."""
    return str(volume.meta.get("filename_or_obj", "image"))


def _check_affine(path: str | Path, affine: np.ndarray) -> None:
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
        raise ValueError(f"{path}: the affine is not invertible: {np.asarray(affine).tolist()}")
