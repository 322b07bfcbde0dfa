"""Coloured tokens in plain HTML, light enough for dozens of them on a page."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bilens.draw.markup import Numbers, ViewError, escape, full_scale, numbers, spaced
from bilens.draw.page import View

STRONGEST = 0.6  # opacity of the strongest colour: text stays legible on it, in light and in dark


@dataclass(frozen=True, eq=False)
class TokenStrip(View):
    """One line of text with its tokens coloured by value, for lists of top-activating examples.

    Args:
        tokens: the text's tokens.
        values: one number each; those below zero take the second colour.
        focus: index of a token to outline, such as the one that activates most.
        scale: the |value| in full colour; the largest one by default. Give strips of one list the same.
        wordpiece: join `##` pieces to the token before, put a space before any other.
    """

    tokens: Sequence[str]
    values: Numbers
    focus: int | None = None
    scale: float | None = None
    wordpiece: bool = False

    def __post_init__(self) -> None:
        if self.focus is not None and not 0 <= self.focus < len(self.tokens):
            raise ViewError(f"focus {self.focus} is outside the {len(self.tokens)} tokens.")
        self.html()  # whatever cannot be drawn is refused at once

    def html(self) -> str:
        values = numbers(self.values, "values (one per token)", len(self.tokens))
        opacity = STRONGEST * np.minimum(np.abs(values) / full_scale(values, self.scale), 1)
        spans = []
        for place, (token, (gap, text)) in enumerate(
            zip(self.tokens, spaced(self.tokens, self.wordpiece), strict=True)
        ):
            classes = ("n" if values[place] < 0 else "p") + (" f" if place == self.focus else "")
            color = f' class="{classes}" style="--a:{opacity[place]:.2f}"'
            title = escape(f"{values[place]:.4g}  {token!r}")
            spans.append(f'{gap}<span{color} title="{title}">{escape(text)}</span>')
        return f'<div class="bilens-strip">{"".join(spans)}</div>'
