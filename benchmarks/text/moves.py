"""What the text moves: other sentences for one request, and how far the masks follow them.

    python -m benchmarks.text.moves phantom    trains both heads on a phantom of left and right
    python -m benchmarks.text.moves tables     the section of docs/research/text.md

Each request is compared with the standard one, class by class: Dice of the mask with the mask under its own sentences
("stays": 1 if the text moved nothing), and with that of the class whose words or sentences it got ("follows": 1 if the
mask went with them). Real patients, and words that no training read: `benchmarks.text.reading`.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import typer
from torch import Tensor

from benchmarks import ROOT, records
from benchmarks.common import save_runs
from benchmarks.documents import insert
from benchmarks.text import laterality
from lib.model.nets import BiPVLSeg
from lib.tasks import Task
from lib.tasks.wording import exchanged_rows

Predict = Callable[[Task, list[list[str]]], Tensor]  # a task's classes and their sentences to labels (cases, ...)
SIDES = ("left", "right")
RESULTS = records.RESULTS / "text-moves-phantom.jsonl"
WORK = Path.home() / ".cache" / "bipvl-accuracy"
DOCUMENT = ROOT / "docs" / "research" / "text.md"

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.command("phantom")
def phantom_command(seeds: int = 3, steps: int = 100, cases: int = 16) -> None:
    """Train both heads on the phantom of left and right, in both wordings."""
    runs = []
    for seed in range(seeds):
        for head in ("fixed", "text"):
            for wording in laterality.NAMES:
                task = laterality.task(head, wording)
                model = laterality.train(task, steps, seed)
                image, label = laterality.draw(cases, torch.Generator().manual_seed(10_000))
                found = moves(task, patches(model, image), label[:, 0].long())
                runs.append({"head": head, "wording": wording, "seed": seed, **found})
                print(json.dumps(runs[-1]), file=sys.stderr, flush=True)
                save_runs(RESULTS, runs, steps=steps, cases=cases)


@app.command("tables")
def tables_command() -> None:
    """Write the table into the document."""
    insert(DOCUMENT, "text-moves", table(records.read(RESULTS)))


# Requests -------------------------------------------------------------------------------------------------------------


def patches(model: BiPVLSeg, image: Tensor) -> Predict:
    """Whole images at once."""

    @torch.no_grad()
    def run(task: Task, rows: list[list[str]]) -> Tensor:
        return model(image, model.text.tokenize(rows)).logits.argmax(1)

    return run


def moves(task: Task, run: Predict, label: Tensor) -> dict[str, Any]:
    """All requests that fit the task's sentences: words exchanged everywhere, two classes' sentences exchanged, and one
    class alone given another's sentences."""
    names, rows = task.classes, task.text_rows()
    before = run(task, rows)
    result: dict[str, Any] = {"dice": {n: dice(before, i, label, i) for i, n in enumerate(names, 1)}, "requests": []}

    def record(request: str, after: Tensor, goes: dict[int, int], words: int) -> None:
        classes = {
            names[i]: {
                "stays": dice(after, i + 1, before, i + 1),
                "follows": dice(after, i + 1, before, goes.get(i, i) + 1),
                "to": names[goes.get(i, i)],
            }
            for i in range(len(names))
        }
        result["requests"].append({"request": request, "words": words, "classes": classes})

    other = exchanged_rows(rows, *SIDES)
    words = sum(
        a != b
        for old, new in zip(rows, other, strict=True)
        for s, t in zip(old, new, strict=True)
        for a, b in zip(s.split(), t.split(), strict=True)
    )
    record("left and right exchanged", run(task, other), {0: 1, 1: 0}, words)
    for i in range(len(names)):
        for j in range(i + 1, len(names)):
            other = list(rows)
            other[i], other[j] = rows[j], rows[i]
            record(f"{names[i]} and {names[j]} exchange all sentences", run(task, other), {i: j, j: i}, 0)
    for i in range(len(names)):
        j = (i + 1) % len(names)
        # Two classes of one description would tie: with the text head the other one is not asked for.
        asked = [n for n in range(len(names)) if n != j or task.model.head == "fixed"]
        found = run(task.only([names[n] for n in asked]), [rows[j if n == i else n] for n in asked])
        numbers = torch.tensor([0, *(1 + n for n in asked)])
        record(f"{names[i]} described as {names[j]}", numbers[found], {i: j}, 0)
    return result


def dice(a: Tensor, i: int, b: Tensor, j: int) -> float:
    """Dice of two masks; 1 if both are empty."""
    first, second = a == i, b == j
    total = int(first.sum() + second.sum())
    return round(float(2 * (first & second).sum()) / total, 4) if total else 1.0


def table(runs: list[dict[str, Any]]) -> str:
    """One row per request and class: for each kind of run mean and range over seeds of "stays" and "follows"."""
    heads = sorted({r["head"] for r in runs})
    lines = [
        "| request | class | " + " | ".join(f"{h}: stays | {h}: follows" for h in heads) + " |",
        "|---|---|" + "---|" * 2 * len(heads),
    ]
    wordings = list(dict.fromkeys(r.get("wording", "") for r in runs))
    for wording in wordings:
        some = [r for r in runs if r.get("wording", "") == wording]
        means = [f"| Dice against the reference ({wording or 'test'}) | {name} |" for name in some[0]["dice"]]
        for line, name in zip(means, some[0]["dice"], strict=True):
            cells = [spread([r["dice"][name] for r in some if r["head"] == h]) + " |" for h in heads]
            lines.append(f"{line} " + " | ".join(cells) + " |")
        for n, request in enumerate(some[0]["requests"]):
            for name in request["classes"]:
                cells = []
                for h in heads:
                    found = [r["requests"][n]["classes"][name] for r in some if r["head"] == h]
                    moved = found[0]["to"] != name
                    cells.append(spread([f["stays"] for f in found]))
                    cells.append(spread([f["follows"] for f in found]) if moved else "")
                lines.append(f"| {request['request']} | {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def spread(values: list[float]) -> str:
    mean = statistics.mean(values)
    return f"{mean:.2f}" if len(values) == 1 else f"{mean:.2f} ({min(values):.2f} to {max(values):.2f})"


if __name__ == "__main__":
    app()
