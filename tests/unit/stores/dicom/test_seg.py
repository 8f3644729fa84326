"""SEGs: what ours say, and that those of any program are read by name, onto the grid of the image."""

from __future__ import annotations

import copy
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset

from lib.stores.dicom.listing import created, description, newest_first
from lib.stores.dicom.seg import MadeBy, read_seg, segment_labels, write_seg
from lib.stores.errors import StoreError
from lib.tasks import Task, list_tasks, load_task
from lib.volumes.series import Volume, read_headers, volume_of
from support.dicom.dicoms import dcmqi_seg, iod_errors, make_series, needs_dciodvfy
from support.helpers import concepts, label, tiny_task

NOON = datetime(2026, 1, 31, 12, 0, 0, 250000)


@pytest.fixture(scope="module")
def amos() -> Task:
    return load_task("amos22-ct")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("series")
    make_series(place / "s", (12, 10, 6))
    return place / "s"


@pytest.fixture(scope="module")
def volume(folder: Path) -> Volume:
    return read_headers(folder)


@pytest.fixture(scope="module")
def mask(volume: Volume) -> np.ndarray:
    """Five of fifteen organs of the task, asymmetric, with single voxels at both ends."""
    made = np.zeros(volume.shape, np.uint16)
    made[1:4, 2:5, 1:3], made[5:8, 1:9, 2:5] = 6, 3
    made[8:10, 0:2, 3], made[0, 0, 0], made[11, 9, 5] = 2, 15, 12
    return made


def written(mask: np.ndarray, volume: Volume, task: Task, **more: Any) -> Dataset:
    return write_seg(mask, volume, task, **{"tag": "final", "when": NOON, "software": "1.2", **more})


def values(ds: Dataset, volume: Volume, task: Task) -> np.ndarray:
    found = read_seg(ds, volume)
    return np.array([0, *(task.label_values[name] for name in found.names)])[found.index]


def test_nothing_changes_on_the_way(mask: np.ndarray, volume: Volume, amos: Task, tmp_path: Path) -> None:
    written(mask, volume, amos).save_as(tmp_path / "seg.dcm")
    ds = pydicom.dcmread(tmp_path / "seg.dcm")
    np.testing.assert_array_equal(values(ds, volume, amos), mask)


def test_segments_say_what_they_are(mask: np.ndarray, volume: Volume, amos: Task) -> None:
    """In the order of the task, with its codes, the side as a modifier, and its colours."""
    segments = written(mask, volume, amos).SegmentSequence
    assert [s.SegmentLabel for s in segments] == [
        "right kidney",
        "left kidney",
        "liver",
        "left adrenal gland",
        "prostate/uterus",
    ]
    assert [s.SegmentNumber for s in segments] == [1, 2, 3, 4, 5]
    kinds = [(s.SegmentedPropertyTypeCodeSequence[0].CodeValue, s.SegmentAlgorithmType) for s in segments]
    assert kinds == [(c, "MANUAL") for c in ("64033007", "64033007", "10200004", "23451007", "21844003")]
    sides = [s.SegmentedPropertyTypeCodeSequence[0].get("SegmentedPropertyTypeModifierCodeSequence") for s in segments]
    assert [side and side[0].CodeMeaning for side in sides] == ["Right", "Left", None, "Left", None]
    assert {s.SegmentedPropertyCategoryCodeSequence[0].CodeValue for s in segments} == {"123037004"}
    # liver (150, 75, 30): L* 40.59, a* 28.2, b* 39.5 by the formulas of CIE 1976 with white D65
    lightness, a, b = segments[2].RecommendedDisplayCIELabValue
    np.testing.assert_allclose([lightness / 655.35, a / 257 - 128, b / 257 - 128], [40.59, 28.24, 39.53], atol=0.05)


