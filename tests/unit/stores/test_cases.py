"""Finding cases and judging them before training."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from lib.stores.cases import audit, read_datalist
from lib.volumes.folders import image_id
from support.helpers import label, tiny_overlapping_task, tiny_task, write_nifti

SHAPE = (6, 7, 8)


def image(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-100, 200, SHAPE).astype(np.float32)


def mask(**voxels: int) -> np.ndarray:
    """A label volume with so many voxels of each value, e.g. mask(v1=5, v3=2)."""
    flat = np.zeros(np.prod(SHAPE), np.uint8)
    start = 0
    for key, count in voxels.items():
        flat[start : start + count] = int(key[1:])
        start += count
    return flat.reshape(SHAPE)


def case(folder: Path, name: str, labelled: np.ndarray | None, affine=None, picture=None) -> dict:
    write_nifti(folder / f"{name}.nii.gz", image() if picture is None else picture)
    path = folder / f"{name}_label.nii.gz"
    if labelled is not None:
        write_nifti(path, labelled, affine)
    return {
        "id": name,
        "image": str(folder / f"{name}.nii.gz"),
        "label": None if labelled is None else str(path),
    }


# Lists of cases --------------------------------------------------------------------------------------------------


def test_monai_label_folder(tmp_path):
    final = tmp_path / "labels" / "final"
    final.mkdir(parents=True)
    for name in ("b.nii.gz", "a.nrrd", "c.nii", "._b.nii.gz", "notes.txt", "datastore_v2.json"):
        (tmp_path / name).touch()
    for name in ("b.nii.gz", "a.nii.gz", "z.nii.gz"):
        (final / name).touch()
    (tmp_path / "labels" / "original").mkdir()
    (tmp_path / "labels" / "original" / "c.nii.gz").touch()
    assert read_datalist(tmp_path) == [
        {"id": "a", "image": str(tmp_path / "a.nrrd"), "label": str(final / "a.nii.gz")},
        {"id": "b", "image": str(tmp_path / "b.nii.gz"), "label": str(final / "b.nii.gz")},
        {"id": "c", "image": str(tmp_path / "c.nii"), "label": None},
    ]


def test_json_list_and_decathlon_layout(tmp_path):
    entries = [
        {"image": "./imagesTr/two.nii.gz", "label": "./labelsTr/two.nii.gz"},
        {"id": "one", "image": "imagesTr/1.nii.gz"},
    ]
    expected = [
        {"id": "one", "image": str(tmp_path / "imagesTr/1.nii.gz"), "label": None},
        {
            "id": "two",
            "image": str(tmp_path / "imagesTr/two.nii.gz"),
            "label": str(tmp_path / "labelsTr/two.nii.gz"),
        },
    ]
    path = tmp_path / "dataset.json"
    path.write_text(json.dumps(entries))
    assert read_datalist(path) == expected
    path.write_text(json.dumps({"name": "Task", "training": entries, "test": ["./imagesTs/3.nii.gz"]}))
    assert read_datalist(str(path)) == expected


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[{", "not valid JSON"),
        ("\xff", "not valid JSON"),
        ('{"cases": []}', "under 'training'"),
        ("[]", "no images"),
        ('["a.nii.gz"]', "entry 0"),
        ('[{"label": "a.nii.gz"}]', "entry 0"),
        ('[{"image": "a.nii.gz", "label": 3}]', "'label' must be a path"),
        ('[{"image": "x/a.nii.gz"}, {"image": "y/a.nii.gz"}]', "several cases with id 'a'"),
    ],
)
def test_bad_lists(tmp_path, text, reason):
    path = tmp_path / "list.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=reason) as error:
        read_datalist(path)
    assert str(path) in str(error.value)


def test_bad_folders(tmp_path):
    with pytest.raises(ValueError, match="neither a folder nor a JSON file"):
        read_datalist(tmp_path / "missing")
    with pytest.raises(ValueError, match="no images"):
        read_datalist(tmp_path)
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "1").write_bytes(bytes(128) + b"DICM")
    with pytest.raises(ValueError, match="no images.*there are DICOM files, e.g. study/1, which count in a DICOMweb"):
        read_datalist(tmp_path)
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "x.nii").touch()
    with pytest.raises(ValueError, match="no images.*there are images in sub folders, e.g. more/x.nii"):
        read_datalist(tmp_path)
    (tmp_path / "a.nrrd").touch()
    (tmp_path / "a.nii.gz").touch()
    with pytest.raises(ValueError, match=r"no image that can be used: image id 'a' belongs to a\.nii\.gz and a\.nrrd"):
        read_datalist(tmp_path)


def test_an_image_that_cannot_be_used_costs_itself_alone(tmp_path, caplog):
    (tmp_path / "loop.nii.gz").symlink_to("loop.nii.gz")
    os.close(os.open(os.fsencode(tmp_path) + b"/caf\xe9.nii.gz", os.O_CREAT))
    for name in ("good.nii.gz", "twin.nii", "twin.nii.gz"):
        (tmp_path / name).touch()
    assert [case["id"] for case in read_datalist(tmp_path)] == ["good"]
    for words in (
        "loop.nii.gz: it cannot be read",
        r"caf\xe9.nii.gz: its name is not UTF-8",
        "twin.nii and twin.nii.gz",
    ):
        assert words in caplog.text


def test_one_comparison_of_names_decides_whom_a_label_was_drawn_for(tmp_path):
    """`Left-Kidney` of then is `left kidney` of now; `kidney` is another class."""
    task = tiny_task(labels={"left kidney": label(1), "aorta": label(2)})
    drawn = case(tmp_path, "a", mask(v1=3))
    for names, problem in (
        ({"Left-Kidney": 1}, None),
        ({"kidney": 1}, "drawn for another task: value 1 is 'kidney' there, 'left kidney' here"),
        ({"LEFT_KIDNEY": 2}, "value 2 is 'LEFT_KIDNEY' there, 'aorta' here"),
        ({"left kidney": 7}, "value 7 is 'left kidney' there, None here"),
    ):
        found = audit(task, [{**drawn, "label_names": names}]).cases[0].problem
        assert found is None if problem is None else problem in found
    report = audit(task, [{**drawn, "annotated": ["LEFT-kidney"]}])
    assert report.cases[0].problem is None and report.cases[0].counts == {"left kidney": 3}


def test_values_are_rounded_where_a_float_lost_something_and_named_where_they_are_others(tmp_path):
    task = tiny_task(labels={"liver": label(1), "spleen": label(2)})
    near = mask(v1=4, v2=3).astype(np.float32) * np.float32(0.9999999)
    assert audit(task, [case(tmp_path, "near", near)]).cases[0].counts == {"liver": 4, "spleen": 3}
    for wrong, shown in ((0.75, "0.75"), (1.002, "1.002"), (255, "255"), (-1, "-1"), (0.99, "0.99")):
        values = mask(v1=4).astype(np.float32) * np.float32(wrong)
        problem = audit(task, [case(tmp_path, "wrong", values)]).cases[0].problem
        assert f"unknown label values {shown}; task 'tiny' knows 0 (background), 1 (liver), 2 (spleen)" in problem


def test_a_case_that_went_away_names_itself(tmp_path, monkeypatch):
    one, other = case(tmp_path, "one", mask(v1=3)), case(tmp_path, "other", mask(v1=3))
    real = os.stat

    def stale(path, *args, **kwargs):
        if str(path) == one["image"]:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))
        return real(path, *args, **kwargs)

    monkeypatch.setattr(os, "stat", stale)
    report = audit(tiny_task(), [one, other])
    assert [found["id"] for found in report.usable] == ["other"]
    assert report.cases[0].problem and "one.nii.gz" in report.cases[0].problem


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/d/case.1.nii.gz", "case.1"),
        ("case.nii", "case"),
        ("x.seg.nrrd", "x"),
        ("x.NRRD", "x"),
        ("/d/series-7", "series-7"),
    ],
)
def test_image_id(path, name):
    assert image_id(path) == name


# Audit -----------------------------------------------------------------------------------------------------------


def in_metres(given):
    """The same case, its image's header in metres."""
    volume = nib.Nifti1Image(image(), np.eye(4))
    volume.header.set_xyzt_units("meter")
    nib.save(volume, given["image"])
    return given


