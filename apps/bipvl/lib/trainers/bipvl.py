"""The train task, as MONAI Label's app and the command line know it: options, statistics, and one round per call."""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path
from typing import Any

from lib.files import write_json
from lib.model.versions import Versions
from lib.tasks import Task
from lib.tasks.revisions import newest_text
from lib.trainers import rounds
from lib.trainers.options import train_options
from lib.trainers.roundtask import STATS, RoundTask
from lib.upstream import Datastore, TrainInterface


class BiPVLTrain(TrainInterface):
    """Train BiPVL-Seg on the labelled cases and publish the round's best model, if the gate lets it pass.

    A round starts from the served version (`pretrained`), validates on cases that never train, keeps the model with the
    best validation Dice (without validation: the last one), compares it with the served version, and publishes it as
    the next version, served or only kept.

    Args:
        task: what to segment.
        model_dir: the task's folder for versions, runs and the remembered split.
        interaction: whether people click; if not, no robot does, and no refiner is trained.
    """

    def __init__(self, task: Task, model_dir: Path, interaction: bool = True) -> None:
        super().__init__(f"Train BiPVL-Seg on {task.description}")
        self.task = task
        self.folder, self.interaction = model_dir, interaction
        self.versions = Versions(model_dir)
        self.options = train_options(task, f"sqlite:///{model_dir / 'mlflow.db'}")

    def config(self) -> dict[str, Any]:
        """Options as clients show them."""
        return self.options.offer()

    def info(self) -> dict[str, Any]:
        return {**super().info(), "labels": self.task.label_values}

    def stats(self) -> dict[str, Any]:
        """What the last round wrote: of its progress, its result, or why it failed (`failure`)."""
        try:
            found = json.loads((self.folder / STATS).read_text())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def __call__(self, request: dict[str, Any], datastore: Datastore) -> dict[str, Any]:
        """Run a round and return its statistics. What it fails of is in the statistics too.

        Raises:
            ValueError: no usable labelled case (with a table of what is wrong with each), an option out of range, a
                round that cannot be resumed, another round of this task is running, or damaged sentences.
        """
        begun = int(time.time())
        try:
            self.task = newest_text(self.task, self.folder)
            with rounds.only_round(self.folder, self.task.name):
                RoundTask(self.task, self.folder)(self.checked(request), datastore)
        except BaseException as error:
            self._note(begun, error)
            raise
        return self.stats()

    def _note(self, begun: int, error: BaseException) -> None:
        """Write why a round failed, for whoever asks for its status, beside what is known of the round that ran last:
        that may be another process's, which is still running."""
        text = str(error) or type(error).__name__
        with contextlib.suppress(OSError):  # such as the full disk that the round failed of
            write_json(self.folder / STATS, {**self.stats(), "failure": {"start_ts": begun, "error": text}})

    def checked(self, request: dict[str, Any]) -> dict[str, Any]:
        """A request's options and the defaults of the others.

        Raises:
            ValueError: naming the option and what is valid.
        """
        return self.options.full(request) | ({} if self.interaction else {"gate_clicks": 0, "refiner": 0})
