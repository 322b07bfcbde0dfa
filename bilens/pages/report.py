"""From a model's name to a page: the main job, in one call.

1. a model, and the SAEs on the input and output of one of its MLPs
2. what every feature fires on, over example texts: names and examples
3. which output features: those asked for, or the most interesting ones
4. each one's circuit on a text, and the page of them
"""

import json
import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE

from bilens._core.bare import require_bare
from bilens._core.checks import check_index, check_sizes
from bilens._core.files import PAGE, destination, write_atomically
from bilens.attribute import (
    Circuit,
    FrozenPass,
    Target,
    attribute_tokens,
    check_circuit,
    check_edges,
    freeze,
    read_positions,
    trace_circuit,
)
from bilens.attribute.faithfulness import MODES
from bilens.attribute.targets import read_targets
from bilens.attribute.tracing import MLPs
from bilens.decompose import Decomposer
from bilens.decompose.feature import N_CIRCUITS, FeatureCircuit, feature_circuit, rank_features
from bilens.decompose.firing import Firing
from bilens.decompose.gallery import MotifGallery, motif_gallery
from bilens.draw.page import Page
from bilens.errors import ArgumentError, OutOfRangeError
from bilens.layer.bilinear import check_bilinear
from bilens.model.files import DEFAULT_MODEL, PRETRAINED
from bilens.model.loading import load_model
from bilens.model.transformer import HookedBilinearTransformer
from bilens.pages.circuit import circuit_page
from bilens.sae.features.examples import DescribedFeatures, FeatureActivations
from bilens.sae.features.kept import describe_features
from bilens.sae.loading import layers_of, list_saes, load_sae, sae_source
from bilens.sae.texts import bundled_texts, example_texts
from bilens.sae.train.evaluation import SAEScores, evaluate_saes
from bilens.train.data import TokenizedTexts
from bilens.train.language_model import validate

DEMO_FILE = "demo.json"
N_EIGENCIRCUITS = 3  # features of a traced circuit whose eigencircuits are shown
N_CANDIDATES = 24  # features of a text that are explained before the best are chosen
N_FITTED = 48  # texts on which eigencircuits are found: a quarter of the bundled ones, for a quarter of the time
DENSE = 0.1  # of the tokens: a feature that fires on more of them tells little
RARE = 1e-3  # of the tokens: a feature that fires on more of them tells less, by the logarithm
CONTEXT_AFTER = 6  # tokens of a story kept after the one explained


HOW_CHOSEN = (
    "Of the features that fire on this text, these fire strongly, both for what they do in the example texts and among "
    "the features at their token, and two eigencircuits, read in input features, give most of what the layer writes "
    "along them. Rare features come first; those that fire on more than a tenth of all tokens are left out."
)
HOW_RANKED = (
    "These are the features whose activation two eigencircuits, found where they fire, reproduce best over the example "
    "texts, by pairs of different input features. Each is shown where it fires most strongly."
)


@dataclass(frozen=True)
class LabelledLayer:
    """A decomposer whose features have names, what they fire on, and texts on which eigencircuits are found."""

    decomposer: Decomposer
    inputs: DescribedFeatures
    outputs: DescribedFeatures
    texts: Sequence[str] = field(default=(), repr=False)

    def activations(self) -> tuple[FeatureActivations, FeatureActivations]:
        """The same of inputs and outputs, token by token.

        Raises:
            ArgumentError: the layer was labelled without texts.
        """
        if not isinstance(self.inputs, FeatureActivations) or not isinstance(self.outputs, FeatureActivations):
            raise ArgumentError(
                "this needs to know every token on which features fire: label_layers(decomposers, texts)."
            )
        return self.inputs, self.outputs

    @cached_property
    def firing(self) -> Firing | None:
        """Where output features fire in the first of the texts: what squares are found by; `None` without texts."""
        return self.decomposer.firing(self.texts[:N_FITTED]) if self.texts else None


