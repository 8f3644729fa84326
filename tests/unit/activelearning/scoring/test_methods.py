"""Scores kept per image and version, after kills and faults too; annotators first."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import numpy as np
import pytest
from monailabel.utils.others.generic import device_list

from lib.activelearning.scoring import CaseScoring, cache, scoring_methods
from lib.activelearning.scoring.forward import score_case
from lib.activelearning.scoring.methods import SERVER, Orphaned
from lib.activelearning.scoring.turns import Turns
from lib.model.nets import build_model
from lib.stores.dicom.archive import ArchiveError
from lib.volumes.transforms import apply, load
from support.scoring import publish, scoring


def test_every_case_is_scored_once_a_version(engine, task, store, tmp_path, monkeypatch):
    method = scoring(engine, tmp_path)
    assert method({}, store) == {"tiny": {"version": 0, "scored": 0, "failed": 0}}, "nothing is published yet"
    publish(engine, task, 1)
    passes = []
    forward = type(build_model(task)).forward
    monkeypatch.setattr(type(build_model(task)), "forward", lambda *a, **k: passes.append(1) or forward(*a, **k))
    assert method({}, store) == {"tiny": {"version": 1, "scored": 4, "failed": 0}}
    assert len(passes) == 4, "one window per case, one pass per window"
    for case in "abcd":
        info = store.get_image_info(case)
        assert cache.version_of(info, "tiny") == 1
        image = apply(load(task, label=False), {"image": store.get_image_uri(case)})["image"]
        expected, _ = score_case(engine.loaded("cpu")[1], image, task)
        found = cache.scores_of(info, "tiny")
        assert (found.entropy, found.alignment) == pytest.approx((expected.entropy, expected.alignment), abs=1e-5)
        assert np.allclose(found.vector, expected.vector, atol=1e-3)
    assert method.info()["progress"]["done"] == method.info()["progress"]["total"] == 4

    passes.clear()
    assert CaseScoring("alignment", method.infers, tmp_path / "models", 200)({}, store)["tiny"]["scored"] == 0
    assert passes == [], "another method finds everything there"
    publish(engine, task, 2)
    assert method.missing(store, "tiny") and method({"model": ["tiny"]}, store)["tiny"] == {
        **{"version": 2, "scored": 4, "failed": 0}
    }
    assert not method.missing(store, "tiny")
    with pytest.raises(ValueError, match="unknown model 'liver'; valid are all, tiny"):
        method({"model": "liver"}, store)


def test_a_killed_run_goes_on_where_it_was(engine, task, store, tmp_path, monkeypatch):
    """Killed after the second case: two are kept, and the next run scores the other two."""
    publish(engine, task, 1)
    method = scoring(engine, tmp_path)
    kept: list[str] = []
    update = store.update_image_info

    def killed(case, news):
        if len(kept) == 2:
            raise KeyboardInterrupt
        kept.append(case)
        update(case, news)

    monkeypatch.setattr(store, "update_image_info", killed)
    with pytest.raises(KeyboardInterrupt):
        method({}, store)
    monkeypatch.undo()
    assert len(method.missing(store, "tiny")) == 2
    assert method({}, store)["tiny"]["scored"] == 2
    assert not engine.loaded(device_list()[0].split()[0])[1]._forward_pre_hooks


def test_a_version_published_meanwhile_is_scored_at_once(engine, task, store, tmp_path, monkeypatch):
    publish(engine, task, 1)
    update, calls = store.update_image_info, []

    def publishing(case, news):
        update(case, news)
        calls.append(case)
        if len(calls) == 2:
            publish(engine, task, 2)

    monkeypatch.setattr(store, "update_image_info", publishing)
    assert scoring(engine, tmp_path)({}, store)["tiny"] == {"version": 2, "scored": 6, "failed": 0}
    assert {cache.version_of(store.get_image_info(c), "tiny") for c in "abcd"} == {2}


def test_a_case_that_cannot_be_read_is_noted_and_not_tried_again(engine, task, store, tmp_path):
    publish(engine, task, 1)
    (store.folder / "a.nii.gz").write_bytes(b"no volume")
    method = scoring(engine, tmp_path)
    assert method({}, store)["tiny"] == {"version": 1, "scored": 3, "failed": 1}
    assert "cannot be read" in store.get_image_info("a")[cache.KEY]["tiny"]["failed"]
    assert method.missing(store, "tiny") == []


def test_an_archive_that_is_down_says_nothing_about_a_case(engine, task, store, tmp_path, monkeypatch):
    publish(engine, task, 1)

    def down(case):
        raise ArchiveError("did not answer")

    monkeypatch.setattr(store, "get_image_uri", down)
    with pytest.raises(ArchiveError):
        scoring(engine, tmp_path)({}, store)
    assert len(scoring(engine, tmp_path).missing(store, "tiny")) == 4


def test_at_most_so_many_unlabelled_cases_are_scored(engine, task, store, tmp_path):
    publish(engine, task, 1)
    some = scoring(engine, tmp_path, limit=2).missing(store, "tiny")
    assert len(some) == 3 and "b" in some, "two unlabelled ones, and the labelled one"
    (store.folder / "a0.nii.gz").write_bytes((store.folder / "a.nii.gz").read_bytes())
    assert set(some) - {"b"} <= set(scoring(engine, tmp_path, limit=3).missing(store, "tiny"))


def test_two_processes_do_not_score_at_once(engine, task, store, tmp_path):
    publish(engine, task, 1)
    method = scoring(engine, tmp_path)
    code = "import sys, filelock; lock = filelock.FileLock(sys.argv[1]); lock.acquire(); print('held', flush=True)"
    code += "; sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(method.lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout.readline() == b"held\n"
        assert method({}, store) == {}
        other.kill()
    assert method({}, store)["tiny"]["scored"] == 4, "the kernel gives the lock of a killed process back"


def test_a_scoring_process_ends_with_its_server(engine, task, store, tmp_path, monkeypatch):
    publish(engine, task, 1)
    with subprocess.Popen([sys.executable, "-c", "pass"]) as gone:
        gone.wait()
    monkeypatch.setenv(SERVER, str(gone.pid))
    with pytest.raises(Orphaned):
        scoring(engine, tmp_path)({}, store)
    monkeypatch.setenv(SERVER, str(os.getppid()))
    assert scoring(engine, tmp_path)({}, store)["tiny"]["scored"] == 4


def test_scoring_waits_for_requests_and_requests_for_nobody(tmp_path):
    turns, passed = Turns(tmp_path / "m" / "requests.lock"), threading.Event()

    def wait() -> None:
        turns.wait()
        passed.set()

    with turns.request(), turns.request():
        threading.Thread(target=wait, daemon=True).start()
        assert not passed.wait(0.3)
        with turns.request():  # a later request overtakes who waits
            pass
        assert not passed.is_set()
    assert passed.wait(10)
    (tmp_path / "file").write_text("")
    with Turns(tmp_path / "file" / "requests.lock").request():
        Turns(tmp_path / "file" / "requests.lock").wait()


def test_the_methods_that_clients_show(engine, task, tmp_path):
    methods = scoring_methods({"tiny": engine}, {"tiny": task}, tmp_path, 5)
    assert set(methods) == {"entropy", "alignment", "dice"}
    for method in methods.values():
        options = method.info()["config"].values()
        assert all(isinstance(o, str) or all(isinstance(x, str) for x in o) for o in options)
