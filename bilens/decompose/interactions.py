"""Which pairs of input directions an output is made of: the result of every search for them.

One row per pair. `coefficient` is what multiplies `f_i f_j` in the output: `Q_ii` of a direction with itself, `2 Q_ij`
of two, which stand once. A pair's contribution on a token is `coefficient * f_i * f_j`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bilens._core.checks import name_of
from bilens._core.display import Tabular
from bilens.draw import plots

ONE_LENGTH = 1.01  # decoder rows whose lengths differ by less are of one length
COLUMNS = ("layer", "output", "i", "j", "coefficient", "weight")


class PairNames(NamedTuple):
    """Labels of the outputs and of both ends of the pairs of one layer; `None` names them by number."""

    output: Sequence[str] | None = None
    i: Sequence[str] | None = None
    j: Sequence[str] | None = None


@dataclass(frozen=True)
class Interactions(Tabular):
    """Interactions between input directions, one row per pair.

    Attributes:
        layer, output: the layer and output of each pair; directions given as outputs have their places as numbers.
        i, j: the pair, `i <= j` within one set of directions.
        coefficient: the number that multiplies `f_i f_j`: `Q_ii`, or `2 Q_ij`.
        weight: the weight of each pair, if they are ranked by `|coefficient * weight|`.
        names: the names of outputs and ends, by layer.
        one_set: whether `i` and `j` are of the same set of directions: `i = j` is then a self interaction.
        method: the way they were found.
        note: a remark on the ranking.
    """

    layer: Int[Tensor, "n"] = field(repr=False)
    output: Int[Tensor, "n"] = field(repr=False)
    i: Int[Tensor, "n"] = field(repr=False)
    j: Int[Tensor, "n"] = field(repr=False)
    coefficient: Float[Tensor, "n"] = field(repr=False)
    weight: Float[Tensor, "n"] | None = field(default=None, repr=False)
    names: Mapping[int, PairNames] = field(default_factory=dict, repr=False)
    one_set: bool = field(default=True, repr=False)
    method: str = ""
    note: str = field(default="", repr=False)

    @property
    def score(self) -> Float[Tensor, "n"]:
        """What they are ranked by, in absolute value: `coefficient * weight`, or the coefficient alone."""
        return self.coefficient if self.weight is None else self.coefficient * self.weight

    def __len__(self) -> int:
        return len(self.coefficient)

    def __getitem__(self, rows: slice | Int[Tensor, "m"] | Bool[Tensor, "n"]) -> "Interactions":
        """Some rows, such as `found[:10]` or `found[found.output == 3]`."""
        columns = {name: value for name in COLUMNS if (value := getattr(self, name)) is not None}
        return replace(self, **{name: value[rows] for name, value in columns.items()})

    def to_frame(self) -> pd.DataFrame:
        """One row per pair: `layer, output, i, j, kind, coefficient, output_name, i_name, j_name`, with weights
        `weight, score` after the coefficient."""
        layers, output, i, j = (getattr(self, name).tolist() for name in COLUMNS[:4])
        columns = {
            "layer": layers,
            "output": output,
            "i": i,
            "j": j,
            "kind": ["self" if self.one_set and a == b else "cross" for a, b in zip(i, j, strict=True)],
            "coefficient": self.coefficient.tolist(),
        }
        if self.weight is not None:
            columns |= {"weight": self.weight.tolist(), "score": self.score.tolist()}
        names = [self.names.get(layer, PairNames()) for layer in layers]
        for place, (column, which) in enumerate((("output_name", output), ("i_name", i), ("j_name", j))):
            columns[column] = [name_of(of[place], number) for of, number in zip(names, which, strict=True)]
        return pd.DataFrame(columns)

    def plot(self, top: int = 30) -> go.Figure:
        """The first `top` of them as signed bars; several outputs or layers are named, too."""
        frame = self.to_frame().head(top)
        labels = [a if a == b else f"{a} x {b}" for a, b in zip(frame.i_name, frame.j_name, strict=True)]
        if frame.output.nunique() > 1:
            labels = [f"{output} <- {pair}" for output, pair in zip(frame.output_name, labels, strict=True)]
        if frame.layer.nunique() > 1:
            labels = [f"{layer}: {label}" for layer, label in zip(frame.layer, labels, strict=True)]
        column = "coefficient" if self.weight is None else "score"
        return plots.bars(labels, frame[column].tolist(), "interactions", value_title=column)

    def __repr__(self) -> str:
        layers = ", ".join(map(str, self.layer.unique().tolist()))
        found = f"{len(self)} of layers {layers or 'none'}"
        return f"Interactions({'; '.join(filter(None, [found, self.method]))})"

    def __str__(self) -> str:
        lines = [repr(self), self[:20].to_frame().to_string(index=False), self.note]
        return "\n".join(filter(None, lines))

    def _repr_html_(self) -> str:
        return f"{super()._repr_html_()}<p>{self.note}</p>" if self.note else super()._repr_html_()


def unequal_rows(directions: Float[Tensor, "d_sae d_model"]) -> str:
    """What to know of coefficients per unit of activation, where the features' decoder rows are not of one length.

    An SAE whose rows are longer and activations smaller by the same factor is the same SAE with other coefficients.
    """
    lengths = directions.norm(dim=-1)
    lengths = lengths[lengths > 0]
    if not len(lengths) or lengths.max() <= ONE_LENGTH * lengths.min():
        return ""
    return (
        f"Coefficients are per unit of activation, and the input SAE's decoder rows are {lengths.min():.3g} to "
        f"{lengths.max():.3g} long: features with long rows lead, however weakly they fire. Give typical activations "
        "to rank by what pairs contribute."
    )


def merge(found: Sequence[Interactions], n: int) -> Interactions:
    """The `n` of largest absolute score of several; equal ones in the order given."""
    parts: dict[str, Any] = {name: [getattr(of, name) for of in found] for name in COLUMNS}
    columns: dict[str, Any] = {name: None if of[0] is None else torch.cat(of) for name, of in parts.items()}
    columns["names"] = {layer: names for of in found for layer, names in of.names.items()}
    every = replace(found[0], **columns, method="; ".join(dict.fromkeys(of.method for of in found)), note="")
    return every[every.score.abs().argsort(descending=True, stable=True)[:n]]
