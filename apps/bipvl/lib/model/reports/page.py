"""Reports: what a round trained, or what an evaluation scored, as one HTML page with everything in it.

    model/<task>/v0003.html    beside the version that the round published; goes when the version goes

The page loads nothing and runs no script. It shows slices of the cases, so only those who may read images may read it.
"""

from __future__ import annotations

import base64
import io
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jinja2 import Environment, StrictUndefined
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from lib.files import write_atomic
from lib.model.predict import Prediction
from lib.model.reports.charts import COLOURS, Points, diverging, ink, line_chart
from lib.tasks import ATTRIBUTES, Task
from lib.volumes import metrics
from lib.volumes.picture import opposed, overlay, plane, read_for_picture, resized, window
from lib.volumes.transforms import decode

logger = logging.getLogger(__name__)

# Nothing may be loaded, run, framed or sent. Colours of cells are style attributes.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
WORST = 3  # cases that are shown
HEIGHT = 280  # of the largest plane, in pixels
PLANES = ("axial", "coronal", "sagittal")
LOSSES = {
    "segmentation": "segmentation",
    "class_embedding": "class embedding",
    "alignment_global": "alignment, global",
    "alignment_local": "alignment, local",
}
SIGMAS = {
    "sigma_segmentation": "segmentation",
    "sigma_class_embedding": "class embedding",
    "sigma_alignment": "alignment",
}

_environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
_environment.filters["decimals"] = lambda value, digits=3: _decimals(value, f".{digits}f")
_environment.filters["signed"] = lambda value: _decimals(value, "+.3f")
_template = _environment.from_string(Path(__file__).with_name("page.html.j2").read_text(encoding="utf-8"))


@dataclass
class Shown:
    """A case with its planes: title of the row (reference, model, differences) to data URIs, in the order of PLANES."""

    case: str
    mean: float
    rows: list[metrics.Row]
    planes: dict[str, list[str]]


class Examined:
    """Collects what a report shows of the cases that a model is scored on: scores, text weights, the worst cases.

    Keeps pictures of the worst cases only. What goes wrong here is logged; it never stops what it watches.
    """

    def __init__(self, task: Task, worst: int = WORST) -> None:
        self.task = task
        self.worst = worst
        self.rows: list[metrics.Row] = []
        self.shown: list[Shown] = []
        self._weights: list[Tensor] = []
        self._similarity: list[Tensor] = []

    @property
    def weights(self) -> list[list[float]] | None:
        """w_k of each class (C, K), mean over cases; None before the first."""
        return torch.stack(self._weights).mean(0).tolist() if self._weights else None

    @property
    def similarity(self) -> list[list[float]] | None:
        """Cosines of text (rows) and vision (columns) of the classes (C, C), mean over cases."""
        return torch.stack(self._similarity).mean(0).tolist() if self._similarity else None

    def prediction(self, data: Mapping[Any, Any], prediction: Prediction, found: Tensor, target: Tensor) -> None:
        """Add a case on the network's grid.

        Args:
            data: what `transforms.load` returned, with the case's `id`.
            found, target: (C, h, w, d) predicted and true masks.
        """
        try:
            task, spacing = self.task, list(self.task.spacing)
            known = [name for name, yes in zip(task.classes, data["annotated"].tolist(), strict=True) if yes]
            rows = metrics.evaluate_masks(task.classes, found > 0, target > 0, spacing, str(data["id"]))
            self._add_text(prediction.concept_weights, prediction.similarity)
            background = [] if task.overlapping else [1 - target.amax(0, keepdim=True)]
            masks = {
                "Reference": decode(torch.cat([*background, target]), task).numpy(),
                "Model": decode(prediction.probabilities.cpu(), task).numpy(),
            }
            grey = np.asarray(data["image"][0])
            grey = grey if task.intensity.mode == "range" else window(grey, task)
            self._add([row for row in rows if row.name in known], grey, np.array(spacing), masks)
        except Exception:  # a round must not fail for its report
            logger.exception("Case %s is not in the report", data.get("id"))

    def files(
        self, rows: Sequence[metrics.Row], image: Path, mask: Path, reference: Path, result: Mapping[str, Any]
    ) -> None:
        """Add a case from files: its scores, image, predicted and true labels, and what the inference result says."""
        try:
            weights = [list(result["concept_weights"][name].values()) for name in self.task.classes]
            similarity = [list(result["similarity"][name].values()) for name in self.task.classes]
            self._add_text(torch.tensor(weights), torch.tensor(similarity))
            grey, spacing, labels = read_for_picture(self.task, image, {"Reference": reference, "Model": mask})
            self._add(list(rows), grey, spacing, {title: _own_values(self.task, m) for title, m in labels.items()})
        except Exception:
            logger.exception("Case %s is not in the report", image)

    def _add_text(self, weights: Tensor, similarity: Tensor) -> None:
        self._weights.append(weights.float().cpu())
        self._similarity.append(similarity.float().cpu())

    def _add(self, rows: list[metrics.Row], grey: NDArray, spacing: NDArray, masks: Mapping[str, NDArray]) -> None:
        self.rows += rows
        counted = [row.dice for row in rows if row.dice == row.dice]
        mean = float(np.mean(counted)) if counted else 1.0
        if len(self.shown) == self.worst and mean >= self.shown[-1].mean:
            return
        shown = Shown(rows[0].case if rows else "", mean, rows, _planes(self.task, grey, spacing, masks))
        self.shown = sorted([*self.shown, shown], key=lambda s: s.mean)[: self.worst]


