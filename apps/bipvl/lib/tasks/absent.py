"""Texts of what an image of a task does not show, for training steps in which a class has no voxel.

Two sources: `absent.yaml` (structures of other parts of the body, and ordinary sentences), and the classes of the
shipped tasks of other modalities. Those of the same modality are left out: what they describe may well lie in the field
of view of this task's images, where nobody has drawn it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from lib.tasks.concepts import ATTRIBUTES
from lib.tasks.loading import CONCEPTS_DIR, list_tasks, load_task
from lib.tasks.names import folded, meant
from lib.tasks.schema import Task

FILE = Path(__file__).with_name("absent.yaml")
ASIDE = 5  # every fifth text is kept aside: training reads it never, benchmarks do


@dataclass(frozen=True)
class Absent:
    """structures: six sentences each, in the order of `ATTRIBUTES`. ordinary: sentences about anything else."""

    structures: tuple[tuple[str, ...], ...]
    ordinary: tuple[str, ...]


def absent_texts(task: Task, aside: bool = False) -> Absent:
    """What the task's images do not show.

    Args:
        task: its classes, and structures of the same name or SNOMED code, are left out. Of a task that shows half a
            body this cannot be all that its images show: `training.absent` is for those that show a part.
        aside: the texts that no training reads, in place of those that it does.
    """
    structures = {
        entry["name"]: tuple(entry[attribute] for attribute in ATTRIBUTES)
        for entry in _bank()["body"]
        if not any(entry["name"] in folded(name) for name in task.classes)
    }
    codes = {label.snomed.code for label in task.labels.values()}
    codes |= {region.snomed.code for region in (task.regions or {}).values()}
    for other in _other_tasks(task.modality):
        for name in other.classes:
            known = (other.regions[name] if other.regions else other.labels[name]).snomed.code in codes
            if not known and meant(name, (*task.classes, *structures)) is None:
                rows = other.concepts.rows((name,))[0]
                structures[name] = tuple(_in_modality(row, other.modality, task.modality) for row in rows)
    return Absent(_share([*structures.values()], aside), _share(_bank()["ordinary"], aside))


@cache
def _bank() -> dict[str, Any]:
    return yaml.safe_load(FILE.read_text(encoding="utf-8"))


def _other_tasks(modality: str) -> list[Task]:
    """The shipped tasks of other modalities."""
    found = (load_task(name) for name in list_tasks() if (CONCEPTS_DIR / f"{name}.yaml").is_file())
    return [task for task in found if task.modality != modality]


def _in_modality(sentence: str, theirs: str, ours: str) -> str:
    """The sentence about an image of our modality: else its name alone would tell that nothing is there."""
    return re.sub(rf"\b{re.escape(theirs)}\b", ours, sentence)


def _share(texts: list[Any], aside: bool) -> tuple[Any, ...]:
    return tuple(text for n, text in enumerate(texts, 1) if (n % ASIDE == 0) == aside)
