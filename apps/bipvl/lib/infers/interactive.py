"""Clicks and scribbles of a person on an image: each is answered from what one pass of the model left behind."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lib.files import temporary_file
from lib.infers.bipvl import BiPVLInfer
from lib.infers.options import click_options, scribble_options
from lib.infers.segmentation import label_info
from lib.interaction.answer import Settings
from lib.interaction.margins import margins
from lib.interaction.memory import Change, Kept, Key, Memory, Session
from lib.interaction.prompts import Prompts
from lib.interaction.respond import respond
from lib.model.predict import Prediction
from lib.options import OptionTable
from lib.stores.uploads.checks import check_label_file
from lib.stores.uploads.names import named_values, to_task_values, whole_numbers
from lib.tasks import Task
from lib.upstream import InferInterface, InferType, device_list
from lib.volumes.masks import write_mask
from lib.volumes.reading import align_label, read_volume

INSIDE, OUTSIDE = "foreground_scribbles", "background_scribbles"  # segments that 3D Slicer's panel paints on
IMAGE_BYTES = 512 * 2**20  # of images kept in memory; the last one stays in any case
META = ("affine", "original_affine", "spatial_shape")


@dataclass(frozen=True)
class Work:
    """What a person works on.

    label: the image's last submitted label of the person's own or anybody's, if there is one.
    """

    person: str
    image: str
    path: Path
    label: Path | None = None


class Images:
    """The images that people click on, as their files hold them: reading one takes longer than an answer."""

    def __init__(self, limit: int = IMAGE_BYTES) -> None:
        self._limit = limit
        self._kept: OrderedDict[tuple[Any, ...], tuple[np.ndarray, np.ndarray]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, path: Path) -> tuple[np.ndarray, np.ndarray]:
        """Intensities (channels, H, W, D) in half precision, and the affine (4, 4) from voxels to mm (RAS+)."""
        stat = path.stat()
        key = (str(path), stat.st_ino, stat.st_size, stat.st_mtime_ns)
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        volume = read_volume(path)
        values = volume.numpy()
        most = float(np.abs(values).max()) or 1.0
        found = (values / most * 1000).astype(np.float16), volume.affine.numpy()
        with self._lock:
            self._kept[key] = found
            while len(self._kept) > 1 and sum(image.nbytes for image, _ in self._kept.values()) > self._limit:
                self._kept.popitem(last=False)
        return found


class Interaction:
    """What the click task and the scribble task of one task share.

    Args:
        engine: whose versions answer.
        memory: of all tasks.
        images: likewise.
        settings: of the answer.
    """

    def __init__(self, engine: BiPVLInfer, memory: Memory, images: Images, settings: Settings | None = None) -> None:
        self.engine, self.memory, self.images = engine, memory, images
        self.settings = settings or Settings()

    @property
    def task(self) -> Task:
        """The server's."""
        return self.engine.task

    def key(self, work: Work) -> Key:
        """Of the session."""
        return Key(work.person, work.image, self.task.name)

    def remember(
        self, work: Work, version: int, task: Task, prediction: Prediction, meta: Mapping[str, Any], labels: np.ndarray
    ) -> None:
        """Keep what a mask's own pass found, so that the first click need not compute it."""
        kept = {key: meta[key] for key in META}
        session = Session(version, kept, margins(prediction.probabilities, task), Kept(labels), "your last mask")
        self.memory.put(self.key(work), session)

    def session(self, work: Work, label: str, device: str, afresh: bool) -> tuple[Session, list[str]]:
        """The person's session, one that knows how sure the model was of the label; and warnings."""
        session = None if afresh else self.memory.get(self.key(work))
        warnings = []
        if session is None or label not in session.margins:
            started = self._start(work, device, session.version if session else None, afresh)
            if session is not None:
                started.labels, started.origin = session.labels, session.origin
            session = started
            self.memory.put(self.key(work), session)
        if (served := self.engine.served()) != session.version:
            warnings.append(
                f"version {served} has been published meanwhile: this image goes on with version {session.version}, "
                "which its mask came from; Auto Segmentation takes the new one"
            )
        return session, warnings

    def _start(self, work: Work, device: str, version: int | None, afresh: bool) -> Session:
        """One pass of the model."""
        loaded, prediction, meta, labels = self.engine.predict(work.path, version, device)
        origin = "the model's mask"
        if work.label is not None and not afresh:
            labels, origin = self._submitted(work.label, work.path), "the submitted label"
        found = margins(prediction.probabilities, loaded.task)
        return Session(loaded.version, {key: meta[key] for key in META}, found, Kept(labels), origin)

    def submitted(self, work: Work) -> None:
        """Hear of a label that the person submitted: work goes on from it."""
        session = self.memory.get(self.key(work))
        if session is not None and work.label is not None:
            with session.lock:
                session.set(self._submitted(work.label, work.path), "the submitted label")

    def _submitted(self, label: Path, image: Path) -> np.ndarray:
        volume = align_label(read_volume(label), read_volume(image))
        return to_task_values(whole_numbers(volume.numpy()[0]), None, self.task).astype(self._type)

    @property
    def _type(self) -> type[np.generic]:
        return np.uint8 if max(self.task.label_values.values()) <= 255 else np.uint16

    def drawn(self, file: Path, info: Any, work: Work) -> tuple[np.ndarray, Prompts]:
        """A label map with strokes in it, as 3D Slicer sends it: the map without them in the task's values (a voxel
        under a stroke is unknown to it: 0), and the strokes.

        Raises:
            ValueError: another grid, or segments that nobody knows.
        """
        names = named_values(info)
        if not names:
            raise ValueError("label_info: expected `name` and `id` of each segment of the label map; got none")
        whole = whole_numbers(check_label_file(file, work.path, work.image).numpy())[0]
        strokes = {name: [value for value, given in names.items() if given == name] for name in (INSIDE, OUTSIDE)}
        inside, outside = (np.isin(whole, strokes[name]) for name in (INSIDE, OUTSIDE))
        plain = np.where(inside | outside, 0, whole).astype(np.uint16)
        others = {value: name for value, name in names.items() if name not in strokes}
        return to_task_values(plain, others, self.task).astype(self._type), Prompts.of_maps(inside, outside)

    def answer(
        self, session: Session, label: str, labels: np.ndarray, prompts: Prompts, work: Work
    ) -> tuple[np.ndarray, Change]:
        """The new map."""
        image, affine = self.images.get(work.path)
        spacing = np.linalg.norm(affine[:3, :3], axis=0).tolist()
        margin = session.margins[label]
        value = self.task.label_values[label]
        return respond(labels, value, image, spacing, prompts, self.settings, lambda box: margin.on(session.meta, box))


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
    def options(self) -> OptionTable:
        """What a request may ask for."""
        raise NotImplementedError

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

    def respond(self, request: Mapping[str, Any], work: Work) -> tuple[Path, dict[str, Any]]:
        """Answer one request.

        Args:
            request: options as clients send them; `map`, the path of the label map that came with it.
            work: whose, on what.

        Returns:
            A temporary file with the mask, and what the answer says.

        Raises:
            ValueError: something that cannot be used; nothing has changed.
        """
        start = time.perf_counter()
        given = self.options.full(request)
        given["device"] = given["device"] or device_list()[0]
        label = self._label(given)
        session, warnings = self.interaction.session(work, label, given["device"], bool(given.get("reset_state")))
        ready = time.perf_counter()
        with session.lock:
            before, after, origin, said = self._answer(session, label, given, work)
            file = self._write(after, label, given, work)
        moved = before != after
        result = {
            "label": label,
            "label_names": {label: 1},
            "label_info": label_info(self.task),
            "model_version": session.version,
            "mask_from": origin,
            "changed": int(moved.sum()),
            "latencies": {
                "model": round(ready - start, 3),
                "answer": round(time.perf_counter() - ready, 3),
            },
            "warnings": warnings + said,
        }
        return file, result

    def _label(self, given: Mapping[str, Any]) -> str:
        raise NotImplementedError

    def _answer(
        self, session: Session, label: str, given: Mapping[str, Any], work: Work
    ) -> tuple[np.ndarray, np.ndarray, str, list[str]]:
        """The map before and after, where the one before came from, and warnings."""
        raise NotImplementedError

    def _write(self, labels: np.ndarray, label: str, given: Mapping[str, Any], work: Work) -> Path:
        """The answer as its client expects it: the label alone, as value 1. A `.seg.nrrd` replaces all segments of a
        scene, so that one holds all of them."""
        source = str(work.path)
        suffix = given.get("result_extension") or ".nii.gz"
        _, affine = self.interaction.images.get(work.path)
        with temporary_file(suffix) as path:
            if suffix == ".seg.nrrd":
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
        self, session: Session, label: str, given: Mapping[str, Any], work: Work
    ) -> tuple[np.ndarray, np.ndarray, str, list[str]]:
        before = session.labels.full()
        prompts = Prompts.of_points(given["foreground"], given["background"], before.shape)
        start = session.without(label)
        prompts = session.fresh(label, prompts)
        if not len(prompts):  # all points were taken away again
            session.change(label, start, None)
            return before, start, session.origin, []
        after, change = self.interaction.answer(session, label, start, prompts, work)
        session.change(label, after, change)
        return before, after, session.origin, []


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
        self, session: Session, label: str, given: Mapping[str, Any], work: Work
    ) -> tuple[np.ndarray, np.ndarray, str, list[str]]:
        if given.get("map") is None:
            raise ValueError("label: expected the label map with the strokes, as a file; got none")
        drawn, prompts = self.interaction.drawn(Path(given["map"]), given["label_info"], work)
        known = session.labels.full()
        under = np.zeros(drawn.shape, bool)
        under[tuple(prompts.all.T)] = True
        drawn[under] = known[under]  # what a stroke hides is as it was
        origin = "the map with the scribbles"
        session.set(drawn, origin)
        if not len(prompts):
            return drawn, drawn, origin, ["no stroke is in the label map: nothing is changed"]
        after, _ = self.interaction.answer(session, label, drawn, prompts, work)
        session.set(after, "your last scribbles")
        return drawn, after, origin, []
