"""The model that the quickstart starts with: when it is used, and that it fits."""

import pytest
import torch

from lib.files import sha256
from lib.model import checkpoints, shipped
from lib.model.shipped import start_from_shipped
from lib.model.versions import Versions
from lib.tasks import load_task
from support.helpers import checkpoint, tiny_task

FILE = shipped.FOLDER / "quickstart.pt"


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


# The shipped file itself ----------------------------------------------------------------------------------------------


def test_the_shipped_model_fits_the_quickstart(tmp_path):
    assert FILE.stat().st_size <= 25e6
    store = Versions(tmp_path / "quickstart")
    assert start_from_shipped(load_task("quickstart"), store) == 1
    manifest = store.manifest(1)
    assert not any(case.startswith("phantom") for case in manifest["seen"]), "ids of its cases are not a user's"
    card = FILE.with_name("README.md").read_text()
    for name, dice in manifest["metrics"]["held_out"]["phantoms"].items():
        assert f"| {name} | {dice:.2f} |" in card, "the card says what was measured"
    assert sha256(FILE)[:12] in card
