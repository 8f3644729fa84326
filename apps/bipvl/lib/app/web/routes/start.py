"""The one page of the server itself: what it is, and what can be asked for. Nothing is loaded from elsewhere."""

from __future__ import annotations

from html import escape
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi.responses import HTMLResponse, Response

from lib.app.web.common import Services
from lib.app.web.routes.reports import report_links

PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #223 }}
td {{ padding: .15rem 1rem .15rem 0; vertical-align: top }} code {{ white-space: nowrap }}
</style>
<h1>{title}</h1>
<p>{description}</p>
<p>Annotate with 3D Slicer (module MONAI Label, this address as server) or, for a DICOMweb archive, in the browser:
<a href="ohif/">OHIF viewer</a>. <a href="concepts/">Sentences</a> that describe the classes: read, edit and try them.
Also here: <a href="info/">tasks and options</a>, <a href="train/">training</a>,
<a href="logs/">log</a>, <a href="openapi.json">OpenAPI description</a>.</p>
{reports}
<h2>Requests</h2>
<table>{rows}</table>
</html>
"""


def page_routes(api: FastAPI, services: Services) -> APIRouter:
    """`/` and, for those who know MONAI Label, `/docs`."""
    routes = APIRouter(include_in_schema=False)

    @routes.get("/")
    @routes.get("/docs")
    def page() -> HTMLResponse:
        return HTMLResponse(
            PAGE.format(
                title=escape(api.title),
                description=escape(api.description),
                reports=report_links(services),
                rows="".join(_rows(api.openapi())),
            )
        )

    @routes.get("/favicon.ico")
    def favicon() -> Response:
        return Response(status_code=204)

    return routes


def _rows(schema: dict[str, Any]) -> list[str]:
    return [
        f"<tr><td><code>{method.upper()} {escape(path)}</code></td><td>{escape(operation.get('summary', ''))}</td></tr>"
        for path, operations in schema["paths"].items()
        for method, operation in operations.items()
    ]
