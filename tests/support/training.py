"""Rounds small enough for every test: a task, cases of phantoms, and the trainer of both."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from lib.tasks import Task, load_task
from lib.trainers import BiPVLTrain
from support.helpers import tiny_task, write_nifti

SMALL = {
    "model.vision": "unet",  # the cheapest backbone: these tests are about the round, not the network
    "model.feature_size": "4",
    "model.scratch": "{layers: 4, width: 16, heads: 2}",
    "spacing": "[8, 8, 8]",
    "patch": "[48, 48, 48]",
    "training.patches_per_case": "1",
    "training.learning_rate": "1e-3",
    "training.gate_clicks": "0",  # a robot user takes as long as the round; `test_clicks.py` and `test_second_stage.py`
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


def worded(task: Task, aside: str = "something that nobody trains with") -> Task:
    """The task with two further wordings of its first class's shape, the last of which is kept aside."""
    texts = task.concepts.classes
    text = texts[task.classes[0]].model_copy(update={"variants": {"shape": ("other words for it", aside)}})
    concepts = task.concepts.model_copy(update={"classes": {**texts, task.classes[0]: text}})
    return task.model_copy(update={"concepts": concepts})


# A channel a class, which can be damaged one by one. Three boxes of clear contrast are learned in a few dozen steps.
BOXES = tiny_task(
    patch=[32, 16, 16],
    model={"vision": "unet", "feature_size": 4, "head": "fixed"},
    augmentation={"rotate_probability": 0, "intensity_probability": 0},
    training={"gate_clicks": 0},
)
HU = (-100, 120, 220, 20)  # of the background and of the three organs


def box_case(folder: Path, number: int) -> dict[str, str]:
    """A case of the task `BOXES`, with a box for each organ, at places of its own."""
    rng = np.random.default_rng(number)
    x, y, z = rng.integers(0, 3, 3)
    label = np.zeros((16, 16, 16), np.uint8)
    label[1 + x : 7 + x, 1 + y : 14 + y, 2:13] = 1
    label[8 + x : 13 + x, 1 + y : 6 + y, 2:13] = 2
    label[8 + x : 13 + x, 7 + y : 12 + y, 1 + z : 13 + z] = 3
    image = (np.array(HU)[label] + rng.normal(0, 10, label.shape)).astype(np.int16)
    return {
        "image": str(write_nifti(folder / f"case_{number:03}.nii.gz", image)),
        "label": str(write_nifti(folder / f"case_{number:03}_label.nii.gz", label)),
    }
