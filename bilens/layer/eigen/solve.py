"""The leading eigenpairs of the interaction matrices of a whole layer's outputs, and how much of each they are.

1. rescale by powers of two, which changes no digit, so that no weights are too large or too small for what follows
2. choose how by a count of operations (`operations`): Lanczos on the factors (`lanczos`); blocks of vectors on matrices
   formed from the third-order tensor (`block`), which pays where outputs are many, spectra decay slowly, as the steps
   that Lanczos takes for a first chunk tell, and the device multiplies bfloat16 fast; or forming every `Q`
3. outputs in chunks that fit the memory allowed and, on a CPU, the cache; each scaled to `||Q||_F = 1`
4. what a search leaves unresolved, in float64: by Lanczos again, then whole. Among it are pairs behind a giant one,
   which float32 does not know to the error allowed
5. certify: the squares of all eigenvalues add up to `||Q||_F^2`, which the factors give, so that one missed can be no
   larger than `sqrt(||Q||_F^2 - sum of the squares found)`

`||Q_u||_F^2 = u^T H u` with one small matrix `H` for the layer, `H = W_out^T K W_out`, where `K` holds the inner
products of the hidden units' interaction matrices (`inner`).
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, get_args

import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from bilens._core.checks import MEMORY
from bilens._core.display import Tabular
from bilens.draw import plots
from bilens.errors import ArgumentError, SAEMismatchError, nearest
from bilens.layer import inner
from bilens.layer.bilinear import BilinearLayer, hidden_coefficients, interaction_matrix, search_dtype
from bilens.layer.eigen.blocks import OutputTensor, block_size, leading_eigenpairs_of_blocks
from bilens.layer.eigen.lanczos import leading_eigenpairs
from bilens.layer.eigen.pairs import ROUNDINGS, Order, check_pairs, signed, sorted_eigenpairs
from bilens.layer.eigen.refine import InteractionOperator, Leading, Wanted

Method = Literal["auto", "lanczos", "block", "dense"]
STATUSES = ("bounded", "converged", "dense")
# Bytes that Lanczos holds of a chunk of outputs, forty vectors each: fewer outputs are slow, more are not faster.
HELD, HELD_STEPS, SMALLEST_CHUNK, LARGEST_CHUNK = 2**26, 40, 128, 2048
STARTING = 2e9
PILOT = 64  # outputs: enough to learn how many steps a spectrum takes, few enough to change over
FORMED = 2**27  # bytes of matrices formed at a time: more are not formed faster
GRAM_BLOCK = 2**22  # entries of K at a time
# Of the squared norm: how far it, and the sum of squares found, may be off in float32.
NORM_ROUNDING = 1e-5
# Of an eigenvalue from products of the factors: units of rounding of what the hidden units add up to if none cancels.
# Twice the largest seen: how a CPU orders its sums changes it.
UNITS = 4
# Steps that Lanczos takes as a rule, and at best; see `operations`.
TYPICAL_STEPS, STEPS_PER_PAIR, FEWEST_STEPS = 20, 5, 18


@dataclass(frozen=True)
class LeadingEigenpairs(Tabular):
    """The leading eigenpairs of `n` interaction matrices.

    Attributes:
        values: the eigenvalues by falling absolute value (a positive one first if they tie up to their errors), or in
            the order asked for.
        vectors: unit eigenvectors as rows, largest entry positive.
        errors: a cautious bound on each value's error: at most `tolerance` times the value, or what float64 leaves of a
            matrix solved whole. A value below its error is not known to be other than zero.
        residuals: `||Q v - lambda v||`, at most.
        norms, traces: Frobenius norm and trace of every `Q`, from the factors.
        status: how it is known that none of the pairs is missed, an index into `STATUSES`: *bounded*, the norm leaves
            no room for a larger eigenvalue; *converged*, a search that went on after it converged found none, nor
            did a second one from another start; *dense*, all eigenvalues were computed.
        steps: the number of steps of the search; 0 if there was none.
        method: the method that was used, and why.
    """

    values: Float[Tensor, "n k"]
    vectors: Float[Tensor, "n k d_model"] = field(repr=False)
    errors: Float[Tensor, "n k"] = field(repr=False)
    residuals: Float[Tensor, "n k"] = field(repr=False)
    norms: Float[Tensor, "n"] = field(repr=False)
    traces: Float[Tensor, "n"] = field(repr=False)
    status: Int[Tensor, "n"] = field(repr=False)
    steps: Int[Tensor, "n"] = field(repr=False)
    method: str

    @property
    def shares(self) -> Float[Tensor, "n"]:
        """`sum of l^2 / ||Q||_F^2` of the pairs found: 1 says that they are all of the interaction matrix."""
        return torch.where(self.norms > 0, self._squares, 1.0).clamp(max=1.0)

    @property
    def missed_bound(self) -> Float[Tensor, "n"]:
        """No eigenvalue that is not listed is larger than this in absolute value."""
        left = 1 + NORM_ROUNDING - self._squares
        return self.norms * left.clamp_min(0).sqrt()

    @property
    def _squares(self) -> Float[Tensor, "n"]:
        # Ratios first: the squares of small weights' eigenvalues are nothing in float32.
        parts = self.values / torch.where(self.norms > 0, self.norms, 1.0)[:, None]
        return parts.square().sum(-1)

    def to_frame(self) -> pd.DataFrame:
        """One row per output: `output, eigenvalue_1, ..., eigenvalue_k, error, share, norm, trace, status, steps`."""
        columns: dict[str, list[int] | list[float] | list[str]] = {"output": list(range(len(self.values)))}
        columns |= {f"eigenvalue_{rank + 1}": self.values[:, rank].tolist() for rank in range(self.values.shape[1])}
        columns |= {
            "error": self.errors.amax(1).tolist(),
            "share": self.shares.tolist(),
            "norm": self.norms.tolist(),
            "trace": self.traces.tolist(),
            "status": [STATUSES[i] for i in self.status.tolist()],
            "steps": self.steps.tolist(),
        }
        return pd.DataFrame(columns)

    def plot(self) -> go.Figure:
        """How much of their interaction matrices the pairs found are, over all outputs."""
        k = self.values.shape[1]
        return plots.histogram(self.shares.tolist(), x_title=f"share of {k} eigenpairs in the squared norm")

    def __repr__(self) -> str:
        n, k = self.values.shape
        counts = self.status.bincount(minlength=len(STATUSES)).tolist()
        known = ", ".join(f"{count} {name}" for name, count in zip(STATUSES, counts, strict=True) if count)
        return f"LeadingEigenpairs({n} outputs, {k} eigenpairs each; {known}; {self.method})"

    def __str__(self) -> str:
        return f"{self!r}\n{self.to_frame().head(10).to_string(index=False)}"


@torch.no_grad()
def top_eigenpairs(
    layer: BilinearLayer,
    outputs: Float[Tensor, "n d_model"],
    k: int = 2,
    *,
    order: Order = "size",
    tolerance: float = 1e-4,
    memory: int = MEMORY,
    method: Method = "auto",
    seed: int = 0,
    progress: bool | Callable[[int, int], object] = True,
) -> LeadingEigenpairs:
    """The `k` leading eigenpairs of the interaction matrix of every output direction.

    Args:
        layer: its weights; the results have their dtype and device.
        outputs: directions.
        k: small against d_model for a search to pay; all `d_model` for whole spectra.
        order: `"size"`, the largest absolute values; `"positive"`, the most positive; `"negative"`, the most negative.
        tolerance: relative error of every eigenvalue, as estimated, which is cautiously.
        memory: bytes to work in, and at most as many for the result; 1 GiB by default.
        method: `"lanczos"` never forms a `Q`; `"block"` forms them in low precision, and searches with many vectors at
            once, by absolute value only; `"dense"` forms and solves all in float64; `"auto"` takes what needs the
            fewest operations: the same for the same shapes, `k`, dtype and kind of device.
        seed: the seed of the start vectors. Same seed and method give the same result, whatever the other outputs.
        progress: show a bar, or a function that is told how many outputs are done, and of how many.

    Raises:
        OutOfRangeError: `k` is not in 1..d_model.
        SAEMismatchError: directions of another width than d_model.
        ArgumentError: an unknown method or order, a tolerance that is not positive, directions or weights that are not
            finite, less memory than one output needs, or eigenvalues that the dtype does not hold.
    """
    _check_arguments(layer, outputs, k, order, tolerance, method)
    work = _Work.of(layer, outputs, Wanted(k, tolerance, order != "size"), memory, flip=order == "negative")
    n, u = len(work.u), work.u
    possible = work.possible()
    typical = TYPICAL_STEPS + STEPS_PER_PAIR * k
    chosen = method if method != "auto" else work.cheapest(possible, typical)
    if chosen == "block" and "block" not in work.possible(with_block=True):
        chosen = "lanczos" if "lanczos" in possible else "dense"
    how = chosen if method == "auto" else f"{chosen}, as asked"
    # How slowly the spectra decay is learnt from a first few, unless blocks are fewer operations whatever it is.
    learning = method == "auto" and "block" in possible and n >= 4 * PILOT
    learning = learning and work.cheapest(possible, FEWEST_STEPS) == "lanczos"
    norms, traces = work.norms_and_traces() if chosen != "dense" else (u.new_zeros(n), u.new_zeros(n))
    result, whole = Leading.empty(n, k, u), torch.zeros(n, dtype=torch.bool, device=u.device)
    start = 0
    with tqdm(total=n, desc="eigenpairs", unit="output", disable=progress is not True) as bar:
        while start < n:
            current = "lanczos" if learning else chosen
            size = _chunk_size(work, current)
            rows = slice(start, min(start + (min(size, PILOT) if learning else size), n))
            found = work.search(rows, norms[rows], current, seed)
            if learning:
                steps = found.steps[found.resolved].double().mean().nan_to_num(0.0).item()
                chosen, learning = work.cheapest(possible, steps), False
                how = f"{chosen}, as a first {rows.stop} took lanczos {steps:.0f} steps"
            if current != "dense":
                work.search_in_float64(rows, norms[rows], found, seed)
            whole[rows] = ~found.resolved
            work.solve_whole(rows, norms, traces, found)
            _put_in_order(found, work.wanted)
            for name, values in vars(found).items():
                getattr(result, name)[rows] = values
            start = rows.stop
            bar.update(len(found.values))
            if callable(progress):
                progress(rows.stop, n)
    if (result.steps > 0).any():
        how += f", {result.steps[result.steps > 0].float().mean():.0f} steps on average"
    sign = -1 if order == "negative" else 1
    exponents = work.exponents
    numbers = {
        "values": sign * _times_power(result.values * norms[:, None], exponents[:, None]),
        "errors": _times_power(result.errors * norms[:, None], exponents[:, None]),
        "residuals": _times_power(result.residuals * norms[:, None], exponents[:, None]),
        "norms": _times_power(norms, exponents),
        "traces": sign * _times_power(traces, exponents),
    }
    _check_range(norms, numbers["norms"])
    how += f", searching in {str(work.search_dtype).removeprefix('torch.')}" if chosen != "dense" else ""
    sweep = LeadingEigenpairs(vectors=result.vectors, status=whole.long(), steps=result.steps, method=how, **numbers)
    last = sign * sweep.values[:, -1] if work.wanted.positive else sweep.values[:, -1].abs()
    bounded = sweep.missed_bound <= last
    converged, dense = STATUSES.index("converged"), STATUSES.index("dense")
    sweep.status[:] = torch.where(whole, dense, torch.where(bounded, STATUSES.index("bounded"), converged))
    return sweep


def operations(d_model: int, d_mlp: int, n: int, k: int, steps: float) -> dict[str, float]:
    """Roughly how many multiplications each method needs per output, those that are slow counted several times.

    Large products are counted from the shapes. What is around them is not: its factors, and `STARTING`, are rough
    estimates set by hand, not fitted to a clock. They choose between methods that find the same pairs. With few outputs
    to share it, what is done once (the matrix of the norms, the tensor) counts, and so does starting many small
    operations, as `STARTING` of large ones.

    Args:
        d_model, d_mlp: the sizes of the layer.
        n: outputs in all.
        k: pairs wanted.
        steps: that Lanczos takes; a block of vectors takes about half as many products.
    """
    once = (8 * d_mlp**2 * d_model + STARTING) / max(n, 1)
    # After forty steps one takes twice as long: there is more to be orthogonal to. The probe takes two fifths more.
    lanczos = 1.4 * steps * (1 + steps / 40) * 8 * d_model * d_mlp
    tensor, forming = d_model**3 * d_mlp / max(n, 1), 2 * d_model**3
    block = tensor + forming + 0.5 * steps * 2 * block_size(k) * d_model**2
    # In float64; solving a matrix whole is some fifty products of it, which a few large ones cannot replace.
    rank = _largest_rank(d_model, d_mlp)
    dense = 4 * rank**2 * d_mlp + 50 * rank**3
    return {"lanczos": once + lanczos, "block": once + block, "dense": dense}


def _largest_rank(d_model: int, d_mlp: int) -> int:
    """Of any `Q`: every hidden unit adds two at most."""
    return min(d_model, 2 * d_mlp)


def frobenius_norms(layer: BilinearLayer, u: Float[Tensor, "n d_model"]) -> Float[Tensor, "n"]:
    """`||Q_u||_F` of every direction from the factors, in the layer's dtype (`inner.norms` computes in float64).

    `u^T H u` costs next to nothing per output; `H` is a few products of the branches, made in blocks.
    """
    gram = layer.W_out.new_zeros(layer.W_out.shape[1], layer.W_out.shape[1])
    for rows in torch.arange(len(layer.W_out), device=gram.device).split(max(1, GRAM_BLOCK // len(layer.W_out))):
        left, right = layer.W_gate[:, rows].T, layer.W_in[:, rows].T
        kernel = (left @ layer.W_gate).mul_(right @ layer.W_in)
        kernel += (left @ layer.W_in).mul_(right @ layer.W_gate)
        gram += layer.W_out[rows].T @ (kernel @ layer.W_out)
    return (0.5 * ((u @ gram) * u).sum(-1)).clamp_min(0).sqrt()


@dataclass(frozen=True)
class _Work:
    """What is to be solved, in numbers of order one.

    Attributes:
        layer, u: rescaled; `exponents`: `Q` is so many powers of two larger.
        wanted: the pairs.
        memory: the bytes to work in.
        search_dtype: the type that searches multiply in.
    """

    layer: BilinearLayer
    u: Float[Tensor, "n d_model"]
    exponents: Int[Tensor, "n"]
    wanted: Wanted
    memory: int
    search_dtype: torch.dtype

    @classmethod
    def of(cls, layer: BilinearLayer, outputs: Tensor, wanted: Wanted, memory: int, *, flip: bool) -> "_Work":
        layer = layer.to(torch.promote_types(layer.W_out.dtype, torch.float32))
        balanced, columns = _balanced(layer)
        u = inner.double(outputs.to(layer.W_out)) * torch.exp2(columns.double())
        exponents = _exponents(u, 1)
        u = (-u if flip else u) * torch.exp2(-exponents[:, None].double())
        dtype = search_dtype(layer.W_out.dtype, layer.W_out.device)
        return cls(balanced, u.to(balanced.W_out), exponents.to(layer.W_out.device), wanted, memory, dtype)

    @property
    def shape(self) -> tuple[int, int]:
        return self.layer.W_gate.shape  # type: ignore[return-value]

    @property
    def searchable(self) -> bool:
        """Whether `Q` holds the pairs wanted several times over: what a search needs to tell them from the rest."""
        return 4 * self.wanted.k <= _largest_rank(*self.shape)

    def possible(self, *, with_block: bool = False) -> list[str]:
        """The methods that can find the pairs in the memory; blocks where they pay, or anyway."""
        (d_model, d_mlp), k = self.shape, self.wanted.k
        methods = ["dense"]
        if self.searchable:
            methods.append("lanczos")
        room = 2 * OutputTensor.bytes_of(d_model, d_mlp, self.search_dtype) <= self.memory
        pays = room and self.search_dtype == torch.bfloat16
        if (pays or with_block) and 2 * block_size(k) <= d_model and not self.wanted.positive:
            methods.append("block")
        return methods

    def cheapest(self, possible: list[str], steps: float) -> str:
        count = operations(*self.shape, len(self.u), self.wanted.k, steps)
        return min(possible, key=lambda name: count[name])

    @cached_property
    def operator(self) -> InteractionOperator:
        return InteractionOperator.of(self.layer.W_gate.T, self.layer.W_in.T)

    @cached_property
    def coarse(self) -> InteractionOperator:
        return self.operator.to(self.search_dtype)

    @cached_property
    def wide(self) -> BilinearLayer:
        """In float64: on the CPU for devices that have none."""
        return BilinearLayer(**{name: inner.double(weights) for name, weights in vars(self.layer).items()})

    @cached_property
    def wide_operator(self) -> InteractionOperator:
        return InteractionOperator.of(self.wide.W_gate.T, self.wide.W_in.T)

    @cached_property
    def tensor(self) -> OutputTensor:
        chunk = min(_chunk_size(self, "block"), len(self.u))
        return OutputTensor.of(self.layer, self.search_dtype, chunk)

    @cached_property
    def unit_sizes(self) -> Float[Tensor, "d_mlp"]:
        """`|l_m|^2 |r_m|^2`."""
        return self.layer.W_gate.square().sum(0) * self.layer.W_in.square().sum(0)

    def sizes(self, u: Tensor, c: Tensor) -> Float[Tensor, "n"]:
        """What the numbers that add up to `Q_u` have as norm if none cancels another."""
        layer = self.layer
        coefficients = c.square() @ self.unit_sizes + u.square() @ (layer.W_out.square().T @ self.unit_sizes)
        return coefficients.sqrt()

    def norms_and_traces(self) -> tuple[Float[Tensor, "n"], Float[Tensor, "n"]]:
        """From the factors, as many outputs at a time as fit the memory."""
        each = 16 * self.layer.W_gate.shape[1] * self.u.element_size()
        parts = map(self._norms_and_traces, self.u.split(max(SMALLEST_CHUNK, self.memory // each)))
        norms, traces = (torch.cat(found) for found in zip(*parts, strict=True))
        return norms, traces

    def _norms_and_traces(self, u: Float[Tensor, "n d_model"]) -> tuple[Float[Tensor, "n"], Float[Tensor, "n"]]:
        """In float64 where most of it cancels, and from `Q` itself where all but rounding does."""
        layer = self.layer
        norms, c = frobenius_norms(layer, u), hidden_coefficients(layer, u)
        size = self.sizes(u, c)
        cancels = UNITS * torch.finfo(u.dtype).eps * size**2 > 0.5 * NORM_ROUNDING * norms**2
        if cancels.any():
            norms[cancels] = inner.norms(layer, u[cancels], memory=self.memory).to(norms)
        rounding = UNITS * torch.finfo(torch.float64).eps * size**2
        for one in (rounding > 1e-2 * NORM_ROUNDING * norms**2).logical_and(size > 0).nonzero().flatten().tolist():
            norms[one] = torch.linalg.matrix_norm(interaction_matrix(self.wide, inner.double(u[one]))).to(norms)
        return norms, c @ (layer.W_gate * layer.W_in).sum(0)

    def search(self, rows: slice, norms: Float[Tensor, "m"], method: str, seed: int) -> Leading:
        """What the method finds of some outputs, scaled to norm one."""
        u, k = self.u[rows], self.wanted.k
        if method == "dense":
            return Leading.empty(len(u), k, u)
        u = u / torch.where(norms > 0, norms, 1.0)[:, None]
        c = hidden_coefficients(self.layer, u)
        size = self.sizes(u, c)
        rounding = UNITS * torch.finfo(u.dtype).eps * size
        if method == "lanczos":
            found = leading_eigenpairs(self.operator, self.coarse, c, self.wanted, rounding, seed=seed)
        else:
            found = leading_eigenpairs_of_blocks(self.operator, self.tensor, u, c, self.wanted, rounding, seed=seed)
        nothing = size == 0
        found.resolved |= nothing
        found.vectors[nothing] = torch.eye(u.shape[1]).to(u)[:k]
        return found

    def search_in_float64(self, rows: slice, norms: Float[Tensor, "m"], found: Leading, seed: int) -> None:
        """Fill in what is not resolved, and can be."""
        (d_model, d_mlp), k = self.shape, self.wanted.k
        each = 8 * (16 * HELD_STEPS * d_model + 8 * (k + 2) * d_mlp)
        left = (~found.resolved & (norms > 0)).nonzero().flatten()
        for some in left.split(max(1, min(SMALLEST_CHUNK, self.memory // (2 * each)))) if self.searchable else ():
            u = inner.double(self.u[rows][some])
            u = u / inner.double(norms[some])[:, None]
            c = hidden_coefficients(self.wide, u)
            rounding = UNITS * torch.finfo(u.dtype).eps * self.sizes(u.to(self.u), c.to(self.u)).to(u)
            operator = self.wide_operator
            exact = leading_eigenpairs(operator, operator, c, self.wanted, rounding, coarse=torch.float32, seed=seed)
            solved = exact.resolved
            for name, values in vars(exact).items():
                whole = getattr(found, name)
                whole[some[solved]] = values[solved].to(whole)

    def solve_whole(self, rows: slice, norms: Tensor, traces: Tensor, found: Leading) -> None:
        """Fill in what is not resolved yet from all eigenpairs of each `Q`, and with them its norm and trace."""
        k, order = self.wanted.k, "positive" if self.wanted.positive else "size"
        ties = 0.5 * ROUNDINGS * torch.finfo(self.u.dtype).eps
        # In the space that the hidden units read, or for more pairs than it has dimensions, in all.
        few = k <= _largest_rank(*self.shape) < len(self.wide.W_gate)
        space = torch.linalg.qr(self.wide_operator.rows.T)[0] if few else None
        gate, in_ = (w if space is None else space.T @ w for w in (self.wide.W_gate, self.wide.W_in))
        left = (~found.resolved).nonzero().flatten()
        for some in left.split(max(1, min(32, self.memory // (2 * _bytes_of_whole(self.layer))))) if len(left) else ():
            at = some + rows.start
            c = hidden_coefficients(self.wide, inner.double(self.u[at]))
            raw = (gate * c[:, None]) @ in_.T
            matrix = 0.5 * (raw + raw.mT)
            values, vectors = sorted_eigenpairs(matrix, None, order, ties)  # type: ignore[arg-type]
            norm = values.norm(dim=1)
            unit = torch.where(norm > 0, norm, 1.0)[:, None]
            traces[at], norms[at] = values.sum(1).to(traces), norm.to(norms)
            values, vectors = values[:, :k], vectors[:, :k]
            residuals = (vectors @ matrix - values[..., None] * vectors).norm(dim=2)
            rounding = UNITS * torch.finfo(c.dtype).eps * self.sizes(self.u[at], c.to(self.u)).to(c)
            found.steps[some] = 0
            found.vectors[some] = (vectors if space is None else vectors @ space.T).to(found.vectors)
            of_norm_one = {"values": values, "residuals": residuals, "errors": residuals + rounding[:, None]}
            for name, numbers in of_norm_one.items():
                getattr(found, name)[some] = (numbers / unit).to(found.values)


def _check_arguments(layer: BilinearLayer, outputs: Tensor, k: int, order: str, tolerance: float, method: str) -> None:
    d_model = len(layer.W_gate)
    if outputs.ndim != 2 or outputs.shape[1] != d_model:
        raise SAEMismatchError(
            f"output directions of shape {tuple(outputs.shape)}: expected (n, {d_model}), the layer's d_model."
        )
    for name, numbers in {"output directions": outputs, **vars(layer)}.items():
        if not numbers.isfinite().all():
            raise ArgumentError(f"the {name} hold NaN or infinite values.")
    check_pairs(d_model, k, order)
    if not 0 < tolerance < 1:
        raise ArgumentError(f"tolerance is {tolerance}, expected a relative error between 0 and 1, such as 1e-4.")
    methods = get_args(Method)
    if method not in methods:
        expected = ", ".join(map(repr, methods))
        raise ArgumentError(f"method is {method!r}, expected one of {expected}.{nearest(str(method), methods)}")


def _check_range(norms: Tensor, scaled: Tensor) -> None:
    lost = ((norms > 0) & (scaled == 0)) | scaled.isinf()
    if lost.any():
        raise ArgumentError(
            f"the eigenvalues of {int(lost.sum())} outputs, the first of them {int(lost.nonzero()[0])}, are too large "
            f"or too small for {str(scaled.dtype).removeprefix('torch.')}: rescale the weights or the directions."
        )


def _balanced(layer: BilinearLayer) -> tuple[BilinearLayer, Int[Tensor, "d_model"]]:
    """The layer with every hidden unit's branches, and every output coordinate, of order one.

    By powers of two, which change no digit; those of the output coordinates are returned.
    """
    left, right, out = (inner.double(t) for t in (layer.W_gate, layer.W_in, layer.W_out))
    of_left, of_right = _exponents(left, 0), _exponents(right, 0)
    out = out * torch.exp2((of_left + of_right)[:, None].double())
    columns = _exponents(out, 0)
    scaled = {left: of_left, right: of_right, out: columns}
    gate, in_, out = ((part * torch.exp2(-powers.double())).to(layer.W_out) for part, powers in scaled.items())
    return BilinearLayer(gate, in_, out, layer.b_gate, layer.b_in, layer.b_out), columns


def _exponents(numbers: Float[Tensor, "a b"], dim: int) -> Int[Tensor, "c"]:
    """Powers of two that the largest absolute values along a dimension are below."""
    return torch.frexp(numbers.abs().amax(dim)).exponent


def _times_power(numbers: Tensor, exponents: Tensor) -> Tensor:
    """`numbers * 2^exponents`, without the power itself having to be in range."""
    half = exponents // 2
    return numbers * torch.exp2(half.to(numbers)) * torch.exp2((exponents - half).to(numbers))


def _chunk_size(work: _Work, method: str) -> int:
    """How many outputs at a time fit the memory allowed, and are worth it."""
    (d_model, d_mlp), k, layer = work.shape, work.wanted.k, work.layer
    item, coarse = layer.W_gate.element_size(), work.search_dtype.itemsize
    # The factors in three precisions, and blocks of K.
    shared = 4 * d_mlp * d_model * (item + coarse) + 7 * d_mlp * d_model * 8 + 3 * GRAM_BLOCK * item
    if method == "dense":
        each = _bytes_of_whole(layer)
    elif method == "block":
        shared += OutputTensor.bytes_of(d_model, d_mlp, work.search_dtype)
        each = 2 * coarse * d_model**2 + 8 * item * block_size(k) * d_model + 4 * (k + 2) * d_mlp * item
    else:
        products = d_mlp * (3 * item + 6 * coarse) + 4 * (k + 2) * d_mlp * item
        each = products + 8 * HELD_STEPS * d_model * item
    fits = (work.memory - shared) // each
    if fits < 1:
        raise ArgumentError(
            f"memory is {work.memory:,} bytes; with d_model {d_model} and d_mlp {d_mlp} one output at a time needs "
            f"{shared + each:,}, and {shared + SMALLEST_CHUNK * each:,} is enough to be fast."
        )
    largest = LARGEST_CHUNK
    if layer.W_gate.device.type == "cpu":
        enough = FORMED // (coarse * d_model**2) if method == "block" else HELD // (HELD_STEPS * d_model * item)
        largest = max(SMALLEST_CHUNK, enough)
    return min(fits, largest)


def _bytes_of_whole(layer: BilinearLayer) -> int:
    d_model, d_mlp = layer.W_gate.shape
    return 8 * (2 * d_mlp * d_model + 6 * d_model**2)


def _put_in_order(found: Leading, wanted: Wanted) -> None:
    """Order and signs for a reader, and the rounding of the result itself (of matrices of norm one).

    A tie that is broken by sign moves a value by half its error at most.
    """
    eps = torch.finfo(found.values.dtype).eps
    found.errors = torch.maximum(found.errors + 2 * eps * found.values.abs(), ROUNDINGS * eps * found.values.abs())
    found.residuals += eps
    order = wanted.in_order(found.values, found.errors)
    found.vectors = signed(found.vectors.gather(1, order[..., None].expand_as(found.vectors)))
    for name in ("values", "errors", "residuals"):
        setattr(found, name, getattr(found, name).gather(1, order))
