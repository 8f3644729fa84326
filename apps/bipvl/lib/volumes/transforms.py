"""Preprocessing and restoration, each defined once for training, validation and inference.

`load` brings a file to the network's grid, `restore` brings probabilities back
to exactly the grid of the file. All geometry goes through affines, never through array order.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import (
    Compose,
    CropForegroundd,
    MapTransform,
    NormalizeIntensityd,
    Orientationd,
    ScaleIntensityRanged,
    Spacingd,
    SpatialResample,
    Transform,
)
from scipy import ndimage
from torch import Tensor

from lib.tasks import Task
from lib.volumes.reading import AXIS_CODES, align_label, check_image, encode, read_volume, source_of
from lib.volumes.resampling import BORDER, Grid, parallel_axes

_SLAB_ELEMENTS = 2**25  # numbers resampled at once in `restore`: 128 MiB of float32


def load(task: Task, label: bool) -> list[Transform]:
    """The deterministic part: from files to the network's grid (paper, Table 4).

    Input keys: `image`, the path of a NIfTI or NRRD file or of a DICOM folder; with `label` also `label`, a file on
    the image's grid in any orientation, and if that is partial `annotated`, the names of its classes
    (`Task.annotated`). Output: `image` (channels, h, w, d) float32, RAS, `task.spacing` mm, cropped to its foreground;
    `label` on the same grid, float32, (1, h, w, d) class indices, or (C, h, w, d) regions if classes overlap;
    `annotated` (C,) boolean. `image.meta` keeps `original_affine` and `spatial_shape`, which `restore` needs.

    Raises (when applied):
        ValueError: naming the file, what is wrong with it and what is expected.
    """
    keys = ["image", "label"] if label else ["image"]
    spacing_modes = ["bilinear", "nearest"] if label else ["bilinear"]
    intensity = task.intensity
    steps: list[Transform] = [ReadVolumed(task, label)]
    if label:
        steps.append(EncodeLabeld(task))
    steps += [
        Orientationd(keys, axcodes="RAS", labels=AXIS_CODES),
        Spacingd(keys, pixdim=task.spacing, mode=spacing_modes, dtype=np.float32),
    ]
    if intensity.mode == "range":
        assert intensity.low is not None and intensity.high is not None
        steps.append(ScaleIntensityRanged(["image"], intensity.low, intensity.high, 0.0, 1.0, clip=True))
    else:
        steps.append(NormalizeIntensityd(["image"], nonzero=True, channel_wise=True))
    steps.append(CropToForegroundd(keys, task))
    return steps


def apply(transforms: Sequence[Transform], data: Mapping[str, Any]) -> Any:
    """Run transforms on one case. MONAI hides the reason of a failure behind a RuntimeError; a ValueError stays one.

    Raises:
        ValueError: a problem of the case, in words for the user.
    """
    try:
        return Compose(transforms)(dict(data))
    except RuntimeError as error:
        reason = error.__cause__
        while reason is not None and not isinstance(reason, ValueError):
            reason = reason.__cause__
        if reason is None:
            raise
        raise reason from None


class ReadVolumed(MapTransform):
    """Read and check `image`, and bring `label` to its voxel order."""

    def __init__(self, task: Task, label: bool) -> None:
        super().__init__(["image", "label"] if label else ["image"])
        self.task, self.label = task, label

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        result = dict(data)
        image = read_volume(result["image"])
        check_image(image, self.task)
        result["image"] = image
        if self.label:
            result["label"] = align_label(read_volume(result["label"]), image)
            result["annotated"] = torch.tensor(self.task.annotated(result.get("annotated")))
        return result


class EncodeLabeld(MapTransform):
    """Raw file values to class indices or regions, by the task's tables (`encode`)."""

    def __init__(self, task: Task, keys: Sequence[str] = ("label",)) -> None:
        super().__init__(keys)
        self.task = task

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        result = dict(data)
        for key in self.key_iterator(result):
            label = result[key]
            encoded = encode(label.as_tensor(), self.task, source_of(label))
            result[key] = MetaTensor(encoded, meta=label.meta)
        return result


class CropToForegroundd(CropForegroundd):
    """Crop to the image's foreground. After either intensity mode, what is not foreground (at or below the lower
    clip, or zero in the file) is exactly 0."""

    def __init__(self, keys: Sequence[str], task: Task) -> None:
        super().__init__(
            keys,
            source_key="image",
            select_fn=_nonzero,
            allow_smaller=True,
            start_coord_key=None,
            end_coord_key=None,
        )
        self.intensity = task.intensity

    def __call__(self, data: Mapping[Hashable, Any], lazy: bool | None = None) -> dict[Hashable, Any]:
        if not _nonzero(data["image"]).any():
            limit = f"above {self.intensity.low:g}" if self.intensity.mode == "range" else "other than 0"
            raise ValueError(
                f"{source_of(data['image'])}: no voxel {limit}: nothing to segment; check the unit of its intensities"
            )
        return super().__call__(data, lazy)


