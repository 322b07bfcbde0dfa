"""The leading eigenpairs of many interaction matrices at once, without forming any of them.

    Q_c v = 1/2 (L^T (c * R v) + R^T (c * L v))          L, R the branch rows, c one number per hidden unit

is two matrix products, shared by every output of a batch. On them, per output and in lockstep:

1. search: Lanczos with full orthogonalisation, all from the same random vector, every vector rounded to bfloat16
   before it is multiplied (and multiplied in bfloat16, where the machine does that faster). The rounding is no loss:
   Lanczos never finds what its start vector has nothing of, and this mixes in a thousandth of everything at each step
2. check, every few steps, on the small projected matrix: the pairs wanted, and any Ritz value too close to them to be
   told apart after the rounding, have converged, and no other Ritz value reaches them within its residual
3. probe: a small residual says that a pair is an eigenpair, not that no larger one was missed because the start vector
   had too little of it. What is missing grows with every step, so the check has to pass for some steps more; then a
   second random vector is driven for a few steps in the complement of the whole Krylov space, where what was missed is
   what is largest. If it, its residual and what the first Krylov space may hold of it reach the pairs found, the
   search goes on
4. refine, in full precision: Rayleigh-Ritz on the vectors found, their true residuals, and Davidson corrections until
   the error is as small as asked. The correction inverts `Q - lambda` on the search's Krylov space, so one is enough

What does not converge (it is rare) is marked, for the caller to solve otherwise.

The errors reported are `min(r, r^2 / gap)` of the residual `r` (Kato-Temple), the gap being the distance to the nearest
Ritz value outside the block. Sources: Parlett, The Symmetric Eigenvalue Problem, chapters 11 to 13; Davidson 1975.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bilens.decompose.eigen import by_magnitude

FIRST_CHECK, CHECK_EVERY, MAX_STEPS = 12, 4, 192
CONFIRM = 1.1  # times the steps of the first check that passes, until the probe
PROBE_STEPS, PROBE_SHARE = 8, 4  # eight steps at least, or a quarter of those of the search
REFINEMENTS = 6
# Of the search: rounding to bfloat16 leaves Ritz values off by up to two thousandths.
BLUR, SEARCH_TOLERANCE = 4e-3, 1e-5
MAX_TIED = 4  # Ritz values carried along because they may belong to the pairs wanted
# A Ritz value below the pairs wanted may be that of a larger eigenvalue in the making. Close to them, its residual is
# then about as large as its way. And where the eigenvector has a share p in the Krylov space, the Ritz value is about p
# and the squared residual p (1 - p), in units of the eigenvalue; the probe sees the rest, 1 - p.
REACH, NEAR, SHARE = 1.5, 0.7, 0.08


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
        hidden = _times(vectors.reshape(n * p, d).to(self.dtype), rows)
        hidden.view(n, p, 2, -1).mul_(half_c[:, None, None])
        return _times(hidden, swapped).view(n, p, d)


def tied_units(dtype: torch.dtype, tolerance: float) -> int:
    """Up to how many units of rounding values of opposite sign count as equally large: a part of their error, and more
    than `eigh` of a finished matrix leaves, because products of the factors are less exact."""
    return int(max(64, 0.25 * tolerance / torch.finfo(dtype).eps))


def _times(x: Float[Tensor, "n i"], weight: Float[Tensor, "o i"]) -> Float[Tensor, "n o"]:
    if weight.layout == torch.strided:
        return x @ weight.T
    return torch.nn.functional.linear(x.to_mkldnn(), weight).to_dense()


@dataclass
class Leading:
    """The leading eigenpairs of a batch, by falling absolute value up to `errors`.

    Attributes:
        values, vectors: unit vectors as rows.
        errors: estimated absolute error of each value; `residuals`: `||Q v - lambda v||`.
        steps: of the search.
        resolved: false where the search did not converge: the row is void.
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


@dataclass
class _Ritz:
    """Ritz pairs of a batch by falling absolute value: `values` (n, j), `weights` (n, j, j) as rows, `residuals`."""

    values: Tensor
    weights: Tensor
    residuals: Tensor

    def take(self, index: Tensor) -> "_Ritz":
        return _Ritz(self.values[index], self.weights[index], self.residuals[index])


