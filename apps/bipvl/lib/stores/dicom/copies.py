"""The labels of an archive's images as files: copies of its segmentations (SEG) in the values of their tasks.

Who makes or reads the copy of a series holds the series, and takes the folder only for the moment of writing
(`lib.stores.locks`).
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lib.files import FINAL
from lib.stores.dicom.archive import Archive, SeriesEntry
from lib.stores.dicom.cache import ImageCache
from lib.stores.dicom.labels import by_name, task_of_seg
from lib.stores.dicom.listing import Segmentation
from lib.stores.dicom.seg import read_seg
from lib.stores.labelfolder import LabelFolder
from lib.tasks import Task
from lib.volumes.masks import write_mask
from lib.volumes.reading import read_header


class Copies:
    """Labels in a folder, beside the images of a cache.

    Args:
        folder: where.
        images: of the same folder.
        archive: where SEGs come from.
        tasks: of this server.
    """

    def __init__(self, folder: LabelFolder, images: ImageCache, archive: Archive, tasks: Sequence[Task]) -> None:
        self._folder, self._images, self._archive, self._tasks = folder, images, archive, tasks

    def final(self, entry: SeriesEntry, seg: Segmentation) -> tuple[Path, dict[str, Any]]:
        """The copy of a SEG of an image, made if it is not here, and what is known about it.

        Raises:
            StoreError: the image is not a volume, or the SEG is not on its grid.
            ArchiveError: one of them cannot be had.
        """
        uid = entry.uid
        task = task_of_seg(seg.names, seg.task, self._tasks)
        assert task, "a listed label has a task"
        with self._images.lock(uid):
            volume = self._images.volume(entry)
            paths = self._folder.labels.of(uid, FINAL)
            if paths:
                info = self._folder.infos.read().label(uid, FINAL, paths[-1]).info
                if info.get("segmentation") == seg.instance and info.get("read_as") == _reading(volume.shape, task):
                    return paths[-1], info
            found = read_seg(self._archive.instance(seg.study, seg.series, seg.instance), volume)
            mask, looked_for = by_name(found, f"SEG {seg.instance}", task)
            info = {**facts_of(seg), "annotated": looked_for}
            return self.put(uid, FINAL, mask, task, {k: v for k, v in info.items() if v is not None})

    def put(
        self, uid: str, tag: str, mask: np.ndarray, task: Task, info: dict[str, Any]
    ) -> tuple[Path, dict[str, Any]]:
        """Put a label into the folder; the one that was there goes into the history. The caller holds the series.

        Args:
            mask: (columns, rows, slices), values of the task.
        """
        info = {**info, "task": task.name, "read_as": _reading(mask.shape, task)}
        with tempfile.TemporaryDirectory() as name:
            file, image = Path(name) / f"{uid}.nii.gz", self._images.path(uid)
            kind = np.uint8 if mask.max(initial=0) < 256 else np.uint16
            write_mask(file, mask.astype(kind), read_header(image).affine.numpy(), str(image), {})
            with self._folder.writing():
                self._folder.labels.put(uid, tag, file, info)
        return self._folder.labels.of(uid, tag)[-1], info


def facts_of(seg: Segmentation) -> dict[str, Any]:
    """What an info says about the SEG that a label is a copy of."""
    return {
        "segmentation": seg.instance,
        "SeriesInstanceUID": seg.series,
        "StudyInstanceUID": seg.study,
        "created": seg.created,
        "segments": list(seg.names),
    }


def _reading(shape: Sequence[int], task: Task) -> dict[str, Any]:
    """What a copy of a SEG depends on beside the SEG: the grid, and the values of the task."""
    return {"shape": list(shape), "task": task.name, "values": task.label_values}
