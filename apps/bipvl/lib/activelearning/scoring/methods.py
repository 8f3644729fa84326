"""Scoring methods, as MONAI Label calls them: in a process of their own (`POST /scoring/{method}`)."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from filelock import FileLock, Timeout

from lib.activelearning.scoring import cache
from lib.activelearning.scoring.forward import score_case
from lib.activelearning.scoring.turns import Turns
from lib.files import FINAL, ORIGINAL, now, write_json
from lib.infers import BiPVLInfer
from lib.infers.segmentation import GPU_WINDOWS
from lib.model.checkpoints import CheckpointError
from lib.options import Choice, OptionTable, Text
from lib.stores.dicom.archive import ArchiveError
from lib.tasks import Task
from lib.upstream import ScoringMethod, device_list, name_to_device
from lib.volumes.metrics import dice_of_classes
from lib.volumes.reading import align_label, read_volume
from lib.volumes.transforms import apply, load

logger = logging.getLogger(__name__)

ALL = "all"  # models
SERVER = "BIPVL_SERVER"  # the environment variable from which a scoring process knows the server that started it


class Orphaned(Exception):
    """The server that started this process is gone."""


class CaseScoring(ScoringMethod):
    """Entropy, alignment and V_4 of the datastore's cases by the served version, in one forward pass per case.

    Whatever the quantity it is called for, all three are kept in the image's info: a second method finds them there.
    Labelled cases and others take turns, in an order that depends on their names alone. Of the unlabelled ones at most
    `limit` are scored, so that a large archive is not downloaded for it.

    Args:
        quantity: `entropy` or `alignment`.
        infers: model to inference task.
        folder: for the file that says how far it is, and for two locks.
        limit: see above.
    """

    def __init__(self, quantity: str, infers: Mapping[str, BiPVLInfer], folder: Path, limit: int) -> None:
        super().__init__(f"{quantity.capitalize()} of every case by the served version, kept for Next Sample")
        self.options = case_options(infers)
        self.quantity, self.infers, self.limit = quantity, infers, limit
        self.progress = folder / "scoring.json"
        self.lock = folder / "scoring.lock"
        self.turns = Turns(folder / "requests.lock")

    def info(self) -> dict[str, Any]:
        return {**super().info(), "config": self.options.offer(), "progress": read_progress(self.progress)}

    def missing(self, datastore: Any, model: str) -> list[str]:
        """The cases that the served version of a model has not scored, in order; none if nothing is published."""
        version = self.infers[model].served()
        if not version:
            return []
        unlabelled = sorted(set(datastore.get_unlabeled_images()), key=_shuffled)[: self.limit]
        labelled = sorted(set(datastore.get_labeled_images()), key=_shuffled)
        pairs = chain.from_iterable(zip_longest(unlabelled, labelled))
        return [
            case
            for case in pairs
            if case is not None and cache.version_of(datastore.get_image_info(case), model) != version
        ]

    def __call__(self, request: dict[str, Any], datastore: Any) -> dict[str, Any]:
        """Score what is missing; `model` in the request names one model.

        Returns:
            Model → version, how many cases it has scored now and how many it could not.

        Raises:
            ValueError: an unknown model.
        """
        wanted = self.options.full(request)["model"]
        self.lock.parent.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(self.lock, timeout=0):
                return {name: self._fill(name, datastore) for name in self.infers if wanted in (ALL, name)}
        except Timeout:
            logger.info("Another process is scoring already")
            return {}

    def _fill(self, model: str, datastore: Any) -> dict[str, Any]:
        infer, parent = self.infers[model], os.getppid()
        server = int(os.environ.get(SERVER, parent))
        device = name_to_device(device_list()[0])

        def turn(*_: Any) -> None:
            """Before each case and each window."""
            if os.getppid() != parent or not psutil.pid_exists(server):  # the server may not be the parent itself
                raise Orphaned("the server that started this process is gone")
            self.turns.wait()

        counts = {"scored": 0, "failed": 0}
        served: int | None = None
        while served != infer.served():  # a version may be published meanwhile
            served = infer.served()
            todo, begun = self.missing(datastore, model), time.monotonic()
            if not todo:
                break
            version, network, task = infer.loaded(device)
            if version != served:
                raise CheckpointError(f"version {served} of {model} is served but cannot be read: nothing is scored")
            sentences = network.text.tokenize(task.text_rows())
            hook = network.register_forward_pre_hook(turn)
            try:
                for done, case in enumerate(todo):
                    if infer.served() != served:
                        break
                    turn()
                    info = datastore.get_image_info(case)
                    try:
                        image = apply(load(task, label=False), {"image": datastore.get_image_uri(case)})["image"]
                        batch = GPU_WINDOWS if device.startswith("cuda") else 1
                        scores, _ = score_case(network, image, task, sentences, batch)
                        news = cache.scored(info, model, version, scores)
                        counts["scored"] += 1
                    except (ArchiveError, torch.OutOfMemoryError, Orphaned):
                        raise  # says nothing about the case
                    except (ValueError, RuntimeError) as error:  # one bad case must not hold up the others
                        logger.warning("%s cannot be scored: %s", case, error)
                        news = cache.failed(info, model, version, str(error))
                        counts["failed"] += 1
                    datastore.update_image_info(case, news)
                    self._tell(model, version, done + 1, len(todo), time.monotonic() - begun)
            finally:
                hook.remove()
        return {"version": served, **counts}

    def _tell(self, model: str, version: int, done: int, total: int, seconds: float) -> None:
        left = round(seconds / done * (total - done))
        logger.info("Scored %d of %d cases with version %d of %s, %d s left", done, total, version, model, left)
        found = {"model": model, "version": version, "done": done, "total": total, "seconds_left": left, "at": now()}
        try:
            write_json(self.progress, found)
        except OSError as error:
            logger.warning("%s: %s", self.progress, error)


class DiceScoring(ScoringMethod):
    """Dice of a stored mask against the final label, class by class: how much annotators had to correct.

    A class counts if either shows it; if a label declares the classes it was drawn for, only those count.
    """

    def __init__(self, tasks: Mapping[str, Task]) -> None:
        super().__init__("Dice of each class between the final label and the model's stored mask (tag original)")
        self.options = dice_options(tasks)
        self.tasks = tasks

    def info(self) -> dict[str, Any]:
        return {**super().info(), "config": self.options.offer()}

    def __call__(self, request: dict[str, Any], datastore: Any) -> dict[str, dict[str, float]]:
        """Image → class → Dice, also kept in each image's info under `dice` (the mean) and `dice_of_classes`.

        Raises:
            ValueError: an unknown model.
        """
        asked = self.options.full(request)
        name, tags = asked["model"], (asked["y"], asked["y_pred"])
        result = {}
        for case, labels in _labelled(datastore, *tags):
            try:
                scores = _dice(datastore, self.tasks[name], case, labels, tags)
            except (ValueError, OSError) as error:
                logger.warning("%s cannot be scored: %s", case, error)
                continue
            if scores:
                mean = round(float(np.mean(list(scores.values()))), 6)
                datastore.update_image_info(case, {"dice": mean, "dice_of_classes": scores})
                logger.info("Dice of %s: %s", case, mean)
                result[case] = scores
        return result


def case_options(models: Iterable[str]) -> OptionTable:
    """The table of `POST /scoring/entropy` and `POST /scoring/alignment`."""
    return OptionTable(Choice("model", ALL, "whose version scores", choices=(ALL, *models), what="model"))


def dice_options(models: Iterable[str]) -> OptionTable:
    """The table of `POST /scoring/dice`."""
    names = tuple(models)
    return OptionTable(
        Choice("model", names[0], "whose classes count", "the first task", choices=names, what="model"),
        Text("y", FINAL, "the tag of the labels that are right"),
        Text("y_pred", ORIGINAL, "the tag of the masks that are scored"),
    )


def read_progress(path: Path) -> dict[str, Any] | None:
    """How far the scoring that ran last has come; None if none ran."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else None
    except (OSError, ValueError):
        return None


