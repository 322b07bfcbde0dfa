"""Spectra of whole layers: every number against the dense matrices, and the invariances they must have."""

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from bilens.decompose import Decomposer
from bilens.decompose.spectra import cross_shares, effective_ranks
from bilens.errors import ArgumentError, MissingSAEError
from tests.conftest import make_model
from tests.random_saes import D_SAE, make_sae

D = 16


def make(model, **kwargs):
    saes = make_sae("topk", "blocks.1.ln2.hook_normalized", seed=1), make_sae("topk", "blocks.1.hook_mlp_out", seed=2)
    return Decomposer(model, 1, *saes, **kwargs)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("side", ["encoder", "decoder"])
def test_every_number_is_that_of_the_dense_matrices(models, bias, side):
    decomposer = make(models(bias, True))
    found = decomposer.spectra(k=3, side=side, full=True, progress=False)
    every = torch.arange(D_SAE)
    Q = decomposer.interaction(every, side=side).double()
    values = torch.linalg.eigvalsh(Q)
    top = values.gather(-1, values.abs().argsort(-1, descending=True))[:, :3]
    # The sweep's own tolerance on eigenvalues, and float32 rounding of sums of 16 and 1,600 squares.
    assert_close(found.eigen.values.abs().double(), top.abs(), rtol=1e-4, atol=1e-6)
    assert_close(found.eigen.norms.double(), Q.flatten(1).norm(dim=-1), rtol=1e-4, atol=0)
    assert_close(found.eigen.traces.double(), Q.diagonal(dim1=1, dim2=2).sum(-1), rtol=1e-4, atol=1e-5)
    assert_close(found.effective_rank.double(), values.abs().sum(-1) ** 2 / (values**2).sum(-1), rtol=1e-3, atol=0)
    features = decomposer.interaction(every, basis="features", side=side).double()
    own = features.diagonal(dim1=1, dim2=2).square().sum(-1)
    assert_close(found.cross_share.double(), 1 - own / features.square().sum((1, 2)), rtol=1e-4, atol=1e-5)


def test_some_outputs_and_directions(models):
    decomposer = make(models(False, True), output_names=[f"out {i}" for i in range(D_SAE)])
    every = decomposer.spectra(progress=False)
    some = decomposer.spectra([7, 3], progress=False)
    assert some.outputs.tolist() == [7, 3]
    assert some.to_frame()["name"].tolist() == ["out 7", "out 3"]
    assert_close(some.eigen.values, every.eigen.values[[7, 3]], rtol=1e-4, atol=1e-6)
    u = decomposer.directions([7, 3])
    same = Decomposer(models(False, True), 1).spectra(u, progress=False)
    assert_close(same.eigen.values, some.eigen.values, rtol=1e-4, atol=1e-6)
    assert same.cross_share is None
    assert same.effective_rank is None
    assert same.outputs.tolist() == [0, 1]


def test_a_square_and_a_product(models):
    """Q = v v^T has effective rank 1 and no cross share in its own basis; of (a b^T + b a^T)/2 it is 2, all cross."""
    decomposer = make(models(False, True))
    layer, eye = decomposer.weights, torch.eye(D)
    zero = torch.zeros_like(layer.W_gate)
    gate, right, out = zero.clone(), zero.clone(), torch.zeros_like(layer.W_out)
    gate[:, 0], right[:, 0], out[0, 0] = eye[2], eye[2], 1.0
    gate[:, 1], right[:, 1], out[1, 1] = eye[3], eye[5], 1.0
    made = replace(layer, W_gate=gate, W_in=right, W_out=out)
    assert_close(effective_ranks(made, eye[:3]), torch.tensor([1.0, 2.0, 0.0], dtype=torch.float64))
    assert_close(cross_shares(made, eye[:3], eye), torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64))


def test_an_input_sae_on_resid_mid_gives_no_cross_share(models):
    saes = make_sae("topk", "blocks.1.hook_resid_mid", seed=1), make_sae("topk", "blocks.1.hook_mlp_out", seed=2)
    assert Decomposer(models(False, True), 1, *saes).spectra(progress=False).cross_share is None
    assert Decomposer(models(False, False), 1, *saes).spectra(progress=False).cross_share is not None


def test_ranked_and_drawn(models):
    found = make(models(False, True)).spectra(full=True, progress=False)
    frame = found.ranked("share")
    assert frame.share.is_monotonic_decreasing
    assert found.ranked("trace", ascending=True).trace.abs().is_monotonic_increasing
    assert len(found.plot().data[0].x) == D_SAE
    assert "LeadingEigenpairs" in str(found)
    with pytest.raises(ArgumentError, match=r"no 'shares' to rank by.*Did you mean 'share'"):
        found.ranked("shares")
    with pytest.raises(ArgumentError, match=r"no 'effective_rank'"):
        make(models(False, True)).spectra(progress=False).ranked("effective_rank")
    with pytest.raises(MissingSAEError):
        Decomposer(models(False, True), 0).spectra()


@pytest.mark.parametrize("size", [1e9, 1e-12])
def test_weights_of_any_size_have_the_same_shares(size: float) -> None:
    """Interaction matrices at 1e27 and 1e-36 of the usual, whose squares float32 has no room for."""
    model, sae = make_model(), make_sae(hook="blocks.1.hook_mlp_out")
    before = Decomposer(model, 1, output_sae=sae)
    eigen, sweep = before.eigen(3), before.spectra([3, 4], k=2, progress=False).eigen
    for weight in (model.blocks[1].mlp.w.weight, model.blocks[1].mlp.p.weight):
        weight.data *= size
    after, scale = Decomposer(model, 1, output_sae=sae), size**3
    assert_close(after.eigen(3).shares, eigen.shares, atol=1e-5, rtol=0)
    assert_close(after.eigen(3).norms.double() / scale, eigen.norms.double(), atol=0, rtol=1e-5)
    again = after.spectra([3, 4], k=2, progress=False).eigen
    assert_close(again.shares, sweep.shares, atol=1e-5, rtol=0)
    for name in ("norms", "traces", "missed_bound"):
        found, expected = getattr(again, name).double() / scale, getattr(sweep, name).double()
        assert_close(found, expected, atol=1e-5, rtol=1e-5)
