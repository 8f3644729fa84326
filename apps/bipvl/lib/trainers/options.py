"""The options of a training round."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from lib.options import GPUS, Choice, Device, Number, Option, OptionTable, Switch, Text, shown
from lib.tasks import UNJUDGED, Task
from lib.tasks.revisions import FOLDER
from lib.upstream import device_list, settings

FIRST, TASK = "the first GPU, else the CPU", "the task's"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")  # without dots none is that of a version or another file
RESERVED = (FOLDER,)
ANY = "none"  # as a limit


def is_round(name: str) -> bool:
    """Whether a round can have this name, that of a folder beside the task's versions."""
    return bool(NAME.fullmatch(name)) and name.lower() not in RESERVED


@dataclass(frozen=True)
class _Name(Option):
    """The name of a round."""

    @property
    def valid(self) -> str:
        return f"up to 64 letters, digits, dashes and underscores; not {', '.join(RESERVED)}"

    def convert(self, value: Any) -> str:
        if not isinstance(value, str) or not is_round(value):
            raise ValueError(f"{self.name}: expected {self.valid}, got {value!r}")
        return value


@dataclass(frozen=True)
class _Fall(Option):
    """How much Dice may fall; `none`: by any amount. Clients show a text, so that both can be typed."""

    @property
    def offer(self) -> str:
        return self.default if isinstance(self.default, str) else f"{self.default:g}"

    @property
    def valid(self) -> str:
        return f"number from 0 to 1, or {ANY}"

    def convert(self, value: Any) -> float | str:
        if isinstance(value, str) and value.strip().lower() == ANY:
            return ANY
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if isinstance(value, bool) or not 0 <= number <= 1:
            raise ValueError(f"{self.name}: expected a {self.valid}, got {shown(value)}")
        return number


def limit_of(fall: float | str) -> float | None:
    """How much a Dice may fall by what a request says; None for any amount."""
    return None if isinstance(fall, str) else fall


def train_options(task: Task, tracking_uri: str) -> OptionTable:
    """The table of `POST /train/<task>`.

    Args:
        tracking_uri: where MLflow records.
    """
    recipe = task.training
    tracking = "mlflow" if settings.MONAI_LABEL_TRACKING_ENABLED else "None"
    return OptionTable(
        Number("max_epochs", recipe.epochs, "epochs of this round", TASK, low=1),
        Number(
            "train_batch_size",
            recipe.batch_size,
            "cases per step; a step sees this many times `patches_per_case` patches",
            TASK,
            low=1,
        ),
        Number("patches_per_case", recipe.patches_per_case, "patches from each case per epoch", TASK, low=1),
        Number("learning_rate", recipe.learning_rate, "the highest, after the warm-up", TASK, low=1e-12),
        Number(
            "continued_rate",
            recipe.continued_rate,
            "times the learning rates, in a round that goes on from a served version",
            TASK,
            low=1e-12,
        ),
        Number("val_interval", recipe.val_interval, "epochs between validations", TASK, low=1),
        Number("val_split", 0.2, "wanted share of validation cases", low=0, below=1),
        Switch("pretrained", True, "start from the served version"),
        Number("seed", 0, "seed of weights, patches and augmentation", low=0),
        Device("device", device_list()[0], "where to train", said=FIRST),
        Number(
            "gate_margin",
            recipe.gate_margin,
            "how much Dice one class may lose against the served version",
            TASK,
            low=0,
        ),
        Number(
            "gate_min_cases",
            recipe.gate_min_cases,
            "with fewer cases that neither model was trained on, the gate cannot judge",
            TASK,
            low=1,
        ),
        Choice(
            "gate_unjudged",
            recipe.gate_unjudged,
            "what then becomes of the version: `keep` it unserved, or `publish` it",
            TASK,
            choices=UNJUDGED,
        ),
        Number(
            "gate_clicks",
            recipe.gate_clicks,
            "cases on which a robot user clicks, for the gate; 0: none",
            TASK,
            low=0,
        ),
        _Fall(
            "gate_reading",
            ANY if recipe.gate_reading is None else recipe.gate_reading,
            "how much mean Dice may fall with wordings that no training reads; `none`: the gate only reports it",
            TASK,
        ),
        Number(
            "refiner",
            recipe.refiner,
            "simulated corrections that a refiner learns from after the epochs; 0: the version gets none",
            TASK,
            low=0,
        ),
        Switch("cross_validate", recipe.cross_validate, "with two to four cases: leave each out in turn", TASK),
        Switch("resume", False, "go on with the round that was stopped; other options and cases must be the same"),
        Choice(
            "dataset",
            "CacheDataset",
            "keeps preprocessed cases in memory; `PersistentDataset` on disk, `Dataset` not at all",
            choices=("CacheDataset", "PersistentDataset", "Dataset"),
        ),
        Choice("tracking", tracking, "`None` switches MLflow off", "`mlflow`", choices=("mlflow", "None")),
        Text("tracking_uri", tracking_uri, "where MLflow records; not in a request", "SQLite file", shown=False),
        Text("tracking_experiment_name", "", "the experiment in MLflow", "the task's name"),
        Choice(
            "dataloader",
            "ThreadDataLoader",
            "MONAI Label's choice of loader",
            choices=("ThreadDataLoader", "DataLoader"),
        ),
        Switch("multi_gpu", True, "no effect with one GPU; not yet tested with several"),
        GPUS,
        _Name("name", "train", "folder of the round's event files"),
        Number("val_batch_size", 1, "cases per validation step", low=1),
        Number(
            "early_stop_patience",
            -1,
            "stop after this many validations without a better mean Dice; -1 runs all epochs",
            low=-1,
        ),
    )
