"""Labels: every one that was drawn is kept, and what is none is refused and kept aside."""

from __future__ import annotations

import gzip
import json
import os
import time
import zipfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from monailabel.interfaces.tasks.batch_infer import BatchInferTask

from lib.stores.cases import read_datalist
from lib.stores.errors import NotInStoreError, StoreError
from lib.stores.local import LocalStore
from support.drawn import SHAPE, drawing, history, rejected, ten_drawings, two_cases, value_of
from support.helpers import write_nifti


@pytest.fixture
def studies(tmp_path: Path) -> Path:
    return two_cases(tmp_path / "studies")


@pytest.fixture
def labels(tmp_path: Path) -> list[Path]:
    return ten_drawings(tmp_path / "drawn")


def test_every_replaced_label_is_in_the_history(studies, labels):
    store = LocalStore(studies)
    for i in range(1, 5):
        assert store.save_label("a", str(labels[i]), "final", {"user": f"Dr. {i}/x"}) == "a"
    assert value_of(store.get_label_uri("a", "final")) == 4
    assert store.get_label_info("a", "final")["user"] == "Dr. 4/x"
    assert [value_of(p) for p in history(studies)] == [1, 2, 3], "in the order in which they were drawn"
    assert [p.name.split("-")[1] for p in history(studies)] == [f"Dr._{i}_x.nii.gz" for i in (1, 2, 3)]
    store.remove_label("a", "final")
    assert store.get_labels_by_image_id("a") == {}
    assert [value_of(p) for p in history(studies)] == [1, 2, 3, 4]
    with pytest.raises(NotInStoreError):
        store.remove_label("a", "final")


def test_the_bytes_are_kept_as_they_came(studies, labels):
    store = LocalStore(studies)
    store.save_label("a", str(labels[7]), "final", None)
    assert Path(store.get_label_uri("a", "final")).read_bytes() == labels[7].read_bytes()
    empty = drawing(labels[0].with_name("empty.nii"), 0)
    store.save_label("b", str(empty), "final", None)
    assert Path(store.get_label_uri("b", "final")).read_bytes() == empty.read_bytes(), (
        "an empty label teaches background"
    )


@pytest.mark.parametrize("suffix", [".nrrd", ".seg.nrrd", ".nii"])
def test_another_format_replaces_the_label(studies, labels, suffix):
    store = LocalStore(studies)
    store.save_label("a", str(labels[1]), "final", {})
    store.save_label("a", str(drawing(labels[0].with_name(f"x{suffix}"), 2)), "final", {})
    assert [p.name for p in (studies / "labels" / "final").iterdir()] == [f"a{suffix}"]
    assert store.json()["objects"]["a"]["labels"]["final"]["ext"] == suffix
    assert [value_of(p) for p in history(studies)] == [1]
    store.save_label("a", str(labels[3]), "final", {})
    assert history(studies)[1].name.endswith(suffix)
    assert value_of(store.get_label_uri("a", "final")) == 3


@pytest.mark.parametrize("years", [-1, 1])
def test_a_clock_that_jumps_loses_nothing(studies, labels, years):
    """The labels that are there say that they were saved in another year, both in the very same microsecond."""
    store = LocalStore(studies)
    other_time = time.time_ns() + years * 365 * 86400 * 10**9
    for i in (1, 2):
        store.save_label("a", str(labels[i]), "final", {})
        os.utime(store.get_label_uri("a", "final"), ns=(other_time, other_time))
    store.save_label("a", str(labels[3]), "final", {})
    assert value_of(store.get_label_uri("a", "final")) == 3
    assert [value_of(p) for p in history(studies)] == [1, 2]
    nrrd = drawing(labels[0].with_name("x.nrrd"), 4)
    store.save_label("a", str(nrrd), "final", {})
    assert store.get_label_uri("a", "final").endswith(".nrrd")


def test_of_two_files_left_by_a_kill_the_newer_save_counts(studies, labels, monkeypatch):
    """Also where the older one claims to be from next year."""
    store = LocalStore(studies)
    store.save_label("a", str(labels[1]), "final", {})
    old = Path(store.get_label_uri("a", "final"))
    next_year = time.time_ns() + 365 * 86400 * 10**9
    os.utime(old, ns=(next_year, next_year))
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", lambda *args, **kwargs: None)
        store.save_label("a", str(drawing(labels[0].with_name("x.nrrd"), 2)), "final", {"user": "ann"})
    assert old.exists()
    assert store.get_label_uri("a", "final").endswith(".nrrd")
    assert store.get_label_info("a", "final")["user"] == "ann"


