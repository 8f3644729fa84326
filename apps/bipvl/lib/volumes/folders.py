"""Which files of a folder are volumes, and which of them cannot be used."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SUFFIXES = (".nii.gz", ".nii", ".seg.nrrd", ".nrrd", ".mha", ".mhd")
LOOKED_AT = 1000  # files, before nothing is said about a folder
NAMED = 20  # files that an answer names; of more it gives the number


@dataclass(frozen=True)
class Listing:
    """What a folder holds.

    files: id to its files, both in order. An id with several files is for the caller to judge.
    problems: the name of a file that cannot be used, as it can be shown, to the reason.
    """

    files: dict[str, list[Path]]
    problems: dict[str, str]


def listing(folder: Path) -> Listing:
    """The volumes of a folder, without hidden files (archives made on macOS carry a `._` twin of every file).

    A file that cannot be read or named costs itself alone. Empty if the folder does not exist.

    Raises:
        OSError: the folder itself cannot be listed.
    """
    files, problems = defaultdict(list), {}
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if not entry.name.lower().endswith(SUFFIXES) or entry.name.startswith("."):
                    continue
                try:
                    if _is_readable_file(entry):
                        files[image_id(entry.name)].append(folder / entry.name)
                except OSError as error:
                    problems[shown(entry.name)] = f"it cannot be read: {error.strerror}"
                except ValueError as error:
                    problems[shown(entry.name)] = str(error)
    except (FileNotFoundError, NotADirectoryError):
        return Listing({}, {})
    return Listing({case: sorted(paths) for case, paths in sorted(files.items())}, dict(sorted(problems.items())))


def volumes(folder: Path) -> dict[str, list[Path]]:
    """The usable files of a folder by id, as `listing` finds them."""
    return listing(folder).files


def usable(folder: Path) -> tuple[dict[str, Path], dict[str, str]]:
    """Images by id, and by id why others are left out: their file cannot be used, or several files have one id."""
    found = listing(folder)
    problems = {image_id(name): f"{name}: {reason}" for name, reason in found.problems.items()}
    problems |= {case: twins(case, paths) for case, paths in found.files.items() if len(paths) > 1}
    return {case: paths[0] for case, paths in found.files.items() if len(paths) == 1}, problems


def why_empty(folder: Path) -> str:
    """What a folder without images holds instead, if it looks like a mistake; empty if not."""
    looked = 0
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(
            name for name in folders if not name.startswith(".") and Path(parent, name) != folder / "labels"
        )
        for name in sorted(files):
            file = Path(parent, name)
            if Path(parent) != folder and name.lower().endswith(SUFFIXES):
                return (
                    f"there are images in sub folders, e.g. {file.relative_to(folder)}, and only those directly in the "
                    "folder count: move them there, or name that sub folder"
                )
            if _is_dicom(file):
                return (
                    f"there are DICOM files, e.g. {file.relative_to(folder)}, which count in a DICOMweb archive only: "
                    "store them in one and name its address, or convert each series to NIfTI"
                )
            looked += 1
            if looked == LOOKED_AT:
                return ""
    return ""


def _is_dicom(file: Path) -> bool:
    try:
        with file.open("rb") as opened:
            return opened.read(132)[128:] == b"DICM"
    except OSError:
        return False


def twins(case: str, paths: Sequence[Path]) -> str:
    """Why an image of several files is left out: labels belong to an id, and it would not say to which file."""
    return f"image id {case!r} belongs to {' and '.join(p.name for p in paths)}: left out until one is renamed"


def newest(paths: Sequence[Path]) -> Path:
    """The label that counts if one image has several, as after a save that was cut off."""
    return max(paths, key=lambda path: (path.stat().st_mtime_ns if path.exists() else 0, path.name))


def image_id(path: str | Path) -> str:
    """The id of a case: the name of its image without the extension."""
    name = os.path.basename(path)
    suffix = next((s for s in SUFFIXES if name.lower().endswith(s)), "")
    return name[: len(name) - len(suffix)]


def shown(name: str) -> str:
    """A file's name as text that can be written anywhere: what is not UTF-8 as the bytes' numbers.

    >>> shown("caf\\udce9.nii")
    'caf\\\\xe9.nii'
    """
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def counted(found: Mapping[str, str] | Collection[str]) -> dict[str, Any]:
    """What an answer says about files: how many there are, and the first of them by name."""
    names = list(found)[:NAMED]
    return {"count": len(found), "files": {n: found[n] for n in names} if isinstance(found, Mapping) else names}


def _is_readable_file(entry: os.DirEntry) -> bool:
    """False for what is not meant as a file.

    Raises:
        OSError, ValueError: it cannot be used; says why.
    """
    if not entry.is_file():
        if entry.is_symlink() and not entry.is_dir():
            raise ValueError("it is a link to a file that is not there")
        return False
    try:
        entry.name.encode()
    except UnicodeEncodeError:
        raise ValueError("its name is not UTF-8: rename it") from None
    if not os.access(entry.path, os.R_OK):
        os.close(os.open(entry.path, os.O_RDONLY))  # says why
    return True
