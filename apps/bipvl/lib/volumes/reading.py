"""Reading volumes and labels from files, with every check that a user's data can fail.

What a file holds is judged by its affine and by the task's tables of values, never by the order of its axes or classes.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TypeVar, cast

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import Orientation
from nibabel.orientations import aff2axcodes, io_orientation
from torch import Tensor

from lib.tasks import Task
from lib.volumes import itk, nifti, series

logger = logging.getLogger(__name__)
T = TypeVar("T")

AXIS_CODES = (("L", "R"), ("P", "A"), ("I", "S"))
GRID_TOLERANCE = 0.1  # voxels that corners of a label's grid may lie off its image's: rounding in headers, no more
MAX_VALUE = 65535
MAX_NUMBERS = 2**30  # that a volume may have on the network's grid: 4 GiB of float32
WHOLE = 1e-3  # what floats and scaling factors lose of a whole number; interpolation loses more


def read_volume(path: str | Path) -> MetaTensor:
    """Read a NIfTI, NRRD or MetaImage file or a DICOM folder, each where ITK, and so 3D Slicer, shows it.

    Returns:
        (channels, H, W, D) float32, or fewer axes for what is not a volume, with the affine in RAS+ millimetres.

    Raises:
        ValueError: the file is missing, empty or cannot be read; a folder does not hold exactly one even stack.
    """
    path = _existing(path)
    voxels, affine = _attempt(_read_voxels, path)
    _tell_space(path)
    meta = {"filename_or_obj": str(path), "original_affine": affine, "spatial_shape": np.array(voxels.shape[1:])}
    return MetaTensor(torch.from_numpy(voxels), affine=torch.from_numpy(affine), meta=meta)


def read_header(path: str | Path) -> MetaTensor:
    """What `read_volume` returns, but with zeros in place of voxels: of a file, only the header is read.

    Raises:
        ValueError: as `read_volume`; a file that ends too early is not noticed.
    """
    path = _existing(path)
    if path.is_dir():
        return read_volume(path)
    shape, affine = _attempt(_read_grid, path)
    # One number stands for all voxels, so that no memory is taken.
    zeros = torch.zeros(()).expand(shape)
    return MetaTensor(zeros, affine=torch.from_numpy(affine), meta={"filename_or_obj": str(path)})


def _existing(path: str | Path) -> Path:
    path = Path(path)
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise ValueError(f"{path}: does not exist") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
    if path.is_file() and size == 0:
        raise ValueError(f"{path}: cannot be read as an image: the file has zero bytes")
    return path


def _attempt(read: Callable[[Path], T], path: Path) -> T:
    try:
        return read(path)
    except Exception as error:  # readers raise anything on broken files: EOFError, zlib.error, struct.error
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"{path}: cannot be read as an image: {reason[0]}") from error


def _read_voxels(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """(channels, H, W, D) float32, and the affine."""
    if path.is_dir():
        voxels, affine = series.read_folder(path)
        voxels = voxels[None]
    elif nifti.is_nifti(path):
        voxels, affine = np.asanyarray(nifti.open_nifti(path).dataobj), nifti.affine_of(path)
        voxels = voxels.reshape(_channels_last(voxels.shape))
        voxels = np.moveaxis(voxels, 3, 0) if voxels.ndim > 3 else voxels[None]
    else:
        voxels, affine = itk.read(path)
    if np.iscomplexobj(voxels) or voxels.dtype.names:
        raise ValueError("the voxels are complex numbers or colours; expected grey values")
    return np.ascontiguousarray(voxels, np.float32), np.array(affine, np.float64)


def _read_grid(path: Path) -> tuple[tuple[int, ...], np.ndarray]:
    if not nifti.is_nifti(path):
        return itk.read_header(path)
    shape = _channels_last(nifti.open_nifti(path).shape)
    return (*shape[3:4], *shape[:3], *shape[4:]) if len(shape) > 3 else (1, *shape), nifti.affine_of(path)


def _channels_last(shape: tuple[int, ...]) -> tuple[int, ...]:
    """NIfTI keeps vectors in the fifth axis, behind one for time."""
    return (*shape[:3], shape[4]) if len(shape) == 5 and shape[3] == 1 else shape


@lru_cache(maxsize=1024)
def _tell_space(path: Path) -> None:
    """Say once what had to be assumed of an NRRD file; read again, it need not be said again."""
    if path.name.lower().endswith(".nrrd") and path.is_file() and not itk.names_space(path):
        logger.warning("%s names no space: taken as left-posterior-superior, as ITK and 3D Slicer do", path)


def check_grid(path: str | Path, shape: Sequence[int], affine: np.ndarray, task: Task) -> None:
    """Check an image's header: `shape` is (channels, H, W, D).

    Raises:
        ValueError: empty, 2-D, another number of channels than the task's, an unusable affine, or voxel sizes by which
            the volume on the network's grid would be beyond memory, or not even one voxel.
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
    _check_network_grid(path, shape, affine, task)


