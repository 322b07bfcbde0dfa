"""The language figures, on the bundled model."""

from typing import TYPE_CHECKING

from bilens.decompose import Decomposer
from bilens.decompose.fidelity import fidelity
from bilens.model.loading import load_model
from bilens.pages.report import example_texts, layer_decomposers
from bilens.reproduce.reproduction import PEARCE_2025, Made, Recipe, Settings

if TYPE_CHECKING:
    import pandas as pd

THRESHOLD = 0.75
MIN_ACTIVE = 20


def _layers_and_texts(settings: Settings) -> tuple[list[Decomposer], list[str]]:
    """The decomposers of all layers, and the texts to measure on."""
    model = load_model(settings.model)
    texts = example_texts(model) if settings.texts is None else list(settings.texts)
    decomposers = layer_decomposers(model, [0] if settings.reduced else None)
    return decomposers, texts[:24] if settings.reduced else texts


def _low_rank(settings: Settings) -> Made:
    from bilens.draw.plots import line

    decomposers, texts = _layers_and_texts(settings)
    found = {f"layer {d.layer}": fidelity(d, texts, k=4 if settings.reduced else 16) for d in decomposers}
    rows = []
    for name, measured in found.items():
        share = measured.shares([THRESHOLD], min_active=MIN_ACTIVE).set_index("k")
        rows += [
            (
                f"features with correlation > {THRESHOLD} by two eigenvectors, {name}",
                "most (32 to 65 % in the reproduction by openreview 6k7qRdz7rD)",
                f"{share.loc[2, f'> {THRESHOLD:g}']:.0%} of {int(measured.eligible(MIN_ACTIVE).sum())}",
            ),
            (f"median correlation with 1, 2, 4 eigenvectors, {name}", "", _medians(share["median"])),
        ]
    ks = list(range(1, next(iter(found.values())).k + 1))
    curves = {name: measured.shares([THRESHOLD])["median"].tolist() for name, measured in found.items()}
    against = line(ks, curves, x_title="eigenvectors", y_title="median correlation, active tokens", log_x=True)
    figures = {"9A: correlation against eigenvectors": against}
    last = found[f"layer {decomposers[-1].layer}"]
    figures[f"9B: features by correlation, two eigenvectors, layer {decomposers[-1].layer}"] = last.histogram(2)
    figures[f"9C: correlation against how often a feature fires, layer {decomposers[-1].layer}"] = last.scatter(2)
    return Made(rows, figures)


def _medians(medians: "pd.Series[float]") -> str:
    return ", ".join(f"{medians.loc[k]:.2f}" for k in (1, 2, 4))


LOW_RANK = Recipe(
    name="low-rank",
    source=f"{PEARCE_2025}, figure 9",
    about="how well the leading eigenvectors of an output feature reproduce its activation on text",
    scaled_down="a 6.3 M parameter model of TinyStories and its SAEs, in place of models of FineWeb and TinyStories "
    "up to some hundred million parameters",
    make=_low_rank,
)

LANGUAGE = [LOW_RANK]
