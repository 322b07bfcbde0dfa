"""Does "not" turn a word's sentiment round? The paper's sentiment-negation circuit, looked for in another model.

Sentences of four kinds (positive, negative, not positive, not negative: `negation_probes`) are run once; everything is
read at the adjective and at the full stop.

1. screen: does any output feature of any layer tell "not positive" from each of the other three kinds, or follow the
   clause ("good" and "not bad" against "bad" and "not good")? A feature's score is the least AUC of its comparisons, of
   pre-activations; of equal ones that which separates by more standard deviations is taken. The best of all features
   that fire here is picked on one half of the adjectives and tested on the other; so is the best under labels permuted
   over adjectives (for "negated": plain and negated swapped, adjective by adjective): what so many reach by chance
2. readout: the direction from negative to positive in plain sentences, learned on one half, on the other half's plain
   and negated sentences. AUC 1 follows the word, 0 the clause, 1/2 neither; the last site is the next token's
   distribution (square roots of probabilities)
3. the layers' own algebra: with the four means of a layer's input `mu = m + a n + b s + a b d`, `a, b = +-1/2` for
   negated and positive, and `mlp(x) = B(x, x)`, the difference of differences of its output is exactly

       (nP - nN) - (P - N) = 2 B(n, s) + 2 B(m, d) + spread

   what the layer makes of negation and valence, what it passes on of a difference that its input has already, and what
   comes of variation around the means. `fade` is minus the projection on the plain valence `v = P - N` of the output,
   over `|v|^2`: 0 if the word's valence is untouched under negation, 1 if it is gone, 2 if it is turned round. Null:
   valences permuted over adjectives, and feature directions as long as `s` in place of it
4. gates: the picked features' two leading eigenvectors, and which families of input features their pre-activation comes
   from, exactly

Source: Pearce et al. 2025 (arXiv 2410.08417), section 5, the sentiment-negation circuit; DESIGN section 4.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bilens.decompose import Decomposer
from bilens.decompose.tensors import BilinearLayer, biases_as_weights, interaction_matrix
from bilens.display import Tabular
from bilens.loading import load_model
from bilens.model import HookedBilinearTransformer
from bilens.reporting import layer_decomposers
from bilens.reproduce.negation_probes import (
    CELL_NAMES,
    CELLS,
    NEGATIONS,
    RENDERINGS,
    WORDS,
    Cell,
    halves,
    sentences,
    tokens_of,
    valences,
)
from bilens.reproduce.reproduction import PEARCE_2025, Figures, Recipe, Rows, Settings

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

Pairs = tuple[tuple[Cell, Cell], ...]
TARGETS: dict[str, Pairs] = {
    "positive word": (("P", "N"), ("nP", "nN")),
    "negative word": (("N", "P"), ("nN", "nP")),
    "negated": (("nP", "P"), ("nP", "N"), ("nN", "P"), ("nN", "N")),
    "not positive": (("nP", "P"), ("nP", "N"), ("nP", "nN")),
    "not negative": (("nN", "P"), ("nN", "N"), ("nN", "nP")),
    "positive clause": (("P", "N"), ("nN", "nP")),
    "negative clause": (("N", "P"), ("nP", "nN")),
}
SENTIMENT_BY_NEGATION = ("not positive", "not negative", "positive clause", "negative clause")
SIGNIFICANT = 0.05 / len(TARGETS)  # of several targets one would pass 0.05 by chance
GATED = ("negated", "not positive", "not negative")
POSITIONS = ("adjective", "full stop")
FAMILIES = ("negation", "plain", "positive words", "negative words", "others", "b_dec and error")
MASS = 0.8  # share of a feature's activation that puts it into a family
FIRES = 0.05  # share of the sentences in which a feature must fire to be screened
COLUMNS = 64  # values compared at a time


@dataclass(frozen=True)
class Gate:
    """One output feature on all sentences, in the plane of its two leading eigenvectors.

    Attributes:
        target, layer, feature, position: which.
        eigenvalues: of the plane.
        x, y: with eigenvalues of two signs `sqrt(l1) v1.x -+ sqrt(|l2|) v2.x`, whose product is what the plane adds to
            the output; else `sqrt(|l|) v.x` of each.
        product: whether it is that.
        values: the pre-activation, in full.
        correlation: of the plane's part with it.
        families: what every two families of input features add to it, the mean over the negated sentences it fires in.
    """

    target: str
    layer: int
    feature: int
    position: str
    eigenvalues: tuple[float, float]
    x: Float[Tensor, "sentence"] = field(repr=False)
    y: Float[Tensor, "sentence"] = field(repr=False)
    product: bool
    values: Float[Tensor, "sentence"] = field(repr=False)
    correlation: float
    families: Float[Tensor, "family family"] = field(repr=False)

    def to_frame(self) -> "pd.DataFrame":
        """What every two families add, the largest first: `first, second, contribution, share` (of absolute parts)."""
        import pandas as pd

        i, j = torch.tril_indices(len(FAMILIES), len(FAMILIES))
        parts = self.families[i, j] * torch.where(i == j, 1.0, 2.0)
        frame = pd.DataFrame(
            {
                "first": [FAMILIES[a] for a in j.tolist()],
                "second": [FAMILIES[b] for b in i.tolist()],
                "contribution": parts.tolist(),
                "share": (parts / parts.abs().sum()).tolist(),
            }
        )
        return frame.sort_values("contribution", key=abs, ascending=False, ignore_index=True)

    def share(self, *pairs: tuple[str, str]) -> float:
        """The share of these pairs of families together."""
        frame = self.to_frame()
        chosen = {frozenset(pair) for pair in pairs}
        return float(sum(row.share for row in frame.itertuples() if frozenset((row.first, row.second)) in chosen))

    def plot(self) -> "go.Figure":
        """The sentences in the plane, coloured by the pre-activation, marked by their kind."""
        from bilens.viz.plots import gate

        probes = sentences()
        first, second = (f"{value:+.2f}" for value in self.eigenvalues)
        plane = ("√λ₁ v₁·x − √|λ₂| v₂·x", "√λ₁ v₁·x + √|λ₂| v₂·x") if self.product else ("√|λ₁| v₁·x", "√|λ₂| v₂·x")
        return gate(
            self.x,
            self.y,
            self.values,
            [CELL_NAMES[probe.cell] for probe in probes],
            [probe.text for probe in probes],
            f"layer {self.layer}, output feature {self.feature} (λ = {first}, {second})",
            x_title=plane[0],
            y_title=plane[1],
            value_title="pre-activation",
        )


@dataclass(frozen=True)
class NegationStudy(Tabular):
    """What was found; `verdict` says it in words.

    Attributes:
        model: its name.
        screened: features that fire on these sentences, the two positions counted separately.
        screen: one row per target: `target, layer, position, feature, picked, tested, chance_picked, chance_tested, p`
            and the share of all sentences of each kind in which the feature fires. `chance_*` are the 95th percentiles
            under permuted labels.
        readout: one row per site: `layer, site, position, plain, negated, negated_low, negated_high, own`: AUCs on the
            held-out half, an interval of 95 % over adjectives, and that of a readout learned on negated sentences.
        algebra: one row per layer: `layer, valence, measured, cross, fade, fade_cross, fade_passed_on, fade_spread,
            fade_chance, p, cosine, percentile, promotes, suppresses`.
        distances: Hellinger distances between the mean next-token distributions of the four kinds.
        gates: of the picked features of `GATED`.
    """

    model: str
    screened: int
    screen: "pd.DataFrame" = field(repr=False)
    readout: "pd.DataFrame" = field(repr=False)
    algebra: "pd.DataFrame" = field(repr=False)
    distances: "pd.DataFrame" = field(repr=False)
    gates: Sequence[Gate] = field(repr=False)

    @property
    def verdict(self) -> list[str]:
        """What the figures say, sentence by sentence."""
        held = [gate for gate in self.gates if gate.target in _held(self.screen)]
        return [
            _headline(self),
            *_on_screen(self),
            *_on_readout(self),
            *_on_algebra(self.algebra),
            *map(_on_gate, held),
        ]

    def to_frame(self) -> "pd.DataFrame":
        """The screen."""
        return self.screen

    def plot(self) -> "go.Figure":
        """The first gate: the feature that says "negated"."""
        return self.gates[0].plot()

    def __str__(self) -> str:
        frames = {
            "screen of output features": self.screen,
            "readout of valence learned on plain sentences": self.readout,
            "negation x valence in every layer": self.algebra,
            "next-token distributions, Hellinger distance": self.distances,
        }
        tables = (f"{title}\n{frame.to_string(index=frame.index.name is not None)}" for title, frame in frames.items())
        gates = (
            f"{g.target}: {g.layer}/{g.feature}\n{g.to_frame().head(8).to_string(index=False)}" for g in self.gates
        )
        lines = "\n".join(f"- {line}" for line in self.verdict)
        return "\n\n".join([f"negation and sentiment in {self.model}", *tables, *gates, lines])


@dataclass(frozen=True)
class _Run:
    """The sentences run once: every site is (word, negated, rendering, dimension)."""

    model: HookedBilinearTransformer
    decomposers: Sequence[Decomposer]
    sites: dict[tuple[str, str], Float[Tensor, "word 2 rendering d"]]

    def of(self, hook: str, position: str) -> Float[Tensor, "word 2 rendering d"]:
        return self.sites[hook, position]


@torch.no_grad()
def negation_study(
    source: str | HookedBilinearTransformer | None = None, *, permutations: int = 1000, seed: int = 0
) -> NegationStudy:
    """Look for a circuit that turns sentiment round under negation; see the module for how.

    Args:
        source: a model with SAEs on its MLPs, or what `load_model` takes; `None` is the bundled one.
        permutations: of the labels, for the nulls.
        seed: of the permutations.

    Raises:
        TokenizationError: a model to which one of the adjectives is not one token.
        NotBilinearError, ModelNotFoundError: as for `reporting.layer_decomposers`.
    """
    model = source if isinstance(source, HookedBilinearTransformer) else load_model(source)
    run = _run(model, layer_decomposers(model))
    generator = torch.Generator().manual_seed(seed)
    screen, screened = _screen(run, permutations, generator)
    return NegationStudy(
        model=model.cfg.model_name,
        screened=screened,
        screen=screen,
        readout=_readout(run, permutations, generator),
        algebra=_algebra(run, permutations, generator),
        distances=_distances(run),
        gates=[_gate(run, screen.set_index("target").loc[target]) for target in GATED],
    )


def _run(model: HookedBilinearTransformer, decomposers: Sequence[Decomposer]) -> _Run:
    tokens, adjective = tokens_of(model)
    hooks = [d.normalized_hook for d in decomposers] + [d.out_hook for d in decomposers]
    hooks += [f"blocks.{d.layer}.hook_resid_post" for d in decomposers]
    logits, cache = model.run_with_cache(tokens, names_filter=hooks, return_cache_object=False)
    cache["next token"] = logits.softmax(-1).sqrt()  # so that distances are Hellinger's
    rows, sites = torch.arange(len(tokens)), {}
    for hook, values in cache.items():
        for after, position in enumerate(POSITIONS):
            sites[hook, position] = values[rows, adjective + after].view(WORDS, NEGATIONS, RENDERINGS, -1)
    return _Run(model, decomposers, sites)


# --- 1: the screen ----------------------------------------------------------------------------------------------------


def win_rates(values: Float[Tensor, "word 2 rendering column"]) -> Float[Tensor, "column unit unit"]:
    """The share of pairs of sentences in which one (word, negated) has the larger value than another; ties half.

    AUCs between any sets of (word, negated) are means over its blocks, so relabelling words needs no sentence again.
    """
    columns = values.shape[-1]
    flat = values.flatten(0, 1).permute(2, 0, 1)  # column, unit, rendering
    units = flat.shape[1]
    rates = flat.new_full((columns, units, units), 0.5)
    for low in range(0, columns, COLUMNS):
        part = flat[low : low + COLUMNS].contiguous()
        for u in range(1, units):
            one, others = part[:, u, None, :, None], part[:, :u, None, :]
            rates[low : low + COLUMNS, u, :u] = ((one > others).float() + 0.5 * (one == others).float()).mean((-2, -1))
    lower = rates.tril(-1)
    return lower + (1 - lower.mT).triu(1) + 0.5 * torch.eye(units)


def cell_aucs(
    rates: Float[Tensor, "column unit unit"],
    positive: Bool[Tensor, "word"],
    swapped: Bool[Tensor, "word"] | None = None,
) -> Float[Tensor, "column 4 4"]:
    """The AUC of every kind of sentence (in the order of `CELLS`) against every other.

    Args:
        rates: `win_rates`; units are (word, negated).
        positive: of each word.
        swapped: words whose plain sentences are taken for the negated ones.
    """
    negated = torch.zeros(len(positive), 2, dtype=torch.bool)
    negated[:, 1] = True
    negated = negated if swapped is None else negated ^ swapped[:, None]
    members = torch.stack([(positive[:, None] == p) & (negated == n) for n in (False, True) for p in (True, False)])
    weights = members.flatten(1).float()
    weights /= weights.sum(1, keepdim=True)
    return weights @ (rates @ weights.T)


def least_auc(aucs: Float[Tensor, "*column 4 4"], pairs: Pairs) -> Float[Tensor, "*column"]:
    """The least of a target's comparisons: 1 if all of them are separated."""
    return torch.stack([aucs[..., CELLS.index(high), CELLS.index(low)] for high, low in pairs]).amin(0)


