"""Eigenpairs of symmetric matrices in the order and sign that a reader expects."""

from concurrent.futures import ThreadPoolExecutor
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bilens._core.checks import whole_number
from bilens.errors import ArgumentError, OutOfRangeError, nearest

Order = Literal["size", "positive", "negative"]
SMALL = 1024  # rows and columns; larger matrices are worth several threads each
ROUNDINGS = 16  # units of rounding up to which two numbers count as equal


def check_pairs(d: int, k: int | None, order: str) -> None:
    """Raise unless there are `k` eigenpairs of a `d x d` matrix, and such an order."""
    if order not in get_args(Order):
        known = get_args(Order)
        raise ArgumentError(
            f"order is {order!r}, expected one of {', '.join(map(repr, known))}." + nearest(order, known)
        )
    if k is not None and not 1 <= whole_number(k, "a number of eigenpairs is expected") <= d:
        raise OutOfRangeError(f"k is {k}, expected 1 to {d} (or None for all).")


def eigh(matrices: Float[Tensor, "*n d d"]) -> tuple[Float[Tensor, "*n d"], Float[Tensor, "*n d d"]]:
    """`torch.linalg.eigh`; on a CPU, each small matrix on one thread, and several of them at a time.

    By itself it takes one matrix after the other, each on all threads, which then wait for one another thousands of
    times: where other processes use the cores, too, that takes a hundred times as long.
    """
    d, threads = matrices.shape[-1], torch.get_num_threads()
    if matrices.device.type != "cpu" or threads == 1 or d > SMALL or matrices.numel() == 0:
        return torch.linalg.eigh(matrices)
    parts = matrices.reshape(-1, d, d).chunk(threads)
    try:
        with ThreadPoolExecutor(len(parts), initializer=torch.set_num_threads, initargs=(1,)) as pool:
            found = list(pool.map(torch.linalg.eigh, parts))
    finally:
        torch.set_num_threads(threads)  # or else threads that start later would have one, too
    values, columns = (torch.cat(parts) for parts in zip(*found, strict=True))
    return values.reshape(matrices.shape[:-1]), columns.reshape(matrices.shape)


def sorted_eigenpairs(
    matrix: Float[Tensor, "*n d d"], k: int | None = None, order: Order = "size", ties: float | None = None
) -> tuple[Float[Tensor, "*n k"], Float[Tensor, "*n k d"]]:
    """Eigenvalues by falling absolute value (or by sign), and their unit eigenvectors as rows.

    Of two eigenvalues `+a` and `-a` that differ by rounding only, the positive one comes first. Each vector's entry of
    largest absolute value is positive.

    Args:
        matrix: symmetric.
        k: the number of eigenpairs; `None` gives all.
        order: `"size"` is by absolute value; `"positive"` from the most positive down, `"negative"` from the most
            negative up, each followed by those of the other sign if `k` is more than there are.
        ties: the relative difference up to which values count as equal; `None` is the rounding of `matrix`.

    Raises:
        ArgumentError: another order.
        OutOfRangeError: `k` is not in 1..d.
    """
    check_pairs(matrix.shape[-1], k, order)
    values, columns = eigh(matrix)
    off = None if ties is None else ties * values.abs()
    places = by_magnitude(values, off) if order == "size" else values.argsort(-1, descending=order == "positive")
    places = places[..., :k]
    values = values.gather(-1, places)
    vectors = columns.mT.gather(-2, places[..., None].expand(*places.shape, matrix.shape[-1]))
    return values, signed(vectors)


def signed(vectors: Float[Tensor, "*n d"]) -> Float[Tensor, "*n d"]:
    """Every vector or its opposite, whichever has its entry of largest absolute value positive."""
    largest = vectors.abs().argmax(-1, keepdim=True)
    return vectors * vectors.gather(-1, largest).sign()


def by_magnitude(values: Float[Tensor, "*n d"], off: Float[Tensor, "*n d"] | None = None) -> Int[Tensor, "*n d"]:
    """Indices by falling `|value|`, positive first among those equal up to rounding.

    Args:
        values: the values, in any order.
        off: the error of each. `None` is for values as `eigh` leaves them: it is backward stable, so each is off
            by a few units of rounding of the largest one.
    """
    order = values.abs().argsort(-1, descending=True)
    ranked = values.gather(-1, order)
    size = ranked.abs()
    rounding = ROUNDINGS * torch.finfo(values.dtype).eps * size[..., :1] if off is None else off.gather(-1, order)
    cluster = (size.diff(dim=-1, prepend=size[..., :1]).abs() > rounding).cumsum(-1)
    return order.gather(-1, (2 * cluster + (ranked < 0)).argsort(dim=-1, stable=True))
