"""How sparse the interactions of each output are: outliers, and the kurtosis of all entries.

The entries of an output feature are those of its symmetric interaction matrix between input features, each pair once:
`Q_ij` (not `2 Q_ij`) of the strict lower triangle, the cross interactions, and `Q_ii` of the diagonal, the self
interactions.

1. form `Q` and `D Q`, and of `D Q D^T` the lower triangle only, in blocks; one output at a time in one buffer. If there
   is no memory for the triangle, its blocks are made anew each time that they are looked at: four times as much work
2. quartiles of the strict lower triangle and of the diagonal separately (linear interpolation between order statistics,
   as numpy's; exact: a sample brackets them, what is inside the bracket is sorted)
3. outliers: beyond `q1 - f iqr` or `q3 + f iqr` of their own group. `f = 1.5` is Tukey's; of Gaussian entries it marks
   0.7 percent
4. excess kurtosis of all entries together, `m4 / m2^2 - 3` with population moments about the mean, sums in float64

Directions are taken at the length they have; only ratios of entries matter to 3 and 4.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from bilens._core.checks import MEMORY, check_budget, how_many_fit, name_of
from bilens._core.display import Tabular
from bilens.draw import plots
from bilens.errors import ArgumentError, OutOfRangeError
from bilens.layer.bilinear import BilinearLayer, interaction_matrix

BLOCK = 256  # rows of the triangle at a time
SORTED_WHOLE, SAMPLE, MARGIN = 2**16, 2**16, 0.008  # of the quartiles' brackets: four standard deviations
PIECE, FEWEST, PIECE_ENTRY = 2**22, 2**14, 64  # entries looked at together, and the bytes that each takes meanwhile
MOMENT_CHUNK = 2**18


@dataclass(frozen=True)
class Sparsity(Tabular):
    """How sparse each output's interactions are.

    Attributes:
        outputs: the output features, or 0..n-1 for directions.
        kurtosis: excess, of all entries; NaN where all are equal.
        cross_outliers, self_outliers: the numbers of outliers.
        cross_quartiles, self_quartiles: first and third.
        largest_cross, largest_self: largest `|Q_ij|`, `|Q_ii|`.
        fence: the `f` of the outliers.
        n_inputs: input features.
    """

    outputs: Int[Tensor, "n"]
    kurtosis: Float[Tensor, "n"]
    cross_outliers: Int[Tensor, "n"]
    self_outliers: Int[Tensor, "n"]
    cross_quartiles: Float[Tensor, "n 2"] = field(repr=False)
    self_quartiles: Float[Tensor, "n 2"] = field(repr=False)
    largest_cross: Float[Tensor, "n"] = field(repr=False)
    largest_self: Float[Tensor, "n"] = field(repr=False)
    fence: float
    n_inputs: int
    output_names: Sequence[str] | None = field(default=None, repr=False)

    @property
    def cross_share(self) -> Float[Tensor, "n"]:
        """Share of the cross interactions that are outliers."""
        return self.cross_outliers / max(1, self.n_inputs * (self.n_inputs - 1) // 2)

    def to_frame(self) -> pd.DataFrame:
        """One row per output: `output, name, kurtosis, cross_outliers, self_outliers, cross_share, cross_q1, cross_q3,
        self_q1, self_q3, largest_cross, largest_self`."""
        outputs = self.outputs.tolist()
        return pd.DataFrame(
            {
                "output": outputs,
                "name": [name_of(self.output_names, output) for output in outputs],
                "kurtosis": self.kurtosis.tolist(),
                "cross_outliers": self.cross_outliers.tolist(),
                "self_outliers": self.self_outliers.tolist(),
                "cross_share": self.cross_share.tolist(),
                "cross_q1": self.cross_quartiles[:, 0].tolist(),
                "cross_q3": self.cross_quartiles[:, 1].tolist(),
                "self_q1": self.self_quartiles[:, 0].tolist(),
                "self_q3": self.self_quartiles[:, 1].tolist(),
                "largest_cross": self.largest_cross.tolist(),
                "largest_self": self.largest_self.tolist(),
            }
        )

    def plot(self) -> go.Figure:
        """Each output's share of outliers against its kurtosis."""
        frame = self.to_frame().dropna(subset="kurtosis")
        return plots.scatter(
            frame.cross_share.tolist(),
            frame["kurtosis"].tolist(),
            frame.name.tolist(),
            "sparsity of interactions",
            x_title="share of cross interactions that are outliers",
            y_title="excess kurtosis",
        )

    def __str__(self) -> str:
        return self.to_frame().head(20).to_string(index=False)


