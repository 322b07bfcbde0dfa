"""From rough leading eigenvectors of interaction matrices to exact ones, in full precision.

What a search in low precision (`lanczos`, `block`) found is refined through the factors,

    Q_c v = 1/2 (L^T (c * R v) + R^T (c * L v))          L, R the branch rows, c one number per hidden unit

which are two matrix products, shared by every output of a batch:

1. Rayleigh-Ritz on the vectors found, and their true residuals
2. the error of every value, `min(r, r^2 / gap)` of its residual `r` (Kato-Temple), the gap being the distance to the
   nearest Ritz value outside the block, less what the search may have it wrong; and the rounding of the products
3. where that is too large, a Davidson correction, which inverts `Q - lambda` as the search knows it: its Ritz values on
   its own space, zero elsewhere; and again

Sources: Parlett, The Symmetric Eigenvalue Problem, chapters 11 to 13; Davidson 1975.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bilens.layer.eigen.pairs import by_magnitude, eigh

REFINEMENTS = 6
ROUNDING_SHARE = 0.25  # of the error allowed, for the rounding of the operator
VECTORS = 256  # oneDNN copies what it multiplies: so many at a time, and the copies stay in the cache


@dataclass(frozen=True)
class InteractionOperator:
    """`v -> Q_c v` for many `c`, in one dtype.

    Attributes:
        rows: `[L; R]`.
        swapped: `[R; L]` as columns, so that `L v` meets `R` on the way back.
    """

    rows: Float[Tensor, "two_d_mlp d_model"]
    swapped: Float[Tensor, "d_model two_d_mlp"]

    @classmethod
    def of(cls, left: Float[Tensor, "d_mlp d_model"], right: Float[Tensor, "d_mlp d_model"]) -> "InteractionOperator":
        return cls(torch.cat([left, right]), torch.cat([right, left]).T.contiguous())

    def to(self, dtype: torch.dtype) -> "InteractionOperator":
        return InteractionOperator(self.rows.to(dtype), self.swapped.to(dtype))

    @property
    def dtype(self) -> torch.dtype:
        return self.rows.dtype

    @cached_property
    def _prepared(self) -> tuple[Tensor, Tensor]:
        """On a CPU float32 products go through oneDNN, which is up to twice as fast as the default library on some."""
        if self.dtype == torch.float32 and self.rows.device.type == "cpu" and torch.backends.mkldnn.is_available():
            return self.rows.to_mkldnn(), self.swapped.to_mkldnn()
        return self.rows, self.swapped

    def __call__(
        self, vectors: Float[Tensor, "n p d_model"], half_c: Float[Tensor, "n d_mlp"]
    ) -> Float[Tensor, "n p d_model"]:
        """`Q v` of `p` vectors per output, in the operator's dtype.

        Args:
            half_c: `c / 2` in the operator's dtype.
        """
        n, p, d = vectors.shape
        rows, swapped = self._prepared
        at_once = max(1, VECTORS // p) if rows.is_mkldnn else max(1, n)
        result = vectors.new_empty(n, p, d, dtype=self.dtype)
        for start in range(0, n, at_once):
            part = slice(start, start + at_once)
            hidden = _times(vectors[part].reshape(-1, d).to(self.dtype), rows)
            hidden.view(-1, p, 2, half_c.shape[1]).mul_(half_c[part, None, None])
            result[part] = _times(hidden, swapped).view(-1, p, d)
        return result


def _times(x: Float[Tensor, "n i"], weight: Float[Tensor, "o i"]) -> Float[Tensor, "n o"]:
    if weight.layout == torch.strided:
        return x @ weight.T
    return torch.nn.functional.linear(x.to_mkldnn(), weight).to_dense()


@dataclass
class Leading:
    """The leading eigenpairs of a batch, by falling size up to `errors`.

    Attributes:
        values, vectors: unit vectors as rows.
        errors: estimated absolute error of each value; `residuals`: `||Q v - lambda v||`.
        steps: the number of steps of the search.
        resolved: false where the search did not converge, or not to the error allowed: the row is void.
    """

    values: Float[Tensor, "n k"]
    vectors: Float[Tensor, "n k d_model"]
    errors: Float[Tensor, "n k"]
    residuals: Float[Tensor, "n k"]
    steps: Int[Tensor, "n"]
    resolved: Bool[Tensor, "n"]

    @classmethod
    def empty(cls, n: int, k: int, like: Float[Tensor, "*any d_model"]) -> "Leading":
        zeros = like.new_zeros(n, k)
        steps = torch.zeros(n, dtype=torch.long, device=like.device)
        return cls(zeros, like.new_zeros(n, k, like.shape[-1]), zeros.clone(), zeros.clone(), steps, steps.bool())


@dataclass(frozen=True)
class Wanted:
    """What to look for.

    Attributes:
        k: the number of pairs.
        tolerance: relative error of each value.
        positive: those of largest value; otherwise of largest absolute value.
    """

    k: int
    tolerance: float
    positive: bool = False

    def size(self, values: Tensor) -> Tensor:
        """What the first pairs have most of."""
        return values if self.positive else values.abs()

    def in_order(self, values: Float[Tensor, "n j"], errors: Float[Tensor, "n j"]) -> Int[Tensor, "n j"]:
        """Places by falling size; of opposite values that are equal up to half their error, the positive first."""
        return values.argsort(dim=1, descending=True) if self.positive else by_magnitude(values, 0.5 * errors)


@dataclass
class Ritz:
    """Ritz pairs of a batch by falling size: `values` (n, j), `weights` (n, j, j) as rows, `residuals`."""

    values: Tensor
    weights: Tensor
    residuals: Tensor

    def take(self, index: Tensor) -> "Ritz":
        return Ritz(self.values[index], self.weights[index], self.residuals[index])

    def to(self, dtype: torch.dtype) -> "Ritz":
        return Ritz(*(t.to(dtype) for t in vars(self).values()))


def errors_of(
    values: Tensor, residuals: Tensor, spectrum: Tensor, inside: Tensor, blur: Tensor | float = 0.0
) -> Tensor:
    """`min(r, r^2 / gap)`, the gap to the nearest value of `spectrum` that is not `inside` the block (nor itself).

    The values of `spectrum` may be off by `blur`.
    """
    distance = (values[:, :, None] - spectrum[:, None, :]).abs()
    hidden = inside[:, None, :].expand_as(distance)
    if distance.shape[1] == distance.shape[2]:
        itself = torch.eye(distance.shape[1], dtype=torch.bool, device=values.device)
        hidden = (hidden & inside[:, :, None]) | itself
    gap = distance.masked_fill(hidden, torch.inf).amin(2) - blur
    return torch.minimum(residuals, residuals**2 / gap.clamp_min(torch.finfo(values.dtype).tiny))


def crowded(ritz: Ritz, wanted: Wanted, carried: int, blur: float) -> Bool[Tensor, "n"]:
    """Whether more Ritz values than are carried along are as large as the last one wanted, up to the search's blur.

    So they are behind a giant one.
    """
    size = wanted.size(ritz.values)
    last = size[:, min(wanted.k, size.shape[1]) - 1]
    tied = (size >= (last - blur * ritz.values.abs().amax(1))[:, None]).sum(1)
    return tied > carried


def refine(
    operator: InteractionOperator,
    half_c: Tensor,
    basis: Tensor,
    ritz: Ritz,
    tied: int,
    wanted: "Wanted",
    rounding: Float[Tensor, "n"],
    blur: float,
) -> Leading:
    """Rayleigh-Ritz in full precision on the `tied` first Ritz vectors, and Davidson corrections as long as needed.

    Args:
        operator: the operator, in full precision.
        half_c: `c / 2`.
        basis: the search's, orthonormal rows.
        ritz: all Ritz pairs on it.
        tied: the number of them that stand for the pairs wanted.
        wanted: the number of pairs, their order, and how exact they must be.
        rounding: the largest error that the operator's own rounding may cause in the values.
        blur: the largest error of the search, relative to the largest value.
    """
    (n, d), k = (len(half_c), basis.shape[-1]), wanted.k
    basis = basis[:, : ritz.values.shape[1]]
    result = Leading.empty(n, k, basis)
    at = torch.arange(n, device=basis.device)
    outer = ritz.values[:, tied:]
    space = torch.linalg.qr(torch.bmm(ritz.weights[:, :tied], basis).mT)[0].mT
    image = operator(space, half_c)
    for round_ in range(REFINEMENTS + 1):
        values, turn = _rayleigh_ritz(space, image, tied, wanted)
        residual = torch.bmm(turn, image) - values[..., None] * torch.bmm(turn, space)
        norms = residual.norm(dim=2)
        outside = torch.zeros_like(outer, dtype=torch.bool)
        off = blur * values.abs().amax(1)[:, None]
        errors = errors_of(values, norms, outer, outside, off) if outer.shape[1] else norms
        errors, norms = errors + rounding[at, None], norms + rounding[at, None]
        order = wanted.in_order(values, errors)
        values, norms, errors = (part.gather(1, order) for part in (values, norms, errors))
        turn, residual = (part.gather(1, order[..., None].expand_as(part)) for part in (turn, residual))
        vectors = torch.bmm(turn[:, :k], space)
        allowed = wanted.tolerance * values[:, :k].abs()
        done = (errors[:, :k] <= torch.maximum(allowed, 2 * rounding[at, None])).all(1)
        room = min(tied, d - space.shape[1])
        finished = done | (round_ == REFINEMENTS or room == 0)
        for name, found in (("values", values), ("vectors", vectors), ("errors", errors), ("residuals", norms)):
            getattr(result, name)[at[finished]] = found[finished, :k]
        # Behind a giant value, rounding alone may be more than what is allowed.
        exact = (errors[:, :k] <= allowed).all(1) & (rounding[at, None] <= ROUNDING_SHARE * allowed).all(1)
        result.resolved[at[finished]] = exact[finished]
        going = ~finished
        if not going.any():
            break
        at, half_c, basis, ritz, outer = at[going], half_c[going], basis[going], ritz.take(going), outer[going]
        new = _correction(basis, ritz, tied, values[going], residual[going])[:, :room]
        space, image = space[going], image[going]
        more = torch.linalg.qr(torch.cat([space, new], 1).mT)[0].mT[:, -room:]
        space, image = torch.cat([space, more], 1), torch.cat([image, operator(more, half_c)], 1)
    return result


def _rayleigh_ritz(x: Tensor, w: Tensor, count: int, wanted: "Wanted") -> tuple[Tensor, Tensor]:
    """The `count` first Ritz values on orthonormal rows `x` with `w = Q x`, and the rows' combinations."""
    product = torch.bmm(x, w.mT)
    values, columns = eigh(0.5 * (product + product.mT))
    order = wanted.size(values).argsort(dim=1, descending=True)[:, :count]
    return values.gather(1, order), columns.mT.gather(1, order[..., None].expand(-1, -1, columns.shape[1]))


def _correction(basis: Tensor, ritz: Ritz, tied: int, values: Tensor, residual: Tensor) -> Tensor:
    """`-(Q - lambda)^-1 r` with `Q` as the search knows it: its Ritz values on the Krylov space, zero elsewhere."""
    inner = torch.bmm(residual, basis.mT)
    weights = ritz.weights[:, tied:]
    shift = ritz.values[:, None, tied:] - values[..., None]
    # Those tied are corrected by Rayleigh-Ritz; a near-singular shift only says so.
    floor = (1e-4 * values.abs()).clamp_min(torch.finfo(values.dtype).tiny)[..., None]
    shift = torch.where(shift.abs() < floor, floor, shift)
    small = torch.bmm(torch.bmm(inner, weights.mT) / shift, weights)
    scale = torch.where(values == 0, floor[..., 0], values)[..., None]
    outer = (residual - torch.bmm(inner, basis)) / scale
    return outer - torch.bmm(small, basis)
