"""What a layer reads where its output features fire, kept from one run over texts.

`Decomposer.eigen`, `spectra` and `fidelity` take it as `fit`: they then choose or find eigencircuits by what these do
on the tokens where a feature fires, instead of by the weights alone.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeAlias

import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Float, Int
from torch import Tensor

from bilens._core.checks import MEMORY
from bilens._core.display import Tabular
from bilens.draw import plots
from bilens.layer.bilinear import BilinearLayer, double, interaction_matrix
from bilens.layer.eigen.circuits import Metric
from bilens.layer.eigen.fitted import best_squares
from bilens.layer.eigen.metric import Ranking, metric_eigenpairs, moment, shares_of, terms
from bilens.layer.eigen.metric_sweep import MetricPairs, leading_metric_pairs
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


@dataclass(frozen=True)
class FiringSpectra(Tabular):
    """The leading squares of many features, each in the metric of the tokens on which it fires.

    Attributes:
        features: the output features.
        n_active: the number of tokens each fires on.
        pairs: the squares, and how they were found.
        names: the names of the output features.
    """

    features: Int[Tensor, "n"]
    n_active: Int[Tensor, "n"]
    pairs: MetricPairs = field(repr=False)
    names: Sequence[str] | None = field(default=None, repr=False)

    @property
    def shares(self) -> Float[Tensor, "n"]:
        """`sum mu^2 / ||M^1/2 Q M^1/2||_F^2`: how much of the matrix in the metric the squares are, which is also their
        share of the variance over Gaussian inputs."""
        norms = self.pairs.norms
        return torch.where(norms > 0, ((self.pairs.mu / norms[:, None]) ** 2).sum(1), 0.0)

    def to_frame(self) -> pd.DataFrame:
        """One row per feature: `feature, name, n_active`, `mu_1, mu_2, ...` (eigenvalues of `M^1/2 Q M^1/2`), and
        `share` of all its squares together."""
        columns = {f"mu_{r + 1}": column.tolist() for r, column in enumerate(self.pairs.mu.T)}
        return pd.DataFrame(
            {
                "feature": self.features.tolist(),
                "name": [self.names[i] if self.names else str(i) for i in self.features.tolist()],
                "n_active": self.n_active.tolist(),
                **columns,
                "share": self.shares.tolist(),
            }
        )

    def plot(self) -> go.Figure:
        """How much of each feature's matrix in the metric the squares are, against how often it fires."""
        frame = self.to_frame()
        labels = [f"{feature} {name}" for feature, name in zip(frame["feature"], frame["name"], strict=True)]
        title = f"share of {self.pairs.mu.shape[1]} squares"
        return plots.scatter(
            frame["n_active"].tolist(), frame["share"].tolist(), labels, x_title="tokens", y_title=title
        )

    def __str__(self) -> str:
        first = self.to_frame().sort_values("share", ascending=False, ignore_index=True).head(10)
        return f"{len(self.features)} features where they fire\n{first.to_string(index=False)}"


@torch.no_grad()
def spectra_where_they_fire(
    layer: BilinearLayer,
    u: Float[Tensor, "n d_model"],
    features: Int[Tensor, "n"],
    firing: Firing,
    k: int,
    memory: int = MEMORY,
) -> FiringSpectra:
    """The `k` leading squares of every feature in the metric of its tokens, without the root of any metric.

    Args:
        layer: its weights.
        u: an output direction for each feature.
        features: whose tokens count.
        firing: what the layer reads on them.
        k: how many squares of each.
        memory: bytes to work in.

    Raises:
        ArgumentError: less memory than the search needs.
    """

    def tokens_of(row: int) -> Tensor:
        return firing.tokens_of(int(features[row]))

    pairs = leading_metric_pairs(layer, u, firing.inputs, tokens_of, firing.second_moment, k, memory=memory)
    return FiringSpectra(features, firing.n_active[features], pairs)
