"""The way to the DICOM archive: only DICOMweb passes, whole and unmixed, and nothing else does."""

from __future__ import annotations

import asyncio
import socket
import threading
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import google.auth
import pytest
import requests
from fastapi import HTTPException
from monailabel.config import Settings

from lib.app.web import proxy
from support.dicom.archive import DICOM_PARTS, WAIT, Recorder, free_port, once_a_connection, reply, serving

pytest_plugins = ("support.dicom.fixtures",)

UID = "1.2.840.10008.1"
LONGEST = "1." * 31 + "12"  # 64 characters

# --- which requests are DICOMweb --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    [
        "studies",
        "series",
        "instances",
        f"studies/{UID}",
        f"studies/{LONGEST}",
        f"studies/{UID}/metadata",
        f"studies/{UID}/series",
        f"studies/{UID}/instances",
        f"studies/{UID}/thumbnail",
        f"studies/{UID}/series/{UID}",
        f"studies/{UID}/series/{UID}/metadata",
        f"studies/{UID}/series/{UID}/rendered",
        f"studies/{UID}/series/{UID}/instances",
        f"studies/{UID}/series/{UID}/instances/{UID}",
        f"studies/{UID}/series/{UID}/instances/{UID}/metadata",
        f"studies/{UID}/series/{UID}/instances/{UID}/frames/1",
        f"studies/{UID}/series/{UID}/instances/{UID}/frames/1,2,30",
        f"studies/{UID}/series/{UID}/instances/{UID}/frames/3/rendered",
        f"studies/{UID}/series/{UID}/instances/{UID}/bulkdata",
        f"studies/{UID}/series/{UID}/instances/{UID}/bulk/7fe00010",
        f"studies/{UID}/series/{UID}/instances/{UID}/bulk/00540016/1/00181072",
        f"studies/{UID}/bulkdata/a1b2-c3.raw",
    ],
)
def test_paths_of_dicomweb_pass(path: str) -> None:
    proxy.check("GET", path)
    proxy.check("HEAD", path)


@pytest.mark.parametrize(
    "path",
    [
        "",
        "system",
        "patients",
        "tools/bulk-delete",
        "../instances",
        "studies/..",
        "studies/../../system",
        f"studies/{UID}/..",
        f"studies/{UID}/../../../system",
        f"studies/{UID}/bulkdata/../../../../system",
        f"studies/{UID}/bulkdata/..",
        f"studies/{UID}/bulkdata/a..b",
        "studies/.",
        "studies/1..2",
        "studies/.1",
        "studies/1.",
        f"studies/{LONGEST}3",
        "studies/abc",
        "studies/١",  # a digit, but not one of DICOM's
        "studies/",
        "/studies",
        "studies//series",
        f"studies//{UID}",
        f"studies/{UID}/series/{UID}/reject/113039^DCM",
        f"studies/{UID}/series/{UID}/instances/{UID}/frames/",
        f"studies/{UID}/series/{UID}/instances/{UID}/frames/1,",
        f"studies/{UID}/series/{UID}/instances/{UID}/frames/1/../../../..",
        "studies%2f1",
        "studies/%2e%2e/system",
        "studies\\1",
        "studies\n",
        "studies\x00",
        "studies;a=b",
        "studies?PatientID=1",
        "studies#x",
        "http://elsewhere.example/studies",
        "wado",  # WADO-URI without a query
        "wado/../system",
    ],
)
def test_other_paths_are_refused(path: str) -> None:
    with pytest.raises(HTTPException) as refusal:
        proxy.check("GET", path)
    assert refusal.value.status_code == 400


def test_wado_uri_names_what_it_wants_in_the_query() -> None:
    proxy.check("GET", "wado", f"requestType=WADO&studyUID={UID}&seriesUID={UID}&objectUID={UID}")
    with pytest.raises(HTTPException, match="requestType=WADO"):
        proxy.check("GET", "wado", "requestType=DELETE")


@pytest.mark.parametrize(
    ("path", "content_type"),
    [
        ("studies", DICOM_PARTS),
        (f"studies/{UID}", DICOM_PARTS),
        ("studies", "multipart/related; boundary=x; type=application/dicom+json"),
        ("studies", "Application/DICOM"),
    ],
)
def test_dicom_can_be_stored(path: str, content_type: str) -> None:
    proxy.check("POST", path, content_type=content_type)


