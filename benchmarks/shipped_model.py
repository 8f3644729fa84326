"""Train the models that come with the app, and score them.

    python -m benchmarks.shipped_model hippocampus --data FOLDER     T1 crops of the Medical Segmentation Decathlon
    python -m benchmarks.shipped_model phantom                       generated CT-like scans

Each writes `apps/bipvl/shipped/<task>.pt` and prints what its card says. The numbers repeat on one machine with the
same number of threads.

The hippocampus model is a run of `benchmarks.accuracy`, which takes one core forty minutes, or twice that on a slow
machine. If its checkpoint is in the work folder, it is taken from there. Its head then learns more words in five
minutes (`benchmarks.text.second_stage`). The phantom model trains on phantoms with other seeds than the quickstart's
examples and the scored ones, in ten minutes of one core. With `--real FOLDER` it is also scored on two CT scans with
automatic labels (TotalSegmentator's examples).
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import nibabel as nib
import numpy as np
import torch
import typer

from benchmarks import ROOT
from benchmarks.accuracy.__main__ import WORK, checkpoint_path, execute
from benchmarks.accuracy.data import SPLITS, Patches, Preprocessed, Split, find_cases, split_cases
from benchmarks.accuracy.settings import Run
from benchmarks.text.second_stage import FOR_T, plain, teach
from lib.files import now
from lib.infers import BiPVLInfer
from lib.model import checkpoints
from lib.model.nets.reading import KEY as PLACES
from lib.model.shipped import SAME
from lib.model.versions import Versions
from lib.stores.cases import Case, read_datalist
from lib.tasks import Task, load_task, task_from_dict
from lib.trainers import BiPVLTrain
from lib.trainers.evaluation import find_places
from lib.volumes import metrics
from lib.volumes.phantoms.studies import write_studies

SHIPPED = ROOT / "apps" / "bipvl" / "shipped"
PHANTOM, HIPPOCAMPUS = "quickstart", "hippocampus-mr"
TRAINING, HELD_OUT = 1000, 2000  # seeds; the quickstart's examples have 0
VALIDATION = 4  # of the training phantoms, to watch the round by
REAL = ("ts-example", "ts-s0009")
AMOS = {"liver": 6, "spleen": 1, "left kidney": 3, "right kidney": 2, "aorta": 8}  # values of `label-amos15`
FUSED = (("model.head_text", "fused"),)  # of the first stage
FOR_PLACES = 20  # training crops in which the places of classes are looked for
KEPT = ("task", "concepts", "trained_on", "validated_on", "seen", "epoch", "seed", "options", "packages", "time")

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


# Both -----------------------------------------------------------------------------------------------------------------


def score(engine: BiPVLInfer, cases: Sequence[Case], tolerance: float, **options: Any) -> list[metrics.Row]:
    """Dice, HD95 (mm) and surface Dice of the served version, on the grid of the files."""
    rows = []
    for case in cases:
        mask, _ = engine({"image": str(case["image"]), "device": "cpu", "logging": "WARNING", **options})
        assert mask is not None
        rows += metrics.evaluate_case(engine.task, Path(mask), Path(str(case["label"])), case["id"], tolerance)
        Path(mask).unlink()
    return rows


def show(title: str, rows: list[metrics.Row]) -> None:
    """Print the means of a table of the card."""
    print(f"\n{title}: {len({row.case for row in rows})} case(s)")
    for name, values in metrics.summary(rows).items():
        print(f"  {name:24}", *(f"{m} {values[m].mean:6.3f}" for m in metrics.METRICS))


def exchanged(engine: BiPVLInfer, cases: Sequence[Case], one: str, other: str) -> dict[str, float]:
    """Dice of the masks of a request in which two classes have each other's sentences with those of a plain request:
    `stays` of the class with its own mask, `follows` with the mask of the class whose sentences it got."""
    classes, values = engine.task.concepts.classes, engine.task.label_values
    words = {one: classes[other].sentences, other: classes[one].sentences}
    found: dict[str, list[float]] = {"stays": [], "follows": []}
    for case in cases:
        masks = []
        for more in ({}, {"concepts": words}):
            file, _ = engine({"image": str(case["image"]), "device": "cpu", "logging": "WARNING", **more})
            assert file is not None
            masks.append(np.asarray(nib.Nifti1Image.from_filename(file).dataobj))
            Path(file).unlink()
        before, after = masks
        for name, twin in ((one, other), (other, one)):
            found["stays"].append(dice(before == values[name], after == values[name]))
            found["follows"].append(dice(before == values[twin], after == values[name]))
    return {kind: round(float(np.mean(numbers)), 3) for kind, numbers in found.items()}


def dice(a: np.ndarray, b: np.ndarray) -> float:
    """Dice of two masks; 1 if both are empty."""
    voxels = int(a.sum() + b.sum())
    return 2 * int((a & b).sum()) / voxels if voxels else 1.0


def ship(checkpoint: dict[str, Any], scores: dict[str, list[metrics.Row]], out: Path) -> None:
    """Write a checkpoint as a shipped one: weights in half precision, half the bytes in the repository; the network
    computes in float32 with them."""
    manifest = {key: checkpoint["manifest"][key] for key in KEPT}
    manifest["origin"] = "shipped"
    manifest["metrics"] = {
        "held_out": {
            kind: {name: round(values["dice"].mean, 4) for name, values in metrics.summary(rows).items()}
            for kind, rows in scores.items()
        }
    }
    checkpoints.save({**halved(checkpoint), "manifest": manifest}, out)
    print(f"\nWritten: {out}, {out.stat().st_size / 1e6:.1f} MB")


class Labelled:
    """What a train task asks a datastore for."""

    def __init__(self, cases: list[Case]) -> None:
        self.cases = cases

    def datalist(self) -> list[Case]:
        return self.cases


def halved(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint with its weights in half precision. Weights of several names stay one: ResEnc has three for each."""
    made: dict[tuple[int, torch.Size], torch.Tensor] = {}
    weights = {
        name: made.setdefault((v.data_ptr(), v.shape), v.half() if v.is_floating_point() else v)
        for name, v in checkpoint["model"].items()
    }
    return {**checkpoint, "model": weights}