def label_layers(decomposers: Sequence[Decomposer], texts: Sequence[str] | None = None) -> dict[int, LabelledLayer]:
    """Decomposers of several layers, with both SAEs, whose features have names.

    Args:
        decomposers: one for each layer.
        texts: texts to see what features fire on, token by token (`FeatureActivations`), by one run; `None` takes what
            is kept beside the SAEs, where there is that.
    """
    model, flat = decomposers[0].model, [sae for d in decomposers for sae in saes_of(d)]
    described = describe_features(model, flat, texts)
    fit = bundled_texts(model) if texts is None else texts
    layers = {}
    for place, d in enumerate(decomposers):
        inputs, outputs = described[2 * place : 2 * place + 2]
        names = {"input_names": inputs.labels(), "output_names": outputs.labels()}
        layers[d.layer] = LabelledLayer(Decomposer(d.model, d.layer, *saes_of(d), **names), inputs, outputs, fit)  # type: ignore[arg-type]
    return layers


def saes_of(decomposer: Decomposer) -> tuple[SAE[Any], SAE[Any]]:
    """The input and the output SAE."""
    return decomposer.input_view.sae, decomposer.output_view.sae


def interesting_circuits(
    labelled: LabelledLayer,
    text: str | None = None,
    features: Sequence[int] | None = None,
    n: int = 3,
) -> list[FeatureCircuit]:
    """Circuits of the features asked for, or of the `n` most interesting ones.

    Args:
        labelled: the layer's decomposer with names and examples; without a text, made by texts.
        text: `None` shows each feature on its strongest example.
        features: `None` takes the best of `well_explained` where there is a text, of `rank_features` otherwise.
        n: the number of features to take if none are given.
    """
    decomposer = labelled.decomposer
    if features is None:
        if text is None:
            features = rank_features(decomposer, labelled.activations()[1]).features[:n].tolist()
        else:
            features = well_explained(labelled, text, n)
        if not features:
            raise OutOfRangeError(
                "no output feature fires often enough on these texts; give features or more examples."
            )
    circuits = []
    for feature in features:
        tokens, position = (text, None) if text is not None else strongest_example(labelled, feature)
        circuits.append(explained(labelled, tokens, feature, position))
    return circuits


def explained(
    labelled: LabelledLayer,
    text_or_tokens: str | torch.Tensor,
    feature: int,
    position: int | None = None,
    note: str = "",
) -> FeatureCircuit:
    """`feature_circuit` with names and examples, and where in the text its first eigencircuits are read."""
    d = labelled.decomposer
    found = feature_circuit(
        d,
        text_or_tokens,
        feature,
        position,
        inputs=labelled.inputs,
        outputs=labelled.outputs,
        fit=labelled.firing,
        note=note,
    )
    tokens = d.model.input_to_tokens(text_or_tokens)[0, : found.attribution.position + 1]
    return replace(found, attribution=read_positions(freeze(d.model, tokens), found.attribution, N_CIRCUITS))


@torch.no_grad()
def well_explained(labelled: LabelledLayer, text: str, n: int) -> list[int]:
    """Output features that fire strongly on a text, and that few eigencircuits explain; see `HOW_CHOSEN`."""
    d, outputs = labelled.decomposer, labelled.outputs
    require_bare(d.model, d.output_view.sae)
    tokens = d.model.input_to_tokens(text)
    _, cache = d.model.run_with_cache(
        tokens, names_filter=d.out_hook, stop_at_layer=d.layer + 1, return_cache_object=False
    )
    activations = d.output_view.activations(cache[d.out_hook][0, d.model.n_bos :]).cpu()
    strongest, places = activations.max(0)
    usual, density = outputs.maxima(), outputs.density()
    strength = (strongest / usual.clamp_min(1e-6)).clamp(0, 1) * (strongest / activations.max(1).values[places])
    strength *= (usual > 0) & (density <= DENSE)
    candidates = [f for f in strength.argsort(descending=True)[:N_CANDIDATES].tolist() if strength[f] > 0]
    scores = {}
    for feature in candidates:
        at = int(places[feature]) + d.model.n_bos
        told = d.attribute(tokens, feature, at, fit=labelled.firing).explanation
        leading = told.shares[:N_CIRCUITS].sum().item()
        read = told.parts[0, :-2].sum().item() / told.projections[0].item()
        rarity = density[feature].clamp_min(RARE).log() / math.log(RARE)
        scores[feature] = strength[feature].item() * _nearness(leading) * _nearness(read) * rarity.item()
    ranked = sorted(candidates, key=lambda feature: -scores[feature])
    # One feature for each word: two of the same token would say the same.
    first = {int(places[feature]): feature for feature in reversed(ranked)}
    return sorted(ranked, key=lambda feature: feature not in first.values())[:n]


