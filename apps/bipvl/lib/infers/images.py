"""Images kept in memory, as their files hold them."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np

from lib.volumes.reading import read_volume

IMAGE_BYTES = 512 * 2**20  # of images kept in memory; the last one stays in any case


Stamp = tuple[Any, ...]


def stamp(path: Path) -> Stamp:
    """What tells a file from one that was written in its place."""
    stat = path.stat()
    return str(path), stat.st_ino, stat.st_size, stat.st_mtime_ns


class Images:
    """The images that people click on, as their files hold them: reading one takes longer than an answer."""

    def __init__(self, limit: int = IMAGE_BYTES) -> None:
        self._limit = limit
        self._kept: OrderedDict[Stamp, tuple[np.ndarray, np.ndarray, str]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, path: Path) -> tuple[np.ndarray, np.ndarray]:
        """Intensities (channels, H, W, D) in half precision, and the affine (4, 4) from voxels to mm (RAS+)."""
        return self._get(path)[:2]

    def digest(self, path: Path) -> str:
        """What tells what the file shows from anything else, whenever and however it was written."""
        return self._get(path)[2]

    def _get(self, path: Path) -> tuple[np.ndarray, np.ndarray, str]:
        key = stamp(path)
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        volume = read_volume(path)
        values = volume.numpy()
        most = float(np.abs(values).max()) or 1.0
        scaled, affine = (values / most * 1000).astype(np.float16), volume.affine.numpy()
        shown = hashlib.blake2b(scaled.tobytes(), digest_size=16)
        shown.update(f"{scaled.shape} {affine.tolist()}".encode())
        found = scaled, affine, shown.hexdigest()
        with self._lock:
            self._kept[key] = found
            while len(self._kept) > 1 and sum(image.nbytes for image, *_ in self._kept.values()) > self._limit:
                self._kept.popitem(last=False)
        return found
