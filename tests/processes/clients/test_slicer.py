"""3D Slicer's road: the requests of its module, what it makes of the answers, and what it sends."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import itk
import nrrd
import numpy as np
import pytest
from monailabel.client.client import MONAILabelClientException

from lib.app.web.access.accounts import User
from lib.app.web.access.downloads import SECONDS, Downloads
from lib.infers import BiPVLInfer
from lib.stores.cases import audit
from lib.stores.errors import StoreError
from lib.stores.local import LocalStore
from lib.tasks import list_tasks, load_task
from lib.trainers import BiPVLTrain
from lib.volumes.masks import write_mask
from support.clients.slicer import Slicer, loop, shown, widget_of
from support.helpers import label, read_nifti, tiny_task, write_nifti
from support.server import ELSEWHERE, Server, add_case
from support.training import SMALL

FROM_ELSEWHERE = {"X-Forwarded-For": ELSEWHERE}
USERS = {"BIPVL_USER": "ada", "BIPVL_PASSWORD": "a long word"}


@pytest.fixture(scope="module")
def studies(tmp_path_factory: pytest.TempPathFactory, phantoms: Callable[..., None]) -> Path:
    folder = tmp_path_factory.mktemp("slicer") / "studies"
    phantoms(folder, cases=4, labelled=1)
    return folder


@pytest.fixture(scope="module")
def server(studies: Path):
    with Server(studies, studies.parent / "models", {**SMALL, "models": "quickstart"}, **USERS) as running:
        yield running


@pytest.fixture
def slicer(server: Server, tmp_path: Path) -> Slicer:
    return Slicer(server.url, tmp_path, headers=FROM_ELSEWHERE, login=("ada", "a long word"))


# What the module builds from /info/ ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list_tasks())
def test_every_option_has_a_widget_and_its_value_comes_back(name, tmp_path):
    task = load_task(name, {"model.text": "scratch", "model.text_frozen": "none"})
    model, trainer = BiPVLInfer(task, tmp_path), BiPVLTrain(task, tmp_path)
    kinds = {}
    for engine in (model, trainer):
        for key, value in engine.info()["config"].items():
            kind, first = widget_of(value)
            kinds[key] = kind
            if kind == "combo":
                assert engine.options.full({key: first})[key] == first
                assert engine.options.full({key: value})[key] == first, "the whole list: its first entry is meant"
            else:
                assert engine.options.full({key: str(value)})[key] == value, "typed as a text"
                assert engine.options.full({key: value})[key] == value
    assert kinds["tta"] == kinds["resume"] == "checkbox"
    assert kinds["overlap"] == kinds["max_epochs"] == kinds["learning_rate"] == "number"
    assert kinds["device"] == kinds["model_version"] == kinds["dataset"] == "combo"
    values = list(task.label_values.values())
    assert values == list(range(1, len(values) + 1)), "segments get values by position"
    assert list(model.info()["labels"]) == list(task.labels)


# Masks that it reads ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".nrrd", ".seg.nrrd"])
def test_masks_lie_where_itk_reads_them(tmp_path, suffix):
    """An oblique grid, read by the library that Slicer reads with."""
    random = np.random.default_rng(3)
    mask = random.integers(0, 4, (9, 7, 5)).astype(np.uint8)
    turn, _ = np.linalg.qr(random.normal(size=(3, 3)))
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = turn @ np.diag([0.7, 1.5, 3.0]), [10.0, -20.0, 33.0]
    file = tmp_path / f"mask{suffix}"
    write_mask(file, mask, affine, "", tiny_task().labels)
    image = itk.imread(str(file))
    found = np.eye(4)
    found[:3, :3] = itk.array_from_matrix(image.GetDirection()) @ np.diag(np.array(image.GetSpacing()))
    found[:3, 3] = np.array(image.GetOrigin())
    assert np.allclose(np.diag([-1, -1, 1, 1]) @ found, affine, atol=1e-9)
    assert np.array_equal(itk.array_from_image(image).transpose(), mask)
    header = nrrd.read_header(str(file))
    assert (header.get("Segment1_Name") == "spleen") == (suffix == ".seg.nrrd")


# Labels that it writes ----------------------------------------------------------------------------------------------

LIVER, SPLEEN, AORTA = "liver", "spleen", "aorta"


def saved(folder: Path, values: np.ndarray, names: list[str] | None, tasks=None, **info) -> tuple[LocalStore, Path]:
    """A store with one label of image `a`, sent as Slicer sends it: values by position, names in label_info."""
    folder.mkdir(exist_ok=True)
    affine = np.diag([-2.0, 3.0, 4.0, 1.0])
    write_nifti(folder / "a.nii.gz", np.arange(values.size).reshape(values.shape).astype(np.int16), affine)
    sent = write_nifti(folder.parent / "sent.nii.gz", values.astype(np.int16), affine)
    store = LocalStore(folder, tasks=tasks or [tiny_task()])
    if names is not None:
        info["label_info"] = [{"name": name, "idx": i} for i, name in enumerate(names, start=1)]
    store.save_label("a", str(sent), "final", {"user": "ann", **info})
    return store, Path(store.get_label_uri("a", "final"))


def test_names_decide_not_positions(tmp_path):
    """Liver deleted in the Segment Editor, aorta moved to the front: values 1 and 2 are aorta and spleen."""
    drawn = np.random.default_rng(0).integers(0, 3, (5, 6, 7))
    store, file = saved(tmp_path / "studies", drawn, [AORTA, SPLEEN])
    kept = read_nifti(file)
    assert np.array_equal(np.asarray(kept.dataobj), np.array([0, 3, 2])[drawn])
    assert np.array_equal(kept.affine, read_nifti(tmp_path / "studies" / "a.nii.gz").affine)
    found = audit(tiny_task(), store.datalist()).cases[0]
    assert found.problem is None
    assert found.counts == {LIVER: 0, SPLEEN: int((drawn == 2).sum()), AORTA: int((drawn == 1).sum())}


def test_values_that_are_right_are_kept_byte_for_byte(tmp_path):
    drawn = np.random.default_rng(0).integers(0, 4, (5, 6, 7))
    _, file = saved(tmp_path / "studies", drawn, [LIVER, SPLEEN, AORTA, "Segment_1"])
    assert file.read_bytes() == (tmp_path / "sent.nii.gz").read_bytes(), "an empty segment of the user's own is ignored"


def test_a_segment_that_no_task_has_is_refused_and_kept(tmp_path):
    drawn = np.random.default_rng(0).integers(0, 3, (5, 6, 7))
    with pytest.raises(StoreError, match=r"'Segment_1' \(value 2\), which task 'tiny' does not know; valid are liver"):
        saved(tmp_path / "studies", drawn, [LIVER, "Segment_1"])
    (kept,) = (tmp_path / "studies" / "labels" / "rejected" / "a").glob("*.nii.gz")
    assert kept.read_bytes() == (tmp_path / "sent.nii.gz").read_bytes()


def test_two_tasks_on_one_folder(tmp_path):
    """The scene has the segments of both tasks. A label of one must not train the other."""
    heart = tiny_task(name="heart", labels={"left ventricle": label(1), "myocardium": label(2)})
    scene = [LIVER, SPLEEN, AORTA, "left ventricle", "myocardium"]
    drawn = np.random.default_rng(0).choice([0, 4, 5], (5, 6, 7))
    store, file = saved(tmp_path / "studies", drawn, scene, [tiny_task(), heart])
    assert np.array_equal(np.asarray(read_nifti(file).dataobj), np.where(drawn, drawn - 3, 0))
    (case,) = store.datalist()
    assert audit(heart, [case]).cases[0].problem is None
    assert "value 1 is 'left ventricle' there, 'liver' here" in str(audit(tiny_task(), [case]).cases[0].problem)


def test_a_segmentation_file_names_its_own_segments(tmp_path):
    """With the extension .seg.nrrd the module sends Slicer's own format: values and names are in its header."""
    values = np.random.default_rng(0).choice([0, 5, 9], (5, 6, 7)).astype(np.uint8)
    studies = tmp_path / "studies"
    studies.mkdir()
    write_nifti(studies / "a.nii.gz", np.arange(210).reshape(5, 6, 7).astype(np.int16), np.diag([-2.0, 3.0, 4.0, 1.0]))
    header = {
        "space": "left-posterior-superior",
        "space directions": np.diag([2.0, -3.0, 4.0]),
        "kinds": ["domain"] * 3,
    }
    header |= {"Segment0_Name": SPLEEN, "Segment0_LabelValue": "9", "Segment1_Name": LIVER, "Segment1_LabelValue": "5"}
    nrrd.write(str(tmp_path / "sent.seg.nrrd"), values, {**header, "space origin": [0, 0, 0]})
    store = LocalStore(studies, tasks=[tiny_task()])
    positions = [{"name": SPLEEN, "idx": 1}, {"name": LIVER, "idx": 2}]
    store.save_label("a", str(tmp_path / "sent.seg.nrrd"), "final", {"label_info": positions})
    kept = np.asarray(read_nifti(store.get_label_uri("a", "final")).dataobj)
    assert np.array_equal(kept, np.select([values == 5, values == 9], [1, 2]))

    layers = np.stack([values == 5, values >= 5]).astype(np.uint8)
    directions = np.vstack([[np.nan] * 3, np.diag([2.0, -3.0, 4.0])])
    overlapping = {**header, "space directions": directions, "kinds": ["list", *header["kinds"]]}
    nrrd.write(str(tmp_path / "two.seg.nrrd"), layers, {**overlapping, "space origin": [0, 0, 0]})
    with pytest.raises(StoreError, match="has 2 layers, as overlapping segments do"):
        store.save_label("a", str(tmp_path / "two.seg.nrrd"), "final", {})


