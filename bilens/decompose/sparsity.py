"""How sparse the interactions of each output are: outliers, and the kurtosis of all entries.

The entries of an output feature are those of its symmetric interaction matrix between input features, each pair once:
`Q_ij` (not `2 Q_ij`) of the strict lower triangle, the cross interactions, and `Q_ii` of the diagonal, the self
interactions.

1. form `Q` and `D Q`, and of `D Q D^T` the lower triangle only, in blocks; one output at a time in one buffer
2. quartiles of the strict lower triangle and of the diagonal separately (linear interpolation between order statistics,
   as numpy's; exact: a sample brackets them, what is inside the bracket is sorted)
3. outliers: beyond `q1 - f iqr` or `q3 + f iqr` of their own group. `f = 1.5` is Tukey's; of Gaussian entries it marks
   0.7 percent
4. excess kurtosis of all entries together, `m4 / m2^2 - 3` with population moments about the mean, sums in float64

Directions are taken at the length they have; only ratios of entries matter to 3 and 4.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from bilens._core.checks import name_of
from bilens._core.display import Tabular
from bilens.draw import plots
from bilens.errors import ArgumentError, OutOfRangeError
from bilens.layer.bilinear import BilinearLayer, interaction_matrix

BLOCK = 256  # rows of the triangle at a time
SORTED_WHOLE, SAMPLE, MARGIN = 2**16, 2**14, 0.02  # of the quartiles' brackets
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
        self, out: Float[Tensor, "pairs"], left: Float[Tensor, "n d_model"], right: Float[Tensor, "n d_model"]
    ) -> None:
        """`out = left @ right.T`, below the diagonal."""
        for low, high, start in self.blocks:
            height = high - low
            end = start + height * low
            if low:
                torch.mm(left[low:high], right[:low].T, out=out[start:end].view(height, low))
            square = left[low:high] @ right[low:high].T
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


@torch.no_grad()
def feature_entries(
    layer: BilinearLayer,
    outputs: Float[Tensor, "n d_model"],
    inputs: Float[Tensor, "d_sae d_model"],
    *,
    progress: bool = True,
    title: str = "interactions",
) -> Iterator[tuple[Float[Tensor, "pairs"], Float[Tensor, "d_sae"]]]:
    """`Q_ij` of the strict lower triangle (as in `Triangle`) and of the diagonal, output by output.

    The first is one buffer, overwritten by the next output: memory is that of half a matrix.
    """
    outputs, inputs = outputs.to(layer.W_out), inputs.to(layer.W_out)
    triangle = Triangle(len(inputs))
    cross = inputs.new_empty(len(triangle))
    for u in tqdm(outputs, desc=title, unit="output", disable=not progress):
        left = inputs @ interaction_matrix(layer, u)
        triangle.fill(cross, left, inputs)
        yield cross, (left * inputs).sum(1)


def quartiles(x: Float[Tensor, "n"]) -> Float[Tensor, "2"]:
    """First and third, by linear interpolation between order statistics: numpy's, exactly; NaN of nothing."""
    n = len(x)
    if n <= SORTED_WHOLE:
        return torch.quantile(x, x.new_tensor([0.25, 0.75])) if n else x.new_full((2,), torch.nan)
    sample = x[:: n // SAMPLE].sort().values
    found = []
    for share in (0.25, 0.75):
        position = share * (n - 1)
        rank = int(position)
        low, high = (sample[int((share + side * MARGIN) * (len(sample) - 1))] for side in (-1, 1))
        below = int((x < low).sum())
        inside = x[(x >= low) & (x <= high)]
        if not below <= rank < rank + 1 < below + len(inside):  # a sample that misleads
            below, inside = 0, x
        a, b = (inside.kthvalue(rank - below + place).values for place in (1, 2))
        found.append(torch.lerp(a, b, position - rank))
    return torch.stack(found)


def fences(quartile: Float[Tensor, "2"], fence: float) -> tuple[float, float]:
    """`q1 - f iqr` and `q3 + f iqr`."""
    q1, q3 = quartile.tolist()
    return q1 - fence * (q3 - q1), q3 + fence * (q3 - q1)


def outside(x: Float[Tensor, "n"], fence: float) -> Int[Tensor, "k"]:
    """The places of the outliers of `x`."""
    low, high = fences(quartiles(x), fence)
    return ((x < low) | (x > high)).nonzero().flatten()


def excess_kurtosis(*parts: Float[Tensor, "_"]) -> float:
    """`m4 / m2^2 - 3` of all entries of all parts, population moments about the common mean, sums in float64."""
    n = sum(len(part) for part in parts)
    mean = sum(part.sum(dtype=torch.float64).item() for part in parts) / max(n, 1)
    second = fourth = 0.0
    for part in parts:
        for chunk in part.split(MOMENT_CHUNK):
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
    progress: bool = True,
) -> Sparsity:
    """Outlier counts, quartiles and kurtosis of every output's interactions; see the module for what they are.

    Args:
        layer: its weights.
        outputs: output directions.
        inputs: input directions.
        fence: the `f` of the outliers.
        progress: show a bar.

    Raises:
        ArgumentError: a negative fence.
    """
    check_fence(fence)
    rows, crosses, selves = [], [], []
    for cross, self_ in feature_entries(layer, outputs, inputs, progress=progress, title="sparsity"):
        of_cross, of_self = quartiles(cross), quartiles(self_)
        counts = []
        for entries, quartile in ((cross, of_cross), (self_, of_self)):
            low, high = fences(quartile, fence)
            counts.append(int((entries < low).sum() + (entries > high).sum()))
        largest = [max((-part.min()).item(), part.max().item()) if len(part) else 0.0 for part in (cross, self_)]
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
        progress: show a bar.

    Raises:
        ArgumentError: a negative fence.
        OutOfRangeError: `n` below 1.
    """
    check_fence(fence)
    if n is not None and n < 1:
        raise OutOfRangeError(f"n is {n}, expected at least 1, or None for all.")
    triangle = Triangle(len(inputs))
    none = torch.zeros(0, dtype=torch.long, device=inputs.device)
    found = [(none, none, none, inputs.new_zeros(0))]
    for row, (cross, self_) in enumerate(feature_entries(layer, outputs, inputs, progress=progress, title="outliers")):
        places, own = outside(cross, fence), outside(self_, fence)
        coefficients = torch.cat([2 * cross[places], self_[own]])
        i, j = (torch.cat([of_pairs, own]) for of_pairs in triangle.pairs(places))
        order = coefficients.abs().argsort(descending=True, stable=True)[:n]
        found.append((torch.full_like(order, row), i[order], j[order], coefficients[order]))
    rows, i, j, coefficients = (torch.cat(parts) for parts in zip(*found, strict=True))
    return rows, i, j, coefficients


def check_fence(fence: float) -> None:
    if not fence >= 0:
        raise ArgumentError(f"fence is {fence}, expected 0 or more; 1.5 is usual.")
