"""A real server process for tests: `monailabel start_server --app apps/bipvl` on a free port."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import requests
from monailabel.client import MONAILabelClient

from support import ROOT, forks

START_SECONDS = 240
ELSEWHERE = "203.0.113.7"


class Server:
    """Use as a context manager; `client` is MONAI Label's own.

    Args:
        studies: folder of images, or address of a DICOMweb archive.
        models: folder for the app's models, so that tests never touch those in the app.
        conf: what `--conf` passes on.
        faketime: run with the clock moved by this much, e.g. "+1y" (needs libfaketime).
        environment: variables to set or, with None, to remove.
    """

    plain = not forks.AVAILABLE

    def __init__(
        self,
        studies: Path | str,
        models: Path,
        conf: dict[str, str],
        *,
        faketime: str | None = None,
        **environment: str | None,
    ) -> None:
        self.log = models.parent / f"server-{models.name}-{time.monotonic_ns()}.log"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        launcher = Path(sys.executable).with_name("monailabel")
        command = [str(launcher)] if launcher.exists() else [sys.executable, "-m", "monailabel.main"]
        command += ["start_server", "--app", str(ROOT / "apps" / "bipvl"), "--studies", str(studies)]
        command += ["--host", "127.0.0.1", "--port", str(self.port)]
        # Scoring in the background would take the time of tests that are about something else.
        for key, value in {"model_dir": str(models), "score_cases": "0", **conf}.items():
            command += ["--conf", key, value]
        if faketime:  # not through the program faketime: it would be stopped in the server's place
            (library,) = Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1")
            environment |= {"LD_PRELOAD": str(library), "FAKETIME": faketime}
            environment["FAKETIME_DONT_FAKE_MONOTONIC"] = "1"  # else waits with a timeout never end
        env = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
        env |= {k: v for k, v in environment.items() if v is not None}
        self.command, self.env = command, {k: v for k, v in env.items() if environment.get(k, "") is not None}
        self.plain = self.plain or faketime is not None
        self.process: subprocess.Popen[bytes] | forks.Forked
        # A folder of its own: results keep the name of the server's temporary file, which the server then deletes.
        self.client = MONAILabelClient(f"http://127.0.0.1:{self.port}", tmpdir=str(models.parent / "received"))

    def __enter__(self) -> Server:
        with self.log.open("w") as log:
            if self.plain:
                self.process = subprocess.Popen(self.command, stdout=log, stderr=subprocess.STDOUT, env=self.env)
            else:
                words = self.command[self.command.index("start_server") :]
                with open(os.devnull) as nothing:
                    self.process = forks.Forked(["-m", "monailabel.main", *words], self.env, (nothing, log, log))
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise AssertionError(f"the server stopped with {self.process.returncode}:\n{self.tail()}")
            try:
                if requests.get(f"http://127.0.0.1:{self.port}/info/", timeout=5).status_code in (200, 401):
                    return self
            except requests.RequestException:
                time.sleep(0.1)
        self.__exit__()
        raise AssertionError(f"no answer in {START_SECONDS} s:\n{self.tail()}")

    def __exit__(self, *_: Any) -> None:
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def call(
        self, method: str, path: str, elsewhere: bool = False, headers: dict[str, str] | None = None, **more: Any
    ) -> requests.Response:
        """A request; `elsewhere`: as from another machine (uvicorn believes a proxy on this one)."""
        origin = {"X-Forwarded-For": ELSEWHERE} if elsewhere else {}
        return requests.request(method, self.url + path, headers={**origin, **(headers or {})}, timeout=120, **more)

    def tail(self, lines: int = 40) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def train(self, model: str, seconds: float, **params: Any) -> dict[str, Any]:
        """Press train, wait, and return the final status."""
        self.client.train_start(model, params)
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            status = self.client.train_status()
            if status["status"] not in ("SUBMITTED", "RUNNING"):
                return status
            time.sleep(0.2)
        raise AssertionError(f"training took over {seconds} s:\n{self.tail()}")


class PlainServer(Server):
    """The very command, which imports everything itself. Another server is forked from a process that has imported the
    packages (support/forks.py), and so are its rounds."""

    plain = True


def add_case(studies: Path, image: Path, case: str) -> None:
    """Put an image into a studies folder under an id of its own."""
    studies.mkdir(parents=True, exist_ok=True)
    shutil.copy(image, studies / f"{case}.nii.gz")