# A server with accounts, from another machine ------------------------------------------------------------------------


def test_next_sample_downloads_once_without_the_login(server, studies, slicer):
    case = slicer.next_sample()
    image = read_nifti(studies / f"{case}.nii.gz")
    assert np.array_equal(slicer.volume, np.asarray(image.dataobj)) and np.allclose(slicer.affine, image.affine)
    asked = f"/datastore/image?image={case}"
    assert server.call("GET", asked, elsewhere=True).status_code == 401, "once"
    slicer.client().next_sample("first", {})
    assert server.call("GET", asked, headers={"X-Forwarded-For": "203.0.113.8"}).status_code == 401, "from there"
    assert server.call("GET", "/datastore/image?image=phantom_000", elsewhere=True).status_code == 401, "this image"
    assert server.call("GET", f"{asked}&image=phantom_000", elsewhere=True).status_code == 401
    assert server.call("GET", f"/datastore/image/info?image={case}", elsewhere=True).status_code == 401
    assert server.call("GET", asked, elsewhere=True).status_code == 200


def test_a_download_without_login_is_for_one_image_one_address_and_a_while():
    now = [0.0]
    downloads = Downloads(lambda: now[0])
    downloads.allow("10.0.0.1", "a", User("ada", "admin"))
    assert downloads.take("10.0.0.2", "a") is downloads.take("10.0.0.1", "b") is None
    assert downloads.take("10.0.0.1", "a") == User("ada", "viewer"), "who may only look"
    assert downloads.take("10.0.0.1", "a") is None
    downloads.allow("10.0.0.1", "a", User("ada", "admin"))
    now[0] = SECONDS + 1
    assert downloads.take("10.0.0.1", "a") is None


