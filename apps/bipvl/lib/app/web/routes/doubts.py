"""Where a model doubts in an image, and what people answered when they looked there."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool

from lib.app.web.access.accounts import User
from lib.app.web.common import ERRORS, Services, choice, current_user, known_image, person
from lib.app.web.running import Asked, Run, Running

Asker = Annotated[User, Depends(current_user)]
NONE: dict[str, Any] = {"version": None, "time": None, "places": []}


class Answer(BaseModel):
    """What a person says about a place: `right`, it looks right, or `fix`, it is to be fixed. `version`: whose list the
    person saw."""

    place: str
    answer: str
    version: int | None = None


def doubt_routes(services: Services) -> APIRouter:
    """Routes below /doubts."""
    routes = APIRouter(prefix="/doubts", tags=["Infer"], responses=ERRORS)
    running = Running()

    @routes.get("/{model}/progress", summary="How far one's own look is")
    def progress(
        user: Asker, asked: Request, model: str, image: str = "", client_id: str = ""
    ) -> dict[str, int] | None:
        """Windows that the model has done, and all; null if it is not looking."""
        return running.progress(Asked(person(services, user, asked, client_id), model, image))

    @routes.get("/{model}", summary="Where the served version doubts in an image", response_model=None)
    async def listing(
        user: Asker, asked: Request, model: str, image: str, look: bool = True, client_id: str = ""
    ) -> Any:
        """The places, with people's answers. The last mask of the image has left them behind; if there is none by the
        served version, the model looks at the image, unless `look` is false."""
        engine = choice("model", model, services.app.models)
        await run_in_threadpool(known_image, services.app.datastore(), image)
        if not look:
            return await run_in_threadpool(engine.reviews.get, image) or NONE
        who = Asked(person(services, user, asked, client_id), model, image)
        return await running.attend(who, asked, services.infers, partial(_look, services, model, image))

    @routes.put("/{model}", summary="Answer about a place")
    def answer(user: Asker, model: str, image: str, said: Answer) -> dict[str, Any]:
        """Kept with the account's name, in place of an earlier answer of the same account about the same place."""
        engine = choice("model", model, services.app.models)
        known_image(services.app.datastore(), image)
        return engine.reviews.answer(image, said.version, said.place, said.answer, user.name)

    return routes


def _look(services: Services, model: str, image: str, run: Run) -> dict[str, Any]:
    return services.app.doubts(model, image, run)
