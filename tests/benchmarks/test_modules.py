"""Benchmarks start as documents say: from the repository's root, with no path set by hand."""

import os
import subprocess
import sys

from benchmarks import ROOT


def test_every_module_starts_without_a_path_set_by_hand():
    modules = [
        ".".join(file.relative_to(ROOT).with_suffix("").parts)
        for file in sorted((ROOT / "benchmarks").rglob("*.py"))
        if not file.name.startswith("__")
    ]
    assert "benchmarks.speed.serving" in modules
    code = "\n".join(f"import {module}" for module in modules)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
