"""What is remembered, what is undone, and what is forgotten."""

from __future__ import annotations

import numpy as np
import pytest

from lib.interaction import memory
from lib.interaction.memory import Change, Kept, Key, Memory, Session
from lib.interaction.prompts import Asked, Prompts

BOX = (slice(1, 3), slice(0, 2), slice(0, 1))


def labels(*values: int) -> np.ndarray:
    return np.array(values, np.uint8).reshape(4, 2, 1)


def session(values: np.ndarray) -> Session:
    return Session(3, {}, {}, Kept(values), "the model")


def test_a_map_is_kept_in_the_box_of_its_labels() -> None:
    given = labels(0, 0, 1, 0, 0, 2, 0, 0)
    kept = Kept(given)
    assert kept.part.shape == (2, 2, 1) and np.array_equal(kept.full(), given)
    assert np.array_equal(Kept(labels(*[0] * 8)).full(), labels(*[0] * 8))


def test_a_label_s_clicks_can_be_taken_back_and_other_work_stays() -> None:
    found = session(labels(0, 0, 1, 0, 0, 2, 0, 0))
    after = labels(0, 0, 1, 1, 1, 2, 0, 0)
    before = found.labels.full()
    found.change("liver", after, Change(BOX, before[BOX], after[BOX]))
    assert np.array_equal(found.without("liver"), before)
    assert np.array_equal(found.without("spleen"), after)
    # Another label took one of the two voxels meanwhile: it keeps it.
    other = labels(0, 0, 1, 2, 1, 2, 0, 0)
    found.change("spleen", other, Change(BOX, after[BOX], other[BOX]))
    assert np.array_equal(found.without("liver"), labels(0, 0, 1, 2, 0, 2, 0, 0))


def test_a_drawn_map_makes_earlier_clicks_final() -> None:
    found = session(labels(*[0] * 8))
    after = labels(0, 0, 1, 1, 0, 0, 0, 0)
    found.change("liver", after, Change(BOX, found.labels.full()[BOX], after[BOX]))
    drawn = labels(1, 0, 1, 1, 0, 0, 0, 0)
    found.set(drawn, "your scribbles")
    assert np.array_equal(found.without("liver"), drawn) and found.origin == "your scribbles"


def asked(label: str, number: int) -> Asked:
    return Asked(label, "clicks", 3, "evidence", Prompts(np.array([[number, 0, 0]]), np.zeros((0, 3), int)), None, 0)


def test_what_was_asked_is_known_until_a_label_is_submitted() -> None:
    found = session(labels(*[0] * 8))
    found.asked["liver"] = asked("liver", 1)
    found.asked["liver"] = asked("liver", 2)  # with each click a client sends all points again
    found.asked["spleen"] = asked("spleen", 3)
    found.change("spleen", found.labels.full(), None)  # its points were taken back
    found.set(labels(1, 0, 0, 0, 0, 0, 0, 0), "a drawing")
    found.asked["liver"] = asked("liver", 4)
    assert [one.prompts.inside[0, 0] for one in found.history()] == [2, 4]
    found.submitted()
    assert found.history() == []


def test_only_the_latest_answers_are_kept() -> None:
    found = session(labels(*[0] * 8))
    for number in range(memory.ASKED + 5):
        found.asked["liver"] = asked("liver", number)
        found.set(found.labels.full(), "a drawing")
    assert [one.prompts.inside[0, 0] for one in found.history()] == list(range(5, memory.ASKED + 5))


def test_people_images_and_tasks_are_apart() -> None:
    kept = Memory()
    kept.put(Key("ann", "a", "t"), session(labels(*[1] * 8)))
    for other in (Key("ben", "a", "t"), Key("ann", "b", "t"), Key("ann", "a", "u")):
        assert kept.get(other) is None
    kept.put(Key("ben", "a", "t"), session(labels(*[2] * 8)))
    kept.forget("a")
    assert len(kept) == 0


def test_the_least_recently_used_goes_when_memory_is_short() -> None:
    kept = Memory(limit=20)  # of 8 bytes each
    for person in ("ann", "ben"):
        kept.put(Key(person, "a", "t"), session(labels(*[1] * 8)))
    assert kept.get(Key("ann", "a", "t"))
    kept.put(Key("eve", "a", "t"), session(labels(*[1] * 8)))
    assert [bool(kept.get(Key(person, "a", "t"))) for person in ("ann", "ben", "eve")] == [True, False, True]


def test_one_that_is_too_large_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "SESSION_BYTES", 7)
    with pytest.raises(ValueError, match="a: clicks need 0 MB of memory"):
        Memory().put(Key("ann", "a", "t"), session(labels(*[1] * 8)))


def test_one_that_nobody_used_for_long_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = Memory(seconds=60)
    kept.put(Key("ann", "a", "t"), session(labels(*[1] * 8)))
    later = memory.time.monotonic() + 61
    monkeypatch.setattr(memory.time, "monotonic", lambda: later)
    assert kept.get(Key("ann", "a", "t")) is None and len(kept) == 0
