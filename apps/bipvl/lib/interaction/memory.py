"""What the server remembers of people at work: their mask as it is, how sure the model was, and what each label's
clicks changed. Bounded, and forgotten after a while: it costs one pass of the model to have it again."""

from __future__ import annotations

import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from lib.interaction import boxes
from lib.interaction.answer import Refine
from lib.interaction.boxes import Box
from lib.interaction.margins import Features, Margin
from lib.interaction.prompts import Asked, Prompts

SESSION_BYTES = 256 * 2**20  # of one session at most: one that needs more is refused
BYTES = 2**30  # of all sessions together: the least recently used are forgotten first
SECONDS = 8 * 3600.0  # without use, after which one is forgotten
ASKED = 30  # answers of one session that are kept with its label, the latest


Point = tuple[bool, int, int, int]  # whether it belongs to the label; its voxel


class OutdatedError(ValueError):
    """A client speaks of a mask that the server has not (any more)."""

    def __init__(self) -> None:
        super().__init__("mask_state: the server keeps another mask of this image, or none any more; send yours along")


class Key(NamedTuple):
    """Whose work on what."""

    person: str
    image: str
    task: str


@dataclass(frozen=True)
class Change:
    """What the clicks on one label changed: the map's values in a box, before and after."""

    box: Box
    before: np.ndarray
    after: np.ndarray


@dataclass(frozen=True)
class Trained:
    """The refiner of the version that a session began with.

    refine: what it adds to a margin, from a label's text vector (P,) and mm per voxel.
    answers: whether it answers unless a request asks for the other way.
    """

    refine: Callable[[Tensor, Sequence[float]], Refine]
    answers: bool


class Kept:
    """A label map in memory: the box that holds its labels."""

    def __init__(self, labels: np.ndarray) -> None:
        self.shape = labels.shape
        self.box = boxes.of_change(labels > 0)
        self.part = labels[self.box].copy()

    def full(self) -> np.ndarray:
        """The whole map, a new one."""
        labels = np.zeros(self.shape, self.part.dtype)
        labels[self.box] = self.part
        return labels


