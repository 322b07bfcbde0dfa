"""The top N of whole layers is that of looking at every triple in float64, whatever the shape, memory and screening."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from bilens.decompose import Decomposer, strongest_interactions, topn
from bilens.decompose.topn import cofiring, top_triples
from bilens.errors import ArgumentError, MissingSAEError, OutOfRangeError, SAEMismatchError
from bilens.layer.bilinear import BilinearLayer, interaction_matrix
from bilens.sae.features.examples import FeatureActivations
from tests.random_saes import D_SAE, make_sae


def make_layer(d, m, seed=0, whole=False):
    """A random layer; `whole` gives small integers, on which float32 is exact and ties are real."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return (
            torch.randint(-1, 2, shape, generator=generator).float()
            if whole
            else torch.randn(*shape, generator=generator)
        )

    none = torch.zeros(m)
    layer = BilinearLayer(draw(d, m), draw(d, m), draw(m, d), none, none, torch.zeros(d))
    return layer, draw


def every_triple(layer, outputs, inputs, weights=None):
    """Of every triple (score, coefficient, output, i, j), best first, in float64; equal ones by their indices."""
    inputs = inputs.double()
    matrices = interaction_matrix(layer.to(torch.float64), outputs.double())
    i, j = torch.triu_indices(len(inputs), len(inputs))
    coefficients = (inputs @ matrices @ inputs.T)[:, i, j] * torch.where(i == j, 1.0, 2.0)
    scores = coefficients if weights is None else coefficients * weights.double()[i, j]
    output = torch.arange(len(outputs))[:, None].expand_as(coefficients)
    parts = [scores, coefficients, output, i.expand_as(scores), j.expand_as(scores)]
    parts = [part.flatten() for part in parts]
    order = parts[0].abs().argsort(descending=True, stable=True)  # the triples stand in the order of their indices
    return [part[order] for part in parts]


def check(found, layer, outputs, inputs, n, weights=None):
    scores, coefficients, *triples = (part[:n] for part in every_triple(layer, outputs, inputs, weights))
    some = scores != 0
    for mine, theirs in zip((found.outputs, found.i, found.j), triples, strict=True):
        assert mine.tolist() == theirs[some].tolist()
    # float64 sums in another order
    assert_close(found.coefficients, coefficients[some], atol=1e-10, rtol=1e-10)
    assert_close(found.scores, scores[some], atol=1e-10, rtol=1e-10)


shapes = st.fixed_dictionaries(
    {
        "d": st.integers(1, 12),
        "m": st.integers(1, 20),
        "n_out": st.integers(1, 40),
        "n_in": st.integers(1, 24),
        "n": st.integers(1, 300),
        "weighted": st.booleans(),
        "seed": st.integers(0, 100),
    }
)


