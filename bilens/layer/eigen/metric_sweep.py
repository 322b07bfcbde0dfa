"""The leading eigenpairs of `M^1/2 Q M^1/2` for many outputs, each with a metric of its own, without roots of any `M`.

The `w_k` of `metric` are eigenvectors of `Q M`, which is symmetric in the inner product `<a, b> = a^T M b`:

    Q M w = mu w        M = OWN X^T X / n + (1 - OWN) M_all + a small multiple of 1

Matrices `Q` are combinations of the layer's third-order tensor (`blocks.OutputTensor`).

Block Lanczos in that inner product, of several outputs in lockstep, all blocks kept orthogonal; then Rayleigh-Ritz.
Pairs whose residual is not small are solved whole (`metric.metric_eigenpairs`).
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from bilens._core.checks import MEMORY, check_budget
from bilens.layer.bilinear import BilinearLayer, double, interaction_matrix
from bilens.layer.eigen.blocks import OutputTensor
from bilens.layer.eigen.metric import FLOOR, OWN, as_unit, metric_eigenpairs, moment
from bilens.layer.eigen.pairs import eigh

CHUNK = 64  # outputs in lockstep
SPARE = 6  # vectors in a block beyond the pairs wanted
STEPS = 5
RESIDUAL = 3e-2  # of mu; its error is about the square of that over the distance to the next


@dataclass(frozen=True)
class MetricPairs:
    """The leading pairs of every output.

    Attributes:
        mu: eigenvalues of `M^1/2 Q M^1/2`, by falling absolute value.
        norms: `||M^1/2 Q M^1/2||_F`.
        values, vectors: the squares that they stand for, `value (v . x)^2`, with unit vectors.
        whole: which outputs were solved whole, the search not having converged.
    """

    mu: Float[Tensor, "n k"]
    norms: Float[Tensor, "n"]
    values: Float[Tensor, "n k"]
    vectors: Float[Tensor, "n k d_model"] = field(repr=False)
    whole: Bool[Tensor, "n"] = field(repr=False)


@torch.no_grad()
def leading_metric_pairs(
    layer: BilinearLayer,
    u: Float[Tensor, "n d_model"],
    inputs_of: Callable[[int], Float[Tensor, "p d_model"]],
    every: Float[Tensor, "d_model d_model"],
    k: int = 2,
    *,
    memory: int = MEMORY,
    seed: int = 0,
) -> MetricPairs:
    """The `k` leading pairs of every output direction in the metric of its inputs.

    Args:
        layer: its weights.
        u: output directions.
        inputs_of: the inputs that count for the output in a row.
        every: the second moment of all inputs.
        k: how many pairs.
        memory: bytes to work in.
        seed: the seed of the random start vectors.

    Raises:
        ArgumentError: less memory than the search needs.
    """
    d, d_mlp = layer.W_gate.shape
    chunk = min(CHUNK, len(u))
    needed = OutputTensor.bytes_of(d, d_mlp, u.dtype) + 3 * chunk * u.element_size() * d**2
    check_budget(f"pairs in the metric of {len(u):,} outputs", needed, memory, "take eigen for a few outputs")
    tensor = OutputTensor.of(layer, u.dtype, chunk)
    start = torch.randn(d, min(k + SPARE, d), generator=torch.Generator().manual_seed(seed)).to(u)
    mu, values, vectors = u.new_empty(len(u), k), u.new_empty(len(u), k), u.new_empty(len(u), k, d)
    norms = u.new_empty(len(u))
    whole = torch.zeros(len(u), dtype=torch.bool, device=u.device)
    for rows in torch.arange(len(u)).split(CHUNK):
        moments = _moments([inputs_of(row) for row in rows.tolist()], every.to(u))
        Q = tensor(u[rows])
        found, w, residuals = _lanczos(Q, moments, start, k)
        both = torch.bmm(moments, Q)
        mu[rows], norms[rows] = found, (both * both.mT).sum((1, 2)).clamp_min(0).sqrt()
        values[rows], vectors[rows] = as_unit(found, w)
        # A larger one is as good as excluded where the k-th is resolved: a block finds several at once.
        for at in ((residuals > RESIDUAL * found.abs()) | ~residuals.isfinite()).any(1).nonzero().flatten().tolist():
            row = int(rows[at])
            M = moment(inputs_of(row), every)
            exact = metric_eigenpairs(double(interaction_matrix(layer, u[row])), M, k)
            values[row], vectors[row] = (part.to(u) for part in exact)
            mu[row] = (exact[0] * ((exact[1] @ M) * exact[1]).sum(1)).to(u)
            whole[row] = True
    return MetricPairs(mu, norms, values, vectors, whole)


def _moments(inputs: list[Float[Tensor, "p d"]], every: Float[Tensor, "d d"]) -> Float[Tensor, "n d d"]:
    """`moment` of each, in the precision of the search."""
    shares = every.new_tensor([OWN if len(x) else 0.0 for x in inputs])
    lift = FLOOR * every.diagonal().sum() * torch.eye(len(every)).to(every)
    moments = (1 - shares)[:, None, None] * every + lift
    for share, x, own in zip(shares.tolist(), inputs, moments, strict=True):
        own.addmm_(x.T, x, alpha=share / max(len(x), 1))
    return moments


def _lanczos(
    Q: Float[Tensor, "n d d"], M: Float[Tensor, "n d d"], start: Float[Tensor, "d p"], k: int
) -> tuple[Float[Tensor, "n k"], Float[Tensor, "n k d"], Float[Tensor, "n k"]]:
    """`mu`, the `w` of length one in the metric, and residuals in the metric."""
    n, d, _ = Q.shape
    block = start.expand(n, -1, -1)
    basis: list[Tensor] = []
    images: list[Tensor] = []
    products: list[Tensor] = []
    for _ in range(max(1, min(STEPS, d // start.shape[1]))):
        if basis:
            known, of_known = torch.cat(basis, 2), torch.cat(images, 2)
            block = torch.baddbmm(block, known, torch.bmm(of_known.mT, block), alpha=-1)
        image = torch.bmm(M, block)
        if basis:  # again: what rounding left
            again = torch.bmm(of_known.mT, block)
            block, image = (
                torch.baddbmm(part, old, again, alpha=-1) for part, old in ((block, known), (image, of_known))
            )
        block, image = _orthonormal(block, image)
        basis.append(block)
        images.append(image)
        products.append(torch.bmm(Q, image))
        block = products[-1]
    whole, image, product = (torch.cat(parts, 2) for parts in (basis, images, products))
    small = torch.bmm(image.mT, product)
    theta, turn = eigh(0.5 * (small + small.mT))
    first = theta.abs().argsort(1, descending=True)[:, :k]
    theta, turn = theta.gather(1, first), turn.gather(2, first[:, None].expand(-1, turn.shape[1], -1))
    w = torch.bmm(whole, turn)
    left = torch.bmm(product, turn) - w * theta[:, None]
    residuals = (left * torch.bmm(M, left)).sum(1).clamp_min(0).sqrt()
    return theta, w.mT, residuals


def _orthonormal(
    block: Float[Tensor, "n d p"], image: Float[Tensor, "n d p"]
) -> tuple[Float[Tensor, "n d p"], Float[Tensor, "n d p"]]:
    """The block with columns orthonormal in the metric, and its image under it, by Cholesky of their products."""
    cosines = torch.bmm(block.mT, image)
    scale = cosines.diagonal(dim1=1, dim2=2).clamp_min(1e-30).rsqrt()
    cosines = cosines * scale[:, :, None] * scale[:, None]
    cosines = 0.5 * (cosines + cosines.mT) + 1e-6 * torch.eye(cosines.shape[1]).to(cosines)
    lower, _ = torch.linalg.cholesky_ex(cosines)
    turn = torch.linalg.solve_triangular(lower, torch.diag_embed(scale), upper=False).mT
    return torch.bmm(block, turn), torch.bmm(image, turn)
