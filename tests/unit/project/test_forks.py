"""The process that forks servers for tests outlives whoever asked it and was killed."""

from __future__ import annotations

import json
import os
import socket
import struct

import pytest

from support import forks


@pytest.mark.parametrize("sent", [b"", b"\0\0", struct.pack("!I", 10), struct.pack("!I", 10) + b"{}"])
def test_a_request_that_is_cut_off_is_none(sent: bytes) -> None:
    asking, serving = socket.socketpair(socket.AF_UNIX)
    asking.sendall(sent)
    asking.close()
    with serving:
        assert forks._receive(serving) is None


def test_a_whole_request_is_a_job_and_its_files() -> None:
    asking, serving = socket.socketpair(socket.AF_UNIX)
    body = json.dumps({"arguments": ["-V"]}).encode()
    with asking, serving, open(os.devnull) as nothing:
        socket.send_fds(asking, [struct.pack("!I", len(body))], [nothing.fileno()])
        asking.sendall(body)
        found = forks._receive(serving)
        assert found is not None
        job, files = found
        assert job == {"arguments": ["-V"]} and len(files) == 1
        os.close(files[0])
