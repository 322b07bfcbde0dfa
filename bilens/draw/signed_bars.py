"""Signed bars and coloured matrices in plain HTML: small, and drawn without a script, in light and dark."""

from collections.abc import Sequence
from dataclasses import dataclass

from bilens.draw.markup import Numbers, full_scale, numbers
from bilens.draw.markup import escape as esc
from bilens.draw.page import View
from bilens.draw.tokens import STRONGEST


@dataclass(frozen=True, eq=False)
class SignedBars(View):
    """Named numbers as horizontal bars from a common zero, the first on top.

    Args:
        labels: one for each bar.
        values: one number each; those below zero go to the left, in the second colour.
        beside: what stands beside each bar, such as an example of what it is named after.
        muted: the number of bars at the end that are set back: sums of what is left.
    """

    labels: Sequence[str]
    values: Numbers
    beside: Sequence[View | None] | None = None
    muted: int = 0

    def __post_init__(self) -> None:
        self.html()  # whatever cannot be drawn is refused at once

    def html(self) -> str:
        values = numbers(self.values, "values (one per label)", len(self.labels))
        beside = self.beside or [None] * len(values)
        low, high = min(values.min(initial=0), 0), max(values.max(initial=0), 0)
        span = float(high - low) or 1.0
        rows = []
        for place, (label, value, more) in enumerate(zip(self.labels, values.tolist(), beside, strict=True)):
            left, width = 100 * (min(value, 0) - low) / span, 100 * abs(value) / span
            bar = f'<i class="{"n" if value < 0 else "p"}" style="left:{left:.1f}%;width:{width:.1f}%"></i>'
            seen = "" if more is None else f"<div>{more.html()}</div>"
            kind = ' class="muted"' if place >= len(values) - self.muted else ""
            rows.append(
                f'<li{kind}><b title="{esc(label)}">{esc(label)}</b><span>{bar}</span><em>{value:+.2f}</em>{seen}</li>'
            )
        wide = "" if self.beside is None else " beside"
        return f'<ul class="bilens-bars{wide}" style="--zero:{-100 * low / span:.1f}%">{"".join(rows)}</ul>'


@dataclass(frozen=True, eq=False)
class ColoredMatrix(View):
    """A small matrix as a table of coloured numbers.

    Args:
        matrix: row x column.
        labels: the names of the rows; columns are numbered alike.
    """

    matrix: Numbers
    labels: Sequence[str]

    def __post_init__(self) -> None:
        self.html()  # whatever cannot be drawn is refused at once

    def html(self) -> str:
        labels = list(map(str, self.labels))
        values = numbers(self.matrix, "matrix", len(labels), len(labels))
        opacity = STRONGEST * abs(values) / full_scale(values)
        head = "".join(f"<th scope='col'>{place + 1}</th>" for place in range(len(labels)))
        rows = "".join(
            f"<tr><th scope='row'>{place + 1} · {esc(label)}</th>"
            + "".join(
                f'<td class="{"n" if value < 0 else "p"}" style="--a:{a:.2f}">{value:.2f}</td>'
                for value, a in zip(values[place].tolist(), opacity[place].tolist(), strict=True)
            )
            + "</tr>"
            for place, label in enumerate(labels)
        )
        return (
            '<div class="table" role="region" aria-label="matrix" tabindex="0">'
            f'<table class="bilens-matrix"><thead><tr><th></th>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
        )
