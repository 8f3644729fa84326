"""Published versions: self-contained checkpoints, atomic publishing, clear refusals."""

import json
import os
import subprocess
import sys
import textwrap
import time

import pytest
import torch

from conftest import ROOT
from helpers import tiny_task
from lib import versions
from lib.nets import build_model
from lib.versions import CheckpointError, Versions

PATCH = (64, 32, 32)


def checkpoint(task, seed=0, **manifest):
    torch.manual_seed(seed)
    return versions.checkpoint_of(build_model(task), task, {"task": task.name, **manifest})


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


def test_old_versions_are_removed_but_never_the_served_one(task, store):
    first = checkpoint(task)
    for _ in range(5):
        store.publish(first)
    assert store.numbers() == [3, 4, 5]
    store.serve(3)
    assert store.served == 3
    with pytest.raises(CheckpointError, match="valid are 3, 4, 5"):
        store.serve(1)


def test_a_checkpoint_of_another_task_is_refused_by_name(task):
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
        from lib import versions
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
        assert model.classes == 3
        if not store.path(1).exists():
            (folder / "v0001.pt").write_bytes(store.path(store.served).read_bytes())


def test_served_pointer_that_cannot_be_read_is_named(store):
    store.folder.mkdir(parents=True)
    (store.folder / "served.json").write_text(json.dumps({"wrong": 1}))
    with pytest.raises(CheckpointError, match=r"served\.json: not readable"):
        _ = store.served
