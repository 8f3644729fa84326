"""What all routes share: the app behind them, who asks, checked JSON, and answers that are documented."""

from __future__ import annotations

import errno
import json
import logging
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from filelock import Timeout
from pydantic import BaseModel
from starlette.exceptions import HTTPException as StarletteHTTPException

from lib.app.web.access.accounts import User
from lib.app.web.access.auth import Authenticator, Refusal
from lib.app.web.access.guard import LOCAL_USER, USER
from lib.app.web.access.options import WebOptions
from lib.app.web.sessions import Sessions
from lib.infers import BatchInfer, BiPVLInfer
from lib.model.checkpoints import CheckpointError
from lib.scoring.background import Background
from lib.stores.interface import Store
from lib.trainers import BiPVLTrain
from lib.upstream import (
    ImageNotFoundException,
    LabelNotFoundException,
    MONAILabelException,
    ScoringMethod,
    Strategy,
)

logger = logging.getLogger(__name__)
Entry = TypeVar("Entry")

MODEL_UNREADABLE = (
    "a model file on the server cannot be used. Nothing that you sent is wrong: the server's log says which file and "
    "why, and whoever runs it has to restore the file or serve another version"
)


class Problem(BaseModel):
    """Every error answers with a sentence."""

    detail: str


ERRORS: dict[int | str, dict[str, Any]] = {
    code: {"model": Problem, "description": text}
    for code, text in {
        400: "What was sent cannot be used",
        401: "Not logged in",
        403: "Not allowed, or a read-only folder",
        404: "No such model, image, label, session, version or path; the text lists the valid ones",
        405: "This path has other methods",
        406: "Sessions are switched off",
        409: "In conflict with what is there",
        413: "Larger than the server accepts",
        421: "The server is not known under this name",
        422: "A parameter is missing or of the wrong type",
        429: "Already running, or too many failed logins",
        500: "A file on the server cannot be read or written",
        502: "The archive does not answer",
        503: "The OpenID realm does not answer, or others have held what was asked for too long",
        507: "The disk is full",
    }.items()
}


class LabelApp(Protocol):
    """What routes ask of the app (lib.app.bipvl.BiPVLApp)."""

    name: str
    description: str
    version: str
    studies: str
    conf: dict[str, str]
    background: Background | None
    batch: BatchInfer

    @property
    def models(self) -> Mapping[str, BiPVLInfer]: ...
    @property
    def trainers(self) -> Mapping[str, BiPVLTrain]: ...
    @property
    def strategies(self) -> Mapping[str, Strategy]: ...
    @property
    def scoring_methods(self) -> Mapping[str, ScoringMethod]: ...
    def datastore(self) -> Store: ...
    def sessions(self) -> Sessions | None: ...
    def info(self) -> dict[str, Any]: ...
    def model_info(self, model: str) -> dict[str, Any] | None: ...
    def next_sample(self, request: dict[str, Any]) -> dict[str, Any]: ...
    def infer(self, request: dict[str, Any]) -> dict[str, Any]: ...
    def infer_file(self, request: dict[str, Any], path: Path) -> dict[str, Any]: ...
    def on_save_label(self, image_id: str, label_id: str) -> dict[str, Any] | None: ...


@dataclass
class Services:
    """What routes work with. `infers` runs inference, so that nothing else waits for it."""

    app: LabelApp
    options: WebOptions
    auth: Authenticator | None
    sessions: Sessions | None
    infers: ThreadPoolExecutor


def current_user(request: Request) -> User:
    """Who sent the request, as the guard found; FastAPI dependency."""
    return request.scope.get(USER, LOCAL_USER)


def choice(kind: str, name: Any, valid: Mapping[str, Entry]) -> Entry:
    """An entry of the app's models, trainers, strategies or methods.

    Raises:
        HTTPException: 404 with the valid names.
    """
    if not isinstance(name, str) or name not in valid:
        raise HTTPException(404, f"unknown {kind} {str(name)[:100]!r}; valid are {', '.join(valid) or 'none'}")
    return valid[name]


def known_image(store: Any, image: str) -> str:
    """The id of an image in the datastore.

    Raises:
        HTTPException: 404, or 409 with the reason where the image is there but cannot be used.
    """
    images = store.list_images()
    if image not in images:
        if reason := store.left_out().get(image):
            raise HTTPException(409, f"image {image[:100]!r} cannot be used: {reason}")
        raise HTTPException(404, f"unknown image {image[:100]!r}; the datastore has {len(images)} images")
    return image


def json_object(text: str, what: str = "params") -> dict[str, Any]:
    """A JSON object from a form field.

    Raises:
        HTTPException: 400 for anything else.
    """
    try:
        data = json.loads(text) if text else {}
    except (ValueError, RecursionError) as error:
        raise HTTPException(400, f"{what}: not valid JSON: {error}") from error
    return checked(data, what)


def checked(data: Any, what: str = "params") -> dict[str, Any]:
    """An object that can be kept and sent back as JSON: no NaN, no broken Unicode.

    Raises:
        HTTPException: 400.
    """
    if not isinstance(data, dict):
        raise HTTPException(400, f"{what}: expected a JSON object, got {type(data).__name__}")
    try:
        json.dumps(data, allow_nan=False, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise HTTPException(400, f"{what}: NaN, infinity, broken Unicode or too deep: {error}") from error
    return data


def handle_errors(api: FastAPI) -> None:
    """Turn what a user can cause into a 4xx with a sentence, and a full disk into 507."""

    @api.exception_handler(StarletteHTTPException)
    async def refused(_: Request, error: StarletteHTTPException) -> JSONResponse:
        if isinstance(error.__cause__, OSError):  # a full disk while an upload was received
            return _storage(error.__cause__)
        return _answer(error.status_code, str(error.detail), error.headers)

    @api.exception_handler(Refusal)
    async def not_let_in(_: Request, error: Refusal) -> JSONResponse:
        return _answer(error.status, error.message, error.headers)

    @api.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        found = [f"{'.'.join(str(part) for part in e['loc'])}: {e['msg']}" for e in error.errors()]
        return _answer(422, "; ".join(found)[:2000])

    @api.exception_handler(ValueError)
    async def unusable(_: Request, error: ValueError) -> JSONResponse:
        status = getattr(error, "status", None)  # who raises with one has meant an answer; others may be mistakes
        if isinstance(error, CheckpointError) and error.status == 500:
            logger.error("%s", error)
            return _answer(500, MODEL_UNREADABLE)
        logger.info("Refused: %s", error, exc_info=status is None)
        return _answer(status or 400, str(error))

    @api.exception_handler(MONAILabelException)
    async def stock(_: Request, error: MONAILabelException) -> JSONResponse:
        missing = isinstance(error, (ImageNotFoundException, LabelNotFoundException))
        return _answer(404 if missing else 400, str(error.msg))

    @api.exception_handler(OSError)
    async def storage(_: Request, error: OSError) -> JSONResponse:
        return _storage(error)


def _storage(error: OSError) -> JSONResponse:
    if isinstance(error, Timeout):  # of a lock among processes
        logger.warning("%s has been held by another program for too long", error.lock_file)
        return _answer(503, "another program has been at work on the same files for too long; try again later")
    logger.error("Storage: %s", error, exc_info=error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return _answer(507, "the server's disk is full; nothing was changed. Whoever runs it has to make room")
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return _answer(403, "the server may not write there; nothing was changed")
    return _answer(500, "the server could not read or write a file; its log says more")


def _answer(status: int, text: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    text = text.encode("utf-8", "replace").decode()
    return JSONResponse({"detail": text}, status, dict(headers or {}))
