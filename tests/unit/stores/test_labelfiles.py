"""Labels: every one that was drawn is kept, and what is none is refused and kept aside."""

from __future__ import annotations

import gzip
import json
import os
import re
import time
import zipfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import yaml
from monailabel.interfaces.tasks.batch_infer import BatchInferTask
from typer.testing import CliRunner

from lib.app.cli.labels import app
from lib.stores.cases import audit, read_datalist
from lib.stores.errors import ConflictError, NotInStoreError, StoreError
from lib.stores.local import LocalStore
from lib.stores.renaming import Renaming
from lib.stores.uploads.checks import check_label_file
from lib.stores.uploads.numbering import segment_names
from lib.volumes.masks import write_mask
from support.drawn import SHAPE, drawing, everything, history, rejected, ten_drawings, two_cases, value_of
from support.helpers import label, read_nifti, tiny_task, write_nifti


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
    """Even if the older one claims to be from next year."""
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
        "text.nii.gz": (b"this is not a label", "not a NIfTI file"),
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


def test_what_was_drawn_on_an_image_that_is_gone_is_kept(studies, labels, monkeypatch):
    """Renamed, removed or doubled: before the label came, and while it was checked."""
    store = LocalStore(studies)

    def refused(kind: type[StoreError], words: str) -> None:
        before = len(rejected(studies))
        with pytest.raises(kind, match=words) as error:
            store.save_label("a", str(labels[5]), "final", {"user": "ann"})
        assert len(rejected(studies)) == before + 1
        kept = studies / str(error.value).rsplit("kept as ", 1)[1]
        assert value_of(kept) == 5 and "-ann." in kept.name
        assert words in kept.with_name(f"{kept.name}.txt").read_text()

    (studies / "a.nii.gz").rename(studies / "new name.nii.gz")
    refused(NotInStoreError, "unknown image 'a'")
    (studies / "new name.nii.gz").rename(studies / "a.nii.gz")
    (studies / "a.nii").write_bytes(gzip.decompress((studies / "a.nii.gz").read_bytes()))
    refused(ConflictError, "left out until one is renamed")
    (studies / "a.nii").unlink()

    def removed_meanwhile(*args):
        (studies / "a.nii.gz").unlink()
        return check_label_file(*args)

    image = (studies / "a.nii.gz").read_bytes()
    monkeypatch.setattr("lib.stores.local.check_label_file", removed_meanwhile)
    refused(StoreError, "does not exist")
    (studies / "a.nii.gz").write_bytes(image)

    def removed_at_last(*args):
        (studies / "a.nii.gz").unlink()

    monkeypatch.setattr("lib.stores.local.check_label_file", check_label_file)
    monkeypatch.setattr("lib.stores.local.check_trainable", removed_at_last)
    refused(NotInStoreError, "unknown image 'a'")
    assert store.list_images() == ["b"] and history(studies) == []


def test_a_submit_is_refused_in_the_words_of_training(studies, labels):
    """And what training takes is taken: a value that is a float's error off."""
    task = tiny_task(labels={"liver": label(1), "spleen": label(2)})
    other = tiny_task(name="other", labels={"aorta": label(9)})
    store = LocalStore(studies, tasks=[task])

    def drawn(value: float) -> str:
        return str(write_nifti(labels[0].with_name("v.nii.gz"), np.full(SHAPE, value, np.float32)))

    for value, shown in ((255, "255"), (0.75, "0.75"), (-1, "-1"), (70000, "70000"), (float("nan"), "nan")):
        with pytest.raises(StoreError, match=f"unknown label values {re.escape(shown)}; ") as error:
            store.save_label("a", drawn(value), "final", {})
        said = str(error.value).partition("; the file is kept")[0]
        trained = audit(task, [{"id": "a", "image": str(studies / "a.nii.gz"), "label": drawn(value)}]).cases[0].problem
        assert said.removeprefix("the label") == trained.removeprefix(drawn(value))
    assert len(rejected(studies)) == 5
    for value in (1, 0.9999999, 2.0000002):
        store.save_label("a", drawn(value), "final", {"annotated": ["LIVER"]})
        assert float(read_nifti(store.datalist()[0]["label"]).get_fdata().max()) == round(value), "exactly"
    assert audit(task, store.datalist()).cases[0].counts == {"liver": 0}
    with pytest.raises(StoreError, match="annotated: unknown class 'kidney'; valid are liver, spleen"):
        store.save_label("a", drawn(1), "final", {"annotated": ["kidney"]})
    with pytest.raises(StoreError, match="annotated: unknown class 'kidney'"):
        store.update_label_info("a", "final", {"annotated": ["kidney"]})
    both = LocalStore(studies, tasks=[task, other])
    both.save_label("b", drawn(9), "final", {})
    with pytest.raises(StoreError, match="unknown label values 9; task 'tiny' knows"):
        both.save_label("b", drawn(9), "final", {"model": "tiny"})
    with pytest.raises(StoreError, match=r"task 'tiny' knows.*; other: annotated: unknown class 'liver'"):
        both.save_label("b", drawn(9), "final", {"annotated": ["liver"]})
    both.save_label("b", drawn(9), "scores", {})


def test_a_named_upload_with_rounded_values_is_taken(studies, labels):
    store = LocalStore(studies, tasks=[tiny_task(labels={"left kidney": label(1), "spleen": label(2)})])
    file = write_nifti(labels[0].with_name("v.nii.gz"), np.full(SHAPE, 0.9999999, np.float32))
    store.save_label("a", str(file), "final", {"label_info": [{"name": "Left-Kidney", "idx": 1}]})
    assert store.datalist()[0]["label_names"] == {"left kidney": 1}
    assert set(np.unique(read_nifti(store.datalist()[0]["label"]).get_fdata())) == {1}
    half = write_nifti(labels[0].with_name("h.nii.gz"), np.full(SHAPE, 0.5, np.float32))
    with pytest.raises(StoreError, match="not whole numbers from 0 to 65535: 0.5"):
        store.save_label("a", str(half), "final", {"label_info": [{"name": "spleen", "idx": 1}]})


