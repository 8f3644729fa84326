"""A class that joins a trained network: from its description, or as a fresh output channel.

    python -m benchmarks.text.new_class run --data FOLDER      trains, adapts and scores; continues where it stopped
    python -m benchmarks.text.new_class run --task amos22-ct --data FOLDER --fold 0 --new liver
    python -m benchmarks.text.new_class run --task quickstart --new spleen          generated phantoms
    python -m benchmarks.text.new_class tables                 the section of docs/research/text.md

A network of each head is trained on a task without one class, whose voxels are background there, as in the
files of people who do not need it yet. Then the class joins the task. With the text head the network stays as
it is and reads the class's sentences; with the fixed head its output channel begins anew, and all other weights stay.
Both are scored at once (0 cases) and after a short training on 1, 3 and 5 cases in which all classes are drawn; with
`--mix` half of the steps see all earlier cases, in which the class is neither drawn nor counted, as in a round.
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
from torch import Tensor

from benchmarks import records
from benchmarks.accuracy.data import Patches, Preprocessed, Split, find_cases, split_cases
from benchmarks.accuracy.settings import ABDOMEN, FIELDS, SMALL
from benchmarks.accuracy.training import train
from benchmarks.common import save_runs
from benchmarks.documents import insert
from benchmarks.text.moves import DOCUMENT, dice
from lib.model import checkpoints
from lib.model.nets import BiPVLSeg, build_model
from lib.model.predict import predict
from lib.tasks import Task, load_task
from lib.trainers.objective import TrainingNetwork
from lib.volumes.phantoms.studies import write_studies

WORK = Path.home() / ".cache" / "bipvl-accuracy"
NAME = "new-class"
RESULTS = records.RESULTS / f"{NAME}.jsonl"
SHOTS = (1, 3, 5)
# Sizes, what the networks see of a volume, and a class to hold out.
TASKS: dict[str, tuple[dict[str, Any], tuple[float, float] | None, str]] = {
    "acdc-mr": (SMALL, FIELDS["small"], "right ventricle"),
    "amos22-ct": (ABDOMEN, None, "liver"),
    "quickstart": ({"patch": [64, 64, 32], "training.patches_per_case": 1}, None, "spleen"),
}
PHANTOMS = (20, 6)  # training and test
Case = dict[str, Any]

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.command("run")
def run_command(
    data: Annotated[Path | None, typer.Option(help="folder of the data set; none: generated phantoms")] = None,
    task: Annotated[str, typer.Option(help=", ".join(TASKS))] = "acdc-mr",
    new: Annotated[list[str] | None, typer.Option(help="classes to hold out, each by itself")] = None,
    fold: Annotated[
        int | None, typer.Option(help="0, 1 or 2: a third of the patients is tested, all others train")
    ] = None,
    mix: Annotated[bool, typer.Option(help="half of the steps see earlier cases, in twice as many steps")] = False,
    seeds: int = 2,
    steps: Annotated[int, typer.Option(help="of the training without the class")] = 150,
    more: Annotated[int, typer.Option(help="steps with the labelled cases")] = 40,
    work: Annotated[Path, typer.Option(help="preprocessed volumes")] = WORK,
) -> None:
    """Train, adapt and score."""
    if task not in TASKS:
        raise typer.BadParameter(f"--task {task}: valid are {', '.join(TASKS)}")
    if not data and task != "quickstart":
        raise typer.BadParameter(f"--task {task} needs --data FOLDER: generated phantoms have the labels of quickstart")
    settings, field, usual = TASKS[task]
    runs = records.read(RESULTS)
    split = split_cases(find_cases(data), fold=fold) if data else phantoms(work / "phantoms")
    full = load_task(task, settings)
    training, test = (
        list(Preprocessed(full, cases, work / "volumes", field))
        for cases in (split.training, first_of_patients(split.test))
    )
    for seed in range(seeds):
        for name in new or [usual]:
            for head in ("text", "fixed"):
                key = {"task": task, "head": head, "new": name, "seed": seed, "fold": fold, "mix": mix}
                if any(key.items() <= r.items() for r in runs):
                    continue
                known = load_task(task, {**settings, "model.head": head})
                counts = {"training": len(training), "test": len(test), "steps": steps, "more": more}
                runs.append({**key, **counts, **one(known, name, training, test, seed, steps, more, mix)})
                save_runs(RESULTS, runs)


def phantoms(folder: Path) -> Split:
    """Generated cases."""
    count = sum(PHANTOMS)
    images = write_studies(folder, count, count)
    cases = [
        {"id": p.name.split(".")[0], "patient": p.name, "image": str(p), "label": str(folder / "labels/final" / p.name)}
        for p in images
    ]
    return Split(cases[: PHANTOMS[0]], [], cases[PHANTOMS[0] :])


@app.command("tables")
def tables_command() -> None:
    """Write the table into the document."""
    insert(DOCUMENT, NAME, table(records.read(RESULTS)))


def one(
    task: Task, new: str, training: Sequence[Case], test: Sequence[Case], seed: int, steps: int, more: int, mix: bool
) -> dict[str, Any]:
    """Dice of each class: of the network without the new class, and of the one that has it, by its labelled cases."""
    old = task.only([name for name in task.classes if name != new])
    known = [{**case, "label": without(case["label"], task, old)} for case in training]
    set_determinism(seed)
    base = fit(build_model(old), old, known, steps, seed)
    found: dict[str, Any] = {"before": score(base, old, task, test), "after": {}}
    kept = checkpoints.checkpoint_of(base, old, {})
    shuffled = torch.randperm(len(training), generator=torch.Generator().manual_seed(seed)).tolist()
    for cases in (0, *(n for n in SHOTS if n <= len(training))):
        set_determinism(seed)
        model = joined(kept, task)
        if cases:
            drawn, before = ([training[i] for i in part] for part in (shuffled[:cases], shuffled[cases:]))
            chosen = joint(drawn, before if mix else [], task, new)
            model = fit(model, task, chosen, more * (1 + mix), seed)
        found["after"][str(cases)] = score(model, task, task, test)
        print(task.model.head, new, seed, cases, json.dumps(found["after"][str(cases)]), file=sys.stderr, flush=True)
    return found


def joint(drawn: Sequence[Case], before: Sequence[Case], task: Task, new: str) -> list[Case]:
    """The cases of a round: in `drawn` every class counts; in those of `before` the new one is background and does not.
    The drawn ones are repeated, so that half of the steps see them."""
    others = torch.tensor([name != new for name in task.classes])
    value = 1 + task.classes.index(new)
    undrawn = [{**case, "label": case["label"].masked_fill(case["label"] == value, 0)} for case in before]
    repeated = list(drawn) * max(1, len(before) // len(drawn))
    return [
        *({**case, "annotated": torch.ones_like(others)} for case in repeated),
        *({**case, "annotated": others} for case in undrawn),
    ]


def fit(model: BiPVLSeg, task: Task, volumes: Sequence[Case], steps: int, seed: int) -> BiPVLSeg:
    """Train as a round does, from the weights that the model has."""
    patches = Patches(task, volumes, steps, seed)
    train(TrainingNetwork(model, task), task, patches, [patches[0]], torch.device("cpu"), "float32")
    return model


def joined(checkpoint: dict[str, Any], task: Task) -> BiPVLSeg:
    """The network of a checkpoint with the classes of `task`: the text head's by description, as the server does it;
    the fixed head's with a fresh channel for each class that the checkpoint does not know."""
    if task.model.head == "text":
        checkpoints.check_same_task(checkpoint, task)
        return checkpoints.restore_model(checkpoint, "checkpoint", task)[0]
    base, old = checkpoints.restore_model(checkpoint)
    model = build_model(task, base.text.assets)
    own, theirs = model.state_dict(), base.state_dict()
    channels = [0, *(1 + task.classes.index(name) for name in old.classes)]  # where the old channels go
    for key, value in theirs.items():
        if own[key].shape == value.shape:
            own[key] = value
        else:
            own[key][channels] = value
    model.load_state_dict(own)
    return model