@pytest.mark.parametrize(
    ("path", "content_type", "status"),
    [
        ("studies", "application/json", 415),
        ("studies", "application/x-www-form-urlencoded", 415),
        ("studies", 'multipart/form-data; type="application/dicom"', 415),
        ("studies", 'multipart/related; type="text/html"', 415),
        ("studies", "multipart/related; boundary=x", 415),
        ("studies", "", 415),
        ("series", DICOM_PARTS, 405),
        (f"studies/{UID}/series", DICOM_PARTS, 405),
        (f"studies/{UID}/series/{UID}/reject/113039^DCM", DICOM_PARTS, 405),
        ("tools/bulk-delete", DICOM_PARTS, 405),
    ],
)
def test_nothing_else_can_be_posted(path: str, content_type: str, status: int) -> None:
    with pytest.raises(HTTPException) as refusal:
        proxy.check("POST", path, content_type=content_type)
    assert refusal.value.status_code == status


# --- the proxy beside an archive that keeps a record ------------------------------------------------------------------


def test_query_arrives_whole(recorder: Recorder) -> None:
    query = "PatientName=M%C3%BCller%5EA*&includefield=00081030%2C00080060&PatientID=a%26b%2Fc&fuzzymatching=true&x="
    with serving(recorder.url) as url:
        assert requests.get(f"{url}/qido/studies?{query}", timeout=WAIT).json() == []
    assert recorder.requests[0].path == f"/dicom-web/studies?{query}"


def test_prefixes_follow_what_is_asked(recorder: Recorder) -> None:
    prefixes = {f"MONAI_LABEL_{name}_PREFIX": f"{name.lower()}-rs" for name in ("QIDO", "WADO", "STOW")}
    with serving(recorder.url, **prefixes) as url:
        for path in ("qido/studies", "wado/studies/1", "qido/studies/1/metadata", "studies/1", "wado?requestType=WADO"):
            requests.get(f"{url}/{path}", timeout=WAIT).raise_for_status()
        for path in ("stow/studies", "wado/studies"):  # OHIF stores under its wado address
            requests.post(f"{url}/{path}", b"x", headers={"Content-Type": DICOM_PARTS}, timeout=WAIT)
    assert [r.path.removeprefix("/dicom-web/") for r in recorder.requests] == [
        *("qido-rs/studies", "wado-rs/studies/1", "wado-rs/studies/1/metadata", "studies/1", "wado?requestType=WADO"),
        *("stow-rs/studies", "stow-rs/studies"),
    ]


def test_annotators_credentials_stay_here(recorder: Recorder) -> None:
    sent = {
        "Authorization": "Bearer of-the-annotator",
        "Cookie": "session=of-the-annotator",
        "X-Forwarded-For": "192.0.2.7",
        "X-Api-Key": "of-the-annotator",
        "Origin": "http://viewer.example",
        "Connection": "X-Custom",
        "X-Custom": "1",
        "Accept": "application/dicom+json",
        "Range": "bytes=0-9",
        "If-None-Match": '"a"',
    }
    account = {"MONAI_LABEL_DICOMWEB_USERNAME": "server", "MONAI_LABEL_DICOMWEB_PASSWORD": "of-the-server"}
    with serving(recorder.url, **account) as url:
        requests.get(f"{url}/qido/studies", headers=sent, timeout=WAIT).raise_for_status()
    headers = recorder.requests[0].headers
    assert "of-the-annotator" not in str(headers)
    assert headers["Authorization"] == requests.auth._basic_auth_str("server", "of-the-server")
    assert {key.lower() for key in headers} == {
        *("host", "authorization", "accept", "accept-encoding", "range", "if-none-match")
    }


