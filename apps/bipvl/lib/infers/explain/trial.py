"""What other sentences change on one case: the served model asked twice, and the two masks slice by slice."""

from __future__ import annotations

import base64
import gzip
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lib.tasks import Task
from lib.volumes.picture import read_for_picture

MOST = 256  # voxels along an axis that are shown; scores are those of the whole masks
TEXTS = ("before", "after")

Infer = Callable[[dict[str, Any]], dict[str, Any]]


def compare(task: Task, image: Path, infer: Infer, concepts: dict[str, Any]) -> dict[str, Any]:
    """Segment a case with the served version's own text and with another, and say what differs.

    Args:
        task: labels, colours and grey window.
        image: a file or a DICOM folder.
        infer: options of a request to its result, with the mask's `file`, which is removed here, and `params`.
        concepts: class → attribute → sentence, for the second request.

    Returns:
        JSON: `volumes`, the scores of each label, `changed` voxels of all, and what each of the two results says of the
        text: w_k, similarity of text and vision, warnings, version.
    """
    results = {}
    try:
        for name, options in zip(TEXTS, ({}, {"concepts": concepts}), strict=True):
            results[name] = infer(options)
        masks = {name: Path(result["file"]) for name, result in results.items()}
        grey, spacing, labels = read_for_picture(task, image, masks)
    finally:
        for result in results.values():
            Path(result["file"]).unlink(missing_ok=True)
    keys = ("concept_weights", "similarity", "warnings", "model_version")
    return {
        "volumes": volumes(task, grey, spacing, labels),
        "labels": scores(task, labels["before"], labels["after"]),
        "changed": int((labels["before"] != labels["after"]).sum()),
        **{name: {key: result["params"][key] for key in keys} for name, result in results.items()},
    }


def scores(task: Task, before: NDArray, after: NDArray) -> list[dict[str, Any]]:
    """Of each label: its name, Dice of the masks (None if both are empty), voxels in each, and changed voxels."""
    rows = []
    for name, value in task.label_values.items():
        first, second = before == value, after == value
        both, total = int((first & second).sum()), int(first.sum() + second.sum())
        rows.append(
            {
                "name": name,
                "dice": 2 * both / total if total else None,
                "before": int(first.sum()),
                "after": int(second.sum()),
                "changed": total - 2 * both,
            }
        )
    return rows


def volumes(task: Task, grey: NDArray, spacing: NDArray, labels: Mapping[str, NDArray]) -> dict[str, Any]:
    """Grey values and masks for a browser: bytes, RAS, the right-left axis running slowest, gzip, base64.

    A mask's byte is the label's place in `task.labels`, from 1. Along an axis of more than MOST voxels every second (or
    third …) voxel is taken: `step` says which.
    """
    step = [-(-n // MOST) for n in grey.shape]
    every = tuple(slice(None, None, s) for s in step)
    shown = grey[every]
    places = np.zeros(1 + max(task.label_values.values()), np.uint8)
    for place, value in enumerate(task.label_values.values(), 1):
        places[value] = place
    return {
        "shape": list(shown.shape),
        "spacing": [float(mm * s) for mm, s in zip(spacing, step, strict=True)],
        "step": step,
        "grey": _packed((shown * 255).round().astype(np.uint8)),
        **{name: _packed(places[mask[every]]) for name, mask in labels.items()},
    }


def _packed(array: NDArray[np.uint8]) -> str:
    return base64.b64encode(gzip.compress(np.ascontiguousarray(array).tobytes(), 1, mtime=0)).decode()
