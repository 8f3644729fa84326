"""Labels of an archive in the values of a task: uploads, and SEGs by the names of their segments."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydicom import dcmread
from pydicom.errors import InvalidDicomError

from lib.stores.dicom.seg import Segments, read_seg, referenced_series, source_instances
from lib.stores.errors import StoreError
from lib.stores.uploads.checks import check_label_file
from lib.stores.uploads.names import label_of, task_for, task_named, whole_numbers
from lib.tasks import Task
from lib.volumes.series import Volume

logger = logging.getLogger(__name__)


def task_of_seg(names: Iterable[str], saved_for: str, tasks: Sequence[Task]) -> Task | None:
    """The task that a SEG belongs to: the one that this app saved it for, else the one that knows most of its names."""
    saved = [task for task in tasks if task.name == saved_for and task_for(names, [task])]
    return saved[0] if saved else task_for(names, tasks)


def by_name(found: Segments, what: str, task: Task) -> tuple[np.ndarray, list[str] | None]:
    """A SEG in the values of its task, and the classes that it counts for (None: all).

    Segments that the task does not know are left out, and then the label counts for the classes that it does name: what
    else the image shows is not known.

    Args:
        what: to name in messages.
    """
    labels = [label_of(name, task) for name in found.names]
    unknown = [name for name, label in zip(found.names, labels, strict=True) if label is None]
    looked_for = found.declared
    if unknown:
        looked_for = list(dict.fromkeys(label for label in labels if label))
        logger.warning(
            "%s: task %s does not know the segments %s; the label counts for %s",
            *(what, task.name, ", ".join(unknown), ", ".join(looked_for)),
        )
    values = np.array([0, *(task.label_values[label] if label else 0 for label in labels)], np.uint16)
    return values[found.index], looked_for


def task_of(info: Mapping[str, Any], names: Mapping[int, str] | None, mask: np.ndarray, tasks: Sequence[Task]) -> Task:
    """The task that a label belongs to: the one that the client names, that knows its names, or that has its values.

    Args:
        info: what the client sent; `model` names the task.
        names: value to name, if the client or the file says so.

    Raises:
        StoreError: an unknown model, or values without names that could be those of several tasks.
    """
    if info.get("model") is not None:
        return task_named(info["model"], tasks)
    shown = [int(value) for value in np.flatnonzero(np.bincount(mask.ravel())) if value]
    if names is not None:
        named = [names[value] for value in shown if value in names] or list(names.values())
        return task_for(named, tasks) or tasks[0]  # which then says what it does not know
    fitting = [task for task in tasks if set(shown) <= set(task.value_names)] or list(tasks[:1])
    if len(fitting) > 1:
        raise StoreError(
            f"the values of the label could be those of {' or '.join(t.name for t in fitting)}: send label_info "
            "with their names, or model with the name of the task"
        )
    return fitting[0]


def voxels_of(file: Path, volume: Volume, image: Path, uid: str) -> np.ndarray:
    """Values of an uploaded file (columns, rows, slices) on the grid of its image.

    Args:
        file: a volume, or `.bin`: a byte per voxel, in the image's order.
        image: the image's file.

    Raises:
        StoreError: another number of voxels, or values that are not whole numbers.
        ValueError: another grid, or not readable.
    """
    if file.suffix.lower() == ".bin":
        voxels = np.fromfile(file, np.uint8)
        if voxels.size != np.prod(volume.shape):
            raise StoreError(f"the label has {voxels.size} bytes; its image has {np.prod(volume.shape)} voxels")
        return voxels.reshape(volume.shape, order="F")
    return whole_numbers(check_label_file(file, image, uid).numpy()[0])


def uploaded_seg(file: Path, uid: str, volume: Volume) -> Segments:
    """An uploaded SEG of an image.

    Raises:
        StoreError: not a SEG, or one of another series or grid.
    """
    try:
        ds = dcmread(file)
    except (InvalidDicomError, OSError) as error:
        raise StoreError(f"the label is not a DICOM file: {error}") from error
    drawn_on = referenced_series(ds)
    slices = {str(header.SOPInstanceUID) for header in volume.headers}
    if uid not in drawn_on and (drawn_on or slices.isdisjoint(source_instances(ds))):
        raise StoreError(f"the segmentation was drawn on series {', '.join(drawn_on) or 'unknown'}, not on {uid}")
    return read_seg(ds, volume)


def modalities(tasks: Iterable[Task]) -> list[str]:
    """The DICOM modalities of tasks, each once."""
    return list(dict.fromkeys("MR" if t.modality.upper() == "MRI" else t.modality.upper() for t in tasks))
