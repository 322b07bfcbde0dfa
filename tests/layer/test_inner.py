"""Inner products from the factors, against the interaction matrices and tensors written out.

In float64, on layers whose numbers are of order one: 1e-9 of the norms is some thousand roundings.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from bilens.decompose import Decomposer, layer_similarity
from bilens.errors import ArgumentError, NotBilinearError, SAEMismatchError
from bilens.layer import inner
from bilens.layer.bilinear import BilinearLayer, in_basis, interaction_matrix
from bilens.layer.inner import (
    cosines,
    inner_products,
    norms,
    tensor_inner,
    tensor_norm,
    traces,
)
from tests.conftest import make_model
from tests.random_saes import make_sae

EXACT = {"atol": 1e-9, "rtol": 1e-9}
seeds, widths, units = st.integers(0, 2**31), st.integers(1, 9), st.integers(1, 12)


def random(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make_layer(seed, d, m):
    shapes = (d, m), (d, m), (m, d), (m,), (m,), (d,)
    return BilinearLayer(*(random(seed + n, *shape) for n, shape in enumerate(shapes)))


def tensor_of(layer):
    """T, one output coordinate after the other."""
    return interaction_matrix(layer, torch.eye(layer.W_out.shape[1], dtype=torch.float64))


def rotation(seed, d):
    return torch.linalg.qr(random(seed, d, d)).Q


def rotated(layer, rotate):
    """The same layer in another basis of the residual stream."""
    return BilinearLayer(
        rotate @ layer.W_gate, rotate @ layer.W_in, layer.W_out @ rotate.T, layer.b_gate, layer.b_in, layer.b_out
    )


def rescaled(layer, seed):
    """Branches swapped and rescaled against each other: another writing of the same tensor."""
    scale = random(seed, layer.W_gate.shape[1]).exp() * random(seed + 1, layer.W_gate.shape[1]).sign()
    return BilinearLayer(layer.W_in * scale, layer.W_gate / scale, layer.W_out, layer.b_in, layer.b_gate, layer.b_out)


@given(seeds, widths, units, units, st.integers(1, 4), st.integers(1, 4), st.booleans())
def test_inner_products_are_those_of_the_matrices(seed, d, m, other_m, n, k, in_features):
    """`<Q_u, Q'_w>` of two layers, in the residual basis and between features."""
    layer, other = make_layer(seed, d, m), make_layer(seed + 50, d, other_m)
    u, w, decoder = random(seed + 1, n, d), random(seed + 2, k, d), random(seed + 3, 7, d)
    metric = decoder.T @ decoder if in_features else None
    Q, P = interaction_matrix(layer, u), interaction_matrix(other, w)
    if in_features:
        Q, P = in_basis(Q, decoder), in_basis(P, decoder)
    expected = torch.einsum("nij,kij->nk", Q, P)
    found = inner_products(layer, u, other, w, metric)
    tolerance = 1e-11 * (1 + Q.norm() * P.norm()).item()
    assert_close(found, expected, atol=tolerance, rtol=0)
    assert_close(inner_products(layer, u, metric=metric), torch.einsum("nij,kij->nk", Q, Q), atol=1e-9, rtol=1e-9)
    assert_close(norms(layer, u, metric), torch.linalg.matrix_norm(Q), atol=1e-6, rtol=1e-9)
    assert_close(traces(layer, u, metric), Q.diagonal(dim1=-2, dim2=-1).sum(-1), **EXACT)


@given(seeds, widths, units, units)
def test_whole_layers_are_compared_as_their_tensors(seed, d, m, other_m):
    layer, other = make_layer(seed, d, m), make_layer(seed + 50, d, other_m)
    T, S = tensor_of(layer), tensor_of(other)
    tolerance = 1e-11 * (1 + T.norm() * S.norm()).item()
    assert_close(tensor_inner(layer, other), (T * S).sum(), atol=tolerance, rtol=0)
    assert_close(tensor_norm(layer), T.norm(), **EXACT)


@given(seeds, widths, units)
def test_only_the_tensor_counts(seed, d, m):
    """Swapped and rescaled branches are the same tensor; a rotated basis changes no inner product."""
    layer, other, rotate = make_layer(seed, d, m), make_layer(seed + 50, d, m), rotation(seed + 9, d)
    again = rescaled(layer, seed + 7)
    for found in (tensor_norm(again) ** 2, tensor_inner(layer, again)):
        assert_close(found, tensor_norm(layer) ** 2, **EXACT)
    turned, turned_other = rotated(layer, rotate), rotated(other, rotate)
    assert_close(tensor_inner(turned, turned_other), tensor_inner(layer, other), **EXACT)
    u = random(seed + 1, 3, d)
    assert_close(inner_products(turned, u @ rotate.T), inner_products(again, u), atol=1e-8, rtol=1e-8)


def test_the_memory_changes_nothing():
    layer, other, u, w = make_layer(0, 6, 23), make_layer(1, 6, 17), random(1, 40, 6), random(2, 30, 6)
    metric = random(3, 6, 6) @ random(3, 6, 6).T
    for memory in (2**14, 2**15, 2**16):
        for found, expected in (
            (inner_products(layer, u, memory=memory), inner_products(layer, u)),
            (inner_products(layer, u, other, w, metric, memory), inner_products(layer, u, other, w, metric)),
            (norms(layer, u, metric, memory), norms(layer, u, metric)),
            (tensor_inner(layer, other, metric, memory), tensor_inner(layer, other, metric)),
        ):
            assert_close(found, expected, **EXACT)
    with pytest.raises(ArgumentError, match=r"of 40 and 40 outputs needs 12,800 bytes, and memory is 5: ask for fewer"):
        inner_products(layer, u, memory=5)


def test_blocks_change_nothing(monkeypatch):
    layer, u = make_layer(0, 6, 23), random(1, 4, 6)
    whole = inner_products(layer, u), tensor_norm(layer)
    monkeypatch.setattr(inner, "BLOCK", 50)
    for found, expected in zip((inner_products(layer, u), tensor_norm(layer)), whole, strict=True):
        assert_close(found, expected, **EXACT)


def test_float32_weights_are_summed_in_float64():
    """To float64's rounding, whatever the weights are stored in."""
    layer = make_layer(0, 8, 30).to(torch.float32)
    assert tensor_inner(layer, layer).dtype == torch.float64
    assert_close(tensor_inner(layer, layer), tensor_of(layer.to(torch.float64)).pow(2).sum(), atol=0, rtol=1e-14)


