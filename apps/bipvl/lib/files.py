"""Files that are whole at every instant: written beside their place, synced and renamed."""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Tags of labels, and their folders below `labels/`: what an annotator submitted, what a model drew.
FINAL, ORIGINAL = "final", "original"


def write_json(path: Path, data: Any) -> None:
    """Write JSON atomically."""
    write_atomic(path, lambda file: file.write(json.dumps(data, indent=2).encode()))


def sha256(path: Path) -> str:
    """The hexadecimal sha256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def write_atomic(path: Path, write: Callable[[Any], Any]) -> None:
    """Write beside the place, sync, rename, sync the folder: readers see the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


@contextmanager
def temporary_file(suffix: str) -> Iterator[Path]:
    """A new temporary file. It stays, for the caller to remove, unless what happens inside fails."""
    handle, name = tempfile.mkstemp(suffix=suffix)
    os.close(handle)
    try:
        yield Path(name)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def clear_unfinished(folder: Path, pattern: str) -> None:
    """Remove what killed writers of matching files left. Call it only if no other process can be writing them."""
    for path in folder.glob(f".{pattern}.*"):
        path.unlink(missing_ok=True)


def numbered(folder: Path, letter: str, suffix: str) -> list[int]:
    """The numbers of a folder's files that are called like v0001.pt, in order; none if there is no folder."""
    try:
        names = [path.name for path in folder.iterdir()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    found = (re.fullmatch(rf"{letter}(\d{{4,}})\.{suffix}", name) for name in names)
    return sorted(int(match[1]) for match in found if match)


def now() -> str:
    """The time for manifests: UTC, ISO 8601, to the second."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
