"""The largest interactions of a whole layer: the top N of |coefficient| over all (output, input, input) triples.

    coefficient(o, i, i) = Q_o,ii        coefficient(o, i, j) = 2 Q_o,ij    (i < j, each pair once)
    Q_o,ij = 1/2 sum_m c_om (a_im b_jm + b_im a_jm)                         a = D W_gate, b = D W_in, c = U W_out^T

Going output by output means forming `Q_o` and `D Q_o D^T` for each. Here the pair is the outer loop: all outputs of a
pair are `U' g_ij` with one vector `g_ij` of at most d_model numbers.

1. factor the outputs, `c = U' W'^T`, with `p = min(outputs, d_model)` columns; where there are more outputs than that,
   in a metric that evens out the spread of `g` (`S U` and `S^-1 g` have the same products, and closer bounds)
2. contract the layer to the core tensor `G_pab` of the output and input spaces once (or, where it does not fit the
   memory or would not pay, go through the hidden units every time); then `H_i = G d_i`, p x d, per input feature
3. `g_ij = H_i d_j` for `j` from `i` on only: symmetry is half the work. Input features by falling size, so that the
   N-th largest found so far, the threshold, rises quickly
4. skip, by Cauchy-Schwarz `|u . g| <= |u| |g|`, pairs for blocks of outputs of falling norm
5. screen the others by `U' g` in bfloat16 where this kind of device multiplies it faster, with the error bounded by
   `|u| |g|` times bfloat16's unit roundoff; recompute in full precision what may pass
6. whatever comes within `TOLERANCE` of the threshold is evaluated in float64 from the layer's own weights; by these
   numbers the N are chosen, and equal ones by (output, i, j)

The result is that of a float64 search of everything, if the full precision of step 5 is good to `TOLERANCE` of the
threshold. That is checked on everything evaluated in step 6: if one is off by more than a quarter of it, the layer is
searched again in float64.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from bilens._core.checks import MEMORY
from bilens.errors import ArgumentError, OutOfRangeError, SAEMismatchError
from bilens.layer.bilinear import (
    BFLOAT16_FACTORS,
    BFLOAT16_RESULT,
    BilinearLayer,
    branches,
    products,
    search_dtype,
    triple_coefficients,
)

TOLERANCE = 2.0**-10
ROWS, FEATURES, OUTPUTS = 2048, 64, 512  # pairs at a time, input features whose H are held, outputs in a block
SAMPLE = 2048  # pairs to learn the metric from
SETTLE = 1024  # candidates that wait for their float64 values


@dataclass(frozen=True)
class Triples:
    """Triples by falling |score|, equal ones by (output, i, j); indices into the directions given, `i <= j`.

    Attributes:
        coefficients: the coefficients, in float64.
        scores: coefficient times weight; the coefficient itself without weights.
        method: the way they were found.
    """

    outputs: Int[Tensor, "n"]
    i: Int[Tensor, "n"]
    j: Int[Tensor, "n"]
    coefficients: Float[Tensor, "n"]
    scores: Float[Tensor, "n"]
    method: str


@torch.no_grad()
def top_triples(
    layer: BilinearLayer,
    outputs: Float[Tensor, "n_out d_model"],
    inputs: Float[Tensor, "n_in d_model"],
    n: int,
    *,
    weights: Float[Tensor, "n_in n_in"] | None = None,
    floor: float = 0.0,
    memory: int = MEMORY,
    progress: bool = True,
) -> Triples:
    """The `n` triples of largest `|coefficient|` (times `|weight|`), exactly; see the module for how.

    Triples of score zero are left out, so fewer than `n` may come.

    Args:
        layer: its weights.
        outputs: output directions `U`.
        inputs: input directions `D`.
        n: the number of triples.
        weights: symmetric, one per pair of inputs, dense.
        floor: leave out what is below this `|score|`.
        memory: bytes to work in, and at most as many for the result; 1 GiB by default.
        progress: show a bar.

    Raises:
        ArgumentError: directions or weights that are not finite, weights that are not symmetric, or less memory than
            the smallest step takes.
        OutOfRangeError: `n` is less than 1, or more than there are triples.
        SAEMismatchError: directions of another width than d_model, or weights of another size than there are inputs.
    """
    _check(layer, outputs, inputs, n, weights)
    outputs, inputs = outputs.to(layer.W_out), inputs.to(layer.W_out)
    dtypes = dict.fromkeys((layer.W_out.dtype, torch.float64))
    for dtype in dtypes:
        search = _Search(layer, outputs, inputs, n, weights, floor, memory, dtype)
        try:
            return search.run(progress)
        except _ImpreciseError:
            continue
    raise AssertionError("a float64 search found its own numbers imprecise")  # evaluated in float64, too


class _ImpreciseError(Exception):
    """A number of the search is too far from its float64 value."""


class _Best:
    """The `n` best so far by their float64 scores, and what it takes to be one of them."""

    def __init__(self, n: int, floor: float, strict: bool) -> None:
        self.n, self.floor, self.threshold, self.strict = n, floor, floor, strict
        self.found: np.ndarray = np.zeros((3, 0), dtype=np.int64)
        self.scores: np.ndarray = np.zeros(0)

    def add(self, triples: np.ndarray, scores: np.ndarray, approximate: np.ndarray) -> None:
        """Take in some with their float64 scores; `approximate` are those of the search."""
        start = len(self.scores)
        triples, scores = np.concatenate([self.found, triples], 1), np.concatenate([self.scores, scores])
        order = np.lexsort((*triples[::-1], -np.abs(scores)))
        order = order[np.abs(scores[order]) >= max(self.floor, np.finfo(float).tiny)][: self.n]
        self.found, self.scores = triples[:, order], scores[order]
        if len(order) == self.n:
            self.threshold = float(np.abs(self.scores[-1]))
        worst = np.abs(np.abs(scores[start:]) - np.abs(approximate)).max(initial=0)
        if self.strict and len(order) == self.n and worst > TOLERANCE / 4 * self.threshold:
            raise _ImpreciseError


class _Search:
    """One layer's search in one dtype."""

    def __init__(
        self,
        layer: BilinearLayer,
        outputs: Float[Tensor, "n_out d_model"],
        inputs: Float[Tensor, "n_in d_model"],
        n: int,
        weights: Float[Tensor, "n_in n_in"] | None,
        floor: float,
        memory: int,
        dtype: torch.dtype,
    ) -> None:
        cpu = (tensor.cpu() for tensor in vars(layer).values())  # not every device has float64
        self.exact = BilinearLayer(*cpu).to(torch.float64), outputs.cpu().double(), inputs.cpu().double()
        layer = layer.to(dtype)
        outputs, inputs = outputs.to(dtype), inputs.to(dtype)
        self.n_in, self.d_model = inputs.shape
        self.left, self.right = layer.W_gate.T.contiguous(), layer.W_in.T.contiguous()
        self.weights = None if weights is None else weights.to(inputs.device)
        self.order = _by_size(layer, outputs, inputs, weights)
        self.inputs = inputs[self.order]
        self.hidden, factor = _factor_outputs(layer, outputs, self.inputs)
        self.p = self.hidden.shape[1]
        self.best = _Best(n, floor, strict=dtype != torch.float64)
        self.pending: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        self.waiting = 0
        self.factor, self.by_norm = factor, None
        self.screen = dtype if factor is None else search_dtype(dtype, inputs.device)
        if factor is not None:
            norms = factor.norm(dim=1)
            self.by_norm = norms.argsort(descending=True)
            self.factor, self.norms = factor[self.by_norm], norms[self.by_norm]
            self.coarse = self.factor.to(self.screen)
        self.rows, self.features, self.use_core = self._plan(len(outputs), memory, inputs.element_size())
        self.pairs = self.multiplied = 0

    def _plan(self, n_out: int, memory: int, size: int) -> tuple[int, int, bool]:
        """Pairs at a time, input features at a time, and whether to make the core tensor."""
        d, m, p, n_in = self.d_model, len(self.left), self.p, self.n_in
        row = 2 * p * size + 4 * p + 4 * size * min(n_out, OUTPUTS) + 2 * size * d
        feature = size * p * d
        core = size * p * d * d
        pays = m * d + 2 * n_in * d < 2 * n_in * m  # operations over p d, half of the core's by symmetry
        use_core = bool(pays and core <= memory // 2)
        factors = 0 if self.factor is None else 2 * n_out * p * size
        rest = memory - use_core * core - factors - 16 * (3 * m + n_out + n_in) * d
        rows, features = min(ROWS, int(rest // 2 // row)), min(FEATURES, n_in, int(rest // 4 // feature))
        if rows < 1 or features < 1:
            needed = memory - rest + max(2 * row, 4 * feature)
            raise ArgumentError(f"memory {memory} bytes is too little: this layer's search takes {needed} at least.")
        return rows, features, use_core

    def run(self, progress: bool) -> Triples:
        core = _core(self.left, self.right, self.hidden) if self.use_core else None
        total = self.n_in * (self.n_in + 1) // 2
        buffer = self.inputs.new_empty(self.rows, self.p)
        with tqdm(total=total, desc="interactions", unit="pair", unit_scale=True, disable=not progress) as bar:
            for start in range(0, self.n_in, self.features):
                stop = min(start + self.features, self.n_in)
                contracted = self._contract(core, start, stop)
                for segments in _tiles(start, stop, self.n_in, self.rows):
                    self._tile(contracted, start, segments, buffer)
                    bar.update(sum(high - low for _, low, high in segments))
        self._settle()
        return self._result()

    def _contract(self, core: Tensor | None, start: int, stop: int) -> Float[Tensor, "p features d_model"]:
        """`2 H_i` of a few input features."""
        directions = self.inputs[start:stop]
        if core is not None:
            return torch.matmul(directions, core)
        a, b = directions @ self.left.T, directions @ self.right.T
        out = directions.new_empty(self.p, stop - start, self.d_model)
        for k in range(stop - start):
            out[:, k] = self.hidden.T @ (a[k][:, None] * self.right).addcmul_(b[k][:, None], self.left)
        return out

    def _tile(self, contracted: Tensor, start: int, segments: list[tuple[int, int, int]], buffer: Tensor) -> None:
        """All outputs of some pairs, given as (i, first j, last j + 1)."""
        at = 0
        i_of: list[tuple[int, int]] = []
        j_of: list[Tensor] = []
        for i, low, high in segments:
            directions, j = self.inputs[low:high], torch.arange(low, high, device=buffer.device)
            if self.weights is not None:
                weights = self.weights[self.order[i], self.order[low:high]].abs().to(directions)
                some = weights.nonzero().flatten()
                directions, j = directions[some] * weights[some, None], j[some]
            g = torch.mm(directions, contracted[:, i - start].T, out=buffer[at : at + len(j)])
            g[j == i] *= 0.5
            i_of.append((i, len(j)))
            j_of.append(j)
            at += len(j)
        if not at:
            return
        counts = torch.tensor([count for _, count in i_of], device=buffer.device)
        first = torch.tensor([i for i, _ in i_of], device=buffer.device).repeat_interleave(counts)
        self._outputs(buffer[:at], first, torch.cat(j_of))

    def _outputs(self, g: Float[Tensor, "rows p"], i: Int[Tensor, "rows"], j: Int[Tensor, "rows"]) -> None:
        """Offer what may be among the best of all outputs of the pairs `i, j`."""
        self.pairs += len(g)
        if self.factor is None:  # the outputs themselves
            rows = (g.abs().amax(1) >= self._least).nonzero().flatten()
            self.multiplied += g.numel()
            self._offer(g[rows], 0, i[rows], j[rows])
            return
        norms = g.norm(dim=1)
        rows, coarse = torch.arange(len(g), device=g.device), None
        for low in range(0, len(self.factor), OUTPUTS):
            block, largest = slice(low, low + OUTPUTS), self.norms[low]
            passing = norms * largest >= self._least
            count = int(passing.sum())
            if not count:
                break
            # Later blocks have smaller outputs, so fewer pairs; a gather only where it spares enough.
            if coarse is None or count < 0.8 * len(rows):
                rows = passing.nonzero().flatten()
                coarse = (g if count == len(g) else g[rows]).to(self.screen)
            self.multiplied += len(rows) * (min(low + OUTPUTS, len(self.factor)) - low)
            values = coarse @ self.coarse[block].T
            peak = values.abs_().amax(1).to(norms.dtype)
            if self.screen == torch.bfloat16:
                peak = peak * (1 + BFLOAT16_RESULT) + norms[rows] * (largest * BFLOAT16_FACTORS)
            chosen = rows[peak >= self._least]
            if len(chosen):
                self._offer(g[chosen] @ self.factor[block].T, low, i[chosen], j[chosen])

    @property
    def _least(self) -> float:
        """An approximate value below this cannot be among the best."""
        return self.best.threshold * (1 - TOLERANCE)

    def _offer(self, values: Float[Tensor, "rows outputs"], first: int, i: Tensor, j: Tensor) -> None:
        flat = values.abs()
        least = max(self._least, torch.finfo(values.dtype).tiny)
        rows, outputs = (flat >= least).nonzero(as_tuple=True)
        if len(rows) > 2 * self.best.n:  # only at first: most of these cannot be among the best even of this tile
            kth = flat[rows, outputs].kthvalue(len(rows) - self.best.n + 1).values * (1 - 2 * TOLERANCE)
            keep = flat[rows, outputs] >= kth
            rows, outputs = rows[keep], outputs[keep]
        if len(rows):
            self.pending.append((outputs + first, i[rows], j[rows], values[rows, outputs]))
            self.waiting += len(rows)
        if self.waiting >= min(self.best.n, SETTLE):
            self._settle()

    def _settle(self) -> None:
        """Evaluate the pending ones in float64."""
        if not self.pending:
            return
        outputs, i, j, approximate = (torch.cat(parts) for parts in zip(*self.pending, strict=True))
        self.pending.clear()
        self.waiting = 0
        outputs = outputs if self.by_norm is None else self.by_norm[outputs]
        i, j = self.order[i], self.order[j]
        triples = torch.stack([outputs, torch.minimum(i, j), torch.maximum(i, j)]).cpu()
        self.best.add(triples.numpy(), self._scores(triples)[1].numpy(), approximate.cpu().double().numpy())

    def _scores(self, triples: Int[Tensor, "3 n"]) -> tuple[Float[Tensor, "n"], Float[Tensor, "n"]]:
        """Coefficients and scores in float64."""
        coefficients = triple_coefficients(*self.exact, *triples)
        if self.weights is None:
            return coefficients, coefficients
        i, j = triples[1:].to(self.weights.device)
        return coefficients, coefficients * self.weights[i, j].cpu()

    def _result(self) -> Triples:
        triples = torch.from_numpy(self.best.found)
        coefficients, scores = self._scores(triples)
        share = self.multiplied / max(1, self.pairs * len(self.exact[1]))
        how = "core tensor" if self.use_core else "through the hidden units"
        dtype = str(self.screen).removeprefix("torch.")
        method = f"{how}; {share:.0%} of the triples multiplied, in {dtype}, the others bounded"
        outputs, i, j = triples
        return Triples(outputs, i, j, coefficients, scores, method)


def _check(layer: BilinearLayer, outputs: Tensor, inputs: Tensor, n: int, weights: Tensor | None) -> None:
    d_model, n_in = layer.W_gate.shape[0], len(inputs)
    for name, directions in (("outputs", outputs), ("inputs", inputs)):
        if directions.ndim != 2 or directions.shape[1] != d_model:
            raise SAEMismatchError(f"{name} of shape {tuple(directions.shape)}: expected (n, {d_model}).")
        if not directions.isfinite().all():
            raise ArgumentError(f"the {name} hold NaN or infinite values.")
    triples = len(outputs) * n_in * (n_in + 1) // 2
    if not 1 <= n <= triples:
        raise OutOfRangeError(
            f"n is {n}, expected 1 to {triples}, the number of triples of {len(outputs)} outputs and {n_in} inputs."
        )
    if weights is None:
        return
    if weights.shape != (n_in, n_in):
        raise SAEMismatchError(f"weights of shape {tuple(weights.shape)} for {n_in} inputs: expected ({n_in}, {n_in}).")
    if not weights.isfinite().all():
        raise ArgumentError("the weights hold NaN or infinite values.")
    if not torch.allclose(weights, weights.T, rtol=1e-4, atol=1e-6 * float(weights.abs().max())):
        raise ArgumentError("the weights are not symmetric: a pair (i, j) is the pair (j, i). Use (w + w.T) / 2.")


def _by_size(layer: BilinearLayer, outputs: Tensor, inputs: Tensor, weights: Tensor | None) -> Int[Tensor, "n_in"]:
    """The input features by roughly how large their interactions are, the largest first."""
    share = (outputs @ layer.W_out.T).square().mean(0)
    size = torch.cat(
        [(d @ layer.W_gate).square() @ share + (d @ layer.W_in).square() @ share for d in inputs.split(512)]
    )
    if weights is not None:
        size = size * weights.abs().amax(1).to(size) ** 2
    return size.argsort(descending=True)


def _factor_outputs(
    layer: BilinearLayer, outputs: Float[Tensor, "n_out d_model"], inputs: Float[Tensor, "n_in d_model"]
) -> tuple[Float[Tensor, "d_mlp p"], Float[Tensor, "n_out p"] | None]:
    """`W', U'` with `c^T = W' U'^T`; `U'` is `None` where it would be the identity."""
    if len(outputs) <= outputs.shape[1]:
        return layer.W_out @ outputs.T, None
    generator = torch.Generator().manual_seed(0)
    i, j = (inputs[torch.randint(len(inputs), (SAMPLE,), generator=generator)] for _ in range(2))
    g = products(branches(layer, i), branches(layer, j)) @ layer.W_out
    values, vectors = torch.linalg.eigh(g.T @ g)
    # The fourth root: half-way between the metric of the outputs and that of the g.
    scale = (values / values[-1].clamp_min(torch.finfo(g.dtype).tiny)).clamp_min(1e-6) ** 0.25
    return (layer.W_out @ vectors) / scale, (outputs @ vectors) * scale


def _core(
    left: Float[Tensor, "d_mlp d_model"], right: Float[Tensor, "d_mlp d_model"], hidden: Float[Tensor, "d_mlp p"]
) -> Float[Tensor, "p d_model d_model"]:
    """`2 G_pab = sum_m W'_mp (l_ma r_mb + r_ma l_mb)`, one half and mirrored."""
    d_model = left.shape[1]
    core = left.new_empty(hidden.shape[1], d_model, d_model)
    for a in range(d_model):
        products = (left[:, a, None] * right[:, a:]).addcmul_(right[:, a, None], left[:, a:])
        core[:, a, a:] = core[:, a:, a] = hidden.T @ products
    return core


def _tiles(start: int, stop: int, n: int, rows: int) -> Iterator[list[tuple[int, int, int]]]:
    """The pairs `i <= j < n` of `i` in `start..stop`, as lists of (i, first j, last j + 1) of at most `rows` pairs."""
    tile: list[tuple[int, int, int]] = []
    room = rows
    for i in range(start, stop):
        low = i
        while low < n:
            high = min(n, low + room)
            tile.append((i, low, high))
            room, low = room - (high - low), high
            if not room:
                yield tile
                tile, room = [], rows
    if tile:
        yield tile
