"""Results as JSON Lines: one run per line, and its long curves compressed beside it.

    accuracy.jsonl               everything of a run but its curves
    accuracy.curves.jsonl.gz     {"name": …, "curves": …} of each run with curves

They lie in benchmarks/results, or in the folder that the environment variable BIPVL_RESULTS names.

Files are rewritten whole, beside their place, under a lock: several processes may add runs to one of them.
"""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from filelock import FileLock

from benchmarks import ROOT
from lib.files import write_atomic

RESULTS = Path(os.environ.get("BIPVL_RESULTS") or ROOT / "benchmarks" / "results")
LOCK_SECONDS = 60

Run = dict[str, Any]


def read(file: Path, curves: bool = False) -> list[Run]:
    """The runs of a file, in its order; none if it does not exist. `curves` puts each run's own back into it."""
    runs = _lines(file.read_bytes()) if file.is_file() else []
    beside = _beside(file)
    if curves and beside.is_file():
        found = {line["name"]: line["curves"] for line in _lines(gzip.decompress(beside.read_bytes()))}
        runs = [{**run, "curves": found[run["name"]]} if run.get("name") in found else run for run in runs]
    return runs


def find(file: Path, name: str) -> Run | None:
    """The run of this name, without its curves; None if there is none."""
    return next((run for run in read(file) if run.get("name") == name), None)


def put(file: Path, run: Run) -> None:
    """Write a run, in the place of the one that has its `name`."""
    with _locked(file):
        if "curves" in run:
            beside = _beside(file)
            old = _lines(gzip.decompress(beside.read_bytes())) if beside.is_file() else []
            new = _replaced(old, {"name": run["name"], "curves": run["curves"]})
            # Without a time of its own in it, so that equal curves are equal bytes.
            write_atomic(beside, lambda target: target.write(gzip.compress(_text(new), mtime=0)))
        kept = {key: value for key, value in run.items() if key != "curves"}
        write(file, _replaced(read(file), kept))


def write(file: Path, runs: Iterable[Run]) -> None:
    """Write all runs of a file."""
    text = _text(runs)
    write_atomic(file, lambda target: target.write(text))


def _replaced(runs: list[Run], run: Run) -> list[Run]:
    names = [old.get("name") for old in runs]
    if run["name"] not in names:
        return [*runs, run]
    return [run if name == run["name"] else old for name, old in zip(names, runs, strict=True)]


def _lines(content: bytes) -> list[Run]:
    return [json.loads(line) for line in content.decode().splitlines() if line.strip()]


def _text(runs: Iterable[Run]) -> bytes:
    return "".join(f"{json.dumps(run)}\n" for run in runs).encode()


def _beside(file: Path) -> Path:
    return file.with_name(f"{file.stem}.curves.jsonl.gz")


def _locked(file: Path) -> FileLock:
    file.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(f"{file}.lock", timeout=LOCK_SECONDS)
