"""Does "not" turn a word's sentiment round? The paper's sentiment-negation circuit, looked for in another model.

Sentences of four kinds (positive, negative, not positive, not negative: `probes`) are run once; everything is
read at the adjective and at the full stop.

1. screen (`auc`): does any output feature of any layer tell "not positive" from each of the other three kinds,
   or follow the clause ("good" and "not bad" against "bad" and "not good")? A feature's score is the least AUC of its
   comparisons, of pre-activations; of equal ones that which separates by more standard deviations is taken. The best of
   all features that fire here is picked on one half of the adjectives and tested on the other; so is the best under
   labels permuted over adjectives (for "negated": plain and negated swapped, adjective by adjective): what so many
   reach by chance
2. readout: the direction from negative to positive in plain sentences, learned on one half, on the other half's plain
   and negated sentences. AUC 1 follows the word, 0 the clause, 1/2 neither; the last site is the next token's
   distribution (square roots of probabilities)
3. the layers' own algebra (`algebra`): with the four means of a layer's input `mu = m + a n + b s + a b d`,
   `a, b = +-1/2` for negated and positive, and `mlp(x) = B(x, x)`, the difference of differences of its output is
   exactly

       (nP - nN) - (P - N) = 2 B(n, s) + 2 B(m, d) + spread

   what the layer makes of negation and valence, what it passes on of a difference that its input has already, and what
   comes of variation around the means. `fade` is minus the projection on the plain valence `v = P - N` of the output,
   over `|v|^2`: 0 if the word's valence is untouched under negation, 1 if it is gone, 2 if it is turned round. Null:
   valences permuted over adjectives, and feature directions as long as `s` in place of it
4. gates (`gates`): the picked features' two leading eigenvectors, and which families of input features their
   pre-activation comes from, exactly

Source: Pearce et al. 2025 (arXiv 2410.08417), section 5.1, the sentiment-negation circuit.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from bilens._core.bare import require_bare
from bilens._core.display import Tabular
from bilens.decompose import Decomposer
from bilens.errors import ArgumentError
from bilens.model.loading import load_model
from bilens.model.transformer import HookedBilinearTransformer
from bilens.reproduce.reproduction import Made, Settings
from tutorials.negation.algebra import bilinear_form, split_difference
from tutorials.negation.auc import (
    TARGETS,
    cell_aucs,
    cell_margins,
    cell_means,
    least_auc,
    negated_interval,
    positive_minus_negative,
    win_rates,
)
from tutorials.negation.gates import Gate, gate_of
from tutorials.negation.probes import (
    CELL_NAMES,
    CELLS,
    NEGATIONS,
    POSITIONS,
    RENDERINGS,
    WORDS,
    halves,
    tokens_of,
    valences,
)
from tutorials.negation.verdict import verdict

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

GATED = ("negated", "not positive", "not negative")
FIRES = 0.05  # share of the sentences in which a feature must fire to be screened


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
        return verdict(self)

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
        lines = "\n".join(f"- {line}" for line in self.verdict)
        return "\n\n".join([f"negation and sentiment in {self.model}", *tables, *map(str, self.gates), lines])


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
    source: str | HookedBilinearTransformer | None = None,
    *,
    permutations: int = 1000,
    seed: int = 0,
    progress: bool = True,
) -> NegationStudy:
    """Look for a circuit that turns sentiment round under negation; see the module for how.

    Args:
        source: a model with SAEs on its MLPs, or what `load_model` takes; `None` is the bundled one.
        permutations: of the labels, for the nulls.
        seed: of the permutations.
        progress: show a bar.

    Raises:
        ArgumentError: `permutations` below 1.
        TokenizationError: a model to which one of the adjectives is not one token.
        NotBilinearError, ModelNotFoundError: as for `Decomposer.from_pretrained`.
    """
    if permutations < 1:
        raise ArgumentError(f"permutations is {permutations}, expected at least 1.")
    model = source if isinstance(source, HookedBilinearTransformer) else load_model(source)
    run = _run(model, [Decomposer.from_pretrained(model, layer) for layer in range(model.cfg.n_layers)])
    generator = torch.Generator().manual_seed(seed)
    screen, screened = _screen(run, permutations, generator, progress)
    picked = screen.set_index("target")
    return NegationStudy(
        model=model.cfg.model_name,
        screened=screened,
        screen=screen,
        readout=_readout(run, permutations, generator),
        algebra=_algebra(run, permutations, generator),
        distances=_distances(run),
        gates=[_gate(run, picked.loc[target]) for target in GATED],
    )


def _run(model: HookedBilinearTransformer, decomposers: Sequence[Decomposer]) -> _Run:
    require_bare(model)
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


def _screen(run: _Run, permutations: int, generator: torch.Generator, progress: bool) -> tuple["pd.DataFrame", int]:
    import pandas as pd

    learn, test = halves()
    columns, values = _firing(run, learn)
    rates = [win_rates(values[words]) for words in (learn, test)]
    labels = [valences()[words] > 0 for words in (learn, test)]
    margins = cell_margins(values[learn])

    def best(target: str, labels: Sequence[Tensor], swaps: Sequence[Tensor | None] = (None, None)) -> _Best:
        pairs = TARGETS[target]
        scores = least_auc(cell_aucs(rates[0], labels[0], swaps[0]), pairs)
        equal = (scores == scores.max()).nonzero().flatten()
        column = int(equal[least_auc(margins, pairs)[equal].argmax()])
        tested = least_auc(cell_aucs(rates[1][[column]], labels[1], swaps[1]), pairs)
        return _Best(column, scores[column].item(), tested.item())

    rows = []
    for target in tqdm(TARGETS, "screen", unit="target", disable=not progress):
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
            | {f"fires {cell}": share for cell, share in zip(CELLS, cell_means(fires.float()).tolist(), strict=True)}
        )
    return pd.DataFrame(rows), len(columns)


def _gate(run: _Run, row: "pd.Series") -> Gate:
    d = {d.layer: d for d in run.decomposers}[row.layer]
    x, y = (run.of(hook, row.position) for hook in (d.normalized_hook, d.out_hook))
    return gate_of(d, int(row.feature), x, y, target=str(row.name), position=row.position)


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
            directions = [positive_minus_negative(values[learn][:, n]) for n in (0, 1)]
            rates = win_rates(values[test] @ torch.stack(directions, -1))
            plain, negated = cell_aucs(rates, valences()[test] > 0)
            low, high = negated_interval(rates[0], draws, generator)
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


def _distances(run: _Run) -> "pd.DataFrame":
    """Hellinger distances between the mean next-token distributions after the full stop."""
    import pandas as pd

    probabilities = cell_means(run.of("next token", POSITIONS[1]) ** 2)
    distances = torch.cdist(probabilities.sqrt(), probabilities.sqrt()) / 2**0.5
    names = list(CELL_NAMES.values())
    return pd.DataFrame(distances.tolist(), index=pd.Index(names, name="kind"), columns=names)


# --- 3: the layers' algebra -------------------------------------------------------------------------------------------


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


# --- as a recipe ------------------------------------------------------------------------------------------------------


def negation(settings: Settings) -> Made:
    """The negation study as a recipe (figure 8)."""
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
    figures = {f"{gate.target}: layer {gate.layer}, feature {gate.feature}": gate.plot() for gate in study.gates}
    ran_on = f"{study.model} (the paper: a TinyStories model of 33 M parameters) and 1152 sentences made from templates"
    return Made(ran_on, rows, figures, study.verdict)
