"""Files that clients send: into a private temporary folder, under names of our own, and away again."""

from __future__ import annotations

import atexit
import logging
import os
import shutil
import stat
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO

from fastapi import HTTPException, UploadFile
from filelock import FileLock, Timeout

from lib.infers.options import RESULT_SUFFIXES

logger = logging.getLogger(__name__)

PREFIX = "bipvl-server-"
IMAGE_SUFFIXES = (".seg.nrrd", ".nii.gz", ".nii", ".nrrd", ".mha", ".dcm", ".zip")
LABEL_SUFFIXES = (*RESULT_SUFFIXES, ".bin")
ARCHIVE_ENTRIES = 100_000
COPY_BYTES = 1 << 20
NAME_BYTES = 150  # file systems take 255


class TemporaryFolder:
    """A folder only this user can read, for every temporary file of this process and its children.

    A lock inside tells a folder in use from one that a killed server left; those are removed at construction.
    """

    def __init__(self) -> None:
        parent = Path(tempfile.gettempdir())
        for old in parent.glob(f"{PREFIX}*"):
            _remove_abandoned(old)
        self.path, self._lock = _locked_folder(parent)
        self._before = tempfile.tempdir, os.environ.get("TMPDIR")
        tempfile.tempdir = str(self.path)
        os.environ["TMPDIR"] = str(self.path)
        atexit.register(self.remove)

    def remove(self) -> None:
        """Delete the folder and what is in it. Safe to call twice."""
        atexit.unregister(self.remove)
        tempfile.tempdir = self._before[0]
        if self._before[1] is None:
            os.environ.pop("TMPDIR", None)
        else:
            os.environ["TMPDIR"] = self._before[1]
        self._lock.release()
        shutil.rmtree(self.path, ignore_errors=True)


def _locked_folder(parent: Path) -> tuple[Path, FileLock]:
    while True:
        path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
        lock = FileLock(path / "lock")
        try:
            lock.acquire()
            if (path / "lock").exists():
                return path, lock
            lock.release()
        except FileNotFoundError:
            pass  # a server that starts at the same moment took the folder for an abandoned one


def _remove_abandoned(folder: Path) -> None:
    try:
        status = folder.lstat()
        if not stat.S_ISDIR(status.st_mode) or (hasattr(os, "getuid") and status.st_uid != os.getuid()):
            return
        with FileLock(folder / "lock", timeout=0):
            shutil.rmtree(folder, ignore_errors=True)
        logger.info("Removed %s, which a server that was killed had left", folder)
    except (OSError, Timeout):
        pass  # in use, or another server removes it at the same moment


def suffix(name: str | None, valid: Sequence[str], what: str) -> str:
    """The file type of an upload, by its name.

    Raises:
        HTTPException: 400 for a type that is not valid.
    """
    found = [s for s in valid if (name or "").lower().endswith(s)]
    if not found:
        raise HTTPException(400, f"{what}: the file name {(name or '')[-100:]!r} must end in {', '.join(valid)}")
    return max(found, key=len)


@contextmanager
def saved(upload: UploadFile, valid: Sequence[str], what: str) -> Iterator[Path]:
    """An upload as a temporary file that exists within the `with` block.

    Raises:
        HTTPException: 400 for a type that is not valid.
    """
    kind = suffix(upload.filename, valid, what)
    name = safe_name(upload.filename, 0)
    with tempfile.TemporaryDirectory() as folder:
        base = name[: len(name) - len(kind)] if name.lower().endswith(kind) else ""
        path = Path(folder) / f"{base or 'file'}{kind}"  # as clients know it: messages name it
        with path.open("xb") as file:
            shutil.copyfileobj(upload.file, file, COPY_BYTES)
        yield path


def safe_name(name: str | None, number: int) -> str:
    """One harmless path component out of a client's file name."""
    base = (name or "").replace("\\", "/").rpartition("/")[2]
    base = "".join(c if c.isalnum() or c in "._-" else "_" for c in base)
    base = base.encode("utf-8", "replace")[-NAME_BYTES:].decode("utf-8", "ignore").lstrip(".")
    return base or f"file{number}"


def unpack(archive: Path, folder: Path, limit: int) -> None:
    """Unpack a zip or tar file: plain files and folders only, all of them inside the folder.

    Raises:
        HTTPException: 400 for any other member, for a file that is not an archive, for more than `limit` bytes, or for
            too many entries.
    """
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as source:
                _unpack_zip(source, folder, limit)
        elif tarfile.is_tarfile(archive):
            with tarfile.open(archive) as source:
                _unpack_tar(source, folder, limit)
        else:
            raise HTTPException(400, "uncompress: the file is neither a zip nor a tar archive")
    except (zipfile.BadZipFile, tarfile.TarError, EOFError, zipfile.LargeZipFile, NotImplementedError) as error:
        raise HTTPException(400, f"uncompress: the archive is damaged: {error}") from error


def _unpack_zip(source: zipfile.ZipFile, folder: Path, limit: int) -> None:
    members = source.infolist()
    budget = _Budget(limit)
    for member in members:
        kind = stat.S_IFMT(member.external_attr >> 16)
        if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise _bad(member.filename, "is a link or a device")
        if member.flag_bits & 1:
            raise _bad(member.filename, "is encrypted")
        place = _place(folder, member.filename)
        budget.entry()
        if member.is_dir():
            place.mkdir(parents=True, exist_ok=True)
            continue
        with source.open(member) as content:
            _write(content, place, budget)


def _unpack_tar(source: tarfile.TarFile, folder: Path, limit: int) -> None:
    budget = _Budget(limit)
    for member in source:
        place = _place(folder, member.name)
        budget.entry()
        if member.isdir():
            place.mkdir(parents=True, exist_ok=True)
        elif member.isreg():
            content = source.extractfile(member)
            assert content is not None  # a regular file has content
            _write(content, place, budget)
        else:
            raise _bad(member.name, "is a link or a device")


class _Budget:
    def __init__(self, limit: int) -> None:
        self.limit, self.bytes, self.entries = limit, 0, 0

    def entry(self) -> None:
        self.entries += 1
        if self.entries > ARCHIVE_ENTRIES:
            raise HTTPException(400, f"uncompress: more than {ARCHIVE_ENTRIES} entries")

    def take(self, count: int) -> None:
        self.bytes += count
        if self.bytes > self.limit:
            raise HTTPException(400, f"uncompress: more than {self.limit >> 20} MB when unpacked")


def _write(content: IO[bytes], place: Path, budget: _Budget) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    try:
        with place.open("xb") as file:
            while block := content.read(COPY_BYTES):
                budget.take(len(block))  # what is unpacked, not what the archive says
                file.write(block)
    except FileExistsError:
        raise _bad(place.name, "is there twice") from None


def _place(folder: Path, name: str) -> Path:
    path = PurePosixPath(name.replace("\\", "/"))
    odd = any(part == ".." or ":" in part or any(ord(c) < 32 for c in part) for part in path.parts)
    if path.is_absolute() or odd or not path.parts or len(path.parts) > 32:
        raise _bad(name, "would be written elsewhere")
    return folder.joinpath(*path.parts)


def _bad(name: str, reason: str) -> HTTPException:
    return HTTPException(400, f"uncompress: the member {name[:200]!r} {reason}; nothing was kept")
