"""Interactions as a result: of a layer as of each output, of several layers as of each, ranked and noted."""

import pytest
import torch
from torch.testing import assert_close

from bilens.decompose import Decomposer, strongest_interactions
from bilens.errors import ArgumentError, MissingSAEError, OutOfRangeError, SAEMismatchError
from bilens.sae.features.examples import FeatureActivations
from tests.layer.test_triples import every_triple
from tests.random_saes import D_SAE, make_sae


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
    each = decomposer.top_interactions(list(range(D_SAE)), n=40).to_frame()
    best = each.sort_values("coefficient", key=abs, ascending=False).head(40)
    assert set(zip(found.output.tolist(), found.i.tolist(), found.j.tolist(), strict=True)) == set(
        zip(best.output, best.i, best.j, strict=True)
    )
    frame = found.to_frame()
    assert list(frame) == ["layer", "output", "i", "j", "kind", "coefficient", "output_name", "i_name", "j_name"]
    assert frame.i_name[0] == f"in {frame.i[0]}"
    assert "Interactions(40 of layers 0" in repr(found)
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
    assert set(directions.output.tolist()) <= {0, 1}
    assert directions.to_frame().output_name[0] == str(directions.output[0].item())


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
    weights = activations.cofiring()
    f = dense.flatten(0, 1)
    assert_close(weights, f.T @ f / 32)
    assert torch.equal(activations.cofiring_counts(), (f != 0).float().T @ (f != 0).float())
    found = decomposers[0].strongest_interactions(25, weights=weights, progress=False)
    layer = decomposers[0].weights
    everything = every_triple(layer, decomposers[0].output_view.encoder, decomposers[0].input_directions(), weights)
    assert found.i.tolist() == everything[3][:25].tolist()
    assert_close(found.score, everything[0][:25], atol=1e-6, rtol=1e-6)
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


def test_decoder_rows_of_unequal_length_are_said_or_ranked_away(models):
    """A row ten times as long with activations a tenth as large is the same SAE; by the coefficient alone it leads."""
    model, sae = models(False, True), make_sae("topk", "blocks.1.ln2.hook_normalized", seed=1)
    with torch.no_grad():
        sae.W_dec.div_(sae.W_dec.norm(dim=-1, keepdim=True))
    out, fires = make_sae("topk", "blocks.1.hook_mlp_out", seed=2), torch.rand(D_SAE) + 0.5
    d = Decomposer(model, 1, sae, out)
    plain, ranked = d.top_interactions(3, n=20), d.top_interactions(3, n=20, activations=fires)
    assert plain.note == d.strongest_interactions(20, progress=False).note == ""
    stretch = torch.rand(D_SAE) * 10 + 1
    with torch.no_grad():
        sae.W_dec.mul_(stretch[:, None])
    for found in (d.top_interactions(3, n=20), d.strongest_interactions(20, progress=False)):
        assert "per unit of activation" in found.note
        assert found.note in str(found)
        assert found.note in found._repr_html_()
    again = d.top_interactions(3, n=20, activations=fires / stretch)
    assert again.i.tolist() == ranked.i.tolist()
    assert again.j.tolist() == ranked.j.tolist()
    assert_close(again.score, ranked.score)
    assert again.to_frame()["score"].tolist() == again.score.tolist()
