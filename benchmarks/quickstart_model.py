"""Train the model that the quickstart starts with, and score it: python -m benchmarks.quickstart_model

Everything is generated. It trains on phantoms with seeds other than those of the quickstart's examples and of the
scored ones, and writes the checkpoint to `apps/bipvl/shipped/quickstart.pt`. With `--real FOLDER` it also scores two CT
scans with automatic labels (TotalSegmentator's examples). One CPU core takes about ten minutes. The numbers repeat on
one machine with the same number of threads.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Annotated, Any

import nibabel as nib
import numpy as np
import torch
import typer

from benchmarks import ROOT
from lib.infers import BiPVLInfer
from lib.model import checkpoints
from lib.model.versions import Versions
from lib.stores.cases import Case, read_datalist
from lib.tasks import load_task
from lib.trainers import BiPVLTrain
from lib.volumes import metrics
from lib.volumes.phantoms.studies import write_studies

TASK = load_task("quickstart")
TRAINING, HELD_OUT = 1000, 2000  # seeds; the quickstart's examples have 0
VALIDATION = 4  # of the training phantoms, to watch the round by
REAL = ("ts-example", "ts-s0009")
AMOS = {"liver": 6, "spleen": 1, "left kidney": 3, "right kidney": 2, "aorta": 8}  # values of `label-amos15`


class Phantoms:
    """What a train task asks a datastore for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def datalist(self) -> list[Case]:
        return read_datalist(self.folder)


def train(work: Path, cases: int, epochs: int) -> Versions:
    """One round from fresh weights."""
    write_studies(work / "training", cases, cases, TRAINING, "quickstart_model")
    trainer = BiPVLTrain(TASK, work / "model")
    # One patch per step: with so few steps their number counts for more than their patches.
    options: dict[str, Any] = {"max_epochs": epochs, "val_split": VALIDATION / cases, "patches_per_case": 1}
    trainer({"model": TASK.name, **options, "pretrained": False, "tracking": "None"}, Phantoms(work / "training"))
    return trainer.versions


def score(engine: BiPVLInfer, cases: list[Case]) -> list[metrics.Row]:
    """Dice, HD95 (mm) and surface Dice at 2 mm of the served version, on the grid of the files."""
    rows = []
    for case in cases:
        mask, _ = engine({"image": str(case["image"]), "device": "cpu", "logging": "WARNING"})
        assert mask is not None
        rows += metrics.evaluate_case(TASK, Path(mask), Path(str(case["label"])), case["id"])
        Path(mask).unlink()
    return rows


def real_cases(source: Path, work: Path) -> list[Case]:
    """The two scans with labels in the quickstart's values; the spine is all vertebrae of the finer labels."""
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
            label[given == value] = TASK.label_values[organ]
        label[np.isin(np.asarray(fine.dataobj), vertebrae)] = TASK.label_values["spine"]
        path = work / f"{name}.nii.gz"
        nib.save(nib.Nifti1Image(label, amos.affine), path)
        cases.append({"id": name, "image": str(folder / f"{name}_ct.nii.gz"), "label": str(path)})
    return cases


def ship(versions: Versions, scores: dict[str, list[metrics.Row]], out: Path) -> None:
    """Write the served version as the shipped checkpoint: weights in half precision, half the bytes in the repository;
    the network computes in float32 with them."""
    number = versions.served
    assert number is not None
    checkpoint = versions.read(number)
    halved = {k: v.half() if v.is_floating_point() else v for k, v in checkpoint["model"].items()}
    kept = ("task", "concepts", "trained_on", "validated_on", "seen", "epoch", "seed", "options", "packages", "time")
    manifest = {key: checkpoint["manifest"][key] for key in kept}
    manifest["origin"] = "shipped"
    manifest["metrics"] = {
        "held_out": {
            kind: {name: round(values["dice"].mean, 4) for name, values in metrics.summary(rows).items()}
            for kind, rows in scores.items()
        }
    }
    checkpoints.save({**checkpoint, "model": halved, "manifest": manifest}, out)


def main(
    work: Annotated[Path, typer.Option(help="folder for what is generated")] = Path("quickstart-model"),
    out: Annotated[Path, typer.Option(help="checkpoint to write")] = ROOT / "apps/bipvl/shipped/quickstart.pt",
    cases: Annotated[int, typer.Option(help="training phantoms")] = 108,
    epochs: int = 2,
    held_out: Annotated[int, typer.Option(help="phantoms to score on")] = 12,
    real: Annotated[Path | None, typer.Option(help="folder with the two CT scans")] = None,
) -> None:
    logging.basicConfig(level="INFO", format="%(message)s")
    torch.set_num_threads(1)  # sums in another order are other numbers
    versions = train(work, cases, epochs)
    engine = BiPVLInfer(TASK, versions.folder)
    write_studies(work / "held-out", held_out, held_out, HELD_OUT, "held_out")
    scores = {"phantoms": score(engine, read_datalist(work / "held-out"))}
    if real:
        scores |= {case["id"]: score(engine, [case]) for case in real_cases(real, work / "real")}
    for kind, rows in scores.items():
        print(f"\n{kind}: {len({row.case for row in rows})} case(s)")
        for name, values in metrics.summary(rows).items():
            print(f"  {name:14}", *(f"{m} {values[m].mean:6.3f}" for m in metrics.METRICS))
    ship(versions, scores, out)
    print(f"\nWritten: {out}, {out.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    typer.run(main)
