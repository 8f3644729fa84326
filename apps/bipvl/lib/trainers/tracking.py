"""What a round reports while it runs: one line per epoch, TensorBoard, MLflow, the statistics that clients ask for."""

from __future__ import annotations

import datetime
import logging
import os
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from ignite.engine import Engine, Events
from torch.utils.tensorboard import SummaryWriter

from lib.tasks import Task
from lib.trainers.objective import unwrapped
from lib.upstream import Context, prepare_stats

logger = logging.getLogger(__name__)

TELL_SECONDS = 30.0  # between two lines; an epoch on a CPU may last minutes
History = dict[str, list[tuple[int, float]]]


class Tracker:
    """Collects every loss part, each sigma, learning rate, throughput and Dice per class.

    The line of each epoch goes to the log, whose last lines are what `GET /train/` returns; scalars go to TensorBoard
    (the run's events folder) and, if tracking is `mlflow`, to MLflow. The store is SQLite: today's MLflow refuses
    the file store.

    Args:
        prefix: what the lines begin with, the name of a fold.
        history: of the epochs before a resumed round was stopped.

    `history` holds every scalar as points (epoch, value).
    """

    def __init__(self, context: Context, task: Task, prefix: str = "", history: History | None = None) -> None:
        self.context = context
        self.task = task
        self.prefix = f"{prefix}, " if prefix else ""
        self.board = SummaryWriter(context.events_dir)
        self.mlflow = _start_mlflow(context) if str(context.tracking).lower() == "mlflow" else None
        self.latest: dict[str, float] = {}
        self.history: History = defaultdict(list, {name: list(points) for name, points in (history or {}).items()})
        self._epochs_before = len(self.history["loss"])
        self._sums: dict[str, float] = defaultdict(float)
        self._patches = 0
        self._epoch_start = time.time()
        self._seconds_left: int | None = None
        self._step = 0  # of the epoch that runs; 0 between two epochs
        self._told = time.monotonic()
        self._tell: Callable[[], None] = lambda: None

    def attach(self, trainer: Engine, evaluator: Engine | None, tell: Callable[[], None]) -> None:
        """Follow a round.

        Args:
            tell: called whenever `stats` has news between two epochs.
        """
        self._tell = tell
        for engine in (trainer, evaluator) if evaluator else (trainer,):
            engine.logger.setLevel(logging.WARNING)  # the lines below say what its own say, and more
        trainer.add_event_handler(Events.EPOCH_STARTED, self._start_epoch)
        trainer.add_event_handler(Events.ITERATION_COMPLETED, self._add)
        trainer.add_event_handler(Events.EPOCH_COMPLETED, self._end_epoch)
        trainer.add_event_handler(Events.COMPLETED, self._close)
        trainer.add_event_handler(Events.EXCEPTION_RAISED, self._fail)
        if evaluator is not None:
            evaluator.add_event_handler(Events.ITERATION_COMPLETED, self._validating)
            evaluator.add_event_handler(Events.COMPLETED, self._validated)

    def stats(self) -> dict[str, Any]:
        """MONAI Label's training statistics, and this round's latest figures."""
        stats = prepare_stats(self.context.start_ts, self.context.trainer, self.context.evaluator)
        running = {"step": self._step, "steps": self.context.trainer.state.epoch_length} if self._step else {}
        return {
            **stats,
            "epoch": stats["epoch"] - bool(self._step),  # the last that has ended
            **running,
            "latest": {k: round(v, 6) for k, v in self.latest.items()},
            "seconds_left": self._seconds_left,
            "loss_history": [round(v, 6) for _, v in self.history["loss"]],
            **({"fold": self.prefix.rstrip(", ")} if self.prefix else {}),
        }

    def tag(self, key: str, value: str) -> None:
        """Note a result of the whole round in MLflow."""
        if self.mlflow:
            self.mlflow.set_tag(key, value)

    def note(self, what: str, done: int, total: int) -> None:
        """Say how what follows the epochs goes, now and then and at its end."""
        if done == total or self._is_due():
            logger.info("%s%s: %d of %d", self.prefix, what, done, total)

    def _start_epoch(self, _: Any) -> None:
        self._sums.clear()
        self._patches = 0
        self._epoch_start = time.time()

    def _add(self, engine: Any) -> None:
        for name, value in engine.state.output.items():
            self._sums[name] += float(value)
        self._patches += len(engine.state.batch["image"])
        state = engine.state
        self._step = (state.iteration - 1) % state.epoch_length + 1
        if self._is_due():
            self._seconds_left = self._left(state.epoch - 1 + self._step / state.epoch_length, state.max_epochs)
            logger.info(
                "%sEpoch %d/%d, step %d/%d: loss %.4f, time left %s",
                self.prefix,
                *(state.epoch, state.max_epochs, self._step, state.epoch_length),
                self._sums["loss"] / self._step,
                datetime.timedelta(seconds=self._seconds_left),
            )
            self._tell()

    def _validating(self, evaluator: Any) -> None:
        if self._is_due():
            state = evaluator.state
            done = (state.iteration - 1) % state.epoch_length + 1
            logger.info("%sValidation: %d of %d cases", self.prefix, done, state.epoch_length)

    def _is_due(self) -> bool:
        """Whether nothing was said for so long that a person would ask."""
        if time.monotonic() - self._told < TELL_SECONDS:
            return False
        self._told = time.monotonic()
        return True

    def _left(self, epochs: float, last: int) -> int:
        """Seconds that remain after so many epochs, at the pace so far."""
        elapsed = time.time() - self.context.start_ts
        return round(elapsed / (epochs - self._epochs_before) * (last - epochs))

    def _end_epoch(self, engine: Any) -> None:
        state = engine.state
        seconds = time.time() - self._epoch_start
        network = unwrapped(self.context.network)
        scalars = {name: total / state.epoch_length for name, total in self._sums.items()}
        scalars |= network.sigmas()
        scalars["learning_rate"] = self.context.optimizer.param_groups[0]["lr"]
        scalars["patches_per_second"] = self._patches / max(seconds, 1e-9)
        self._record(scalars, state.epoch)

        self._step, self._told = 0, time.monotonic()
        self._seconds_left = self._left(state.epoch, state.max_epochs)
        logger.info(
            "%sEpoch %d/%d: loss %.4f (segmentation %.4f, class embedding %.4f, alignment %.4f), sigma %.3f %.3f %.3f, "
            "lr %.2e, %.1f s, time left %s",
            self.prefix,
            state.epoch,
            state.max_epochs,
            *(scalars[k] for k in ("loss", "segmentation", "class_embedding", "alignment")),
            *network.sigmas().values(),
            scalars["learning_rate"],
            seconds,
            datetime.timedelta(seconds=self._seconds_left),
        )

    def _validated(self, evaluator: Any) -> None:
        state = evaluator.state
        per_class = torch.as_tensor(state.metrics["val_class_dice"]).flatten().tolist()
        scalars = {
            f"dice_{name.replace(' ', '_')}": v for name, v in zip(self.task.classes, per_class, strict=True) if v == v
        }
        scalars["val_mean_dice"] = float(state.metrics["val_mean_dice"])
        self._record(scalars, state.epoch)
        classes = ", ".join(
            f"{name} {'-' if value != value else format(value, '.3f')}"
            for name, value in zip(self.task.classes, per_class, strict=True)
        )
        logger.info(
            "Validation after epoch %d: mean Dice %.4f (best %.4f, epoch %d); %s",
            state.epoch,
            scalars["val_mean_dice"],
            state.best_metric,
            state.best_metric_epoch,
            classes,
        )

    def _record(self, scalars: dict[str, float], epoch: int) -> None:
        self.latest |= scalars
        for name, value in scalars.items():
            self.history[name].append((epoch, value))
            self.board.add_scalar(name, value, epoch)
        self.board.flush()
        if self.mlflow:
            self.mlflow.log_metrics({k.replace("/", "-"): v for k, v in scalars.items()}, step=epoch)

    def _close(self, _: Engine, status: str = "FINISHED") -> None:
        self.board.close()
        if self.mlflow:
            self.mlflow.end_run(status)

    def _fail(self, engine: Engine, error: Exception) -> None:
        self._close(engine, "FAILED")
        raise error


def _start_mlflow(context: Context) -> Any:
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    import mlflow  # seconds to import, and many rounds run without it

    mlflow.set_tracking_uri(context.tracking_uri)
    mlflow.set_experiment(context.tracking_experiment_name)
    mlflow.start_run(run_name=context.tracking_run_name)
    plain = {k: v for k, v in context.request.items() if isinstance(v, str | int | float | bool)}
    mlflow.log_params(plain)
    return mlflow
