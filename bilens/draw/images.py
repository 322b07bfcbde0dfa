"""Grids of small images, with and without bars beside them, as plotly figures.

An image is drawn red below zero and blue above, zero in the page's own colour; full colour is its own largest |value|,
so that images of one grid compare in shape and not in size. Numbers go out as 32-bit floats, which keeps pages small.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from bilens.draw.markup import Numbers, ViewError, full_scale, numbers, plotly_text, signed_colors
from bilens.draw.plots import DIVERGING, FAINT, GREY, template

CELL, TITLE, TOP, SIDE = 104, 20, 52, 14  # pixels: an image, the line over it, over and beside the grid
LETTER = 7  # pixels: the width of one, for room at the left
MOST_BESIDE = 7  # images: as many as a page has room for, beside a label
GREYS = [[0, "rgba(127, 135, 144, 0)"], [1, GREY]]


def image_grid(
    images: Sequence[Sequence[Numbers | None]],
    titles: Sequence[Sequence[str]] | None = None,
    *,
    row_labels: Sequence[str] | None = None,
    title: str = "",
) -> go.Figure:
    """Images in rows and columns, each with a line over it.

    Rows that are too long for a page are cut, all at the same columns; the rest goes below.

    Args:
        images: rows of `(height, width)` arrays; rows may differ in length, `None` leaves a place empty.
        titles: a line over each image.
        row_labels: beside each row; a line break starts a new line.
        title: over the figure.

    Raises:
        ViewError: titles or labels that do not fit, an image that is no matrix, or a value that is not finite.
    """
    rows, columns = len(images), max((len(row) for row in images), default=0)
    if titles is not None and [len(row) for row in titles] != [len(row) for row in images]:
        raise ViewError("titles must be as many as images, row by row.")
    if row_labels is not None and len(row_labels) != rows:
        raise ViewError(f"{len(row_labels)} row labels for {rows} rows.")
    left = SIDE + LETTER * max((len(line) for label in row_labels or () for line in label.split("\n")), default=0)
    over = TITLE if titles else 4
    beside = -(-columns // (-(-columns // MOST_BESIDE) or 1)) or 1  # cut into equal parts
    lines = [
        (i, start)
        for start in range(0, columns or 1, beside)
        for i, row in enumerate(images)
        if row[start:] or not start
    ]
    canvas = _Canvas(left + beside * (CELL + SIDE) + SIDE, TOP + len(lines) * (CELL + over + 4), title)
    for line, (i, start) in enumerate(lines):
        top = TOP + line * (CELL + over + 4) + over
        if row_labels:
            canvas.text(row_labels[i], 0, top + CELL / 2, "left", "middle", 12)
        for j, image in enumerate(images[i][start : start + beside]):
            if image is not None:
                canvas.image(image, left + j * (CELL + SIDE), top, CELL, titles[i][start + j] if titles else "")
    return canvas.figure


def spectrum_with_images(
    values: Numbers, images: Sequence[Sequence[Numbers]], titles: Sequence[Sequence[str]], title: str = ""
) -> go.Figure:
    """Eigenvalues from the most positive to the most negative as bars, and images at the left: a row for each sign.

    Args:
        values: the values, in any order.
        images: rows of `(height, width)` arrays; may be empty.
        titles: a line over each image.
        title: over the figure.

    Raises:
        ViewError: an image that is no matrix, or a value that is not finite.
    """
    given = np.sort(numbers(values, "values", None))[::-1]
    columns = max(map(len, images), default=0)
    left, height = columns * (CELL + SIDE) + 40, 2 * (CELL + TITLE + 12)
    canvas = _Canvas(left + 460, TOP + height + 34, title)
    for i, row in enumerate(images):
        for j, image in enumerate(row):
            top = TOP + TITLE + i * (CELL + TITLE + 12)
            canvas.image(image, j * (CELL + SIDE), top, CELL, titles[i][j])
    canvas.bars(list(range(len(given))), given, left, TOP, 440, height - 12, "eigenvalue %{x}", names=None)
    return canvas.figure


def explanation_figure(
    image: Numbers,
    class_names: Sequence[str],
    logits: Numbers,
    explained: Sequence[str],
    parts: Sequence[Sequence[tuple[str, float]]],
    features: Sequence[Sequence[Numbers]],
) -> go.Figure:
    """An image and its logits; below, for every class explained, bars of the parts of its logit, and their images.

    Args:
        image: `(height, width)`, of brightness.
        class_names: the names of all classes.
        logits: one per class.
        explained: a line for each class explained.
        parts: name and contribution of each part of its logit.
        features: images of the first parts of each class; may be empty.

    Raises:
        ViewError: lengths that do not fit, an image that is no matrix, or a value that is not finite.
    """
    scores = numbers(logits, "logits (one per class)", len(class_names))
    most = max((len(row) for row in parts), default=0)
    block = max(CELL + TITLE, 20 * most) + 34
    left = 230 + LETTER * 18
    columns = max(3, *map(len, features))
    canvas = _Canvas(left + columns * (CELL + SIDE) + SIDE, TOP + CELL + 60 + len(parts) * block, "explanation")
    canvas.image(image, LETTER * 18, TOP, CELL, "the image", grey=True)
    canvas.bars(list(class_names), scores, left, TOP - 6, columns * (CELL + SIDE) - SIDE, CELL, "logit of %{x}")
    for i, (name, row, pictures) in enumerate(zip(explained, parts, features, strict=True)):
        top = TOP + CELL + 70 + i * block
        canvas.text(name, 0, top - 8, "left", "bottom", 13)
        labels, sizes = [part for part, _ in row], np.array([size for _, size in row], dtype=float)
        canvas.bars(labels, sizes, LETTER * 18, top, 190, 20 * len(row), "%{y}", across=True)
        for j, picture in enumerate(pictures):
            canvas.image(picture, left + j * (CELL + SIDE), top + 6, CELL, f"#{labels[j].split()[-1]}: {sizes[j]:+.3g}")
    return canvas.figure


class _Canvas:
    """A figure of fixed size on which images and bars are placed by pixels from the top left."""

    def __init__(self, width: float, height: float, title: str):
        self.figure, self.count = go.Figure(), 0
        self.width, self.height = max(width, 320), max(height, 120)
        self.figure.update_layout(
            template=template(),
            title_text=plotly_text(title),
            width=self.width,
            height=self.height,
            margin={"l": 0, "r": 0, "t": 0, "b": 0},
            showlegend=False,
        )

    def text(self, text: str, x: float, y: float, xanchor: str, yanchor: str, size: int) -> None:
        """Words; line breaks are kept."""
        self.figure.add_annotation(
            text="<br>".join(plotly_text(line) for line in text.split("\n")),
            x=x / self.width,
            y=1 - y / self.height,
            xref="paper",
            yref="paper",
            xanchor=xanchor,
            yanchor=yanchor,
            align="left",
            showarrow=False,
            font={"size": size},
        )

    def image(self, image: Numbers, x: float, y: float, side: float, title: str = "", *, grey: bool = False) -> None:
        """An image in a square, with a line over it."""
        pixels = numbers(image, "an image", None, None)
        rows, columns = pixels.shape
        limit, longer = full_scale(pixels), max(rows, columns, 1)
        width, height = side * columns / longer, side * rows / longer
        x, y = x + (side - width) / 2, y + (side - height) / 2
        xaxis, yaxis = self._axes(x, y, width, height)
        frame: dict[str, Any] = {
            "visible": True,
            "showgrid": False,
            "zeroline": False,
            "showticklabels": False,
            "automargin": False,
        }
        frame |= {"showline": True, "mirror": True, "linecolor": FAINT, "title": {"text": ""}, "fixedrange": True}
        self._layout(xaxis, yaxis, frame | {"range": [-0.5, columns - 0.5]}, frame | {"range": [rows - 0.5, -0.5]})
        self.figure.add_trace(
            go.Heatmap(
                z=pixels.astype(np.float32),
                zmin=0 if grey else -limit,
                zmax=limit,
                colorscale=GREYS if grey else DIVERGING,
                showscale=False,
                xaxis=xaxis,
                yaxis=yaxis,
                hovertemplate="row %{y}, column %{x}<br><b>%{z:.3g}</b><extra></extra>",
            )
        )
        if title:
            self.text(title, x + width / 2, y - 2, "center", "bottom", 11)

    def bars(
        self,
        labels: Sequence[str] | Sequence[int],
        values: np.ndarray,
        x: float,
        y: float,
        width: float,
        height: float,
        hover: str,
        *,
        across: bool = False,
        names: str | None = "category",
    ) -> None:
        """Signed bars, upright or (`across`) lying; `names` of `None` numbers them."""
        xaxis, yaxis = self._axes(x, y, width, height)
        shown = [plotly_text(label) if isinstance(label, str) else label for label in labels]
        low, high = min(values.min(initial=0), 0), max(values.max(initial=0), 0)
        room = (0.45 if across else 0.05) * (high - low or 1)
        plain = {"automargin": False, "title": {"text": ""}, "fixedrange": True}
        along = plain | {"range": [low - room * (low < 0), high + room * (high > 0)], "nticks": 5}
        named = plain | {"showgrid": False, "zeroline": False, "tickfont": {"size": 11}}
        if names:  # not numbers, even where they look like some
            named |= {"type": "category", "tickmode": "array", "tickvals": shown, "ticktext": shown}
        if across:
            self._layout(xaxis, yaxis, along | {"showticklabels": False}, named | {"autorange": "reversed"})
        else:
            self._layout(xaxis, yaxis, named, along)
        self.figure.add_trace(
            go.Bar(
                x=values if across else shown,
                y=shown if across else values,
                orientation="h" if across else "v",
                marker={"color": signed_colors(values), "line": {"width": 0}},
                text=[f"{value:+.3g}" for value in values] if across else None,
                textposition="outside" if across else None,
                textfont={"size": 11},
                cliponaxis=False,
                xaxis=xaxis,
                yaxis=yaxis,
                hovertemplate=hover + ("<br><b>%{x:.4g}</b>" if across else "<br><b>%{y:.4g}</b>") + "<extra></extra>",
            )
        )

    def _axes(self, x: float, y: float, width: float, height: float) -> tuple[str, str]:
        """A new pair of axes; where it stands is remembered for `_layout`."""
        self.count += 1
        number = "" if self.count == 1 else str(self.count)
        self.domains = (
            [max(0.0, x / self.width), min(1.0, (x + width) / self.width)],
            [max(0.0, 1 - (y + height) / self.height), min(1.0, 1 - y / self.height)],
        )
        return f"x{number}", f"y{number}"

    def _layout(self, xaxis: str, yaxis: str, x: dict, y: dict) -> None:
        self.figure.update_layout(
            {
                "xaxis" + xaxis[1:]: x | {"domain": self.domains[0], "anchor": yaxis},
                "yaxis" + yaxis[1:]: y | {"domain": self.domains[1], "anchor": xaxis},
            }
        )
