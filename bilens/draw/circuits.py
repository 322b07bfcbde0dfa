"""circuitsvis' interactive views, rendered by ourselves: offline, and with tokens that stay text.

circuitsvis' own renderer writes tokens into its script unescaped, asks the internet before it shows anything in a
notebook, and sets each token as the inner HTML of its box. The views here hold the data only; `bilens.draw.page.Page`
embeds the bundle once, and a notebook cell gets its own copy.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from bilens.draw.markup import (
    NEGATIVE,
    POSITIVE,
    Numbers,
    ViewError,
    full_scale,
    island,
    names,
    numbers,
    spaced,
    to_json,
)
from bilens.draw.page import View

WORD_JOINER = "\u2060"
_OPENS_MARKUP = re.compile(r"<(?=[A-Za-z/!?])|&(?=[A-Za-z0-9#])")


class CircuitsView(View):
    """A component of circuitsvis with its props."""

    component: ClassVar[str]

    def __post_init__(self) -> None:
        self.props()  # whatever cannot be drawn is refused at once

    def props(self) -> dict[str, Any]:
        """What the component is given, in JSON's types."""
        raise NotImplementedError

    def html(self) -> str:
        return island("circuitsvis", to_json({"component": self.component, "props": self.props()}))


@dataclass(frozen=True, eq=False)
class ColoredTokens(CircuitsView):
    """A text, each token coloured by its value; hovering shows the number.

    Args:
        tokens: the text's tokens.
        values: one number each.
        scale: the |value| in full colour; the largest one by default. Give views to be compared the same.
        wordpiece: join `##` pieces to the token before, put a space before any other.
        positive_color: CSS colour of the values above zero.
        negative_color: CSS colour of those below.
    """

    component: ClassVar[str] = "ColoredTokens"

    tokens: Sequence[str]
    values: Numbers
    scale: float | None = None
    wordpiece: bool = False
    positive_color: str = POSITIVE
    negative_color: str = NEGATIVE

    def props(self) -> dict[str, Any]:
        values = _drawable(self.values, "values (one per token)", len(self.tokens))
        scale = full_scale(values, self.scale)
        return {
            "tokens": _inert(self.tokens, self.wordpiece),
            "values": _rounded(values),
            "minValue": -scale,
            "maxValue": scale,
            "positiveColor": self.positive_color,
            "negativeColor": self.negative_color,
        }


@dataclass(frozen=True, eq=False)
class ColoredTokensMulti(CircuitsView):
    """A text and several features: choosing one colours the tokens, hovering a token shows all its values.

    Args:
        tokens: the text's tokens.
        values: token x feature.
        labels: the features' names; their indices by default.
        scale: the |value| in full colour, for every feature alike; the largest one by default.
        wordpiece: the same as for `ColoredTokens`.
    """

    component: ClassVar[str] = "ColoredTokensMulti"

    tokens: Sequence[str]
    values: Numbers
    labels: Sequence[str] | None = None
    scale: float | None = None
    wordpiece: bool = False

    def props(self) -> dict[str, Any]:
        values = _drawable(self.values, "values (token x feature)", len(self.tokens), None)
        features = values.shape[1]
        # The component keeps the bounds of its first feature for all, and six decimals of them: they are given equal.
        bound = max(full_scale(values, self.scale), 1e-6)
        return {
            "tokens": _inert(self.tokens, self.wordpiece),
            "values": _rounded(values),
            "labels": names(self.labels, features, "labels"),
            "positiveBounds": [bound] * features,
            "negativeBounds": [-bound] * features,
        }


@dataclass(frozen=True, eq=False)
class AttentionPatterns(CircuitsView):
    """Where each head attends: a small map per head, and the chosen one at full size with its tokens.

    Args:
        tokens: the text's tokens.
        attention: head x query x key, of either sign.
        head_names: the heads' names; by default `head 0`, `head 1`, ...
        scale: the |attention| in full colour; the largest one by default.
        causal: grey out the keys after the query.
        wordpiece: the same as for `ColoredTokens`.
        positive_color: CSS colour of the values above zero.
        negative_color: CSS colour of those below.
    """

    component: ClassVar[str] = "AttentionHeads"

    tokens: Sequence[str]
    attention: Numbers
    head_names: Sequence[str] | None = None
    scale: float | None = None
    causal: bool = True
    wordpiece: bool = False
    positive_color: str = POSITIVE
    negative_color: str = NEGATIVE

    def props(self) -> dict[str, Any]:
        length = len(self.tokens)
        attention = _drawable(self.attention, "attention (head x query x key)", None, length, length)
        scale = full_scale(attention, self.scale)
        default = [f"head {head}" for head in range(len(attention))]
        return {
            # Drawn on a canvas, as text: these need no guard.
            "tokens": [text for _, text in spaced(self.tokens, self.wordpiece)],
            "attention": _rounded(attention),
            "attentionHeadNames": names(self.head_names or default, len(attention), "head_names"),
            "minValue": -scale,
            "maxValue": scale,
            "maskUpperTri": self.causal,
            "positiveColor": self.positive_color,
            "negativeColor": self.negative_color,
        }


def _inert(tokens: Sequence[str], wordpiece: bool) -> list[str]:
    """The tokens as circuitsvis may have them.

    It sets each as inner HTML, and again as plain text in its tooltip, so that neither an escaped nor a bare token
    shows right in both. An invisible word joiner after a `<` or `&` that would open a tag or an entity does: HTML then
    reads a plain character.
    """
    texts = [gap + text for gap, text in spaced(tokens, wordpiece)]
    return [_OPENS_MARKUP.sub(rf"\g<0>{WORD_JOINER}", text).replace("↵", "↵\n") for text in texts]


def _drawable(values: Numbers, what: str, *shape: int | None) -> NDArray[np.float64]:
    array = numbers(values, what, *shape)
    if not array.size:
        raise ViewError(f"{what} is empty: there is nothing to draw.")
    return array


def _rounded(array: NDArray[np.float64]) -> list[Any]:
    """Nested lists of six significant digits: what a tooltip shows, and a fifth of the size."""
    return np.array([float(f"{value:.6g}") for value in array.flat]).reshape(array.shape).tolist()