def _nearness(share: float) -> float:
    """1 for a share of 1, less for what is short of it or beyond it."""
    return max(0.0, 1 - abs(1 - share))


def strongest_example(labelled: LabelledLayer, feature: int) -> tuple[torch.Tensor, int]:
    """The tokens up to a little after where a feature fires most, and the position of that token.

    Raises:
        OutOfRangeError: the feature fires nowhere in the example texts.
    """
    _, outputs = labelled.activations()
    at = outputs.entries(feature)
    if at.start == at.stop:
        raise OutOfRangeError(f"output feature {feature} fires nowhere in the example texts; give a text.")
    entry = int(outputs.values[at].abs().argmax())
    row, position = int(outputs.rows[at][entry]), int(outputs.positions[at][entry])
    last = int(outputs.mask[row].nonzero().max())
    return outputs.tokens[row, : min(last, position + CONTEXT_AFTER) + 1], position


@dataclass(frozen=True)
class Report:
    """Circuits of some features, as one page: a notebook shows it, `.save(path)` writes it as one HTML file.

    Attributes:
        circuits: one for each feature.
        title, subtitle: of the page.
        how: how the features were chosen; empty where they were asked for.
    """

    circuits: Sequence[FeatureCircuit] = field(repr=False)
    title: str
    subtitle: str
    how: str = field(default="", repr=False)

    def to_page(self) -> Page:
        return circuit_page(self.circuits, self.title, self.subtitle, self.how)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the page, whole or not at all, and return where."""
        return self.to_page().save(path)

    def _repr_html_(self) -> str:
        return self.to_page()._repr_html_()

    def __str__(self) -> str:
        return "\n\n".join(str(circuit) for circuit in self.circuits)


def report(
    source: str | os.PathLike[str] | HookedBilinearTransformer | None = None,
    *,
    layer: int | None = None,
    text: str | None = None,
    features: Sequence[int] | None = None,
    n: int = 3,
    saes: str | os.PathLike[str] | Sequence[SAE[Any] | str | os.PathLike[str]] | None = None,
    expansion: int | None = None,
    k: int | None = None,
    examples: Sequence[str] | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Report:
    """Explain features of one MLP, on a text or each on its strongest example.

        bilens.report(model, saes=[input_sae, output_sae], text="Lily did not know").save("report.html")

    Args:
        source: a model, or the source of one for `load_model`.
        layer: the layer of the MLP; `None` takes the middle one, or the middle one of those that a list of SAEs is on.
        text: the text to explain; `None` shows each feature on its strongest example.
        features: output features; `None` takes the `n` most interesting ones.
        n: the number of interesting features.
        saes: the source of the SAEs for `load_sae`; `None` is the bundled model's, or `<source>-scope` for a hub id.
            Or a list of SAEs, or of folders of one SAE each, on the input and the output of the MLP.
        expansion, k: features per dimension and active features per token of the SAEs, if the source holds several.
        examples: texts to see what features fire on; `None` takes what is kept beside the SAEs (`bilens names`) where
            that is enough, or else runs the model's own (see `example_texts`).
        say: a function that is told what is going on.

    Raises:
        SAEMismatchError: a list of SAEs without one for each side of the MLP.
        others: the same as for `Decomposer.from_pretrained` and `interesting_circuits`.
    """
    check_sizes(n=n)
    model = source if isinstance(source, HookedBilinearTransformer) else load_model(source)
    check_bilinear(model)  # no SAEs would help
    if layer is None:
        listed = saes is not None and not isinstance(saes, str | os.PathLike)
        layers = (layers_of(saes) if listed else []) or range(model.cfg.n_layers)  # type: ignore[arg-type]
        layer = layers[(len(layers) - 1) // 2]
    decomposer = Decomposer.from_pretrained(model, layer, saes=saes, expansion=expansion, k=k)
    say(f"model {model.cfg.model_name}, layer {decomposer.layer}")
    texts = example_texts(model) if examples is None and text is None else examples
    say("looking up what features fire on" if texts is None else f"running {len(texts)} example texts")
    labelled = label_layers([decomposer], texts)[decomposer.layer]
    say("looking for circuits" if features is None else f"features {list(features)}")
    circuits = interesting_circuits(labelled, text, features, n)
    subtitle = f"Layer {decomposer.layer} of {model.cfg.model_name}" + (f", on “{text}”" if text else "")
    how = "" if features is not None else HOW_RANKED if text is None else HOW_CHOSEN
    if how:
        say(how)
    return Report(circuits, "Circuits read from the weights", subtitle, how)


def demo(say: Callable[[str], None] = lambda line: None) -> Report:
    """The report on the bundled model: the features its authors picked, on the texts they picked."""
    model = load_model()
    picks = json.loads((PRETRAINED / DEFAULT_MODEL / DEMO_FILE).read_text())
    say(f"model {model.cfg.model_name}: {len(picks)} features")
    needed = sorted({pick["layer"] for pick in picks})
    layers = label_layers([Decomposer.from_pretrained(model, layer) for layer in needed])
    circuits = []
    for pick in picks:
        labelled = layers[pick["layer"]]
        say(f"layer {pick['layer']}, feature {pick['feature']}: {pick['note']}")
        circuits.append(explained(labelled, pick["text"], pick["feature"], note=pick["note"]))
    subtitle = (
        f"Three features of {model.cfg.model_name}, a 6.3 M parameter bilinear transformer trained on TinyStories"
    )
    return Report(circuits, "Circuits read from the weights", subtitle)


def trace(
    source: str | os.PathLike[str] | HookedBilinearTransformer | None = None,
    *,
    text: str,
    target: str | None = None,
    minus: str | None = None,
    feature: str | None = None,
    position: int = -1,
    max_nodes: int = 200,
    mlps: MLPs = "eigencircuits",
    saes: str | os.PathLike[str] | Sequence[SAE[Any] | str | os.PathLike[str]] | None = None,
    expansion: int | None = None,
    k: int | None = None,
    examples: Sequence[str] | None = None,
    check: bool = True,
    out: str | os.PathLike[str] = "bilens_trace.html",
    say: Callable[[str], None] = lambda line: None,
) -> Circuit:
    """Trace a logit or a feature back to the tokens and write the interactive graph: one self-contained HTML file.

    Args:
        source: a bilinear model, or the source of one for `load_model`.
        text: the text that the model reads.
        target: the token whose logit to explain; `None` takes the likeliest next one.
        minus: the token its logit is compared with.
        feature: explain a feature instead: `2-mlp-in/137`, or `2-mlp-in/137@11` with its position, as nodes are named.
        position: the target's position; a negative one counts from the end.
        max_nodes: the largest number of nodes in the graph.
        mlps: what features of MLPs' outputs are made of: `"eigencircuits"`, or `"pairs"` of features of their inputs.
        saes: the source of the SAEs for `load_sae`; `None` is the bundled model's, or `<source>-scope` for a hub id.
            Or a list of SAEs, or of folders of one SAE each.
        expansion, k: features per dimension and active features per token of the SAEs, if the source holds several.
        examples: texts to see what features fire on; `None` takes what is kept beside the SAEs (`bilens names`), or
            else runs the model's own (see `example_texts`).
        check: true checks the circuit by intervention, too.
        out: the HTML file, which is checked before anything is computed.
        say: a function that is told what is going on.

    Returns:
        The circuit on the page.

    Raises:
        ArgumentError: a feature that is not named so, a feature and a token at once, or `minus` without `target`.
        others: the same as for `freeze` and `read_targets`.
    """
    out = destination(out, PAGE)
    check_sizes(max_nodes=max_nodes)
    model = source if isinstance(source, HookedBilinearTransformer) else load_model(source)
    where = {"saes": saes, "expansion": expansion, "k": k}
    decomposers = [Decomposer.from_pretrained(model, layer, **where) for layer in range(model.cfg.n_layers)]  # type: ignore[arg-type]
    say(f"model {model.cfg.model_name}, {2 * len(decomposers)} SAEs")
    frozen = freeze(model, text, [sae for d in decomposers for sae in saes_of(d)])
    aim = _target(frozen, target, minus, feature, position)
    read_targets(frozen, aim)  # what cannot be explained is refused before the long work
    say("looking up what features fire on")
    layers = label_layers(decomposers, examples)
    features = {f"{layer}-mlp-in": found.inputs for layer, found in layers.items()}
    features |= {f"{layer}-mlp-out": found.outputs for layer, found in layers.items()}
    names = {name: found.labels() for name, found in features.items()}
    say("tracing")
    circuit = trace_circuit(frozen, aim, max_nodes=max_nodes, mlps=mlps, names=names)
    if check:
        say("checking by intervention")
    nodes = circuit.to_frame()
    top = nodes[(nodes.kind == "feature") & (nodes.point == "mlp-out")].drop_duplicates(["layer", "feature"])
    shown = [
        feature_circuit(
            layers[node.layer].decomposer,
            text,
            int(node.feature),
            int(node.position),
            inputs=layers[node.layer].inputs,
            outputs=layers[node.layer].outputs,
        )
        for node in top.head(N_EIGENCIRCUITS).itertuples()
    ]
    circuit.to_page(
        features=features,
        tokens=attribute_tokens(frozen, aim),
        faithfulness=check_circuit(frozen, circuit, aim) if check else None,
        edges=[check_edges(frozen, circuit, aim, attention=mode) for mode in MODES] if check else [],
        feature_circuits=shown,
        wordpiece=model.is_wordpiece,
    ).save(out)
    return circuit


def gallery(
    source: str | os.PathLike[str] | HookedBilinearTransformer | None = None,
    *,
    layers: Sequence[int] | None = None,
    n: int = 3,
    saes: str | os.PathLike[str] | Sequence[SAE[Any] | str | os.PathLike[str]] | None = None,
    expansion: int | None = None,
    k: int | None = None,
    examples: Sequence[str] | None = None,
    out: str | os.PathLike[str] = "bilens_gallery.html",
    say: Callable[[str], None] = lambda line: None,
) -> MotifGallery:
    """Write the gallery of a model's motifs (AND, XOR, AND NOT, inhibition): one self-contained HTML file.

    Args:
        source: a bilinear model, or the source of one for `load_model`.
        layers: `None` is all of them.
        n: the number of entries of each kind and layer.
        saes: the source of the SAEs for `load_sae`; `None` is the bundled model's, or `<source>-scope` for a hub id.
            Or a list of SAEs, or of folders of one SAE each.
        expansion, k: features per dimension and active features per token of the SAEs, if the source holds several.
        examples: texts to see what features fire on together; `None` takes the model's own (see `example_texts`).
        out: the HTML file, which is checked before anything is computed.
        say: a function that is told what is going on.

    Returns:
        What is on the page.
    """
    out = destination(out, PAGE)
    model = source if isinstance(source, HookedBilinearTransformer) else load_model(source)
    chosen = range(model.cfg.n_layers) if layers is None else layers
    decomposers = [Decomposer.from_pretrained(model, layer, saes=saes, expansion=expansion, k=k) for layer in chosen]
    texts = list(examples) if examples is not None else example_texts(model)
    numbers = ", ".join(str(d.layer) for d in decomposers)
    say(f"model {model.cfg.model_name}, layers {numbers}: running {len(texts)} texts")
    labelled = label_layers(decomposers, texts).values()
    found = motif_gallery(
        [one.decomposer for one in labelled],
        [one.activations()[0] for one in labelled],
        [one.activations()[1] for one in labelled],
        n,
    )
    subtitle = f"Pairs of features in {model.cfg.model_name} that do together what neither does alone"
    found.to_page(subtitle=subtitle).save(out)
    return found


def _target(frozen: FrozenPass, token: str | None, minus: str | None, feature: str | None, position: int) -> Target:
    if feature is not None:
        if token is not None or minus is not None:
            raise ArgumentError(f"the target is either a feature or a token's logit, not both {feature!r} and a token.")
        match = re.fullmatch(r"(.+)/(\d+)(?:@(-?\d+))?", feature)
        if match is None:
            raise ArgumentError(
                f"{feature!r} names no feature: expected its SAE, index and perhaps position, as in 2-mlp-in/137@11."
            )
        return Target.feature(match[1], int(match[2]), position if match[3] is None else int(match[3]))
    if token is None:
        if minus is not None:
            raise ArgumentError(f"minus is {minus!r} without a target: say which token's logit it is compared with.")
        position = check_index(
            position, frozen.n_positions, "position {} is outside the text's {} tokens", negative=True
        )
        return Target.logit(int(frozen.logits[position].argmax()), position)
    return Target.logit(token, position, minus=minus)


@dataclass(frozen=True)
class ModelCard:
    """What a model and its SAEs measure on texts they were not trained on."""

    model: str
    n_texts: int
    nats_per_token: float
    nats_per_character: float
    saes: SAEScores

    def save(self, path: Path) -> None:
        """Write the figures as JSON."""
        facts = {key: getattr(self, key) for key in ("model", "n_texts", "nats_per_token", "nats_per_character")}
        facts["saes"] = [asdict(score) for score in self.saes.scores]
        write_atomically(path, lambda beside: beside.write_text(json.dumps(facts, indent=1) + "\n"))

    def __str__(self) -> str:
        return (
            f"{self.model} on {self.n_texts} texts: {self.nats_per_token:.4f} nats/token, "
            f"{self.nats_per_character:.4f} nats/character\n{self.saes}"
        )


def evaluate(
    source: str | os.PathLike[str] | None,
    texts: list[str],
    saes: str | os.PathLike[str] | None = None,
    *,
    expansion: int | None = None,
    k: int | None = None,
) -> ModelCard:
    """Measure a model and its SAEs.

    Args:
        source: the model's source, for `load_model`.
        texts: texts that neither the model nor the SAEs were trained on.
        saes, expansion, k: the SAEs, as for `model_saes`.

    Raises:
        ArgumentError: there are no such SAEs.
    """
    model = load_model(source)
    found = model_saes(model, saes, expansion, k)
    loss = validate(model, TokenizedTexts.from_texts(texts, model.tokenizer, bool(model.n_bos)))
    scores = evaluate_saes(model, found, texts)
    return ModelCard(model.cfg.model_name, len(texts), loss.nats_per_token, loss.nats_per_character, scores)


def model_saes(
    model: HookedBilinearTransformer,
    saes: str | os.PathLike[str] | None = None,
    expansion: int | None = None,
    k: int | None = None,
) -> dict[str, SAE[Any]]:
    """All SAEs of a model, by the names of their folders, on the model's device.

    Args:
        model: the model.
        saes: the source of the SAEs for `list_saes`; `None` is the bundled model's, or `<source>-scope` for a hub id.
        expansion: only SAEs with this many features per dimension.
        k: only SAEs with this many active features per token.

    Raises:
        ArgumentError: there are no such SAEs.
    """
    place = saes if saes is not None else sae_source(model.cfg.model_name)
    entries = list_saes(place)
    if not entries:
        raise ArgumentError(f"{place} holds no SAEs: say where they are (saes=, --saes).")
    chosen = [one for one in entries if expansion in (None, one.expansion) and k in (None, one.k)]
    if not chosen:
        there = ", ".join(one.folder for one in entries)
        raise ArgumentError(
            f"{place} holds no SAE of expansion {expansion or 'any'} and k {k or 'any'}; it holds {there}."
        )
    cfg, device = model.cfg, model.W_E.device
    return {
        one.folder: load_sae(
            place,
            one.point,
            one.layer,
            one.expansion,
            one.k,
            one.tag or "",
            device=device,
            n_layers=cfg.n_layers,
            scale_attn=cfg.scale_attn,
        )
        for one in chosen
    }
