"""What is known about images and labels beyond their files: MONAI Label's `datastore_v2.json`, in its own schema.

Files are the truth; this document only adds to them. It is written beside its place, synced and renamed, the previous
generation stays as `datastore_v2.json.bak`, and a damaged one is set aside and never stops the server.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, BinaryIO
from uuid import uuid4

from pydantic import BaseModel, ConfigDict

from lib.files import sha256

logger = logging.getLogger(__name__)

STAGED = ".saving-"  # files that are not yet in their place; only ever there while the folder is locked
NO_HARD_LINKS = (errno.EPERM, errno.EACCES, errno.EOPNOTSUPP, errno.ENOSYS, errno.EXDEV, errno.EMLINK)


class Record(BaseModel):
    """One file: its extension and what is known about it."""

    model_config = ConfigDict(extra="allow")
    ext: str = ""
    info: dict[str, Any] = {}


class Entry(BaseModel):
    """One image and its labels by tag."""

    model_config = ConfigDict(extra="allow")
    image: Record = Record()
    labels: dict[str, Record] = {}


class Announced(BaseModel):
    """The record of a label about to be put in its place: it holds once the file there has this digest."""

    sha256: str
    record: Record


class Document(BaseModel):
    """The whole of `datastore_v2.json`. MONAI Label ignores `announced`."""

    model_config = ConfigDict(extra="allow")
    name: str = "new-dataset"
    description: str = "New Dataset"
    images_dir: str = "."
    labels_dir: str = "labels"
    objects: dict[str, Entry] = {}
    announced: dict[str, Announced] = {}

    def entry(self, case: str) -> Entry:
        """The entry of an image, made if there is none."""
        return self.objects.setdefault(case, Entry())

    def image(self, case: str) -> Record:
        return self.objects[case].image if case in self.objects else Record()

    def label(self, case: str, tag: str, path: Path) -> Record:
        """The record that belongs to a label's file, even if a save was cut off between file and record."""
        announced = self.announced.get(f"{tag}/{case}")
        if announced and digest(path) == announced.sha256:
            return announced.record
        return self.objects[case].labels.get(tag, Record()) if case in self.objects else Record()

    def announce(self, case: str, tag: str, sha256: str, record: Record) -> None:
        self.announced[f"{tag}/{case}"] = Announced(sha256=sha256, record=record)

    def settle(self, case: str, tag: str, record: Record | None) -> None:
        """Write down a label's record, or with None that the label is gone."""
        self.announced.pop(f"{tag}/{case}", None)
        if record:
            self.entry(case).labels[tag] = record
        elif case in self.objects:
            self.objects[case].labels.pop(tag, None)


class Infos:
    """The document of one studies folder. Threads and processes may read at any time; who changes holds the lock."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "datastore_v2.json"
        self.backup = folder / "datastore_v2.json.bak"
        self._cache: tuple[Any, Document] | None = None

    def read(self) -> Document:
        """The document as it is on disk, empty if there is none. Shared between callers: not to be changed."""
        try:
            stat = self.path.stat()
            signature: Any = (stat.st_ino, stat.st_mtime_ns, stat.st_size)
        except OSError as error:
            signature = error.errno
        cached = self._cache
        if cached is None or cached[0] != signature:
            cached = (signature, self._load())
            self._cache = cached
        return cached[1]

    @contextmanager
    def change(self) -> Iterator[Document]:
        """A copy to change; it is written when the block ends without an error.

        Raises:
            OSError: nothing was changed.
        """
        try:
            document = Document.model_validate_json(self.path.read_bytes())
        except (FileNotFoundError, ValueError):
            self.set_damaged_aside()
            document = self._load()
        yield document
        text = document.model_dump_json(indent=2).encode()
        staged = stage(self.path.parent, lambda file: file.write(text))
        try:
            if self.path.exists():
                generation = self.path.with_name(f"{STAGED}{uuid4().hex}")
                link_or_copy(self.path, generation)
                os.replace(generation, self.backup)
                generation.unlink(missing_ok=True)  # replace does nothing if both are one file
            os.replace(staged, self.path)
        except BaseException:
            staged.unlink(missing_ok=True)
            raise
        sync_folder(self.path.parent)

    def set_damaged_aside(self) -> None:
        """Rename what cannot be read to `….damaged-<time>`, so that it is neither used nor overwritten."""
        for path in (self.path, self.backup):
            try:
                Document.model_validate_json(path.read_bytes())
            except FileNotFoundError:
                continue
            except ValueError:
                stamp = datetime.now(timezone.utc).strftime("%Y%m%dT%H%M%S.%fZ")
                aside = path.with_name(f"{path.name}.damaged-{stamp}")
                path.rename(aside)
                logger.warning("%s was damaged; it is set aside as %s", path, aside.name)

    def _load(self) -> Document:
        for path in (self.path, self.backup):
            try:
                return Document.model_validate_json(path.read_bytes())
            except FileNotFoundError:
                continue
            except (ValueError, OSError) as error:
                reason = " ".join(str(error).split())[:200]
                logger.warning("%s cannot be read; going on with an earlier one or the files alone: %s", path, reason)
        return Document()


def stage(folder: Path, write: Callable[[BinaryIO], Any]) -> Path:
    """Write a hidden file completely to disk, to be renamed into its place.

    Raises:
        OSError: nothing is left behind.
    """
    path = folder / f"{STAGED}{uuid4().hex}"
    try:
        with path.open("xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return path


def stage_copy(source: Path, folder: Path) -> Path:
    """Stage a copy of a file; errors as `stage`."""
    with source.open("rb") as original:
        return stage(folder, lambda file: shutil.copyfileobj(original, file, 1 << 20))


def link_or_copy(source: Path, target: Path) -> None:
    """Give a file a second name, or if the file system has no hard links, a copy.

    Raises:
        FileExistsError: the target is there; it is never overwritten.
        OSError: nothing was changed.
    """
    try:
        os.link(source, target, follow_symlinks=False)
        return
    except OSError as error:
        if error.errno not in NO_HARD_LINKS:
            raise
    if os.path.lexists(target):  # the folder is locked, nobody makes it meanwhile
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
    os.rename(stage_copy(source, target.parent), target)


def sync_folder(folder: Path) -> None:
    """Wait until renames in a folder are on disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def digest(path: Path) -> str:
    """SHA-256 of a file, empty if it cannot be read."""
    try:
        return sha256(path)
    except OSError:
        return ""
