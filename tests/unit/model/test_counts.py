"""What is computed, read and kept, counted exactly. No test measures time: `benchmarks/` does."""

from __future__ import annotations

import contextlib
import math
import os
import sys
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from monailabel.interfaces.datastore import Datastore

from lib.infers import BiPVLInfer
from lib.model.nets import build_model
from lib.model.predict import predict
from lib.trainers import BiPVLTrain
from lib.trainers.roundtask import RoundTask
from lib.volumes.reading import read_volume
from support.helpers import read_nifti, tiny_task, write_nifti

PATCH = (48, 48, 48)
_WATCHING: list[Counter[str]] = []


def _audit(event: str, arguments: tuple) -> None:
    if event == "open" and _WATCHING and isinstance(arguments[0], str | os.PathLike | bytes):
        _WATCHING[-1][os.fsdecode(arguments[0])] += 1


sys.addaudithook(_audit)  # Python itself reports every file it opens; a hook cannot be removed again


@contextlib.contextmanager
def opened_files() -> Iterator[Counter[str]]:
    """Counts how often each file is opened by this process, whatever library does it."""
    _WATCHING.append(Counter())
    try:
        yield _WATCHING[-1]
    finally:
        _WATCHING.pop()


@pytest.fixture(scope="module")
def task():
    return tiny_task(patch=PATCH, model={"vision": "unet", "feature_size": 4})


@pytest.fixture
def model(task):
    torch.manual_seed(0)
    return build_model(task).eval()


def test_the_counter_sees_what_readers_open(tmp_path):
    path = write_nifti(tmp_path / "a.nii.gz", np.ones((4, 4, 4), np.int16))
    with opened_files() as files:
        np.asarray(read_nifti(path).dataobj)
        path.read_bytes()
    assert files[str(path)] >= 2


def test_windows_read_no_file_and_tokenise_nothing_and_no_token_passes_twice(task, model, monkeypatch):
    image = torch.rand(1, 72, 48, 48)
    predict(model, image, task)
    assert model.text.token_passes == 1

    def forbidden(*_arguments):
        raise AssertionError("no window may tokenise")

    monkeypatch.setattr(type(model.text), "tokenize", forbidden)
    with opened_files() as files:
        prediction = predict(model, image, task)
    assert prediction.windows == 2
    assert not files
    assert model.text.token_passes == 1, "weights and text are as before: no sentence is read again"


class Slow(OrderedDict):
    """A cache that other threads get at between a look and the next step."""

    def __contains__(self, key):
        found = super().__contains__(key)
        time.sleep(0.001)
        return found


def test_threads_that_ask_at_once_share_one_reading_and_none_fails(model, monkeypatch):
    monkeypatch.setattr("lib.model.nets.text.encoder.CACHED_TEXTS", 1)
    text, threads = model.text, 4
    text._cache = Slow()
    texts = [text.tokenize([["one"]]), text.tokenize([["two", "words"]])]
    expected = [text._read(sentences).rows for sentences in texts]
    start = threading.Barrier(threads)

    @torch.no_grad()
    def ask(wanted: list[int]) -> list[torch.Tensor]:
        start.wait()
        return [text.read(texts[n]).rows for n in wanted]

    with ThreadPoolExecutor(threads) as pool:
        before = text.token_passes
        list(pool.map(ask, [[0]] * threads))
        assert text.token_passes == before + 1
        orders = [[n % 2 for n in range(thread, thread + 20)] for thread in range(threads)]
        for order, rows in zip(orders, pool.map(ask, orders), strict=True):
            assert all(torch.equal(found, expected[n]) for n, found in zip(order, rows, strict=True))


def test_a_request_tokenises_once_and_reads_its_image_once(task, tmp_path, monkeypatch):
    path = write_nifti(tmp_path / "image.nii.gz", np.random.default_rng(0).integers(0, 200, (72, 48, 48), np.int16))
    engine = BiPVLInfer(task, tmp_path / "m")
    engine({"image": str(path), "device": "cpu", "logging": "WARNING"})
    (loaded,) = engine.models._models.values()
    calls, tokenize = [], type(loaded.model.text).tokenize
    monkeypatch.setattr(
        type(loaded.model.text), "tokenize", lambda self, rows: (calls.append(rows), tokenize(self, rows))[1]
    )
    reads: list[str] = []
    monkeypatch.setattr("lib.volumes.transforms.read_volume", lambda p: (reads.append(str(p)), read_volume(p))[1])
    passes = loaded.model.text.token_passes
    with opened_files() as files:
        engine({"image": str(path), "device": "cpu", "logging": "WARNING"})
    assert len(calls) <= 1
    assert loaded.model.text.token_passes == passes
    assert reads == [str(path)]
    assert not [f for f in files if f.endswith((".pt", ".yaml"))], "no model and no task is read again"


@pytest.mark.parametrize("window_batch", [1, 3])
def test_each_window_is_computed_once(task, model, window_batch):
    """Every voxel holds its own number, so a window is known by its first."""
    shape = (100, 60, 48)
    image = torch.arange(math.prod(shape), dtype=torch.float32).reshape(1, *shape) / math.prod(shape)
    seen: list[float] = []
    handle = model.register_forward_pre_hook(lambda _m, i: seen.extend(i[0][:, 0, 0, 0, 0].tolist()))
    prediction = predict(model, image, task, window_batch=window_batch)
    handle.remove()
    assert prediction.windows == len(seen) == 4 * 2 and prediction.skipped == 0
    assert len(set(seen)) == len(seen)


def test_predictions_of_one_seed_are_equal(task):
    image = torch.rand(1, 72, 48, 48, generator=torch.Generator().manual_seed(3))
    results = []
    for _ in range(2):
        torch.manual_seed(5)
        results.append(predict(build_model(task).eval(), image, task).probabilities)
    assert torch.equal(*results)


def test_the_second_epoch_reads_no_volume(task, tmp_path, monkeypatch):
    """With either cache each file is opened before the first step only."""
    cases = []
    for n in range(2):
        rng = np.random.default_rng(n)
        image = write_nifti(tmp_path / f"case{n}.nii.gz", rng.integers(0, 200, PATCH, np.int16))
        label = write_nifti(tmp_path / f"case{n}_label.nii.gz", rng.integers(0, 4, PATCH, np.uint8))
        cases.append({"image": str(image), "label": str(label)})

    class Store(Datastore):
        datalist = staticmethod(lambda: cases)

    Store.__abstractmethods__ = frozenset()
    epochs: list[tuple[int, int]] = []
    step = RoundTask._train_step

    for dataset in ("CacheDataset", "PersistentDataset"):
        epochs.clear()
        with opened_files() as files:
            volumes = lambda files=files: sum(n for f, n in files.items() if f.endswith(".nii.gz"))  # noqa: E731

            def counted(self, engine, batch, volumes=volumes):
                epochs.append((engine.state.epoch, volumes()))
                return step(self, engine, batch)

            monkeypatch.setattr(RoundTask, "_train_step", counted)
            trainer = BiPVLTrain(task, tmp_path / dataset)
            trainer(
                {
                    **{"max_epochs": 3, "dataset": dataset, "val_split": 0.0, "device": "cpu", "tracking": "None"},
                    **{"cross_validate": False, "gate_unjudged": "publish", "train_batch_size": 1},
                },
                Store(),
            )
        first_epoch = max(n for epoch, n in epochs if epoch == 1)
        assert first_epoch >= 4
        assert {n for epoch, n in epochs if epoch > 1} == {first_epoch}, dataset
