"""Reports of rounds, as `lib.model.reports.page` wrote them beside the versions.

They show slices of cases: whoever may read images may read them.
"""

from __future__ import annotations

from html import escape
from typing import Any

from fastapi import APIRouter, HTTPException
from fastapi.responses import HTMLResponse

from lib.app.web.common import ERRORS, Services, choice
from lib.model.reports.page import POLICY

HEADERS = {"Content-Security-Policy": f"{POLICY}; frame-ancestors 'self'", "Cache-Control": "private, no-store"}


def report_routes(services: Services) -> APIRouter:
    """`/reports/<model>/v0003.html`: a page links to its sisters by file name, on a server and from a disk alike."""
    routes = APIRouter(responses=ERRORS)

    @routes.get(
        "/reports/{model}/{page}", tags=["Model"], summary="Report of a version's round", response_class=HTMLResponse
    )
    def report(model: str, page: str) -> HTMLResponse:
        versions = choice("model", model, services.app.models).versions
        pages = _pages(versions)
        if page not in pages.values():
            raise HTTPException(404, f"no report {page[:100]!r}; {model} has {', '.join(pages.values()) or 'none yet'}")
        try:
            text = (versions.folder / page).read_text(encoding="utf-8")
        except FileNotFoundError:  # it went with its version at this moment
            raise HTTPException(404, f"{model}: {page} is gone") from None
        return HTMLResponse(text, headers=HEADERS)

    return routes


def report_links(services: Services) -> str:
    """HTML for the start page: one line of links per model, the newest report first; empty if there is none."""
    lines = []
    for model, task in services.app.models.items():
        links = [
            f'<a href="reports/{escape(model)}/{page}">version {number}</a>'
            for number, page in sorted(_pages(task.versions).items(), reverse=True)
        ]
        if links:
            lines.append(f"<p>{escape(model)}: {', '.join(links)}</p>")
    return f"<h2>Reports of training rounds</h2>{''.join(lines)}" if lines else ""


def _pages(versions: Any) -> dict[int, str]:
    """Version to the file name of its report."""
    pages = {number: versions.report(number) for number in versions.numbers()}
    return {number: page.name for number, page in pages.items() if page.is_file()}
