"""A class that gets another name in its task: the labels that name it follow, and no voxel changes.

Names stand in the records of labels (`annotated`, `label_names`, `label_info`) and in the headers of `.seg.nrrd` files.
What lies in `labels/history` and `labels/rejected` stays as it was.
"""

from __future__ import annotations

import copy
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lib.stores.document import Document, Infos
from lib.stores.errors import NotInStoreError, StoreError
from lib.stores.labelfiles import LabelFiles
from lib.tasks import Task, folded, meant
from lib.volumes.folders import newest, volumes

SEGMENT_NAME = re.compile(rb"^(Segment\d+_(?:Name|ID):=)(.*?)(\r?)$", re.MULTILINE)
BLANK_LINE = re.compile(rb"\r?\n\r?\n")


@dataclass(frozen=True)
class Renaming:
    """From one name of a class to another, for the labels of one task.

    Raises:
        StoreError: the task does not know the new name, or still knows the old one.
    """

    old: str
    new: str
    task: Task

    def __post_init__(self) -> None:
        valid = tuple(dict.fromkeys((*self.task.labels, *self.task.classes)))
        if self.new not in valid:
            raise StoreError(
                f"task {self.task.name!r} has no class {self.new!r}; valid are {', '.join(valid)}. Rename it in the "
                "task file and in the concepts file first"
            )
        if meant(self.old, valid) not in (None, self.new):
            raise StoreError(
                f"task {self.task.name!r} still has the class {self.old!r}: rename it in the task file and in the "
                "concepts file first"
            )

    def of(self, name: Any) -> Any:
        """A name after the change."""
        return self.new if isinstance(name, str) and folded(name) == folded(self.old) else name

    def applies(self, info: dict[str, Any]) -> bool:
        """False for a label of another task, where the name has another value."""
        names, values = info.get("label_names"), self.task.value_names
        if not isinstance(names, dict):
            return True
        return all(self.of(name) == name or values.get(value) == self.new for name, value in names.items())

    def info(self, info: dict[str, Any]) -> dict[str, Any]:
        """A label's record after the change."""
        if not self.applies(info):
            return info
        names, changed = info.get("label_names"), copy.deepcopy(info)
        if isinstance(names, dict):
            changed["label_names"] = {self.of(name): value for name, value in names.items()}
        if isinstance(info.get("annotated"), list):
            changed["annotated"] = list({str(name): self.of(name) for name in info["annotated"]}.values())
        if isinstance(info.get("label_info"), list):
            for entry in changed["label_info"]:
                if isinstance(entry, dict) and "name" in entry:
                    entry["name"] = self.of(entry["name"])
        return changed

    def header(self, path: Path) -> bytes | None:
        """The bytes of a `.seg.nrrd` after the change, None if its header does not name the class."""
        if not path.name.lower().endswith(".seg.nrrd"):
            return None
        content = path.read_bytes()
        blank = BLANK_LINE.search(content)
        head, rest = (content[: blank.start()], content[blank.start() :]) if blank else (content, b"")

        def rename(line: re.Match[bytes]) -> bytes:
            name = line[2].decode("utf-8", "surrogateescape")
            return line[1] + self.of(name).encode("utf-8", "surrogateescape") + line[3]

        changed = SEGMENT_NAME.sub(rename, head)
        return changed + rest if changed != head else None


def planned(labels: LabelFiles, infos: Document, renaming: Renaming) -> list[str]:
    """The places of the labels that a renaming changes, `labels/final/a.nii.gz`."""
    found = []
    for case, tag, path in _labels(labels):
        info = infos.label(case, tag, path).info
        if renaming.applies(info) and (renaming.info(info) != info or renaming.header(path) is not None):
            found.append(path.relative_to(labels.studies).as_posix())
    return found


def rename_class(labels: LabelFiles, infos: Infos, renaming: Renaming) -> list[str]:
    """Do it, and return what `planned` said. The caller holds the folder's lock.

    All records change at once. A `.seg.nrrd` is written anew, and the one that was there goes into the history; a kill
    in between leaves headers with the old name, which the next call changes.

    Raises:
        NotInStoreError: no label names the class.
        OSError: what was not changed yet stays as it was.
    """
    places = planned(labels, infos.read(), renaming)
    if not places:
        raise NotInStoreError(f"no label of the folder names the class {renaming.old!r}")
    with infos.change() as document:
        for announced in document.announced.values():
            announced.record.info = renaming.info(announced.record.info)
        for entry in document.objects.values():
            for record in entry.labels.values():
                record.info = renaming.info(record.info)
    for case, tag, path in _labels(labels):
        info = dict(infos.read().label(case, tag, path).info)
        content = renaming.header(path) if renaming.applies(info) else None
        if content is not None:
            with tempfile.TemporaryDirectory() as folder:
                changed = Path(folder) / path.name
                changed.write_bytes(content)
                labels.put(case, tag, changed, info)
    return places


def _labels(labels: LabelFiles) -> Iterator[tuple[str, str, Path]]:
    for tag in labels.tags():
        for case, paths in volumes(labels.folder / tag).items():
            yield case, tag, newest(paths)
