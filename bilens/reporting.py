"""From a model's name to a page: the main job, in one call.

1. a model, and the SAEs on the input and output of one of its MLPs
2. what every feature fires on, over example texts: names and examples
3. which output features: those asked for, or the most interesting ones
4. each one's circuit on a text, and the page of them
"""

import gzip
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE

from bilens.data import TokenizedTexts
from bilens.decompose import Decomposer
from bilens.decompose.circuit import FeatureCircuit, feature_circuit, rank_features
from bilens.errors import ModelNotFoundError, OutOfRangeError
from bilens.files import write_atomically
from bilens.generation import sample_texts
from bilens.loading import DEFAULT_MODEL, PRETRAINED, list_models, load_model
from bilens.model import HookedBilinearTransformer
from bilens.sae.evaluation import SAEScores, evaluate_saes
from bilens.sae.examples import FeatureActivations, feature_activations
from bilens.sae.loading import list_saes, load_sae
from bilens.training import validate
from bilens.viz.circuit_page import circuit_page

STORIES_FILE, DEMO_FILE = "stories.jsonl.gz", "demo.json"
N_SAMPLED = 192
CONTEXT_AFTER = 6  # tokens of a story kept after the one explained


@dataclass(frozen=True)
class LabelledLayer:
    """A decomposer whose features have names, and what they fire on."""

    decomposer: Decomposer
    inputs: FeatureActivations
    outputs: FeatureActivations


def label_layers(
    model: HookedBilinearTransformer, saes: dict[int, tuple[SAE[Any], SAE[Any]]], texts: Sequence[str]
) -> dict[int, LabelledLayer]:
    """Decomposers of several layers from one run over the texts.

    Args:
        model: the model.
        saes: input and output SAE by layer.
        texts: where to see what features fire on.
    """
    flat = [sae for pair in saes.values() for sae in pair]
    activations = feature_activations(model, flat, texts)
    layers = {}
    for place, (layer, (input_sae, output_sae)) in enumerate(saes.items()):
        inputs, outputs = activations[2 * place : 2 * place + 2]
        decomposer = Decomposer(
            model, layer, input_sae, output_sae, input_names=inputs.labels(), output_names=outputs.labels()
        )
        layers[layer] = LabelledLayer(decomposer, inputs, outputs)
    return layers


def example_texts(model: HookedBilinearTransformer) -> list[str]:
    """Texts to see features fire on: those that come with a bundled model, or else sampled from the model itself."""
    bundled = PRETRAINED / model.cfg.model_name / STORIES_FILE
    if model.cfg.model_name in list_models() and bundled.exists():
        with gzip.open(bundled, "rt", encoding="utf-8") as file:
            return [json.loads(line)["text"] for line in file]
    return [text for text in sample_texts(model, N_SAMPLED) if text.strip()]


def interesting_circuits(
    labelled: LabelledLayer, text: str | None = None, features: Sequence[int] | None = None, n: int = 3
) -> list[FeatureCircuit]:
    """Circuits of the features asked for, or of the `n` most interesting ones.

    Args:
        labelled: of the layer.
        text: `None` shows each feature on its strongest example.
        features: `None` takes the best of `rank_features` (among those that fire on the text, where there is one).
        n: how many, where they are not given.
    """
    decomposer, outputs = labelled.decomposer, labelled.outputs
    if features is None:
        among = None if text is None else active_features(decomposer, text)
        ranked = rank_features(decomposer, outputs, among=among).features.tolist()
        # Few features of a short text may be common enough to rank; the strongest of the others follow.
        features = list(dict.fromkeys([*ranked, *(among or [])]))[:n]
        if not features:
            raise OutOfRangeError(
                "no output feature fires often enough on these texts; give features or more examples."
            )
    circuits = []
    for feature in features:
        tokens, position = (text, None) if text is not None else strongest_example(labelled, feature)
        circuits.append(feature_circuit(decomposer, tokens, feature, position, inputs=labelled.inputs, outputs=outputs))
    return circuits


def layer_decomposers(
    model: HookedBilinearTransformer,
    layers: Sequence[int] | None = None,
    saes: str | os.PathLike[str] | None = None,
    expansion: int | None = None,
    k: int | None = None,
) -> list[Decomposer]:
    """A `Decomposer` of each layer with the SAEs on its MLP's input and output.

    Args:
        model: a bilinear model.
        layers: `None` is all of them.
        saes: where `load_sae` finds them; `None` is the bundled model's, or `<source>-scope` for a hub id.
        expansion, k: which SAEs, where there are several.
    """
    place = saes if saes is not None else sae_source(model.cfg.model_name)
    return [
        Decomposer(model, layer, *(load_sae(place, point, layer, expansion, k) for point in ("mlp-in", "mlp-out")))
        for layer in (range(model.cfg.n_layers) if layers is None else layers)
    ]


@torch.no_grad()
def active_features(decomposer: Decomposer, text: str) -> list[int]:
    """Output features that fire on a text (`[BOS]` left out), the strongest first."""
    tokens = decomposer.model.input_to_tokens(text)
    _, cache = decomposer.model.run_with_cache(
        tokens, names_filter=decomposer.out_hook, stop_at_layer=decomposer.layer + 1, return_cache_object=False
    )
    strongest = decomposer.output_view.activations(cache[decomposer.out_hook][0, 1:]).amax(0)
    order = strongest.argsort(descending=True)
    return order[: int((strongest > 0).sum())].tolist()


