"""Annotators first: between processes, who computes in the background waits while somebody's request is computed."""

from __future__ import annotations

import fcntl
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

logger = logging.getLogger(__name__)


class Turns:
    """One file that requests hold shared and the background waits for. The kernel lets go of it when a process ends.

    Args:
        path: of the file, made when needed. If it cannot be written, nobody waits.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @contextmanager
    def request(self) -> Iterator[None]:
        """Somebody waits for what happens inside. Requests never wait for one another here."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            file = self.path.open("a")
        except OSError as error:
            logger.debug("%s: %s; background work does not wait", self.path, error)
            yield
            return
        with file:
            fcntl.flock(file, fcntl.LOCK_SH)
            yield

    def wait(self) -> None:
        """Return once no request is being computed."""
        try:
            with self.path.open("a") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            return
