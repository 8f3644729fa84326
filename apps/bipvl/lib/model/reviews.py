"""Places where a model doubts, with what people answered: kept beside the task's versions, one file a case.

    model/<task>/reviews/<digest of the image's id>.json

Each file is whole at every instant. The places are of the last mask that was made of the case; answers are of all
versions. An answer is shown at a place of its own list by the place's name, and at one of a later list, by another
version, if it is about the same label and lies within the place.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock

from lib.files import now, write_json
from lib.options import shown

logger = logging.getLogger(__name__)

FOLDER = "reviews"
LOCK_SECONDS = 60
ANSWERS = ("right", "fix")  # it looks right, it is to be fixed
KEPT = ("id", "label", "voxel", "box", "volume", "entropy", "probability")  # of a place, with its answer


class ReviewError(ValueError):
    """An answer that cannot be kept; `status` is that of HTTP."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


class Reviews:
    """The places and answers of one task's cases. Safe to use from several threads and processes at once.

    Args:
        model_dir: the task's folder of versions.
    """

    def __init__(self, model_dir: Path) -> None:
        self.folder = model_dir / FOLDER

    def keep(self, image: str, version: int, places: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Take over the places of a new mask of a case; answers stay. Returns what `get` does.

        Args:
            places: as `lib.infers.explain.doubts.described`.
        """
        with self._changing():
            held = self._read(image) or {"answers": []}
            held |= {"image": image, "version": version, "time": now(), "places": list(places)}
            write_json(self._path(image), held)
        return _listed(held)

    def get(self, image: str) -> dict[str, Any] | None:
        """`version`, `time` and `places` of a case, each place with its `answers`, oldest first: `answer`, `who`,
        `when`, `version`. None if no list is kept."""
        held = self._read(image)
        return None if held is None else _listed(held)

    def answer(self, image: str, version: Any, place: Any, answer: Any, who: str) -> dict[str, Any]:
        """Keep a person's answer about a place, in place of their earlier one. Returns what `get` does.

        Args:
            version: whose list the person saw; None: that of now.
            place: its `id`.
            answer: one of `ANSWERS`.

        Raises:
            ReviewError: an answer that nobody can give, a list that there is not, or not any more.
        """
        if answer not in ANSWERS:
            raise ReviewError(f"answer: {shown(answer)}; valid are {', '.join(ANSWERS)}")
        with self._changing():
            held = self._read(image)
            if held is None:
                raise ReviewError(f"no list of doubts of image {image[:100]!r} is kept: ask for one first", 404)
            if version is not None and version != held["version"]:
                raise ReviewError(
                    f"version: the list is of version {held['version']} by now, the answer of version "
                    f"{shown(version)}; ask for the list again",
                    409,
                )
            known = {one["id"]: one for one in held["places"]}
            if not isinstance(place, str) or place not in known:
                raise ReviewError(f"place: {shown(place)}; valid are {', '.join(known) or 'none'}", 404)
            entry = {"answer": answer, "who": who, "when": now(), "version": held["version"]}
            entry["place"] = {key: known[place][key] for key in KEPT}
            same = lambda other: _of(other) == _of(entry)  # noqa: E731
            held["answers"] = [*(other for other in held["answers"] if not same(other)), entry]
            write_json(self._path(image), held)
        logger.info("%s: %r answered %r at %s of version %s", image, who, answer, place, entry["version"])
        return _listed(held)

    def forget(self, image: str) -> None:
        """Remove what is kept of a case, because the case is removed."""
        if self.folder.is_dir():
            with self._changing():
                self._path(image).unlink(missing_ok=True)

    def counts(self, version: int) -> dict[str, int]:
        """How many places of a version's masks got each answer, the last one of a place counting."""
        found = dict.fromkeys(ANSWERS, 0)
        for path in sorted(self.folder.glob("*.json")):
            last: dict[str, str] = {}
            for entry in (self._load(path) or {"answers": []})["answers"]:
                if entry["version"] == version:
                    last[entry["place"]["id"]] = entry["answer"]
            for answer in last.values():
                found[answer] += 1
        return found

    def summary(self, version: int) -> str:
        """The counts of a version in words; empty if nobody has answered."""
        right, fix = self.counts(version).values()
        if not right + fix:
            return ""
        return f"{right} place{'' if right == 1 else 's'} looked right, {fix} to be fixed"

    def _changing(self) -> FileLock:
        self.folder.mkdir(parents=True, exist_ok=True)
        return FileLock(self.folder / ".lock", timeout=LOCK_SECONDS)

    def _path(self, image: str) -> Path:
        return self.folder / f"{hashlib.blake2b(image.encode(), digest_size=16).hexdigest()}.json"

    def _read(self, image: str) -> dict[str, Any] | None:
        return self._load(self._path(image))

    def _load(self, path: Path) -> dict[str, Any] | None:
        """None for a file that is not there, or that somebody has damaged: it is set aside."""
        try:
            held = json.loads(path.read_bytes())
            if {"image", "version", "time", "places", "answers"} <= held.keys():
                return held
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (ValueError, AttributeError):
            pass
        logger.warning("%s: damaged, set aside as %s", path, path.with_suffix(".damaged").name)
        path.replace(path.with_suffix(".damaged"))
        return None


def _listed(held: dict[str, Any]) -> dict[str, Any]:
    """What a file holds, as `Reviews.get`."""
    places = [{**place, "answers": _answers(place, held)} for place in held["places"]]
    return {"version": held["version"], "time": held["time"], "places": places}


def _of(entry: dict[str, Any]) -> tuple[Any, ...]:
    """Whose answer about what."""
    return entry["who"], entry["version"], entry["place"]["id"]


def _answers(place: dict[str, Any], held: dict[str, Any]) -> list[dict[str, Any]]:
    found = []
    for entry in held["answers"]:
        theirs = entry["place"]
        if entry["version"] == held["version"]:
            meant = theirs["id"] == place["id"]
        else:
            ends = zip(theirs["voxel"], place["box"], strict=True)
            meant = theirs["label"] == place["label"] and all(low <= n <= high for n, (low, high) in ends)
        if meant:
            found.append({key: entry[key] for key in ("answer", "who", "when", "version")})
    return found
