"""Shared fixtures: the app's modules are importable as `lib`, real volumes are found beside the repository."""

import os
from pathlib import Path

import pytest

from lib.volumes.phantoms.studies import write_studies
from support import FAULTS, ROOT

os.environ["HF_HUB_OFFLINE"] = "1"  # no test may reach for a hub; read when transformers is imported
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

pytest.register_assert_rewrite("support.browser")  # what failed is said there as in tests


def pytest_configure(config: pytest.Config) -> None:
    config.stash[FAULTS] = []


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
def studies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three phantoms with labels; tests do not change them."""
    folder = tmp_path_factory.mktemp("studies")
    write_studies(folder, cases=3, labelled=3, seed=1)
    return folder
