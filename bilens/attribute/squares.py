"""What one read of an MLP's output is at one position, as a sum of squares of linear reads: eigencircuits at a token.

    u . mlp(x) = x^T Q_u x + g_u . x + h_u                            (`bilens.layer.bilinear`)
    x^T Q_u x  = sum_k lambda_k p_k^2,  p_k = v_k . x                  for any `Q_u = sum_k lambda_k v_k v_k^T`

The input is a sum of sources, so each `p_k` is one, `p_k = sum_s p_ks`, and a square splits exactly over them: source
`s` gives `lambda_k p_k p_ks`, which is its Shapley value. A few squares are kept, those that do most at this token; the
rest is `x^T Q_u x` without them, exactly, whatever pairs `(lambda_k, v_k)` are given.

Source: Pearce et al. 2025, section 4 (eigenfeatures of a bilinear layer).
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bilens.layer.bilinear import (
    BilinearLayer,
    branches,
    constant_term,
    hidden_coefficients,
    interaction_matrix,
    linear_term,
)
from bilens.layer.eigen.pairs import sorted_eigenpairs

MOST = 8  # eigencircuits of one read
SOLVED_BYTES = 2**26  # of what the matrices solved at a time are made of


@dataclass(frozen=True)
class Squares:
    """The parts of one read: eigencircuits with what each source gives them, the rest of them, and what is no square.

    Attributes:
        index: the place of each eigencircuit in the given list; -1, the last, is the rest of them. Empty where none was
            found: then the squares are in `direct`.
        weights: what each source gives to each of these; a row adds up to `lambda_k p_k^2`.
        direct: what each source gives without them: of `g_u . x` and `h_u`.
    """

    index: Int[Tensor, "circuit"]
    weights: Float[Tensor, "circuit source"]
    direct: Float[Tensor, "source"]


def split_squares(
    values: Float[Tensor, "k"],
    vectors: Float[Tensor, "k d_model"],
    sources: Float[Tensor, "source d_model"],
    linear: Float[Tensor, "source"],
    direct: Float[Tensor, "source"],
    share: float,
) -> Squares:
    """The squares that do most at a token.

    Args:
        values, vectors: `lambda_k` and `v_k`, of eigenvectors or of any other exact sum of squares.
        sources: what the input is the sum of.
        linear: `s^T Q x` of each source, which add up to `x^T Q x`.
        direct: what each source gives without the squares.
        share: the fewest squares are kept, largest first, that leave at most `1 - share` of `x^T Q x`; `MOST` at most.
    """
    parts = sources @ vectors.T
    projections = parts.sum(0)
    activations = values * projections**2
    order = activations.abs().argsort(descending=True)[:MOST]
    whole = linear.sum()
    enough = (whole - activations[order].cumsum(0)).abs() <= (1 - share) * whole.abs()
    n = int(enough.nonzero()[0]) + 1 if enough.any() else len(order)
    kept = order[:n]
    weights = (values[kept] * projections[kept] * parts[:, kept]).T
    rest = linear - weights.sum(0)
    return Squares(torch.cat([kept.cpu(), torch.tensor([-1])]), torch.cat([weights, rest[None]]), direct)


def find_squares(
    layer: BilinearLayer,
    u: Float[Tensor, "t d_model"],
    sources: Float[Tensor, "source d_model"],
    ones: Float[Tensor, "source"],
    solved: Bool[Tensor, "t"],
    share: float,
) -> list[Squares]:
    """Several reads of an MLP's output at one position, each as a sum of squares.

    Args:
        layer: the MLP.
        u: the reads.
        sources: what its input is the sum of.
        ones: 1 for the source that carries the MLP's biases, 0 for the others.
        solved: the reads whose eigencircuits are found; the others' squares stay together, in `direct`.
        share: see `split_squares`.
    """
    c, made = hidden_coefficients(layer, u), branches(layer, sources.sum(0))
    folded = 0.5 * ((c * made.left) @ layer.W_in.T + (c * made.right) @ layer.W_gate.T)  # Q_u x
    linear = folded @ sources.T
    direct = linear_term(layer, u) @ sources.T + constant_term(layer, u)[:, None] * ones
    found = [Squares(torch.empty(0, dtype=torch.long), linear[:0], linear[t] + direct[t]) for t in range(len(u))]
    size = max(1, SOLVED_BYTES // (8 * layer.W_gate.numel()))
    for rows in solved.nonzero().flatten().split(size):
        # In float32: what a vector is off by goes to the rest.
        values, vectors = sorted_eigenpairs(interaction_matrix(layer, u[rows]).float())
        for t, value, vector in zip(rows.tolist(), values.to(u), vectors.to(u), strict=True):
            found[t] = split_squares(value, vector, sources, linear[t], direct[t], share)
    return found
