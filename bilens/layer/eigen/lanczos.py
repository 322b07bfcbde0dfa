"""The leading eigenpairs of many interaction matrices at once, without forming any of them.

A product of `Q` with a vector is two matrix products with the layer's factors, shared by every output of a batch
(`refine`). On them, per output and in lockstep:

1. search: Lanczos with full orthogonalisation, all from the same random vector, every vector rounded to a lower
   precision before it is multiplied: to bfloat16 (and multiplied in bfloat16, where the machine does that faster), or,
   where pairs behind a giant one would drown in that, to float32 before products in float64. The rounding is no loss:
   Lanczos never finds what its start vector has nothing of, and this mixes in a little of everything at each step
2. check, every few steps, on the small projected matrix: the pairs wanted and one more, and any Ritz value too close to
   them to be told apart after the rounding, have converged, and no other Ritz value reaches them within its residual.
   One more, because a pair that is missed is mostly a near-tie of the last one wanted, and its place is then taken by
   one that does not settle
3. probe: a small residual says that a pair is an eigenpair, not that no larger one was missed because the start vector
   had too little of it. What is missing grows with every step, so the check has to pass for some steps more; then a
   second random vector is driven for a few steps in the complement of the whole Krylov space, where what was missed is
   what is largest. If it, its residual and what the first Krylov space may hold of it reach the pairs found, the
   search goes on
4. refine, in full precision (`refine`): with the whole Krylov space known, one correction is enough

Outputs that do not converge in fewer than d_model steps (the remainder of the last one is nothing but rounding), or
whose pairs wanted are within the rounding of too many others to be told from them, are marked, for the caller to solve
otherwise.

Source: Parlett, The Symmetric Eigenvalue Problem, chapters 11 to 13.
"""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bilens.layer.eigen.pairs import eigh
from bilens.layer.eigen.refine import InteractionOperator, Leading, Ritz, Wanted, crowded, errors_of, refine

FIRST_CHECK, CHECK_EVERY, MAX_STEPS = 12, 4, 192
SPARE = 1  # pairs that have to converge beside those wanted
CONFIRM = 1.1  # times the steps of the first check that passes, until the probe
PROBE_STEPS, PROBE_SHARE = 8, 4  # eight steps at least, or a quarter of those of the search
SEARCH_TOLERANCE = 1e-5
GIANT = 4  # a value that is larger by this over the blur: what is behind it is not waited for
MAX_TIED = 4  # Ritz values carried along because they may belong to the pairs wanted
# A Ritz value below the pairs wanted may be that of a larger eigenvalue in the making. Close to them, its residual is
# then about as large as its way. And where the eigenvector has a share p in the Krylov space, the Ritz value is about p
# and the squared residual p (1 - p), in units of the eigenvalue; the probe sees the rest, 1 - p.
REACH, NEAR, SHARE = 1.5, 0.7, 0.08


