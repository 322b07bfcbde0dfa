"""Pairs of input features that make small logical circuits: AND, XOR, negation, inhibition.

For one output and a pair `i, j` the interaction matrix has the 2x2 block `[[Q_ii, Q_ij], [Q_ij, Q_jj]]`. With typical
activations `f_i`, `f_j` (what the features have where they are active; 1 without data) the pair alone adds to the
output's pre-activation, `(i on, j on)`:

    z(1, 0) = Q_ii f_i^2        z(0, 1) = Q_jj f_j^2        z(1, 1) = z(1, 0) + z(0, 1) + x,  x = 2 Q_ij f_i f_j

Measured in units of the largest of the three absolute values, M, a case is *on* if `z >= M / 2` and *off* if
`z <= M / 4` (negative ones, too). Where the cross term decides, `|x| >= M / 2`, the truth table names the motif:

    motif        z(1, 0)   z(0, 1)   z(1, 1)        what it says
    and          off       off       on             fires if both are on
    xor          on        on        off            fires if one is on, not both
    negation     on        off       off            fires for one unless the other is on (either way round)
    inhibition   off       off       z <= -M / 2    the two together hold the output down

Its strength is the gap between the cases, in units of the pre-activation: the least of what is on less the most of what
is off (`z(0, 0) = 0` is one of those); for inhibition `-z(1, 1)` less the most that one alone subtracts. All other
tables (an OR, cases between *on* and *off*) have no name here.

Only outlier pairs are looked at (`sparsity`): those whose `Q_ij` lies beyond the fences of its output's quartiles. That
is a statement about weights; most pairs of a trained layer never fire on one token, and the strongest of their motifs
never happen. `together` leaves those pairs out.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Float, Int
from torch import Tensor

from bilens._core.checks import MEMORY, name_of
from bilens._core.display import Tabular
from bilens.decompose.sparsity import Triangle, check_fence, feature_entries, outside
from bilens.draw import plots
from bilens.errors import ArgumentError, OutOfRangeError, nearest
from bilens.layer.bilinear import BilinearLayer

MOTIFS = ("and", "xor", "negation", "inhibition")
ON, OFF = 0.5, 0.25


@dataclass(frozen=True)
class Motifs(Tabular):
    """Motifs by falling strength.

    Attributes:
        outputs, i, j: `i < j`, except for a negation: there `i` is the one that `j` negates.
        kinds: indices into `MOTIFS`.
        table: `z(1, 0), z(0, 1), z(1, 1)`.
        strengths: the gap in the truth table.
        counts: the number of motifs of each kind, listed or not.
    """

    outputs: Int[Tensor, "n"]
    i: Int[Tensor, "n"]
    j: Int[Tensor, "n"]
    kinds: Int[Tensor, "n"]
    table: Float[Tensor, "n 3"]
    strengths: Float[Tensor, "n"]
    counts: dict[str, int]
    input_names: Sequence[str] | None = field(default=None, repr=False)
    output_names: Sequence[str] | None = field(default=None, repr=False)

    def to_frame(self) -> pd.DataFrame:
        """One row per motif: `output, i, j, motif, strength, z_10, z_01, z_11, output_name, i_name, j_name`."""
        outputs, i, j = self.outputs.tolist(), self.i.tolist(), self.j.tolist()
        return pd.DataFrame(
            {
                "output": outputs,
                "i": i,
                "j": j,
                "motif": [MOTIFS[kind] for kind in self.kinds.tolist()],
                "strength": self.strengths.tolist(),
                "z_10": self.table[:, 0].tolist(),
                "z_01": self.table[:, 1].tolist(),
                "z_11": self.table[:, 2].tolist(),
                "output_name": [name_of(self.output_names, output) for output in outputs],
                "i_name": [name_of(self.input_names, a) for a in i],
                "j_name": [name_of(self.input_names, b) for b in j],
            }
        )

    def plot(self, top: int = 20) -> go.Figure:
        """The truth tables of the `top` ones, as a heat map."""
        frame = self.to_frame().head(top)
        sign = {"and": "and", "xor": "xor", "negation": "and not", "inhibition": "against"}
        labels = [f"{r.output_name} <- {r.i_name} {sign[r.motif]} {r.j_name}" for r in frame.itertuples()]
        cases = ["first alone", "second alone", "both"]
        return plots.heatmap(frame[["z_10", "z_01", "z_11"]].to_numpy(), labels, cases, "motifs")

    def __str__(self) -> str:
        counts = ", ".join(f"{count} {kind}" for kind, count in self.counts.items())
        return f"{counts} among the outlier pairs\n{self.to_frame().head(20).to_string(index=False)}"


def classify(
    first: Float[Tensor, "n"], second: Float[Tensor, "n"], both: Float[Tensor, "n"]
) -> tuple[Int[Tensor, "n"], Float[Tensor, "n"]]:
    """The motif of each truth table, an index into `MOTIFS` or -1, and its strength (0 for those without)."""
    zero = torch.zeros_like(both)
    cases = torch.stack([first, second, both])
    largest = cases.abs().amax(0)
    on, off = cases >= ON * largest, cases <= OFF * largest
    cross = both - first - second
    decides = (cross.abs() >= ON * largest) & (largest > 0)
    alone = off[0] & off[1]
    one = (on[0] & off[1]) | (off[0] & on[1])
    lower, upper = torch.minimum(first, second), torch.maximum(first, second)
    tests = (
        (alone & on[2], both - upper.clamp_min(0)),
        (on[0] & on[1] & off[2], lower - both.clamp_min(0)),
        (one & off[2] & (cross < 0), upper - torch.maximum(lower, both).clamp_min(0)),
        (alone & (both <= -ON * largest) & (cross < 0), -both - (-lower).clamp_min(0)),
    )
    kinds, strengths = torch.full_like(both, -1, dtype=torch.long), zero
    for kind, (test, strength) in enumerate(tests):
        kinds = torch.where(test & decides, kind, kinds)
        strengths = torch.where(test & decides, strength, strengths)
    return kinds, strengths


def find_motifs(
    layer: BilinearLayer,
    outputs: Float[Tensor, "n_out d_model"],
    inputs: Float[Tensor, "d_sae d_model"],
    n: int,
    *,
    kind: str | None = None,
    activations: Float[Tensor, "d_sae"] | None = None,
    together: Float[Tensor, "d_sae d_sae"] | None = None,
    fence: float = 1.5,
    memory: int = MEMORY,
    progress: bool = True,
) -> Motifs:
    """The `n` strongest motifs of some outputs together; see the module for what they are.

    Args:
        layer: its weights.
        outputs: output directions.
        inputs: input directions.
        n: the number of motifs to list, over all outputs and kinds.
        kind: one of `MOTIFS` alone.
        activations: typical activation of each input feature; 1 without. Pairs with a feature at zero have no motif.
        together: only pairs where this is not zero, such as `FeatureActivations.cofiring`: those that fire on one
            token somewhere.
        fence: the `f` of the outlier pairs.
        memory: bytes to work in, and at most as many for the result; 1 GiB by default.
        progress: show a bar.

    Raises:
        ArgumentError: another kind, another number of activations than inputs, or ones that are not finite, a
            `together` of another size, a negative fence, or less memory than the smallest blocks take.
        OutOfRangeError: `n` below 1.
    """
    if kind is not None and kind not in MOTIFS:
        raise ArgumentError(f"kind is {kind!r}, expected one of {', '.join(MOTIFS)}." + nearest(kind, MOTIFS))
    if n < 1:
        raise OutOfRangeError(f"n is {n}, expected at least 1.")
    check_fence(fence)
    scale = torch.ones(len(inputs)) if activations is None else activations
    if scale.shape != (len(inputs),) or not scale.isfinite().all():
        raise ArgumentError(
            f"activations of shape {tuple(scale.shape)}: expected one finite number for each of {len(inputs)} inputs."
        )
    if together is not None and together.shape != (len(inputs), len(inputs)):
        raise ArgumentError(
            f"together of shape {tuple(together.shape)}: expected one number per pair of {len(inputs)}."
        )
    scale = scale.to(layer.W_out)
    triangle = Triangle(len(inputs))
    counts = torch.zeros(len(MOTIFS), dtype=torch.long)
    empty = torch.zeros(0, dtype=torch.long, device=scale.device)
    best: list[Tensor] = [empty, empty, empty, empty, scale.new_zeros(0, 3), scale.new_zeros(0)]
    entries = feature_entries(layer, outputs, inputs, memory=memory, progress=progress, title="motifs")
    for row, (cross, self_) in enumerate(entries):
        own = self_ * scale**2
        for places, values in outside(cross, fence):
            i, j = triangle.pairs(places)
            if together is not None:
                some = together[i.to(together.device), j.to(together.device)] != 0
                values, i, j = (part[some.to(part.device)] for part in (values, i, j))
            both = own[i] + own[j] + 2 * values * scale[i] * scale[j]
            kinds, strengths = classify(own[i], own[j], both)
            counts += torch.bincount(kinds[kinds >= 0].cpu(), minlength=len(MOTIFS))
            wanted = kinds >= 0 if kind is None else kinds == MOTIFS.index(kind)
            least = best[-1][-1] if len(best[-1]) == n else 0
            at = (wanted & (strengths > least)).nonzero().flatten()
            table = torch.stack([own[i], own[j], both], 1)[at]
            found = [torch.full_like(at, row), i[at], j[at], kinds[at], table, strengths[at]]
            merged = [torch.cat(parts) for parts in zip(best, found, strict=True)]
            order = merged[-1].argsort(descending=True, stable=True)[:n]
            best = [part[order] for part in merged]
    rows, i, j, kinds, table, strengths = best
    i, j, table = negated_first(kinds, i, j, table)
    return Motifs(rows, i, j, kinds, table, strengths, dict(zip(MOTIFS, counts.tolist(), strict=True)))


def negated_first(
    kinds: Int[Tensor, "n"], i: Int[Tensor, "n"], j: Int[Tensor, "n"], table: Float[Tensor, "n 3"]
) -> tuple[Int[Tensor, "n"], Int[Tensor, "n"], Float[Tensor, "n 3"]]:
    """`i, j, table` of motifs with each negation turned so that `j` is the one that negates."""
    swap = (kinds == MOTIFS.index("negation")) & (table[:, 1] > table[:, 0])
    turned = torch.where(swap[:, None], table[:, [1, 0, 2]], table)
    return torch.where(swap, j, i), torch.where(swap, i, j), turned
