"""The bundled model and SAEs are what the README says, measured on the files as shipped."""

import json
import random
import re

import pytest
import torch

import bilens
from bilens.attribute import Target, freeze, split
from bilens.model.files import DEFAULT_MODEL, PRETRAINED
from bilens.pages.report import DEMO_FILE, demo
from bilens.sae import evaluate_saes, example_texts
from bilens.train.data import TokenizedTexts, load_texts
from bilens.train.language_model import validate

N_LAYERS = 4


@pytest.fixture(scope="module")
def model():
    return bilens.load_model()


@pytest.fixture(scope="module")
def stories(shared):
    return load_texts(shared / "tinystories" / "valid.jsonl.gz")


def saes_of(layer):
    return bilens.load_sae(DEFAULT_MODEL, "mlp-in", layer), bilens.load_sae(DEFAULT_MODEL, "mlp-out", layer)


def test_it_is_listed_and_small_enough():
    assert bilens.list_models()[0] == DEFAULT_MODEL
    files = [path for path in (PRETRAINED / DEFAULT_MODEL).rglob("*") if path.is_file()]
    seen = [path for path in files if path.name in ("names.json", "examples.safetensors.gz")]
    assert len(seen) == 2 * 2 * N_LAYERS
    assert sum(path.stat().st_size for path in seen) < 2e6
    assert sum(path.stat().st_size for path in files if path not in seen) < 30e6


def test_every_mlp_has_an_input_and_an_output_sae(model):
    entries = bilens.list_saes(DEFAULT_MODEL)
    assert {(e.layer, e.point) for e in entries} == {(i, p) for i in range(N_LAYERS) for p in ("mlp-in", "mlp-out")}
    assert model.cfg.n_layers == N_LAYERS
    for layer in range(N_LAYERS):
        for sae in saes_of(layer):
            assert sae.W_dec.dtype == torch.float32
            assert sae.cfg.architecture() == "topk"
            assert sae.cfg.k <= 32


def test_validation_loss_is_the_reported_one(model, stories):
    """To four digits of what `card.json` reports: same files, same texts, float32 rounding only."""
    card = json.loads((PRETRAINED / DEFAULT_MODEL / "card.json").read_text())
    found = validate(model, TokenizedTexts.from_texts(stories, model.tokenizer))
    assert found.nats_per_character == pytest.approx(card["nats_per_character"], abs=2e-4)
    assert found.nats_per_token == pytest.approx(card["nats_per_token"], abs=1e-3)
    assert found.nats_per_character < 0.597  # the run to beat


def test_sae_scores_are_the_reported_ones(model, stories):
    """One layer on a third of the stories: the reported score, up to the sampling of the texts."""
    card = {row["name"]: row for row in json.loads((PRETRAINED / DEFAULT_MODEL / "card.json").read_text())["saes"]}
    entries = [e for e in bilens.list_saes(DEFAULT_MODEL) if e.layer == 1]
    saes = {e.folder: bilens.load_sae(DEFAULT_MODEL, e.point, e.layer) for e in entries}
    for score in evaluate_saes(model, saes, stories[:100]).scores:
        assert score.explained_variance == pytest.approx(card[score.name]["explained_variance"], abs=0.02)
        assert score.loss_recovered == pytest.approx(card[score.name]["loss_recovered"], abs=0.02)
        assert score.l0 <= 32


@pytest.mark.parametrize("layer", range(N_LAYERS))
def test_attributions_are_complete(model, layer):
    """At most 1e-5 of the absolute parts, on random (feature, position) pairs, active or not."""
    decomposer = bilens.Decomposer(model, layer, *saes_of(layer))
    choose = random.Random(layer)
    texts = example_texts(model)
    for _ in range(25):
        tokens = model.to_tokens(choose.choice(texts))
        feature = choose.randrange(decomposer.output_view.d_sae)
        result = decomposer.attribute(tokens, feature, choose.randrange(tokens.shape[1]))
        assert result.relative_error <= 1e-5


def test_the_trace_of_the_readme_has_its_parts(model):
    """What leads to *what* over *how*, and that feature 101 speaks against it; the README rounds to two digits."""
    text = "Lily looked everywhere for her red ball. She was sad and did not know"
    frozen = freeze(model, text, [sae for layer in range(N_LAYERS) for sae in saes_of(layer)])
    parts = split(frozen, Target.logit("what", minus="how")).to_frame()
    values = parts.set_index("label").value
    assert values.sum() == pytest.approx(2.58, abs=0.01)
    assert values.abs().idxmax() == "3-mlp-out/101 @15 'know'"
    first = values[values.index.str.contains("mlp-out/|H")].drop(values.abs().idxmax()).nlargest(3)
    assert first.index.tolist() == ["L3H3 from @14 'not'", "L3H0 from @12 'and'", "3-mlp-out/1858 @15 'know'"]
    assert values[values.abs().idxmax()] == pytest.approx(-0.98, abs=0.005)
    assert first.tolist() == pytest.approx([0.73, 0.50, 0.34], abs=0.005)
    W_dec = saes_of(3)[1].W_dec[101].detach().to(model.W_U)
    promoted = (W_dec @ model.W_U).topk(3).indices
    assert [model.to_string(token) for token in promoted] == ["how", "why", "where"]


def test_demo_writes_one_offline_page(tmp_path):
    """Every pick fires where it is shown, and the page fetches nothing."""
    report, out = demo(), tmp_path / "demo.html"
    report.save(out)
    circuits = report.circuits
    picks = json.loads((PRETRAINED / DEFAULT_MODEL / DEMO_FILE).read_text())
    assert [c.attribution.feature for c in circuits] == [p["feature"] for p in picks]
    for circuit in circuits:
        assert circuit.attribution.active
        assert circuit.attribution.relative_error <= 1e-5
    page = out.read_text()
    assert not re.search(r"""<(?:script|link|img|iframe)[^>]+(?:src|href)=["']https?:""", page)
    assert out.stat().st_size < 10e6
