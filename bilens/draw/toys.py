"""Several small matrices, or several small curves, in one figure on one scale."""

from collections.abc import Mapping, Sequence

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from bilens.draw.markup import Numbers, ViewError, full_scale, numbers, plotly_text
from bilens.draw.plots import COLORS, DIVERGING, GREY, template

CELL, LINE, TOP = 200, 150, 76  # pixels: a matrix' side, a curve's height, over the grid
MOST_LABELS = 8  # along a matrix' side


def matrix_grid(
    matrices: Sequence[Sequence[Numbers]],
    row_labels: Sequence[str],
    column_labels: Sequence[str],
    axis_labels: Sequence[str],
    title: str = "",
) -> go.Figure:
    """Matrices over the same axes in rows and columns, red below zero and blue above, all on one scale.

    Args:
        matrices: rows of square matrices.
        row_labels: beside each row.
        column_labels: over each column.
        axis_labels: the labels of the rows and columns of every matrix, each different.
        title: over the figure.

    Raises:
        ViewError: lengths that do not fit, or a value that is not finite.
    """
    rows, columns, n = len(matrices), len(column_labels), len(axis_labels)
    if len(row_labels) != rows or any(len(row) != columns for row in matrices):
        raise ViewError(f"{rows} rows of matrices, with {len(row_labels)} row labels and {columns} column labels.")
    given = [[numbers(matrix, "a matrix", n, n) for matrix in row] for row in matrices]
    limit = full_scale(np.concatenate([matrix.ravel() for row in given for matrix in row]))
    figure = make_subplots(
        rows=rows,
        cols=columns,
        column_titles=[plotly_text(label) for label in column_labels],
        horizontal_spacing=0.24 / columns,
        vertical_spacing=min(0.06, 0.3 / rows),
    )
    for i, row in enumerate(given):
        for j, matrix in enumerate(row):
            cells = go.Heatmap(
                z=matrix,
                x=list(map(plotly_text, axis_labels)),
                y=list(map(plotly_text, axis_labels)),
                coloraxis="coloraxis",
                xgap=1,
                ygap=1,
                hovertemplate="%{y}, %{x}<br><b>%{z:.4g}</b><extra></extra>",
            )
            figure.add_trace(cells, row=i + 1, col=j + 1)
    # By name: plotly would take a number for the category of that name, such as "1".
    ticks = list(map(plotly_text, axis_labels))[:: -(-n // MOST_LABELS) or 1]
    axis = {"type": "category", "showgrid": False, "zeroline": False, "tickvals": ticks, "tickangle": 0}
    figure.update_xaxes(axis)
    figure.update_yaxes(axis, autorange="reversed")
    for i, label in enumerate(row_labels):
        figure.update_yaxes(title_text=plotly_text(label), row=i + 1, col=1)
    bar = {"thickness": 10, "outlinewidth": 0, "len": 0.9}
    figure.update_layout(
        template=template(),
        title_text=plotly_text(title),
        width=columns * (CELL + 30) + 130,
        height=rows * CELL + TOP + 40,
        margin_t=TOP,
        coloraxis={"colorscale": DIVERGING, "cmin": -limit, "cmax": limit, "colorbar": bar},
    )
    figure.update_annotations(font={"size": 12})
    return figure


def curve_grid(
    rows: Sequence[Mapping[str, Numbers]], titles: Sequence[str], title: str = "", *, x_title: str = ""
) -> go.Figure:
    """A row for every set of named curves, one under the other, on one scale; a name has one colour in all of them.

    Args:
        rows: named curves; all of one length.
        titles: over each row.
        title: over the figure.
        x_title: under the last row.

    Raises:
        ViewError: lengths that do not fit, or a value that is not finite.
    """
    if len(titles) != len(rows):
        raise ViewError(f"{len(titles)} titles for {len(rows)} rows of curves.")
    figure = make_subplots(
        rows=len(rows),
        cols=1,
        shared_xaxes=True,
        subplot_titles=list(map(plotly_text, titles)),
        vertical_spacing=min(0.12, 0.4 / max(1, len(rows))),
    )
    names = list(dict.fromkeys(name for curves in rows for name in curves))
    for at, curves in enumerate(rows):
        for name, curve in curves.items():
            up = numbers(curve, f"curve {name!r}", None)
            trace = go.Scatter(
                y=up,
                name=plotly_text(name),
                legendgroup=name,
                showlegend=at == 0,
                mode="lines+markers",
                line={"width": 1.5, "color": COLORS[names.index(name) % len(COLORS)]},
                marker={"size": 4},
                hovertemplate="%{fullData.name} %{x}<br><b>%{y:.4g}</b><extra></extra>",
            )
            figure.add_trace(trace, row=at + 1, col=1)
    figure.update_layout(
        template=template(), title_text=plotly_text(title), height=len(rows) * LINE + TOP + 40, margin_t=TOP
    )
    figure.update_yaxes(matches="y", nticks=4)
    figure.update_xaxes(title_text=plotly_text(x_title), row=len(rows), col=1)
    figure.update_annotations(font={"size": 12, "color": GREY})
    return figure
