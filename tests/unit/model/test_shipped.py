"""The models that come with the app: when they are used, that they fit, and what a first mask is worth."""

from pathlib import Path

import numpy as np
import pytest
import torch

from lib.files import sha256
from lib.infers import BiPVLInfer
from lib.model import checkpoints, shipped
from lib.model.shipped import start_from_shipped
from lib.model.versions import Versions
from lib.tasks import load_task
from lib.volumes import metrics
from support.helpers import checkpoint, read_nifti, tiny_task

MODELS = {"hippocampus-mr": "unseen people", "quickstart": "phantoms"}  # and what they were scored on


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of shipped models with one of a tiny task."""
    folder = tmp_path_factory.mktemp("shipped")
    checkpoints.save(checkpoint(tiny_task(), origin="shipped"), folder / "tiny.pt")
    return folder


@pytest.fixture
def store(tmp_path):
    return Versions(tmp_path / "tiny")


def test_it_becomes_version_1_once(folder, store):
    assert start_from_shipped(tiny_task(), store, folder) == 1
    assert (store.served, store.manifest(1)["origin"]) == (1, "shipped")
    assert "shipped with the app" in (store.folder / "history.jsonl").read_text()
    model, _ = checkpoints.restore_model(store.read(1))
    theirs = checkpoints.load(folder / "tiny.pt")["model"]
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in model.state_dict().items())
    assert start_from_shipped(tiny_task(), store, folder) is None
    assert store.numbers() == [1]


def test_it_never_takes_the_place_of_what_was_published(folder, store):
    store.publish(checkpoint(tiny_task(), seed=1))
    store.path(1).unlink()  # lost: an error that says so is better than another model without a word
    assert start_from_shipped(tiny_task(), store, folder) is None
    assert store.numbers() == []


@pytest.mark.parametrize(
    "changes",
    [{"model": {"feature_size": 24}}, {"spacing": [2.0, 1.0, 1.0]}, {"patch": [64, 64, 32]}, {"channels": ["T1"]}],
)
def test_other_settings_start_with_fresh_weights(folder, store, changes):
    assert start_from_shipped(tiny_task(**changes), store, folder) is None
    assert not store.started


def test_training_and_augmentation_may_differ(folder, store):
    assert start_from_shipped(tiny_task(training={"epochs": 3}, overlap=0.1), store, folder) == 1


def test_a_task_without_one_and_a_damaged_one_start_with_fresh_weights(folder, store, tmp_path, caplog):
    assert start_from_shipped(tiny_task(name="other"), store, folder) is None
    cut = tmp_path / "cut"
    cut.mkdir()
    (cut / "tiny.pt").write_bytes((folder / "tiny.pt").read_bytes()[:1000])
    assert start_from_shipped(tiny_task(), store, cut) is None
    assert "the shipped model cannot be used" in caplog.text
    assert not store.started


def test_a_folder_that_cannot_be_written_does_not_stop_the_start(folder, tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    assert start_from_shipped(tiny_task(), Versions(tmp_path / "file" / "tiny"), folder) is None
    assert "the shipped model cannot be used" in caplog.text


# The shipped files themselves -----------------------------------------------------------------------------------------


def test_every_shipped_model_is_tested():
    assert {path.stem for path in shipped.FOLDER.glob("*.pt")} == set(MODELS)


@pytest.mark.parametrize("name", MODELS)
def test_a_shipped_model_fits_its_task_and_its_card(name, tmp_path):
    file, store = shipped.FOLDER / f"{name}.pt", Versions(tmp_path / name)
    assert file.stat().st_size <= 25e6
    assert start_from_shipped(load_task(name), store) == 1
    manifest = store.manifest(1)
    assert manifest["concepts"] == load_task(name).concepts.hash, "it was trained with these sentences"
    card = file.with_suffix(".md").read_text()
    for label, dice in manifest["metrics"]["held_out"][MODELS[name]].items():
        assert f"| {label} | {dice:.2f} |" in card, "the card says what was measured"
    assert sha256(file)[:12] in card


def test_no_unlabelled_example_was_seen():
    seen = {name: set(checkpoints.load(shipped.FOLDER / f"{name}.pt")["manifest"]["seen"]) for name in MODELS}
    assert not any(case.startswith("phantom") for case in seen["quickstart"]), "ids of its cases are not a user's"
    folder = shipped.FOLDER / "hippocampus-mr"
    images, labels = ({path.name.split(".")[0] for path in (folder / k).iterdir()} for k in ("images", "labels"))
    assert labels <= seen["hippocampus-mr"] and not (images - labels) & seen["hippocampus-mr"]


@pytest.fixture(scope="module")
def hippocampus(tmp_path_factory):
    """Masks of two unlabelled examples, as the first version draws them: by the file's name."""
    task = load_task("hippocampus-mr")
    engine = BiPVLInfer(task, tmp_path_factory.mktemp("models") / task.name)
    assert start_from_shipped(task, engine.versions) == 1
    folder = shipped.FOLDER / task.name
    labelled = {path.name for path in (folder / "labels").iterdir()}
    masks = {}
    for image in [path for path in sorted((folder / "images").iterdir()) if path.name not in labelled][:2]:
        mask, result = engine({"image": str(image), "device": "cpu"})
        assert (result["model_version"], result["warnings"]) == (1, [])
        masks[image.name] = Path(mask)
    yield masks
    for path in masks.values():
        path.unlink()


def test_the_first_masks_of_the_quickstart_show_both_parts(hippocampus):
    for mask in hippocampus.values():
        voxels = np.bincount(np.asarray(read_nifti(mask).dataobj).ravel().astype(int), minlength=3)
        assert len(voxels) == 3 and 700 < voxels[1] < 3500 and 700 < voxels[2] < 3500, "mm³, as in people"


def test_the_first_masks_of_the_quickstart_are_those_of_an_expert(hippocampus, real_data):
    labels = real_data / "hippocampus_mr_msd" / "labels"
    if not labels.is_dir():
        pytest.skip(f"{labels} is not there")
    for name, mask in hippocampus.items():
        rows = metrics.evaluate_case(load_task("hippocampus-mr"), mask, labels / name, name)
        assert min(row.dice for row in rows) >= 0.8, rows
