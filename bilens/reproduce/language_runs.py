"""What the language recipes share: the model's layers with their SAEs, the texts, and what was run, in words."""

from collections.abc import Sequence

from bilens._core.checks import check_index
from bilens.decompose import Decomposer
from bilens.model.loading import load_model
from bilens.model.transformer import HookedBilinearTransformer
from bilens.reproduce.reproduction import Settings
from bilens.sae import example_texts

PAPER_MODELS = "the paper: models of TinyStories with 33 M and of FineWeb with 162 M and 335 M parameters"
REDUCED_TEXTS = 24


def model_and_texts(settings: Settings) -> tuple[HookedBilinearTransformer, list[str]]:
    """The model, and the texts to measure on."""
    model = load_model(settings.model)
    texts = example_texts(model) if settings.texts is None else list(settings.texts)
    return model, texts[:REDUCED_TEXTS] if settings.reduced else texts


def decomposers(
    settings: Settings, model: HookedBilinearTransformer, layers: Sequence[int] | None = None
) -> list[Decomposer]:
    """The layer asked for, or else `layers` (`None` is all; only the first where `reduced`), with their SAEs."""
    if settings.layer is not None:
        layers = [one_layer(settings, model)]
    elif layers is None and settings.reduced:
        layers = [0]
    where = {"saes": settings.saes, "expansion": settings.expansion, "k": settings.k}
    chosen = range(model.cfg.n_layers) if layers is None else layers
    return [Decomposer.from_pretrained(model, layer, **where) for layer in chosen]  # type: ignore[arg-type]


def one_layer(settings: Settings, model: HookedBilinearTransformer) -> int:
    """The layer asked for, or that at two thirds of the depth, where the paper measures.

    Raises:
        OutOfRangeError: No such layer.
    """
    n = model.cfg.n_layers
    if settings.layer is None:
        return 2 * n // 3
    return check_index(settings.layer, n, "layer {} is outside the model's {} layers", negative=True)


def one_decomposer(settings: Settings, model: HookedBilinearTransformer) -> Decomposer:
    """`one_layer` with its SAEs."""
    return decomposers(settings, model, [one_layer(settings, model)])[0]


def ran_on(model: HookedBilinearTransformer, texts: Sequence[str], *layers: Decomposer) -> str:
    """The model, its SAEs and the texts, beside the paper's models."""
    millions = sum(weight.numel() for weight in model.parameters()) / 1e6
    said = f"{model.cfg.model_name}, {millions:.1f} M parameters in {model.cfg.n_layers} layers ({PAPER_MODELS})"
    sizes = sorted({f"{layer.output_view.d_sae:,}" for layer in layers if layer.output_sae is not None})
    if sizes:
        numbers = ", ".join(str(layer.layer) for layer in layers)
        said += f"; layer{'s' if len(layers) > 1 else ''} {numbers}, SAEs of {' and '.join(sizes)} features"
    return f"{said}; {len(texts)} texts"