def test_parts_of_a_structure_are_modifiers_too(mask: np.ndarray, volume: Volume) -> None:
    changes = {"labels.posterior hippocampus.snomed.laterality": "left", "augmentation.flip": []}
    task = load_task("hippocampus-mr", changes)
    segments = written(np.where(mask == 6, 1, np.minimum(mask, 2)), volume, task).SegmentSequence
    types = [s.SegmentedPropertyTypeCodeSequence[0] for s in segments]
    assert [t.CodeValue for t in types] == ["5366008", "5366008"]
    modifiers = [[(m.CodeValue, m.CodeMeaning) for m in t.SegmentedPropertyTypeModifierCodeSequence] for t in types]
    side, anterior, posterior = ("7771000", "Left"), ("255549009", "Anterior"), ("255551008", "Posterior")
    assert modifiers == [[anterior], [side, posterior]]


def test_it_refers_to_its_series(mask: np.ndarray, volume: Volume, amos: Task) -> None:
    ds, first = written(mask, volume, amos), volume.headers[0]
    for name in ("StudyInstanceUID", "FrameOfReferenceUID", "PatientID", "StudyDate"):
        assert ds[name].value == first[name].value, name
    (series,) = ds.ReferencedSeriesSequence
    assert series.SeriesInstanceUID == first.SeriesInstanceUID != ds.SeriesInstanceUID
    used = {i.ReferencedSOPInstanceUID for i in series.ReferencedInstanceSequence}
    assert used == {h.SOPInstanceUID for h in volume.headers}
    assert (ds.Manufacturer, ds.ContentLabel, ds.Modality) == ("BiPVL Label", "FINAL", "SEG")
    assert created(ds) == NOON.isoformat()
    assert not description(ds).draft


def test_who_drew_it_is_said_honestly(mask: np.ndarray, volume: Volume, amos: Task) -> None:
    made_by = {"liver": MadeBy(7, accepted=True), "left kidney": MadeBy(7), "right kidney": MadeBy()}
    ds = written(mask, volume, amos, made_by=made_by)
    kinds = {s.SegmentLabel: s for s in ds.SegmentSequence}
    assert kinds["liver"].SegmentAlgorithmType == "SEMIAUTOMATIC"
    assert kinds["left kidney"].SegmentAlgorithmType == "AUTOMATIC"
    assert kinds["right kidney"].SegmentAlgorithmType == kinds["prostate/uterus"].SegmentAlgorithmType == "MANUAL"
    algorithm = kinds["liver"].SegmentationAlgorithmIdentificationSequence[0]
    assert (algorithm.AlgorithmName, algorithm.AlgorithmVersion) == ("BiPVL-Seg amos22-ct", "7")
    assert kinds["liver"].SegmentAlgorithmName == "BiPVL-Seg amos22-ct"
    assert "SegmentAlgorithmName" not in kinds["right kidney"]


def test_the_models_own_mask_is_a_draft(mask: np.ndarray, volume: Volume, amos: Task) -> None:
    assert description(written(mask, volume, amos, tag="original")).draft


def test_classes_that_were_looked_for_stay_known(mask: np.ndarray, volume: Volume, amos: Task, tmp_path: Path) -> None:
    ds = written(mask, volume, amos, declared=["liver", "left kidney", "spleen"])
    ds.save_as(tmp_path / "seg.dcm")
    assert read_seg(pydicom.dcmread(tmp_path / "seg.dcm"), volume).declared == ["liver", "left kidney", "spleen"]
    assert read_seg(written(mask, volume, amos), volume).declared is None


def test_an_empty_label_names_what_is_not_there(volume: Volume, amos: Task) -> None:
    ds = written(np.zeros(volume.shape, np.uint16), volume, amos, declared=["liver", "spleen"])
    found = read_seg(ds, volume)
    assert found.names == ("spleen", "liver")
    assert not found.index.any()
    assert found.declared == ["liver", "spleen"]
    assert ds.NumberOfFrames == 2


@needs_dciodvfy
@pytest.mark.parametrize("what", ["full", "empty", "declared", "automatic"])
def test_it_is_valid(what: str, mask: np.ndarray, volume: Volume, amos: Task, tmp_path: Path) -> None:
    more: dict[str, dict[str, Any]] = {
        "full": {"author": "Dr. Ann^Lee\\"},
        "empty": {"declared": ["liver"]},
        "declared": {"declared": ["liver", "spleen"], "made_by": {"liver": MadeBy(2, accepted=True)}},
        "automatic": {"tag": "original", "made_by": {name: MadeBy(0) for name in amos.labels}},
    }
    written(mask * (what != "empty"), volume, amos, **more[what]).save_as(tmp_path / "seg.dcm")
    assert iod_errors(tmp_path / "seg.dcm") == []


