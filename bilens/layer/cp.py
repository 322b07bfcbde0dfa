"""Shared neurons: a bilinear layer replaced by a narrower one, by CP decomposition of its tensor.

    T = sum_m p_m (x) sym(l_m r_m^T)   ~   S = sum_r w_r (x) sym(a_r b_r^T)         p_m, w_r: what a hidden unit writes

Each term of S is a hidden unit with branches a_r, b_r, so S is again a bilinear layer, with `rank` hidden units that
all outputs share. `||T - S||^2` needs inner products of hidden units only (`bilens.layer.inner`), never T or S.
Alternating least squares, in float64:

1. start from the largest hidden units of the layer (or at random, or from an earlier result)
2. with the branches fixed, the writes are a linear least-squares problem of size rank: solved
3. with the writes and one branch fixed, the other is one of size rank x d_model, symmetric and positive:
       A -> 1/2 ((O * B B^T) A + (O * B A^T) B),  O = W W^T;   right-hand side: row r is Q_{w_r} b_r
   a few conjugate-gradient steps from where it is, preconditioned by the first half
4. repeat. No step can worsen the fit, so it rises from that of the start; it stops where a sweep gains too little

What the fit means and does not: T and S are compared as tensors (all inputs alike likely), not on data. A fit is a
lower bound of the best of its rank: finding that is NP-hard, other starts find others. Where the rank is small enough
for Kruskal's condition the terms of an exact decomposition are unique up to scale and order; at the ranks of interest
nothing promises it, so a unit is a part of this fit, not a fact of the layer. A best fit of given rank need not exist:
then terms grow and cancel, which `cancellation` far above 1 shows.

MLP biases take part as one more input coordinate, constantly 1.

Source: Kolda & Bader, Tensor decompositions and applications, 2009, section 3.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from bilens._core.checks import MEMORY, check_budget, check_seeds
from bilens._core.display import Tabular
from bilens.draw import plots
from bilens.errors import ArgumentError, OutOfRangeError, SAEMismatchError
from bilens.layer.bilinear import BilinearLayer, biases_as_weights, double
from bilens.layer.inner import branch_rows, tensor_inner, tensor_norm
from bilens.layer.reading import Lexicon

CG_STEPS = 5
DAMPING = 1e-9  # towards the writes of the sweep before, where the branches leave them undetermined

Start: TypeAlias = "BilinearLayer | int | None"


@dataclass(frozen=True)
class CPDecomposition(Tabular):
    """A narrower bilinear layer, fitted to one of a model.

    Attributes:
        layer: the narrower layer, hidden units by falling weight; `b_out` is the model's.
        weights: `||w_r (x) sym(a_r b_r^T)||` of every hidden unit.
        cosine: the cosine of the two tensors, exact from the factors of `layer` as it is.
        explained: `1 - ||T - S||^2 / ||T||^2` after every sweep; it never falls.
        pruned: the cosine where the layer's largest hidden units are kept as they are: what fitting is compared with.
        cancellation: root of the sum of squared weights, over `||S||`: far above 1, terms cancel each other.
        converged: true if the last sweep gained less than the tolerance.
        outputs, inputs: the names that directions are given.
    """

    layer: BilinearLayer = field(repr=False)
    weights: Float[Tensor, "rank"] = field(repr=False)
    cosine: float
    explained: list[float] = field(repr=False)
    pruned: float
    cancellation: float
    converged: bool
    outputs: Lexicon | None = field(default=None, repr=False)
    inputs: Lexicon | None = field(default=None, repr=False)

    @property
    def rank(self) -> int:
        return len(self.weights)

    def to_frame(self, top: int = 3) -> pd.DataFrame:
        """One row per hidden unit: `unit, weight` and, where there are names, `writes, left_reads, right_reads`."""
        frame = pd.DataFrame({"unit": range(self.rank), "weight": self.weights.tolist()})
        if self.outputs is not None and self.inputs is not None:
            frame["writes"] = self.outputs.nearest(self.layer.W_out, top).describe()
            frame["left_reads"] = self.inputs.nearest(self.layer.W_gate.T, top).describe()
            frame["right_reads"] = self.inputs.nearest(self.layer.W_in.T, top).describe()
        return frame

    def plot(self) -> go.Figure:
        """The explained share of the squared norm, sweep by sweep."""
        return plots.line(
            list(range(len(self.explained))),
            {"explained": self.explained},
            f"{self.rank} shared neurons: cosine {self.cosine:.4f}",
            x_title="sweep",
            y_title="explained share of the squared norm",
        )

    def __str__(self) -> str:
        sweeps = len(self.explained) - 1
        return (
            f"CP decomposition into {self.rank} hidden units: cosine {self.cosine:.4f} "
            f"({self.pruned:.4f} by keeping the largest units), cancellation {self.cancellation:.2f}, "
            f"{sweeps} sweeps{'' if self.converged else ', not converged'}\n"
            f"{self.to_frame().head(10).to_string(index=False)}"
        )


@dataclass(frozen=True)
class CPCurve(Tabular):
    """How the fit grows with the number of hidden units."""

    fits: Sequence[CPDecomposition]

    def to_frame(self) -> pd.DataFrame:
        """One row per rank: `rank, cosine, pruned, explained, cancellation, sweeps, converged`."""
        return pd.DataFrame(
            [
                {
                    "rank": fit.rank,
                    "cosine": fit.cosine,
                    "pruned": fit.pruned,
                    "explained": fit.explained[-1],
                    "cancellation": fit.cancellation,
                    "sweeps": len(fit.explained) - 1,
                    "converged": fit.converged,
                }
                for fit in self.fits
            ]
        )

    def plot(self) -> go.Figure:
        """Cosine against rank, fitted and by keeping the largest units."""
        curves = {"fitted": [f.cosine for f in self.fits], "largest units kept": [f.pruned for f in self.fits]}
        return plots.line(
            [f.rank for f in self.fits], curves, "shared neurons", x_title="hidden units", y_title="cosine"
        )

    def __str__(self) -> str:
        return self.to_frame().to_string(index=False)


def cp_decompose(
    layer: BilinearLayer,
    rank: int,
    start: Start = None,
    *,
    max_sweeps: int = 200,
    tolerance: float = 1e-5,
    memory: int = MEMORY,
    progress: bool = True,
) -> CPDecomposition:
    """Fit a bilinear layer of `rank` hidden units to a layer.

    An interrupt (ctrl-C) ends the fit and gives what it has; pass that result's `layer` as `start` to go on.

    Args:
        layer: the layer to fit.
        rank: hidden units of the result.
        start: `None` for the layer's largest hidden units, a seed for random ones, or a layer of `rank` hidden units
            to go on from.
        max_sweeps: the largest number of sweeps over both branches and the writes.
        tolerance: the least gain in the explained share of `||T||^2`; a sweep that gains less is the last.
        memory: bytes to work in, and at most as many for the result; 1 GiB by default.
        progress: show a bar.

    Raises:
        ArgumentError: a layer whose tensor is zero, or less memory than a sweep takes.
        OutOfRangeError: a rank outside 1..d_mlp, or no sweeps.
        SAEMismatchError: a start of another shape.
    """
    d_mlp = len(layer.W_out)
    if not 1 <= rank <= d_mlp:
        raise OutOfRangeError(f"rank is {rank}, expected 1 to {d_mlp}: with d_mlp hidden units the layer is exact.")
    if max_sweeps < 0:
        raise OutOfRangeError(f"max_sweeps is {max_sweeps}, expected 0 or more.")
    # In float64: inner products among the hidden units and with the layer's, and the factors of both.
    d_model, kept = len(layer.W_gate) + 1, 8 * rank**2 + 4 * rank * d_mlp
    needed = 8 * (kept + (4 * d_mlp + 10 * rank) * d_model)
    check_budget(f"cp of rank {rank:,}", needed, memory, "ask for a lower rank")
    target = homogeneous(layer)
    norm = tensor_norm(target, memory=memory).item()
    if not norm > 0:
        raise ArgumentError("the layer's interaction tensor is zero: there is nothing to fit.")
    explained: list[float] = []
    converged = False
    factors = _start(layer, rank, start)
    fits = (fit for _, fit in zip(range(max_sweeps + 1), sweeps(layer, factors, norm), strict=False))
    with tqdm(total=max_sweeps, desc=f"CP, rank {rank}", unit="sweep", disable=not progress) as bar:
        try:
            for better, share in fits:
                factors = better
                explained.append(share)
                bar.update(len(explained) > 1)
                bar.set_postfix(explained=f"{share:.4f}")
                converged = len(explained) > 1 and explained[-1] - explained[-2] < tolerance
                if converged:
                    break
        except KeyboardInterrupt:
            if not explained:
                raise
    fitted, weights = _as_layer(layer, factors)
    fitted_norm = tensor_norm(_reading(target, fitted), memory=memory).item()
    largest = _reading(target, largest_units(layer, rank))
    return CPDecomposition(
        layer=fitted,
        weights=weights,
        cosine=tensor_inner(_reading(target, fitted), target, memory=memory).item() / (norm * fitted_norm),
        explained=explained,
        pruned=tensor_inner(largest, target, memory=memory).item()
        / (norm * tensor_norm(largest, memory=memory).item()),
        cancellation=weights.double().norm().item() / fitted_norm,
        converged=converged,
    )


def largest_units(layer: BilinearLayer, n: int) -> BilinearLayer:
    """The `n` hidden units with the largest `||p_m (x) sym(l_m r_m^T)||`, as they are: the baseline of every fit."""
    return _take_units(layer, unit_norms(layer).topk(n).indices)


def unit_norms(layer: BilinearLayer) -> Float[Tensor, "d_mlp"]:
    """`||p_m (x) sym(l_m r_m^T)||` of every hidden unit, biases included, in float64."""
    left, right = branch_rows(homogeneous(layer))
    squares = 0.5 * ((left**2).sum(-1) * (right**2).sum(-1) + (left * right).sum(-1) ** 2)
    return squares.sqrt() * double(layer.W_out).norm(dim=-1)


def homogeneous(layer: BilinearLayer) -> BilinearLayer:
    """With biases, the layer that reads `(x, 1)` and has none (but `b_out`); else the layer."""
    if not (layer.b_gate.any() or layer.b_in.any()):
        return layer
    return biases_as_weights(layer)


def _reading(target: BilinearLayer, layer: BilinearLayer) -> BilinearLayer:
    """The layer, reading what `target` reads: `x`, or `(x, 1)` even if its own biases are zero."""
    return layer if len(target.W_gate) == len(layer.W_gate) else biases_as_weights(layer)


# --- alternating least squares ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Factors:
    """Writes and branches, one row per hidden unit, in float64; with biases `d` counts the constant input."""

    writes: Float[Tensor, "rank d_model"]
    left: Float[Tensor, "rank d"]
    right: Float[Tensor, "rank d"]


def sweeps(layer: BilinearLayer, start: Factors, norm: float) -> Iterator[tuple[Factors, float]]:
    """Better and better factors, with the explained share of each, for ever; the first has the start's branches."""
    target = _factors(layer)
    state = start
    while True:
        state, explained = _fit_writes(target, state)
        yield state, explained / norm**2
        state = replace(state, left=_fit_branch(target, state.writes, state.left, state.right))
        state = replace(state, right=_fit_branch(target, state.writes, state.right, state.left))


