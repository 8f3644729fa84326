"""Label files: what is replaced, removed or refused is kept, and a kill at any instant leaves whole files.

labels/<tag>/<id>.nii.gz                          the current label of each tag; tag `final` trains
labels/history/<tag>/<id>/<saved at>-<user>.…     every label that was replaced or removed, and beside it its info
labels/rejected/<id>/<received at>-<user>.…       uploads that cannot be labels, and beside them the reason
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Collection
from contextlib import suppress
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any, NoReturn

from lib.stores.document import Infos, Record, digest, link_or_copy, stage, stage_copy, sync_folder
from lib.stores.errors import ReadOnlyError, StoreError
from lib.stores.uploads.checks import suffix_of
from lib.volumes.folders import SUFFIXES, image_id, listing, newest, volumes
from lib.volumes.series import SeriesError

logger = logging.getLogger(__name__)

TAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
RESERVED_TAGS = ("history", "rejected")
STAMP = "%Y%m%dT%H%M%S.%fZ"
EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)
MAX_ID_BYTES = 200


def check_tag(tag: str) -> str:
    """The tag as plain text.

    Raises:
        StoreError: not a tag; the message says what is.
    """
    # MONAI Label's own tags are members of an Enum.
    plain = str.__str__(tag) if isinstance(tag, str) else ""
    if not TAG.fullmatch(plain) or plain.lower() in RESERVED_TAGS:
        raise StoreError(
            f"tag {str(tag)[:80]!r}: valid are up to 64 letters, digits, '-' and '_', "
            f"but not {' or '.join(RESERVED_TAGS)}"
        )
    return plain


def check_new_id(case: str) -> str:
    """The id of an image to come: one name that is safe in a path on any system.

    Raises:
        StoreError: saying what is wrong.
    """
    if not case or case != case.strip() or case.startswith(".") or not case.isprintable():
        problem = "must be visible characters, without a leading dot"
    elif ".." in case or any(c in case for c in '/\\:*?"<>|'):
        problem = "must hold no '..' and none of / \\ : * ? \" < > |"
    elif len(case.encode()) > MAX_ID_BYTES:
        problem = f"is longer than {MAX_ID_BYTES} bytes"
    else:
        return case
    raise StoreError(f"image id {case[:80]!r} {problem}")


class LabelFiles:
    """The labels of one studies folder. Who changes something holds the folder's lock.

    Args:
        folder: the studies folder, resolved.
        infos: what is known about its files.
    """

    def __init__(self, folder: Path, infos: Infos) -> None:
        self.studies = folder
        self.folder = folder / "labels"
        self.infos = infos

    def tags(self) -> list[str]:
        """Tags in use, in order."""
        with suppress(FileNotFoundError, NotADirectoryError):
            names = sorted(entry.name for entry in os.scandir(self.folder))
            tags = (n for n in names if TAG.fullmatch(n) and n.lower() not in RESERVED_TAGS)
            return [n for n in tags if os.path.isdir(self.folder / n)]
        return []

    def problems(self) -> dict[str, str]:
        """Label files that cannot be used, by their place in the studies folder, and why."""
        found = ((tag, listing(self.folder / tag).problems) for tag in self.tags())
        return {f"labels/{tag}/{name}": reason for tag, problems in found for name, reason in problems.items()}

    def without(self, images: Collection[str]) -> list[str]:
        """The places of label files that belong to none of these images: `x_seg.nii.gz`, or an image's old name."""
        found = (volumes(self.folder / tag) for tag in self.tags())
        paths = [p for labels in found for case, files in labels.items() if case not in images for p in files]
        return [path.relative_to(self.studies).as_posix() for path in paths]

    def of(self, case: str, tag: str) -> list[Path]:
        """The label files of an image: none, one, or after a cut-off save several, of which the newest counts."""
        return files_of(self.folder / tag, case)

    def put(self, case: str, tag: str, source: Path, info: dict[str, Any], history: bool = True) -> None:
        """Make a checked file the label of an image. The one that was there goes into the history; without `history`,
        for what a program can make again, it does not.

        The order matters: a kill between any two steps leaves a whole label with the record that belongs to it.

        Raises:
            OSError: the label that was there is untouched.
        """
        folder = self._own_folder(self.folder / tag)
        old = self.of(case, tag)
        target = folder / f"{case}{suffix_of(source)}"
        record = Record(ext=suffix_of(source), info=info)
        staged = stage_copy(source, folder)
        kept: list[Path] = []
        try:
            latest = max((p.stat().st_mtime_ns for p in old), default=0)
            if staged.stat().st_mtime_ns <= latest:  # the clock was set back; the newest of two files counts
                os.utime(staged, ns=(latest + 1000, latest + 1000))
            record.info |= {"ts": staged.stat().st_mtime_ns // 10**9, "name": target.name}
            with self.infos.change() as document:
                for path in old if history else ():
                    kept += self._keep(path, case, tag, document.label(case, tag, path))
                if old:
                    document.settle(case, tag, document.label(case, tag, newest(old)))
                document.announce(case, tag, digest(staged), record)
            os.replace(staged, target)
        except BaseException:
            if staged.exists():
                for path in (staged, *kept):
                    path.unlink(missing_ok=True)
            raise
        sync_folder(folder)
        for path in old:
            if path != target:
                path.unlink(missing_ok=True)
        try:
            with self.infos.change() as document:
                document.settle(case, tag, record)
        except OSError as error:
            logger.warning("Label %s is saved; its announced record holds, the final one failed: %s", target, error)

    def retire(self, case: str, *tags: str) -> None:
        """Move an image's labels, of these tags or all, into the history."""
        with self.infos.change() as document:
            for tag in tags or self.tags():
                for path in self.of(case, tag):
                    self._keep(path, case, tag, document.label(case, tag, path))
                    path.unlink()
                document.settle(case, tag, None)

    def _keep(self, path: Path, case: str, tag: str, record: Record) -> list[Path]:
        """Put a label and its info into the history too; returns the files made, none if they are there already."""
        folder = self._own_folder(self.folder / "history" / tag / case)
        there = path.lstat()
        # A save that was cut off may have kept it already.
        target = next((p for p in folder.iterdir() if os.path.samestat(p.lstat(), there)), None)
        made = []
        try:
            if target is None:
                saved = EPOCH + timedelta(microseconds=there.st_mtime_ns // 1000)
                target = _unused(path, folder, saved, record.info.get("user"), path.name[len(case) :])
                made.append(target)
            beside = target.with_name(f"{target.name}.json")
            if not beside.exists():
                text = record.model_dump_json(indent=2).encode()
                os.replace(stage(self.folder / tag, lambda file: file.write(text)), beside)
                made.append(beside)
        except BaseException:
            for new in made:
                new.unlink(missing_ok=True)
            raise
        sync_folder(folder)
        return made

    def reject(self, case: str, source: Path, user: Any, reason: ValueError) -> NoReturn:
        """Keep an upload that cannot be a label, with the reason beside it, and say so."""
        try:
            if not self.studies.is_dir():
                raise ReadOnlyError("the folder of studies is not there at the moment")
            suffix = "".join(c for c in "".join(source.suffixes)[-20:] if c.isalnum() or c == ".")
            kept = keep_copy(source, self._own_folder(self.folder / "rejected" / case), user, suffix)
            kept.with_name(f"{kept.name}.txt").write_text(f"{reason}\n", encoding="utf-8")
            note = f"the file is kept as {kept.relative_to(self.studies)}"
        except (OSError, ReadOnlyError) as error:
            note = f"the file could not be kept: {error}"
        logger.warning("Label of image %s by %s refused: %s (%s)", case, user or "unknown", reason, note)
        kind = type(reason) if isinstance(reason, (StoreError, SeriesError)) else StoreError
        raise kind(f"{reason}; {note}") from reason

    def _own_folder(self, folder: Path) -> Path:
        """Make a folder for labels; they are never written through links."""
        try:
            straight = folder.resolve() == folder
        except (OSError, RuntimeError):  # a link that leads in a circle
            straight = False
        if not straight:
            raise ReadOnlyError(f"{folder.relative_to(self.studies)} leads out of the folder through a link")
        folder.mkdir(parents=True, exist_ok=True)
        return folder


def files_of(folder: Path, case: Any) -> list[Path]:
    """The files of one id: what `lib.stores.cases.volumes` lists under exactly this id, without listing the folder."""
    if not isinstance(case, str) or not case or case.startswith(".") or os.sep in case:
        return []
    names = (f"{case}{s}" for s in SUFFIXES)
    hits = [folder / n for n in names if os.path.isfile(f"{folder}{os.sep}{n}") and image_id(n) == case]
    return sorted(hits) or volumes(folder).get(case, [])


def _unused(source: Path, folder: Path, when: datetime, user: Any, suffix: str) -> Path:
    """Give a file another name, of a time and a user, that is not in use."""
    who = re.sub(r"[^A-Za-z0-9_.@-]", "_", str(user or ""))[:40]
    while True:
        target = folder / f"{when.strftime(STAMP)}{'-' * bool(who)}{who}{suffix}"
        try:
            link_or_copy(source, target)
            return target
        except FileExistsError:
            when += timedelta(microseconds=1)


def facts(path: Path) -> dict[str, Any]:
    """What MONAI Label writes into every info."""
    return {"ts": int(path.stat().st_mtime), "name": path.name}


def keep_copy(source: Path, folder: Path, user: Any, suffix: str) -> Path:
    """Copy a file into a folder under the time and the user's name, synced; nothing there is overwritten."""
    folder.mkdir(parents=True, exist_ok=True)
    staged = stage_copy(source, folder)
    try:
        target = _unused(staged, folder, datetime.now(timezone.utc), user, suffix)
    finally:
        staged.unlink(missing_ok=True)
    sync_folder(folder)
    return target