def _screen(run: _Run, permutations: int, generator: torch.Generator) -> tuple["pd.DataFrame", int]:
    import pandas as pd

    learn, test = halves()
    columns, values = _firing(run, learn)
    rates = [win_rates(values[words]) for words in (learn, test)]
    labels = [valences()[words] > 0 for words in (learn, test)]
    margins = _margins(values[learn])

    def best(target: str, labels: Sequence[Tensor], swaps: Sequence[Tensor | None] = (None, None)) -> _Best:
        pairs = TARGETS[target]
        scores = least_auc(cell_aucs(rates[0], labels[0], swaps[0]), pairs)
        equal = (scores == scores.max()).nonzero().flatten()
        column = int(equal[least_auc(margins, pairs)[equal].argmax()])
        tested = least_auc(cell_aucs(rates[1][[column]], labels[1], swaps[1]), pairs)
        return _Best(column, scores[column].item(), tested.item())

    rows = []
    for target in TARGETS:
        found = best(target, labels)
        null = torch.tensor([best(target, *_relabelled(labels, target, generator))[1:] for _ in range(permutations)]).T
        d, position, feature = columns[found.column]
        fires = d.output_view.activations(run.of(d.out_hook, position))[..., feature] > 0
        rows.append(
            {
                "target": target,
                "layer": d.layer,
                "position": position,
                "feature": feature,
                "picked": found.picked,
                "tested": found.tested,
                "chance_picked": null[0].quantile(0.95).item(),
                "chance_tested": null[1].quantile(0.95).item(),
                "p": (1 + int((null[1] >= found.tested).sum())) / (1 + permutations),
            }
            | {f"fires {cell}": share for cell, share in zip(CELLS, _cells(fires.float()).tolist(), strict=True)}
        )
    return pd.DataFrame(rows), len(columns)


