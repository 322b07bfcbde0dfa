"""Eigencircuits of interaction matrices as a result that prints, tabulates and plots itself."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Float, Int
from torch import Tensor

from bilens._core.checks import name_of
from bilens._core.display import Tabular
from bilens.draw import plots
from bilens.errors import ArgumentError, MissingSAEError

Metric = Literal["weights", "firing", "mean", "fitted"]


@dataclass(frozen=True)
class Eigencircuits(Tabular):
    """Squares that interaction matrices are sums of, for one output (no leading axis) or for `n`.

    Each stands for `lambda (v . x)^2`. In the metric of the weights they are eigenpairs, and the vectors orthonormal;
    in that of texts they are not orthogonal. See `Decomposer.eigen` for the metrics.

    Attributes:
        values: `lambda`, by falling absolute value (or in the order asked for).
        vectors: unit vectors as rows, largest entry positive.
        norms: Frobenius norms of the whole interaction matrices.
        outputs: the output features, or 0..n-1 for directions.
        decoder: the input SAE's decoder directions, where there is one, for reading the vectors in features.
        names: the names of the input features.
        metric: how the squares were found.
        variance_shares: the share of each in the variance of `x^T Q x` over the tokens on which the output fires, as
            its covariance with it; those of all squares (and of a linear term) add up to 1. `None` without texts; NaN
            for an output that does not fire on them, or alike on all.
        mean_shares: the share of each in the mean of `x^T Q x` there.
        about: the mean `m` of the tokens on which the output fires, in the metric `"mean"`: there the squares are
            `lambda (v . (x - m))^2`.
        linear, constant: `2 Q m` and `m^T Q m`, in the metric `"mean"`: what `x^T Q x` has besides squares is
            `constant + linear . (x - m)`.
        note: what a reader should know of how they were chosen.
    """

    values: Float[Tensor, "*n k"]
    vectors: Float[Tensor, "*n k d_model"]
    norms: Float[Tensor, "*n"]
    outputs: Int[Tensor, "n"]
    decoder: Float[Tensor, "d_sae d_model"] | None = field(default=None, repr=False)
    names: Sequence[str] | None = field(default=None, repr=False)
    metric: Metric = "weights"
    variance_shares: Float[Tensor, "*n k"] | None = field(default=None, repr=False)
    mean_shares: Float[Tensor, "*n k"] | None = field(default=None, repr=False)
    about: Float[Tensor, "*n d_model"] | None = field(default=None, repr=False)
    linear: Float[Tensor, "*n d_model"] | None = field(default=None, repr=False)
    constant: Float[Tensor, "*n"] | None = field(default=None, repr=False)
    note: str = field(default="", repr=False)

    @property
    def shares(self) -> Float[Tensor, "*n k"]:
        """`lambda^2 / ||Q||_F^2`: how much of its interaction matrix each eigenpair is; 0 for a zero matrix.

        Raises:
            ArgumentError: the vectors are not orthogonal, so that these would add up to anything.
        """
        if self.metric != "weights":
            raise ArgumentError(
                f"in the metric {self.metric!r} the vectors are not orthogonal, so no share of ||Q||^2 is one of them: "
                "see variance_shares and mean_shares, of what the output does where it fires."
            )
        norms = self.norms[..., None]  # divided by before squaring: float32 has no room for squares of large weights
        return torch.where(norms > 0, (self.values / norms) ** 2, 0.0)

    def activations(self, x: Float[Tensor, "*p d_model"]) -> Float[Tensor, "*p k"] | Float[Tensor, "*p n k"]:
        """`lambda (v . x)^2` of every eigencircuit on every input (about the mean, in the metric `"mean"`).

        All eigencircuits, and there the linear and constant terms, add up to the quadratic part of the output.
        """
        projections = (x.to(self.vectors) @ self.vectors.flatten(0, -2).T).unflatten(-1, self.values.shape)
        if self.about is not None:
            projections = projections - (self.vectors @ self.about[..., None])[..., 0]
        return self.values * projections**2

    def cosines(self) -> Float[Tensor, "*n k d_sae"]:
        """Cosine of every eigenvector with every input feature's decoder direction."""
        if self.decoder is None:
            raise MissingSAEError("reading eigenvectors in input features needs an input_sae; the Decomposer has none.")
        return self.vectors @ torch.nn.functional.normalize(self.decoder, dim=-1).T

    def in_features(self, top: int = 8) -> pd.DataFrame:
        """The `top` input features of each eigenvector by absolute cosine, with columns
        `output, rank, eigenvalue, i, name, cosine`."""
        cosines = self.cosines().reshape(-1, self.values.shape[-1], self.decoder.shape[0])  # type: ignore[union-attr]
        values = self.values.reshape(-1, self.values.shape[-1])
        chosen = cosines.abs().topk(min(top, cosines.shape[-1]), dim=-1).indices
        rows = [
            {
                "output": output,
                "rank": rank,
                "eigenvalue": values[n, rank].item(),
                "i": i,
                "name": name_of(self.names, i),
                "cosine": cosines[n, rank, i].item(),
            }
            for n, output in enumerate(self.outputs.tolist())
            for rank in range(values.shape[1])
            for i in chosen[n, rank].tolist()
        ]
        return pd.DataFrame(rows)

    def __getitem__(self, row: int) -> "Eigencircuits":
        """Those of one output among several, without the leading axis."""
        if self.values.ndim == 1:
            raise TypeError("these are the eigencircuits of one output; there are no others to choose from.")
        names = ("values", "vectors", "norms", "variance_shares", "mean_shares", "about", "linear", "constant")
        parts = {name: part[row] for name in names if (part := getattr(self, name)) is not None}
        return replace(self, **parts, outputs=self.outputs[row][None])

    def top(self, k: int) -> "Eigencircuits":
        """The first `k` for every output."""
        names = ("values", "variance_shares", "mean_shares")
        parts = {name: part[..., :k] for name in names if (part := getattr(self, name)) is not None}
        return replace(self, **parts, vectors=self.vectors[..., :k, :])

    def to_frame(self) -> pd.DataFrame:
        """One row per eigencircuit: `output, rank, eigenvalue`; `share` of the squared Frobenius norm of the matrix, in
        the metric of the weights; `variance_share` and `mean_share` where texts were given."""
        columns = {"eigenvalue": self.values}
        if self.metric == "weights":
            columns["share"] = self.shares
        if self.variance_shares is not None and self.mean_shares is not None:
            columns |= {"variance_share": self.variance_shares, "mean_share": self.mean_shares}
        k = self.values.shape[-1]
        outputs = self.outputs.cpu().repeat_interleave(k).numpy()
        ranks = torch.arange(k).repeat(len(self.outputs)).numpy()
        numbers = {name: column.reshape(-1).cpu().numpy() for name, column in columns.items()}
        return pd.DataFrame({"output": outputs, "rank": ranks, **numbers})

    def plot(self) -> go.Figure:
        """The spectrum. If there are several outputs, it is that of the first."""
        return plots.spectrum(self.values.reshape(-1, self.values.shape[-1])[0].tolist())

    def __str__(self) -> str:
        lines = [
            f"Eigencircuits({tuple(self.values.shape)})",
            self.to_frame().head(10).to_string(index=False),
            self.note,
        ]
        return "\n".join(line for line in lines if line)
