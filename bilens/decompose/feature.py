"""Everything about one output feature on one text: what a report shows and a reader asks for.

1. where the feature fires on the text, and its exact attribution at one position
2. which input features matter there: those that make the largest eigencircuits, and their interactions in the weights
3. what each of them fires on elsewhere, and which tokens the output feature promotes
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Float, Int
from torch import Tensor

from bilens._core.bare import require_bare
from bilens._core.display import Paged, Tabular
from bilens.decompose.decomposer import Decomposer
from bilens.decompose.explanation import Explanation
from bilens.decompose.firing import Firing, Fit
from bilens.decompose.outputs import check_feature
from bilens.decompose.results import Attribution
from bilens.draw import plots
from bilens.layer.bilinear import interaction_matrix
from bilens.layer.eigen.metric import terms
from bilens.model.tokenization import token_strings
from bilens.sae.features.examples import DescribedFeatures, FeatureActivations, FeatureSummary

N_CIRCUITS = 2  # eigencircuits whose features are shown
TEXTS = 32  # run at a time


@dataclass(frozen=True)
class FeatureCircuit(Paged):
    """One output feature on one text.

    Attributes:
        attribution: exact, at its `position`.
        output_activations: the feature's activation on every token (after the output SAE's top-k).
        shown: the input features with the largest parts in the first `N_CIRCUITS` eigencircuits at that token.
        interactions: the interaction matrix between them (`Q_ij`).
        promoted, suppressed: tokens by the feature's direct effect on the logits (decoder times unembedding).
        wordpiece: true if the tokens are word pieces (`HookedBilinearTransformer.is_wordpiece`).
        note: what a person says of the feature.
        output_summary, input_summaries: the examples that the features fire on, if there are example texts.
    """

    attribution: Attribution
    output_activations: Float[Tensor, "p"] = field(repr=False)
    shown: list[int]
    interactions: Float[Tensor, "m m"] = field(repr=False)
    promoted: list[tuple[str, float]] = field(repr=False)
    suppressed: list[tuple[str, float]] = field(repr=False)
    wordpiece: bool = field(default=False, repr=False)
    note: str = ""
    output_summary: FeatureSummary | None = field(default=None, repr=False)
    input_summaries: dict[int, FeatureSummary] = field(default_factory=dict, repr=False)

    @property
    def explanation(self) -> Explanation:
        return self.attribution.explanation

    @property
    def tokens(self) -> list[str]:
        """The tokens of the text, `[BOS]` first."""
        return self.attribution.tokens

    @property
    def output_label(self) -> str:
        return self.attribution.output_name

    def input_label(self, feature: int) -> str:
        names = self.attribution.input_names
        return str(feature) if names is None else names[feature]

    def to_frame(self) -> pd.DataFrame:
        """The eigencircuits of the attribution; see `Explanation.to_frame`."""
        return self.attribution.to_frame()

    def plot(self) -> go.Figure:
        """The eigencircuits of the attribution; see `Explanation.plot`."""
        return self.attribution.plot()

    def __str__(self) -> str:
        return str(self.attribution)


@torch.no_grad()
def feature_circuit(
    decomposer: Decomposer,
    text_or_tokens: str | Int[Tensor, "p"] | Int[Tensor, "1 p"],
    feature: int,
    position: int | None = None,
    *,
    inputs: DescribedFeatures | None = None,
    outputs: DescribedFeatures | None = None,
    fit: Fit | None = None,
    n_inputs: int = 8,
    note: str = "",
) -> FeatureCircuit:
    """Collect everything about an output feature on a text.

    Args:
        decomposer: a decomposer with both SAEs.
        text_or_tokens: the same as for `Decomposer.attribute`.
        feature: a feature of the output SAE.
        position: `None` takes where the feature fires most, or else its pre-activation is largest, `[BOS]` left out.
        inputs, outputs: the activations of the two SAEs' features on example texts.
        fit: the same as for `Decomposer.attribute`.
        n_inputs: the number of input features to show of each eigencircuit.
        note: what a person says of the feature.

    Raises:
        MissingSAEError, OutOfRangeError, EmptyTextError, ContextLengthError: the same as for `Decomposer.attribute`.
    """
    model, view_in, view_out = decomposer.model, decomposer.input_view, decomposer.output_view
    require_bare(model, view_in.sae, view_out.sae)
    tokens = model.input_to_tokens(text_or_tokens)
    _, cache = model.run_with_cache(
        tokens, names_filter=decomposer.out_hook, stop_at_layer=decomposer.layer + 1, return_cache_object=False
    )
    y = cache[decomposer.out_hook][0]
    if position is None:
        first, feature = min(model.n_bos, len(y) - 1), check_feature(feature, view_out.d_sae)
        active, pre = (values[first:, feature] for values in (view_out.activations(y), view_out.pre_activations(y)))
        position = int((active if active.any() else pre).argmax()) + first
    attribution = decomposer.attribute(tokens, feature, position, fit=fit)

    direction = decomposer.directions(feature)
    shown = _largest_parts(attribution.explanation, n_inputs)
    directions = view_in.decoder[shown].to(direction)
    effect = model.W_U.T.to(direction) @ view_out.decoder[feature].to(direction)
    # Only what the feature changes relative to the average token moves the softmax.
    effect = effect - effect.mean()
    return FeatureCircuit(
        attribution=attribution,
        output_activations=view_out.activations(y)[:, feature],
        shown=shown,
        interactions=directions @ interaction_matrix(decomposer.weights, direction) @ directions.T,
        promoted=_tokens_of(decomposer, effect, 10),
        suppressed=[(token, -value) for token, value in _tokens_of(decomposer, -effect, 10)],
        wordpiece=model.is_wordpiece,
        note=note,
        output_summary=None if outputs is None else outputs.summary(feature),
        input_summaries={} if inputs is None else {i: inputs.summary(i) for i in shown},
    )


def _largest_parts(explanation: Explanation, n: int) -> list[int]:
    """The input features with the `n` largest parts in each of the first circuits."""
    m = len(explanation.inputs)
    parts = explanation.parts[:N_CIRCUITS, :m].abs()
    chosen = [explanation.inputs[row.argsort(descending=True)[:n]].tolist() for row in parts]
    return list(dict.fromkeys(i for features in chosen for i in features))


def _tokens_of(decomposer: Decomposer, effect: Float[Tensor, "d_vocab"], n: int) -> list[tuple[str, float]]:
    top = effect.topk(n)
    return list(zip(token_strings(decomposer.model.tokenizer, top.indices), top.values.tolist(), strict=True))


@dataclass(frozen=True)
class RankedFeatures(Tabular):
    """Output features, ranked by how clear their circuits are.

    Attributes:
        features: best first.
        correlation: that of the leading eigencircuits alone with the feature, over the tokens where it fires.
        cross_share: the share of two different features in the absolute contributions of pairs of input features.
        density: share of all tokens on which the feature fires.
    """

    features: Int[Tensor, "n"]
    correlation: Float[Tensor, "n"]
    cross_share: Float[Tensor, "n"]
    density: Float[Tensor, "n"]
    names: Sequence[str] | None = field(default=None, repr=False)

    @property
    def score(self) -> Float[Tensor, "n"]:
        return self.correlation * self.cross_share

    def to_frame(self) -> pd.DataFrame:
        """One row per feature: `feature, name, score, correlation, cross_share, density`."""
        features = self.features.tolist()
        return pd.DataFrame(
            {
                "feature": features,
                "name": [str(f) if self.names is None else self.names[f] for f in features],
                "score": self.score.tolist(),
                "correlation": self.correlation.tolist(),
                "cross_share": self.cross_share.tolist(),
                "density": self.density.tolist(),
            }
        )

    def plot(self) -> go.Figure:
        """The two factors of the score, feature by feature."""
        labels, shares = self.to_frame().name.tolist(), self.cross_share.tolist()
        return plots.scatter(shares, self.correlation.tolist(), labels, x_title="cross share", y_title="correlation")

    def __str__(self) -> str:
        return self.to_frame().head(20).round(4).to_string(index=False)


@torch.no_grad()
def rank_features(
    decomposer: Decomposer,
    outputs: FeatureActivations,
    *,
    among: Sequence[int] | None = None,
    k: int = 2,
    density: tuple[float, float] = (5e-4, 0.05),
    min_active: int = 20,
) -> RankedFeatures:
    """Rank output features by how well `k` eigencircuits reproduce them and how much they combine different inputs.

    A feature scores high if `k` eigencircuits, found where it fires (`eigen(metric="firing")`), predict token by token
    how strongly it fires (Pearce et al. 2025, section 5.2, takes those of largest `|lambda|`, which are often silent
    there), and if what makes it fire are pairs of two different input features rather than one feature squared.

    Args:
        decomposer: a decomposer with both SAEs.
        outputs: activations of the output SAE's features on example texts, on which eigencircuits are found.
        among: consider these only.
        k: eigencircuits used.
        density: the range of densities of the features considered: the rare and the dense tell little.
        min_active: tokens a feature must fire on.
    """
    view_in = decomposer.input_view
    counts, densities = outputs.offsets.diff(), outputs.density()
    eligible = (counts >= min_active) & (densities >= density[0]) & (densities <= density[1])
    candidates = eligible.nonzero().flatten()
    if among is not None:
        candidates = candidates[torch.isin(candidates, torch.tensor(list(among), dtype=torch.long))]
    if not len(candidates):
        empty = torch.zeros(0)
        return RankedFeatures(candidates, empty, empty, empty, decomposer.output_names)
    firing = _firing(decomposer, outputs)
    pairs = decomposer.spectra(candidates, k, fit=firing).pairs
    weights, directions = decomposer.weights, decomposer.directions(candidates)
    decoder = view_in.decoder.to(directions)
    correlations, shares = [], []
    for feature, u, values, vectors in zip(candidates.tolist(), directions, pairs.values, pairs.vectors, strict=True):
        x, activations = firing.inputs_of(feature).to(vectors), firing.activations_of(feature)
        correlations.append(_correlation(terms(values, vectors, x).sum(1).cpu(), activations))
        strongest = x[activations.argsort(descending=True)[:16]]
        shares.append(_cross_share(interaction_matrix(weights, u), decoder, view_in.activations(strongest)))
    result = RankedFeatures(
        candidates, torch.tensor(correlations), torch.tensor(shares), densities[candidates], decomposer.output_names
    )
    order = result.score.argsort(descending=True)
    return RankedFeatures(
        candidates[order], result.correlation[order], result.cross_share[order], result.density[order], result.names
    )


def _firing(decomposer: Decomposer, outputs: FeatureActivations) -> Firing:
    """What `Decomposer.firing` gives of the same texts."""
    x = torch.cat([decomposer.run(tokens)[0].cpu() for tokens in outputs.tokens.split(TEXTS)])
    counts = outputs.mask.bool()
    numbers = counts.flatten().cumsum(0).view(counts.shape) - 1
    tokens = numbers[outputs.rows, outputs.positions]
    return Firing(decomposer.layer, x[counts], tokens, outputs.values, outputs.offsets, decomposer.output_names)


def _correlation(a: Float[Tensor, "n"], b: Float[Tensor, "n"]) -> float:
    """Pearson's, 0 where either side is constant."""
    a, b = a.double() - a.double().mean(), b.double() - b.double().mean()
    norm = (a.norm() * b.norm()).item()
    return 0.0 if norm == 0.0 else (a @ b).item() / norm


def _cross_share(
    matrix: Float[Tensor, "d_model d_model"], decoder: Float[Tensor, "d_sae d_model"], acts: Float[Tensor, "n d_sae"]
) -> float:
    """Share of `|f_i f_j Q_ij|` that lies off the diagonal, over tokens."""
    cross = total = 0.0
    for f in acts:
        active = f.nonzero().flatten()
        parts = f[active, None] * decoder[active]
        contributions = (parts @ matrix @ parts.T).abs()
        total += contributions.sum().item()
        cross += contributions.sum().item() - contributions.diagonal().sum().item()
    return cross / total if total else 0.0
