"""The contract with MONAI Label, uvicorn and dicomweb-client, as they behave: what they do with what we give them, on
which lib/upstream.py relies. What stands in their code is in test_upstream_code.py.
"""

from __future__ import annotations

import asyncio
import json
import logging
import signal
from collections.abc import Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import monailabel
import pytest
import requests
from dicomweb_client import DICOMwebClient
from fastapi import FastAPI
from fastapi.testclient import TestClient
from monailabel.interfaces.app import MONAILabelApp
from monailabel.tasks.train.basic_train import Context
from monailabel.utils.async_tasks import task as async_task
from monailabel.utils.async_tasks import utils as async_utils
from monailabel.utils.others.class_utils import get_class_of_subclass
from requests.adapters import HTTPAdapter

from lib import upstream
from lib.app.bipvl import BiPVLApp


def test_the_app_is_found_by_its_name():
    main = SimpleNamespace(BiPVLApp=BiPVLApp, cli=print)
    assert get_class_of_subclass(main, "MONAILabelApp") is BiPVLApp


def test_within_dicom_store_the_app_builds_our_store():
    given: dict[str, Any] = {}

    def make(**more: Any) -> str:
        given.update(more)
        return "ours"

    app = SimpleNamespace(studies="http://127.0.0.1:1/dicom-web", _download_dcmqi_tools=lambda: None)
    before = upstream.app_module.DICOMWebDatastore
    with upstream.dicom_store(make):
        assert MONAILabelApp._init_dicomweb_datastore(app) == "ours"
    assert isinstance(given.pop("client"), DICOMwebClient)
    assert set(given) == {"search_filter", "cache_path", "fetch_by_frame", "convert_to_nifti"}
    assert upstream.app_module.DICOMWebDatastore is before


def test_scoring_is_taken_over_once():
    app = SimpleNamespace(_auto_update_scoring=True)
    assert [upstream.take_over_scoring(app), upstream.take_over_scoring(app)] == [True, False]


def test_the_stock_application_is_where_we_look_for_it(monkeypatch):
    source = (Path(monailabel.__file__).parent / "app.py").read_text()
    assert "\napp = FastAPI(" in source
    assert source.index("instance.on_init_complete()") < source.index("    yield"), "before the first request"
    monkeypatch.setitem(upstream.sys.modules, "monailabel.app", SimpleNamespace(app="something else"))
    with pytest.raises(RuntimeError, match="not built like 0.8.5's"):
        upstream.stock_application()


def test_what_replaces_the_application_at_its_start_answers():
    @asynccontextmanager
    async def lifespan(app: FastAPI):
        assert app.middleware_stack is not None, "built before the lifespan begins"
        upstream.replace_application(app, ours)
        yield

    async def ours(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 418, "headers": []})
        await send({"type": "http.response.body", "body": b"ours"})

    stock = FastAPI(lifespan=lifespan)
    stock.get("/")(lambda: "theirs")
    with TestClient(stock) as client:
        assert (client.get("/").status_code, client.get("/docs").text) == (418, "ours")


def test_a_call_at_shutdown_comes_after_the_servers_own(monkeypatch):
    done: list[str] = []

    class Lifespan:
        async def shutdown(self) -> None:
            done.append("server")

    class Server:
        lifespan = Lifespan()

        def handle_exit(self, *_: Any) -> None: ...

    server = Server()
    monkeypatch.setattr(signal, "getsignal", lambda _: server.handle_exit)
    upstream.at_shutdown(lambda: done.append("ours"))
    asyncio.run(server.lifespan.shutdown())
    assert done == ["server", "ours"]
    monkeypatch.setattr(signal, "getsignal", lambda _: signal.SIG_DFL)
    upstream.at_shutdown(lambda: done.append("never"))  # another server: nothing to hold on to
    assert done == ["server", "ours"]


def test_handlers_of_loggers_that_pass_nothing_on_are_found():
    log = logging.getLogger("uvicorn.access")
    handler = logging.NullHandler()
    log.addHandler(handler)
    try:
        assert handler in upstream.log_handlers()
    finally:
        log.removeHandler(handler)


# Tasks --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def table(monkeypatch) -> Iterator[list[dict[str, Any]]]:
    """MONAI Label's table of tasks of one method; nothing is started."""
    found: list[dict[str, Any]] = []
    monkeypatch.setitem(async_utils.background_tasks, "some", found)

    def run(request: Any, method: str) -> dict[str, Any]:
        found.append({"status": "SUBMITTED", "request": request, "start_ts": "2026-01-01 10:00:00"})
        return found[-1]

    monkeypatch.setattr(async_task, "run_background_task", run)
    monkeypatch.setattr(async_task, "app_instance", lambda: SimpleNamespace(info=dict, bundle_path=lambda _: None))
    yield found


def test_one_task_of_a_method_unless_it_may_wait(table):
    first = upstream.start_task("some", {"model": "a"}, queue=False)
    assert first is not None and first["request"] == {"model": "a"} and upstream.is_running(first)
    assert upstream.start_task("some", {}, queue=False) is None
    assert upstream.start_task("some", {}, queue=True) is table[1]
    assert upstream.task_status("some", only_running=False) == (table[1], None)
    assert upstream.task_status("some", only_running=True)[0] is None, "no process"
    for task in table:
        task["status"] = "DONE"
    assert upstream.start_task("some", {}, queue=False) is table[2]
    assert upstream.started(table[0]) % 60 == 0


