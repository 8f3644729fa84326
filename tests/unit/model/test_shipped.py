"""The model that the quickstart starts with: when it is used, that it fits, and what its first mask is worth."""

import json
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from lib.files import sha256
from lib.model import checkpoints, shipped
from lib.model.shipped import start_from_shipped
from lib.model.versions import Versions
from lib.tasks import load_task
from lib.volumes import metrics
from lib.volumes.phantoms.studies import write_studies
from support.helpers import checkpoint, tiny_task
from support.server import Server

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


def test_the_first_mask_of_the_quickstart_shows_organs(tmp_path):
    """As a user gets it: a fresh server, the quickstart's own example without a label, and then a round from there."""
    studies, task = tmp_path / "studies", load_task("quickstart")
    write_studies(studies, cases=5, labelled=5)
    with Server(studies, tmp_path / "models", {}) as server:
        assert server.client.info()["models"]["quickstart"]["version"] == 1
        started = time.monotonic()
        mask, result = server.client.infer("quickstart", "phantom_004", {})
        print(f"First mask after {time.monotonic() - started:.1f} s")
        left, right = (task.concepts.classes[name].sentences for name in ("left kidney", "right kidney"))
        words = {"left kidney": right, "right kidney": left}
        exchanged, _ = server.client.infer("quickstart", "phantom_004", {"concepts": json.dumps(words)})
    assert result["model_version"] == 1
    assert result["warnings"] == []
    reference = studies / "labels" / "final" / "phantom_004.nii.gz"
    rows = metrics.evaluate_case(task, Path(mask), reference, "phantom_004")
    dice = {row.name: round(row.dice, 3) for row in rows}
    assert min(dice.values()) >= 0.5 and np.mean(list(dice.values())) >= 0.7, dice
    before, after = (np.asarray(nib.load(file).dataobj) for file in (mask, exchanged))
    values = task.label_values
    for one, other in (("left kidney", "right kidney"), ("right kidney", "left kidney")):
        a, b = before == values[one], after == values[other]
        assert 2 * (a & b).sum() / (a.sum() + b.sum()) > 0.95, "a class is what its sentences say"
