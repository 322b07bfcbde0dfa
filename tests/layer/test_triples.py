"""The top N of whole layers is that of looking at every triple in float64, whatever the shape, memory and screening."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from bilens.errors import ArgumentError, SAEMismatchError
from bilens.layer import triples
from bilens.layer.bilinear import BilinearLayer, interaction_matrix
from bilens.layer.triples import top_triples


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
    scores, coefficients, *expected = (part[:n] for part in every_triple(layer, outputs, inputs, weights))
    some = scores != 0
    for mine, theirs in zip((found.outputs, found.i, found.j), expected, strict=True):
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
    _, _, *expected = every_triple(layer, outputs, inputs)
    scores = every_triple(layer, outputs, inputs)[0]
    n = min(n, int((scores != 0).sum()))
    for mine, theirs in zip((found.outputs, found.i, found.j), expected, strict=True):
        assert mine.tolist() == theirs[:n].tolist()


@pytest.mark.parametrize("screen", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("n_out", [10, 550])
@pytest.mark.parametrize("memory", [2**30, 300_000])
def test_neither_memory_nor_screening_changes_anything(monkeypatch, screen, n_out, memory):
    """Several blocks of outputs and many tiles; with little memory rows of pairs are cut, without a core tensor."""
    monkeypatch.setattr(triples, "search_dtype", lambda dtype, device: screen)
    monkeypatch.setattr(triples, "ROWS", 50)
    monkeypatch.setattr(triples, "FEATURES", 7)
    monkeypatch.setattr(triples, "SETTLE", 16)
    layer, draw = make_layer(24, 40)
    outputs, inputs = draw(n_out, 24) * torch.linspace(0, 1, n_out)[:, None] ** 3, draw(60, 24)
    memory = memory if n_out == 10 else memory * 4
    check(top_triples(layer, outputs, inputs, 50, memory=memory, progress=False), layer, outputs, inputs, 50)


def test_with_the_core_tensor_and_without(monkeypatch):
    layer, draw = make_layer(16, 60)
    outputs, inputs = draw(50, 16), draw(80, 16)
    with_core = top_triples(layer, outputs, inputs, 100, progress=False)
    monkeypatch.setattr(triples._Search, "_plan", lambda self, *_: (64, 8, False))
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
    original = triples._Search.__init__

    def spy(self, *args):
        dtypes.append(args[-1])
        original(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triples._Search, "__init__", spy)
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


def test_bad_arguments():
    layer, draw = make_layer(8, 10)
    with pytest.raises(SAEMismatchError, match="outputs of shape"):
        top_triples(layer, draw(3, 7), draw(3, 8), 1)
    with pytest.raises(ArgumentError, match="the inputs hold NaN"):
        top_triples(layer, draw(3, 8), torch.full((3, 8), torch.inf), 1)
