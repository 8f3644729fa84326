"""Measurements, run by hand from the repository's root: `python -m benchmarks.<area>.<what>`."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "apps" / "bipvl"))  # the app's modules are `lib`
