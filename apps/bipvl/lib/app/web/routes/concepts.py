"""The concept page at `/concepts/` and what it asks for: read, check, save, review, restore, try and map sentences.

Sentences are data here: the page puts them on the screen as text, and what is saved holds no markup.
"""

from __future__ import annotations

import asyncio
import datetime
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends, HTTPException
from fastapi.responses import FileResponse, RedirectResponse
from pydantic import BaseModel, Field

from lib.app.web.access.accounts import ROLES, User
from lib.app.web.access.guard import role_needed
from lib.app.web.common import ERRORS, Services, choice, current_user, known_image
from lib.infers.explain import concept_map, trial
from lib.model.tokens import check_text
from lib.model.versions import CheckpointError
from lib.tasks import ATTRIBUTES, Review, Task, TaskError
from lib.tasks.check import Problem
from lib.tasks.revisions import Revisions, with_wordings
from lib.tasks.wording import markup
from lib.upstream import device_list, name_to_device
from lib.volumes.transforms import apply, load

logger = logging.getLogger(__name__)

Asker = Annotated[User, Depends(current_user)]
STATIC = Path(__file__).parents[1] / "static" / "concepts"
FILES = {path.name: path for path in STATIC.iterdir()}
MOST_IMAGES = 2000  # ids that the page offers; others can be typed
LONGEST_NAME = 100
HEADERS = {
    "Cache-Control": "private, no-cache",
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'self'",
}

Sentences = dict[str, dict[str, str]]
Variants = dict[str, dict[str, list[str]]]


class Text(BaseModel):
    """Sentences, class → attribute → sentence; what is not named stays as it is in revision `base`."""

    sentences: Sentences = {}
    base: int = Field(0, ge=0)


class Worded(Text):
    """Sentences, and all wordings of some of them: class → attribute → wordings, of which the last is kept aside."""

    variants: Variants = {}


class Saved(Worded):
    """A text to keep, and a line on why. anyway: also if the served version misreads it."""

    note: str = ""
    anyway: bool = True


class Base(BaseModel):
    """The revision that the page showed when something was asked for."""

    base: int = Field(ge=0)


class Signature(Base):
    """Who has read the sentences and stands for them."""

    by: str


class Case(Text):
    """A case to look at with these sentences."""

    image: str


