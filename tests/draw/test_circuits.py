import json
import re

import numpy as np
import pytest
import torch

from bilens.draw.circuits import WORD_JOINER, AttentionPatterns, ColoredTokens, ColoredTokensMulti
from bilens.draw.markup import ViewError, visible


def island(view, read) -> dict:
    return json.loads(read(view.html()).data[0])


def views(tokens):
    n = len(tokens)
    return [
        ColoredTokens(tokens, np.linspace(-1, 1, n)),
        ColoredTokensMulti(tokens, np.ones((n, 2)), ["</script>", "<img src=x onerror=alert(1)>"]),
        AttentionPatterns(tokens, np.ones((1, n, n)), ["</script><b>"]),
    ]


@pytest.mark.parametrize("kind", range(3))
def test_hostile_tokens_stay_data(kind, hostile, read):
    view = views(hostile)[kind]
    page = read(view.html())
    assert [tag for tag, _ in page.elements] == ["div", "script", "div"]
    assert page.code == []
    tokens = json.loads(page.data[0])["props"]["tokens"]
    assert [token.replace(WORD_JOINER, "").replace("↵\n", "↵") for token in tokens] == list(map(visible, hostile))


@pytest.mark.parametrize("kind", range(2))
def test_tokens_set_as_inner_html_open_neither_tag_nor_entity(kind, hostile):
    for token in views(hostile)[kind].props()["tokens"]:
        assert not re.search(r"<[a-zA-Z/!?]|&[a-zA-Z0-9#]", token)


def test_innocent_tokens_are_left_alone():
    tokens = ["a < b", "R & B", "x=1", "<", "&"]
    assert ColoredTokens(tokens, range(5)).props()["tokens"] == tokens


@pytest.mark.parametrize("kind", range(3))
def test_a_notebook_cell_works_on_its_own(kind, read):
    view = views(["a", " b"])[kind]
    page = read(view._repr_html_())
    assert [("CircuitsVis=" in code, "CircuitsVis.render" in code) for code in page.code] == [
        (True, False),
        (False, True),
    ]
    assert not any({"src", "href"} & set(attributes) for _, attributes in page.elements)
    assert "CircuitsVis=" not in view.html()


@pytest.mark.parametrize("component", ["ColoredTokens", "ColoredTokensMulti", "AttentionHeads"])
def test_the_bundle_exports_the_component(component):
    from bilens.draw.markup import circuitsvis_bundle

    assert re.search(rf"\b{component}:\(\)=>", circuitsvis_bundle())
    assert component in {view.component for view in views(["a"])}


def test_colored_tokens_props(read):
    data = island(ColoredTokens(["one", "##s"], torch.tensor([1 / 3, -2.0]), wordpiece=True), read)
    assert data["component"] == "ColoredTokens"
    assert data["props"]["tokens"] == ["one", "s"]
    assert data["props"]["values"] == [0.333333, -2]
    assert (data["props"]["minValue"], data["props"]["maxValue"]) == (-2, 2)
    assert ColoredTokens(["a"], [0]).props()["maxValue"] == 1
    assert ColoredTokens(["a"], [3], scale=9).props()["maxValue"] == 9


def test_every_feature_has_the_same_bounds():
    props = ColoredTokensMulti(["a", "b"], [[1, 0, 0], [0, -5, 0]]).props()
    assert props["positiveBounds"] == [5, 5, 5]
    assert props["negativeBounds"] == [-5, -5, -5]
    assert props["labels"] == ["0", "1", "2"]


def test_attention_props():
    props = AttentionPatterns(["a", "b"], np.array([[[1, 0], [0.5, -0.5]]] * 2)).props()
    assert props["attentionHeadNames"] == ["head 0", "head 1"]
    assert (props["minValue"], props["maxValue"], props["maskUpperTri"]) == (-1, 1, True)
    assert np.shape(props["attention"]) == (2, 2, 2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ColoredTokens(["a"], [1, 2]), "values .* must be 1, not 2"),
        (lambda: ColoredTokens(["a"], [float("nan")]), "holds nan"),
        (lambda: ColoredTokens([], []), "empty"),
        (lambda: ColoredTokens(["a"], [1], scale=0), "positive"),
        (lambda: ColoredTokensMulti(["a"], [1]), "must be 1 x any"),
        (lambda: ColoredTokensMulti(["a"], [[1, 2]], ["only one"]), "1 labels for 2"),
        (lambda: ColoredTokensMulti(["a"], [[]]), "empty"),
        (lambda: AttentionPatterns(["a", "b"], np.zeros((1, 2, 3))), "any x 2 x 2, not 1 x 2 x 3"),
        (lambda: AttentionPatterns(["a"], np.full((1, 1, 1), np.inf)), "holds inf"),
        (lambda: AttentionPatterns(["a"], np.zeros((2, 1, 1)), ["L0H0"]), "1 head_names for 2"),
        (lambda: AttentionPatterns(["a"], np.zeros((0, 1, 1))), "empty"),
    ],
)
def test_what_cannot_be_drawn_is_refused_at_once(make, message):
    with pytest.raises(ViewError, match=message):
        make()