def test_another_image_of_the_same_name_in_the_cache(studies, slicer):
    case = slicer.next_sample()
    right = slicer.volume
    stale = slicer.folder / "cache" / f"{case}.nii.gz"
    shutil.copy(studies / "phantom_000.nii.gz", stale)
    assert slicer.next_sample() == case
    assert np.array_equal(slicer.volume, right)


def test_the_annotators_own_volume(server, studies, slicer, tmp_path):
    """It is uploaded under the name of its node at the first Run; the label belongs to it."""
    mine = write_nifti(tmp_path / "mine.nii.gz", *_volume(studies / "phantom_003.nii.gz", 1))
    slicer.open_own(mine, "Volume")
    slicer.run("quickstart")
    slicer.segments["liver"][:4] = True
    assert slicer.submit() == {"image": "Volume", "label": "Volume"}
    slicer.open_own(mine, "Volume")
    slicer.run("quickstart")
    assert server.call("HEAD", "/datastore/label?image=Volume&tag=final").ok, "the same volume again: the label stays"

    other = write_nifti(tmp_path / "other.nii.gz", *_volume(studies / "phantom_003.nii.gz", 2))
    for name, sentence in (
        ("Volume", "there is another image 'Volume' already: give yours another name (3D Slicer: rename the volume)"),
        ("2: Abdomen 5.0", "image id '2: Abdomen 5.0' must hold no '..' and none of / \\\\ : * ? \" < > |"),
    ):
        slicer.open_own(other, name)
        with pytest.raises(MONAILabelClientException) as error:
            slicer.run("quickstart")
        assert sentence in shown(error.value)
    assert server.call("HEAD", "/datastore/label?image=Volume&tag=final").ok