class _Best(NamedTuple):
    """The best column of a screen, its score where it was picked and where it was not."""

    column: int
    picked: float
    tested: float


def _firing(
    run: _Run, words: Int[Tensor, "words"]
) -> tuple[list[tuple[Decomposer, str, int]], Float[Tensor, "word 2 rendering column"]]:
    """The features that fire often enough on these words, and every sentence's pre-activations of them."""
    columns, values = [], []
    for d in run.decomposers:
        for position in POSITIONS:
            y = run.of(d.out_hook, position)
            share = (d.output_view.activations(y[words]) > 0).float().mean((0, 1, 2))
            features = (share >= FIRES).nonzero().flatten()
            columns += [(d, position, feature) for feature in features.tolist()]
            values.append(d.output_view.pre_activations(y)[..., features])
    return columns, torch.cat(values, -1)


def _relabelled(
    labels: Sequence[Bool[Tensor, "words"]], target: str, generator: torch.Generator
) -> tuple[list[Tensor], list[Tensor | None]]:
    """Labels of both halves, and which words' plain and negated sentences change places, that leave a target empty."""
    if target == "negated":
        return list(labels), [torch.rand(len(of), generator=generator) < 0.5 for of in labels]
    return [of[torch.randperm(len(of), generator=generator)] for of in labels], [None, None]


