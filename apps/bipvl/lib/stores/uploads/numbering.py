"""Uploads whose values are not the task's. 3D Slicer numbers the segments of its scene by position, so that a deleted,
added or moved segment changes all values after it; the names that it sends along say what they mean."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nrrd
import numpy as np
import torch
from monai.data import MetaTensor

from lib.stores.errors import StoreError
from lib.stores.uploads.names import label_of, named_values, task_for, task_named, to_task_values, whole_numbers
from lib.tasks import Task, TaskError
from lib.volumes.masks import write_mask
from lib.volumes.reading import rounded, unknown_values

SEGMENT = re.compile(r"Segment(\d+)_(Name|LabelValue)")


@dataclass(frozen=True)
class Renumbered:
    """A label in the values of a task.

    names: label name to value, of what the label shows.
    changed: the label (1, H, W, D) as it is to be kept; None if the file that was sent holds the right values.
    """

    names: dict[str, int]
    changed: MetaTensor | None

    def file(self, source: Path, folder: Path, image: Path) -> Path:
        """The file to keep: the one that was sent, or another one in `folder` with the geometry of the image."""
        if self.changed is None:
            return source
        mask = self.changed.numpy()[0]
        target = folder / "label.nii.gz"
        write_mask(
            target, mask.astype(np.min_scalar_type(int(mask.max()))), self.changed.affine.numpy(), str(image), {}
        )
        return target


def renumber(source: Path, label: MetaTensor, info: Mapping[str, Any], tasks: Sequence[Task]) -> Renumbered | None:
    """Take the names of an upload's values seriously.

    Args:
        source: the upload; a `.seg.nrrd` names its segments itself.
        label: (1, H, W, D), what it holds.
        info: what the client sent: `label_info`, and `model`, the task that is meant if several know the names.
        tasks: of this server.

    Returns:
        None if nothing is said about names: the values are then taken for the task's own.

    Raises:
        StoreError: a segment that is not empty and that no task knows, or an unknown model.
    """
    names = segment_names(source) or named_values(info.get("label_info"))
    if not names or not tasks:
        return None
    whole = whole_numbers(label.numpy())
    shown = [int(value) for value in np.flatnonzero(np.bincount(whole.ravel())) if value]
    task = _task(info.get("model"), [names[value] for value in shown if value in names], tasks)
    changed = to_task_values(whole, names, task)
    drawn = [label_of(names[value], task) for value in shown]
    same = np.array_equal(changed, label.numpy())  # a float's error is no value that other programs should read
    return Renumbered(
        {name: task.label_values[name] for name in drawn if name},
        None if same else MetaTensor(torch.from_numpy(changed.astype(np.int32)), affine=label.affine),
    )


def without_errors(label: MetaTensor) -> Renumbered | None:
    """A label whose values lost something as floats, with whole numbers; None if it holds whole numbers.

    Raises:
        StoreError: values that are not whole numbers but for a float's error.
    """
    whole = whole_numbers(label.numpy())
    if np.array_equal(whole, label.numpy()):
        return None
    return Renumbered({}, MetaTensor(torch.from_numpy(whole.astype(np.int32)), affine=label.affine))


def check_trainable(label: MetaTensor, info: Mapping[str, Any], tasks: Sequence[Task]) -> None:
    """Refuse what training would refuse, in its words: a value, or a class of `annotated`, that the task does not know.

    Args:
        label: (1, H, W, D), in the values of a task.
        info: what the client sent: `model` may name the task; else one of `tasks` has to know all of it.

    Raises:
        StoreError: no task can train on it; says why for each.
    """
    meant_for = [task for task in tasks if task.name == info.get("model")] or tasks
    values, problems = _values(label.numpy()), []
    for task in meant_for:
        if unknown := [value for value in values if value and value not in task.value_names]:
            problems.append(unknown_values(unknown, task, "the label"))
            continue
        try:
            if info.get("annotated") is not None:
                task.named(info["annotated"])
            return
        except TaskError as error:
            problems.append(f"{task.name}: {error}")
    if problems:
        raise StoreError("; ".join(problems))


def segment_names(source: Path) -> dict[int, str]:
    """Value to name, as the header of a `.seg.nrrd` says; empty for any other file."""
    if not source.name.lower().endswith(".seg.nrrd"):
        return {}
    found: dict[str, dict[str, str]] = {}
    for key, value in nrrd.read_header(str(source)).items():
        if match := SEGMENT.fullmatch(key):
            found.setdefault(match[1], {})[match[2]] = str(value)
    return {int(one["LabelValue"]): one["Name"] for one in found.values() if {"Name", "LabelValue"} <= set(one)}


def _values(voxels: np.ndarray) -> list[float]:
    """The different values of a label."""
    try:
        return [float(value) for value in np.flatnonzero(np.bincount(whole_numbers(voxels).ravel()))]
    except StoreError:  # rare, and slow
        return np.unique(rounded(voxels)).tolist()


def _task(model: Any, names: Sequence[str], tasks: Sequence[Task]) -> Task:
    if model:
        return task_named(model, tasks)
    return task_for(names, tasks) or tasks[0]  # which then says what it does not know
