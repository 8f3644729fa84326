"""Routes of models and of what they do: inference, training, next sample, batches, scores, versions, logs."""

from __future__ import annotations

import logging
import subprocess
import time
from collections import deque
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

import torch
from fastapi import APIRouter, Body, Depends, File, HTTPException, Query, Request, UploadFile
from fastapi import Path as PathParameter
from fastapi.responses import FileResponse, PlainTextResponse

from lib.activelearning.scoring import cache
from lib.app.web import uploads
from lib.app.web.access.accounts import User
from lib.app.web.access.guard import address_of
from lib.app.web.common import ERRORS, LabelApp, Services, checked, choice, current_user, known_image
from lib.app.web.routes.progress import with_images, with_progress
from lib.infers.options import batch_options
from lib.options import OptionTable
from lib.upstream import BatchInferImageType, file_checksum, log_file, start_task, stop_task, task_status, tasks_of
from lib.volumes.folders import SUFFIXES

logger = logging.getLogger(__name__)

Asker = Annotated[User, Depends(current_user)]
Params = Annotated[dict[str, Any] | None, Body()]
LOG_LINES = 10_000
WORK = {"train": "training", "batch_infer": "batch inference", "scoring": "scoring"}  # the words for it


def task_routes(services: Services) -> APIRouter:
    """Everything that is not a file of the datastore."""
    routes = APIRouter(responses=ERRORS)
    app = services.app

    @routes.get("/info/", tags=["App"], summary="What this server can do")
    @routes.get("/info", include_in_schema=False)
    def info() -> dict[str, Any]:
        return app.info()

    # Next sample --------------------------------------------------------------------------------------------------

    @routes.post("/activelearning/{strategy}", tags=["ActiveLearning"], summary="The image to annotate next")
    def next_sample(request: Request, user: Asker, strategy: str, params: Params = None) -> dict[str, Any]:
        given = choice("strategy", strategy, app.strategies).options.read(checked(params or {}))
        client = str(given.get("client_id") or "")
        who = f"{user.name if services.auth else address_of(request.scope)}/{client}"
        found = app.next_sample({**given, "strategy": strategy, "who": who})
        if not found:
            return {}
        image_info = found.pop("info")
        noted = {**image_info.get("strategy", {}), strategy: {"ts": int(time.time()), "client_id": client or user.name}}
        try:
            app.datastore().update_image_info(found["id"], {"strategy": noted})
        except (ValueError, OSError) as error:  # a read-only folder can still be looked through
            logger.warning("What was offered could not be recorded: %s", error)
        if services.auth:
            services.auth.downloads.allow(address_of(request.scope), found["id"], user)
        image_info.pop(cache.KEY, None)  # vectors of the model, of no use to a client
        return {**found, **image_info, **_download(found["id"], Path(found["path"]))}

    # Training, batches, scores ------------------------------------------------------------------------------------

    def training(task: dict[str, Any]) -> dict[str, Any]:
        trainer = app.trainers.get(task["request"].get("model"))
        found = with_progress(_plain(task), trainer.stats() if trainer else {})
        return {**found, "outcome": services.places.hide(found["outcome"])}

    def scores(task: dict[str, Any]) -> dict[str, Any]:
        method = app.scoring_methods.get(task["request"].get("method"))
        return {**_plain(task), "progress": method.info().get("progress") if method else None}

    _task_status(routes, "/train/", "train", "Train", "Status of training", training)

    def batch(task: dict[str, Any]) -> dict[str, Any]:
        found = with_images(_plain(task), app.batch.progress())
        if found["progress"]:
            failed = {image: services.places.hide(text) for image, text in found["progress"]["failed"].items()}
            found["progress"] = {**found["progress"], "failed": failed}
        return {**found, "outcome": services.places.hide(found["outcome"])}

    _task_status(routes, "/batch/infer", "batch_infer", "Infer", "Status of batch inference", batch)
    _task_status(routes, "/scoring/", "scoring", "Scoring", "Status of scoring", scores)

    @routes.post("/train/", tags=["Train"], summary="Train all models")
    def train_all(user: Asker, params: Params = None, run_sync: bool = False) -> dict[str, Any]:
        given = checked(params or {})
        requests = {name: _train_request(app, name, given.get(name) or {}, user) for name in app.trainers}
        return {
            name: {"result": _start("train", r, run_sync, queue=True), "detail": None} for name, r in requests.items()
        }

    @routes.post("/train/{model}", tags=["Train"], summary="Train a model")
    def train(
        user: Asker, model: str, params: Params = None, run_sync: bool = False, enqueue: bool = False
    ) -> dict[str, Any]:
        return _start("train", _train_request(app, model, params or {}, user), run_sync, enqueue)

    @routes.post("/batch/infer/{model}", tags=["Infer"], summary="Segment many images, and keep the masks as labels")
    def batch_infer(
        user: Asker,
        model: str,
        images: BatchInferImageType = BatchInferImageType.IMAGES_ALL,
        params: Params = None,
        run_sync: bool = False,
    ) -> dict[str, Any]:
        options = batch_options(choice("model", model, app.models).options)
        given = checked(params or {})
        wanted = given.get("images", images.value)
        if isinstance(wanted, list):
            wanted = [known_image(app.datastore(), str(i)) for i in wanted]
        elif wanted not in [i.value for i in BatchInferImageType]:
            raise HTTPException(400, f"images: expected all, labeled, unlabeled or a list of ids, got {wanted!r}")
        request = {"max_workers": 1, "multi_gpu": True, **_pick(given, options, {"model": model, "images": None})}
        request["multi_gpu"] &= torch.cuda.is_available()
        return _start("batch_infer", {**request, "model": model, "images": wanted}, run_sync)

    @routes.post("/scoring/", tags=["Scoring"], summary="Run all scoring methods")
    def score_all(params: Params = None, run_sync: bool = False) -> dict[str, Any]:
        given = checked(params or {})
        requests = {name: _score_request(app, name, _object(given.get(name), name)) for name in app.scoring_methods}
        if app.background:
            app.background.give_way()
        return {n: {"result": _start("scoring", r, run_sync, queue=True), "detail": None} for n, r in requests.items()}

    @routes.post("/scoring/{method}", tags=["Scoring"], summary="Run a scoring method")
    def score(method: str, params: Params = None, run_sync: bool = False) -> dict[str, Any]:
        request = _score_request(app, method, checked(params or {}))
        if app.background and not run_sync:
            app.background.give_way()
        return _start("scoring", request, run_sync)

    # Models -------------------------------------------------------------------------------------------------------

    @routes.get("/model/info/{model}", tags=["Model"], summary="Checksum and date of the served model")
    def model_info(model: str) -> dict[str, Any]:
        choice("model", model, app.models)
        found = app.model_info(model)
        if not found:
            raise HTTPException(404, f"{model}: no version is published yet")
        return found

    @routes.get("/model/{model}", tags=["Model"], summary="Download the served model", response_class=FileResponse)
    def download_model(model: str) -> FileResponse:
        path = choice("model", model, app.models).get_path()
        if not path or not Path(path).is_file():
            raise HTTPException(404, f"{model}: no version is published yet")
        return FileResponse(path, filename=f"{model}{Path(path).suffix}", media_type="application/octet-stream")

    @routes.put("/model/{model}", tags=["Model"], summary="Publish a checkpoint of this app as the next version")
    def upload_model(user: Asker, model: str, file: Annotated[UploadFile, File()]) -> dict[str, Any]:
        task = choice("model", model, app.models)
        with uploads.saved(file, (".pt",), "file") as path:
            version = task.versions.adopt(path, task.task)
        logger.info("Version %d of %s uploaded by %r", version, model, user.name)
        return {"version": version, **(app.model_info(model) or {})}

    @routes.get("/model/{model}/versions", tags=["Model"], summary="The published versions, oldest first")
    def versions(model: str) -> list[dict[str, Any]]:
        manifests = choice("model", model, app.models).versions.manifests()
        return [{**m, "damaged": services.places.hide(m["damaged"])} if m.get("damaged") else m for m in manifests]

    @routes.post("/model/{model}/versions/{version}/serve", tags=["Model"], summary="Roll back, or forward")
    def serve(user: Asker, model: str, version: Annotated[int, PathParameter(ge=1)]) -> dict[str, Any]:
        published = choice("model", model, app.models).versions
        if version not in published.numbers():
            valid = ", ".join(str(n) for n in published.numbers()) or "none yet"
            raise HTTPException(404, f"{model} has no version {version}; valid are {valid}")
        published.serve(version)
        logger.info("Version %d of %s is served, says %r", version, model, user.name)
        return {"model": model, "served": version}

    @routes.delete("/model/{model}", tags=["Model"], summary="Not possible: serve another version instead")
    def delete_model(model: str) -> None:
        choice("model", model, app.models)
        raise HTTPException(
            405,
            f"models are not deleted; serve another version: POST /model/{model}/versions/<n>/serve",
            {"Allow": "GET, PUT"},
        )

    # Logs ---------------------------------------------------------------------------------------------------------

    @routes.get("/logs/", tags=["Others"], summary="The last lines of the log", response_class=PlainTextResponse)
    def logs(lines: Annotated[int, Query(ge=1, le=LOG_LINES)] = 300) -> str:
        path = log_file()
        if not path.is_file():
            raise HTTPException(404, "there is no log file")
        with path.open(encoding="utf-8", errors="replace") as file:
            return "".join(deque(file, lines))

    @routes.get("/logs/gpu", tags=["Others"], summary="nvidia-smi", response_class=PlainTextResponse)
    def gpu() -> str:
        try:
            return subprocess.run(["nvidia-smi"], capture_output=True, text=True, timeout=30).stdout
        except (OSError, subprocess.TimeoutExpired):
            raise HTTPException(404, "nvidia-smi is not installed, or does not answer") from None

    return routes


