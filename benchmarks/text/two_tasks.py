"""One network for two tasks: abdominal CT and cardiac MR, trained in turns, each with its own sentences.

    python -m benchmarks.text.two_tasks run --heart FOLDER --abdomen FOLDER    trains and scores; may be repeated
    python -m benchmarks.text.two_tasks tables                                   the section of docs/research/text.md

With the text head no weight knows a class, so that two tasks can share all of them: sizes, scan and preprocessing are
each task's own. Each network alone has half as many steps as the shared one, so that a task's data are seen as often.
Both tasks get a checkpoint of the shared weights; a server takes each as that task's version.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from monai.utils import set_determinism

from benchmarks import records
from benchmarks.accuracy.data import Patches, Preprocessed, find_cases, split_cases
from benchmarks.accuracy.settings import ABDOMEN, FIELDS, SMALL
from benchmarks.common import save_runs
from benchmarks.documents import insert
from benchmarks.text.moves import DOCUMENT, WORK
from benchmarks.text.new_class import Case, first_of_patients, score
from lib.model import checkpoints
from lib.model.nets import BiPVLSeg, TextAssets, build_model
from lib.model.nets.text import StageDividedBert
from lib.tasks import Task, load_task
from lib.trainers.objective import TrainingNetwork
from lib.trainers.recipe import build_schedule, descend

NAME = "two-tasks"
RESULTS = records.RESULTS / f"{NAME}.jsonl"
HEART, ABDOMINAL = "acdc-mr", "amos22-ct"

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.command("run")
def run_command(
    heart: Annotated[Path, typer.Option(help="folder of ACDC")],
    abdomen: Annotated[Path, typer.Option(help="folder of CT with the labels of AMOS22, imagesTr and labelsTr")],
    seeds: int = 2,
    steps: Annotated[int, typer.Option(help="of each task")] = 150,
    fold: Annotated[int, typer.Option(help="of the CT: this third is tested, all others train")] = 0,
    work: Annotated[Path, typer.Option(help="preprocessed volumes, checkpoints")] = WORK,
) -> None:
    """Train alone and together, and score."""
    runs = records.read(RESULTS)
    tasks = [load_task(HEART, {**SMALL, "model.head": "text"}), load_task(ABDOMINAL, {**ABDOMEN, "model.head": "text"})]
    splits = [split_cases(find_cases(heart)), split_cases(find_cases(abdomen), fold=fold)]
    fields = [FIELDS["small"], None]
    training, test = (
        [list(Preprocessed(t, cases(s), work / "volumes", f)) for t, s, f in zip(tasks, splits, fields, strict=True)]
        for cases in (lambda s: s.training, lambda s: first_of_patients(s.test))
    )
    for seed in range(seeds):
        for what in ([0], [1], [0, 1]):
            key = {"tasks": [tasks[i].name for i in what], "seed": seed, "fold": fold, "steps": steps}
            if any(key.items() <= r.items() for r in runs):
                continue
            files = [work / "checkpoints" / f"two-tasks_{len(what)}_{tasks[i].name}_s{seed}.pt" for i in what]
            learn([tasks[i] for i in what], [training[i] for i in what], steps, seed, files)
            dice, trained = {}, {}
            for i, file in zip(what, files, strict=True):
                model, task = checkpoints.restore_model(checkpoints.load(file), file)
                dice[task.name] = score(model, task, task, test[i])
                trained[task.name] = score(model, task, task, training[i][:2])
            runs.append({**key, "dice": dice, "dice_trained_on": trained})
            print(json.dumps(runs[-1]), file=sys.stderr, flush=True)
            counts = {t.name: [len(a), len(b)] for t, a, b in zip(tasks, training, test, strict=True)}
            save_runs(RESULTS, runs, training_and_test_cases=counts)


@app.command("tables")
def tables_command() -> None:
    """Write the table into the document."""
    insert(DOCUMENT, NAME, table(records.read(RESULTS)))


def learn(
    tasks: Sequence[Task], volumes: Sequence[Sequence[Case]], steps: int, seed: int, files: Sequence[Path]
) -> None:
    """Train one network in turns on the tasks, and write a checkpoint for each."""
    set_determinism(seed)
    networks = [TrainingNetwork(model, task) for model, task in zip(shared(tasks), tasks, strict=True)]
    groups = networks[0].parameter_groups()
    groups += [{"params": list(n.uncertainty.parameters()), "weight_decay": 0.0} for n in networks[1:]]
    recipe = tasks[0].training
    optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    schedule = build_schedule(optimizer, steps * len(tasks), recipe)
    patches = [Patches(task, some, steps, seed) for task, some in zip(tasks, volumes, strict=True)]
    for i in range(steps):
        for network, own in zip(networks, patches, strict=True):
            network.train()
            optimizer.zero_grad(set_to_none=True)
            descend(network(*own[i])["loss"], optimizer, network.uncertainty)
            schedule.step()
    for network, file in zip(networks, files, strict=True):
        checkpoints.save(checkpoints.checkpoint_of(network.model, network.task, {"trained_with": len(tasks)}), file)


def shared(tasks: Sequence[Task]) -> list[BiPVLSeg]:
    """One network per task, all with the same modules; only the sentences that they hold are their own."""
    words = {name: text for task in tasks for name, text in task.concepts.classes.items()}
    concepts = tasks[0].concepts.model_copy(update={"classes": words})  # one vocabulary for all
    assets: TextAssets = build_model(tasks[0].model_copy(update={"concepts": concepts})).text.assets
    first = build_model(tasks[0], assets)
    models = [first]
    for task in tasks[1:]:
        text = StageDividedBert(first.text.bert, first.text.tokenizer, task.text_rows())
        parts = (first.vision, text, first.fusion, first.embedding, first.head)
        model = BiPVLSeg(*parts, task.model.projection)
        model.project_text, model.project_vision = first.project_text, first.project_vision
        models.append(model)
    return models


def table(runs: Sequence[dict[str, Any]]) -> str:
    """One row per task: mean Dice of its classes by its own network and by the shared one, seed by seed."""
    lines = ["| task | cases | a network of its own | one network for both |", "|---|---|---|---|"]
    for name in (HEART, ABDOMINAL):
        for part, title in (("dice", "test"), ("dice_trained_on", "trained on")):
            cells = []
            for count in (1, 2):
                some = [r for r in runs if len(r["tasks"]) == count and name in r["tasks"]]
                values = [statistics.mean(r[part][name].values()) for r in some]
                cells.append(", ".join(f"{v:.2f}" for v in values))
            lines.append(f"| {name} | {title} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    app()
