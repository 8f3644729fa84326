"""Labelled cases as the refiner sees them: what a frozen network made of each, once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from torch import Tensor

from lib.interaction import boxes
from lib.interaction.boxes import Box
from lib.interaction.margins import META, Margin, margins
from lib.interaction.prompts import Prompts
from lib.model.nets import BiPVLSeg
from lib.model.predict import Prediction, predict
from lib.model.refining import text_of_labels
from lib.stores.uploads.names import to_task_values, whole_numbers
from lib.tasks import Task
from lib.volumes.reading import align_label, read_volume
from lib.volumes.transforms import restore, restore_box


@dataclass(frozen=True)
class Segmented:
    """A labelled case and what a network made of it.

    image (channels, H, W, D); truth and labels (H, W, D), values of the reference and of the network's mask; margins of
    each label; features (width, h, w, d) of the decoder on the network's grid, None if they were not kept, and then
    there is no `text` either, the vector (P,) of each label; values of the labels; errors: margins of another network
    that had not been trained on the case, empty if there is none; asked: what people prompted on each label while they
    drew the reference.
    """

    name: str
    image: np.ndarray
    truth: np.ndarray
    labels: np.ndarray
    spacing: tuple[float, float, float]
    meta: Mapping[str, Any]
    margins: Mapping[str, Margin]
    features: Tensor | None
    text: Mapping[str, Tensor]
    values: Mapping[str, int]
    errors: Mapping[str, Margin] = field(default_factory=dict)
    asked: Mapping[str, Prompts] = field(default_factory=dict)

    def features_in(self, box: Box) -> np.ndarray:
        """(width, …) of a box of the file's grid."""
        assert self.features is not None
        return restore_box(self.features, self.meta, box)

    @property
    def nbytes(self) -> int:
        """What it takes in memory."""
        kept = sum(m.nbytes for found in (self.margins, self.errors) for m in found.values())
        features = 0 if self.features is None else self.features.numel() * self.features.element_size()
        return self.image.nbytes + self.truth.nbytes + self.labels.nbytes + kept + features

    def within(self, box: Box) -> Segmented:
        """The case as if its file ended at a box; features and margins are shared, not copied."""
        affine = torch.as_tensor(self.meta["original_affine"], dtype=torch.float64).clone()
        start = boxes.corner(box)
        affine[:3, 3] += affine[:3, :3] @ torch.tensor(start, dtype=torch.float64)
        truth = self.truth[box]
        return replace(
            self,
            image=self.image[:, box[0], box[1], box[2]],
            truth=truth,
            labels=self.labels[box],
            meta={**self.meta, "original_affine": affine, "spatial_shape": truth.shape},
            asked={label: prompts.within(box).moved(start) for label, prompts in self.asked.items()},
        )


def segmented(model: BiPVLSeg, task: Task, case: Mapping[str, Any], image: MetaTensor) -> Segmented:
    """Segment one case and keep what a session keeps.

    Args:
        model: in evaluation mode.
        task: its classes.
        case: `id`, `image` and `label`, the files.
        image: preprocessed (`lib.volumes.transforms.load`).
    """
    return as_segmented(predict(model, image, task, keep_features=True), task, case, image)


def as_segmented(found: Prediction, task: Task, case: Mapping[str, Any], image: MetaTensor) -> Segmented:
    """A case and what was predicted for it.

    Args:
        found: with features, if a refiner shall see the case.
        task, case, image: as for `segmented`.
    """
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
        {} if found.text is None else text_of_labels(found.text, task),
        dict(task.label_values),
    )


def with_errors_of(case: Segmented, model: BiPVLSeg, task: Task, image: MetaTensor) -> Segmented:
    """A case with what another network, which had not been trained on it, made of it.

    Args:
        model: in evaluation mode.
        task: the other network's.
        image: of the case, preprocessed for that task.
    """
    found = margins(predict(model, image, task).probabilities, task)
    meta = {key: image.meta[key] for key in META}
    same = np.allclose(np.asarray(meta["affine"]), np.asarray(case.meta["affine"]))
    # A margin lies on its network's grid; one on another grid would be read at the wrong place.
    return replace(case, errors=found) if same else case
