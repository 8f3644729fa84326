"""Copies of an archive's images: each series is downloaded once, as NIfTI and the headers of its slices."""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
import time
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path

from pydicom import dcmread

from lib.stores.dicom.archive import Archive, SeriesEntry
from lib.stores.labelfolder import LabelFolder
from lib.stores.locks import SERIES_SECONDS, Lock, Order
from lib.volumes.series import SeriesError, Volume, read_headers, volume_of, write_nifti

logger = logging.getLogger(__name__)

HEADERS = "dicom"
MARKER = "series.json"  # written last: what is beside it is whole
UNFINISHED = ".unfinished-"
ABANDONED_SECONDS = 86400.0
VOLUMES = 8  # headers kept in memory


class ImageCache:
    """Images of an archive in a folder: `<series>.nii.gz`, and headers in `dicom/<series>/`.

    Args:
        kept: the folder; several processes may use it.
        archive: where images come from.
    """

    def __init__(self, kept: LabelFolder, archive: Archive) -> None:
        self._kept, self._folder, self._archive = kept, kept.path, archive
        self._locks: dict[str, Lock] = {}
        self._volumes: OrderedDict[tuple[str, int], Volume] = OrderedDict()
        self._unusable: dict[str, tuple[int | None, SeriesError]] = {}
        for left in (self._folder / HEADERS).glob(f"{UNFINISHED}*"):  # of a server that was killed
            if time.time() - left.stat().st_mtime > ABANDONED_SECONDS:
                shutil.rmtree(left, ignore_errors=True)

    def lock(self, uid: str) -> Lock:
        """Held by who works on a series."""
        return self._locks.setdefault(uid, Lock(Order.SERIES, f"series {uid}", SERIES_SECONDS))

    def unusable(self, entry: SeriesEntry) -> bool:
        """Whether a series was found not to be a volume, and has not grown since."""
        return self._unusable.get(entry.uid, (-1, None))[0] == entry.instances and entry.uid in self._unusable

    def path(self, uid: str) -> Path:
        """Where the image is, or will be."""
        return self._folder / f"{uid}.nii.gz"

    def has(self, uid: str, instances: int | None = None) -> bool:
        """Whether the image is here, of as many slices."""
        with suppress(OSError, ValueError, KeyError):
            known = json.loads((self._folder / HEADERS / uid / MARKER).read_text())["instances"]
            return self.path(uid).is_file() and instances in (None, known)
        return False

    def image(self, entry: SeriesEntry) -> Path:
        """The image, downloaded if it is not here or has more slices by now.

        Raises:
            SeriesError: the series is not a volume.
            ArchiveError: it cannot be downloaded.
        """
        with self.lock(entry.uid):
            if not self.has(entry.uid, entry.instances):
                if self.unusable(entry):
                    raise self._unusable[entry.uid][1]
                try:
                    self._download(entry)
                except SeriesError as error:
                    self._unusable[entry.uid] = (entry.instances, error)
                    logger.warning("Left out: %s", error)
                    raise
        return self.path(entry.uid)

    def volume(self, entry: SeriesEntry) -> Volume:
        """The grid and headers of an image; raises as `image`."""
        with self.lock(entry.uid):
            self.image(entry)
            folder = self._folder / HEADERS / entry.uid
            key = (entry.uid, (folder / MARKER).stat().st_mtime_ns)
            if key not in self._volumes:
                self._volumes[key] = read_headers(folder)
                while len(self._volumes) > VOLUMES:
                    self._volumes.popitem(last=False)
            return self._volumes[key]

    def _download(self, entry: SeriesEntry) -> None:
        headers = self._folder / HEADERS
        headers.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=UNFINISHED, dir=headers) as name:
            work = Path(name)
            files = self._archive.download(entry.study, entry.uid, work)
            slices = {}
            for file in files:
                ds = dcmread(file, stop_before_pixels=True)
                slices[str(ds.get("SOPInstanceUID", file.name))] = file, ds
            volume = volume_of([ds for _, ds in slices.values()])
            write_nifti({uid: file for uid, (file, _) in slices.items()}, volume, work / "image.nii.gz")
            for file, ds in slices.values():
                ds.save_as(file)  # without pixels
            (work / MARKER).write_text(json.dumps({"instances": entry.instances or len(files)}))
            target = headers / entry.uid
            with self._kept.writing():  # another process may have downloaded the same series
                os.replace(work / "image.nii.gz", self.path(entry.uid))
                shutil.rmtree(target, ignore_errors=True)
                os.replace(work, target)
            work.mkdir()  # for the context manager to remove
