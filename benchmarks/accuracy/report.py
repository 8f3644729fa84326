"""Tables and plots of the accuracy benchmark, from the results of its runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

from benchmarks import records
from benchmarks.accuracy.settings import ABLATIONS, DROPPED, FEW, FORMATS, SHUFFLED, SUPERVISED, VISION_ONLY, matrix

SECTION = "accuracy tables"
NAMES = {
    "swin_unetr": "Swin UNETR",
    "swin_unetr_v2": "Swin UNETR V2",
    "unetr": "UNETR",
    "unet": "U-Net",
    "unetpp": "UNet++",
    "dynunet": "DynUNet",
    "mednext": "MedNeXt",
    "resenc": "ResEnc U-Net",
    "bipvl-fixed": "BiPVL-Seg, fixed head",
    "bipvl-text": "BiPVL-Seg, text head",
}
MAPS = " with class maps, no text"
SOME = ", in 0.3 of the steps some classes"
# Of the learning curve: model, variant, name, colour.
CURVES = (
    ("swin_unetr", "", NAMES["swin_unetr"], "#555555"),
    ("swin_unetr", SUPERVISED, NAMES["swin_unetr"] + MAPS, "#2a9d8f"),
    ("bipvl-fixed", "", NAMES["bipvl-fixed"], "#1f6fb4"),
    ("bipvl-text", "", NAMES["bipvl-text"], "#d1495b"),
    ("bipvl-text", DROPPED, NAMES["bipvl-text"] + SOME, "#edae49"),
)
Result = dict[str, Any]


def read_results(file: Path, task: str, size: str) -> list[Result]:
    """The runs of a task and size that were scored on test cases with nothing else changed."""
    found = sorted(records.read(file, curves=True), key=lambda run: run["name"])
    return [
        r
        for r in found
        if r["run"]["task"] == task and r["run"]["size"] == size and r["on"] == "test" and not r["run"]["overrides"]
    ]


def model_of(result: Result) -> str:
    run = result["run"]
    return f"bipvl-{run['head']}" if run["model"] == "bipvl" else run["model"]


def select(results: Iterable[Result], model: str, variant: str = "", patients: int | None = None) -> list[Result]:
    """Runs of one configuration, over seeds or folds. No number of patients means all of the split's."""
    return [
        r
        for r in results
        if model_of(r) == model and r["run"]["variant"] == variant and r["run"]["train_patients"] == patients
    ]


def main_table(results: list[Result], models: Sequence[str]) -> str:
    """One line per model, and after it those of its variants, if there are any: DSC, HD95, NSD, and DSC of each class;
    mean ± standard deviation over runs."""
    lines = []
    classes: list[str] = []
    for model in models:
        for variant, addition in (("", ""), (SUPERVISED, MAPS), (DROPPED, SOME)):
            found = select(results, model, variant)
            if found:
                classes = [c for c in found[0]["scores"] if c != "mean"]
                lines.append(_line(NAMES[model] + addition, found, classes))
    return _table(["network", "runs", "DSC %", "HD95 mm", "NSD %", *(f"{c}, DSC %" for c in classes)], lines)


def variant_table(results: list[Result], names: dict[str, str]) -> str:
    """One line per variant of BiPVL-Seg with the fixed head."""
    rows = [(name, select(results, "bipvl-fixed", variant)) for variant, name in names.items()]
    rows = [(name, found) for name, found in rows if found]
    classes = [c for c in rows[0][1][0]["scores"] if c != "mean"] if rows else []
    lines = [_line(name, found, classes) for name, found in rows]
    return _table(["setting", "runs", "DSC %", "HD95 mm", "NSD %", *(f"{c}, DSC %" for c in classes)], lines)