def round_report(
    task: Task,
    version: int,
    manifests: Sequence[Mapping[str, Any]],
    history: Mapping[str, Points],
    examined: Examined,
    scored: str,
    doubts: str = "",
) -> str:
    """The page of a training round.

    Args:
        version: what the round published.
        manifests: of `Versions.manifests`, with this version's.
        history: scalar to points (epoch, value), as `trainers.tracking.Tracker` collects them.
        examined: the cases that the model was scored on.
        scored: which cases these are, as a sentence.
        doubts: what people answered where the parent doubted.
    """
    manifest = next(m for m in manifests if m["version"] == version)
    gate = manifest.get("gate") or {}
    facts = {
        "Trained on": _cases(manifest.get("trained_on")),
        "Validated on": _cases(manifest.get("validated_on")),
        "Started from": f"version {manifest['parent']}" if manifest.get("parent") else "fresh weights",
        "Epochs": f"{len(history.get('loss', []))}, the model is of epoch {manifest.get('epoch')}",
        "Time": f"{_time(manifest)}, took {_minutes(manifest.get('seconds'))}",
        "Sentences": f"{task.concepts.hash} ({task.concepts.review.status})",
        **({"Where the parent doubted": doubts} if doubts else {}),
    }
    charts = [
        (
            "Loss parts",
            line_chart(_named(history, LOSSES), log=True),
            list(LOSSES.values()),
            "of Eqs. (3) to (13), logarithmic",
        ),
        (
            "Learned sigmas",
            line_chart(_named(history, SIGMAS)),
            list(SIGMAS.values()),
            "of Eq. (15): a loss weighs 1 / (2 sigma²)",
        ),
        (
            "Total loss",
            line_chart({"loss": history.get("loss", [])}),
            [],
            "the weighted sum; it falls below 0 as the sigmas do",
        ),
        ("Learning rate", line_chart({"learning rate": history.get("learning_rate", [])}), [], "of the vision side"),
    ]
    return _page(
        task,
        title=f"{task.name}, version {version}",
        kind="Training round",
        badge=("served" if gate.get("publish") else "kept, not served", bool(gate.get("publish"))),
        lead=str(gate.get("reason", "")),
        facts=facts,
        scored=scored,
        charts=[
            (name, svg, list(zip(legend, COLOURS, strict=False)), note) for name, svg, legend, note in charts if svg
        ],
        dice=_dice_charts(task, history, manifest.get("epoch")),
        gate=gate,
        versions=_versions(manifests, version),
        details={key: manifest.get(key) for key in ("options", "packages", "trained_on", "validated_on", "seed")},
        examined=examined,
    )


