"""The studies folder: what is there, what may be called what, and which files are labels."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from fastapi import HTTPException
from monailabel.datastore.local import LocalDatastore
from monailabel.interfaces.datastore import DefaultLabelTag

from lib.app.web.common import known_image
from lib.stores.cases import read_datalist
from lib.stores.errors import ConflictError, NotInStoreError, ReadOnlyError, StoreError
from lib.stores.local import LocalStore, check_tag
from support.drawn import drawing, everything, history, picture, ten_drawings, two_cases, value_of
from support.helpers import read_nifti, write_nifti


@pytest.fixture
def studies(tmp_path: Path) -> Path:
    return two_cases(tmp_path / "studies")


@pytest.fixture
def labels(tmp_path: Path) -> list[Path]:
    return ten_drawings(tmp_path / "drawn")


# Listing ----------------------------------------------------------------------------------------------------------


def test_files_are_the_truth(studies, labels):
    store = LocalStore(studies)
    assert store.list_images() == store.get_unlabeled_images() == ["a", "b"]
    assert store.status() == {"total": 2, "completed": 0, "label_tags": {}}
    picture(studies / "c.nii")
    for name in (".hidden.nii.gz", "._a.nii.gz", "notes.txt"):
        (studies / name).touch()
    (studies / "folder.nii.gz").mkdir()
    (studies / "labels" / "final").mkdir(parents=True)
    (studies / "labels" / "final" / "a.nii.gz").write_bytes(labels[3].read_bytes())
    (studies / "labels" / "final" / "stranger.nii.gz").write_bytes(labels[3].read_bytes())
    assert store.list_images() == ["a", "b", "c"]
    assert store.get_labeled_images() == ["a"]
    assert store.get_unlabeled_images() == ["b", "c"]
    lost = {"count": 1, "files": ["labels/final/stranger.nii.gz"]}
    assert store.status() == {
        **{"total": 3, "completed": 1, "label_tags": {"final": 1}},
        "labels_without_image": lost,
    }
    assert store.datalist() == read_datalist(studies)[:1]
    assert store.datalist(full_path=False) == [{"id": "a", "image": "a.nii.gz", "label": "labels/final/a.nii.gz"}]
    assert store.get_labels_by_image_id("a") == {"final": "a"}
    assert store.get_label_by_image_id("b", "final") == ""
    assert store.get_image_info("c")["name"] == "c.nii"
    assert store.get_image("c").getvalue() == (studies / "c.nii").read_bytes()
    (studies / "a.nii.gz").unlink()
    assert store.list_images() == ["b", "c"]
    assert store.get_labeled_images() == []


def test_a_folder_that_comes_and_goes(studies, labels):
    store = LocalStore(studies)
    studies.rename(studies.with_name("elsewhere"))
    assert store.list_images() == []
    assert store.datalist() == []
    assert store.status()["total"] == 0
    with pytest.raises(NotInStoreError):
        store.save_label("a", str(labels[1]), "final", {})
    with pytest.raises(ConflictError, match="not there at the moment"):
        store.add_image("n", str(picture(labels[0].with_name("n.nii.gz"))), {})
    assert not studies.exists(), "nothing is written where a share may be mounted"
    studies.with_name("elsewhere").rename(studies)
    store.save_label("a", str(labels[1]), "final", {})
    assert store.get_labeled_images() == ["a"]


def test_a_folder_that_monai_label_wrote(studies, labels):
    stock = LocalDatastore(str(studies), extensions=("*.nii.gz", "*.nii", "*.nrrd"))
    stock.save_label("a", str(labels[1]), "final", {"user": "ann", "label_info": [{"name": "liver"}]})
    stock.save_label("b", str(labels[2]), "original", {"model": "m"})
    stock.update_image_info("b", {"strategy": {"random": {"ts": 5}}})
    stock.set_description("Livers of 2024")
    store = LocalStore(studies)
    assert store.json() == json.loads(json.dumps(stock.json()))
    for case in ("a", "b"):
        assert store.get_image_info(case) == stock.get_image_info(case)
    assert store.get_label_info("a", "final") == stock.get_label_info("a", "final")
    assert store.status() == stock.status()
    assert store.description() == "Livers of 2024"


def test_monai_label_reads_what_we_wrote(studies, labels):
    store = LocalStore(studies)
    store.set_name("livers")
    store.save_label("a", str(labels[1]), "final", {"user": "ann", "annotated": ["liver"]})
    store.save_label("a", str(labels[2]), DefaultLabelTag.ORIGINAL, {"score": float("nan"), "array": np.ones(2)})
    store.update_image_info("b", {"strategy": {"random": {"ts": 5}}})
    store.save_label("b", str(labels[4]), "final", {})
    store.save_label("b", str(labels[5]), "final", {})
    stock = LocalDatastore(str(studies), extensions=("*.nii.gz", "*.nii", "*.nrrd"))
    assert stock.name() == "livers"
    assert stock.get_label_info("a", "final") == store.get_label_info("a", "final")
    assert stock.get_image_info("b") == store.get_image_info("b")
    assert stock.status()["completed"] == 2
    assert {d["label"] for d in stock.datalist()} == {d["label"] for d in store.datalist()}


def test_images_with_one_id_are_left_out_by_name(studies, caplog):
    picture(studies / "a.nii")
    store = LocalStore(studies)
    assert store.list_images() == store.list_images() == ["b"]
    assert caplog.text.count("'a' belongs to a.nii and a.nii.gz") == 1
    with pytest.raises(ConflictError, match=r"a\.nii and a\.nii\.gz"):
        store.get_image_uri("a")


@pytest.fixture
def troubled(studies) -> Path:
    """Beside a and b: a link in a circle, one to nowhere, a name that is not UTF-8, twins, a label of another time."""
    (studies / "loop.nii.gz").symlink_to("loop.nii.gz")
    (studies / "gone.nii.gz").symlink_to("elsewhere.nii.gz")
    (Path(os.fsdecode(os.fsencode(studies) + b"/caf\xe9.nii.gz"))).write_bytes((studies / "a.nii.gz").read_bytes())
    for name in ("twin.nii.gz", "twin.nii"):
        picture(studies / name)
    final = studies / "labels" / "final"
    final.mkdir(parents=True)
    for name in ("a.nii.gz", "a_seg.nii.gz", "old name.nii.gz", "twin.nii.gz"):
        drawing(final / name, 1)
    (final / "b.nii.gz").symlink_to("b.nii.gz")
    return studies


def test_what_cannot_be_used_costs_itself_alone_and_is_named(troubled, labels, caplog):
    store = LocalStore(troubled)
    store.report()
    assert store.list_images() == ["a", "b"]
    assert store.get_labeled_images() == ["a"] and store.get_unlabeled_images() == ["b"]
    assert [case["id"] for case in store.datalist()] == ["a"]
    assert set(store.json()["objects"]) == {"a", "b"}
    store.save_label("b", str(labels[2]), "original", {})
    store.update_image_info("b", {"seen": True})
    Path(store.get_dataset_archive(None)).unlink()
    expected = {
        "caf\\xe9": "caf\\xe9.nii.gz: its name is not UTF-8: rename it",
        "gone": "gone.nii.gz: it is a link to a file that is not there",
        "loop": "loop.nii.gz: it cannot be read: Too many levels of symbolic links",
        "twin": "image id 'twin' belongs to twin.nii and twin.nii.gz: left out until one is renamed",
        "labels/final/b.nii.gz": "it cannot be read: Too many levels of symbolic links",
    }
    lost = ["labels/final/a_seg.nii.gz", "labels/final/old name.nii.gz"]
    for answer in (store.status(), store.json()):
        assert answer["left_out"] == {"count": 5, "files": expected}
        assert answer["labels_without_image"] == {"count": 2, "files": lost}
    json.dumps(store.json(), ensure_ascii=False).encode()
    for reason in (*expected.values(), f"2 label file(s) without an image: {', '.join(lost)}"):
        assert reason in caplog.text
    for case in ("gone", "loop", "twin"):
        with pytest.raises(ConflictError, match=case):
            store.get_image_uri(case)
        with pytest.raises(HTTPException, match="cannot be used") as error:
            known_image(store, case)
        assert error.value.status_code == 409 and expected[case] in error.value.detail
        with pytest.raises(ConflictError, match=r"belongs to|cannot be used"):
            store.add_image(case, str(picture(labels[0].with_name("new.nii.gz"))), {})


@pytest.mark.parametrize("reason", [errno.EACCES, errno.ESTALE])
def test_a_file_that_may_not_be_read_or_whose_handle_is_stale(studies, monkeypatch, reason):
    real_access, real_open = os.access, os.open

    def access(path, *args, **kwargs):
        return not str(path).endswith("a.nii.gz") and real_access(path, *args, **kwargs)

    def refuse(path, *args, **kwargs):
        if str(path).endswith("a.nii.gz"):
            raise OSError(reason, os.strerror(reason), str(path))
        return real_open(path, *args, **kwargs)

    monkeypatch.setattr(os, "access", access)
    monkeypatch.setattr(os, "open", refuse)
    store = LocalStore(studies)
    assert store.list_images() == ["b"]
    assert store.status()["left_out"]["files"] == {"a": f"a.nii.gz: it cannot be read: {os.strerror(reason)}"}


def test_an_answer_names_the_first_files_and_counts_the_others(studies):
    for number in range(25):
        (studies / f"link{number:02}.nii.gz").symlink_to("nowhere")
    found = LocalStore(studies).status()["left_out"]
    assert found["count"] == 25 and list(found["files"]) == [f"link{number:02}" for number in range(20)]


def test_linked_images_are_read_and_links_for_labels_are_not_followed(studies, labels, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    picture(outside / "far.nii.gz")
    (studies / "near.nii.gz").symlink_to(outside / "far.nii.gz")
    store = LocalStore(studies)
    assert store.get_image_uri("near") == str(studies / "near.nii.gz")
    store.save_label("near", str(labels[1]), "final", {})
    (studies / "labels" / "first").symlink_to(outside)
    with pytest.raises(ReadOnlyError, match="through a link"):
        store.save_label("near", str(labels[1]), "first", {})
    (studies / "labels" / "final" / "a.nii.gz").symlink_to(outside / "precious.nii.gz")
    (outside / "precious.nii.gz").write_bytes(labels[2].read_bytes())
    store.save_label("a", str(labels[3]), "final", {})
    assert value_of(outside / "precious.nii.gz") == 2
    assert value_of(studies / "labels" / "final" / "a.nii.gz") == 3
    assert sorted(p.name for p in outside.iterdir()) == ["far.nii.gz", "precious.nii.gz"]


# Names ------------------------------------------------------------------------------------------------------------

BAD_IDS = (
    "../x",
    "a/b",
    "/abs",
    "..",
    ".x",
    "a\\b",
    "a\0b",
    "a\nb",
    "x" * 201,
    "ü" * 101,
    " x",
    "\ud800",
    "a:b",
    "x..y",
)


@pytest.mark.parametrize("case", BAD_IDS)
def test_bad_ids_reach_nothing(studies, labels, case):
    store = LocalStore(studies)
    new = picture(labels[0].with_name("new.nii.gz"))
    (studies.parent / "x.nii.gz").write_bytes(new.read_bytes())
    before = everything(studies.parent)
    with pytest.raises(StoreError):
        store.add_image(case, str(new), {})
    for call in (
        lambda: store.save_label(case, str(labels[1]), "final", {}),
        lambda: store.get_image_uri(case),
        lambda: store.get_image_info(case),
        lambda: store.get_label_uri(case, "final"),
        lambda: store.update_image_info(case, {}),
        lambda: store.remove_image(case),
        lambda: store.remove_label(case, "final"),
    ):
        with pytest.raises(NotInStoreError):
            call()
    assert everything(studies.parent) == before


@pytest.mark.parametrize("tag", ["", "..", "a/b", ".x", "history", "Rejected", "x" * 65, "a b", "a\n", None])
def test_bad_tags_reach_nothing(studies, labels, tag):
    store = LocalStore(studies)
    before = everything(studies)
    for call in (
        lambda: store.save_label("a", str(labels[1]), tag, {}),
        lambda: store.get_label_uri("a", tag),
        lambda: store.remove_label("a", tag),
        lambda: store.get_label_by_image_id("a", tag),
    ):
        with pytest.raises(StoreError, match="valid are up to 64 letters"):
            call()
    assert everything(studies) == before


def test_tags_of_monai_label_are_plain_text():
    assert type(check_tag(DefaultLabelTag.FINAL)) is str
    assert check_tag(DefaultLabelTag.FINAL) == "final"


def test_errors_carry_a_status(studies, labels):
    store = LocalStore(studies)
    for status, call in (
        (404, lambda: store.get_image_uri("z")),
        (404, lambda: store.get_label_uri("a", "final")),
        (404, lambda: store.get_dataset_archive(None)),
        (400, lambda: store.get_label_uri("a", "../final")),
        (403, lambda: LocalStore(studies, read_only=True).save_label("a", str(labels[1]), "final", {})),
    ):
        with pytest.raises(StoreError) as error:
            call()
        assert error.value.status == status


# Images -----------------------------------------------------------------------------------------------------------


def test_a_new_image(studies, labels):
    store = LocalStore(studies)
    new = picture(labels[0].with_name("new.nii.gz"), 5)
    assert store.add_image("Fall 7 (März)", str(new), {"patient": "x"}) == "Fall 7 (März)"
    assert store.add_image(None, str(new), None) == "new"
    assert (studies / "Fall 7 (März).nii.gz").read_bytes() == new.read_bytes()
    assert store.get_image_info("Fall 7 (März)")["patient"] == "x"
    with pytest.raises(StoreError, match="not a volume"):
        store.add_image("flat", str(write_nifti(new.with_name("flat.nii.gz"), np.ones((3, 3), np.uint8))), {})
    with pytest.raises(StoreError, match=r"valid are \.nii\.gz"):
        store.add_image("text", str(new.with_name("text.txt")), {})
    with pytest.raises(StoreError, match="would take 'x' for the id"):
        store.add_image("x.seg", str(drawing(new.with_name("n.nrrd"), 1)), {})
    with pytest.raises(ConflictError, match=r"belongs to new\.nii\.gz"):
        store.add_image("new", str(picture(new.with_name("other.nii"))), {})


def test_an_image_is_never_replaced_by_another_one(studies, labels):
    store = LocalStore(studies)
    store.save_label("a", str(labels[1]), "final", {"user": "ann"})
    store.save_label("a", str(labels[2]), "original", {})
    same = labels[0].with_name("same.nii.gz")
    same.write_bytes((studies / "a.nii.gz").read_bytes())
    before = (studies / "a.nii.gz").read_bytes()
    store.add_image("a", str(same), {})
    image = read_nifti(same)
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj).astype(np.float64), image.affine), same)
    store.add_image("a", str(same), {})
    assert (studies / "a.nii.gz").read_bytes() == before, "the same image again, as another program writes it"
    with pytest.raises(ConflictError, match="another image 'a' already: give yours another name"):
        store.add_image("a", str(picture(same, 9)), {})
    assert (studies / "a.nii.gz").read_bytes() == before
    assert store.get_labels_by_image_id("a") == {"final": "a", "original": "a"}


def test_a_removed_image_leaves_its_labels_in_the_history(studies, labels):
    store = LocalStore(studies)
    store.save_label("a", str(labels[1]), "final", {"user": "ann"})
    store.remove_image("a")
    assert store.list_images() == ["b"]
    assert "a" not in store.json()["objects"]
    assert value_of(history(studies)[0]) == 1
    assert (
        json.loads(history(studies)[0].with_name(f"{history(studies)[0].name}.json").read_text())["info"]["user"]
        == "ann"
    )


def test_clicks_go_where_their_label_goes(studies, labels):
    store, clicks = LocalStore(studies), [{"label": "liver", "foreground": [[0, 1, 2]]}]
    store.save_label("a", str(labels[1]), "final", {"clicks": clicks})
    assert store.datalist()[0]["clicks"] == read_datalist(studies)[0]["clicks"] == clicks
    store.save_label("a", str(labels[2]), "final", {})
    assert "clicks" not in store.datalist()[0] and "clicks" not in store.get_label_info("a", "final")
    beside = history(studies)[0].with_name(f"{history(studies)[0].name}.json")
    assert json.loads(beside.read_text())["info"]["clicks"] == clicks


# Infos ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b"\xff\xfe", b'{"objects": {"a": 3}}', b'{"objects": []}'])
def test_damaged_infos_are_set_aside(studies, labels, damage, caplog):
    store = LocalStore(studies)
    store.save_label("a", str(labels[1]), "final", {"user": "ann"})
    store.update_image_info("b", {"last": "change"})
    path = studies / "datastore_v2.json"
    path.write_bytes(damage)
    assert store.get_label_info("a", "final")["user"] == "ann", "of the generation before"
    assert "cannot be read" in caplog.text
    again = LocalStore(studies)
    assert [p.read_bytes() for p in studies.glob("datastore_v2.json.damaged-*")] == [damage]
    assert again.get_label_info("a", "final")["user"] == "ann"
    again.update_image_info("b", {"newer": "change"})
    assert LocalStore(studies).get_label_info("a", "final")["user"] == "ann"


def test_without_any_infos_the_files_are_enough(studies, labels):
    store = LocalStore(studies)
    store.save_label("a", str(labels[1]), "final", {"user": "ann"})
    (studies / "datastore_v2.json").write_text("{")
    (studies / "datastore_v2.json.bak").write_text("{")
    store = LocalStore(studies)
    assert store.get_labeled_images() == ["a"]
    assert set(store.get_label_info("a", "final")) == {"ts", "name"}
    assert len(list(studies.glob("*.damaged-*"))) == 2


def test_infos_are_plain_data_and_no_path_of_this_machine(studies):
    store = LocalStore(studies)
    store.update_image_info("a", {"score": float("nan"), "path": "/etc/passwd", "tag": DefaultLabelTag.FINAL})
    info = store.get_image_info("a")
    assert info == {**info, "score": None, "path": str(studies / "a.nii.gz")}
    assert "passwd" not in (studies / "datastore_v2.json").read_text()
    info["strategy"] = "changed by the caller"
    assert "strategy" not in store.get_image_info("a")
    with pytest.raises(StoreError, match="expected an object"):
        store.update_image_info("a", [1])  # type: ignore[arg-type]  # as a client may send it
