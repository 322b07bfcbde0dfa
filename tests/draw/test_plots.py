import html
import json

import numpy as np
import pandas as pd
import pytest
import torch

from bilens.draw import plots
from bilens.draw.markup import NEGATIVE, POSITIVE, ViewError, visible


def shown(text: str) -> str:
    """What plotly shows for a label, which decodes entities and drops the zero-width tail of repeated labels."""
    return html.unescape(text).rstrip("\u200b")


def test_heatmap_is_centred_at_zero():
    figure = plots.heatmap([[1, -4], [0, 2]], ["a", "b"], ["c", "d"], "Title")
    cells = figure.data[0]
    assert (cells.zmin, cells.zmax) == (-4, 4)
    assert (list(cells.y), list(cells.x)) == (["a", "b"], ["c", "d"])
    assert figure.layout.yaxis.autorange == "reversed"
    assert figure.layout.title.text == "Title"
    assert plots.heatmap(np.zeros((2, 2))).data[0].zmax == 1
    assert plots.heatmap([[1]], scale=3).data[0].zmax == 3


def test_a_frame_brings_its_labels():
    cells = plots.heatmap(pd.DataFrame([[1, 2]], index=["row"], columns=["left", 7])).data[0]
    assert (list(cells.y), list(cells.x)) == (["row"], ["left", "7"])


def test_ticks_name_their_categories_where_labels_are_numbers():
    """plotly takes a tick's value for a category of that name before it takes it for a place."""
    labels = ["2", "1", "0", "0"]
    figure = plots.heatmap(np.eye(4), labels, labels)
    for axis, categories in ((figure.layout.yaxis, figure.data[0].y), (figure.layout.xaxis, figure.data[0].x)):
        assert list(axis.tickvals) == list(categories)
        assert list(axis.ticktext) == labels


def test_long_labels_are_whole_on_hovering_and_short_on_the_axis():
    long = "a feature with a description that goes on and on"
    figure = plots.heatmap(np.eye(2), [long, "b"])
    assert figure.data[0].y[0] == long
    assert figure.layout.yaxis.ticktext[0] == long[: plots.LONGEST_LABEL - 1] + "…"
    assert "%{y}" in figure.data[0].hovertemplate


def test_equal_labels_stay_apart():
    for categories in (plots.heatmap(np.eye(3), ["a"] * 3).data[0].y, plots.bars(["a"] * 3, [1, 2, 3]).data[0].y):
        assert len(set(categories)) == 3
        assert list(map(shown, categories)) == ["a"] * 3


def test_labels_that_look_like_numbers_or_dates_are_names():
    figure = plots.bars(["2019", "2020-01-01", "1e5"], [1, 2, 3])
    assert figure.layout.yaxis.type == "category"


def test_many_ticks_are_thinned_out():
    figure = plots.heatmap(np.zeros((500, 3)))
    assert len(figure.layout.yaxis.ticktext) <= plots.MOST_TICKS
    assert len(figure.data[0].y) == 500


def test_hostile_labels_are_shown_literally(hostile):
    figures = [
        plots.heatmap(np.eye(len(hostile)), hostile, hostile, hostile[0]),
        plots.bars(hostile, range(len(hostile)), hostile[0]),
    ]
    for figure in figures:
        assert list(map(shown, figure.data[0].y)) == list(map(visible, hostile))
        assert figure.layout.title.text == html.escape(hostile[0], quote=False)
        assert not set("<${") & set("".join(map(str, figure.layout.yaxis.ticktext)))
        json.loads(figure.to_json())
    points = plots.scatter(range(len(hostile)), range(len(hostile)), hostile)
    assert list(map(shown, points.data[0].customdata)) == list(map(visible, hostile))
    curves = plots.line([1], {token: [1] for token in hostile})
    assert [shown(curve.name) for curve in curves.data] == list(map(visible, hostile))


def test_spectrum_is_sorted_by_magnitude_and_coloured_by_sign():
    bars = plots.spectrum(torch.tensor([0.5, -3.0, 1.0])).data[0]
    assert list(bars.y) == [-3, 1, 0.5]
    assert list(bars.customdata) == [1, 2, 0]
    assert list(bars.marker.color) == [NEGATIVE, POSITIVE, POSITIVE]


def test_bars_keep_their_order_and_have_room():
    figure = plots.bars(["a", "b"], [1, -2])
    assert list(figure.data[0].x) == [1, -2]
    low, high = figure.layout.xaxis.range
    assert low < -2
    assert high > 1
    assert plots.bars(["a"], [3]).layout.xaxis.range[0] == 0


def test_nothing_to_draw_is_an_empty_figure():
    for figure in (plots.bars([], []), plots.spectrum([]), plots.scatter([], [], diagonal=True), plots.line([], {})):
        json.loads(figure.to_json())


def test_scatter_diagonal():
    assert len(plots.scatter([1, 2], [3, 4]).data) == 1
    diagonal = plots.scatter([1, 2], [3, 4], diagonal=True).data[0]
    assert list(diagonal.x) == list(diagonal.y) == [1, 4]


def test_line_names_its_curves():
    figure = plots.line([1, 2], {"a": [1, 2], "b": [3, 4]}, log_x=True, x_title="rank")
    assert [curve.name for curve in figure.data] == ["a", "b"]
    assert figure.layout.showlegend is True
    assert figure.layout.xaxis.type == "log"
    assert figure.layout.xaxis.title.text == "rank"


def test_figures_have_no_background_and_one_look():
    for figure in (plots.heatmap([[1]]), plots.spectrum([1]), plots.bars(["a"], [1]), plots.scatter([1], [1])):
        assert figure.layout.template == plots.template()
    assert plots.template().layout.paper_bgcolor == plots.template().layout.plot_bgcolor == "rgba(0,0,0,0)"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: plots.heatmap([1, 2]), "matrix must be any x any"),
        (lambda: plots.heatmap([[np.nan]]), "matrix holds nan"),
        (lambda: plots.heatmap([[1]], ["a", "b"]), "2 row labels for 1"),
        (lambda: plots.heatmap([[1]], ["a"], []), "0 column labels for 1"),
        (lambda: plots.spectrum([[1]]), "values must be any"),
        (lambda: plots.spectrum([np.inf]), "values holds inf"),
        (lambda: plots.bars(["a"], [1, 2]), "must be 1, not 2"),
        (lambda: plots.scatter([1], [1, 2]), "must be 1, not 2"),
        (lambda: plots.scatter([1], [1], ["a", "b"]), "2 labels for 1"),
        (lambda: plots.line([1], {"a": [1, 2]}), "series 'a'"),
        (lambda: plots.line([0], {"a": [1]}, log_x=True), "logarithmic"),
    ],
)
def test_what_cannot_be_drawn_is_refused(make, message):
    with pytest.raises(ViewError, match=message):
        make()
