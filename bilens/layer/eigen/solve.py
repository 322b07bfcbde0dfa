"""The leading eigenpairs of the interaction matrices of a whole layer's outputs, and how much of each they are.

1. choose how by measured cost (`cost`): Lanczos on the factors (`lanczos`); blocks of vectors on matrices formed from
   the third-order tensor (`block`), which pays where outputs are many and spectra decay slowly, as the steps that
   Lanczos takes for a first chunk tell; or forming every `Q` and solving it whole
2. outputs in chunks that fit the memory allowed and, on a CPU, the cache; each scaled to `||Q||_F = 1`
3. what a search leaves unresolved is solved whole
4. certify: the squares of all eigenvalues add up to `||Q||_F^2`, which the factors give, so that one missed can be no
   larger than `sqrt(||Q||_F^2 - sum of the squares found)`

`||Q_u||_F^2 = u^T H u` with one small matrix `H` for the layer, `H = W_out^T K W_out`, where `K` holds the inner
products of the hidden units' interaction matrices (`inner`).
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from bilens._core.display import Tabular
from bilens.errors import ArgumentError, OutOfRangeError, SAEMismatchError, nearest
from bilens.layer.bilinear import BilinearLayer, hidden_coefficients
from bilens.layer.eigen.blocks import OutputTensor, block_size, leading_eigenpairs_of_blocks
from bilens.layer.eigen.cost import Cost, Pilot, estimate
from bilens.layer.eigen.lanczos import leading_eigenpairs
from bilens.layer.eigen.pairs import by_magnitude, signed, sorted_eigenpairs
from bilens.layer.eigen.refine import InteractionOperator, Leading, tied_units

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

Method = Literal["auto", "lanczos", "block", "dense"]
STATUSES = ("bounded", "converged", "dense")
# Bytes that Lanczos holds of a chunk of outputs, forty vectors each: fewer outputs are slow, more are not faster.
HELD, HELD_STEPS, SMALLEST_CHUNK, LARGEST_CHUNK = 2**26, 40, 128, 2048
PILOT = 64  # outputs: enough to learn how many steps a spectrum takes, few enough to change over
FORMED = 2**27  # bytes of matrices formed at a time: more are not formed faster
GRAM_BLOCK = 2**22  # entries of K at a time
# Of the squared norm: how far it, and the sum of squares found, may be off in float32.
NORM_ROUNDING = 1e-5


@dataclass(frozen=True)
class EigenSweep(Tabular):
    """The leading eigenpairs of `n` interaction matrices.

    Attributes:
        values: by falling absolute value, the positive one first among those as large up to their errors.
        vectors: unit eigenvectors as rows, largest entry positive.
        errors: estimated absolute error of each value.
        residuals: `||Q v - lambda v||`.
        norms, traces: Frobenius norm and trace of every `Q`, from the factors.
        status: how it is known that none of the pairs is missed, an index into `STATUSES`: *bounded*, the norm leaves
            no room for a larger eigenvalue; *converged*, a search that went on after it converged found none, nor
            did a second one from another start; *dense*, all eigenvalues were computed.
        steps: of the search; 0 where there was none.
        method: how, and why.
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
        # Divided before they are squared: squares of large or small weights have no room in float32.
        ratios = self.values / self.norms.clamp_min(torch.finfo(self.norms.dtype).tiny)[..., None]
        return torch.where(self.norms > 0, (ratios**2).sum(-1), 1.0).clamp(max=1.0)

    @property
    def missed_bound(self) -> Float[Tensor, "n"]:
        """No eigenvalue that is not listed is larger than this in absolute value."""
        ratios = self.values / torch.where(self.norms > 0, self.norms, 1.0)[..., None]
        left = 1 + NORM_ROUNDING - (ratios**2).sum(-1)
        return self.norms * left.clamp_min(0).sqrt()

    def to_frame(self) -> "pd.DataFrame":
        """One row per output: `output, eigenvalue_1, ..., eigenvalue_k, error, share, norm, trace, status, steps`."""
        import pandas as pd

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

    def plot(self) -> "go.Figure":
        """How much of their interaction matrices the pairs found are, over all outputs."""
        from bilens.draw.plots import histogram

        k = self.values.shape[1]
        return histogram(self.shares.tolist(), x_title=f"share of {k} eigenpairs in the squared norm")

    def __repr__(self) -> str:
        n, k = self.values.shape
        counts = self.status.bincount(minlength=len(STATUSES)).tolist()
        known = ", ".join(f"{count} {name}" for name, count in zip(STATUSES, counts, strict=True) if count)
        return f"EigenSweep({n} outputs, {k} eigenpairs each; {known}; {self.method})"

    def __str__(self) -> str:
        return f"{self!r}\n{self.to_frame().head(10).to_string(index=False)}"


