"""Series of an archive, and the SEGs that another program made of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from lib.tasks import load_task
from lib.volumes.series import read_headers
from support.dicom.archive import Archive
from support.dicom.dicoms import dcmqi_seg, make_series
from support.training import SMALL

ACCOUNT = ("archivist", "a long word")
SHAPE = (40, 36, 24)
TASK = load_task("quickstart", SMALL)
# A program with an alphabet of its own: neither our values nor our order.
NAMES = {1: "spleen", 2: "Right_Kidney", 3: "liver", 4: "left kidney"}
MEANT = {1: 2, 2: 4, 3: 1, 4: 3}  # the task's values


def drawn(seed: int) -> np.ndarray:
    """A block for each of four organs, of different sizes."""
    numbers = np.zeros(SHAPE, np.uint8)
    shift = seed % 3
    numbers[2:14, 2:14, 2:12], numbers[16:26, 2:10, 2:12] = 3, 1
    numbers[28:34, 20:30, 4 + shift : 9], numbers[4:8, 20:34, 4:9] = 4, 2
    return numbers


def stored(archive: Archive, folder: Path, number: int, labelled: bool) -> tuple[str, np.ndarray]:
    """A series in the archive, with a SEG by dcmqi if wanted; its UID and what that SEG means in the task's values."""
    uid = make_series(folder / str(number), SHAPE, spacing=(5, 5, 6), seed=number, patient=f"P{number}")
    archive.store(folder / str(number))
    numbers = drawn(number)
    if labelled:
        affine = read_headers(folder / str(number)).affine
        archive.store(dcmqi_seg(folder / str(number), numbers, affine, NAMES, folder / f"{number}.dcm"))
    return uid, np.array([0, *(MEANT[i] for i in range(1, 5))], np.uint8)[numbers]
