"""The leading eigenpairs of many interaction matrices at once, each of them formed, but cheaply.

Where there are many more outputs than d_model, forming all `Q` costs little: they are combinations of d_model matrices,

    Q_u = sum_a u_a T_a          T_a the interaction matrix of the layer's a-th output coordinate

so that one matrix product makes a chunk of them out of the third-order tensor `T`. In low precision some of them fit a
CPU's cache at a time, where a block of vectors is multiplied in the time of one. Per output and in lockstep:

1. a block of random orthonormal vectors, the same for all
2. filter: a Chebyshev polynomial of `Q / b` keeps what has eigenvalues in [-b, b] from growing, of either sign, and
   lets the rest grow faster than any other polynomial of its degree. `b` is the bulk of the spectrum: at first less
   than what random numbers of the same norm would have, then a Ritz value in the middle of the block. The degree is
   short of where the largest eigenvector would drown the others in rounding
3. orthonormalise; after some filters Rayleigh-Ritz on the block: outputs whose pairs wanted have residuals down at the
   rounding, or small against their distance to the rest of the spectrum, are done; the others go on. Where a pair
   wanted lies in [-b, b] of any filter, a larger one there may be at a zero of the polynomial, and so filtered out:
   such an output is left to the caller
4. refine, in full precision, through the factors (`refine`)

Whatever else is missed must have next to nothing in all the vectors that the block starts from, and would then still be
filtered up faster than the pairs found.

Sources: Saad, Numerical Methods for Large Eigenvalue Problems, sections 5.1 and 7.4; Zhou and Saad 2007.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bilens.layer.bilinear import BilinearLayer
from bilens.layer.eigen.pairs import eigh
from bilens.layer.eigen.refine import InteractionOperator, Leading, Ritz, Wanted, crowded, refine

BLOCK, SPARE = 16, 4  # vectors at least; and at least so many times the pairs wanted
BEYOND = 2  # of them to refine: they may turn out to be the larger ones
CHECKS = 6
BULK = 1.8  # over sqrt(d), of matrices of norm one: the first guess, below the 2 where a random spectrum ends
# Growth of the largest eigenvector over the bulk in one filter: beyond, bfloat16 loses the others.
GROWTH, SHORTEST, LONGEST = 100.0, 2, 12
MOST_GROWTH = 1e15  # of any output's: a matrix of low rank has no bulk to speak of, and float32 squares what has grown
# Done: residual over eigenvalue, a few roundings of bfloat16; or over the distance to the rest of the spectrum.
ROUNDING, CLOSENESS = 5e-3, 1e-2
ROWS = 32  # of T's matrices at a time
# Matrices multiplied again and again: so many bytes of them stay in a CPU's cache; elsewhere so many at a time.
CACHE, MANY = 2**22, 256


@dataclass(frozen=True)
class OutputTensor:
    """`T`: the interaction matrix of every output coordinate, flattened, in the dtype to search in.

    Attributes:
        matrices: `T`.
        scratch: memory for the combinations, a chunk at a time: fresh memory would cost as much as the product.
    """

    matrices: Float[Tensor, "d_model d_model_squared"]
    scratch: Float[Tensor, "chunk d_model_squared"]

    @classmethod
    def of(cls, layer: BilinearLayer, dtype: torch.dtype, chunk: int) -> "OutputTensor":
        """From the lower triangle of the symmetric products of the branches, `1/2 (L_hi R_hj + R_hi L_hj)`."""
        left, right, out = (t.T.to(dtype).contiguous() for t in (layer.W_gate, layer.W_in, layer.W_out))
        d_mlp, d = left.shape
        first, second = torch.stack([left, right], 2), 0.5 * torch.stack([right, left], 1)
        matrices = left.new_empty(d, d, d)
        products, sums = left.new_empty(d_mlp * ROWS * d), left.new_empty(d * ROWS * d)
        for start in range(0, d, ROWS):
            stop = min(start + ROWS, d)
            size = (stop - start) * stop
            pairs = products[: d_mlp * size].view(d_mlp, stop - start, stop)
            torch.bmm(first[:, start:stop], second[:, :, :stop], out=pairs)
            part = torch.mm(out, pairs.flatten(1), out=sums[: d * size].view(d, size)).view(d, stop - start, stop)
            matrices[:, start:stop, :stop] = part
            matrices[:, :start, start:stop] = part[:, :, :start].mT
        return cls(matrices.flatten(1), left.new_empty(chunk, d * d))

    @staticmethod
    def bytes_of(d_model: int, d_mlp: int, dtype: torch.dtype) -> int:
        """What making it takes at most, without the scratch."""
        return dtype.itemsize * (d_model**3 + ROWS * d_model * (d_mlp + d_model))

    def __call__(self, u: Float[Tensor, "n d_model"]) -> Float[Tensor, "n d_model d_model"]:
        """The interaction matrices of up to `chunk` output directions, until the next call."""
        d = len(self.matrices)
        return torch.mm(u.to(self.matrices.dtype), self.matrices, out=self.scratch[: len(u)]).view(len(u), d, d)


@torch.no_grad()
def leading_eigenpairs_of_blocks(
    operator: InteractionOperator,
    tensor: OutputTensor,
    u: Float[Tensor, "n d_model"],
    c: Float[Tensor, "n d_mlp"],
    wanted: Wanted,
    rounding: Float[Tensor, "n"],
    *,
    seed: int = 0,
) -> Leading:
    """The eigenpairs of largest absolute value of every `Q_u`.

    Args:
        operator: the operator, in the precision of the result.
        tensor: of the same layer.
        u: scaled so that `||Q_u||_F = 1`.
        c: their coefficients of the hidden units.
        wanted: the pairs wanted, by absolute value; `block_size(k)` is at most d_model.
        rounding: the largest error that the operator's own rounding may cause in the values.
        seed: the seed of the random start vectors.
    """
    (n, d), k = u.shape, wanted.k
    blur = 0.5 * torch.finfo(torch.bfloat16).eps  # whatever dtype the tensor has: what is done has residuals like that
    matrices = tensor(u)
    block = _random_block(d, k, seed, matrices).expand(n, -1, -1)
    bulk = matrices.new_full((n, 1, 1), BULK / math.sqrt(d), dtype=torch.float32)
    damped = bulk[:, 0, 0]  # up to here a filter may have taken eigenvectors out
    index, done_at = torch.arange(n, device=u.device), torch.zeros(n, dtype=torch.long, device=u.device)
    basis = operator.rows.new_empty(n, d, block.shape[2])
    known = Ritz(*(basis.new_empty(n, *shape) for shape in ((block.shape[2],), 2 * (block.shape[2],), (k,))))
    degree, products = 3, 0
    for check in range(CHECKS):
        # The first time the bulk is a guess, and three short filters do better than a long one.
        times = 3 if check == 0 else 1
        block, image = _advance(matrices, index, block, bulk, degree, times)
        products += degree * times + 1
        wide = block.float()
        ritz = _rayleigh_ritz(wide, image.float(), k)
        converged, last = _converged(ritz, k), ritz.values[:, k - 1].abs()
        hopeless = crowded(ritz, wanted, k + BEYOND, blur) | (converged & (last <= damped))
        done = converged & ~hopeless
        at = index[done]
        basis[at] = wide[done].to(basis)
        for name, part in vars(ritz).items():
            getattr(known, name)[at] = part[done].to(basis)
        done_at[at] = products
        going = ~done & ~hopeless
        if not going.any():
            break
        index, block, damped = index[going], block[going], damped[going]
        sizes = ritz.values[going].abs()
        bulk = sizes[:, block.shape[2] // 2, None, None]
        # One degree for all: the median output's.
        growth = (sizes[:, 0] / bulk[:, 0, 0].clamp_min(1e-12)).median().clamp_min(1.02)
        degree = max(SHORTEST, min(LONGEST, round(math.acosh(GROWTH) / math.acosh(float(growth)))))
        bulk = torch.maximum(bulk, sizes[:, :1, None] / math.cosh(math.acosh(MOST_GROWTH) / degree))
        damped = torch.maximum(damped, bulk[:, 0, 0])
    result = Leading.empty(n, k, operator.rows)
    rows = done_at.nonzero().flatten()
    if len(rows):
        parts = (operator, 0.5 * c[rows], basis[rows].mT, known.take(rows))
        refined = refine(*parts, k + BEYOND, wanted, rounding[rows], blur)
        refined.steps[:] = done_at[rows]
        for name, part in vars(refined).items():
            getattr(result, name)[rows] = part
    return result


def block_size(k: int) -> int:
    """Vectors multiplied at a time to find `k`."""
    return max(BLOCK, SPARE * k)


def outputs_at_hand(d_model: int, dtype: torch.dtype, device: torch.device) -> int:
    """How many matrices are multiplied at a time."""
    return max(1, CACHE // (dtype.itemsize * d_model**2)) if device.type == "cpu" else MANY


def _random_block(d: int, k: int, seed: int, like: Tensor) -> Float[Tensor, "d p"]:
    vectors = torch.randn(d, block_size(k), generator=torch.Generator().manual_seed(seed))
    return torch.linalg.qr(vectors)[0].to(like.device, like.dtype)


def _advance(
    matrices: Float[Tensor, "m d d"],
    index: Int[Tensor, "n"],
    block: Float[Tensor, "n d p"],
    bulk: Float[Tensor, "n 1 1"],
    degree: int,
    times: int,
) -> tuple[Float[Tensor, "n d p"], Float[Tensor, "n d p"]]:
    """Filter the blocks of some outputs so many times; the new blocks and their products with the matrices.

    A few outputs after the others, each with all that is to be done, so that their matrices stay in the cache.
    """
    n, d, _ = block.shape
    few = outputs_at_hand(d, matrices.dtype, matrices.device)
    blocks, images = block.new_empty(block.shape), block.new_empty(block.shape)
    for start in range(0, n, few):
        rows = slice(start, start + few)
        some = matrices[rows] if n == len(matrices) else matrices[index[rows]]
        part = block[rows]
        for _ in range(times):
            part = _orthonormal(_filter(some, part, bulk[rows], degree)).to(part.dtype)
        blocks[rows] = part
        torch.bmm(some, part, out=images[rows])
    return blocks, images


def _filter(
    matrices: Float[Tensor, "n d d"], block: Float[Tensor, "n d p"], bulk: Float[Tensor, "n 1 1"], degree: int
) -> Float[Tensor, "n d p"]:
    """The Chebyshev polynomial of `Q / bulk`, applied to every column."""
    twice = (2 / bulk.clamp_min(1e-12)).to(block.dtype)
    before, now = block, torch.bmm(matrices, block * (0.5 * twice))
    for _ in range(degree - 1):
        before, now = now, torch.baddbmm(before, matrices, now * twice, beta=-1)
    return now


def _orthonormal(block: Float[Tensor, "n d p"]) -> Float[Tensor, "n d p"]:
    """An orthonormal basis of the columns, up to rounding: Cholesky of their cosines."""
    columns = block.float()
    cosines = torch.bmm(columns.mT, columns)
    scale = cosines.diagonal(dim1=1, dim2=2).clamp_min(1e-30).rsqrt()
    cosines *= scale[:, :, None] * scale[:, None]
    # Columns that have become parallel in low precision must not stop the others.
    cosines.diagonal(dim1=1, dim2=2).add_(1e-5)
    lower = torch.linalg.cholesky(cosines)
    inverse = torch.linalg.solve_triangular(lower, torch.eye(len(lower[0])).to(lower).expand_as(lower), upper=False)
    return torch.bmm(columns, (inverse * scale[:, None]).mT)


def _rayleigh_ritz(block: Float[Tensor, "n d p"], image: Float[Tensor, "n d p"], k: int) -> Ritz:
    """Ritz pairs on the columns of a block; residuals of the first `k`."""
    product = torch.bmm(block.mT, image)
    values, columns = eigh(0.5 * (product + product.mT))
    order = values.abs().argsort(dim=1, descending=True)
    values, turn = values.gather(1, order), columns.mT.gather(1, order[..., None].expand_as(columns))
    first = turn[:, :k]
    residuals = torch.bmm(first, image.mT) - values[:, :k, None] * torch.bmm(first, block.mT)
    return Ritz(values, turn, residuals.norm(dim=2))


def _converged(ritz: Ritz, k: int) -> Tensor:
    size, residuals = ritz.values.abs(), ritz.residuals[:, :k]
    distance = size[:, :k] - size[:, -1:]
    return ((residuals <= ROUNDING * size[:, :k]) | (residuals <= CLOSENESS * distance)).all(1)
