"""Charts of reports as inline SVG: nothing to load, sharp at any size, readable without scripts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from markupsafe import Markup, escape

Points = Sequence[tuple[float, float]]

WIDTH, HEIGHT = 460, 220
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 10, 26
INK, FAINT = "#5b6b7c", "#e6ebf0"
COLOURS = ("#0f766e", "#c2571a", "#4457b8", "#9c2f6c", "#6b7a12", "#287fb0")


def line_chart(
    series: Mapping[str, Points],
    colours: Sequence[str] = COLOURS,
    *,
    log: bool = False,
    limits: tuple[float, float] | None = None,
    mark: float | None = None,
    size: tuple[int, int] = (WIDTH, HEIGHT),
) -> Markup:
    """Lines over epochs. Values that are not finite, and with `log` those not above 0, are left out.

    Args:
        series: name to points (epoch, value). A line of one point is drawn as a dot.
        colours: one per line, repeated if there are more lines.
        log: logarithmic values.
        limits: of the values; else those of the data.
        mark: an epoch to mark by a dashed line.
        size: width and height in pixels of the drawing, which scales with its container.
    """
    drawn = {
        name: [(x, y) for x, y in points if math.isfinite(y) and (y > 0 or not log)] for name, points in series.items()
    }
    every = [point for points in drawn.values() for point in points]
    if not every:
        return Markup("")
    width, height = size
    x_low, x_high = min(x for x, _ in every), max(x for x, _ in every)
    ticks = _ticks(*(limits or (min(y for _, y in every), max(y for _, y in every))), log)
    low, high = (limits or (ticks[0], ticks[-1])) if not log else (ticks[0], ticks[-1])

    def across(x: float) -> float:
        share = (x - x_low) / (x_high - x_low) if x_high > x_low else 0.5
        return round(LEFT + share * (width - LEFT - RIGHT), 1)

    def up(y: float) -> float:
        a, b, c = (math.log10(v) if log else v for v in (low, y, high))
        share = (b - a) / (c - a) if c > a else 0.5
        return round(height - BOTTOM - min(max(share, 0), 1) * (height - TOP - BOTTOM), 1)

    parts = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(", ".join(drawn))} over epochs">']
    for tick in ticks:
        y = up(tick)
        parts.append(f'<path d="M{LEFT} {y}H{width - RIGHT}" stroke="{FAINT}"/>')
        parts.append(_text(LEFT - 6, y + 3.5, _number(tick), "end"))
    for epoch in _epochs(x_low, x_high):
        parts.append(_text(across(epoch), height - 9, f"{epoch:g}", "middle"))
    if mark is not None and x_low <= mark <= x_high:
        x = across(mark)
        parts.append(f'<path d="M{x} {TOP}V{height - BOTTOM}" stroke="{INK}" stroke-dasharray="3 3"/>')
    for number, (name, points) in enumerate(drawn.items()):
        colour = colours[number % len(colours)]
        title = f"<title>{escape(name)}</title>"
        if len(points) > 1:
            path = " ".join(f"{across(x)},{up(y)}" for x, y in points)
            style = 'fill="none" stroke-width="2" stroke-linejoin="round"'
            parts.append(f'<polyline points="{path}" stroke="{colour}" {style}>{title}</polyline>')
        if 0 < len(points) <= 12:
            parts += [
                f'<circle cx="{across(x)}" cy="{up(y)}" r="3" fill="{colour}">{title}</circle>' for x, y in points
            ]
    return Markup("".join(parts) + "</svg>")


def diverging(value: float) -> str:
    """Orange at -1, white at 0, teal at 1, as a CSS colour."""
    return _mixed((255, 255, 255), (15, 118, 110) if value >= 0 else (194, 87, 26), abs(value))


def ink(share: float) -> str:
    """A text colour that is readable on the colour of `diverging(share)`."""
    return "#ffffff" if abs(share) > 0.62 else "#1d2733"


def _mixed(first: Sequence[int], second: Sequence[int], share: float) -> str:
    share = min(max(share, 0.0), 1.0)
    return "#" + "".join(f"{round(a + (b - a) * share):02x}" for a, b in zip(first, second, strict=True))


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}" font-size="11" fill="{INK}">{escape(text)}</text>'


def _ticks(low: float, high: float, log: bool) -> list[float]:
    """Round numbers that enclose the values; with `log` powers of ten, or 1, 2, 5."""
    if log:
        decades = range(math.floor(math.log10(low)), math.floor(math.log10(high)) + 2)
        steps = (1, 2, 5) if len(decades) < 4 else (1,)
        marks = [step * 10.0**decade for decade in decades for step in steps]
        first = max((i for i, m in enumerate(marks) if m <= low), default=0)
        last = next(i for i, m in enumerate(marks) if m >= high)
        return marks[first : max(last, first + 1) + 1]
    if high - low < 1e-9:
        low, high = low - 0.5, high + 0.5
    raw = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(f * power for f in (1, 2, 2.5, 5, 10) if f * power >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [n * step for n in range(first, last + 1)]


def _epochs(low: float, high: float) -> list[int]:
    step = max(1, math.ceil((high - low) / 6))
    return [*range(math.ceil(low), math.floor(high) + 1, step)]


def _number(value: float) -> str:
    return f"{value:.0e}" if value and (abs(value) < 1e-3 or abs(value) >= 1e5) else f"{value:.4g}"
