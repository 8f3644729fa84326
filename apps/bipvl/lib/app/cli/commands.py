"""The command line: train, infer and evaluate without a server, with the same code that the server runs."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import track
from rich.table import Table

from lib.app.cli import concepts as concept_cli
from lib.app.cli import labels as label_cli
from lib.app.cli.concepts import DEFAULT_MODELS
from lib.infers import BiPVLInfer
from lib.model.reports.page import Examined, evaluation_report, write_report
from lib.model.reports.version_chart import version_chart
from lib.model.shipped import start_from_shipped
from lib.model.versions import Versions
from lib.stores.cases import Case, read_datalist
from lib.tasks import CONCEPTS_DIR, TASKS_DIR, UNJUDGED, Task, list_tasks, load_task
from lib.trainers import BiPVLTrain
from lib.volumes import metrics
from lib.volumes.phantoms.studies import write_studies
from lib.volumes.picture import picture as draw_picture

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
versions_app = typer.Typer(help="List published versions, look at one, serve another.", no_args_is_help=True)
app.add_typer(versions_app, name="versions")
app.add_typer(concept_cli.app, name="concepts")
app.add_typer(label_cli.app, name="labels")
console = Console()

TaskOption = Annotated[str, typer.Option("--task", help="name of a shipped task, or path of your own task file")]
DataOption = Annotated[Path, typer.Option("--data", help="MONAI Label folder (labels in labels/final), or a JSON list")]
ModelDirOption = Annotated[Path, typer.Option("--model-dir", help="where versions are kept, one folder per task")]
SetOption = Annotated[list[str] | None, typer.Option("--set", help="change a value, e.g. model.feature_size=12")]
DeviceOption = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, …; default: the GPU if there is one")]
VersionOption = Annotated[str, typer.Option(help="a published version, or served")]


@app.command()
def train(
    task: TaskOption,
    data: DataOption,
    model_dir: ModelDirOption = DEFAULT_MODELS,
    epochs: Annotated[int | None, typer.Option(help="default: the task's")] = None,
    val_split: Annotated[float, typer.Option(help="share of cases kept for validation")] = 0.2,
    seed: int = 0,
    pretrained: Annotated[bool, typer.Option(help="start from the served version")] = True,
    tracking: Annotated[str, typer.Option(help="mlflow or None")] = "mlflow",
    gate_margin: Annotated[float | None, typer.Option(help="how much Dice one class may lose")] = None,
    gate_min_cases: Annotated[int | None, typer.Option(help="with fewer cases the model cannot be judged")] = None,
    gate_unjudged: Annotated[str | None, typer.Option(help=f"what cannot be judged: {' or '.join(UNJUDGED)}")] = None,
    gate_clicks: Annotated[int | None, typer.Option(help="cases on which a robot user clicks; 0: none")] = None,
    gate_reading: Annotated[str | None, typer.Option(help="how much Dice may fall with unseen wordings")] = None,
    refiner: Annotated[int | None, typer.Option(help="simulated corrections for a refiner; 0: none")] = None,
    cross_validate: Annotated[bool | None, typer.Option(help="with fewer than five cases; default: the task's")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on with the round that was stopped")] = False,
    device: DeviceOption = None,
    set_: SetOption = None,
) -> None:
    """Run a training round and publish the best model as the next version, if the gate lets it pass."""
    chosen = _task(task, set_)
    trainer = BiPVLTrain(chosen, model_dir / chosen.name)
    start_from_shipped(chosen, trainer.versions)
    request: dict[str, Any] = {
        "model": chosen.name,
        "val_split": val_split,
        "seed": seed,
        "pretrained": pretrained,
        "tracking": tracking,
        "progress": True,
        "resume": resume,
    }
    optional = {
        "max_epochs": epochs,
        "device": device,
        "gate_margin": gate_margin,
        "gate_min_cases": gate_min_cases,
        "gate_unjudged": gate_unjudged,
        "gate_clicks": gate_clicks,
        "gate_reading": gate_reading,
        "refiner": refiner,
        "cross_validate": cross_validate,
    }
    trainer(request | {k: v for k, v in optional.items() if v is not None}, _Cases(data))
    console.print(f"Version {trainer.versions.served} of {chosen.name} is served from {trainer.versions.folder}")


@app.command()
def infer(
    images: Annotated[list[Path], typer.Argument(help="volumes to segment")],
    task: TaskOption,
    out: Annotated[Path, typer.Option(help="folder for the masks and one JSON each")],
    model_dir: ModelDirOption = DEFAULT_MODELS,
    version: VersionOption = "served",
    overlap: float | None = None,
    tta: Annotated[bool, typer.Option(help="average over flips")] = False,
    device: DeviceOption = None,
    set_: SetOption = None,
) -> None:
    """Write a mask (and its JSON) for each volume: a file, or a folder with the slices of one DICOM series.

    What cannot be used is named, the others are segmented, and the exit status is 1.
    """
    chosen = _task(task, set_)
    engine = BiPVLInfer(chosen, model_dir / chosen.name)
    start_from_shipped(chosen, engine.versions)
    out.mkdir(parents=True, exist_ok=True)
    failed = 0
    for image in track(images, "Segmenting", console=console):
        target = out / image.name if image.name.endswith((".nii", ".nii.gz")) else out / f"{image.name}.nii.gz"
        if target.resolve() == image.resolve():
            raise typer.BadParameter(f"{target} would overwrite the image; choose another --out")
        try:
            with _segmented(engine, image, version, overlap, tta, device) as (mask, result):
                shutil.copyfile(mask, target)
        except ValueError as error:
            console.print(f"[red]{image}: {error}", highlight=False)
            failed += 1
            continue
        (out / f"{image.name}.json").write_text(json.dumps(result, indent=2))
    if failed:
        raise typer.Exit(1)


@app.command()
def evaluate(
    task: TaskOption,
    data: DataOption,
    out: Annotated[Path, typer.Option(help="folder for metrics.csv, metrics.json and report.html")],
    model_dir: ModelDirOption = DEFAULT_MODELS,
    version: VersionOption = "served",
    tolerance: Annotated[float, typer.Option(help="of the normalised surface distance, in mm")] = 2.0,
    overlap: float | None = None,
    tta: bool = False,
    device: DeviceOption = None,
    set_: SetOption = None,
) -> None:
    """Score a version on labelled cases: DSC, HD95 and NSD per class and case.

    A case that cannot be used is named and left out, and the exit status is 1.
    """
    chosen = _task(task, set_)
    engine = BiPVLInfer(chosen, model_dir / chosen.name)
    start_from_shipped(chosen, engine.versions)
    cases = _Cases(data).datalist()
    if not cases:
        raise ValueError(f"{data}: no labelled case to evaluate")
    rows: list[metrics.Row] = []
    examined, used, failed = Examined(chosen), 0, 0
    for case in track(cases, "Evaluating", console=console):
        image, label = Path(case["image"]), Path(str(case["label"]))
        try:
            with _segmented(engine, image, version, overlap, tta, device) as (mask, result):
                scores = metrics.evaluate_case(chosen, mask, label, case["id"], tolerance)
                examined.files(scores, image, mask, label, result)
        except ValueError as error:
            console.print(f"[red]{case['id']}: {error}", highlight=False)
            failed += 1
            continue
        rows += scores
        used = result["model_version"]
    if not rows:
        raise ValueError(f"{data}: none of {failed} labelled case(s) can be evaluated")
    out.mkdir(parents=True, exist_ok=True)
    metrics.write_csv(rows, out / "metrics.csv")
    metrics.write_json(rows, out / "metrics.json")
    console.print(metrics.table(rows))
    page = evaluation_report(chosen, used, engine.versions.manifests(), examined, tolerance)
    write_report(page, out / "report.html")
    console.print(f"Written: {out / 'metrics.csv'}, {out / 'metrics.json'}, {out / 'report.html'}")
    if failed:
        raise typer.Exit(1)


@versions_app.command("list")
def list_versions(task: TaskOption, model_dir: ModelDirOption = DEFAULT_MODELS, set_: SetOption = None) -> None:
    """List the versions of a task."""
    store = _versions(task, model_dir, set_)
    table = Table("version", "time", "parent", "cases", "mean Dice", "status", "gate")
    for m in store.manifests():
        metrics = m.get("metrics") or {}
        dice = metrics.get("mean_dice")
        status = "served" if m["served"] else m.get("damaged") or m.get("status") or "-"
        table.add_row(
            *(
                str(m["version"]),
                str(m.get("time", "-")),
                str(m.get("parent") or "-"),
                str(len(m.get("trained_on", []))),
            ),
            *("-" if dice is None else f"{dice:.3f}", status, str((m.get("gate") or {}).get("reason", "-"))),
        )
    console.print(table)


@versions_app.command()
def show(
    version: Annotated[str, typer.Argument(help="number, or served")],
    task: TaskOption,
    model_dir: ModelDirOption = DEFAULT_MODELS,
    set_: SetOption = None,
) -> None:
    """Print the manifest of a version as JSON."""
    store = _versions(task, model_dir, set_)
    console.print_json(data=store.manifest(_number(store, version)))


@versions_app.command()
def serve(
    version: Annotated[str, typer.Argument(help="number of the version to serve")],
    task: TaskOption,
    model_dir: ModelDirOption = DEFAULT_MODELS,
    set_: SetOption = None,
) -> None:
    """Serve another version, older or newer; a running server uses it from the next request on."""
    store = _versions(task, model_dir, set_)
    number = _number(store, version)
    store.serve(number, why="command line")
    console.print(f"Version {number} is served from {store.folder}")


@versions_app.command("picture")
def picture_versions(
    task: TaskOption,
    out: Annotated[Path, typer.Option(help="PNG file to write")],
    model_dir: ModelDirOption = DEFAULT_MODELS,
    set_: SetOption = None,
) -> None:
    """Draw what each version scored and what the gate decided, class by class."""
    store = _versions(task, model_dir, set_)
    version_chart(store.folder.name, store.manifests(), out)
    console.print(f"Written: {out}")


@app.command()
def tasks() -> None:
    """List the shipped tasks."""
    table = Table("task", "channels", "classes", "text encoder", "review")
    for name in list_tasks():
        t = load_task(name)
        table.add_row(name, ", ".join(t.channels), ", ".join(t.classes), t.model.text, t.concepts.review.status)
    console.print(table)
    console.print(f"Files: {TASKS_DIR}, {CONCEPTS_DIR}")


@app.command()
def studies(
    folder: Annotated[Path, typer.Argument(help="where to write the volumes")],
    cases: int = 8,
    labelled: int = 4,
    seed: int = 0,
) -> None:
    """Generate the quickstart's phantom studies."""
    write_studies(folder, cases=cases, labelled=labelled, seed=seed)


