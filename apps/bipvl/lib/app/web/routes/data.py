"""Routes of images, labels and sessions, as MONAI Label's clients, 3D Slicer and OHIF use them."""

from __future__ import annotations

import logging
import mimetypes
import shutil
import tempfile
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends, File, Form, HTTPException, Query, Request, Response, UploadFile
from fastapi.responses import FileResponse
from starlette.background import BackgroundTask

from lib.app.web import uploads
from lib.app.web.access.accounts import User
from lib.app.web.common import ERRORS, Services, checked, current_user, json_object, known_image, person
from lib.files import FINAL
from lib.stores.cases import CLICKS
from lib.upstream import file_checksum

logger = logging.getLogger(__name__)

Asker = Annotated[User, Depends(current_user)]
ALGORITHMS = ("SHA256", "SHA512", "MD5")
FILE: dict[int | str, dict[str, Any]] = {200: {"content": {"application/octet-stream": {}}, "description": "The file"}}


class DatastoreOutput(str, Enum):
    """What GET /datastore/ lists."""

    train = "train"
    stats = "stats"
    all = "all"


def datastore_routes(services: Services) -> APIRouter:
    """Routes below /datastore."""
    routes = APIRouter(prefix="/datastore", tags=["Datastore"], responses=ERRORS)
    app = services.app

    @routes.get("/", summary="Images and labels")
    def listing(output: DatastoreOutput = DatastoreOutput.stats) -> Any:
        store = app.datastore()
        return {"all": store.json, "train": store.datalist, "stats": store.status}[output.value]()

    @routes.put("/", include_in_schema=False)
    @routes.put("/image", summary="Add an image")
    def add_image(
        user: Asker,
        file: Annotated[UploadFile, File()],
        image: str | None = None,
        params: Annotated[str, Form()] = "{}",
    ) -> dict[str, str]:
        info = {**json_object(params), "user": user.name}
        kind = uploads.suffix(file.filename, uploads.IMAGE_SUFFIXES, "file")
        name = image or uploads.safe_name(file.filename, 0)[: -len(kind)]
        with uploads.saved(file, uploads.IMAGE_SUFFIXES, "file") as path:
            added = app.datastore().add_image(name, str(path), info)
        logger.info("Image %r added by %r", added, user.name)
        return {"image": added}

    @routes.delete("/", include_in_schema=False)
    @routes.delete("/image", summary="Remove an image and its labels")
    def remove_image(user: Asker, id: str) -> dict[str, str]:
        app.datastore().remove_image(known_image(app.datastore(), id))
        for engine in app.models.values():
            engine.reviews.forget(id)
        logger.info("Image %r removed by %r", id, user.name)
        return {}

    @routes.head("/image", summary="Is there such an image, with this checksum?")
    def check_image(image: str, check_sum: str | None = None) -> Response:
        path = _image_file(app.datastore(), image)
        if check_sum:
            algorithm, _, digest = check_sum.rpartition(":")
            if (algorithm or "SHA256") not in ALGORITHMS:
                raise HTTPException(400, f"check_sum: unknown algorithm {algorithm!r}; valid are {ALGORITHMS}")
            if file_checksum(path, algorithm or "SHA256") != f"{algorithm or 'SHA256'}:{digest}":
                raise HTTPException(404, "the image has another checksum")
        return Response()

    @routes.get("/image", summary="Download an image", response_class=FileResponse, responses=FILE)
    def download_image(image: str) -> FileResponse:
        return _file(_image_file(app.datastore(), image))

    @routes.get("/image/info", summary="What is known about an image")
    def image_info(image: str) -> Any:
        return app.datastore().get_image_info(known_image(app.datastore(), image))

    @routes.put("/image/info", summary="Add to what is known about an image")
    def update_image_info(user: Asker, image: str, info: Annotated[str, Form()] = "{}") -> Any:
        known_image(app.datastore(), image)
        app.datastore().update_image_info(image, {**json_object(info, "info"), "user": user.name})
        return {}

    @routes.put("/label", summary="Save a label")
    def save_label(
        user: Asker,
        asked: Request,
        image: str,
        label: Annotated[UploadFile, File()],
        tag: str = FINAL,
        params: Annotated[str, Form()] = "{}",
    ) -> dict[str, Any]:
        info, store = {**json_object(params), "user": user.name}, app.datastore()
        valid = (*uploads.LABEL_SUFFIXES, *([".dcm"] if store.dicom else []))
        who, final = person(services, user, asked, info.get("client_id")), (tag or FINAL) == FINAL
        info.pop(CLICKS, None)  # the server knows them better
        if final and (clicks := app.asked(who, image)):
            info[CLICKS] = clicks
        with uploads.saved(label, valid, "label") as path:
            saved = store.save_label(image, str(path), tag or FINAL, info)
        logger.info("Label of %r saved as %r by %r", image, tag, user.name)
        if final:
            app.submitted(who, image)
        return {**(app.on_save_label(image, saved) or {}), "image": image, "label": saved}

    @routes.delete("/label", summary="Remove a label")
    def remove_label(user: Asker, id: str, tag: str) -> dict[str, str]:
        _label_file(app.datastore(), id, tag)
        app.datastore().remove_label(id, tag)
        logger.info("Label %r of tag %r removed by %r", id, tag, user.name)
        return {}

    @routes.head("/label", summary="Is there such a label?")
    def check_label(image: str, tag: str) -> Response:
        _label_file(app.datastore(), image, tag)
        return Response()

    @routes.get("/label", summary="Download a label", response_class=FileResponse, responses=FILE)
    def download_label(label: str, tag: str) -> FileResponse:
        return _file(_label_file(app.datastore(), label, tag))

    @routes.get("/label/info", summary="What is known about a label")
    def label_info(label: str, tag: str) -> Any:
        _label_file(app.datastore(), label, tag)
        return app.datastore().get_label_info(label, tag)

    def _update_label_info(user: User, label: str, tag: str, info: dict[str, Any]) -> dict[str, str]:
        _label_file(app.datastore(), label, tag)
        app.datastore().update_label_info(label, tag, {**checked(info, "info"), "user": user.name})
        return {}

    @routes.put("/label/info", summary="Add to what is known about a label")
    def update_label_info(user: Asker, label: str, tag: str, info: Annotated[str, Form()] = "{}") -> Any:
        return _update_label_info(user, label, tag, json_object(info, "info"))

    @routes.put("/updatelabelinfo", include_in_schema=False)
    def update_label_info_as_before(user: Asker, label: str, tag: str, params: Annotated[str, Form()] = "{}") -> Any:
        return _update_label_info(user, label, tag, json_object(params))

    @routes.get("/dataset", summary="Images and labels as a zip", response_class=FileResponse, responses=FILE)
    def dataset(limit_cases: Annotated[int | None, Query(ge=1)] = None) -> FileResponse:
        path = Path(app.datastore().get_dataset_archive(limit_cases))
        ours = Path(tempfile.gettempdir()) in path.parents
        done = BackgroundTask(path.unlink, missing_ok=True) if ours else None
        return FileResponse(path, media_type="application/zip", filename="dataset.zip", background=done)

    return routes


