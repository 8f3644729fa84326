"""From the names that a client or a file gives to its values, to the values of a task. Names decide, never positions.

A name means a label of the task if it is the same but for case, spaces, hyphens and underscores. Anything else is
unknown, and what is unknown is never taken for something else.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from lib.options import shown
from lib.stores.errors import StoreError
from lib.tasks import Task, TaskError, folded, meant
from lib.tasks.names import BACKGROUND
from lib.volumes.reading import MAX_VALUE, rounded

VALUE_KEYS = ("idx", "value", "labelID", "id")


def label_of(name: str, task: Task) -> str | None:
    """The task's label that a segment's name means, None for an unknown one."""
    return meant(name, task.labels)


def task_for(names: Iterable[str], tasks: Sequence[Task]) -> Task | None:
    """The first task that knows the most of these names; None if no task knows any."""
    names = list(names)
    known = [sum(label_of(name, task) is not None for name in names) for task in tasks]
    most = max(known, default=0)
    return tasks[known.index(most)] if most else None


def task_named(name: Any, tasks: Sequence[Task]) -> Task:
    """A task of this server.

    Raises:
        StoreError: with the valid names.
    """
    found = [task for task in tasks if task.name == name]
    if not found:
        raise StoreError(f"unknown model {name!r}; valid are {', '.join(t.name for t in tasks)}")
    return found[0]


def whole_numbers(voxels: np.ndarray) -> np.ndarray:
    """The values of an uploaded label, as they were read, as uint16; a float's error is rounded.

    Raises:
        StoreError: some are not whole numbers, or too small or large; names them.
    """
    values = rounded(voxels)
    whole = np.isfinite(values) & (values >= 0) & (values <= MAX_VALUE)
    whole[whole] = values[whole] == np.rint(values[whole])
    if not whole.all():
        found = ", ".join(f"{value:.7g}" for value in np.unique(values[~whole])[:10])
        raise StoreError(f"the label holds values that are not whole numbers from 0 to {MAX_VALUE}: {found}")
    return values.astype(np.uint16)


def check_annotated(names: Sequence[str], tasks: Sequence[Task]) -> None:
    """Whether some task has all classes that a label declares.

    Raises:
        StoreError: a name that no task has, with the valid ones.
    """
    problems = []
    for task in tasks:
        try:
            task.named(names)
            return
        except TaskError as error:
            problems.append(f"{task.name}: {error}")
    if problems:
        raise StoreError("; ".join(problems))


def named_values(label_info: Any) -> dict[int, str] | None:
    """Value to name, out of `label_info` as MONAI Label's clients send it: a list of objects with `name` and the value
    as `idx`, else by position from 1, or from 0 if the first is the background. The background itself is left out.
    None if nothing is said.

    Raises:
        StoreError: of another form, or two names for one value.
    """
    if label_info in (None, [], ""):
        return None
    if not isinstance(label_info, list) or not all(isinstance(entry, dict) for entry in label_info):
        raise StoreError("label_info: expected a list of objects with 'name' and 'idx'")
    values: dict[int, str] = {}
    first = label_info[0].get("name")
    for position, entry in enumerate(label_info, start=0 if _is_background(first) else 1):
        name, value = entry.get("name"), next((entry[k] for k in VALUE_KEYS if entry.get(k) is not None), position)
        if not isinstance(name, str) or not name.strip():
            raise StoreError(f"label_info: entry {position} has no name")
        if value == 0 and _is_background(name):
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)) or int(value) != value or value < 1:
            raise StoreError(f"label_info: {name!r}: expected a value of at least 1, found {shown(value)}")
        if values.setdefault(int(value), name) != name:
            raise StoreError(f"label_info: value {int(value)} has two names, {values[int(value)]!r} and {name!r}")
    return values


def to_task_values(mask: np.ndarray, names: dict[int, str] | None, task: Task) -> np.ndarray:
    """A mask with the task's own values.

    Args:
        mask: integers, 0 for background.
        names: value to name, as from `named_values`; None: they are values that the task's files may hold.

    Raises:
        StoreError: a value without a name, or a name that the task does not know.
    """
    if mask.size == 0:
        return mask.astype(np.uint16)
    table = np.zeros(int(mask.max()) + 1, np.uint16)
    given = task.value_names if names is None else names
    for value in np.flatnonzero(np.bincount(mask.ravel())):
        if not value:
            continue
        name = given.get(int(value))
        if _is_background(name):
            continue
        label = label_of(name, task) if name is not None else None
        if label is None:
            what = f"value {value}" if name is None else f"{name!r} (value {value})"
            raise StoreError(
                f"the label shows {what}, which task {task.name!r} does not know; valid are {', '.join(task.labels)}"
            )
        table[value] = task.label_values[label]
    return table[mask]


def _is_background(name: Any) -> bool:
    return isinstance(name, str) and folded(name) == BACKGROUND