# --- pure functions ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Triangle:
    """Where the pairs `i < j` of `n` features stand in a vector of their `n (n - 1) / 2` entries.

    Blocks of rows `j`; of each first the rectangle left of its diagonal block, then that block's strict lower triangle.
    So the rectangles are matrix products written where they belong.
    """

    n: int

    def __len__(self) -> int:
        return self.n * (self.n - 1) // 2

    @cached_property
    def blocks(self) -> list[tuple[int, int, int]]:
        """First row, last row + 1, and where the block starts."""
        return [(low, min(low + BLOCK, self.n), low * (low - 1) // 2) for low in range(0, self.n, BLOCK)]

    def fill(
        self,
        out: Float[Tensor, "_"],
        block: tuple[int, int, int],
        left: Float[Tensor, "rows d_model"],
        right: Float[Tensor, "n d_model"],
    ) -> None:
        """The entries of one block: `left @ right.T`, below the diagonal, `left` being the block's rows."""
        low, height = block[0], len(left)
        end = height * low
        if low:
            torch.mm(left, right[:low].T, out=out[:end].view(height, low))
        square = left @ right[low : low + height].T
        row, column = torch.tril_indices(height, height, -1, device=out.device)
        out[end : end + len(row)] = square[row, column]

    def pairs(self, index: Int[Tensor, "k"]) -> tuple[Int[Tensor, "k"], Int[Tensor, "k"]]:
        """`i, j` of places in the vector."""
        starts = torch.tensor([start for _, _, start in self.blocks], device=index.device)
        # The first two blocks may start at the same place: the last of them is the one with entries.
        low = (torch.searchsorted(starts, index, right=True) - 1) * BLOCK
        height = (self.n - low).clamp(max=BLOCK)
        at = index - low * (low - 1) // 2
        inside = at >= height * low  # in the diagonal block
        width = low.clamp_min(1)
        table = torch.tril_indices(BLOCK, BLOCK, -1, device=index.device)
        row, column = table[:, (at - height * low).clamp_min(0)]
        return torch.where(inside, low + column, at % width), low + torch.where(inside, row, at // width)


@dataclass(frozen=True)
class Entries:
    """The entries of one output in pieces: held, or made anew whenever they are gone through."""

    n: int
    pieces: Callable[[], Iterable[Float[Tensor, "_"]]]

    def __iter__(self) -> Iterator[tuple[int, Float[Tensor, "_"]]]:
        """Each piece, and the place of its first entry."""
        start = 0
        for piece in self.pieces():
            yield start, piece
            start += len(piece)

    @classmethod
    def of(cls, held: Float[Tensor, "n"]) -> "Entries":
        """Entries that are held whole."""
        return cls(len(held), lambda: held.split(PIECE))


@torch.no_grad()
def feature_entries(
    layer: BilinearLayer,
    outputs: Float[Tensor, "n d_model"],
    inputs: Float[Tensor, "d_sae d_model"],
    *,
    memory: int = MEMORY,
    progress: bool = True,
    title: str = "interactions",
) -> Iterator[tuple[Entries, Float[Tensor, "d_sae"]]]:
    """`Q_ij` of the strict lower triangle (as in `Triangle`) and of the diagonal, output by output.

    The first is one buffer, overwritten by the next output: half a matrix, or a block of it if memory is short.
    """
    outputs, inputs = outputs.to(layer.W_out), inputs.to(layer.W_out)
    triangle, size = Triangle(len(inputs)), inputs.element_size()
    d_model, d_mlp = layer.W_gate.shape
    largest = max((high * (high - 1) // 2 - start for _, high, start in triangle.blocks), default=0)  # of the blocks
    bracket = 0 if len(triangle) <= SORTED_WHOLE else 3 * MARGIN * len(triangle) * (2 * size + 16)
    besides = size * d_model * (d_mlp + 4 * d_model + 4 * BLOCK) + bracket + 32 * (SAMPLE + len(inputs))
    held, in_blocks = besides + len(triangle) * size, besides + largest * size
    how_many_fit(
        f"{title} of {len(inputs):,} input features", FEWEST * PIECE_ENTRY, memory, besides=min(held, in_blocks)
    )
    hold = held + FEWEST * PIECE_ENTRY <= memory
    at_once = min(PIECE, int((memory - (held if hold else in_blocks)) // PIECE_ENTRY))
    buffer = inputs.new_empty(len(triangle) if hold else largest)

    def made(matrix: Tensor, out: Tensor) -> Iterator[Tensor]:
        """The blocks of one output, behind each other in a buffer that holds all, or each in the place of the last."""
        for block in triangle.blocks:
            low, high, start = block
            there = out[start if hold else 0 :][: high * (high - 1) // 2 - start]
            triangle.fill(there, block, inputs[low:high] @ matrix, inputs)
            yield there

    for u in tqdm(outputs, desc=title, unit="output", disable=not progress):
        matrix = interaction_matrix(layer, u)
        diagonal = torch.cat([((rows @ matrix) * rows).sum(1) for rows in inputs.split(BLOCK)])
        if hold:
            for _ in made(matrix, buffer):
                pass
            yield Entries(len(triangle), lambda: buffer.split(at_once)), diagonal
        else:
            pieces = lambda matrix=matrix: (part for block in made(matrix, buffer) for part in block.split(at_once))  # noqa: E731
            yield Entries(len(triangle), pieces), diagonal


def quartiles(entries: Entries) -> Float[Tensor, "2"]:
    """First and third, by linear interpolation between order statistics: numpy's, exactly; NaN of nothing."""
    n = entries.n
    if n <= SORTED_WHOLE:
        x = torch.cat([piece for _, piece in entries])
        return torch.quantile(x, x.new_tensor([0.25, 0.75])) if n else x.new_full((2,), torch.nan)
    step = n // SAMPLE
    sample = torch.cat([piece[-start % step :: step] for start, piece in entries]).sort().values
    shares = (0.25, 0.75)
    brackets = [tuple(sample[int((share + side * MARGIN) * (len(sample) - 1))] for side in (-1, 1)) for share in shares]
    below, inside = [0, 0], [[sample[:0]], [sample[:0]]]
    for _, piece in entries:
        for which, (low, high) in enumerate(brackets):
            below[which] += int((piece < low).sum())
            inside[which].append(piece[(piece >= low) & (piece <= high)])
    found = []
    for share, under, parts in zip(shares, below, inside, strict=True):
        position = share * (n - 1)
        rank, x = int(position), torch.cat(parts)
        if not under <= rank < rank + 1 < under + len(x):  # a sample that misleads
            under, x = 0, torch.cat([piece for _, piece in entries])
        a, b = (x.kthvalue(rank - under + place).values for place in (1, 2))
        found.append(torch.lerp(a, b, position - rank))
    return torch.stack(found)


def fences(quartile: Float[Tensor, "2"], fence: float) -> tuple[float, float]:
    """`q1 - f iqr` and `q3 + f iqr`."""
    q1, q3 = quartile.tolist()
    return q1 - fence * (q3 - q1), q3 + fence * (q3 - q1)


def outside(entries: Entries, fence: float) -> Iterator[tuple[Int[Tensor, "k"], Float[Tensor, "k"]]]:
    """The places of the outliers and their values, piece by piece."""
    low, high = fences(quartiles(entries), fence)
    for start, piece in entries:
        places = ((piece < low) | (piece > high)).nonzero().flatten()
        yield start + places, piece[places]


def excess_kurtosis(*groups: Entries) -> float:
    """`m4 / m2^2 - 3` of all entries of all groups, population moments about the common mean, sums in float64."""
    n = sum(group.n for group in groups)
    mean = sum(piece.sum(dtype=torch.float64).item() for group in groups for _, piece in group) / max(n, 1)
    second = fourth = 0.0
    for piece in (piece for group in groups for _, piece in group):
        for chunk in piece.split(MOMENT_CHUNK):
            squares = (chunk.double() - mean).square_()
            second += squares.sum().item()
            fourth += (squares @ squares).item()
    return n * fourth / second**2 - 3 if second else float("nan")


def measure_sparsity(
    layer: BilinearLayer,
    outputs: Float[Tensor, "n d_model"],
    inputs: Float[Tensor, "d_sae d_model"],
    *,
    fence: float = 1.5,
    memory: int = MEMORY,
    progress: bool = True,
) -> Sparsity:
    """Outlier counts, quartiles and kurtosis of every output's interactions; see the module for what they are.

    Args:
        layer: its weights.
        outputs: output directions.
        inputs: input directions.
        fence: the `f` of the outliers.
        memory: bytes to work in, and at most as many for the result; 1 GiB by default.
        progress: show a bar.

    Raises:
        ArgumentError: a negative fence, or less memory than the smallest blocks take.
    """
    check_fence(fence)
    rows, crosses, selves = [], [], []
    options = {"memory": memory, "progress": progress}
    for cross, diagonal in feature_entries(layer, outputs, inputs, title="sparsity", **options):  # type: ignore[arg-type]
        self_ = Entries.of(diagonal)
        of_cross, of_self = quartiles(cross), quartiles(self_)
        counts, largest = [], []
        for entries, quartile in ((cross, of_cross), (self_, of_self)):
            low, high = fences(quartile, fence)
            pieces = [
                (int((piece < low).sum() + (piece > high).sum()), max((-piece.min()).item(), piece.max().item()))
                for _, piece in entries
                if len(piece)
            ]
            counts.append(sum(count for count, _ in pieces))
            largest.append(max((most for _, most in pieces), default=0.0))
        rows.append((excess_kurtosis(cross, self_), *counts, *largest))
        crosses.append(of_cross)
        selves.append(of_self)
    table = torch.tensor(rows, dtype=torch.float64).reshape(-1, 5)
    none = torch.zeros(0, 2)
    return Sparsity(
        outputs=torch.arange(len(table)),
        kurtosis=table[:, 0],
        cross_outliers=table[:, 1].long(),
        self_outliers=table[:, 2].long(),
        cross_quartiles=torch.stack(crosses) if crosses else none,
        self_quartiles=torch.stack(selves) if selves else none,
        largest_cross=table[:, 3],
        largest_self=table[:, 4],
        fence=fence,
        n_inputs=len(inputs),
    )


def find_outliers(
    layer: BilinearLayer,
    outputs: Float[Tensor, "n_out d_model"],
    inputs: Float[Tensor, "d_sae d_model"],
    n: int | None = 1000,
    *,
    fence: float = 1.5,
    memory: int = MEMORY,
    progress: bool = True,
) -> tuple[Int[Tensor, "pair"], Int[Tensor, "pair"], Int[Tensor, "pair"], Float[Tensor, "pair"]]:
    """The outlier interactions themselves: `output, i, j, coefficient` (`2 Q_ij` of a cross pair), by output.

    Args:
        layer: its weights.
        outputs: output directions.
        inputs: input directions.
        n: the largest number for each output, by their coefficients; `None` gives all (on a trained layer some percent
            of all pairs).
        fence: the `f` of the outliers.
        memory: bytes to work in, and at most as many for the result; 1 GiB by default.
        progress: show a bar.

    Raises:
        ArgumentError: a negative fence, or less memory than the smallest blocks take.
        OutOfRangeError: `n` below 1.
    """
    check_fence(fence)
    if n is not None and n < 1:
        raise OutOfRangeError(f"n is {n}, expected at least 1, or None for all.")
    triangle = Triangle(len(inputs))
    none = torch.zeros(0, dtype=torch.long, device=inputs.device)
    found = [(none, none, none, inputs.new_zeros(0))]
    options = {"memory": memory, "progress": progress}
    every = feature_entries(layer, outputs, inputs, title="outliers", **options)  # type: ignore[arg-type]
    for row, (cross, diagonal) in enumerate(every):
        best = (none, none, inputs.new_zeros(0))
        for own, entries in ((False, cross), (True, Entries.of(diagonal))):
            for places, values in outside(entries, fence):
                ends = (places, places) if own else triangle.pairs(places)
                parts = zip(best, (*ends, values if own else 2 * values), strict=True)
                i, j, coefficients = (torch.cat(pair) for pair in parts)
                order = coefficients.abs().argsort(descending=True, stable=True)[:n]
                best = i[order], j[order], coefficients[order]
                kept = sum(len(part[0]) for part in found) + len(order)
                check_budget(f"a list of {kept:,} outliers", 64 * kept, memory, "ask for the largest alone (`n`)")
        found.append((torch.full_like(best[0], row), *best))
    rows, i, j, coefficients = (torch.cat(parts) for parts in zip(*found, strict=True))
    return rows, i, j, coefficients


def check_fence(fence: float) -> None:
    if not fence >= 0:
        raise ArgumentError(f"fence is {fence}, expected 0 or more; 1.5 is usual.")
