"""What goes from this app to an archive: labels as segmentations (SEG), with who drew each of their segments."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
from pydicom.dataset import Dataset

from lib.files import FINAL, ORIGINAL
from lib.stores.cases import declared
from lib.stores.dicom.archive import Archive, SeriesEntry
from lib.stores.dicom.cache import ImageCache
from lib.stores.dicom.copies import Copies, facts_of
from lib.stores.dicom.labels import task_of, uploaded_seg, voxels_of
from lib.stores.dicom.listing import Listings, description
from lib.stores.dicom.proposals import Proposals
from lib.stores.dicom.seg import MadeBy, write_seg
from lib.stores.errors import StoreError
from lib.stores.uploads.checks import plain
from lib.stores.uploads.names import named_values, to_task_values
from lib.stores.uploads.numbering import segment_names
from lib.tasks import Task
from lib.volumes.series import Volume

logger = logging.getLogger(__name__)

EMPTY = (
    "the label is empty. If none of its structures is in the image, say so: send 'annotated' with the names of the "
    "classes that you looked for. Otherwise draw, and submit again"
)


class Saving:
    """Labels on their way to the archive, and the model's masks, against which a saved label is compared.

    Args:
        tasks: of this server.
        software: this app's version, written into SEGs.
    """

    def __init__(
        self,
        archive: Archive,
        images: ImageCache,
        copies: Copies,
        listings: Listings,
        proposals: Proposals,
        tasks: Sequence[Task],
        software: str,
    ) -> None:
        self._archive, self._images, self._copies, self._listings = archive, images, copies, listings
        self._proposals, self._tasks, self._software = proposals, tasks, software

    def save(self, entry: SeriesEntry, source: Path, tag: str, label_info: dict[str, Any] | None) -> None:
        """Make a file the label of an image: with the tag `final` in the archive, else only here. The caller holds the
        series.

        Args:
            source, label_info: as `lib.stores.dicom.store.DicomStore.save_label` takes them.

        Raises:
            ValueError: not a label of this image.
            ArchiveError: the archive did not take it.
        """
        uid, info = entry.uid, plain(label_info)
        looked_for = declared(info["annotated"]) if info.get("annotated") is not None else None
        volume = self._images.volume(entry)
        mask, task, said = self._received(source, uid, volume, info)
        looked_for = said if looked_for is None else looked_for
        if looked_for is not None:
            info["annotated"] = looked_for = task.named(looked_for)
        if tag != FINAL:
            self._copies.put(uid, tag, mask, task, info)
            return
        if not mask.any() and looked_for is None:
            raise StoreError(EMPTY)
        kept = self._proposals.unchanged(uid, task, mask)
        latest = self._listings.now(fresh=True).labels.get(uid)
        when = datetime.now()
        if latest:  # a clock that was set back must not make this label an old one
            when = max(when, datetime.fromisoformat(latest[0].created) + timedelta(milliseconds=1))
        ds = write_seg(
            mask,
            volume,
            task,
            tag=FINAL,
            when=when,
            software=self._software,
            author=str(info.get("user") or ""),
            made_by={name: MadeBy(version, accepted=True) for name, version in kept.items()},
            declared=looked_for,
        )
        self._archive.store(ds)
        seg = description(ds)
        try:
            self._copies.put(uid, FINAL, mask, task, {**info, **facts_of(seg)})
        except (OSError, StoreError) as error:
            logger.warning("SEG %s is in the archive; its copy here failed: %s", seg.instance, error)
        self._listings.add(seg)

    def propose(self, entry: SeriesEntry, task: Task, version: int, mask: Path) -> None:
        """Remember a model's mask of an image."""
        self._proposals.add(entry.uid, task, version, self._voxels(mask, entry, self._images.volume(entry)))

    def draft(self, entry: SeriesEntry, task: Task, version: int, mask: Path) -> Dataset:
        """A model's mask as a SEG that does not count as a label."""
        volume = self._images.volume(entry)
        return write_seg(
            self._voxels(mask, entry, volume),
            volume,
            task,
            tag=ORIGINAL,
            when=datetime.now(),
            software=self._software,
            made_by={name: MadeBy(version) for name in task.labels},
        )

    def _voxels(self, file: Path, entry: SeriesEntry, volume: Volume) -> np.ndarray:
        return voxels_of(file, volume, self._images.path(entry.uid), entry.uid)

    def _received(
        self, source: Path, uid: str, volume: Volume, info: dict[str, Any]
    ) -> tuple[np.ndarray, Task, list[str] | None]:
        """An upload in the values of its task, and the classes that it declares."""
        if source.suffix.lower() == ".dcm":
            found = uploaded_seg(source, uid, volume)
            names: dict[int, str] | None = dict(enumerate(found.names, start=1))
            mask, said = found.index, found.declared
        else:
            mask, said = voxels_of(source, volume, self._images.path(uid), uid), None
            names = segment_names(source) or named_values(info.get("label_info"))
        task = task_of(info, names, mask, self._tasks)
        return to_task_values(mask, names, task), task, said
