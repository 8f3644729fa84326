"""The app in this process, without a server: what its hooks and routes do when something goes wrong."""

import tempfile
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from monailabel.utils.async_tasks.utils import background_tasks

from lib.app.bipvl import BiPVLApp
from lib.app.web.access.options import WebOptions
from lib.app.web.answers import Places, handle_errors
from lib.app.web.common import Services
from lib.app.web.routes.infer import infer_routes
from lib.app.web.routes.models import task_routes
from lib.infers import BatchInfer
from lib.model.checkpoints import DamagedCheckpoint
from lib.volumes import masks
from support import ROOT
from support.helpers import checkpoint, write_nifti
from support.training import SMALL

MODEL = "quickstart"
ON_CPU = {"model": MODEL, "device": "cpu", "logging": "WARNING"}


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    folder = tmp_path_factory.mktemp("app")
    (folder / "studies").mkdir()
    for number in range(3):
        voxels = np.random.default_rng(number).integers(-100, 200, (12, 10, 8), np.int16)
        write_nifti(folder / "studies" / f"case{number}.nii.gz", voxels, np.diag([8.0, 8, 8, 1]))
    conf = {"models": MODEL, "model_dir": str(folder / "models"), "score_cases": "0", **SMALL}
    return BiPVLApp(str(ROOT / "apps" / "bipvl"), str(folder / "studies"), conf)


@pytest.fixture(scope="module")
def client(app):
    api, places = FastAPI(), Places([app.studies, app.model_dir], "/t")
    handle_errors(api, places)
    with ThreadPoolExecutor(1) as pool:
        services = Services(app, WebOptions.read({}, {}, ""), None, None, pool, places)
        for routes in (infer_routes(services), task_routes(services)):
            api.include_router(routes)
        with TestClient(api) as client:
            yield client