def test_an_older_module_sends_a_session(server, studies, slicer):
    session = slicer.client().create_session(str(studies / "phantom_003.nii.gz"))["session_id"]
    assert slicer.client().get_session(session)
    params = {"result_extension": ".nrrd", "result_dtype": "uint8"}
    file, result = slicer.client().infer("quickstart", "3: not on the server", params, session_id=session)
    slicer.open(str(studies / "phantom_003.nii.gz"), {})
    slicer.take_in(file, result["label_names"])
    slicer.client().remove_session(session)
    with pytest.raises(MONAILabelClientException) as error:
        slicer.client().infer("quickstart", "x", params, session_id=session)
    assert "unknown session" in error.value.msg and "expired" in error.value.msg


def test_labels_keep_who_drew_them(server, studies, slicer):
    case = slicer.next_sample()
    slicer.segments["spleen"][3:6, 3:6, 3:6] = True
    slicer.submit()
    del slicer.segments["liver"]
    slicer.segments["spleen"][3, 3, 3] = False
    slicer.submit()
    info = server.call("GET", f"/datastore/label/info?label={case}&tag=final").json()
    assert (info["user"], info["client_id"], info["label_names"]) == ("ada", "user-xyz", {"spleen": 2})
    current = np.asarray(read_nifti(studies / "labels" / "final" / f"{case}.nii.gz").dataobj)
    assert np.array_equal(current, np.where(slicer.segments["spleen"], 2, 0))
    (before,) = (studies / "labels" / "history" / "final" / case).glob("*-ada.nii.gz")
    assert np.asarray(read_nifti(before).dataobj).sum() == 2 * 27
    assert slicer.next_sample() != case
    server.call("DELETE", f"/datastore/label?id={case}&tag=final").raise_for_status()
    assert len(list((studies / "labels" / "history" / "final" / case).glob("*.nii.gz"))) == 2


INFER_ERRORS: tuple[tuple[str | None, str | None, dict[str, Any], str], ...] = (
    ("nothing", None, {}, "unknown model 'nothing'; valid are quickstart"),
    (None, "nobody", {}, "unknown image 'nobody'; the datastore has "),
    (None, None, {"overlap": "half"}, "overlap: expected a number from 0 to below 1, got 'half'"),
    (None, None, {"overlap": 1.5}, "overlap 1.5: valid is 0 up to, but not including, 1"),
    (None, None, {"tta": "perhaps"}, "tta: expected true or false, got 'perhaps'"),
    (None, None, {"largest_component": 3}, "largest_component: expected true or false, got 3"),
    (None, None, {"label_subset": "liver, livr"}, "label_subset: unknown label 'livr'; valid are liver, spleen"),
    (None, None, {"concepts": "{"}, "concepts: not valid JSON"),
    (None, None, {"model_version": "9"}, "model version '9': valid are 'served' and none yet"),
    (None, None, {"device": "cuda:9"}, "device: 'cuda:9'; valid are "),
    (None, None, {"result_extension": ".obj"}, "result_extension: '.obj'; valid are .nii.gz, .nii, .nrrd"),
    (None, None, {"result_compress": "x"}, "result_compress: expected true or false, got 'x'"),
    (None, None, {"save_label": "x"}, "save_label: expected true or false, got 'x'"),
)
TRAIN_ERRORS: tuple[tuple[str, dict[str, Any], str], ...] = (
    ("nothing", {}, "unknown model 'nothing'; valid are quickstart"),
    ("quickstart", {"max_epochs": "many"}, "max_epochs: expected a whole number, got 'many'"),
    ("quickstart", {"max_epochs": 0}, "max_epochs: 0 is too small; the least is 1"),
    ("quickstart", {"learning_rate": "fast"}, "learning_rate: expected a number, got 'fast'"),
    ("quickstart", {"val_split": 1}, "val_split 1.0: valid is 0 up to, but not including, 1"),
    ("quickstart", {"val_batch_size": 1.5}, "val_batch_size: expected a whole number, got 1.5"),
    ("quickstart", {"dataset": "Mine"}, "dataset: 'Mine'; valid are CacheDataset, PersistentDataset, Dataset"),
    ("quickstart", {"dataloader": ["Mine"]}, "dataloader: 'Mine'; valid are ThreadDataLoader, DataLoader"),
    ("quickstart", {"tracking": "x"}, "tracking: 'x'; valid are mlflow, None"),
    ("quickstart", {"gate_unjudged": "x"}, "gate_unjudged: 'x'; valid are "),
    ("quickstart", {"multi_gpu": "x"}, "multi_gpu: expected true or false, got 'x'"),
    ("quickstart", {"resume": "x"}, "resume: expected true or false, got 'x'"),
    ("quickstart", {"device": "cuda:9"}, "device: 'cuda:9'; valid are "),
    ("quickstart", {"name": "../x"}, "name: expected up to 64 letters, digits, dashes and underscores"),
    ("quickstart", {"tracking_uri": "http://x"}, "params: 'tracking_uri' cannot be set"),
)


