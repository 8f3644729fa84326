"""An archive: what is drawn is kept here before it is sent, and nothing but series is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from monailabel.datastore.dicom import DICOMwebClientX

from lib.stores.dicom.archive import Archive, ArchiveError
from lib.stores.dicom.store import DicomStore
from lib.stores.errors import StoreError
from support.dicom.archive import Recorder, free_port, once_a_connection
from support.drawn import history, ten_drawings, value_of
from support.helpers import tiny_task

pytest_plugins = ("support.dicom.fixtures",)


@pytest.fixture
def labels(tmp_path: Path) -> list[Path]:
    return ten_drawings(tmp_path / "drawn")


@pytest.fixture
def dicom(tmp_path: Path) -> DicomStore:
    """A store whose archive is down."""
    client = DICOMwebClientX(url=f"http://127.0.0.1:{free_port()}/dicom-web")
    return DicomStore(client, {}, str(tmp_path / "cache"), tasks=[tiny_task()], software="test")


def test_a_label_is_kept_before_the_archive_is_asked(dicom: DicomStore, labels: list[Path]) -> None:
    for i in (1, 2):
        with pytest.raises(
            ArchiveError, match="did not answer.*The drawing is kept as labels/history/final/1.2.840.5/"
        ):
            dicom.save_label("1.2.840.5", str(labels[i]), "final", {"user": "ann"})
    assert [value_of(p) for p in history(dicom.folder, "1.2.840.5")] == [1, 2]
    assert all(p.name.endswith("-ann.nii.gz") for p in history(dicom.folder, "1.2.840.5"))


def test_a_connection_that_the_archive_may_be_closing_is_not_used_again(recorder: Recorder) -> None:
    recorder.answer = once_a_connection
    archive = Archive(DICOMwebClientX(url=recorder.url), timeout=10)
    assert [archive.segmentations() for _ in range(3)] == [[], [], []]
    assert len(recorder.requests) == 3


@pytest.mark.parametrize("uid", ["..", "../1.2", "1..2", "1.2/..", "a", "", "1." * 40, "1.2\n", None])
def test_an_archive_knows_series_only(dicom: DicomStore, labels: list[Path], uid: Any) -> None:
    for call in (
        lambda: dicom.save_label(uid, str(labels[1]), "final", {}),
        lambda: dicom.get_image_uri(uid),
        lambda: dicom.get_label_uri(uid, "final"),
        lambda: dicom.remove_image(uid),
        lambda: dicom.remove_label(uid, "final"),
    ):
        with pytest.raises(StoreError, match="expected a series instance UID"):
            call()
    assert list(dicom.folder.rglob("*.nii.gz")) == []


def test_an_archive_checks_tags(dicom: DicomStore, labels: list[Path]) -> None:
    with pytest.raises(StoreError, match="valid are up to 64 letters"):
        dicom.save_label("1.2.840.5", str(labels[1]), "../x", {})
    with pytest.raises(StoreError, match="valid are up to 64 letters"):
        dicom.get_label_uri("1.2.840.5", "history")
