"""The largest interactions between two sets of input directions, of which all pairs together would not fit in memory.

Two sources `f_i left_i` and `g_j right_j` of a layer's input add `2 left_i^T Q_u right_j f_i g_j` to an output `u`.
The `n` largest of them, exactly, for thousands or tens of thousands of directions on either side:

1. A = left Q_u, in blocks of rows that are made when they are needed; first the lengths of all of them
2. rows of A by falling length: `|A_i . right_j| <= |A_i| |right_j|`, so the first blocks hold most of what is large,
   and where the bound falls below the n-th largest found so far, nothing that follows can count. Within one set the
   bound holds the other way round, too, and only one of `(i, j)` and `(j, i)` is multiplied
3. block by block of A right^T, first in bfloat16 where this kind of device multiplies it faster, its error bounded: of
   the rows that may have something above that threshold, what is above it joins the best n
"""

from math import sqrt

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bilens._core.checks import MEMORY, check_budget
from bilens.errors import OutOfRangeError
from bilens.layer.bilinear import BFLOAT16_FACTORS, BFLOAT16_RESULT, BilinearLayer, interaction_matrix, search_dtype

SIDE = 1024  # rows and columns of a block: 4 MB of float32
ENTRY = 24  # bytes of an entry besides its value, its size and a copy of that: what picking the largest takes
BOUND_SLACK = 1 + 1e-5  # of the bound, against rounding in what it bounds


def top_pairs(
    layer: BilinearLayer,
    u: Float[Tensor, "d_model"],
    left: Float[Tensor, "l d_model"],
    right: Float[Tensor, "r d_model"] | None,
    n: int,
    *,
    memory: int = MEMORY,
) -> tuple[Int[Tensor, "n"], Int[Tensor, "n"], Float[Tensor, "n"]]:
    """`i, j, coefficient` of the `n` largest, by falling absolute coefficient `2 left_i^T Q_u right_j`.

    Within one set (`right` is `None`) a pair stands once, with `i <= j`, and `i = j` has `left_i^T Q_u left_i`.

    Raises:
        ArgumentError: less memory than the smallest blocks take, in bytes.
        OutOfRangeError: fewer than `n` pairs.
    """
    within = right is None
    right = left if right is None else right
    n_pairs = len(left) * (len(left) + 1) // 2 if within else len(left) * len(right)
    if not 1 <= n <= n_pairs:
        raise OutOfRangeError(f"n is {n}, expected 1 to {n_pairs}, the number of pairs.")
    side, hold = _plan(layer, len(left), len(right), n, memory)
    matrix = interaction_matrix(layer, u)
    held = left @ matrix if hold else None
    norms = (
        torch.cat([(part @ matrix).norm(dim=-1) for part in left.split(side)]) if held is None else held.norm(dim=-1)
    )
    row_norms, rows = norms.sort(descending=True)
    row_norms = 2 * BOUND_SLACK * row_norms
    lengths = right.norm(dim=-1)
    columns = rows if within else lengths.argsort(descending=True)
    screen = search_dtype(matrix.dtype, matrix.device)

    best = matrix.new_zeros(0)
    pairs = rows.new_zeros(2, 0)
    threshold: Tensor | None = None  # as soon as there are n
    for top in range(0, len(left), side):
        at, bounds = rows[top : top + side], row_norms[top : top + side]
        if threshold is not None and bounds[0] * lengths.max() < threshold:
            break
        images = 2 * (left[at] @ matrix if held is None else held[at])
        coarse = images.to(screen)
        for start in range(top if within else 0, len(right), side):
            others = columns[start : start + side]
            diagonal = within and start == top
            if threshold is not None and not diagonal:
                passing = lengths[others] * bounds[0] >= threshold
                if within:
                    passing &= row_norms[start : start + side] * lengths[at].max() >= threshold
                others = others[passing]
                if not len(others):
                    continue
            some = torch.arange(len(at), device=at.device)
            if threshold is not None and screen != images.dtype:
                peak = (coarse @ right[others].to(screen).T).abs_().amax(1).to(bounds)
                error = bounds * (lengths[others].max() * BFLOAT16_FACTORS)
                some = (peak * (1 + BFLOAT16_RESULT) + error >= threshold).nonzero().flatten()
            block = images[some] @ right[others].T
            place = torch.arange(len(others), device=at.device)
            if diagonal:  # each pair once: what stands elsewhere counts for nothing
                block[some[:, None] == place] *= 0.5
            size = block.abs()
            if diagonal:
                size[some[:, None] > place] = -1.0
            i, j = _largest(size, n, threshold)
            best = torch.cat([best, block[i, j]])
            pairs = torch.cat([pairs, torch.stack([at[some[i]], others[j]])], 1)
            kept = best.abs().topk(min(n, len(best))).indices
            best, pairs = best[kept], pairs[:, kept]
            if len(best) == n:
                threshold = best[-1].abs()
    i, j = pairs.sort(dim=0).values if within else pairs
    return i, j, best


def _plan(layer: BilinearLayer, n_left: int, n_right: int, n: int, memory: int) -> tuple[int, bool]:
    """The rows and columns of the blocks, and whether there is room to hold all rows of A."""
    (d_model, d_mlp), size = layer.W_gate.shape, layer.W_gate.element_size()
    fixed = size * d_model * (d_mlp + 4 * d_model) + 32 * (n_left + n_right) + 8 * (16 + size) * n
    rows, entry, row = 2 * size * d_model * n_left, 3 * size + ENTRY, 6 * size * d_model
    smallest = fixed + entry + row
    call = f"the search for the {n:,} largest pairs of {n_left:,} and {n_right:,} directions"
    check_budget(call, smallest, memory, "ask for fewer pairs")
    hold = smallest + rows <= memory // 2
    room = memory - fixed - hold * rows
    return min(SIDE, int((sqrt(row**2 + 4 * entry * room) - row) / (2 * entry))), hold


def _largest(
    size: Float[Tensor, "rows columns"], n: int, threshold: Float[Tensor, ""] | None
) -> tuple[Int[Tensor, "k"], Int[Tensor, "k"]]:
    """Places of the entries above the threshold, at most the `n` largest; without one, of the `n` largest from zero."""
    if threshold is None:
        top = size.flatten().topk(min(n, int((size >= 0).sum()))).indices
        return top // size.shape[1], top % size.shape[1]
    some = (size.amax(1) > threshold).nonzero().flatten()
    chosen = size[some]
    row, j = (chosen > threshold).nonzero(as_tuple=True)
    if len(row) > n:
        top = chosen[row, j].topk(n).indices
        row, j = row[top], j[top]
    return some[row], j
