"""What the benchmarks share: the networks to compare, alternating measurements, their summary, and the machine."""

from __future__ import annotations

import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Hashable, Mapping
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks import ROOT, records

SPEED = records.RESULTS / "speed.jsonl"
# Threads that wait must not count as work: CPU time is reported beside wall time, because it hardly depends on what
# else the machine does. Read when torch is imported; measuring processes inherit it.
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"

import torch  # noqa: E402
from monai.networks.nets import SwinUNETR  # noqa: E402
from torch import nn  # noqa: E402
from transformers import BertConfig  # noqa: E402

from lib.model.nets import BiPVLSeg, TextAssets, build_model  # noqa: E402
from lib.tasks import Task, load_task  # noqa: E402


def full_size(**changes: Any) -> Task:
    """`amos22-ct` at the paper's size (96³, feature size 48, 15 classes x 6 sentences) without its hub model."""
    return load_task("amos22-ct", {"model.text": "scratch", **{k.replace("__", "."): v for k, v in changes.items()}})


def our_network(task: Task) -> BiPVLSeg:
    """BiPVL-Seg with a BERT-base of random weights: its size counts, its weights do not."""
    tokenizer = build_model(
        task.model_copy(update={"model": task.model.model_copy(update={"feature_size": 12})})
    ).text.assets.tokenizer
    torch.manual_seed(0)
    return build_model(task, TextAssets(BertConfig().to_json_string(), tokenizer))


def stock_network(task: Task) -> nn.Module:
    """MONAI's Swin UNETR with the same settings."""
    torch.manual_seed(0)
    spec = task.model
    return SwinUNETR(
        len(task.channels),
        task.out_channels,
        feature_size=spec.feature_size,
        use_v2=spec.vision == "swin_unetr_v2",
        use_checkpoint=spec.checkpointing,
    )


def timed(run: Callable[[], Any], device: str = "cpu") -> dict[str, float]:
    """Wall and CPU seconds (of all threads) of one call."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}


def alternate(
    runs: Mapping[Hashable, Callable[[], dict[str, float]]], repeats: int, warm_up: int = 1
) -> dict[Hashable, list[dict[str, float]]]:
    """A B C A B C …: what disturbs the machine disturbs all alike. The first `warm_up` rounds are not kept."""
    kept: dict[Hashable, list[dict[str, float]]] = {name: [] for name in runs}
    for n in range(-warm_up, repeats):
        for name, run in runs.items():
            found = run()
            if n >= 0:
                kept[name].append(found)
        print(f"  round {n + 1} of {repeats}", file=sys.stderr, flush=True)
    return kept


def summary(values: list[float]) -> dict[str, float]:
    """Median and spread."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {
        **{"median": round(median, 4), "q1": round(low, 4), "q3": round(high, 4)},
        **{"min": round(min(values), 4), "max": round(max(values), 4), "n": len(values)},
    }


def compared(found: Mapping[Hashable, list[dict[str, float]]], name: Hashable, reference: Hashable) -> dict[str, Any]:
    """One setting's times, and their ratio to the reference's: of the medians, and the spread of the ratios round by
    round."""
    result: dict[str, Any] = {}
    for kind in ("wall", "cpu"):
        ours, theirs = ([r[kind] for r in found[n]] for n in (name, reference))
        result[kind] = summary(ours)
        result[f"{kind}_ratio"] = round(statistics.median(ours) / max(statistics.median(theirs), 1e-9), 3)
        result[f"{kind}_ratio_by_round"] = summary([a / max(b, 1e-9) for a, b in zip(ours, theirs, strict=True)])
    return result


def resident() -> int:
    """Bytes of this process in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def peak_resident() -> int:
    """The most bytes of this process that were ever in memory."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def machine() -> dict[str, Any]:
    """What a figure depends on."""
    cpu = [line.split(":")[1].strip() for line in _read("/proc/cpuinfo").splitlines() if line.startswith("model name")]
    git = ["git", "-C", str(ROOT)]
    commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    return {
        "cpu": cpu[0] if cpu else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "load_average": [round(n, 1) for n in os.getloadavg()],
        "packages": {name: version(name) for name in ("torch", "monai", "monailabel", "transformers")},
        "commit": commit,
        "command": " ".join(["python", *_program(), *sys.argv[1:]]),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


def save(name: str, result: dict[str, Any]) -> None:
    """Write a measurement of speed or memory, with the machine's facts, in the place of the one of this name."""
    records.put(SPEED, {"name": name, "machine": machine(), **result})
    print(f"written: {name} in {SPEED}", file=sys.stderr)


def save_runs(file: Path, runs: list[dict[str, Any]], **setting: Any) -> None:
    """Write all runs of a result. The new ones get the setting that they share and the machine's facts."""
    for run in runs:
        if "machine" not in run:
            run |= {**setting, **run, "machine": machine()}
    records.write(file, runs)
    print(f"written: {file.relative_to(ROOT)}", file=sys.stderr)


def _program() -> list[str]:
    """`-m benchmarks.…` for a module of ours, the path for anything else."""
    path = Path(sys.argv[0]).resolve()
    if not path.is_relative_to(ROOT):
        return [path.name]
    return ["-m", ".".join(p for p in path.relative_to(ROOT).with_suffix("").parts if p != "__main__")]


def _read(path: str) -> str:
    return Path(path).read_text() if Path(path).exists() else ""
