"""All that this app assumes about MONAI Label, uvicorn and dicomweb-client beyond what they promise, in one place.

Every other module imports them from here, under names of ours. tests/unit/project/test_upstream_code.py holds a table
of the assumptions, each with a test that looks at the installed packages: an upgrade that breaks one fails there and
says what changed. The module imports nothing of ours, so that every package may import it.
"""

from __future__ import annotations

import logging
import signal
import sys
import threading
import time
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import monailabel
import psutil
import requests
from dicomweb_client import DICOMwebClient
from fastapi import FastAPI
from monailabel.config import Settings, settings
from monailabel.interfaces import app as app_module
from monailabel.interfaces.app import MONAILabelApp
from monailabel.interfaces.datastore import Datastore
from monailabel.interfaces.exception import ImageNotFoundException, LabelNotFoundException, MONAILabelException
from monailabel.interfaces.tasks.batch_infer import BatchInferImageType, BatchInferTask
from monailabel.interfaces.tasks.infer_v2 import InferTask as InferInterface
from monailabel.interfaces.tasks.infer_v2 import InferType
from monailabel.interfaces.tasks.scoring import ScoringMethod
from monailabel.interfaces.tasks.strategy import Strategy
from monailabel.interfaces.tasks.train import TrainTask as TrainInterface
from monailabel.tasks.infer.basic_infer import BasicInferTask
from monailabel.tasks.train.basic_train import BasicTrainTask, Context
from monailabel.tasks.train.handler import prepare_stats
from monailabel.transform.writer import write_itk
from monailabel.utils.async_tasks.task import AsyncTask
from monailabel.utils.async_tasks.utils import tasks as tasks_of
from monailabel.utils.others.generic import device_list, file_checksum, md5_digest, name_to_device, strtobool
from requests.adapters import HTTPAdapter

__all__ = [  # of theirs, handed on
    "BatchInferImageType",
    "BatchInferTask",
    "Context",
    "Datastore",
    "device_list",
    "DICOMwebClient",
    "file_checksum",
    "ImageNotFoundException",
    "InferInterface",
    "InferType",
    "LabelNotFoundException",
    "md5_digest",
    "MONAILabelApp",
    "MONAILabelException",
    "name_to_device",
    "prepare_stats",
    "ScoringMethod",
    "Settings",
    "settings",
    "Strategy",
    "strtobool",
    "tasks_of",
    "TrainInterface",
    "write_itk",
]

VERSIONS = {  # what the assumptions were checked with last
    "monailabel": "0.8.5",
    "monai": "1.5.2",
    "uvicorn": "0.54.0",
    "dicomweb-client": "0.60.1",
    "requests": "2.34.2",
}

OHIF = Path(monailabel.__file__).parent / "endpoints" / "static" / "ohif"  # the viewer that MONAI Label brings along
for _noisy in ("dicomweb_client", "retrying"):  # every request, and a traceback of every failed one
    logging.getLogger(_noisy).setLevel(logging.ERROR)


# The app --------------------------------------------------------------------------------------------------------------


def models(app: MONAILabelApp) -> dict[str, Any]:
    """Name to inference task, as `init_infers` gave them."""
    return app._infers


def trainers(app: MONAILabelApp) -> dict[str, Any]:
    """Name to train task; empty if MONAI_LABEL_TASKS_TRAIN is false."""
    return app._trainers


def strategies(app: MONAILabelApp) -> dict[str, Any]:
    """Name to strategy of Next Sample; empty if MONAI_LABEL_TASKS_STRATEGY is false."""
    return app._strategies


def scoring_methods(app: MONAILabelApp) -> dict[str, Any]:
    """Name to scoring method; empty if MONAI_LABEL_TASKS_SCORING is false."""
    return app._scoring_methods


def take_over_scoring(app: MONAILabelApp) -> bool:
    """Keep MONAI Label from starting every scoring method when a round ends, when a case is offered and at the start.

    Returns:
        Whether it would have: MONAI_LABEL_AUTO_UPDATE_SCORING.
    """
    wanted = bool(app._auto_update_scoring)
    app._auto_update_scoring = False
    return wanted


@contextmanager
def dicom_store(make: Callable[..., Datastore]) -> Iterator[None]:
    """Within it, MONAI Label's app connects to an archive and then calls `make` instead of its own store's class.

    Args:
        make: gets client, search_filter, cache_path, fetch_by_frame and convert_to_nifti by name.
    """
    stock = app_module.DICOMWebDatastore
    app_module.DICOMWebDatastore = make
    try:
        yield
    finally:
        app_module.DICOMWebDatastore = stock


# The server -----------------------------------------------------------------------------------------------------------


def stock_application() -> FastAPI:
    """The application that uvicorn calls, in a process of `monailabel start_server`.

    Raises:
        RuntimeError: there is none, or it is not built as expected.
    """
    stock = getattr(sys.modules.get("monailabel.app"), "app", None)
    if not isinstance(stock, FastAPI) or getattr(stock, "middleware_stack", None) is None:
        raise RuntimeError("MONAI Label's server is not built like 0.8.5's: it cannot be guarded, so it stops")
    return stock


def replace_application(stock: FastAPI, ours: Any) -> None:
    """Put an ASGI application in the place of the whole middleware stack, with every stock route behind it.

    The stock routes go as well: should anything build the stock application again, it would answer nothing.
    """
    stock.router.routes.clear()
    stock.middleware_stack = ours


