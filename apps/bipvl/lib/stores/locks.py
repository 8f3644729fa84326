"""Locks among threads, and the one order in which they are taken, so that no two requests wait for one another.

Who needs several takes them from the first of `Order` to the last, and none of one place while holding another of it;
every `Lock` checks that. What has to be looked up or downloaded is looked up before a later lock is taken: whoever
changes a folder (`lib.stores.labelfolder`) knows the image and the label already. Nobody waits forever.

Other locks (sessions, accounts, models in memory, versions, revisions) are taken alone: nothing that is done under them
takes another one, but for a shipped model, which is published while its own lock is held.
"""

from __future__ import annotations

import threading
from enum import IntEnum

from lib.stores.errors import BusyError

LOCK_SECONDS = 120.0
SERIES_SECONDS = 600.0  # to download a large series over a slow line


class Order(IntEnum):
    """The places of locks, the first one first."""

    BACKGROUND = 1  # which work is started in the background; looks what is missing in a store
    LEASES = 2  # from asking a store what is free until it is leased
    SERIES = 3  # one series of an archive: its copy, its label, what is saved for it
    LISTING = 4  # what an archive holds; asks the archive
    PROPOSALS = 5  # a file
    FOLDER = 6  # the files of a folder; among processes too


class _Held(threading.local):
    """What the present thread holds, in the order in which it was taken."""

    def __init__(self) -> None:
        self.locks: list[Lock] = []


_HELD = _Held()


class Lock:
    """A lock among threads, to be used with `with`; a thread may take it again.

    Args:
        place: in the order.
        what: is locked, for the message.
        seconds: how long to wait.
    """

    def __init__(self, place: Order, what: str, seconds: float = LOCK_SECONDS) -> None:
        self.place, self.what, self.seconds = place, what, seconds
        self._lock = threading.RLock()

    def __enter__(self) -> Lock:
        """Raises BusyError if others hold it for too long."""
        held = _HELD.locks
        late = [other.what for other in held if other is not self and other.place >= self.place]
        assert self in held or not late, f"{self.what} is locked while holding {', '.join(late)}: not in order"
        if not self._lock.acquire(timeout=self.seconds):
            raise BusyError(f"{self.what}: another request has been at work for {self.seconds:g} s; try again later")
        held.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        _HELD.locks.remove(self)
        self._lock.release()
