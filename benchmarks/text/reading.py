"""Whether a network reads: masks under wordings that it never saw, exchanged texts, and texts of what is not there.

    python -m benchmarks.text.reading run CHECKPOINT --data FOLDER [--on test] [--cases 20]
    python -m benchmarks.text.reading tables                     the section of docs/research/text.md

Each text is asked of each case, and the masks are compared with the labels on the network's grid:

    meant    Dice of a class's mask with that class's label, mean over cases, then over classes
    other    likewise with the label that fits best among the other classes'
    drawn    voxels of the masks, as a share of those that the task's own text brings

Of each text it is also kept whether the server would have warned of it, and whether it would have been right to.

`aside` are the wordings that training keeps aside, `stranger …` those of strangers.yaml, whose author has not seen the
others. Of absent texts, `known` ones stood in training and `aside` ones did not.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
import yaml

from benchmarks import ROOT, records
from benchmarks.accuracy.__main__ import WORK, commit, hardware
from benchmarks.accuracy.data import SHARES, SPLITS, Preprocessed, find_cases, split_cases
from benchmarks.documents import insert
from benchmarks.shipped_model import FOR_PLACES
from lib.model import checkpoints
from lib.model.nets import BiPVLSeg
from lib.model.nets.reading import misread
from lib.model.nets.text import Sentences
from lib.model.predict import predict
from lib.tasks import ATTRIBUTES, Task
from lib.tasks.absent import Absent, absent_texts
from lib.tasks.wording import exchanged_rows
from lib.trainers.evaluation import find_places

RESULTS = records.RESULTS / "reading.jsonl"
DOCUMENT = ROOT / "docs" / "research" / "text.md"
STRANGERS = Path(__file__).with_name("strangers.yaml")
PAIRS: dict[str, tuple[str, str]] = {
    "hippocampus-mr": ("anterior", "posterior"),
    "acdc-mr": ("left", "right"),
    "quickstart": ("left", "right"),
}
ABSENT_TEXTS = 2  # of each kind
WRONG = 0.5  # Dice with the masks of the own text below which a text is drawn wrong

Rows = list[list[str]]

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True)
class Text:
    """A text to ask for. rows: a list of sentences for each class. order: whose description each class got, if not its
    own. concepts: the numbers of its attributes, if some are left out. replaced: the classes that got an absent text;
    the others keep their own."""

    kind: str
    rows: Rows
    order: tuple[int, ...] | None = None
    concepts: tuple[int, ...] | None = None
    replaced: tuple[int, ...] = ()


@app.command("run")
def run_command(
    checkpoint: Annotated[Path, typer.Argument(help="of a benchmark run, or a published version")],
    data: Annotated[Path, typer.Option(help="folder of the data set")],
    on: Annotated[str, typer.Option(help="validation or test")] = "validation",
    cases: Annotated[int, typer.Option(help="the first so many, one of each patient")] = 12,
    field: Annotated[tuple[float, float] | None, typer.Option(help="mm around the centre; size small: 192 192")] = None,
    only: Annotated[str, typer.Option(help="texts whose kind contains this")] = "",
    name: Annotated[str, typer.Option(help="of the result; default: the file's")] = "",
    results: Annotated[Path, typer.Option(help="JSON Lines")] = RESULTS,
    work: Annotated[Path, typer.Option(help="preprocessed volumes")] = WORK,
) -> None:
    """Ask a trained network for every text; the results take the place of an earlier run of the same name."""
    model, task = checkpoints.restore_model(checkpoints.load(checkpoint), checkpoint)
    split = split_cases(find_cases(data), shares=SPLITS.get(task.name, SHARES))
    found = {"validation": split.validation, "test": split.test}[on]
    firsts = list({case["patient"]: case for case in reversed(found)}.values())[::-1][:cases]
    volumes = list(Preprocessed(task, firsts, work / "volumes", field))
    labels = [volume["label"].numpy()[0].astype(np.int64) for volume in volumes]
    images = [volume["image"] for volume in volumes]
    own = masks(model, task, images, None)
    places = find_places(model, task, split.training[:FOR_PLACES])
    rows: list[dict[str, Any]] = [{"kind": "own", **compare(task, own, labels, own)}]
    for text in texts(task):
        if only in text.kind:
            asked = masks(model, task, images, sentences_of(model, text))
            rows.append({"kind": text.kind, **compare(task, asked, labels, own, text)})
            if places and text.concepts is None:
                said = misread(model, places, task, text.rows)
                rows[-1]["warnings"] = announced(task, asked, own, said)
            print(json.dumps(rows[-1]), flush=True)
    records.put(
        results,
        {
            **{"name": f"{name or checkpoint.stem}_{on}", "task": task.name, "on": on, "cases": len(firsts)},
            **{"model": task.model.model_dump(mode="json"), "training": task.training.model_dump(mode="json")},
            **{"texts": rows, "hardware": hardware(torch.device("cpu")), "commit": commit()},
        },
    )


@app.command("tables")
def tables_command() -> None:
    """Write the table into the document."""
    runs = records.read(RESULTS)
    insert(DOCUMENT, "reading", f"{table(runs)}\n\n{warned(runs)}")


# Texts ----------------------------------------------------------------------------------------------------------------


def texts(task: Task) -> Iterator[Text]:
    """All texts that fit a task, its own aside."""
    names, own = task.classes, task.text_rows()
    count, width = len(names), len(own[0])
    around = tuple((n + 1) % count for n in range(count))  # each class gets the next one's
    aside = task.concepts.aside(names)
    worded = [("aside", aside)] if aside else []
    for style, classes in strangers(task).items():
        worded.append((f"stranger {style}", [[classes[name][a] for a in ATTRIBUTES] for name in names]))
    for kind, rows in worded:
        yield Text(kind, rows)
    for kind, rows in (("own", own), *worded):
        yield Text(f"{kind}, exchanged", [rows[n] for n in around], order=around)
    yield Text("names only", [[name] * width for name in names])
    yield Text("sentence of the name only", [[row[0]] * width for row in own])
    yield Text("without the name", [row[1:] for row in own], concepts=tuple(range(1, width)))
    if pair := PAIRS.get(task.name):
        order = tuple(twin(names, n, *pair) for n in range(count))
        words = " and ".join(pair)
        for kind, rows in (("", own), *((f", {kind}", rows) for kind, rows in worded)):
            swapped = exchanged_rows(rows, *pair)
            # Other people's names of a class may have neither word.
            if all(swapped[n][0] != rows[n][0] for n in range(count) if order[n] != n):
                yield Text(f"{words} exchanged{kind}", swapped, order=order)
        name_alone = [[exchanged_rows([row], *pair)[0][0]] * width for row in own]
        yield Text(f"{words} exchanged, sentence of the name only", name_alone, order=order)
    for share, found in (("known", absent_texts(task)), ("aside", absent_texts(task, aside=True))):
        yield from absent(own, share, found)


def absent(own: Rows, share: str, found: Absent) -> Iterator[Text]:
    """Texts of what is not there for all classes, and for each class alone beside the true ones of the others."""
    count, width = len(own), len(own[0])
    every = tuple(range(count))
    structures = [list(found.structures[n * 7 % len(found.structures)]) for n in range(ABSENT_TEXTS)]
    ordinary = [[found.ordinary[(n * 11 + k) % len(found.ordinary)] for k in range(width)] for n in range(ABSENT_TEXTS)]
    for kind, described in (("structures", structures), ("ordinary", ordinary)):
        for n in range(ABSENT_TEXTS):
            rows = [described[(n + c) % ABSENT_TEXTS] for c in every]
            yield Text(f"absent, {kind}, {share}, all classes", rows, replaced=every)
            one = n % count
            rows = [described[n] if c == one else own[c] for c in every]
            yield Text(f"absent, {kind}, {share}, one class", rows, replaced=(one,))


def strangers(task: Task) -> dict[str, dict[str, dict[str, str]]]:
    """Style to class to attribute to sentence."""
    return yaml.safe_load(STRANGERS.read_text(encoding="utf-8")).get(task.name, {})


def twin(names: Sequence[str], n: int, first: str, second: str) -> int:
    """The class whose name has the other word; the class itself if there is none."""
    other = exchanged_rows([[names[n]]], first, second)[0][0]
    return names.index(other) if other in names else n


def sentences_of(model: BiPVLSeg, text: Text) -> Sentences:
    """The text, tokenised; left-out attributes are compared with the task's own in their places."""
    found = model.text.tokenize(text.rows)
    if text.concepts is None:
        return found
    return Sentences(found.ids, found.mask, found.key, found.classes, concepts=torch.tensor(text.concepts))


