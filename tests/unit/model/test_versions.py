"""Published versions: self-contained checkpoints, atomic publishing, clear refusals."""

import concurrent.futures
import json
import os
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from lib.infers import BiPVLInfer
from lib.model import versions
from lib.model.nets import build_model
from lib.model.versions import CheckpointError, DamagedCheckpoint, Versions
from support import ROOT
from support.helpers import checkpoint, tiny_task, write_nifti

PATCH = (64, 32, 32)


@pytest.fixture(scope="module")
def task():
    return tiny_task(patch=PATCH)


@pytest.fixture
def store(tmp_path):
    return Versions(tmp_path / "model" / "tiny", keep=3)


def test_checkpoint_rebuilds_the_same_model_without_any_file(task, store):
    saved = checkpoint(task)
    number = store.publish(saved)
    model, restored = versions.restore_model(versions.load(store.path(number)))
    assert restored == task
    assert not any(module.training for module in model.modules()), "ready to predict"
    state = model.state_dict()
    assert state.keys() == saved["model"].keys()
    assert all(torch.equal(state[k], saved["model"][k]) for k in state)
    image = torch.randn(1, 1, *PATCH)
    torch.manual_seed(0)
    original = build_model(task).eval()
    with torch.no_grad():
        assert torch.equal(model.eval()(image).logits, original(image).logits)


def test_versions_count_up_and_the_newest_is_served(task, store):
    assert store.served is None
    assert store.resolve("served") is None
    numbers = [store.publish(checkpoint(task, seed)) for seed in range(2)]
    assert numbers == [1, 2]
    assert store.served == 2
    manifest = versions.load(store.path(2))["manifest"]
    assert (manifest["version"], manifest["parent"], manifest["task"]) == (2, 1, "tiny")
    assert store.resolve("v1") == store.resolve("1") == store.resolve(1) == 1
    with pytest.raises(CheckpointError, match="model version '9': valid are 'served' and 1, 2"):
        store.resolve("9")


def test_old_versions_are_removed_but_never_the_served_one_and_its_parent(task, store):
    first = checkpoint(task)
    for _ in range(2):
        store.publish(first)
    for _ in range(5):
        store.publish(first, serve=False)
    assert store.numbers() == [1, 2, 5, 6, 7], "2 is served, 1 its parent"
    assert sorted(p.name for p in store.folder.glob("v*.json")) == [f"v000{n}.json" for n in (1, 2, 5, 6, 7)]
    store.serve(7)
    for _ in range(3):
        store.publish(first)
    assert store.numbers() == [8, 9, 10]


def test_a_version_that_is_gone_cannot_be_served(task, store):
    first = checkpoint(task)
    for _ in range(5):
        store.publish(first)
    assert store.numbers() == [3, 4, 5]
    store.serve(3)
    assert store.served == 3
    with pytest.raises(CheckpointError, match="valid are 3, 4, 5"):
        store.serve(1)


def test_a_checkpoint_of_another_task_is_refused_by_name():
    task = tiny_task(patch=PATCH, model={"head": "fixed"})  # there a class is its number
    other = checkpoint(task)
    labels = other["task"]["labels"]
    name = next(iter(labels))
    for change, words in (
        ({"labels": {**labels, name: {**labels[name], "value": 9}}}, "label values"),
        ({"name": "another"}, "task 'another'"),
        ({"model": {**other["task"]["model"], "vision": "unet"}}, "vision backbone 'unet'"),
    ):
        with pytest.raises(CheckpointError, match=f"a checkpoint of another task: .*{words}"):
            versions.check_same_task({**other, "task": {**other["task"], **change}}, task, "x.pt")
    versions.check_same_task(other, task)