def _fit_writes(target: Factors, state: Factors) -> tuple[Factors, float]:
    """The best writes for these branches (scaled to unit length), and `||T||^2 - ||T - S||^2` with them."""
    lengths = [branch.norm(dim=-1, keepdim=True) for branch in (state.left, state.right)]
    left, right = (
        branch / length.clamp_min(torch.finfo(branch.dtype).tiny)
        for branch, length in zip((state.left, state.right), lengths, strict=True)
    )
    before = state.writes * lengths[0] * lengths[1]
    gram = _unit_gram(left, right, left, right)
    wanted = _unit_gram(left, right, target.left, target.right) @ target.writes
    damped = gram + DAMPING * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    writes = torch.linalg.solve(damped, wanted + DAMPING * before)
    explained = 2 * (writes * wanted).sum() - (writes * (gram @ writes)).sum()
    return Factors(writes, left, right), explained.item()


def _fit_branch(
    target: Factors,
    writes: Float[Tensor, "rank d_model"],
    branch: Float[Tensor, "rank d"],
    other: Float[Tensor, "rank d"],
) -> Float[Tensor, "rank d"]:
    """A better `branch` for these writes and `other` branch, by preconditioned conjugate gradients."""
    written = writes @ writes.T
    c = writes @ target.writes.T
    wanted = 0.5 * ((c * (other @ target.right.T)) @ target.left + (c * (other @ target.left.T)) @ target.right)
    half = 0.5 * written * (other @ other.T)

    def apply(x: Tensor) -> Tensor:
        return half @ x + 0.5 * (written * (other @ x.T)) @ other

    ridge = 1e-10 * half.diagonal().mean() * torch.eye(len(half), dtype=half.dtype, device=half.device)
    factor, failed = torch.linalg.cholesky_ex(half + ridge)
    if failed.any():  # all writes zero: every branch is as good
        return branch
    residual = wanted - apply(branch)
    step = preconditioned = torch.cholesky_solve(residual, factor)
    size = (residual * preconditioned).sum()
    for _ in range(CG_STEPS):
        image = apply(step)
        curvature = (step * image).sum()
        if not (size > 0 and curvature > 0):
            break
        branch = branch + size / curvature * step
        residual = residual - size / curvature * image
        preconditioned = torch.cholesky_solve(residual, factor)
        size_before, size = size, (residual * preconditioned).sum()
        step = preconditioned + size / size_before * step
    return branch