def scoring_methods(
    infers: Mapping[str, BiPVLInfer], tasks: Mapping[str, Task], folder: Path, limit: int
) -> dict[str, ScoringMethod]:
    """All methods by name."""
    methods: dict[str, ScoringMethod] = {q: CaseScoring(q, infers, folder, limit) for q in ("entropy", "alignment")}
    return {**methods, "dice": DiceScoring(tasks)}


def _shuffled(case: str) -> str:
    """Sorting by this mixes cases whose names follow the order of recording, and stays as it is when cases come."""
    return hashlib.sha256(case.encode()).hexdigest()


def _labelled(datastore: Any, *tags: str) -> Iterator[tuple[str, list[str]]]:
    """Images with labels of all these tags, and the labels' ids."""
    for case in datastore.list_images():
        labels = [datastore.get_label_by_image_id(case, tag) for tag in tags]
        if all(labels):
            yield case, labels


def _dice(datastore: Any, task: Task, case: str, labels: list[str], tags: tuple[str, str]) -> dict[str, float]:
    final, other = (read_volume(datastore.get_label_uri(label, tag)) for label, tag in zip(labels, tags, strict=True))
    scores = dice_of_classes(task, align_label(other, final).numpy()[0], final.numpy()[0], case)
    looked_for = task.annotated(datastore.get_label_info(labels[0], tags[0]).get("annotated"))
    counted = {name for name, counts in zip(task.classes, looked_for, strict=True) if counts}
    return {name: round(value, 6) for name, value in scores.items() if name in counted and not math.isnan(value)}
