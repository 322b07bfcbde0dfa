"""Curves and points as SVG: drawn without a script, a page of a few needs no plotly.js, of five megabytes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from bilens.draw.markup import POSITIVE, Numbers, escape, numbers, visible
from bilens.draw.page import View
from bilens.draw.plots import COLORS, GREY

WIDTH, HEIGHT = 640, 360
LEFT, RIGHT, TOP, BOTTOM = 64, 12, 12, 44  # around the plot
TICKS = 6  # at most, on each axis


@dataclass(frozen=True, eq=False)
class Chart(View):
    """Curves or points on common axes; hovering over a point shows its label and its numbers.

    Args:
        x_title, y_title: of the axes.
        curves: x and y of each, by name.
        points: x and y.
        labels: one for each point.
        diagonal: a line at y = x, to compare two measures of one thing.

    Raises:
        ViewError: x, y and labels of different lengths, or a value that is not finite.
    """

    x_title: str
    y_title: str
    curves: Mapping[str, tuple[Numbers, Numbers]] = field(default_factory=dict)
    points: tuple[Numbers, Numbers] = ((), ())
    labels: Sequence[str] = ()
    diagonal: bool = False

    def __post_init__(self) -> None:
        self.html()  # whatever cannot be drawn is refused at once

    def html(self) -> str:
        n = len(self.labels)
        drawn = [
            (name, COLORS[place % len(COLORS)], *_pair(*pair)) for place, (name, pair) in enumerate(self.curves.items())
        ]
        across, up = (numbers(values, "points (one number per label)", n) for values in self.points)
        x, y = ([*here, *(curve[axis] for curve in drawn)] for axis, here in ((2, [across]), (3, [up])))
        bounds_x, bounds_y = _bounds(np.concatenate(x)), _bounds(np.concatenate(y))
        place_x, place_y = _Scale(*bounds_x, LEFT, WIDTH - RIGHT), _Scale(*bounds_y, HEIGHT - BOTTOM, TOP)
        parts = [_axes(place_x, place_y, self.x_title, self.y_title)]
        if self.diagonal:
            low, high = max(bounds_x[0], bounds_y[0]), min(bounds_x[1], bounds_y[1])
            ends = f"M{place_x(low):.1f} {place_y(low):.1f}L{place_x(high):.1f} {place_y(high):.1f}"
            parts.append(f'<path d="{ends}" stroke="{GREY}" stroke-dasharray="2 3"/>' if low < high else "")
        for name, color, at_x, at_y in drawn:
            corners = " ".join(f"{place_x(a):.1f},{place_y(b):.1f}" for a, b in zip(at_x, at_y, strict=True))
            parts.append(f'<polyline points="{corners}" fill="none" stroke="{color}" stroke-width="2"/>')
            parts += [_dot(place_x(a), place_y(b), color, name, a, b) for a, b in zip(at_x, at_y, strict=True)]
        parts.append('<g fill-opacity="0.65">')
        for label, a, b in zip(self.labels, across, up, strict=True):
            parts.append(_dot(place_x(a), place_y(b), POSITIVE, label, a, b))
        legend = "".join(
            f'<li><i style="background:{color}"></i>{escape(visible(name))}</li>' for name, color, *_ in drawn
        )
        title = escape(visible(f"{self.y_title} over {self.x_title}"))
        return (
            '<div class="bilens-chart">'
            + (f"<ul>{legend}</ul>" if legend else "")
            + f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{title}">{"".join(parts)}</g></svg></div>'
        )


@dataclass(frozen=True)
class _Scale:
    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        rough = (self.high - self.low) / TICKS
        unit = 10 ** np.floor(np.log10(rough))
        step = next(unit * size for size in (1, 2, 5, 10) if unit * size >= rough)
        return [float(n * step) for n in range(int(np.ceil(self.low / step)), int(np.floor(self.high / step)) + 1)]


def _pair(x: Numbers, y: Numbers) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    across = numbers(x, "x", None)
    return across, numbers(y, "y (one per x)", len(across))


def _bounds(values: NDArray[np.float64]) -> tuple[float, float]:
    low, high = (float(values.min()), float(values.max())) if len(values) else (0.0, 1.0)
    room = 0.04 * (high - low) or 0.5 * abs(high) or 1.0
    return low - room, high + room


def _dot(x: float, y: float, color: str, label: str, a: float, b: float) -> str:
    tip = f"<title>{escape(visible(label))} ({a:.4g}, {b:.4g})</title>"
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{color}">{tip}</circle>'


def _axes(across: _Scale, up: _Scale, x_title: str, y_title: str) -> str:
    left, right, bottom, top = across.start, across.end, up.start, up.end
    lines, texts = [], []
    for tick in across.ticks():
        lines.append(f"M{across(tick):.1f} {top}V{bottom}")
        texts.append(f'<text x="{across(tick):.1f}" y="{bottom + 16}" text-anchor="middle">{tick:.4g}</text>')
    for tick in up.ticks():
        lines.append(f"M{left} {up(tick):.1f}H{right}")
        texts.append(f'<text x="{left - 6}" y="{up(tick) + 4:.1f}" text-anchor="end">{tick:.4g}</text>')
    middle = (top + bottom) / 2
    texts += [
        f'<text x="{(left + right) / 2}" y="{HEIGHT - 6}" text-anchor="middle">{escape(visible(x_title))}</text>',
        f'<text transform="translate(12 {middle}) rotate(-90)" text-anchor="middle">{escape(visible(y_title))}</text>',
    ]
    return f'<path d="{"".join(lines)}" stroke="{GREY}" stroke-opacity="0.22"/>{"".join(texts)}'
