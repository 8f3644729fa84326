"""Does bfloat16 on a CPU cost accuracy? Dice of a trained model in both precisions, on the same volumes.

python -m benchmarks.speed.precision CHECKPOINT --phantoms 6            generated volumes that it was not trained on
python -m benchmarks.speed.precision CHECKPOINT --data cases.json       a JSON list of {"image": …, "label": …}
"""

from __future__ import annotations

import json
import statistics
import tempfile
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.common import save, timed
from lib.model import checkpoints
from lib.model.allocator import keep_freed_memory
from lib.model.nets.bipvl import BiPVLSeg
from lib.model.predict import Prediction, predict
from lib.tasks import Task
from lib.trainers.evaluation import class_dice
from lib.volumes.phantoms.studies import write_studies
from lib.volumes.transforms import apply, load


def main(
    checkpoint: Path,
    phantoms: Annotated[int, typer.Option(help="generated cases to score on")] = 6,
    data: Annotated[Path | None, typer.Option(help="cases to score on instead")] = None,
    threads: Annotated[int, typer.Option(help="threads of torch")] = 2,
) -> None:
    keep_freed_memory()
    torch.set_num_threads(threads)
    model, task = checkpoints.restore_model(checkpoints.load(checkpoint), checkpoint)
    assert not task.overlapping, "this benchmark decides by the most probable class"
    with tempfile.TemporaryDirectory() as folder:
        if data is None:
            write_studies(Path(folder), phantoms, phantoms, seed=90_000)
            cases = [
                {"image": str(p), "label": str(Path(folder) / "labels" / "final" / p.name)}
                for p in sorted(Path(folder).glob("*.nii.gz"))
            ]
        else:
            cases = json.loads(data.read_text())
        rows = [_compare(model, task, case) for case in cases]
    dice = {half: [d for row in rows for d in row[half]] for half in (False, True)}
    changes = [abs(a - b) for a, b in zip(*dice.values(), strict=True)]
    means = [statistics.mean(d) for d in dice.values()]
    result = {
        **{"cases": len(rows), "dice_float32": means[0], "dice_bfloat16": means[1]},
        **{"largest_change_of_a_class_in_a_case": max(changes), "mean_change": statistics.mean(changes)},
        "voxels_that_change_class": statistics.mean(row["changed"] for row in rows),
        "cpu_seconds": {str(half): statistics.median(row["seconds"][half] for row in rows) for half in dice},
        **{"task": task.name, "feature_size": task.model.feature_size},
    }
    table = Table("figure", "value")
    for name, value in result.items():
        table.add_row(name, f"{value:.5f}" if isinstance(value, float) else str(value))
    Console(width=120).print(table)
    save(f"precision-{task.name}", result)


def _compare(model: BiPVLSeg, task: Task, case: dict) -> dict:
    got = apply(load(task, label=True), case)
    truth = got["label"].as_tensor()[0].long()
    row: dict = {"seconds": {}}
    masks = {}
    for half in (False, True):
        found: list[Prediction] = []

        def once(half: bool = half, found: list[Prediction] = found) -> None:
            found.append(predict(model, got["image"], task, half=half))

        seconds = timed(once)
        masks[half] = found[0].probabilities.argmax(0)
        row["seconds"][half] = seconds["cpu"]
        row[half] = [
            dice
            for dice, c in zip(_dice(masks[half], truth, task), range(1, task.out_channels), strict=True)
            if (truth == c).any()
        ]
    row["changed"] = float((masks[False] != masks[True]).float().mean())
    return row


def _dice(mask: torch.Tensor, truth: torch.Tensor, task) -> list[float]:
    one_hot = [torch.stack([x == c for c in range(1, task.out_channels)]).float() for x in (mask, truth)]
    return class_dice(*one_hot)


if __name__ == "__main__":
    typer.run(main)
