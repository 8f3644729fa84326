"""Answers to requests that cannot be fulfilled: a status, a sentence without paths of the server, a line in the log."""

from __future__ import annotations

import errno
import logging
import os
import re
import traceback
from collections.abc import Iterable, Mapping
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from filelock import Timeout
from starlette.exceptions import HTTPException

from lib.app.web.access.auth import Refusal
from lib.app.web.access.guard import LOCAL_USER, USER, address_of
from lib.model.checkpoints import CheckpointError
from lib.upstream import ImageNotFoundException, LabelNotFoundException, MONAILabelException

logger = logging.getLogger(__name__)

LONGEST_LINE = 1000
MODEL_UNREADABLE = (
    "a model file on the server cannot be used. Nothing that you sent is wrong: the server's log says which file and "
    "why, and whoever runs it has to restore the file or serve another version"
)
_PATH = re.compile(r"""(?<![\w/:.<>])/(?:[^\s/:'",;)]+/)+[^\s/:'",;)]*""")


class Places:
    """The server's folders, which are no business of anybody who only sends requests.

    Args:
        folders: what lies in them is named from there on: `labels/final/case.nii.gz`.
        temporary: likewise, without the folder of a single request in it.
    """

    def __init__(self, folders: Iterable[Path | str], temporary: Path | str) -> None:
        known = {str(form) for folder in folders for form in (Path(folder).absolute(), Path(folder).resolve())}
        longest = sorted(known - {os.sep}, key=len, reverse=True)
        parts = [rf"{re.escape(str(temporary))}(?:/tmp[^/\s]*(?=/))?", *map(re.escape, longest)]
        self._known = re.compile(rf"(?<![\w.-])({'|'.join(parts)})(/|(?![\w.-]))")

    def hide(self, text: str) -> str:
        """A text as it may be sent: of a path in a known folder what follows it, of any other path only the name."""
        text = self._known.sub(lambda m: "" if m[2] else m[1].rpartition("/")[2], text)
        return _PATH.sub(lambda m: m[0].rstrip("/").rpartition("/")[2] if _exists(m[0]) else m[0], text)


def _exists(path: str) -> bool:
    """Whether a path is on this machine, and not part of a request (`/model/heart/versions/3/serve`)."""
    return os.path.lexists("/" + path.split("/")[1])


def handle_errors(api: FastAPI, places: Places) -> None:
    """Turn what a user can cause into a 4xx with a sentence, a lock that others hold for too long into 503, and a full
    disk into 507."""

    def answer(
        request: Request, status: int, text: str, headers: Mapping[str, str] | None = None, hint: str = ""
    ) -> JSONResponse:
        if status not in (500, 507):  # which the log has as errors
            log_refusal(request, status, text + hint)
        text = places.hide(text).encode("utf-8", "replace").decode()
        return JSONResponse({"detail": text}, status, dict(headers or {}))

    @api.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> JSONResponse:
        if isinstance(error.__cause__, OSError):  # a full disk while an upload was received
            return failed(request, error.__cause__)
        return answer(request, error.status_code, str(error.detail), error.headers)

    @api.exception_handler(Refusal)
    async def not_let_in(request: Request, error: Refusal) -> JSONResponse:
        return answer(request, error.status, error.message, error.headers)

    @api.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        found = [f"{'.'.join(str(part) for part in e['loc'])}: {e['msg']}" for e in error.errors()]
        return answer(request, 422, "; ".join(found)[:2000])

    @api.exception_handler(ValueError)
    async def unusable(request: Request, error: ValueError) -> JSONResponse:
        status = getattr(error, "status", None)  # whoever raises with one means it as an answer; others may be mistakes
        if isinstance(error, CheckpointError) and error.status == 500:
            logger.error("%s", error)
            return answer(request, 500, MODEL_UNREADABLE)
        return answer(request, status or 400, str(error), hint="" if status else _raised(error))

    @api.exception_handler(MONAILabelException)
    async def stock(request: Request, error: MONAILabelException) -> JSONResponse:
        missing = isinstance(error, (ImageNotFoundException, LabelNotFoundException))
        return answer(request, 404 if missing else 400, str(error.msg))

    @api.exception_handler(OSError)
    async def storage(request: Request, error: OSError) -> JSONResponse:
        return failed(request, error)

    def failed(request: Request, error: OSError) -> JSONResponse:
        if isinstance(error, Timeout):  # of a lock among processes
            text = "another program has been at work on the same files for too long; try again later"
            return answer(request, 503, text, hint=f" ({error.lock_file})")
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            logger.error("Storage: %s", error)
            text = "the server's disk is full; nothing was changed. Whoever runs it has to make room"
            return answer(request, 507, text)
        if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            hint = f" ({error})"
            return answer(request, 403, "the server may not write there; nothing was changed", hint=hint)
        logger.error("Storage: %s", error, exc_info=error)
        return answer(request, 500, "the server could not read or write a file; its log says more")


def log_refusal(request: Request, status: int, reason: str) -> None:
    """One line: who asked for what, and why it was refused. The query may name patients: it stays out."""
    scope = request.scope
    user = scope.get(USER, LOCAL_USER).name
    line = " ".join(reason.split())[:LONGEST_LINE].encode("utf-8", "replace").decode()
    # A client that asks with HEAD whether something is there is not refused anything.
    level = logging.INFO if scope["method"] == "HEAD" and status == 404 else logging.WARNING
    who, what = (address_of(scope), user), (scope["method"], scope["path"][:LONGEST_LINE])
    logger.log(level, "Refused %s %r from %s (%r): %d, %s", *what, *who, status, line)


def _raised(error: BaseException) -> str:
    """Where an error comes from, for whoever looks for a mistake in the program."""
    last = traceback.extract_tb(error.__traceback__)[-1:]
    return "".join(f" (raised in {frame.name}, {Path(frame.filename).name}:{frame.lineno})" for frame in last)
