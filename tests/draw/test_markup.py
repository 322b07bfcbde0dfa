import json

import numpy as np
import pytest
import torch

from bilens.draw.markup import (
    ViewError,
    circuitsvis_bundle,
    escape,
    full_scale,
    island,
    names,
    numbers,
    plotly_bundle,
    script_source,
    scripts_for,
    spaced,
    to_json,
    visible,
)
from bilens.draw.page import Html
from bilens.errors import BilensError


def test_an_island_gives_its_data_back_and_nothing_else(hostile, read):
    page = read(island("circuitsvis", to_json(hostile)))
    assert json.loads(page.data[0]) == hostile
    assert [tag for tag, _ in page.elements] == ["div", "script", "div"]
    assert page.text == ""


def test_json_for_a_script_has_no_character_that_html_or_javascript_would_read(hostile):
    data = island("plotly", to_json(hostile)).split('json">')[1].split("</script>")[0]
    assert not set("<>&\u2028\u2029") & set(data)


def test_json_takes_no_nan():
    with pytest.raises(ValueError, match="JSON"):
        to_json(float("nan"))


def test_escaped_text_cannot_ask_for_a_script():
    assert scripts_for(escape('<div data-draw="plotly">')) == []
    assert scripts_for("prose") == []


def test_each_script_is_given_once():
    assert scripts_for(island("circuitsvis", "1") * 3) == [circuitsvis_bundle(), scripts_for(island("plotly", "1"))[-1]]


@pytest.mark.parametrize("bundle", [circuitsvis_bundle, plotly_bundle])
def test_a_bundle_fits_a_script_element(bundle, read):
    source = bundle()
    assert len(source) > 1e6
    assert "</script" not in source.lower()
    assert "<!--" not in source
    assert "sourceMappingURL" not in source
    assert read(f"<script>{source}</script>").code == [source]


def test_a_script_keeps_its_meaning():
    source = 'a = "</script><!-- </SCRIPT >";\nb = /</; c = d < e;\n//# sourceMappingURL=x.js.map\n'
    assert script_source(source) == 'a = "<\\/script><\\!-- <\\/SCRIPT >";\nb = /</; c = d < e;\n\n'


@pytest.mark.parametrize(
    ("token", "shown"),
    [
        ("dog", "dog"),
        (" dog", " dog"),
        ("  ", "␣␣"),
        ("", ""),
        ("a\nb\t", "a↵b⇥"),
        ("\x00", "\\x00"),
        ("\u202eabc", "\\u202eabc"),
        ("\u2028", "\\u2028"),
        ("\ud800", "\\ud800"),
        ("\xa0", "\\xa0"),
        ("été 🙂 你好", "été 🙂 你好"),
        ("👩\u200d🔬", "👩\u200d🔬"),
        ("\\n", "\\n"),
    ],
)
def test_nothing_in_a_token_is_hidden(token, shown):
    assert visible(token) == shown


def test_wordpieces_are_joined():
    tokens = ["##ing", "play", "##ing", "##", "."]
    assert spaced(tokens, wordpiece=True) == [("", "ing"), (" ", "play"), ("", "ing"), ("", "##"), (" ", ".")]
    assert spaced(tokens, wordpiece=False) == [("", token) for token in tokens]


@pytest.mark.parametrize("values", [[1, 2], (1.0, 2.0), np.array([1, 2]), torch.tensor([1.0, 2.0], requires_grad=True)])
def test_numbers_from_anything(values):
    assert numbers(values, "values", 2).tolist() == [1, 2]
    assert numbers(torch.tensor([[1.5]], dtype=torch.bfloat16), "values", 1, None).tolist() == [[1.5]]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_numbers_are_finite(bad):
    with pytest.raises(ViewError, match=r"weights holds (nan|-?inf) at \[1, 0\]"):
        numbers([[0, 0], [bad, 0]], "weights", 2, 2)


def test_numbers_have_the_shape():
    with pytest.raises(ViewError, match="weights must be 3 x any, not 2 x 2"):
        numbers(np.zeros((2, 2)), "weights", 3, None)
    with pytest.raises(ViewError, match="a single number"):
        numbers(1.0, "weights", None)


def test_full_scale():
    assert full_scale(np.array([1.0, -3.0])) == 3
    assert full_scale(np.zeros(2)) == 1
    assert full_scale(np.array([1.0]), 5) == 5
    for bad in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ViewError, match="positive"):
            full_scale(np.zeros(1), bad)


def test_names():
    assert names(None, 2, "labels") == ["0", "1"]
    assert names(["a", "b"], 2, "labels") == ["a", "b"]
    with pytest.raises(ViewError, match="1 labels for 2"):
        names(["a"], 2, "labels")


def test_view_errors_are_value_errors_of_bilens():
    assert issubclass(ViewError, BilensError)
    assert issubclass(ViewError, ValueError)


def test_html_is_taken_as_it_is():
    assert Html("<b>x</b>").html() == "<b>x</b>"
    assert Html("<b>x</b>")._repr_html_().endswith("<b>x</b>")
