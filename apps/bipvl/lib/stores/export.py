"""The labelled cases of a store as one file to take away."""

from __future__ import annotations

import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def zip_cases(cases: Sequence[Mapping[str, Any]], metadata: str) -> str:
    """A temporary ZIP with `image/`, `label/` and `metadata.json`, for the caller to delete.

    Raises:
        OSError: the ZIP cannot be written; nothing is left behind.
    """
    with tempfile.NamedTemporaryFile(suffix=".zip", delete=False) as file:
        try:
            with zipfile.ZipFile(file, "w", strict_timestamps=False) as archive:
                for case in cases:
                    for kind in ("image", "label"):
                        archive.write(case[kind], f"{kind}/{Path(case[kind]).name}")
                archive.writestr("metadata.json", metadata)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise
    return file.name
