"""A read of an MLP's output is a sum of squares of what its sources give, whichever exact sum is taken.

Tolerance: float64 algebra, relative to the absolute parts.
"""

import pytest
import torch

from bilens.attribute.squares import MOST, find_squares, split_squares
from bilens.layer.bilinear import BilinearLayer, interaction_matrix
from tests.attribute.conftest import model_of


@pytest.fixture(scope="module", params=[False, True], ids=["no biases", "biases"])
def layer(request):
    return BilinearLayer.of(model_of(request.param, True), 1).to(torch.float64)


@pytest.fixture(scope="module")
def given():
    generator = torch.Generator().manual_seed(2)
    sources = torch.randn(9, 16, generator=generator, dtype=torch.float64)
    sources[-1] = 0.0  # the one that carries the biases
    return torch.randn(5, 16, generator=generator, dtype=torch.float64), sources, torch.eye(9)[-1].double()


def test_the_parts_add_up_to_the_read(layer, given):
    u, sources, ones = given
    solved = torch.tensor([True, True, False, True, False])
    found = find_squares(layer, u, sources, ones, solved, 0.8)
    values = layer(sources.sum(0)) @ u.T
    for square, value, is_solved in zip(found, values.tolist(), solved.tolist(), strict=True):
        parts = torch.cat([square.weights.flatten(), square.direct])
        assert parts.sum().item() == pytest.approx(value, abs=1e-12 * parts.abs().sum().item())
        assert bool(len(square.index)) == is_solved
        assert square.index.tolist()[-1:] == [-1] * is_solved


def test_an_eigencircuit_is_its_square_and_each_source_gives_its_shapley_value(layer, given):
    u, sources, ones = given
    (found,) = find_squares(layer, u[:1], sources, ones, torch.tensor([True]), 1.0)
    matrix = interaction_matrix(layer, u[0])
    values, vectors = torch.linalg.eigh(matrix)
    by_size = values.abs().argsort(descending=True)
    values, vectors = values[by_size], vectors.T[by_size]
    for rank, weights in zip(found.index.tolist()[:-1], found.weights, strict=False):
        activation = values[rank] * (vectors[rank] @ sources.sum(0)) ** 2
        # Solved in float32: good to seven digits of the matrix.
        assert weights.sum().item() == pytest.approx(activation.item(), abs=1e-5 * values[0].abs().item() * 16)
        own = values[rank] * (sources @ vectors[rank])[:, None] * (sources @ vectors[rank])
        torch.testing.assert_close(weights, own.sum(1), atol=1e-4, rtol=1e-4)  # half of each pair to each member


def test_any_exact_sum_of_squares_serves(layer, given):
    """Of a metric's eigenvectors, `Q = sum_k mu_k w_k w_k^T` with `w_k` neither of length one nor orthogonal."""
    u, sources, _ = given
    matrix = interaction_matrix(layer, u[0])
    root = torch.randn(16, 16, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    values, vectors = torch.linalg.eigh(root.T @ matrix @ root)
    vectors = vectors.T @ torch.linalg.inv(root)
    torch.testing.assert_close((vectors.T * values) @ vectors, matrix)
    x = sources.sum(0)
    linear = sources @ matrix @ x
    for share in (0.5, 0.9):
        found = split_squares(values, vectors, sources, linear, linear * 0, share)
        parts = values * (vectors @ x) ** 2
        ranked = parts.abs().argsort(descending=True)[: len(found.index) - 1]
        assert found.index[:-1].tolist() == ranked.tolist()
        torch.testing.assert_close(found.weights.sum(1)[:-1], parts[ranked])
        assert found.weights.sum().item() == pytest.approx((x @ matrix @ x).item())
        left = (linear.sum() - parts[ranked].cumsum(0)).abs() / linear.sum().abs()
        assert len(ranked) == MOST or left[-1] <= 1 - share
        assert not (left[:-1] <= 1 - share).any()