def text_table(results: list[Result], variant: str = "") -> str:
    """DSC with other text at inference, for both heads; shuffled text is scored by channel and by sentences read."""
    kinds = ("own", "shuffled", "names only", "empty")
    lines = []
    for model in ("bipvl-fixed", "bipvl-text"):
        found = [r for r in select(results, model, variant) if r.get("text")]
        if not found:
            continue
        cells = [NAMES[model], str(len(found))]
        for kind in kinds:
            cells.append(_spread([_text_dice(r, kind, "mean") for r in found], 100, 1))
            if kind == "shuffled":
                cells.append(_spread([_text_dice(r, kind, "follows") for r in found], 100, 1))
        lines.append(cells)
    head = ["network", "runs", "own text", "shuffled, by channel", "shuffled, by sentence", "names only", "empty"]
    return _table(head, lines)


def curve_table(results: list[Result], full: int) -> str:
    """DSC by the number of training patients."""
    lines = []
    for model, variant, name, _ in CURVES:
        cells = [name]
        for n in (*FEW, None):
            found = select(results, model, variant, n)
            cells.append(f"{_spread([_dice(r) for r in found], 100, 1)} ({len(found)})" if found else "not run")
        if any(c != "not run" for c in cells[1:]):
            lines.append(cells)
    return _table(["network", *(f"{n} patients" for n in (*FEW, full))], lines)


def state_table(results: list[Result], task: str, size: str) -> str:
    """How much of the matrix has been run."""
    done = {r["name"] for r in results}
    runs = matrix(task, size)
    opened = [run.name for run in runs if run.name not in done]
    text = f"{len(runs) - len(opened)} of {len(runs)} runs of the matrix are done."
    if opened:
        text += " Not yet: " + ", ".join(f"`{name.removeprefix(f'{task}_{size}_')}`" for name in opened) + "."
    return text


def tables(results: list[Result], task: str, size: str) -> str:
    """All tables as one markdown text."""
    main = ("swin_unetr", "bipvl-fixed", "bipvl-text")
    patients = max((len(r["patients"]["training"]) for r in results), default=0)
    names = {"": "BiPVL-Seg"} | {v: v.replace("-", " ") for v in ABLATIONS}
    names["paper-embedding"] = "class embedding of V_4 (paper)"
    formats = (
        {"": "consistent concepts"} | {v: v for v in FORMATS} | {SHUFFLED: "text of another class, in training too"}
    )
    parts = [
        ("Main comparison", main_table(results, main)),
        ("Other text at inference (DSC %)", text_table(results)),
        ("Few labels (DSC %, runs in brackets)", curve_table(results, patients)),
        ("Ablations (the paper's Table 3)", variant_table(results, names)),
        ("Text formats in training (the paper's Table 2)", variant_table(results, formats)),
        ("Networks without text", main_table(results, VISION_ONLY)),
        ("State of the matrix", state_table(results, task, size)),
    ]
    return "\n\n".join(f"### {title}\n\n{text}" for title, text in parts)


def paper_row(results: list[Result]) -> str:
    """Our row of the paper's Table 1 for this data set. The paper's own figures are to be read there."""
    lines = []
    for model in NAMES:
        found = select(results, model)
        if found:
            cells = [_spread([r["scores"]["mean"][m] for r in found], f, 1) for m, f in METRIC_SCALE]
            lines.append([NAMES[model], str(len(found)), *cells, "see arXiv 2503.23534, Table 1"])
    return _table(["network", "folds", "DSC %", "HD95 mm", "NSD %", "paper"], lines)


# Plots ----------------------------------------------------------------------------------------------------------------


def plot_few_labels(results: list[Result], path: Path) -> None:
    """DSC over the number of training patients, once there are two: one point per run, a line through the means."""
    if len({len(r["patients"]["training"]) for r in results}) < 2:
        return
    figure, axes = plt.subplots(figsize=(6.4, 4), layout="constrained")
    for model, variant, name, colour in CURVES:
        points: dict[int, list[float]] = {}
        for r in results:
            if model_of(r) == model and r["run"]["variant"] == variant:
                points.setdefault(len(r["patients"]["training"]), []).append(100 * _dice(r))
        if points:
            xs = sorted(points)
            axes.plot(xs, [mean(points[x]) for x in xs], color=colour, label=name)
            axes.plot([x for x in xs for _ in points[x]], [y for x in xs for y in points[x]], "o", color=colour, ms=4)
    axes.set(xscale="log", xlabel="training patients", ylabel="DSC on the test patients, %")
    axes.set_xticks([4, 8, 16, 40], ["4", "8", "16", "40"])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    _save(figure, path)