def restore(probabilities: Tensor, image: MetaTensor | Mapping[str, Any], task: Task) -> np.ndarray:
    """Probabilities on the network's grid to a label volume on the grid of the file.

    They are resampled linearly by affine, in slabs along the last axis, so that memory stays bounded. Voxels more than
    half a network voxel outside the preprocessed crop are background. Exclusive classes: the most probable one.
    Overlapping classes: see `_decode_regions`.

    Args:
        probabilities: (task.out_channels, h, w, d), softmax (background first) or sigmoid.
        image: what `load` returned for the image, or its `meta` with `affine`, `original_affine`, `spatial_shape`.

    Returns:
        (H, W, D) label values as annotators edit them, uint8, or uint16 if a value exceeds 255.
    """
    if probabilities.ndim != 4 or probabilities.shape[0] != task.out_channels:
        raise ValueError(
            f"probabilities: shape {tuple(probabilities.shape)}; task {task.name!r} has ({task.out_channels}, h, w, d)"
        )
    meta = image.meta if isinstance(image, MetaTensor) else image
    network, original = (torch.as_tensor(meta[key], dtype=torch.float64).cpu() for key in ("affine", "original_affine"))
    shape = tuple(int(n) for n in meta["spatial_shape"][:3])
    volume = np.zeros(shape, np.uint8 if max(task.label_values.values()) <= 255 else np.uint16)
    source = torch.as_tensor(probabilities.detach()).as_subclass(Tensor).float()
    to_source = torch.linalg.solve(network, original)
    axes = parallel_axes(to_source)
    if axes is None:
        resample_all(source, network, original, task, volume)
        return volume
    grid = Grid(source, to_source, axes, shape, partial(decode, task=task))
    within = volume[grid.box]
    if not within.size:
        return volume
    thickness = max(1, _SLAB_ELEMENTS // (task.out_channels * within.shape[0] * within.shape[1]))
    for start in range(0, within.shape[2], thickness):
        stop = min(start + thickness, within.shape[2])
        within[..., start:stop] = grid.decisions(start, stop).cpu().numpy()
    return volume


def resample_all(source: Tensor, network: Tensor, original: Tensor, task: Task, volume: np.ndarray) -> None:
    """`restore` into `volume` by resampling every voxel: for files whose axes are not perpendicular, which those of the
    network's grid always are."""
    for part, slab, inside in _resampled(source, network, original, volume.shape):
        volume[..., part] = np.where(inside, decode(slab, task).cpu().numpy(), 0)


def restore_map(values: Tensor, image: MetaTensor | Mapping[str, Any]) -> np.ndarray:
    """A map of numbers on the network's grid to the grid of the file; as `restore`, without a decision.

    Args:
        values: (h, w, d).
        image: as in `restore`.

    Returns:
        (H, W, D) float32, 0 outside the preprocessed crop.
    """
    meta = image.meta if isinstance(image, MetaTensor) else image
    network, original = (torch.as_tensor(meta[key], dtype=torch.float64).cpu() for key in ("affine", "original_affine"))
    volume = np.zeros(tuple(int(n) for n in meta["spatial_shape"][:3]), np.float32)
    for part, slab, inside in _resampled(values.as_subclass(Tensor).float()[None], network, original, volume.shape):
        volume[..., part] = np.where(inside, slab[0].cpu().numpy(), 0)
    return volume


def restore_box(values: Tensor, meta: Mapping[str, Any], box: tuple[slice, slice, slice]) -> np.ndarray:
    """Maps of numbers on the network's grid to a box of the file's grid; as `restore_map`, and past the preprocessed
    crop the values at its edge.

    Args:
        values: (channels, h, w, d).
        meta: as in `restore`.
        box: of the file's voxels.

    Returns:
        (channels, …) float32, of the box's size.
    """
    network, original = (torch.as_tensor(meta[key], dtype=torch.float64).cpu() for key in ("affine", "original_affine"))
    affine = original.clone()
    affine[:3, 3] += original[:3, :3] @ torch.tensor([part.start for part in box], dtype=torch.float64)
    size = [part.stop - part.start for part in box]
    # Only the network's voxels around the box: resampling copies its source.
    corners = torch.tensor([[x, y, z, 1] for x in (-1, size[0]) for y in (-1, size[1]) for z in (-1, size[2])]).double()
    places = (torch.linalg.solve(network, affine) @ corners.T)[:3]
    shape = torch.tensor(values.shape[1:])
    low = torch.minimum((places.amin(1).floor() - 1).long().clamp(min=0), shape - 2).clamp(min=0)
    high = torch.maximum(torch.minimum(places.amax(1).ceil().long() + 2, shape), low + 1)
    part = values[:, low[0] : high[0], low[1] : high[1], low[2] : high[2]].as_subclass(Tensor).float()
    moved = network.clone()
    moved[:3, 3] += network[:3, :3] @ low.double()
    resample = SpatialResample(mode="bilinear", padding_mode="border", align_corners=False, dtype=np.float32)
    found = resample(MetaTensor(part, affine=moved), dst_affine=affine, spatial_size=size)
    return np.asarray(found, np.float32)


def _resampled(
    source: Tensor, network: Tensor, original: Tensor, shape: Sequence[int]
) -> Iterator[tuple[slice, Tensor, np.ndarray]]:
    """Slabs of (channels, h, w, d) on another grid: where along its last axis, (channels, …), and which voxels lie
    within the source."""
    tensor = MetaTensor(source, affine=network)
    resample = SpatialResample(mode="bilinear", padding_mode="border", align_corners=False, dtype=np.float32)
    thickness = max(1, _SLAB_ELEMENTS // (len(source) * shape[0] * shape[1]))
    for start in range(0, shape[2], thickness):
        stop = min(start + thickness, shape[2])
        affine = original.clone()
        affine[:3, 3] += original[:3, 2] * start
        size = (*shape[:2], stop - start)
        slab = resample(tensor, dst_affine=affine, spatial_size=size)
        inside = _inside(torch.linalg.solve(network, affine).numpy(), size, source.shape[1:])
        yield slice(start, stop), torch.Tensor.as_subclass(slab, torch.Tensor), inside


def decode(probabilities: Tensor, task: Task) -> Tensor:
    """Probabilities (channels, …) to label values (…) on the same grid: the decision of `restore`."""
    return (_decode_regions if task.overlapping else _decode_exclusive)(probabilities, task)


def largest_components(volume: np.ndarray, values: Sequence[int]) -> np.ndarray:
    """Keep the largest connected component (26 neighbours) of each of `values`; other labels stay as they are.

    Returns:
        A new array of the same shape and type.
    """
    result = volume.copy()
    boxes = ndimage.find_objects(volume)
    for value in values:
        box = boxes[value - 1] if 1 <= value <= len(boxes) else None
        if box is None:
            continue
        mask = volume[box] == value
        components, count = ndimage.label(mask, structure=np.ones((3, 3, 3)))
        if count > 1:
            largest = np.bincount(components.ravel())[1:].argmax() + 1
            result[box][mask & (components != largest)] = 0
    return result


def _decode_exclusive(probabilities: Tensor, task: Task) -> Tensor:
    values = torch.tensor([0, *task.label_values.values()], device=probabilities.device)
    return values[probabilities.max(0).indices]  # argmax takes four times as long


def _decode_regions(probabilities: Tensor, task: Task) -> Tensor:
    """Regions of probability above one half to the raw labels: each voxel gets the label whose set of containing
    regions is nearest to the predicted set. Regions of fewer labels count more than all larger ones together, so that
    a voxel called enhancing tumour but not tumour core is still enhancing tumour."""
    assert task.regions is not None
    regions = list(task.regions.values())
    largest_first = sorted(range(len(regions)), key=lambda i: -len(regions[i].labels))
    weight = torch.zeros(len(regions))
    for rank, i in enumerate(largest_first):
        weight[i] = 2.0**rank
    member = torch.tensor([[False, *(name in r.labels for name in task.labels)] for r in regions]).float()
    # sum_r w_r |p_r - m_r| for p, m in {0, 1}, written as a product with p
    product = (weight[:, None] * (1 - 2 * member)).to(probabilities.device)
    constant = (weight[:, None] * member).sum(0).to(probabilities.device)
    cost = torch.einsum("rl,rhwd->lhwd", product, (probabilities > 0.5).float()) + constant[:, None, None, None]
    values = torch.tensor([0, *task.label_values.values()], device=probabilities.device)
    return values[cost.argmin(0)]


def _inside(to_source: np.ndarray, size: Sequence[int], source: Sequence[int]) -> np.ndarray:
    """Which voxels of a grid of `size` lie within half a voxel of the grid `source`, given the affine between them."""
    index = np.ogrid[: size[0], : size[1], : size[2]]
    inside = np.ones(tuple(size), bool)
    for row, n in zip(to_source[:3], source, strict=True):
        position = row[0] * index[0] + row[1] * index[1] + row[2] * index[2] + row[3]
        inside &= (position >= -BORDER) & (position <= n - 1 + BORDER)
    return inside


def _nonzero(image: Tensor) -> Tensor:
    return image != 0