def test_stopping_what_just_ended_is_no_error(table):
    table.append({"id": "1", "status": "RUNNING"})
    async_utils.background_processes["some"] = {"1": SimpleNamespace(pid=2**22 + 1)}  # above the largest process id
    try:
        assert upstream.stop_task("some") is None
    finally:
        del async_utils.background_processes["some"]
    assert upstream.stop_task("some") is None


# Models and rounds --------------------------------------------------------------------------------------------------


def test_an_inference_calls_our_steps_in_this_order():
    steps: list[str] = []

    class Task(upstream.InferTask):
        def pre_transforms(self, data: Any = None) -> list:
            assert data["image_path"] == data["image"] == "case.nii.gz" and data["overlap"] == 0.5
            data["options"].append("a copy")
            return [lambda d: {**d, "loaded": steps.append("load")}]

        def run_inferer(self, data: Any, convert_to_batch: bool = True, device: str = "cuda") -> Any:
            steps.append(f"infer on {device}")
            return data

        def inverse_transforms(self, data: Any = None) -> None:
            return None

        def post_transforms(self, data: Any = None) -> list:
            return [lambda d: {**d, "restored": steps.append("restore")}]

        def writer(self, data: Any, extension: Any = None, dtype: Any = None) -> Any:
            assert {"loaded", "restored"} <= set(data)
            steps.append("write")
            return "mask.nii.gz", {}

    task = Task(None, None, upstream.InferType.SEGMENTATION, {"liver": 1}, 3, "", config={"overlap": 0.5})
    request = {"image": "case.nii.gz", "device": "cpu", "options": []}
    file, result = task(request)
    assert steps == ["load", "infer on cpu", "restore", "write"]
    assert request["options"] == [], "requests are copied"
    assert file == "mask.nii.gz" and result["label_names"] == {"liver": 1} and "total" in result["latencies"]
    assert set(task.defaults) == {"overlap", "device"}


def test_a_round_calls_our_steps_in_this_order(tmp_path):
    steps: list[str] = []

    class Net:
        def to(self, _: Any) -> Net:
            return self

    class Trainer:
        state = SimpleNamespace(
            epoch=1, max_epochs=1, best_metric=-1, best_metric_epoch=-1, metrics={}, key_metric_name=None
        )

        def run(self) -> None:
            steps.append("run")

        def get_stats(self) -> dict[str, Any]:
            return {}

    class Task(upstream.TrainTask):
        def pre_process(self, request: Any, datastore: Any) -> list:
            steps.append(f"pre_process {request['max_epochs']}")
            return [{"id": "a"}]

        def partition_datalist(self, context: Context, shuffle: bool = False) -> tuple[list, list]:
            steps.append("partition_datalist")
            assert context.request["run_id"] == context.run_id and context.datalist == [{"id": "a"}]
            return context.datalist, []

        def network(self, context: Context) -> Net:
            steps.append("network")
            return Net()

        def optimizer(self, context: Context) -> str:
            steps.append("optimizer")
            return "optimizer"

        def evaluator(self, context: Context) -> None:
            steps.append("evaluator")

        def trainer(self, context: Context) -> Trainer:
            steps.append("trainer")
            assert context.evaluator is None and context.optimizer == "optimizer"
            return Trainer()

        def finalize(self, context: Context) -> None:
            steps.append("finalize")
            Path(context.output_dir, "here").touch()
            self.stats_file.write_text(json.dumps({"epoch": 7}))

        def cleanup(self, request: Any) -> None:
            steps.append("cleanup")

        loss_function = train_pre_transforms = train_post_transforms = val_inferer = network

    task = Task(str(tmp_path), "", config={"name": "run", "max_epochs": 3}, tracking="None")
    task({"device": "cpu", "multi_gpu": False, "dataset": "Dataset", "dataloader": "DataLoader"}, None)
    expected = ["partition_datalist", "network", "optimizer", "evaluator", "trainer", "finalize", "run", "cleanup"]
    assert steps == ["pre_process 3", *expected]
    assert (tmp_path / "run" / "here").exists(), "the folder of a run"
    assert task.stats() == {"epoch": 7} and task.defaults["max_epochs"] == 3


# The archive's client -----------------------------------------------------------------------------------------------


def test_the_archives_client_gives_up_in_time_and_counts(monkeypatch):
    sent: list[Any] = []

    def send(self: Any, request: Any, *_: Any, **more: Any) -> requests.Response:
        sent.append((request.headers["Connection"], more["timeout"]))
        answer = requests.Response()
        answer.status_code, answer._content = 503, b""
        return answer

    waited: list[float] = []
    client = DICOMwebClient(url="http://127.0.0.1:1/dicom-web")
    monkeypatch.setattr(HTTPAdapter, "send", send)
    upstream.limit_waiting(client, 5, 30, waited.append)
    with pytest.raises(requests.HTTPError):
        client.search_for_series(search_filters={"Modality": "CT"}, offset=0)
    assert sent == [("close", (5, 30))], "not tried again, and on a connection of its own"
    assert len(waited) == 1 and waited[0] >= 0
    assert client.base_url == "http://127.0.0.1:1/dicom-web"