def without(label: Tensor, task: Task, old: Task) -> Tensor:
    """A label of `task`, class indices, as one of `old`, which has some of its classes; the others are background."""
    table = torch.tensor([0, *(1 + old.classes.index(c) if c in old.classes else 0 for c in task.classes)])
    return table[label.long()].to(label.dtype)


def score(model: BiPVLSeg, asked: Task, task: Task, test: Sequence[Case]) -> dict[str, float]:
    """Mean Dice of each class of `asked` over the cases that show it, on the network's grid; labels are numbered as in
    `task`."""
    model.eval()
    found: dict[str, list[float]] = {name: [] for name in asked.classes}
    with torch.no_grad():
        for case in test:
            mask = predict(model, case["image"], asked).probabilities.argmax(0)
            label = case["label"].as_tensor()[0].long()
            for i, name in enumerate(asked.classes, 1):
                value = 1 + task.classes.index(name)
                if (label == value).any():
                    found[name].append(dice(mask, i, label, value))
    return {name: round(statistics.mean(values), 4) for name, values in found.items() if values}


def table(runs: Sequence[dict[str, Any]]) -> str:
    """One row per held-out class, head and number of cases: Dice of the new class, and what the old ones lost."""
    lines = [
        "| task | class that joins | head | labelled cases | its Dice | Dice of the others before | after |",
        "|---|---|---|---|---|---|---|",
    ]
    for task, new, mix, head in dict.fromkeys((r["task"], r["new"], r["mix"], r["head"]) for r in runs):
        some = [r for r in runs if (r["task"], r["new"], r["mix"], r["head"]) == (task, new, mix, head)]
        before = statistics.mean(v for r in some for v in r["before"].values())
        for cases in some[0]["after"]:
            after = [r["after"][cases] for r in some]
            others = statistics.mean(v for a in after for name, v in a.items() if name != new)
            own = ", ".join(f"{a[new]:.2f}" for a in after)
            mixed = " and all earlier cases" if mix and cases != "0" else ""
            lines.append(f"| {task} | {new} | {head} | {cases}{mixed} | {own} | {before:.2f} | {others:.2f} |")
    return "\n".join(lines) + "\n"


def first_of_patients(cases: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    """The first case of each patient."""
    return list({case["patient"]: case for case in reversed(cases)}.values())


if __name__ == "__main__":
    app()
