"""Reading task and concepts files, with overrides, and messages that name file, key and valid choices."""

from __future__ import annotations

import difflib
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from lib.tasks.concepts import Concepts, TaskError
from lib.tasks.schema import Task

ROOT = Path(__file__).resolve().parents[4]
TASKS_DIR = ROOT / "sample-apps-config"
CONCEPTS_DIR = ROOT / "concepts"


def task_from_dict(data: dict[str, Any], source: str = "task") -> Task:
    """Build a task from plain data, as a checkpoint carries it.

    Raises:
        TaskError: naming `source`, the key and what is valid.
    """
    try:
        return Task.model_validate(data)
    except ValidationError as error:
        raise TaskError(_explain(error, Task, source)) from None


def list_tasks() -> list[str]:
    """The names of the shipped tasks."""
    return sorted(p.stem for p in TASKS_DIR.glob("*.yaml"))


def load_task(name: str | Path, overrides: dict[str, Any] | None = None) -> Task:
    """Load a shipped task by name, or a user's own task by the path of its YAML file.

    The key `concepts` of a task file names its concepts file: relative to the task file, or a file of `concepts/`;
    without the key it is `concepts/<task name>.yaml`.

    Args:
        name: a name of `list_tasks()`, or a path that ends in .yaml or .yml.
        overrides: dotted keys to other values, e.g. {"model.feature_size": "12"}; strings are read as YAML.

    Raises:
        TaskError: unknown task, unreadable file, unknown key, wrong value, a class without concepts.
    """
    path, data = task_data(name, overrides)
    if isinstance(data.setdefault("concepts", f"{data.get('name', path.stem)}.yaml"), str):
        file = concepts_file(path, data)
        if not file.is_file():
            raise TaskError(f"{path}: concepts: no file {file}, nor one of that name in {CONCEPTS_DIR}")
        data["concepts"] = load_concepts(file).model_dump(mode="json")
    return task_from_dict(data, str(path))


def task_data(name: str | Path, overrides: dict[str, Any] | None = None) -> tuple[Path, dict[str, Any]]:
    """A task's file and what it says, unchecked; arguments and errors as `load_task`."""
    text = str(name)
    path = Path(text) if text.endswith((".yaml", ".yml")) else TASKS_DIR / f"{text}.yaml"
    if not path.is_file():
        if path.parent == TASKS_DIR:
            raise TaskError(f"unknown task {text!r}; valid are {', '.join(list_tasks())}{_hint(text, list_tasks())}")
        raise TaskError(f"task file {path} does not exist")
    data = _read_yaml(path)
    for key, value in (overrides or {}).items():
        _override(data, key, value, path)
    return path, data


def concepts_file(path: Path, data: dict[str, Any]) -> Path:
    """Where the sentences of a task file are: `data["concepts"]` beside it, or in `concepts/`. If neither is a file,
    the place for it."""
    beside, shipped = path.parent / data["concepts"], CONCEPTS_DIR / data["concepts"]
    candidates = [c for c in (beside, shipped) if c.resolve() != path.resolve()]
    own = candidates[0] if path.parent != TASKS_DIR else shipped
    return next((c for c in candidates if c.is_file()), own)


def load_concepts(path: Path) -> Concepts:
    """Read a concepts file.

    Raises:
        TaskError: not readable, an unknown key or a wrong value.
    """
    try:
        return Concepts.model_validate(_read_yaml(path))
    except ValidationError as error:
        raise TaskError(_explain(error, Concepts, str(path))) from None


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeys)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise TaskError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(data, dict):
        raise TaskError(f"{path}: expected keys and values, found {type(data).__name__}")
    return data


class _UniqueKeys(yaml.SafeLoader):
    """YAML keeps the last of two equal keys silently; here a duplicate is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=deep)
            if not isinstance(key, Hashable):
                raise yaml.YAMLError(f"a key that is not plain text, line {key_node.start_mark.line + 1}")
            if key in seen:
                raise yaml.YAMLError(f"duplicate key {key!r}, line {key_node.start_mark.line + 1}")
            seen.add(key)
        return super().construct_mapping(node, deep)


def _override(data: dict[str, Any], dotted: str, value: Any, path: Path) -> None:
    *parents, last = dotted.split(".")
    target = data
    for key in parents:
        target = target.setdefault(key, {})
        if not isinstance(target, dict):
            raise TaskError(f"{path}: override {dotted!r}: {key!r} holds a value, not keys")
    try:
        target[last] = yaml.safe_load(value) if isinstance(value, str) else value
    except yaml.YAMLError as error:
        raise TaskError(f"{path}: override {dotted!r}: not valid YAML: {error}") from None


def _explain(error: ValidationError, model: type[BaseModel], source: str) -> str:
    """One line per problem: the file, the dotted key, what is wrong and what is valid."""
    lines = []
    for problem in error.errors():
        key = ".".join(str(p) for p in problem["loc"])
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            valid = _valid_keys(model, problem["loc"][:-1])
            message = f"unknown key; valid are {', '.join(valid)}{_hint(str(problem['loc'][-1]), valid)}"
        elif problem["type"] == "missing":
            message = "required key is missing"
        else:
            given = problem.get("input")
            if not isinstance(given, dict | list | BaseModel):
                message += f" (found {given!r})"
        lines.append(f"{source}: {key + ': ' if key else ''}{message}")
    return "\n".join(lines)


def _valid_keys(model: Any, location: tuple[Any, ...]) -> list[str]:
    """Field names of the model at a location inside `model`; keys of free mappings are stepped over."""
    for key in location:
        if isinstance(model, type) and issubclass(model, BaseModel) and key in model.model_fields:
            model = _innermost_model(model.model_fields[key].annotation)
    return list(model.model_fields) if isinstance(model, type) and issubclass(model, BaseModel) else []


def _innermost_model(annotation: Any) -> Any:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in getattr(annotation, "__args__", ()):
        found = _innermost_model(argument)
        if found is not None:
            return found
    return None


def _hint(word: str, choices: list[str]) -> str:
    close = difflib.get_close_matches(word, choices, 1)
    return f" (did you mean {close[0]!r}?)" if close else ""
