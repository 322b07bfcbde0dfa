"""CP decomposition: fits against tensors written out, what never falls, what is exact, and a model with a fit inside.

Fits run in float64 on layers of order one, so what is stated as equal is equal to 1e-9.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from bilens.decompose import Decomposer, replace_mlp
from bilens.errors import ArgumentError, NotBilinearError, OutOfRangeError, SAEMismatchError
from bilens.layer import cp
from bilens.layer.bilinear import BilinearLayer, interaction_matrix
from bilens.layer.cp import cp_decompose, homogeneous, largest_units, unit_norms
from tests.conftest import make_model
from tests.layer.test_inner import make_layer, random, rotated, rotation

seeds = st.integers(0, 2**31)
EXACT = {"atol": 1e-9, "rtol": 1e-9}


def fit(layer, rank, start=None, **kwargs):
    return cp_decompose(layer, rank, start, progress=False, **kwargs)


def without_biases(layer):
    zeros = torch.zeros_like(layer.b_gate)
    return BilinearLayer(layer.W_gate, layer.W_in, layer.W_out, zeros, zeros, layer.b_out)


def dense(layer):
    """The tensor of `(x, 1)`, biases in its last row and column."""
    layer = homogeneous(layer)
    return interaction_matrix(layer, torch.eye(layer.W_out.shape[1], dtype=torch.float64))


@settings(max_examples=12)
@given(seeds, st.integers(2, 7), st.integers(1, 9), st.data(), st.booleans())
def test_the_fit_is_what_it_says_and_never_falls(seed, d, m, data, bias):
    """Cosine, explained share, weights and baseline, against the tensors; sweeps only gain."""
    layer = make_layer(seed, d, m) if bias else without_biases(make_layer(seed, d, m))
    rank = data.draw(st.integers(1, m))
    start = data.draw(st.sampled_from([None, 3]))
    found = fit(layer, rank, start, max_sweeps=10)
    T, S, pruned = dense(layer), dense(found.layer), dense(largest_units(layer, rank))
    if bias and not (found.layer.b_gate.any() or found.layer.b_in.any()):
        S = torch.nn.functional.pad(S, (0, 1, 0, 1))
    assert_close(found.cosine, ((T * S).sum() / (T.norm() * S.norm())).item(), **EXACT)
    assert_close(found.pruned, ((T * pruned).sum() / (T.norm() * pruned.norm())).item(), **EXACT)
    assert_close(found.explained[-1], (1 - ((T - S) ** 2).sum() / (T**2).sum()).item(), **EXACT)
    gains = torch.tensor(found.explained).diff()
    assert (gains > -1e-9).all()
    assert (found.weights.diff() <= 0).all()
    assert_close(found.weights, unit_norms(found.layer), **EXACT)
    assert_close(found.cancellation, (found.weights.norm() / S.norm()).item(), **EXACT)
    if start is None:
        # From the largest units, with writes fitted: no worse than those units, best scaled.
        assert found.cosine >= found.pruned - 1e-9


@given(seeds, st.integers(2, 7), st.integers(1, 9))
def test_with_all_hidden_units_it_is_the_layer(seed, d, m):
    layer = make_layer(seed, d, m)
    found = fit(layer, m, max_sweeps=2)
    assert found.cosine > 1 - 1e-9
    x = random(seed + 20, 5, d)
    y, expected = ((x @ of.W_gate + of.b_gate) * (x @ of.W_in + of.b_in) @ of.W_out for of in (found.layer, layer))
    # Writes are damped by 1e-9 and units may be nearly dependent.
    assert_close(y, expected, atol=1e-5 * (1 + expected.abs().max().item()), rtol=0)


def test_it_finds_the_neurons_that_a_layer_is_made_of():
    """Twelve hidden units that are three, each split in four: three suffice, and they are those three."""
    three = without_biases(make_layer(5, 6, 3))
    shares = random(6, 12).abs() + 0.1
    unit = torch.arange(12) % 3
    shares = shares / torch.zeros(3, dtype=torch.float64).index_add(0, unit, shares)[unit]
    split = BilinearLayer(
        W_gate=three.W_gate[:, unit],
        W_in=three.W_in[:, unit],
        W_out=three.W_out[unit] * shares[:, None],
        b_gate=shares * 0,
        b_in=shares * 0,
        b_out=three.b_out,
    )
    best = max((fit(split, 3, seed, max_sweeps=500, tolerance=1e-12) for seed in range(3)), key=lambda f: f.cosine)
    assert best.cosine > 1 - 1e-9
    cosines = torch.nn.functional.cosine_similarity(best.layer.W_out[:, None], three.W_out[None], dim=-1).abs()
    assert_close(cosines.amax(0), torch.ones(3, dtype=torch.float64), atol=1e-4, rtol=0)
    assert_close(best.weights.sort().values, unit_norms(three).sort().values, atol=1e-4, rtol=1e-4)


@settings(max_examples=8)
@given(seeds)
def test_the_fit_belongs_to_the_tensor(seed):
    """Branches rescaled against each other, or a rotated basis: the same fit, sweep by sweep."""
    layer = without_biases(make_layer(seed, 5, 8))
    scale = random(seed + 1, 8).exp()
    rescaled = BilinearLayer(
        layer.W_gate * scale, layer.W_in / scale, layer.W_out, layer.b_gate, layer.b_in, layer.b_out
    )
    expected = fit(layer, 3, max_sweeps=6).explained
    for other in (rescaled, rotated(layer, rotation(seed + 2, 5))):
        # Rounding grows from sweep to sweep where the fit is ill-conditioned.
        assert_close(fit(other, 3, max_sweeps=6, tolerance=0).explained[: len(expected)], expected, atol=1e-5, rtol=0)


def test_seeded_restartable_and_interruptible(monkeypatch):
    layer = make_layer(0, 8, 20)
    first, again, other = fit(layer, 4, 1), fit(layer, 4, 1), fit(layer, 4, 2)
    assert first.explained == again.explained
    assert torch.equal(first.layer.W_out, again.layer.W_out)
    assert first.explained != other.explained
    assert first.converged

    short = fit(layer, 4, 1, max_sweeps=3)
    assert not short.converged
    assert short.explained == first.explained[:4]
    longer = fit(layer, 4, short.layer)
    assert_close(longer.explained[0], short.explained[-1], **EXACT)
    assert longer.cosine > short.cosine

    def interrupted(*args):
        for n, sweep in enumerate(original(*args)):
            if n == 4:
                raise KeyboardInterrupt
            yield sweep

    original = cp.sweeps
    monkeypatch.setattr(cp, "sweeps", interrupted)
    assert fit(layer, 4, 1).layer.W_out.equal(short.layer.W_out)


def test_the_baseline_keeps_the_largest_units():
    layer = without_biases(make_layer(0, 5, 9))
    units = [torch.einsum("o,i,j->oij", layer.W_out[m], layer.W_gate[:, m], layer.W_in[:, m]) for m in range(9)]
    norms = torch.stack([(0.5 * (unit + unit.mT)).norm() for unit in units])
    assert_close(unit_norms(layer), norms)
    kept = norms.topk(4).indices
    expected = sum(0.5 * (units[m] + units[m].mT) for m in kept.tolist())
    assert_close(dense(largest_units(layer, 4)), expected)


def test_the_decomposer_names_units_and_draws_curves(models, tokenizer):
    decomposer = Decomposer(models(False, True), 0)
    found = decomposer.cp(6, max_sweeps=5, progress=False)
    frame = found.to_frame(top=1)
    assert list(frame) == ["unit", "weight", "writes", "left_reads", "right_reads"]
    assert frame.writes[0].rsplit(" ", 1)[0] in tokenizer.get_vocab()
    assert len(found.plot().data[0].x) == len(found.explained)
    curve = decomposer.cp_curve([2, 24], max_sweeps=5, progress=False)
    assert list(curve.to_frame()["rank"]) == [2, 24]
    # float32 weights.
    assert curve.to_frame().cosine[1] > 1 - 1e-5
    assert {trace.name for trace in curve.plot().data} == {"fitted", "largest units kept"}
    assert "6 hidden units" in str(found)


@pytest.mark.parametrize("bias", [False, True])
def test_a_model_computes_with_other_weights(models, bias):
    """In a copy: the MLP is that of the weights, the rest and the model itself are as they were."""
    model = models(bias, True)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    fitted = Decomposer(model, 1).cp(5, max_sweeps=3, progress=False).layer
    changed = replace_mlp(model, -1, fitted)
    x = torch.randn(1, 6, 16, generator=torch.Generator().manual_seed(0))
    left, right = x @ fitted.W_gate + fitted.b_gate, x @ fitted.W_in + fitted.b_in
    assert_close(changed.blocks[1].mlp(x), left * right @ fitted.W_out + fitted.b_out, atol=1e-5, rtol=1e-5)
    assert torch.equal(changed.blocks[0].mlp(x), model.blocks[0].mlp(x))
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    whole = replace_mlp(model, 1, BilinearLayer.of(model, 1))
    tokens = torch.arange(5)[None]
    assert torch.equal(whole(tokens), model(tokens))


def test_what_is_refused(models):
    layer = make_layer(0, 5, 8)
    for rank in (0, 9):
        with pytest.raises(OutOfRangeError, match=f"rank is {rank}, expected 1 to 8"):
            fit(layer, rank)
    with pytest.raises(ArgumentError, match=r"cp of rank 2 needs .* bytes, and memory is 1,000: ask for a lower rank"):
        fit(layer, 2, memory=1000)
    with pytest.raises(OutOfRangeError, match="max_sweeps is -1"):
        fit(layer, 2, max_sweeps=-1)
    with pytest.raises(SAEMismatchError, match="3 hidden units and d_model 5: expected 2 and 5"):
        fit(layer, 2, make_layer(1, 5, 3))
    nothing = BilinearLayer(layer.W_gate, layer.W_in, layer.W_out * 0, layer.b_gate, layer.b_in, layer.b_out)
    with pytest.raises(ArgumentError, match="tensor is zero"):
        fit(nothing, 2)
    with pytest.raises(ArgumentError, match="ranks is empty"):
        Decomposer(models(False, True), 0).cp_curve([])

    model = models(False, True)
    with pytest.raises(SAEMismatchError, match="read 5 dimensions and write 5, for a model of d_model 16"):
        replace_mlp(model, 0, layer)
    with pytest.raises(OutOfRangeError, match="30 hidden units do not fit the model's d_mlp of 24"):
        replace_mlp(model, 0, make_layer(0, 16, 30))
    with pytest.raises(SAEMismatchError, match="the weights have biases"):
        replace_mlp(model, 0, make_layer(0, 16, 3))
    with pytest.raises(OutOfRangeError, match="layer 2 is outside the model's 2 layers"):
        replace_mlp(model, 2, make_layer(0, 16, 3))
    with pytest.raises(NotBilinearError):
        replace_mlp(make_model(gate="silu"), 0, make_layer(0, 16, 3))
