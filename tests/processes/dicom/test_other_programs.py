"""SEGs that others store in the archive, and an archive that misbehaves."""

from __future__ import annotations

import shutil
import threading
import time
from pathlib import Path

import numpy as np
import pydicom
import pytest
from monailabel.config import Settings

from lib.stores.cases import audit
from lib.stores.dicom.archive import ArchiveError
from lib.stores.dicom.store import DicomStore
from lib.stores.errors import StoreError
from support.dicom.archive import Archive, Recorder, needs_orthanc, reply
from support.dicom.dicoms import dcmqi_seg, make_series
from support.dicom.stores import SHAPE, TASK, counted, dated, label_file, label_of, seg_of, store_on
from support.drawn import history
from support.helpers import concepts, label, read_nifti, tiny_task

pytest_plugins = ("support.dicom.fixtures",)
pytestmark = [needs_orthanc, pytest.mark.usefixtures("always_asked")]


def test_a_seg_stored_in_the_archive_is_a_label(
    archive: Archive, store: DicomStore, series: str, mask: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a restart, by name: its numbers are those of another program."""
    monkeypatch.setattr("lib.stores.dicom.listing.FRESH_SECONDS", 1.0)
    assert counted(store)[1:3] == ([], [series])
    archive.store(seg_of(store, series, mask, tmp_path, "seg"))
    time.sleep(1)
    assert counted(store) == (1, [series], [], [series])
    np.testing.assert_array_equal(label_of(store, series), mask)


def test_the_newest_by_its_own_time_counts_in_whatever_order_they_arrive(
    archive: Archive, store: DicomStore, series: str, mask: np.ndarray, tmp_path: Path
) -> None:
    newer = np.where(mask == 3, 2, mask).astype(np.uint8)
    archive.store(dated(seg_of(store, series, newer, tmp_path, "newer"), "120000.5"))
    archive.store(dated(seg_of(store, series, mask, tmp_path, "older"), "120000.4"))
    np.testing.assert_array_equal(label_of(store, series), newer)


def test_our_label_is_the_newest_even_if_a_clock_is_wrong(
    archive: Archive, store: DicomStore, series: str, mask: np.ndarray, tmp_path: Path
) -> None:
    future = dated(seg_of(store, series, mask, tmp_path, "future"), "120000")
    ds = pydicom.dcmread(future)
    ds.ContentDate = "20991231"
    ds.save_as(future)
    archive.store(future)
    corrected = np.where(mask == 3, 2, mask).astype(np.uint8)
    store.save_label(series, str(label_file(store, series, corrected, tmp_path / "l.nii.gz")), "final", {})
    for one in (store, store_on(archive, tmp_path / "other", TASK)):
        np.testing.assert_array_equal(label_of(one, series), corrected)


def test_segments_that_the_task_does_not_know_are_not_taken_for_others(
    archive: Archive, store: DicomStore, series: str, mask: np.ndarray, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    affine = read_nifti(store.get_image_uri(series)).affine
    names = {1: "liver", 3: "Segment 3"}
    archive.store(dcmqi_seg(tmp_path / "series", mask, affine, names, tmp_path / "seg.dcm"))
    (case,) = store.datalist()
    assert case["annotated"] == ["liver"]  # what else the image shows is not known
    np.testing.assert_array_equal(label_of(store, series), np.where(mask == 1, 1, 0))
    assert "does not know the segments Segment 3" in caplog.text


def test_segs_of_other_things_are_no_labels(
    archive: Archive, store: DicomStore, series: str, mask: np.ndarray, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    affine = read_nifti(store.get_image_uri(series)).affine
    names = {1: "nodule", 3: "Segment 3"}
    archive.store(dcmqi_seg(tmp_path / "series", mask, affine, names, tmp_path / "seg.dcm"))
    assert counted(store) == (0, [], [series], [])
    assert "no task knows a segment of nodule, Segment 3" in caplog.text


def test_a_seg_that_cannot_be_read_is_left_out_of_training(
    archive: Archive, store: DicomStore, series: str, mask: np.ndarray, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ds = pydicom.dcmread(seg_of(store, series, mask, tmp_path, "seg"))
    for item in ds.PerFrameFunctionalGroupsSequence:
        item.PlanePositionSequence[0].ImagePositionPatient[0] += 0.7
    ds.save_as(tmp_path / "seg.dcm")
    archive.store(tmp_path / "seg.dcm")
    assert store.datalist() == []
    assert "not on the grid of its image" in caplog.text


def test_several_tasks_each_get_their_own_labels(
    archive: Archive, series: str, mask: np.ndarray, tmp_path: Path
) -> None:
    lungs = {"left lung": label(1), "right lung": label(3)}
    other = tiny_task(name="lungs", labels=lungs, concepts=concepts(list(lungs), "CT"))
    store = store_on(archive, tmp_path / "cache", TASK, other)
    file = label_file(store, series, mask, tmp_path / "l.nii.gz")
    with pytest.raises(StoreError, match="could be those of tiny or lungs: send label_info"):
        store.save_label(series, str(file), "final", {})
    store.save_label(series, str(file), "final", {"model": "lungs"})
    (case,) = store_on(archive, tmp_path / "other", TASK, other).datalist()
    assert case["task"] == "lungs"
    expected = {"left lung": int((mask == 1).sum()), "right lung": int((mask == 3).sum())}
    assert audit(other, [case]).cases[0].counts == expected
    assert audit(TASK, [case]).cases[0].problem == "labelled for task 'lungs'"


# --- the archive misbehaves -------------------------------------------------------------------------------------------


def test_a_name_that_two_tasks_have_is_that_of_the_task_it_was_saved_for(
    archive: Archive, series: str, mask: np.ndarray, tmp_path: Path
) -> None:
    other = tiny_task(
        name="other", labels={"aorta": label(1), "liver": label(3)}, concepts=concepts(["aorta", "liver"], "CT")
    )
    store = store_on(archive, tmp_path / "cache", TASK, other)
    file = label_file(store, series, mask, tmp_path / "l.nii.gz")
    store.save_label(series, str(file), "final", {"model": "other"})
    (case,) = store_on(archive, tmp_path / "reading", TASK, other).datalist()
    assert case["task"] == "other"
    np.testing.assert_array_equal(label_of(store, series), mask)


def test_nothing_is_lost_while_the_archive_is_down(
    archive: Archive, store: DicomStore, series: str, mask: np.ndarray, tmp_path: Path
) -> None:
    file = label_file(store, series, mask, tmp_path / "l.nii.gz")
    archive.stop()
    try:
        with pytest.raises(ArchiveError, match="The drawing is kept as labels/history/final/") as caught:
            store.save_label(series, str(file), "final", {"user": "ann"})
        assert caught.value.status == 502
        (kept,) = history(store.folder, series)
        assert kept.read_bytes() == file.read_bytes()
        with pytest.raises(ArchiveError, match="did not answer"):
            store.list_images()
    finally:
        archive.start()
    store.save_label(series, str(kept), "final", {"user": "ann"})
    np.testing.assert_array_equal(label_of(store, series), mask)


def test_what_the_archive_does_not_list_stays_here(
    archive: Archive, store: DicomStore, series: str, mask: np.ndarray, tmp_path: Path
) -> None:
    store.save_label(series, str(label_file(store, series, mask, tmp_path / "l.nii.gz")), "final", {})
    here = store.folder / "labels" / "final" / f"{series}.nii.gz"
    before = here.read_bytes()
    archive.remove_series(archive.segs()[0].SeriesInstanceUID)
    again = store_on(archive, tmp_path / "cache", TASK)  # after a restart: what was just saved counts for ten minutes
    assert counted(again) == (0, [], [series], [])
    assert here.read_bytes() == before


def test_a_series_that_grows_is_downloaded_again(archive: Archive, tmp_path: Path) -> None:
    """Offered while the scanner was still sending."""
    uid = make_series(tmp_path / "series")
    files = sorted((tmp_path / "series").iterdir(), key=lambda f: pydicom.dcmread(f).InstanceNumber)
    archive.store(*files[:3])
    store = store_on(archive, tmp_path / "cache", TASK)
    assert read_nifti(store.get_image_uri(uid)).shape == (9, 7, 3)
    archive.store(*files[3:])
    assert read_nifti(store.get_image_uri(uid)).shape == SHAPE
    archive.remove_series(uid)


def test_images_are_of_the_tasks_modalities(archive: Archive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ct, mr = make_series(tmp_path / "ct"), make_series(tmp_path / "mr", modality="MR")
    archive.store(tmp_path / "ct", tmp_path / "mr")
    heart = tiny_task(
        name="heart", modality="MR", channels=["MR"], intensity={"mode": "nonzero", "low": None, "high": None}
    )
    assert store_on(archive, tmp_path / "a", TASK).list_images() == [ct]
    assert store_on(archive, tmp_path / "b", heart).list_images() == [mr]
    assert set(store_on(archive, tmp_path / "c", TASK, heart).list_images()) == {ct, mr}
    chosen = Settings(MONAI_LABEL_DICOMWEB_SEARCH_FILTER={"Modality": "MR"})
    monkeypatch.setattr("lib.stores.dicom.store.settings", chosen)
    assert store_on(archive, tmp_path / "d", TASK, search_filter={"Modality": "MR"}).list_images() == [mr]
    for uid in (ct, mr):
        archive.remove_series(uid)


def test_a_slow_archive_is_given_up(recorder: Recorder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lib.stores.dicom.store.settings.MONAI_LABEL_DICOMWEB_PROXY_TIMEOUT", 0.5)
    done = threading.Event()
    recorder.answer = lambda handler: (done.wait(20), reply(handler, b"[]"))[1]
    store = store_on(recorder, tmp_path / "cache", TASK)  # type: ignore[arg-type]
    with pytest.raises(ArchiveError, match="ReadTimeout"):
        store.list_images()
    done.set()
    recorder.server_close()


def test_copies_may_be_thrown_away(
    archive: Archive, store: DicomStore, series: str, mask: np.ndarray, tmp_path: Path
) -> None:
    store.save_label(series, str(label_file(store, series, mask, tmp_path / "l.nii.gz")), "final", {})
    shutil.rmtree(store.folder / "dicom")
    (store.folder / "segmentations.json").write_text("not JSON")
    for file in store.folder.glob("**/*.nii.gz"):
        file.unlink()
    again = store_on(archive, tmp_path / "cache", TASK)
    np.testing.assert_array_equal(label_of(again, series), mask)
