"""Dice of a model on whole labelled volumes, for the publish gate and for cross-validation."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from monai.networks.utils import one_hot
from torch import Tensor

from lib.model.nets import BiPVLSeg
from lib.model.nets.heads import TextHead
from lib.model.nets.reading import Places
from lib.model.nets.text import Sentences
from lib.model.predict import Prediction, predict
from lib.model.reports.page import Examined
from lib.tasks import Task, TaskError
from lib.trainers.refiner.clicks import Robot
from lib.volumes.transforms import apply, load

logger = logging.getLogger(__name__)


@dataclass
class CaseScores:
    """Case id to class to Dice (`lib.trainers.gate.Scores`), and which classes the label of each case shows.

    unseen: Dice with wordings that the model was not trained on; empty if it read none.
    wordings: tells these wordings from others.
    """

    dice: dict[str, dict[str, float]] = field(default_factory=dict)
    shown: dict[str, list[str]] = field(default_factory=dict)
    unseen: dict[str, dict[str, float]] = field(default_factory=dict)
    wordings: str | None = None


def unseen_wordings(task: Task, own: Task) -> list[list[str]] | None:
    """The wordings that a task keeps aside, for a model to read in place of its own text.

    Args:
        task: whose wordings; it has all classes of `own`.
        own: what the model was trained for.

    Returns:
        C lists of K sentences, in the order of the model's classes. None if the task keeps none aside, or the model
        does not tell its classes by one sentence for each attribute.
    """
    reads = own.model.head == "text" and own.model.text_format == "concepts"
    return task.concepts.aside(own.classes) if reads else None


def score_cases(
    model: BiPVLSeg,
    task: Task,
    cases: Sequence[dict[Any, Any]],
    examined: Examined | None = None,
    robot: Robot | None = None,
    unseen: Sequence[Sequence[str]] | None = None,
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
        unseen: C lists of K sentences, with which each case is predicted once more, for `CaseScores.unseen`.
    """
    sentences = _tokenized(model, unseen) if unseen else None
    scores, was_training = CaseScores(wordings=sentences.key[:12] if sentences else None), model.training
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
        if sentences:
            del prediction, pred, label  # two predictions of one large volume may not fit into memory
            pred, label = _masks(predict(model, data["image"], task, sentences=sentences), task, data["label"])
            dice = dict(zip(task.classes, class_dice(pred, label), strict=True))
            scores.unseen[case["id"]] = {name: dice[name] for name in known}
    model.train(was_training)
    return scores


def find_places(model: BiPVLSeg, task: Task, cases: Sequence[dict[Any, Any]]) -> Places | None:
    """The mean decoder features of each class, where prediction and label agree; None for a fixed head, which reads
    nothing. Classes that no case shows have none.

    Args:
        cases: with `image` and `label`; a few are enough.
    """
    if not isinstance(model.head, TextHead):
        return None
    was_training, width = model.training, model.vision.feature_width
    model.eval()
    sums, counts = torch.zeros(len(task.classes), width, dtype=torch.float64), torch.zeros(len(task.classes))
    for case in cases:
        data = apply(load(task, label=True), {**case})
        prediction = predict(model, data["image"], task, keep_features=True)
        pred, label = _masks(prediction, task, data["label"])
        assert prediction.features is not None
        features = prediction.features.double().flatten(1)
        agreed = (pred * label).flatten(1)
        sums += agreed.double() @ features.T
        counts += agreed.sum(1)
    model.train(was_training)
    shown = counts > 0
    names = tuple(name for name, any_ in zip(task.classes, shown.tolist(), strict=True) if any_)
    return Places(names, (sums[shown] / counts[shown, None]).float())


def _tokenized(model: BiPVLSeg, rows: Sequence[Sequence[str]]) -> Sentences | None:
    """None for a wording that the model's text encoder cannot read: hours of training are not lost for it."""
    try:
        return model.text.tokenize([list(sentences) for sentences in rows])
    except TaskError as error:
        logger.error("No Dice with wordings that are kept aside: %s", error)
        return None


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