@pytest.fixture
def scratch(tmp_path, monkeypatch):
    """The folder of temporary files."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def failing(error, after=0):
    """A function that fails from its call number `after` on; before, it does nothing."""
    calls: list[None] = []

    def fail(*_arguments, **_options):
        calls.append(None)
        if len(calls) > after:
            raise error

    return fail


# Temporary files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "broken", "error"),
    [
        ("save_label", "store", OSError(28, "No space left on device")),
        ("save_label", "store", KeyboardInterrupt()),
        ("keep_map", "store", RuntimeError("the archive's library fails")),
    ],
    ids=["disk full", "stopped", "map"],
)
def test_no_mask_stays_where_it_cannot_be_kept(app, scratch, monkeypatch, name, broken, error):
    monkeypatch.setattr(app.datastore(), name, failing(error))
    with pytest.raises(type(error)):
        app.infer({**ON_CPU, "image": "case0", "save_label": True, "uncertainty_map": True})
    assert list(scratch.iterdir()) == []


@pytest.mark.parametrize(
    ("writer", "after", "extension"),
    [("write_mask", 0, ".nii.gz"), ("write_mask", 1, ".nrrd"), ("write_itk", 0, ".mha")],
    ids=["map", "mask", "MetaImage"],
)
def test_no_file_stays_of_a_writer_that_fails(app, scratch, monkeypatch, writer, after, extension):
    place = masks if writer == "write_mask" else "lib.infers.segmentation"
    fail = failing(RuntimeError("cannot write"), after)
    monkeypatch.setattr(*((place, writer, fail) if place is masks else (f"{place}.{writer}", fail)))
    request = {"image": "case0", "uncertainty_map": True, "result_extension": extension}
    with pytest.raises(RuntimeError, match="cannot write"):
        app.infer({**ON_CPU, **request})
    assert list(scratch.iterdir()) == []


def test_what_is_kept_leaves_the_answers_mask_alone(app, scratch):
    result = app.infer({**ON_CPU, "image": "case0", "save_label": True, "uncertainty_map": True})
    assert [str(p) for p in scratch.iterdir()] == [result["file"]]
    assert app.datastore().get_label_by_image_id("case0", "original")


# A model file that cannot be read -------------------------------------------------------------------------------------


def test_a_model_that_cannot_be_read_is_the_servers_fault(app, client, caplog):
    versions = app.models[MODEL].versions
    versions.publish(checkpoint(app.tasks[MODEL]))
    path, whole = versions.path(1), versions.path(1).read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    place = f"/infer/{MODEL}?image=case0&output=json"
    try:
        for method, address, more in (
            ("POST", place, {"data": {"params": "{}"}}),
            ("POST", place, {"data": {"params": '{"model_version": "1"}'}}),
            ("POST", f"/model/{MODEL}/versions/1/serve", {}),
        ):
            caplog.clear()
            answer = client.request(method, address, **more)
            assert answer.status_code == 500, answer.text
            detail = answer.json()["detail"]
            assert "a model file on the server cannot be used" in detail
            assert str(path.parent) not in detail, "where files lie is not for clients"
            assert str(path) in caplog.text and "damaged" in caplog.text, "it is for the log"
    finally:
        path.write_bytes(whole)


@pytest.mark.parametrize(
    ("method", "place", "more", "status", "reason"),
    [
        ("POST", "/infer/quickstart?image=case0", {"data": {"params": '{"model_version": "9"}'}}, 400, "valid"),
        (
            "PUT",
            "/model/quickstart",
            {"files": {"file": ("mine.pt", b"no checkpoint")}},
            400,
            "damaged, or not a checkpoint",
        ),
        ("POST", "/model/quickstart/versions/9/serve", {}, 404, "no version 9"),
    ],
)
def test_what_a_client_got_wrong_about_models_stays_its_own(client, method, place, more, status, reason):
    answer = client.request(method, place, **more)
    assert answer.status_code == status, answer.text
    assert reason in answer.json()["detail"]


# Batches --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 2])
def test_a_batch_goes_on_after_a_bad_scan(app, client, caplog, monkeypatch, workers):
    bad = Path(app.studies) / "case1b.nii.gz"
    bad.write_bytes(b"not a volume")
    request = {**ON_CPU, "images": "all", "max_workers": workers, "multi_gpu": False}
    try:
        with caplog.at_level("INFO", logger="lib.infers.batch"):
            result = app.batch_infer(request)
    finally:
        bad.unlink()
    assert {image for image, answer in result.items() if answer} == {"case0", "case1", "case2"}
    assert result["case1b"] == {}
    assert all(app.datastore().get_label_by_image_id(f"case{n}", "original") for n in range(3))
    summary, failed = [r.getMessage() for r in caplog.records if r.name == "lib.infers.batch"][-2:]
    assert summary == "3 of 4 image(s) are segmented, 1 failed"
    assert failed.startswith("Failed: case1b: ") and "cannot be read" in failed
    began = datetime.fromtimestamp(app.batch.progress()["started"]).strftime("%Y-%m-%d %H:%M:%S")
    task = {"id": "1", "status": "DONE", "start_ts": began, "request": request, "details": []}
    monkeypatch.setitem(background_tasks, "batch_infer", [task])
    status = client.get("/batch/infer").json()
    assert (status["progress"]["done"], status["progress"]["total"]) == (4, 4)
    assert list(status["progress"]["failed"]) == ["case1b"]
    assert status["outcome"].startswith("3 of 4 images are segmented. Failed: case1b: ")


def test_a_batch_ends_where_no_model_can_be_read(tmp_path):
    asked, batch = [], BatchInfer(tmp_path / "batch.json")

    def infer(request, _datastore):
        asked.append(request["image"])
        raise DamagedCheckpoint("v0001.pt: damaged")

    with pytest.raises(DamagedCheckpoint):
        batch({"images": ["a", "b", "c"], "device": "cpu", "multi_gpu": False, "max_workers": 1}, None, infer)
    assert asked == ["a"]
    assert batch.progress()["error"] == "v0001.pt: damaged" and batch.progress()["failed"] == {}
