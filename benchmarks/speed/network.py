"""Seconds and memory of the network beside MONAI's Swin UNETR of the same size, measured alternately in one run.

    python -m benchmarks.speed.network inference     one window: allocator, precision, layout, batch, compiler
    python -m benchmarks.speed.network training      one step: forward, losses, backward, clipping, AdamW
    python -m benchmarks.speed.network memory        the peak of one window and of two steps, in separate processes

All print a table and write a line of benchmarks/results/speed.jsonl. A GPU is measured with --device cuda. Without
options they measure `amos22-ct` at 96³, feature size 48, 15 classes x 6 sentences, BERT-base.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.common import (
    alternate,
    compared,
    full_size,
    our_network,
    peak_resident,
    resident,
    save,
    stock_network,
    timed,
)
from lib.model.allocator import keep_freed_memory
from lib.model.losses import segmentation_loss
from lib.tasks import Task
from lib.trainers.objective import TrainingNetwork
from lib.trainers.recipe import descend

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
Vision = Annotated[str, typer.Option(help="swin_unetr (V1) or swin_unetr_v2")]
Device = Annotated[str, typer.Option(help="cpu or cuda")]
Threads = Annotated[int, typer.Option(help="threads of torch on the CPU")]
Repeats = Annotated[int, typer.Option(help="rounds that count; one more warms up")]
FeatureSize = Annotated[int, typer.Option(help="of both networks; 48 is the paper's")]
Patch = Annotated[int, typer.Option(help="voxels per side")]

BASE = {"precision": "float32", "layout": "contiguous", "compile": False, "batch": 1, "reread": False}


class Worker:
    """A process that measures on demand, because an allocator is chosen when a process starts."""

    def __init__(self, allocator: str, **options: str | int) -> None:
        given = [part for key, value in options.items() for part in (f"--{key.replace('_', '-')}", str(value))]
        self.process = subprocess.Popen(
            [sys.executable, "-m", __spec__.name, "worker", *given, "--allocator", allocator],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=_environment(),
        )

    def measure(self, setting: dict[str, Any]) -> dict[str, float]:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps(setting) + "\n")
        self.process.stdin.flush()
        while not (line := self.process.stdout.readline()).startswith("{"):
            if not line:
                raise RuntimeError(f"the measuring process ended with {self.process.wait()}")
        return json.loads(line)

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def _environment() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}


@app.command(hidden=True)
def worker(
    vision: Vision = "swin_unetr",
    device: Device = "cpu",
    threads: Threads = 2,
    allocator: str = "tuned",
    patch: Patch = 96,
    feature_size: FeatureSize = 48,
) -> None:
    """Read settings from standard input, one per line, and answer each with its times."""
    if allocator == "tuned":
        keep_freed_memory()
    with ThreadPoolExecutor(1) as server:  # a server computes in a thread, where allocators behave differently
        task = full_size(model__vision=vision, patch=[patch] * 3, model__feature_size=feature_size)
        server.submit(_work, task, device, threads).result()


def _work(task: Task, device: str, threads: int) -> None:
    torch.set_num_threads(threads)
    made: dict[tuple, torch.nn.Module] = {}
    for line in sys.stdin:
        setting = json.loads(line)
        key = (setting["network"], setting["layout"], setting["compile"])
        if key not in made:
            network = (our_network if setting["network"] == "ours" else stock_network)(task).eval().to(device)
            if setting["layout"] == "channels_last":
                network = network.to(memory_format=torch.channels_last_3d)
            made[key] = torch.compile(network) if setting["compile"] else network  # type: ignore[assignment]
        image = torch.rand(setting["batch"], 1, *task.patch, device=device)
        if setting["layout"] == "channels_last":
            image = image.to(memory_format=torch.channels_last_3d)
        print(json.dumps(timed(partial(_infer, made[key], image, setting), device)), flush=True)


def _infer(network: torch.nn.Module, image: torch.Tensor, setting: dict[str, Any]) -> None:
    if setting["reread"]:
        text: Any = network.text
        text._cache.clear()
    kind = image.device.type
    with torch.no_grad(), torch.autocast(kind, torch.bfloat16, enabled=setting["precision"] == "bfloat16"):
        network(image)


@app.command()
def inference(
    vision: Vision = "swin_unetr",
    device: Device = "cpu",
    threads: Threads = 2,
    repeats: Repeats = 7,
    extras: Annotated[bool, typer.Option(help="also layout, windows per pass and re-reading the text")] = True,
    compiler: Annotated[bool, typer.Option(help="also torch.compile (minutes to compile)")] = False,
    patch: Patch = 96,
    feature_size: FeatureSize = 48,
) -> None:
    """Seconds per window of each network."""
    settings: dict[str, tuple[str, dict[str, Any]]] = {}
    for allocator in ("default", "tuned"):
        for precision in ("float32", "bfloat16") if allocator == "tuned" else ("float32",):
            for network in ("stock", "ours"):
                settings[f"{network}, {precision}, {allocator}"] = (
                    allocator,
                    {**BASE, "network": network, "precision": precision},
                )
    if extras:
        for network in ("stock", "ours"):
            settings[f"{network}, float32, tuned, channels-last"] = (
                "tuned",
                {**BASE, "network": network, "layout": "channels_last"},
            )
            settings[f"{network}, float32, tuned, 2 windows a pass"] = (
                "tuned",
                {**BASE, "network": network, "batch": 2},
            )
        settings["ours, float32, tuned, text read for every window"] = (
            "tuned",
            {**BASE, "network": "ours", "reread": True},
        )
    if compiler:
        for network in ("stock", "ours"):
            settings[f"{network}, float32, tuned, compiled"] = ("tuned", {**BASE, "network": network, "compile": True})

    size: dict[str, Any] = {"patch": patch, "feature_size": feature_size}
    workers = {
        name: Worker(name, vision=vision, device=device, threads=threads, **size) for name in ("default", "tuned")
    }
    try:
        found = alternate(
            {name: partial(_per_window, workers[a], setting) for name, (a, setting) in settings.items()}, repeats
        )
    finally:
        for each in workers.values():
            each.close()
    rows = {}
    for name in settings:
        rows[name] = {
            "against_twin": compared(
                found, name, name.replace("ours", "stock", 1).replace(", text read for every window", "")
            ),
            "against_stock_call": compared(found, name, "stock, float32, default"),
        }
    table = Table("setting", "wall s", "wall q1-q3", "CPU s", "wall / twin", "CPU / twin", "wall / stock call")
    for name, row in rows.items():
        twin, call = row["against_twin"], row["against_stock_call"]
        table.add_row(
            name, *_times(twin), f"{twin['wall_ratio']:.2f}", f"{twin['cpu_ratio']:.2f}", f"{call['wall_ratio']:.2f}"
        )
    Console(width=140).print(table)
    save(
        f"inference-{vision}-{device}{_suffix(**size)}",
        {"vision": vision, "device": device, "seconds_per_window": rows},
    )


def _suffix(patch: int, feature_size: int) -> str:
    """What a measurement's name says of sizes that are not the paper's."""
    return f"-{patch}" * (patch != 96) + f"-width{feature_size}" * (feature_size != 48)


def _per_window(worker: Worker, setting: dict[str, Any]) -> dict[str, float]:
    return {kind: value / setting["batch"] for kind, value in worker.measure(setting).items()}


def _times(row: dict[str, Any]) -> tuple[str, str, str]:
    wall = row["wall"]
    return f"{wall['median']:.2f}", f"{wall['q1']:.2f}-{wall['q3']:.2f}", f"{row['cpu']['median']:.2f}"


class Step:
    """One training step of a network, as the train task does it."""

    def __init__(self, network: str, task: Any, batch: int, device: str) -> None:
        self.task, self.ours = task, network.startswith("ours")
        self.network: torch.nn.Module = (
            TrainingNetwork(our_network(task), task) if self.ours else stock_network(task)
        ).to(device)
        self.network.train()
        groups = self.network.parameter_groups() if isinstance(self.network, TrainingNetwork) else None
        self.optimizer = torch.optim.AdamW(groups or self.network.parameters(), lr=1e-4, weight_decay=1e-5)
        self.image = torch.rand(batch, 1, *task.patch, device=device)
        self.label = torch.randint(0, task.out_channels, (batch, 1, *task.patch), device=device)

    def run(self) -> None:
        kind = self.image.device.type
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(kind, torch.bfloat16, enabled=kind == "cuda"):
            if self.ours:
                loss = self.network(self.image, self.label)["loss"]
            else:
                loss = segmentation_loss(self.network(self.image), self.label)
        descend(loss, self.optimizer)

    def timed(self) -> dict[str, float]:
        """Mean over the steps that one reading of the text lasts."""
        count = self.task.training.text_interval if self.ours else 1
        runs = [timed(self.run, self.image.device.type) for _ in range(count)]
        self.optimizer.zero_grad(set_to_none=True)  # the networks share the memory
        return {kind: sum(r[kind] for r in runs) / count for kind in runs[0]}


Batch = Annotated[int, typer.Option(help="patches per step")]
Checkpointing = Annotated[bool, typer.Option(help="recompute activations, in both networks")]


@app.command()
def training(
    vision: Vision = "swin_unetr",
    device: Device = "cpu",
    threads: Threads = 2,
    repeats: Repeats = 5,
    batch: Batch = 1,
    patch: Patch = 96,
    feature_size: FeatureSize = 48,
    checkpointing: Checkpointing = False,
    text_interval: Annotated[int, typer.Option(help="also with a reading of the text that lasts this many steps")] = 2,
) -> None:
    """Seconds of one training step of each network."""
    keep_freed_memory()
    torch.set_num_threads(threads)
    settings = {"model__vision": vision, "patch": [patch] * 3, "model__checkpointing": checkpointing}
    settings |= {"model__feature_size": feature_size}
    intervals = {"stock": 1, "ours": 1} | {f"ours, text every {n} steps": n for n in [text_interval] if n > 1}
    steps = {
        name: Step(name, full_size(**settings, training__text_interval=n), batch, device)
        for name, n in intervals.items()
    }
    found = alternate({name: step.timed for name, step in steps.items()}, repeats)
    rows = {name: compared(found, name, "stock") for name in steps}
    table = Table("network", "wall s", "wall q1-q3", "CPU s", "wall / stock", "CPU / stock")
    for name, row in rows.items():
        table.add_row(name, *_times(row), f"{row['wall_ratio']:.2f}", f"{row['cpu_ratio']:.2f}")
    Console(width=140).print(table)
    setting = {"vision": vision, "device": device, "batch": batch, "patch": patch, "checkpointing": checkpointing}
    suffix = _suffix(patch, feature_size) + "-checkpointing" * checkpointing
    save(f"training-{vision}-{device}-batch{batch}{suffix}", {**setting, "seconds_per_step": rows})


@app.command()
def memory(
    vision: Vision = "swin_unetr",
    device: Device = "cpu",
    threads: Threads = 2,
    batch: Batch = 1,
    patch: Patch = 96,
    feature_size: FeatureSize = 48,
    checkpointing: Checkpointing = False,
    steps: Annotated[bool, typer.Option("--training/--no-training", help="also of training")] = True,
) -> None:
    """Peak memory: on the CPU of the process, with and without what the imports take; on a GPU of its allocator."""
    rows: dict[str, dict[str, Any]] = {}
    for what in ("inference", "training") if steps else ("inference",):
        for network in ("stock", "ours"):
            options = {"vision": vision, "device": device, "threads": threads, "batch": batch, "patch": patch}
            options |= {"network": network, "what": what, "checkpointing": checkpointing, "feature_size": feature_size}
            command = [sys.executable, "-m", __spec__.name, "peak", json.dumps(options)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=_environment())
            rows[f"{what}, {network}"] = json.loads(done.stdout.splitlines()[-1])
    table = Table("", "process GiB", "above imports GiB", "ratio process", "ratio above imports")
    for name, row in rows.items():
        reference = rows[name.replace("ours", "stock")]
        row["process_ratio"] = round(row["process"] / reference["process"], 3)
        row["above_imports_ratio"] = round(row["above_imports"] / reference["above_imports"], 3)
        sizes = [f"{row[k] / 2**30:.2f}" for k in ("process", "above_imports")]
        table.add_row(name, *sizes, f"{row['process_ratio']:.2f}", f"{row['above_imports_ratio']:.2f}")
    Console(width=140).print(table)
    setting = {"vision": vision, "device": device, "batch": batch, "patch": patch, "checkpointing": checkpointing}
    suffix = f"-batch{batch}" * (batch != 1) + _suffix(patch, feature_size) + "-checkpointing" * checkpointing
    save(f"memory-{vision}-{device}{suffix}", {**setting, "bytes": rows})


@app.command(hidden=True)
def peak(options: str) -> None:
    """Measure one peak in this process."""
    given = json.loads(options)
    torch.set_num_threads(given["threads"])
    device, patch = given["device"], [given["patch"]] * 3
    size = {"patch": patch, "model__feature_size": given["feature_size"]}
    task = full_size(model__vision=given["vision"], model__checkpointing=given["checkpointing"], **size)
    base = resident()
    if given["what"] == "training":
        step = Step(given["network"], task, given["batch"], device)
        for _ in range(2):  # the optimizer's moments exist from the second step on
            step.run()
    else:
        network = (our_network if given["network"] == "ours" else stock_network)(task).eval().to(device)
        for _ in range(2):
            _infer(network, torch.rand(given["batch"], 1, *task.patch, device=device), BASE)
    if device.startswith("cuda"):
        found = {"process": torch.cuda.max_memory_reserved(), "above_imports": torch.cuda.max_memory_allocated()}
    else:
        found = {"process": peak_resident(), "above_imports": peak_resident() - base}
    print(json.dumps(found))


if __name__ == "__main__":
    app()
