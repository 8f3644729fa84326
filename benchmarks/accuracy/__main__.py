"""Accuracy on a labelled data set: BiPVL-Seg against networks that read no text, in one pipeline.

    python -m benchmarks.accuracy run --task acdc-mr --data FOLDER --model bipvl --head fixed --seed 0
    python -m benchmarks.accuracy plan --task acdc-mr --data FOLDER --execute     all runs not yet there
    python -m benchmarks.accuracy ablate-text CHECKPOINT --data FOLDER            own, shuffled, names only, empty text
    python -m benchmarks.accuracy tables                                          docs/research/accuracy.md, its plots

A run is one line of the results. A stopped matrix continues where it stopped.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import subprocess
import time
import traceback
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
import yaml
from torch import nn

from benchmarks import ROOT, records
from benchmarks.accuracy.data import SHARES, SPLITS, Patches, Preprocessed, find_cases, split_cases
from benchmarks.accuracy.report import (
    SECTION,
    paper_row,
    plot_few_labels,
    plot_training,
    read_results,
    tables,
)
from benchmarks.accuracy.settings import SMALL_ITERATIONS, Run, matrix
from benchmarks.accuracy.training import (
    PROBE_PATCHES,
    ablate_text,
    build_network,
    score,
    scores,
    seconds_since,
    segment,
    train,
)
from benchmarks.documents import insert
from lib.model import checkpoints
from lib.model.nets import BiPVLSeg
from lib.model.nets.text import Sentences
from lib.model.nets.vision import lay_out
from lib.tasks import Task
from lib.trainers.objective import TrainingNetwork

RESULTS = records.RESULTS / "accuracy.jsonl"
WORK = Path.home() / ".cache" / "bipvl-accuracy"

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
DataOption = Annotated[Path, typer.Option("--data", help="folder of the data set")]
WorkOption = Annotated[Path, typer.Option(help="preprocessed volumes, checkpoints, claims")]
ResultsOption = Annotated[Path, typer.Option(help="JSON Lines, one run per line")]
TextOption = Annotated[bool, typer.Option(help="score with other text, too")]
PrecisionOption = Annotated[str, typer.Option(help="bf16 or float32; training only")]
TaskOption = Annotated[str, typer.Option("--task", help="name of a shipped task")]


@app.command("run")
def run_command(
    task: TaskOption,
    data: DataOption,
    model: Annotated[str, typer.Option(help="bipvl, or a network without text")] = "bipvl",
    head: str = "fixed",
    variant: Annotated[str, typer.Option(help="ablation or text format")] = "",
    train_patients: int | None = None,
    seed: int = 0,
    size: str = "small",
    fold: int | None = None,
    iterations: int | None = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="key=value of the task")] = None,
    on: Annotated[str, typer.Option(help="test, or validation while settings are being chosen")] = "test",
    text: TextOption = True,
    precision: PrecisionOption = "float32",
    device: str = "cuda" if torch.cuda.is_available() else "cpu",
    workers: int = 0,
    results: ResultsOption = RESULTS,
    work: WorkOption = WORK,
) -> None:
    """Train one network and score it."""
    pairs = tuple(sorted((k, yaml.safe_load(v)) for k, v in (s.split("=", 1) for s in set_ or [])))
    spec = Run(task, model, head, variant, train_patients, seed, size, fold, iterations, pairs)
    execute(spec, data, on, text, precision, torch.device(device), workers, results, work)


def execute(
    spec: Run,
    data: Path,
    on: str,
    text: bool,
    precision: str,
    device: torch.device,
    workers: int,
    results: Path,
    work: Path,
) -> None:
    """Run and write the result."""
    start = time.perf_counter()
    task = spec.task_of()
    split = split_cases(find_cases(data), spec.train_patients, spec.fold, SPLITS.get(spec.task, SHARES))
    held_out = {"test": split.test, "validation": split.validation}[on]
    training: Sequence[dict[str, Any]] = Preprocessed(task, split.training, work / "volumes", spec.field)
    steps = spec.iterations or SMALL_ITERATIONS
    if spec.size != "small":
        steps = spec.iterations or task.training.epochs * -(-len(training) // task.training.batch_size)
    else:
        training = list(training)
    probes = Preprocessed(task, (split.validation or split.test)[:4], work / "volumes", spec.field)
    probe = [Patches(task, list(probes), PROBE_PATCHES, 1)[i] for i in range(PROBE_PATCHES)]
    network = build_network(spec, task).to(device)
    lay_out(network, device)
    prepared = seconds_since(start)

    start, cpu = time.perf_counter(), time.process_time()
    state = work / "states" / f"{spec.name}.pt"
    state.parent.mkdir(parents=True, exist_ok=True)
    watched = list(Preprocessed(task, split.validation, work / "volumes", spec.field))

    aside = task.concepts.aside(task.classes) if task.varied else None

    def validate(model: nn.Module) -> dict[str, float]:
        texts: dict[str, Sentences | None] = {"validation": None}
        if aside and isinstance(model, BiPVLSeg):
            texts["aside"] = model.text.tokenize(aside)
        return {
            name: scores(score(task, split.validation, segment(model, task, watched, text)))["mean"]["mean"]["dice"]
            for name, text in texts.items()
        }

    patches = Patches(task, training, steps, spec.seed)
    curves = train(
        network, task, patches, probe, device, precision, workers, state, validate if split.validation else None
    )
    trained = seconds_since(start)
    cpu = round(time.process_time() - cpu, 1)

    start = time.perf_counter()
    volumes = Preprocessed(task, held_out, work / "volumes", spec.field)
    found = scores(score(task, held_out, segment(network.model, task, volumes)))
    evaluated = seconds_since(start)
    print(f"{spec.name}: {on} {json.dumps(found['mean'])}", flush=True)
    result: dict[str, Any] = {
        "run": spec.to_dict(),
        "name": spec.name,
        "on": on,
        "steps": steps,
        "scores": found["mean"],
        "cases": found["cases"],
        "patients": {
            part: sorted({c["patient"] for c in cases})
            for part, cases in (("training", split.training), (on, held_out))
        },
        "parameters": sum(p.numel() for p in network.model.parameters()),
        "seconds": {"preparing": prepared, "training": trained, "evaluating": evaluated, "training_cpu": cpu},
        "precision": precision,
        "hardware": hardware(device),
        "commit": commit(),
        "packages": {p: version(p) for p in ("torch", "monai", "transformers")},
        "curves": curves,
    }
    if isinstance(network, TrainingNetwork):
        manifest = {"benchmark": spec.name, "metrics": {"mean_dice": found["mean"]["mean"]["dice"]}}
        checkpoints.save(checkpoints.checkpoint_of(network.model, task, manifest), checkpoint_path(spec, work))
        records.put(results, result)
        if text:
            add_text(results, spec, network.model, task, held_out, volumes)
    else:
        records.put(results, result)
    state.unlink(missing_ok=True)


def add_text(results: Path, spec: Run, model: BiPVLSeg, task: Task, cases: list[dict[str, str]], volumes: Any) -> None:
    """Add to a run's result what the model does with other text; the first case of each patient shows it."""
    text = ablate_text(model, task, *first_of_each(cases, volumes))
    run = records.find(results, spec.name)
    assert run, "text is added to a run that is written"
    records.put(results, {**run, "text": text})


