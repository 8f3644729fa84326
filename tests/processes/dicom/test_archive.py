"""Labels that are saved through us: on a real archive, voxel by voxel, by name, and never lost."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from lib.stores.cases import audit
from lib.stores.dicom.store import DicomStore
from lib.stores.errors import ConflictError, NotInStoreError, StoreError
from lib.volumes.series import SeriesError
from support.dicom.archive import Archive, needs_orthanc
from support.dicom.dicoms import make_series
from support.dicom.stores import SHAPE, TASK, counted, label_file, label_of, seg_of, store_on
from support.drawn import history, rejected
from support.helpers import read_nifti

pytest_plugins = ("support.dicom.fixtures",)
pytestmark = [needs_orthanc, pytest.mark.usefixtures("always_asked")]


def test_saved_label_counts_at_once_and_comes_back(
    archive: Archive, store: DicomStore, series: str, mask: np.ndarray, tmp_path: Path
) -> None:
    assert counted(store) == (0, [], [series], [])
    before = store.archive.seconds
    store.save_label(series, str(label_file(store, series, mask, tmp_path / "l.nii.gz")), "final", {"user": "ann"})
    assert counted(store) == (1, [series], [], [series])
    np.testing.assert_array_equal(label_of(store, series), mask)
    assert store.archive.seconds > before
    (seg,) = archive.segs()
    assert [s.SegmentLabel for s in seg.SegmentSequence] == ["liver", "aorta"]
    assert seg.ContentCreatorName == "ann^"

    other = store_on(archive, tmp_path / "other", TASK)  # a server on another machine
    assert counted(other) == (1, [series], [], [series])
    np.testing.assert_array_equal(label_of(other, series), mask)
    assert list((other.folder / "labels" / "history").glob("**/*.nii.gz")) == []


def test_newest_label_counts_and_the_older_ones_stay(
    archive: Archive, store: DicomStore, series: str, mask: np.ndarray, tmp_path: Path
) -> None:
    for value in (1, 2, 3):
        changed = np.where(mask > 0, value, 0).astype(np.uint8)
        store.save_label(series, str(label_file(store, series, changed, tmp_path / "l.nii.gz")), "final", {})
        np.testing.assert_array_equal(label_of(store, series), changed)
    assert [s.SegmentSequence[0].SegmentLabel for s in archive.segs()] == ["liver", "spleen", "aorta"]
    assert [int(np.asarray(read_nifti(f).dataobj).max()) for f in history(store.folder, series)] == [1, 2]
    assert label_of(store_on(archive, tmp_path / "other", TASK), series).max() == 3


def test_values_go_by_the_names_that_come_with_them(
    store: DicomStore, series: str, mask: np.ndarray, tmp_path: Path
) -> None:
    """3D Slicer numbers by position in its list."""
    sent = np.array([0, 2, 0, 1], np.uint8)[mask]
    info = {"label_info": [{"name": "Aorta", "idx": 1}, {"name": "liver", "idx": 2}, {"name": "a cyst", "idx": 3}]}
    store.save_label(series, str(label_file(store, series, sent, tmp_path / "l.nii.gz")), "final", info)
    np.testing.assert_array_equal(label_of(store, series), mask)


def test_unknown_names_are_refused_and_the_drawing_is_kept(
    archive: Archive, store: DicomStore, series: str, mask: np.ndarray, tmp_path: Path
) -> None:
    info = {"label_info": [{"name": "liver", "idx": 1}, {"name": "tumour", "idx": 3}], "user": "bo"}
    file = label_file(store, series, mask, tmp_path / "l.nii.gz")
    with pytest.raises(StoreError, match=r"'tumour' \(value 3\).*valid are liver, spleen, aorta.*kept as labels/rejec"):
        store.save_label(series, str(file), "final", info)
    (kept,) = rejected(store.folder, series)
    assert kept.read_bytes() == file.read_bytes()
    assert archive.segs() == [] and history(store.folder, series) == []


def test_empty_label_is_refused_unless_the_classes_are_named(
    archive: Archive, store: DicomStore, series: str, tmp_path: Path
) -> None:
    file = label_file(store, series, np.zeros(SHAPE, np.uint8), tmp_path / "l.nii.gz")
    with pytest.raises(StoreError, match="the label is empty.*send 'annotated'"):
        store.save_label(series, str(file), "final", {})
    assert len(rejected(store.folder, series)) == 1
    store.save_label(series, str(file), "final", {"annotated": ["liver", "spleen"]})
    (case,) = store_on(archive, tmp_path / "other", TASK).datalist()
    assert case["annotated"] == ["liver", "spleen"]
    (found,) = audit(TASK, [case]).cases
    assert (found.problem, found.counts) == (None, {"liver": 0, "spleen": 0})


def test_another_grid_is_refused_and_the_drawing_is_kept(
    archive: Archive, store: DicomStore, series: str, mask: np.ndarray, tmp_path: Path
) -> None:
    store.get_image_uri(series)
    for wrong in (nib.Nifti1Image(mask, np.eye(4)), nib.Nifti1Image(mask[:-1], np.eye(4))):
        nib.save(wrong, tmp_path / "l.nii.gz")
        with pytest.raises(StoreError, match="grid of its image"):
            store.save_label(series, str(tmp_path / "l.nii.gz"), "final", {})
    (tmp_path / "l.bin").write_bytes(b"\1" * 7)
    with pytest.raises(StoreError, match="7 bytes; its image has 315 voxels"):
        store.save_label(series, str(tmp_path / "l.bin"), "final", {})
    assert len(rejected(store.folder, series)) == 3
    assert archive.segs() == []


def test_missing_tag_is_refused_and_the_drawing_is_kept(
    archive: Archive, series: str, mask: np.ndarray, tmp_path: Path
) -> None:
    uid = make_series(tmp_path / "without", without=("ImagePositionPatient",))
    archive.store(tmp_path / "without")
    store = store_on(archive, tmp_path / "cache", TASK)
    file = label_file(store, series, mask, tmp_path / "l.nii.gz")
    with pytest.raises(SeriesError, match="the DICOM tag ImagePositionPatient is missing.*kept as labels/rejected"):
        store.save_label(uid, str(file), "final", {})
    assert len(rejected(store.folder, uid)) == 1
    assert store.get_unlabeled_images() == [series]  # what is not a volume is not offered again
    archive.remove_series(uid)


def test_raw_bytes_are_in_the_order_of_the_image(
    store: DicomStore, series: str, mask: np.ndarray, tmp_path: Path
) -> None:
    (tmp_path / "l.bin").write_bytes(mask.tobytes(order="F"))  # columns fastest, then rows, then slices
    store.save_label(series, str(tmp_path / "l.bin"), "final", {})
    np.testing.assert_array_equal(label_of(store, series), mask)


def test_a_seg_can_be_uploaded(
    archive: Archive, store: DicomStore, series: str, mask: np.ndarray, tmp_path: Path
) -> None:
    store.save_label(series, str(seg_of(store, series, mask, tmp_path, "seg")), "final", {"user": "cy"})
    np.testing.assert_array_equal(label_of(store, series), mask)
    (seg,) = archive.segs()
    assert [s.SegmentedPropertyTypeCodeSequence[0].CodeMeaning for s in seg.SegmentSequence] == ["Structure"] * 2
    other = make_series(tmp_path / "another")
    archive.store(tmp_path / "another")
    with pytest.raises(StoreError, match=f"drawn on series {series}, not on {other}"):
        store.save_label(other, str(tmp_path / "seg.dcm"), "final", {})
    archive.remove_series(other)


def test_what_a_person_left_as_the_model_made_it_is_said(
    archive: Archive, store: DicomStore, series: str, mask: np.ndarray, tmp_path: Path
) -> None:
    file = label_file(store, series, mask, tmp_path / "l.nii.gz")
    store.propose(series, "tiny", 4, file)
    draft = store.as_seg(series, "tiny", 4, file)
    assert {s.SegmentAlgorithmType for s in draft.SegmentSequence} == {"AUTOMATIC"}
    draft.save_as(tmp_path / "draft.dcm")
    archive.store(tmp_path / "draft.dcm")
    assert store.get_labeled_images() == []  # nobody has looked at it

    mask[5, 5, 0] = 0
    store.save_label(series, str(label_file(store, series, mask, tmp_path / "l.nii.gz")), "final", {})
    kinds = {s.SegmentLabel: s.SegmentAlgorithmType for s in archive.segs()[-1].SegmentSequence}
    assert kinds == {"liver": "MANUAL", "aorta": "SEMIAUTOMATIC"}
    algorithm = archive.segs()[-1].SegmentSequence[1].SegmentationAlgorithmIdentificationSequence[0]
    assert algorithm.AlgorithmVersion == "4"


def test_other_tags_stay_here(
    archive: Archive, store: DicomStore, series: str, mask: np.ndarray, tmp_path: Path
) -> None:
    file = label_file(store, series, np.zeros(SHAPE, np.uint8), tmp_path / "l.nii.gz")
    store.save_label(series, str(file), "original", {"model": "tiny"})
    assert store.get_labels_by_image_id(series) == {"original": series}
    assert counted(store) == (0, [], [series], [])
    assert archive.segs() == []
    store.remove_label(series, "original")
    assert store.get_labels_by_image_id(series) == {}


def test_a_final_label_and_images_belong_to_the_archive(
    store: DicomStore, series: str, mask: np.ndarray, tmp_path: Path
) -> None:
    with pytest.raises(NotInStoreError):
        store.remove_label(series, "final")
    store.save_label(series, str(label_file(store, series, mask, tmp_path / "l.nii.gz")), "final", {})
    with pytest.raises(ConflictError, match="belongs to the archive"):
        store.remove_label(series, "final")
    with pytest.raises(ConflictError, match="remove the series there"):
        store.remove_image(series)
    with pytest.raises(ConflictError, match="store the DICOM series there"):
        store.add_image(series, str(tmp_path / "l.nii.gz"), {})
    np.testing.assert_array_equal(label_of(store, series), mask)