def _margins(values: Float[Tensor, "word 2 rendering column"]) -> Float[Tensor, "column 4 4"]:
    """By how many standard deviations each kind's mean exceeds each other's: what decides between equal AUCs."""
    means = torch.stack([values[words, n].flatten(0, 1).mean(0) for n in (0, 1) for words in _signs(len(values))], -1)
    spread = values.flatten(0, 2).std(0).clamp_min(torch.finfo(values.dtype).tiny)
    return (means[:, :, None] - means[:, None, :]) / spread[:, None, None]


def _signs(words: int) -> tuple[slice, slice]:
    """Positive words come first, as many as negative ones."""
    return slice(None, words // 2), slice(words // 2, None)


def _cells(values: Float[Tensor, "word 2 rendering *d"]) -> Float[Tensor, "4 *d"]:
    """Means over the four kinds of sentences, in the order of `CELLS`."""
    return torch.stack([values[words, n].flatten(0, 1).mean(0) for n in (0, 1) for words in _signs(len(values))])


# --- 2: the readout ---------------------------------------------------------------------------------------------------


def _readout(run: _Run, draws: int, generator: torch.Generator) -> "pd.DataFrame":
    import pandas as pd

    sites = [("mlp in", d.layer, d.normalized_hook) for d in run.decomposers]
    sites += [("mlp out", d.layer, d.out_hook) for d in run.decomposers]
    sites += [("resid post", d.layer, f"blocks.{d.layer}.hook_resid_post") for d in run.decomposers]
    sites = [*sorted(sites, key=lambda site: site[1]), ("next token", run.decomposers[-1].layer, "next token")]
    learn, test = halves()
    rows = []
    for position in POSITIONS:
        for site, layer, hook in sites:
            values = run.of(hook, position)
            directions = [_difference(values[learn][:, n]) for n in (0, 1)]
            rates = win_rates(values[test] @ torch.stack(directions, -1))
            plain, negated = cell_aucs(rates, valences()[test] > 0)
            low, high = _interval(rates[0], draws, generator)
            rows.append(
                {
                    "layer": layer,
                    "site": site,
                    "position": position,
                    "plain": plain[0, 1].item(),
                    "negated": plain[2, 3].item(),
                    "negated_low": low,
                    "negated_high": high,
                    "own": negated[2, 3].item(),
                }
            )
    return pd.DataFrame(rows)


def _difference(values: Float[Tensor, "word rendering *d"]) -> Float[Tensor, "*d"]:
    """Mean of the positive words less that of the negative ones."""
    positive, negative = (values[words].flatten(0, 1).mean(0) for words in _signs(len(values)))
    return positive - negative


def _interval(rates: Float[Tensor, "unit unit"], draws: int, generator: torch.Generator) -> tuple[float, float]:
    """Of the AUC of not positive against not negative: 95 % of what other adjectives might give (bootstrap)."""
    words = len(rates) // 2
    positive, negative = (
        torch.randint(words // 2, (draws, words // 2), generator=generator) + start for start in (0, words // 2)
    )
    drawn = rates[2 * positive[:, :, None] + 1, 2 * negative[:, None, :] + 1].mean((1, 2))
    low, high = drawn.quantile(torch.tensor([0.025, 0.975])).tolist()
    return low, high


def _distances(run: _Run) -> "pd.DataFrame":
    """Hellinger distances between the mean next-token distributions after the full stop."""
    import pandas as pd

    probabilities = _cells(run.of("next token", POSITIONS[1]) ** 2)
    distances = torch.cdist(probabilities.sqrt(), probabilities.sqrt()) / 2**0.5
    names = list(CELL_NAMES.values())
    return pd.DataFrame(distances.tolist(), index=pd.Index(names, name="kind"), columns=names)


# --- 3: the layers' algebra -------------------------------------------------------------------------------------------


def bilinear_form(
    layer: BilinearLayer, x: Float[Tensor, "*x d_model"], y: Float[Tensor, "*x d_model"]
) -> Float[Tensor, "*x d_out"]:
    """The symmetric `B(x, y)` with `B(x, x) = mlp(x)` of a layer without biases (or with its biases as weights)."""
    left, right = x @ layer.W_gate, x @ layer.W_in
    return 0.5 * (left * (y @ layer.W_in) + right * (y @ layer.W_gate)) @ layer.W_out


@dataclass(frozen=True)
class Split:
    """A layer's difference of differences `(nP - nN) - (P - N)`, in parts that add up to it.

    Attributes:
        valence: `P - N` of the layer's output on plain sentences.
        cross: `2 B(n, s)`: what the layer makes of negation and valence.
        passed_on: `2 B(m, d)`: of a difference of differences in its input.
        spread: of what varies around the means.
        s: the input's valence.
    """

    valence: Float[Tensor, "*k d_model"]
    cross: Float[Tensor, "*k d_model"]
    passed_on: Float[Tensor, "*k d_model"]
    spread: Float[Tensor, "*k d_model"]
    n: Float[Tensor, "d_model"]
    s: Float[Tensor, "*k d_model"]

    @property
    def measured(self) -> Float[Tensor, "*k d_model"]:
        return self.cross + self.passed_on + self.spread

    def fade(self, part: Float[Tensor, "*k d_model"]) -> Float[Tensor, "*k"]:
        """How far a part takes the valence away: 1 all of it, 2 turned round."""
        return -(part * self.valence).sum(-1) / self.valence.square().sum(-1)


def split_difference(
    layer: BilinearLayer,
    x: Float[Tensor, "word 2 d_model"],
    y: Float[Tensor, "word 2 d_model"],
    valence: Float[Tensor, "*k word"],
) -> Split:
    """The parts of the difference of differences; see the module.

    Args:
        layer: its weights.
        x, y: means of its input and of its output for every word, plain and negated.
        valence: +1 and -1 for as many words each; several labellings give as many splits.
    """
    weights = valence / (valence.shape[-1] / 2)  # P - N of means
    means = x.mean((0, 1))
    n = (x[:, 1] - x[:, 0]).mean(0)
    s = weights @ x.mean(1)
    d = weights @ (x[:, 1] - x[:, 0])
    plain, difference = weights @ y[:, 0], weights @ (y[:, 1] - y[:, 0])
    over = biases_as_weights(layer)
    zero, one = x.new_zeros(1), x.new_ones(1)
    n1, m1 = torch.cat([n, zero]), torch.cat([means, one])
    s1, d1 = (torch.cat([part, part.new_zeros(*part.shape[:-1], 1)], -1) for part in (s, d))
    cross = 2 * bilinear_form(over, n1.expand_as(s1), s1)
    passed_on = 2 * bilinear_form(over, m1.expand_as(d1), d1)
    return Split(plain, cross, passed_on, difference - cross - passed_on, n, s)


def _algebra(run: _Run, permutations: int, generator: torch.Generator) -> "pd.DataFrame":
    import pandas as pd

    labels = valences()
    shuffled = torch.stack([labels[torch.randperm(WORDS, generator=generator)] for _ in range(permutations)])
    rows = []
    for d in run.decomposers:
        x, y = (run.of(hook, POSITIONS[0]).mean(2) for hook in (d.normalized_hook, d.out_hook))
        found = split_difference(d.weights, x, y, labels)
        chance = split_difference(d.weights, x, y, shuffled)
        fades = chance.fade(chance.cross)
        fade = found.fade(found.cross).item()
        features = torch.nn.functional.normalize(d.input_directions(), dim=-1) * found.s.norm()
        others = 2 * bilinear_form(d.weights, found.n.expand_as(features), features).norm(dim=-1)
        logits = found.cross @ run.model.W_U
        tokens = [run.model.to_str_tokens(order.topk(5).indices) for order in (logits, -logits)]
        rows.append(
            {
                "layer": d.layer,
                "valence": found.valence.norm().item(),
                "measured": found.measured.norm().item(),
                "cross": found.cross.norm().item(),
                "fade": found.fade(found.measured).item(),
                "fade_cross": fade,
                "fade_passed_on": found.fade(found.passed_on).item(),
                "fade_spread": found.fade(found.spread).item(),
                "fade_chance": fades.mean().item(),
                "p": (1 + int((fades >= fade).sum())) / (1 + permutations),
                "cosine": torch.cosine_similarity(found.cross, found.valence, dim=-1).item(),
                "percentile": (others < found.cross.norm()).float().mean().item() * 100,
                "promotes": " ".join(tokens[0]),
                "suppresses": " ".join(tokens[1]),
            }
        )
    return pd.DataFrame(rows)


# --- 4: gates ---------------------------------------------------------------------------------------------------------


def families(activations: Float[Tensor, "word 2 rendering d_sae"]) -> Int[Tensor, "d_sae"]:
    """The family of every feature, an index into `FAMILIES`: the first that holds `MASS` of its activation."""
    by_cell = _cells(activations.abs())
    total = by_cell.sum(0).clamp_min(torch.finfo(by_cell.dtype).tiny)
    shares = torch.stack([by_cell[cells].sum(0) / total for cells in ([2, 3], [0, 1], [0, 2], [1, 3])])
    fits = torch.cat([shares >= MASS, torch.ones_like(shares[:1], dtype=torch.bool)])
    return fits.int().argmax(0)


def family_contributions(
    matrix: Float[Tensor, "d_model d_model"],
    x: Float[Tensor, "token d_model"],
    activations: Float[Tensor, "token d_sae"],
    decoder: Float[Tensor, "d_sae d_model"],
    family: Int[Tensor, "d_sae"],
) -> Float[Tensor, "family family"]:
    """The mean over tokens of what every two families add to `x^T Q x`; a pair of two stands twice, half each.

    The last family is what is not a feature: `b_dec` and the SAE's error. The entries add up to the mean of `x^T Q x`.
    """
    count = len(FAMILIES) - 1
    parts = torch.stack([(activations * (family == f)) @ decoder for f in range(count)])
    parts = torch.cat([parts, (x - parts.sum(0))[None]])
    return torch.einsum("ftd,de,gte->fg", parts, matrix, parts) / len(x)


def _gate(run: _Run, row: "pd.Series") -> Gate:
    d, feature = run.decomposers[int(row.layer)], int(row.feature)
    x = run.of(d.normalized_hook, row.position)
    matrix = interaction_matrix(d.weights, d.directions(feature))
    eigen = d.eigen(feature, k=2)
    values, projections = eigen.values, x.flatten(0, 2) @ eigen.vectors.T
    # Let what negation adds be positive, as far as signs are free.
    negated = (x[:, 1] - x[:, 0]).mean((0, 1)) @ eigen.vectors.T
    scaled = projections * values.abs().sqrt() * torch.where(negated < 0, -1.0, 1.0)
    product = bool(values[0] * values[1] < 0)
    if product:
        positive, negative = (scaled[:, int((values > 0).int().argmax())], scaled[:, int((values < 0).int().argmax())])
        scaled = torch.stack([positive - negative, positive + negative], 1)
    in_full = d.output_view.pre_activations(run.of(d.out_hook, row.position))[..., feature].flatten()
    approximate = (projections**2) @ values
    acts = d.input_view.activations(x)
    fires = (d.output_view.activations(run.of(d.out_hook, row.position))[:, 1, :, feature] > 0).flatten()
    return Gate(
        target=row.name,
        layer=d.layer,
        feature=feature,
        position=row.position,
        eigenvalues=(values[0].item(), values[1].item()),
        x=scaled[:, 0],
        y=scaled[:, 1],
        product=product,
        values=in_full,
        correlation=torch.corrcoef(torch.stack([approximate, in_full]))[0, 1].item(),
        families=family_contributions(
            matrix,
            x[:, 1].flatten(0, 1)[fires],
            acts[:, 1].flatten(0, 1)[fires],
            d.input_directions(),
            families(acts),
        ),
    )


# --- in words ---------------------------------------------------------------------------------------------------------


def _held(screen: "pd.DataFrame") -> dict[str, "pd.Series"]:
    """The targets whose best feature passes on the words it was not picked on."""
    return {row.target: row for _, row in screen.iterrows() if row.p < SIGNIFICANT}


def _next_token(study: NegationStudy) -> "pd.Series":
    return study.readout[(study.readout.site == "next token") & (study.readout.position == POSITIONS[1])].iloc[0]


def _headline(study: NegationStudy) -> str:
    held, turned = _held(study.screen), study.readout[study.readout.negated_high < 0.5]
    crossed = [target for target in SENTIMENT_BY_NEGATION if target in held]
    fade = study.algebra.fade.max()
    if not crossed and not len(turned) and fade < 1:
        return (
            f"{study.model} has no circuit that turns sentiment round under negation: none of the {study.screened} "
            "features that fire here passes as one that reads both, no readout of valence is turned round, and no "
            f"layer's output loses more than {fade:.0%} of the word's valence."
        )
    found = [f"a feature for “{target}” (AUC {held[target].tested:.2f})" for target in crossed]
    found += [f"a readout turned round in {len(turned)} places"] * bool(len(turned))
    found += [f"a layer that takes away {fade:.0%} of the word's valence"] * bool(fade >= 1)
    return f"{study.model} combines negation and sentiment: {'; '.join(found)}."


def _on_screen(study: NegationStudy) -> list[str]:
    held = _held(study.screen)
    return [
        f"“{row.target}”: {'found' if row.target in held else 'not found'}. The best feature, {row.feature} of layer "
        f"{row.layer} at the {row.position}, has a least AUC of {row.picked:.2f} on the words it was picked on and "
        f"{row.tested:.2f} on the others (95 % of chance: {row.chance_tested:.2f}, p = {row.p:.3f})."
        for row in study.screen.itertuples()
    ]


def _on_readout(study: NegationStudy) -> list[str]:
    last = _next_token(study)
    if last.negated_high < 0.5:
        what = "the clause: negation turns it round"
    elif last.negated_low > 0.5:
        what = "the word: negation does not turn it round"
    else:
        what = "neither the word nor the clause"
    flipped = study.readout[study.readout.negated_high < 0.5]
    where = ", ".join(f"layer {row.layer} {row.site} at the {row.position}" for row in flipped.itertuples())
    return [
        f"What the model says next follows {what} (the plain sentences' readout has AUC {last.plain:.2f} on plain and "
        f"{last.negated:.2f} [{last.negated_low:.2f}, {last.negated_high:.2f}] on negated ones).",
        f"The readout is turned round in {where}." if where else "The readout is turned round nowhere.",
    ]


def _on_algebra(algebra: "pd.DataFrame") -> list[str]:
    lines = []
    for row in algebra.itertuples():
        does = (
            "turns round"
            if row.fade > 1.5
            else "takes away"
            if row.fade > 0.75
            else "dims"
            if row.fade > 0.25
            else "keeps"
        )
        special = "more than" if row.p < 0.05 / len(algebra) else "no more than"
        lines.append(
            f"Layer {row.layer}: under negation its output {does} the word's valence (fade {row.fade:.2f}). Its own "
            f"product of negation and valence makes {row.fade_cross:.2f} of this, {special} for other halvings of the "
            f"same words (mean {row.fade_chance:.2f}, p = {row.p:.3f})."
        )
    return lines


def _on_gate(gate: Gate) -> str:
    words = ("positive words", "negative words")
    alone = gate.share(("negation", "negation"))
    crossed = gate.share(*(("negation", word) for word in words))
    kind = "an AND of negation and sentiment" if crossed > alone else "no AND of negation and sentiment"
    return (
        f"Feature {gate.feature} of layer {gate.layer} (“{gate.target}”) is {kind}: of the absolute parts that make it "
        f"fire {alone:.0%} are negation features with each other, {crossed:.0%} negation features with features of "
        f"sentiment words; its two leading eigenvectors follow it with correlation {gate.correlation:.2f}."
    )


# --- as a recipe ------------------------------------------------------------------------------------------------------


def _make(settings: Settings) -> tuple[Rows, Figures]:
    study = negation_study(settings.model, permutations=20 if settings.reduced else 1000, seed=settings.seed)
    rows = [
        (
            f"best feature for “{row.target}”, least AUC on words it was not picked on",
            "features for not-good and not-bad" if row.target in ("not positive", "not negative") else "",
            f"{row.tested:.2f} ({row.layer}/{row.feature}; chance {row.chance_tested:.2f}, p = {row.p:.3f})",
        )
        for row in study.screen.itertuples()
    ]
    rows += [
        (f"valence lost under negation, layer {row.layer}", "", f"{row.fade:.0%}") for row in study.algebra.itertuples()
    ]
    rows += [("in words", "", line) for line in study.verdict]
    return rows, {f"{gate.target}: layer {gate.layer}, feature {gate.feature}": gate.plot() for gate in study.gates}


NEGATION = Recipe(
    name="negation",
    source=f"{PEARCE_2025}, section 5, the sentiment-negation circuit",
    about="whether features or layers turn a word's sentiment round under negation",
    scaled_down="a 6.3 M parameter model of TinyStories and 1152 sentences made from templates",
    make=_make,
)