def checkpoint_path(spec: Run, work: Path) -> Path:
    return work / "checkpoints" / f"{spec.name}.pt"


def missing(spec: Run, results: Path, text: bool) -> str:
    """What is still to be done for a run: `run`, `text`, or nothing."""
    found = records.find(results, spec.name)
    if not found:
        return "run"
    return "text" if text and spec.model == "bipvl" and "text" not in found else ""


@app.command("plan")
def plan_command(
    task: TaskOption,
    data: DataOption,
    size: str = "small",
    seeds: int = 3,
    paper_protocol: Annotated[bool, typer.Option(help="three folds of every model")] = False,
    execute_: Annotated[bool, typer.Option("--execute", help="do the runs not done; start it again to go on")] = False,
    only: Annotated[str, typer.Option(help="runs whose name contains this")] = "",
    text: TextOption = True,
    precision: PrecisionOption = "float32",
    device: str = "cuda" if torch.cuda.is_available() else "cpu",
    workers: int = 0,
    results: ResultsOption = RESULTS,
    work: WorkOption = WORK,
) -> None:
    """List the matrix of runs, and do those that are missing. Several processes may share one work folder."""
    runs = [r for r in matrix(task, size, seeds, paper_protocol) if only in r.name]
    for spec in runs:
        open_ = missing(spec, results, text)
        if not execute_:
            print(f"{open_ or 'done':5} {spec.name}")
            continue
        if not open_ or not claim(work / "claims" / spec.name):
            continue
        open_ = missing(spec, results, text)  # another process may have done it meanwhile
        print(f"begins {spec.name}", flush=True)
        log = work / "logs" / f"{spec.name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        try:
            with log.open("w") as file, contextlib.redirect_stdout(file):
                if open_ == "run":
                    execute(spec, data, "test", text, precision, torch.device(device), workers, results, work)
                elif open_ == "text":
                    saved = checkpoint_path(spec, work)
                    model, own = checkpoints.restore_model(checkpoints.load(saved), saved)
                    test = split_cases(find_cases(data), fold=spec.fold, shares=SPLITS.get(spec.task, SHARES)).test
                    volumes = Preprocessed(own, test, work / "volumes", spec.field)
                    add_text(results, spec, model.to(device), own, test, volumes)
            print(f"done: {spec.name}", flush=True)
        except Exception:  # one failed run must not end the matrix
            print(f"failed: {spec.name}\n{traceback.format_exc()}", flush=True)
        finally:
            (work / "claims" / spec.name).unlink()