def test_errors_are_sentences_to_act_on(server, studies, slicer, tmp_path):
    for model, image, params, sentence in INFER_ERRORS:
        with pytest.raises(MONAILabelClientException) as error:
            slicer.client().infer(model or "quickstart", image or "phantom_003", params)
        assert sentence in shown(error.value), params
    for model, params, sentence in TRAIN_ERRORS:
        with pytest.raises(MONAILabelClientException) as error:
            slicer.client().train_start(model, params)
        assert sentence in shown(error.value), params
    with pytest.raises(MONAILabelClientException) as error:
        slicer.client().next_sample("best", {})
    assert "unknown strategy 'best'; valid are " in shown(error.value)
    scored = server.call("POST", "/scoring/best", json={})
    assert scored.status_code == 404 and "unknown scoring method 'best'; valid are " in scored.json()["detail"]
    (tmp_path / "text.nii.gz").write_bytes(b"no label")
    small = write_nifti(tmp_path / "small.nii.gz", np.ones((4, 4, 4), np.uint8))
    for file, sentence in ((tmp_path / "text.nii.gz", "not a NIfTI file"), (small, "not on the grid of its image")):
        with pytest.raises(MONAILabelClientException) as error:
            slicer.client().save_label("phantom_003", str(file), params={"label_info": []})
        assert sentence in shown(error.value)
        assert "the file is kept as labels/rejected/phantom_003/" in shown(error.value)
    with pytest.raises(MONAILabelClientException) as error:
        slicer.client().save_label("nobody", str(small), params={})
    assert "unknown image 'nobody'" in shown(error.value)


def test_what_the_table_sends_is_understood(slicer):
    slicer.next_sample()
    result = slicer.run("quickstart", overlap="0.25", tta=True, label_subset="liver, spleen", largest_component=True)
    assert set(np.flatnonzero(list(result["voxels"].values()))) <= {0, 1}
    assert not any(slicer.segments[name].any() for name in ("aorta", "spine"))


def test_a_second_training_and_stop(slicer):
    started = slicer.train("quickstart", max_epochs="500", tracking="None")
    assert {"id", "status", "start_ts"} <= set(started)
    with pytest.raises(MONAILabelClientException) as error:
        slicer.train("quickstart")
    assert shown(error.value) == "training is already running; wait until it ends, or stop it first"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and slicer.watch()["status"] != "RUNNING":
        time.sleep(0.5)
    assert slicer.client().train_status(True) is True
    slicer.stop()
    while time.monotonic() < deadline and slicer.client().train_status(True):
        time.sleep(0.5)
    assert slicer.watch()["status"] == "STOPPED"
    assert slicer.stop() is None


def _volume(path: Path, added: int) -> tuple[np.ndarray, np.ndarray]:
    image = read_nifti(path)
    return np.asarray(image.dataobj) + np.int16(added), image.affine


# The whole loop; over TLS and on an archive it is in test_deployment.py ---------------------------------------------


@pytest.mark.slow
def test_loop_on_a_folder(real_data, tmp_path):
    """Real CT, as a user on the server's own machine: files are opened where they are."""
    folder, studies = real_data / "abdomen_ct", tmp_path / "studies"
    add_case(studies, folder / "ts-example_ct.nii.gz", "first")
    add_case(studies, folder / "ts-s0009_ct.nii.gz", "second")
    truth = np.asarray(read_nifti(folder / "ts-example_label-amos15.nii.gz").dataobj)
    conf = {"models": "amos22-ct", "model.text": "scratch", **SMALL}
    with Server(studies, tmp_path / "models", conf) as server:
        slicer = Slicer(server.url, tmp_path / "slicer", shared=True)
        loop(slicer, "amos22-ct", lambda _: truth, max_epochs="3", val_split="0")
    assert np.array_equal(np.asarray(read_nifti(studies / "labels" / "final" / "first.nii.gz").dataobj), truth)