def strongest_example(labelled: LabelledLayer, feature: int) -> tuple[torch.Tensor, int]:
    """The tokens up to a little after where a feature fires most, and the position of that token.

    Raises:
        OutOfRangeError: the feature fires nowhere in the example texts.
    """
    outputs = labelled.outputs
    at = outputs.entries(feature)
    if at.start == at.stop:
        raise OutOfRangeError(f"output feature {feature} fires nowhere in the example texts; give a text.")
    entry = int(outputs.values[at].abs().argmax())
    row, position = int(outputs.rows[at][entry]), int(outputs.positions[at][entry])
    last = int(outputs.mask[row].nonzero().max())
    return outputs.tokens[row, : min(last, position + CONTEXT_AFTER) + 1], position


def report(
    source: str | os.PathLike[str] | HookedBilinearTransformer | None = None,
    *,
    layer: int | None = None,
    text: str | None = None,
    features: Sequence[int] | None = None,
    n: int = 3,
    saes: str | os.PathLike[str] | None = None,
    expansion: int | None = None,
    k: int | None = None,
    examples: Sequence[str] | None = None,
    out: str | os.PathLike[str] = "bilens_report.html",
    say: Callable[[str], None] = lambda line: None,
) -> list[FeatureCircuit]:
    """Write a report on a model's circuits: one self-contained HTML file.

    Args:
        source: a model, or what `load_model` takes.
        layer: which MLP; `None` takes the middle one.
        text: to explain; `None` shows each feature on its strongest example.
        features: output features; `None` takes the `n` most interesting ones.
        n: how many.
        saes: where `load_sae` finds them; `None` is the bundled model's, or `<source>-scope` for a hub id.
        expansion, k: which SAEs, where there are several.
        examples: texts to see what features fire on; `None` takes the model's own (see `example_texts`).
        out: the file.
        say: is told what is going on.

    Returns:
        The circuits on the page.
    """
    model = source if isinstance(source, HookedBilinearTransformer) else load_model(source)
    layer = (model.cfg.n_layers - 1) // 2 if layer is None else layer
    say(f"model {model.cfg.model_name}, layer {layer}")
    place = saes if saes is not None else sae_source(model.cfg.model_name)
    pair = (load_sae(place, "mlp-in", layer, expansion, k), load_sae(place, "mlp-out", layer, expansion, k))
    texts = list(examples) if examples is not None else example_texts(model)
    say(f"running {len(texts)} example texts")
    labelled = label_layers(model, {layer: pair}, texts)[layer]
    say("looking for circuits" if features is None else f"features {list(features)}")
    circuits = interesting_circuits(labelled, text, features, n)
    subtitle = f"Layer {layer} of {model.cfg.model_name}" + (f", on “{text}”" if text else "")
    circuit_page(circuits, "Circuits read from the weights", subtitle).save(out)
    return circuits


def demo(
    out: str | os.PathLike[str] = "bilens_demo.html", say: Callable[[str], None] = lambda line: None
) -> list[FeatureCircuit]:
    """The report on the bundled model: the features its authors picked, on the texts they picked."""
    model = load_model()
    picks = json.loads((PRETRAINED / DEFAULT_MODEL / DEMO_FILE).read_text())
    texts = example_texts(model)
    say(f"model {model.cfg.model_name}: {len(picks)} features; running {len(texts)} example stories")
    needed = sorted({pick["layer"] for pick in picks})
    pairs = {i: (load_sae(DEFAULT_MODEL, "mlp-in", i), load_sae(DEFAULT_MODEL, "mlp-out", i)) for i in needed}
    layers = label_layers(model, pairs, texts)
    circuits = []
    for pick in picks:
        labelled = layers[pick["layer"]]
        say(f"layer {pick['layer']}, feature {pick['feature']}: {pick['note']}")
        circuits.append(
            feature_circuit(
                labelled.decomposer,
                pick["text"],
                pick["feature"],
                inputs=labelled.inputs,
                outputs=labelled.outputs,
            )
        )
    subtitle = (
        f"Three features of {model.cfg.model_name}, a 6.3 M parameter bilinear transformer trained on TinyStories"
    )
    circuit_page(circuits, "Circuits read from the weights", subtitle).save(out)
    return circuits


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
    source: str | os.PathLike[str] | None, texts: list[str], saes: str | os.PathLike[str] | None = None
) -> ModelCard:
    """Measure a model and all of its SAEs.

    Args:
        source: what `load_model` takes.
        texts: not seen in training.
        saes: where `list_saes` finds them; `None` is as for `report`.
    """
    model = load_model(source)
    place = saes if saes is not None else sae_source(model.cfg.model_name)
    found = {e.folder: load_sae(place, e.point, e.layer, e.expansion, e.k, e.tag or "") for e in list_saes(place)}
    loss = validate(model, TokenizedTexts.from_texts(texts, model.tokenizer))
    scores = evaluate_saes(model, found, texts)
    return ModelCard(model.cfg.model_name, len(texts), loss.nats_per_token, loss.nats_per_character, scores)


def sae_source(model_name: str) -> str:
    """Where a model's SAEs are by convention: with a bundled model, or in `<model>-scope` on the hub or beside it.

    Raises:
        ModelNotFoundError: no such place.
    """
    if model_name in list_models():
        return model_name
    scope = f"{model_name}-scope"
    if Path(scope).is_dir() or "/" in model_name:
        return scope
    raise ModelNotFoundError(f"no SAEs are known for {model_name!r}: say where they are (saes=, --saes).")