def _check_network_grid(path: str | Path, shape: Sequence[int], affine: np.ndarray, task: Task) -> None:
    """Before anything of that size is allocated."""
    sizes = np.linalg.norm(affine[:3, :3], axis=0)  # of voxels, along the file's axes
    extents = np.zeros(3)
    extents[io_orientation(affine)[:, 0].astype(int)] = sizes * shape[1:]
    wanted = [max(math.ceil(extent / spacing), 1) for extent, spacing in zip(extents, task.spacing, strict=True)]
    cause = (
        f"its voxels measure {_by(sizes)} mm, the task's {_by(task.spacing)} mm; probably the unit or the voxel size "
        "in the file's header is wrong"
    )
    if shape[0] * math.prod(wanted) > MAX_NUMBERS:
        raise ValueError(
            f"{path}: too large for the network's grid: {_by(wanted)} voxels with {shape[0]} channel(s), and at most "
            f"{MAX_NUMBERS} numbers are resampled; {cause}"
        )
    if (extents < task.spacing).all():
        raise ValueError(f"{path}: too small: all of it, {_by(extents)} mm, is less than one network voxel; {cause}")


def _by(numbers: Sequence[float] | np.ndarray) -> str:
    return " x ".join(f"{n:.6g}" if isinstance(n, float) else str(n) for n in numbers)


def check_image(image: MetaTensor, task: Task) -> None:
    """Check header and voxels of an image that `read_volume` returned.

    Raises:
        ValueError: as `check_grid`, or voxels that are not finite, or that hold no foreground: they are all of one
            value, or none is above the task's range.
    """
    path = source_of(image)
    check_grid(path, image.shape, image.affine.numpy(), task)
    voxels = image.as_tensor()
    bad = int((~torch.isfinite(voxels)).sum())
    if bad:
        raise ValueError(f"{path}: {bad} of {voxels.numel()} voxels are NaN or infinite")
    if voxels.min() == voxels.max():
        raise ValueError(f"{path}: empty volume, every voxel is {float(voxels.min()):g}")
    low = task.intensity.low
    if low is not None and voxels.max() <= low:
        raise ValueError(f"{path}: no voxel above {low:g}: nothing to segment; check the unit of its intensities")
    if low is None and not any(_varies(channel[channel != 0]) for channel in voxels):
        raise ValueError(f"{path}: all voxels other than 0 have one value: nothing to segment")


def _varies(values: Tensor) -> bool:
    return bool(values.numel() and values.min() != values.max())