def plot_training(results: list[Result], path: Path) -> None:
    """Losses, sigmas, alignment and concept weights over the steps, one column per head; one line per seed."""
    models = [m for m in ("bipvl-fixed", "bipvl-text") if select(results, m)]
    if not models:
        return
    figure, grid = plt.subplots(4, len(models), figsize=(5 * len(models), 11), layout="constrained", squeeze=False)
    for column, model in enumerate(models):
        axes = grid[:, column]
        for number, result in enumerate(select(results, model)):
            curves, first = result["curves"], number == 0
            for i, name in enumerate(("segmentation", "class_embedding", "alignment")):
                label = name.replace("_", " ") if first else None
                axes[0].plot(curves["step"], curves[name], color=f"C{i}", label=label, alpha=0.8, lw=1)
                axes[1].plot(curves["step"], curves[f"sigma_{name}"], color=f"C{i}", label=label, alpha=0.8, lw=1)
            own, other = _cosines(curves["similarity"])
            axes[2].plot(curves["step"], own, color="C2", label="T and V of a class" if first else None, lw=1)
            axes[2].plot(curves["step"], other, color="C7", label="of different classes" if first else None, lw=1)
            axes[2].plot(
                curves["step"], curves["spread"], "k:", label="spread of the classes' rows" if first else None, lw=1
            )
            if first:
                _plot_weights(axes[3], result)
        axes[0].set(title=NAMES[model], ylabel="loss", yscale="log")
        axes[1].set(ylabel="sigma", yscale="log")
        axes[2].set(ylabel="cosine; spread", ylim=(-1.05, 1.05))
        axes[3].set(ylabel="w_k (seed 0)", xlabel="training step")
        for each in axes:
            each.grid(alpha=0.3)
            each.legend(fontsize=7, ncols=2)
    _save(figure, path)


def _plot_weights(axes: Any, result: Result) -> None:
    names = [c for c in result["scores"] if c != "mean"]
    weights = result["curves"]["weights"]
    for c, (name, style) in enumerate(zip(names, ("-", "--", ":", "-."), strict=False)):
        for k in range(len(weights[0][c])):
            label = name if k == 0 else None
            axes.plot(result["curves"]["step"], [w[c][k] for w in weights], style, color=f"C{k}", label=label, lw=1)


def _cosines(matrices: list[list[list[float]]]) -> tuple[list[float], list[float]]:
    """Mean of the diagonal and of everything else, of each matrix."""
    own, other = [], []
    for m in matrices:
        n = len(m)
        own.append(mean(m[i][i] for i in range(n)))
        other.append(mean([m[i][j] for i in range(n) for j in range(n) if i != j] or [0.0]))
    return own, other


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


# Numbers --------------------------------------------------------------------------------------------------------------

METRIC_SCALE = (("dice", 100), ("hd95", 1), ("nsd", 100))


def _line(name: str, found: list[Result], classes: Sequence[str]) -> list[str]:
    cells = [_spread([r["scores"]["mean"][m] for r in found], f, 1) for m, f in METRIC_SCALE]
    cells += [_spread([r["scores"][c]["dice"] for r in found], 100, 1) for c in classes]
    return [name, str(len(found)), *cells]


def _dice(result: Result) -> float:
    return result["scores"]["mean"]["dice"]


def _text_dice(result: Result, kind: str, by: str) -> float | None:
    values = [t[by]["mean"]["dice"] for t in result["text"] if t["kind"] == kind and by in t]
    return mean(values) if values else None


def _spread(values: Sequence[float | None], factor: float, digits: int) -> str:
    """Mean ± standard deviation over runs; the value alone if there is one run."""
    counted = [v * factor for v in values if v is not None]
    if not counted:
        return "-"
    form: Callable[[float], str] = lambda v: f"{v:.{digits}f}"  # noqa: E731
    return form(mean(counted)) + (f" ± {form(stdev(counted))}" if len(counted) > 1 else "")


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    if not lines:
        return "Not run yet."
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)
