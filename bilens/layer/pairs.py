"""The largest interactions between two sets of input directions, of which all pairs together would not fit in memory.

Two sources `f_i left_i` and `g_j right_j` of a layer's input add `2 left_i^T Q_u right_j f_i g_j` to an output `u`.
The `n` largest of them, exactly, for thousands or tens of thousands of directions on either side:

1. A = left Q_u, through the branches: no `Q_u`
2. rows of A and of right by falling length: `|A_i . right_j| <= |A_i| |right_j|`, so the first blocks hold most of what
   is large, and where the bound falls below the n-th largest found so far, nothing that follows can count
3. block by block of A right^T: what is above that threshold joins the best n
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bilens.errors import OutOfRangeError
from bilens.layer.bilinear import BilinearLayer, apply_interaction

BLOCK_ROWS, BLOCK_ENTRIES = 1024, 2**22  # 16 MB of float32
BOUND_SLACK = 1 + 1e-5  # of the bound, against rounding in what it bounds


def top_pairs(
    layer: BilinearLayer,
    u: Float[Tensor, "d_model"],
    left: Float[Tensor, "l d_model"],
    right: Float[Tensor, "r d_model"] | None,
    n: int,
) -> tuple[Int[Tensor, "n"], Int[Tensor, "n"], Float[Tensor, "n"]]:
    """`i, j, coefficient` of the `n` largest, by falling absolute coefficient `2 left_i^T Q_u right_j`.

    Within one set (`right` is `None`) a pair stands once, with `i <= j`, and `i = j` has `left_i^T Q_u left_i`.

    Raises:
        OutOfRangeError: fewer than `n` pairs.
    """
    within = right is None
    right = left if right is None else right
    n_pairs = len(left) * (len(left) + 1) // 2 if within else len(left) * len(right)
    if not 1 <= n <= n_pairs:
        raise OutOfRangeError(f"n is {n}, expected 1 to {n_pairs}, the number of pairs.")
    images = apply_interaction(layer, u, left)
    row_order, row_norms = _by_length(images)
    column_order, column_norms = _by_length(right)
    images, right = images[row_order], right[column_order]

    best = images.new_zeros(0)
    flat = row_order.new_zeros(0)
    threshold = 0.0
    rows = max(1, min(BLOCK_ROWS, BLOCK_ENTRIES // len(right)))
    columns = min(len(right), BLOCK_ENTRIES)
    for top in range(0, len(images), rows):
        longest = row_norms[top].item() * 2 * BOUND_SLACK
        if longest * column_norms[0].item() < threshold:
            break
        # Columns too short to reach the threshold even with the longest row of the block are left out.
        reach = int((column_norms * longest >= threshold).sum())
        for start in range(0, reach, columns):
            stop = min(start + columns, reach)
            block = 2 * images[top : top + rows] @ right[start:stop].T
            if within:
                block = _once(block, row_order[top : top + rows], column_order[start:stop])
            size = block.abs().flatten()
            # While there are fewer than n, zeros count; NaN, a pair that stands elsewhere, never does.
            found = (size > threshold if len(best) == n else size >= 0).nonzero()[:, 0]
            if not len(found):
                continue
            i = row_order[top + found // (stop - start)]
            j = column_order[start + found % (stop - start)]
            best = torch.cat([best, block.flatten()[found]])
            flat = torch.cat([flat, i * len(right) + j])
            kept = best.abs().topk(min(n, len(best))).indices
            best, flat = best[kept], flat[kept]
            if len(best) == n:
                threshold = best[-1].abs().item()
    return flat // len(right), flat % len(right), best


def _by_length(rows: Float[Tensor, "n d"]) -> tuple[Int[Tensor, "n"], Float[Tensor, "n"]]:
    lengths, order = rows.norm(dim=-1).sort(descending=True)
    return order, lengths


def _once(block: Tensor, i: Int[Tensor, "rows"], j: Int[Tensor, "columns"]) -> Tensor:
    """Within one set: pairs `i > j` out (NaN is above no threshold), `i = j` halved."""
    block = torch.where(i[:, None] == j, 0.5 * block, block)
    return block.masked_fill(i[:, None] > j, torch.nan)