def align_label(label: MetaTensor, image: MetaTensor) -> MetaTensor:
    """Turn a label (1, ...) stored in any orientation to its image's voxel order; no value is interpolated.

    If a header places its volume twice and differently (`lib.volumes.nifti`), the label fits if it fits by one of
    the ways, and by no other in another voxel order. The log says which was taken if ITK would take another.

    Raises:
        ValueError: the label has several channels, covers a different grid from the image's, or fits in two ways.
    """
    if label.ndim != 4 or label.shape[0] != 1:
        found = f"shape {tuple(label.shape)}"
        raise ValueError(f"{source_of(label)}: expected a label with one channel and three axes, found {found}")
    for volume in (label, image):
        _check_affine(source_of(volume), volume.affine.numpy())
    ours, theirs = _placements(label), _placements(image)
    fitting = []
    for (drawn, here), (shown, there) in itertools.product(ours.items(), theirs.items()):
        turned, off = _turned(label, here, image.shape, there)
        if turned.shape[1:] == image.shape[1:] and off <= GRID_TOLERANCE:
            fitting.append((drawn, shown, turned))
    if not fitting:
        raise ValueError(_misfit(label, image, ours, theirs))
    drawn, shown, turned = fitting[0]
    if not all(torch.equal(other.as_tensor(), turned.as_tensor()) for _, _, other in fitting[1:]):
        raise ValueError(
            f"{source_of(label)}: fits its image {source_of(image)} in two ways, in different voxel orders: "
            f"{_twice(label, ours) or _twice(image, theirs)}"
        )
    if (drawn, shown) != (next(iter(ours)), next(iter(theirs))):
        _tell_form(source_of(label), drawn, source_of(image), shown)
    turned.affine = image.affine
    return turned


def _placements(volume: MetaTensor) -> dict[str, np.ndarray]:
    """By name, the affines that a volume's header allows, of which the first is taken; equal ones stand once."""
    found = {"": volume.affine.numpy()}
    taken, *others = nifti.forms(source_of(volume)).items() or [("", found[""])]
    if _apart(volume.shape, taken[1], found[""]) > GRID_TOLERANCE:
        return found  # cropped or resampled since it was read: what the header says is not about this grid
    for name, affine in others:
        if _usable(affine) and all(_apart(volume.shape, affine, known) > GRID_TOLERANCE for known in found.values()):
            found[name] = affine
    return found


def _turned(label: MetaTensor, here: np.ndarray, shape: Sequence[int], there: np.ndarray) -> tuple[MetaTensor, float]:
    """A label placed by `here`, in the voxel order of a grid of `shape` (channels, H, W, D) placed by `there`, and how
    many voxels the corners then lie apart."""
    codes = "".join(aff2axcodes(there))
    placed = MetaTensor(label.as_tensor(), affine=torch.as_tensor(here), meta=dict(label.meta))
    turned = cast(MetaTensor, Orientation(axcodes=codes, labels=AXIS_CODES)(placed))
    return turned, _apart(shape, turned.affine.numpy(), there)


def _corners(shape: Sequence[int]) -> np.ndarray:
    """The eight outermost voxels (8, 4) of a grid (channels, H, W, D), homogeneous."""
    return np.array([[*c, 1] for c in np.ndindex(2, 2, 2)]) * [*np.subtract(shape[1:], 1), 1]


def _apart(shape: Sequence[int], one: np.ndarray, other: np.ndarray) -> float:
    """How many voxels the corners of a grid (channels, H, W, D) lie apart under two affines."""
    corners = _corners(shape)
    return float(np.abs(corners @ np.linalg.solve(other, one).T - corners).max())


