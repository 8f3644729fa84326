"""Dice with wordings that no training reads: what the gate makes of it, what it costs, and where it is shown."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from lib.model.reports.page import Examined, round_report
from lib.model.versions import Versions
from lib.tasks import Task
from lib.trainers import evaluation
from lib.trainers.gate import Decision, Unseen, decide
from lib.trainers.judging import judge
from lib.trainers.options import limit_of, train_options
from support.helpers import checkpoint, tiny_task
from support.training import BOXES, box_case, worded

CLASSES = ("liver", "spleen")
# Both models with their own text: liver (0.8 + 0.6) / 2 and spleen (0.6 + 0.8) / 2 give a mean of 0.7.
OWN = {"a": {"liver": 0.8, "spleen": 0.6}, "b": {"liver": 0.6, "spleen": 0.8}}
# The served one with unseen wordings: liver (0.7 + 0.5) / 2 and spleen 0.5 give a mean of 0.55.
SERVED = {"a": {"liver": 0.7, "spleen": 0.5}, "b": {"liver": 0.5, "spleen": 0.5}}

TEXT = tiny_task(patch=[32, 16, 16], model={"vision": "unet", "feature_size": 4})
REQUEST = {"gate_margin": 1, "gate_min_cases": 1, "gate_unjudged": "keep", "gate_clicks": 0, "gate_reading": "none"}


def both(liver: float, spleen: float) -> dict[str, dict[str, float]]:
    return {case: {"liver": liver, "spleen": spleen} for case in OWN}


@pytest.mark.parametrize(
    ("candidate", "margin", "publish"),
    [
        (both(0.4, 0.3), 0.1, False),
        (both(0.4, 0.3), 0.2, True),  # exactly the margin
        (both(0.4, 0.3), None, True),  # it is only reported
        (both(0.9, 0.2), 0.0, True),  # the mean does not fall, and it alone decides
        (both(0.5, 0.58), 0.0, False),
    ],
)
def test_a_version_that_reads_worse_is_refused(candidate: Any, margin: float | None, publish: bool) -> None:
    decision = decide(OWN, OWN, CLASSES, unseen=Unseen(SERVED, candidate, margin))
    assert (decision.publish, decision.judged) == (publish, True)
    mean = sum(candidate["a"].values()) / 2
    complaint = f"reads worse: Dice with wordings that neither read falls from 0.550 to {mean:.3f}, by more than"
    assert decision.reason.startswith(f"{complaint} {margin:g}" if not publish else "mean Dice 0.700 to 0.700")


def test_it_is_one_complaint_among_others() -> None:
    worse = {case: {name: dice - 0.1 for name, dice in row.items()} for case, row in OWN.items()}
    reason = decide(OWN, worse, CLASSES, margin=1, unseen=Unseen(SERVED, both(0.1, 0.1), 0.0)).reason
    assert reason.split("; ") == [
        "mean Dice falls from 0.700 to 0.600",
        "reads worse: Dice with wordings that neither read falls from 0.550 to 0.100, by more than 0",
    ]


def test_the_line_and_plain_data_say_the_same() -> None:
    decision = decide(OWN, OWN, CLASSES, unseen=Unseen(SERVED, both(0.7, 0.5), 0.1))
    assert decision.table().splitlines()[-1] == (
        "Dice with wordings it never read: 0.600 (own 0.700), served 0.550 (own 0.700)"
    )
    found = decision.to_dict()["reading"]
    assert (found["cases"], found["margin"]) == (["a", "b"], 0.1)
    assert found["table"] == [
        {
            "class": name,
            **dict(zip(("served", "candidate", "difference", "served_own", "candidate_own"), row, strict=True)),
        }
        for name, *row in (
            ("liver", 0.6, 0.7, 0.1, 0.7, 0.7),
            ("spleen", 0.5, 0.5, 0.0, 0.7, 0.7),
            ("mean", 0.55, 0.6, 0.05, 0.7, 0.7),
        )
    ]


@pytest.mark.parametrize("served", [None, OWN])
def test_without_a_served_figure_the_candidate_s_stands_alone(served: Any) -> None:
    """The first version, and one after a version that could not be asked: its fixed head reads nothing."""
    decision = decide(served, OWN, CLASSES, unseen=Unseen(None if served is None else {}, both(0.1, 0.3), 0.0))
    assert decision.publish
    assert decision.table().splitlines()[-1] == "Dice with wordings it never read: 0.200 (own 0.700)"


def test_both_are_compared_on_the_cases_for_which_both_have_a_figure() -> None:
    """Case a is of folds from before there were such figures. On b alone: (0.5 + 0.5) / 2, and (0.6 + 0.8) / 2."""
    served = {"b": SERVED["b"]}
    reading = decide(OWN, OWN, CLASSES, unseen=Unseen(served, {"a": SERVED["a"], "b": OWN["b"]}, 0.0)).reading
    assert reading is not None and reading.cases == ("b",)
    assert (reading.unseen[-1].served, reading.unseen[-1].candidate) == pytest.approx((0.5, 0.7))
    assert reading.own[0].candidate == pytest.approx(0.6)


def test_a_class_that_no_label_shows_is_not_read_either() -> None:
    shown = {"a": ["liver"], "b": ["liver"]}
    reading = decide(OWN, OWN, CLASSES, shown=shown, unseen=Unseen(SERVED, both(0.6, 0.0), 0.0)).reading
    assert reading is not None and [row.candidate for row in reading.unseen] == [0.6, None, 0.6]
    nothing: Mapping[str, list[str]] = {}
    assert decide(OWN, OWN, CLASSES, shown=nothing, unseen=Unseen(SERVED, SERVED, 0.0)).reading is None


def page(decision: Decision, against: int | None) -> str:
    gate = {**decision.to_dict(), "against": against, "method": "validation", "margin": 0.02, "answered_by": "evidence"}
    task, manifest = tiny_task(), {"version": 2, "served": True, "gate": gate, "parent": against}
    return round_report(task, 2, [manifest], {}, Examined(task), "scored")


def test_the_report_has_the_line_and_the_figures_of_each_class() -> None:
    compared = page(decide(OWN, OWN, CLASSES, unseen=Unseen(SERVED, both(0.7, 0.51), 0.1)), 1)
    assert "Dice with wordings it never read: 0.605 (own 0.700)" in compared
    assert "version 1, unseen" in compared and "+0.010" in compared and "may fall by 0.1 against version 1" in compared
    first = page(decide(None, OWN, CLASSES, unseen=Unseen(None, both(0.7, 0.51))), None)
    assert "Dice with wordings it never read: 0.605 (own 0.700)" in first and "It decides nothing" in first
    assert "never read" not in page(decide(OWN, OWN, CLASSES), 1)


def test_the_option_takes_a_number_or_none() -> None:
    strict, plain = (train_options(task, "") for task in (tiny_task(training={"gate_reading": 0.05}), tiny_task()))
    assert (strict["gate_reading"].offer, plain["gate_reading"].offer) == ("0.05", "none")
    assert [limit_of(table.full({})["gate_reading"]) for table in (strict, plain)] == [0.05, None]
    assert [limit_of(strict.full({"gate_reading": sent})["gate_reading"]) for sent in ("None", "0.1", 0, "")] == [
        *(None, 0.1, 0.0, 0.05),
    ]
    for sent in (1.5, "-0.1", "nan", "much", True):
        with pytest.raises(ValueError, match="^gate_reading: expected a number from 0 to 1, or none, got"):
            plain.read({"gate_reading": sent})


# With networks that have learned nothing: what they are asked ------------------------------------------------------


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return {"id": "case_000", **box_case(tmp_path_factory.mktemp("case"), 0)}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The letters of the first class's shape in each prediction; empty for the model's own text."""
    found, plain = [], evaluation.predict

    def counting(model: Any, *given: Any, **more: Any) -> Any:
        read = more.get("sentences")
        words = model.text.tokenizer.decode(read.ids[1].tolist()) if read else ""
        found.append(re.sub(r"\[\w+\]|##| ", "", words))
        return plain(model, *given, **more)

    monkeypatch.setattr(evaluation, "predict", counting)
    return found


