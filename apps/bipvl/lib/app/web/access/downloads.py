"""The one download that 3D Slicer's module makes without the login it has.

*Next Sample* asks for a case with the annotator's login, then leaves fetching the image to a part of Slicer that knows
no logins: with accounts that would always fail. So whoever was offered a case may fetch its image once, from the same
address, soon after.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable

from lib.app.web.access.accounts import User

SECONDS = 120  # Slicer asks at once; long enough for a slow archive to deliver the series first
MOST = 1000


class Downloads:
    """Who may fetch which image once without a login.

    Args:
        clock: seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._open: OrderedDict[tuple[str, str], tuple[float, User]] = OrderedDict()

    def allow(self, address: str, image: str, user: User) -> None:
        """`user`, who has just logged in from this address, was offered this image."""
        with self._lock:
            self._open.pop((address, image), None)
            self._open[address, image] = self._clock() + SECONDS, User(user.name, "viewer", user.realm)
            if len(self._open) > MOST:
                self._open.popitem(last=False)

    def take(self, address: str, image: str) -> User | None:
        """Who was allowed to fetch it; from then on nobody is. None if it is not allowed."""
        with self._lock:
            until, user = self._open.pop((address, image), (0.0, None))
        return user if self._clock() < until else None