def session_routes(services: Services) -> APIRouter:
    """Routes below /session."""
    routes = APIRouter(prefix="/session", tags=["Session"], responses=ERRORS)

    @routes.get("/{session_id}", summary="A session, or its image", response_model=None)
    def get(session_id: str, update_ts: bool = False, image: bool = False) -> dict[str, Any] | FileResponse:
        session = known_session(services, session_id, update_ts)
        if not image:
            return session
        path = Path(session["image"])
        if not path.is_file():
            raise HTTPException(409, "the session holds several files, not one image")
        return _file(path)

    @routes.put("/", summary="Send an image for a while")
    def create(files: Annotated[list[UploadFile], File()], uncompress: bool = False, expiry: int = 0) -> dict[str, Any]:
        sessions = _sessions(services)
        if uncompress and len(files) != 1:
            raise HTTPException(400, f"uncompress: expected one archive, got {len(files)} files")
        folder = Path(tempfile.mkdtemp())
        try:
            if uncompress:
                with uploads.saved(files[0], ("",), "files") as archive:
                    uploads.unpack(archive, folder, 4 * services.options.max_upload)
            else:
                for number, file in enumerate(files):
                    _receive(file, folder, number)
            if not any(p.is_file() for p in folder.rglob("*")):
                raise HTTPException(400, "no file was sent")
            session = sessions.add(folder, expiry)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        return {"session_id": session["name"], "session_info": session}

    @routes.delete("/{session_id}", summary="Remove a session")
    def remove(session_id: str) -> dict[str, Any]:
        session = known_session(services, session_id)
        _sessions(services).remove(session_id)
        return session

    return routes


def known_session(services: Services, session_id: str, touch: bool = False) -> dict[str, Any]:
    """A session.

    Raises:
        HTTPException: 404 for an unknown or expired one, 406 if sessions are switched off.
    """
    session = _sessions(services).get(session_id, touch)
    if session is None:
        raise HTTPException(404, f"unknown session {session_id[:64]!r}; it may be expired")
    return session


def _sessions(services: Services) -> Any:
    if services.sessions is None:
        raise HTTPException(406, "sessions are switched off (MONAI_LABEL_SESSIONS)")
    return services.sessions


def _receive(file: UploadFile, folder: Path, number: int) -> None:
    place = folder / uploads.safe_name(file.filename, number)
    if place.exists():
        place = folder / f"{number}-{place.name}"
    with place.open("xb") as target:
        shutil.copyfileobj(file.file, target, uploads.COPY_BYTES)


def _image_file(store: Any, image: str) -> Path:
    path = Path(store.get_image_uri(known_image(store, image)))
    if not path.is_file():
        raise HTTPException(404, f"the image {image[:100]!r} has no file")
    return path


def _label_file(store: Any, label: str, tag: str) -> Path:
    uri = store.get_label_uri(label, tag)
    if not uri or not Path(uri).is_file():
        raise HTTPException(404, f"image {label[:100]!r} has no label of tag {tag[:100]!r}")
    return Path(uri)


def _file(path: Path) -> FileResponse:
    kind = mimetypes.guess_type(path, strict=False)[0] or "application/octet-stream"
    return FileResponse(path, media_type=kind, filename=path.name)
