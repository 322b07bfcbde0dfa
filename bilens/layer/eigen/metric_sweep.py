"""The leading eigenpairs of `M^1/2 Q M^1/2` for many outputs, each with a metric of its own, without roots of any `M`.

What the metrics share is taken out once, and any factor of what is left serves instead of a root:

    M = S^1/2 (1 + OWN X'^T X' / n) S^1/2       X' = X S^-1/2       S = (1 - OWN) M_all + a small multiple of 1
    1 + OWN X'^T X' / n = F F^T                 Q' = S^1/2 Q S^1/2

`F^T Q' F` has the eigenvalues `mu` of `M^1/2 Q M^1/2`, and its eigenvectors `y` give `w = S^-1/2 F^-T y`: `M^1/2` is
`S^1/2 F` up to a rotation from the right. Per chunk of outputs and in lockstep:

1. form `F^T Q' F`, with `Q'` from the third-order tensor of the layer between `S^1/2` (`blocks.OutputTensor`), and
   search it by block Lanczos, multiplying in bfloat16 where the machine does that faster
2. Rayleigh-Ritz for `Q M w = mu w`, symmetric in the inner product `<a, b> = a^T M b`, on the first Ritz vectors, with
   `Q` and `M` as they are given, in full precision

Pairs whose residual is not small are solved whole (`metric.metric_eigenpairs`).
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bilens._core.checks import MEMORY, check_budget
from bilens.layer.bilinear import BilinearLayer, double, hidden_coefficients, interaction_matrix, search_dtype
from bilens.layer.eigen.blocks import OutputTensor
from bilens.layer.eigen.metric import OWN, as_unit, metric_eigenpairs, moment, roots
from bilens.layer.eigen.pairs import eigh
from bilens.layer.eigen.refine import InteractionOperator

CHUNK = 32  # outputs in lockstep
SPARE = 6  # vectors in a block beyond the pairs wanted
STEPS = 6
CARRIED = 4  # Ritz vectors to refine beyond the pairs wanted
RESIDUAL = 3e-2  # of mu; its error is about the square of that over the distance to the next


@dataclass(frozen=True)
class MetricPairs:
    """The leading pairs of every output.

    Attributes:
        mu: eigenvalues of `M^1/2 Q M^1/2`, by falling absolute value.
        norms: `||M^1/2 Q M^1/2||_F`, to about 1e-3 where the search is in bfloat16.
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
    inputs: Float[Tensor, "p d_model"],
    tokens_of: Callable[[int], Int[Tensor, "own"]],
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
        inputs: all inputs.
        tokens_of: which of them count for the output in a row.
        every: the second moment of all inputs.
        k: how many pairs.
        memory: bytes to work in.
        seed: the seed of the random start vectors.

    Raises:
        ArgumentError: less memory than the search needs.
    """
    d, d_mlp = layer.W_gate.shape
    coarse, chunk = search_dtype(u.dtype, u.device), min(CHUNK, len(u))
    formed = chunk * d**2 * (4 * coarse.itemsize + 2 * u.element_size())
    needed = OutputTensor.bytes_of(d, d_mlp, coarse) + formed
    check_budget(f"pairs in the metric of {len(u):,} outputs", needed, memory, "take eigen for a few outputs")
    metrics = _Metrics.of(inputs, every, coarse, u, memory - needed)
    tensor = OutputTensor.of(_between(layer, metrics.root), coarse, chunk)
    operator = InteractionOperator.of(layer.W_gate.T, layer.W_in.T).to(u.dtype)
    half_c = 0.5 * hidden_coefficients(layer, u)
    start = torch.randn(d, min(k + SPARE, d), generator=torch.Generator().manual_seed(seed)).to(u)
    start = torch.linalg.qr(start)[0]
    mu, values, vectors = u.new_empty(len(u), k), u.new_empty(len(u), k), u.new_empty(len(u), k, d)
    norms = u.new_empty(len(u))
    whole = torch.zeros(len(u), dtype=torch.bool, device=u.device)
    for rows in torch.arange(len(u)).split(CHUNK):
        own = [tokens_of(row) for row in rows.tolist()]
        factors, failed = metrics.factors(own)
        # Diagonals of ones, where a metric is much like that of all inputs: rounding would be off the same way in each.
        scale = factors.diagonal(dim1=1, dim2=2).mean(1)
        narrow = (factors / scale[:, None, None]).to(coarse)
        A = torch.bmm(narrow.mT, torch.bmm(tensor(u[rows]), narrow))
        y = _lanczos(A, start, min(k + CARRIED, d))
        w = torch.linalg.solve_triangular(factors.mT, y, upper=True).mT @ metrics.inverse
        refined, w, left = _rayleigh_ritz(w, metrics.times(w, own), operator, half_c[rows], k)
        residuals, found = torch.bmm(left @ metrics.root, factors).norm(dim=2), refined[:, :k]
        norms[rows] = (scale**4 * _rest(A.to(u.dtype), y) + refined.square().sum(1)).sqrt()
        mu[rows] = found
        # `Q M w / mu` is a power step closer, and longer by its residual, which is orthogonal to `w` in the metric.
        over = torch.where(found == 0, 1, found)
        w = (w + left / over[..., None]) * (1 + (residuals / over) ** 2).rsqrt()[..., None]
        values[rows], vectors[rows] = as_unit(found, w)
        # A larger one is as good as excluded where the k-th is resolved: a block finds several at once.
        unsure = failed | ((residuals > RESIDUAL * found.abs()) | ~residuals.isfinite()).any(1)
        for at in unsure.nonzero().flatten().tolist():
            row = int(rows[at])
            M = moment(inputs[own[at]], every)
            exact = metric_eigenpairs(double(interaction_matrix(layer, u[row])), M, k)
            values[row], vectors[row] = (part.to(u) for part in exact)
            mu[row] = (exact[0] * ((exact[1] @ M) * exact[1]).sum(1)).to(u)
            whole[row] = True
    return MetricPairs(mu, norms, values, vectors, whole)


def _between(layer: BilinearLayer, root: Float[Tensor, "d_model d_model"]) -> BilinearLayer:
    """The layer whose interaction matrices are `root Q root`."""
    root = root.to(layer.W_gate)
    return replace(layer, W_gate=root @ layer.W_gate, W_in=root @ layer.W_in)


@dataclass(frozen=True)
class _Metrics:
    """`M` of each output, `S^1/2 (1 + OWN X'^T X' / n) S^1/2`; without inputs of its own those of all count.

    Attributes:
        inputs, every: all of them, and their second moment.
        shared: `S`.
        root, inverse: `S^1/2` and `S^-1/2`.
        coarse: the dtype to search in.
        whitened: `X'` in it, of all inputs, where memory allows.
    """

    inputs: Float[Tensor, "p d_model"]
    every: Float[Tensor, "d_model d_model"]
    shared: Float[Tensor, "d_model d_model"]
    root: Float[Tensor, "d_model d_model"]
    inverse: Float[Tensor, "d_model d_model"]
    coarse: torch.dtype
    whitened: Float[Tensor, "p d_model"] | None

    @classmethod
    def of(cls, inputs: Tensor, every: Tensor, coarse: torch.dtype, like: Tensor, memory: int) -> "_Metrics":
        shared = moment(inputs[:0], double(every)) - OWN * double(every)
        parts = [every, shared, *roots(shared)]
        every, shared, root, inverse = (part.to(like) for part in parts)
        whitened = None
        if inputs.numel() * coarse.itemsize <= memory:
            whitened = inputs.new_empty(inputs.shape, dtype=coarse)
            for rows in torch.arange(len(inputs)).split(2**12):
                whitened[rows[0] : rows[-1] + 1] = inputs[rows[0] : rows[-1] + 1].to(like) @ inverse
        return cls(inputs, every, shared, root, inverse, coarse, whitened)

    def factors(self, own: list[Int[Tensor, "own"]]) -> tuple[Float[Tensor, "n d d"], Bool[Tensor, "n"]]:
        """`F` of each output, and where rounding left none."""
        d = len(self.root)
        factors = self.root.new_empty(len(own), d, d)
        info = torch.empty(len(own), dtype=torch.int32, device=factors.device)
        for at, tokens in enumerate(own):  # one after the other, in a CPU's cache
            x = self._whitened(tokens)
            if len(tokens):
                full = torch.mm(x.T, x).to(factors).mul_(OWN / len(tokens))
            else:
                full = OWN * self.inverse @ self.every @ self.inverse
            full.diagonal().add_(1)
            factors[at], info[at] = torch.linalg.cholesky_ex(full)
        factors[info != 0] = torch.eye(d).to(factors)
        return factors, info != 0

    def times(self, w: Float[Tensor, "n m d"], own: list[Int[Tensor, "own"]]) -> Float[Tensor, "n m d"]:
        """`M w`, in full precision."""
        images = w @ self.shared
        for tokens, vectors, image in zip(own, w, images, strict=True):
            if len(tokens):
                x = self.inputs.index_select(0, tokens).to(w)
                image.addmm_(vectors @ x.T, x, alpha=OWN / len(tokens))
            else:
                image.addmm_(vectors, self.every, alpha=OWN)
        return images

    def _whitened(self, tokens: Int[Tensor, "own"]) -> Float[Tensor, "own d_model"]:
        if self.whitened is not None:
            return self.whitened.index_select(0, tokens)
        return (self.inputs.index_select(0, tokens).to(self.inverse) @ self.inverse).to(self.coarse)


def _lanczos(A: Float[Tensor, "n d d"], start: Float[Tensor, "d p"], m: int) -> Float[Tensor, "n d m"]:
    """Orthonormal vectors that span the first `m` Ritz vectors of a block Krylov space."""
    (n, d, _), p = A.shape, start.shape[1]
    steps = max(1, min(STEPS, d // p))
    basis = start.new_empty(n, d, steps * p)
    images = torch.empty_like(basis)
    block = start.expand(n, -1, -1)
    for step in range(steps):
        at = slice(step * p, (step + 1) * p)
        if step:
            known = basis[:, :, : step * p]
            for _ in range(2):  # again: what rounding left
                block = _orthonormal(torch.baddbmm(block, known, torch.bmm(known.mT, block), alpha=-1))
        basis[:, :, at] = block
        block = torch.bmm(A, block.to(A.dtype)).to(start.dtype)
        images[:, :, at] = block
    small = torch.bmm(basis.mT, images)
    theta, turn = eigh(0.5 * (small + small.mT))
    first = theta.abs().argsort(dim=1, descending=True, stable=True)[:, :m]
    return torch.linalg.qr(torch.bmm(basis, turn.gather(2, first[:, None].expand(-1, turn.shape[1], -1))))[0]


def _rest(A: Float[Tensor, "n d d"], y: Float[Tensor, "n d m"]) -> Float[Tensor, "n"]:
    """`||(1 - y y^T) A (1 - y y^T)||_F^2`."""
    images = torch.bmm(A, y)
    inside = torch.bmm(y.mT, images)
    return (A.square().sum((1, 2)) - 2 * images.square().sum((1, 2)) + inside.square().sum((1, 2))).clamp_min(0)


def _rayleigh_ritz(
    w: Float[Tensor, "n m d"],
    images: Float[Tensor, "n m d"],
    operator: InteractionOperator,
    half_c: Float[Tensor, "n d_mlp"],
    k: int,
) -> tuple[Float[Tensor, "n m"], Float[Tensor, "n k d"], Float[Tensor, "n k d"]]:
    """From vectors `w` and `M w`, all `mu`; of the first `k` the `w` of length one in the metric, `Q M w - mu w`."""
    products = operator(images, half_c)
    cosines, small = torch.bmm(w, images.mT), torch.bmm(images, products.mT)
    lower, _ = torch.linalg.cholesky_ex(0.5 * (cosines + cosines.mT))
    small = torch.linalg.solve_triangular(lower, 0.5 * (small + small.mT), upper=False)
    small = torch.linalg.solve_triangular(lower, small.mT, upper=False)
    theta, turn = eigh(0.5 * (small + small.mT))
    order = theta.abs().argsort(dim=1, descending=True, stable=True)
    theta, turn = theta.gather(1, order), turn.gather(2, order[:, None].expand_as(turn))[:, :, :k]
    turn = torch.linalg.solve_triangular(lower.mT, turn, upper=True).mT
    w = torch.bmm(turn, w)
    return theta, w, torch.bmm(turn, products) - theta[:, :k, None] * w


def _orthonormal(block: Float[Tensor, "n d p"]) -> Float[Tensor, "n d p"]:
    """The block with columns orthonormal up to rounding, by Cholesky of their products."""
    cosines = torch.bmm(block.mT, block)
    scale = cosines.diagonal(dim1=1, dim2=2).clamp_min(1e-30).rsqrt()
    cosines = cosines * scale[:, :, None] * scale[:, None]
    cosines.diagonal(dim1=1, dim2=2).add_(1e-5)
    lower = torch.linalg.cholesky(cosines)
    return torch.bmm(block, torch.linalg.solve_triangular(lower, torch.diag_embed(scale), upper=False).mT)
