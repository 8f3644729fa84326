"""What a round's status says to people, from what MONAI Label and the trainer know."""

from __future__ import annotations

import time
from datetime import datetime
from typing import Any

import pytest

from lib.app.web.routes.progress import NO_WORD, with_images, with_progress

START = time.time() - 60
FIRST = {"epoch": 3, "total_epochs": 10, "start_ts": int(START) + 20, "seconds_left": 84}


def status(state: str, *details: str) -> dict[str, Any]:
    started = datetime.fromtimestamp(START).strftime("%Y-%m-%d %H:%M:%S")
    return {"id": "1", "status": state, "start_ts": started, "request": {"model": "heart"}, "details": list(details)}


def test_a_running_round_has_figures() -> None:
    stats = {**FIRST, "latest": {"loss": 1.25, "val_mean_dice": 0.5}, "fold": "Fold 2 of 3"}
    found = with_progress(status("RUNNING"), stats)
    assert found["progress"] == {
        **{"epoch": 3, "epochs": 10, "step": 0, "steps": 0, "loss": 1.25, "dice": 0.5},
        **{"seconds_left": 84, "stage": "Fold 2 of 3", "doing": None},
    }
    assert (found["outcome"], found["id"]) == ("", "1")
    doing = {"what": "Refiner", "done": 50, "total": 200}
    assert with_progress(status("RUNNING"), {**stats, "doing": doing})["progress"]["doing"] == doing


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


def test_the_first_epoch_shows_its_steps() -> None:
    found = with_progress(status("RUNNING"), {**FIRST, "epoch": 0, "step": 4, "steps": 40})["progress"]
    assert [found[key] for key in ("epoch", "step", "steps", "loss")] == [0, 4, 40, None]


def test_a_failed_round_says_why() -> None:
    error = "none of 2 case(s) can be used: the labels lie on other grids\nand a table"
    stats = {**FIRST, "failure": {"start_ts": int(START) + 30, "error": error}}
    found = with_progress(status("ERROR"), stats)
    assert found["outcome"] == "None of 2 case(s) can be used: the labels lie on other grids"
    assert with_progress(status("STOPPED"), stats)["outcome"] == "It was stopped."
    assert with_progress(status("DONE"), {**stats, "version": 4, "served": 4})["outcome"] == "Version 4 is served."
    # A round may fail while the statistics are still another's: of the failure its own time counts.
    foreign = {**stats, "start_ts": int(START) - 3600}
    assert with_progress(status("ERROR"), foreign)["outcome"].startswith("None of 2")
    earlier = {**FIRST, "failure": {"start_ts": int(START) - 30, "error": "of before"}}
    assert with_progress(status("ERROR", "ValueError: a line of a traceback"), earlier)["outcome"] == NO_WORD


BATCH = {"model": "heart", "started": int(START) + 5, "done": 3, "total": 4, "failed": {"b": "zero bytes"}}


def test_a_batch_tells_what_failed_while_it_runs_and_at_its_end() -> None:
    found = with_images(status("RUNNING"), BATCH)
    assert (found["progress"], found["outcome"]) == ({"done": 3, "total": 4, "failed": {"b": "zero bytes"}}, "")
    ended = {**BATCH, "done": 4}
    assert with_images(status("DONE"), ended)["outcome"] == "3 of 4 images are segmented. Failed: b: zero bytes."
    stopped = with_images(status("STOPPED"), {**BATCH, "failed": {}})
    assert stopped["outcome"] == "It was stopped. 3 of 4 images are segmented."
    broken = with_images(status("ERROR"), {**BATCH, "done": 0, "failed": {}, "error": "v0001.pt: damaged"})
    assert broken["outcome"] == "V0001.pt: damaged. 0 of 4 images are segmented."


def test_an_earlier_batch_is_not_taken_for_this_one() -> None:
    earlier = {**BATCH, "started": int(START) - 100}
    assert with_images(status("RUNNING"), earlier)["progress"] is None
    assert with_images(status("ERROR"), earlier)["outcome"] == NO_WORD
    assert with_images(status("DONE"), {})["outcome"] == ""