@pytest.fixture
def renamed(studies, labels, tmp_path) -> Path:
    """Labels that were drawn while the class `aorta` (value 3) was called `main artery`."""
    before = tiny_task(labels={"main artery": label(3), "spleen": label(2)})
    store = LocalStore(studies, tasks=[before])
    named = {"label_info": [{"name": "Main-Artery", "idx": 3}], "annotated": ["main_artery", "spleen"], "user": "ann"}
    store.save_label("a", str(labels[3]), "final", named)
    file = labels[0].with_name("b.seg.nrrd")
    write_mask(file, np.full(SHAPE, 3, np.uint8), np.eye(4), "", before.labels)
    store.save_label("b", str(file), "final", {})
    store.save_label("b", str(labels[2]), "other", {"label_info": [{"name": "spleen", "idx": 2}]})
    return studies


def test_labels_follow_a_class_that_is_renamed(renamed):
    now = tiny_task(labels={"aorta": label(3), "spleen": label(2)})
    store = LocalStore(renamed, tasks=[now])
    problems = [found.problem for found in audit(now, store.datalist()).cases]
    assert "unknown class 'main_artery'" in problems[0] and "'main artery' there, 'aorta' here" in problems[1]
    renaming, before = Renaming("main artery", "aorta", now), everything(renamed)
    places = store.rename_class(renaming, only_list=True)
    assert places == ["labels/final/a.nii.gz", "labels/final/b.seg.nrrd"]
    assert everything(renamed) == before
    assert store.rename_class(renaming) == places
    info = store.get_label_info("a", "final")
    assert (info["annotated"], info["label_names"], info["user"]) == (["aorta", "spleen"], {"aorta": 3}, "ann")
    assert info["label_info"] == [{"name": "aorta", "idx": 3}]
    assert [found.counts["aorta"] for found in audit(now, store.datalist()).cases] == [336, 336]
    new = Path(store.get_label_uri("b", "final"))
    (old,) = history(renamed, "b")
    assert segment_names(new) == {3: "aorta", 2: "spleen"} and segment_names(old) == {3: "main artery", 2: "spleen"}
    assert old.read_bytes() == before["labels/final/b.seg.nrrd"]
    assert old.read_bytes().partition(b"\n\n")[2] == new.read_bytes().partition(b"\n\n")[2], "no voxel is written anew"
    assert everything(renamed)["labels/final/a.nii.gz"] == before["labels/final/a.nii.gz"]
    with pytest.raises(NotInStoreError, match="no label of the folder names the class 'main artery'"):
        store.rename_class(renaming)
    then = tiny_task(labels={"main artery": label(3), "spleen": label(2)})
    assert store.rename_class(Renaming("aorta", "main artery", then)) == places, "there is a way back"


def test_labels_of_another_task_keep_their_names(renamed):
    """There the name has another value."""
    now = tiny_task(labels={"aorta": label(7), "spleen": label(2)})
    assert LocalStore(renamed).rename_class(Renaming("main artery", "aorta", now), only_list=True) == []


def test_a_rename_that_the_task_does_not_know_is_refused():
    task = tiny_task()
    with pytest.raises(StoreError, match="has no class 'vessel'; valid are liver, spleen, aorta"):
        Renaming("aorta", "vessel", task)
    with pytest.raises(StoreError, match="still has the class 'Liver'"):
        Renaming("Liver", "aorta", task)
    assert Renaming("AORTA", "aorta", task).of("Aorta") == "aorta", "another spelling can be unified"


def test_renaming_on_the_command_line(renamed):
    now = renamed.parent / "own.yaml"
    data = tiny_task(labels={"aorta": label(3), "spleen": label(2)}).to_dict()
    now.write_text(yaml.safe_dump({**data, "concepts": "texts.yaml"}))
    (renamed.parent / "texts.yaml").write_text(yaml.safe_dump(data["concepts"]))
    command = ["rename", "main artery", "aorta", "--task", str(now), "--data"]
    listed = CliRunner().invoke(app, [*command, str(renamed)])
    assert "labels/final/a.nii.gz" in listed.output and "2 label(s) would change; nothing was changed" in listed.output
    done = CliRunner().invoke(app, [*command, str(renamed), "--yes"])
    assert "2 label(s) now say 'aorta' instead of 'main artery'" in done.output
    refused = CliRunner().invoke(app, [*command, "http://archive/dicom-web"])
    assert "DICOM SEGs, which stay as they were stored" in str(refused.exception)
    refused = CliRunner().invoke(app, [*command, "list.json"])
    assert "not a folder of studies" in str(refused.exception)


def test_a_dataset_without_what_vanished_while_it_was_packed(studies, labels, monkeypatch):
    store = LocalStore(studies)
    store.save_label("a", str(labels[1]), "final", {})
    store.save_label("b", str(labels[2]), "final", {})
    cases = store.datalist()
    (studies / "b.nii.gz").unlink()
    monkeypatch.setattr(store, "datalist", lambda: cases)
    path = store.get_dataset_archive(None)
    with zipfile.ZipFile(path) as archive:
        assert sorted(archive.namelist()) == ["image/a.nii.gz", "label/a.nii.gz", "left-out.txt", "metadata.json"]
        assert archive.read("left-out.txt").decode() == "b.nii.gz: No such file or directory\n"
    Path(path).unlink()


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
