"""Eigenpairs that count for what a layer reads, instead of for all inputs alike.

With `M` the second moment of the inputs that matter,

    M^1/2 Q M^1/2 = sum_k mu_k y_k y_k^T        w_k = M^-1/2 y_k        x^T Q x = sum_k mu_k (w_k . x)^2

exactly, for any positive definite `M`, and with as many positive and negative terms as `Q` has. Of inputs that are
Gaussian with second moment `M` the first `k` terms lose least of all. With `M` the identity they are the eigenpairs of
`Q`. Around a mean `m`, with `M` the covariance there,

    x^T Q x = m^T Q m + 2 (Q m) . (x - m) + sum_k mu_k (w_k . (x - m))^2

The vectors are given as unit vectors `v = w / |w|`, so the value is `mu |w|^2`, and `v`s need not be orthogonal.
"""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from bilens.layer.bilinear import double
from bilens.layer.eigen.pairs import eigh, signed, sorted_eigenpairs

Ranking = Literal["variance", "mean"]
OWN = 0.7  # of the second moment is that of the output's own inputs; the rest is that of all
FLOOR = 1e-6  # of the largest eigenvalue: added, so that directions that no input has can be mapped back


def moment(
    x: Float[Tensor, "p d_model"],
    every: Float[Tensor, "d_model d_model"],
    about: Float[Tensor, "d_model"] | None = None,
) -> Float[Tensor, "d_model d_model"]:
    """The second moment of some inputs, shrunk towards that of all, and of full rank; in float64.

    Args:
        x: the inputs, such as those on which a feature fires; there may be none.
        every: the second moment of all inputs.
        about: the point to take it about; `None` is zero.
    """
    every = double(every)
    if len(x):
        x = double(x) if about is None else double(x) - double(about)
        every = OWN * (x.T @ x / len(x)) + (1 - OWN) * every
    lift = FLOOR * every.diagonal().sum().clamp_min(torch.finfo(torch.float64).tiny)
    return every + lift * torch.eye(len(every)).to(every)


def roots(
    M: Float[Tensor, "*n d_model d_model"],
) -> tuple[Float[Tensor, "*n d_model d_model"], Float[Tensor, "*n d_model d_model"]]:
    """`M^1/2` and `M^-1/2` of a positive definite matrix."""
    values, columns = eigh(M)
    root = values.clamp_min(torch.finfo(M.dtype).tiny).sqrt()[..., None, :]
    return (columns * root) @ columns.mT, (columns / root) @ columns.mT


def metric_eigenpairs(
    Q: Float[Tensor, "*n d_model d_model"], M: Float[Tensor, "*n d_model d_model"], k: int | None = None
) -> tuple[Float[Tensor, "*n k"], Float[Tensor, "*n k d_model"]]:
    """The terms of `x^T Q x = sum_k value_k (v_k . x)^2` in the metric `M`: all of them (`k` is `None`) are exact.

    Args:
        Q: symmetric.
        M: positive definite.
        k: how many, by falling `|mu|`.
    """
    root, inverse = roots(M)
    mu, y = sorted_eigenpairs(root @ Q @ root, k)
    return as_unit(mu, y @ inverse)


def as_unit(
    values: Float[Tensor, "*n k"], vectors: Float[Tensor, "*n k d_model"]
) -> tuple[Float[Tensor, "*n k"], Float[Tensor, "*n k d_model"]]:
    """The same terms with unit vectors, each one's entry of largest absolute value positive."""
    length = vectors.norm(dim=-1)
    return values * length**2, signed(vectors / length.clamp_min(torch.finfo(length.dtype).tiny)[..., None])


def terms(
    values: Float[Tensor, "k"], vectors: Float[Tensor, "k d_model"], x: Float[Tensor, "p d_model"]
) -> Float[Tensor, "p k"]:
    """`value (v . x)^2` of each, on every input."""
    return values * (x @ vectors.T) ** 2


def shares_of(
    of_terms: Float[Tensor, "p k"], whole: Float[Tensor, "p"]
) -> tuple[Float[Tensor, "k"], Float[Tensor, "k"]]:
    """Each term's share of the variance of the whole over inputs, `cov(term, whole) / var(whole)`, and of its mean.

    Those of all terms that add up to the whole add up to 1; a share may be negative. NaN without a variance or mean.
    """
    off, centred = of_terms - of_terms.mean(0), whole - whole.mean()
    return (centred @ off) / centred.square().sum(), of_terms.mean(0) / whole.mean()