def judged(
    folder: Path, served: Task, task: Task, cases: list[dict[str, Any]], folds: tuple[Any, Any] | None = None
) -> tuple[Decision, dict[str, Any]]:
    """What the gate says of a fresh network, compared with another one that is served.

    folds: cross-validation of both on the cases, on all of which both were trained; None: the cases validate.
    """
    seen = [case["id"] for case in cases] if folds else []
    theirs, ours = ({"cross_validation": one} for one in folds) if folds else ({}, {})
    versions = Versions(folder / task.name)
    versions.publish(checkpoint(served, seed=1, seen=seen, metrics=theirs))
    candidate = checkpoint(task, seed=2, seen=seen, metrics=ours)
    sides = (cases, []) if folds else ([], cases)
    return judge(candidate, task, versions, *sides, REQUEST, torch.device("cpu"))


def test_both_are_asked_once_more_with_the_wording_that_is_kept_aside(
    tmp_path: Path, case: dict[str, Any], asked: list[str]
) -> None:
    decision, gate = judged(tmp_path, TEXT, worded(TEXT), [case])
    assert asked == ["", "somethingthatnobodytrainswith"] * 2
    assert gate["reading"]["cases"] == ["case_000"] and [r["class"] for r in gate["reading"]["table"][:-1]] == [
        *TEXT.classes
    ]
    assert all(None not in row.values() for row in gate["reading"]["table"])
    assert "Dice with wordings it never read" in decision.table()


