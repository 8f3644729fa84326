"""What the model proposed for an image, so that a saved label can say which of its segments a person has changed."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np

from lib.files import write_json
from lib.stores.locks import Lock, Order
from lib.tasks import Task

logger = logging.getLogger(__name__)

KEPT = 8  # proposals of one image


class Proposals:
    """The latest proposals of each image, in a file.

    Args:
        path: the JSON file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = Lock(Order.PROPOSALS, "the list of proposed masks")

    def add(self, image: str, task: Task, version: int, mask: np.ndarray) -> None:
        """Remember a mask of the task's values."""
        made = {"task": task.name, "version": version, "segments": fingerprints(mask, task)}
        with self._lock:
            found = self._read()
            found[image] = [made, *(p for p in found.get(image, []) if p != made)][:KEPT]
            try:
                write_json(self._path, found)
            except OSError as error:
                logger.warning(
                    "%s cannot be written: accepted masks will count as drawn by hand: %s", self._path, error
                )

    def unchanged(self, image: str, task: Task, mask: np.ndarray) -> dict[str, int]:
        """Label name to the model's version, for the labels of a mask that are exactly as one proposed them."""
        made = fingerprints(mask, task)
        with self._lock:
            proposed = [p for p in self._read().get(image, []) if p["task"] == task.name]
        return {
            name: next(p["version"] for p in proposed if p["segments"].get(name) == mark)
            for name, mark in made.items()
            if any(p["segments"].get(name) == mark for p in proposed)
        }

    def _read(self) -> dict[str, list[dict[str, Any]]]:
        try:
            found = json.loads(self._path.read_text(encoding="utf-8"))
            return found if isinstance(found, dict) else {}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            logger.warning("%s cannot be read: %s", self._path, error)
            return {}


def fingerprints(mask: np.ndarray, task: Task) -> dict[str, str]:
    """A digest of the voxels of each label that a mask of the task's values shows."""
    places = np.flatnonzero(mask)
    values = mask.ravel()[places]
    return {
        name: hashlib.sha256(places[values == value].tobytes()).hexdigest()
        for name, value in task.label_values.items()
        if (values == value).any()
    }
