"""What a round remembers: the state it can be resumed from; and that no other runs beside it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from ignite.handlers import EarlyStopping
from monai.transforms import Compose

from lib.files import clear_unfinished, now, write_json
from lib.model.checkpoints import DamagedCheckpoint, load_tensors, save
from lib.model.reports.page import Examined
from lib.tasks import Task
from lib.trainers.objective import unwrapped
from lib.trainers.options import is_round
from lib.upstream import Context

# A round is resumed only with the same values: another would make the rest of it another round.
MATCHING = (
    *("max_epochs", "train_batch_size", "patches_per_case", "learning_rate", "val_interval", "val_split"),
    *("pretrained", "continued_rate", "seed", "early_stop_patience", "cross_validate"),
)
LAST, BEST = "last.pt", "best.pt"  # in the folder of the run: where it was stopped, and its best epoch so far


@dataclass
class Fold:
    """One training of the cross-validation: all cases but one, and that one to score.

    start: the version to start from, None for fresh weights.
    """

    number: int
    count: int
    held_out: dict[str, Any]
    start: int | None

    def __str__(self) -> str:
        return f"Fold {self.number}/{self.count}"


@dataclass
class Round:
    """What the steps of one round share.

    audit: table and problems of the labels, for the statistics.
    training, validation: the cases of each side.
    examined: what the report shows of the cases that the round's model, or a fold's, was scored on.
    identity: what must be the same for the round to be resumed.
    parent: the version that the round starts from, None for fresh weights.
    seen: the cases that the parent and its ancestors were trained on.
    cross_validation: scores of the folds so far, None if there is none.
    fold: the fold that is being trained, None for the round's own model.
    saved: the state to resume from, None for a fresh start.
    """

    audit: dict[str, Any]
    training: list[dict[str, Any]]
    validation: list[dict[str, Any]]
    examined: Examined
    identity: dict[str, Any] = field(default_factory=dict)
    parent: int | None = None
    seen: list[str] = field(default_factory=list)
    cross_validation: dict[str, Any] | None = None
    fold: Fold | None = None
    saved: dict[str, Any] | None = None

    @property
    def start(self) -> int | None:
        """The version that the training of now starts from, None for fresh weights."""
        return self.fold.start if self.fold else self.parent


@contextlib.contextmanager
def only_round(model_dir: Path, task: str) -> Iterator[None]:
    """Hold the lock of a task's rounds. The kernel releases it when the process ends, however it ends.

    Args:
        model_dir: the task's folder, with a folder for each name of a round.
        task: the task's name.

    Raises:
        ValueError: another process holds it; says which and since when.
    """
    folder = model_dir / "train"
    folder.mkdir(parents=True, exist_ok=True)
    holder = folder / "round.json"
    lock = FileLock(folder / "round.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(
            f"a round of task {task!r} is already running{_described(holder)}; one runs at a time"
        ) from None
    try:
        write_json(holder, {"pid": os.getpid(), "started": now()})
        _clear(model_dir)
        yield
    finally:
        lock.release()


def _clear(model_dir: Path) -> None:
    """Remove what killed rounds left, whatever their names. Call it only if no other round can be running."""
    for pattern in ("v*.html", "split.json", "train_stats.json"):
        clear_unfinished(model_dir, pattern)
    for run in model_dir.iterdir():
        if run.is_dir() and is_round(run.name):
            clear_unfinished(run, "*.pt")
            clear_unfinished(run, "*.json")
            for cache in run.glob("cache_*"):  # of preprocessed cases; a round removes its own unless it is killed
                shutil.rmtree(cache, ignore_errors=True)


def _described(holder: Path) -> str:
    try:
        found = json.loads(holder.read_text())
        return f" (process {found['pid']}, since {found['started']})"
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def identity(task: Task, request: dict[str, Any], training: list[str], validation: list[str]) -> dict[str, Any]:
    """What must be the same for a round to be resumed."""
    return {
        "task": task.to_dict(),
        "options": {key: request[key] for key in MATCHING},
        "training cases": sorted(training),
        "validation cases": sorted(validation),
    }


def load_saved(path: Path, expected: dict[str, Any]) -> dict[str, Any] | None:
    """The state of a round that was stopped; None if there is none.

    Raises:
        ValueError: damaged, or of a round with another task, other options or other cases; says which.
    """
    if not path.is_file():
        return None
    advice = "start over with resume false"
    try:
        saved = load_tensors(path)
    except DamagedCheckpoint as error:
        raise ValueError(f"the round cannot be resumed: {error}; {advice}") from error
    found = saved["identity"]
    differences = [
        f"another {key}" if key == "task" else f"other {key}" for key in expected if found[key] != expected[key]
    ]
    for key in MATCHING:
        before, after = found["options"].get(key), expected["options"][key]
        if before != after:
            differences.append(f"{key} was {before!r}, now {after!r}")
    if differences:
        raise ValueError(f"{path}: the round cannot be resumed: {'; '.join(differences)}. Send the same, or {advice}")
    return saved


def reseed(transforms: Compose, seed: int, epoch: int) -> None:
    """Make all random numbers of an epoch depend on seed and epoch alone, so that a resumed round draws the same."""
    number = int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0])
    torch.manual_seed(number)
    transforms.set_random_state(number)


def restore(this: Round, context: Context, stop: EarlyStopping | None) -> None:
    """Put optimizer, schedule and engines where a stopped round was; the network is there already."""
    if not this.saved:
        return
    state, trainer = this.saved["state"], context.trainer
    context.optimizer.load_state_dict(state["optimizer"])
    context.schedule.load_state_dict(state["schedule"])
    trainer.state.epoch = state["epoch"]
    trainer.state.iteration = state["epoch"] * trainer.state.epoch_length
    if context.evaluator:
        context.evaluator.state.best_metric, context.evaluator.state.best_metric_epoch = state["best"]
    if stop:
        stop.load_state_dict(state["stop"])


def snapshot(
    context: Context, history: dict[str, list[tuple[int, float]]], stop: EarlyStopping | None
) -> dict[str, Any]:
    """What brings network and engines back to the end of this epoch."""
    network, evaluator = unwrapped(context.network), context.evaluator
    assets = network.model.text.assets
    return {
        "epoch": context.trainer.state.epoch,
        "network": network.state_dict(),
        "text": {"config": assets.config, "tokenizer": assets.tokenizer},
        "optimizer": context.optimizer.state_dict(),
        "schedule": context.schedule.state_dict(),
        "best": (float(evaluator.state.best_metric), evaluator.state.best_metric_epoch) if evaluator else None,
        "stop": dict(stop.state_dict()) if stop else None,
        "history": dict(history),
    }


def save_progress(this: Round, context: Context, state: dict[str, Any] | None) -> None:
    """Write what a stopped round is resumed from. Without `state`: between two folds."""
    progress = {
        "identity": this.identity,
        "parent": this.parent,
        "seen": this.seen,
        "cross_validation": this.cross_validation,
        "fold": this.fold.number if this.fold else None,
        "state": state,
    }
    save(progress, Path(context.output_dir) / LAST)