@needs_dciodvfy
@pytest.mark.parametrize("name", list_tasks())
def test_every_shipped_task_makes_valid_segs(name: str, volume: Volume, tmp_path: Path) -> None:
    task = load_task(name)
    mask = np.zeros(volume.shape, np.uint16)
    for i, value in enumerate(task.label_values.values()):
        mask[i % 12, i // 12, :] = value
    ds = written(mask, volume, task)
    ds.save_as(tmp_path / "seg.dcm")
    assert iod_errors(tmp_path / "seg.dcm") == []
    np.testing.assert_array_equal(values(ds, volume, task), mask)


def test_lesions_are_no_organs(volume: Volume) -> None:
    task = load_task("msd-brain")
    mask = np.zeros(volume.shape, np.uint16)
    mask[0, 0, 0], mask[1, 1, 1] = 1, 3
    categories = [
        s.SegmentedPropertyCategoryCodeSequence[0].CodeValue for s in written(mask, volume, task).SegmentSequence
    ]
    assert categories == ["49755003", "49755003"]  # Morphologically Abnormal Structure


@pytest.mark.parametrize("name", ["PatientID", "PatientBirthDate", "StudyID", "AccessionNumber", "SliceThickness"])
def test_tags_that_may_be_empty_may_be_missing(name: str, mask: np.ndarray, volume: Volume, amos: Task) -> None:
    slices = [copy.deepcopy(ds) for ds in volume.headers]
    for ds in slices:
        delattr(ds, name)
    np.testing.assert_array_equal(values(written(mask, volume_of(slices), amos), volume, amos), mask)


@needs_dciodvfy
def test_names_in_any_script_survive(volume: Volume, tmp_path: Path) -> None:
    slices = [copy.deepcopy(ds) for ds in volume.headers]
    for ds in slices:
        ds.SpecificCharacterSet, ds.PatientName = "ISO_IR 100", "Müller^Jörg"
    names = {"größte Läsion": label(1), "肝": label(2)}
    task = tiny_task(labels=names, concepts=concepts(list(names), "CT"))
    mask = np.zeros(volume.shape, np.uint16)
    mask[0, 0, 0], mask[1, 1, 1] = 1, 2
    written(mask, volume_of(slices), task, author="Zoë", declared=list(names)).save_as(tmp_path / "seg.dcm")
    ds = pydicom.dcmread(tmp_path / "seg.dcm")
    assert (ds.PatientName, ds.ContentCreatorName) == ("Müller^Jörg", "Zoë^")
    found = read_seg(ds, volume)
    assert found.names == tuple(names) and found.declared == list(names)
    np.testing.assert_array_equal(values(ds, volume, task), mask)
    assert iod_errors(tmp_path / "seg.dcm") == []


# --- other programs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["binary", "labelmap"])
def test_dcmqi_numbers_in_its_own_way(
    kind: str, folder: Path, mask: np.ndarray, volume: Volume, amos: Task, tmp_path: Path
) -> None:
    """Alphabetical, the code Tissue for everything, as OHIF does it too; as bits, or as a label map (PS3.3 A.87)."""
    names = sorted(name for name, value in amos.label_values.items() if value in mask)
    numbers = np.zeros(16, np.uint8)
    for number, name in enumerate(names, start=1):
        numbers[amos.label_values[name]] = number
    file = dcmqi_seg(folder, numbers[mask], volume.affine, dict(enumerate(names, start=1)), tmp_path / "q.dcm", kind)
    ds = pydicom.dcmread(file)
    assert sorted(segment_labels(ds).values()) == names
    np.testing.assert_array_equal(values(ds, volume, amos), mask)


@pytest.fixture
def seg(mask: np.ndarray, volume: Volume, amos: Task, tmp_path: Path) -> Dataset:
    written(mask, volume, amos).save_as(tmp_path / "as_stored.dcm")
    return pydicom.dcmread(tmp_path / "as_stored.dcm")


def frames(ds: Dataset) -> np.ndarray:
    return ds.pixel_array.copy()


def repacked(ds: Dataset, pixels: np.ndarray) -> Dataset:
    ds.PixelData = np.packbits(pixels.ravel(), bitorder="little").tobytes() + b"\0"
    ds.Rows, ds.Columns = pixels.shape[1:]
    return ds


def test_frames_may_come_in_any_order(seg: Dataset, mask: np.ndarray, volume: Volume, amos: Task) -> None:
    order = np.random.default_rng(1).permutation(seg.NumberOfFrames)
    pixels = frames(seg)[order]
    seg.PerFrameFunctionalGroupsSequence = [seg.PerFrameFunctionalGroupsSequence[i] for i in order]
    np.testing.assert_array_equal(values(repacked(seg, pixels), volume, amos), mask)


def test_frames_may_be_turned_and_mirrored(seg: Dataset, mask: np.ndarray, volume: Volume, amos: Task) -> None:
    """Rows become columns, from the other end."""
    orientation = np.array(volume.headers[0].ImageOrientationPatient, float)
    spacing = [float(x) for x in volume.headers[0].PixelSpacing]
    turned = frames(seg).transpose(0, 2, 1)[:, ::-1]
    shared = seg.SharedFunctionalGroupsSequence[0]
    shared.PlaneOrientationSequence[0].ImageOrientationPatient = [*orientation[3:], *(-orientation[:3])]
    shared.PixelMeasuresSequence[0].PixelSpacing = spacing[::-1]
    for item in seg.PerFrameFunctionalGroupsSequence:
        plane = item.PlanePositionSequence[0]
        shift = orientation[:3] * spacing[1] * (volume.shape[0] - 1)
        plane.ImagePositionPatient = [float(x) for x in np.array(plane.ImagePositionPatient, float) + shift]
    np.testing.assert_array_equal(values(repacked(seg, turned), volume, amos), mask)


def test_frames_may_cover_a_part(mask: np.ndarray, volume: Volume, amos: Task, tmp_path: Path) -> None:
    """Cropped to where something is drawn, with a bit count that is not a multiple of eight."""
    cropped = mask.copy()
    cropped[[0, 11]] = 0
    written(cropped, volume, amos).save_as(tmp_path / "seg.dcm")
    seg = pydicom.dcmread(tmp_path / "seg.dcm")
    orientation = np.array(volume.headers[0].ImageOrientationPatient, float)
    for item in seg.PerFrameFunctionalGroupsSequence:
        plane = item.PlanePositionSequence[0]
        shift = orientation[:3] * float(volume.headers[0].PixelSpacing[1])
        plane.ImagePositionPatient = [float(x) for x in np.array(plane.ImagePositionPatient, float) + shift]
    pixels = frames(seg)[:, :9, 1:10]
    assert pixels[0].size % 8
    np.testing.assert_array_equal(values(repacked(seg, pixels), volume, amos), cropped)


def test_fractional_counts_from_a_half(seg: Dataset, mask: np.ndarray, volume: Volume, amos: Task) -> None:
    pixels = np.where(frames(seg) > 0, 100, 99).astype(np.uint8)
    seg.SegmentationType, seg.MaximumFractionalValue = "FRACTIONAL", 200
    seg.BitsAllocated, seg.BitsStored, seg.HighBit = 8, 8, 7
    seg.PixelData = pixels.tobytes()
    np.testing.assert_array_equal(values(seg, volume, amos), mask)


def test_shared_voxels_are_refused(seg: Dataset, volume: Volume) -> None:
    pixels = frames(seg)
    pixels[:, 3, 3] = 1
    with pytest.raises(StoreError, match="segments '.*' and '.*' share voxels"):
        read_seg(repacked(seg, pixels), volume)


@pytest.mark.parametrize("shift", [(0.4, 0, 0), (0, 0.4, 0), (0, 0, 1.0)])
def test_another_grid_is_refused(shift: tuple[float, float, float], seg: Dataset, volume: Volume) -> None:
    for item in seg.PerFrameFunctionalGroupsSequence:
        plane = item.PlanePositionSequence[0]
        plane.ImagePositionPatient = [float(a) + b for a, b in zip(plane.ImagePositionPatient, shift, strict=True)]
    with pytest.raises(StoreError, match="not on the grid of its image: frame 1 lies up to 0.[0-9]+ voxels off"):
        read_seg(seg, volume)


def test_beyond_the_image_is_refused(seg: Dataset, volume: Volume) -> None:
    for item in seg.PerFrameFunctionalGroupsSequence:
        plane = item.PlanePositionSequence[0]
        plane.ImagePositionPatient = [float(x) + d for x, d in zip(plane.ImagePositionPatient, (0, 0, 3), strict=True)]
    with pytest.raises(StoreError, match="extends beyond its image"):
        read_seg(seg, volume)


@pytest.mark.parametrize("name", ["PerFrameFunctionalGroupsSequence", "PixelData", "Rows"])
def test_damaged_files_are_refused(name: str, seg: Dataset, volume: Volume) -> None:
    delattr(seg, name)
    with pytest.raises(StoreError, match="cannot be read"):
        read_seg(seg, volume)


def test_what_is_no_seg_is_refused(volume: Volume) -> None:
    with pytest.raises(StoreError, match="not a DICOM segmentation"):
        read_seg(volume.headers[0], volume)


# --- which is the newest ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ({"ContentDate": "20260131", "ContentTime": "120000.5"}, "2026-01-31T12:00:00.500000"),
        ({"ContentDate": "20260131", "ContentTime": "1200"}, "2026-01-31T12:00:00"),
        ({"ContentDate": "2026.01.31", "ContentTime": "12:00:00"}, "2026-01-31T12:00:00"),
        ({"ContentDate": "20260131", "ContentTime": ""}, "2026-01-31T00:00:00"),
        ({"ContentDate": "", "SeriesDate": "20250101", "SeriesTime": "01"}, "2025-01-01T01:00:00"),
        ({"ContentDate": "nonsense", "InstanceCreationDate": "20250203"}, "2025-02-03T00:00:00"),
        ({}, "1970-01-01T00:00:00"),
    ],
)
def test_time_of_a_seg(tags: dict[str, str], expected: str) -> None:
    ds = Dataset()
    with pydicom.config.disable_value_validation():
        for name, value in tags.items():
            setattr(ds, name, value)
        assert created(ds) == expected


