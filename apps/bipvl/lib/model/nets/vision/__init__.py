"""Vision backbones behind one protocol, so that the model never asks which one it holds.

A backbone is driven stage by stage: `stem` once, `stage` for n = 0..3 with a chance to change the map in between (that
is where BiFusion sits), then `decode` with the four maps as skip connections. Every adapter drives the modules of the
network as MONAI (ResEnc: nnU-Net) ships it, so weights and behaviour stay theirs: run without fusion, it computes
exactly what its own forward computes. A further backbone is one adapter class and one entry in `BACKBONES`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from lib.model.nets.vision.protocol import STAGES, VisionBackbone
from lib.model.nets.vision.resenc import ResEncBackbone, lay_out
from lib.model.nets.vision.swin_unetr import SwinUNETRBackbone
from lib.model.nets.vision.unetr import UNETRBackbone
from lib.model.nets.vision.unets import MedNeXtBackbone, UNetBackbone, UNetPlusPlusBackbone
from lib.tasks import Task

__all__ = ["BACKBONES", "STAGES", "VisionBackbone", "build_vision", "lay_out"]

BACKBONES: dict[str, Callable[..., VisionBackbone]] = {
    "swin_unetr": partial(SwinUNETRBackbone, v2=False),
    "swin_unetr_v2": partial(SwinUNETRBackbone, v2=True),
    "unetr": UNETRBackbone,
    "unet": UNetBackbone,
    "unetpp": UNetPlusPlusBackbone,
    "resenc": ResEncBackbone,
    "mednext": MedNeXtBackbone,
}


def build_vision(task: Task, name: str | None = None) -> VisionBackbone:
    """The vision backbone of a task, with fresh weights.

    Args:
        task: channels, patch, spacing, and the network's sizes (`model.feature_size` is d of the paper, 48 at full
            size).
        name: a key of `BACKBONES`; None for the task's own.

    Raises:
        ValueError: unknown name.
    """
    spec, name = task.model, name or task.model.vision
    if name not in BACKBONES:
        raise ValueError(f"vision backbone {name!r}: valid are {', '.join(BACKBONES)}")
    own: dict[str, Any] = {}
    if name.startswith("swin"):
        own["heads"] = spec.swin_heads
    elif name == "resenc":
        own["spacing"] = task.spacing
    return BACKBONES[name](len(task.channels), tuple(task.patch), spec.feature_size, spec.checkpointing, **own)