@app.command()
def picture(
    image: Annotated[Path, typer.Argument(help="volume to show")],
    task: TaskOption,
    out: Annotated[Path, typer.Option(help="PNG file to write")],
    mask: Annotated[list[str] | None, typer.Option(help="title=file, one row per mask; may be repeated")] = None,
) -> None:
    """Draw three planes of a volume, and masks on it."""
    for entry in mask or []:
        if "=" not in entry:
            raise typer.BadParameter(f"--mask {entry}: expected title=file, e.g. model=mask.nii.gz")
    masks = dict(entry.split("=", 1) for entry in mask or [])
    draw_picture(load_task(task), image, {title: Path(path) for title, path in masks.items()}, out)
    console.print(f"Written: {out}")


class _Cases:
    """What a train task needs of a datastore, from a folder or a JSON list."""

    def __init__(self, source: Path) -> None:
        self.source = source

    def datalist(self) -> list[Case]:
        return [case for case in read_datalist(self.source) if case["label"]]


def _versions(task: str, model_dir: Path, changes: list[str] | None) -> Versions:
    return Versions(model_dir / _task(task, changes).name)


def _number(store: Versions, wanted: str) -> int:
    number = store.resolve(wanted)
    if number is None:
        raise ValueError(f"{store.folder}: no version is published yet")
    return number


def _task(name: str, changes: list[str] | None) -> Task:
    for change in changes or []:
        if "=" not in change:
            raise typer.BadParameter(f"--set {change}: expected key=value, e.g. model.feature_size=12")
    return load_task(name, dict(c.split("=", 1) for c in changes or []))


@contextmanager
def _segmented(
    engine: BiPVLInfer, image: Path, version: str, overlap: float | None, tta: bool, device: str | None
) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The mask, a file that exists within the `with` block, and what is known of it."""
    request = {"image": str(image), "model_version": version, "overlap": overlap, "tta": tta, "logging": "WARNING"}
    mask, result = engine({**request, **({"device": device} if device else {})})
    assert mask is not None
    try:
        yield Path(mask), result
    finally:
        Path(mask).unlink(missing_ok=True)


def cli() -> None:
    """Entry point: a user's mistake is one line on the terminal, not a traceback."""
    logging.basicConfig(level="INFO", format="%(message)s", datefmt="%H:%M:%S", handlers=[RichHandler(console=console)])
    try:
        app()
    except (ValueError, OSError) as error:
        console.print(f"[red bold]Error:[/] {error}", highlight=False, markup=True)
        raise SystemExit(1) from None
