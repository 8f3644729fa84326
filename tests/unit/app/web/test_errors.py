"""What stands in the way of a request is an answer that says so."""

from __future__ import annotations

import errno

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from filelock import Timeout

from lib.app.web.answers import Places, handle_errors
from lib.stores.errors import BusyError


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (BusyError("series 1.2.3: another request has been at work"), 503, "series 1.2.3: another request"),
        (Timeout("/models/tiny/.versions.lock"), 503, "another program has been at work on the same files"),
        (OSError(errno.ENOSPC, "no space"), 507, "the server's disk is full"),
        (OSError(errno.EACCES, "denied"), 403, "may not write there"),
        (TimeoutError("slow"), 500, "its log says more"),
    ],
)
def test_an_error_has_its_status(error: Exception, status: int, text: str) -> None:
    api = FastAPI()
    handle_errors(api, Places([], "/t"))

    @api.get("/")
    def fails() -> None:
        raise error

    answer = TestClient(api, raise_server_exceptions=False).get("/")
    assert answer.status_code == status
    assert text in answer.json()["detail"]
    assert "/models" not in answer.text, "paths of the server stay with it"
