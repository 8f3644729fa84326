"""A second look at saved labels: the classes whose drawn masks fit their sentences least come first."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from lib.infers.explain import agreement
from lib.model.nets import BiPVLSeg
from lib.model.predict import predict
from lib.stores.cases import audit
from lib.tasks import Task
from lib.volumes.transforms import apply, load


def check_labels(model: BiPVLSeg, task: Task, cases: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Compare labels with what the network finds in their images, one forward pass per case.

    Args:
        model: in evaluation mode.
        task: its classes.
        cases: labelled (`lib.stores.cases`).

    Returns:
        `masks`: `image`, `class`, `agreement` and `fit` (see `lib.infers.explain.agreement`) of each drawn class, least
        agreement first. Classes that a label was not drawn for, or does not show, are left out. `problems`: why a
        label could not be judged, by image.
    """
    masks: list[dict[str, Any]] = []
    problems: dict[str, str] = {}
    for case in cases:
        found = audit(task, [case], voxels=False).cases[0]
        if found.problem:
            problems[found.case["id"]] = found.problem
            continue
        try:
            masks += [{"image": found.case["id"], **entry} for entry in _of_case(model, task, dict(found.case))]
        except ValueError as error:  # an image whose voxels cannot be used
            problems[found.case["id"]] = str(error)
    return {"masks": sorted(masks, key=lambda entry: entry["agreement"]), "problems": problems}


def _of_case(model: BiPVLSeg, task: Task, case: dict[Any, Any]) -> list[dict[str, Any]]:
    data = apply(load(task, label=True), case)
    label = data["label"].as_tensor()
    drawn = label > 0 if task.overlapping else label == torch.arange(1, 1 + len(task.classes)).view(-1, 1, 1, 1)
    prediction = predict(model, data["image"], task)
    judged = agreement.agreement(prediction.probabilities, list(drawn), task.overlapping, task.spacing)
    known = data["annotated"].tolist()
    return [
        {"class": name, "agreement": round(value.agreement, 4), "fit": round(value.fit, 4)}
        for name, value, is_known in zip(task.classes, judged, known, strict=True)
        if value is not None and is_known
    ]
