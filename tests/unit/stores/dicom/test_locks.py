"""Requests for one series at the same time: none waits for ever, in whatever order they come."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lib.stores.dicom.cache import ImageCache
from lib.stores.dicom.store import DicomStore
from support.archive import WAIT
from support.dicoms import make_series
from support.helpers import write_nifti
from support.memory import MemoryArchive
from support.stores import SHAPE, TASK, label_file, label_of

pytest_plugins = ("support.archive_fixtures",)


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
