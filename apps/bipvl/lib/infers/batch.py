"""Batch inference: many images, of which some may be bad, and a file that says how far it is."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lib.files import write_json
from lib.model.checkpoints import CheckpointError
from lib.upstream import BatchInferTask, Datastore

logger = logging.getLogger(__name__)

Infer = Callable[[dict[str, Any], Datastore], dict[str, Any]]  # the app's: a request to its result
SHOWN = 15  # images whose failures end the log; clients show a task's last twenty lines


class BatchInfer(BatchInferTask):
    """MONAI Label's batch inference, which goes on after an image that cannot be segmented, with any number of workers.

    Args:
        path: of the file that says how far it is, read by the server while a process of its own segments.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def __call__(self, request: dict[str, Any], datastore: Datastore, infer: Infer) -> dict[str, Any]:
        """Segment the images that the request names.

        Returns:
            Image to MONAI Label's result, empty if the image failed.

        Raises:
            CheckpointError: no model can be read, so that no image can be segmented.
        """
        most = int(request.get("max_batch_size") or 0)
        images = sorted(self.get_images(request, datastore))[: most if most > 0 else None]
        state = _State(self.path, str(request.get("model")), len(images))

        def guarded(one: dict[str, Any], store: Datastore) -> dict[str, Any]:
            if state.stopped:
                return {}
            try:
                result = infer(one, store)
            except CheckpointError as error:
                state.stopped = error
                return {}
            except Exception as error:  # whatever is wrong with one image, the others are segmented
                logger.warning("%s cannot be segmented", one["image"], exc_info=True)
                state.note(one["image"], _reason(error))
                return {}
            state.note(one["image"])
            return result

        results = super().__call__({**request, "images": images}, datastore, guarded)
        if state.stopped:
            state.give_up(state.stopped)
            raise state.stopped
        state.summary()
        return results

    def progress(self) -> dict[str, Any]:
        """How far the newest batch is: `model`, `started`, `done` and `total` images, and of those `done` the `failed`
        ones, image to reason; `error` if it ended early. Empty if none ever ran."""
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}


class _State:
    """What has become of the images so far. Several workers note at once."""

    def __init__(self, path: Path, model: str, total: int) -> None:
        self.path = path
        self.stopped: CheckpointError | None = None
        self._lock = threading.Lock()
        self._failed: dict[str, str] = {}
        self._found: dict[str, Any] = {
            "model": model,
            "started": int(time.time()),
            "done": 0,
            "total": total,
            "failed": self._failed,
        }
        self._write()

    def note(self, image: str, failure: str | None = None) -> None:
        with self._lock:
            self._found["done"] += 1
            if failure is not None:
                self._failed[image] = failure
            self._write()

    def give_up(self, error: Exception) -> None:
        with self._lock:
            self._found["error"] = _reason(error)
            self._write()

    def summary(self) -> None:
        failed = self._failed
        level = logging.WARNING if failed else logging.INFO
        total = self._found["total"]
        logger.log(level, "%d of %d image(s) are segmented, %d failed", total - len(failed), total, len(failed))
        for image, reason in list(failed.items())[:SHOWN]:
            logger.warning("Failed: %s: %s", image, reason)
        if len(failed) > SHOWN:
            logger.warning("Failed: %d more; %s names them all", len(failed) - SHOWN, self.path)

    def _write(self) -> None:
        try:
            write_json(self.path, self._found)
        except OSError as error:  # the masks are worth more
            logger.warning("%s: %s", self.path, error)


def _reason(error: Exception) -> str:
    """What an error says, in one line."""
    text = getattr(error, "detail", None) or str(error) or type(error).__name__  # FastAPI's errors have a detail
    return " ".join(str(text).split())[:500]
