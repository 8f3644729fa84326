"""`concepts` on the command line: check, show, compare and draft sentences."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import openai
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text
from typer.core import TyperGroup

from lib.model.tokens import check_text
from lib.model.versions import Versions
from lib.tasks import (
    ATTRIBUTES,
    ClassText,
    Concepts,
    Task,
    TaskError,
    concepts_file,
    list_tasks,
    load_concepts,
    load_task,
    task_data,
    task_from_dict,
)
from lib.tasks import generate as drafting
from lib.tasks.check import MAX_WORDINGS, worded
from lib.tasks.generate import Drafter
from lib.tasks.revisions import Revisions

DEFAULT_MODELS = Path(__file__).resolve().parents[3] / "model"
REFERENCE = "a task, a task or concepts file, or of a task TASK@3 (a revision), TASK@newest, TASK@v2 (a version's text)"
KEY, BASE_URL, MODEL = "OPENAI_API_KEY", "OPENAI_BASE_URL", "OPENAI_MODEL"
NO_KEY = "none"  # local servers need none, but the library insists on one

ModelDirOption = Annotated[Path, typer.Option("--model-dir", help="where versions and revisions are kept")]


class _CheckByDefault(TyperGroup):
    """`concepts my-task.yaml` is `concepts check my-task.yaml`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args or (args[0] not in self.commands and args[0] != "--help"):
            args = ["check", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(cls=_CheckByDefault, help="Check, show, compare and draft sentences. Without a command: check.")
console = Console()


@app.command("check")
def check_command(
    task: Annotated[str | None, typer.Argument(help="task name or file; default: all shipped")] = None,
) -> None:
    """Check the sentences of a task."""
    problems = 0
    for name in [task] if task else list_tasks():
        found = check_text(load_task(name))
        problems += len(found)
        console.print(f"{name}: {'ok' if not found else f'{len(found)} problem(s)'}")
        for problem in found:
            console.print(Text(f"  {problem}"))
    if problems:
        raise typer.Exit(1)


@app.command()
def show(
    text: Annotated[str, typer.Argument(help=REFERENCE)],
    class_: Annotated[list[str] | None, typer.Argument(metavar="[CLASS]...", help="default: all")] = None,
    model_dir: ModelDirOption = DEFAULT_MODELS,
) -> None:
    """Print sentences as a table, one row per attribute, and below each its further wordings."""
    title, concepts = resolve(text, model_dir)
    unknown = [name for name in class_ or [] if name not in concepts.classes]
    if unknown:
        raise TaskError(f"{title}: unknown class {unknown[0]!r}; valid are {', '.join(concepts.classes)}")
    console.print(Text(f"{title}: {concepts.modality}, {_review(concepts)}, text {concepts.hash}"))
    table = Table("class", "attribute", "sentence", show_lines=False)
    for name in class_ or concepts.classes:
        rows = list(_rows(concepts.classes[name]))
        for number, (attribute, sentence) in enumerate(rows):
            table.add_row(
                Text(name if number == 0 else ""), attribute, Text(sentence), end_section=number == len(rows) - 1
            )
    console.print(table)


@app.command()
def diff(
    first: Annotated[str, typer.Argument(help=REFERENCE)],
    second: Annotated[str, typer.Argument(help="likewise")],
    model_dir: ModelDirOption = DEFAULT_MODELS,
) -> None:
    """Compare two texts, sentence by sentence and wording by wording; the exit status is 1 if they differ."""
    (left, before), (right, after) = resolve(first, model_dir), resolve(second, model_dir)
    changes = list(compare(before, after))
    heads = [Text(f"{title} ({_review(concepts)})") for title, concepts in ((left, before), (right, after))]
    if not changes:
        console.print(Text.assemble("The same sentences: ", heads[0], ", ", heads[1]))
        return
    table = Table("class", "attribute", show_lines=True)
    for head in heads:
        table.add_column(head)
    for name, attribute, old, new in changes:
        table.add_row(Text(name), attribute, *_marked(old, new))
    console.print(table)
    raise typer.Exit(1)


@app.command()
def generate(
    task: Annotated[str, typer.Argument(help="task name or file; its concepts file need not exist yet")],
    model: Annotated[str, typer.Option(envvar=MODEL, help="name of the language model at the endpoint")],
    base_url: Annotated[str | None, typer.Option(envvar=BASE_URL, help="default: the library's own")] = None,
    key_file: Annotated[Path | None, typer.Option(help=f"file with the key; else the variable {KEY}")] = None,
    out: Annotated[Path | None, typer.Option(help="default: the concepts file of the task")] = None,
    class_: Annotated[list[str] | None, typer.Option("--class", help="draft this class anew; repeatable")] = None,
    attempts: Annotated[int, typer.Option(min=1, max=20, help="most answers to ask for per class")] = 4,
    retries: Annotated[int, typer.Option(min=0, help="when the endpoint is busy or limits requests")] = 8,
    timeout: Annotated[float, typer.Option(min=1, help="seconds for one answer")] = 120,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace text that people wrote or reviewed")] = False,
    variants: Annotated[
        int, typer.Option(min=0, max=MAX_WORDINGS, help="wordings to draft of each sentence, 2 or more; 0: none")
    ] = 0,
) -> None:
    """Draft the sentences of each class, or wordings of them, with a language model; a person reviews them before they
    are used."""
    path, data = task_data(task)
    data.setdefault("concepts", f"{data.get('name', path.stem)}.yaml")
    target = out or concepts_file(path, data)
    if target.resolve() == path.resolve():
        raise TaskError(f"{target} is the task file; choose another --out")
    blank = task_from_dict(drafting.without_text(data), str(path))
    client = openai.OpenAI(api_key=_key(key_file, base_url), base_url=base_url, max_retries=retries, timeout=timeout)
    drafter = Drafter(client, model, attempts)
    columns = (
        TextColumn("Drafting"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console) as bar:
        line = bar.add_task("", total=None)
        outcome = drafting.draft_file(
            blank,
            target,
            drafter,
            class_ or (),
            overwrite,
            lambda name, done, of: bar.update(line, description=name, completed=done, total=of),
            variants,
        )
    for name, reason in outcome.failed.items():
        console.print(Text(f"{name}: no answer of {attempts} could be used; the last: {reason}", "red"))
    if outcome.failed:
        console.print(
            Text(f"{target} is not written. The finished classes are kept; run the command again for the others.")
        )
        raise typer.Exit(1)
    if not target.is_file() or not outcome.drafted:
        what = "sentences and wordings" if variants else "sentences"
        console.print(Text(f"{target}: every class has its {what}; --class NAME drafts one anew"))
        return
    console.print(Text(f"Written: {target}, status draft. Read it, correct it, and sign it (docs/using/sentences.md)."))
    for problem in drafting.remaining(blank, target):
        console.print(Text(f"  {problem}"))


def _key(file: Path | None, base_url: str | None) -> str:
    """The key, which no command line shows."""
    key = file.read_text(encoding="utf-8").strip() if file else os.environ.get(KEY, "").strip()
    if not key and not base_url:
        raise TaskError(f"no key: set {KEY}, or give --key-file; an endpoint of your own (--base-url) may need none")
    return key or NO_KEY


def resolve(reference: str, model_dir: Path) -> tuple[str, Concepts]:
    """What a reference on the command line names: a title, and the sentences.

    Raises:
        TaskError: no such task, file, revision or version.
    """
    match = re.fullmatch(r"(.+)@(v?\d+|newest|file)", reference)
    if match:
        task = load_task(match[1])
        wanted, folder = match[2], model_dir / task.name
        if wanted.startswith("v"):
            return reference, _version(task, Versions(folder), wanted)
        revisions = Revisions(task, folder)
        number = {"newest": revisions.newest, "file": 0}.get(wanted)
        return reference, revisions.read(int(wanted) if number is None else number).concepts
    if reference.endswith((".yaml", ".yml")) and "classes" in task_data(reference)[1]:
        return reference, load_concepts(Path(reference))
    return reference, load_task(reference).concepts


def _version(task: Task, versions: Versions, wanted: str) -> Concepts:
    number = versions.resolve(wanted)
    assert number is not None
    return task_from_dict(versions.read(number)["task"], str(versions.path(number))).concepts


def compare(before: Concepts, after: Concepts) -> Iterator[tuple[str, str, str, str]]:
    """(class, attribute, old sentence, new sentence) of each difference; empty if one side has none."""
    for name in dict.fromkeys((*before.classes, *after.classes)):
        old, new = (_sentences(concepts, name) for concepts in (before, after))
        for attribute in dict.fromkeys((*ATTRIBUTES, *old, *new)):
            if old.get(attribute, "") != new.get(attribute, ""):
                yield name, attribute, old.get(attribute, ""), new.get(attribute, "")


def _sentences(concepts: Concepts, name: str) -> dict[str, str]:
    text = concepts.classes.get(name)
    if text is None:
        return {}
    wordings = {worded(a, n): w for a, own in text.variants.items() for n, w in enumerate(own, 1)}
    return {**text.sentences, **wordings, **{f"ambiguous {n}": s for n, s in enumerate(text.ambiguous, 1)}}


def _rows(text: ClassText) -> Iterator[tuple[str, str]]:
    """What a table shows of a class: names of rows, and sentences."""
    for attribute, sentence in text.sentences.items():
        yield attribute, sentence
        wordings = text.variants.get(attribute, ())
        for number, wording in enumerate(wordings, 1):
            yield f"  wording {number}{', kept aside' if number == len(wordings) else ''}", wording
    for number, sentence in enumerate(text.ambiguous, 1):
        yield f"ambiguous {number}", sentence


def _marked(old: str, new: str) -> tuple[Text, Text]:
    """Both sentences, with the words that only one of them has coloured."""
    first, second = (re.findall(r"\s*\S+", sentence) for sentence in (old, new))
    left, right = Text(), Text()
    for kind, a, b, c, d in difflib.SequenceMatcher(None, first, second, autojunk=False).get_opcodes():
        left.append("".join(first[a:b]), "" if kind == "equal" else "red")
        right.append("".join(second[c:d]), "" if kind == "equal" else "green")
    return left, right


def _review(concepts: Concepts) -> str:
    review = concepts.review
    signed = " ".join(part for part in (f"by {review.by}" if review.by else "", review.date or "") if part)
    return " ".join(part for part in (review.status, f"of the {review.part}" if review.part else "", signed) if part)
