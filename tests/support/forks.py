"""Processes that start without importing: one process imports torch, MONAI and the like once, and forks all others.

A server or a training round takes some twenty seconds of a core to import what it needs, and a second to do what most
tests ask of it. Whatever is forked here is a process of its own all the same, with its own arguments, environment and
files, and it imports MONAI Label and this app itself: only the packages below them are shared. The process that forks
computes nothing, so a forked one starts with no thread but its own.

The server starts its rounds with `sys.executable`. In a forked server that is a small program that has the round forked
as well and stays in its place until the round ends; who kills it kills the round.

As a program, with the packages of the standard library only:
    forks.py serve FOLDER OWNER         fork on demand, until the process OWNER ends
    forks.py run FOLDER ARGUMENTS...    like `python ARGUMENTS...`
"""

from __future__ import annotations

import fcntl
import gc
import importlib
import json
import os
import runpy
import selectors
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

START_SECONDS = 240
AVAILABLE = hasattr(os, "pidfd_open")  # Linux
FORKED = "monailabel.interfaces.utils.app"  # the module of which a server starts rounds and scoring
# What the app and MONAI Label import, and what takes long. Something missing here costs time, nothing else.
PACKAGES = """
    torch torch.utils.tensorboard torch.distributed torchvision torchvision.utils monai monai.apps monai.bundle
    monai.data monai.engines monai.handlers monai.inferers monai.losses monai.metrics monai.networks.nets
    monai.transforms monai.visualize ignite.engine ignite.handlers ignite.contrib.handlers mlflow openai
    openai.types.chat transformers transformers.models.bert.modeling_bert transformers.models.auto.tokenization_auto
    sklearn.manifold matplotlib.figure matplotlib.pyplot highdicom highdicom.seg highdicom.sr pydicom pydicom_seg itk
    SimpleITK nibabel nrrd skimage.measure skimage.color scipy.interpolate scipy.stats scipy.ndimage shapely.geometry
    dicomweb_client dicomweb_client.ext.gcp.session_utils fastapi fastapi.openapi.docs fastapi.staticfiles uvicorn
    uvicorn.protocols.http.auto uvicorn.lifespan.on uvicorn.loops.auto pydantic_settings cachetools filelock bcrypt jwt
    jinja2 requests_toolbelt schedule timeloop watchdog.observers watchdog.observers.polling multipart passlib.context
    girder_client expiring_dict numpymaxflow rich.table rich.progress typer tqdm psutil httpx
""".split()  # noqa: SIM905  as text, for its length


class Forked:
    """A process that behaves as `python ARGUMENTS...` does, with the interface of `subprocess.Popen`.

    Args:
        arguments: `-m MODULE ...`, or a script and what it is told.
        environment: all its variables.
        files: its standard input, output and error.
        folder: of the process that forks; by default that of these tests, started when it is needed.

    Its number stays its own until somebody learns how it ended and this object is gone; a process whose object is gone
    is killed.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        files: tuple[int | IO[Any], int | IO[Any], int | IO[Any]],
        folder: Path | None = None,
    ) -> None:
        self.returncode: int | None = None
        self._answers = b""
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(str((folder or _forking()) / "socket"))
        job = {"arguments": list(arguments), "environment": dict(environment), "folder": os.getcwd()}
        body = json.dumps(job).encode()
        numbers = [file if isinstance(file, int) else file.fileno() for file in files]
        socket.send_fds(self._socket, [struct.pack("!I", len(body))], numbers)
        self._socket.sendall(body)
        pid = self._answer(START_SECONDS)
        assert pid, "nothing was forked"
        self.pid = pid

    def poll(self) -> int | None:
        """How it ended, as Popen says it; None while it runs."""
        if self.returncode is None:
            self.returncode = self._answer(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end; subprocess.TimeoutExpired after so many seconds."""
        if self.returncode is None:
            self.returncode = self._answer(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _answer(self, seconds: float | None) -> int | None:
        """The next number that the process that forks tells, or None if it tells none in so many seconds."""
        end = None if seconds is None else time.monotonic() + seconds
        while b"\n" not in self._answers:
            self._socket.settimeout(None if end is None else max(0.0, end - time.monotonic()))
            try:
                received = self._socket.recv(64)
            except (BlockingIOError, TimeoutError):
                return None
            if not received:
                raise RuntimeError("the process that forks has ended")
            self._answers += received
        line, _, self._answers = self._answers.partition(b"\n")
        return int(line)


def _forking() -> Path:
    """The folder of the process that forks for these tests, all workers of pytest-xdist together."""
    owner = os.getppid() if "PYTEST_XDIST_WORKER" in os.environ else os.getpid()
    folder = Path(tempfile.gettempdir(), f"bipvl-forks-{owner}")
    folder.mkdir(mode=0o700, exist_ok=True)
    assert folder.stat().st_uid == os.getuid(), f"{folder} belongs to somebody else"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "socket").exists():
            command = [sys.executable, __file__, "serve", str(folder), str(owner)]
            environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
            environment["OPENBLAS_NUM_THREADS"] = "1"  # it would start threads at its import
            with (folder / "log").open("w") as log:
                process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True
                )
            deadline = time.monotonic() + START_SECONDS
            while not (folder / "socket").exists():
                alive = process.poll() is None and time.monotonic() < deadline
                assert alive, f"the process that forks did not start:\n{(folder / 'log').read_text()}"
                time.sleep(0.05)
    return folder


# The process that forks -----------------------------------------------------------------------------------------------


