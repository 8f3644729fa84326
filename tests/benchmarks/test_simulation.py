"""The simulation of active learning: a real one on tiny volumes, and its tables from cases to derive by hand."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from benchmarks.active_learning import __main__ as simulation
from benchmarks.active_learning import report
from support.helpers import write_nifti

TINY = {
    "patch": [32, 16, 16],
    "overlap": 0.0,
    "model.vision": "unet",
    "model.feature_size": 4,
    "model.projection": 8,
    "model.scratch": {"layers": 4, "width": 16, "heads": 2},
}


def hearts(folder: Path, patients: int) -> Path:
    """Two frames of each patient: noise with a box for each structure."""
    generator = np.random.default_rng(0)
    folder.mkdir()
    for patient in range(1, patients + 1):
        for frame in (1, 12):
            label = np.zeros((30, 28, 20), np.uint8)
            label[4:12, 4:12, 4:16], label[14:22, 6:20, 4:16], label[22:28, 8:20, 6:14] = 1, 2, 3
            stem = folder / f"patient{patient:03}_frame{frame:02}"
            write_nifti(Path(f"{stem}.nii.gz"), (generator.normal(0, 20, label.shape) + 100 * label).astype(np.float32))
            write_nifti(Path(f"{stem}_gt.nii.gz"), label)
    return folder


def test_strategies_choose_from_the_pool_and_share_the_first_round(tmp_path: Path) -> None:
    data = hearts(tmp_path / "data", 9)  # 6 train
    settings = [f"{key}={json.dumps(value)}" for key, value in TINY.items()]

    def run(steps: int = 1) -> dict[str, dict]:
        results, work = tmp_path / "results.jsonl", tmp_path / "work"
        simulation.run_command(
            data,
            strategies="random,diverse",
            seeds=1,
            start=2,
            add=2,
            rounds=2,
            first_steps=2,
            steps=steps,
            set_=settings,
            results=results,
            work=work,
            document=None,
        )
        found = {r["run"]["strategy"]: r for r in report.read_results(results, "acdc-mr", "small", "text")}
        assert not list((work / "claims").iterdir()), "a claim is given back"
        return found

    found = run()
    assert set(found) == {"random", "diverse"}
    first = {json.dumps(r["rounds"][0]["labelled"] + [r["rounds"][0]["dice"]]) for r in found.values()}
    assert len(first) == 1
    for result in found.values():
        rounds = result["rounds"]
        assert [len(r["labelled"]) for r in rounds] == [2, 4, 6]
        assert len(set(rounds[-1]["labelled"])) == 6
        for before, after in pairwise(rounds):
            assert after["labelled"] == before["labelled"] + list(before["chosen"])
        assert all(len(r["cases"]) == 4 and 0 <= r["dice"] <= 1 for r in rounds)  # 2 test patients
    scored = found["diverse"]["rounds"][0]["pool"]
    assert len(scored) == 4 and set(found["diverse"]["rounds"][0]["chosen"]) < set(scored)
    assert "pool" not in found["random"]["rounds"][0]

    written = (tmp_path / "results.jsonl").stat().st_mtime_ns
    run()
    assert written == (tmp_path / "results.jsonl").stat().st_mtime_ns, "what is done stays"
    with pytest.raises(ValueError, match="with other settings"):
        run(steps=2)


def result(strategy: str, seed: int, *dice: float, pools: tuple[dict, ...] = ()) -> dict:
    rounds: list[dict] = [{"labelled": ["p"] * (4 + 4 * i), "dice": d} for i, d in enumerate(dice)]
    for entry, pool in zip(rounds, pools, strict=False):
        entry["pool"] = pool
    run = {"strategy": strategy, "seed": seed, "first_steps": 9, "steps": 3, "size": "small", "overrides": {}}
    return {"run": run, "rounds": rounds, "hardware": "a machine", "packages": {}, "commit": "c"}


def test_the_area_is_the_mean_dice_on_the_way() -> None:
    assert report.area(result("random", 0, 0.5, 0.7, 0.7)) == pytest.approx((0.6 + 0.7) / 2)


def test_better_is_better_in_every_seed_and_takes_three() -> None:
    assert report.verdict([1, 2]) == "too few seeds"
    assert report.verdict([0.1, 2, 1]) == "in every seed"
    assert report.verdict([-0.1, 2, 1]) == report.verdict([0.0, 2, 1]) == "not shown"
    assert report.verdict([-0.1, -2, -1]) == "worse in every seed"


def test_tables() -> None:
    pool = {str(i): {"entropy": i / 9, "alignment": 0.5, "dice": (3 - i) / 9} for i in range(3)}
    results = [result("random", s, 0.5, 0.6) for s in range(3)]
    results += [result("uncertainty", s, 0.5, 0.62 + s / 100, pools=(pool,)) for s in range(3)]
    text = report.tables(results)
    assert "| uncertainty | 3 | 50.0 ± 0.0 | 63.0 ± 1.0 |" in text
    assert "| uncertainty | 56.5 ± 0.5 | +1.5 ± 0.5 | +1.0, +1.5, +2.0 | in every seed |" in text
    assert "| random | 55.0 ± 0.0 | - | - | - |" in text
    assert "| entropy | -1.00 |" in text, "one pool, which three runs share, counts once"
    assert "| disagreement (low alignment) | - |" in text, "the same for all says nothing"
