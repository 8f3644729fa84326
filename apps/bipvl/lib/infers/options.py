"""The options of an inference request, checked."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from lib.model.versions import Versions
from lib.tasks import Task, meant
from lib.upstream import strtobool


@dataclass
class Options:
    """What one request asks for, checked. `from_request` reads the option table that clients show.

    version: the one asked for, None for the served one.
    """

    version: int | None
    overlap: float | None
    tta: bool
    classes: tuple[str, ...]
    largest_component: bool
    uncertainty_map: bool
    concepts: dict[str, Any]

    @classmethod
    def from_request(cls, request: dict[str, Any], task: Task, published: Versions) -> Options:
        """Raises ValueError for an unknown version or label, or a value that cannot be read."""
        overlap = request.get("overlap")
        try:
            overlap = None if overlap in (None, "") else float(overlap)
        except (TypeError, ValueError):
            raise ValueError(f"overlap: expected a number from 0 to below 1, got {request['overlap']!r}") from None
        wanted, concepts = request.get("model_version"), request.get("concepts") or {}
        if isinstance(concepts, str):
            try:
                concepts = json.loads(concepts)
            except ValueError as error:
                raise ValueError(f"concepts: not valid JSON: {error}") from None
        return cls(
            version=None if wanted in (None, "", "served") else published.resolve(wanted),
            overlap=overlap,
            tta=_boolean(request, "tta"),
            classes=_names(request.get("label_subset"), task),
            largest_component=_boolean(request, "largest_component"),
            uncertainty_map=_boolean(request, "uncertainty_map"),
            concepts=concepts,
        )


def _boolean(request: dict[str, Any], key: str) -> bool:
    value = request.get(key)
    try:
        return value not in (None, "") and bool(strtobool(str(value)))
    except ValueError:
        raise ValueError(f"{key}: expected true or false, got {value!r}") from None


def _names(wanted: Any, task: Task) -> tuple[str, ...]:
    """Label names from a list or a comma-separated string; nothing means all."""
    names = wanted.split(",") if isinstance(wanted, str) else list(wanted or [])
    names = [str(n).strip() for n in names if str(n).strip()]
    known = [meant(name, task.labels) for name in names]
    if None in known:
        unknown = names[known.index(None)]
        raise ValueError(f"label_subset: unknown label {unknown!r}; valid are {', '.join(task.labels)}")
    return tuple(name for name in known if name) or tuple(task.labels)
