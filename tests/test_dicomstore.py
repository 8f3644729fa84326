"""An archive: what is drawn is kept here before it is sent, and nothing but series is asked for."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from drawn import history, ten_drawings, value_of
from lib.datastores import StoreError
from lib.dicomstore import DicomStore


@pytest.fixture
def labels(tmp_path: Path) -> list[Path]:
    return ten_drawings(tmp_path / "drawn")


class Archive:
    """A DICOMweb client whose archive is down."""

    base_url = "http://archive.test/dicom-web"

    def __getattr__(self, name: str) -> Any:
        raise ConnectionError("the archive is down")


@pytest.fixture
def dicom(tmp_path):
    store = DicomStore(client=Archive(), search_filter={}, cache_path=str(tmp_path / "cache"))
    yield SimpleNamespace(store=store, folder=Path(store._datastore_path))
    store._observer.stop()


def test_a_label_is_kept_before_the_archive_is_asked(dicom, labels):
    for i in (1, 2):
        with pytest.raises(ConnectionError):
            dicom.store.save_label("1.2.840.5", str(labels[i]), "final", {"user": "ann"})
    assert [value_of(p) for p in history(dicom.folder, "1.2.840.5")] == [1, 2]
    assert all(p.name.endswith("-ann.nii.gz") for p in history(dicom.folder, "1.2.840.5"))


@pytest.mark.parametrize("uid", ["..", "../1.2", "1..2", "1.2/..", "a", "", "1." * 40, "1.2\n", None])
def test_an_archive_knows_series_only(dicom, labels, uid):
    for call in (
        lambda: dicom.store.save_label(uid, str(labels[1]), "final", {}),
        lambda: dicom.store.get_image_uri(uid),
        lambda: dicom.store.get_label_uri(uid, "final"),
        lambda: dicom.store.add_image(uid, str(labels[1]), {}),
        lambda: dicom.store.remove_image(uid),
        lambda: dicom.store.remove_label(uid, "final"),
    ):
        with pytest.raises(StoreError, match="expected a series instance UID"):
            call()
    assert list(dicom.folder.rglob("*.nii.gz")) == []


def test_an_archive_checks_tags(dicom, labels):
    with pytest.raises(StoreError, match="valid are up to 64 letters"):
        dicom.store.save_label("1.2.840.5", str(labels[1]), "../x", {})
    with pytest.raises(StoreError, match="valid are up to 64 letters"):
        dicom.store.get_label_uri("1.2.840.5", "history")
