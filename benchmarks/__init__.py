"""Measurements, run by hand from the repository's root: `python -m benchmarks.<area>.<what>`."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# The app's modules are `lib`; `support` starts the servers and archives of the tests.
sys.path[:0] = [str(ROOT / "apps" / "bipvl"), str(ROOT / "tests")]