def at_shutdown(call: Callable[[], None]) -> None:
    """Call when the server has answered its last request. uvicorn ends by the signal it received, without Python's
    atexit; its server object is known through the signal's handler. Under another server atexit has to do."""
    server = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
    lifespan = getattr(server, "lifespan", None)
    if lifespan is None:
        return
    shutdown = lifespan.shutdown

    async def wrapped() -> None:
        await shutdown()
        call()

    lifespan.shutdown = wrapped


def log_handlers() -> set[logging.Handler]:
    """The handlers of all loggers. uvicorn's own loggers have some, and pass nothing on to the root's."""
    loggers = [logging.root, *(x for x in logging.root.manager.loggerDict.values() if isinstance(x, logging.Logger))]
    return {handler for log in loggers for handler in log.handlers}


def log_file() -> Path:
    """Where `monailabel start_server` writes its log."""
    return Path(settings.MONAI_LABEL_APP_DIR) / "logs" / "app.log"


# Tasks in processes of their own: training, batch inference, scoring -------------------------------------------------

RUNNING = ("SUBMITTED", "RUNNING")
_starting = threading.Lock()  # two starts at once must not both find nothing running


def is_running(task: Mapping[str, Any]) -> bool:
    """Whether a task waits for its turn or works."""
    return task["status"] in RUNNING


def start_task(method: str, request: dict[str, Any], queue: bool) -> dict[str, Any] | None:
    """Start a task of a method ("train", "batch_infer", "scoring"), or put it behind those that run.

    Args:
        queue: put it behind; else None is returned if one runs.

    Returns:
        MONAI Label's record of the task, which changes as the task goes on.
    """
    with _starting:
        if not queue and any(map(is_running, tasks_of(method))):
            return None
        return AsyncTask.run(method, request=request, enqueue=True)[0]


def stop_task(method: str) -> dict[str, Any] | None:
    """Kill the process of a method's task; None if none runs, or if it ended at this moment."""
    try:
        return AsyncTask.stop(method)
    except (psutil.NoSuchProcess, StopIteration):
        return None


def task_status(method: str, only_running: bool) -> tuple[dict[str, Any] | None, str | None]:
    """The newest task of a method, or the one that runs; without one, None and the reason."""
    return AsyncTask.status(method, check_if_running=only_running)


def started(task: Mapping[str, Any]) -> float:
    """When a task was started, in seconds since 1970. MONAI Label notes local time, to the second."""
    return datetime.strptime(task["start_ts"], "%Y-%m-%d %H:%M:%S").timestamp()


# What runs a model, and what trains one -------------------------------------------------------------------------------


class InferTask(BasicInferTask):
    """MONAI Label's inference task, under public names.

    Its `__call__` adds the defaults to the request, copies it, and calls in this order pre_transforms, run_inferer,
    inverse_transforms (None: nothing to invert), post_transforms and writer, each with the one dictionary `data`.
    """

    @property
    def defaults(self) -> dict[str, Any]:
        """Option to default, as given at construction, and `device`."""
        return self._config


class TrainTask(BasicTrainTask):
    """MONAI Label's train task, under public names.

    Its `__call__` adds the defaults to the request and calls pre_process, train and cleanup. `train` fills a Context
    and calls partition_datalist, network, optimizer, evaluator, trainer and finalize, and then runs the trainer.
    """

    @property
    def defaults(self) -> dict[str, Any]:
        """Option to default: MONAI Label's, and what was given at construction."""
        return self._config

    @property
    def stats_file(self) -> Path:
        """The JSON that `stats()` returns."""
        return Path(self._stats_path)

    @abstractmethod
    def evaluator(self, context: Context) -> Any:
        """The engine that validates, None if nothing is set aside."""

    @abstractmethod
    def trainer(self, context: Context) -> Any:
        """The engine that trains; `context.evaluator` is there already."""

    def _create_evaluator(self, context: Context) -> Any:
        return self.evaluator(context)

    def _create_trainer(self, context: Context) -> Any:
        return self.trainer(context)


# The archive's client -------------------------------------------------------------------------------------------------


class _Unpooled(HTTPAdapter):
    """A time limit, as requests waits forever by default, and a connection of its own for each request: one that is
    kept may be closed by the archive just as it is used again (Orthanc: after a second)."""

    def __init__(self, limits: tuple[float, float]) -> None:
        super().__init__()
        self._limits = limits

    def send(self, request: Any, *args: Any, **more: Any) -> requests.Response:
        more["timeout"] = self._limits
        request.headers["Connection"] = "close"  # the archive need not wait for another one
        return HTTPAdapter().send(request, *args, **more)


def limit_waiting(client: DICOMwebClient, connect: float, read: float, waited: Callable[[float], None]) -> None:
    """Make a client give up in time, and tell how long it waited.

    Args:
        connect: seconds in which a connection must be made.
        read: seconds without a byte after which the archive counts as down.
        waited: is told the seconds of each request, up to the first byte of what comes as a stream.
    """
    client.set_http_retry_params(retry=False)  # it would wait for minutes; the annotator asks again
    session = client._session
    for scheme in ("http://", "https://"):
        session.mount(scheme, _Unpooled((connect, read)))
    send = session.send

    def timed(request: Any, **more: Any) -> requests.Response:
        start = time.monotonic()
        try:
            return send(request, **more)
        finally:
            waited(time.monotonic() - start)

    session.send = timed  # type: ignore[method-assign]
