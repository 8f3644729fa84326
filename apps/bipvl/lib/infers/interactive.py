"""Clicks and scribbles of a person on an image: each is answered from what one pass of the model left behind."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lib.files import temporary_file
from lib.infers.options import click_options, scribble_options
from lib.infers.segmentation import label_info
from lib.infers.sessions import Interaction
from lib.infers.work import Work
from lib.interaction import boxes
from lib.interaction.boxes import Box
from lib.interaction.memory import OutdatedError, Session
from lib.interaction.prompts import Asked, Prompts
from lib.model.predict import Watch
from lib.model.refining import Way
from lib.options import OptionTable
from lib.tasks import Task
from lib.upstream import InferInterface, InferType, device_list
from lib.volumes.masks import write_mask


class InteractiveInfer(InferInterface):
    """An inference task of people's clicks or scribbles, over the versions of another one."""

    KIND: InferType
    SUFFIX: str

    def __init__(self, interaction: Interaction) -> None:
        self.interaction = interaction
        task = interaction.task
        super().__init__(self.KIND, task.label_values, 3, f"{task.description}: {self.SUFFIX}")

    @property
    def task(self) -> Task:
        """The server's."""
        return self.interaction.task

    @property
    @abstractmethod
    def options(self) -> OptionTable:
        """What a request may ask for."""

    def is_valid(self) -> bool:
        return True

    def get_path(self, validate: bool = True) -> str | None:
        return self.interaction.engine.get_path()

    def config(self) -> dict[str, Any]:
        return self.options.offer()

    def info(self) -> dict[str, Any]:
        return {**super().info(), "labels": self.labels, "label_info": label_info(self.task)}

    def __call__(self, request: dict[str, Any], callbacks: dict | None = None) -> tuple[str | None, dict[str, Any]]:
        raise TypeError("clicks and scribbles belong to a person at an image: call respond")

    def respond(
        self, request: Mapping[str, Any], work: Work, watch: Watch | None = None
    ) -> tuple[Path, dict[str, Any]]:
        """Answer one request.

        Args:
            request: options as clients send them; `map`, the path of the label map that came with it.
            work: whose, on what.
            watch: told how a pass of the model goes, if one is needed.

        Returns:
            A temporary file with the mask, and what the answer says.

        Raises:
            ValueError: something that cannot be used; nothing has changed.
        """
        start = time.perf_counter()
        given = self.options.full(request)
        given["device"] = given["device"] or device_list()[0]
        label = self._label(given)
        state = "" if given.get("map") else given.get("mask_state", "")
        afresh = bool(given.get("reset_state"))
        session, warnings = self.interaction.session(work, label, given["device"], afresh, state, watch)
        way, said = self.interaction.way(session, given["answer_by"], work, given["device"], watch)
        warnings += said
        ready = time.perf_counter()
        with session.lock:
            if state and session.state != state:
                raise OutdatedError
            before, after, origin, said = self._answer(session, label, given, work, way)
            self.interaction.keep(work, session)
            state = session.state
        moved = before != after
        box = boxes.of_change(moved) if given["box"] else None
        answered = time.perf_counter()
        file = self._write(after, label, given, work, box)
        result = {
            "label": label,
            "label_names": {label: 1} if box is None else self.labels,
            "mask_state": state,
            "box": None if box is None else [[part.start, part.stop - 1] for part in box],
            "label_info": label_info(self.task),
            "model_version": session.version,
            "mask_from": origin,
            "answered_by": way,
            "changed": int(moved.sum()),
            "latencies": {
                "model": round(ready - start, 3),
                "answer": round(answered - ready, 3),
                "file": round(time.perf_counter() - answered, 3),
            },
            "warnings": warnings + said,
        }
        return file, result

    @abstractmethod
    def _label(self, given: Mapping[str, Any]) -> str:
        """The label that a request is about."""

    @abstractmethod
    def _answer(
        self, session: Session, label: str, given: Mapping[str, Any], work: Work, way: Way
    ) -> tuple[np.ndarray, np.ndarray, str, list[str]]:
        """The map before and after, where the one before came from, and warnings."""

    @staticmethod
    def _near(prompts: Prompts, limits: Box | None) -> tuple[Prompts, list[str]]:
        """The prompts that are answered, and a warning if some are not."""
        near = prompts if limits is None else prompts.within(limits)
        beside = len(prompts) - len(near)
        return near, [f"roi: {beside} of {len(prompts)} voxels lie outside of the box: they change nothing"] * bool(
            beside
        )

    def _write(self, labels: np.ndarray, label: str, given: Mapping[str, Any], work: Work, box: Box | None) -> Path:
        """The answer as its client expects it: the label alone, as value 1. A `.seg.nrrd` replaces all segments of a
        scene, so that one holds all of them, and so does a part of the map."""
        source = str(work.path)
        suffix = given.get("result_extension") or ".nii.gz"
        _, affine = self.interaction.images.get(work.path)
        with temporary_file(suffix) as path:
            if box is not None:
                moved = affine.copy()
                moved[:3, 3] += affine[:3, :3] @ boxes.corner(box)
                write_mask(path, labels[box], moved, "", self.task.labels)
            elif suffix == ".seg.nrrd":
                write_mask(path, labels, affine, source, self.task.labels)
            else:
                mask = (labels == self.task.label_values[label]).astype(np.uint8)
                write_mask(path, mask, affine, source, {label: self.task.labels[label].model_copy(update={"value": 1})})
        return path


