"""The labelled cases of a store as one file to take away."""

from __future__ import annotations

import logging
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lib.stores.errors import NotInStoreError

logger = logging.getLogger(__name__)

LEFT_OUT = "left-out.txt"


def zip_cases(cases: Sequence[Mapping[str, Any]], metadata: str, limit: int | None = None) -> str:
    """A temporary ZIP with `image/`, `label/` and `metadata.json`, for the caller to delete.

    A case that cannot be read any more is left out, and `left-out.txt` says why.

    Args:
        cases: labelled ones.
        metadata: JSON.
        limit: at most so many cases; None or 0: all.

    Raises:
        NotInStoreError: no case is labelled.
        OSError: the ZIP cannot be written; nothing is left behind.
    """
    if not cases:
        raise NotInStoreError("no image has a final label yet: there is nothing to download")
    cases = cases[:limit] if limit and limit > 0 else cases
    problems = []
    with tempfile.NamedTemporaryFile(suffix=".zip", delete=False) as file:
        try:
            with zipfile.ZipFile(file, "w", strict_timestamps=False) as archive:
                for case in cases:
                    paths = {kind: Path(case[kind]) for kind in ("image", "label")}
                    if problem := next(filter(None, map(_unreadable, paths.values())), None):
                        logger.warning("Left out of the dataset: %s", problem)
                        problems.append(problem)
                        continue
                    for kind, path in paths.items():
                        archive.write(path, f"{kind}/{path.name}")
                archive.writestr("metadata.json", metadata)
                if problems:
                    archive.writestr(LEFT_OUT, "\n".join(problems) + "\n")
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise
    return file.name


def _unreadable(path: Path) -> str | None:
    try:
        with path.open("rb"):
            return None
    except OSError as error:
        return f"{path.name}: {error.strerror}"
