"""Why a feature fires at one token, told by eigencircuits: an exact sum of squares, each read in input features.

With `Q = sum_k lambda_k v_k v_k^T` (eigenpairs, or any other exact sum of squares) the pre-activation at one token is

    z = sum_k lambda_k (v_k . x)^2 + (what MLP biases add) + (the output SAE's bias)
    v_k . x = sum_i f_i (v_k . d_i) + v_k . b_dec + v_k . error

The first line adds up exactly, and so does the second: each projection is linear in the input. The sign of a vector
says nothing, so each is turned to make its projection positive: a positive part of it is one that made it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Float, Int
from torch import Tensor

from bilens._core.checks import check_index, name_of
from bilens._core.completeness import Complete
from bilens._core.display import Tabular
from bilens.decompose.sentences import Circuit, Family, families, percent, quote, tell
from bilens.draw import plots
from bilens.errors import ArgumentError
from bilens.layer.bilinear import BilinearLayer, branches, constant_term, hidden_coefficients, linear_term

EXACT = 1e-4  # of the absolute sum: circuits in float32 add up to a hundredth of that
ENOUGH = 0.8  # of what the layer writes: the circuits needed for it are counted
ROUNDING = 1e-9  # of a share, for sums that come out exactly at it
CIRCUITS_READ = 12  # circuits of the table whose features are named


@dataclass(frozen=True)
class Explanation(Complete, Tabular):
    """One output feature's pre-activation at one token as a sum of squares.

    Circuits are ordered by what they do at this token: by falling `|contribution|`.

    Attributes:
        layer, feature, position: of the feature and its token, counted from the front with `[BOS]`.
        tokens: the token strings.
        inputs: the active input features; `activations` `f_i` of each.
        values: `lambda` of each circuit.
        vectors: `v` of each, turned so that its projection is not negative.
        parts: what each source adds to each projection: the features `f_i (v . d_i)`, then `b_dec`, then the `error`.
        layer_bias: what MLP biases add (linear and constant part); 0 without them.
        output_bias: what the output SAE itself adds.
        actual: the pre-activation that the output SAE computes from the model's own `hook_mlp_out`.
        active: true if the feature is among those the output SAE lets through.
        reads: what each position of the text adds to the first projections, where that was split
            (`bilens.attribute.read_positions`); the rest of each is biases.
        dtype: the type of the model's forward pass; the parts are computed in float64.
    """

    layer: int
    feature: int
    position: int
    tokens: list[str] = field(repr=False)
    inputs: Int[Tensor, "m"] = field(repr=False)
    activations: Float[Tensor, "m"] = field(repr=False)
    values: Float[Tensor, "k"] = field(repr=False)
    vectors: Float[Tensor, "k d_model"] = field(repr=False)
    parts: Float[Tensor, "k source"] = field(repr=False)
    layer_bias: float
    output_bias: float
    actual: float
    active: bool
    input_names: Sequence[str] | None = field(default=None, repr=False)
    output_names: Sequence[str] | None = field(default=None, repr=False)
    reads: Float[Tensor, "r p"] | None = field(default=None, repr=False)
    dtype: torch.dtype = field(default=torch.float32, repr=False)

    @property
    def projections(self) -> Float[Tensor, "k"]:
        """`v . x` of each circuit."""
        return self.parts.sum(-1)

    @property
    def contributions(self) -> Float[Tensor, "k"]:
        """`lambda (v . x)^2` of each circuit."""
        return self.values * self.projections**2

    @property
    def written(self) -> float:
        """What the layer writes along the feature: the pre-activation without the output SAE's bias."""
        return self.contributions.sum().item() + self.layer_bias

    @property
    def shares(self) -> Float[Tensor, "k"]:
        """Each circuit's share of what the layer writes; they add up to 1 where there are no MLP biases.

        Above 1 where other circuits take off; of little meaning where the layer writes next to nothing.
        """
        return self.contributions / (self.written or torch.finfo(torch.float64).tiny)

    @property
    def total(self) -> float:
        """The sum of every part."""
        return self.written + self.output_bias

    @property
    def absolute_sum(self) -> float:
        return self.contributions.abs().sum().item() + abs(self.layer_bias) + abs(self.output_bias)

    def needed(self, share: float = ENOUGH) -> int:
        """How many circuits, largest first, give this share of what the layer writes; see `parts_needed`."""
        biases = [self.layer_bias] if self.layer_bias else []
        return parts_needed(torch.cat([self.contributions, self.contributions.new_tensor(biases)]), share)

    def families(self, rank: int) -> list[Family]:
        """The input features that make a circuit's projection, those of one name together, largest part first."""
        rank = check_index(rank, len(self.values), "there is no circuit {} among the {}")
        members = zip(self.inputs.tolist(), self.parts[rank, : len(self.inputs)].tolist(), strict=True)
        token, before = self.tokens[self.position], self.tokens[: self.position]
        return families([(i, name_of(self.input_names, i), part) for i, part in members], token, before)

    @property
    def sentence(self) -> str:
        """Why it fires, in one sentence."""
        shares, contributions, errors = self.shares, self.contributions, self.parts[:, -1] / self.projections
        circuits = [
            Circuit(
                self.families(rank), contributions[rank].item(), shares[rank].item(), self.projections[rank].item(),
                errors[rank].item(),
            )
            for rank in range(min(CIRCUITS_READ, len(self.values)))
        ]  # fmt: skip
        first = next((rank for rank, circuit in enumerate(circuits) if circuit.share > 0), 0)
        read = "" if self.reads is None or first >= len(self.reads) else self.quoted(first)
        return tell(circuits, self.needed(), self.active, self.written, read)

    def quoted(self, rank: int) -> str:
        """The words of the text that make a circuit's projection; `reads` has been split for it."""
        assert self.reads is not None
        return quote(self.tokens, (self.reads[rank] / self.projections[rank]).tolist())

    def to_frame(self) -> pd.DataFrame:
        """One row per circuit by falling `|contribution|`, then the biases.

        Columns `circuit` (its rank here), `eigenvalue, projection, contribution, share, made_of` (the features with the
        largest parts of the first circuits). The contributions add up to the pre-activation.
        """
        made_of = [
            ", ".join(f"{family} {family.part:+.2f}" for family in self.families(rank)[:3])
            if rank < CIRCUITS_READ
            else ""
            for rank in range(len(self.values))
        ]
        frame = pd.DataFrame(
            {
                "circuit": pd.Series(range(len(self.values)), dtype=object),
                "eigenvalue": self.values.tolist(),
                "projection": self.projections.tolist(),
                "contribution": self.contributions.tolist(),
                "share": self.shares.tolist(),
                "made_of": made_of,
            }
        )
        biases = [("MLP biases", self.layer_bias)] if self.layer_bias else []
        for name, value in [*biases, ("output bias", self.output_bias)]:
            frame.loc[len(frame)] = [name, None, None, value, None, ""]
        return frame

    def part_frame(self, rank: int = 0) -> pd.DataFrame:
        """What makes one circuit's projection, largest first; columns `part, i, name, activation, value, share`.

        The values add up to the projection, the shares to 1.
        """
        rank = check_index(rank, len(self.values), "there is no circuit {} among the {}")
        m, inputs = len(self.inputs), self.inputs.tolist()
        values = self.parts[rank]
        frame = pd.DataFrame(
            {
                "part": ["feature"] * m + ["b_dec", "error"],
                "i": [*inputs, -1, -1],
                "name": [*(name_of(self.input_names, i) for i in inputs), "b_dec", "error"],
                "activation": [*self.activations.tolist(), None, None],
                "value": values.tolist(),
                "share": (values / values.sum()).tolist(),
            }
        )
        return frame.sort_values("value", key=abs, ascending=False, ignore_index=True)

    def plot(self, top: int = 6) -> go.Figure:
        """The largest circuits, the sum of the others and the biases, as signed bars."""
        labels, values = self.bars(top)
        return plots.bars(labels, values, value_title="part of the pre-activation")

    def bars(self, top: int) -> tuple[list[str], list[float]]:
        """What `plot` draws: labels and values, which add up to the pre-activation."""
        named = [(self._label(rank), value) for rank, value in enumerate(self.contributions[:top].tolist())]
        if len(self.values) > top:
            named.append((f"{len(self.values) - top} other circuits", self.contributions[top:].sum().item()))
        named += [("MLP biases", self.layer_bias)] * bool(self.layer_bias) + [("output bias", self.output_bias)]
        return [name for name, _ in named], [value for _, value in named]

    def plot_circuit(self, rank: int = 0, top: int = 10) -> go.Figure:
        """What makes one circuit's projection, as signed bars: the largest parts, and the sum of the others."""
        frame = self.part_frame(rank)
        labels, values = frame["name"].tolist()[:top], frame["value"].tolist()[:top]
        if len(frame) > top:
            labels.append(f"{len(frame) - top} others")
            values.append(float(frame["value"][top:].sum()))
        return plots.bars(labels, values, value_title=f"part of the projection, {self.projections[rank]:.3g}")

    def _label(self, rank: int) -> str:
        return f"circuit {rank + 1}: " + ", ".join(str(family) for family in self.families(rank)[:2])

    def __str__(self) -> str:
        shown = self.to_frame().head(5).drop(columns="eigenvalue")
        name, token = name_of(self.output_names, self.feature), self.tokens[self.position]
        lines = [
            self.sentence,
            f"  feature {name} at position {self.position} ({token!r}): pre-activation {self.actual:+.4f}"
            f" ({'active' if self.active else 'not active'}), {self.written:+.4f} of it from the layer;"
            f" {self.needed()} of {len(self.values)} circuits give {percent(ENOUGH)}",
            f"  circuits and biases {self.total:+.5f}, {self._gap}",
            shown.to_string(index=False, float_format=lambda number: f"{number:.3f}"),
        ]
        return "\n".join(lines)