def test_counts_by_name_and_one_bad_case_stops_nothing(tmp_path):
    task = tiny_task(labels={"aorta": label(1, file_values=[820]), "liver": label(2), "spleen": label(3)})
    raw = mask(v1=4, v2=6).astype(np.uint16)
    raw[-1] = 820  # 56 voxels
    broken = case(tmp_path, "broken", mask(v1=3))
    Path(broken["label"]).write_bytes(b"")
    nan = image()
    nan[0, 0, 0] = np.nan
    shifted = np.eye(4)
    shifted[0, 3] = 2
    cases = [
        broken,
        case(tmp_path, "good", raw),
        case(tmp_path, "unknown", mask(v2=5, v9=1)),
        case(tmp_path, "elsewhere", mask(v2=5), shifted),
        case(tmp_path, "nan", mask(v2=5), picture=nan),
        case(tmp_path, "empty", mask()),
        case(tmp_path, "unlabelled", None),
        {"id": "gone", "image": str(tmp_path / "gone.nii.gz"), "label": str(tmp_path / "gone_label.nii.gz")},
        case(tmp_path, "channels", mask(v2=1), picture=np.stack([image(), image(1)], -1)),
        case(tmp_path, "air", mask(v2=1), picture=image() - 1e5),
        in_metres(case(tmp_path, "metres", mask(v2=1))),
        {**case(tmp_path, "listed", mask(v2=1)), "label_names": {"liver": ["not", "a", "value"]}},
    ]
    report = audit(task, cases)
    found = {c.case["id"]: c for c in report.cases}
    assert found["good"].counts == {"aorta": 60, "liver": 6, "spleen": 0} and found["good"].problem is None
    assert found["empty"].empty and found["empty"].problem is None
    problems = {
        "broken": "zero bytes",
        "unknown": "unknown label values 9",
        "elsewhere": "not on the grid",
        "nan": "1 of 336 voxels are NaN",
        "unlabelled": "no label",
        "gone": "does not exist",
        "channels": "found 2 channels",
        "air": "no voxel above -175",
        "metres": "too large for the network's grid",
        "listed": "TypeError",
    }
    for name, words in problems.items():
        assert words in found[name].problem
    assert [c["id"] for c in report.usable] == ["good", "empty"]
    assert report.usable[0] == cases[1]
    assert report.missing == ("spleen",)
    report.check()
    table = report.table()
    assert "never present in a usable case: spleen" in table
    assert all(name in table for name in found) and "broken_label.nii.gz" in table
    (row,) = (line for line in table.splitlines() if "good" in line and "ok" in line)
    assert "60" in row and "6" in row


