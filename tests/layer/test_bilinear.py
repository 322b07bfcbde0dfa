"""The interaction tensor as pure functions of a layer's weights, against the model's own MLP and against loops.

Algebra is stated in float64, where rounding is below 1e-12 of the numbers at hand (all of order one to a hundred), so
that 1e-9 lets no mistake through; float32 has its own test.
"""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from bilens.errors import NotBilinearError
from bilens.layer.bilinear import (
    BilinearLayer,
    branches,
    constant_term,
    hidden_coefficients,
    in_basis,
    interaction_matrix,
    linear_term,
    pair_products,
    search_dtype,
)
from tests.conftest import make_model

D = 16
EXACT = {"atol": 1e-9, "rtol": 1e-9}
MODELS = {
    (bias, normalization): make_model(bias=bias, normalization=normalization, seed=5).to(torch.float64)
    for bias in (False, True)
    for normalization in (False, True)
}
kinds = st.sampled_from(sorted(MODELS))
seeds = st.integers(0, 2**31)


def random(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@given(kinds, st.integers(0, 1), seeds)
def test_quadratic_linear_and_constant_terms_are_the_mlp(kind, layer, seed):
    """`x^T Q x + g . x + h == u . mlp(x)` with the model's own MLP module."""
    model, weights = MODELS[kind], BilinearLayer.of(MODELS[kind], layer)
    u, x = random(seed, D), random(seed + 1, 1, 5, D)
    Q, g, h = interaction_matrix(weights, u), linear_term(weights, u), constant_term(weights, u)
    expected = model.blocks[layer].mlp(x)[0] @ u
    assert_close(torch.einsum("pi,ij,pj->p", x[0], Q, x[0]) + x[0] @ g + h, expected, **EXACT)
    assert (g.abs().max() > 0) == model.cfg.bias
    assert (h != 0) == model.cfg.bias


@pytest.mark.parametrize("bias", [False, True])
def test_in_float32_it_is_the_mlp_up_to_its_rounding(bias):
    model = make_model(bias=bias)
    weights = BilinearLayer.of(model, 1)
    u, x = random(0, D, dtype=torch.float32), random(1, 1, 50, D, dtype=torch.float32)
    Q, g, h = interaction_matrix(weights, u), linear_term(weights, u), constant_term(weights, u)
    # Sums of D * D and d_mlp terms of size about one: 1e-4 is some hundred units of float32 rounding of each.
    expected = model.blocks[1].mlp(x)[0] @ u
    assert_close(torch.einsum("pi,ij,pj->p", x[0], Q, x[0]) + x[0] @ g + h, expected, atol=1e-4, rtol=1e-4)


@given(kinds, st.integers(0, 1), seeds)
def test_it_is_the_papers_sum_over_hidden_units(kind, layer, seed):
    """`Q = 1/2 sum_m c_m (l_m r_m^T + r_m l_m^T)`, one hidden unit after the other, in numpy."""
    weights, u = BilinearLayer.of(MODELS[kind], layer), random(seed, D)
    left, right, out = (matrix.numpy() for matrix in (weights.W_gate, weights.W_in, weights.W_out))
    expected = np.zeros((D, D))
    for m in range(out.shape[0]):
        c = float(out[m] @ u.numpy())
        expected += 0.5 * c * (np.outer(left[:, m], right[:, m]) + np.outer(right[:, m], left[:, m]))
    assert_close(interaction_matrix(weights, u), torch.from_numpy(expected), **EXACT)


@given(st.sampled_from([torch.float32, torch.float64]), seeds, st.sampled_from([(), (1,), (3,), (2, 3)]))
def test_symmetric_to_the_bit(dtype, seed, batch):
    weights = BilinearLayer.of(MODELS[True, True], 0).to(dtype)
    matrix = interaction_matrix(weights, random(seed, *batch, D, dtype=dtype))
    assert matrix.shape == (*batch, D, D)
    assert torch.equal(matrix, matrix.mT)
    between = in_basis(matrix, random(seed + 1, 40, D, dtype=dtype))
    assert between.shape == (*batch, 40, 40)
    assert torch.equal(between, between.mT)


@given(kinds, seeds, st.floats(-100, 100), st.floats(-100, 100))
def test_linear_in_the_direction(kind, seed, a, b):
    weights, u, v = BilinearLayer.of(MODELS[kind], 0), random(seed, D), random(seed + 1, D)
    for of in (interaction_matrix, linear_term, constant_term, hidden_coefficients):
        assert_close(of(weights, a * u + b * v), a * of(weights, u) + b * of(weights, v), atol=1e-9, rtol=1e-7)


@given(kinds, seeds)
def test_a_batch_is_its_members(kind, seed):
    weights, u = BilinearLayer.of(MODELS[kind], 1), random(seed, 3, D)
    for of in (interaction_matrix, linear_term, constant_term):
        assert_close(of(weights, u), torch.stack([of(weights, one) for one in u]), **EXACT)


@given(seeds, st.integers(1, 40))
def test_the_feature_basis_is_d_q_dt(seed, d_sae):
    weights, directions = BilinearLayer.of(MODELS[False, True], 0), random(seed, d_sae, D)
    Q = interaction_matrix(weights, random(seed + 1, D))
    expected = [[d_i @ Q @ d_j for d_j in directions] for d_i in directions]
    assert_close(in_basis(Q, directions), torch.tensor(expected, dtype=torch.float64), **EXACT)


@given(kinds, st.integers(0, 1), seeds, st.integers(1, 6))
def test_pairs_of_sources_add_up_to_the_mlp(kind, layer, seed, n):
    """Sources that add up to `(x, 1)`: all pairs give `u . mlp(x)`, each is the homogeneous form."""
    model, weights = MODELS[kind], BilinearLayer.of(MODELS[kind], layer)
    u, sources, ones = random(seed, D), random(seed + 1, n, D), random(seed + 2, n)
    ones = ones / ones.sum()  # 1 may be split over the sources in any way
    products = pair_products(weights, u, branches(weights, sources, ones), ones)
    x = sources.sum(0)
    # Dividing by a small sum makes single shares, hence the terms, large: tolerance relative to the largest.
    tolerance = 1e-10 * (1 + products.abs().max().item())
    assert_close(products.sum(), model.blocks[layer].mlp(x[None, None])[0, 0] @ u, atol=tolerance, rtol=0)
    assert_close(products, products.T, atol=tolerance, rtol=0)

    Q, g, h = interaction_matrix(weights, u), linear_term(weights, u), constant_term(weights, u)
    form = torch.zeros(D + 1, D + 1, dtype=torch.float64)
    form[:D, :D], form[:D, D], form[D, :D], form[D, D] = Q, g / 2, g / 2, h
    homogeneous = torch.cat([sources, ones[:, None]], dim=1)
    assert_close(products, homogeneous @ form @ homogeneous.T, atol=tolerance, rtol=0)


def test_half_precision_weights_are_raised_to_float32():
    model = make_model(bias=True)
    exact = BilinearLayer.of(model.to(torch.bfloat16), 0)
    assert {tensor.dtype for tensor in vars(exact).values()} == {torch.float32}
    assert torch.equal(exact.W_in, model.blocks[0].mlp.W_in.float())
    assert not exact.W_in.requires_grad


@pytest.mark.parametrize(
    ("published", "kind"),
    [({"gate": "relu"}, "gated by 'relu'"), ({"gate": "silu"}, "'silu'"), ({"bilinear": False}, "one-branch MLP")],
)
def test_other_kinds_of_mlp_are_refused(published, kind):
    with pytest.raises(NotBilinearError, match=f"{kind}.*bilinear true and gate null"):
        BilinearLayer.of(make_model(**published), 0)


@pytest.mark.parametrize("name", ["_is_amx_tile_supported", "_is_avx512_bf16_supported"])
def test_searches_are_in_bfloat16_where_the_processor_multiplies_it_fast(monkeypatch, name):
    """And torch says so: these functions of it are private, and may be gone in another release."""
    for private in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        monkeypatch.delattr(torch.cpu, private, raising=False)
    assert search_dtype(torch.float32, torch.device("cpu")) == torch.float32
    for supported, expected in ((False, torch.float64), (True, torch.bfloat16)):
        monkeypatch.setattr(torch.cpu, name, lambda supported=supported: supported, raising=False)
        assert search_dtype(torch.float64, torch.device("cpu")) == expected
    assert search_dtype(torch.float32, torch.device("cuda")) == torch.bfloat16
    assert search_dtype(torch.float32, torch.device("mps")) == torch.float32
