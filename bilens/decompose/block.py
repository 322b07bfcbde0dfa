"""The leading eigenpairs of many interaction matrices at once, each of them formed, but cheaply.

Where there are many more outputs than d_model, forming all `Q` costs little: they are combinations of d_model matrices,

    Q_u = sum_a u_a T_a          T_a the interaction matrix of the layer's a-th output coordinate

so that one matrix product makes a chunk of them out of the third-order tensor `T`. In low precision they fit a CPU's
cache, where a block of vectors is multiplied in the time of one. Per output and in lockstep:

1. a block of random orthonormal vectors, the same for all
2. filter: a Chebyshev polynomial of `Q / b` keeps what has eigenvalues in [-b, b] from growing, of either sign, and
   lets the rest grow faster than any other polynomial of its degree. `b` is the bulk of the spectrum: at first what
   random numbers of the same norm would have, then a Ritz value in the middle of the block. The degree is short of
   where the largest eigenvector would drown the others in rounding
3. orthonormalise; after some filters Rayleigh-Ritz on the block: outputs whose pairs wanted have residuals down at the
   rounding, or small against their distance to the rest of the spectrum, are done; the others go on
4. refine, in full precision, through the factors (`refine`)

Whatever is missed must have next to nothing in all the vectors that the block starts from, and would then still be
filtered up faster than the pairs found: sixteen random vectors make that as unlikely as nothing else here.

Sources: Saad, Numerical Methods for Large Eigenvalue Problems, sections 5.1 and 7.4; Zhou and Saad 2007.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from bilens.decompose.refine import InteractionOperator, Leading, Ritz, eigh, refine
from bilens.decompose.tensors import BilinearLayer

BLOCK, SPARE = 16, 4  # vectors at least; and at least so many times the pairs wanted
BEYOND = 2  # of them to refine: they may turn out to be the larger ones
CHECKS = 6
# Growth of the largest eigenvector over the bulk in one filter: beyond, bfloat16 loses the others.
GROWTH, SHORTEST, LONGEST = 100.0, 2, 12
# Done: residual over eigenvalue, a few roundings of bfloat16; or over the distance to the rest of the spectrum.
ROUNDING, CLOSENESS = 5e-3, 1e-2
COORDINATES = 8  # of T at a time


@dataclass(frozen=True)
class OutputTensor:
    """`T`: the interaction matrix of every output coordinate, flattened, in the dtype to search in."""

    matrices: Float[Tensor, "d_model d_model_squared"]

    @classmethod
    def of(cls, layer: BilinearLayer, dtype: torch.dtype) -> "OutputTensor":
        left, right, out = (t.to(dtype) for t in (layer.W_gate, 0.5 * layer.W_in.T, layer.W_out))
        d, d_mlp = left.shape
        matrices = left.new_empty(d, d, d)
        # The same memory for every few coordinates: fresh pages cost as much as the products.
        scaled, raw = left.new_empty(COORDINATES, d, d_mlp), left.new_empty(COORDINATES * d, d)
        for start in range(0, d, COORDINATES):
            c = out[:, start : start + COORDINATES].T
            n = len(c)
            torch.mul(left, c[:, None], out=scaled[:n])
            torch.mm(scaled[:n].flatten(0, 1), right, out=raw[: n * d])
            half = raw[: n * d].view(n, d, d)
            torch.add(half, half.mT, out=matrices[start : start + n])
        return cls(matrices.flatten(1))

    def __call__(self, u: Float[Tensor, "n d_model"]) -> Float[Tensor, "n d_model d_model"]:
        """The interaction matrices of output directions."""
        d = len(self.matrices)
        return (u.to(self.matrices.dtype) @ self.matrices).view(len(u), d, d)


@torch.no_grad()
def leading_eigenpairs_of_blocks(
    operator: InteractionOperator,
    tensor: OutputTensor,
    u: Float[Tensor, "n d_model"],
    c: Float[Tensor, "n d_mlp"],
    k: int,
    *,
    tolerance: float,
    seed: int = 0,
) -> Leading:
    """The `k` eigenpairs of largest absolute value of every `Q_u`.

    Args:
        operator: in the precision of the result.
        tensor: of the same layer.
        u: scaled so that `||Q_u||_F = 1`.
        c: their coefficients of the hidden units.
        k: `block_size(k)` is at most d_model.
        tolerance: relative error of the eigenvalues to reach; rounding of the dtype is allowed on top.
        seed: of the random start vectors.
    """
    n, d = u.shape
    result = Leading.empty(n, k, operator.rows)
    matrices = tensor(u)
    index = torch.arange(n, device=u.device)
    going = torch.ones(n, dtype=torch.bool, device=u.device)
    block = _random_block(d, k, seed, matrices).expand(n, -1, -1)
    bulk = matrices.new_full((n, 1, 1), 2 / math.sqrt(d), dtype=torch.float32)
    degree, products = 3, 0
    for check in range(CHECKS):
        # The first time the bulk is a guess, and three short filters do better than a long one.
        for _ in range(3 if check == 0 else 1):
            block = _orthonormal(_filter(matrices, block, bulk, degree)).to(matrices.dtype)
            products += degree
        image = torch.bmm(block, matrices).float()
        products += 1
        ritz, vectors = _rayleigh_ritz(block.float(), image)
        done = going & _converged(ritz, k)
        if done.any():
            basis, known = vectors[done].to(operator.dtype), ritz.take(done).to(operator.dtype)
            found = refine(operator, 0.5 * c[index[done]], basis, known, k + BEYOND, k, tolerance)
            found.steps[:] = products
            for name, values in vars(found).items():
                getattr(result, name)[index[done]] = values
        going &= ~done
        if not going.any():
            break
        bulk = ritz.values[:, block.shape[1] // 2].abs()[:, None, None]
        # One degree for all: the median output's.
        growth = (ritz.values[going, 0].abs() / bulk[going, 0, 0].clamp_min(1e-12)).median().clamp_min(1.02)
        degree = max(SHORTEST, min(LONGEST, round(math.acosh(GROWTH) / math.acosh(float(growth)))))
        if 2 * going.sum() < len(going):  # copying the matrices costs more than a few products too many
            index, block, bulk, matrices = index[going], block[going], bulk[going], matrices[going]
            going = going[going]
    return result


def block_size(k: int) -> int:
    """Vectors multiplied at a time to find `k`."""
    return max(BLOCK, SPARE * k)


def _random_block(d: int, k: int, seed: int, like: Tensor) -> Float[Tensor, "p d"]:
    vectors = torch.randn(d, block_size(k), generator=torch.Generator().manual_seed(seed))
    return torch.linalg.qr(vectors)[0].T.to(like.device, like.dtype)


def _filter(
    matrices: Float[Tensor, "n d d"], block: Float[Tensor, "n p d"], bulk: Float[Tensor, "n 1 1"], degree: int
) -> Float[Tensor, "n p d"]:
    """The Chebyshev polynomial of `Q / bulk`, applied to every row."""
    twice = (2 / bulk.clamp_min(1e-12)).to(block.dtype)
    before, now = block, torch.bmm(block * (0.5 * twice), matrices)
    for _ in range(degree - 1):
        before, now = now, torch.baddbmm(before, now * twice, matrices, beta=-1)
    return now


def _orthonormal(block: Float[Tensor, "n p d"]) -> Float[Tensor, "n p d"]:
    """An orthonormal basis of the rows, up to rounding: Cholesky of their cosines."""
    rows = block.float()
    rows = rows / rows.norm(dim=2, keepdim=True).clamp_min(1e-30)
    cosines = torch.bmm(rows, rows.mT)
    # Rows that have become parallel in low precision must not stop the others.
    cosines.diagonal(dim1=1, dim2=2).add_(1e-5)
    lower = torch.linalg.cholesky(cosines)
    inverse = torch.linalg.solve_triangular(lower, torch.eye(len(lower[0])).to(lower).expand_as(lower), upper=False)
    return torch.bmm(inverse, rows)


def _rayleigh_ritz(block: Float[Tensor, "n p d"], image: Float[Tensor, "n p d"]) -> tuple[Ritz, Tensor]:
    product = torch.bmm(block, image.mT)
    values, columns = eigh(0.5 * (product + product.mT))
    order = values.abs().argsort(dim=1, descending=True)
    values, turn = values.gather(1, order), columns.mT.gather(1, order[..., None].expand_as(columns))
    vectors = torch.bmm(turn, block)
    residuals = (torch.bmm(turn, image) - values[..., None] * vectors).norm(dim=2)
    unit = torch.eye(len(values[0])).to(turn).expand_as(turn)
    return Ritz(values, unit, residuals), vectors


def _converged(ritz: Ritz, k: int) -> Tensor:
    size, residuals = ritz.values.abs(), ritz.residuals[:, :k]
    distance = size[:, :k] - size[:, -1:]
    return ((residuals <= ROUNDING * size[:, :k]) | (residuals <= CLOSENESS * distance)).all(1)
