"""Labelled cases as the refiner sees them: what a frozen network made of each, once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from monai.data import MetaTensor
from torch import Tensor

from lib.interaction.boxes import Box
from lib.interaction.margins import Margin, margins
from lib.model.nets import BiPVLSeg
from lib.model.predict import predict
from lib.stores.uploads.names import to_task_values, whole_numbers
from lib.tasks import Task
from lib.volumes.reading import align_label, read_volume
from lib.volumes.transforms import restore, restore_box

META = ("affine", "original_affine", "spatial_shape")


@dataclass(frozen=True)
class Segmented:
    """A labelled case and what a network made of it.

    image (channels, H, W, D); truth and labels (H, W, D), values of the reference and of the network's mask; margins of
    each label; features (width, h, w, d) of the decoder on the network's grid; text: vector (P,) of each label; values
    of the labels.
    """

    name: str
    image: np.ndarray
    truth: np.ndarray
    labels: np.ndarray
    spacing: tuple[float, float, float]
    meta: Mapping[str, Any]
    margins: Mapping[str, Margin]
    features: Tensor
    text: Mapping[str, Tensor]
    values: Mapping[str, int]

    def features_in(self, box: Box) -> np.ndarray:
        """(width, …) of a box of the file's grid."""
        return restore_box(self.features, self.meta, box)


def segmented(model: BiPVLSeg, task: Task, case: Mapping[str, Any], image: MetaTensor) -> Segmented:
    """Segment one case and keep what a session keeps.

    Args:
        model: in evaluation mode.
        task: its classes.
        case: `id`, `image` and `label`, the files.
        image: preprocessed (`lib.volumes.transforms.load`).
    """
    found = predict(model, image, task, keep_features=True)
    assert found.features is not None and found.text is not None
    volume = read_volume(case["image"])
    given = align_label(read_volume(case["label"]), volume).numpy()[0]
    x, y, z = np.linalg.norm(volume.affine.numpy()[:3, :3], axis=0).tolist()
    return Segmented(
        str(case["id"]),
        volume.numpy(),
        to_task_values(whole_numbers(given), None, task),
        restore(found.probabilities, image, task),
        (x, y, z),
        {key: image.meta[key] for key in META},
        margins(found.probabilities, task),
        found.features,
        text_of_labels(found.text, task),
        dict(task.label_values),
    )


def text_of_labels(text: Tensor, task: Task) -> dict[str, Tensor]:
    """Class vectors (C, P) to those of the labels that annotators draw: a label's own class, or the smallest region
    that holds it."""
    if task.regions is None:
        return dict(zip(task.classes, text, strict=True))
    found = {}
    for name in task.labels:
        own = [i for i, region in enumerate(task.regions.values()) if name in region.labels]
        sizes = [len(list(task.regions.values())[i].labels) for i in own]
        found[name] = text[own[int(np.argmin(sizes))]] if own else text.mean(0)
    return found
