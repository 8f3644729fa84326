"""The random part of training: which patches of a case, and how they are changed."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
import torch
from monai.transforms import (
    DeleteItemsd,
    RandAdjustContrastd,
    RandCropByLabelClassesd,
    RandFlipd,
    RandGaussianNoised,
    RandRotated,
    RandScaleIntensityd,
    RandShiftIntensityd,
    RandZoomd,
    SpatialPadd,
    Transform,
)

from lib.tasks import AXES, Task

_SAMPLING = "sampling_map"


def augment(task: Task, patches: int) -> list[Transform]:
    """The random part of training: patches around every class in turn, flips, rotations, intensity changes.

    Takes what `load(task, label=True)` returns and gives a list of `patches` such dictionaries, all of size
    `task.patch`. Background and every class present are equally likely patch centres, so that rare classes are seen.
    Axes are flipped only if `task.augmentation.flip` names them.
    """
    keys, settings = ["image", "label"], task.augmentation
    steps: list[Transform] = [SpatialPadd(keys, spatial_size=task.patch)]
    if task.overlapping:
        steps.append(_AddSamplingMapd())
    steps.append(
        RandCropByLabelClassesd(
            keys,
            label_key=_SAMPLING if task.overlapping else "label",
            spatial_size=task.patch,
            num_classes=None if task.overlapping else task.out_channels,
            num_samples=patches,
            warn=False,
        )
    )
    if task.overlapping:
        steps.append(DeleteItemsd(_SAMPLING))
    steps += [RandFlipd(keys, prob=settings.flip_probability, spatial_axis=AXES.index(axis)) for axis in settings.flip]
    about_x, about_y, about_z = (math.radians(angle) for angle in rotation_degrees(task))
    steps += [
        RandRotated(
            keys,
            range_x=about_x,
            range_y=about_y,
            range_z=about_z,
            prob=settings.rotate_probability,
            mode=["bilinear", "nearest"],
            padding_mode="zeros",
            dtype=np.float32,
        ),
        RandScaleIntensityd(["image"], factors=settings.scale_intensity, prob=settings.intensity_probability),
        RandShiftIntensityd(["image"], offsets=settings.shift_intensity, prob=settings.intensity_probability),
    ]
    if settings.zoom:
        steps.append(
            RandZoomd(
                keys,
                prob=settings.zoom_probability,
                min_zoom=1 - settings.zoom,
                max_zoom=1 + settings.zoom,
                mode=["trilinear", "nearest"],
                padding_mode="constant",
            )
        )
    if settings.gamma:
        gammas = 1 / (1 + settings.gamma), 1 + settings.gamma
        steps.append(RandAdjustContrastd(["image"], settings.intensity_probability, gamma=gammas, retain_stats=True))
    if settings.noise:
        steps.append(RandGaussianNoised(["image"], prob=settings.intensity_probability, std=settings.noise))
    return steps


def rotation_degrees(task: Task) -> tuple[float, float, float]:
    """Largest rotation about each RAS axis. Patches are rotated in voxels, so a rotation that mixes axes of different
    spacing would shear the anatomy: its angle shrinks by the ratio of the two spacings."""
    x, y, z = task.spacing
    ratios = (min(y, z) / max(y, z), min(x, z) / max(x, z), min(x, y) / max(x, y))
    first, second, third = (task.augmentation.rotate_degrees * ratio for ratio in ratios)
    return first, second, third


class _AddSamplingMapd(Transform):
    """Overlapping regions have no background channel; patches must also be drawn from cases without any region."""

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        regions = data["label"].as_tensor() > 0
        return {**data, _SAMPLING: torch.cat([~regions.any(0, keepdim=True), regions])}