def _unit_gram(left: Tensor, right: Tensor, left_other: Tensor, right_other: Tensor) -> Float[Tensor, "rank other"]:
    """Inner products of `sym(a b^T)` of every two hidden units."""
    return 0.5 * ((left @ left_other.T) * (right @ right_other.T) + (left @ right_other.T) * (right @ left_other.T))


def _factors(layer: BilinearLayer) -> Factors:
    left, right = branch_rows(homogeneous(layer))
    return Factors(double(layer.W_out), left, right)


def _start(layer: BilinearLayer, rank: int, start: Start) -> Factors:
    if start is None:
        # By homogeneous units: those kept may have no biases although others have.
        target, units = _factors(layer), unit_norms(layer).topk(rank).indices
        return Factors(target.writes[units], target.left[units], target.right[units])
    if isinstance(start, BilinearLayer):
        if start.W_gate.shape != (layer.W_gate.shape[0], rank) or start.W_out.shape != (rank, layer.W_out.shape[1]):
            raise SAEMismatchError(
                f"a start of {start.W_gate.shape[1]} hidden units and d_model {start.W_gate.shape[0]}: expected {rank} "
                f"and {layer.W_gate.shape[0]}."
            )
        factors, d = _factors(start), _factors(layer).left.shape[1]
        pad = (0, d - factors.left.shape[1])
        return replace(
            factors,
            left=torch.nn.functional.pad(factors.left, pad),
            right=torch.nn.functional.pad(factors.right, pad),
        )
    check_seeds(start=start)
    # Random mixtures of the layer's own hidden units: in the space they span, and of its scale.
    target = _factors(layer)
    generator = torch.Generator().manual_seed(start)
    mixtures = [torch.randn(rank, len(target.writes), generator=generator).to(target.writes) for _ in range(3)]
    return Factors(mixtures[0] @ target.writes, mixtures[1] @ target.left, mixtures[2] @ target.right)


