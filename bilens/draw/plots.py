"""Plain arrays to plotly figures. No mathematics: what is drawn is what was given.

Figures have no background of their own and greys that read on white and on black; zero is transparent in a heatmap.
Labels are text: markup in them is shown, not obeyed.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from bilens.draw.markup import (
    NEGATIVE,
    POSITIVE,
    Numbers,
    ViewError,
    full_scale,
    names,
    numbers,
    plotly_text,
    signed_colors,
)

GREY = "#7f8790"
FAINT = "rgba(127, 135, 144, 0.22)"
COLORS = [POSITIVE, "#e08a2c", "#2f9e77", NEGATIVE, "#8a6fc9", "#a0765b"]
# Opaque to transparent to opaque: zero is the page's own colour, whichever that is.
DIVERGING = [[0, NEGATIVE], [0.5, "rgba(214, 69, 93, 0)"], [0.5, "rgba(43, 123, 186, 0)"], [1, POSITIVE]]
LONGEST_LABEL = 28
LONGEST_BAR_LABEL = 52  # a bar's label has a line to itself
MOST_TICKS = 48
LINE_HEIGHT = 22


def template() -> "go.layout.Template":
    """The look of every figure here."""
    axis = {
        "automargin": True,
        "gridcolor": FAINT,
        "linecolor": FAINT,
        "zerolinecolor": GREY,
        "zerolinewidth": 1,
        "ticks": "",
        "title": {"standoff": 10, "font": {"size": 12}},
    }
    return go.layout.Template(
        layout={
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            "font": {"family": "system-ui, -apple-system, Segoe UI, Roboto, sans-serif", "size": 12, "color": GREY},
            "title": {"x": 0, "xanchor": "left", "y": 1, "yanchor": "top", "pad": {"t": 6}, "font": {"size": 15}},
            "margin": {"l": 8, "r": 8, "t": 44, "b": 8},
            "colorway": COLORS,
            "hovermode": "closest",
            "hoverlabel": {"align": "left", "font": {"size": 12}},
            "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
            "bargap": 0.25,
            "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": GREY, "activecolor": POSITIVE},
            "xaxis": axis,
            "yaxis": axis,
        }
    )


def heatmap(
    matrix: Numbers | pd.DataFrame,
    row_labels: Sequence[str] | None = None,
    col_labels: Sequence[str] | None = None,
    title: str = "",
    *,
    row_title: str = "",
    col_title: str = "",
    scale: float | None = None,
) -> go.Figure:
    """A matrix, red below zero and blue above; hovering shows both whole labels and the number.

    Args:
        matrix: row x column; a frame brings its own labels.
        row_labels: one per row; indices by default.
        col_labels: one per column; indices by default.
        title: over the figure.
        row_title: the title of the rows.
        col_title: the title of the columns.
        scale: the |value| in full colour; the largest one by default.
    """
    if isinstance(matrix, pd.DataFrame):
        row_labels = list(map(str, matrix.index)) if row_labels is None else row_labels
        col_labels = list(map(str, matrix.columns)) if col_labels is None else col_labels
    values = numbers(matrix, "matrix", None, None)
    rows, columns = values.shape
    limit = full_scale(values, scale)
    y, yaxis = _labelled(names(row_labels, rows, "row labels"))
    x, xaxis = _labelled(names(col_labels, columns, "column labels"))
    row, column = plotly_text(row_title) or "row", plotly_text(col_title) or "column"
    hover = f"{row}: %{{y}}<br>{column}: %{{x}}<br><b>%{{z:.4g}}</b>"
    cells = go.Heatmap(
        z=values,
        x=x,
        y=y,
        zmin=-limit,
        zmax=limit,
        colorscale=DIVERGING,
        colorbar={"thickness": 10, "outlinewidth": 0, "len": 0.9},
        hovertemplate=hover + "<extra></extra>",
        xgap=1 if columns <= MOST_TICKS else 0,
        ygap=1 if rows <= MOST_TICKS else 0,
    )
    longest = max(map(len, xaxis["ticktext"]), default=0)
    figure = _figure(title, col_title, row_title, height=min(max(rows * LINE_HEIGHT, 220), 800) + 90 + 5 * longest)
    figure.add_trace(cells)
    figure.update_xaxes(**xaxis, showgrid=False, autotickangles=[0, -45, -90])
    figure.update_yaxes(**yaxis, showgrid=False, autorange="reversed")
    return figure


def spectrum(values: Numbers, title: str = "") -> go.Figure:
    """Signed eigenvalues as bars, the largest |value| first; hovering shows the place each had in `values`."""
    given = numbers(values, "values", None)
    order = np.argsort(-np.abs(given), kind="stable")
    bars_ = go.Bar(
        x=np.arange(len(given)),
        y=given[order],
        customdata=order,
        marker={"color": signed_colors(given[order]), "line": {"width": 0}},
        hovertemplate="rank %{x} (index %{customdata})<br><b>%{y:.4g}</b><extra></extra>",
    )
    figure = _figure(title, "rank by magnitude", "eigenvalue", height=320)
    figure.add_trace(bars_)
    figure.update_xaxes(showgrid=False, zeroline=False, range=[-0.6, len(given) - 0.4])
    return figure


def bars(labels: Sequence[str], values: Numbers, title: str = "", *, value_title: str = "") -> go.Figure:
    """Signed contributions as horizontal bars, the first on top, each with its number."""
    given = numbers(values, "values (one per label)", len(labels))
    y, yaxis = _labelled(list(map(str, labels)), LONGEST_BAR_LABEL)
    bars_ = go.Bar(
        x=given,
        y=y,
        orientation="h",
        marker={"color": signed_colors(given), "line": {"width": 0}},
        text=[f"{value:.3g}" for value in given],
        textposition="outside",
        cliponaxis=False,
        hovertemplate="%{y}<br><b>%{x:.4g}</b><extra></extra>",
    )
    figure = _figure(title, value_title, "", height=len(given) * LINE_HEIGHT + 110)
    figure.add_trace(bars_)
    low, high = min(given.min(initial=0), 0), max(given.max(initial=0), 0)
    room = 0.25 * (high - low or 1)  # for the numbers at the bars' ends
    figure.update_xaxes(range=[low - room * (low < 0), high + room * (high > 0)])
    figure.update_yaxes(**yaxis, showgrid=False, autorange="reversed")
    return figure


def scatter(
    x: Numbers,
    y: Numbers,
    labels: Sequence[str] | None = None,
    title: str = "",
    *,
    x_title: str = "",
    y_title: str = "",
    diagonal: bool = False,
) -> go.Figure:
    """Points, each with its whole label on hovering.

    Args:
        x: one number per point.
        y: one number per point.
        labels: one per point; indices by default.
        title: over the figure.
        x_title: under the horizontal axis.
        y_title: beside the vertical axis.
        diagonal: a line at y = x, to compare two measures of one thing.
    """
    across = numbers(x, "x", None)
    up = numbers(y, "y (one per x)", len(across))
    points = go.Scatter(
        x=across,
        y=up,
        mode="markers",
        customdata=[plotly_text(label) for label in names(labels, len(across), "labels")],
        marker={"color": POSITIVE, "size": 7, "opacity": 0.65, "line": {"width": 0}},
        hovertemplate="%{customdata}<br>(%{x:.4g}, %{y:.4g})<extra></extra>",
        showlegend=False,
    )
    figure = _figure(title, x_title, y_title, height=420)
    if diagonal and len(across):
        ends = [min(across.min(), up.min()), max(across.max(), up.max())]
        line_style = {"color": GREY, "dash": "dot", "width": 1}
        figure.add_trace(go.Scatter(x=ends, y=ends, mode="lines", line=line_style, hoverinfo="skip", showlegend=False))
    figure.add_trace(points)
    return figure


def scatter_grid(
    panels: Mapping[str, tuple[Numbers, Numbers]], columns: int = 3, *, x_title: str = "", y_title: str = ""
) -> go.Figure:
    """Small scatter plots in rows, each with its name over it and a line at y = x.

    Args:
        panels: x and y of the points of each, by name.
        columns: the number of plots in a row.
        x_title, y_title: the axis titles of all plots.
    """
    rows = -(-len(panels) // columns) or 1
    titles = [plotly_text(name) for name in panels]
    figure = make_subplots(rows, columns, subplot_titles=titles, vertical_spacing=0.2 / rows)
    figure.update_layout(template=template(), height=rows * 220 + 60)
    for place, (x, y) in enumerate(panels.values()):
        across = numbers(x, "x", None)
        up = numbers(y, "y (one per x)", len(across))
        at = {"row": place // columns + 1, "col": place % columns + 1}
        ends = [min(across.min(initial=0), up.min(initial=0)), max(across.max(initial=0), up.max(initial=0))]
        line_style = {"color": GREY, "dash": "dot", "width": 1}
        figure.add_trace(go.Scatter(x=ends, y=ends, mode="lines", line=line_style, hoverinfo="skip"), **at)
        dots = {"color": POSITIVE, "size": 5, "opacity": 0.5, "line": {"width": 0}}
        hover = "(%{x:.4g}, %{y:.4g})<extra></extra>"
        figure.add_trace(go.Scatter(x=across, y=up, mode="markers", marker=dots, hovertemplate=hover), **at)
        figure.update_xaxes(title_text=plotly_text(x_title) if at["row"] == rows else "", **at)
        figure.update_yaxes(title_text=plotly_text(y_title) if at["col"] == 1 else "", **at)
    return figure.update_layout(showlegend=False).update_annotations(font_size=12)


def histogram(values: Numbers, title: str = "", *, x_title: str = "", bins: int = 40) -> go.Figure:
    """How many values fall where."""
    counts, edges = np.histogram(numbers(values, "values", None), bins=bins)
    bars_ = go.Bar(
        x=(edges[:-1] + edges[1:]) / 2,
        y=counts,
        width=np.diff(edges),
        customdata=np.stack([edges[:-1], edges[1:]], -1),
        marker={"color": POSITIVE, "line": {"width": 0}},
        hovertemplate="%{customdata[0]:.3g} to %{customdata[1]:.3g}<br><b>%{y}</b><extra></extra>",
    )
    figure = _figure(title, x_title, "how many", height=320)
    figure.add_trace(bars_)
    figure.update_layout(bargap=0)
    return figure


def line(
    x: Numbers,
    series: Mapping[str, Numbers],
    title: str = "",
    *,
    x_title: str = "",
    y_title: str = "",
    log_x: bool = False,
) -> go.Figure:
    """Named curves over one x.

    Raises:
        ViewError: a curve of another length than `x`, a value that is not finite, or `log_x` and zero or less in `x`.
    """
    across = numbers(x, "x", None)
    if log_x and (across <= 0).any():
        raise ViewError("x is not above zero everywhere, which a logarithmic axis needs.")
    figure = _figure(title, x_title, y_title, height=360)
    for name, curve in series.items():
        up = numbers(curve, f"series {name!r} (one per x)", len(across))
        figure.add_trace(
            go.Scatter(
                x=across,
                y=up,
                name=plotly_text(name),
                mode="lines+markers" if len(across) <= 40 else "lines",
                line={"width": 2},
                marker={"size": 6},
                hovertemplate="%{fullData.name}<br>(%{x:.4g}, %{y:.4g})<extra></extra>",
            )
        )
    figure.update_layout(showlegend=len(series) > 1, margin_t=72 if len(series) > 1 else None)
    figure.update_xaxes(type="log" if log_x else "linear")
    return figure


def _figure(title: str, x_title: str, y_title: str, height: int) -> go.Figure:
    figure = go.Figure()
    figure.update_layout(template=template(), title_text=plotly_text(title), height=height)
    figure.update_layout(xaxis_title_text=plotly_text(x_title), yaxis_title_text=plotly_text(y_title))
    return figure


def _labelled(labels: Sequence[str], longest: int = LONGEST_LABEL) -> tuple[list[str], dict[str, Any]]:
    """Categories for an axis, whole and distinct, and the axis' ticks, shortened and thinned out if they are many."""
    seen: dict[str, int] = {}
    categories = []
    for label in labels:
        seen[label] = seen.get(label, -1) + 1
        categories.append(plotly_text(label) + "\u200b" * seen[label])  # plotly would merge equal categories
    shown = range(0, len(labels), -(-len(labels) // MOST_TICKS) or 1)
    short = [label if len(label) <= longest else label[: longest - 1] + "…" for label in labels]
    # A tick names its category: as a number it would be looked for among the labels first, where some are numbers.
    ticks = {
        "tickvals": [categories[place] for place in shown],
        "ticktext": [plotly_text(short[place]) for place in shown],
    }
    return categories, {"type": "category", "tickmode": "array", "ticklabelstandoff": 4, **ticks}
