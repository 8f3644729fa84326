"""What a round's status says to people, from what MONAI Label and the trainer know."""

from __future__ import annotations

import time
from datetime import datetime
from typing import Any

import pytest

from lib.app.web.routes.progress import with_progress

START = time.time() - 60
FIRST = {"epoch": 3, "total_epochs": 10, "start_ts": int(START) + 20, "seconds_left": 84}


def status(state: str, *details: str) -> dict[str, Any]:
    started = datetime.fromtimestamp(START).strftime("%Y-%m-%d %H:%M:%S")
    return {"id": "1", "status": state, "start_ts": started, "request": {"model": "heart"}, "details": list(details)}


def test_a_running_round_has_figures() -> None:
    stats = {**FIRST, "latest": {"loss": 1.25, "val_mean_dice": 0.5}, "fold": "Fold 2 of 3"}
    found = with_progress(status("RUNNING"), stats)
    assert found["progress"] == {
        **{"epoch": 3, "epochs": 10, "loss": 1.25, "dice": 0.5},
        **{"seconds_left": 84, "stage": "Fold 2 of 3"},
    }
    assert (found["outcome"], found["id"]) == ("", "1")


@pytest.mark.parametrize("state", ["SUBMITTED", "RUNNING"])
@pytest.mark.parametrize("stats", [{}, {**FIRST, "start_ts": int(START) - 3600, "version": 7, "served": 7}])
def test_nothing_is_known_before_the_first_epoch(state: str, stats: dict[str, Any]) -> None:
    found = with_progress(status(state), stats)
    assert (found["progress"], found["outcome"]) == (None, "")


@pytest.mark.parametrize(
    ("served", "gate", "expected"),
    [
        (4, {}, "Version 4 is served."),
        (4, {"reason": "no class fell"}, "Version 4 is served: no class fell."),
        (3, {"reason": "liver fell by 0.1"}, "Version 4 is kept, not served: liver fell by 0.1."),
    ],
)
def test_a_finished_round_says_what_became_of_its_version(served: int, gate: dict[str, str], expected: str) -> None:
    found = with_progress(status("DONE"), {**FIRST, "version": 4, "served": served, "gate": gate})
    assert (found["progress"], found["outcome"]) == (None, expected)


def test_a_failed_round_says_why() -> None:
    lines = (
        "[2026-01-01 10:00:00,000] [1] [MainThread] [INFO] (lib.x:1) - Result: {}",
        "Traceback (most recent call last):",
        '  File "main.py", line 1, in train',
        "lib.tasks.TaskError: none of 2 case(s) can be used: the labels lie on other grids",
    )
    found = with_progress(status("ERROR", *lines), FIRST)
    assert found["outcome"] == "None of 2 case(s) can be used: the labels lie on other grids"
    assert with_progress(status("ERROR", "Killed"), FIRST)["outcome"] == ""
    assert with_progress(status("STOPPED", *lines), FIRST)["outcome"] == "It was stopped."
