"""An output feature as a gate: its two leading eigenvectors, and the families of input features that make it fire."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bilens._core.display import Tabular
from bilens.decompose import Decomposer
from tutorials.negation.auc import cell_means
from tutorials.negation.probes import CELL_NAMES, sentences

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

FAMILIES = ("negation", "plain", "positive words", "negative words", "others", "b_dec and error")
MASS = 0.8  # share of a feature's activation that puts it into a family


@dataclass(frozen=True)
class Gate(Tabular):
    """One output feature on all sentences, in the plane of its two leading eigenvectors.

    Attributes:
        target, layer, feature, position: which.
        eigenvalues: of the plane.
        x, y: with eigenvalues of two signs `sqrt(l+) v+.x -+ sqrt(|l-|) v-.x`, whose product is what the plane adds to
            the output; else `sqrt(|l|) v.x` of each.
        product: whether it is that.
        values: the pre-activation, in full.
        correlation: of the plane's part with it.
        families: what every two families of input features add to it, the mean over the negated sentences it fires in.
    """

    target: str
    layer: int
    feature: int
    position: str
    eigenvalues: tuple[float, float]
    x: Float[Tensor, "sentence"] = field(repr=False)
    y: Float[Tensor, "sentence"] = field(repr=False)
    product: bool
    values: Float[Tensor, "sentence"] = field(repr=False)
    correlation: float
    families: Float[Tensor, "family family"] = field(repr=False)

    def to_frame(self) -> "pd.DataFrame":
        """What every two families add, the largest first: `first, second, contribution, share` (of absolute parts)."""
        import pandas as pd

        i, j = torch.tril_indices(len(FAMILIES), len(FAMILIES))
        parts = self.families[i, j] * torch.where(i == j, 1.0, 2.0)
        frame = pd.DataFrame(
            {
                "first": [FAMILIES[a] for a in j.tolist()],
                "second": [FAMILIES[b] for b in i.tolist()],
                "contribution": parts.tolist(),
                "share": (parts / parts.abs().sum().clamp_min(torch.finfo(parts.dtype).tiny)).tolist(),
            }
        )
        return frame.sort_values("contribution", key=abs, ascending=False, ignore_index=True)

    def share(self, *pairs: tuple[str, str]) -> float:
        """The share of these pairs of families together."""
        frame = self.to_frame()
        chosen = {frozenset(pair) for pair in pairs}
        return float(sum(row.share for row in frame.itertuples() if frozenset((row.first, row.second)) in chosen))

    def plot(self) -> "go.Figure":
        """The sentences in the plane, coloured by the pre-activation, marked by their kind."""
        import pandas as pd
        import plotly.express as px

        from bilens.draw.plots import DIVERGING, template

        probes = sentences()
        first, second = (f"{value:+.2f}" for value in self.eigenvalues)
        plane = ("√λ₊ v₊·x − √|λ₋| v₋·x", "√λ₊ v₊·x + √|λ₋| v₋·x") if self.product else ("√|λ₁| v₁·x", "√|λ₂| v₂·x")
        points = pd.DataFrame(
            {
                plane[0]: self.x.tolist(),
                plane[1]: self.y.tolist(),
                "pre-activation": self.values.tolist(),
                "kind": [CELL_NAMES[probe.cell] for probe in probes],
                "sentence": [probe.text for probe in probes],
            }
        )
        figure = px.scatter(
            points,
            *plane,
            color="pre-activation",
            symbol="kind",
            hover_name="sentence",
            color_continuous_scale=DIVERGING,
            color_continuous_midpoint=0,
            template=template(),
            title=f"layer {self.layer}, output feature {self.feature} (λ = {first}, {second})",
        )
        return figure.update_layout(legend={"orientation": "h", "y": 1.1})

    def __str__(self) -> str:
        return f"{self.target}: {self.layer}/{self.feature}\n{self.to_frame().head(8).to_string(index=False)}"


def families(activations: Float[Tensor, "word 2 rendering d_sae"]) -> Int[Tensor, "d_sae"]:
    """The family of every feature, an index into `FAMILIES`: the first that holds `MASS` of its activation."""
    by_cell = cell_means(activations.abs())
    total = by_cell.sum(0).clamp_min(torch.finfo(by_cell.dtype).tiny)
    shares = torch.stack([by_cell[cells].sum(0) / total for cells in ([2, 3], [0, 1], [0, 2], [1, 3])])
    fits = torch.cat([shares >= MASS, torch.ones_like(shares[:1], dtype=torch.bool)])
    return fits.int().argmax(0)


def family_contributions(
    matrix: Float[Tensor, "d_model d_model"],
    x: Float[Tensor, "token d_model"],
    activations: Float[Tensor, "token d_sae"],
    decoder: Float[Tensor, "d_sae d_model"],
    family: Int[Tensor, "d_sae"],
) -> Float[Tensor, "family family"]:
    """The mean over tokens of what every two families add to `x^T Q x`; a pair of two stands twice, half each.

    The last family is what is not a feature: `b_dec` and the SAE's error. The entries add up to the mean of `x^T Q x`;
    without a token they are zero.
    """
    count = len(FAMILIES) - 1
    parts = torch.stack([(activations * (family == f)) @ decoder for f in range(count)])
    parts = torch.cat([parts, (x - parts.sum(0))[None]])
    return torch.einsum("ftd,de,gte->fg", parts, matrix, parts) / max(1, len(x))


def gate_of(
    d: Decomposer,
    feature: int,
    x: Float[Tensor, "word 2 rendering d_model"],
    y: Float[Tensor, "word 2 rendering d_model"],
    *,
    target: str,
    position: str,
) -> Gate:
    """A feature on all sentences.

    Args:
        d: the decomposer of its layer.
        feature: of the output SAE.
        x, y: the layer's input and output at one position of every sentence.
        target, position: to be named with it.
    """
    eigen = d.eigen(feature, k=2)
    values, projections = eigen.values, x.flatten(0, 2) @ eigen.vectors.T
    # Let what negation adds be positive, as far as signs are free.
    negated = (x[:, 1] - x[:, 0]).mean((0, 1)) @ eigen.vectors.T
    scaled = projections * values.abs().sqrt() * torch.where(negated < 0, -1.0, 1.0)
    product = bool(values[0] * values[1] < 0)
    if product:
        positive, negative = (scaled[:, int((values > 0).int().argmax())], scaled[:, int((values < 0).int().argmax())])
        scaled = torch.stack([positive - negative, positive + negative], 1)
    in_full = d.output_view.pre_activations(y)[..., feature].flatten()
    approximate = (projections**2) @ values
    acts = d.input_view.activations(x)
    fires = (d.output_view.activations(y)[:, 1, :, feature] > 0).flatten()
    return Gate(
        target=target,
        layer=d.layer,
        feature=feature,
        position=position,
        eigenvalues=(values[0].item(), values[1].item()),
        x=scaled[:, 0],
        y=scaled[:, 1],
        product=product,
        values=in_full,
        correlation=torch.corrcoef(torch.stack([approximate, in_full]))[0, 1].item(),
        families=family_contributions(
            d.interaction(feature),
            x[:, 1].flatten(0, 1)[fires],
            acts[:, 1].flatten(0, 1)[fires],
            d.input_directions(),
            families(acts),
        ),
    )
