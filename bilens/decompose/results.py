"""The exact expansion of an output feature on a text, as a result that prints, tabulates and plots itself."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Float, Int
from torch import Tensor

from bilens._core.checks import name_of
from bilens._core.completeness import Complete
from bilens._core.display import Tabular
from bilens.decompose.explanation import Explanation, parts_needed
from bilens.draw import plots

BIAS_SOURCES = ("b_dec", "error", "mlp bias")


@dataclass(frozen=True)
class Attribution(Complete, Tabular):
    """The exact expansion of one output feature's pre-activation at one token, in two views.

    The first is `explanation`: few eigencircuits, in a sentence, a table and a picture. The second is pairs: the
    layer's input is split into sources that add up to it: each active input feature `f_i d_i`, then the input SAE's
    `b_dec`, its reconstruction `error`, and the constant 1 that MLP biases multiply. `contributions[s, t]` is what the
    pair of sources adds (a cross pair `s != t` stands at both `[s, t]` and `[t, s]`, half each); `output_bias` is what
    the output SAE itself adds (`- e . b_dec + b`). All of them together are the pre-activation.

    Attributes:
        feature, position: the output feature and its position, counted from the front with `[BOS]`.
        tokens: the token strings.
        inputs: the active input features, in the order of the first rows of `contributions`.
        activations: `f_i` of each.
        interactions: `Q_ij` between them (with the token's frozen scale, for an SAE on `resid_mid`).
        contributions: the contribution of every pair of sources.
        output_bias: the part that does not come from the layer.
        actual: the pre-activation the output SAE computes from the model's own `hook_mlp_out`, before its top-k.
        active: true if the feature is among those the output SAE lets through.
        explanation: the same pre-activation as a sum of squares.
        dtype: the type of the model's forward pass.
    """

    layer: int
    feature: int
    position: int
    tokens: list[str] = field(repr=False)
    inputs: Int[Tensor, "m"] = field(repr=False)
    activations: Float[Tensor, "m"] = field(repr=False)
    interactions: Float[Tensor, "m m"] = field(repr=False)
    contributions: Float[Tensor, "source source"] = field(repr=False)
    output_bias: float
    actual: float
    active: bool
    explanation: Explanation = field(repr=False)
    input_names: Sequence[str] | None = field(default=None, repr=False)
    output_names: Sequence[str] | None = field(default=None, repr=False)
    dtype: torch.dtype = field(default=torch.float32, repr=False)

    @property
    def output_name(self) -> str:
        """The feature's label, or its number."""
        return name_of(self.output_names, self.feature)

    @property
    def total(self) -> float:
        """The float32 sum of every part."""
        return (self.contributions.sum() + torch.tensor(self.output_bias)).item()

    @property
    def absolute_sum(self) -> float:
        """Sum of the absolute values of the parts: what `completeness_error` is measured against."""
        pairs = self.contributions.tril(-1) * 2 + self.contributions.diag().diag()
        return pairs.abs().sum().item() + abs(self.output_bias)

    @property
    def groups(self) -> dict[str, float]:
        """The sum of each group of parts; the groups add up to `total`."""
        m = len(self.inputs)
        features, rest = self.contributions[:m, :m], self.contributions[m:, m:]
        self_part = features.diagonal().sum()
        groups = {"self interactions": self_part.item(), "cross interactions": (features.sum() - self_part).item()}
        for s, name in enumerate(BIAS_SOURCES):
            groups[f"features x {name}"] = 2 * self.contributions[:m, m + s].sum().item()
        for s, first in enumerate(BIAS_SOURCES):
            for t, second in enumerate(BIAS_SOURCES[: s + 1]):
                groups[f"{second} x {first}"] = (rest[s, t] * (1 if s == t else 2)).item()
        return groups | {"output bias": self.output_bias}

    @property
    def sentence(self) -> str:
        """Why the feature fires, in one sentence."""
        return self.explanation.sentence

    def to_frame(self) -> pd.DataFrame:
        """The eigencircuits; see `Explanation.to_frame`."""
        return self.explanation.to_frame()

    def plot(self) -> go.Figure:
        """The eigencircuits; see `Explanation.plot`."""
        return self.explanation.plot()

    def pairs_needed(self, share: float = 0.8) -> int:
        """How many pairs of sources, largest first, give this share of what the layer writes, as
        `Explanation.needed` counts circuits."""
        s, t = torch.tril_indices(*self.contributions.shape, device=self.contributions.device)
        return parts_needed(self.contributions[s, t] * torch.where(s == t, 1, 2), share)

    def pair_frame(self) -> pd.DataFrame:
        """Pairs of active input features by falling absolute contribution.

        Columns `i, j, kind, f_i, f_j, coefficient, contribution, i_name, j_name`; a cross pair stands once, with
        coefficient `2 Q_ij`, so that `contribution = coefficient * f_i * f_j`.
        """
        m = len(self.inputs)
        # Input features ascend, so source t <= s has the smaller index.
        s, t = torch.tril_indices(m, m)
        twice = torch.where(s == t, 1, 2)
        inputs, activations = self.inputs.cpu(), self.activations.cpu().double()
        names = np.array([name_of(self.input_names, i) for i in self.inputs.tolist()], dtype=object)
        frame = pd.DataFrame(
            {
                "i": inputs[t].numpy(),
                "j": inputs[s].numpy(),
                "kind": pd.Series(np.array(["cross", "self"], dtype=object)[(s == t).int().numpy()], dtype=object),
                "f_i": activations[t].numpy(),
                "f_j": activations[s].numpy(),
                "coefficient": (twice * self.interactions.cpu()[s, t].double()).numpy(),
                "contribution": (twice * self.contributions.cpu()[s, t].double()).numpy(),
                "i_name": pd.Series(names[t.numpy()], dtype=object),
                "j_name": pd.Series(names[s.numpy()], dtype=object),
            }
        )
        return frame.sort_values("contribution", key=abs, ascending=False, ignore_index=True)

    def plot_pairs(self, top: int = 12) -> go.Figure:
        """The largest pairs, the other pairs, biases and error, as signed bars."""
        labels, values = self.pair_bars(top)
        return plots.bars(labels, values, value_title="part of the pre-activation")

    def pair_bars(self, top: int) -> tuple[list[str], list[float]]:
        """What `plot_pairs` draws: labels and values, which add up to the pre-activation."""
        pairs = self.pair_frame()
        shown, rest = pairs[:top], pairs[top:]
        bars = [(_pair(row.i_name, row.j_name), float(row.contribution)) for row in shown.itertuples()]
        if len(rest):
            bars.append((f"{len(rest)} other pairs", float(rest.contribution.sum())))
        others = {name: value for name, value in self.groups.items() if "interactions" not in name}
        error = sum(value for name, value in others.items() if "error" in name)
        bars += [("with b_dec and biases", sum(others.values()) - error), ("with the SAE's error", error)]
        return [label for label, _ in bars], [value for _, value in bars]

    def __str__(self) -> str:
        pairs = [
            f"  in pairs: parts {self.total:+.5f}, {self._gap}",
            *(f"  {value:+10.4f}  {group}" for group, value in self.groups.items() if value),
        ]
        return "\n".join([str(self.explanation), *pairs])


def _pair(i: str, j: str) -> str:
    return f"{i} ²" if i == j else f"{i} × {j}"