def test_regions_are_counted_from_labels(tmp_path):
    four = np.stack([image(i) for i in range(4)], -1)
    report = audit(tiny_overlapping_task(), [case(tmp_path, "a", mask(v1=7, v2=5, v3=2), picture=four)])
    assert report.cases[0].counts == {"whole tumour": 14, "tumour core": 7, "enhancing core": 2}


def test_headers_alone(tmp_path):
    """Without reading voxels, wrong grids and channels are found, NaN is not."""
    nan = image()
    nan[0, 0, 0] = np.nan
    cases = [
        case(tmp_path, "nan", mask(v2=5), picture=nan),
        case(tmp_path, "channels", mask(v2=1), picture=np.stack([image(), image(1)], -1)),
        case(tmp_path, "flat", mask(v2=1), picture=image()[..., 0]),
        case(tmp_path, "elsewhere", mask(v2=5)[:-1]),
    ]
    problems = [c.problem for c in audit(tiny_task(), cases, voxels=False).cases]
    assert problems[0] is None
    assert "found 2 channels" in problems[1] and "not a volume" in problems[2] and "not on the grid" in problems[3]


def test_training_on_nothing_is_refused(tmp_path):
    task = tiny_task()
    report = audit(task, [case(tmp_path, "odd", mask(v200=5)), case(tmp_path, "bare", None)])
    with pytest.raises(ValueError, match="none of 2 case") as error:
        report.check()
    assert "unknown label values 200" in str(error.value) and "bare: no label" in str(error.value)
    with pytest.raises(ValueError, match="every usable label is empty") as error:
        audit(task, [case(tmp_path, "void", mask())]).check()
    assert "liver, spleen, aorta" in str(error.value)


def test_real_cases_are_usable(real_data):
    folder = real_data / "cardiac_mr_acdc"
    names = {"right ventricle": label(1), "myocardium": label(2), "left ventricle": label(3)}
    task = tiny_task(modality="MR", channels=["cine MR"], labels=names)
    cases = [
        {"id": p.name, "image": str(p).replace("_gt", ""), "label": str(p)}
        for p in sorted(folder.glob("patient00*_gt.nii.gz"))[:4]
    ]
    report = audit(task, cases)
    assert len(report.usable) == 4 and report.missing == ()
    assert all(min(c.counts.values()) > 100 for c in report.cases)
