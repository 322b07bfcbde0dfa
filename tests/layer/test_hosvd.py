"""Higher-order SVD, against the SVD of the unfoldings written out.

Singular values come as roots of a Gram matrix's eigenvalues in float64: relative to the largest, 1e-7 is ten times what
that can lose.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from bilens.decompose import Decomposer
from bilens.errors import ArgumentError, OutOfRangeError
from bilens.layer.hosvd import core, input_gram, output_gram, singular
from bilens.layer.inner import tensor_norm
from tests.conftest import make_model
from tests.layer.test_inner import make_layer, random, rescaled, rotated, rotation, tensor_of
from tests.random_saes import make_sae

D = 16
seeds, widths, units = st.integers(0, 2**31), st.integers(1, 9), st.integers(1, 12)
LAYER1 = ("blocks.1.ln2.hook_normalized", "blocks.1.hook_mlp_out")


@pytest.fixture(scope="module")
def decomposer():
    return Decomposer(make_model(seed=3).double(), 1)


@given(seeds, widths, units)
def test_it_is_the_svd_of_both_unfoldings(seed, d, m):
    layer = make_layer(seed, d, m)
    T = tensor_of(layer)
    unfoldings = (T.flatten(1), T.movedim(1, 0).flatten(1))
    for gram in (output_gram, input_gram):  # the memory changes nothing
        assert_close(gram(layer, 2**15), gram(layer))
    for gram, unfolding in zip((output_gram(layer), input_gram(layer)), unfoldings, strict=True):
        tolerance = 1e-7 * T.norm().item()
        assert_close(gram, unfolding @ unfolding.T, atol=1e-10 * T.norm().item() ** 2, rtol=0)
        values, vectors = singular(gram)
        expected = torch.linalg.svdvals(unfolding)
        assert_close(values[: len(expected)], expected, atol=tolerance, rtol=0)
        assert_close(vectors @ vectors.T, torch.eye(d, dtype=torch.float64))
        # The rows are singular vectors: projections of the unfolding on them are orthogonal and as long as the values.
        projected = vectors @ unfolding
        assert_close(projected @ projected.T, torch.diag(values**2), atol=1e-9 * T.norm().item() ** 2, rtol=0)


@given(seeds, widths, units)
def test_singular_values_belong_to_the_tensor(seed, d, m):
    """Not to how it is written (branches swapped, rescaled) or to the basis of the residual stream."""
    layer = make_layer(seed, d, m)
    others = rescaled(layer, seed + 5), rotated(layer, rotation(seed + 6, d))
    for gram in (output_gram, input_gram):
        values = singular(gram(layer))[0]
        for other in others:
            # Small values are roots of rounding.
            assert_close(singular(gram(other))[0], values, atol=3e-7 * values[0].item(), rtol=1e-9)
        assert_close((values**2).sum().sqrt(), tensor_norm(layer))


@settings(max_examples=8)
@given(st.integers(1, D), st.integers(1, D))
def test_errors_are_exact(decomposer, n_output, n_input):
    """By the discarded singular values where one mode is cut, by the core's norm where both are."""
    hosvd = decomposer.hosvd(2)
    T, norm = tensor_of(decomposer.weights), tensor_norm(decomposer.weights)
    for kept in ((n_output, None), (None, n_input), (n_output, n_input)):
        truncated = hosvd.truncated(*kept)
        found = hosvd.error(*kept)
        assert abs(found - (tensor_of(truncated) - T).norm() / norm) < 1e-6
    inputs, outputs = hosvd.input_values[n_input:] ** 2, hosvd.output_values[n_output:] ** 2
    assert found**2 <= (outputs.sum() + 2 * inputs.sum()) / norm**2 + 1e-9
    expected = torch.einsum(
        "ro,oij,si,tj->rst",
        hosvd.output_directions[:n_output],
        T,
        hosvd.input_directions[:n_input],
        hosvd.input_directions[:n_input],
    )
    assert_close(hosvd.core(n_output, n_input), expected, atol=1e-10, rtol=1e-10)


def test_the_first_output_direction_has_the_largest_interaction_matrix(decomposer):
    """`||Q_u||` is the singular value, and no unit direction has a larger one."""
    hosvd = decomposer.hosvd(3)
    lengths = torch.linalg.matrix_norm(decomposer.interaction(hosvd.output_directions))
    assert_close(lengths, hosvd.output_values)
    directions = torch.nn.functional.normalize(random(0, 500, D), dim=-1)
    assert torch.linalg.matrix_norm(decomposer.interaction(directions)).max() < lengths[0]
    assert_close(
        (core(decomposer.weights, hosvd.output_directions, hosvd.input_directions) ** 2).sum(), (lengths**2).sum()
    )


def test_it_names_what_directions_are_like(models, tokenizer):
    """Features where there are SAEs, tokens where there are none."""
    saes = [make_sae(hook=hook, seed=seed) for seed, hook in enumerate(LAYER1)]
    names = [f"feature {n}" for n in range(40)]
    hosvd = Decomposer(models(False, True), 1, *saes, input_names=names, output_names=names).hosvd(4)
    frame = hosvd.to_frame()
    assert list(frame)[:5] == ["rank", "singular_value", "share", "cumulative", "like"]
    assert list(frame)[5:] == ["eigenvalue_1", "reads_1", "eigenvalue_2", "reads_2"]
    assert len(frame) == 4
    cosines = torch.nn.functional.cosine_similarity(saes[1].W_dec, hosvd.output_directions[0].float()[None]).detach()
    best = int(cosines.abs().argmax())
    assert frame.like[0].startswith(f"feature {best} {cosines[best]:+.2f}")
    assert frame.eigenvalue_1[0] == hosvd.circuits.values[0, 0]
    assert len(hosvd.to_frame("input", top=2)) == 4
    assert {trace.name for trace in hosvd.plot().data} == {"output", "input"}

    in_tokens = Decomposer(models(False, True), 1).hosvd(1).to_frame(top=1)
    assert in_tokens.like[0].rsplit(" ", 1)[0] in tokenizer.get_vocab()


def test_what_is_refused(decomposer):
    for k in (0, D + 1):
        with pytest.raises(OutOfRangeError, match=f"k is {k}, expected 1 to 16"):
            decomposer.hosvd(k)
    hosvd = decomposer.hosvd(1)
    for call in (hosvd.error, hosvd.truncated):
        with pytest.raises(OutOfRangeError, match="17 directions, expected 1 to 16"):
            call(17)
    with pytest.raises(ArgumentError, match=r"mode is 'outputs', expected one of .* Did you mean 'output'"):
        hosvd.to_frame("outputs")