def explain(
    weights: BilinearLayer,
    u: Float[Tensor, "d_model"],
    sources: Float[Tensor, "source d_model"],
    values: Float[Tensor, "k"],
    vectors: Float[Tensor, "k d_model"],
    **facts: Any,
) -> Explanation:
    """What each source adds to the projection of each square, squares by falling contribution.

    Args:
        weights: of the layer, in float64, as everything here.
        u: what the output feature reads of the layer's output.
        sources: what the layer's input is made of: features, `b_dec`, error.
        values, vectors: a sum of squares, `Q_u = sum_k value_k vector_k vector_k^T`.
        facts: the other fields of the result.

    Raises:
        ArgumentError: the squares do not add up to the layer's quadratic part.
    """
    x = sources.sum(0)
    parts = vectors @ sources.T
    projections = parts.sum(-1)
    contributions = values * projections**2
    made = branches(weights, x)
    quadratic = hidden_coefficients(weights, u) @ (made.left * made.right)
    gap, scale = (contributions.sum() - quadratic).abs().item(), contributions.abs().sum().item()
    if not gap <= EXACT * max(scale, quadratic.abs().item()):
        raise ArgumentError(
            f"the {len(values)} circuits add up to {contributions.sum().item():.4g} where the layer's quadratic part "
            f"is {quadratic.item():.4g}: expected all circuits of this feature, as `eigen(feature)` gives them."
        )
    order = contributions.abs().argsort(descending=True)
    sign = torch.where(projections < 0, -1.0, 1.0)[order, None]
    return Explanation(
        values=values[order],
        vectors=vectors[order] * sign,
        parts=parts[order] * sign,
        layer_bias=(linear_term(weights, u) @ x + constant_term(weights, u)).item(),
        **facts,
    )


def parts_needed(parts: Float[Tensor, "part"], share: float) -> int:
    """The fewest parts, largest first, whose sum comes within `1 - share` of the sum of all, and stays there however
    many more are added: parts of both signs could pass it by chance."""
    ordered = parts[parts.abs().argsort(descending=True)].double()
    whole = ordered.sum()
    outside = ((ordered.cumsum(0) - whole).abs() > (1 - share + ROUNDING) * whole.abs()).nonzero()
    return int(outside[-1]) + 2 if len(outside) else min(1, len(parts))
