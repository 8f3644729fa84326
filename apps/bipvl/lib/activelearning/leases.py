"""Leases: a case that was offered to one annotator is not offered to others for a while."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypedDict

from lib.files import write_json
from lib.stores.locks import Lock, Order

logger = logging.getLogger(__name__)

DEFAULT_MINUTES = 60.0


class Lease(TypedDict):
    """Who works on a case, and until when (seconds since 1970)."""

    person: str
    until: float


class Leases:
    """At most one lease per person and one per case. They survive a restart if the file can be written.

    Args:
        path: the JSON file.
        minutes: how long a lease lasts; 0 offers every case to everyone.
        clock: seconds since 1970.

    Raises:
        ValueError: `minutes` is not a number of at least 0.
    """

    def __init__(
        self, path: Path, minutes: float | str = DEFAULT_MINUTES, clock: Callable[[], float] = time.time
    ) -> None:
        try:
            self.seconds = float(minutes) * 60
        except ValueError:
            self.seconds = math.nan
        if not 0 <= self.seconds < math.inf:
            raise ValueError(f"lease_minutes: expected a number of minutes, 0 for no leases, found {minutes!r}")
        self.path = path
        # To be held from asking what is taken until leasing the choice.
        self.lock = Lock(Order.LEASES, "the list of who works on which case")
        self._clock = clock
        self._leases = self._load()

    def taken(self, person: str) -> set[str]:
        """Cases that others work on."""
        with self.lock:
            return {case for case, lease in self._leases.items() if lease["person"] != person and self._counts(lease)}

    def lease(self, case: str, person: str) -> None:
        """Give a case to a person, whose earlier lease ends."""
        if not self.seconds:
            return
        with self.lock:
            kept = {c: one for c, one in self._leases.items() if one["person"] != person and self._counts(one)}
            self._keep({**kept, case: Lease(person=person, until=self._clock() + self.seconds)})

    def release(self, case: str) -> None:
        """Whoever worked on a case is done with it."""
        with self.lock:
            if case in self._leases:
                self._keep({c: one for c, one in self._leases.items() if c != case})

    def _counts(self, lease: Lease) -> bool:
        # A clock that jumps, either way, ends leases; it never makes one that lasts longer.
        return 0 <= lease["until"] - self._clock() <= self.seconds and self.seconds > 0

    def _load(self) -> dict[str, Lease]:
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
            return {str(c): Lease(person=str(one["person"]), until=float(one["until"])) for c, one in found.items()}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            logger.warning("%s cannot be read, so cases are offered as if nobody worked on them: %s", self.path, error)
            return {}

    def _keep(self, leases: dict[str, Lease]) -> None:
        self._leases = leases
        try:
            write_json(self.path, leases)
        except OSError as error:
            logger.warning("%s cannot be written, so leases end with the server: %s", self.path, error)


class Offer:
    """A datastore as one annotator's strategy sees it: without the cases that others work on."""

    def __init__(self, store: Any, taken: set[str]) -> None:
        self._store = store
        self.taken = taken

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def get_unlabeled_images(self, label_tag: str | None = None, labels: list[str] | None = None) -> list[str]:
        """Images that are unlabelled and free."""
        return [case for case in self._store.get_unlabeled_images(label_tag, labels) if case not in self.taken]
