"""The program that drafts sentences, killed while it waits for an answer."""

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

from lib.tasks.check import check
from support import ROOT
from support.endpoint import KEY, MODEL, TASK, drafted, good

pytest_plugins = ("support.endpoint",)


@contextmanager
def program(endpoint, out):
    command = [sys.executable, str(ROOT / "apps" / "bipvl" / "main.py"), "concepts", "generate", "quickstart"]
    environment = {"OPENAI_API_KEY": KEY, "OPENAI_BASE_URL": endpoint.url, "OPENAI_MODEL": MODEL}
    process = subprocess.Popen(
        [*command, "--out", str(out)],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def test_a_killed_run_goes_on_where_it_was(endpoint, out):
    """The real program, configured by its environment, killed while the fourth class is asked for."""
    hanging = threading.Event()
    endpoint.script = [good, good, good, lambda name: hanging.wait(60) and good(name)]
    with program(endpoint, out) as process:
        deadline = time.monotonic() + 120
        while len(endpoint.requests) < 4 and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    hanging.set()
    assert endpoint.asked() == list(TASK.classes)[:4] and not out.exists()
    endpoint.requests.clear()
    endpoint.script.clear()
    with program(endpoint, out) as process:
        output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert endpoint.asked() == list(TASK.classes)[3:]
    assert check(drafted(out)) == [] and [p for p in out.parent.iterdir() if p.suffix == ".part"] == []
