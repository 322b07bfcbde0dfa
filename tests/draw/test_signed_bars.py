"""Bars and matrices in plain HTML: the numbers they were given, in the right place, and text as text."""

import re

import numpy as np
import pytest

from bilens.draw.markup import ViewError
from bilens.draw.page import Html
from bilens.draw.signed_bars import ColoredMatrix, SignedBars


def test_bars_begin_at_a_common_zero() -> None:
    drawn = SignedBars(["a", "b", "c"], [3.0, -1.0, 0.0], muted=1).html()
    assert "--zero:25.0%" in drawn
    places = re.findall(r'class="([pn])" style="left:([\d.]+)%;width:([\d.]+)%"', drawn)
    assert places == [("p", "25.0", "75.0"), ("n", "0.0", "25.0"), ("p", "25.0", "0.0")]
    assert re.findall(r"<em>(.*?)</em>", drawn) == ["+3.00", "-1.00", "+0.00"]
    assert drawn.count('class="muted"') == 1


def test_what_stands_beside_a_bar_is_beside_it() -> None:
    drawn = SignedBars(["a", "b"], [1.0, 2.0], [Html("<u>one</u>"), None]).html()
    assert drawn.count("<div><u>one</u></div>") == drawn.count("<div>") == 1


def test_labels_are_text(hostile: list[str], read) -> None:
    for view in (SignedBars(hostile, np.ones(len(hostile))), ColoredMatrix(np.eye(len(hostile)), hostile)):
        page = read(view.html())
        assert not page.tags("img")
        assert not page.tags("script")
        assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)


@pytest.mark.parametrize("draw", [lambda v: SignedBars(["a"], v), lambda v: ColoredMatrix([v], ["a"])])
def test_what_cannot_be_drawn_is_refused(draw) -> None:
    for values in ([np.nan], [1.0, 2.0]):
        with pytest.raises(ViewError):
            draw(values)
