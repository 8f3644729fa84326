"""The publish gate: whether a round's model may take the place of the one that is served. Pure: numbers in, a decision
out."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lib.tasks import Unjudged

TOLERANCE = 1e-6  # equal models may differ in the last digits of a float32 mean

# Case id to class name to Dice. A case lacks the classes that its label was not annotated for.
Scores = Mapping[str, Mapping[str, float]]
# Case id to label name to Dice after each number of clicks.
Curves = Mapping[str, Mapping[str, Sequence[float]]]


@dataclass(frozen=True)
class Row:
    """One class, or the mean: Dice of both models; None if it was not judged."""

    name: str
    served: float | None
    candidate: float | None

    @property
    def difference(self) -> float | None:
        if self.served is None or self.candidate is None:
            return None
        return self.candidate - self.served

    def to_dict(self) -> dict[str, float | None]:
        """The figures without the name."""
        figures = {"served": self.served, "candidate": self.candidate, "difference": self.difference}
        return {name: _rounded(value) for name, value in figures.items()}


@dataclass(frozen=True)
class Clicks:
    """What a robot user's corrections of both models' masks came to.

    numbers: of clicks, in order.
    served: None if nothing is served.
    """

    numbers: tuple[int, ...]
    served: Curves | None
    candidate: Curves

    def rows(self) -> tuple[tuple[Row, ...], tuple[str, ...]]:
        """One row per number of clicks, and the cases that count. Dice is the mean over cases, then over labels, of
        what both models were clicked on."""
        labels: dict[str, list[str]] = {}  # to their cases
        for case, curves in self.candidate.items():
            for label in curves:
                if self.served is None or label in self.served.get(case, ()):
                    labels.setdefault(label, []).append(case)
        if not labels:
            return (), ()

        def after(curves: Curves, n: int) -> float:
            return _mean(_mean(curves[case][name][n] for case in cases) for name, cases in labels.items())

        rows = (
            Row(str(number), None if self.served is None else after(self.served, n), after(self.candidate, n))
            for n, number in enumerate(self.numbers)
        )
        return tuple(rows), tuple(sorted({case for cases in labels.values() for case in cases}))


@dataclass(frozen=True)
class Unseen:
    """Dice of both models' masks with wordings that neither was trained on.

    served: None if nothing is served; empty if the served model has no such figure.
    margin: how much the mean may fall; None: it decides nothing.
    """

    served: Scores | None
    candidate: Scores
    margin: float | None = None


@dataclass(frozen=True)
class Reading:
    """Dice with unseen wordings beside Dice with each model's own text, on the same cases.

    own, unseen: one row per class, and the mean last. Without a figure of the served model `unseen` has the candidate's
        alone.
    cases: what the rows are means of.
    margin: as in `Unseen`.
    """

    own: tuple[Row, ...]
    unseen: tuple[Row, ...]
    cases: tuple[str, ...]
    margin: float | None

    def line(self) -> str:
        """The means."""
        own, unseen = self.own[-1], self.unseen[-1]
        line = f"Dice with wordings it never read: {unseen.candidate:.3f} (own {own.candidate:.3f})"
        return line if unseen.served is None else f"{line}, served {unseen.served:.3f} (own {own.served:.3f})"

    def complaint(self) -> str | None:
        """What speaks against the candidate."""
        mean = self.unseen[-1]
        if self.margin is None or mean.difference is None or mean.difference >= -self.margin - TOLERANCE:
            return None
        change = f"from {mean.served:.3f} to {mean.candidate:.3f}"
        return f"reads worse: Dice with wordings that neither read falls {change}, by more than {self.margin:g}"

    def to_dict(self) -> dict[str, Any]:
        """Plain data: `served`, `candidate`, `difference` with unseen wordings; `…_own` with the models' own text."""
        table = [
            {
                "class": unseen.name,
                **unseen.to_dict(),
                "served_own": _rounded(own.served),
                "candidate_own": _rounded(own.candidate),
            }
            for own, unseen in zip(self.own, self.unseen, strict=True)
        ]
        return {"table": table, "cases": list(self.cases), "margin": self.margin}


