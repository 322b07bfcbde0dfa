"""A gallery of motifs: pairs of input features that make an AND, XOR, negation or inhibition, in weights and data.

`Decomposer.motifs` reads truth tables from the weights, of all pairs. Here the pairs are those that do fire together on
texts, and a motif counts only if the texts show it, too:

1. pairs of input features that fire on one token at least `MIN_TOKENS` times, each of them without the other as often.
   Features that fire on more than a tenth of all tokens are left out, on both sides: they go with everything.
   Two features of the same word say little about combining: what they fire on must differ (cosine of their activation
   by token up to `SAME_TOKENS`)
2. for all of them and every output feature that fires as often, the truth table from the weights at the features'
   typical activations (`motifs.classify`), its strength in units of the output's typical activation. What is below
   `FLOOR` is no motif here; for each kind the `CANDIDATES` strongest go on. What a pair writes, `g`, is d_model wide,
   and its cross term is `u . g` for every output `u`
3. the same table measured: the output's mean pre-activation on tokens with the first alone, the second alone and both,
   less that on tokens with neither. A motif holds if the measured table is of the same kind, the output fires more
   often in the cases of `FIRING` than in the others, and the pair's own cross term on tokens with both has the sign it
   should; its strength is then the least of the two gaps and the mean of that cross term
4. families, among the features of these motifs: input features by the cosine of their decoder directions, outputs by
   that of their interaction matrices (`neighbours.cluster`). Motifs between the same families count once; of those with
   outputs of one family the strongest is shown, the others are named with it

The measured table is of everything that goes with a pair being active, not of the pair alone: what the pair itself adds
is the cross term, `2 Q_ij f_i f_j`, token by token.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from bilens._core.bare import require_bare
from bilens._core.checks import MEMORY, check_budget, name_of
from bilens._core.display import Paged, Tabular
from bilens.decompose.decomposer import Decomposer
from bilens.decompose.motifs import MOTIFS, classify, negated_first
from bilens.decompose.similarity import cluster
from bilens.draw import plots
from bilens.errors import ArgumentError, SAEMismatchError
from bilens.layer.bilinear import BilinearLayer, branches, products, triple_coefficients
from bilens.model.tokenization import token_strings
from bilens.sae.features.examples import Example, FeatureActivations
from bilens.sae.train.evaluation import DENSE

MIN_TOKENS = 30
SAME_TOKENS = 0.5
FLOOR = 0.02  # of the output's typical activation
CANDIDATES = 400  # of each kind and layer, measured on texts
INPUT_COSINE, OUTPUT_COSINE = 0.3, 0.2  # at which families are cut
PAIRS, OUTPUTS = 1024, 512  # at a time
COUNTED = 2**21  # pairs whose tokens are counted at a time
ROWS, TOKENS = 32, 1024  # texts at a time, tokens at a time for all outputs
POINTS = 60  # of each case in the plane of an entry
EXAMPLES, BEFORE, AFTER = 4, 14, 5
PROMOTED = 6
CASES = ("neither", "first alone", "second alone", "both")
# By kind: places in `CASES` where the output fires more often than in those after them.
FIRING = {
    "and": ((3,), (0, 1, 2)),
    "xor": ((1, 2), (0, 3)),
    "negation": ((1,), (0, 2, 3)),
    "inhibition": ((1, 2), (3,)),
}


@dataclass(frozen=True)
class GalleryEntry:
    """One motif: an output feature and two input features (`i` is the one that a negation's `j` negates).

    Attributes:
        layer, kind, output, i, j: the motif's place; `kind` is one of `MOTIFS`.
        output_name, i_name, j_name: labels.
        table: `z(1, 0), z(0, 1), z(1, 1)` from the weights, at typical activations.
        measured: mean pre-activation in each of `CASES`; `fires` the share of tokens on which the output fires,
            `counts` the tokens.
        typical: the output's mean activation where it fires, the unit of `strength`.
        strength: the least of the weights' gap, the measured one and `|part|`, in that unit.
        part, whole: the means of the pair's cross term and of the whole pre-activation, on tokens where both fire.
        x, y, z: a sample of tokens: the layer's input along both decoder directions, and the pre-activation; `case` of
            each.
        examples: contexts where both fire; the values are the pair's cross term. `wholes` has the pre-activations.
        promoted: tokens the output feature promotes most.
        alike: the same motif of outputs of the same family, as labels `(output, i, j)`; one of each families of inputs.
    """

    layer: int
    kind: str
    output: int
    i: int
    j: int
    output_name: str
    i_name: str
    j_name: str
    table: tuple[float, float, float]
    measured: tuple[float, float, float, float]
    fires: tuple[float, float, float, float]
    counts: tuple[int, int, int, int]
    typical: float
    strength: float
    part: float
    whole: float
    x: Float[Tensor, "point"] = field(repr=False)
    y: Float[Tensor, "point"] = field(repr=False)
    z: Float[Tensor, "point"] = field(repr=False)
    case: Int[Tensor, "point"] = field(repr=False)
    examples: tuple[Example, ...] = field(repr=False)
    wholes: tuple[float, ...] = field(repr=False)
    promoted: tuple[str, ...] = field(repr=False)
    alike: tuple[tuple[str, str, str], ...] = field(default=(), repr=False)

    @property
    def formula(self) -> str:
        """`602 little ← 1064 little AND 1963 big`; an inhibition has ⊣."""
        return formula(self.kind, self.output_name, self.i_name, self.j_name)

    @property
    def meaning(self) -> str:
        """The motif in a sentence: `“it” (144) fires for “she → wanted” (913), unless “not” (8) is there as well.`"""
        output, i, j = map(quoted, (self.output_name, self.i_name, self.j_name))
        return {
            "and": f"{output} fires where {i} and {j} come together, and for neither of them alone.",
            "xor": f"{output} fires for {i} or for {j}, and not where they come together.",
            "negation": f"{output} fires for {i}, unless {j} is there as well.",
            "inhibition": f"{i} and {j} together keep {output} from firing; neither of them does so alone.",
        }[self.kind]


def quoted(name: str) -> str:
    """A feature's name in a sentence, its index behind: `“happy” (1333)`."""
    index, _, words = name.partition(" ")
    return f"“{words}” ({index})" if words else index


def formula(kind: str, output: str, i: str, j: str) -> str:
    """A motif in a line."""
    sign = {"and": "AND", "xor": "XOR", "negation": "AND NOT", "inhibition": "AND"}[kind]
    return f"{output} {'⊣' if kind == 'inhibition' else '←'} {i} {sign} {j}"


@dataclass(frozen=True)
class MotifGallery(Tabular, Paged):
    """The motifs of some layers that hold in weights and data, by kind and falling strength.

    Attributes:
        entries: one per motif and families.
        counts: one row per layer and kind: `layer, kind, in_weights, measured, held, families`: motifs by the weights
            among the pairs that fire together; those of them measured (the strongest); those that hold on texts; and
            how many of them there are between different families.
        n_tokens: the number of tokens of the texts.
        wordpiece: true if the tokens are word pieces (`HookedBilinearTransformer.is_wordpiece`).
    """

    entries: Sequence[GalleryEntry] = field(repr=False)
    counts: pd.DataFrame = field(repr=False)
    n_tokens: int
    wordpiece: bool = False

    def to_frame(self) -> pd.DataFrame:
        """One row per entry: `layer, motif, strength, output, i, j, output_name, i_name, j_name`, the weights' `z_10,
        z_01, z_11`, the measured `neither, first_alone, second_alone, both`, `part, whole, alike` (how many)."""
        plain = ("layer", "kind", "strength", "output", "i", "j", "output_name", "i_name", "j_name")
        measured = (case.replace(" ", "_") for case in CASES)
        rows = [
            (*(getattr(e, name) for name in plain), *e.table, *e.measured, e.part, e.whole, len(e.alike))
            for e in self.entries
        ]
        columns = [*plain, "z_10", "z_01", "z_11", *measured, "part", "whole", "alike"]
        return pd.DataFrame(rows, columns=columns).rename(columns={"kind": "motif"})

    def plot(self) -> go.Figure:
        """How many families of motifs every layer has, kind by kind."""
        table = self.counts.pivot(index="layer", columns="kind", values="families")[list(MOTIFS)]
        return plots.heatmap(table, [f"layer {layer}" for layer in table.index], list(MOTIFS), "families of motifs")

    def __str__(self) -> str:
        columns = ["layer", "motif", "strength", "output_name", "i_name", "j_name", "part", "whole", "alike"]
        frame = self.to_frame()
        top = frame.head(20)[columns].to_string(index=False) if len(frame) else "no entries"
        return f"{self.counts.to_string(index=False)}\n{top}"


def motif_gallery(
    decomposers: Sequence[Decomposer],
    inputs: Sequence[FeatureActivations],
    outputs: Sequence[FeatureActivations],
    n: int = 3,
    *,
    min_tokens: int = MIN_TOKENS,
    memory: int = MEMORY,
    progress: bool = True,
) -> MotifGallery:
    """The strongest motifs of some layers; see the module for what they are.

    All activations of one layer are held at once, which is meant for texts of some ten thousand tokens.

    Args:
        decomposers: one per layer, with both SAEs, the input SAE on what the layer reads.
        inputs, outputs: what the SAEs' features fire on (`feature_activations`), over the same texts.
        n: entries of each kind and layer.
        min_tokens: the least number of tokens on which a pair fires together, and each of its features alone.
        memory: bytes to work in, and at most as many for the result; 1 GiB by default.
        progress: show a bar.

    Raises:
        AlteredModelError: SAEs are attached to a model, or there are hooks on it or on an SAE.
        ArgumentError: no layers, or another number of activations than of layers; activations on different texts; `n`
            or `min_tokens` below 1; less memory than a layer takes.
        MissingSAEError: a decomposer without one of its SAEs.
        SAEMismatchError: activations of an SAE of another size, or one on another hook than the layer reads.
    """
    if not decomposers or not len(decomposers) == len(inputs) == len(outputs):
        raise ArgumentError(
            f"{len(decomposers)} decomposers, {len(inputs)} input and {len(outputs)} output activations: expected one "
            "or more layers, and one each."
        )
    if min(n, min_tokens) < 1:
        raise ArgumentError(f"n {n} and min_tokens {min_tokens} must be at least 1.")
    for d, ins, outs in zip(decomposers, inputs, outputs, strict=True):
        require_bare(d.model, d.input_view.sae, d.output_view.sae)
        for which, given, view in (("input", ins, d.input_view), ("output", outs, d.output_view)):
            if given.d_sae != view.d_sae:
                raise SAEMismatchError(
                    f"layer {d.layer}: activations of {given.d_sae} {which} features, and an SAE of {view.d_sae}."
                )
            if not torch.equal(given.tokens, inputs[0].tokens):
                raise ArgumentError(f"layer {d.layer}: {which} activations on other texts than the first ones.")
        check_budget(*_needed(d, ins), memory, "give fewer texts, or smaller SAEs")
    entries: list[GalleryEntry] = []
    counts = []
    for d, ins, outs in zip(decomposers, inputs, outputs, strict=True):
        found, counted = _layer_entries(d, ins, outs, n, min_tokens, memory, progress)
        entries += found
        counts += counted
    entries.sort(key=lambda entry: (MOTIFS.index(entry.kind), -entry.strength))
    return MotifGallery(entries, pd.DataFrame(counts), int(inputs[0].mask.sum()), decomposers[0].model.is_wordpiece)


def _needed(d: Decomposer, inputs: FeatureActivations) -> tuple[str, int]:
    """What a layer's part of the gallery is called in words, and the bytes that it takes: the most of its steps."""
    n_in, n_out, n_tokens = d.input_view.d_sae, d.output_view.d_sae, int(inputs.mask.sum())
    d_model, d_mlp = d.weights.W_gate.shape
    some_in, some_out = min(n_in, 2 * len(MOTIFS) * CANDIDATES), min(n_out, len(MOTIFS) * CANDIDATES)
    together = 64 * len(inputs.values) + 48 * COUNTED  # tokens of each feature, and of every two of some
    by_weights = 4 * n_in * (2 * d_mlp + n_out + d_model) + 8 * n_out * d_model + 4 * d_mlp * d_model
    by_weights += PAIRS * (128 * min(n_out, OUTPUTS) + 24 * d_mlp + 8 * d_model)
    on_texts = 4 * n_tokens * (some_out + d_model + len(MOTIFS)) + 4 * TOKENS * n_out
    families = 16 * some_in**2
    return f"the gallery of layer {d.layer} on {n_tokens:,} tokens", max(together, by_weights, on_texts + families)


@torch.no_grad()
def _layer_entries(
    d: Decomposer,
    inputs: FeatureActivations,
    outputs: FeatureActivations,
    n: int,
    min_tokens: int,
    memory: int,
    progress: bool,
) -> tuple[list[GalleryEntry], list[dict[str, object]]]:
    """The `n` first families of each kind of one layer, and how many of everything there are."""
    directions = d.input_directions()
    typical = outputs.typical_activations().to(directions)
    often = (outputs.offsets.diff() >= min_tokens) & (typical.cpu() > 0) & (outputs.density() <= DENSE)
    often = often.nonzero().flatten()
    candidates = pair_motifs(
        d.weights,
        d.directions(often),
        directions,
        *pairs_together(inputs, min_tokens),
        inputs.typical_activations().to(directions),
        typical[often],
        CANDIDATES,
        title=f"layer {d.layer}",
        progress=progress,
    )
    candidates = replace(candidates, outputs=often[candidates.outputs])
    texts = _OnTexts.of(d, inputs, outputs, candidates.outputs.unique())
    coefficients = triple_coefficients(
        d.weights,
        d.directions(candidates.outputs),
        directions,
        torch.arange(len(candidates.i)),
        candidates.i,
        candidates.j,
    )
    measured = [
        texts.truth_table(*triple, coefficient)
        for triple, coefficient in zip(candidates.triples, coefficients.tolist(), strict=True)
    ]
    strengths = [
        _strength(table, kind, weights, typical[triple[0]].item(), min_tokens)
        for table, kind, weights, triple in zip(
            measured, candidates.kinds.tolist(), candidates.strengths.tolist(), candidates.triples, strict=True
        )
    ]
    held = sorted((place for place, s in enumerate(strengths) if s > 0), key=lambda place: -strengths[place])
    families = _families(d, candidates, held, memory)
    kinds = candidates.kinds.tolist()
    entries, shown = [], dict.fromkeys(range(len(MOTIFS)), 0)
    for members in _by_output(families):
        best, kind = members[0], kinds[members[0]]
        shown[kind] += 1
        if shown[kind] > n:
            continue
        triples = [candidates.triples[member] for member in members]
        entries.append(
            GalleryEntry(
                layer=d.layer,
                kind=MOTIFS[kind],
                **_named(d, triples[0]),
                table=_floats(candidates.table[best]),
                measured=_floats(measured[best].means),
                fires=_floats(measured[best].fires),
                counts=tuple(measured[best].counts.tolist()),
                typical=typical[triples[0][0]].item(),
                strength=strengths[best],
                promoted=_promoted(d, triples[0][0]),
                alike=tuple(_labels(d, triple) for triple in triples[1:]),
                part=measured[best].part,
                whole=measured[best].means[-1].item(),
                **texts.shown(d, triples[0], coefficients[best].item()),
            )
        )
    counted: list[dict[str, object]] = [
        {
            "layer": d.layer,
            "kind": kind,
            "in_weights": int(candidates.counts[place]),
            "measured": kinds.count(place),
            "held": sum(kinds[member] == place for member in held),
            "families": sum(one[0] == place for one in families),
        }
        for place, kind in enumerate(MOTIFS)
    ]
    return entries, counted


# --- pairs and their motifs -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Candidates:
    """Motifs of pairs by the weights; `counts` are of all there were, by kind. Strengths in the outputs' own units."""

    outputs: Int[Tensor, "n"]
    i: Int[Tensor, "n"]
    j: Int[Tensor, "n"]
    kinds: Int[Tensor, "n"]
    table: Float[Tensor, "n 3"]
    strengths: Float[Tensor, "n"]
    counts: Int[Tensor, "kind"]

    @cached_property
    def triples(self) -> list[tuple[int, int, int]]:
        return list(zip(self.outputs.tolist(), self.i.tolist(), self.j.tolist(), strict=True))


def pairs_together(inputs: FeatureActivations, min_tokens: int) -> tuple[Int[Tensor, "n"], Int[Tensor, "n"]]:
    """Pairs `i < j` that fire on one token at least so often, each as often without the other, and on other tokens.

    Dense features are in none of them.
    """
    fires = inputs.offsets.diff().where(inputs.density() <= DENSE, 0).numpy()
    kept = np.flatnonzero(fires >= 2 * min_tokens)
    where, words = inputs.by_place()[kept], inputs.by_token()[kept]
    words = words.multiply(1 / np.sqrt(words.multiply(words).sum(1))[:, None]).tocsr()
    found = [np.zeros((2, 0), dtype=np.int64)]
    step = max(1, COUNTED // max(len(kept), 1))
    for start in range(0, len(kept), step):
        rows = np.arange(start, min(start + step, len(kept)))
        together = (where[rows] @ where.T).toarray()
        least = np.minimum(fires[kept[rows]][:, None], fires[kept]) - together
        i, j = ((together >= min_tokens) & (least >= min_tokens) & (rows[:, None] < np.arange(len(kept)))).nonzero()
        pairs = np.stack([rows[i], j])
        for some in np.array_split(pairs, max(1, pairs.shape[1] * len(inputs.strings) // 2**26), axis=1):
            cosines = np.asarray(words[some[0]].multiply(words[some[1]]).sum(1)).ravel()
            found.append(some[:, cosines <= SAME_TOKENS])
    first, second = torch.from_numpy(kept[np.concatenate(found, axis=1)])
    return first, second


def pair_motifs(
    layer: BilinearLayer,
    outputs: Float[Tensor, "n_out d_model"],
    inputs: Float[Tensor, "d_sae d_model"],
    i: Int[Tensor, "pair"],
    j: Int[Tensor, "pair"],
    activations: Float[Tensor, "d_sae"],
    units: Float[Tensor, "n_out"],
    n: int,
    *,
    title: str = "motifs",
    progress: bool = True,
) -> Candidates:
    """The `n` strongest motifs of each kind among some pairs, for all outputs.

    Args:
        layer: its weights.
        outputs, inputs: directions.
        i, j: the pairs.
        activations: typical ones of the inputs.
        units: the units of the outputs' pre-activations; strengths are divided by them.
        n: the number of motifs of each kind.
        title, progress: the progress bar's title, and if it is shown.
    """
    used, place = torch.cat([i, j]).unique(return_inverse=True)
    firsts, seconds = place.to(outputs.device).view(2, -1)
    used = used.to(outputs.device)
    scaled = inputs[used] * activations[used, None]
    made = branches(layer, scaled)
    outputs = outputs / units[:, None]
    # Through the layer's output space, where that is narrower than the outputs are many.
    through = len(outputs) > outputs.shape[1]
    hidden = layer.W_out if through else layer.W_out @ outputs.T
    alone = torch.cat([products(made[some], made[some]) @ hidden for some in torch.arange(len(used)).split(PAIRS)])
    alone = alone @ outputs.T if through else alone
    counts, none = i.new_zeros(len(MOTIFS), device=outputs.device), i.new_zeros(0, device=outputs.device)
    best = [[none, none, none, alone.new_zeros(0, 3), alone.new_zeros(0)] for _ in MOTIFS]
    for rows in tqdm(
        torch.arange(len(i)).split(PAIRS), desc=title, unit="pair", unit_scale=PAIRS, disable=not progress
    ):
        a, b = firsts[rows], seconds[rows]
        g = 2 * products(made[a], made[b]) @ hidden
        for start in range(0, len(outputs), OUTPUTS):
            at = slice(start, start + OUTPUTS)
            cross = g @ outputs[at].T if through else g[:, at]
            first, second = alone[a, at], alone[b, at]
            # A motif is decided by its cross term: that is at least half of the largest case, so of the strength.
            most = 2 * cross.abs()
            row, output = ((most >= FLOOR) & (first.abs() <= most) & (second.abs() <= most)).nonzero(as_tuple=True)
            first, second, cross = (part[row, output] for part in (first, second, cross))
            output = output + start
            table = torch.stack([first, second, first + second + cross], 1)
            kinds, strengths = classify(*table.T)
            kinds = torch.where(strengths >= FLOOR, kinds, -1)
            counts += kinds.add(1).bincount(minlength=len(MOTIFS) + 1)[1:]
            for kind, kept in enumerate(best):
                least = kept[-1][-1] if len(kept[-1]) == n else 0
                new = ((kinds == kind) & (strengths > least)).nonzero().flatten()
                found = [output[new], used[a[row[new]]], used[b[row[new]]], table[new] * units[output[new], None]]
                merged = [torch.cat(parts) for parts in zip(kept, [*found, strengths[new]], strict=True)]
                by_strength = merged[-1].argsort(descending=True, stable=True)[:n]
                best[kind] = [part[by_strength] for part in merged]
    outs, i, j, tables, strengths = (torch.cat(parts).cpu() for parts in zip(*best, strict=True))
    kinds = torch.repeat_interleave(torch.arange(len(MOTIFS)), torch.tensor([len(kept[0]) for kept in best]))
    i, j, tables = negated_first(kinds, i, j, tables)
    return Candidates(outs, i, j, kinds, tables, strengths, counts.cpu())


# --- on texts ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """Means of an output over the tokens of each of `CASES`; `part` is that of the pair's cross term where both are."""

    means: Float[Tensor, "4"]
    fires: Float[Tensor, "4"]
    counts: Int[Tensor, "4"]
    part: float


def cases_of(first: Bool[Tensor, "token"], second: Bool[Tensor, "token"]) -> Int[Tensor, "token"]:
    """Which of `CASES` each token is."""
    return first.long() + 2 * second.long()


def measure(
    z: Float[Tensor, "token"],
    fires: Bool[Tensor, "token"],
    cases: Int[Tensor, "token"],
    cross: Float[Tensor, "token"],
) -> Measured:
    """Means of pre-activation, firing and the pair's cross term; zero where there is no token."""
    counts = cases.bincount(minlength=len(CASES))
    sums = (z.new_zeros(len(CASES)).index_add_(0, cases, values) for values in (z, fires.to(z), cross))
    means, shares, parts = (total / counts.clamp_min(1) for total in sums)
    return Measured(means, shares, counts, parts[-1].item())


def _strength(found: Measured, kind: int, weights: float, typical: float, min_tokens: int) -> float:
    """The least of the weights' gap, the measured one and the cross term; zero where the motif does not hold."""
    if found.counts.min() < min_tokens:
        return 0.0
    first, second, both = (found.means[1:] - found.means[0])[:, None]
    other, gap = classify(first, second, both)
    turned = kind == MOTIFS.index("negation") and bool(second > first)
    more, less = (found.fires[list(cases)] for cases in FIRING[MOTIFS[kind]])
    if more.min() <= less.max():
        return 0.0
    adds = found.part if MOTIFS[kind] == "and" else -found.part
    return min(weights, gap.item() / typical, adds / typical) if int(other) == kind and not turned else 0.0


@dataclass(frozen=True)
class _OnTexts:
    """A layer on all tokens of the texts: its input, and the pre-activations of some outputs."""

    inputs: FeatureActivations
    outputs: FeatureActivations
    columns: dict[int, int]
    x: Float[Tensor, "token d_model"]
    z: Float[Tensor, "token n_out"]

    @classmethod
    def of(
        cls, d: Decomposer, inputs: FeatureActivations, outputs: FeatureActivations, some: Int[Tensor, "n_out"]
    ) -> "_OnTexts":
        mask = inputs.mask.bool()
        xs, zs = [], []
        for rows, kept in zip(inputs.tokens.split(ROWS), mask.split(ROWS), strict=True):
            x, y = (part[kept.to(part.device)] for part in d.run(rows))
            xs.append(x.cpu())
            zs += [d.output_view.pre_activations(part)[:, some.to(part.device)].cpu() for part in y.split(TOKENS)]
        columns = {output: column for column, output in enumerate(some.tolist())}
        return cls(inputs, outputs, columns, torch.cat(xs), torch.cat(zs))

    def fires(self, which: FeatureActivations, feature: int) -> Float[Tensor, "token"]:
        """A feature's activation on every token."""
        return which.dense(feature)[which.mask.bool()]

    def cases(self, i: int, j: int) -> Int[Tensor, "token"]:
        return cases_of(self.fires(self.inputs, i) != 0, self.fires(self.inputs, j) != 0)

    def cross(self, i: int, j: int, coefficient: float) -> Float[Tensor, "token"]:
        return coefficient * self.fires(self.inputs, i) * self.fires(self.inputs, j)

    def truth_table(self, output: int, i: int, j: int, coefficient: float) -> Measured:
        z, fires = self.z[:, self.columns[output]], self.fires(self.outputs, output) > 0
        return measure(z, fires, self.cases(i, j), self.cross(i, j, coefficient))

    def shown(self, d: Decomposer, triple: tuple[int, int, int], coefficient: float) -> dict[str, Any]:
        """The fields of an entry that are single tokens."""
        output, i, j = triple
        cases, z = self.cases(i, j), self.z[:, self.columns[output]]
        both = cases == CASES.index("both")
        ends = d.input_directions()[[i, j]].cpu()
        part = self.cross(i, j, coefficient)
        generator = torch.Generator().manual_seed(0)
        drawn = torch.cat([_some((cases == case).nonzero().flatten(), generator) for case in range(len(CASES))])
        across, up = (self.x[drawn] @ torch.nn.functional.normalize(ends, dim=-1).T).T
        # Those with the coefficient's sign, the largest first.
        examples = self._examples(part, (part if coefficient > 0 else -part).where(both, -torch.inf))
        return {
            "x": across,
            "y": up,
            "z": z[drawn],
            "case": cases[drawn],
            "examples": tuple(example for example, _ in examples),
            "wholes": tuple(z[place].item() for _, place in examples),
        }

    def _examples(self, part: Float[Tensor, "token"], order_by: Float[Tensor, "token"]) -> list[tuple[Example, int]]:
        """The cross term around where `order_by` is largest: one place of each text, none where it is `-inf`."""
        inputs = self.inputs
        rows, positions = inputs.mask.bool().nonzero(as_tuple=True)
        found: dict[int, tuple[Example, int]] = {}
        for place in order_by.argsort(descending=True)[: int(order_by.isfinite().sum())].tolist():
            row, position = int(rows[place]), int(positions[place])
            if row in found:
                continue
            first, last = (int(end) for end in inputs.mask[row].nonzero().aminmax())
            window = range(max(first, position - BEFORE), min(last, position + AFTER) + 1)
            tokens = [inputs.strings[token] for token in inputs.tokens[row, window.start : window.stop].tolist()]
            values = part[place - position + window.start : place - position + window.stop].tolist()
            found[row] = Example(tokens, values, position - window.start), place
            if len(found) == EXAMPLES:
                break
        return list(found.values())


def _some(places: Int[Tensor, "n"], generator: torch.Generator) -> Int[Tensor, "m"]:
    return places[torch.randperm(len(places), generator=generator)[:POINTS]]


# --- families and names -----------------------------------------------------------------------------------------------


Family = tuple[int, int, tuple[int, ...]]


def _families(d: Decomposer, candidates: Candidates, held: Sequence[int], memory: int) -> dict[Family, int]:
    """The strongest of those that hold between the same families of features: `(kind, output's, inputs')`."""
    ends = sorted({end for place in held for end in candidates.triples[place][1:]})
    unit = torch.nn.functional.normalize(d.input_directions()[ends], dim=-1).cpu()
    labels = cluster(unit @ unit.T, INPUT_COSINE).tolist() if len(ends) > 1 else [0] * len(ends)
    family_in = dict(zip(ends, labels, strict=True))
    outputs = sorted({candidates.triples[place][0] for place in held})
    labels = (
        d.clusters(outputs, OUTPUT_COSINE, memory=memory).labels.tolist() if len(outputs) > 1 else [0] * len(outputs)
    )
    family_out = dict(zip(outputs, labels, strict=True))
    found: dict[Family, int] = {}
    for place in held:
        (output, i, j), kind = candidates.triples[place], int(candidates.kinds[place])
        families = (family_in[i], family_in[j])
        ordered = families if MOTIFS[kind] == "negation" else tuple(sorted(families))
        found.setdefault((kind, family_out[output], ordered), place)
    return found


def _by_output(families: dict[Family, int]) -> list[list[int]]:
    """Families of one kind and one family of outputs together."""
    groups: dict[tuple[int, int], list[int]] = {}
    for (kind, output, _), place in families.items():
        groups.setdefault((kind, output), []).append(place)
    return list(groups.values())


def _labels(d: Decomposer, triple: tuple[int, int, int]) -> tuple[str, str, str]:
    output, i, j = triple
    return name_of(d.output_names, output), name_of(d.input_names, i), name_of(d.input_names, j)


def _named(d: Decomposer, triple: tuple[int, int, int]) -> dict[str, Any]:
    names = ("output", "i", "j")
    labels = dict(zip((f"{name}_name" for name in names), _labels(d, triple), strict=True))
    return dict(zip(names, triple, strict=True)) | labels


def _promoted(d: Decomposer, output: int) -> tuple[str, ...]:
    logits = d.output_view.decoder[output] @ d.model.W_U
    return tuple(token_strings(d.model.tokenizer, logits.topk(PROMOTED).indices))


def _floats(values: Tensor) -> tuple[Any, ...]:
    return tuple(values.tolist())
