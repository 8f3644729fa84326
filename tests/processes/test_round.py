"""A round in the process that MONAI Label's server starts for it, in the environment that users have."""

import json
import os
import socket
import subprocess
import sys
import threading
from typing import Any

import numpy as np
import pytest

from lib.model.versions import Versions
from support import ROOT
from support.helpers import write_nifti
from support.training import SMALL

GRID = np.diag([8.0, 8, 8, 1])
HIDDEN = ("MONAI_LABEL_", "PYTHONWARNINGS")  # what a developer's shell may have set
ROUND = {"model": "quickstart", "max_epochs": 1, "device": "cpu", "val_split": 0.5, "tracking": "None"}


@pytest.fixture(scope="module")
def studies(tmp_path_factory):
    """Two small cases of blocks, one for each label."""
    folder = tmp_path_factory.mktemp("process") / "studies"
    (folder / "labels" / "final").mkdir(parents=True)
    for number in range(2):
        image = np.random.default_rng(number).integers(-100, 200, (50, 48, 48)).astype(np.int16)
        label = np.zeros(image.shape, np.uint8)
        for value in range(1, 7):
            label[6 * value : 6 * value + 6, 10:30, 10:30] = value
        write_nifti(folder / f"case{number}.nii.gz", image, GRID)
        write_nifti(folder / "labels" / "final" / f"case{number}.nii.gz", label, GRID)
    return folder


@pytest.fixture(scope="module")
def tls_port():
    """Where a server with TLS listens: it hangs up on whoever speaks plain HTTP. Yields the port and the callers."""
    callers: list[Any] = []

    def hang_up() -> None:
        while True:
            try:
                caller, address = listener.accept()
            except OSError:
                return  # closed
            callers.append(address)
            caller.close()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=hang_up, daemon=True)
        thread.start()
        yield listener.getsockname()[1], callers
        listener.shutdown(socket.SHUT_RDWR)
    thread.join(10)


def train(studies, models, port, **request):
    """Run a round as the server does. Returns the finished process, its output in one text."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(HIDDEN)}
    environment |= {
        "MONAI_LABEL_APP_DIR": str(ROOT / "apps" / "bipvl"),
        "MONAI_LABEL_STUDIES": str(studies),
        "MONAI_LABEL_APP_CONF": json.dumps({"models": "quickstart", "model_dir": str(models), **SMALL}),
        "MONAI_LABEL_SERVER_PORT": str(port),
    }
    command = [sys.executable, "-m", "monailabel.interfaces.utils.app", "-m", "train"]
    command += ["-r", json.dumps({**ROUND, **request})]
    return subprocess.run(
        command, env=environment, cwd=models.parent, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def test_a_good_round_beside_a_server_with_tls_is_not_reported_as_failed(studies, tmp_path, tls_port):
    port, callers = tls_port
    done = train(studies, tmp_path / "models", port)
    assert done.returncode == 0, done.stdout[-4000:]
    assert Versions(tmp_path / "models" / "quickstart").served == 1
    assert callers == [], "a round has nothing to ask of the server that started it"
    foreign = [line for line in done.stdout.splitlines() if "deprecat" in line.lower() or "Warning:" in line]
    assert foreign == [], "what the packages say of themselves hides what is said to users"
    assert "requires_grad" not in done.stdout and "non-tuple" not in done.stdout
