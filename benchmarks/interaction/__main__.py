"""Robot users on labelled patients: what clicks and scribbles are worth.

python -m benchmarks.interaction run CHECKPOINT --data FOLDER --method evidence --user precise
python -m benchmarks.interaction doubts CHECKPOINT --data FOLDER
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from benchmarks import records
from benchmarks.accuracy.__main__ import commit
from benchmarks.accuracy.data import SHARES, SPLITS, Preprocessed, Split, find_cases, split_cases
from benchmarks.interaction import doubts
from benchmarks.interaction.cases import prepare
from benchmarks.interaction.users import USERS, work
from lib.files import write_atomic
from lib.interaction.answer import Settings
from lib.interaction.evidence import Reach
from lib.model import checkpoints
from lib.model.nets import BiPVLSeg
from lib.model.refining import fresh
from lib.tasks import Task
from lib.trainers.refiner.cases import with_errors_of
from lib.trainers.refiner.clicks import answered
from lib.trainers.refiner.training import train_refiner

RESULTS = records.RESULTS / "interaction.jsonl"
WORK = Path.home() / ".cache" / "bipvl-accuracy"
AFTER = (0, 1, 3, 5, 10)
METHODS: dict[str, Settings] = {
    "evidence and cut": Settings(),
    "evidence": Settings(smooth=0.0),
    "cut": Settings(reach=None),
    "re-fit": Settings(reach=None, pull=10.0, fade=6.0, smooth=0.0),
    "all three": Settings(pull=10.0, fade=6.0),
    "evidence by distance alone": Settings(reach=Reach(intensity=0.0), smooth=0.0),
}

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


def opened(checkpoint: Path, data: Path) -> tuple[BiPVLSeg, Task, Split]:
    """The network of a checkpoint with its task, and the task's split of the data."""
    model, task = checkpoints.restore_model(checkpoints.load(checkpoint), checkpoint)
    return model, task, split_cases(find_cases(data), shares=SPLITS.get(task.name, SHARES))


def side(split: Split, on: str) -> list[dict[str, str]]:
    """The cases of `test` or `validation`."""
    return {"test": split.test, "validation": split.validation}[on]