@dataclass
class Session:
    """One person's work on one image.

    version: of the model that it began with.
    meta: `affine` of the network's grid, `original_affine`, `spatial_shape`.
    margins: of each label.
    origin: where its mask came from, for the answer.
    file: what told the image's file from others when the model saw it.
    shown: what tells the image's voxels from others; empty until somebody clicks.
    changes: what the present clicks on each label changed.
    points: the present clicks on each label; done: those from before the map was drawn, which it has obeyed already
        though clients go on sending them.
    limits: the box that the present clicks are answered in.
    asked: the answer to the present clicks on each label; settled: those from before, oldest first.
    state: tells this mask from all others.
    trained: the version's refiner, None if it has none; features: what that reads, None until it is needed.
    """

    version: int
    meta: Mapping[str, Any]
    margins: Mapping[str, Margin]
    labels: Kept
    origin: str
    file: tuple[Any, ...] = ()
    shown: str = ""
    changes: dict[str, Change] = field(default_factory=dict)
    points: dict[str, set[Point]] = field(default_factory=dict)
    done: dict[str, set[Point]] = field(default_factory=dict)
    limits: Box | None = None
    asked: dict[str, Asked] = field(default_factory=dict)
    settled: list[Asked] = field(default_factory=list)
    state: str = field(default_factory=lambda: secrets.token_hex(8))
    trained: Trained | None = None
    features: Features | None = None
    lock: threading.RLock = field(default_factory=threading.RLock)
    used: float = field(default_factory=time.monotonic)

    @property
    def nbytes(self) -> int:
        changes = sum(c.before.nbytes + c.after.nbytes for c in self.changes.values())
        features = self.features.nbytes if self.features else 0
        return self.labels.part.nbytes + sum(m.nbytes for m in self.margins.values()) + changes + features

    def keep(self, features: Features) -> bool:
        """Keep what the refiner reads; False if a session has no room for it."""
        fits = self.features is not None or self.nbytes + features.nbytes <= SESSION_BYTES
        if fits:
            self.features = features
        return fits

    def without(self, label: str) -> np.ndarray:
        """The label map without what the clicks on a label changed; voxels that have changed since stay."""
        labels = self.labels.full()
        if change := self.changes.get(label):
            part = labels[change.box]
            part[...] = np.where((change.before != change.after) & (part == change.after), change.before, part)
        return labels

    def set(self, labels: np.ndarray, origin: str) -> None:
        """Take over a map that somebody drew: clicks from before count as done."""
        self.labels, self.origin, self.state = Kept(labels), origin, secrets.token_hex(8)
        self.changes.clear()
        self.settled = [*self.settled, *self.asked.values()][-ASKED:]
        self.asked.clear()
        for label, points in self.points.items():
            self.done.setdefault(label, set()).update(points)
        self.points.clear()

    def begin(self, labels: np.ndarray, origin: str) -> None:
        """Take over a map from which a client starts anew: it sends no click of before again, and the same voxel again
        means a new click."""
        self.set(labels, origin)
        self.done.clear()

    def change(self, label: str, labels: np.ndarray, change: Change | None) -> None:
        """Take over the answer to the clicks on one label; without a change, they were all taken back."""
        self.labels, self.state = Kept(labels), secrets.token_hex(8)
        if change:
            self.changes[label] = change
        else:
            self.changes.pop(label, None)
            self.asked.pop(label, None)

    def history(self) -> list[Asked]:
        """What was asked since the last label was submitted, oldest first."""
        return [*self.settled, *self.asked.values()][-ASKED:]

    def submitted(self) -> None:
        """What was asked belongs to a label now."""
        self.settled.clear()
        self.asked.clear()

    def fresh(self, label: str, prompts: Prompts) -> Prompts:
        """Those of a label's prompts that no drawn map has obeyed already; remembers all of them."""
        kinds = ((True, prompts.inside), (False, prompts.outside))
        given = {(kind, *point): point for kind, points in kinds for point in points.tolist()}
        self.points[label] = set(given)  # type: ignore[arg-type]
        new = [key for key in given if key not in self.done.get(label, ())]
        inside, outside = (
            np.array([given[key] for key in new if key[0] is kind], np.int64).reshape(-1, 3) for kind in (True, False)
        )
        return Prompts(inside, outside)


class Memory:
    """The sessions of a server. Safe to use from several threads.

    Args:
        limit: bytes of all sessions together.
        seconds: without use, after which one is forgotten.
    """

    def __init__(self, limit: int = BYTES, seconds: float = SECONDS) -> None:
        self._limit, self._seconds = limit, seconds
        self._sessions: OrderedDict[Key, Session] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Key) -> Session | None:
        """The session, None if there is none (any more)."""
        with self._lock:
            self._clear()
            if found := self._sessions.get(key):
                found.used = time.monotonic()
                self._sessions.move_to_end(key)
            return found

    def put(self, key: Key, session: Session) -> None:
        """Remember a session, in place of the one that there is.

        Raises:
            ValueError: it needs more memory than one may.
        """
        if session.nbytes > SESSION_BYTES:
            size = session.nbytes / 2**20
            raise ValueError(f"{key.image}: clicks need {size:.0f} MB of memory; valid are {SESSION_BYTES >> 20} MB")
        with self._lock:
            self._sessions[key] = session
            self._sessions.move_to_end(key)
            self._clear()

    def forget(self, image: str) -> None:
        """Drop what is known of an image, of everybody."""
        with self._lock:
            for key in [key for key in self._sessions if key.image == image]:
                del self._sessions[key]

    def __len__(self) -> int:
        with self._lock:
            return len(self._sessions)

    def _clear(self) -> None:
        now = time.monotonic()
        for key in [key for key, session in self._sessions.items() if now - session.used > self._seconds]:
            del self._sessions[key]
        size = sum(session.nbytes for session in self._sessions.values())
        while size > self._limit and len(self._sessions) > 1:
            size -= self._sessions.popitem(last=False)[1].nbytes
