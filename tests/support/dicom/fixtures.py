"""Fixtures of an archive, a series in it, a store on it, and an archive that keeps a record, for the tests that name
this file as a plugin."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from lib.stores.dicom.store import DicomStore
from support.dicom.archive import WAIT, Archive, Recorder
from support.dicom.dicoms import make_series
from support.dicom.stores import SHAPE, TASK, store_on


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Archive]:
    with Archive(tmp_path_factory.mktemp("archive") / "orthanc") as running:
        yield running


@pytest.fixture
def series(archive: Archive, tmp_path: Path) -> Iterator[str]:
    """A series of a new patient; gone afterwards, with its labels."""
    uid = make_series(tmp_path / "series")
    archive.store(tmp_path / "series")
    yield uid
    for ds in archive.segs():
        archive.remove_series(ds.SeriesInstanceUID)
    archive.remove_series(uid)


@pytest.fixture
def store(archive: Archive, series: str, tmp_path: Path) -> DicomStore:
    return store_on(archive, tmp_path / "cache", TASK)


@pytest.fixture
def always_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stores ask the archive every time, so that tests need not wait for what others have stored."""
    monkeypatch.setattr("lib.stores.dicom.listing.FRESH_SECONDS", 0.0)


@pytest.fixture
def mask() -> np.ndarray:
    made = np.zeros(SHAPE, np.uint8)
    made[1:4, 2:5, 1:3], made[5, 5, :], made[8, 6, 4] = 3, 1, 3
    return made


@pytest.fixture
def recorder() -> Iterator[Recorder]:
    server = Recorder()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join(WAIT)
    server.server_close()