@torch.no_grad()
def leading_eigenpairs(
    operator: InteractionOperator,
    search: InteractionOperator,
    c: Float[Tensor, "n d_mlp"],
    wanted: Wanted,
    rounding: Float[Tensor, "n"],
    *,
    coarse: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> Leading:
    """The eigenpairs wanted of every `Q_c`.

    Args:
        operator: the operator, in the precision of the result.
        search: the same operator, in the dtype to search in.
        c: coefficients of the hidden units, scaled so that the numbers of `Q_c` are of order one.
        wanted: few pairs, against d_model.
        rounding: the largest error that the operator's own rounding may cause in the values.
        coarse: the type that vectors are rounded to in the search.
        seed: the seed of the random start vectors.
    """
    (n, d), k = (len(c), operator.rows.shape[1]), wanted.k
    blur = 0.5 * torch.finfo(coarse).eps  # up to so much of the largest value are Ritz values off
    result = Leading.empty(n, k, operator.rows)
    half = 0.5 * c
    nothing = operator.rows.new_empty(n, 0, d)
    lanczos = _Lanczos(search, half.to(search.dtype), nothing, wanted, coarse, seed)
    index = torch.arange(n, device=c.device)
    passing_since = torch.zeros(n, dtype=torch.long, device=c.device)  # 0: the last check did not pass
    proven = operator.rows.new_zeros(n)  # by a probe: the k wanted are this large at least
    steps, end = max(FIRST_CHECK, 3 * k), max(MAX_STEPS, 8 * k)
    while len(index):
        steps = min(steps, d, end)
        lanczos.advance(steps)
        ritz = lanczos.ritz()
        count, passed, share = _check(ritz, wanted, blur)
        passing_since = torch.where(passed, passing_since.masked_fill(passing_since == 0, steps), 0)
        last = wanted.size(ritz.values)[:, min(k, steps) - 1]
        giant = last < GIANT * blur * ritz.values.abs().amax(1)
        hopeless = crowded(ritz, wanted, k + MAX_TIED, blur) & (passed | giant)
        rows = passed & ~hopeless & (steps < d) & (steps >= CONFIRM * passing_since) & (last >= (1 - blur) * proven)
        largest, reach = _probe(lanczos, rows)
        proven[rows] = largest
        done = rows.clone()
        done[rows] = reach <= (1 - share[rows]) * last[rows]
        for tied in count[done].unique().tolist():
            rows = (done & (count == tied)).nonzero().flatten()
            part, parts = index[rows], (lanczos.basis[rows], ritz.take(rows))
            found = refine(operator, half[part], *parts, tied, wanted, rounding[part], blur)
            found.steps[:] = steps
            for name, values in vars(found).items():
                getattr(result, name)[part] = values
        done |= hopeless
        if steps == min(d, end):
            break
        index, passing_since, proven = index[~done], passing_since[~done], proven[~done]
        lanczos.keep(~done)
        # At wider intervals later; sooner where most have just passed, and wait for the probe.
        pause = max(CHECK_EVERY, steps // 5)
        if 2 * (passing_since == steps).sum() > len(index):
            pause = min(pause, math.ceil(CONFIRM * steps) - steps)
        steps += pause
    return result


class _Lanczos:
    """A batch of Lanczos runs in lockstep: an orthonormal basis each, and `Q` projected on it.

    The projection is kept whole, not only its three diagonals: with rounded vectors it is the better approximation. A
    run whose Krylov space is exhausted goes on from a fresh random vector.
    """

    def __init__(
        self,
        operator: InteractionOperator,
        half_c: Tensor,
        deflate: Float[Tensor, "n p d_model"],
        wanted: Wanted,
        coarse: torch.dtype,
        seed: int,
    ):
        self.operator, self.half_c, self.wanted, self.coarse, self.seed = operator, half_c, wanted, coarse, seed
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
            image = self.operator(basis[:, j:].to(self.coarse), self.half_c)[:, 0].to(basis.dtype)
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

    def ritz(self) -> Ritz:
        values, columns = eigh(self.projected)
        order = self.wanted.size(values).argsort(dim=1, descending=True)
        rows = columns.mT.gather(1, order[..., None].expand_as(columns))
        return Ritz(values.gather(1, order), rows, self.ahead[:, None] * rows[:, :, -1].abs())

    def keep(self, alive: Bool[Tensor, "n"]) -> None:
        for name in ("basis", "projected", "ahead", "half_c", "deflate"):
            setattr(self, name, getattr(self, name)[alive])


def _check(ritz: Ritz, wanted: Wanted, blur: float) -> tuple[Int[Tensor, "n"], Bool[Tensor, "n"], Float[Tensor, "n"]]:
    """Have the pairs wanted converged?

    Returns:
        How many Ritz pairs stand for those wanted, those tied with the last in the search's precision included;
        whether they have converged and nothing else is on its way to them; and how large a share of such a one may
        already be in the Krylov space.
    """
    size, steps = wanted.size(ritz.values), ritz.values.shape[1]
    k, largest = min(wanted.k + SPARE, steps), ritz.values.abs().amax(1)
    last = size[:, k - 1]
    tied = (size >= (last - blur * largest)[:, None]).sum(1).clamp(max=min(k + MAX_TIED, steps))
    inside = torch.arange(steps, device=size.device) < tied[:, None]
    target = SEARCH_TOLERANCE * last + 8 * torch.finfo(size.dtype).eps * largest
    converged = errors_of(ritz.values, ritz.residuals, ritz.values, inside) <= target[:, None]
    below = (size < NEAR * last[:, None]) | (size + REACH * ritz.residuals <= last[:, None])
    room = (last[:, None] - size).clamp_min(torch.finfo(size.dtype).tiny)
    share = (ritz.residuals**2 / room).masked_fill(inside, 0.0).amax(1) / last.clamp_min(torch.finfo(size.dtype).tiny)
    return tied, torch.where(inside, converged, below).all(1) & (share <= SHARE), share


def _probe(lanczos: _Lanczos, rows: Bool[Tensor, "n"]) -> tuple[Float[Tensor, "m"], Float[Tensor, "m"]]:
    """What a second random vector finds in the complement of the Krylov spaces of `rows`: the size of the largest Ritz
    value, and how far it and its residual reach."""
    # Without the vector where the next step starts: it may be all of what was missed.
    basis = lanczos.basis[rows, :-1]
    room = basis.shape[2] - basis.shape[1]
    if not len(basis) or not room:
        return basis.new_zeros(len(basis)), basis.new_zeros(len(basis))
    second = _Lanczos(lanczos.operator, lanczos.half_c[rows], basis, lanczos.wanted, lanczos.coarse, lanczos.seed)
    second.advance(min(room, max(PROBE_STEPS, basis.shape[1] // PROBE_SHARE)))
    ritz = second.ritz()
    size = second.wanted.size(ritz.values)
    return size[:, 0], size[:, 0] + ritz.residuals[:, 0]


def _along(basis: Float[Tensor, "n j d"], w: Float[Tensor, "n d"]) -> Float[Tensor, "n j"]:
    # As a row times a matrix: the same as a matrix times a column is several times slower on a CPU.
    return torch.bmm(w[:, None], basis.mT)[:, 0]


def _combine(weights: Float[Tensor, "n j"], basis: Float[Tensor, "n j d"]) -> Float[Tensor, "n d"]:
    return torch.bmm(weights[:, None], basis)[:, 0]


def _random_unit(d: int, seed: int, like: Tensor) -> Float[Tensor, "d"]:
    """The same on every device."""
    vector = torch.randn(d, generator=torch.Generator().manual_seed(seed)).to(like.dtype)
    return (vector / vector.norm()).to(like.device)