def _task_status(
    routes: APIRouter,
    path: str,
    method: str,
    tag: str,
    summary: str,
    show: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
) -> None:
    shown = show or _plain

    @routes.get(path, tags=[tag], summary=summary)
    def status(all: bool = False, check_if_running: bool = False) -> Any:
        if all and not check_if_running:
            return [shown(task) for task in tasks_of(method)]
        found, reason = task_status(method, check_if_running)
        if found is None:
            raise HTTPException(404, reason)
        return shown(found)

    @routes.delete(path, tags=[tag], summary="Stop it")
    def stop() -> Any:
        stopped = stop_task(method)
        return shown(stopped) if stopped else None


def _plain(task: dict[str, Any]) -> dict[str, Any]:
    """A task for the answer: another thread goes on adding lines to its details, of which 3D Slicer shows the last."""
    return {**task, "details": list(task.get("details") or [task.get("status", "")])}


def _start(method: str, request: dict[str, Any], run_sync: bool, queue: bool = False) -> dict[str, Any]:
    if run_sync:
        raise HTTPException(400, "run_sync: not offered; start it, and ask for its status")
    task = start_task(method, request, queue)
    if task is None:
        raise HTTPException(429, f"{WORK[method]} is already running; wait until it ends, or stop it first")
    return _plain(task)


