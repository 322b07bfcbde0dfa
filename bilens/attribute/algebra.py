"""The frozen model as linear and quadratic maps, in pure tensor functions.

With attention patterns and norm scales frozen, attention is linear and an MLP is quadratic:

    attn(x)[q]  = sum_h sum_s pattern_h[q, s] (x[s] / scale[s]) W_V_h W_O_h
    u . mlp(n)  = n^T Q_u n + g_u . n + h_u                                       (`bilens.layer.bilinear`)

A *field* is what one target reads of a residual stream: a vector at every position. Fields go down through attention
(`attention_back`), streams go up (`attention_forward`, `mlp_shares`); a whole batch of either is a few matrix products.

Source: Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits" (OV paths).
"""

import torch
from jaxtyping import Float
from torch import Tensor

from bilens.layer.bilinear import BilinearLayer, Branches, branches, hidden_coefficients, products


def attention_back(
    fields: Float[Tensor, "t q d_model"],
    pattern: Float[Tensor, "head q k"],
    scale: Float[Tensor, "k"],
    W_V: Float[Tensor, "head d_model d_head"],
    W_O: Float[Tensor, "head d_head d_model"],
) -> Float[Tensor, "t k d_model"]:
    """What reads of attention's output read of the residual stream before it (the stream itself not included)."""
    n_heads, d_head = W_O.shape[:2]
    values = (fields @ W_O.flatten(0, 1).T).unflatten(-1, (n_heads, d_head)).transpose(1, 2)
    moved = (pattern.mT @ values).transpose(1, 2).flatten(2)
    return moved @ W_V.transpose(1, 2).flatten(0, 1) / scale[:, None]


def attention_forward(
    streams: Float[Tensor, "n k d_model"],
    pattern: Float[Tensor, "head q k"],
    scale: Float[Tensor, "k"],
    W_V: Float[Tensor, "head d_model d_head"],
    W_O: Float[Tensor, "head d_head d_model"],
) -> Float[Tensor, "n q d_model"]:
    """What attention makes of each part of the residual stream."""
    mixed = pattern @ head_values(streams, scale, W_V)
    return mixed.transpose(1, 2).flatten(2) @ W_O.flatten(0, 1)


def head_values(
    streams: Float[Tensor, "n k d_model"], scale: Float[Tensor, "k"], W_V: Float[Tensor, "head d_model d_head"]
) -> Float[Tensor, "n head k d_head"]:
    """Each head's values of each part of the residual stream."""
    flat = W_V.transpose(0, 1).flatten(1)
    return (streams / scale[:, None] @ flat).unflatten(-1, (W_V.shape[0], W_V.shape[2])).transpose(1, 2)


def head_parts(
    reads: Float[Tensor, "t d_model"],
    pattern_rows: Float[Tensor, "head t k"],
    values: Float[Tensor, "head k d_head"],
    W_O: Float[Tensor, "head d_head d_model"],
) -> Float[Tensor, "t head k"]:
    """What every head moved from every source position to where a read is, as the read sees it."""
    seen = torch.einsum("td,hed->hte", reads, W_O)
    return (pattern_rows * (seen @ values.mT)).transpose(0, 1)


def mlp_shares(
    layer: BilinearLayer, parts: Float[Tensor, "n p d_model"], ones: Float[Tensor, "n"]
) -> Float[Tensor, "n p d_model"]:
    """An MLP's output split over parts of its input, every product of two of them half to each.

    The parts add up to the input, `ones` to 1 (the part that carries the MLP's biases has 1). A part's share is
    `B(part, whole)` of the symmetric bilinear form `B` with `mlp(n) = B(n, n)`, so the shares add up to the output.

    This is the Shapley value of the parts: `B(n, n) = sum_i B(i, i) + sum_{i<j} 2 B(i, j)`; a player's marginal
    contribution to a coalition `S` is `B(i, i) + 2 sum_{j in S} B(i, j)`, and over all orders each `j` comes before `i`
    half of the time, which leaves `B(i, i) + sum_{j != i} B(i, j) = B(i, whole)`.
    """
    made = branches(layer, parts, ones[:, None])
    hidden = products(made, made.sum(0))
    return hidden @ layer.W_out + ones[:, None, None] * layer.b_out


def mlp_back(
    layer: BilinearLayer, fields: Float[Tensor, "t p d_model"], whole: Branches
) -> tuple[Float[Tensor, "t p d_model"], Float[Tensor, "t"]]:
    """What reads of an MLP's output read of a part of its input, by `mlp_shares`, and of its biases.

    A part's share is linear in the part: `B(part, whole)`.
    """
    c = 0.5 * hidden_coefficients(layer, fields)
    left, right = c * whole.right, c * whole.left
    constants = (left @ layer.b_gate + right @ layer.b_in + fields @ layer.b_out).sum(1)
    return left @ layer.W_gate.T + right @ layer.W_in.T, constants