@torch.no_grad()
def top_eigenpairs(
    layer: BilinearLayer,
    outputs: Float[Tensor, "n d_model"],
    k: int = 2,
    *,
    tolerance: float = 1e-4,
    memory: int = 2**30,
    method: Method = "auto",
    seed: int = 0,
    progress: bool | Callable[[int, int], object] = True,
) -> EigenSweep:
    """The `k` eigenpairs of largest absolute value of the interaction matrix of every output direction.

    Args:
        layer: its weights; the results have their dtype and device.
        outputs: directions.
        k: small against d_model for Lanczos to pay; all `d_model` for whole spectra (`method="dense"`).
        tolerance: relative error of the eigenvalues, as estimated, which is cautiously. Ignored by `"dense"`.
        memory: bytes to use besides the layer and the result.
        method: `"lanczos"` never forms a `Q`; `"block"` forms them in low precision, and searches with many vectors at
            once; `"dense"` forms and solves all; `"auto"` takes what is fastest here.
        seed: of the start vectors. Same seed and method, same result, whatever the other outputs, to the tolerance.
        progress: show a bar, or a function that is told how many outputs are done, and of how many.

    Raises:
        OutOfRangeError: `k` is not in 1..d_model.
        SAEMismatchError: directions of another width than d_model.
        ArgumentError: an unknown method, a tolerance that is not positive, directions that are not finite, or less
            memory than one output needs.
    """
    d_model, d_mlp = layer.W_gate.shape
    _check_arguments(outputs, d_model, k, tolerance, method)
    layer, size_of_all = layer.to(torch.promote_types(layer.W_out.dtype, torch.float32)).of_moderate_size()
    u = outputs.to(layer.W_out)
    cost = estimate(d_model, d_mlp, k, u.dtype, u.device)
    possible = _possible(layer, k, cost.search_dtype, memory)
    n = len(u)
    chosen = method if method != "auto" else _cheapest(cost.per_output(n), possible)
    if chosen == "block" and 2 * block_size(k) > d_model:
        chosen = "dense"  # a block would be the whole space
    norms = frobenius_norms(layer, u)
    traces = hidden_coefficients(layer, u) @ (layer.W_gate * layer.W_in).sum(0)
    operator = InteractionOperator.of(layer.W_gate.T, layer.W_in.T)
    search, tensor, pilot = operator.to(cost.search_dtype), None, None
    result = Leading.empty(n, k, u)
    how = chosen if method == "auto" else f"{chosen}, as asked"
    wanted = method == "auto" and n >= 4 * PILOT and _undecided(cost, n, chosen, possible)
    start = 0
    with tqdm(total=n, desc="eigenpairs", unit="output", disable=progress is not True) as bar:
        while start < n:
            current = "lanczos" if wanted else chosen
            size = _chunk_size(layer, search.dtype, k, memory, current)
            size = min(size, PILOT) if wanted else size
            rows = slice(start, min(start + size, n))
            direction = _scaled(u[rows], norms[rows])
            c = hidden_coefficients(layer, direction)
            if wanted:
                found, pilot = _timed_lanczos(operator, search, c, k, tolerance, seed)
                chosen, wanted = _cheapest(cost.per_output(n, pilot), possible), False
                how = f"{chosen}, as a first {len(c)} took lanczos {pilot.steps:.0f} steps"
            elif current == "lanczos":
                found = leading_eigenpairs(operator, search, c, k, tolerance=tolerance, seed=seed)
            elif current == "block":
                tensor = tensor or OutputTensor.of(layer, cost.search_dtype, min(size, n - start))
                found = leading_eigenpairs_of_blocks(operator, tensor, direction, c, k, tolerance=tolerance, seed=seed)
            else:
                found = Leading.empty(len(c), k, u)
            _solve_whole(layer, operator, c, found, memory)
            _put_in_order(found, norms[rows, None], tolerance)
            for name, values in vars(found).items():
                getattr(result, name)[rows] = values
            start = rows.stop
            bar.update(len(c))
            if callable(progress):
                progress(rows.stop, n)
    searched = result.steps > 0
    if searched.any():
        how += f", {result.steps[searched].float().mean():.0f} steps on average"
    estimates = cost.per_output(n, pilot).items()
    milliseconds = ", ".join(f"{1e3 * s:.2g} ms {name}" for name, s in estimates if name in possible)
    converged, dense = (torch.tensor(STATUSES.index(name), device=u.device) for name in ("converged", "dense"))
    sweep = EigenSweep(
        values=result.values * size_of_all,
        vectors=result.vectors,
        errors=result.errors * size_of_all,
        residuals=result.residuals * size_of_all,
        norms=norms * size_of_all,
        traces=traces * size_of_all,
        status=torch.where(searched, converged, dense),
        steps=result.steps,
        method=f"{how}; estimated per output {milliseconds}, searching in {str(search.dtype).removeprefix('torch.')}",
    )
    sweep.status[searched & (sweep.missed_bound <= sweep.values[:, -1].abs())] = STATUSES.index("bounded")
    return sweep


