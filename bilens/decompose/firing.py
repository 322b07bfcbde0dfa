"""What a layer reads where its output features fire, kept from one run over texts.

`Decomposer.eigen` takes it as `fit`: it then chooses or finds eigencircuits by what these do on the tokens where a
feature fires, instead of by the weights alone.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeAlias

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from bilens._core.display import Tabular
from bilens.layer.bilinear import BilinearLayer, double, interaction_matrix
from bilens.layer.eigen.circuits import Metric
from bilens.layer.eigen.fitted import best_squares
from bilens.layer.eigen.metric import Ranking, metric_eigenpairs, moment, shares_of, terms
from bilens.layer.eigen.pairs import Order, sorted_eigenpairs


@dataclass(frozen=True)
class Firing(Tabular):
    """The layer's input on every token of some texts (`[BOS]` left out), and where each output feature fires.

    It takes `4 d_model` bytes a token in float32, and 12 for every time that a feature fires.

    Attributes:
        layer: the layer.
        inputs: what the layer reads on every token.
        tokens: the tokens on which features fire, the first feature's first.
        activations: their activations there.
        offsets: those of feature `i` are from `offsets[i]` to `offsets[i + 1]`.
        names: the names of the output features.
    """

    layer: int
    inputs: Float[Tensor, "p d_model"] = field(repr=False)
    tokens: Int[Tensor, "entry"] = field(repr=False)
    activations: Float[Tensor, "entry"] = field(repr=False)
    offsets: Int[Tensor, "d_sae_and_one"] = field(repr=False)
    names: Sequence[str] | None = field(default=None, repr=False)

    @property
    def n_active(self) -> Int[Tensor, "d_sae"]:
        """On how many tokens each feature fires."""
        return self.offsets.diff()

    def tokens_of(self, feature: int) -> Int[Tensor, "n"]:
        """The tokens on which a feature fires."""
        return self.tokens[self.offsets[feature] : self.offsets[feature + 1]]

    def inputs_of(self, feature: int) -> Float[Tensor, "n d_model"]:
        """What the layer reads on the tokens on which a feature fires."""
        return self.inputs[self.tokens_of(feature)]

    def activations_of(self, feature: int) -> Float[Tensor, "n"]:
        """The activations of a feature on the tokens on which it fires."""
        return self.activations[self.offsets[feature] : self.offsets[feature + 1]]

    @cached_property
    def mean(self) -> Float[Tensor, "d_model"]:
        """Of the inputs on all tokens, in float64."""
        return double(self.inputs).mean(0)

    @cached_property
    def second_moment(self) -> Float[Tensor, "d_model d_model"]:
        """Of the inputs on all tokens, in float64."""
        total = double(self.inputs.new_zeros(self.inputs.shape[1], self.inputs.shape[1]))
        for rows in self.inputs.split(2**14):
            total += double(rows).T @ double(rows)
        return total / len(self.inputs)

    def to_frame(self) -> pd.DataFrame:
        """One row per feature: `feature, name, n_active, density, mean_activation` (where it fires)."""
        n = self.n_active
        feature = torch.repeat_interleave(torch.arange(len(n)), n)
        totals = torch.zeros(len(n)).index_add_(0, feature, self.activations.float())
        return pd.DataFrame(
            {
                "feature": range(len(n)),
                "name": [self.names[i] if self.names else str(i) for i in range(len(n))],
                "n_active": n.tolist(),
                "density": (n / len(self.inputs)).tolist(),
                "mean_activation": (totals / n).tolist(),
            }
        )

    def __str__(self) -> str:
        n = self.n_active
        fires = n[n > 0]
        median = f", the median one of them on {int(fires.median()):,} tokens" if len(fires) else ""
        of = f"{len(fires):,} of {len(n):,} output features fire"
        return f"layer {self.layer}, {len(self.inputs):,} tokens: {of}{median}"


Fit: TypeAlias = Firing | Iterable[str]  # texts stand for what they give


@torch.no_grad()
def circuits_where_it_fires(
    layer: BilinearLayer,
    u: Float[Tensor, "n d_model"],
    features: Int[Tensor, "n"],
    firing: Firing,
    k: int,
    metric: Metric,
    order: Order | Ranking = "variance",
) -> dict[str, Tensor]:
    """The parts of `Eigencircuits` that are found on texts, by their names there.

    Args:
        layer: its weights.
        u: an output direction for each feature.
        features: whose tokens count.
        firing: what the layer reads on them.
        k: how many squares of each.
        metric: how they are found.
        order: which come first; by size or sign, `lambda` of the weights or `lambda v^T M v` counts, with `M` the
            moment of the metric.
    """
    found: dict[str, list[Tensor]] = {}
    for direction, feature in zip(u, features.tolist(), strict=True):
        Q, x = double(interaction_matrix(layer, direction)), double(firing.inputs_of(feature))
        whole = ((x @ Q) * x).sum(1)
        parts = {"norms": Q.norm()}
        if metric == "mean":
            mean = x.mean(0) if len(x) else firing.mean
            M = moment(x, firing.second_moment - torch.outer(firing.mean, firing.mean), mean)
            parts |= {"about": mean, "linear": 2 * Q @ mean, "constant": mean @ Q @ mean}
        else:
            M, mean = moment(x, firing.second_moment), torch.zeros_like(firing.mean)
        if metric == "weights":
            values, vectors = sorted_eigenpairs(Q)
        elif metric == "fitted":
            values, vectors = best_squares(Q, firing.inputs_of(feature), M, k)
        else:
            values, vectors = metric_eigenpairs(Q, M)
        of_terms = terms(values, vectors, x - mean)
        mu = values if metric == "weights" else values * ((vectors @ M) * vectors).sum(1)
        chosen = places(order, of_terms, mu)[:k]
        shares = shares_of(of_terms[:, chosen], whole)
        parts |= {"values": values[chosen], "vectors": vectors[chosen]}
        parts |= {"variance_shares": shares[0], "mean_shares": shares[1]}
        for name, part in parts.items():
            found.setdefault(name, []).append(part.to(u))
    return {name: torch.stack(parts) for name, parts in found.items()}


def places(order: Order | Ranking, of_terms: Float[Tensor, "p k"], mu: Float[Tensor, "k"]) -> Int[Tensor, "k"]:
    """The places of terms, the first in an order first; without inputs to rank them on, by size."""
    if order == "variance" and len(of_terms):
        size = of_terms.var(0, correction=0)
    elif order == "mean" and len(of_terms):
        size = of_terms.mean(0).abs()
    else:
        size = {"positive": mu, "negative": -mu}.get(order, mu.abs())
    return size.argsort(descending=True, stable=True)
