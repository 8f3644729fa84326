"""Images whose headers hold what DICOM does not allow: their labels are saved all the same, and the log says what was
left out of them."""

from __future__ import annotations

import copy
from datetime import datetime
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.datadict import tag_for_keyword
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.tag import Tag

from lib.stores.dicom.seg import read_seg, write_seg
from lib.volumes.series import Volume, read_headers, volume_of
from support.dicom.dicoms import iod_errors, make_series, needs_dciodvfy
from support.dicom.memory import MemoryArchive
from support.dicom.stores import TASK, label_file, label_of

pytest_plugins = ("support.dicom.fixtures",)


def put(ds: Dataset, name: str, kind: str, value: str) -> None:
    """Write a value into a header as it would stand in a file, whatever it is."""
    tag, content = Tag(tag_for_keyword(name)), value.encode() + b" " * (len(value) % 2)
    ds[tag] = RawDataElement(tag, kind, len(content), content, 0, False, True)


@pytest.fixture(scope="module")
def volume(tmp_path_factory: pytest.TempPathFactory) -> Volume:
    folder = tmp_path_factory.mktemp("series")
    make_series(folder)
    return read_headers(folder)


def saved(volume: Volume, mask: np.ndarray, folder: Path) -> Dataset:
    """A SEG as an archive gets it."""
    write_seg(mask, volume, TASK, tag="final", when=datetime(2026, 1, 31), software="1").save_as(folder / "seg.dcm")
    return pydicom.dcmread(folder / "seg.dcm")


def check(seg: Dataset, volume: Volume, mask: np.ndarray) -> None:
    found = read_seg(seg, volume)
    np.testing.assert_array_equal(np.array([0, *(TASK.label_values[n] for n in found.names)])[found.index], mask)


@pytest.mark.parametrize(
    ("name", "kind", "value", "kept"),
    [
        ("PatientBirthDate", "DA", "00000000", ""),
        ("PatientBirthDate", "DA", "1950", ""),
        ("PatientBirthDate", "DA", "19500101-19600101", ""),
        ("PatientBirthDate", "DA", "19500101\\19500102", ""),
        ("StudyDate", "DA", "20200230", ""),
        ("StudyTime", "TM", "12:00:00", ""),
        ("StudyTime", "TM", "250000", ""),
        ("PatientSex", "CS", "male", ""),
        ("PatientName", "PN", "A^B\\C^D", ""),
        ("PatientAge", "AS", "45", None),
        ("PatientWeight", "DS", "70,5", None),
        ("PatientWeight", "DS", "70.12345678901234567", None),
        ("PatientSize", "DS", "tall", None),
        ("PatientBirthTime", "TM", "noon", None),
        ("LossyImageCompression", "CS", "01", "01"),
        ("PatientID", "LO", "1" * 70, "1" * 70),  # identifies: another one would be another patient
        ("AccessionNumber", "SH", "1" * 17, "1" * 17),
    ],
)
def test_what_is_not_valid_is_left_out(
    name: str, kind: str, value: str, kept: str | None, volume: Volume, mask: np.ndarray, tmp_path: Path
) -> None:
    slices = [copy.deepcopy(ds) for ds in volume.headers]
    for ds in slices:
        put(ds, name, kind, value)
    seg = saved(volume_of(slices), mask, tmp_path)
    check(seg, volume, mask)
    assert seg.get(name) == kept
    assert seg.StudyInstanceUID == volume.headers[0].StudyInstanceUID


@pytest.mark.parametrize(
    ("name", "kind", "value"),
    [
        ("SliceThickness", "DS", "3,0"),
        ("InstanceNumber", "IS", "1.5"),
        ("FrameOfReferenceUID", "UI", "1.2 .3"),
        ("SeriesNumber", "IS", "one"),
        ("SeriesDate", "DA", "yesterday"),
        ("ImagePositionPatient", "DS", "-20.0000000000000001\\11.00000000000000001\\4.00000000000000001"),
    ],
)
def test_what_is_not_taken_over_does_not_stand_in_the_way(
    name: str, kind: str, value: str, volume: Volume, mask: np.ndarray, tmp_path: Path
) -> None:
    slices = [copy.deepcopy(ds) for ds in volume.headers]
    for ds in slices[: 1 if name == "ImagePositionPatient" else None]:
        put(ds, name, kind, value)
    check(saved(volume_of(slices), mask, tmp_path), volume, mask)


def test_dates_within_sequences_are_left_out_alone(volume: Volume, mask: np.ndarray, tmp_path: Path) -> None:
    slices, item = [copy.deepcopy(ds) for ds in volume.headers], Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = "1", "99X", "a procedure"
    put(item, "ContextGroupVersion", "DT", "long ago")
    slices[0].ProcedureCodeSequence = Sequence([item])
    (code,) = saved(volume_of(slices), mask, tmp_path).ProcedureCodeSequence
    assert code.CodeMeaning == "a procedure" and "ContextGroupVersion" not in code


@needs_dciodvfy
@pytest.mark.parametrize("uids", [[""], ["1.2.3", "1.2.4"], ["a.b"]])
def test_a_frame_of_reference_is_made_where_the_slices_have_none(
    uids: list[str], volume: Volume, mask: np.ndarray, tmp_path: Path
) -> None:
    """Missing, not the same in all slices, not a UID: each SEG of the series names the same one."""
    slices = [copy.deepcopy(ds) for ds in volume.headers]
    for k, ds in enumerate(slices):
        put(ds, "FrameOfReferenceUID", "UI", uids[k % len(uids)])
    segs = [saved(volume_of(slices), mask, tmp_path) for _ in range(2)]
    check(segs[0], volume, mask)
    assert segs[0].FrameOfReferenceUID == segs[1].FrameOfReferenceUID and segs[0].FrameOfReferenceUID.is_valid
    assert segs[0].FrameOfReferenceUID.startswith("2.25.")
    assert iod_errors(tmp_path / "seg.dcm") == []


