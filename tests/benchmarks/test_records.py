"""Results as JSON Lines: replaced by name, curves beside them, whole at every instant."""

from __future__ import annotations

import gzip
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks import records


def test_a_run_is_a_line_and_its_curves_lie_beside_it(tmp_path: Path) -> None:
    file = tmp_path / "some.jsonl"
    assert records.read(file) == [] and records.find(file, "a") is None
    records.put(file, {"name": "a", "dice": 0.5, "curves": {"loss": [3, 2]}})
    records.put(file, {"name": "b", "dice": 0.6})
    records.put(file, {"name": "a", "dice": 0.7})  # no new curves: the old ones stay
    assert [json.loads(line) for line in file.read_text().splitlines()] == [
        {"name": "a", "dice": 0.7},
        {"name": "b", "dice": 0.6},
    ]
    assert records.find(file, "a") == {"name": "a", "dice": 0.7}
    assert records.read(file, curves=True) == [
        {"name": "a", "dice": 0.7, "curves": {"loss": [3, 2]}},
        {"name": "b", "dice": 0.6},
    ]
    packed = (tmp_path / "some.curves.jsonl.gz").read_bytes()
    assert json.loads(gzip.decompress(packed)) == {"name": "a", "curves": {"loss": [3, 2]}}
    records.put(file, {"name": "a", "dice": 0.7, "curves": {"loss": [3, 2]}})
    assert (tmp_path / "some.curves.jsonl.gz").read_bytes() == packed, "equal curves are equal bytes"


def test_runs_that_end_together_are_all_kept(tmp_path: Path) -> None:
    file = tmp_path / "some.jsonl"
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: records.put(file, {"name": str(n), "curves": [n]}), range(40)))
    found = {run["name"]: run["curves"] for run in records.read(file, curves=True)}
    assert found == {str(n): [n] for n in range(40)}


def test_the_results_of_the_repository_can_be_read() -> None:
    for file in records.RESULTS.glob("*.jsonl"):
        runs = records.read(file, curves=True)
        names = [run["name"] for run in runs if "name" in run]
        assert runs and len(set(names)) == len(names), file.name
