"""Tables and the plot of the active-learning simulation, from the results of its runs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from scipy.stats import spearmanr

from benchmarks import records

SECTION = "active-learning tables"
ORDER = ("random", "first", "uncertainty", "alignment", "diverse", "combined")
COLOURS = {
    "random": "#555555",
    "first": "#999999",
    "uncertainty": "#1f6fb4",
    "alignment": "#d1495b",
    "diverse": "#2a9d5c",
    "combined": "#8e5bb5",
}
Result = dict[str, Any]


def read_results(file: Path, task: str, size: str, head: str) -> list[Result]:
    """The finished runs of a task, size and head; first rounds alone are not runs."""
    found = sorted(records.read(file), key=lambda run: run["name"])
    same = [r for r in found if (r["run"]["task"], r["run"]["size"], r["run"]["head"]) == (task, size, head)]
    return [r for r in same if r["run"]["strategy"] in ORDER]


def area(result: Result) -> float:
    """Area under Dice over labelled patients, divided by the range of patients: the mean Dice on the way, 0 to 1."""
    points = [(len(r["labelled"]), r["dice"]) for r in result["rounds"]]
    trapezoids = ((x1 - x0) * (y0 + y1) / 2 for (x0, y0), (x1, y1) in pairwise(points))
    return sum(trapezoids) / (points[-1][0] - points[0][0])


def of(results: Iterable[Result], strategy: str) -> dict[int, Result]:
    """Seed to run."""
    return {r["run"]["seed"]: r for r in results if r["run"]["strategy"] == strategy}


def curve_table(results: list[Result]) -> str:
    """Dice by labelled patients, one line per strategy."""
    counts = sorted({len(r["labelled"]) for result in results for r in result["rounds"]})
    lines = []
    for strategy in ORDER:
        runs = list(of(results, strategy).values())
        if runs:
            cells = [_spread([100 * d for r in runs for d in _dice_at(r, n)]) for n in counts]
            lines.append([strategy, str(len(runs)), *cells])
    return _table(["strategy", "seeds", *(f"{n} patients" for n in counts)], lines)


def area_table(results: list[Result]) -> str:
    """Area under the curve, and its difference from random's with the same seed, that is the same first round."""
    reference = of(results, "random")
    lines = []
    for strategy in ORDER:
        runs = of(results, strategy)
        if not runs:
            continue
        differences = [100 * (area(runs[s]) - area(reference[s])) for s in sorted(runs) if s in reference]
        own = strategy == "random" or not differences
        lines.append(
            [
                strategy,
                _spread([100 * area(r) for r in runs.values()]),
                "-" if own else _spread(differences, signed=True),
                "-" if own else ", ".join(f"{d:+.1f}" for d in differences),
                "-" if own else verdict(differences),
            ]
        )
    return _table(["strategy", "area, %", "less random's", "seed by seed", "better than random"], lines)


def verdict(differences: Sequence[float]) -> str:
    """Said before anything was run: better or worse only if every seed says so, and there are at least three."""
    if len(differences) < 3:
        return "too few seeds"
    better, worse = all(d > 0 for d in differences), all(d < 0 for d in differences)
    return "in every seed" if better else "worse in every seed" if worse else "not shown"


def foretell_table(results: list[Result]) -> str:
    """Spearman correlation of a score with the Dice that the network has on the pool's patients at that moment: mean
    over all pools that were scored; -1 would be a perfect score of what goes wrong."""
    lines = []
    counts = sorted({len(r["labelled"]) for result in results for r in result["rounds"] if "pool" in r})
    kinds = (("entropy", 1.0, "entropy"), ("alignment", -1.0, "disagreement (low alignment)"))
    for kind, sign, name in kinds:
        cells = []
        for n in counts:
            found = []
            for pool in _pools(results, n):
                scores, truth = [sign * p[kind] for p in pool], [p["dice"] for p in pool]
                if np.ptp(scores) > 0 and np.ptp(truth) > 0:  # a constant ranks nothing
                    found.append(float(spearmanr(scores, truth).statistic))
            cells.append(_spread(found, digits=2, signed=True))
        lines.append([name, *cells])
    return _table(["score", *(f"after {n} patients" for n in counts)], lines)


def tables(results: list[Result]) -> str:
    """All tables as one markdown text."""
    if not results:
        return "Not run yet."
    parts = [
        ("Dice on the test patients, %", curve_table(results)),
        ("Area under the curve", area_table(results)),
        ("Do the scores foretell where the network is wrong?", foretell_table(results)),
    ]
    run, first = results[0]["run"], results[0]
    packages = ", ".join(f"{name} {number}" for name, number in first["packages"].items())
    setting = (
        f"{run['first_steps']} training steps in the first round, {run['steps']} in each later one, which goes on from "
        f"the weights before. {first['hardware']}; {packages}; commit "
        f"{', '.join(sorted({r['commit'] for r in results}))}. Changed from the size `{run['size']}`: "
        f"{', '.join(f'`{k}={v}`' for k, v in run['overrides'].items()) or 'nothing'}."
    )
    return "\n\n".join([setting, *(f"### {title}\n\n{text}" for title, text in parts)])


def plot(results: list[Result], path: Path) -> None:
    """Dice over labelled patients: means, with the standard deviation over seeds as error bars."""
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    shown = [s for s in ORDER if of(results, s)]
    for place, strategy in enumerate(shown):
        runs = list(of(results, strategy).values())
        xs = [len(r["labelled"]) for r in runs[0]["rounds"]]
        values = [[100 * d for r in runs for d in _dice_at(r, n)] for n in xs]
        axes.errorbar(
            [x + 0.16 * (place - (len(shown) - 1) / 2) for x in xs],  # beside one another, to be told apart
            [mean(v) for v in values],
            [stdev(v) if len(v) > 1 else 0 for v in values],
            color=COLOURS[strategy],
            label=f"{strategy}, area {mean(100 * area(r) for r in runs):.1f}",
            marker="o",
            ms=3.5,
            lw=1.4,
            capsize=2,
            elinewidth=0.8,
        )
    axes.set(xlabel="labelled patients", ylabel="Dice on the test patients, %")
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def _dice_at(result: Result, patients: int) -> list[float]:
    return [r["dice"] for r in result["rounds"] if len(r["labelled"]) == patients]


def _pools(results: list[Result], patients: int) -> list[list[dict[str, float]]]:
    """Different pools scored after so many patients: strategies of one seed share the first one, which counts once."""
    found = {
        json.dumps(r["pool"]): list(r["pool"].values())
        for result in results
        for r in result["rounds"]
        if "pool" in r and len(r["labelled"]) == patients
    }
    return list(found.values())


def _spread(values: Sequence[float], digits: int = 1, signed: bool = False) -> str:
    """Mean ± standard deviation over runs; the value alone if there is one."""
    if not values:
        return "-"
    middle = f"{mean(values):{'+' if signed else ''}.{digits}f}"
    return middle + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *lines])
