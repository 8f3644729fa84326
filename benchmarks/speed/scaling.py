"""How the time of a volume grows: with its size, the overlap, the windows per pass, and the number of sentences.

    python -m benchmarks.speed.scaling                       two cores: narrow networks, patch 64³
    python -m benchmarks.speed.scaling --device cuda --feature-size 48 --patch 96

One curve varies one thing and leaves the others at their middle; BiPVL-Seg and MONAI's Swin UNETR of the same size take
turns. Writes the rows `scaling` of benchmarks/results/speed.jsonl and docs/images/plots/scaling.png.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import matplotlib

matplotlib.use("Agg")

import torch
import typer
from matplotlib import pyplot as plt
from monai.inferers import sliding_window_inference
from rich.console import Console
from rich.table import Table

from benchmarks import ROOT
from benchmarks.common import alternate, compared, full_size, our_network, save, stock_network, timed
from lib.model.allocator import keep_freed_memory
from lib.model.nets import BiPVLSeg
from lib.model.nets.text import Sentences
from lib.model.predict import predict
from lib.tasks import Task

IMAGE = ROOT / "docs" / "images" / "plots" / "scaling.png"
TWINS = {"stock": "Swin UNETR", "ours": "BiPVL-Seg"}
# In patches per side, in which the volume's size is counted.
SIZES, OVERLAPS, BATCHES, SENTENCES = (1.0, 1.5, 2.0), (0.0, 0.25, 0.5, 0.75), (1, 2, 4), (15, 30, 90, 360)
MIDDLE = {"size": 1.5, "overlap": 0.5, "batch": 1, "sentences": 90}


class Both:
    """The two networks, and a volume through either."""

    def __init__(self, task: Task, device: str) -> None:
        self.task, self.device = task, device
        self.ours: BiPVLSeg = our_network(task).eval().to(device)
        self.stock = stock_network(task).eval().to(device)

    def text(self, sentences: int) -> Sentences:
        """The task's own sentences, repeated as needed, equally many per class."""
        classes = len(self.task.classes)
        rows = [row for rows in self.task.text_rows() for row in rows]
        each = sentences // classes
        return self.ours.text.tokenize(
            [[rows[(c * each + k) % len(rows)] for k in range(each)] for c in range(classes)]
        )

    @torch.no_grad()
    def run(self, network: str, size: float, overlap: float, batch: int, sentences: int) -> None:
        shape = [round(size * side) for side in self.task.patch]
        image = torch.rand(1, *shape, generator=torch.Generator().manual_seed(0))
        half = self.device != "cpu"
        if network == "ours":
            predict(self.ours, image, self.task, overlap, batch, sentences=self.text(sentences), half=half)
            return
        with torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=half):
            logits = sliding_window_inference(
                image[None],
                self.task.patch,
                batch,
                self.stock,
                overlap=overlap,
                mode="gaussian",
                sw_device=self.device,
                device=self.device,
            )
        logits.softmax(1)  # type: ignore[union-attr]


def main(
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    threads: Annotated[int, typer.Option(help="threads of torch on the CPU")] = 2,
    repeats: Annotated[int, typer.Option(help="rounds that count; one more warms up")] = 3,
    feature_size: Annotated[int, typer.Option(help="channels of the networks; the paper's is 48")] = 12,
    patch: Annotated[int, typer.Option(help="voxels per side; the paper's is 96")] = 64,
    image: Annotated[Path, typer.Option(help="where the curves go")] = IMAGE,
) -> None:
    """Measure the four curves."""
    keep_freed_memory()
    torch.set_num_threads(threads)
    both = Both(full_size(model__feature_size=feature_size, patch=[patch] * 3), device)
    curves = {"size": SIZES, "overlap": OVERLAPS, "batch": BATCHES, "sentences": SENTENCES}
    points = {tuple((MIDDLE | {name: value}).items()) for name, values in curves.items() for value in values}
    runs = {
        (network, point): partial(timed, partial(both.run, network, **dict(point)), device)  # type: ignore[arg-type]
        for point in sorted(points)
        for network in TWINS
    }
    found = alternate(runs, repeats)  # type: ignore[arg-type]
    rows: dict[str, list[dict[str, Any]]] = {}
    table = Table("curve", "value", "CPU s Swin UNETR", "CPU s BiPVL-Seg", "CPU ratio", "wall ratio")
    for name, values in curves.items():
        for value in values:
            point = tuple((MIDDLE | {name: value}).items())
            row = compared(found, ("ours", point), ("stock", point))
            stock = compared(found, ("stock", point), ("stock", point))
            rows.setdefault(name, []).append({"value": value, "ours": row, "stock": stock})
            seconds = [f"{r['cpu']['median']:.2f}" for r in (stock, row)]
            table.add_row(name, str(value), *seconds, f"{row['cpu_ratio']:.2f}", f"{row['wall_ratio']:.2f}")
    Console(width=140).print(table)
    save(f"scaling-{device}", {"feature_size": feature_size, "patch": patch, "middle": MIDDLE, "curves": rows})
    draw(rows, "cpu" if device == "cpu" else "wall", patch, image)


def draw(rows: dict[str, list[dict[str, Any]]], kind: str, patch: int, path: Path) -> None:
    """One plot per curve."""
    labels = {
        "size": f"side of the volume, in patches of {patch}³",
        "overlap": "overlap of windows",
        "batch": "windows a pass",
        "sentences": "sentences (classes x concepts)",
    }
    figure, axes = plt.subplots(1, 4, figsize=(14, 3.4), layout="constrained")
    for axis, (name, points) in zip(axes, rows.items(), strict=True):
        for network, label in TWINS.items():
            times = [p[network][kind] for p in points]
            middle = [t["median"] for t in times]
            spread = [[t["median"] - t["q1"] for t in times], [t["q3"] - t["median"] for t in times]]
            axis.errorbar([p["value"] for p in points], middle, spread, marker="o", capsize=3, label=label)
        axis.set(xlabel=labels[name], ylim=(0, None))
        if name == "sentences":
            axis.set_xscale("log")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("CPU seconds a volume" if kind == "cpu" else "seconds a volume")
    axes[0].legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    typer.run(main)
