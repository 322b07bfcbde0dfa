import numpy as np
import pytest

from bilens.draw.markup import ViewError, visible
from bilens.draw.tokens import STRONGEST, TokenStrip


def test_hostile_tokens_are_text(hostile, read):
    page = read(TokenStrip(hostile, np.linspace(-1, 1, len(hostile))).html())
    assert page.text == "".join(map(visible, hostile))
    assert {tag for tag, _ in page.elements} == {"div", "span"}
    assert all(set(attributes) <= {"class", "style", "title"} for _, attributes in page.elements)
    assert [span["title"].split("  ", 1)[1] for span in page.tags("span")] == list(map(repr, hostile))


def test_colours_follow_the_values(read):
    spans = read(TokenStrip(["a", "b", "c"], [2, -1, 0], focus=1).html()).tags("span")
    assert [span["class"] for span in spans] == ["p", "n f", "p"]
    assert [span["style"] for span in spans] == [f"--a:{STRONGEST * share:.2f}" for share in (1, 0.5, 0)]
    assert spans[0]["title"].startswith("2 ")


def test_a_shared_scale_is_not_exceeded(read):
    spans = read(TokenStrip(["a", "b"], [1, 100], scale=10).html()).tags("span")
    assert [span["style"] for span in spans] == ["--a:0.06", f"--a:{STRONGEST:.2f}"]


def test_wordpieces_read_as_text(read):
    assert read(TokenStrip(["out", "##side", ",", "now"], range(4), wordpiece=True).html()).text == "outside , now"


def test_a_strip_needs_no_script(read):
    page = read(TokenStrip(["a"], [1])._repr_html_())
    assert page.code == []
    assert page.tags("style")


def test_an_empty_text_is_an_empty_strip(read):
    assert read(TokenStrip([], []).html()).text == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["a"], [1, 2]), "must be 1, not 2"),
        ((["a"], [float("inf")]), "holds inf"),
        ((["a"], [1], 1), "focus 1 is outside the 1 tokens"),
        ((["a"], [1], -1), "focus -1"),
        ((["a"], [1], None, -1.0), "positive"),
    ],
)
def test_what_cannot_be_drawn_is_refused_at_once(arguments, message):
    with pytest.raises(ViewError, match=message):
        TokenStrip(*arguments)