def evaluation_report(
    task: Task, version: int, manifests: Sequence[Mapping[str, Any]], examined: Examined, tolerance: float
) -> str:
    """The page of an evaluation. Scores are on the grid of the files.

    Args:
        version: what was evaluated; 0 for fresh weights.
        tolerance: of the surface Dice, mm.
    """
    manifest: Mapping[str, Any] = next((m for m in manifests if m["version"] == version), {})
    cases = list(dict.fromkeys(row.case for row in examined.rows))
    seen = sorted(set(cases) & set(manifest.get("seen") or manifest.get("trained_on") or []))
    facts = {
        "Cases": _cases(cases),
        "Of them seen in training": _cases(seen),
        "Version of": _time(manifest),
        "Sentences": f"{task.concepts.hash} ({task.concepts.review.status})",
    }
    warning = f"The model, or one it descends from, was trained on {len(seen)} of these cases." if seen else ""
    return _page(
        task,
        title=f"{task.name}, version {version}" if version else f"{task.name}, untrained",
        kind="Evaluation",
        badge=(f"{len(cases)} case{'s' if len(cases) != 1 else ''}", True),
        lead=warning,
        facts=facts,
        scored=f"Scored on the grid of the files; surface Dice at {tolerance:g} mm.",
        charts=[],
        dice=[],
        gate={},
        versions=_versions(manifests, version, linked=False),
        details={},
        examined=examined,
    )


def write_report(page: str, path: Path) -> None:
    """Write a page atomically."""
    write_atomic(path, lambda file: file.write(page.encode()))


def _decimals(value: float | None, form: str) -> str:
    return "–" if value is None or value != value else format(value, form)


def _page(task: Task, *, examined: Examined, **values: Any) -> str:
    attributes: Sequence[Any] = ATTRIBUTES if task.model.text_format == "concepts" else ()
    weights = examined.weights or []
    columns = list(attributes) or [f"sentence {k + 1}" for k in range(len(weights[0]) if weights else 0)]
    return _template.render(
        policy=POLICY,
        task=task,
        colours={name: _css(task, name) for name in (*task.classes, *task.labels)},
        classes=_class_rows(task, examined.rows),
        cases=_case_rows(task, examined.rows),
        shown=examined.shown,
        planes=PLANES,
        concepts=(columns, _heat(task, weights, lambda w: w * len(columns) - 1)) if weights else None,
        similarity=_heat(task, examined.similarity or [], float) if examined.similarity else None,
        **values,
    )


def _class_rows(task: Task, rows: Sequence[metrics.Row]) -> list[tuple[str, dict[str, metrics.Statistic]]]:
    return list(metrics.summary(rows).items()) if rows else []


def _case_rows(task: Task, rows: Sequence[metrics.Row]) -> list[tuple[str, float, list[float | None]]]:
    """Case, mean Dice, Dice of each class in order; the worst case first."""
    table = []
    for case in dict.fromkeys(row.case for row in rows):
        dice = {row.name: row.dice for row in rows if row.case == case}
        counted = [d for d in dice.values() if d == d]
        table.append((case, float(np.mean(counted)) if counted else float("nan"), [dice.get(c) for c in task.classes]))
    return sorted(table, key=lambda row: (row[1] != row[1], row[1]))


def _dice_charts(task: Task, history: Mapping[str, Points], epoch: int | None) -> list[tuple[str, Any, float]]:
    """Class, its chart over epochs, and its last value; the mean first."""
    names = {"mean": "val_mean_dice"} | {name: f"dice_{name.replace(' ', '_')}" for name in task.classes}
    charts = []
    for name, key in names.items():
        points = history.get(key, [])
        if points:
            colour = "#1d2733" if name == "mean" else _css(task, name)
            svg = line_chart({name: points}, [colour], limits=(0, 1), mark=epoch, size=(240, 130))
            charts.append((name, svg, points[-1][1]))
    return charts


