"""Every label that was drawn is somewhere, whole, after anything that can happen to a server or its disk."""

from __future__ import annotations

import errno
import gzip
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lib.stores.cases import read_datalist
from lib.stores.errors import ReadOnlyError, StoreError
from lib.stores.local import LocalStore
from support.drawn import everything, history, ten_drawings, two_cases, value_of

CHILDREN = multiprocessing.get_context("fork")  # an import of the stack takes half a minute


@pytest.fixture
def studies(tmp_path: Path) -> Path:
    return two_cases(tmp_path / "studies")


@pytest.fixture
def labels(tmp_path: Path) -> list[Path]:
    return ten_drawings(tmp_path / "drawn")


@contextmanager
def mounted(folder: Path, *options: str) -> Iterator[Callable[..., Any]]:
    """A file system of its own in a folder; yields a function that mounts it again with other options."""

    def mount(*more: str) -> None:
        done = subprocess.run(["mount", "-t", "tmpfs", *more, "tmpfs", str(folder)], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"this test mounts a file system, which is not permitted here: {done.stderr.strip()}")

    folder.mkdir(parents=True, exist_ok=True)
    try:
        mount(*options)
    except FileNotFoundError:
        pytest.skip("this test mounts a file system, and there is no program mount")
    try:
        yield mount
    finally:
        subprocess.run(["umount", str(folder)], check=True)


# Many at once -----------------------------------------------------------------------------------------------------


