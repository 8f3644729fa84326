"""When scores are filled without anybody asking: after the start, after each publish or rollback, and when cases come.

The work itself is a scoring task like one that a client starts, in a process of its own, so that the server goes on
answering. It never runs beside a training round, whose version would make the scores old: it is stopped and goes on
afterwards, which costs one case at most.
"""

from __future__ import annotations

import logging
import threading
import time
from typing import Any

from lib.activelearning.scoring.methods import CaseScoring
from lib.stores.locks import Lock, Order
from lib.upstream import is_running, start_task, stop_task, tasks_of

logger = logging.getLogger(__name__)

METHOD = "entropy"  # fills everything
LOOK_SECONDS = 5.0
RETRY_SECONDS = 900.0  # after a failure that a look at the cases cannot explain, such as an archive that is down


class Background:
    """A thread that starts scoring tasks and stops its own if they are in the way.

    Args:
        method: what is missing, and of which versions.
        datastore: the server's.
    """

    def __init__(self, method: CaseScoring, datastore: Any) -> None:
        self._method, self._datastore = method, datastore
        self._lock = Lock(Order.BACKGROUND, "scoring in the background")
        self._due = True
        self._seen: dict[str, int] = {}
        self._own: dict[str, Any] | None = None  # the task that was started last
        self._paused = False  # that task was stopped by us
        self._retry = 0.0  # not before, on a monotonic clock

    def start(self) -> None:
        threading.Thread(target=self._run, name="scoring", daemon=True).start()

    def wake(self) -> None:
        """Cases may have come or been labelled. Waits for nothing: somebody's request is being answered."""
        self._due = True

    def give_way(self) -> None:
        """Stop the own task, if it runs, for somebody who starts a task; it goes on later."""
        with self._lock:
            if self._own is not None and is_running(self._own):
                self._paused = self._due = True
                stop_task("scoring")

    def look(self) -> None:
        """Start what is due, if nothing stands in the way."""
        with self._lock:
            served = {model: infer.served() for model, infer in self._method.infers.items()}
            if served != self._seen:
                self._seen, self._due, self._retry = served, True, 0.0
            self._note_end()
            if _active("train"):
                self.give_way()
            elif self._due and not _active("scoring") and time.monotonic() >= self._retry:
                self._due = False
                if any(self._method.missing(self._datastore, model) for model in served):
                    self._own = start_task("scoring", {"method": METHOD}, queue=True)

    def _note_end(self) -> None:
        """A failed task is tried again after a while; what a person stopped, once another version is served."""
        if self._own is None or is_running(self._own):
            return
        if self._own["status"] != "DONE" and not self._paused:
            failed = self._own["status"] == "ERROR"
            self._due, self._retry = failed, time.monotonic() + (RETRY_SECONDS if failed else float("inf"))
        self._own, self._paused = None, False

    def _run(self) -> None:
        while True:
            try:
                self.look()
            except Exception as error:  # an archive that is down, a folder that is gone: the thread must live on
                logger.warning("Scoring in the background: %s", error)
                with self._lock:
                    self._due, self._retry = True, time.monotonic() + RETRY_SECONDS
            time.sleep(LOOK_SECONDS)


def _active(method: str) -> bool:
    return any(map(is_running, tasks_of(method)))
