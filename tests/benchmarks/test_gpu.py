"""The command that fills every row of a GPU: what is done stays, what is not goes on, and nothing outlives its time."""

import importlib
import json
import time
from typing import Any

import psutil
import pytest
from typer.main import get_command

from benchmarks import gpu, records

HELPERS = {
    "good": "print('measured')",
    "bad": "import sys; print('no such device'); sys.exit(3)",
    "slow": "import subprocess, sys, time\n"
    "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
    "open(sys.argv[1], 'w').write(str(child.pid))\n"
    "time.sleep(60)",
}


@pytest.fixture
def row(tmp_path, monkeypatch):
    """A row whose command is a small script in place of a benchmark."""
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    for name, text in HELPERS.items():
        (tmp_path / f"{name}.py").write_text(text)
    return lambda name, *arguments, limit=30.0: gpu.Row(name, (name, *arguments), limit)


def test_a_second_run_goes_on_with_what_did_not_end_well(row, tmp_path):
    wanted = [row("good"), row("bad")]
    assert [r["outcome"] for r in gpu.fill(wanted, 60, tmp_path)] == [gpu.DONE, gpu.FAILED]
    (tmp_path / "good.py").write_text("raise SystemExit('measured twice')")
    (tmp_path / "bad.py").write_text(HELPERS["good"])
    assert [r["outcome"] for r in gpu.fill(wanted, 60, tmp_path)] == ["there already", gpu.DONE]
    kept = records.read(tmp_path / "gpu.jsonl")
    assert [(r["name"], r["outcome"]) for r in kept] == [("good", gpu.DONE), ("bad", gpu.DONE)]


def test_a_failure_says_what_was_printed(row, tmp_path):
    [ended] = gpu.fill([row("bad")], 60, tmp_path)
    assert ended["output"] == ["no such device"]
    assert json.loads((tmp_path / "gpu.jsonl").read_text())["command"] == "python -m bad"


def test_what_takes_too_long_ends_with_all_it_started(row, tmp_path):
    pid = tmp_path / "pid"
    start = time.monotonic()
    [ended] = gpu.fill([row("slow", str(pid), limit=3)], 60, tmp_path)
    assert ended["outcome"] == gpu.LATE
    assert time.monotonic() - start < 20
    child = psutil.Process(int(pid.read_text())) if psutil.pid_exists(int(pid.read_text())) else None
    assert child is None or child.status() == psutil.STATUS_ZOMBIE, "the child of a measurement goes with it"


def test_no_row_begins_after_the_time_is_used_up(row, tmp_path):
    assert [r["outcome"] for r in gpu.fill([row("good")], 0.5, tmp_path)] == [gpu.LEFT]
    assert not (tmp_path / "gpu.jsonl").exists()


def test_the_training_has_as_many_steps_as_its_time_allows(tmp_path):
    records.put(
        tmp_path / "speed.jsonl",
        {"name": "training-swin_unetr-cuda-batch1", "seconds_per_step": {"ours": {"wall": {"median": 0.4}}}},
    )
    command = gpu.acdc(tmp_path, "cuda", False, 200.0, tmp_path).command
    assert command[command.index("--iterations") + 1] == str(int(120 / (1.3 * 0.4)))
    assert command[command.index("--size") + 1] == "paper"


def test_options_of_every_row_exist():
    """What a command does not know is refused here, not when somebody has a GPU for a quarter of an hour."""
    for row in (*gpu.rows("cuda", False), *gpu.rows("cpu", True)):
        module, command, *arguments = row.command
        found: Any = get_command(importlib.import_module(module).app)
        with found.make_context("benchmark", [command, *arguments], resilient_parsing=False) as context:
            name, sub, rest = found.resolve_command(context, [command, *arguments])
            parsed = sub.make_context(name, rest, parent=context)
            assert not parsed.args, f"{row.name}: {parsed.args}"