@torch.no_grad()
def choose_method(
    layer: BilinearLayer,
    outputs: Float[Tensor, "n d_model"],
    k: int = 2,
    *,
    tolerance: float = 1e-4,
    memory: int = 2**30,
) -> str:
    """What `top_eigenpairs` with method `"auto"` would take for these outputs, from a first chunk of them.

    It is measured, so it may differ between machines and moments; what is chosen here can be given as `method`.
    """
    d_model, d_mlp = layer.W_gate.shape
    cost = estimate(d_model, d_mlp, k, torch.promote_types(layer.W_out.dtype, torch.float32), outputs.device)
    possible = _possible(layer, k, cost.search_dtype, memory)
    chosen = _cheapest(cost.per_output(len(outputs)), possible)
    if not _undecided(cost, len(outputs), chosen, possible):
        return chosen
    layer, _ = layer.to(torch.promote_types(layer.W_out.dtype, torch.float32)).of_moderate_size()
    u = outputs[:PILOT].to(layer.W_out)
    c = hidden_coefficients(layer, _scaled(u, frobenius_norms(layer, u)))
    operator = InteractionOperator.of(layer.W_gate.T, layer.W_in.T)
    _, pilot = _timed_lanczos(operator, operator.to(cost.search_dtype), c, k, tolerance, seed=0)
    return _cheapest(cost.per_output(len(outputs), pilot), possible)


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


def _check_arguments(outputs: Tensor, d_model: int, k: int, tolerance: float, method: str) -> None:
    if outputs.ndim != 2 or outputs.shape[1] != d_model:
        raise SAEMismatchError(
            f"output directions of shape {tuple(outputs.shape)}: expected (n, {d_model}), the layer's d_model."
        )
    if not outputs.isfinite().all():
        raise ArgumentError("the output directions hold NaN or infinite values.")
    if not 1 <= k <= d_model:
        raise OutOfRangeError(f"k is {k}, expected 1 to {d_model}.")
    if not 0 < tolerance < 1:
        raise ArgumentError(f"tolerance is {tolerance}, expected a relative error between 0 and 1, such as 1e-4.")
    methods = get_args(Method)
    if method not in methods:
        expected = ", ".join(map(repr, methods))
        raise ArgumentError(f"method is {method!r}, expected one of {expected}.{nearest(str(method), methods)}")


def _possible(layer: BilinearLayer, k: int, search_dtype: torch.dtype, memory: int) -> list[str]:
    """The methods that can find `k` pairs of this layer in this memory."""
    d_model, d_mlp = layer.W_gate.shape
    methods = ["dense"]
    if 4 * k <= d_model:  # the search must be able to hold the pairs wanted several times over
        methods.append("lanczos")
    if 2 * block_size(k) <= d_model and 2 * OutputTensor.bytes_of(d_model, d_mlp, search_dtype) <= memory:
        methods.append("block")
    return methods