# Masks ----------------------------------------------------------------------------------------------------------------


def masks(model: BiPVLSeg, task: Task, images: Sequence[torch.Tensor], sentences: Sentences | None) -> list[np.ndarray]:
    """The label volume of each image on the network's grid, classes numbered from 1."""
    found = (predict(model, image, task, sentences=sentences) for image in images)
    return [prediction.probabilities.argmax(0).cpu().numpy() for prediction in found]


def compare(
    task: Task,
    asked: Sequence[np.ndarray],
    labels: Sequence[np.ndarray],
    own: Sequence[np.ndarray],
    text: Text | None = None,
) -> dict[str, float | None]:
    """`meant`, `other` and `drawn` of the masks; of a text with an `order`, `meant` is the class described. Of absent
    texts `drawn` is that of the replaced classes alone, and `meant` is of those that are left."""
    count = len(task.classes)
    replaced = set(text.replaced) if text else set()
    order = (text.order if text else None) or tuple(range(count))
    kept = [n for n in range(count) if n not in replaced]
    pairs = list(zip(asked, labels, strict=True))
    table = np.array([[[dice(a == c + 1, b == d + 1) for d in range(count)] for c in range(count)] for a, b in pairs])
    # (cases, class drawn, class of the label)
    meant = [np.nanmean(table[:, c, order[c]]) for c in kept]
    other = [max(np.nanmean(table[:, c, d]) for d in range(count) if d != order[c]) for c in kept if count > 1]
    counted = sorted(replaced) or kept
    drawn = sum(int((a == c + 1).sum()) for a in asked for c in counted)
    usual = sum(int((a == order[c] + 1).sum()) for a in own for c in counted)
    return {"meant": mean(meant), "other": mean(other), "drawn": round(drawn / usual, 4) if usual else None}