def _download(case: str, path: Path) -> dict[str, str]:
    """What 3D Slicer needs to download an image: a file name, whose ending it reads the file by, and the checksum,
    without which it takes another image of the same name out of its cache."""
    if not path.is_file():
        return {}
    suffix = next(s for s in SUFFIXES if path.name.lower().endswith(s))
    stat = path.stat()
    return {"name": f"{case}{suffix}", "checksum": _checksum(path, stat.st_mtime_ns, stat.st_size)}


@lru_cache(maxsize=10_000)
def _checksum(path: Path, modified: int, size: int) -> str:
    """Of a file as it is at a time and size, so that a changed file is read again."""
    return file_checksum(path)


def _train_request(app: LabelApp, model: str, params: dict[str, Any], user: User) -> dict[str, Any]:
    trainer = choice("model", model, app.trainers)
    uri = trainer.options["tracking_uri"].default  # a path or an address on the server
    request = _pick(_object(params, model), trainer.options, {"model": model, "tracking_uri": uri})
    logger.info("Training of %s started by %r", model, user.name)
    return {**request, "model": model}


def _object(params: Any, what: str) -> dict[str, Any]:
    return checked(params if params is not None else {}, what)


def _score_request(app: LabelApp, method: str, params: dict[str, Any]) -> dict[str, Any]:
    return {**choice("scoring method", method, app.scoring_methods).options.read(params), "method": method}


def _pick(params: dict[str, Any], options: OptionTable, fixed: dict[str, Any]) -> dict[str, Any]:
    """The options that the app knows, in their types. Clients send more than that; what is `fixed` may be sent back,
    not changed."""
    for key, value in fixed.items():
        if value is not None and params.get(key, value) != value:
            raise HTTPException(400, f"params: {key!r} cannot be set")
    ignored = sorted(set(params) - set(options) - set(fixed) - {"client_id"})
    if ignored:
        logger.info("Options that nothing reads: %s", ", ".join(repr(k[:50]) for k in ignored[:20]))
    return options.read({key: value for key, value in params.items() if key in options and key not in fixed})
