"""Places and answers of cases: kept whole, shown again, carried over to later versions, counted, and refused."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from lib.model.reviews import ReviewError, Reviews


def place(label: str, *voxel: int) -> dict[str, Any]:
    """A cube of five voxels."""
    box = [[n - 2, n + 2] for n in voxel]
    name = "-".join(map(str, voxel))
    rest = {"volume": 125.0, "entropy": 1.0, "probability": 0.5, "why": f"{label}?", "centre": [0.0, 0.0, 0.0]}
    return {"id": f"{label}-{name}", "label": label, "voxel": list(voxel), "box": box, **rest}


LIVER, SPLEEN = place("liver", 10, 10, 10), place("spleen", 30, 10, 10)


@pytest.fixture
def reviews(tmp_path: Path) -> Reviews:
    return Reviews(tmp_path / "task")


def said(found: dict[str, Any] | None) -> list[list[tuple[str, str, int]]]:
    """Answer, person and version, of each place."""
    return [[(a["answer"], a["who"], a["version"]) for a in one["answers"]] for one in found["places"]]


def test_what_nobody_has_looked_at_has_no_list(reviews: Reviews) -> None:
    assert reviews.get("a") is None and reviews.counts(1) == {"right": 0, "fix": 0}
    reviews.forget("a")
    assert not reviews.folder.exists(), "reading makes no folder"


def test_answers_are_kept_with_person_version_place_and_time(reviews: Reviews) -> None:
    reviews.keep("../a b", 3, [LIVER, SPLEEN])
    assert said(reviews.get("../a b")) == [[], []]
    found = reviews.answer("../a b", 3, SPLEEN["id"], "fix", "ann")
    again = Reviews(reviews.folder.parent).get("../a b")
    assert found == again and said(again) == [[], [("fix", "ann", 3)]]
    assert again["version"] == 3 and again["places"][0] == {**LIVER, "answers": []}
    (file,) = reviews.folder.glob("*.json")
    (entry,) = json.loads(file.read_text())["answers"]
    assert entry["place"]["voxel"] == [30, 10, 10] and entry["place"]["label"] == "spleen"
    assert entry["when"].endswith("+00:00") and reviews.get("b") is None


def test_the_last_answer_of_a_person_counts_and_others_stay(reviews: Reviews) -> None:
    reviews.keep("a", 1, [LIVER, SPLEEN])
    for answer, who in (("right", "ann"), ("fix", "ben"), ("fix", "ann")):
        found = reviews.answer("a", None, LIVER["id"], answer, who)
    assert said(found)[0] == [("fix", "ben", 1), ("fix", "ann", 1)]
    reviews.answer("a", 1, SPLEEN["id"], "right", "ann")
    assert reviews.counts(1) == {"right": 1, "fix": 1}, "one place counts once, whoever answered"
    assert reviews.summary(1) == "1 place looked right, 1 to be fixed"
    assert reviews.counts(2) == {"right": 0, "fix": 0} and reviews.summary(2) == ""


def test_a_later_list_shows_answers_about_the_same_place(reviews: Reviews) -> None:
    reviews.keep("a", 1, [LIVER, SPLEEN])
    reviews.answer("a", 1, LIVER["id"], "right", "ann")
    near, far, other = place("liver", 12, 8, 10), place("liver", 13, 10, 10), place("spleen", 10, 10, 10)
    reviews.keep("a", 2, [near, far, other])
    assert said(reviews.get("a")) == [[("right", "ann", 1)], [], []]
    # A new list of the same version: by its name alone, so that a neighbour's answer is not taken for its own.
    reviews.answer("a", 2, near["id"], "fix", "ben")
    reviews.keep("a", 2, [place("liver", 11, 8, 10), near])
    assert said(reviews.get("a")) == [[("right", "ann", 1)], [("right", "ann", 1), ("fix", "ben", 2)]]


@pytest.mark.parametrize(
    ("version", "where", "answer", "status", "message"),
    [
        (1, LIVER["id"], "perhaps", 400, "answer: 'perhaps'; valid are right, fix"),
        (1, LIVER["id"], None, 400, "answer: None; valid are right, fix"),
        (1, LIVER["id"], ["right"], 400, r"answer: \['right'\]; valid are right, fix"),
        (1, "heart-1-2-3", "right", 404, "place: 'heart-1-2-3'; valid are liver-10-10-10, spleen-30-10-10"),
        (1, {}, "right", 404, "place: {}; valid are liver"),
        (2, LIVER["id"], "right", 409, "version: the list is of version 1 by now, the answer of version 2"),
        ("1", LIVER["id"], "right", 409, "the answer of version '1'"),
    ],
)
def test_bad_answers_are_refused_and_change_nothing(
    reviews: Reviews, version: Any, where: Any, answer: Any, status: int, message: str
) -> None:
    reviews.keep("a", 1, [LIVER, SPLEEN])
    (file,) = reviews.folder.glob("*.json")
    before = file.read_bytes()
    with pytest.raises(ReviewError, match=message) as refused:
        reviews.answer("a", version, where, answer, "ann")
    assert refused.value.status == status and file.read_bytes() == before


def test_an_answer_about_a_case_without_a_list_is_refused(reviews: Reviews) -> None:
    with pytest.raises(ReviewError, match="no list of doubts of image 'a' is kept: ask for one first"):
        reviews.answer("a", None, "x", "right", "ann")


def test_a_write_that_fails_leaves_what_was_there(reviews: Reviews, monkeypatch: pytest.MonkeyPatch) -> None:
    reviews.keep("a", 1, [LIVER])
    reviews.answer("a", 1, LIVER["id"], "right", "ann")

    def killed(*_: Any) -> None:
        raise OSError("no room")

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(OSError, match="no room"):
        reviews.answer("a", 1, LIVER["id"], "fix", "ann")
    monkeypatch.undo()
    assert said(reviews.get("a")) == [[("right", "ann", 1)]]


def test_a_damaged_file_is_set_aside(reviews: Reviews) -> None:
    reviews.keep("a", 1, [LIVER])
    (file,) = reviews.folder.glob("*.json")
    for damage in ('{"image": "a"', "[]", '{"image": "a"}'):
        file.write_text(damage)
        assert reviews.get("a") is None and reviews.counts(1) == {"right": 0, "fix": 0}
        assert file.with_suffix(".damaged").read_text() == damage and not file.exists()
    reviews.keep("a", 1, [LIVER])
    assert said(reviews.get("a")) == [[]]


def test_a_case_that_is_removed_is_forgotten(reviews: Reviews) -> None:
    reviews.keep("a", 1, [LIVER])
    reviews.keep("b", 1, [SPLEEN])
    reviews.forget("a")
    assert reviews.get("a") is None and reviews.get("b") is not None
