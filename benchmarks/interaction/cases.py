"""Cases as a server has them when somebody clicks: image, reference, the model's mask and what is cached with it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from benchmarks.accuracy.data import Preprocessed
from lib.interaction.boxes import Box
from lib.interaction.margins import Margin, margins
from lib.model.nets import BiPVLSeg
from lib.model.predict import predict
from lib.tasks import Task
from lib.volumes.reading import align_label, read_volume
from lib.volumes.transforms import restore, restore_box


@dataclass(frozen=True)
class Case:
    """What a session has, and the truth.

    image: (channels, H, W, D); truth, labels: (H, W, D), all on the grid of the file. features: (width, h, w, d) on
    the network's grid.
    """

    name: str
    image: np.ndarray
    truth: np.ndarray
    labels: np.ndarray
    spacing: tuple[float, float, float]
    meta: dict[str, Any]
    margins: dict[str, Margin]
    features: torch.Tensor

    def features_in(self, box: Box) -> np.ndarray:
        """The decoder's features on a box of the file's grid."""
        return restore_box(self.features, self.meta, box)


def prepare(model: BiPVLSeg, task: Task, cases: Sequence[dict[str, str]], volumes: Preprocessed) -> Iterator[Case]:
    """Segment each case once and keep what a session keeps."""
    model.eval()
    for case, data in zip(cases, volumes, strict=True):
        found = predict(model, data["image"], task, keep_features=True)
        assert found.features is not None
        image = read_volume(case["image"])
        given = align_label(read_volume(case["label"]), image)
        truth = np.zeros(given.shape[1:], np.uint8)
        for name, value in task.label_values.items():
            values = [value, *task.labels[name].file_values]
            truth[np.isin(given.numpy()[0].round(), values)] = value
        yield Case(
            case["id"],
            image.numpy(),
            truth,
            restore(found.probabilities, data["image"], task),
            tuple(np.linalg.norm(image.affine.numpy()[:3, :3], axis=0).tolist()),
            {key: data["image"].meta[key] for key in ("affine", "original_affine", "spatial_shape")},
            margins(found.probabilities, task),
            found.features,
        )