@dataclass(frozen=True)
class Decision:
    """Whether to publish, and why.

    publish: serve the candidate. Else it is kept as a version that is not served.
    judged: the two models were compared.
    reason: a sentence for the user.
    rows: one per class, and the mean last.
    cases: what both were scored on.
    clicks: one row per number of clicks, its name; empty if nobody clicked.
    clicked: the cases that a robot clicked on.
    reading: None if the candidate read no other wordings.
    """

    publish: bool
    judged: bool
    reason: str
    rows: tuple[Row, ...]
    cases: tuple[str, ...]
    clicks: tuple[Row, ...] = ()
    clicked: tuple[str, ...] = ()
    reading: Reading | None = None

    def table(self) -> str:
        """One line per class; short, because clients show only the last twenty lines of a round."""
        width = max(len(row.name) for row in self.rows)
        lines = [f"{'Dice':<{width}}  served  candidate  difference"]
        for row in self.rows:
            served, candidate = ("-" if value is None else f"{value:.3f}" for value in (row.served, row.candidate))
            change = "" if row.difference is None else f"{row.difference:+.3f}"
            change = change if row.candidate is not None else "not judged"
            lines.append(f"{row.name:<{width}}  {served:>6}  {candidate:>9}  {change:>10}".rstrip())
        if self.clicks:
            served, candidate = (
                " ".join("-" if value is None else f"{value:.3f}" for value in values)
                for values in ([row.served for row in self.clicks], [row.candidate for row in self.clicks])
            )
            numbers = ", ".join(row.name for row in self.clicks)
            lines.append(f"Dice after {numbers} clicks: served {served}, candidate {candidate}")
        if self.reading:
            lines.append(self.reading.line())
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for the manifest and the statistics."""
        return {
            "publish": self.publish,
            "judged": self.judged,
            "reason": self.reason,
            "cases": list(self.cases),
            "table": [{"class": row.name, **row.to_dict()} for row in self.rows],
            "clicked": list(self.clicked),
            "clicks": [{"clicks": int(row.name), **row.to_dict()} for row in self.clicks],
            "reading": self.reading.to_dict() if self.reading else None,
        }


def decide(
    served: Scores | None,
    candidate: Scores,
    classes: Sequence[str],
    *,
    margin: float = 0.02,
    min_cases: int = 1,
    unjudged: Unjudged = "keep",
    shown: Mapping[str, Collection[str]] | None = None,
    clicks: Clicks | None = None,
    unseen: Unseen | None = None,
) -> Decision:
    """Compare a candidate with the served model on the cases that both were scored on.

    It is published only if mean Dice does not fall, no class falls by more than the margin, mean Dice after no number
    of clicks does, and mean Dice with unseen wordings falls by no more than its own margin, if it has one. The Dice of
    a class is its mean over cases, mean Dice the mean of these over classes, so that a rare class weighs as much as any
    other.

    Args:
        served: None if nothing is served: the candidate is published as the first.
        candidate: scores of the candidate; cases that either model was trained on are not to be among them.
        classes: all classes, in the order of the table.
        margin: how much Dice one class may lose.
        min_cases: with fewer cases in common the two cannot be judged.
        unjudged: what becomes of a version that cannot be judged.
        shown: for each case the classes that its label shows; a class that no label shows is not judged, because only
            false alarms would count. None: all scored classes are shown.
        clicks: what came out when a robot corrected the masks of both; None if none did.
        unseen: what came out with other wordings; None if there are none.
    """
    cases = tuple(sorted(candidate if served is None else served.keys() & candidate.keys()))
    table = _table(served, candidate, classes, cases, shown)
    mean, judged = table[-1], [row for row in table[:-1] if row.difference is not None]
    after, clicked = clicks.rows() if clicks else ((), ())
    reading = _reading(unseen, served, candidate, classes, cases, shown) if unseen else None
    figures = table, cases, after, clicked, reading
    if served is None:
        return Decision(True, False, "the first version: there is none to compare it with", *figures)
    if len(cases) < min_cases or not judged:
        reason = (
            f"cannot judge: {len(cases)} case(s) that neither model was trained on, {min_cases} needed"
            if len(cases) < min_cases
            else "cannot judge: no label of the compared cases shows any class"
        )
        return Decision(unjudged == "publish", False, reason, *figures)
    assert mean.difference is not None
    fallen = [r for r in judged if r.difference is not None and r.difference < -margin - TOLERANCE]
    complaints = []
    if mean.difference < -TOLERANCE:
        complaints.append(f"mean Dice falls from {mean.served:.3f} to {mean.candidate:.3f}")
    if fallen:
        names = ", ".join(f"{row.name} by {-row.difference:.3f}" for row in fallen if row.difference is not None)
        complaints.append(f"Dice falls by more than {margin:g}: {names}")
    # After no click at all the masks are those that have been compared above.
    worse = [r for r in after if r.name != "0" and r.difference is not None and r.difference < -margin - TOLERANCE]
    if worse:
        names = ", ".join(f"from {row.served:.3f} to {row.candidate:.3f} after {row.name}" for row in worse)
        complaints.append(f"clicks are answered worse by more than {margin:g}: Dice falls {names}")
    if reading and (complaint := reading.complaint()):
        complaints.append(complaint)
    if complaints:
        return Decision(False, True, "; ".join(complaints), *figures)
    change = f"{mean.served:.3f} to {mean.candidate:.3f}"
    reason = f"mean Dice {change} on {len(cases)} case(s), no class falls by more than {margin:g}"
    return Decision(True, True, reason, *figures)


def _table(
    served: Scores | None,
    candidate: Scores,
    classes: Sequence[str],
    cases: Sequence[str],
    shown: Mapping[str, Collection[str]] | None,
) -> tuple[Row, ...]:
    """One row per class, and the mean last, over cases that both were scored on."""
    judged = {name for case in cases for name in candidate[case] if shown is None or name in shown.get(case, ())}
    rows = []
    for name in classes:
        here = [c for c in cases if name in candidate[c] and (served is None or name in served[c])]
        if name not in judged or not here:
            rows.append(Row(name, None, None))
        else:
            before = None if served is None else _mean(served[c][name] for c in here)
            rows.append(Row(name, before, _mean(candidate[c][name] for c in here)))
    served_means = [row.served for row in rows if row.served is not None]
    means = [row.candidate for row in rows if row.candidate is not None]
    mean = Row("mean", _mean(served_means) if served_means else None, _mean(means) if means else None)
    return (*rows, mean)


def _reading(
    unseen: Unseen,
    served: Scores | None,
    candidate: Scores,
    classes: Sequence[str],
    cases: Sequence[str],
    shown: Mapping[str, Collection[str]] | None,
) -> Reading | None:
    """On the compared cases for which the served model has a figure too, or on all if it has none; None if there is
    nothing to show."""
    read = tuple(case for case in cases if case in unseen.candidate)
    both = tuple(case for case in read if case in (unseen.served or {}))
    own = _table(served, candidate, classes, both or read, shown)
    other = _table(unseen.served if both else None, unseen.candidate, classes, both or read, shown)
    return None if other[-1].candidate is None else Reading(own, other, both or read, unseen.margin)


def _mean(values: Any) -> float:
    numbers = list(values)
    return sum(numbers) / len(numbers)


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
