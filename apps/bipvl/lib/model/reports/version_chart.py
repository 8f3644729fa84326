"""A picture of a task's versions: what each scored, which were served, and what the gate decided, class by class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

SERVED, KEPT = "#1a7f5a", "#b3402e"
LIMIT = 0.2  # difference in Dice at which the colour is full


def version_chart(task: str, manifests: Sequence[Mapping[str, Any]], out: Path) -> None:
    """Draw the versions of a task as PNG.

    Above, the mean Dice of each version and of the one that it was compared with; below, the difference of each class
    that the gate saw.

    Args:
        manifests: of `Versions.manifests`, oldest first; the damaged ones are left out.

    Raises:
        ValueError: no version to draw.
    """
    known = [m for m in manifests if isinstance(m.get("gate"), dict)]
    if not known:
        raise ValueError(f"task {task!r} has no version with a gate decision to draw; train first")
    classes = [row["class"] for row in known[-1]["gate"]["table"]]
    figure = Figure(figsize=(2.6 + 1.25 * len(known), 3.4 + 0.3 * len(classes)), dpi=120, layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[2.6, 0.3 * len(classes)])
    figure.suptitle(f"Versions of {task}", fontsize=12)
    _scores(above, known)
    _differences(below, known, classes)
    figure.savefig(out, format="png")


def _scores(axes: Axes, manifests: Sequence[Mapping[str, Any]]) -> None:
    for x, manifest in enumerate(manifests):
        published = manifest["gate"]["publish"]
        mean = manifest["gate"]["table"][-1]
        colour = SERVED if published else KEPT
        if mean["candidate"] is not None:
            axes.plot(x, mean["candidate"], "o" if published else "X", color=colour, markersize=11, zorder=3)
            fell = mean["served"] is not None and mean["candidate"] < mean["served"]
            offset = (0, -18 if fell else 11)  # away from the line to the served version
            axes.annotate(f"{mean['candidate']:.3f}", (x, mean["candidate"]), offset, **_LABEL, color=colour)
        if mean["served"] is not None:
            axes.plot([x - 0.3, x + 0.3], [mean["served"]] * 2, color="#777777", linewidth=2)
            if mean["candidate"] is not None:
                axes.plot([x, x], [mean["served"], mean["candidate"]], color=colour, linewidth=1)
        if manifest["served"]:
            axes.axvspan(x - 0.45, x + 0.45, color=SERVED, alpha=0.12, linewidth=0)
    axes.set_ylabel("mean Dice")
    axes.margins(y=0.35)
    axes.spines[["top", "right"]].set_visible(False)
    handles = [
        axes.plot([], [], "o", color=SERVED, label="served by the gate")[0],
        axes.plot([], [], "X", color=KEPT, label="kept, not served")[0],
        axes.plot([], [], color="#777777", linewidth=2, label="the served version on the same cases")[0],
        axes.fill_between([], [], [], color=SERVED, alpha=0.12, linewidth=0, label="answers now"),
    ]
    axes.legend(handles=handles, fontsize=7, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)


def _differences(axes: Axes, manifests: Sequence[Mapping[str, Any]], classes: Sequence[str]) -> None:
    values = np.full((len(classes), len(manifests)), np.nan)
    for x, manifest in enumerate(manifests):
        rows = {row["class"]: row["difference"] for row in manifest["gate"]["table"]}
        for y, name in enumerate(classes):
            if rows.get(name) is not None:
                values[y, x] = rows[name]
    axes.imshow(np.ma.masked_invalid(values), cmap="RdYlGn", vmin=-LIMIT, vmax=LIMIT, aspect="auto")
    for (y, x), value in np.ndenumerate(values):
        colour = "white" if abs(value) > 0.7 * LIMIT else "black"
        axes.text(x, y, "-" if np.isnan(value) else f"{value:+.3f}", ha="center", va="center", fontsize=8, color=colour)
    axes.set_yticks(range(len(classes)), classes, fontsize=8)
    labels = [f"v{m['version']}\n{'served' if m['gate']['publish'] else 'kept'}" for m in manifests]
    axes.set_xticks(range(len(manifests)), labels, fontsize=8)
    axes.set_xlabel("difference in Dice to the version that was served then", fontsize=8)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


_LABEL: dict[str, Any] = {"textcoords": "offset points", "ha": "center", "fontsize": 8}
