"""Eigenpairs of interaction matrices as a result that prints, tabulates and plots itself."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Float, Int
from torch import Tensor

from bilens._core.checks import name_of
from bilens._core.display import Tabular
from bilens.draw import plots
from bilens.errors import MissingSAEError


@dataclass(frozen=True)
class Eigencircuits(Tabular):
    """Eigenpairs of the interaction matrices of one output (no leading axis) or of `n`.

    Attributes:
        values: `lambda`, by falling absolute value (or in the order asked for).
        vectors: unit eigenvectors as rows, largest entry positive.
        norms: Frobenius norms of the whole interaction matrices.
        outputs: the output features, or 0..n-1 for directions.
        decoder: the input SAE's decoder directions, where there is one, for reading the vectors in features.
        names: the names of the input features.
    """

    values: Float[Tensor, "*n k"]
    vectors: Float[Tensor, "*n k d_model"]
    norms: Float[Tensor, "*n"]
    outputs: Int[Tensor, "n"]
    decoder: Float[Tensor, "d_sae d_model"] | None = field(default=None, repr=False)
    names: Sequence[str] | None = field(default=None, repr=False)

    @property
    def shares(self) -> Float[Tensor, "*n k"]:
        """`lambda^2 / ||Q||_F^2`: how much of its interaction matrix each eigenpair is; 0 for a zero matrix."""
        norms = self.norms[..., None]  # divided by before squaring: float32 has no room for squares of large weights
        return torch.where(norms > 0, (self.values / norms) ** 2, 0.0)

    def activations(self, x: Float[Tensor, "*p d_model"]) -> Float[Tensor, "*p k"] | Float[Tensor, "*p n k"]:
        """`lambda (v . x)^2` of every eigencircuit on every input; they add up to the quadratic part of the output."""
        projections = (x.to(self.vectors) @ self.vectors.flatten(0, -2).T).unflatten(-1, self.values.shape)
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
        parts = {name: getattr(self, name)[row] for name in ("values", "vectors", "norms")}
        return replace(self, **parts, outputs=self.outputs[row][None])

    def top(self, k: int) -> "Eigencircuits":
        """The first `k` eigenpairs for every output."""
        return replace(self, values=self.values[..., :k], vectors=self.vectors[..., :k, :])

    def to_frame(self) -> pd.DataFrame:
        """One row per eigenpair: `output, rank, eigenvalue, share` (of the squared Frobenius norm of the matrix)."""
        values = self.values.reshape(-1, self.values.shape[-1])
        share = self.shares.reshape(values.shape)
        return pd.DataFrame(
            [
                {"output": output, "rank": rank, "eigenvalue": values[n, rank].item(), "share": share[n, rank].item()}
                for n, output in enumerate(self.outputs.tolist())
                for rank in range(values.shape[1])
            ]
        )

    def plot(self) -> go.Figure:
        """The spectrum. If there are several outputs, it is that of the first."""
        return plots.spectrum(self.values.reshape(-1, self.values.shape[-1])[0].tolist())

    def __str__(self) -> str:
        return f"Eigencircuits({tuple(self.values.shape)})\n{self.to_frame().head(10).to_string(index=False)}"