def summary(works: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Means over classes and cases."""
    found = list(works)
    dices = np.array([w["dice"] for w in found])
    gains = np.diff(dices, axis=1)
    result: dict[str, Any] = {f"dice@{n}": round(float(dices[:, n].mean()), 4) for n in AFTER if n < dices.shape[1]}
    for goal in (0.85, 0.90):
        reached = dices >= goal
        first = np.where(reached.any(1), reached.argmax(1), dices.shape[1] - 1)
        result[f"noc@{goal:.2f}"] = round(float(first.mean()), 2)
        result[f"failed@{goal:.2f}"] = int((~reached.any(1)).sum())
    seconds = np.concatenate([w["seconds"] for w in found]) if any(w["seconds"] for w in found) else np.zeros(1)
    return {
        **result,
        "auc": round(float(dices.mean(1).mean()), 4),
        "worst mean step": round(float(gains.mean(0).min()), 4),
        "seconds": {"median": round(float(np.median(seconds)), 3), "p95": round(float(np.quantile(seconds, 0.95)), 3)},
        "outside": int(sum(w["outside"] for w in found)),
        "disobeyed": int(sum(w["disobeyed"] for w in found)),
        "classes": len(found),
    }


@app.command("run")
def run_command(
    checkpoint: Annotated[Path, typer.Argument(help="of an accuracy run, or a published version")],
    data: Annotated[Path, typer.Option(help="folder of the data set")],
    method: Annotated[list[str] | None, typer.Option(help="default: all")] = None,
    user: Annotated[list[str] | None, typer.Option(help="default: all")] = None,
    on: Annotated[str, typer.Option(help="test, or validation while settings are being chosen")] = "validation",
    interactions: int = 10,
    cases: Annotated[int, typer.Option(help="first so many patients; 0: all")] = 0,
    field: Annotated[tuple[float, float] | None, typer.Option(help="mm around the centre, as in training")] = None,
    refiner: Annotated[Path | None, typer.Option(help="of `refine`; the only method then")] = None,
    results: Path = RESULTS,
    work_folder: Annotated[Path, typer.Option("--work")] = WORK,
) -> None:
    """Let robot users correct every class of every case."""
    model, task, split = opened(checkpoint, data)
    chosen = side(split, on)
    patients = list(dict.fromkeys(case["patient"] for case in chosen))[: cases or None]
    firsts = {case["patient"]: case for case in reversed(chosen) if case["patient"] in patients}
    listed = [firsts[patient] for patient in patients]
    prepared = list(prepare(model, task, listed, Preprocessed(task, listed, work_folder / "volumes", field)))
    trained = fresh(model, 0).eval() if refiner else None
    if refiner and trained:
        trained.load_state_dict(torch.load(refiner, weights_only=True))
    for name in [f"refiner {refiner.stem}"] if refiner else method or METHODS:
        answer = partial(answered, refiner=trained, settings=None if refiner else METHODS[name])
        for who in user or USERS:
            works = [
                work(case, label, value, who, answer, interactions)
                for case in prepared
                for label, value in task.label_values.items()
            ]
            found = summary(works)
            print(json.dumps({"method": name, "user": who, **found}), flush=True)
            run: dict[str, Any] = {"name": f"{task.name} {on} {name} {who}", "task": task.name}
            run["method"] = name
            run |= {"user": who, "on": on, "patients": patients, "commit": commit(), "summary": found}
            records.put(results, run)


@app.command("doubts")
def doubts_command(
    checkpoint: Annotated[Path, typer.Argument(help="of an accuracy run, or a published version")],
    data: Annotated[Path, typer.Option(help="folder of the data set")],
    on: Annotated[str, typer.Option(help="test, or validation while settings are being chosen")] = "validation",
    results: Path = RESULTS,
    work_folder: Annotated[Path, typer.Option("--work")] = WORK,
) -> None:
    """Ask whether the places where the model doubts hold its errors."""
    model, task, split = opened(checkpoint, data)
    chosen = side(split, on)
    found = doubts.summary(
        doubts.examined(model, task, chosen, Preprocessed(task, chosen, work_folder / "volumes", None))
    )
    print(json.dumps(found, indent=2))
    run = {"name": f"{task.name} {on} doubts", "task": task.name, "method": "doubts", "on": on, "commit": commit()}
    records.put(results, {**run, "summary": found})


@app.command("refine")
def refine_command(
    checkpoint: Annotated[Path, typer.Argument(help="of an accuracy run, or a published version")],
    data: Annotated[Path, typer.Option(help="folder of the data set")],
    out: Annotated[Path, typer.Option(help="file of the refiner")],
    steps: int = 2000,
    seed: int = 0,
    cases: Annotated[int, typer.Option(help="first so many patients; 0: all")] = 0,
    held_out: Annotated[int, typer.Option(help="also the first so many test patients; do not test on them then")] = 0,
    errors: Annotated[Path | None, typer.Option(help="checkpoint whose errors are corrected, too")] = None,
    errors_seen: Annotated[int, typer.Option(help="first so many patients, which it was trained on")] = 0,
    field: Annotated[tuple[float, float] | None, typer.Option(help="mm around the centre, as in training")] = None,
    work_folder: Annotated[Path, typer.Option("--work")] = WORK,
) -> None:
    """Train a refiner on the training patients of a frozen network.

    With `--held-out`, half of the simulations of those patients begin with the network's own errors, which are real: it
    was not trained on them. With `--errors`, likewise with another network's on patients whom that one has not seen.
    """
    model, task, split = opened(checkpoint, data)
    listed = split.training[: cases or None]
    volumes = Preprocessed(task, listed, work_folder / "volumes", field)
    prepared = list(prepare(model, task, listed, volumes))
    if errors:
        other, its_task = checkpoints.restore_model(checkpoints.load(errors), errors)
        for n in range(errors_seen, len(prepared)):
            prepared[n] = with_errors_of(prepared[n], other, its_task, volumes[n]["image"])
    unseen = split.test[:held_out]
    own = prepare(model, task, unseen, Preprocessed(task, unseen, work_folder / "volumes", field))
    prepared += [replace(case, errors=case.margins) for case in own]
    refiner = fresh(model, seed)
    reach = Settings().reach
    assert reach is not None
    begin = time.monotonic()

    def told(step: int, losses: dict[str, float]) -> None:
        print(json.dumps({"step": step, **losses, "seconds": round(time.monotonic() - begin)}), flush=True)
        write_atomic(out, partial(torch.save, refiner.state_dict()))

    train_refiner(refiner, prepared, steps, seed, reach, told)


if __name__ == "__main__":
    app()
