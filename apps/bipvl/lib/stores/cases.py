"""Cases: which images and labels there are, and which of them can be used.

A case is a dictionary with `id`, `image` and `label`, the last two absolute paths, `label` None if there is none.
A label that was drawn for some classes only says so: `annotated` names them. One that came with names keeps them:
`label_names` is label name to value, of what it shows. `clicks` is what was clicked and scribbled while it was drawn
(`lib.interaction.prompts.Asked`).
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from rich.console import Console
from rich.table import Table

from lib.files import FINAL
from lib.stores.document import Infos
from lib.tasks import Task, folded
from lib.volumes.folders import SUFFIXES, image_id, newest, usable, volumes, why_empty
from lib.volumes.reading import align_label, check_grid, check_image, encode, read_header, read_volume

logger = logging.getLogger(__name__)

LABELS_FOLDER = Path("labels") / FINAL
CLICKS = "clicks"  # of a label's info, and of a case


class _Declared(TypedDict, total=False):
    annotated: list[str]
    label_names: dict[str, int]
    clicks: list[dict[str, Any]]


class Case(_Declared):
    """One image, labelled or not."""

    id: str
    image: str
    label: str | None


@dataclass(frozen=True)
class CaseAudit:
    """What was found in one labelled case.

    counts: class name to voxels, for the classes that the label was annotated for; empty if it could not be read.
    problem: why the case cannot be used.
    """

    case: Case
    counts: dict[str, int]
    problem: str | None

    @property
    def empty(self) -> bool:
        """The label is readable but shows no class."""
        return self.problem is None and not any(self.counts.values())


@dataclass(frozen=True)
class Audit:
    """What was found in all cases of a task."""

    task: str
    classes: tuple[str, ...]
    cases: tuple[CaseAudit, ...]

    @property
    def usable(self) -> list[Case]:
        """Labelled cases without a problem. An empty label stays: it teaches what background is."""
        return [c.case for c in self.cases if c.problem is None]

    @property
    def missing(self) -> tuple[str, ...]:
        """Classes that no usable case shows."""
        return tuple(n for n in self.classes if not any(c.counts.get(n) for c in self.cases if c.problem is None))

    def table(self) -> str:
        """Voxels per case and class, and the problems, as plain text."""
        table = Table("case", *self.classes, "status", title=f"Labels of task {self.task}")
        for c in self.cases:
            counts = [str(c.counts[n]) if n in c.counts else "-" for n in self.classes]
            table.add_row(c.case["id"], *counts, "unusable" if c.problem else "empty" if c.empty else "ok")
        # Problems name files and affines: below the table they stay in one piece.
        lines = [f"{c.case['id']}: {c.problem}" for c in self.cases if c.problem]
        if self.missing:
            lines.append(f"never present in a usable case: {', '.join(self.missing)}")
        console = Console(width=60 + 16 * len(self.classes), color_system=None)
        with console.capture() as capture:
            console.print(table)
        return "\n".join([capture.get().rstrip(), *lines])

    def check(self) -> None:
        """Refuse what training could not learn from.

        Raises:
            ValueError: no usable case, or no usable case that shows any class; with the table.
        """
        if not self.usable:
            raise ValueError(f"none of {len(self.cases)} case(s) can be used for task {self.task!r}\n{self.table()}")
        if len(self.missing) == len(self.classes):
            raise ValueError(f"every usable label is empty: nothing to learn for task {self.task!r}\n{self.table()}")


def read_datalist(source: str | Path) -> list[Case]:
    """The cases of a MONAI Label folder or of a JSON list, sorted by id.

    Args:
        source: a folder with images, their labels under the same name in `labels/final` (an image that cannot be used
            is left out, and the log says why); or a JSON file: a list of
            objects with `image` and optionally `label`, `id` and `annotated`, or an object with such a list under
            `training` (Medical Segmentation Decathlon). Paths are relative to the JSON file.

    Raises:
        ValueError: naming the file and what is wrong.
    """
    source = Path(source)
    if source.is_dir():
        return _unique(_from_folder(source.resolve()), source)
    if not source.is_file():
        raise ValueError(f"{source}: neither a folder nor a JSON file")
    return _unique(_from_json(source.resolve()), source)


def audit(task: Task, cases: Sequence[Mapping[str, Any]], voxels: bool = True) -> Audit:
    """Read every case's label and image and say what cannot be used, and why. One bad case never stops the rest.

    Args:
        cases: with `id`, `image`, `label`.
        voxels: also read the images' voxels, where truncated files and NaN show; else only headers.
    """
    return Audit(task.name, task.classes, tuple(_audit_case(task, case, voxels) for case in cases))


def _audit_case(task: Task, given: Mapping[str, Any], voxels: bool) -> CaseAudit:
    label_path = str(given["label"]) if given.get("label") else None
    case = Case(id=str(given["id"]), image=str(given["image"]), label=label_path)
    if given.get("annotated") is not None:
        case["annotated"] = given["annotated"]
    if isinstance(given.get("label_names"), dict):
        case["label_names"] = given["label_names"]
    if isinstance(given.get(CLICKS), list):
        case["clicks"] = given[CLICKS]
    if label_path is None:
        return CaseAudit(case, {}, "no label")
    counts: dict[str, int] = {}
    if given.get("task") not in (None, task.name):  # of an archive; its values are those of the other task
        return CaseAudit(case, counts, f"labelled for task {given['task']!r}")
    try:
        annotated = task.annotated(case.get("annotated"))
        for name, value in case.get("label_names", {}).items():
            here = task.value_names.get(value)
            if here is None or folded(here) != folded(name):
                raise ValueError(
                    f"{label_path}: drawn for another task: value {value} is {name!r} there, {here!r} here"
                )
        if voxels:
            image = read_volume(case["image"])
            check_image(image, task)
        else:
            image = read_header(case["image"])
            check_grid(case["image"], image.shape, image.affine.numpy(), task)
        label = align_label(read_volume(label_path), image)
        encoded = encode(label.as_tensor(), task, label_path)
        if task.overlapping:
            counts = {n: int(encoded[i].count_nonzero()) for i, n in enumerate(task.classes)}
        else:
            counts = {n: int((encoded == i).sum()) for i, n in enumerate(task.classes, 1)}
        counts = {n: count for (n, count), known in zip(counts.items(), annotated, strict=True) if known}
    except Exception as error:  # whatever is wrong with a case, it costs that case alone
        problem = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        return CaseAudit(case, counts, problem)
    return CaseAudit(case, counts, None)


def declared(names: Any) -> list[str]:
    """The classes that a label says it was annotated for.

    Raises:
        ValueError: not a list of names, or an empty one.
    """
    if not isinstance(names, list) or not names or not all(isinstance(n, str) and n.strip() for n in names):
        raise ValueError(f"annotated: expected a list of class names, found {names!r}")
    return names


def make_case(
    case: str, image: Path, label: Path | None, annotated: Any = None, names: Any = None, clicks: Any = None
) -> Case:
    """A case; `annotated` is what the label's file or list declares, None for all classes; `names`: `label_names`."""
    made = Case(id=case, image=str(image), label=str(label) if label else None)
    if annotated is not None and label:
        # Taken as it stands: left out, a partial label would count as complete; the audit names what is wrong with it.
        made["annotated"] = annotated if isinstance(annotated, list) else [str(annotated)]
    if isinstance(names, dict) and label:
        made["label_names"] = names
    if isinstance(clicks, list) and label:
        made["clicks"] = clicks
    return made


