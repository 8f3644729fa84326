"""Tasks small enough for every test, and volumes written to files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from torch import Tensor

from lib.model import checkpoints
from lib.model.nets import build_model
from lib.tasks import Task, task_from_dict

ORGANS = {"liver": ("10200004", 1), "spleen": ("78961009", 2), "aorta": ("15825003", 3)}
TUMOUR = {"edema": ("79654002", 1), "non-enhancing tumour": ("108369006", 2), "enhancing tumour": ("126952004", 3)}
REGIONS = {
    "whole tumour": tuple(TUMOUR),
    "tumour core": ("non-enhancing tumour", "enhancing tumour"),
    "enhancing core": ("enhancing tumour",),
}
MODEL = {
    "feature_size": 12,
    "text": "scratch",
    "projection": 16,
    "scratch": {"layers": 4, "width": 16, "heads": 2, "max_tokens": 64},
}


def label(value: int, code: str = "91723000", **more: Any) -> dict[str, Any]:
    """A label of a task file."""
    return {"value": value, "snomed": {"code": code, "meaning": "Structure"}, "color": [value % 256, 90, 120], **more}


def concepts(classes: list[str], modality: str) -> dict[str, Any]:
    """Short made-up sentences, different for each class."""
    sentences = {
        name: {
            "class": f"{name} in a {modality} image",
            "shape": f"shape of the {name}, number {i}",
            "location": f"location of the {name}, number {i}",
            "appearance": f"appearance of the {name}, number {i}",
            "contour": f"contour of the {name}, number {i}",
            "texture": f"texture of the {name}, number {i}",
        }
        for i, name in enumerate(classes)
    }
    return {
        "modality": modality,
        "review": {"status": "unreviewed"},
        "classes": {
            name: {"sentences": text, "ambiguous": [f"perhaps {s}" for s in text.values()]}
            for name, text in sentences.items()
        },
    }


def tiny_task(**changes: Any) -> Task:
    """Three exclusive classes in CT, 1 mm. `changes` replace top-level keys; dictionaries other than `labels` and
    `concepts` are merged into the default."""
    return _task(
        {
            "name": "tiny",
            "description": "Three organs",
            "modality": "CT",
            "channels": ["CT"],
            "labels": {name: label(value, code) for name, (code, value) in ORGANS.items()},
            "spacing": [1.0, 1.0, 1.0],
            "intensity": {"mode": "range", "low": -175, "high": 250},
            "patch": [64, 32, 32],
            "model": MODEL,
        },
        changes,
    )


def tiny_overlapping_task(**changes: Any) -> Task:
    """Four MR channels, three labels, and three nested regions of them as classes."""
    return _task(
        {
            "name": "tiny-overlapping",
            "description": "Regions of a brain tumour",
            "modality": "MR",
            "channels": ["FLAIR", "T1", "T1Gd", "T2"],
            "labels": {name: label(value, code) for name, (code, value) in TUMOUR.items()},
            "regions": {
                name: {"labels": labels, "snomed": {"code": "126952004", "meaning": "Tumour"}, "color": [200, 10, 10]}
                for name, labels in REGIONS.items()
            },
            "spacing": [1.0, 1.0, 1.0],
            "intensity": {"mode": "nonzero"},
            "patch": [64, 32, 32],
            "model": MODEL,
        },
        changes,
    )


def write_nifti(path: Path, data: np.ndarray, affine: np.ndarray | None = None) -> Path:
    """Write a volume, by default with 1 mm RAS voxels."""
    nib.save(nib.Nifti1Image(data, np.eye(4) if affine is None else affine), path)
    return path


def read_nifti(path: Path | str) -> nib.Nifti1Image:
    """A volume as it is stored."""
    image = nib.load(path)
    assert isinstance(image, nib.Nifti1Image)
    return image


def one_hot(encoded: torch.Tensor, channels: int) -> torch.Tensor:
    """Class indices (1, ...) as probabilities (channels, ...)."""
    return torch.nn.functional.one_hot(encoded[0].long(), channels).movedim(-1, 0).float()


def exclusive(
    batch: int = 2, classes: int = 3, size: int = 4, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """Random logits with a background channel and a label that holds every class."""
    label = torch.arange(batch * size**3).view(batch, 1, size, size, size) % (classes + 1)
    return torch.randn(batch, classes + 1, size, size, size, dtype=dtype), label


def regions(
    batch: int = 2, classes: int = 3, size: int = 4, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """Random logits and random overlapping regions."""
    shape = (batch, classes, size, size, size)
    return torch.randn(shape, dtype=dtype), torch.rand(shape).gt(0.5).to(torch.uint8)


def vectors(batch: int = 2, classes: int = 5, concepts: int = 3, width: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    """Random text (B, C, P), concepts (B, C, K, P) and vision (B, C, P) in float64."""
    text = torch.randn(batch, classes, width, dtype=torch.float64)
    rows = torch.randn(batch, classes, concepts, width, dtype=torch.float64)
    return text, rows, torch.randn(batch, classes, width, dtype=torch.float64)


def _task(data: dict[str, Any], changes: dict[str, Any]) -> Task:
    for key, value in changes.items():
        merge = isinstance(value, dict) and isinstance(data.get(key), dict) and key != "labels"
        data[key] = {**data[key], **value} if merge else value
    data.setdefault("concepts", concepts(list(data.get("regions") or data["labels"]), data["modality"]))
    return task_from_dict(data, "tests")


def checkpoint(task, seed=0, **manifest):
    torch.manual_seed(seed)
    return checkpoints.checkpoint_of(build_model(task), task, {"task": task.name, **manifest})
