"""Charts: points where their numbers say, labels as text, and what cannot be drawn refused."""

import re

import numpy as np
import pytest

from bilens.draw.charts import Chart
from bilens.draw.markup import ViewError


def test_points_stand_where_their_numbers_say() -> None:
    drawn = Chart("x", "y", points=([0.0, 1.0, 3.0], [1.0, 3.0, 2.0]), labels=["a", "b", "c"]).html()
    places = np.array(re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', drawn), dtype=float)
    # In SVG y goes down. A tenth of a pixel is what is written.
    assert (places[2, 0] - places[0, 0]) / (places[1, 0] - places[0, 0]) == pytest.approx(3, abs=0.01)
    assert (places[2, 1] - places[0, 1]) / (places[1, 1] - places[0, 1]) == pytest.approx(0.5, abs=0.01)
    assert places[1, 1] < places[0, 1]
    assert "<title>b (1, 3)</title>" in drawn


def test_curves_are_named() -> None:
    drawn = Chart("x", "y", {"one": ([0, 1], [2.0, 2.0]), "two": ([0, 1, 2], [0, 1, 4])}).html()
    assert drawn.count("<polyline") == 2
    assert drawn.count("<circle") == 5
    assert re.findall(r"</i>(\w+)</li>", drawn) == ["one", "two"]


@pytest.mark.parametrize("value", [0.0, 5.0, -1e-9, 1e12])
def test_points_that_are_all_the_same_are_drawn(value: float) -> None:
    drawn = Chart("x", "y", points=([value] * 2, [value] * 2), labels=["a", "b"], diagonal=True).html()
    assert drawn.count("<circle") == 2
    assert "nan" not in drawn


def test_nothing_is_drawn_as_empty_axes() -> None:
    assert "<circle" not in Chart("x", "y", diagonal=True).html()


def test_labels_are_text(hostile: list[str], read) -> None:
    n = np.ones(len(hostile))
    page = read(Chart(hostile[0], hostile[1], {name: ([0], [1]) for name in hostile}, (n, n), hostile).html())
    assert not page.tags("img")
    assert not page.tags("script")
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)


@pytest.mark.parametrize("values", [[np.nan], [1.0, 2.0]])
def test_what_cannot_be_drawn_is_refused(values: list[float]) -> None:
    with pytest.raises(ViewError):
        Chart("x", "y", {"a": ([0.0], values)})
    with pytest.raises(ViewError):
        Chart("x", "y", points=([0.0], values), labels=["a"])
