"""What a server remembers of a person at an image, and how their clicks and scribbles are answered from it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from lib.infers.bipvl import BiPVLInfer
from lib.infers.images import Images, stamp
from lib.infers.models import Loaded
from lib.infers.work import Work
from lib.interaction.answer import REACH
from lib.interaction.boxes import Box
from lib.interaction.margins import META, Features, Margin, features_near, margins
from lib.interaction.memory import Change, Kept, Key, Memory, OutdatedError, Session
from lib.interaction.prompts import Prompts
from lib.interaction.respond import respond
from lib.model.predict import Prediction, Watch
from lib.model.refining import SETTINGS, Way, text_of_labels
from lib.stores.uploads.checks import check_label_file
from lib.stores.uploads.names import named_values, to_task_values, whole_numbers
from lib.tasks import Task
from lib.volumes.itk import LPS_TO_RAS
from lib.volumes.reading import align_label, read_volume

INSIDE, OUTSIDE = "foreground_scribbles", "background_scribbles"  # segments that 3D Slicer's panel paints on


class Interaction:
    """What the click task and the scribble task of one task share.

    Args:
        engine: whose versions answer.
        memory: of all tasks.
        images: likewise.
    """

    def __init__(self, engine: BiPVLInfer, memory: Memory, images: Images) -> None:
        self.engine, self.memory, self.images = engine, memory, images

    @property
    def task(self) -> Task:
        """The server's."""
        return self.engine.task

    def key(self, work: Work) -> Key:
        """Of the session."""
        return Key(work.person, work.image, self.task.name)

    def remember(
        self,
        work: Work,
        loaded: Loaded,
        task: Task,
        prediction: Prediction,
        meta: Mapping[str, Any],
        labels: np.ndarray,
    ) -> None:
        """Keep what a mask's own pass found, so that the first click need not compute it."""
        session = _session(loaded, task, prediction, meta, labels, "your last mask", work)
        self.memory.put(self.key(work), session)

    def state(self, work: Work) -> str | None:
        """What tells the mask that the server keeps from others; None if it keeps none."""
        session = self.memory.get(self.key(work))
        return session.state if session else None

    def session(
        self, work: Work, label: str, device: str, afresh: bool, state: str = "", watch: Watch | None = None
    ) -> tuple[Session, list[str]]:
        """The person's session, one that knows how sure the model was of the label; and warnings. A new one is kept by
        whoever asked for it, once it is of use.

        Raises:
            OutdatedError: it is not in this `state`, if one is named.
        """
        session, warnings = None if afresh else self.memory.get(self.key(work)), []
        if session and not self._shows_the_same(session, work):
            session = None
            warnings.append("the image's file has changed: the mask that the server kept was of another image")
        if state and (session is None or session.state != state):
            raise OutdatedError
        if session is None or label not in session.margins:
            started = self._start(work, device, session.version if session else None, afresh, watch)
            if session is not None:
                started.labels, started.origin, started.state = session.labels, session.origin, session.state
            session = started
        if (served := self.engine.served()) != session.version:
            warnings.append(
                f"version {served} has been published meanwhile: this image goes on with version {session.version}, "
                "which its mask came from; Auto Segmentation takes the new one"
            )
        return session, warnings

    def _start(self, work: Work, device: str, version: int | None, afresh: bool, watch: Watch | None) -> Session:
        """One pass of the model."""
        loaded, prediction, meta, labels = self.engine.predict(work.path, version, device, watch)
        origin = "the model's mask"
        if work.stored:
            self.engine.note_doubts(work.image, loaded.version, loaded.task, prediction, meta)
        if work.label is not None and not afresh:
            labels, origin = self._submitted(work.label, work.path), "the submitted label"
        session = _session(loaded, loaded.task, prediction, meta, labels, origin, work)
        session.shown = self.images.digest(work.path)
        return session

    def way(
        self, session: Session, wanted: str, work: Work, device: str, watch: Watch | None = None
    ) -> tuple[Way, list[str]]:
        """Which way the next prompts are answered; and warnings. If a refiner is to answer and the session lacks what
        it reads, the model runs once more.

        Args:
            wanted: one of `WAYS`, or anything else for the version's own.

        Raises:
            ValueError: a refiner is asked for, and the version has none.
        """
        trained = session.trained
        if trained is None:
            if wanted == "refiner":
                raise ValueError(f"answer_by: version {session.version} has no refiner; valid is evidence")
            return "evidence", []
        if wanted == "evidence" or (wanted != "refiner" and not trained.answers):
            return "evidence", []
        if session.features is None:
            loaded, prediction, _, _ = self.engine.predict(work.path, session.version, device, watch, True)
            if not session.keep(_features(loaded.task, prediction, session.margins)):
                return "evidence", ["the image is too large for the refiner: it is answered without it"]
        return "refiner", []

    def _shows_the_same(self, session: Session, work: Work) -> bool:
        """Whether the image is still what the model saw; another file may show the same voxels."""
        shown = self.images.digest(work.path)
        if not session.shown and session.file == stamp(work.path):
            session.shown = shown
        return session.shown == shown

    def keep(self, work: Work, session: Session) -> None:
        """Remember a session, in place of the one that there is."""
        if self.memory.get(self.key(work)) is not session:
            self.memory.put(self.key(work), session)

    def asked(self, person: str, image: str) -> list[dict[str, Any]]:
        """What a person prompted on an image since their last label, and what it changed, oldest first; to be kept with
        the next."""
        session = self.memory.get(Key(person, image, self.task.name))
        if session is None:
            return []
        with session.lock:
            return [{"task": self.task.name, **found.to_dict()} for found in session.history()]

    def submitted(self, work: Work) -> None:
        """Hear of a label that the person submitted: work goes on from it."""
        session = self.memory.get(self.key(work))
        if session is None:
            return
        with session.lock:
            session.submitted()
        if work.label is not None and self._shows_the_same(session, work):
            with session.lock:
                labels = self._submitted(work.label, work.path)
                if not np.array_equal(labels, session.labels.full()):
                    session.set(labels, "the submitted label")

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

    def map(self, file: Path, info: Any, work: Work) -> np.ndarray:
        """A label map without strokes, in the task's values.

        Raises:
            ValueError: another grid, or a label that nobody knows.
        """
        whole = whole_numbers(check_label_file(file, work.path, work.image).numpy())[0]
        return to_task_values(whole, named_values(info), self.task).astype(self._type)

    def to_voxels(self, work: Work) -> np.ndarray:
        """(4, 4), from DICOM's millimetres (LPS+) to voxels of the image."""
        return np.linalg.inv(LPS_TO_RAS @ self.images.get(work.path)[1])

    def answer(
        self,
        session: Session,
        label: str,
        labels: np.ndarray,
        prompts: Prompts,
        work: Work,
        limits: Box | None,
        way: Way,
        kept: np.ndarray | None = None,
    ) -> tuple[np.ndarray, Change]:
        """The new map."""
        image, affine = self.images.get(work.path)
        spacing = np.linalg.norm(affine[:3, :3], axis=0).tolist()
        margin = session.margins[label]
        value = self.task.label_values[label]
        known = lambda box: margin.on(session.meta, box)  # noqa: E731
        features, refine = None, None
        if way == "refiner":
            assert session.features is not None and session.trained is not None
            features = partial(session.features.on, session.meta)
            refine = session.trained.refine(session.features.text[label], spacing)
        given = (labels, value, image, spacing, prompts, SETTINGS[way])
        return respond(*given, known, features, limits, kept, refine)


def _session(
    loaded: Loaded,
    task: Task,
    prediction: Prediction,
    meta: Mapping[str, Any],
    labels: np.ndarray,
    origin: str,
    work: Work,
) -> Session:
    """What is kept of one pass of a model."""
    found = margins(prediction.probabilities, task)
    where = {key: meta[key] for key in META}
    session = Session(loaded.version, where, found, Kept(labels), origin, stamp(work.path))
    session.trained = loaded.refiner.trained if loaded.refiner else None
    if prediction.features is not None:
        session.keep(_features(task, prediction, found))
    return session


def _features(task: Task, prediction: Prediction, found: Mapping[str, Margin]) -> Features:
    assert prediction.features is not None and prediction.text is not None
    text = text_of_labels(prediction.text, task)
    return features_near(prediction.features, text, found, task.spacing, REACH)
