"""Requests for one series at the same time: none waits for ever, in whatever order they come."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lib.stores.dicom.cache import ImageCache
from lib.stores.dicom.store import DicomStore
from lib.stores.errors import BusyError, ReadOnlyError
from lib.stores.locks import Lock, Order
from support.dicom.archive import WAIT
from support.dicom.dicoms import make_series
from support.dicom.memory import MemoryArchive
from support.dicom.stores import SHAPE, TASK, label_file, label_of
from support.drawn import history
from support.helpers import write_nifti

pytest_plugins = ("support.dicom.fixtures",)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_series(tmp_path / "series")
    return tmp_path / "series"


@pytest.fixture
def memory(folder: Path) -> MemoryArchive:
    return MemoryArchive(folder)


@pytest.fixture
def kept(memory: MemoryArchive, tmp_path: Path) -> DicomStore:
    return memory.store_of(tmp_path / "cache", TASK)


def in_thread(work: Callable[[], Any], errors: list[BaseException]) -> threading.Thread:
    def run() -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread


@pytest.mark.parametrize("other", ["a map is kept", "a label's info is changed", "a label is read"])
def test_a_save_and_another_request_for_the_same_series(
    other: str,
    memory: MemoryArchive,
    kept: DicomStore,
    mask: np.ndarray,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The save is held in the archive until the other request wants the series; then both must end."""
    (uid,) = kept.list_images()
    file = label_file(kept, uid, mask, tmp_path / "l.nii.gz")
    kept.save_label(uid, str(file), "final", {})
    entropy = write_nifti(tmp_path / "map.nii.gz", np.zeros(SHAPE, np.uint8))
    requests = {
        "a map is kept": lambda: kept.keep_map(uid, entropy, {"unit": "percent"}),
        "a label's info is changed": lambda: kept.update_label_info(uid, "final", {"remark": "checked"}),
        "a label is read": lambda: kept.get_label_uri(uid, "final"),
    }
    saving, wanted, lock = threading.Event(), threading.Event(), ImageCache.lock

    def taking(_: Any) -> None:
        saving.set()
        assert wanted.wait(WAIT)

    def asked(cache: ImageCache, series: str) -> Any:
        if saving.is_set():
            wanted.set()
        return lock(cache, series)

    memory.taking = taking
    monkeypatch.setattr(ImageCache, "lock", asked)
    errors: list[BaseException] = []
    corrected = label_file(kept, uid, np.where(mask == 3, 2, mask).astype(np.uint8), tmp_path / "m.nii.gz")
    save = in_thread(lambda: kept.save_label(uid, str(corrected), "final", {}), errors)
    assert saving.wait(WAIT)
    request = in_thread(requests[other], errors)
    for thread in (save, request):
        thread.join(WAIT)
    assert not save.is_alive() and not request.is_alive(), "a save and a request wait for one another"
    assert errors == []
    np.testing.assert_array_equal(label_of(kept, uid), np.where(mask == 3, 2, mask))


def test_info_of_a_label_whose_copy_is_not_here(
    memory: MemoryArchive, kept: DicomStore, mask: np.ndarray, tmp_path: Path
) -> None:
    """The copy has to be made before the info can be changed, and both write in the folder."""
    (uid,) = kept.list_images()
    kept.save_label(uid, str(label_file(kept, uid, mask, tmp_path / "l.nii.gz")), "final", {})
    other, errors = memory.store_of(tmp_path / "other", TASK), list[BaseException]()
    work = in_thread(lambda: other.update_label_info(uid, "final", {"remark": "checked"}), errors)
    work.join(WAIT)
    assert not work.is_alive(), "a request waits for itself"
    assert errors == []
    assert other.get_label_info(uid, "final")["remark"] == "checked"