def _misfit(label: MetaTensor, image: MetaTensor, ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> str:
    here, there = label.affine.numpy(), image.affine.numpy()
    _, off = _turned(label, here, image.shape, there)
    causes = [cause for cause in (_twice(label, ours), _twice(image, theirs)) if cause]
    return "; ".join(
        [
            f"{source_of(label)}: not on the grid of its image {source_of(image)}: shape {tuple(label.shape[1:])} "
            f"against {tuple(image.shape[1:])}, corners up to {off:.3g} voxels apart; affine "
            f"{here.round(4).tolist()} against {there.round(4).tolist()}",
            *causes,
        ]
    )


def _twice(volume: MetaTensor, placements: dict[str, np.ndarray]) -> str:
    """What is to be said of a header that places its volume in several ways; empty for any other."""
    others = {name: affine for name, affine in placements.items() if name}
    if not others:
        return ""
    taken = placements[""]
    apart = ", ".join(f"{name} up to {_millimetres(volume.shape, a, taken):.3g} mm" for name, a in others.items())
    return (
        f"the header of {source_of(volume)} places it in several ways, apart from where ITK and 3D Slicer show it: "
        f"{apart}; give its qform and sform the same values"
    )


def _millimetres(shape: Sequence[int], one: np.ndarray, other: np.ndarray) -> float:
    corners = _corners(shape)
    return float(np.linalg.norm(corners @ (one - other).T, axis=1).max())


@lru_cache(maxsize=1024)
def _tell_form(label: str, drawn: str, image: str, shown: str) -> None:
    where = " and ".join(f"{file} by {form}" for file, form in ((label, drawn), (image, shown)) if form)
    logger.warning("%s lies on its image only if placed otherwise than ITK and 3D Slicer do: %s", label, where)


def encode(values: Tensor, task: Task, source: str = "label") -> Tensor:
    """Label values as files hold them to the channels of the network, by name.

    Args:
        values: (1, H, W, D) values of `task.value_names`, 0 for background.
        source: what to name in an error.

    Returns:
        float32, (1, H, W, D) class indices with 0 for background; if classes overlap (C, H, W, D) of 0 and 1.

    Raises:
        ValueError: values that the task does not know, as `unknown_values` says it.
    """
    names = list(task.labels)
    table = torch.full((MAX_VALUE + 1,), -1)
    table[0] = 0
    for value, name in task.value_names.items():
        table[value] = names.index(name) + 1
    whole = values.round().long()
    whole[((values - whole).abs() > WHOLE) | (whole < 0) | (whole > MAX_VALUE) | ~values.isfinite()] = MAX_VALUE + 1
    index = torch.cat([table, torch.tensor([-1])]).to(values.device)[whole]
    if (index < 0).any():
        raise ValueError(unknown_values(np.unique(rounded(values[index < 0].cpu().numpy())).tolist(), task, source))
    if task.regions is None:
        return index.float()
    members = [[False, *(name in region.labels for name in names)] for region in task.regions.values()]
    return torch.tensor(members, device=values.device)[:, index[0]].float()


def rounded(values: np.ndarray) -> np.ndarray:
    """Label values without a float's error: 1 for 0.9999999. What is not a whole number stays as it is."""
    whole = np.rint(values)
    return np.where(np.abs(values - whole) <= WHOLE, whole, values)


def unknown_values(values: Sequence[float], task: Task, source: str) -> str:
    """What is said of a label that holds these values, which the task does not know."""
    shown = ", ".join(f"{value:.7g}" for value in values[:10]) + (", …" if len(values) > 10 else "")
    valid = ", ".join(f"{value} ({name})" for value, name in task.value_names.items())
    return f"{source}: unknown label values {shown}; task {task.name!r} knows 0 (background), {valid}"


def source_of(volume: MetaTensor) -> str:
    """The file that a volume was read from."""
    return str(volume.meta.get("filename_or_obj", "image"))


def _usable(affine: np.ndarray) -> bool:
    if not np.isfinite(affine).all():
        return False
    sizes = np.linalg.norm(affine[:3, :3], axis=0)
    return bool(sizes.min() > 0 and abs(np.linalg.det(affine[:3, :3] / sizes)) > 1e-6)


def _check_affine(path: str | Path, affine: np.ndarray) -> None:
    if not _usable(affine):
        raise ValueError(f"{path}: the affine is not invertible: {np.asarray(affine).tolist()}")