def test_what_has_no_length_has_cosine_zero():
    layer = make_layer(0, 4, 5)
    u = torch.stack([torch.zeros(4, dtype=torch.float64), random(1, 4)])
    found = cosines(inner_products(layer, u), norms(layer, u), norms(layer, u))
    assert_close(found, torch.diag(torch.tensor([0.0, 1.0], dtype=torch.float64)))


def test_a_models_layers_and_two_models():
    model, other = make_model(seed=1).double(), make_model(seed=2).double()
    T, S = ([tensor_of(BilinearLayer.of(m, layer)) for layer in range(2)] for m in (model, other))
    same, two = layer_similarity(model), layer_similarity(model, other)
    for found, (a, b) in ((same, (T, T)), (two, (T, S))):
        cosine = torch.stack([torch.stack([(x * y).sum() / (x.norm() * y.norm()) for y in b]) for x in a])
        assert_close(found.cosines, cosine, **EXACT)
        # Distances of zero have half the digits.
        assert_close(
            found.distances, torch.stack([torch.stack([(x - y).norm() for y in b]) for x in a]), atol=1e-6, rtol=0
        )
    frame = two.to_frame()
    assert list(frame) == ["layer", "other", "inner", "cosine", "distance"]
    assert len(frame) == 4
    assert len(two.plot().data) == 1
    assert "layer 1" in str(two)


def test_the_decomposer_gives_the_same(models):
    decomposer = Decomposer(
        models(True, True),
        1,
        make_sae(hook="blocks.1.ln2.hook_normalized"),
        make_sae(hook="blocks.1.hook_mlp_out", seed=2),
    )
    for basis in ("residual", "features"):
        for side in ("encoder", "decoder"):
            Q = decomposer.interaction([3, 0, 7], basis=basis, side=side).double()
            found = decomposer.inner_products([3, 0, 7], basis=basis, side=side)
            # The matrices are float32: sums of 1600 products of numbers up to ten.
            assert_close(found, torch.einsum("nij,kij->nk", Q, Q), atol=1e-3, rtol=1e-4)
    assert decomposer.inner_products(3).shape == (1, 1)


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(SAEMismatchError, match="d_model 4 and one of 5"):
        tensor_inner(make_layer(0, 4, 6), make_layer(0, 5, 6))
    with pytest.raises(NotBilinearError, match="gated by 'relu'"):
        layer_similarity(make_model(gate="relu"))
