"""What a round does to a model that is trained to the end: Dice of people it never saw, before and after.

    python -m benchmarks.accuracy.continued --data FOLDER --rates 1 --rates 0.3 --rates 0.1

A round of the app, at the defaults of `hippocampus-mr`, goes on from the shipped version with a few labelled crops:
those of the quickstart, which the model knows (`known`), or crops of the validation people, which are new to it
(`new`). Each rate is one line of benchmarks/results/continued.jsonl. The scores are those of the validation crops that
no round trains on.
"""

from __future__ import annotations

import logging
import tempfile
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks import records
from benchmarks.accuracy.data import SPLITS, find_cases, split_cases
from benchmarks.common import machine
from benchmarks.shipped_model import HIPPOCAMPUS, Labelled, cases_of, person, score
from lib.infers import BiPVLInfer
from lib.model.shipped import start_from_shipped
from lib.model.versions import Versions
from lib.stores.cases import Case
from lib.tasks import load_task
from lib.trainers import BiPVLTrain
from lib.volumes import metrics

RESULTS = records.RESULTS / "continued.jsonl"
KINDS = ("known", "new")


def mean_dice(engine: BiPVLInfer, cases: list[Case]) -> dict[str, float]:
    """Dice of each class, and their mean as `mean`."""
    found = {name: values["dice"].mean for name, values in metrics.summary(score(engine, cases, 1.0)).items()}
    return {**found, "mean": sum(found.values()) / len(found)}


def main(
    data: Annotated[Path, typer.Option(help="folder of the data set")],
    rates: Annotated[list[float], typer.Option(help="continued_rate of each round")],
    kind: Annotated[str, typer.Option(help="known or new: has the model trained on the labelled crops?")] = "known",
    labelled: Annotated[int, typer.Option(help="crops that the round trains on")] = 4,
    epochs: Annotated[int | None, typer.Option(help="default: the task's")] = None,
    seed: Annotated[int, typer.Option(help="of the round")] = 0,
    results: Annotated[Path, typer.Option(help="JSON Lines, one round a line")] = RESULTS,
) -> None:
    if kind not in KINDS:
        raise typer.BadParameter(f"--kind {kind!r}: valid are {', '.join(KINDS)}")
    logging.basicConfig(level="WARNING", format="%(message)s")
    torch.set_num_threads(1)  # sums in another order are other numbers
    task = load_task(HIPPOCAMPUS)
    split = split_cases(find_cases(data), shares=SPLITS[HIPPOCAMPUS])
    fresh = split.validation[:labelled]
    people = {person(case) for case in fresh}
    judged = cases_of([case for case in split.validation[labelled:] if person(case) not in people])
    chosen = cases_of(split.training[:labelled] if kind == "known" else fresh)
    rounds = epochs or task.training.epochs
    table = Table("continued_rate", *task.classes, "mean")
    for rate in (None, *rates):  # None: the shipped version itself
        name = f"{kind}-n{labelled}-e{rounds}-s{seed}-" + ("before" if rate is None else f"rate{rate:g}")
        row = records.find(results, name)
        if row is None:
            start = time.monotonic()
            with tempfile.TemporaryDirectory() as folder:
                versions = Versions(Path(folder))
                assert start_from_shipped(task, versions) == 1
                if rate is not None:
                    options = {"max_epochs": rounds, "continued_rate": rate, "seed": seed, "val_split": 0}
                    trainer = BiPVLTrain(task, versions.folder)
                    trainer({"model": task.name, **options, "tracking": "None", "device": "cpu"}, Labelled(chosen))
                    assert versions.served == 2
                dice = mean_dice(BiPVLInfer(task, versions.folder), judged)
            row = {"name": name, "kind": kind, "rate": rate, "labelled": labelled, "epochs": rounds, "seed": seed}
            row |= {"dice": dice, "cases": len(judged), "seconds": round(time.monotonic() - start)}
            records.put(results, {**row, "machine": machine()})
        table.add_row("before" if rate is None else f"{rate:g}", *(f"{value:.3f}" for value in row["dice"].values()))
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