@pytest.mark.parametrize("damage", ["empty", "cut", "text", "foreign", "pickle"])
def test_damaged_checkpoints_are_refused(task, store, damage, tmp_path):
    number = store.publish(checkpoint(task))
    path = store.path(number)
    whole = path.read_bytes()
    if damage == "empty":
        path.write_bytes(b"")
    elif damage == "cut":
        path.write_bytes(whole[: len(whole) // 2])
    elif damage == "text":
        path.write_text("not a checkpoint")
    elif damage == "foreign":
        torch.save({"state_dict": {}}, path)
    else:  # arbitrary objects are not unpickled
        torch.save({"format": 1, "task": Exploit(tmp_path / "owned")}, path)
    with pytest.raises(CheckpointError, match=str(path)):
        versions.load(path)
    assert not (tmp_path / "owned").exists()


class Exploit:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_kill_during_publish_leaves_a_whole_served_model(task, tmp_path):
    """kill -9 while versions are published in a loop: what is served can always be loaded."""
    folder = tmp_path / "tiny"
    Versions(folder).publish(checkpoint(task))
    loop = textwrap.dedent(
        f"""
        import sys
        sys.path[:0] = [{str(ROOT / "apps" / "bipvl")!r}]
        from pathlib import Path
        from lib.model import versions
        store = versions.Versions(Path({str(folder)!r}), keep=2)
        saved = versions.load(store.path(1))
        print("ready", flush=True)
        while True:
            store.publish(saved)
        """
    )
    for moment in (0.05, 0.4):
        process = subprocess.Popen([sys.executable, "-c", loop], stdout=subprocess.PIPE, text=True)
        assert process.stdout.readline() == "ready\n"
        time.sleep(moment)
        process.kill()
        process.wait()
        store = Versions(folder)
        model, _ = versions.restore_model(versions.load(store.path(store.served)))
        assert model.text.sentences.classes == 3
        if not store.path(1).exists():
            (folder / "v0001.pt").write_bytes(store.path(store.served).read_bytes())


def test_served_pointer_that_cannot_be_read_is_named(store):
    store.folder.mkdir(parents=True)
    (store.folder / "served.json").write_text(json.dumps({"wrong": 1}))
    with pytest.raises(CheckpointError, match=r"served\.json: not readable"):
        _ = store.served


def test_going_back_rewrites_nothing_and_is_noted(task, store):
    for seed in range(2):
        store.publish(checkpoint(task, seed), why="round")
    before = {p.name: p.read_bytes() for p in store.folder.glob("v*")}
    store.serve(1, why="the second one misses lesions")
    assert store.served == 1
    store.serve(2)
    assert {p.name: p.read_bytes() for p in store.folder.glob("v*")} == before
    history = [json.loads(line) for line in (store.folder / "history.jsonl").read_text().splitlines()]
    assert [(line["from"], line["to"]) for line in history] == [(None, 1), (1, 2), (2, 1), (1, 2)]
    assert history[2]["why"] == "the second one misses lesions"


def test_a_kept_version_is_not_served(task, store):
    store.publish(checkpoint(task))
    assert store.publish(checkpoint(task), serve=False) == 2
    assert store.served == 1
    assert [(m["version"], m["served"], m["status"]) for m in store.manifests()] == [
        (1, True, "served at publish"),
        (2, False, "kept"),
    ]


@pytest.mark.parametrize("damage", [None, "{", "[]", "{}"])
def test_a_lost_manifest_is_rebuilt_from_the_checkpoint(task, store, damage):
    store.publish(checkpoint(task, trained_on=["a"]))
    sidecar = store.folder / "v0001.json"
    expected = json.loads(sidecar.read_text())
    sidecar.unlink() if damage is None else sidecar.write_text(damage)
    assert store.manifests() == [{**expected, "served": True, "report": None}]
    assert json.loads(sidecar.read_text()) == expected
    assert store.seen(1) == ["a"]


def test_a_number_is_never_given_twice(task, store):
    for _ in range(2):
        store.publish(checkpoint(task))
    store.path(2).unlink()
    assert store.publish(checkpoint(task)) == 3


def test_a_changed_bit_is_noticed(task, store):
    """PyTorch does not check its archives: only the hash tells."""
    for seed in range(2):
        store.publish(checkpoint(task, seed))
    path = store.path(2)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(DamagedCheckpoint, match="its sha256 is not that of the published file"):
        store.read(2)
    number, _ = store.read_served()
    assert number == 1
    store.serve(1)
    with pytest.raises(DamagedCheckpoint):
        store.serve(2)
    assert store.served == 1


def test_two_publishers_never_take_the_same_number(task, tmp_path):
    saved, folder = checkpoint(task), tmp_path / "tiny"
    with concurrent.futures.ThreadPoolExecutor(4) as pool:  # each with a lock of its own, as in several processes
        numbers = list(pool.map(lambda _: Versions(folder, keep=20).publish(saved), range(8)))
    assert sorted(numbers) == list(range(1, 9))
    assert [m["version"] for m in Versions(folder).manifests()] == list(range(1, 9))


def test_an_uploaded_checkpoint_becomes_a_version(task, store, tmp_path):
    store.publish(checkpoint(task))
    file = tmp_path / "upload.pt"
    versions.save(checkpoint(task, seed=1, seen=["x"]), file)
    assert store.adopt(file, task) == 2
    manifest = store.manifest(2)
    assert (store.served, manifest["origin"], manifest["parent"], store.seen(2)) == (2, "upload", None, ["x"])


@pytest.mark.parametrize("fault", ["other task", "missing weights", "NaN", "no configuration", "manifest"])
def test_an_upload_that_cannot_be_used_changes_nothing(task, store, tmp_path, fault):
    store.publish(checkpoint(task))
    upload = checkpoint(task)
    if fault == "other task":
        upload["task"] = {**upload["task"], "name": "another"}
    elif fault == "missing weights":
        upload["model"].popitem()
    elif fault == "NaN":
        name, weight = upload["model"].popitem()
        upload["model"][name] = weight * torch.nan
    elif fault == "no configuration":
        upload["text"] = {"config": "{", "tokenizer": "{"}
    else:
        upload["manifest"] = {"tensor": torch.zeros(1)}
    versions.save(upload, tmp_path / "upload.pt")
    with pytest.raises(CheckpointError):
        store.adopt(tmp_path / "upload.pt", task)
    assert (store.numbers(), store.served) == ([1], 1)


def test_the_text_encoder_may_go_by_another_name(task, tmp_path):
    """A site without network names a local folder: the same configuration and tokenizer are the same encoder."""
    saved = checkpoint(task)
    model, _ = versions.restore_model(saved)
    folder = tmp_path / "bert"
    model.text.bert.save_pretrained(folder)
    tokenizer = Tokenizer.from_str(model.text.assets.tokenizer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    named = task.model_copy(update={"model": task.model.model_copy(update={"text": str(folder)})})
    saved["task"] = {**saved["task"], "model": {**saved["task"]["model"], "text": "hub/name"}}
    versions.check_same_task(saved, named)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 5}))
    with pytest.raises(CheckpointError, match="text encoder 'hub/name'.*num_hidden_layers 4, not 5"):
        versions.check_same_task(saved, named)
    missing = task.model_copy(update={"model": task.model.model_copy(update={"text": str(tmp_path / "none")})})
    with pytest.raises(CheckpointError, match="cannot be compared"):
        versions.check_same_task(saved, missing)


