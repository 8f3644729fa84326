"""Is the agreement of a mask with its class's text a warning? Injected errors against faultless cases.

    python -m benchmarks.text.explanation run FILE... --data FOLDER     checkpoints of accuracy.py
    python -m benchmarks.text.explanation tables                        the section of docs/research/explanation.md

Both settings use real images with masks drawn by hand. "masks" shifts, grows or mirrors one organ's mask. "images"
shifts, grows or mirrors the organ itself in the image, and the model judges its own mask. AUROC: how often a score puts
a case with an error below one without; 0.5 is chance.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from scipy.stats import rankdata
from torch import Tensor

from benchmarks import ROOT, records
from benchmarks.accuracy.data import Preprocessed, find_cases, split_cases
from benchmarks.accuracy.settings import FIELDS
from benchmarks.common import save_runs
from benchmarks.documents import insert
from benchmarks.text.injected import errors, painted
from lib.infers.explain import agreement
from lib.model import checkpoints
from lib.model.nets import BiPVLSeg
from lib.model.predict import Prediction, predict
from lib.tasks import Task

RESULTS = records.RESULTS / "explanation.jsonl"
DOCUMENT = ROOT / "docs" / "research" / "explanation.md"
WORK = Path.home() / ".cache" / "bipvl-accuracy"
LEAST = 20  # voxels of a mask that is used
IN_IMAGES = ("shift 9 mm", "shift 15 mm", "growth 6 mm", "growth 9 mm", "mirror in image", "mirror in box")
NAMES = {
    "cosine": "cosine of T and V",
    "inside": "mean p inside the mask",
    "dice": "soft Dice of mask and p",
    "margin": "mean logit inside over the best other class",
    "fit": "fit",
    "agreement": "**agreement** = fit / fit of the model's own mask",
    "certainty": "1 − uncertainty of the whole case",
}
Scored = dict[
    str, list[dict[str, Any]]
]  # kind of error, "" for none, to entries: `class`, `overlap` with the right mask, scores

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.command("run")
def run_command(
    files: Annotated[list[Path], typer.Argument(help="checkpoints")],
    data: Annotated[Path, typer.Option(help="folder of the data set")],
    on: Annotated[list[str], typer.Option(help="validation or test")] = ["validation", "test"],  # noqa: B006
    every: Annotated[int, typer.Option(help="errors in the image of every n-th test case; 0: none")] = 1,
    work: Annotated[Path, typer.Option(help="preprocessed volumes")] = WORK,
) -> None:
    """Score faultless and injected cases with every method; methods were chosen on the validation patients."""
    for file in files:
        model, task = checkpoints.restore_model(checkpoints.load(file), file)
        split = split_cases(find_cases(data))
        run: dict[str, Any] = {"head": task.model.head, "checkpoint": file.stem}
        for part in on:
            cases = {"validation": split.validation, "test": split.test}[part]
            volumes = Preprocessed(task, cases, work / "volumes", FIELDS["small"])
            found: dict[str, Scored] = {"masks": {}, "images": {}}
            for i, case in enumerate(volumes):
                image, label = case["image"].as_tensor(), case["label"].as_tensor()[0].long()
                score_case(model, task, image, label, found, i if chosen(part, i, every) else None)
            run[part] = {name: summed(scored) for name, scored in found.items() if scored}
            print(file.stem, part, json.dumps(run[part]), file=sys.stderr, flush=True)
        kept = [r for r in records.read(RESULTS) if r["checkpoint"] != file.stem]
        save_runs(RESULTS, [*kept, run], task=task.name)


@app.command("tables")
def tables_command() -> None:
    """Write the tables into the document."""
    insert(DOCUMENT, "explanation", "\n".join(tables(records.read(RESULTS))))


def chosen(part: str, i: int, every: int) -> bool:
    """Whether the image of a case is injected with errors: each costs a pass of the network."""
    return part == "test" and every > 0 and i % every == 0


# Scores ---------------------------------------------------------------------------------------------------------------


class Reference:
    """What a model says of class c (counted from 1) in a case; every score of a mask is taken from it."""

    def __init__(self, prediction: Prediction, c: int, spacing: Sequence[float]) -> None:
        p = prediction.probabilities
        logits = p.clamp_min(1e-6).log()
        self.p, self.own, self.spacing = p[c], p.argmax(0) == c, spacing
        self.margin = logits[c] - torch.cat([logits[:c], logits[c + 1 :]]).amax(0)
        self.mass = float(self.p.sum())
        self.fit = agreement.fit(self.p, self.own, spacing)
        self.cosine = float(prediction.alignment[c - 1])
        self.certainty = 1 - prediction.uncertainty()

    def of_mask(self, mask: Tensor) -> dict[str, float]:
        """Every method's score of a mask."""
        inside, fit = float(self.p[mask].sum()), agreement.fit(self.p, mask, self.spacing)
        if fit is None:  # shifted out of the image
            return {"cosine": self.cosine, "inside": 0, "dice": 0, "margin": 0, "fit": 0, "agreement": 0}
        return {
            "cosine": self.cosine,
            "inside": inside / int(mask.sum()),
            "dice": 2 * inside / (int(mask.sum()) + self.mass),
            "margin": float(self.margin[mask].mean()),
            "fit": fit,
            "agreement": fit / (self.fit or 1.0),
        }

    def of_own(self) -> dict[str, float]:
        """Every method's score of the model's own mask; agreement is 1 by definition."""
        scores = self.of_mask(self.own)
        del scores["agreement"]
        return {**scores, "certainty": self.certainty}