class _Child:
    def __init__(self, pid: int, connection: socket.socket) -> None:
        self.pid, self.connection, self.pidfd = pid, connection, os.pidfd_open(pid)


def _serve(folder: Path, owner: int) -> dict[str, Any] | None:
    """Fork until the owner ends. Returns the job in a forked process, None in this one."""
    owner_fd = os.pidfd_open(owner)
    _launcher(folder)
    for name in PACKAGES:
        try:
            importlib.import_module(name)
        except ImportError as error:
            print(f"{name}: {error}", flush=True)
    threads = len(os.listdir("/proc/self/task"))
    print(f"{threads} thread(s)", flush=True)
    gc.collect()
    gc.freeze()  # what is shared stays shared: no later collection writes to it

    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(folder / "socket.new"))
    listener.listen(64)
    os.rename(folder / "socket.new", folder / "socket")
    selector, children = selectors.DefaultSelector(), set[_Child]()
    selector.register(owner_fd, selectors.EVENT_READ, "owner")
    selector.register(listener, selectors.EVENT_READ, "job")
    while True:
        for key, _ in selector.select():
            if key.data == "owner":
                for child in children:
                    os.kill(child.pid, signal.SIGKILL)
                shutil.rmtree(folder, ignore_errors=True)
                return None
            if key.data == "job":
                connection = listener.accept()[0]
                received = _receive(connection)
                if received is None:
                    connection.close()
                    continue
                job, files = received
                pid = os.fork()
                if pid == 0:
                    for number, fd in enumerate(files):
                        os.dup2(fd, number)
                    selector.close()
                    for thing in (listener, connection, *(child.connection for child in children)):
                        thing.close()
                    for fd in (*files, owner_fd, *(child.pidfd for child in children)):
                        os.close(fd)
                    return {**job, "python": str(folder / "python")}
                for fd in files:
                    os.close(fd)
                child = _Child(pid, connection)
                children.add(child)
                selector.register(child.pidfd, selectors.EVENT_READ, child)
                selector.register(connection, selectors.EVENT_READ, child)
                _tell(child, pid)
            elif key.fd == key.data.pidfd and key.data in children:
                end = os.waitid(os.P_PID, key.data.pid, os.WEXITED | os.WNOWAIT)
                assert end is not None
                selector.unregister(key.data.pidfd)
                _tell(key.data, end.si_status if end.si_code == os.CLD_EXITED else -end.si_status)
            elif key.data in children:  # nobody holds the other end any more
                child = key.data
                os.kill(child.pid, signal.SIGKILL)  # in vain if it has ended, as it is waited for only here
                os.waitpid(child.pid, 0)
                if child.pidfd in selector.get_map():
                    selector.unregister(child.pidfd)
                selector.unregister(child.connection)
                child.connection.close()
                os.close(child.pidfd)
                children.remove(child)


def _receive(connection: socket.socket) -> tuple[dict[str, Any], list[int]] | None:
    """A job and its three files; None if whoever asked was killed meanwhile."""
    files: list[int] = []
    try:
        head, files, _, _ = socket.recv_fds(connection, 4, 3)
        body = b""
        if len(head) == 4:
            (left,) = struct.unpack("!I", head)
            while left > len(body) and (part := connection.recv(left - len(body))):
                body += part
            if left == len(body):
                return json.loads(body), files
    except OSError:
        pass
    for fd in files:
        os.close(fd)
    return None


def _tell(child: _Child, number: int) -> None:
    try:
        child.connection.sendall(b"%d\n" % number)
    except OSError:  # the other end is gone, which the selector tells next
        return


def _launcher(folder: Path) -> None:
    """What a forked process takes for its Python."""
    text = f'#!/bin/sh\nexec "{sys.executable}" -IS "{Path(__file__).resolve()}" run "{folder}" "$@"\n'
    (folder / "python").write_text(text)
    (folder / "python").chmod(0o700)


def _become(job: dict[str, Any], own: str) -> None:
    """Run what the job names, as the main program of this process."""
    arguments, environment = job["arguments"], job["environment"]
    os.environ.clear()
    os.environ.update(environment)
    time.tzset()  # read once, else
    tempfile.tempdir = None  # likewise: TMPDIR may have changed
    os.chdir(job["folder"])
    sys.executable = job["python"]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    threads = environment.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0))
    sys.modules["torch"].set_num_threads(int(threads))
    sys.modules["numpy"].random.seed()  # else all would draw the same numbers
    first = job["folder"] if arguments[0] == "-m" else str(Path(arguments[0]).resolve().parent)
    added = [entry for entry in environment.get("PYTHONPATH", "").split(os.pathsep) if entry]
    sys.path[:] = [first, *added, *(entry for entry in sys.path if entry != own)]
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        runpy.run_path(arguments[0], run_name="__main__")


def _run(folder: Path, arguments: list[str]) -> None:
    """In the place of a forked process's Python: have it forked, pass signals on, end as it ends."""
    if arguments[:2] != ["-m", FORKED]:
        os.execv(sys.executable, [sys.executable, *arguments])
    process = Forked(arguments, os.environ, (0, 1, 2), folder)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: process.send_signal(number))
    code = process.wait()
    if code < 0:
        signal.signal(-code, signal.SIG_DFL) if -code != signal.SIGKILL else None
        os.kill(os.getpid(), -code)
    os._exit(code)


def main() -> None:
    command, folder = sys.argv[1], Path(sys.argv[2])
    if command == "run":
        _run(folder, sys.argv[3:])
        return
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    own = sys.path.pop(0)
    if job := _serve(folder, int(sys.argv[3])):
        _become(job, own)


if __name__ == "__main__":
    main()
