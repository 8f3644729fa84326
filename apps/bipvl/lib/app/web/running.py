"""Requests that are being computed: how far they are, and an end to those that nobody waits for any more."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from typing import NamedTuple, TypeVar

from fastapi import Request, Response

logger = logging.getLogger(__name__)
Answer = TypeVar("Answer")

LOOK = 0.3  # seconds between looks whether somebody still waits


class CancelledError(Exception):
    """Whoever asked has gone."""


class Asked(NamedTuple):
    """Whose request, to which model, about what."""

    person: str
    model: str
    image: str


class Run:
    """One request. The model tells it how far it is, and learns here that it may stop."""

    def __init__(self) -> None:
        self.done = self.total = 0
        self._cancelled = threading.Event()

    def __call__(self, done: int, total: int) -> None:
        """`done` of `total` windows are computed.

        Raises:
            CancelledError: nobody waits for the rest.
        """
        self.done, self.total = done, total
        if self._cancelled.is_set():
            raise CancelledError

    def cancel(self) -> None:
        """At the next window."""
        self._cancelled.set()


class Running:
    """The requests of a server. Safe to use from several threads."""

    def __init__(self) -> None:
        self._runs: dict[Asked, list[Run]] = {}
        self._lock = threading.Lock()

    @contextmanager
    def run(self, asked: Asked) -> Iterator[Run]:
        """A request, while it runs."""
        run = Run()
        with self._lock:
            self._runs.setdefault(asked, []).append(run)
        try:
            yield run
        finally:
            with self._lock:
                self._runs[asked].remove(run)
                if not self._runs[asked]:
                    del self._runs[asked]

    def progress(self, asked: Asked) -> dict[str, int] | None:
        """Windows that are done, and all, of the newest such request; None if there is none."""
        with self._lock:
            runs = self._runs.get(asked)
            return {"done": runs[-1].done, "total": runs[-1].total} if runs else None

    async def attend(
        self, asked: Asked, request: Request, executor: Executor, work: Callable[[Run], Answer]
    ) -> Answer | Response:
        """Do work in its turn for as long as somebody waits for it. If nobody does any more, the answer is an empty
        one, which nobody reads."""
        with self.run(asked) as run:
            answer = asyncio.get_running_loop().run_in_executor(executor, work, run)
            while not (await asyncio.wait({answer}, timeout=LOOK))[0]:
                if await request.is_disconnected():
                    run.cancel()
            try:
                return await answer
            except CancelledError:
                logger.info("%s of %r: cancelled after %d of %d windows", *asked[1:], run.done, run.total)
                return Response(status_code=499)