@torch.no_grad()
def score_case(
    model: BiPVLSeg, task: Task, image: Tensor, label: Tensor, found: dict[str, Scored], number: int | None
) -> None:
    """Add the scores of a case's masks, and with a `number` of its images, to what was found.

    Of the four sides of a shift an image gets one, in turn by number and class: each costs a pass of the network.
    """
    before = predict(model, image, task)
    for c in range(1, 1 + len(task.classes)):
        mask = label == c
        if mask.sum() < LEAST:
            continue
        reference = Reference(before, c, task.spacing)
        _add(found["masks"], "", c, 1.0, reference.of_mask(mask))
        injected = list(errors(mask, task.spacing))
        for error in injected:
            _add(found["masks"], error.kind, c, _dice(mask, error.mask), reference.of_mask(error.mask))
        if number is None:
            continue
        _add(found["images"], "", c, 1.0, reference.of_own())
        for kind in IN_IMAGES:
            choices = [error for error in injected if error.kind == kind]
            error = choices[(number + c) % len(choices)]
            after = Reference(predict(model, painted(image, mask, error, task.spacing), task), c, task.spacing)
            _add(found["images"], kind, c, _dice(mask, error.mask), after.of_own())


def _add(scored: Scored, kind: str, c: int, dice: float, scores: dict[str, float]) -> None:
    scored.setdefault(kind, []).append({"class": c, "overlap": dice, **scores})


def _dice(a: Tensor, b: Tensor) -> float:
    return float(2 * (a & b).sum() / (a.sum() + b.sum()))


# Summary --------------------------------------------------------------------------------------------------------------


def auroc(faultless: Sequence[float], wrong: Sequence[float]) -> float:
    """Share of pairs in which the wrong one scores lower; ties count half.

    >>> auroc([3, 2], [1, 2])
    0.875
    """
    # Rounded: cosines that differ in the sixth digit are the same for every purpose.
    ranks = rankdata(np.round([*wrong, *faultless], 4))
    n, m = len(wrong), len(faultless)
    return float(1 - (ranks[:n].sum() - n * (n + 1) / 2) / (n * m))


def summed(scored: Scored) -> dict[str, Any]:
    """AUROC of every method: over all errors (`all`), the mean of the classes by themselves (`within`), each kind's;
    how many there were, and the mean Dice of the wrong mask with the right one."""
    right, kinds = scored[""], [kind for kind in scored if kind]
    wrong = [entry for kind in kinds for entry in scored[kind]]
    methods = [key for key in right[0] if key not in ("class", "overlap")]
    result: dict[str, Any] = {
        "faultless": len(right),
        "errors": {k: {"n": len(scored[k]), "dice": round(_mean(scored[k], "overlap"), 3)} for k in kinds},
        "methods": {},
    }
    for method in methods:
        within = []
        for c in sorted({entry["class"] for entry in right}):
            within.append(auroc(*([e[method] for e in part if e["class"] == c] for part in (right, wrong))))
        values = {"all": auroc(_values(right, method), _values(wrong, method)), "within": statistics.mean(within)}
        values |= {kind: auroc(_values(right, method), _values(scored[kind], method)) for kind in kinds}
        result["methods"][method] = {key: round(value, 3) for key, value in values.items()}
    return result


def _values(entries: Sequence[dict[str, Any]], key: str) -> list[float]:
    return [entry[key] for entry in entries]


def _mean(entries: Sequence[dict[str, Any]], key: str) -> float:
    return statistics.mean(_values(entries, key))


def tables(runs: Sequence[dict[str, Any]]) -> list[str]:
    """For each reading the methods by head, and the chosen score by kind of error."""
    lines: list[str] = []
    for reading, chosen in (("masks", "agreement"), ("images", "fit")):
        some = [r for r in runs if reading in r["test"]]
        if not some:
            continue
        first = some[0]["test"][reading]
        total = sum(e["n"] for e in first["errors"].values())
        lines += [f"### Errors in the {reading}\n", f"{total} errors, {first['faultless']} faultless; test patients.\n"]
        columns = [(r, part) for r in some for part in ("validation", "test") if reading in r.get(part, {})]
        lines.append("| AUROC | " + " | ".join(f"{r['head']}: {part}" for r, part in columns) + " |")
        lines.append("|---|" + "---|" * len(columns))
        for method in first["methods"]:
            cells = [f"{r[part][reading]['methods'][method]['all']:.2f}" for r, part in columns]
            lines.append(f"| {NAMES[method]} | " + " | ".join(cells) + " |")
        cells = [f"{r[part][reading]['methods'][chosen]['within']:.2f}" for r, part in columns]
        lines.append(f"| {chosen}, each class by itself | " + " | ".join(cells) + " |\n")
        lines.append(
            "| error | n | Dice with the right mask | " + " | ".join(f"{r['head']}: {chosen}" for r in some) + " |"
        )
        lines.append("|---|---|---|" + "---|" * len(some))
        for kind, facts in first["errors"].items():
            cells = [f"{r['test'][reading]['methods'][chosen][kind]:.2f}" for r in some]
            lines.append(f"| {kind} | {facts['n']} | {facts['dice']:.2f} | " + " | ".join(cells) + " |")
        lines.append("")
    return lines


if __name__ == "__main__":
    app()