# Hippocampus ----------------------------------------------------------------------------------------------------------


@app.command("hippocampus")
def hippocampus_command(
    data: Annotated[Path, typer.Option(help="folder of the data set")],
    work: Annotated[Path, typer.Option(help="preprocessed volumes, checkpoint")] = WORK,
    out: Annotated[Path, typer.Option(help="checkpoint to write")] = SHIPPED / f"{HIPPOCAMPUS}.pt",
    iterations: Annotated[int, typer.Option(help="training steps")] = 4200,
    steps: Annotated[int, typer.Option(help="steps of the second stage, which teaches the head more words")] = 400,
) -> None:
    """Train on 120 crops of the data set, and score on 60 others."""
    logging.basicConfig(level="WARNING", format="%(message)s")
    task = load_task(HIPPOCAMPUS)
    split = split_cases(find_cases(data), shares=SPLITS[HIPPOCAMPUS])
    run = Run(HIPPOCAMPUS, "bipvl", "text", size="task", iterations=iterations, overrides=FUSED)
    file = checkpoint_path(run, work)
    if not file.is_file():
        torch.set_num_threads(1)  # sums in another order are other numbers
        results = work / "shipped-model.jsonl"
        execute(run, data, "validation", False, "float32", torch.device("cpu"), 0, results, work)
    model, trained = checkpoints.restore_model(checkpoints.load(file), file)
    patches = Patches(trained, list(Preprocessed(trained, split.training, work / "volumes")), steps, 1 + run.seed)
    own = with_plain_head(trained)
    model = plain(model, own, [patches[n][0] for n in range(FOR_T)])
    teach(model, own, patches, run.seed)
    checkpoint = as_published(checkpoints.checkpoint_of(model, own, {}), task, split, run, file)
    checkpoint["manifest"]["options"]["second_stage"] = steps
    if places := find_places(model, task, split.training[:FOR_PLACES]):
        checkpoint[PLACES] = places.to_entry()

    test, strangers = cases_of(split.test), cases_of(unseen_people(split))
    with tempfile.TemporaryDirectory() as folder:
        versions = Versions(Path(folder))
        versions.publish(halved(checkpoint))
        engine = BiPVLInfer(task, versions.folder)
        rows = score(engine, test, 1.0)
        ids = {case["id"] for case in strangers}
        scores = {"unseen people": [row for row in rows if row.case in ids], "all test crops": rows}
        for kind, found in scores.items():
            show(kind, found)
        print("\nSentences exchanged:", exchanged(engine, strangers, *task.classes))
    ship(checkpoint, scores, out)


def with_plain_head(task: Task) -> Task:
    """The task with a head that reads D alone."""
    return task.model_copy(update={"model": task.model.model_copy(update={"head_text": "plain"})})


def cases_of(found: Sequence[dict[str, str]]) -> list[Case]:
    """Cases of the accuracy benchmark, as a datastore has them."""
    return [{"id": case["id"], "image": case["image"], "label": case["label"]} for case in found]


def person(case: dict[str, str]) -> int:
    """Whose hippocampus a crop shows. The data set does not say it, but its crops 2k - 1 and 2k are of one person: all
    such pairs of files with float voxels share their quantisation step, and no other neighbours do."""
    return (int(case["id"].rsplit("_", 1)[1]) + 1) // 2


def unseen_people(split: Split) -> list[dict[str, str]]:
    """The test crops of people of whom no crop was trained on or validated."""
    seen = {person(case) for case in (*split.training, *split.validation)}
    return [case for case in split.test if person(case) not in seen]


