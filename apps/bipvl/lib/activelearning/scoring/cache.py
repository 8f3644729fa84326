"""Scores of a case, and how an image's info in the datastore keeps them: `scores` → model → one version's.

    {"version": 3, "entropy": 0.21, "alignment": 0.64, "vector": "…"}      or      {"version": 3, "failed": "reason"}

The vector is base64 of float16, about two kilobytes for a model of full size. Clients can write anything into an info:
what cannot be read does not count.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

KEY = "scores"


@dataclass(frozen=True, eq=False)
class CaseScores:
    """What one forward pass tells about a case.

    entropy: predictive entropy over the foreground, 0 to 1.
    alignment: cosine of text and vision, mean over the classes that the model found, -1 to 1.
    vector: (width,), V_4 averaged over places and windows, of length 1.
    """

    entropy: float
    alignment: float
    vector: np.ndarray


def scored(info: Mapping[str, Any], model: str, version: int, scores: CaseScores) -> dict[str, Any]:
    """What to add to an image's info; the scores of other models stay."""
    entry = {
        "version": version,
        "entropy": round(scores.entropy, 6),
        "alignment": round(scores.alignment, 6),
        "vector": base64.b64encode(scores.vector.astype("<f2").tobytes()).decode(),
    }
    return {KEY: {**_all(info), model: entry}}


def failed(info: Mapping[str, Any], model: str, version: int, reason: str) -> dict[str, Any]:
    """The same for a case that cannot be scored, so that it is not tried again with this version."""
    return {KEY: {**_all(info), model: {"version": version, "failed": reason[:500]}}}


def version_of(info: Mapping[str, Any], model: str) -> int | None:
    """The version that an image was scored with, or failed with."""
    version = _entry(info, model).get("version")
    return version if isinstance(version, int) and not isinstance(version, bool) else None


def scores_of(info: Mapping[str, Any], model: str) -> CaseScores | None:
    """An image's scores, None if there are none."""
    entry = _entry(info, model)
    try:
        entropy, alignment = float(entry["entropy"]), float(entry["alignment"])
        vector = np.frombuffer(base64.b64decode(entry["vector"], validate=True), "<f2").astype(np.float32)
    except (KeyError, TypeError, ValueError):
        return None
    usable = math.isfinite(entropy) and math.isfinite(alignment) and vector.size and np.isfinite(vector).all()
    return CaseScores(entropy, alignment, vector) if usable else None


def _all(info: Mapping[str, Any]) -> dict[str, Any]:
    found = info.get(KEY)
    return dict(found) if isinstance(found, Mapping) else {}


def _entry(info: Mapping[str, Any], model: str) -> dict[str, Any]:
    found = _all(info).get(model)
    return dict(found) if isinstance(found, Mapping) else {}
