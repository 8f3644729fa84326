"""POST /infer/{model}: as MONAI Label's clients, 3D Slicer and OHIF ask for it, in a thread of its own."""

from __future__ import annotations

import io
import json
import mimetypes
from contextlib import ExitStack
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends, File, Form, HTTPException, Request, Response, UploadFile
from requests_toolbelt import MultipartEncoder
from starlette.concurrency import run_in_threadpool

from lib.app.web import uploads
from lib.app.web.access.accounts import User
from lib.app.web.common import (
    ERRORS,
    LabelApp,
    Services,
    choice,
    current_user,
    json_object,
    known_image,
    person,
)
from lib.app.web.routes.data import known_session
from lib.app.web.running import Asked, Run, Running
from lib.files import ORIGINAL
from lib.infers import BiPVLInfer, InteractiveInfer
from lib.infers.work import Work
from lib.options import shown

SAVE_OPTIONS = ("save_label", "label_tag")
RESERVED = ("model", "image")  # part of the address; clients may repeat them
ADDED = ("client_id", "result_dtype")  # by clients of their own accord, whatever is asked for
FORBIDDEN = ("image_path", "label", "session", "path", "skip_writer", "result_write_to_file")
ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The mask and what is known about it",
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "properties": {
                        "params": {"type": "string", "description": "JSON: label names, scores, version, latencies"},
                        "image": {"type": "string", "format": "binary", "description": "The mask"},
                    },
                }
            },
            "application/json": {},
            "application/octet-stream": {},
            "application/dicom": {},
        },
    }
}


class InferOutput(str, Enum):
    """What POST /infer answers with."""

    image = "image"
    json = "json"
    all = "all"
    dicom_seg = "dicom_seg"


def infer_routes(services: Services) -> APIRouter:
    """The inference route."""
    routes = APIRouter(prefix="/infer", tags=["Infer"], responses=ERRORS)
    running = Running()

    @routes.get("/{model}/progress", summary="How far one's own request is")
    def progress(
        user: Annotated[User, Depends(current_user)],
        asked: Request,
        model: str,
        image: str = "",
        client_id: str = "",
    ) -> dict[str, int] | None:
        """Windows that the model has done, and all; null if no such request is running."""
        return running.progress(Asked(person(services, user, asked, client_id), model, image))

    @routes.post("/{model}", summary="Segment an image", response_class=Response, responses=ANSWERS)
    async def infer(
        user: Annotated[User, Depends(current_user)],
        asked: Request,
        model: str,
        image: str = "",
        session_id: str = "",
        params: Annotated[str, Form()] = "{}",
        file: Annotated[UploadFile | None, File()] = None,
        label: Annotated[
            UploadFile | None, File(description="The label map: for `_scribbles`, or for `_clicks`")
        ] = None,
        output: InferOutput = InferOutput.all,
    ) -> Response:
        def prepare() -> _Request:
            request = _prepare(services, user, model, image, session_id, params, file, output)
            request.person = person(services, user, asked, json_object(params).get("client_id"))
            request.map = label
            return request

        request = await run_in_threadpool(prepare)
        who = Asked(request.person, model, image)
        return await running.attend(who, asked, services.infers, partial(_run, services, request))

    return routes


class _Request:
    """One checked request: of `image` (an id), `path` (a session's) and `file` (an upload) one is set."""

    def __init__(self, options: dict[str, Any], output: InferOutput) -> None:
        self.options, self.output = options, output
        self.image: str | None = None
        self.path: Path | None = None
        self.file: UploadFile | None = None
        self.person = ""
        self.map: UploadFile | None = None  # with scribbles
        self.warnings: list[str] = []


