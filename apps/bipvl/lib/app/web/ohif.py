"""OHIF, the viewer that MONAI Label brings along, at `/ohif/`."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath

from fastapi import APIRouter, HTTPException, Request
from fastapi.responses import HTMLResponse, RedirectResponse, Response
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException as StarletteHTTPException

from lib.upstream import OHIF

# Names with a hash of the content never change theirs; everything else is asked for again, and answered by 304.
_HASHED = re.compile(r"(?:.*\.)?[0-9a-f]{20}\.[a-z]+")
_KEPT = "private, max-age=31536000, immutable"
_ASKED = "private, no-cache"

# The page loads and asks nothing from elsewhere: patients' names stay here whatever bug the viewer has, and the
# fonts of Google that its style sheet names neither delay it nor tell about it.
_POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' blob: data:; frame-ancestors 'self'"

# What we add to the viewer: a module that runs before its own script, which reads the configuration that we extend.
OURS = Path(__file__).parent / "static" / "ohif"
_EXTENSION = '<script type="module" src="/ohif/bipvl/extension.js"></script>'


def page(html: str) -> str:
    """OHIF's page without fonts from the internet, with our mode, and a manifest that is fetched with the login."""
    html = re.sub(r'<link\b[^>]*\bhref="https?://[^>]*>', "", html)
    html = re.sub(r'(<link\b[^>]*\brel="manifest")', r'\1 crossorigin="use-credentials"', html)
    viewer = "<script defer"
    if viewer not in html:
        raise RuntimeError("the viewer's page is not built like MONAI Label 0.8.5's: our panel finds no place in it")
    return html.replace(viewer, _EXTENSION + viewer, 1)


def router(folder: Path = OHIF) -> APIRouter:
    """Routes `/ohif/…`: the files of the viewer, and its page for every address that it makes up itself.

    Who may ask is decided before: nothing here looks at the user.

    Args:
        folder: of the built viewer, with an `index.html`.
    """
    routes = APIRouter()
    files, ours = StaticFiles(directory=folder), StaticFiles(directory=OURS)
    index = page((folder / "index.html").read_text(encoding="utf-8"))

    @routes.api_route("/ohif", methods=["GET", "HEAD"], include_in_schema=False)
    def without_slash(request: Request) -> Response:
        query = request.url.query
        return RedirectResponse(f"/ohif/?{query}" if query else "/ohif/")

    @routes.api_route("/ohif/{path:path}", methods=["GET", "HEAD"], include_in_schema=False)
    async def viewer(request: Request, path: str) -> Response:
        if path not in ("", "index.html"):
            try:
                part = path.removeprefix("bipvl/")
                answer = await (files if part == path else ours).get_response(part, request.scope)
            except StarletteHTTPException as error:
                # /ohif/viewer, /ohif/monai-label and the like are pages; a missing script is not.
                if error.status_code != 404 or PurePosixPath(path).suffix:
                    raise HTTPException(404, f"OHIF has no file {path[:200]!r}") from error
            else:
                answer.headers["cache-control"] = _KEPT if _HASHED.fullmatch(PurePosixPath(path).name) else _ASKED
                return answer
        return HTMLResponse(index, headers={"cache-control": _ASKED, "content-security-policy": _POLICY})

    return routes