def announced(
    task: Task, asked: Sequence[np.ndarray], own: Sequence[np.ndarray], said: Mapping[str, str | None]
) -> list[list[float | bool]]:
    """For each class, the Dice of its masks with those of its own text, mean over cases, and whether the server would
    have warned of its text."""
    return [
        [round(float(np.nanmean([dice(a == n, b == n) for a, b in zip(asked, own, strict=True)])), 4), name in said]
        for n, name in enumerate(task.classes, 1)
    ]


def dice(a: np.ndarray, b: np.ndarray) -> float:
    """Dice of two masks; NaN if both are empty."""
    voxels = int(a.sum() + b.sum())
    return 2 * int((a & b).sum()) / voxels if voxels else math.nan


def mean(values: Sequence[float]) -> float | None:
    return round(float(np.mean(values)), 4) if len(values) else None


# Table ----------------------------------------------------------------------------------------------------------------


def table(runs: Sequence[dict[str, Any]]) -> str:
    """A table a run, with a row for each kind of text; texts of one kind are averaged."""
    lines: list[str] = []
    for run in runs:
        lines += [f"*{run['name']}, {run['cases']} cases*", ""]
        lines += ["| text | Dice with the class meant | with another class | voxels drawn |", "|---|---|---|---|"]
        for kind in dict.fromkeys(text["kind"] for text in run["texts"]):
            found = [text for text in run["texts"] if text["kind"] == kind]
            cells = (_cell([text[key] for text in found]) for key in ("meant", "other", "drawn"))
            lines.append(f"| {kind} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines).rstrip()


def warned(runs: Sequence[dict[str, Any]]) -> str:
    """How many of the texts that are drawn wrong, and of those that are drawn right, were announced."""
    lines = ["| network | texts drawn wrong | announced | texts drawn right | announced |", "|---|---|---|---|---|"]
    for run in runs:
        found = [pair for text in run["texts"] for pair in text.get("warnings", [])]
        wrong, right = ([said for dice_, said in found if (dice_ < WRONG) == kind] for kind in (True, False))
        cells = (str(value) for part in (wrong, right) for value in (len(part), sum(part)))
        lines.append(f"| {run['name']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{sum(known) / len(known):.3f}" if known else ""


if __name__ == "__main__":
    app()