def _prepare(
    services: Services,
    user: User,
    model: str,
    image: str,
    session_id: str,
    params: str,
    file: UploadFile | None,
    output: InferOutput,
) -> _Request:
    """Check everything before the request waits for its turn."""
    interactive = services.app.interactions
    tasks: dict[str, BiPVLInfer | InteractiveInfer] = {**services.app.models, **interactive}
    task = choice("model", model, tasks)
    store = services.app.datastore()
    given = json_object(params)
    request = _Request({**_options(task, given, model, image), "model": model}, output)
    if unknown := [key for key in given if key not in (*task.options, *RESERVED, *ADDED)]:
        request.warnings.append(f"unknown options without effect: {', '.join(map(shown, unknown))}")
    if model in interactive and (output is InferOutput.dicom_seg or (file is not None and not session_id)):
        if output is InferOutput.dicom_seg:
            raise HTTPException(400, "output: dicom_seg is not offered for clicks and scribbles")
        raise HTTPException(400, "file is not offered for clicks and scribbles: name an image or a session_id")
    if session_id:
        request.path = Path(known_session(services, session_id, touch=True)["image"])
    elif file is not None:
        uploads.suffix(file.filename, uploads.IMAGE_SUFFIXES, "file")
        request.file = file
    elif image:
        request.image = known_image(store, image)
    else:
        raise HTTPException(400, "what to segment: expected an image id, a file or a session_id")
    if request.image is None or not request.options.get("save_label"):
        for key in SAVE_OPTIONS:
            request.options.pop(key, None)
    elif user.role == "viewer":
        raise HTTPException(403, "save_label: this needs the role annotator")
    if request.options.get("uncertainty_map"):
        if request.image is None:
            raise HTTPException(400, "uncertainty_map: offered for the images of the datastore, which keeps the map")
        if user.role == "viewer":
            raise HTTPException(403, "uncertainty_map: this needs the role annotator")
    if output is InferOutput.dicom_seg and (request.image is None or not store.dicom):
        raise HTTPException(400, "output: dicom_seg is offered for the images of a DICOMweb archive only")
    return request


def _run(services: Services, request: _Request, run: Run) -> Response:
    app = services.app
    with ExitStack() as stack:
        if request.options["model"] in app.interactions:
            result = _interact(app, request, stack, run)
        elif request.image is not None:
            result = app.infer({**request.options, "image": request.image}, person=request.person, watch=run)
        elif request.file is not None:
            path = stack.enter_context(uploads.saved(request.file, uploads.IMAGE_SUFFIXES, "file"))
            result = app.infer_file(request.options, path, watch=run)
        else:
            assert request.path is not None
            work = _of_session(request)
            result = app.infer_file(request.options, request.path, work, run)
        mask = Path(result["file"])
        stack.callback(mask.unlink, missing_ok=True)
        params = result["params"]
        params["warnings"] = [services.places.hide(text) for text in [*params.get("warnings", ()), *request.warnings]]
        return _answer(app, request, mask, params)


def _interact(app: LabelApp, request: _Request, stack: ExitStack, run: Run) -> dict[str, Any]:
    options = dict(request.options)
    if request.map is not None:
        options["map"] = stack.enter_context(uploads.saved(request.map, uploads.LABEL_SUFFIXES, "label"))
    if request.image is not None:
        return app.interact(options, app.work(request.person, request.image), run)
    return app.interact(options, _of_session(request), run)


def _of_session(request: _Request) -> Work:
    assert request.path is not None
    return Work(request.person, f"session {request.path}", request.path, stored=False)


def _answer(app: LabelApp, request: _Request, mask: Path, params: dict[str, Any]) -> Response:
    if request.output is InferOutput.json:
        return Response(json.dumps(params), media_type="application/json")
    if request.output is InferOutput.dicom_seg:
        return _dicom_seg(app, request, mask, params)
    if request.output is InferOutput.image:
        return _attached(mask.read_bytes(), mask.name)
    fields = {
        "params": (None, json.dumps(params), "application/json"),
        "image": (mask.name, mask.read_bytes(), _media_type(mask.name)),
    }
    body = MultipartEncoder(fields=fields)
    return Response(body.to_string(), media_type=body.content_type)


def _dicom_seg(app: LabelApp, request: _Request, mask: Path, params: dict[str, Any]) -> Response:
    assert request.image is not None
    seg = app.datastore().as_seg(request.image, request.options["model"], params["model_version"], mask)
    with io.BytesIO() as file:
        seg.save_as(file)
        return _attached(file.getvalue(), f"{request.image}.dcm", "application/dicom")


def _attached(content: bytes, name: str, kind: str | None = None) -> Response:
    headers = {"Content-Disposition": f'attachment; filename="{name}"'}
    return Response(content, media_type=kind or _media_type(name), headers=headers)


def _media_type(name: str) -> str:
    return mimetypes.guess_type(name, strict=False)[0] or "application/octet-stream"


def _options(task: BiPVLInfer | InteractiveInfer, given: dict[str, Any], model: str, image: str) -> dict[str, Any]:
    """The options that the model knows, in their types. No option may name a file of the server."""
    for key, value in zip(RESERVED, (model, image), strict=True):
        if given.get(key, value) not in (value, ""):
            raise HTTPException(400, f"params: {key!r} belongs in the address, where it is {value!r}")
    for key in FORBIDDEN:
        if key in given and key not in task.options:
            raise HTTPException(400, f"params: {key!r} cannot be set")
    options = {key: value for key, value in task.options.read(given).items() if key in task.options}
    options.setdefault("label_tag", ORIGINAL)
    return options