def _as_layer(layer: BilinearLayer, factors: Factors) -> tuple[BilinearLayer, Float[Tensor, "rank"]]:
    """Units by falling weight, their weight spread evenly over write and branches, in the layer's own dtype."""
    parts = [factors.writes, factors.left, factors.right]
    lengths = [part.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(part.dtype).tiny) for part in parts]
    size = (lengths[0] * lengths[1] * lengths[2]) ** (1 / 3)
    writes, left, right = ((part / length * size).to(layer.W_out) for part, length in zip(parts, lengths, strict=True))
    d = layer.W_gate.shape[0]
    zero = torch.zeros_like(writes[:, 0])
    fitted = BilinearLayer(
        W_gate=left[:, :d].T,
        W_in=right[:, :d].T,
        W_out=writes,
        b_gate=left[:, d] if left.shape[1] > d else zero,
        b_in=right[:, d] if right.shape[1] > d else zero,
        b_out=layer.b_out,
    )
    weights = unit_norms(fitted)
    order = weights.argsort(descending=True)
    return _take_units(fitted, order), weights[order].to(writes)


def _take_units(layer: BilinearLayer, units: Tensor) -> BilinearLayer:
    return BilinearLayer(
        W_gate=layer.W_gate[:, units],
        W_in=layer.W_in[:, units],
        W_out=layer.W_out[units],
        b_gate=layer.b_gate[units],
        b_in=layer.b_in[units],
        b_out=layer.b_out,
    )