def test_eight_threads_on_one_case(studies, labels):
    store = LocalStore(studies)
    threads = [
        threading.Thread(target=store.save_label, args=("a", str(labels[i]), "final", {"user": str(i)}))
        for i in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    current = value_of(store.get_label_uri("a", "final"))
    assert store.get_label_info("a", "final")["user"] == str(current)
    assert sorted([current, *map(value_of, history(studies))]) == list(range(8))
    for path in history(studies):
        assert path.name.endswith(f"-{value_of(path)}.nii.gz"), "each under its own user"


def _annotate(studies: Path, labels: list[Path], mine: list[int]) -> None:
    store = LocalStore(studies)
    for i in mine:
        store.save_label("a", str(labels[i]), "final", {"user": str(i)})
        store.update_image_info("b", {f"seen by {i}": True})


def test_two_processes_on_one_folder(studies, labels):
    halves = [CHILDREN.Process(target=_annotate, args=(studies, labels, h)) for h in ([1, 3, 5, 7], [2, 4, 6, 8])]
    for process in halves:
        process.start()
    for process in halves:
        process.join()
        assert process.exitcode == 0
    store = LocalStore(studies)
    current = value_of(store.get_label_uri("a", "final"))
    assert sorted([current, *map(value_of, history(studies))]) == list(range(1, 9))
    assert {k for k in store.get_image_info("b") if k.startswith("seen")} == {f"seen by {i}" for i in range(1, 9)}


# Killed at any point ----------------------------------------------------------------------------------------------

STEPS = ("open", "link", "replace", "rename", "unlink", "fsync", "utime")


def _save_and_die(studies: Path, label: Path, user: str, step: int) -> None:
    """Save, but be killed before the given step of those that touch the disk."""
    store, done = LocalStore(studies), 0

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal done
            done += 1
            if done == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        return call

    for name in STEPS:
        setattr(os, name, counted(getattr(os, name)))
    store.save_label("a", str(label), "final", {"user": user, "annotated": [user]})
    os._exit(0)


def cut_off_saves(before: Path, studies: Path, label: Path, user: str) -> Iterator[int]:
    """The folder after a save that was killed before its first, second, … step, and at last after a whole one.

    Yields whose label is there then: before one step it is the old one, from there on the new one.
    """
    outcomes: list[int] = []
    child = None
    while child is None or child.exitcode:
        shutil.rmtree(studies, ignore_errors=True)
        shutil.copytree(before, studies)
        child = CHILDREN.Process(target=_save_and_die, args=(studies, label, user, len(outcomes) + 1))
        child.start()
        child.join()
        assert child.exitcode in (0, -signal.SIGKILL)
        store = LocalStore(studies)
        assert not list(studies.rglob(".saving-*")), "leftovers go at the next start"
        outcomes.append(value_of(store.get_label_uri("a", "final")))
        assert_records_fit(studies)
        yield outcomes[-1]
    assert len(outcomes) > 10
    assert outcomes[0] != outcomes[-1] == int(user)
    assert outcomes.count(outcomes[0]) == outcomes.index(int(user)), "never back to the old one"


def assert_records_fit(studies: Path) -> None:
    """Labels hold the number of who drew them: each has its own record, now and in the history."""
    store = LocalStore(studies)
    user = str(value_of(store.get_label_uri("a", "final")))
    assert store.get_label_info("a", "final")["user"] == user
    assert store.datalist()[0]["annotated"] == read_datalist(studies)[0]["annotated"] == [user]
    for path in history(studies):
        record = path.with_name(f"{path.name}.json")
        assert f"-{value_of(path)}.nii" in path.name
        # The record is written after the label; a kill in between is made good by the next save.
        assert not record.exists() or json.loads(record.read_text())["info"]["user"] == str(value_of(path))


@pytest.mark.parametrize("suffix", [".nii.gz", ".nii"])
def test_kill_before_every_step_of_a_save(studies, labels, tmp_path, suffix):
    """Old or new, the label is whole and its record, with the declared classes, is its own."""
    (tmp_path / "drawn" / "2.nii").write_bytes(gzip.decompress(labels[2].read_bytes()))
    LocalStore(studies).save_label("a", str(labels[1]), "final", {"user": "1", "annotated": ["1"]})
    before = studies.rename(tmp_path / "before")
    for current in cut_off_saves(before, studies, tmp_path / "drawn" / f"2{suffix}", "2"):
        assert 1 in {current, *map(value_of, history(studies))}, "what was drawn before is somewhere"
        LocalStore(studies).save_label("a", str(labels[3]), "final", {"user": "3", "annotated": ["3"]})
        assert_records_fit(studies)
        assert {1, current} <= {value_of(p) for p in history(studies)}
        assert len(list(history(studies)[0].parent.glob("*.json"))) == len(history(studies))


def test_kill_after_a_kill(studies, labels, tmp_path):
    """A save that was killed between label and record is followed by another that is killed, at any step."""
    LocalStore(studies).save_label("a", str(labels[1]), "final", {"user": "1", "annotated": ["1"]})
    before = studies.rename(tmp_path / "before")
    once = tmp_path / "once"
    for current in cut_off_saves(before, studies, labels[2], "2"):
        if current == 2 and not once.exists():  # the label is there, its record only announced
            shutil.copytree(studies, once)
    for current in cut_off_saves(once, studies, labels[3], "3"):
        assert {1, 2} <= {current, *map(value_of, history(studies))}


def _save_forever(studies: Path, labels: list[Path]) -> None:
    store = LocalStore(studies)
    while True:
        for i in (1, 2, 3):
            store.save_label("a", str(labels[i]), "final", {"user": str(i)})


def test_kill_at_random_times_while_others_read(studies, labels):
    LocalStore(studies).save_label("a", str(labels[1]), "final", {"user": "1"})
    waits = np.random.default_rng(0).uniform(0.05, 0.4, 12)
    for wait in waits:
        child = CHILDREN.Process(target=_save_forever, args=(studies, labels))
        child.start()
        reader = LocalStore(studies, read_only=True)
        stop = threading.Event()
        threading.Timer(wait, stop.set).start()
        while not stop.is_set():
            assert value_of(reader.get_label_uri("a", "final")) in (1, 2, 3), "no moment without a whole label"
        child.kill()
        child.join()
        assert reader.get_label_info("a", "final")["user"] == str(value_of(reader.get_label_uri("a", "final")))
    for path in history(studies):
        assert path.name.endswith(f"-{value_of(path)}.nii.gz")


# Full disk, read-only disk ----------------------------------------------------------------------------------------


def test_a_full_disk_changes_nothing(studies, labels, tmp_path):
    with mounted(tmp_path / "disk", "-o", "size=2m"):
        disk = tmp_path / "disk"
        for path in studies.glob("*.nii.gz"):
            (disk / path.name).write_bytes(path.read_bytes())
        store = LocalStore(disk)
        store.save_label("a", str(labels[1]), "final", {"user": "ann", "annotated": ["liver"]})
        free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_bsize
        # From no room at all up to where it fits: every step of a save meets the full disk once.
        refused = 0
        for room in range(0, 60_000, 4096):
            (disk / "ballast").write_bytes(bytes(free - room))
            before = everything(disk)
            try:
                store.save_label("a", str(labels[2]), "final", {"user": "bob"})
            except OSError as error:
                assert error.errno == errno.ENOSPC
                refused += 1
                after = everything(disk)
                journal = [n for n in before if n.startswith("datastore_v2.json")]
                assert {k: v for k, v in after.items() if k not in journal and not k.startswith("datastore_v2")} == {
                    k: v for k, v in before.items() if k not in journal
                }
                assert store.datalist()[0]["annotated"] == ["liver"]
                assert store.get_label_info("a", "final")["user"] == "ann"
            else:
                break
            finally:
                (disk / "ballast").unlink()
        assert refused >= 3
        assert value_of(store.get_label_uri("a", "final")) == 2
        assert store.get_label_info("a", "final")["user"] == "bob"
        assert [value_of(p) for p in history(disk)] == [1]


def test_a_read_only_disk(studies, labels, tmp_path):
    with mounted(tmp_path / "disk") as mount:
        disk = tmp_path / "disk"
        for path in studies.glob("*.nii.gz"):
            (disk / path.name).write_bytes(path.read_bytes())
        mount("-o", "remount,ro")
        store = LocalStore(disk)
        assert store.list_images() == store.get_unlabeled_images() == ["a", "b"]
        assert store.get_image_info("a")["name"] == "a.nii.gz"
        assert store.datalist() == []
        for call in (
            lambda: store.save_label("a", str(labels[1]), "final", {}),
            lambda: store.add_image("n", str(labels[1]), {}),
            lambda: store.update_image_info("a", {"x": 1}),
            lambda: store.remove_image("a"),
        ):
            with pytest.raises(ReadOnlyError, match="can only be read") as error:
                call()
            assert error.value.status == 403
        (labels[0]).write_bytes(b"no label")
        with pytest.raises(StoreError, match="could not be kept"):
            store.save_label("a", str(labels[0]), "final", {})
        mount("-o", "remount,rw")
        store.save_label("a", str(labels[1]), "final", {})
        assert store.get_labeled_images() == ["a"]
