"""How well the leading eigencircuits reproduce output features on data.

    1. each interaction matrix Q is truncated to its k leading eigenpairs: q_k(x) = sum_r lambda_r (v_r . x)^2
    2. the texts run through the model once; per token, x is the layer's input, y its output, f the feature's activation
    3. running sums give, for every feature and every k at once,
         correlation           of q_k(x) with f, over the tokens where the feature is active, and over all
         explained variance    of t = e.y (the layer's read along the feature's encoder direction e) by q_k(x) and the
                               MLP's bias terms, over the active tokens: 1 - sum (t - t_k)^2 / sum (t - mean t)^2

Correlation asks whether the eigencircuits follow the feature up to scale and offset, explained variance whether they
give its value. With all d_model eigenpairs the second is 1.

Source: Pearce et al. 2025 (arXiv 2410.08417), section 5.2 and figure 9 (correlation over active tokens).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Float, Int
from torch import Tensor

from bilens._core.checks import MEMORY, how_many_fit
from bilens._core.display import Tabular
from bilens.draw import plots
from bilens.errors import ArgumentError, OutOfRangeError
from bilens.layer.bilinear import BilinearLayer, constant_term, linear_term
from bilens.layer.eigen.pairs import check_pairs
from bilens.layer.eigen.solve import top_eigenpairs

SPREAD = 1e-6  # of the root mean square: activations that differ by less are equal but for float32 rounding
PAIRS_AT_ONCE = 2**24  # numbers (token x feature x eigenpair) held at a time, at most
ENTRY, SUMS = 64, 128  # bytes: of one of them while it is looked at, and of the sums of one feature and eigenpair


@dataclass(frozen=True)
class Fidelity(Tabular):
    """How well 1, 2, ..., k eigencircuits reproduce each output feature; NaN where it is active on fewer than 2 tokens,
    or alike on all of them (as one that fires at the first word of a text alone).

    Attributes:
        features: the output features.
        n_active: tokens each is active on.
        n_tokens: tokens in all (`[BOS]` left out).
        correlation: the one with the feature's activation, where it is active; column `r` uses `r + 1` eigenpairs.
        correlation_all: the same over all tokens.
        explained_variance: the explained variance of the layer's read along the feature, over its active tokens.
    """

    features: Int[Tensor, "n"]
    n_active: Int[Tensor, "n"]
    n_tokens: int
    correlation: Float[Tensor, "n k"] = field(repr=False)
    correlation_all: Float[Tensor, "n k"] = field(repr=False)
    explained_variance: Float[Tensor, "n k"] = field(repr=False)
    names: Sequence[str] | None = field(default=None, repr=False)

    @property
    def k(self) -> int:
        """The largest number of eigenpairs."""
        return self.correlation.shape[1]

    def eligible(self, min_active: int = 20) -> Tensor:
        """Which features have a correlation, and over so many active tokens: one over few says little."""
        return (self.n_active >= min_active) & self.correlation.isfinite().any(-1)

    def to_frame(self, k: int | None = None) -> pd.DataFrame:
        """One row per feature: `feature, name, n_active, density, correlation, correlation_all, explained_variance`.

        Args:
            k: eigenpairs used; `None` is 2, or fewer where there are fewer.
        """
        at = self._column(min(2, self.k) if k is None else k)
        return pd.DataFrame(
            {
                "feature": self.features.tolist(),
                "name": [self.names[i] if self.names else str(i) for i in self.features.tolist()],
                "n_active": self.n_active.tolist(),
                "density": (self.n_active / self.n_tokens).tolist(),
                "correlation": self.correlation[:, at].tolist(),
                "correlation_all": self.correlation_all[:, at].tolist(),
                "explained_variance": self.explained_variance[:, at].tolist(),
            }
        )

    def shares(self, thresholds: Sequence[float] = (0.5, 0.75, 0.9), *, min_active: int = 20) -> pd.DataFrame:
        """Share of features whose correlation over active tokens is above each threshold: one row per k.

        Raises:
            ArgumentError: no feature is active on so many tokens.
        """
        self._check_eligible(min_active)
        eligible = self.correlation[self.eligible(min_active)]
        columns = [column[column.isfinite()] for column in eligible.T]
        rows = [
            {"k": r + 1, "median": _median(kept)}
            | {f"> {threshold:g}": (kept > threshold).double().mean().item() for threshold in thresholds}
            for r, kept in enumerate(columns)
        ]
        return pd.DataFrame(rows)

    def plot(self, *, min_active: int = 20) -> go.Figure:
        """Correlation against k: median and quartiles of the features.

        Raises:
            ArgumentError: no feature is active on so many tokens.
        """
        self._check_eligible(min_active)
        kept = self.correlation[self.eligible(min_active)]
        quantiles = {"upper quartile": 0.75, "median": 0.5, "lower quartile": 0.25}
        curves = {name: kept.nanquantile(q, dim=0).tolist() for name, q in quantiles.items()}
        return plots.line(
            list(range(1, self.k + 1)),
            curves,
            x_title="eigenpairs",
            y_title="correlation over active tokens",
            log_x=self.k > 10,
        )

    def histogram(self, k: int = 2, *, min_active: int = 20) -> go.Figure:
        """How many features have which correlation, with `k` eigenpairs."""
        self._check_eligible(min_active)
        values = self.correlation[self.eligible(min_active), self._column(k)]
        return plots.histogram(values[values.isfinite()].tolist(), x_title=f"correlation with {k} eigenpairs")

    def scatter(self, k: int = 2, *, min_active: int = 20) -> go.Figure:
        """Correlation against how many tokens each feature is active on."""
        self._check_eligible(min_active)
        frame = self.to_frame(k)[self.eligible(min_active).numpy()].dropna()
        labels = [f"{row.feature} {row.name_}" for row in frame.rename(columns={"name": "name_"}).itertuples()]
        figure = plots.scatter(
            frame.density.tolist(),
            frame.correlation.tolist(),
            labels,
            x_title="share of tokens it is active on",
            y_title=f"correlation with {k} eigenpairs",
        )
        return figure.update_xaxes(type="log")

    def _check_eligible(self, min_active: int) -> None:
        if not self.eligible(min_active).any():
            raise ArgumentError(
                f"none of the {len(self.features)} features is active on {min_active} or more of the {self.n_tokens} "
                "tokens, and not alike on all: give fidelity more texts, or ask for a smaller min_active."
            )

    def _column(self, k: int) -> int:
        if not 1 <= k <= self.k:
            raise OutOfRangeError(f"k is {k}, expected 1 to {self.k}, the eigenpairs measured.")
        return k - 1

    def __str__(self) -> str:
        head = f"{len(self.features)} features on {self.n_tokens} tokens, those active on at least 20:"
        if not self.eligible().any():
            return f"{head} none. Give more texts, or ask for shares(min_active=...) of fewer."
        return f"{head}\n{self.shares().round(3).to_string(index=False)}"


@torch.no_grad()
def measure_fidelity(
    layer: BilinearLayer,
    u: Float[Tensor, "n d_model"],
    batches: Iterable[tuple[Float[Tensor, "p d_model"], Float[Tensor, "p d_model"], Float[Tensor, "p n"]]],
    k: int = 10,
    memory: int = MEMORY,
) -> Fidelity:
    """How well the `k` leading eigencircuits, and every smaller number of them, reproduce output features on data.

    Args:
        layer: its weights.
        u: the features' directions in the layer's output.
        batches: batches of tokens: what the layer reads and writes, and the features' activations.
        k: the largest number of eigenpairs.
        memory: bytes to work in, and at most as many for the result; 1 GiB by default.

    Raises:
        ArgumentError: less memory than the eigenvectors and one token take.
        OutOfRangeError: more eigenpairs than `d_model`.
    """
    check_pairs(u.shape[1], k, "size")
    besides = len(u) * k * (layer.W_out.element_size() * u.shape[1] + SUMS)
    call, instead = f"fidelity ({k} pairs of {len(u):,} outputs)", "ask for fewer pairs (`k`) or outputs"
    at_once = how_many_fit(call, len(u) * k * ENTRY, memory, instead, besides=besides)
    eigen = top_eigenpairs(layer, u, k, memory=memory - besides, progress=False)
    linear, constant = linear_term(layer, u), constant_term(layer, u)
    sums = _Sums(len(u), k, u.device)
    for x, y, f in batches:
        for part in torch.arange(len(x)).split(min(at_once, max(1, PAIRS_AT_ONCE // (len(u) * k)))):
            projections = (x[part] @ eigen.vectors.flatten(0, 1).T).unflatten(-1, eigen.values.shape)
            q = (eigen.values * projections**2).cumsum(-1)
            sums.add(q, f[part].to(u), y[part] @ u.T - x[part] @ linear.T - constant)
    return sums.result()


class _Sums:
    """Running sums over tokens, in float64; `active` ones over the tokens where the feature is active."""

    def __init__(self, n: int, k: int, device: torch.device):
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.float64, device=device)

        self.n_tokens = 0
        self.active = {name: zeros(n, 1) for name in ("1", "f", "ff", "t", "tt")}
        self.active |= {name: zeros(n, k) for name in ("q", "qq", "qf", "residual")}
        self.all = {name: zeros(n, k) for name in ("q", "qq")}

    def add(self, q: Float[Tensor, "p n k"], f: Float[Tensor, "p n"], t: Float[Tensor, "p n"]) -> None:
        self.n_tokens += len(q)
        self.all["q"] += q.sum(0, dtype=torch.float64)
        self.all["qq"] += q.square().sum(0, dtype=torch.float64)
        token, feature = (f != 0).nonzero(as_tuple=True)
        q, f, t = q[token, feature].double(), f[token, feature, None].double(), t[token, feature, None].double()
        new = {"1": torch.ones_like(f), "f": f, "ff": f * f, "t": t, "tt": t * t}
        new |= {"q": q, "qq": q * q, "qf": q * f, "residual": (t - q) ** 2}
        for name, value in new.items():
            self.active[name].index_add_(0, feature, value)

    def result(self) -> Fidelity:
        a, n_active = self.active, self.active["1"]
        over_active = _correlation(n_active, a["f"], a["ff"], a["q"], a["qq"], a["qf"])
        n_tokens = torch.full_like(n_active, self.n_tokens)
        over_all = _correlation(n_tokens, a["f"], a["ff"], self.all["q"], self.all["qq"], a["qf"])
        variance = _squares(n_active, a["t"], a["tt"])
        enough = n_active >= 2
        return Fidelity(
            features=torch.arange(len(n_active)),
            n_active=n_active[:, 0].long().cpu(),
            n_tokens=self.n_tokens,
            correlation=over_active.where(enough, torch.nan).float().cpu(),
            correlation_all=over_all.where(enough, torch.nan).float().cpu(),
            explained_variance=(1 - a["residual"] / variance).where(enough, torch.nan).float().cpu(),
        )


def _correlation(n: Tensor, f: Tensor, ff: Tensor, q: Tensor, qq: Tensor, qf: Tensor) -> Tensor:
    """Pearson's, from sums."""
    return (qf - q * f / n) / (_squares(n, f, ff) * _squares(n, q, qq)).sqrt()


def _squares(n: Tensor, x: Tensor, xx: Tensor) -> Tensor:
    """The sum of squared deviations from the mean, from sums; NaN where it is rounding."""
    squares = xx - x**2 / n
    return squares.where(squares > SPREAD**2 * xx, torch.nan)


def _median(values: Tensor) -> Any:
    return values.nanmedian().item()