def test_log_has_neither_patients_nor_passwords(recorder: Recorder, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    recorder.answer = lambda handler: reply(handler, b"", 401)
    with serving(recorder.url.replace("//", "//server:of-the-server@")) as url:
        requests.get(f"{url}/qido/studies?PatientName=Doe", timeout=WAIT)
    assert recorder.requests[0].headers["Authorization"] == requests.auth._basic_auth_str("server", "of-the-server")
    text = "\n".join(record.getMessage() for record in caplog.records if not record.name.startswith("uvicorn"))
    assert "the DICOM archive answers 401" in text
    assert "Doe" not in text and "of-the-server" not in text


def test_google_gets_a_token_of_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    class Credentials:
        valid, token = False, None

        def refresh(self, _: Any) -> None:
            self.valid, self.token = True, "of-the-server"

    monkeypatch.setattr(google.auth, "default", lambda scopes: (Credentials(), "project"))
    google_archive = proxy.Archive("https://healthcare.googleapis.com/v1/projects/p/dicomWeb", Settings())
    assert asyncio.run(google_archive.authorization()) == {"authorization": "Bearer of-the-server"}
    other = proxy.Archive("https://archive.example/healthcare.googleapis.com", Settings())
    assert asyncio.run(other.authorization()) == {}


def test_answers_carry_content_and_nothing_about_the_archive(recorder: Recorder) -> None:
    recorder.answer = lambda handler: reply(
        handler,
        b"<script>",
        Content_Type="text/html",
        ETag='"a"',
        Keep_Alive="timeout=1",
        Server="Orthanc",
        Set_Cookie="session=of-the-archive",
        Access_Control_Allow_Origin="*",
    )
    with serving(recorder.url) as url:
        answer = requests.get(f"{url}/wado/studies/1/rendered", timeout=WAIT)
    assert answer.content == b"<script>"
    headers = {key.lower(): value for key, value in answer.headers.items() if key.lower() not in ("date", "server")}
    assert headers == {
        "content-type": "text/html",
        "content-length": "8",
        "etag": '"a"',
        "cache-control": "no-store",
        "content-security-policy": "sandbox",  # its scripts do not run
    }
    assert answer.headers["server"] == "uvicorn"


def test_head_asks_for_the_head(recorder: Recorder) -> None:
    recorder.answer = lambda handler: reply(handler, b"12345", Content_Type="application/dicom")
    with serving(recorder.url) as url:
        answer = requests.head(f"{url}/wado/studies/1", timeout=WAIT)
    assert (answer.status_code, answer.headers["content-length"], answer.content) == (200, "5", b"")
    assert recorder.requests[0].method == "HEAD"


@pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH", "OPTIONS"])
def test_other_methods_never_reach_the_archive(recorder: Recorder, method: str) -> None:
    with serving(recorder.url) as url:
        assert requests.request(method, f"{url}/wado/studies/1", timeout=WAIT).status_code == 405
    assert recorder.requests == []


@pytest.mark.parametrize("status", [401, 403])
def test_refusal_by_the_archive_is_no_question_for_the_browser(recorder: Recorder, status: int) -> None:
    recorder.answer = lambda handler: reply(handler, b"", status, WWW_Authenticate='Basic realm="archive"')
    with serving(recorder.url) as url:
        answer = requests.get(f"{url}/qido/studies", timeout=WAIT)
    assert answer.status_code == 502
    assert "MONAI_LABEL_DICOMWEB_USERNAME" in answer.json()["detail"]
    assert "www-authenticate" not in answer.headers


def test_redirects_are_not_followed(recorder: Recorder) -> None:
    recorder.answer = lambda handler: reply(handler, b"", 302, Location=f"{recorder.url}/../system")
    with serving(recorder.url) as url:
        answer = requests.get(f"{url}/qido/studies", timeout=WAIT, allow_redirects=False)
    assert (answer.status_code, len(recorder.requests)) == (502, 1)
    assert "--studies" in answer.json()["detail"]


def test_other_answers_of_the_archive_pass(recorder: Recorder) -> None:
    recorder.answer = lambda handler: reply(handler, b'{"error":"no such study"}', 404)
    with serving(recorder.url) as url:
        answer = requests.get(f"{url}/wado/studies/1", timeout=WAIT)
    assert (answer.status_code, answer.json()) == (404, {"error": "no such study"})


def test_archive_that_is_down() -> None:
    with serving(f"http://user:secret@127.0.0.1:{free_port()}/dicom-web") as url:
        answer = requests.get(f"{url}/qido/studies", timeout=WAIT)
    assert answer.status_code == 502
    assert "cannot be reached" in answer.json()["detail"]
    assert "secret" not in answer.text


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST"])
def test_archive_closes_a_connection_just_as_it_is_used_again(recorder: Recorder, method: str) -> None:
    recorder.answer = once_a_connection
    headers = {"Content-Type": DICOM_PARTS}
    with serving(recorder.url) as url:
        answers = [requests.request(method, f"{url}/studies", headers=headers, timeout=WAIT) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200, 200, 200]
    assert len(recorder.requests) == (3 if method == "POST" else 4)


def test_archive_that_never_answers_is_asked_twice(recorder: Recorder) -> None:
    recorder.answer = lambda handler: setattr(handler, "close_connection", True)
    with serving(recorder.url) as url:
        answer = requests.get(f"{url}/qido/studies", timeout=WAIT)
    assert (answer.status_code, len(recorder.requests)) == (502, 2)


def test_archive_that_is_slow(recorder: Recorder) -> None:
    done = threading.Event()
    recorder.answer = lambda handler: (done.wait(WAIT), reply(handler, b"[]"))[1]
    with serving(recorder.url, MONAI_LABEL_DICOMWEB_PROXY_TIMEOUT=0.2) as url:
        answer = requests.get(f"{url}/qido/studies", timeout=WAIT)
        done.set()
    assert answer.status_code == 504
    assert "MONAI_LABEL_DICOMWEB_PROXY_TIMEOUT" in answer.json()["detail"]


def test_slow_answers_hold_up_no_others(recorder: Recorder) -> None:
    release = threading.Event()

    def answer(handler: BaseHTTPRequestHandler) -> None:
        if "slow" in handler.path:
            assert release.wait(WAIT)
        reply(handler, b"[]")

    recorder.answer = answer
    with serving(recorder.url) as url:
        slow: list[int] = []
        thread = threading.Thread(
            target=lambda: slow.append(requests.get(f"{url}/qido/studies?slow", timeout=WAIT).status_code)
        )
        thread.start()
        assert requests.get(f"{url}/qido/studies?quick", timeout=WAIT / 2).status_code == 200
        assert slow == []
        release.set()
        thread.join(WAIT)
    assert slow == [200]


def test_answers_are_streamed(recorder: Recorder) -> None:
    """The archive sends the second half only once the browser has the first."""
    seen, half = threading.Event(), b"x" * 300_000

    def answer(handler: BaseHTTPRequestHandler) -> None:
        reply(handler, half, Content_Type="application/octet-stream", Content_Length=str(2 * len(half)))
        if seen.wait(WAIT):
            handler.wfile.write(half)

    recorder.answer = answer
    with serving(recorder.url) as url, requests.get(f"{url}/wado/studies/1", stream=True, timeout=WAIT) as response:
        assert response.headers["content-length"] == str(2 * len(half))
        assert len(response.raw.read(len(half))) == len(half)
        seen.set()
        assert response.raw.read() == half


def test_answer_that_breaks_off_is_seen_to(recorder: Recorder) -> None:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        reply(handler, b"half", Content_Type="application/octet-stream", Content_Length="8")
        handler.close_connection = True

    recorder.answer = answer
    with serving(recorder.url) as url, pytest.raises(requests.exceptions.ChunkedEncodingError):
        requests.get(f"{url}/wado/studies/1", timeout=WAIT)


def test_uploads_are_streamed(recorder: Recorder) -> None:
    """The browser sends the second half only once the archive has the first."""
    half = b"x" * 300_000
    with (
        serving(recorder.url) as url,
        socket.create_connection(("127.0.0.1", urlsplit(url).port), timeout=WAIT) as browser,
    ):
        head = (
            f"POST /proxy/dicom/studies HTTP/1.1\r\nHost: a\r\nConnection: close\r\n"
            f"Content-Type: {DICOM_PARTS}\r\nContent-Length: {2 * len(half)}\r\n\r\n"
        )
        browser.sendall(head.encode() + half)
        assert recorder.received.wait(WAIT)
        browser.sendall(half)
        assert browser.makefile("rb").read().startswith(b"HTTP/1.1 200")
    assert recorder.requests[0].body == half + half
    assert recorder.requests[0].headers["Content-Type"] == DICOM_PARTS


def test_folder_of_studies_has_no_archive(tmp_path: Path) -> None:
    with serving(str(tmp_path)) as url:
        answer = requests.get(f"{url}/qido/studies", timeout=WAIT)
    assert answer.status_code == 404
    assert "this server's studies are not a DICOMweb archive" in answer.json()["detail"]