def examples(split: Split, labelled: int = 4, unlabelled: int = 8) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """The crops of the quickstart: with labels, of the training part; without, of unseen people."""
    return split.training[:labelled], unseen_people(split)[:unlabelled]


def as_published(checkpoint: dict[str, Any], task: Task, split: Split, run: Run, file: Path) -> dict[str, Any]:
    """A checkpoint of the accuracy benchmark with the manifest of a round, and the task as it is now.

    Raises:
        ValueError: the task has changed what the network is or reads.
    """
    theirs = task_from_dict(checkpoint["task"], str(file))
    if any(getattr(theirs, key) != getattr(task, key) for key in SAME) or theirs.text_rows() != task.text_rows():
        raise ValueError(f"{file}: of another {task.name} than the present one; remove it to train again")
    trained_on = [case["id"] for case in split.training]
    assert run.iterations
    steps, recipe = run.iterations, theirs.training
    manifest = {
        "task": task.name,
        "concepts": task.concepts.hash,
        "trained_on": trained_on,
        "validated_on": [case["id"] for case in split.validation],
        "seen": sorted(trained_on),
        "epoch": steps * recipe.batch_size // len(trained_on),
        "seed": run.seed,
        "options": {
            "iterations": steps,
            "train_batch_size": recipe.batch_size,
            "patches_per_case": recipe.patches_per_case,
            "learning_rate": recipe.learning_rate,
        },
        "packages": {p: version(p) for p in ("torch", "monai", "monailabel", "transformers")},
        "time": now(),
    }
    return {**checkpoint, "task": task.to_dict(), "manifest": manifest}


# Phantom --------------------------------------------------------------------------------------------------------------


@app.command("phantom")
def phantom_command(
    work: Annotated[Path, typer.Option(help="folder for what is generated")] = Path("quickstart-model"),
    out: Annotated[Path, typer.Option(help="checkpoint to write")] = SHIPPED / f"{PHANTOM}.pt",
    cases: Annotated[int, typer.Option(help="training phantoms")] = 108,
    epochs: int = 2,
    held_out: Annotated[int, typer.Option(help="phantoms to score on")] = 12,
    real: Annotated[Path | None, typer.Option(help="folder with the two CT scans")] = None,
) -> None:
    """Train on generated phantoms, and score on others."""
    logging.basicConfig(level="INFO", format="%(message)s")
    torch.set_num_threads(1)  # sums in another order are other numbers
    task = load_task(PHANTOM)
    versions = train_on_phantoms(task, work, cases, epochs)
    engine = BiPVLInfer(task, versions.folder)
    write_studies(work / "held-out", held_out, held_out, HELD_OUT, "held_out")
    phantoms = read_datalist(work / "held-out")
    scores = {"phantoms": score(engine, phantoms, 2.0)}
    if real:
        scores |= {case["id"]: score(engine, [case], 2.0) for case in real_cases(task, real, work / "real")}
    for kind, rows in scores.items():
        show(kind, rows)
    print("\nSentences exchanged:", exchanged(engine, phantoms[:3], "left kidney", "right kidney"))
    assert versions.served is not None
    ship(versions.read(versions.served), scores, out)


def train_on_phantoms(task: Task, work: Path, cases: int, epochs: int) -> Versions:
    """One round from fresh weights."""
    write_studies(work / "training", cases, cases, TRAINING, "quickstart_model")
    trainer = BiPVLTrain(task, work / "model")
    # One patch a step: with so few steps their number counts for more than their patches.
    options: dict[str, Any] = {"max_epochs": epochs, "val_split": VALIDATION / cases, "patches_per_case": 1}
    trainer(
        {"model": task.name, **options, "pretrained": False, "tracking": "None"},
        Labelled(read_datalist(work / "training")),
    )
    return trainer.versions


def real_cases(task: Task, source: Path, work: Path) -> list[Case]:
    """The two scans with labels in the task's values; the spine is all vertebrae of the finer labels."""
    folder = source / "abdomen_ct" if (source / "abdomen_ct").is_dir() else source
    names = json.loads((folder / "ts117_classes.json").read_text())
    vertebrae = [int(value) for value, name in names.items() if name.startswith("vertebrae")]
    work.mkdir(parents=True, exist_ok=True)
    cases: list[Case] = []
    for name in REAL:
        amos, fine = (
            nib.Nifti1Image.from_filename(folder / f"{name}_label-{kind}.nii.gz") for kind in ("amos15", "ts117")
        )
        given = np.asarray(amos.dataobj)
        label = np.zeros(given.shape, np.uint8)
        for organ, value in AMOS.items():
            label[given == value] = task.label_values[organ]
        label[np.isin(np.asarray(fine.dataobj), vertebrae)] = task.label_values["spine"]
        path = work / f"{name}.nii.gz"
        nib.save(nib.Nifti1Image(label, amos.affine), path)
        cases.append({"id": name, "image": str(folder / f"{name}_ct.nii.gz"), "label": str(path)})
    return cases


if __name__ == "__main__":
    app()