def test_two_processes_that_download_one_series(
    memory: MemoryArchive, kept: DicomStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server and a round on one folder: one is about to put its copy in its place when the other one is, too."""
    (uid,) = kept.list_images()
    other, remove, errors = memory.store_of(tmp_path / "cache", TASK), shutil.rmtree, list[BaseException]()
    threads: list[threading.Thread] = []

    def meanwhile(path: Any, **more: Any) -> None:
        remove(path, **more)
        if Path(path).name == uid and not threads:
            threads.append(in_thread(lambda: other.get_image_uri(uid), errors))
            threads[0].join(1)

    monkeypatch.setattr("lib.stores.dicom.cache.shutil.rmtree", meanwhile)
    image = kept.get_image_uri(uid)
    threads[0].join(WAIT)
    assert not threads[0].is_alive() and errors == []
    assert other.get_image_uri(uid) == image
    assert memory.asked.count("iter_series") == 2


# --- the order --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("later", [Order.SERIES, Order.LISTING, Order.PROPOSALS, Order.FOLDER])
def test_locks_out_of_order_are_a_mistake_that_shows_at_once(later: Order) -> None:
    """Also two series at once: another thread could take them the other way round."""
    first, held = Lock(Order.SERIES, "one series"), Lock(later, "what is held")
    with held, pytest.raises(AssertionError, match="one series is locked while holding what is held"):
        first.__enter__()
    with first, first:
        pass


def test_a_lock_that_cannot_be_had_is_an_answer_that_says_so() -> None:
    lock, free = Lock(Order.SERIES, "series 1.2.3", seconds=0.01), threading.Event()
    held = threading.Event()

    def hold() -> None:
        with lock:
            held.set()
            free.wait(WAIT)

    thread = in_thread(hold, [])
    assert held.wait(WAIT)
    with pytest.raises(BusyError, match="series 1.2.3: another request has been at work for 0.01 s") as caught, lock:
        pass
    assert caught.value.status == 503
    free.set()
    thread.join(WAIT)
    with lock, Lock(Order.FOLDER, "the folder"):  # nothing of the failed attempt is left
        pass


def test_a_drawing_is_kept_while_others_are_at_work(
    kept: DicomStore, mask: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (uid,) = kept.list_images()
    file = label_file(kept, uid, mask, tmp_path / "l.nii.gz")
    free, held, lock = threading.Event(), threading.Event(), Lock(Order.SERIES, "the series", seconds=0.01)
    monkeypatch.setattr(ImageCache, "lock", lambda self, series: lock)

    def hold() -> None:
        with lock:
            held.set()
            free.wait(WAIT)

    thread = in_thread(hold, [])
    assert held.wait(WAIT)
    with pytest.raises(BusyError, match="another request.*The drawing is kept as labels/history/final/"):
        kept.save_label(uid, str(file), "final", {"user": "ann"})
    free.set()
    thread.join(WAIT)
    (drawing,) = history(kept.folder, uid)
    assert drawing.read_bytes() == file.read_bytes()


def test_a_read_only_archive_refuses_every_change(
    memory: MemoryArchive, kept: DicomStore, mask: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Copies of what the archive holds are made all the same."""
    (uid,) = kept.list_images()
    file = label_file(kept, uid, mask, tmp_path / "l.nii.gz")
    kept.save_label(uid, str(file), "final", {})
    monkeypatch.setattr("lib.stores.dicom.store.settings.MONAI_LABEL_DATASTORE_READ_ONLY", True)
    reading = memory.store_of(tmp_path / "reading", TASK)
    assert reading.read_only and not kept.read_only
    np.testing.assert_array_equal(label_of(reading, uid), mask)
    for change in (
        lambda: reading.save_label(uid, str(file), "final", {}),
        lambda: reading.keep_map(uid, file, {}),
        lambda: reading.update_image_info(uid, {"a": 1}),
        lambda: reading.update_label_info(uid, "final", {"a": 1}),
        lambda: reading.remove_label(uid, "original"),
        lambda: reading.set_name("x"),
        lambda: reading.set_description("x"),
    ):
        with pytest.raises(ReadOnlyError, match="can only be read"):
            change()
