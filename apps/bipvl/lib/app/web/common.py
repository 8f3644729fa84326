"""What all routes share: the app behind them, who asks, checked JSON, and answers that are documented."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from fastapi import HTTPException, Request
from pydantic import BaseModel

from lib.activelearning.scoring.background import Background
from lib.app.web.access.accounts import User
from lib.app.web.access.auth import Authenticator
from lib.app.web.access.guard import LOCAL_USER, USER
from lib.app.web.access.options import WebOptions
from lib.app.web.answers import Places
from lib.app.web.sessions import Sessions
from lib.infers import BatchInfer, BiPVLInfer, InteractiveInfer
from lib.infers.work import Work
from lib.model.predict import Watch
from lib.options import from_json
from lib.stores.interface import Store
from lib.trainers import BiPVLTrain
from lib.upstream import ScoringMethod, Strategy

logger = logging.getLogger(__name__)
Entry = TypeVar("Entry")


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
    app_dir: str
    model_dir: Path
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
    @property
    def interactions(self) -> Mapping[str, InteractiveInfer]: ...
    def infer(
        self, request: dict[str, Any], *, person: str | None = None, watch: Watch | None = None
    ) -> dict[str, Any]: ...
    def infer_file(
        self, request: dict[str, Any], path: Path, work: Work | None = None, watch: Watch | None = None
    ) -> dict[str, Any]: ...
    def interact(self, request: dict[str, Any], work: Work, watch: Watch | None = None) -> dict[str, Any]: ...
    def doubts(self, model: str, image: str, watch: Watch | None = None) -> dict[str, Any]: ...
    def work(self, person: str, image: str) -> Work: ...
    def asked(self, person: str, image: str) -> list[dict[str, Any]]: ...
    def submitted(self, person: str, image: str) -> None: ...
    def on_save_label(self, image_id: str, label_id: str) -> dict[str, Any] | None: ...


@dataclass
class Services:
    """What routes work with. `infers` runs inference, so that nothing else waits for it; `places` keeps the server's
    folders out of what people read."""

    app: LabelApp
    options: WebOptions
    auth: Authenticator | None
    sessions: Sessions | None
    infers: ThreadPoolExecutor
    places: Places


def current_user(request: Request) -> User:
    """Who sent the request, as the guard found; FastAPI dependency."""
    return request.scope.get(USER, LOCAL_USER)


def person(services: Services, user: User, request: Request, client_id: Any) -> str:
    """Whom work is remembered for: the account; without accounts the name that the client gives itself (`client_id`)
    and its address."""
    if services.auth:
        return user.name
    return f"{str(client_id or '')[:100]}@{request.client.host if request.client else ''}"


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
        HTTPException: 404, or 409 with the reason if the image is there but cannot be used.
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
        data = from_json(text) if text else {}
    except ValueError as error:
        raise HTTPException(400, f"{what}: {error}") from error
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
        raise HTTPException(400, f"{what}: NaN, infinity or broken Unicode cannot be used") from error
    return data
