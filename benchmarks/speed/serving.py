"""What surrounds the network, through a real server and MONAI Label's own client.

    python -m benchmarks.speed.serving request    a CT of 256 x 256 x 128 voxels of 1.5 x 1.5 x 2 mm
    python -m benchmarks.speed.serving request --shape 512 512 397 --spacing 0.9 0.9 1.5 --overlap 0.5
    python -m benchmarks.speed.serving restore    bringing a mask back to the file's grid
    python -m benchmarks.speed.serving round       from pressing train to the new version served: where the time goes

`request` serves `amos22-ct` at full size with random weights: masks are noise, the worst case for restoring and
writing them. With --overlap 0 fewer windows are computed than by default, so the share around the network is an upper
bound. `round` serves the quickstart on generated studies.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Hashable
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import nibabel as nib
import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table
from scipy import ndimage

from benchmarks.common import alternate, full_size, save, summary, timed
from lib.tasks import Task
from lib.volumes.phantoms.studies import write_studies
from lib.volumes.transforms import resample_all, restore
from support.helpers import read_nifti
from support.server import Server  # noqa: E402  the tests' server process

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
BERT_BASE = "{layers: 12, width: 768, heads: 12, max_tokens: 512}"
SHAPE, SPACING = (256, 256, 128), (1.5, 1.5, 2.0)


def write_ct(path: Path, shape: tuple[int, int, int] = SHAPE, spacing: tuple[float, float, float] = SPACING) -> None:
    """A trunk of soft tissue of changing density in noisy air, LPS as scanners store it."""
    rng = np.random.default_rng(0)
    x, y, z = np.ogrid[: shape[0], : shape[1], : shape[2]]
    trunk = ((x - shape[0] / 2) / (0.42 * shape[0])) ** 2 + ((y - shape[1] / 2) / (0.3 * shape[1])) ** 2 + 0 * z < 1
    texture = ndimage.zoom(rng.normal(0, 60, [-(-n // 8) for n in shape]), 8, order=1)[tuple(map(slice, shape))]
    image = np.where(trunk, 40 + texture, -1000) + rng.normal(0, 15, shape)
    affine = np.diag([-spacing[0], -spacing[1], spacing[2], 1.0])
    nib.save(nib.Nifti1Image(image.round().astype(np.int16), affine), path)


@app.command()
def request(
    overlap: Annotated[float, typer.Option(help="of windows; the task's default is 0.5")] = 0.0,
    feature_size: Annotated[int, typer.Option(help="of the network; 48 is the paper's")] = 48,
    repeats: Annotated[int, typer.Option(help="requests that count; one on a small volume warms up")] = 1,
    shape: Annotated[tuple[int, int, int], typer.Option(help="voxels of the CT")] = SHAPE,
    spacing: Annotated[tuple[float, float, float], typer.Option(help="mm of the CT's voxels")] = SPACING,
    set_: Annotated[list[str] | None, typer.Option("--set", help="key=value of the task")] = None,
) -> None:
    """Time of a request by step, and what the server holds of a GPU after it."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        studies = Path(folder) / "studies"
        studies.mkdir()
        write_ct(studies / "ct.nii.gz", shape, spacing)
        write_ct(studies / "warm-up.nii.gz", (64, 64, 48))
        conf = {"models": "amos22-ct", "model.text": "scratch", "model.scratch": BERT_BASE}
        conf |= {"model.feature_size": str(feature_size), **dict(s.split("=", 1) for s in set_ or [])}
        with Server(studies, Path(folder) / "models", conf) as server:
            server.client.infer("amos22-ct", "warm-up", {"overlap": overlap})
            for _ in range(repeats):
                start = time.perf_counter()
                file, result = server.client.infer("amos22-ct", "ct", {"overlap": overlap})
                seconds = time.perf_counter() - start
                assert read_nifti(file).shape == shape
                steps = {k: v for k, v in result["latencies"].items() if isinstance(v, int | float)}
                steps["http"] = seconds - steps.pop("total")
                rows.append({"seconds": seconds, **steps, "windows": result["windows"] - result["windows_skipped"]})
            gpu_mib = held_of_gpu()
    medians = {name: float(np.median([row[name] for row in rows])) for name in rows[0]}
    around = (medians["seconds"] - medians["infer"]) / medians["seconds"]
    table = Table("step", "seconds")
    for name, value in medians.items():
        table.add_row(name, f"{value:.2f}")
    table.add_row("share around the network", f"{around:.1%}")
    if gpu_mib is not None:
        table.add_row("GPU memory of all processes, MiB", str(gpu_mib))
    Console().print(table)
    setting = {"shape": shape, "spacing": spacing, "overlap": overlap, "feature_size": feature_size, "set": set_ or []}
    name = "request" if shape == SHAPE else "request-" + "x".join(map(str, shape))
    save(name, {**setting, "share_around": around, "gpu_mib": gpu_mib, "requests": rows})


def held_of_gpu() -> int | None:
    """MiB in use on the first GPU: torch keeps what a request took at its peak. None without a GPU."""
    if not torch.cuda.is_available():
        return None
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    return int(subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0])


