"""One forward pass over a case, and all that active learning wants to know of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from lib.activelearning.scoring.cache import CaseScores
from lib.model.nets import BiPVLSeg
from lib.model.nets.text import Sentences
from lib.model.predict import Prediction, predict
from lib.tasks import Task


class _Pooled:
    """Mean over places and windows of V_4, the last fused map."""

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.windows = 0

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
        v4 = output[1]  # (B, width, h, w, d)
        sums = v4.float().flatten(2).mean(2).sum(0).cpu()
        self.total = sums if self.total is None else self.total + sums
        self.windows += len(v4)


@contextmanager
def _pooled(model: BiPVLSeg) -> Iterator[_Pooled]:
    pooled = _Pooled()
    handle = model.fusion[-1].register_forward_hook(pooled)
    try:
        yield pooled
    finally:
        handle.remove()


def score_case(
    model: BiPVLSeg, image: Tensor, task: Task, sentences: Sentences | None = None, window_batch: int = 1
) -> tuple[CaseScores, Prediction]:
    """Scores of a preprocessed case (channels, h, w, d), and the prediction they come from.

    Nobody else may use the model meanwhile. `sentences` and `window_batch` are those of `lib.model.predict.predict`.
    Entropy, alignment and vector of a case without any content are 0.
    """
    with _pooled(model) as pooled:
        prediction = predict(model, image, task, window_batch=window_batch, sentences=sentences)
    return CaseScores(prediction.uncertainty(), _alignment(prediction), _unit(pooled, model)), prediction


def _alignment(prediction: Prediction) -> float:
    """Mean over the classes that the model found: one that this scan does not show has nothing to agree with. Over all
    if it found none."""
    found = prediction.found()
    values = prediction.alignment[found] if found.any() else prediction.alignment
    return float(values.mean())


def _unit(pooled: _Pooled, model: BiPVLSeg) -> np.ndarray:
    if pooled.total is None:
        return np.zeros(model.vision.widths[-1], np.float32)
    vector = pooled.total / pooled.windows
    return torch.nn.functional.normalize(vector, dim=0).numpy()