def _scaled(u: Float[Tensor, "n d_model"], norms: Float[Tensor, "n"]) -> Float[Tensor, "n d_model"]:
    """Directions whose interaction matrices have norm 1, or 0."""
    return u / torch.where(norms > 0, norms, 1.0)[:, None]


def _timed_lanczos(
    operator: InteractionOperator,
    search: InteractionOperator,
    c: Float[Tensor, "n d_mlp"],
    k: int,
    tolerance: float,
    seed: int,
) -> tuple[Leading, Pilot]:
    start = time.perf_counter()
    found = leading_eigenpairs(operator, search, c, k, tolerance=tolerance, seed=seed)
    steps = found.steps.float().mean().item()
    return found, Pilot(steps, (time.perf_counter() - start) / len(c))


def _undecided(cost: Cost, n: int, chosen: str, possible: list[str]) -> bool:
    """Whether the choice between blocks and Lanczos waits for a first few outputs."""
    return {"block", "lanczos"} <= set(possible) and chosen != "dense" and cost.open_to_lanczos(n)


def _cheapest(seconds: dict[str, float], possible: list[str]) -> str:
    return min(possible, key=lambda name: seconds[name])


def _chunk_size(layer: BilinearLayer, search_dtype: torch.dtype, k: int, memory: int, method: str) -> int:
    """How many outputs at a time fit the memory allowed, and are worth it."""
    d_model, d_mlp = layer.W_gate.shape
    item, coarse = layer.W_gate.element_size(), search_dtype.itemsize
    shared = 4 * d_mlp * d_model * (item + coarse) + 3 * GRAM_BLOCK * item
    if method == "dense":
        each = _bytes_of_whole(layer)
    elif method == "block":
        shared += OutputTensor.bytes_of(d_model, d_mlp, search_dtype)
        each = 2 * coarse * d_model**2 + 8 * item * block_size(k) * d_model + 4 * (k + 2) * d_mlp * item
    else:
        products = d_mlp * (3 * item + 6 * coarse) + 4 * (k + 2) * d_mlp * item
        each = products + 8 * HELD_STEPS * d_model * item
    fits = (memory - shared) // each
    if fits < 1:
        raise ArgumentError(
            f"memory is {memory:,} bytes; with d_model {d_model} and d_mlp {d_mlp} one output at a time needs "
            f"{shared + each:,}, and {shared + SMALLEST_CHUNK * each:,} is enough to be fast."
        )
    largest = LARGEST_CHUNK
    if layer.W_gate.device.type == "cpu":
        enough = FORMED // (coarse * d_model**2) if method == "block" else HELD // (HELD_STEPS * d_model * item)
        largest = max(SMALLEST_CHUNK, enough)
    return min(fits, largest)


def _bytes_of_whole(layer: BilinearLayer) -> int:
    d_model, d_mlp = layer.W_gate.shape
    return layer.W_gate.element_size() * (2 * d_mlp * d_model + 6 * d_model**2)


def _solve_whole(
    layer: BilinearLayer, operator: InteractionOperator, c: Float[Tensor, "n d_mlp"], found: Leading, memory: int
) -> None:
    """Fill in what is not resolved, from all eigenpairs of each `Q_c`."""
    batch = max(1, min(32, memory // (2 * _bytes_of_whole(layer))))
    unresolved = (~found.resolved).nonzero().flatten()
    for rows in unresolved.split(batch) if len(unresolved) else ():
        raw = (layer.W_gate * c[rows, None]) @ layer.W_in.T
        values, vectors = sorted_eigenpairs(0.5 * (raw + raw.mT), found.values.shape[1])
        residuals = (operator(vectors, 0.5 * c[rows]) - values[..., None] * vectors).norm(dim=2)
        found.values[rows], found.vectors[rows], found.steps[rows] = values, vectors, 0
        found.residuals[rows], found.errors[rows] = residuals, residuals


def _put_in_order(found: Leading, scale: Float[Tensor, "n 1"], tolerance: float) -> None:
    """Order and signs for a reader, and the numbers of `Q` itself."""
    order = by_magnitude(found.values, tied_units(found.values.dtype, tolerance))
    found.vectors = signed(found.vectors.gather(1, order[..., None].expand_as(found.vectors)))
    for name in ("values", "errors", "residuals"):
        setattr(found, name, getattr(found, name).gather(1, order) * scale)