@app.command("restore")
def restore_command(
    repeats: Annotated[int, typer.Option(help="rounds that count; one warms up")] = 3,
    full: Annotated[bool, typer.Option(help="false: one small volume, to see that it runs")] = True,
) -> None:
    """CPU time of `restore` against resampling every voxel and deciding there, in turns, and how many voxels differ."""
    task = full_size()
    settings: list[tuple[str, tuple[int, ...], tuple[float, ...], bool]] = [
        ("the network's spacing, LPS", SHAPE, SPACING, False),
        ("few borders", (480, 480, 205), (0.8, 0.8, 1.25), False),
        ("a mask of noise", (480, 480, 205), (0.8, 0.8, 1.25), True),
    ]
    table = Table("to the file's grid", "every voxel, CPU s", "restore, CPU s", "voxels that differ")
    rows = []
    for name, shape, spacing, noise in settings if full else [("small", (96, 96, 40), (0.8, 0.8, 1.25), False)]:
        found, differ = compare_restores(task, shape, *restored_case(task, shape, spacing, noise), repeats)
        times = {k: summary([run["cpu"] for run in runs]) for k, runs in found.items()}
        rows.append({"setting": name, "shape": shape, "spacing": spacing, "cpu": times, "differ": differ})
        before, now = (times[k]["median"] for k in ("everything", "restore"))
        table.add_row(f"{' x '.join(map(str, shape))}, {name}", f"{before:.2f}", f"{now:.2f}", str(differ))
    Console().print(table)
    save("restore", {"classes": task.out_channels, "rows": rows})


def compare_restores(
    task: Task, shape: tuple[int, ...], probabilities: torch.Tensor, meta: dict[str, Any], repeats: int
) -> tuple[dict[Hashable, list[dict[str, float]]], int]:
    """Times of both ways, and how many voxels differ."""
    everything = np.zeros(shape, np.uint8)
    runs: dict[Hashable, Callable[[], dict[str, float]]] = {
        "everything": lambda: timed(
            lambda: resample_all(probabilities, meta["affine"], meta["original_affine"], task, everything)
        ),
        "restore": lambda: timed(lambda: restore(probabilities, meta, task)),
    }
    return alternate(runs, repeats), int((restore(probabilities, meta, task) != everything).sum())


def restored_case(
    task: Task, shape: tuple[int, ...], spacing: tuple[float, ...], noise: bool
) -> tuple[torch.Tensor, dict[str, Any]]:
    """Probabilities of a body of boxes (or of noise) at the task's spacing in RAS, and the file's geometry in LPS."""
    size = [round(n * mm / own) for n, mm, own in zip(shape, spacing, task.spacing, strict=True)]
    rng = torch.Generator().manual_seed(0)
    logits = torch.zeros(task.out_channels, *size)
    if noise:
        logits.normal_(0, 3, generator=rng)
    else:
        logits[0] = 4
        for c in range(1, task.out_channels):
            corner = [int(n * 0.9 * float(torch.rand((), generator=rng))) for n in size]
            block = [slice(a, a + max(2, n // 10)) for a, n in zip(corner, size, strict=True)]
            logits[c][tuple(block)] = 8
    network = torch.diag(torch.tensor([*task.spacing, 1.0], dtype=torch.float64))
    network[:2, 3] = -torch.tensor([(n - 1) * mm for n, mm in zip(size, task.spacing, strict=True)][:2])
    original = torch.diag(torch.tensor([-spacing[0], -spacing[1], spacing[2], 1.0], dtype=torch.float64))
    meta = {"affine": network, "original_affine": original, "spatial_shape": shape}
    return logits.softmax(0), meta


@app.command("round")
def training_round(
    epochs: Annotated[int, typer.Option(help="of the round")] = 3,
    dataset: Annotated[str, typer.Option(help="CacheDataset, PersistentDataset or Dataset")] = "CacheDataset",
) -> None:
    """Time of a training round by step, from the times in the server's log."""
    with tempfile.TemporaryDirectory() as folder:
        studies = Path(folder) / "studies"
        write_studies(studies, 6, 6)
        with Server(studies, Path(folder) / "models", {"models": "quickstart"}) as server:
            begun = datetime.now()
            status = server.train(
                "quickstart", 3600, max_epochs=epochs, dataset=dataset, val_split=0.3, val_interval=epochs
            )
            done = datetime.now()
            assert status["status"] == "DONE", server.tail()
            log = server.log.read_text(errors="replace")
    steps = split_round(log, begun, done)
    table = Table("step", "seconds")
    for name, value in steps.items():
        table.add_row(name, f"{value:.1f}")
    Console().print(table)
    save(f"round-{dataset}", {"epochs": epochs, "cases": 6, "seconds": steps})


def split_round(log: str, begun: datetime, done: datetime) -> dict[str, float]:
    """Seconds of each part of a round, from the lines that the trainer writes."""
    lines = [
        (datetime.strptime(m[1], "%Y-%m-%d %H:%M:%S,%f"), m[2])
        for m in re.finditer(r"^\[([\d-]+ [\d:,]+)\](.*)$", log, re.MULTILINE)
    ]
    lines = [(at, text) for at, text in lines if at >= begun]

    def first(pattern: str) -> tuple[datetime, str]:
        return next((at, text) for at, text in lines if re.search(pattern, text))

    audited, _ = first(r"Labels of \d+ case")
    epochs = [(at, float(m[1])) for at, text in lines if (m := re.search(r"Epoch \d+/\d+: loss.*?, ([\d.]+) s,", text))]
    validations = [at for at, text in lines if "Validation after epoch" in text]
    began_steps = epochs[0][0].timestamp() - epochs[0][1]
    learned = max([at for at, _ in epochs] + validations)
    return {
        "start-up (process, imports, app, audit of labels)": (audited - begun).total_seconds(),
        "data (network, reading and preprocessing)": began_steps - audited.timestamp(),
        "steps and validation": learned.timestamp() - began_steps,  # the line of an epoch comes after its validation
        "judging and publishing": (done - learned).total_seconds(),
        "total": (done - begun).total_seconds(),
        **{f"epoch {n}": seconds for n, (_, seconds) in enumerate(epochs, 1)},
    }


if __name__ == "__main__":
    app()
