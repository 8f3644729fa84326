"""DICOM archives for tests: a real one (Orthanc with its DICOMweb plugin), one that keeps a record, and our proxy."""

from __future__ import annotations

import io
import json
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import requests
import uvicorn
from fastapi import FastAPI
from monailabel.config import Settings
from pydicom import dcmread
from pydicom.dataset import Dataset

from lib.app.web import proxy

PROGRAM = shutil.which("Orthanc") or shutil.which("Orthanc", path="/usr/sbin:/usr/local/sbin")
PLUGIN = Path("/usr/share/orthanc/plugins/libOrthancDicomWeb.so")  # where Debian and Ubuntu put it
START_SECONDS = 60
WAIT = 20  # seconds after which a test that waits for another party fails
DICOM_PARTS = 'multipart/related; type="application/dicom"; boundary=x'

needs_orthanc = pytest.mark.skipif(
    PROGRAM is None or not PLUGIN.exists(),
    reason="Orthanc with DICOMweb is not installed (Debian, Ubuntu: apt-get install orthanc orthanc-dicomweb)",
)


def free_port() -> int:
    """A port of 127.0.0.1 on which nothing listens now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


class Archive:
    """Orthanc on a free port. Use as a context manager.

    `url` is its DICOMweb address, `rest` that of its own interface, which can do anything and asks for no password.

    Args:
        folder: for its database, configuration and log; created.
        account: name and password that it asks for, else none.
    """

    def __init__(self, folder: Path, account: tuple[str, str] | None = None) -> None:
        self.folder, self.account = folder, account
        self.rest = f"http://127.0.0.1:{free_port()}"
        self.url = f"{self.rest}/dicom-web"

    def environment(self, cache: Path) -> dict[str, str]:
        """Variables of a server on this archive: its account, and the folder for what it downloads."""
        assert self.account
        return {
            "MONAI_LABEL_DICOMWEB_USERNAME": self.account[0],
            "MONAI_LABEL_DICOMWEB_PASSWORD": self.account[1],
            "MONAI_LABEL_DICOMWEB_CACHE_PATH": str(cache),
        }

    def __enter__(self) -> Archive:
        self.folder.mkdir(parents=True)
        self.start()
        return self

    def start(self) -> None:
        """Start it, also again after `stop`, on the same port."""
        assert PROGRAM, "mark the test with needs_orthanc"
        settings = {
            "StorageDirectory": str(self.folder / "storage"),
            "IndexDirectory": str(self.folder / "storage"),
            "HttpPort": int(self.rest.rpartition(":")[2]),
            "DicomServerEnabled": False,
            "RemoteAccessAllowed": False,
            "AuthenticationEnabled": self.account is not None,
            "RegisteredUsers": dict([self.account]) if self.account else {},
            "Plugins": [str(PLUGIN)],
            "DicomWeb": {"Enable": True, "Root": "/dicom-web/"},
        }
        (self.folder / "orthanc.json").write_text(json.dumps(settings))
        with (self.folder / "log").open("w") as log:
            self.process = subprocess.Popen(
                [PROGRAM, str(self.folder / "orthanc.json")], stdout=log, stderr=subprocess.STDOUT
            )
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                requests.get(f"{self.url}/studies", timeout=5, auth=self.account).raise_for_status()
                return
            except requests.RequestException:
                time.sleep(0.1)
        self.stop()
        raise AssertionError(f"Orthanc did not start:\n{(self.folder / 'log').read_text(errors='replace')}")

    def __exit__(self, *_: Any) -> None:
        self.stop()

    def stop(self) -> None:
        """Stop it."""
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def store(self, *folders: Path) -> None:
        """Store these files, and every file of these folders."""
        files = [file for f in folders for file in (sorted(f.iterdir()) if f.is_dir() else [f])]
        with requests.Session() as session:
            session.auth = self.account
            for file in files:
                session.post(f"{self.rest}/instances", data=file.read_bytes(), timeout=60).raise_for_status()

    def instances(self) -> int:
        """How many it holds."""
        return int(self._get("statistics").json()["CountInstances"])

    def segs(self) -> list[Dataset]:
        """All segmentations, as stored, the oldest first."""
        query: dict[str, Any] = {"Level": "Instance", "Query": {"Modality": "SEG"}}
        answer = requests.post(f"{self.rest}/tools/find", json=query, timeout=60, auth=self.account)
        found = [dcmread(io.BytesIO(self._get(f"instances/{i}/file").content)) for i in answer.json()]
        return sorted(found, key=lambda ds: (ds.ContentDate, float(ds.ContentTime)))

    def remove_series(self, uid: str) -> None:
        """Delete a series."""
        query: dict[str, Any] = {"Level": "Series", "Query": {"SeriesInstanceUID": uid}}
        (series,) = requests.post(f"{self.rest}/tools/find", json=query, timeout=60, auth=self.account).json()
        requests.delete(f"{self.rest}/series/{series}", timeout=60, auth=self.account).raise_for_status()

    def _get(self, path: str) -> requests.Response:
        answer = requests.get(f"{self.rest}/{path}", timeout=60, auth=self.account)
        answer.raise_for_status()
        return answer


@contextmanager
def serving(archive: str, **settings: Any) -> Iterator[str]:
    """The proxy's address, served by uvicorn as in MONAI Label's server."""
    app = FastAPI()
    app.include_router(proxy.router(archive, Settings(**settings)))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            thread.join(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/proxy/dicom"
    finally:
        server.should_exit = True
        thread.join(WAIT)


class Recorder(ThreadingHTTPServer):
    """An archive that writes down what it is asked; `answer` writes the answer."""

    daemon_threads = True

    def __init__(self) -> None:
        self.requests: list[SimpleNamespace] = []
        self.answer: Callable[[BaseHTTPRequestHandler], None] = lambda handler: reply(handler, b"[]")
        self.received = threading.Event()  # the first piece of a body
        recorder = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                length, body = int(self.headers.get("Content-Length") or 0), b""
                while len(body) < length:
                    body += self.rfile.read1(length - len(body))
                    recorder.received.set()
                recorder.requests.append(
                    SimpleNamespace(method=self.command, path=self.path, headers=self.headers, body=body)
                )
                recorder.answer(self)

            do_HEAD = do_POST = do_GET

            def log_message(self, *_: Any) -> None:
                pass

        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/dicom-web"


def once_a_connection(handler: BaseHTTPRequestHandler) -> None:
    """An `answer` of a Recorder that closes a connection instead when it is used again, as Orthanc does when its time
    is up just then."""
    if hasattr(handler, "answered"):
        handler.close_connection = True
    else:
        handler.answered = True  # type: ignore[attr-defined]
        reply(handler, b"[]")


def reply(handler: BaseHTTPRequestHandler, body: bytes, status: int = 200, **headers: str) -> None:
    handler.send_response(status)
    headers = {"Content_Type": "application/dicom+json", "Content_Length": str(len(body)), **headers}
    for key, value in headers.items():
        handler.send_header(key.replace("_", "-"), value)
    handler.end_headers()
    if handler.command != "HEAD":
        handler.wfile.write(body)
