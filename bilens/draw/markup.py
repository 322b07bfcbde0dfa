"""What every view shares: escaping, checked numbers, and the scripts that draw it.

A view's markup never carries code. It is an island: a `div` with its data as JSON in an inert script block, drawn by
`assets/mount.js` once it comes near the screen. So a page needs no more than four scripts (plotly.js, the circuitsvis
bundle, `graph.js`, `mount.js`), each embedded once and allowed by its hash; whatever else a token may smuggle in cannot
run.
"""

import html
import json
import re
from collections.abc import Iterable, Sequence
from functools import cache
from importlib.resources import files
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from plotly.offline import get_plotlyjs

from bilens.errors import BilensError

Numbers: TypeAlias = ArrayLike | torch.Tensor

POSITIVE = "#2b7bba"
NEGATIVE = "#d6455d"

_IN_SCRIPT = str.maketrans({character: f"\\u{ord(character):04x}" for character in "<>&\u2028\u2029"})
_MARKS = {"\n": "↵", "\t": "⇥"}
_JOINERS = "\u200c\u200d"  # invisible on purpose, in Persian and in emoji


class ViewError(BilensError, ValueError):
    """Something that cannot be drawn: NaN, lengths that differ, an array of the wrong rank."""


def escape(text: object) -> str:
    """Text for an element or a quoted attribute."""
    return html.escape(str(text))


def visible(text: str) -> str:
    r"""A token with nothing hidden: a newline is ↵, a tab ⇥, what does not print (or turns the text around) its escape
    such as `\u202e`; spaces are ␣ where there is nothing else."""
    if text.strip(" ") == "":
        return "␣" * len(text)
    return "".join(c if c.isprintable() or c in _JOINERS else _MARKS.get(c) or ascii(c)[1:-1] for c in text)


def plotly_text(label: str) -> str:
    """A label as plotly shows it literally: it reads tags, some entities, `%{x}` and, where MathJax is loaded, `$`."""
    return html.escape(visible(label), quote=False).replace("$", "&#36;").replace("{", "&#123;")


def signed_colors(values: NDArray[np.float64]) -> list[str]:
    """Red below zero, blue from there on."""
    return [NEGATIVE if value < 0 else POSITIVE for value in values]


def spaced(tokens: Iterable[str], wordpiece: bool) -> list[tuple[str, str]]:
    """For each token, the space that WordPiece implies before it ("" elsewhere) and its visible text."""
    if not wordpiece:
        return [("", visible(token)) for token in tokens]
    return [
        ("" if place == 0 or token.startswith("##") else " ", visible(token.removeprefix("##") or token))
        for place, token in enumerate(tokens)
    ]


def numbers(values: Numbers, what: str, *shape: int | None) -> NDArray[np.float64]:
    """`values` as an array of that shape, where `None` leaves a dimension free.

    Raises:
        ViewError: another shape, or a NaN or infinite value.
    """
    if isinstance(values, torch.Tensor):
        values = values.detach().double().cpu().numpy()
    array = np.asarray(values, dtype=np.float64)
    fits = array.ndim == len(shape) and all(want in (None, have) for want, have in zip(shape, array.shape, strict=True))
    if not fits:
        wanted = " x ".join("any" if size is None else str(size) for size in shape)
        raise ViewError(f"{what} must be {wanted}, not {' x '.join(map(str, array.shape)) or 'a single number'}.")
    if not np.isfinite(array).all():
        place = tuple(np.argwhere(~np.isfinite(array))[0].tolist())
        raise ViewError(f"{what} holds {array[place]} at {list(place)}; only finite numbers can be drawn.")
    return array


def full_scale(array: NDArray[np.float64], scale: float | None = None) -> float:
    """The |value| drawn in full colour: `scale`, or the largest there is (1 where all are zero)."""
    if scale is not None and not (np.isfinite(scale) and scale > 0):
        raise ViewError(f"scale must be a positive number, not {scale}.")
    return scale or float(np.abs(array).max(initial=0)) or 1.0


def names(given: Sequence[str] | None, count: int, what: str) -> list[str]:
    """`count` names: those given, else their indices.

    Raises:
        ViewError: another number of names.
    """
    if given is not None and len(given) != count:
        raise ViewError(f"{len(given)} {what} for {count}.")
    return [str(name) for name in (range(count) if given is None else given)]


def script_json(text: str) -> str:
    """JSON that a script element can hold: nothing in it ends the element or opens a comment."""
    return text.translate(_IN_SCRIPT)


def island(drawer: Literal["circuitsvis", "plotly", "graph"], data: str, height: int = 0) -> str:
    """The place where `drawer` will draw `data` (JSON), with `height` pixels kept free for it."""
    place = f'<div style="min-height:{height}px"></div>' if height else "<div></div>"
    inert = f'<script type="application/json">{script_json(data)}</script>'
    return f'<div class="bilens-view" data-draw="{drawer}">{inert}{place}</div>'


def scripts_for(markup: str) -> list[str]:
    """The scripts that draw the islands in `markup`, each once. Escaped text cannot spell the attribute looked for."""
    bundles = {"plotly": plotly_bundle, "circuitsvis": circuitsvis_bundle, "graph": graph_script}
    used = [bundle() for drawer, bundle in bundles.items() if f'data-draw="{drawer}"' in markup]
    return [*used, asset("mount.js")] if used else []


@cache
def asset(name: str) -> str:
    """A file of `bilens/draw/assets`."""
    return (files("bilens.draw") / "assets" / name).read_text(encoding="utf-8")


@cache
def graph_script() -> str:
    """What draws attribution graphs; it defines the global `BilensGraph`."""
    return asset("graph_layout.js") + asset("graph_picture.js") + asset("graph.js")


@cache
def circuitsvis_bundle() -> str:
    """circuitsvis' script, which defines the global `CircuitsVis`."""
    return script_source((files("circuitsvis") / "dist" / "cdn" / "iife.js").read_text(encoding="utf-8"))


@cache
def plotly_bundle() -> str:
    """plotly.js, which defines the global `Plotly`."""
    return script_source(get_plotlyjs())


def script_source(source: str) -> str:
    r"""JavaScript for an inline script, its meaning unchanged.

    Bundles hold `</script` and `<!--` in strings and regular expressions alone, where `\/` is `/` and `\!` is `!`. The
    pointer to a source map, which a browser would go and look for, is dropped.
    """
    source = re.sub(r"<(?=/script)", r"<\\", source, flags=re.IGNORECASE).replace("<!--", r"<\!--")
    return re.sub(r"^//# sourceMappingURL=.*$", "", source, flags=re.MULTILINE)


def to_json(value: Any) -> str:
    """Plain JSON, in ASCII (a lone surrogate of a broken token included)."""
    return json.dumps(value, allow_nan=False, separators=(",", ":"))
