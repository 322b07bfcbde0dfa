"""Eigenpairs of symmetric matrices in the order and sign that a reader expects."""

from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bilens.errors import ArgumentError, OutOfRangeError, nearest

Order = Literal["size", "positive", "negative"]


def sorted_eigenpairs(
    matrix: Float[Tensor, "*n d d"], k: int | None = None, order: Order = "size"
) -> tuple[Float[Tensor, "*n k"], Float[Tensor, "*n k d"]]:
    """Eigenvalues by falling absolute value (or by sign), and their unit eigenvectors as rows.

    Of two eigenvalues `+a` and `-a` that differ by rounding only, the positive one comes first. Each vector's entry of
    largest absolute value is positive.

    Args:
        matrix: symmetric.
        k: how many; `None` gives all.
        order: `"size"` is by absolute value; `"positive"` from the most positive down, `"negative"` from the most
            negative up, each followed by those of the other sign if `k` is more than there are.

    Raises:
        ArgumentError: another order.
        OutOfRangeError: `k` is not in 1..d.
    """
    if order not in get_args(Order):
        known = get_args(Order)
        raise ArgumentError(
            f"order is {order!r}, expected one of {', '.join(map(repr, known))}." + nearest(order, known)
        )
    d = matrix.shape[-1]
    if k is not None and not 1 <= k <= d:
        raise OutOfRangeError(f"k is {k}, expected 1 to {d} (or None for all).")
    values, columns = torch.linalg.eigh(matrix)
    places = by_magnitude(values) if order == "size" else values.argsort(-1, descending=order == "positive")
    places = places[..., :k]
    values = values.gather(-1, places)
    vectors = columns.mT.gather(-2, places[..., None].expand(*places.shape, d))
    return values, signed(vectors)


def signed(vectors: Float[Tensor, "*n d"]) -> Float[Tensor, "*n d"]:
    """Every vector or its opposite, whichever has its entry of largest absolute value positive."""
    largest = vectors.abs().argmax(-1, keepdim=True)
    return vectors * vectors.gather(-1, largest).sign()


def by_magnitude(values: Float[Tensor, "*n d"], units: int = 16) -> Int[Tensor, "*n d"]:
    """Indices by falling `|value|`, positive first among those equal up to `units` of rounding of the largest."""
    order = values.abs().argsort(-1, descending=True)
    ranked = values.gather(-1, order)
    # eigh is backward stable: each value is off by a few units of rounding of the largest one.
    rounding = units * torch.finfo(values.dtype).eps * ranked[..., :1].abs()
    gaps = ranked.abs().diff(dim=-1, prepend=ranked[..., :1].abs()).abs() > rounding
    cluster = gaps.cumsum(-1)
    return order.gather(-1, (2 * cluster + (ranked < 0)).argsort(dim=-1, stable=True))
