"""Ways to choose or find eigencircuits, measured on texts that they were not fitted on.

For every feature, the correlation of 1, 2, ..., k squares with its activation, over the tokens on which it fires: the
test of figure 9 of Pearce et al. 2025 (arXiv 2410.08417), there for the first by |lambda| alone.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Float, Int
from torch import Tensor

from bilens._core.display import Tabular
from bilens.decompose.fidelity import SPREAD
from bilens.decompose.firing import Firing, places
from bilens.draw import plots
from bilens.errors import ArgumentError
from bilens.layer.bilinear import BilinearLayer, double, interaction_matrix
from bilens.layer.eigen.fitted import squares_by_number
from bilens.layer.eigen.metric import metric_eigenpairs, moment, terms
from bilens.layer.eigen.pairs import sorted_eigenpairs

SIZE, VARIANCE, MEAN = "largest |eigenvalue|", "chosen by variance", "chosen by mean"
FIRING, LINEAR, FITTED = "found in the firing metric", "linear term and squares", "fitted"
METHODS = (SIZE, VARIANCE, MEAN, FIRING, LINEAR, FITTED)
MOST_FITTED = 4  # each number of squares is fitted anew


@dataclass(frozen=True)
class FidelityComparison(Tabular):
    """How well few squares follow features on texts, by how the squares are chosen or found on others.

    Attributes:
        features: the output features.
        n_active: the number of tokens each fires on, in the texts measured on.
        n_fitted: the same in the texts fitted on.
        correlation: by method, with the feature's activation where it fires; column `r` uses `r + 1` squares. NaN where
            it fires on fewer than 2 tokens or alike on all, and for more fitted squares than 4.
        correlation_on_fit: the same on the texts fitted on: how much better it is there was learnt by heart.
    """

    features: Int[Tensor, "n"]
    n_active: Int[Tensor, "n"]
    n_fitted: Int[Tensor, "n"]
    correlation: Mapping[str, Float[Tensor, "n k"]] = field(repr=False)
    correlation_on_fit: Mapping[str, Float[Tensor, "n k"]] = field(repr=False)

    def to_frame(self, threshold: float = 0.75, *, min_active: int = 20) -> pd.DataFrame:
        """One row per method and number of squares: `method, k, features, mean, median`, the share of features above
        the threshold, and that share on the texts fitted on.

        Raises:
            ArgumentError: no feature fires on so many tokens.
        """
        rows = []
        for method, correlation in self.correlation.items():
            for at in range(correlation.shape[1]):
                kept = self._kept(correlation[:, at], min_active)
                if len(kept):
                    on_fit = self._kept(self.correlation_on_fit[method][:, at], min_active)
                    row = {"method": method, "k": at + 1, "features": len(kept)}
                    row |= {"mean": kept.mean().item(), "median": kept.median().item()}
                    shares = [(part > threshold).double().mean().item() for part in (kept, on_fit)]
                    rows.append(row | {f"> {threshold:g}": shares[0], f"> {threshold:g} on fit": shares[1]})
        if not rows:
            raise ArgumentError(
                f"no feature fires on {min_active} tokens or more, and not alike on all: give more texts."
            )
        return pd.DataFrame(rows)

    def plot(self, *, min_active: int = 20) -> go.Figure:
        """Mean correlation over features against the number of squares, a curve for each method."""
        frame = self.to_frame(min_active=min_active)
        curves = {str(method): rows["mean"].tolist() for method, rows in frame.groupby("method", sort=False)}
        k = max(len(curve) for curve in curves.values())
        whole = {name: curve for name, curve in curves.items() if len(curve) == k}
        figure = plots.line(list(range(1, k + 1)), whole, x_title="squares", y_title="mean correlation where it fires")
        for name, curve in curves.items():
            if name not in whole:
                figure.add_scatter(x=list(range(1, len(curve) + 1)), y=curve, name=name, mode="lines")
        return figure

    def _kept(self, correlation: Float[Tensor, "n"], min_active: int) -> Float[Tensor, "m"]:
        kept = correlation[self.n_active >= min_active]
        return kept[kept.isfinite()]

    def __str__(self) -> str:
        frame = self.to_frame(min_active=min(20, int(self.n_active.max())))
        two = frame[frame["k"] == min(2, int(frame["k"].max()))]
        return f"{len(self.features)} features:\n{two.round(3).to_string(index=False)}"


@torch.no_grad()
def compare_methods(
    layer: BilinearLayer,
    u: Float[Tensor, "n d_model"],
    features: Int[Tensor, "n"],
    measured: Firing,
    fit: Firing,
    k: int = 2,
) -> FidelityComparison:
    """Measure all of `METHODS`.

    Args:
        layer: its weights.
        u: the direction of each feature in the layer's output.
        features: the output features.
        measured: the texts to measure on.
        fit: the texts to choose and find squares on.
        k: the largest number of squares.
    """
    found: dict[str, list[tuple[Tensor, Tensor]]] = {method: [] for method in METHODS}
    for direction, feature in zip(u, features.tolist(), strict=True):
        Q = double(interaction_matrix(layer, direction))
        x, y = double(fit.inputs_of(feature)), double(measured.inputs_of(feature))
        both = torch.cat([x, y])
        targets = double(fit.activations_of(feature)), double(measured.activations_of(feature))
        for method, sums in _sums(Q, x, both, fit, k).items():
            on_fit, on_measured = sums.split([len(x), len(y)])
            found[method].append((_correlations(on_measured, targets[1]), _correlations(on_fit, targets[0])))
    there, on_fit = (
        {method: torch.stack([pair[place] for pair in pairs]).float().cpu() for method, pairs in found.items()}
        for place in (0, 1)
    )
    return FidelityComparison(features, measured.n_active[features], fit.n_active[features], there, on_fit)


def _sums(
    Q: Float[Tensor, "d d"], x: Float[Tensor, "p d"], both: Float[Tensor, "q d"], fit: Firing, k: int
) -> dict[str, Float[Tensor, "q k"]]:
    """What 1, 2, ..., k squares of each method, found on `x`, add up to on all inputs."""
    values, vectors = sorted_eigenpairs(Q)
    of_terms = terms(values, vectors, both)
    sums = {SIZE: of_terms[:, :k].cumsum(1)}
    for name, order in ((VARIANCE, "variance"), (MEAN, "mean")):
        sums[name] = of_terms[:, places(order, of_terms[: len(x)], values)[:k]].cumsum(1)  # type: ignore[arg-type]
    M = moment(x, fit.second_moment)
    sums[FIRING] = terms(*metric_eigenpairs(Q, M, k), both).cumsum(1)
    mean = x.mean(0) if len(x) else fit.mean
    covariance = moment(x, fit.second_moment - torch.outer(fit.mean, fit.mean), mean)
    squares = terms(*metric_eigenpairs(Q, covariance, k), both - mean)
    sums[LINEAR] = squares.cumsum(1) + (both @ (2 * Q @ mean))[:, None]
    each = [terms(*found, both).sum(1) for found in squares_by_number(Q, x.float(), M, min(k, MOST_FITTED))]
    sums[FITTED] = torch.stack(each + [torch.full_like(each[0], torch.nan)] * (k - len(each)), 1)
    return sums


def _correlations(sums: Float[Tensor, "p k"], target: Float[Tensor, "p"]) -> Float[Tensor, "k"]:
    """Pearson's; NaN where there are fewer than 2 tokens, or no spread."""
    if len(target) < 2:
        return torch.full((sums.shape[1],), torch.nan).to(sums)
    off, wanted = sums - sums.mean(0), target - target.mean()
    spread = [(part.norm(dim=0) > SPREAD * whole.norm(dim=0)) for part, whole in ((off, sums), (wanted, target))]
    return ((wanted @ off) / (off.norm(dim=0) * wanted.norm())).where(spread[0] & spread[1], torch.nan)
