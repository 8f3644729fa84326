"""Scores fill themselves, make way for training, and respect who stopped them."""

from __future__ import annotations

import time

import pytest

from lib.activelearning.scoring import background as background_module
from lib.activelearning.scoring.background import Background
from support.scoring import publish, scoring


class Tasks:
    """MONAI Label's tasks, without processes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.all: dict[str, list[dict]] = {"scoring": [], "train": []}
        monkeypatch.setattr(background_module, "tasks_of", self.all.__getitem__)
        monkeypatch.setattr(background_module, "start_task", self.start)
        monkeypatch.setattr(background_module, "stop_task", self.stop)

    def start(self, method, request, queue):
        self.all[method].append({"status": "RUNNING", "request": request})
        return self.all[method][-1]

    def stop(self, method):
        self.all[method][-1]["status"] = "STOPPED"


@pytest.fixture
def filling(engine, task, store, tmp_path, monkeypatch):
    publish(engine, task, 1)
    tasks = Tasks(monkeypatch)
    return Background(scoring(engine, tmp_path), store), tasks.all


def test_scoring_starts_by_itself_and_after_each_publish(filling, engine, task, store):
    background, tasks = filling
    background.look()
    background.look()
    assert len(tasks["scoring"]) == 1, "one at a time"
    background._method({}, store)
    tasks["scoring"][-1]["status"] = "DONE"
    background.wake()
    background.look()
    assert len(tasks["scoring"]) == 1, "nothing is missing"
    publish(engine, task, 2)
    background.look()
    assert len(tasks["scoring"]) == 2


def test_scoring_makes_way_for_training_and_goes_on(filling):
    background, tasks = filling
    background.look()
    tasks["train"].append({"status": "RUNNING"})
    background.look()
    assert tasks["scoring"][-1]["status"] == "STOPPED"
    background.look()
    assert len(tasks["scoring"]) == 1
    tasks["train"][-1]["status"] = "DONE"
    background.look()
    assert [t["status"] for t in tasks["scoring"]] == ["STOPPED", "RUNNING"]


def test_what_a_person_stopped_begins_with_the_next_version_only(filling, engine, task):
    background, tasks = filling
    background.look()
    tasks["scoring"][-1]["status"] = "STOPPED"
    background.look()
    background.wake()
    background.look()
    assert len(tasks["scoring"]) == 1
    publish(engine, task, 2)
    background.look()
    assert len(tasks["scoring"]) == 2


def test_a_failure_is_tried_again_later(filling, monkeypatch):
    background, tasks = filling
    background.look()
    tasks["scoring"][-1]["status"] = "ERROR"
    background.look()
    background.wake()
    background.look()
    assert len(tasks["scoring"]) == 1
    monkeypatch.setattr(background_module, "time", _Later())
    background.look()
    assert len(tasks["scoring"]) == 2


class _Later:
    @staticmethod
    def monotonic() -> float:
        return time.monotonic() + background_module.RETRY_SECONDS
