"""No page is wider than a narrow window: what is too wide is scrolled in a box of its own."""

import json
import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
import torch
from sae_lens import SAE

from bilens.attribute import Target, freeze, trace_circuit
from bilens.decompose import Decomposer
from bilens.decompose.feature import feature_circuit
from bilens.draw import images, plots, toys
from bilens.draw.page import Page, columns, details
from bilens.model.transformer import HookedBilinearTransformer
from bilens.pages.circuit import circuit_page
from bilens.pages.dashboard import FeatureDashboard
from bilens.pages.graph import graph_page
from bilens.reproduce.reproduction import Reproduction
from tests.conftest import make_model
from tests.pages.test_dashboard import record
from tests.random_saes import make_sae

NARROW = 700
TOKENS = torch.tensor([1, 17, 42, 8, 42, 3])
LONG = [f"{n} " + "/".join(["considerable"] * 4) for n in range(12)]
MEASURE = """<script>
const wait = () => {
  const views = [...document.querySelectorAll(".bilens-view")];
  if (!views.every((view) => view.drawn)) return setTimeout(wait, 50);
  const measured = {
    page: document.documentElement.scrollWidth,
    boxes: views.map((view) => view.clientWidth),
    insides: views.map((view) => view.scrollWidth),
  };
  dispatchEvent(new Event("beforeprint"));
  measured.printed = [...document.querySelectorAll(".js-plotly-plot")].map((plot) => plot._fullLayout.width);
  const seen = document.body.appendChild(document.createElement("pre"));
  seen.id = "measured";
  seen.textContent = JSON.stringify(measured);
};
document.querySelectorAll("details").forEach((details) => (details.open = true));
addEventListener("load", () => setTimeout(wait, 50));
</script></body>"""


class Widths(NamedTuple):
    """What was measured, all folds open."""

    page: int
    boxes: list[int]  # of every view
    insides: list[int]  # of what is in them
    printed: list[int]  # of every plot


@pytest.fixture
def widths(tmp_path, dump) -> Callable[[Page], Widths]:
    def measure(page: Page) -> Widths:
        path = page.save(tmp_path / "page.html")
        text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", path.read_text(encoding="utf-8"))
        path.write_text(text.replace("</body>", MEASURE), encoding="utf-8")
        after = dump(path, 'id="measured"', f"{NARROW},900")
        return Widths(**json.loads(re.search(r'id="measured">(.*?)<', after)[1]))

    return measure


def modelled() -> tuple[HookedBilinearTransformer, list[SAE]]:
    """A model of one layer, and SAEs on the input and output of its MLP."""
    points = ("ln2.hook_normalized", "hook_mlp_out")
    return make_model(seed=3), [make_sae(hook=f"blocks.0.{point}") for point in points]


def grids() -> Reproduction:
    """A reproduction with figures of every kind, of long labels and many columns."""
    rng = np.random.default_rng(0)
    picture = rng.normal(size=(6, 6))
    values = rng.normal(size=12)
    square = rng.normal(size=(12, 12))
    figures = {
        "images": images.image_grid([[picture] * 8], [LONG[:8]], row_labels=LONG[:1]),
        "spectrum": images.spectrum_with_images(values, [[picture] * 3], [["title"] * 3]),
        "explanation": images.explanation_figure(picture, LONG, values, LONG[:1], [[("feature 1", 1.0)]], [[picture]]),
        "matrices": toys.matrix_grid([[square] * 3], ["row"], LONG[:3], LONG),
        "curves": toys.curve_grid([{"a": values}], ["curve"]),
        "heatmap": plots.heatmap(square, LONG, LONG, row_title="row", col_title="column"),
        "bars": plots.bars(LONG, values),
        "lines": plots.line(values, dict.fromkeys(LONG, values)),
        "scatter": plots.scatter(values, values, LONG, diagonal=True),
        "panels": plots.scatter_grid(dict.fromkeys(LONG[:4], (values, values)), columns=4),
    }
    return Reproduction("name", "source", "x" * 300, [("y" * 90, "z" * 90, "w" * 90)], figures)


def test_a_reproduction_scrolls_its_wide_figures_in_their_boxes(widths):
    reproduction = grids()
    seen = widths(reproduction.to_page())
    assert seen.page <= NARROW
    fixed = [figure.layout.width for figure in reproduction.figures.values()]
    wider = [inside if inside > box else None for box, inside in zip(seen.boxes, seen.insides, strict=True)]
    assert wider == fixed
    # On paper those are made smaller as a whole, the others drawn again.
    assert seen.printed == [width or 680 for width in fixed]


def test_a_page_of_features_fits(widths):
    features = [record(LONG), record(["w" * 300] * 3)]
    assert widths(FeatureDashboard(features).to_page()).page <= NARROW


def test_a_gallery_fits(widths, gallery):
    assert widths(gallery.to_page()).page <= NARROW


def test_circuits_fit(widths):
    model, saes = modelled()
    names = [f"{n} considerable/considerable/considerable" for n in range(saes[0].cfg.d_sae)]
    decomposer = Decomposer(model, 0, *saes, input_names=names, output_names=names)
    page = circuit_page([feature_circuit(decomposer, TOKENS.repeat(4), 0)])
    page.add(columns(details("folded", "w" * 200), plots.histogram(np.arange(5.0))))
    assert widths(page).page <= NARROW


def test_graphs_fit(widths):
    model, saes = modelled()
    circuit = trace_circuit(freeze(model, TOKENS, saes), Target.logit(7), max_nodes=40)
    assert widths(graph_page(circuit, title="w" * 200)).page <= NARROW
