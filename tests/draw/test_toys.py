import numpy as np
import pytest

from bilens.draw.markup import ViewError
from bilens.draw.toys import curve_grid, matrix_grid


def test_matrices_share_one_scale_and_keep_their_places():
    matrices = [[np.eye(2), -3 * np.eye(2)], [np.zeros((2, 2)), np.ones((2, 2))]]
    figure = matrix_grid(matrices, ["r", "s"], ["left", "right"], ["x", "1"], "Title")
    assert (figure.layout.coloraxis.cmin, figure.layout.coloraxis.cmax) == (-3, 3)
    assert all(cells.coloraxis == "coloraxis" for cells in figure.data)
    assert [cells.z[0][0] for cells in figure.data] == [1, -3, 0, 1]
    assert [a.text for a in figure.layout.annotations] == ["left", "right"]
    assert (figure.layout.yaxis.title.text, figure.layout.yaxis3.title.text) == ("r", "s")
    assert figure.layout.yaxis4.autorange == "reversed"
    assert figure.layout.xaxis.type == "category"
    assert figure.layout.xaxis.tickvals == ("x", "1")
    many = matrix_grid([[np.eye(20)]], [""], [""], [f"f{i}" for i in range(20)])
    assert len(many.layout.xaxis.tickvals) <= 8


def test_a_curve_has_one_colour_in_every_row():
    figure = curve_grid([{"a": [1, 2], "b": [3, 4]}, {"b": [5, 6]}], ["one", "two"], x_title="n")
    first, second, third = figure.data
    assert second.line.color == third.line.color != first.line.color
    assert [trace.showlegend for trace in figure.data] == [True, True, False]


def test_labels_are_text():
    labels = ["<b>x</b>", "1"]
    figure = matrix_grid([[np.eye(2)]], ["<i>"], ["<u>"], labels)
    assert figure.data[0].x[0] == "&lt;b&gt;x&lt;/b&gt;"
    assert figure.layout.yaxis.title.text == "&lt;i&gt;"
    assert [a.text for a in figure.layout.annotations] == ["&lt;u&gt;"]


def test_what_does_not_fit_is_refused():
    with pytest.raises(ViewError, match="1 rows of matrices, with 2 row labels"):
        matrix_grid([[np.eye(2)]], ["a", "b"], ["c"], ["x", "y"])
    with pytest.raises(ViewError, match="a matrix"):
        matrix_grid([[np.eye(3)]], ["a"], ["c"], ["x", "y"])
    with pytest.raises(ViewError, match="1 titles for 2 rows"):
        curve_grid([{}, {}], ["one"])
    with pytest.raises(ViewError, match=r"NaN|finite"):
        curve_grid([{"a": [float("nan")]}], ["one"])