def claim(path: Path) -> bool:
    """Take a run for this process; False if another living process has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_file() and not Path(f"/proc/{path.read_text() or 0}").is_dir():
        path.unlink(missing_ok=True)
    try:
        with path.open("x") as file:
            file.write(str(os.getpid()))
    except FileExistsError:
        return False
    return True


@app.command("ablate-text")
def ablate_text_command(
    checkpoint: Annotated[Path, typer.Argument(help="of a run, or a published version")],
    data: DataOption,
    on: str = "test",
    fold: int | None = None,
    field: Annotated[tuple[float, float] | None, typer.Option(help="mm around the centre; size small: 192 192")] = None,
    firsts: Annotated[bool, typer.Option(help="the first case of each patient only, as `run` does")] = True,
    work: WorkOption = WORK,
) -> None:
    """Score a trained model with its own text, shuffled between classes, names only, and empty."""
    model, task = checkpoints.restore_model(checkpoints.load(checkpoint), checkpoint)
    split = split_cases(find_cases(data), fold=fold, shares=SPLITS.get(task.name, SHARES))
    cases = {"test": split.test, "validation": split.validation}[on]
    volumes = Preprocessed(task, cases, work / "volumes", field)
    if firsts:
        print(json.dumps(ablate_text(model, task, *first_of_each(cases, volumes)), indent=1))
    else:
        print(json.dumps(ablate_text(model, task, cases, volumes), indent=1))


@app.command("tables")
def tables_command(
    task: TaskOption = "acdc-mr",
    size: str = "small",
    document: Annotated[Path | None, typer.Option(help="where to put the tables; default: printed")] = None,
    images: Annotated[Path | None, typer.Option(help="folder for the plots")] = None,
    results: ResultsOption = RESULTS,
) -> None:
    """Write the tables and plots of all finished runs of a task."""
    found = read_results(results, task, size)
    text = tables(found, task, size) if size == "small" else paper_row(found)
    if document:
        insert(document, SECTION, text)
    else:
        print(text)
    if images:
        plot_few_labels(found, images / "accuracy-few-labels.png")
        plot_training(found, images / "accuracy-training.png")


def first_of_each(cases: list[dict[str, str]], volumes: Sequence[Any]) -> tuple[list[dict[str, str]], list[Any]]:
    """The first case of each patient: enough to see what a text does, at half of the time."""
    firsts = {case["patient"]: i for i, case in reversed(list(enumerate(cases)))}
    return [cases[i] for i in sorted(firsts.values())], [volumes[i] for i in sorted(firsts.values())]


def commit() -> str:
    """The commit of the code, with + if the tree differs from it."""
    git = ["git", "-C", str(ROOT)]
    head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True).stdout.strip()
    return head + ("+" if changed else "")


def hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{os.cpu_count()} CPU cores ({platform.machine()}), {torch.get_num_threads()} thread(s)"


if __name__ == "__main__":
    app()
