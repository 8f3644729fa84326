"""What tests share: servers, archives, clients and drawn volumes."""

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FAULTS = pytest.StashKey[list[tuple[str, str]]]()  # what test_faults.py tried, and what was seen