@torch.no_grad()
def leading_eigenpairs(
    operator: InteractionOperator,
    search: InteractionOperator,
    c: Float[Tensor, "n d_mlp"],
    k: int,
    *,
    tolerance: float,
    seed: int = 0,
) -> Leading:
    """The `k` eigenpairs of largest absolute value of every `Q_c`.

    Args:
        operator: in the precision of the result.
        search: the same operator, in the dtype to search in.
        c: coefficients of the hidden units, scaled so that the numbers of `Q_c` are of order one.
        k: small against d_model.
        tolerance: relative error of the eigenvalues to reach; rounding of the dtype is allowed on top.
        seed: of the random start vectors.
    """
    n, d = len(c), operator.rows.shape[1]
    result = Leading.empty(n, k, operator.rows)
    half = 0.5 * c
    nothing = operator.rows.new_empty(n, 0, d)
    lanczos = _Lanczos(search, half.to(search.dtype), nothing, seed)
    index = torch.arange(n, device=c.device)
    passing_since = torch.zeros(n, dtype=torch.long, device=c.device)  # 0: the last check did not pass
    proven = operator.rows.new_zeros(n)  # by a probe: the k wanted are this large at least
    for steps in _schedule(d, k):
        lanczos.advance(steps)
        ritz = lanczos.ritz()
        count, passed, share = _check(ritz, k)
        passing_since = torch.where(passed, passing_since.masked_fill(passing_since == 0, steps), 0)
        last = ritz.values[:, min(k, steps) - 1].abs()
        rows = passed & (steps >= CONFIRM * passing_since) & (last >= (1 - BLUR) * proven)
        largest, reach = _probe(lanczos, rows)
        proven[rows] = largest
        done = rows.clone()
        done[rows] = reach <= (1 - share[rows]) * last[rows]
        done |= steps == d
        for tied in count[done].unique().tolist():
            rows = (done & (count == tied)).nonzero().flatten()
            found = _refine(operator, half[index[rows]], lanczos.basis[rows], ritz.take(rows), tied, k, tolerance)
            found.steps[:] = steps
            for name, values in vars(found).items():
                getattr(result, name)[index[rows]] = values
        index, passing_since, proven = index[~done], passing_since[~done], proven[~done]
        if not len(index):
            break
        lanczos.keep(~done)
    return result