def test_time_zones_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """12:30 at +02:00 was before 11:00 at +00:00, wherever this machine is."""
    early, late = Dataset(), Dataset()
    for ds, clock, zone in ((early, "123000", "+0200"), (late, "110000", "+0000")):
        ds.ContentDate, ds.ContentTime, ds.TimezoneOffsetFromUTC = "20260131", clock, zone
    assert created(early) < created(late)


def test_ohif_writes_utc_and_does_not_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    ds = Dataset()
    ds.Manufacturer = ds.ManufacturerModelName = "Unspecified"
    ds.SoftwareVersions, ds.DeviceSerialNumber = "0", "1"
    ds.ContentDate, ds.ContentTime = "20260131", "200000"
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    try:
        assert created(ds) == "2026-02-01T05:00:00"
        ds.Manufacturer = "another program"
        assert created(ds) == "2026-01-31T20:00:00"
    finally:
        monkeypatch.undo()
        time.tzset()


def test_equal_times_are_ordered_all_the_same(seg: Dataset) -> None:
    one = description(seg)
    seg.SOPInstanceUID = "1.2.3"
    other = description(seg)
    assert newest_first([one, other]) == newest_first([other, one])


def test_values_beyond_a_byte(volume: Volume) -> None:
    task = tiny_task(labels={"liver": label(500), "spleen": label(2), "aorta": label(65535)})
    mask = np.zeros(volume.shape, np.uint16)
    mask[0, 0, 0], mask[1, 1, 1], mask[2, 2, 2] = 500, 2, 65535
    np.testing.assert_array_equal(values(written(mask, volume, task), volume, task), mask)