class ClickInfer(InteractiveInfer):
    """Points: 3D Slicer's deepgrow panel sends all points of a label with each click."""

    KIND = InferType.DEEPGROW
    SUFFIX = "clicks"

    @property
    def options(self) -> OptionTable:
        return click_options(self.task)

    def _label(self, given: Mapping[str, Any]) -> str:
        if not given["label"]:
            raise ValueError(
                f"label: expected the label that the points are about; valid are {', '.join(self.task.labels)}"
            )
        return given["label"]

    def _answer(
        self, session: Session, label: str, given: Mapping[str, Any], work: Work, way: Way
    ) -> tuple[np.ndarray, np.ndarray, str, list[str]]:
        shape = session.labels.shape
        to_voxels = self.interaction.to_voxels(work) if given["space"] == "lps" else None
        prompts = Prompts.of_points(given["foreground"], given["background"], shape, to_voxels)
        limits = boxes.of_numbers(given["roi"], shape, to_voxels)
        kept = Prompts.voxels("kept", given["kept"], shape, to_voxels)
        if given.get("map") is not None:
            drawn = self.interaction.map(Path(given["map"]), given["label_info"], work)
            session.begin(drawn, "the map that came with it")
        elif given["settled"]:
            session.begin(session.labels.full(), session.origin)
        elif limits != session.limits:  # what was answered within another box, or none, stays
            session.set(session.labels.full(), session.origin)
        session.limits = limits
        before, start = session.labels.full(), session.without(label)
        prompts, said = self._near(session.fresh(label, prompts), limits)
        if not len(prompts):  # all points were taken away again
            session.change(label, start, None)
            return before, start, session.origin, said
        after, change = self.interaction.answer(session, label, start, prompts, work, limits, way, kept)
        session.change(label, after, change)
        session.asked[label] = _asked(session, label, self.SUFFIX, way, prompts, start != after)
        return before, after, session.origin, said


class ScribbleInfer(InteractiveInfer):
    """Strokes in a label map of all segments: the map says how the mask is now."""

    KIND = InferType.SCRIBBLES
    SUFFIX = "scribbles"

    @property
    def options(self) -> OptionTable:
        return scribble_options(self.task)

    def _label(self, given: Mapping[str, Any]) -> str:
        if not given["selected_label_name"]:
            valid = ", ".join(self.task.labels)
            raise ValueError(f"selected_label_name: expected the label that the strokes are about; valid are {valid}")
        return given["selected_label_name"]

    def _answer(
        self, session: Session, label: str, given: Mapping[str, Any], work: Work, way: Way
    ) -> tuple[np.ndarray, np.ndarray, str, list[str]]:
        if given.get("map") is None:
            raise ValueError("label: expected the label map with the strokes, as a file; got none")
        limits = boxes.of_numbers(given["roi"], session.labels.shape)
        drawn, prompts = self.interaction.drawn(Path(given["map"]), given["label_info"], work)
        known = session.labels.full()
        under = np.zeros(drawn.shape, bool)
        under[tuple(prompts.all.T)] = True
        drawn[under] = known[under]  # what a stroke hides is as it was
        origin = "the map with the scribbles"
        session.set(drawn, origin)
        prompts, said = self._near(prompts, limits)
        if not len(prompts):
            return drawn, drawn, origin, said or ["no stroke is in the label map: nothing is changed"]
        after, _ = self.interaction.answer(session, label, drawn, prompts, work, limits, way)
        session.asked[label] = _asked(session, label, self.SUFFIX, way, prompts, drawn != after)
        session.set(after, "your last scribbles")
        return drawn, after, origin, said


def _asked(session: Session, label: str, kind: str, way: Way, prompts: Prompts, moved: np.ndarray) -> Asked:
    """An answer as it will be kept with the label."""
    box = tuple((part.start, part.stop - 1) for part in boxes.of_change(moved)) if moved.any() else None
    return Asked(label, kind, session.version, way, prompts, box, int(moved.sum()))
