"""Images that clients send for a while, without adding them to the datastore."""

from __future__ import annotations

import json
import logging
import re
import shutil
import threading
import time
import uuid
from pathlib import Path
from typing import Any

from lib.files import write_json

logger = logging.getLogger(__name__)

SESSION_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


class Sessions:
    """Sessions in one folder: `<id>/meta.info` and the image beside it.

    Args:
        folder: created when needed.
        expiry: seconds without use after which a session is removed, and the most that a client may ask for.
    """

    def __init__(self, folder: Path, expiry: int) -> None:
        self.folder = folder
        self.expiry = expiry if expiry > 60 else 3600
        self._lock = threading.Lock()

    def add(self, files: Path, expiry: int = 0) -> dict[str, Any]:
        """Take over a folder of received files; one file in it is the image, otherwise the folder is."""
        name = str(uuid.uuid4())
        place = self.folder / name
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        try:
            place.mkdir(mode=0o700)
            shutil.move(files, place / "image")
            found = [p for p in (place / "image").rglob("*") if p.is_file()]
            now = int(time.time())
            session = {
                "name": name,
                "path": str(place),
                "image": str(found[0] if len(found) == 1 else place / "image"),
                "meta": {},
                "create_ts": now,
                "last_access_ts": now,
                "expiry": min(expiry, self.expiry) if expiry > 0 else self.expiry,
            }
            write_json(place / "meta.info", session)
        except BaseException:
            shutil.rmtree(place, ignore_errors=True)
            raise
        return session

    def get(self, name: str, touch: bool = False) -> dict[str, Any] | None:
        """A session, None if there is none of that name. `touch`: it was used now."""
        if not SESSION_ID.fullmatch(name):
            return None
        with self._lock:
            try:
                session = json.loads((self.folder / name / "meta.info").read_text())
                if not isinstance(session, dict) or not Path(session["image"]).exists():
                    return None
                if touch:
                    session["last_access_ts"] = int(time.time())
                    write_json(self.folder / name / "meta.info", session)
                return session
            except (OSError, ValueError, KeyError, TypeError):
                return None

    def remove(self, name: str) -> None:
        if SESSION_ID.fullmatch(name):
            with self._lock:
                shutil.rmtree(self.folder / name, ignore_errors=True)

    def remove_expired(self) -> int:
        """Remove what is expired or damaged; called by MONAI Label every five minutes. Returns how many."""
        names = [p.name for p in self.folder.iterdir()] if self.folder.is_dir() else []
        now, removed = time.time(), 0
        for name in names:
            session = self.get(name) if SESSION_ID.fullmatch(name) else {}
            if session is None:
                # Being received just now, or damaged: a folder without a readable description goes after a while.
                try:
                    stale = now - (self.folder / name).stat().st_mtime > self.expiry
                except OSError:
                    continue
            else:
                stale = bool(session) and session["last_access_ts"] + session["expiry"] < now
            if stale:
                self.remove(name)
                removed += 1
        return removed
