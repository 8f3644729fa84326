"""Two annotators are never offered the same case, and no lease outlives its time."""

from __future__ import annotations

import json
import threading
from types import SimpleNamespace
from typing import Any

import pytest

from lib.activelearning.leases import Leases, Offer
from lib.activelearning.strategies import First, Random
from lib.app.bipvl import BiPVLApp
from lib.stores.dicom.archive import ArchiveError
from lib.stores.errors import BusyError, NotInStoreError


class Clock:
    """A clock that the test sets."""

    now = 1_700_000_000.0

    def __call__(self) -> float:
        return self.now


class Store:
    """What strategies ask a datastore for."""

    def __init__(self, unlabelled: list[str], info: dict | None = None) -> None:
        self.unlabelled, self.info = unlabelled, info or {}

    def get_unlabeled_images(self, label_tag=None, labels=None):
        return list(self.unlabelled)

    def get_image_info(self, image_id):
        return self.info


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def leases(tmp_path, clock):
    return Leases(tmp_path / "model" / "leases.json", 10, clock)


def test_a_case_is_taken_for_others_only(leases):
    leases.lease("a", "ann")
    assert leases.taken("ann") == set()
    assert leases.taken("bob") == {"a"}


def test_one_lease_a_person_and_one_a_case(leases):
    leases.lease("a", "ann")
    leases.lease("b", "ann")
    assert leases.taken("bob") == {"b"}
    leases.lease("b", "bob")
    assert leases.taken("bob") == set()
    assert leases.taken("ann") == {"b"}


@pytest.mark.parametrize("call", ["get_image_uri", "get_image_info"])
@pytest.mark.parametrize("error", [ArchiveError("down"), OSError("gone"), BusyError("busy"), NotInStoreError("gone")])
def test_what_cannot_be_had_is_not_leased(leases, call, error):
    """Nobody works on it: the next one who asks is offered it."""
    store: Any = Store(["a"])
    store.get_image_uri = lambda case: f"/studies/{case}.nii.gz"
    app: Any = SimpleNamespace(strategies={"first": First()}, leases=leases, background=None, datastore=lambda: store)
    works = getattr(store, call)

    def fails(case):
        assert leases.taken("bob") == {case}
        raise error

    setattr(store, call, fails)
    with pytest.raises(type(error), match=str(error)):
        BiPVLApp.next_sample(app, {"strategy": "first", "who": "ann"})
    setattr(store, call, works)
    assert leases.taken("bob") == set()
    assert BiPVLApp.next_sample(app, {"strategy": "first", "who": "bob"})["path"] == "/studies/a.nii.gz"
    assert BiPVLApp.next_sample(app, {"strategy": "first", "who": "ann"}) == {}


def test_a_lease_ends_by_release_or_time(leases, clock):
    leases.lease("a", "ann")
    leases.lease("b", "bob")
    leases.release("a")
    leases.release("unknown")
    assert leases.taken("cem") == {"b"}
    clock.now += 10 * 60
    assert leases.taken("cem") == {"b"}
    clock.now += 1
    assert leases.taken("cem") == set()


@pytest.mark.parametrize("jump", [-86400 * 365, -1, 86400 * 365])
def test_a_clock_that_jumps_locks_no_case(leases, clock, jump):
    leases.lease("a", "ann")
    clock.now += jump
    assert leases.taken("bob") == set()


def test_leases_survive_a_restart(leases, clock, tmp_path):
    leases.lease("a", "ann")
    again = Leases(tmp_path / "model" / "leases.json", 10, clock)
    assert again.taken("bob") == {"a"}
    # A shorter time counts for old leases too.
    assert Leases(tmp_path / "model" / "leases.json", 5, clock).taken("bob") == set()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"a": 3}', '{"a": {"person": "x"}}', '{"a": {"until": "soon"}}'])
def test_a_damaged_file_is_no_obstacle(tmp_path, clock, text, caplog):
    path = tmp_path / "leases.json"
    path.write_text(text)
    leases = Leases(path, 10, clock)
    assert "cannot be read" in caplog.text
    leases.lease("a", "ann")
    assert json.loads(path.read_text())["a"]["person"] == "ann"


def test_an_unwritable_file_leaves_leases_in_memory(tmp_path, clock, caplog):
    (tmp_path / "model").write_text("a file where the folder should be")
    leases = Leases(tmp_path / "model" / "leases.json", 10, clock)
    leases.lease("a", "ann")
    assert leases.taken("bob") == {"a"}
    assert "cannot be written" in caplog.text


def test_zero_minutes_switch_leases_off(tmp_path, clock):
    leases = Leases(tmp_path / "leases.json", "0", clock)
    leases.lease("a", "ann")
    assert leases.taken("bob") == set()


@pytest.mark.parametrize("minutes", ["-1", "soon", "nan", "inf", ""])
def test_minutes_must_be_a_number(tmp_path, minutes):
    with pytest.raises(ValueError, match="lease_minutes: expected a number of minutes"):
        Leases(tmp_path / "leases.json", minutes)


def test_many_at_once_get_different_cases(leases):
    """Eight annotators, eight cases: nobody shares, nobody goes without."""
    store, found = Store([f"case{i}" for i in range(8)]), []

    def ask(person: str) -> None:
        with leases.lock:
            case = First()({}, Offer(store, leases.taken(person)))["id"]
            leases.lease(case, person)
        found.append(case)

    threads = [threading.Thread(target=ask, args=(f"person{i}",)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == store.unlabelled
    assert First()({}, Offer(store, leases.taken("latecomer"))) is None


@pytest.mark.parametrize("offered", [{}, {"random": {"ts": 9e9}}, {"random": "x"}, "x", {"random": {"ts": None}}])
def test_random_copes_with_any_note_of_an_offer(offered):
    """Offered this second, in the future, or an info that somebody filled with something else."""
    store = Store(["only"], {"strategy": offered})
    assert Random()({"strategy": "random"}, Offer(store, set()))["id"] == "only"
