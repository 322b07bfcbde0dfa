"""The spectra of a whole layer's outputs in numbers: what is low-rank, what is large, what is an interaction of two.

For each output's interaction matrix Q, in the residual basis and (with an input SAE) in the feature basis D Q D^T:

    values          the k eigenvalues of largest absolute value, by the fast sweep (`eigensweep`)
    share           sum of their squares / ||Q||_F^2: how much of Q they are
    effective rank  (sum |l|)^2 / sum l^2, over all eigenvalues; between 1 and d_model
    trace           sum l
    cross share     sum over i != j of (D Q D^T)_ij^2 / ||D Q D^T||_F^2: how much of it joins two different features

Norms, traces and shares come from the factors; only the effective rank needs every eigenvalue, so it is asked for.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Float, Int
from torch import Tensor

from bilens._core.checks import MEMORY
from bilens._core.display import Tabular
from bilens.draw import plots
from bilens.errors import ArgumentError, nearest
from bilens.layer.bilinear import BilinearLayer, double, hidden_coefficients, interaction_matrix
from bilens.layer.eigen.solve import LeadingEigenpairs, Method, top_eigenpairs
from bilens.layer.inner import norms

Criterion = Literal["share", "norm", "trace", "cross_share", "effective_rank", "eigenvalue_1"]

INPUTS_AT_ONCE = 1024  # input directions, at most


@dataclass(frozen=True)
class Spectra(Tabular):
    """Spectra of `n` outputs; see the module for what the numbers are.

    Attributes:
        outputs: output features, or 0..n-1 for directions.
        eigen: the leading eigenpairs, with how each is certified.
        cross_share: `None` without an input SAE on what the layer reads.
        effective_rank: `None` where it was not asked for.
    """

    outputs: Int[Tensor, "n"]
    eigen: LeadingEigenpairs
    cross_share: Float[Tensor, "n"] | None = field(default=None, repr=False)
    effective_rank: Float[Tensor, "n"] | None = field(default=None, repr=False)
    names: Sequence[str] | None = field(default=None, repr=False)

    def to_frame(self) -> pd.DataFrame:
        """One row per output: `output, name`, the columns of `LeadingEigenpairs`, `cross_share, effective_rank`."""
        frame = self.eigen.to_frame()
        frame["output"] = self.outputs.tolist()
        frame.insert(1, "name", [self.names[i] if self.names else str(i) for i in self.outputs.tolist()])
        for column in ("cross_share", "effective_rank"):
            values = getattr(self, column)
            if values is not None:
                frame[column] = values.tolist()
        return frame

    def ranked(self, by: Criterion = "share", *, ascending: bool = False) -> pd.DataFrame:
        """The table in the order of one column, by falling absolute value.

        Args:
            by: the criterion, for example `"share"` (the most low-rank first), `"cross_share"` or `"norm"`.
            ascending: the other way round.

        Raises:
            ArgumentError: no such column, or one that was not computed.
        """
        frame = self.to_frame()
        if by not in frame or by not in get_args(Criterion):
            there = [name for name in get_args(Criterion) if name in frame]
            raise ArgumentError(f"there is no {by!r} to rank by; there are {', '.join(there)}." + nearest(by, there))
        return frame.sort_values(by, key=abs, ascending=ascending, ignore_index=True)

    def plot(self) -> go.Figure:
        """How much the leading eigenpairs are of each interaction matrix, against how large it is."""
        k = self.eigen.values.shape[1]
        labels = [self.names[i] if self.names else str(i) for i in self.outputs.tolist()]
        norms_, shares = self.eigen.norms.tolist(), self.eigen.shares.tolist()
        return plots.scatter(norms_, shares, labels, x_title="Frobenius norm", y_title=f"share of {k} eigenpairs")

    def __str__(self) -> str:
        return f"{self.eigen!r}\n{self.ranked().head(10).to_string(index=False)}"


def find_spectra(
    layer: BilinearLayer,
    u: Float[Tensor, "n d_model"],
    k: int = 2,
    *,
    inputs: Float[Tensor, "d_sae d_model"] | None = None,
    full: bool = False,
    memory: int = MEMORY,
    method: Method = "auto",
    progress: bool = True,
) -> Spectra:
    """Spectra of the interaction matrices of some output directions.

    Args:
        layer: its weights.
        u: output directions.
        k: leading eigenpairs of each.
        inputs: input directions, for the cross share between them.
        full: also the effective rank, from all eigenvalues of every output: the cost of forming and solving each `Q`.
        memory: bytes to work in, and at most as many for the result; 1 GiB by default.
        method: the method that finds the leading pairs; see `top_eigenpairs`.
        progress: show a bar.

    Raises:
        OutOfRangeError: `k` is not in 1..d_model.
    """
    eigen = top_eigenpairs(layer, u, k, memory=memory, method=method, progress=progress)
    return Spectra(
        outputs=torch.arange(len(u)),
        eigen=eigen,
        cross_share=None if inputs is None else cross_shares(layer, u, inputs, memory),
        effective_rank=effective_ranks(layer, u, memory) if full else None,
    )


@torch.no_grad()
def cross_shares(
    layer: BilinearLayer,
    u: Float[Tensor, "n d_model"],
    directions: Float[Tensor, "d_sae d_model"],
    memory: int = MEMORY,
) -> Float[Tensor, "n"]:
    """Share of `||D Q_u D^T||_F^2` off the diagonal, in float64; 0 where there is nothing.

    The whole comes from the factors and `D^T D`; the diagonal is `sum_m c_m (l_m . d_i) (r_m . d_i)`, one product for
    all outputs.
    """
    wide = double(directions)
    whole = norms(layer, u, wide.T @ wide, memory) ** 2
    c = double(hidden_coefficients(layer, u))
    own = torch.zeros_like(whole)
    at_once = memory // (8 * (3 * c.shape[1] + 2 * c.shape[0]))  # two products and theirs, and what outputs read
    for rows in wide.split(max(1, min(INPUTS_AT_ONCE, at_once))):
        products = (rows @ double(layer.W_gate)) * (rows @ double(layer.W_in))
        own += (c @ products.T).square().sum(-1)
    return torch.where(whole > 0, 1 - own / whole.clamp_min(torch.finfo(whole.dtype).tiny), 0.0).clamp(0, 1)


@torch.no_grad()
def effective_ranks(layer: BilinearLayer, u: Float[Tensor, "n d_model"], memory: int = MEMORY) -> Float[Tensor, "n"]:
    """`(sum |l|)^2 / sum l^2` of every `Q_u`, from all its eigenvalues; 0 for a zero matrix."""
    parts = []
    # Branches times coefficients, the raw matrix, Q, and what the solver works in.
    d_model, d_mlp = layer.W_gate.shape
    at_once = memory // (u.element_size() * d_model * (d_mlp + 4 * d_model))
    for rows in u.split(max(1, min(len(u), at_once))):
        values = torch.linalg.eigvalsh(interaction_matrix(layer, rows)).double()
        squares = (values**2).sum(-1)
        ranks = values.abs().sum(-1) ** 2 / squares.clamp_min(torch.finfo(squares.dtype).tiny)
        parts.append(torch.where(squares > 0, ranks, 0.0))
    return torch.cat(parts)