# What a server answers while files are lost under it


@pytest.fixture
def served(task, tmp_path):
    """An engine with two versions, and a function that runs a request: (version, warnings)."""
    engine = BiPVLInfer(task, tmp_path / "m")
    for seed in range(2):
        engine.versions.publish(checkpoint(task, seed))
    volume = np.random.default_rng(0).integers(-50, 200, (20, 18, 9)).astype(np.int16)
    image = write_nifti(tmp_path / "image.nii.gz", volume)

    def segment(**options):
        _, result = engine({"image": str(image), "device": "cpu", "logging": "WARNING", **options})
        return result["model_version"], result["warnings"]

    return engine, segment


@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_damaged_served_version_is_replaced_with_a_warning(served, damage):
    engine, segment = served
    path = engine.versions.path(2)
    path.unlink() if damage == "gone" else path.write_bytes(path.read_bytes()[:1000])
    assert segment() == (1, ["version 2 is missing or damaged: version 1 answers instead"])
    if damage == "cut":
        with pytest.raises(CheckpointError, match="damaged"):
            segment(model_version="2")
    path = engine.versions.path(1)
    path.write_bytes(b"")
    engine.clear_cache()
    with pytest.raises(CheckpointError, match="no published version of 'tiny' can be read"):
        segment()


def test_the_copy_in_memory_answers_while_the_folder_is_gone(served, tmp_path):
    engine, segment = served
    assert segment() == (2, [])
    engine.versions.folder.rename(tmp_path / "elsewhere")
    version, (warning,) = segment()
    assert version == 2
    assert "memory" in warning
    assert engine.info()["version"] == 0
    engine.clear_cache()
    with pytest.raises(CheckpointError, match="no published version of 'tiny' can be read"):
        segment()  # never fresh weights once a version has answered
    (tmp_path / "elsewhere").rename(engine.versions.folder)
    assert segment() == (2, [])


def test_a_damaged_pointer_does_not_stop_the_server(served):
    engine, segment = served
    (engine.versions.folder / "served.json").write_text("{")
    assert segment()[0] == 2
    assert engine.info()["version"] == 0


def test_a_new_file_under_an_old_number_is_read_again(served, task):
    """The folder was replaced by another one: the model in memory is not that version any more."""
    engine, segment = served
    segment()
    first = engine.models.get(None, "cpu").model
    for path in engine.versions.folder.iterdir():
        path.unlink()
    for seed in (5, 6):
        engine.versions.publish(checkpoint(task, seed))
    segment()
    assert not torch.equal(engine.models.get(None, "cpu").model.project_text.weight, first.project_text.weight)


def test_changed_sentences_are_a_warning_in_the_result(served, task, tmp_path):
    engine, segment = served
    name = task.classes[0]
    changed = task.with_concepts({name: {"shape": "Quite another shape."}})
    engine.task = changed
    assert segment() == (2, ["version 2 reads the sentences it was trained with; the next round reads newer ones"])


def test_threads_share_one_model(served, monkeypatch):
    engine, segment = served
    loads, read = [], engine.versions.read
    monkeypatch.setattr(engine.versions, "read", lambda version: loads.append(version) or read(version))
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: segment(), range(8)))
    assert answers == [(2, [])] * 8
    assert loads == [2], "loaded once"
