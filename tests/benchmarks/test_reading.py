"""The benchmark of reading: its texts, and what it counts, on masks drawn by hand."""

import numpy as np
import pytest

from benchmarks.text import reading
from benchmarks.text.reading import Text, announced, compare, table, texts, warned
from lib.tasks import ATTRIBUTES, load_task


@pytest.fixture(scope="module")
def task():
    return load_task("hippocampus-mr")


def test_every_text_has_a_row_a_class(task):
    found = list(texts(task))
    kinds = {text.kind for text in found}
    assert {"aside", "aside, exchanged", "own, exchanged", "names only", "without the name"} <= kinds
    assert {f"stranger {style}" for style in ("plain", "notes", "textbook", "report")} <= kinds
    assert "absent, ordinary, aside, all classes" in kinds and "anterior and posterior exchanged" in kinds
    width = len(ATTRIBUTES)
    for text in found:
        assert [len(row) for row in text.rows] == [width - (text.concepts is not None)] * len(task.classes)
    own = task.text_rows()
    by_kind = {text.kind: text for text in found}
    assert by_kind["own, exchanged"].rows == own[::-1] and by_kind["own, exchanged"].order == (1, 0)
    pair = by_kind["anterior and posterior exchanged"]
    assert pair.order == (1, 0) and "The posterior hippocampus" in pair.rows[0][0]


def test_no_stranger_repeats_what_training_reads():
    for name in ("hippocampus-mr", "acdc-mr", "quickstart"):
        task = load_task(name)
        written = {s.lower() for text in task.concepts.classes.values() for s in text.written()}
        for classes in reading.strangers(task).values():
            assert set(classes) == set(task.classes)
            assert all(set(said) == set(ATTRIBUTES) for said in classes.values())
            assert not written & {s.lower() for said in classes.values() for s in said.values()}


LABEL = np.array([[1, 1, 1, 1, 2, 2, 0, 0]])
OTHER = np.array([[2, 2, 2, 2, 1, 1, 0, 0]])
HALF = np.array([[1, 1, 0, 0, 2, 2, 0, 0]])
NOTHING = np.zeros_like(LABEL)


def test_what_is_meant_and_what_is_drawn(task):
    assert compare(task, [LABEL], [LABEL], [LABEL]) == {"meant": 1.0, "other": 0.0, "drawn": 1.0}
    half = compare(task, [HALF], [LABEL], [LABEL])
    assert half["meant"] == pytest.approx((2 * 2 / 6 + 1) / 2, abs=1e-4) and half["drawn"] == pytest.approx(
        4 / 6, abs=1e-4
    )
    exchanged = Text("", [[], []], order=(1, 0))
    assert compare(task, [OTHER], [LABEL], [LABEL], exchanged)["meant"] == 1.0
    assert compare(task, [LABEL], [LABEL], [LABEL], exchanged) == {"meant": 0.0, "other": 1.0, "drawn": 1.0}
    gone = Text("", [[], []], replaced=(0, 1))
    assert compare(task, [NOTHING], [LABEL], [LABEL], gone) == {"meant": None, "other": None, "drawn": 0.0}
    one = Text("", [[], []], replaced=(0,))
    assert compare(task, [HALF], [LABEL], [LABEL], one) == {"meant": 1.0, "other": 0.0, "drawn": 0.5}


def test_warnings_are_counted_by_what_was_drawn(task):
    said = {"anterior hippocampus": "posterior hippocampus"}
    right = announced(task, [HALF], [LABEL], said)
    assert right == [[0.6667, True], [1.0, False]]
    wrong = announced(task, [OTHER], [LABEL], said)
    assert wrong == [[0.0, True], [0.0, False]]
    run = {"name": "a", "texts": [{"warnings": right}, {"warnings": wrong}, {"kind": "own"}]}
    assert warned([run]).splitlines()[-1] == "| a | 2 | 1 | 2 | 1 |"


def test_texts_of_a_kind_share_a_row():
    rows = [
        {"kind": "x", "meant": 0.5, "other": None, "drawn": 1.0},
        {"kind": "x", "meant": 1, "other": None, "drawn": 0},
    ]
    assert table([{"name": "a", "cases": 1, "texts": rows}]).splitlines()[-1] == "| x | 0.750 |  | 0.500 |"