def concept_routes(services: Services) -> APIRouter:
    """The page, its files, and its requests."""
    routes = APIRouter(responses=ERRORS)

    def engine_of(model: str) -> Any:
        return choice("model", model, services.app.models)

    def revisions_of(model: str) -> Revisions:
        engine = engine_of(model)
        return Revisions(engine.task, engine.versions.folder)

    async def computed(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Wait in the queue of inferences, and let nothing else wait meanwhile."""
        return await asyncio.get_running_loop().run_in_executor(services.infers, work)

    # The page -----------------------------------------------------------------------------------------------------

    @routes.get("/concepts", include_in_schema=False)
    def without_slash() -> RedirectResponse:
        return RedirectResponse("concepts/")

    @routes.get("/concepts/", include_in_schema=False)
    def page() -> FileResponse:
        return FileResponse(FILES["index.html"], headers=HEADERS)

    @routes.get("/concepts/page/{name}", include_in_schema=False)
    def file(name: str) -> FileResponse:
        if name not in FILES:
            raise HTTPException(404, f"the page has no file {name[:100]!r}")
        return FileResponse(FILES[name], headers=HEADERS)

    # The text -----------------------------------------------------------------------------------------------------

    @routes.get("/concepts/{model}", tags=["Concepts"], summary="Sentences, their history and what is served")
    def state(user: Asker, model: str) -> dict[str, Any]:
        engine, revisions = engine_of(model), revisions_of(model)
        newest, damaged = revisions.newest, None
        try:
            text = revisions.text(newest)
        except TaskError as error:
            text, damaged = revisions.task, services.places.hide(str(error))
        history = revisions.history()
        needed = role_needed("POST", f"/concepts/{model}/revisions", user.realm)
        images = services.app.datastore().list_images()
        return {
            "model": model,
            "description": text.description,
            "modality": text.modality,
            "text_format": text.model.text_format,
            "head": text.model.head,
            "attributes": ATTRIBUTES,
            "classes": _classes(text),
            "variants": _variants(text),
            "colors": {name: _css(entry.color) for name, entry in _structures(text).items()},
            "revision": newest,
            "hash": text.concepts.hash,
            "review": text.concepts.review.model_dump(),
            "damaged": damaged,
            "problems": _problems(check_text(text, engine.versions)),
            "history": [_hidden(services, entry) for entry in history],
            "file_changed": revisions.file_changed,
            "served": _served(engine, history),
            "images": images[:MOST_IMAGES],
            "may_save": ROLES.index(user.role) >= ROLES.index(needed),
        }

    @routes.get("/concepts/{model}/revisions/{number}", tags=["Concepts"], summary="The sentences of a revision")
    def revision(model: str, number: int) -> dict[str, Any]:
        text = _revision(revisions_of(model), number)
        review = text.concepts.review.model_dump()
        return {"number": number, "review": review, "classes": _classes(text), "variants": _variants(text)}

    @routes.post("/concepts/{model}/check", tags=["Concepts"], summary="Check sentences without keeping them")
    def check(model: str, asked: Worded) -> dict[str, Any]:
        text = with_wordings(_revision(revisions_of(model), asked.base).with_concepts(asked.sentences), asked.variants)
        engine = engine_of(model)
        misread = engine.misreadings(text)
        told = [Problem(name, "", "", message) for name, message in misread.items()]
        return {"problems": _problems([*told, *check_text(text, engine.versions)])}

    @routes.post("/concepts/{model}/revisions", tags=["Concepts"], summary="Save sentences as the next revision")
    def save(user: Asker, model: str, asked: Saved) -> dict[str, Any]:
        revisions = revisions_of(model)
        before = _revision(revisions, asked.base)
        text = with_wordings(before.with_concepts(_trimmed(asked.sentences)), asked.variants)
        if text.concepts == before.concepts:
            raise HTTPException(400, "nothing to save: no sentence differs, and no wording")
        # A draft with some sentences corrected is still a draft; a signature does not hold for other words.
        if before.concepts.review.status == "reviewed":
            text = _reviewed(text, Review(status="unreviewed"))
        engine = engine_of(model)
        _refuse_unusable(check_text(text, engine.versions))
        warnings = list(engine.misreadings(text).values())
        if warnings and not asked.anyway:
            return {"revision": None, "warnings": warnings}
        return {"revision": revisions.save(text, asked.base, user.name, asked.note.strip()), "warnings": warnings}

    @routes.post("/concepts/{model}/revisions/{number}/restore", tags=["Concepts"], summary="Go back to a revision")
    def restore(user: Asker, model: str, number: int, asked: Base) -> dict[str, Any]:
        revisions = revisions_of(model)
        text = _revision(revisions, number)
        note = f"revision {number} again" if number else "the file again"
        return {"revision": revisions.save(text, asked.base, user.name, note)}

    @routes.post("/concepts/{model}/review", tags=["Concepts"], summary="Sign the newest revision as reviewed")
    def review(user: Asker, model: str, asked: Signature) -> dict[str, Any]:
        name = asked.by.strip()
        if not name or len(name) > LONGEST_NAME or markup(name):
            raise HTTPException(400, f"by: expected the name of the reviewer, at most {LONGEST_NAME} plain characters")
        revisions = revisions_of(model)
        text = _revision(revisions, asked.base)
        _refuse_unusable(check_text(text, engine_of(model).versions))
        signed = Review(status="reviewed", by=name, date=datetime.date.today().isoformat())
        return {"revision": revisions.save(_reviewed(text, signed), asked.base, user.name, f"reviewed by {name}")}

    # What it does -------------------------------------------------------------------------------------------------

    @routes.post("/concepts/{model}/try", tags=["Concepts"], summary="Segment a case with other sentences, and compare")
    async def attempt(model: str, asked: Case) -> dict[str, Any]:
        text = _revision(revisions_of(model), asked.base).with_concepts(_trimmed(asked.sentences))
        path = _path(services, asked.image)

        def infer(options: dict[str, Any]) -> dict[str, Any]:
            return services.app.infer_file({"model": model, **options}, path)

        return await computed(lambda: trial.compare(engine_of(model).task, path, infer, _classes(text)))

    @routes.post("/concepts/{model}/map", tags=["Concepts"], summary="Where sentences lie before and after training")
    async def where(model: str, asked: Case) -> dict[str, Any]:
        text = _revision(revisions_of(model), asked.base).with_concepts(_trimmed(asked.sentences))
        path = _path(services, asked.image)
        return await computed(lambda: _map(services, engine_of(model), text, path))

    return routes


def _map(services: Services, engine: Any, text: Task, path: Path) -> dict[str, Any]:
    """Both maps; in place of one that cannot be drawn, why."""
    version, model, own = engine.loaded(name_to_device(device_list()[0]))
    task = own.model_copy(update={"concepts": text.concepts})
    image = apply(load(task, label=False), {"image": str(path)})["image"]
    result: dict[str, Any] = {"version": version, "classes": task.classes, "rows": task.text_rows()}
    after = concept_map.embeddings(model, task, image)
    result["after"] = concept_map.describe(after) if version else {"missing": "no version is published yet"}
    try:
        fresh = concept_map.untrained(own, model.text.assets)
    except TaskError as error:
        result["before"] = {"missing": services.places.hide(str(error))}
    else:
        result["before"] = concept_map.describe(concept_map.embeddings(fresh, task, image))
    return result


def _hidden(services: Services, entry: dict[str, Any]) -> dict[str, Any]:
    damaged = entry.get("damaged")
    return {**entry, "damaged": services.places.hide(damaged)} if damaged else entry


def _revision(revisions: Revisions, number: int) -> Task:
    """Raises HTTPException 404 for a revision that does not exist."""
    if number != 0 and number not in (numbers := revisions.numbers()):
        raise HTTPException(404, f"no revision {number}; valid are {', '.join(map(str, [0, *numbers]))}")
    return revisions.text(number)


def _path(services: Services, image: str) -> Path:
    store = services.app.datastore()
    return Path(store.get_image_uri(known_image(store, image)))


def _refuse_unusable(problems: list[Problem]) -> None:
    fatal = [str(problem) for problem in problems if problem.fatal]
    if fatal:
        raise HTTPException(400, f"nothing was saved: {'; '.join(fatal[:10])}")


def _reviewed(text: Task, review: Review) -> Task:
    return text.model_copy(update={"concepts": text.concepts.model_copy(update={"review": review})})


def _trimmed(sentences: Sentences) -> Sentences:
    """Without spaces at the ends, which nobody sees."""
    return {name: {key: value.strip() for key, value in own.items()} for name, own in sentences.items()}


def _classes(text: Task) -> Sentences:
    return {name: dict(text.concepts.classes[name].sentences) for name in text.classes}


def _variants(text: Task) -> dict[str, dict[str, tuple[str, ...]]]:
    return {name: text.concepts.classes[name].variants for name in text.classes}


def _problems(problems: list[Problem]) -> list[dict[str, Any]]:
    return [{"class": p.class_name, "attribute": p.attribute, "message": p.message, "fatal": p.fatal} for p in problems]


def _structures(text: Task) -> dict[str, Any]:
    return {**text.labels, **(text.regions or {})}


def _css(color: tuple[int, ...]) -> str:
    return "#" + bytes(color).hex()


def _served(engine: Any, history: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The served version, and which revision its sentences are; None before the first version."""
    try:
        version = engine.versions.served
        manifest = engine.versions.manifest(version) if version else {}
    except CheckpointError as error:
        logger.error("%s", error)
        return None
    if not version:
        return None
    text = manifest.get("concepts")
    numbers = [entry["number"] for entry in history if entry.get("hash") == text]
    return {"version": version, "hash": text, "revisions": numbers, "time": manifest.get("time")}