def _heat(
    task: Task, values: Sequence[Sequence[float]], share: Callable[[float], float]
) -> list[tuple[str, list[tuple[float, str, str]]]]:
    """Class and its cells: (value, background, ink). `share` maps a value to -1 … 1, the ends of the colours."""
    return [
        (name, [(value, diverging(share(value)), ink(share(value))) for value in row])
        for name, row in zip(task.classes, values, strict=True)
    ]


def _versions(manifests: Sequence[Mapping[str, Any]], this: int, linked: bool = True) -> list[dict[str, Any]]:
    """One row per version, the newest first."""
    table = []
    for m in reversed(manifests):
        gate = m.get("gate") or {}
        rows = {row["class"]: row for row in gate.get("table", [])}
        number = m["version"]
        table.append(
            {
                "number": number,
                "this": number == this,
                "link": f"v{number:04d}.html" if linked and number != this and m.get("report") else None,
                "time": _time(m),
                "parent": m.get("parent") or "–",
                "cases": len(m.get("trained_on") or []),
                "mean": rows.get("mean", {}).get("candidate"),
                "difference": rows.get("mean", {}).get("difference"),
                "state": "served" if m["served"] else m.get("damaged") or m.get("status") or "–",
                "reason": gate.get("reason", m.get("origin", "–")),
            }
        )
    return table


def _named(history: Mapping[str, Points], names: Mapping[str, str]) -> dict[str, Points]:
    return {shown: history[key] for key, shown in names.items() if key in history}


def _cases(names: Sequence[str] | None, most: int = 6) -> str:
    names = list(names or [])
    if not names:
        return "none"
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{len(names)}: {', '.join(map(str, names[:most]))}{more}"


def _time(manifest: Mapping[str, Any]) -> str:
    return str(manifest.get("time", "–")).replace("T", " ").replace("+00:00", " UTC")


def _minutes(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def _css(task: Task, name: str) -> str:
    entry = task.labels.get(name) or (task.regions or {})[name]
    return "#" + bytes(entry.color).hex()


def _planes(task: Task, grey: NDArray, spacing: NDArray, masks: Mapping[str, NDArray]) -> dict[str, list[str]]:
    """Reference, model, and where they differ, each in three planes as data URIs of PNG.

    Along each axis the slice that is shown differs much and holds much of the reference: the product counts.
    """
    reference, model = (masks[title].astype(int) for title in ("Reference", "Model"))
    wrong, labelled = reference != model, reference > 0
    others = [tuple(a for a in range(3) if a != axis) for axis in range(3)]
    centre = [int(((1 + wrong.sum(axes)) * (1 + labelled.sum(axes))).argmax()) for axes in others]
    extent = np.array(grey.shape) * spacing  # mm
    scale = HEIGHT / max(extent[1], extent[2])
    result: dict[str, list[str]] = {"Reference": [], "Model": [], "Differences": []}
    for number in range(3):
        x, y, z = extent
        size = tuple(max(1, round(mm * scale)) for mm in ((y, x), (z, x), (z, y))[number])
        pixels = np.repeat(resized(plane(grey, centre, number), size, 1)[..., None], 3, axis=-1)
        flat = {t: resized(plane(m, centre, number), size, 0) for t, m in (("Reference", reference), ("Model", model))}
        for title, labels in flat.items():
            result[title].append(_png(overlay(pixels, labels, task)))
        result["Differences"].append(_png(opposed(pixels, flat["Reference"], flat["Model"])))
    return result


def _own_values(task: Task, labels: NDArray) -> NDArray:
    """What a data set's files hold, as the values that the app writes."""
    result = np.zeros_like(labels)
    for value, name in task.value_names.items():
        result[labels == value] = task.label_values[name]
    return result


def _png(pixels: NDArray) -> str:
    """RGB in [0, 1] as a data URI; 128 colours are enough for slices and half the bytes."""
    image = Image.fromarray((np.clip(pixels, 0, 1) * 255).round().astype(np.uint8)).quantize(128)
    file = io.BytesIO()
    image.save(file, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
