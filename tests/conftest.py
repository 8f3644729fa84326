"""Shared fixtures: the app's modules are importable as `lib`, real volumes are found beside the repository."""

from __future__ import annotations

import gc
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from lib.volumes.phantoms.studies import write_studies
from support import FAULTS, ROOT

os.environ["HF_HUB_OFFLINE"] = "1"  # no test may reach for a hub; read when transformers is imported
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ["COLUMNS"] = (
    "400"  # no sentence that a test looks for is broken into lines; rich reads it when it is imported
)
# One thread each, here and in every process that tests start: there is one worker per core, and the networks are tiny.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.register_at_fork(after_in_child=gc.disable)  # a collection would copy the whole heap into the child

# The files that take longest, longest first: whole files go to workers in this order, so that all end together. If a
# name is wrong or missing, a run takes longer, and nothing else.
LONGEST = (
    "processes/test_server.py",
    "processes/test_faults.py",
    "processes/web/test_web_schema.py",
    "browser/test_ohif_loop.py",
    "browser/test_ohif_clicks.py",
    "browser/test_ohif_review.py",
    "browser/test_first_case.py",
    "processes/test_scoring_server.py",
    "processes/clients/test_load.py",
    "processes/install/test_deployment.py",
    "benchmarks/test_text_moves.py",
    "browser/test_ohif.py",
    "processes/dicom/test_property.py",
    "browser/test_ohif_export.py",
    "benchmarks/test_accuracy.py",
    "processes/clients/test_slicer.py",
    "processes/dicom/test_dicom_server.py",
)

pytest.register_assert_rewrite("support.clients.browser", "support.endpoint")  # what failed is said there as in tests


def pytest_configure(config: pytest.Config) -> None:
    config.stash[FAULTS] = []


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    rank = {ROOT / "tests" / name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path, len(rank)))


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["faults"] = session.config.stash[FAULTS]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """What the workers of pytest-xdist have tried is told in one place."""
    node.config.stash[FAULTS] += map(tuple, getattr(node, "workeroutput", {}).get("faults", []))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if config.stash[FAULTS]:
        terminalreporter.section("faults tried and survived")
    for fault, seen in config.stash[FAULTS]:
        terminalreporter.write_line(f"{fault:<52} {seen}")


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of real volumes (BIPVL_DATA, or ../shared/data beside the repository)."""
    folder = Path(os.environ.get("BIPVL_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real volumes at {folder}; set BIPVL_DATA to run this test")
    return folder


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., None]:
    """Writes what `write_studies` writes. A phantom takes seconds to draw: each is drawn once for all workers."""
    root = tmp_path_factory.getbasetemp()
    drawn = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "phantoms"

    def write(folder: Path, cases: int, labelled: int, seed: int = 1) -> None:
        with FileLock(f"{drawn}-{seed}.lock"):  # those that are there are left alone
            images = write_studies(drawn / str(seed), cases=cases, labelled=cases, seed=seed)
        files = [*images, *(image.parent / "labels" / "final" / image.name for image in images[:labelled])]
        for file in files:
            target = folder / file.relative_to(drawn / str(seed))
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)

    return write


@pytest.fixture(scope="session")
def studies(tmp_path_factory: pytest.TempPathFactory, phantoms: Callable[..., None]) -> Path:
    """Three phantoms with labels; tests do not change them."""
    folder = tmp_path_factory.mktemp("studies")
    phantoms(folder, cases=3, labelled=3)
    return folder
