"""A folder that a store keeps files in: its labels (`.labelfiles`), what is known about its files (`.document`), and
its lock, which is the last in the order of `.locks`."""

from __future__ import annotations

import copy
import errno
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from filelock import FileLock, Timeout

from lib.stores.cases import declared
from lib.stores.document import STAGED, Document, Infos
from lib.stores.errors import ConflictError, NotInStoreError, ReadOnlyError, StoreError
from lib.stores.labelfiles import LabelFiles, check_tag, facts
from lib.stores.locks import LOCK_SECONDS, Lock, Order
from lib.stores.uploads.checks import plain
from lib.stores.uploads.names import check_annotated
from lib.tasks import Task
from lib.volumes.folders import counted, newest, usable, volumes

logger = logging.getLogger(__name__)

UNCERTAINTY = "uncertainty"  # the tag of maps
READ_ONLY_ERRORS = (errno.EROFS, errno.EACCES, errno.EPERM)


class LabelFolder:
    """Files of a store, safe between threads and processes. "The caller holds the folder" is to be inside `writing`.

    Args:
        path: made if it does not exist.
        read_only: refuse every change; a folder that cannot be written to does the same by itself.

    Raises:
        StoreError: the folder does not exist and cannot be made.
    """

    def __init__(self, path: Path, read_only: bool = False) -> None:
        self.path, self.read_only = path.resolve(), read_only
        self.infos = Infos(self.path)
        self.labels = LabelFiles(self.path, self.infos)
        self._lock = Lock(Order.FOLDER, f"the folder {self.path.name}")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(f"{self.path}: cannot be used as the folder of studies: {error.strerror}") from error
        try:
            with self.writing():
                for left in (*self.path.glob(f"{STAGED}*"), *self.labels.folder.glob(f"*/{STAGED}*")):
                    left.unlink(missing_ok=True)  # of a server that was killed while saving
                self.infos.set_damaged_aside()
        except (StoreError, OSError) as error:
            logger.warning("%s", error)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """One change at a time, among threads and processes; not to be nested.

        Raises:
            ReadOnlyError: nothing can be changed.
            ConflictError: the folder is gone, or another program has held it for too long.
            BusyError: another thread has.
        """
        if self.read_only:
            refuse_change()
        if not self.path.is_dir():
            raise ConflictError(f"{self.path.name}: the folder of studies is not there at the moment")
        try:
            with self._lock, FileLock(self.path / ".lock", timeout=LOCK_SECONDS):
                yield
        except Timeout:
            raise ConflictError(f"another program has held {self.path.name}/.lock for {LOCK_SECONDS:g} s") from None
        except OSError as error:
            if error.errno in READ_ONLY_ERRORS:
                refuse_change(str(error.strerror))
            raise

    # What there is ------------------------------------------------------------------------------------------------

    def objects(self, infos: Document) -> dict[str, Any]:
        """Images by id with their labels by tag, in the schema of `datastore_v2.json`."""
        by_tag = {tag: volumes(self.labels.folder / tag) for tag in self.labels.tags()}
        found: dict[str, Any] = {}
        for case, path in usable(self.path)[0].items():
            try:
                image = {"ext": path.name[len(case) :], "info": {**facts(path), **infos.image(case).info}}
                entry: dict[str, Any] = {"image": image, "labels": {}}
                for tag in (tag for tag, files in by_tag.items() if case in files):
                    label = newest(by_tag[tag][case])
                    record = {**facts(label), **infos.label(case, tag, label).info}
                    entry["labels"][tag] = {"ext": label.name[len(case) :], "info": record}
                found[case] = entry
            except OSError as error:  # it went away since it was listed
                logger.warning("%s: image %r cannot be looked at: %s", self.path, case, error.strerror)
        return copy.deepcopy(found)

    def counts_for_nothing(self) -> dict[str, Any]:
        """If there are any: `left_out`, images and label files that cannot be used, and why;
        `labels_without_image`, label files whose name is that of no image."""
        images, problems = usable(self.path)
        left_out, lost = {**problems, **self.labels.problems()}, self.labels.without({*images, *problems})
        return {
            **({"left_out": counted(left_out)} if left_out else {}),
            **({"labels_without_image": counted(lost)} if lost else {}),
        }

    def report(self) -> None:
        """Say the same in the log."""
        images, problems = usable(self.path)
        for reason in problems.values():
            logger.warning("%s: %s", self.path, reason)
        for place, reason in self.labels.problems().items():
            logger.warning("%s: %s is left out: %s", self.path, place, reason)
        if lost := self.labels.without({*images, *problems}):
            names = counted(lost)["files"]
            more = ", …" if len(lost) > len(names) else ""
            logger.warning("%s: %d label file(s) without an image: %s%s", self.path, len(lost), ", ".join(names), more)

    # Texts of the whole -------------------------------------------------------------------------------------------

    def set_name(self, name: str) -> None:
        with self.writing(), self.infos.change() as document:
            document.name = name

    def set_description(self, description: str) -> None:
        with self.writing(), self.infos.change() as document:
            document.description = description

    # Labels -------------------------------------------------------------------------------------------------------

    def label(self, case: str, label_tag: str) -> Path:
        """The file of a label.

        Raises:
            NotInStoreError: there is none; with the tags in use.
        """
        tag = check_tag(label_tag)
        paths = self.labels.of(case, tag)
        if not paths:
            raise NotInStoreError(
                f"no label {str(case)[:80]!r} with tag {tag!r}; tags are {', '.join(self.labels.tags()) or 'none'}"
            )
        return newest(paths)

    def label_info(self, case: str, label_tag: str, path: Path) -> dict[str, Any]:
        """What is known about a label's file."""
        return {**facts(path), **copy.deepcopy(self.infos.read().label(case, check_tag(label_tag), path).info)}

    def tags_of(self, case: str) -> list[str]:
        """The tags under which an image has a label."""
        return [tag for tag in self.labels.tags() if self.labels.of(case, tag)]

    def put_map(self, case: str, file: Path, info: dict[str, Any]) -> None:
        """Keep what a model computed for an image, in place of an earlier one. The caller holds the folder."""
        self.labels.put(case, UNCERTAINTY, file, info, history=False)

    def remove_label(self, case: str, label_tag: str) -> None:
        """Take a label away, into the history.

        Raises:
            NotInStoreError: there is none.
        """
        with self.writing():
            self.label(case, label_tag)
            self.labels.retire(case, check_tag(label_tag))

    def note_label(self, case: str, label_tag: str, info: Any, tasks: Sequence[Task]) -> None:
        """Add to what is known about a label; `annotated` is checked against the tasks, None takes it away.

        Raises:
            NotInStoreError: there is no such label.
            StoreError: not an object, not a list of class names, or names that no task has.
        """
        news, tag = refused(plain, info), check_tag(label_tag)
        if news.get("annotated") is not None:
            check_annotated(refused(declared, news["annotated"]), tasks)
        with self.writing():
            path = self.label(case, tag)
            with self.infos.change() as document:
                record = document.label(case, tag, path).model_copy(deep=True)
                record.ext = path.name[len(case) :]
                record.info = {**facts(path), **record.info, **news}
                document.settle(case, tag, record)

    # Images -------------------------------------------------------------------------------------------------------

    def note_image(self, case: str, extension: str, known: Mapping[str, Any], news: Mapping[str, Any]) -> None:
        """Add to what is known about an image. The caller holds the folder.

        Args:
            known: what `news` and earlier notes are added to.
        """
        with self.infos.change() as document:
            record = document.entry(case).image
            record.ext, record.info = extension, {**known, **record.info, **news}
            record.info.pop("path", None)  # of this machine


def refuse_change(reason: str = "the server was told so (MONAI_LABEL_DATASTORE_READ_ONLY)") -> NoReturn:
    """Raises ReadOnlyError, which says why."""
    raise ReadOnlyError(f"the studies can only be read and nothing can be saved: {reason}")


def refused(check: Callable[[Any], Any], value: Any) -> Any:
    """Run a check, its refusal as a StoreError."""
    try:
        return check(value)
    except ValueError as error:
        raise StoreError(str(error)) from error
