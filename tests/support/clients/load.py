"""Annotators at work, for the load test: each client mixes info, next sample, infer and save without a pause."""

from __future__ import annotations

import hashlib
import itertools
import random
import statistics
import threading
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import nibabel as nib
import numpy as np
from monailabel.client import MONAILabelClient

from support.helpers import read_nifti

OPERATIONS = ("info", "next_sample", "save", "infer")
SHARES = (50, 25, 20, 5)


@dataclass
class Load:
    """What the clients did: seconds of each request, errors, and the SHA-256 of each label that was acknowledged."""

    seconds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    errors: list[str] = field(default_factory=list)
    saved: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))

    def table(self) -> str:
        rows = [f"{'request':<12} {'count':>6} {'median s':>9} {'p95 s':>7} {'longest s':>9}"]
        for name in OPERATIONS:
            times = sorted(self.seconds[name]) or [float("nan")]
            p95 = times[min(len(times) - 1, int(0.95 * len(times)))]
            figures = f"{statistics.median(times):>9.3f} {p95:>7.3f} {times[-1]:>9.3f}"
            rows.append(f"{name:<12} {len(self.seconds[name]):>6} {figures}")
        return "\n".join(rows)


def run(url: str, model: str, images: dict[str, Path], folder: Path, clients: int, seconds: float) -> Load:
    """Let `clients` threads work on a server for some seconds.

    Args:
        images: id to file of every image; each saved label is a new random mask on its grid.
        folder: where clients keep what they send and receive.
    """
    load, lock, end = Load(), threading.Lock(), time.monotonic() + seconds

    def annotate(number: int) -> None:
        mine = folder / f"client{number}"
        mine.mkdir(parents=True)
        client = MONAILabelClient(url, tmpdir=str(mine), client_id=f"annotator-{number}")
        choose, drawn = random.Random(number), itertools.count()
        case = choose.choice(sorted(images))
        while time.monotonic() < end:
            operation = choose.choices(OPERATIONS, SHARES)[0]
            if operation == "save":  # drawing is not the server's time
                label = _draw(images[case], mine / f"label{next(drawn)}.nii.gz", choose.getrandbits(32))
            start = time.monotonic()
            try:
                if operation == "info":
                    client.info()
                elif operation == "next_sample":
                    case = client.next_sample("random", {}).get("id", case)
                elif operation == "infer":
                    client.infer(model, case, {})
                else:
                    client.save_label(case, str(label), "final", {})
            except Exception as error:  # noqa: BLE001  every kind of failure is the finding
                with lock:
                    load.errors.append(f"client {number}, {operation} {case}: {getattr(error, 'msg', error)!r}")
                continue
            with lock:
                load.seconds[operation].append(time.monotonic() - start)
                if operation == "save":
                    load.saved[case].add(digest(label))

    threads = [threading.Thread(target=annotate, args=(n,)) for n in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return load


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _draw(image: Path, label: Path, seed: int) -> Path:
    source = read_nifti(image)
    mask = np.random.default_rng(seed).integers(0, 3, source.shape[:3], dtype=np.uint8)
    nib.save(nib.Nifti1Image(mask, source.affine), label)
    return label