def test_such_an_image_is_labelled_through_the_archive(
    mask: np.ndarray, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    uid = make_series(tmp_path / "series", without=("FrameOfReferenceUID",))
    for file in (tmp_path / "series").iterdir():
        ds = pydicom.dcmread(file)
        put(ds, "PatientBirthDate", "DA", "00000000")
        put(ds, "StudyTime", "TM", "12:00:00")
        put(ds, "PatientWeight", "DS", "70,5")
        ds.save_as(file)
    archive = MemoryArchive(tmp_path / "series")
    store = archive.store_of(tmp_path / "cache", TASK)
    assert store.get_unlabeled_images() == [uid]
    for _ in range(2):
        store.save_label(uid, str(label_file(store, uid, mask, tmp_path / "l.nii.gz")), "final", {})
    assert (store.get_unlabeled_images(), len(archive.segs())) == ([], 2)
    np.testing.assert_array_equal(label_of(archive.store_of(tmp_path / "other", TASK), uid), mask)
    told = [r.getMessage() for r in caplog.records if "left out of its segmentations" in r.getMessage()]
    assert told == [
        f"series {uid}: left out of its segmentations, as the values are not valid DICOM: StudyTime (TM), "
        "PatientBirthDate (DA), PatientWeight (DS)"
    ]
    assert "70,5" not in caplog.text, "values of a patient do not belong in a log"
    assert caplog.text.count(f"series {uid}: FrameOfReferenceUID is missing") == 1


# --- what an archive says of its series and SEGs ----------------------------------------------------------------------


@pytest.fixture
def labelled(tmp_path: Path, mask: np.ndarray) -> tuple[MemoryArchive, str, Dataset]:
    """An archive of one series, and a SEG of it that names no series but the slices of its frames; not stored yet."""
    uid = make_series(tmp_path / "series")
    volume = read_headers(tmp_path / "series")
    seg = saved(volume, mask, tmp_path)
    del seg.ReferencedSeriesSequence, seg.SourceImageSequence
    slices = {tuple(ds.ImagePositionPatient): ds for ds in volume.headers}
    for frame in seg.PerFrameFunctionalGroupsSequence:
        source, derived = Dataset(), Dataset()
        place = slices[tuple(frame.PlanePositionSequence[0].ImagePositionPatient)]
        source.ReferencedSOPClassUID, source.ReferencedSOPInstanceUID = place.SOPClassUID, place.SOPInstanceUID
        derived.SourceImageSequence = Sequence([source])
        frame.DerivationImageSequence = Sequence([derived])
    seg.save_as(tmp_path / "seg.dcm")
    return MemoryArchive(tmp_path / "series"), uid, seg


def test_a_seg_counts_for_the_series_of_the_slices_that_its_frames_name(
    labelled: tuple[MemoryArchive, str, Dataset], mask: np.ndarray, tmp_path: Path
) -> None:
    archive, uid, _ = labelled
    archive.put((tmp_path / "seg.dcm").read_bytes())
    store = archive.store_of(tmp_path / "cache", TASK)
    assert store.get_labeled_images() == [uid]
    np.testing.assert_array_equal(label_of(store, uid), mask)


def test_such_a_seg_can_be_uploaded(
    labelled: tuple[MemoryArchive, str, Dataset], mask: np.ndarray, tmp_path: Path
) -> None:
    archive, uid, _ = labelled
    other = make_series(tmp_path / "another")
    for file in (tmp_path / "another").iterdir():
        archive.put(file.read_bytes())
    store = archive.store_of(tmp_path / "cache", TASK)
    with pytest.raises(ValueError, match=f"drawn on series unknown, not on {other}"):
        store.save_label(other, str(tmp_path / "seg.dcm"), "final", {})
    store.save_label(uid, str(tmp_path / "seg.dcm"), "final", {})
    np.testing.assert_array_equal(label_of(store, uid), mask)


def test_a_seg_that_names_no_slice_either_is_no_label(
    labelled: tuple[MemoryArchive, str, Dataset], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    archive, uid, seg = labelled
    for frame in seg.PerFrameFunctionalGroupsSequence:
        del frame.DerivationImageSequence
    seg.save_as(tmp_path / "seg.dcm")
    archive.put((tmp_path / "seg.dcm").read_bytes())
    store = archive.store_of(tmp_path / "cache", TASK)
    assert (store.get_labeled_images(), store.get_unlabeled_images()) == ([], [uid])
    assert "does not say on which series it was drawn" in caplog.text


def test_a_series_without_a_proper_uid_is_not_offered(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Its UID could not be asked for, and no label be saved for it."""
    uid = make_series(tmp_path / "series")
    archive = MemoryArchive(tmp_path / "series")
    for file in make_copy(tmp_path, "1.2.x"):
        archive.put(file.read_bytes())
    store = archive.store_of(tmp_path / "cache", TASK)
    assert store.list_images() == [uid]
    assert caplog.text.count("Left out: series '1.2.x': expected a series instance UID") == 1


def make_copy(folder: Path, uid: str) -> list[Path]:
    """A series whose UID is this text."""
    make_series(folder / "named")
    files = sorted((folder / "named").iterdir())
    for file in files:
        ds = pydicom.dcmread(file)
        put(ds, "SeriesInstanceUID", "UI", uid)
        ds.save_as(file)
    return files
