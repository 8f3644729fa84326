"""The DICOM archive as browsers see it: `/proxy/dicom/…` hands DICOMweb requests on to the archive, and nothing else.

MONAI Label's own proxy drops query strings, so that the study list mixes patients, passes on encoded `../`, which
reaches the archive's administration, and sends the annotator's password along. This one knows the paths of DICOMweb
(PS3.18) and refuses every other, so a hole in the archive's own interface stays out of reach.
"""

from __future__ import annotations

import logging
import os
import re
import ssl
from collections.abc import AsyncIterator
from contextlib import suppress
from email.message import Message
from typing import Any
from urllib.parse import parse_qs

import google.auth
import google.auth.transport.requests
import httpx
from fastapi import APIRouter, HTTPException, Request
from fastapi.responses import Response, StreamingResponse
from google.auth.exceptions import GoogleAuthError
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect

from lib.upstream import Settings
from lib.upstream import settings as server_settings

logger = logging.getLogger(__name__)
logging.getLogger("httpx").setLevel(logging.WARNING)  # its line per request has the query, which names patients

ROOT = "/proxy/dicom"

# --- what may be asked ------------------------------------------------------------------------------------------------

_UID = r"(?![0-9.]{65})[0-9]+(?:\.[0-9]+)*"
_BULK = r"bulk(?:data)?(?:/[A-Za-z0-9_-]+(?:\.[A-Za-z0-9_-]+)*)*"  # Orthanc says bulk, others bulkdata
_VIEW = rf"metadata|rendered|thumbnail|{_BULK}"
_FRAMES = r"frames/[0-9]+(?:,[0-9]+)*(?:/rendered|/thumbnail)?"
_INSTANCES = rf"instances(?:/{_UID}(?:/(?:{_VIEW}|{_FRAMES}))?)?"
_SERIES = rf"series(?:/{_UID}(?:/(?:{_VIEW}|{_INSTANCES}))?)?"
_RETRIEVE = re.compile(rf"series|instances|studies(?:/{_UID}(?:/(?:{_VIEW}|instances|{_SERIES}))?)?")
_STORE = re.compile(rf"studies(?:/{_UID})?")
_STORED_TYPES = ("application/dicom", "application/dicom+json", "application/dicom+xml")

_PASSED_ON = re.compile(rb"accept|content-type|range|if-.+")
_PASSED_BACK = (
    *("content-type", "content-length", "content-encoding", "content-range", "content-disposition", "accept-ranges"),
    *("cache-control", "expires", "etag", "last-modified", "vary", "retry-after"),
)


def split(path: str) -> tuple[str, str]:
    """What follows `/proxy/dicom/`, as service (wado, qido, stow or none) and the path within DICOMweb."""
    service, _, rest = path.partition("/")
    return (service, rest) if rest and service in ("wado", "qido", "stow") else ("", path)


def check(method: str, path: str, query: str = "", content_type: str = "") -> None:
    """Refuse what is not a DICOMweb request.

    Args:
        path: decoded, within DICOMweb, as from `split`.

    Raises:
        HTTPException: 400 for the path, 405 for the method, 415 for the type of what is stored.
    """
    if method == "POST":
        if not _STORE.fullmatch(path):
            raise HTTPException(405, "POST stores DICOM and goes to studies or studies/{uid}; anything else is GET")
        header = Message()
        header["content-type"] = content_type
        kind = header.get_content_type()
        if (header.get_param("type") if kind == "multipart/related" else kind) not in _STORED_TYPES:
            valid = 'application/dicom or multipart/related; type="application/dicom"'
            raise HTTPException(415, f"the Content-Type is {content_type[:100]!r}; only {valid} can be stored")
    elif path == "wado":  # the older form, WADO-URI, names everything in the query
        if parse_qs(query).get("requestType") != ["WADO"]:
            raise HTTPException(400, "wado without a path is WADO-URI and needs requestType=WADO in the query")
    elif not _RETRIEVE.fullmatch(path):
        raise HTTPException(
            400,
            f"{path[:200]!r} is not a DICOMweb path; valid are studies, series, instances and"
            " studies/{uid}/series/{uid}/instances/{uid} with metadata, frames/1,2, bulkdata/…, rendered or thumbnail",
        )


# --- the archive ------------------------------------------------------------------------------------------------------