@given(shapes)
@settings(max_examples=40)
def test_any_layer(shape):
    layer, draw = make_layer(shape["d"], shape["m"], shape["seed"])
    outputs, inputs = draw(shape["n_out"], shape["d"]), draw(shape["n_in"], shape["d"])
    weights = None
    if shape["weighted"]:
        weights = draw(shape["n_in"], shape["n_in"])
        weights = torch.where(weights > 0, weights, 0.0)
        weights = weights + weights.T
    n = min(shape["n"], shape["n_out"] * shape["n_in"] * (shape["n_in"] + 1) // 2)
    found = top_triples(layer, outputs, inputs, n, weights=weights, progress=False)
    check(found, layer, outputs, inputs, n, weights)


@given(shapes)
@settings(max_examples=30)
def test_ties_go_by_output_i_j(shape):
    """Entries of -1, 0, 1 give few different coefficients; which of the equal ones are in is decided by the indices."""
    layer, draw = make_layer(min(shape["d"], 4), min(shape["m"], 6), shape["seed"], whole=True)
    outputs, inputs = draw(shape["n_out"], min(shape["d"], 4)), draw(shape["n_in"], min(shape["d"], 4))
    n = min(shape["n"], shape["n_out"] * shape["n_in"] * (shape["n_in"] + 1) // 2)
    found = top_triples(layer, outputs, inputs, n, progress=False)
    _, _, *triples = every_triple(layer, outputs, inputs)
    scores = every_triple(layer, outputs, inputs)[0]
    n = min(n, int((scores != 0).sum()))
    for mine, theirs in zip((found.outputs, found.i, found.j), triples, strict=True):
        assert mine.tolist() == theirs[:n].tolist()


@pytest.mark.parametrize("screen", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("n_out", [10, 550])
@pytest.mark.parametrize("memory", [2**30, 300_000])
def test_neither_memory_nor_screening_changes_anything(monkeypatch, screen, n_out, memory):
    """Several blocks of outputs and many tiles; with little memory rows of pairs are cut, without a core tensor."""
    monkeypatch.setattr(topn, "search_dtype", lambda dtype, device: screen)
    monkeypatch.setattr(topn, "ROWS", 50)
    monkeypatch.setattr(topn, "FEATURES", 7)
    monkeypatch.setattr(topn, "SETTLE", 16)
    layer, draw = make_layer(24, 40)
    outputs, inputs = draw(n_out, 24) * torch.linspace(0, 1, n_out)[:, None] ** 3, draw(60, 24)
    memory = memory if n_out == 10 else memory * 4
    check(top_triples(layer, outputs, inputs, 50, memory=memory, progress=False), layer, outputs, inputs, 50)


def test_with_the_core_tensor_and_without(monkeypatch):
    layer, draw = make_layer(16, 60)
    outputs, inputs = draw(50, 16), draw(80, 16)
    with_core = top_triples(layer, outputs, inputs, 100, progress=False)
    monkeypatch.setattr(topn._Search, "_plan", lambda self, *_: (64, 8, False))
    without = top_triples(layer, outputs, inputs, 100, progress=False)
    assert "core tensor" in with_core.method
    assert "hidden units" in without.method
    for name in ("outputs", "i", "j", "coefficients"):
        assert torch.equal(getattr(with_core, name), getattr(without, name))


def test_a_layer_that_float32_gets_wrong_is_searched_in_float64():
    """Hidden units in pairs that cancel to a millionth: in float32 the coefficients have a digit or two."""
    layer, draw = make_layer(12, 20)
    small = draw(20, 12) * 1e-6
    layer = BilinearLayer(
        layer.W_gate.repeat(1, 2),
        layer.W_in.repeat(1, 2),
        torch.cat([layer.W_out, small - layer.W_out]),
        *(torch.zeros(40),) * 2,
        torch.zeros(12),
    )
    outputs, inputs = draw(30, 12), draw(40, 12)
    dtypes = []
    original = topn._Search.__init__

    def spy(self, *args):
        dtypes.append(args[-1])
        original(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(topn._Search, "__init__", spy)
        found = top_triples(layer, outputs, inputs, 100, progress=False)
    assert dtypes == [torch.float32, torch.float64]
    check(found, layer, outputs, inputs, 100)


def test_outputs_and_weights_of_zero_have_no_interactions():
    layer, draw = make_layer(8, 10)
    inputs = draw(6, 8)
    assert len(top_triples(layer, torch.zeros(20, 8), inputs, 5, progress=False).i) == 0
    weights = torch.zeros(6, 6)
    weights[1, 4] = weights[4, 1] = -0.5
    found = top_triples(layer, draw(3, 8), inputs, 10, weights=weights, progress=False)
    assert (found.i.tolist(), found.j.tolist()) == ([1] * 3, [4] * 3)
    assert_close(found.scores, -0.5 * found.coefficients)


def test_a_floor_leaves_out_what_is_below():
    layer, draw = make_layer(8, 10)
    outputs, inputs = draw(20, 8), draw(15, 8)
    everything = top_triples(layer, outputs, inputs, 200, progress=False)
    floor = everything.scores[50].abs().item()
    some = top_triples(layer, outputs, inputs, 200, floor=floor, progress=False)
    assert torch.equal(some.scores, everything.scores[:51])


# --- layers and models ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def decomposers(models):
    """Both layers of a random model."""
    hooks = ("blocks.{}.ln2.hook_normalized", "blocks.{}.hook_mlp_out")
    made = []
    for layer in range(2):
        saes = [make_sae("topk", hook.format(layer), seed=5 * layer + s) for s, hook in enumerate(hooks)]
        names = [f"in {i}" for i in range(D_SAE)]
        made.append(Decomposer(models(True, True), layer, *saes, input_names=names))
    return made


def test_of_a_layer_as_of_each_output(decomposers):
    decomposer = decomposers[0]
    found = decomposer.strongest_interactions(n=40, progress=False)
    each = decomposer.top_interactions(list(range(D_SAE)), k=40).to_frame()
    best = each.sort_values("coefficient", key=abs, ascending=False).head(40)
    assert set(zip(found.outputs.tolist(), found.i.tolist(), found.j.tolist(), strict=True)) == set(
        zip(best.output, best.i, best.j, strict=True)
    )
    frame = found.to_frame()
    assert list(frame) == ["layer", "output", "i", "j", "kind", "coefficient", "output_name", "i_name", "j_name"]
    assert frame.i_name[0] == f"in {frame.i[0]}"
    assert "StrongestInteractions(40 of layers 0" in repr(found)
    assert len(found.plot(top=5).data[0].x) == 5


def test_some_outputs_and_inputs(decomposers):
    decomposer = decomposers[0]
    found = decomposer.strongest_interactions(20, [7, 3], "decoder", inputs=[5, 1, 9, 22], progress=False).to_frame()
    assert len(found) == 20 == 2 * (4 * 5 // 2)
    matrix = decomposer.interaction([7, 3], basis="features", side="decoder")
    for row in found.itertuples():
        expected = matrix[[7, 3].index(row.output), row.i, row.j] * (1 if row.i == row.j else 2)
        # float32 sums of a few hundred terms
        assert row.coefficient == pytest.approx(expected.item(), rel=1e-3, abs=1e-5)
        assert {row.i, row.j} <= {1, 5, 9, 22}
    directions = decomposer.strongest_interactions(5, decomposer.directions([7, 3], "decoder"), progress=False)
    assert set(directions.outputs.tolist()) <= {0, 1}
    assert directions.to_frame().output_name[0] == str(directions.outputs[0].item())


def test_of_a_model_as_of_its_layers(decomposers):
    found = strongest_interactions(decomposers, 60, progress=False).to_frame()
    parts = [d.strongest_interactions(60, progress=False).to_frame() for d in decomposers]
    best = sorted(
        (abs(row.coefficient), row.layer, row.output, row.i, row.j) for part in parts for row in part.itertuples()
    )[-60:]
    assert set(zip(found.layer, found.output, found.i, found.j, strict=True)) == {row[1:] for row in best}
    assert set(found.layer) == {0, 1}


def test_weighted_by_what_fires_together(decomposers):
    generator = torch.Generator().manual_seed(0)
    dense = torch.rand(4, 9, D_SAE, generator=generator) * (torch.rand(4, 9, D_SAE, generator=generator) < 0.1)
    mask = torch.ones(4, 9, dtype=torch.long)
    mask[:, 0] = 0
    dense[:, 0] = 0
    feature, row, position = dense.permute(2, 0, 1).nonzero(as_tuple=True)
    offsets = torch.cat([torch.zeros(1, dtype=torch.long), torch.bincount(feature, minlength=D_SAE).cumsum(0)])
    activations = FeatureActivations(mask, mask, [], row, position, dense[row, position, feature], offsets)
    weights = cofiring(activations)
    f = dense.flatten(0, 1)
    assert_close(weights, f.T @ f / 32)
    found = decomposers[0].strongest_interactions(25, weights=weights, progress=False)
    layer = decomposers[0].weights
    everything = every_triple(layer, decomposers[0].output_view.encoder, decomposers[0].input_directions(), weights)
    assert found.i.tolist() == everything[3][:25].tolist()
    assert_close(found.scores, everything[0][:25], atol=1e-6, rtol=1e-6)
    assert {"weight", "score"} <= set(found.to_frame())
    found.plot()


# --- refused ----------------------------------------------------------------------------------------------------------


def test_bad_arguments(decomposers, models):
    decomposer = decomposers[0]
    with pytest.raises(OutOfRangeError, match="n is 0, expected 1 to"):
        decomposer.strongest_interactions(0)
    with pytest.raises(OutOfRangeError, match="the number of triples of 1 outputs and 1 inputs"):
        decomposer.strongest_interactions(2, 3, inputs=[4])
    with pytest.raises(OutOfRangeError, match="feature 40 is outside the input SAE's 40"):
        decomposer.strongest_interactions(1, inputs=[40])
    with pytest.raises(ArgumentError, match="input features, as integers"):
        decomposer.strongest_interactions(1, inputs=torch.randn(16))
    with pytest.raises(ArgumentError, match="memory 1000 bytes is too little: this layer's search takes"):
        decomposer.strongest_interactions(1, memory=1000)
    with pytest.raises(ArgumentError, match="not symmetric"):
        decomposer.strongest_interactions(1, weights=torch.rand(D_SAE, D_SAE))
    with pytest.raises(SAEMismatchError, match="weights of shape"):
        decomposer.strongest_interactions(1, weights=torch.ones(3, 3))
    with pytest.raises(ArgumentError, match="weights hold NaN"):
        decomposer.strongest_interactions(1, weights=torch.full((D_SAE, D_SAE), torch.nan))
    with pytest.raises(ArgumentError, match="each of another layer"):
        strongest_interactions([decomposer, decomposer])
    with pytest.raises(ArgumentError, match="each of another layer"):
        strongest_interactions([])
    with pytest.raises(ArgumentError, match="1 weight matrices for 2 layers"):
        strongest_interactions(decomposers, weights=torch.ones(D_SAE, D_SAE))
    with pytest.raises(MissingSAEError, match="input_sae"):
        Decomposer(models(True, True), 0).strongest_interactions(1, torch.randn(16))
    layer, draw = make_layer(8, 10)
    with pytest.raises(SAEMismatchError, match="outputs of shape"):
        top_triples(layer, draw(3, 7), draw(3, 8), 1)
    with pytest.raises(ArgumentError, match="the inputs hold NaN"):
        top_triples(layer, draw(3, 8), torch.full((3, 8), torch.inf), 1)


def test_decoder_rows_of_unequal_length_are_said_or_ranked_away(models):
    """A row ten times as long with activations a tenth as large is the same SAE; by the coefficient alone it leads."""
    model, sae = models(False, True), make_sae("topk", "blocks.1.ln2.hook_normalized", seed=1)
    with torch.no_grad():
        sae.W_dec.div_(sae.W_dec.norm(dim=-1, keepdim=True))
    out, fires = make_sae("topk", "blocks.1.hook_mlp_out", seed=2), torch.rand(D_SAE) + 0.5
    d = Decomposer(model, 1, sae, out)
    plain, ranked = d.top_interactions(3, k=20), d.top_interactions(3, k=20, activations=fires)
    assert plain.note == d.strongest_interactions(20, progress=False).note == ""
    stretch = torch.rand(D_SAE) * 10 + 1
    with torch.no_grad():
        sae.W_dec.mul_(stretch[:, None])
    for found in (d.top_interactions(3, k=20), d.strongest_interactions(20, progress=False)):
        assert "per unit of activation" in found.note
        assert found.note in str(found)
        assert found.note in found._repr_html_()
    again = d.top_interactions(3, k=20, activations=fires / stretch)
    assert again.i.tolist() == ranked.i.tolist()
    assert again.j.tolist() == ranked.j.tolist()
    assert_close(again.typical, ranked.typical)
    assert again.to_frame()["typical"].tolist() == again.typical.flatten().tolist()
