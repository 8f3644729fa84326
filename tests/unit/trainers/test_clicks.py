"""A robot user at the gate: what it costs, what it finds, and versions that answer clicks worse."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from lib.interaction.margins import Margin
from lib.model.reports.page import Examined, round_report
from lib.trainers.gate import Clicks, decide
from lib.trainers.judging import better
from lib.trainers.refiner import clicks
from lib.trainers.refiner.cases import Segmented
from lib.trainers.refiner.clicks import CLICKS, Robot, chosen, curve, known_labels
from support.helpers import tiny_task

SHAPE = (40, 16, 16)
NAMES = ("liver", "spleen", "aorta")


def case(name: str = "a", missed: bool = True, shown: Sequence[int] = (1,)) -> Segmented:
    """A bright box of 10 x 10 x 10 voxels; the network has found the half of it, or all."""
    truth = np.zeros(SHAPE, np.uint8)
    for number, value in enumerate(shown):
        truth[3 + 12 * number : 13 + 12 * number, 3:13, 3:13] = value
    labels = truth.copy()
    if missed:
        labels[3:8] = 0
    affine = torch.eye(4, dtype=torch.float64)
    meta = {"affine": affine, "original_affine": affine, "spatial_shape": SHAPE}
    margins = {
        label: Margin(torch.from_numpy(np.where(labels == value, 1.0, -1.0)).half(), (0, 0, 0), SHAPE)
        for value, label in enumerate(NAMES, 1)
    }
    image = np.where(truth > 0, 100.0, 0.0)[None]
    values = {label: value for value, label in enumerate(NAMES, 1)}
    return Segmented(name, image, truth, labels, (1.0, 1.0, 1.0), meta, margins, None, {}, values)


def test_a_robot_s_clicks_are_answered_as_the_app_answers_them() -> None:
    """500 of 1000 voxels are found: Dice 2 · 500 / 1500. The other half is like the clicked voxel and within 7.4 mm of
    it, where 3 exp(-g² / 50) still is more than the margin that speaks against it: one click has nearly all of it."""
    found = curve(case(), "liver", None)
    assert len(found) == len(CLICKS) and found[0] == pytest.approx(2 / 3, abs=1e-4)
    assert found[1] > 0.95
    assert curve(case(missed=False), "liver", None) == [1.0] * len(CLICKS)


def test_a_robot_clicks_on_labels_that_the_reference_shows_and_was_drawn_for() -> None:
    task = tiny_task()
    assert chosen(case(shown=(1, 2)), NAMES) == ["liver", "spleen"]
    assert chosen(case(shown=(1, 2)), known_labels(task, ["spleen"])) == ["spleen"]
    assert chosen(case(shown=()), NAMES) == []
    assert known_labels(task, None) == list(NAMES)


def test_of_many_labels_each_gets_its_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clicks, "LABELS", 2)
    found = [chosen(case(name, shown=(1, 2, 3)), NAMES) for name in "abcdefgh"]
    assert {len(labels) for labels in found} == {2} and {label for labels in found for label in labels} == set(NAMES)


def robot(monkeypatch: pytest.MonkeyPatch, names: str, told: Any, **more: Any) -> Robot:
    """A robot at cases that are segmented already."""
    monkeypatch.setattr(clicks, "as_segmented", lambda found, task, given, image: found)
    one = Robot(total=len(names), told=told, **more)
    for name in names:
        nothing: Any = None
        found: Any = case(name)
        one.prediction(tiny_task(), {"id": name}, nothing, found)
    return one


def test_a_robot_works_at_a_few_cases_and_says_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[int, int]] = []
    one = robot(monkeypatch, "abc", lambda *step: told.append(step), cases=2)
    assert set(one.curves["evidence"]) == {"a", "b"} and told == [(0, 2), (1, 2), (1, 2), (2, 2)]
    assert not robot(monkeypatch, "abc", lambda *step: None, cases=0).curves["evidence"]


def test_a_robot_can_be_stopped_between_two_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    done = []

    def stop(number: int, total: int) -> None:
        done.append(number)
        if number == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        robot(monkeypatch, "abc", stop, cases=3)
    assert done == [0, 1]


def test_a_case_that_cannot_be_clicked_on_costs_itself_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plain = clicks.curve
    monkeypatch.setattr(clicks, "curve", lambda seen, *more: plain(seen, *more) if seen.name != "a" else 1 / 0)
    one = robot(monkeypatch, "ab", lambda *step: None, cases=2)
    assert set(one.curves["evidence"]) == {"b"} and "Case a is not clicked on" in caplog.text


# The gate -----------------------------------------------------------------------------------------------------------

DICE = {"a": {"liver": 0.8}}


def curves(*values: float) -> dict[str, dict[str, Sequence[float]]]:
    return {"a": {"liver": values}}


@pytest.mark.parametrize(
    ("candidate", "publish"),
    [
        ((0.80, 0.84, 0.88, 0.90), True),
        ((0.80, 0.83, 0.865, 0.88), True),  # within the margin, at its end
        ((0.80, 0.84, 0.85, 0.90), False),
        ((0.70, 0.84, 0.88, 0.90), True),  # the masks themselves are compared on all cases
    ],
)
def test_a_version_that_answers_clicks_worse_is_refused(candidate: tuple[float, ...], publish: bool) -> None:
    served = curves(0.80, 0.84, 0.88, 0.90)
    decision = decide(DICE, DICE, ["liver"], margin=0.02, clicks=Clicks(CLICKS, served, curves(*candidate)))
    assert decision.publish is publish
    if not publish:
        assert "clicks are answered worse by more than 0.02: Dice falls from 0.880 to 0.850 after 3" in decision.reason
    assert decision.clicked == ("a",)
    assert decision.to_dict()["clicks"][2] == {
        **{"clicks": 3, "served": 0.88, "candidate": candidate[2]},
        "difference": round(candidate[2] - 0.88, 4),
    }
    assert "Dice after 0, 1, 3, 5 clicks: served 0.800 0.840 0.880 0.900, candidate" in decision.table()


def test_both_are_compared_on_what_both_were_clicked_on() -> None:
    """liver (0.2 + 0.4) / 2 = 0.3 and spleen 0.5 give 0.4; the aorta and case c have no counterpart."""
    ours = {"a": {"liver": [0.2], "spleen": [0.5]}, "b": {"liver": [0.4], "aorta": [1.0]}, "c": {"liver": [1.0]}}
    theirs = {"a": {"liver": [0.1], "spleen": [0.1]}, "b": {"liver": [0.3], "spleen": [0.9]}}
    (row,), cases = Clicks((0,), theirs, ours).rows()
    assert (row.candidate, row.served) == (pytest.approx(0.4), pytest.approx(0.15)) and cases == ("a", "b")
    assert Clicks((0,), {}, ours).rows() == ((), ())


def test_without_clicks_the_gate_says_nothing_of_them() -> None:
    decision = decide(DICE, DICE, ["liver"], clicks=Clicks(CLICKS, {}, {}))
    assert decision.publish and decision.clicks == () and "clicks" not in decision.table()


def test_the_better_way_answers() -> None:
    low, high = curves(0.8, 0.81, 0.82, 0.83), curves(0.8, 0.82, 0.83, 0.84)
    assert better({"evidence": low, "refiner": high}) == "refiner"
    assert better({"evidence": high, "refiner": low}) == better({"evidence": low, "refiner": low}) == "evidence"
    assert better({"evidence": {}, "refiner": {}}) == better({"evidence": low}) == "evidence"


def test_the_report_shows_both_versions_after_clicks() -> None:
    task = tiny_task()
    both = Clicks(CLICKS, curves(0.8, 0.84, 0.88, 0.9), curves(0.8, 0.85, 0.887, 0.9))
    gate = decide(DICE, DICE, ["liver"], clicks=both).to_dict()
    gate |= {"against": 1, "method": "validation", "margin": 0.02, "answered_by": "evidence"}
    manifest = {"version": 2, "served": True, "gate": gate, "parent": 1}
    page = round_report(task, 2, [manifest], {}, Examined(task), "scored")
    assert "After clicks of a robot user" in page and "0.887" in page and "+0.007" in page
    assert "without a refiner" in page
    del gate["clicks"]
    assert "robot user" not in round_report(task, 2, [manifest], {}, Examined(task), "scored")
