"""Rounds small enough for every test: a task, cases of phantoms, and the trainer of both."""

from __future__ import annotations

from lib.tasks import load_task
from lib.trainers import BiPVLTrain

SMALL = {
    "model.vision": "unet",  # the cheapest backbone: these tests are about the round, not the network
    "model.feature_size": "4",
    "model.scratch": "{layers: 4, width: 16, heads: 2}",
    "spacing": "[8, 8, 8]",
    "patch": "[48, 48, 48]",
    "training.patches_per_case": "1",
    "training.learning_rate": "1e-3",
}
OPTIONS = [word for key, value in SMALL.items() for word in ("--set", f"{key}={value}")]
RESUMED = {"max_epochs": 4, "val_interval": 1, "val_split": 0, "tracking": "None", "device": "cpu"}


class Cases(list):
    def datalist(self):
        return list(self)


def phantom_cases(studies, count):
    names = [f"phantom_{i:03}.nii.gz" for i in range(count)]
    return Cases({"image": str(studies / n), "label": str(studies / "labels" / "final" / n)} for n in names)


def small_trainer(folder, **changes):
    task = load_task("quickstart", {**SMALL, **changes})
    return BiPVLTrain(task, folder / task.name)