class Archive:
    """A DICOMweb server: its address, this server's account there, and the connections to it.

    Args:
        url: what `--studies` names.
    """

    def __init__(self, url: str, settings: Settings) -> None:
        given = httpx.URL(url.strip().rstrip("/"))
        self.url = given.copy_with(username="", password="")  # as it may be logged
        self._base = self.url.raw_path.decode().rstrip("/")
        self._prefixes = {
            "qido": (settings.MONAI_LABEL_QIDO_PREFIX or "").strip("/"),
            "wado": (settings.MONAI_LABEL_WADO_PREFIX or "").strip("/"),
            "stow": (settings.MONAI_LABEL_STOW_PREFIX or "").strip("/"),
        }
        self._google = f".{self.url.host}".endswith(".googleapis.com")
        self._credentials: Any = None
        user = settings.MONAI_LABEL_DICOMWEB_USERNAME or given.username
        password = settings.MONAI_LABEL_DICOMWEB_PASSWORD or given.password
        # The authorities that the datastore's client (requests) trusts, so that both reach a hospital's own archive.
        trusted = os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("CURL_CA_BUNDLE")
        common: dict[str, Any] = {
            "auth": (user, password) if user and password and not self._google else None,
            "timeout": settings.MONAI_LABEL_DICOMWEB_PROXY_TIMEOUT,
            "verify": ssl.create_default_context(cafile=trusted) if trusted else True,
        }
        self._client = httpx.AsyncClient(**common)
        self._unpooled = httpx.AsyncClient(**common, limits=httpx.Limits(max_keepalive_connections=0))
        for client in (self._client, self._unpooled):
            client.headers.clear()  # the browser's count, not httpx's
        start = re.escape(self.url.netloc.decode() + self._base)
        wado = re.escape(self._prefixes["wado"])
        self._link = re.compile(rf'"https?://{start}/(?:{wado}/)?studies/'.encode())
        self._longest_link = len(f'"https://{self.url.netloc.decode()}{self._base}/{self._prefixes["wado"]}/studies/')

    def address(self, method: str, service: str, path: str, query: bytes) -> httpx.URL:
        """Where the archive answers a checked request.

        Raises:
            ValueError: the query cannot be part of an address.
        """
        if method == "POST":
            service = service and "stow"  # OHIF stores under its wado address
        elif path.endswith("metadata") and service == "qido":
            service = "wado"  # some versions of OHIF ask for metadata there
        target = "/".join(part for part in (self._base, self._prefixes.get(service), path) if part)
        try:
            return self.url.copy_with(raw_path=f"/{target.lstrip('/')}".encode() + (b"?" + query if query else b""))
        except (httpx.InvalidURL, UnicodeError) as error:
            raise ValueError(f"the query is too long or has characters that need an escape: {error}") from error

    async def send(
        self, method: str, url: httpx.URL, headers: list[tuple[bytes, bytes]], body: AsyncIterator[bytes] | None
    ) -> httpx.Response:
        """Its answer, of which the body is still to be read.

        An archive may close a connection that it kept open (Orthanc after a second without a request) just as it is
        used again. What only reads is then asked again, and what stores never goes over such a connection.

        Raises:
            httpx.RequestError: no answer.
        """
        headers = headers + httpx.Headers(await self.authorization()).raw
        if body is None:
            with suppress(httpx.ReadError, httpx.WriteError, httpx.CloseError, httpx.RemoteProtocolError):
                return await self._client.send(self._client.build_request(method, url, headers=headers), stream=True)
        outgoing = self._unpooled.build_request(method, url, headers=headers, content=body)
        return await self._unpooled.send(outgoing, stream=True)

    async def authorization(self) -> dict[str, str]:
        """A header with Google's token if the archive is Google's; httpx adds a name and password by itself."""
        if not self._google:
            return {}
        return {"authorization": f"Bearer {await run_in_threadpool(self._google_token)}"}

    def _google_token(self) -> str:
        if self._credentials is None:
            self._credentials, _ = google.auth.default(scopes=["https://www.googleapis.com/auth/cloud-platform"])
        if not self._credentials.valid:
            self._credentials.refresh(google.auth.transport.requests.Request())
        return str(self._credentials.token)

    async def with_our_links(self, chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """JSON whose links to the archive (BulkDataURI, RetrieveURL), which a browser cannot reach, lead through us."""
        pending, ours = b"", f'"{ROOT}/wado/studies/'.encode()
        async for chunk in chunks:
            pending += chunk
            # What could still become a link waits for the next chunk.
            end = max([len(pending) - self._longest_link + 1, *(m.end() for m in self._link.finditer(pending))])
            if end > 0:
                yield self._link.sub(ours, pending[:end])
                pending = pending[end:]
        yield self._link.sub(ours, pending)


# --- routes -----------------------------------------------------------------------------------------------------------


def router(archive: str, settings: Settings = server_settings) -> APIRouter:
    """Routes `/proxy/dicom/{wado|qido|stow}/{path}` and `/proxy/dicom/{path}`, as OHIF's configuration names them.

    Who may ask is decided before: nothing here looks at the user.

    Args:
        archive: what `--studies` names; if that is not a DICOMweb server, every route answers 404.
        settings: MONAI Label's: MONAI_LABEL_{QIDO,WADO,STOW}_PREFIX, MONAI_LABEL_DICOMWEB_{USERNAME,PASSWORD} and
            MONAI_LABEL_DICOMWEB_PROXY_TIMEOUT, the seconds for connecting and between two pieces of an answer.
    """
    routes = APIRouter(prefix=ROOT)
    is_dicomweb = archive.startswith(("http://", "https://")) and not settings.MONAI_LABEL_DATASTORE
    server = Archive(archive, settings) if is_dicomweb else None

    @routes.api_route("/{path:path}", methods=["GET", "HEAD", "POST"], include_in_schema=False)
    async def proxy(request: Request, path: str) -> Response:
        if server is None:
            raise HTTPException(
                404,
                "this server's studies are not a DICOMweb archive; it would be started with, for example,"
                " --studies http://127.0.0.1:8042/dicom-web",
            )
        # Whoever decodes once more on the way to the archive must not find a path other than the one checked here.
        if b"%" in request.scope.get("raw_path", b""):
            raise HTTPException(400, "DICOMweb paths have no escapes (%); they belong in the query, after the ?")
        service, resource = split(path)
        query: bytes = request.scope["query_string"]
        check(request.method, resource, query.decode("latin-1"), request.headers.get("content-type", ""))
        try:
            url = server.address(request.method, service, resource, query)
        except ValueError as error:
            raise HTTPException(400, str(error)) from error
        return await _forward(server, request, url)

    return routes


async def _forward(archive: Archive, request: Request, url: httpx.URL) -> Response:
    headers = [(key, value) for key, value in request.headers.raw if _PASSED_ON.fullmatch(key)]
    # Only what httpx can decode, because links are rewritten in the decoded text.
    gzip = "gzip" in request.headers.get("accept-encoding", "")
    headers.append((b"accept-encoding", b"gzip" if gzip else b"identity"))
    body = None
    if request.method == "POST":
        body = request.stream()
        headers += [(key, value) for key, value in request.headers.raw if key == b"content-length"]
    try:
        answer = await archive.send(request.method, url, headers, body)
    except httpx.TimeoutException as error:
        logger.warning("the DICOM archive is slow: %s: %s", type(error).__name__, _place(url))
        raise HTTPException(
            504, "the DICOM archive did not answer in time; MONAI_LABEL_DICOMWEB_PROXY_TIMEOUT sets the seconds"
        ) from error
    except (httpx.RequestError, GoogleAuthError) as error:
        logger.warning("the DICOM archive cannot be reached: %s: %s", type(error).__name__, _place(url))
        raise HTTPException(
            502, "the DICOM archive cannot be reached; the log of this server says more; whoever runs it can help"
        ) from error
    except ClientDisconnect as error:
        raise HTTPException(400, "the upload broke off; nothing was stored") from error

    refused = answer.status_code in (401, 403, 407)
    if refused or answer.has_redirect_location:
        await answer.aclose()
        # Passed on, 401 would make a browser ask for its own password again, and a redirect lead it past this proxy.
        logger.warning("the DICOM archive answers %s: %s", answer.status_code, _place(url))
        advice = (
            "refuses this server's account (MONAI_LABEL_DICOMWEB_USERNAME and MONAI_LABEL_DICOMWEB_PASSWORD)"
            if refused
            else "has moved; start this server with the new address in --studies"
        )
        raise HTTPException(502, f"the DICOM archive answers {answer.status_code}: it {advice}")
    return _passed_back(archive, answer)


def _passed_back(archive: Archive, answer: httpx.Response) -> Response:
    headers = {key: answer.headers[key] for key in _PASSED_BACK if key in answer.headers}
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    headers.setdefault("cache-control", "no-store")  # patients' data; workstations are shared
    if kind != "application/pdf":  # which browsers do not show in a sandbox
        headers["content-security-policy"] = "sandbox"  # a report in HTML must not run scripts under our origin
    if kind in ("application/dicom+json", "application/json"):
        headers.pop("content-length", None)
        headers.pop("content-encoding", None)
        chunks = archive.with_our_links(answer.aiter_bytes())
    else:
        chunks = answer.aiter_raw()

    async def body() -> AsyncIterator[bytes]:
        try:
            async for chunk in chunks:
                yield chunk
        finally:
            await answer.aclose()

    return StreamingResponse(body(), answer.status_code, headers)


def _place(url: httpx.URL) -> str:
    """The address for the log: without the query, which names patients."""
    return str(url.copy_with(query=None))
