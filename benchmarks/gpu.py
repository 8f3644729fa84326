"""Every figure that needs a GPU, in one command of at most eight minutes.

    python -m benchmarks.gpu                                     all rows that are not there yet
    python -m benchmarks.gpu --acdc FOLDER                       also a training at full size on ACDC's files
    python -m benchmarks.gpu --device cpu --tiny --results DIR   that it runs, on a machine without one

A row is a command of benchmarks/speed or benchmarks/accuracy in its own process, with its own share of the time. What
it measured is written when it ends (benchmarks/results/speed.jsonl, accuracy.jsonl), and how it ended goes to gpu.jsonl
beside them. Started again, the command goes on with the rows that did not end well.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks import ROOT, records
from benchmarks.common import machine

DONE, FAILED, LATE, LEFT = "done", "failed", "took too long", "no time left"
START_SECONDS = 40.0  # of a training: imports, and patients brought to the network's grid
LAST_LINES = 12


@dataclass(frozen=True)
class Row:
    """One measurement: a module with its arguments, and the most seconds it may take."""

    name: str
    command: tuple[str, ...]
    limit: float


def rows(device: str, tiny: bool) -> list[Row]:
    """The measurements of speed and memory, the most wanted first.

    Args:
        device: `cuda`, or `cpu` to see that they run.
        tiny: small patches and few channels, one repeat, and four times the time, for a machine that does other work.
    """
    network, on = "benchmarks.speed.network", ("--device", device)
    size = ("--patch", "64", "--feature-size", "12") if tiny else ()
    few = ("--repeats", "1") if tiny else ("--repeats", "5")
    request = ("--shape", "96", "96", "48", "--feature-size", "12") if tiny else ("--shape", "512", "512", "397")
    spacing = ("--spacing", "1.5", "1.5", "2.0") if tiny else ("--spacing", "0.9", "0.9", "1.5", "--overlap", "0.5")
    wanted = [
        Row(f"inference, {device}", (network, "inference", *on, "--no-extras", *few, *size), 90),
        Row(f"training step, {device}", (network, "training", *on, *few, *size), 75),
        Row(f"memory, {device}", (network, "memory", *on, *size), 90),
        Row(f"request to mask, {device}", ("benchmarks.speed.serving", "request", *request, *spacing), 90),
        Row(f"training step, batch 2, {device}", (network, "training", *on, *few, *size, "--batch", "2"), 75),
        Row(f"memory, recomputed activations, {device}", (network, "memory", *on, *size, "--checkpointing"), 90),
    ]
    return [replace(row, limit=4 * row.limit) for row in wanted] if tiny else wanted


def acdc(folder: Path, device: str, tiny: bool, seconds: float, results: Path) -> Row:
    """A training on ACDC with as many steps as the seconds allow, from what a step took in `training step`."""
    steps = 4
    if not tiny:
        found = records.find(results / "speed.jsonl", f"training-swin_unetr-{device}-batch1")
        a_step = found["seconds_per_step"]["ours"]["wall"]["median"] if found else 1.0
        steps = max(10, int((seconds - 2 * START_SECONDS) / (1.3 * a_step)))  # what is left scores the test patients
    size = ("--size", "small" if tiny else "paper")
    kind = ("--precision", "bf16") if device == "cuda" else ()
    run = ("run", "--task", "acdc-mr", "--data", str(folder), "--head", "text", "--no-text", "--device", device)
    command = ("benchmarks.accuracy", *run, *size, *kind, "--iterations", str(steps))
    return Row(f"training on ACDC, {device}", command, seconds)


def measure(row: Row, seconds: float, results: Path) -> dict[str, Any]:
    """Run one row for at most so many seconds and write how it ended.

    Returns:
        `name`, `outcome`, `seconds`, `command`, and the last lines that it printed if it did not end well.
    """
    start = time.monotonic()
    environment = os.environ | {"BIPVL_RESULTS": str(results)}
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", *row.command],
            cwd=ROOT,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            outcome = DONE if process.wait(seconds) == 0 else FAILED
        except subprocess.TimeoutExpired:
            outcome = LATE
        finally:  # with the servers and workers that it started
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        log.seek(0)
        output = log.read()
    ended: dict[str, Any] = {"name": row.name, "outcome": outcome, "seconds": round(time.monotonic() - start, 1)}
    ended["command"] = " ".join(("python", "-m", *row.command))
    if outcome != DONE:
        ended["output"] = output.splitlines()[-LAST_LINES:]
    records.put(results / "gpu.jsonl", {**ended, "machine": machine()})
    return ended


def fill(wanted: Sequence[Row], seconds: float, results: Path) -> list[dict[str, Any]]:
    """Measure what is not there yet, in order, until the time is used up."""
    end, ended = time.monotonic() + seconds, []
    for row in wanted:
        before = records.find(results / "gpu.jsonl", row.name)
        if before and before["outcome"] == DONE:
            ended.append({**before, "outcome": "there already"})
            continue
        left = min(row.limit, end - time.monotonic())
        if left < 1:
            ended.append({"name": row.name, "outcome": LEFT, "seconds": 0.0})
            continue
        print(f"{row.name}: at most {left:.0f} s", file=sys.stderr, flush=True)
        ended.append(measure(row, left, results))
    return ended


def main(
    acdc_folder: Annotated[Path | None, typer.Option("--acdc", help="folder of ACDC's files, to train on")] = None,
    device: Annotated[str, typer.Option(help="cuda, or cpu to see that it runs")] = "cuda",
    tiny: Annotated[bool, typer.Option("--tiny", help="tiny sizes: figures that say nothing")] = False,
    minutes: Annotated[float, typer.Option(help="at most; the training takes what the others leave")] = 8.0,
    results: Annotated[Path, typer.Option(help="folder of the results")] = records.RESULTS,
) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("torch sees no GPU; --device cpu --tiny tries the commands without one")
    if tiny and results.resolve() == records.RESULTS.resolve():
        raise typer.BadParameter("--tiny needs --results: its figures must not stand among the others")
    results = results.resolve()
    results.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    ended = fill(rows(device, tiny), 60 * minutes, results)
    if acdc_folder:
        left = 60 * minutes - (time.monotonic() - start)
        ended += fill([acdc(acdc_folder.resolve(), device, tiny, left, results)], left, results)
    table = Table("row", "outcome", "s")
    for row in ended:
        table.add_row(row["name"], row["outcome"], f"{row['seconds']:.0f}")
        for line in row.get("output", ()):
            print(line, file=sys.stderr)
    Console().print(table)
    if any(row["outcome"] in (FAILED, LATE, LEFT) for row in ended):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
