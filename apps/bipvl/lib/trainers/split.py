"""Which labelled cases train and which validate: kept in a file, by image id, so that it never changes for a case."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from lib.files import write_json


def split_cases(ids: list[str], share: float, path: Path) -> tuple[list[str], list[str]]:
    """Assign new ids and return (training, validation) ids.

    A case once assigned keeps its side in every later round. New cases, taken in an order that depends on the ids
    alone, go to validation while it holds less than `share` of all cases; the first case always trains.

    Args:
        ids: image ids of all labelled cases.
        share: wanted share of validation cases, 0 to below 1.
        path: JSON file that remembers the assignment.

    Raises:
        ValueError: share out of range, or an unreadable file.
    """
    if not 0 <= share < 1:
        raise ValueError(f"val_split {share}: valid is 0 up to, but not including, 1")
    try:
        known: dict[str, str] = json.loads(path.read_text()) if path.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{path}: the remembered split is not readable: {error}") from error
    new = sorted(set(ids) - known.keys(), key=lambda i: hashlib.sha256(i.encode()).hexdigest())
    for case in new:
        validating = sum(side == "validation" for side in known.values())
        known[case] = "validation" if validating + 1 <= share * (len(known) + 1) else "training"
    if new:
        write_json(path, known)
    validation = [i for i in ids if known[i] == "validation"] if share else []
    return [i for i in ids if known[i] == "training"], validation