@pytest.mark.parametrize("task", [TEXT, worded(BOXES)])
def test_a_task_without_other_wordings_or_a_head_that_reads_costs_nothing(
    task: Task, tmp_path: Path, case: dict[str, Any], asked: list[str]
) -> None:
    decision, gate = judged(tmp_path, task, task, [case])
    assert asked == ["", ""]
    assert gate["reading"] is None and "never read" not in decision.table()


def test_a_served_version_that_knows_classes_by_name_is_not_asked(
    tmp_path: Path, case: dict[str, Any], asked: list[str]
) -> None:
    task = worded(TEXT)
    named = task.model_copy(update={"model": task.model.model_copy(update={"text_format": "name"})})
    _, gate = judged(tmp_path, named, task, [case])
    assert [bool(text) for text in asked] == [False, True, False]
    assert gate["judged"] and {row["served"] for row in gate["reading"]["table"]} == {None}


def test_a_wording_too_long_for_the_encoder_does_not_cost_the_round(
    tmp_path: Path, case: dict[str, Any], asked: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    _, gate = judged(tmp_path, TEXT, worded(TEXT, "word " * 100), [case])
    assert gate["judged"] and gate["reading"] is None and asked == ["", ""]
    assert "No Dice with wordings that are kept aside: a text of 102 tokens" in caplog.text


@pytest.mark.parametrize(("wordings", "served"), [("new", 0.55), ("old", None)])
def test_earlier_folds_count_if_they_read_the_same_wordings(
    wordings: str, served: float | None, tmp_path: Path, asked: list[str]
) -> None:
    folds = {"method": "leave-one-out", "max_epochs": 4, "scores": OWN, "shown": {"a": CLASSES, "b": CLASSES}}
    ours, theirs = ({**folds, "unseen": dice, "wordings": w} for dice, w in ((OWN, "new"), (SERVED, wordings)))
    _, gate = judged(tmp_path, TEXT, worded(TEXT), [{"id": "a"}, {"id": "b"}], (theirs, ours))
    mean = gate["reading"]["table"][-1]
    assert (gate["method"], mean["candidate"], mean["served"]) == ("cross-validation", 0.7, served) and asked == []
