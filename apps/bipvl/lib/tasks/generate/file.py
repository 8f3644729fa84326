"""The concepts file of drafts: what is to be drafted, what stays, and how a stopped run goes on."""

from __future__ import annotations

import datetime
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from lib.files import write_atomic
from lib.tasks import ATTRIBUTES, ClassText, Concepts, Review, Task, TaskError, load_concepts
from lib.tasks.check import Problem, check
from lib.tasks.generate.drafter import Drafter, with_texts
from lib.tasks.generate.prompts import Malformed


@dataclass
class Outcome:
    """What a run has drafted, and why the other classes are missing."""

    drafted: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)


def without_text(data: dict[str, Any]) -> dict[str, Any]:
    """A task file's content with empty sentences, for a task whose concepts file is still to be written."""
    names = data.get("regions") or data.get("labels") or {}
    empty = {"sentences": dict.fromkeys(ATTRIBUTES, "")}
    concepts = {
        "modality": data.get("modality", ""),
        "review": {"status": "draft"},
        "classes": dict.fromkeys(names, empty) if isinstance(names, dict) else {},
    }
    return {**data, "concepts": concepts}


def draft_file(
    task: Task,
    target: Path,
    drafter: Drafter,
    names: Iterable[str] = (),
    overwrite: bool = False,
    progress: Callable[[str, int, int], None] = lambda name, done, of: None,
    variants: int = 0,
) -> Outcome:
    """Draft what a concepts file lacks, or the classes named, and write it when all is there.

    Until then finished classes are kept in `<target>.part`, from which another run goes on. Text that people wrote or
    reviewed is replaced only if asked, and stays beside the file as `<target>.bak`. Wordings can be drafted for it, and
    then its sentences and its own wordings stay as they are.

    Args:
        task: its sentences are not read.
        target: the concepts file.
        names: classes to draft anew; none: all that have no text yet, or with `overwrite` all.
        progress: called before each class and at the end, with its name, how many are done and how many there are.
        variants: wordings to draft of each sentence that has none, 2 or more; 0 drafts none.

    Raises:
        TaskError: an unknown class, a file of people's that is not to be overwritten, or one wording only.
        EndpointError: as `Drafter.draft`; what was finished is kept.
    """
    named = tuple(names)
    for name in named:
        if name not in task.classes:
            raise TaskError(f"unknown class {name!r}; valid are {', '.join(task.classes)}")
    if variants == 1:
        raise TaskError("variants 1: at least 2 are needed, because the last is kept aside; 0 drafts none")
    existing = load_concepts(target) if target.is_file() else None
    theirs = bool(existing and _of_people(existing.review)) and not overwrite
    if existing and theirs and not variants:
        by = f" by {existing.review.by}" if existing.review.by else ""
        raise TaskError(
            f"{target}: people wrote this text (status {existing.review.status}{by}). --overwrite replaces it and "
            "keeps it beside the file, --out writes another file, --variants drafts wordings of its sentences"
        )
    part = target.with_name(f"{target.name}.part")
    finished = dict(load_concepts(part).classes) if part.is_file() else {}
    finished = {name: text for name, text in finished.items() if name in task.classes}
    kept = dict(existing.classes) if existing else {}
    if theirs:
        _complete(target, kept, named or task.classes)
        finished = _beside(kept, finished)
    spoken = () if theirs else named or tuple(n for n in task.classes if overwrite or n not in kept)
    problems = check(with_texts(task, {**kept, **finished}))
    if not theirs and not named and existing and not overwrite:
        broken = {p.class_name for p in problems if p.attribute and not p.attribute[-1].isdigit()}  # sentences alone
        spoken = tuple(n for n in task.classes if n not in kept or n in broken)
    poor = {(p.class_name, p.attribute.split()[0]) for p in problems if " wording " in p.attribute and not theirs}

    def unworded(name: str) -> list[str]:
        """Attributes of a class that need wordings."""
        own = finished.get(name, kept.get(name))
        worded = own.variants if own else {}
        redo = {a for n, a in poor if n == name and name not in finished}
        return [a for a in ATTRIBUTES if variants and (a in redo or not worded.get(a))]

    wanted = tuple(n for n in named or task.classes if n in spoken or unworded(n))
    outcome = Outcome()

    def keep(name: str, text: ClassText) -> None:
        finished[name] = text
        outcome.drafted.append(name)
        write_concepts(part, task, finished, drafter.model)

    for place, name in enumerate(wanted):
        progress(name, place, len(wanted))
        try:
            if name in spoken and name not in finished:
                keep(name, drafter.draft(with_texts(task, {**kept, **finished}), name))
            if lacking := unworded(name):
                keep(name, drafter.reword(with_texts(task, {**kept, **finished}), name, lacking, variants))
        except Malformed as error:
            outcome.failed[name] = str(error)
    progress("", len(wanted), len(wanted))
    if outcome.failed or not finished:
        return outcome
    if existing and existing.review.status != "draft":
        shutil.copy2(target, _free(target.with_name(f"{target.name}.bak")))
    write_concepts(target, task, {**kept, **finished}, drafter.model, "wordings" if theirs else None)
    part.unlink(missing_ok=True)
    return outcome


def _of_people(review: Review) -> bool:
    """True if people wrote the sentences."""
    return review.status != "draft" or review.part == "wordings"


def _complete(target: Path, kept: dict[str, ClassText], names: Iterable[str]) -> None:
    """Raises TaskError if one of these classes lacks a sentence: only what is said can be reworded."""
    for name in names:
        sentences = kept[name].sentences if name in kept else {}
        if missing := [attribute for attribute in ATTRIBUTES if not sentences.get(attribute, "").strip()]:
            raise TaskError(
                f"{target}: no sentence for {name}.{missing[0]}; people wrote this text: write it before its wordings "
                "are drafted, or let --overwrite replace all"
            )


def _beside(kept: dict[str, ClassText], finished: dict[str, ClassText]) -> dict[str, ClassText]:
    """Wordings from an earlier run, for sentences that are still the same; those of people go first."""
    return {
        name: kept[name].model_copy(update={"variants": {**text.variants, **kept[name].variants}})
        for name, text in finished.items()
        if name in kept and kept[name].sentences == text.sentences
    }


def write_concepts(
    path: Path, task: Task, classes: dict[str, ClassText], model: str, part: Literal["wordings"] | None = None
) -> None:
    """Write a concepts file with the status draft, atomically; `part` says what of it is drafted if not all is."""
    today = datetime.date.today().isoformat()
    ordered = {name: classes[name] for name in task.classes if name in classes}
    review = Review(status="draft", part=part, by=model, date=today)
    data = Concepts(modality=task.modality, review=review, classes=ordered).model_dump(mode="json", exclude_none=True)
    for text in data["classes"].values():
        for key in ("variants", "ambiguous"):
            if not text[key]:
                del text[key]
    what, them = ("The wordings are drafted", "them") if part else ("Drafted", "it")
    header = f"# {what} by a language model. Nobody has reviewed {them}: read docs/using/sentences.md before use.\n"
    body = yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=120)
    write_atomic(path, lambda file: file.write((header + body).encode()))


def remaining(task: Task, target: Path) -> list[Problem]:
    """What the check finds in a written file as a whole."""
    return check(with_texts(task, load_concepts(target).classes, load_concepts(target).review))


def _free(path: Path) -> Path:
    """The path, with a number if it is taken."""
    number = 1
    while path.exists():
        number += 1
        path = path.with_name(f"{path.name.split('.bak')[0]}.bak{number}")
    return path