def test_what_is_no_label_is_refused_and_kept(studies, labels):
    store = LocalStore(studies)
    store.save_label("a", str(labels[1]), "final", {"user": "ann"})
    folder, whole = labels[0].parent, labels[2].read_bytes()
    flipped = bytearray(gzip.decompress(whole))
    nrrd = drawing(folder / "x.nrrd", 1).read_bytes()
    cases = {
        "text.nii.gz": (b"this is no label", "not a NIfTI file"),
        "nothing.nii.gz": (b"", "cannot be read"),
        "cut.nii.gz": (whole[:-12], "damaged or cut off"),
        "cut.nii": (bytes(flipped[:-5]), "cannot be read"),
        "checksum.nii.gz": (whole[:-8] + b"abcd" + whole[-4:], "damaged or cut off"),
        "more.nii.gz": (gzip.compress(bytes(flipped) + bytes(10**8)), "far more data than its header says"),
        "grid.nii.gz": (drawing(folder / "g.nii.gz", 1, (6, 7, 9)).read_bytes(), r"shape \(6, 7, 9\)"),
        "two.nii.gz": (drawing(folder / "t.nii.gz", 1, (6, 7, 8, 2)).read_bytes(), "with 2 channel"),
        "flat.nii.gz": (drawing(folder / "f.nii.gz", 1, (6, 7)).read_bytes(), "shape"),
        "place.nii.gz": (
            write_nifti(folder / "p.nii.gz", np.ones(SHAPE, np.uint8), np.diag([1, 1, 2, 1])).read_bytes(),
            "not on the grid of its image",
        ),
        "elsewhere.nrrd": (nrrd.replace(b"encoding:", b"data file: /etc/hostname\nencoding:"), "in another file"),
        "elsewhere.mha": (b"ObjectType = Image\nNDims = 3\nElementDataFile = /etc/hostname\n", "in another file"),
        "mask.png": (b"\x89PNG", r"file extension '.png'; valid are .nii.gz"),
    }
    for number, (name, (data, reason)) in enumerate(cases.items(), 1):
        (folder / name).write_bytes(data)
        with pytest.raises(StoreError, match=reason) as error:
            store.save_label("a", str(folder / name), "final", {"user": "bob"})
        assert error.value.status == 400
        assert str(folder) not in str(error.value), "no path of the server"
        assert str(studies) not in str(error.value)
        kept = studies / str(error.value).rsplit("kept as ", 1)[1]
        assert kept.read_bytes() == data
        assert "-bob." in kept.name
        assert kept.with_name(f"{kept.name}.txt").read_text().strip() in str(error.value)
        assert len(rejected(studies)) == number
    assert value_of(store.get_label_uri("a", "final")) == 1
    assert history(studies) == []


def test_a_partial_label_says_so_until_it_is_replaced(studies, labels):
    store = LocalStore(studies)
    for wrong in ([], "liver", [1], [""], {"liver": 1}):
        with pytest.raises(StoreError, match="expected a list of class names"):
            store.save_label("a", str(labels[1]), "final", {"annotated": wrong})
    store.save_label("a", str(labels[1]), "final", {"annotated": ["liver", "spleen"]})
    assert store.datalist()[0]["annotated"] == ["liver", "spleen"]
    assert read_datalist(studies)[0]["annotated"] == ["liver", "spleen"], "the command line sees it too"
    store.update_label_info("a", "final", {"annotated": ["liver"], "checked": True})
    assert store.datalist()[0]["annotated"] == ["liver"]
    store.save_label("a", str(labels[2]), "final", {"annotated": None})
    assert "annotated" not in store.datalist()[0]
    assert "annotated" not in read_datalist(studies)[0]


def test_a_declaration_that_was_damaged_by_hand_is_not_taken_for_a_complete_label(studies, labels):
    store = LocalStore(studies)
    store.save_label("a", str(labels[1]), "final", {"annotated": ["liver"]})
    path = studies / "datastore_v2.json"
    text = json.loads(path.read_text())
    text["objects"]["a"]["labels"]["final"]["info"]["annotated"] = "liver"
    path.write_text(json.dumps(text))
    assert store.datalist()[0]["annotated"] == ["liver"]


def test_a_json_list_may_declare_classes(tmp_path):
    path = tmp_path / "list.json"
    path.write_text(json.dumps([{"image": "a.nii.gz", "label": "l.nii.gz", "annotated": ["liver"]}]))
    assert read_datalist(path)[0]["annotated"] == ["liver"]
    path.write_text(json.dumps([{"image": "a.nii.gz", "label": "l.nii.gz", "annotated": "liver"}]))
    with pytest.raises(ValueError, match="entry 0: annotated: expected a list of class names, found 'liver'"):
        read_datalist(path)


def test_archive_and_batches(studies, labels):
    store = LocalStore(studies)
    store.save_label("a", str(labels[1]), "final", {})
    store.save_label("b", str(labels[2]), "final", {"annotated": ["liver"]})
    path = store.get_dataset_archive(None)
    with zipfile.ZipFile(path) as archive:
        assert {"image/a.nii.gz", "label/b.nii.gz", "metadata.json"} <= set(archive.namelist())
        assert archive.read("label/b.nii.gz") == labels[2].read_bytes()
    Path(path).unlink()
    path = store.get_dataset_archive(1)
    with zipfile.ZipFile(path) as archive:
        assert sorted(archive.namelist()) == ["image/a.nii.gz", "label/a.nii.gz", "metadata.json"]
    Path(path).unlink()
    assert BatchInferTask().get_images({"images": "labeled"}, store) == ["a", "b"]
    assert BatchInferTask().get_images({"images": "unlabeled"}, store) == []


def test_headers_with_two_voxel_sizes(studies, labels):
    """ACDC has such images: the affine says 1 mm, the voxel sizes beside it say 1.5 and 10. Labels have the latter."""
    image = nib.Nifti1Image(np.zeros(SHAPE, np.float32), np.diag([-1, -1, 1, 1]))
    image.header["pixdim"][1:4] = (1.5, 1.5, 10)
    nib.save(image, studies / "a.nii.gz")
    label = write_nifti(labels[0].with_name("x.nii.gz"), np.ones(SHAPE, np.uint8), np.diag([-1.5, -1.5, 10, 1]))
    store = LocalStore(studies)
    store.save_label("a", str(label), "final", {})
    with pytest.raises(StoreError, match="not on the grid of its image 'a'"):
        store.save_label("a", str(labels[1]), "final", {})
