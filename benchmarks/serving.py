"""What surrounds the network, through a real server and MONAI Label's own client.

    python benchmarks/serving.py request     one CT of 256 x 256 x 128 voxels of 1.5 x 1.5 x 2 mm: where the time goes
    python benchmarks/serving.py round       from pressing train to the new version served: where the time goes

`request` serves `amos22-ct` at full size with random weights: masks are noise, the worst case for restoring and
writing them. With --overlap 0 fewer windows are computed than by default, so the share around the network is an upper
bound. `round` serves the quickstart on generated studies.
"""

from __future__ import annotations

import re
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path
from typing import Annotated

import nibabel as nib
import numpy as np
import typer
from rich.console import Console
from rich.table import Table
from scipy import ndimage

from common import ROOT, save
from lib.phantom import write_studies

sys.path.insert(0, str(ROOT / "tests"))
from server import Server  # noqa: E402  the tests' server process

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
BERT_BASE = "{layers: 12, width: 768, heads: 12, max_tokens: 512}"
SHAPE, SPACING = (256, 256, 128), (1.5, 1.5, 2.0)


def write_ct(path: Path, shape: tuple[int, int, int] = SHAPE) -> None:
    """A trunk of soft tissue of changing density in noisy air, LPS as scanners store it."""
    rng = np.random.default_rng(0)
    x, y, z = np.ogrid[: shape[0], : shape[1], : shape[2]]
    trunk = ((x - shape[0] / 2) / (0.42 * shape[0])) ** 2 + ((y - shape[1] / 2) / (0.3 * shape[1])) ** 2 + 0 * z < 1
    texture = ndimage.zoom(rng.normal(0, 60, [n // 8 for n in shape]), 8, order=1)
    image = np.where(trunk, 40 + texture, -1000) + rng.normal(0, 15, shape)
    affine = np.diag([-SPACING[0], -SPACING[1], SPACING[2], 1.0])
    nib.save(nib.Nifti1Image(image.round().astype(np.int16), affine), path)


@app.command()
def request(
    overlap: Annotated[float, typer.Option(help="of windows; the task's default is 0.5")] = 0.0,
    feature_size: Annotated[int, typer.Option(help="of the network; 48 is the paper's")] = 48,
    repeats: Annotated[int, typer.Option(help="requests that count; one on a small volume warms up")] = 1,
) -> None:
    """Time of a request by step."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        studies = Path(folder) / "studies"
        studies.mkdir()
        write_ct(studies / "ct.nii.gz")
        write_ct(studies / "warm-up.nii.gz", (64, 64, 48))
        conf = {"models": "amos22-ct", "model.text": "scratch", "model.scratch": BERT_BASE}
        with Server(studies, Path(folder) / "models", {**conf, "model.feature_size": str(feature_size)}) as server:
            server.client.infer("amos22-ct", "warm-up", {"overlap": overlap})
            for _ in range(repeats):
                start = time.perf_counter()
                file, result = server.client.infer("amos22-ct", "ct", {"overlap": overlap})
                seconds = time.perf_counter() - start
                assert nib.load(file).shape == SHAPE
                steps = {k: v for k, v in result["latencies"].items() if isinstance(v, int | float)}
                steps["http"] = seconds - steps.pop("total")
                rows.append({"seconds": seconds, **steps, "windows": result["windows"] - result["windows_skipped"]})
    medians = {name: float(np.median([row[name] for row in rows])) for name in rows[0]}
    around = (medians["seconds"] - medians["infer"]) / medians["seconds"]
    table = Table("step", "seconds")
    for name, value in medians.items():
        table.add_row(name, f"{value:.2f}")
    table.add_row("share around the network", f"{around:.1%}")
    Console().print(table)
    save("request", {"overlap": overlap, "feature_size": feature_size, "share_around": around, "requests": rows})


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