def _schedule(d: int, k: int) -> Iterator[int]:
    """When to look: every few steps, at wider intervals later; at last, when the Krylov space is everything."""
    last, steps = min(d, max(MAX_STEPS, 8 * k)), max(FIRST_CHECK, 3 * k)
    while steps < last:
        yield steps
        steps += max(CHECK_EVERY, steps // 5)
    yield last


class _Lanczos:
    """A batch of Lanczos runs in lockstep: an orthonormal basis each, and `Q` projected on it.

    The projection is kept whole, not only its three diagonals: with rounded vectors it is the better approximation. A
    run whose Krylov space is exhausted goes on from a fresh random vector.
    """

    def __init__(self, operator: InteractionOperator, half_c: Tensor, deflate: Float[Tensor, "n p d_model"], seed: int):
        self.operator, self.half_c, self.seed = operator, half_c, seed
        self.deflate = deflate  # the complement of these is searched; everything around the products has their dtype
        # (n, steps + 1, d): the last is where the next step starts
        self.basis = self._fresh(self.deflate)[:, None]
        self.projected = self.basis.new_zeros(len(half_c), 0, 0)  # (n, steps, steps), lower triangle
        self.ahead = self.basis.new_zeros(len(half_c))  # length of what the last step found outside the basis

    def advance(self, steps: int) -> None:
        """Go on to `steps` steps."""
        (n, done, d), old = self.basis.shape, self.basis
        self.basis = old.new_empty(n, steps + 1, d)
        self.basis[:, :done] = old
        projected = old.new_zeros(n, steps, steps)
        projected[:, : done - 1, : done - 1] = self.projected
        for j in range(done - 1, steps):
            basis = self.basis[:, : j + 1]
            image = self.operator(basis[:, j:].bfloat16(), self.half_c)[:, 0].to(basis.dtype)
            along = _along(basis, image)
            projected[:, j, : j + 1] = along
            w = image - _combine(along, basis)
            if self.deflate.shape[1]:
                w = w - _combine(_along(self.deflate, w), self.deflate)
            # Once more against the two it was nearly parallel to: the others were orthogonal up to rounding.
            last = basis[:, max(0, j - 1) :]
            w = w - _combine(_along(last, w), last)
            length = w.norm(dim=1)
            # What is left of a vector after its projections are rounding.
            exhausted = length <= 16 * torch.finfo(w.dtype).eps * image.norm(dim=1)
            if exhausted.any():
                w[exhausted], length[exhausted] = self._fresh(torch.cat([self.deflate, basis], 1)[exhausted]), 0.0
            self.basis[:, j + 1] = w / torch.where(length > 0, length, 1.0)[:, None]
        self.projected = projected
        self.ahead = length if steps + self.deflate.shape[1] < d else torch.zeros_like(length)

    def _fresh(self, basis: Tensor) -> Float[Tensor, "n d_model"]:
        """Random unit vectors orthogonal to every basis; zeros where there is no room."""
        n, j, d = basis.shape
        if j >= d:
            return basis.new_zeros(n, d)
        w = _random_unit(d, self.seed + j, basis).expand(n, d).clone()
        for _ in range(2 if j else 0):
            w = w - _combine(_along(basis, w), basis)
            w = w / w.norm(dim=1, keepdim=True)
        return w

    def ritz(self) -> _Ritz:
        values, columns = _eigh(self.projected)
        order = values.abs().argsort(dim=1, descending=True)
        rows = columns.mT.gather(1, order[..., None].expand_as(columns))
        return _Ritz(values.gather(1, order), rows, self.ahead[:, None] * rows[:, :, -1].abs())

    def keep(self, alive: Bool[Tensor, "n"]) -> None:
        for name in ("basis", "projected", "ahead", "half_c", "deflate"):
            setattr(self, name, getattr(self, name)[alive])


def _check(ritz: _Ritz, k: int) -> tuple[Int[Tensor, "n"], Bool[Tensor, "n"], Float[Tensor, "n"]]:
    """Have the pairs wanted converged?

    Returns:
        How many Ritz pairs stand for the `k` wanted, those tied with the last in the search's precision included;
        whether they have converged and nothing else is on its way to them; and how large a share of such a one may
        already be in the Krylov space.
    """
    size, steps = ritz.values.abs(), ritz.values.shape[1]
    k = min(k, steps)
    last = size[:, k - 1]
    tied = (size >= (last - BLUR * size[:, 0])[:, None]).sum(1).clamp(max=min(k + MAX_TIED, steps))
    inside = torch.arange(steps, device=size.device) < tied[:, None]
    target = SEARCH_TOLERANCE * last + 8 * torch.finfo(size.dtype).eps * size[:, 0]
    converged = _errors(ritz.values, ritz.residuals, ritz.values, inside) <= target[:, None]
    below = (size < NEAR * last[:, None]) | (size + REACH * ritz.residuals <= last[:, None])
    room = (last[:, None] - size).clamp_min(torch.finfo(size.dtype).tiny)
    share = (ritz.residuals**2 / room).masked_fill(inside, 0.0).amax(1) / last.clamp_min(torch.finfo(size.dtype).tiny)
    return tied, torch.where(inside, converged, below).all(1) & (share <= SHARE), share


def _probe(lanczos: _Lanczos, rows: Bool[Tensor, "n"]) -> tuple[Float[Tensor, "m"], Float[Tensor, "m"]]:
    """What a second random vector finds in the complement of the Krylov spaces of `rows`: the largest absolute Ritz
    value, and how far a Ritz value and its residual reach."""
    # Without the vector where the next step starts: it may be all of what was missed.
    basis = lanczos.basis[rows, :-1]
    room = basis.shape[2] - basis.shape[1]
    if not len(basis) or not room:
        return basis.new_zeros(len(basis)), basis.new_zeros(len(basis))
    second = _Lanczos(lanczos.operator, lanczos.half_c[rows], basis, lanczos.seed)
    second.advance(min(room, max(PROBE_STEPS, basis.shape[1] // PROBE_SHARE)))
    ritz = second.ritz()
    size = ritz.values.abs()
    return size[:, 0], size[:, 0] + ritz.residuals[:, 0]


def _errors(values: Tensor, residuals: Tensor, spectrum: Tensor, inside: Tensor) -> Tensor:
    """`min(r, r^2 / gap)`, the gap to the nearest value of `spectrum` that is not `inside` the block (nor itself)."""
    distance = (values[:, :, None] - spectrum[:, None, :]).abs()
    hidden = inside[:, None, :].expand_as(distance)
    if distance.shape[1] == distance.shape[2]:
        itself = torch.eye(distance.shape[1], dtype=torch.bool, device=values.device)
        hidden = (hidden & inside[:, :, None]) | itself
    gap = distance.masked_fill(hidden, torch.inf).amin(2)
    return torch.minimum(residuals, residuals**2 / gap.clamp_min(torch.finfo(values.dtype).tiny))


def _refine(
    operator: InteractionOperator, half_c: Tensor, basis: Tensor, ritz: _Ritz, tied: int, k: int, tolerance: float
) -> Leading:
    """Rayleigh-Ritz in full precision on the `tied` first Ritz vectors, and Davidson corrections as long as needed."""
    n, d = len(half_c), basis.shape[-1]
    basis = basis[:, : ritz.values.shape[1]]
    result = Leading.empty(n, k, basis)
    at = torch.arange(n, device=basis.device)
    outer = ritz.values[:, tied:]
    space = torch.linalg.qr(torch.bmm(ritz.weights[:, :tied], basis).mT)[0].mT
    image = operator(space, half_c)
    for round_ in range(REFINEMENTS + 1):
        values, turn = _rayleigh_ritz(space, image, tied, tolerance)
        vectors = torch.bmm(turn, space)
        residual = torch.bmm(turn, image) - values[..., None] * vectors
        norms = residual.norm(dim=2)
        outside = torch.zeros_like(outer, dtype=torch.bool)
        errors = _errors(values, norms, outer, outside) if outer.shape[1] else norms
        size = values.abs()
        target = tolerance * size[:, :k] + 8 * torch.finfo(space.dtype).eps * size[:, :1]
        done = (errors[:, :k] <= target).all(1)
        room = min(tied, d - space.shape[1])
        finished = done | (round_ == REFINEMENTS or room == 0)
        for name, found in (("values", values), ("vectors", vectors), ("errors", errors), ("residuals", norms)):
            getattr(result, name)[at[finished]] = found[finished, :k]
        result.resolved[at[finished]] = done[finished]
        going = ~finished
        if not going.any():
            break
        at, half_c, basis, ritz, outer = at[going], half_c[going], basis[going], ritz.take(going), outer[going]
        new = _correction(basis, ritz, tied, values[going], residual[going])[:, :room]
        space, image = space[going], image[going]
        more = torch.linalg.qr(torch.cat([space, new], 1).mT)[0].mT[:, -room:]
        space, image = torch.cat([space, more], 1), torch.cat([image, operator(more, half_c)], 1)
    return result


def _rayleigh_ritz(x: Tensor, w: Tensor, count: int, tolerance: float) -> tuple[Tensor, Tensor]:
    """The `count` largest Ritz values on orthonormal rows `x` with `w = Q x`, and the rows' combinations."""
    product = torch.bmm(x, w.mT)
    values, columns = _eigh(0.5 * (product + product.mT))
    order = by_magnitude(values, tied_units(x.dtype, tolerance))[:, :count]
    return values.gather(1, order), columns.mT.gather(1, order[..., None].expand(-1, -1, columns.shape[1]))


def _correction(basis: Tensor, ritz: _Ritz, tied: int, values: Tensor, residual: Tensor) -> Tensor:
    """`-(Q - lambda)^-1 r` with `Q` as the search knows it: its Ritz values on the Krylov space, zero elsewhere."""
    inner = torch.bmm(residual, basis.mT)
    weights = ritz.weights[:, tied:]
    shift = ritz.values[:, None, tied:] - values[..., None]
    # Those tied are corrected by Rayleigh-Ritz; a near-singular shift only says so.
    floor = 1e-4 * values.abs().amax(1)[:, None, None].clamp_min(torch.finfo(values.dtype).tiny)
    shift = torch.where(shift.abs() < floor, floor, shift)
    small = torch.bmm(torch.bmm(inner, weights.mT) / shift, weights)
    scale = torch.where(values.abs() < floor[..., 0], floor[..., 0], values)[..., None]
    outer = (residual - torch.bmm(inner, basis)) / scale
    return outer - torch.bmm(small, basis)


def _along(basis: Float[Tensor, "n j d"], w: Float[Tensor, "n d"]) -> Float[Tensor, "n j"]:
    # As a row times a matrix: the same as a matrix times a column is several times slower on a CPU.
    return torch.bmm(w[:, None], basis.mT)[:, 0]


def _combine(weights: Float[Tensor, "n j"], basis: Float[Tensor, "n j d"]) -> Float[Tensor, "n d"]:
    return torch.bmm(weights[:, None], basis)[:, 0]


def _random_unit(d: int, seed: int, like: Tensor) -> Float[Tensor, "d"]:
    """The same on every device."""
    vector = torch.randn(d, generator=torch.Generator().manual_seed(seed))
    return (vector / vector.norm()).to(like.device, like.dtype)


def _eigh(matrices: Float[Tensor, "n j j"]) -> tuple[Tensor, Tensor]:
    """`torch.linalg.eigh` of many small matrices: on a CPU it takes them one after the other, so a slice per thread."""
    threads = min(torch.get_num_threads(), len(matrices) // 16)
    if matrices.device.type != "cpu" or threads < 2:
        return torch.linalg.eigh(matrices)
    with ThreadPoolExecutor(threads) as pool:
        parts = list(pool.map(torch.linalg.eigh, matrices.chunk(threads)))
    return torch.cat([values for values, _ in parts]), torch.cat([vectors for _, vectors in parts])