def _from_folder(folder: Path) -> list[Case]:
    labels = {case: newest(paths) for case, paths in volumes(folder / LABELS_FOLDER).items()}
    infos = Infos(folder).read()
    images, problems = usable(folder)
    for problem in problems.values():
        logger.warning("%s: %s", folder, problem)
    if problems and not images:
        raise ValueError(f"{folder}: no image that can be used: {'; '.join(problems.values())}")
    cases = []
    for case, image in images.items():
        label = labels.get(case)
        info = infos.label(case, LABELS_FOLDER.name, label).info if label else {}
        cases.append(make_case(case, image, label, info.get("annotated"), info.get("label_names"), info.get(CLICKS)))
    return cases


def _from_json(path: Path) -> list[Case]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # also a text that is not UTF-8
        raise ValueError(f"{path}: not valid JSON: {error}") from None
    entries = data.get("training") if isinstance(data, dict) else data
    if not isinstance(entries, list):
        raise ValueError(f"{path}: expected a list of cases, or an object with such a list under 'training'")
    cases = []
    for number, entry in enumerate(entries):
        if not isinstance(entry, dict) or not isinstance(entry.get("image"), str):
            raise ValueError(f"{path}: entry {number}: expected an object with 'image' and 'label', found {entry!r}")
        label = entry.get("label")
        if label is not None and not isinstance(label, str):
            raise ValueError(f"{path}: entry {number}: 'label' must be a path, found {label!r}")
        annotated = entry.get("annotated")
        if annotated is not None:
            try:
                declared(annotated)
            except ValueError as error:
                raise ValueError(f"{path}: entry {number}: {error}") from None
        image = path.parent / entry["image"]
        name = str(entry.get("id") or image_id(image))
        cases.append(make_case(name, image, path.parent / label if label else None, annotated))
    return cases


def _unique(cases: list[Case], source: Path) -> list[Case]:
    if not cases:
        hint = why_empty(source) if source.is_dir() else ""
        raise ValueError(f"{source}: no images; valid names end in {', '.join(SUFFIXES)}{hint and f'; {hint}'}")
    counts = Counter(case["id"] for case in cases)
    twins = [name for name, count in counts.items() if count > 1]
    if twins:
        raise ValueError(f"{source}: several cases with id {twins[0]!r}; an id names one image")
    return sorted(cases, key=lambda case: case["id"])
