"""Dice of a model on whole labelled volumes, for the publish gate and for cross-validation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from monai.networks.utils import one_hot
from torch import Tensor

from lib.model.nets import BiPVLSeg
from lib.model.predict import Prediction, predict
from lib.model.reports.page import Examined
from lib.tasks import Task
from lib.trainers.refiner.clicks import Robot
from lib.volumes.transforms import apply, load


@dataclass
class CaseScores:
    """Case id to class to Dice (`lib.trainers.gate.Scores`), and which classes the label of each case shows."""

    dice: dict[str, dict[str, float]] = field(default_factory=dict)
    shown: dict[str, list[str]] = field(default_factory=dict)


def score_cases(
    model: BiPVLSeg,
    task: Task,
    cases: Sequence[dict[Any, Any]],
    examined: Examined | None = None,
    robot: Robot | None = None,
) -> CaseScores:
    """Score a model on whole volumes, on the grid of its own task.

    Dice is 1 if prediction and label are both empty and 0 if only one of them is. Classes that a label was not
    annotated for are left out.

    Args:
        model: on the device to use.
        task: the task that the model was trained for.
        cases: with `id`, `image`, `label` and, if a label is partial, `annotated`.
        examined: is told of every case.
        robot: corrects some of them.
    """
    scores, was_training = CaseScores(), model.training
    model.eval()
    for case in cases:
        data = apply(load(task, label=True), {**case})
        features = robot is not None and robot.needs_features
        prediction = predict(model, data["image"], task, keep_features=features)
        pred, label = _masks(prediction, task, data["label"])
        if examined:
            examined.prediction(data, prediction, pred, label)
        if robot:
            robot.prediction(task, case, data["image"], prediction)
        known = [name for name, declared in zip(task.classes, data["annotated"].tolist(), strict=True) if declared]
        dice = dict(zip(task.classes, class_dice(pred, label), strict=True))
        voxels = dict(zip(task.classes, label.flatten(1).sum(1).tolist(), strict=True))
        scores.dice[case["id"]] = {name: dice[name] for name in known}
        scores.shown[case["id"]] = [name for name in known if voxels[name]]
    model.train(was_training)
    return scores


def masks(model: BiPVLSeg, task: Task, image: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """Predicted and true masks (C, h, w, d) of one preprocessed volume, 0 or 1, on the CPU."""
    return _masks(predict(model, image, task), task, label)


def _masks(prediction: Prediction, task: Task, label: Tensor) -> tuple[Tensor, Tensor]:
    probabilities = prediction.probabilities.cpu()
    label = torch.as_tensor(label).as_subclass(torch.Tensor).cpu()
    if task.overlapping:
        return (probabilities > 0.5).float(), label.float()
    channels = task.out_channels
    pred = one_hot(probabilities.argmax(0, keepdim=True), channels, dim=0)
    return pred[1:], one_hot(label, channels, dim=0)[1:]


def class_dice(pred: Tensor, label: Tensor) -> list[float]:
    """Dice of each channel of two masks (C, …): 1 if both are empty, 0 if one is."""
    pred, label = pred.flatten(1).double(), label.flatten(1).double()
    overlap, total = 2 * (pred * label).sum(1), pred.sum(1) + label.sum(1)
    return torch.where(total > 0, overlap / total.clamp_min(1), torch.ones_like(total)).tolist()
