"""Squares found where inputs are: exact sums whatever the metric, the best of Gaussian inputs, and no worse fitted."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from bilens.errors import ArgumentError
from bilens.layer.bilinear import BilinearLayer, interaction_matrix
from bilens.layer.eigen import fitted
from bilens.layer.eigen.fitted import best_squares
from bilens.layer.eigen.metric import metric_eigenpairs, moment, shares_of, terms
from bilens.layer.eigen.metric_sweep import leading_metric_pairs
from bilens.layer.eigen.pairs import sorted_eigenpairs

seeds = st.integers(0, 2**31)


def random(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def symmetric(seed, d):
    matrix = random(seed, d, d)
    return matrix + matrix.T


def inputs(seed, n, d, rank=None):
    """Of uneven directions, about a mean, in a subspace where `rank` is given."""
    x = random(seed, n, rank or d) @ random(seed + 1, rank or d, d) * torch.arange(1, d + 1).double() ** -0.5
    return x + random(seed + 2, d) @ torch.linalg.pinv(x) @ x if rank else x + random(seed + 2, d)


@given(seeds, st.integers(1, 12), st.integers(0, 30), st.data())
def test_all_squares_of_a_metric_are_the_matrix(seed, d, n, data):
    """Of however few inputs, in however small a subspace, none at all included: rounding times the metric's condition
    (1e6 by its floor) is 1e-10 of the matrix."""
    rank = data.draw(st.integers(1, d))
    Q, every = symmetric(seed, d), inputs(seed + 3, 40, d, rank)
    x = every[:n]
    values, vectors = metric_eigenpairs(Q, moment(x, every.T @ every / len(every)))
    assert_close((vectors.T * values) @ vectors, Q, atol=1e-8 * Q.abs().max().item(), rtol=0)
    assert_close(vectors.norm(dim=1), torch.ones(d).double())
    # Sylvester: as many of each sign as Q has.
    assert (values > 0).sum() == (torch.linalg.eigvalsh(Q) > 0).sum()
    other = random(seed + 9, 5, d)
    assert_close(terms(values, vectors, other).sum(1), ((other @ Q) * other).sum(1), atol=1e-7, rtol=1e-7)


def test_the_identity_is_the_metric_of_the_weights():
    Q = symmetric(0, 7)
    values, vectors = metric_eigenpairs(Q, torch.eye(7).double())
    expected = sorted_eigenpairs(Q)
    assert_close(values, expected[0])
    assert_close(vectors, expected[1])


@given(seeds)
def test_the_first_squares_lose_least_on_gaussian_inputs(seed):
    """The variance of `x^T R x` is `2 ||M^1/2 R M^1/2||^2` with no mean: no other squares leave less of it."""
    d, k = 6, 2
    Q, x = symmetric(seed, d), random(seed + 1, 50, d) * torch.arange(1, d + 1)
    M = moment(x, torch.eye(d).double())
    root = torch.linalg.cholesky(M)

    def left(values, vectors):
        return (root.T @ (Q - (vectors.T * values) @ vectors) @ root).norm()

    values, vectors = metric_eigenpairs(Q, M, k)
    best = left(values, vectors)
    assert best <= left(*sorted_eigenpairs(Q, k)) + 1e-9
    for other in range(5):
        moved = vectors + 0.05 * random(seed + 5 + other, k, d)
        assert best <= left(values, moved) + 1e-9


@given(seeds, st.integers(1, 40))
def test_shares_of_all_squares_add_up_to_one(seed, n):
    Q, x = symmetric(seed, 5), inputs(seed + 1, n + 2, 5)
    whole = ((x @ Q) * x).sum(1)
    variance, mean = shares_of(terms(*metric_eigenpairs(Q, moment(x, torch.eye(5).double())), x), whole)
    one = torch.tensor(1.0).double()
    # The whole may be a small sum of large squares.
    assert_close(variance.sum(), one, atol=1e-6, rtol=0)
    assert_close(mean.sum(), one, atol=1e-6, rtol=0)


def left_of(Q, x, M, values, vectors):
    """What `best_squares` makes small, as a share of the variance of the whole form."""
    R = Q - (vectors.T * values) @ vectors
    on_inputs = ((x @ R) * x).sum(1).var(correction=0)
    prior = 2 * torch.trace(R @ M @ R @ M)
    return (on_inputs + fitted.PRIOR / len(x) * prior) / ((x @ Q) * x).sum(1).var(correction=0)


@given(seeds, st.integers(1, 3), st.sampled_from([3, 30, 300]))
def test_fitted_squares_leave_no_more_than_those_they_start_from(seed, k, n):
    """Of the objective; and the gradient that L-BFGS is given is that of a finite difference."""
    d = 8
    Q, x = symmetric(seed, d), inputs(seed + 1, n, d)
    M = moment(x, x.T @ x / n)
    values, vectors = best_squares(Q, x, M, k)
    assert values.shape == (k,)
    assert_close(vectors.norm(dim=1), torch.ones(k).double())
    found = left_of(Q, x, M, values, vectors)
    assert found <= left_of(Q, x, M, *metric_eigenpairs(Q, M, 1)) + 1e-6
    problem = fitted._Problem(x, ((x @ Q) * x).sum(1), Q)
    signs, rows, step = torch.ones(k).double(), random(seed + 4, k, d), random(seed + 5, k, d)
    _, gradient = problem.value_and_gradient(signs, rows)
    above, below = (problem.value_and_gradient(signs, rows + h * step)[0] for h in (1e-5, -1e-5))
    assert_close((above - below) / 2e-5, (gradient * step).sum(), rtol=1e-5, atol=1e-4)


def test_fitted_squares_follow_inputs_that_no_gaussian_is_like():
    """Where most inputs lie along one direction of a circuit and few along another, which has all the variance."""
    d, n = 12, 4000
    x = 0.1 * random(1, n, d)
    x[:, 0] += 3
    x[: n // 20, 1] += 3
    Q = torch.diag(torch.tensor([0.5, 1.0, *[0.05] * (d - 2)]).double())
    values, vectors = best_squares(Q, x, moment(x, x.T @ x / n), 1)
    whole = ((x @ Q) * x).sum(1)
    correlation = torch.corrcoef(torch.stack([whole, terms(values, vectors, x)[:, 0]]))[0, 1]
    assert correlation > 0.95


@pytest.mark.parametrize("n", [0, 1, 2])
def test_hardly_any_inputs(n):
    """None, one, or two alike: the squares are those of the metric."""
    Q, every = symmetric(3, 6), inputs(4, 30, 6)
    x = every[:1].expand(n, -1)
    M = moment(x, every.T @ every / 30)
    values, vectors = best_squares(Q, x, M, 2)
    expected = metric_eigenpairs(Q, M, 2)
    # L-BFGS stops at a gradient of 1e-7 of float64 numbers of order one.
    assert_close(values, expected[0], rtol=1e-4, atol=1e-6)
    assert_close(vectors, expected[1], rtol=1e-3, atol=1e-4)


def test_a_zero_form_has_no_squares():
    x = inputs(0, 20, 4)
    values, vectors = best_squares(torch.zeros(4, 4).double(), x, moment(x, x.T @ x / 20), 2)
    assert (values == 0).all()
    assert vectors.isfinite().all()


# --- many outputs -----------------------------------------------------------------------------------------------------


@given(seeds, st.sampled_from([(6, 9), (48, 60)]), st.integers(1, 3))
def test_many_outputs_are_what_each_is_alone(seed, shape, k):
    """Of some with no inputs, with fewer than dimensions, and with many; a zero direction among them. Its error is the
    square of a residual of 3 % over the distance to the next pair, or float32's rounding."""
    d, d_mlp = shape
    left, right, out = random(seed, d, d_mlp), random(seed + 1, d, d_mlp), random(seed + 2, d_mlp, d)
    zero = torch.zeros(d_mlp).double()
    layer = BilinearLayer(left, right, out, zero, zero, torch.zeros(d).double()).to(torch.float32)
    u = random(seed + 3, 5, d).float()
    u[4] = 0
    every = inputs(seed + 4, 400, d).float()
    tokens = [torch.arange(n) for n in (0, 3, 100, 400, 50)]
    moments = every.double().T @ every.double() / len(every)
    found = leading_metric_pairs(layer, u, every, tokens.__getitem__, moments, k)
    for row, own in enumerate(tokens):
        Q, M = interaction_matrix(layer, u[row]).double(), moment(every[own], moments)
        values, vectors = metric_eigenpairs(Q, M, k)
        mu = values * ((vectors @ M) * vectors).sum(1)
        assert_close(found.mu[row].double().abs(), mu.abs(), rtol=5e-3, atol=1e-6)
        made = found.vectors[row].double()
        # As in the whole solution, each has length one in the metric times |mu|.
        assert_close(
            found.values[row].double() * ((made @ M) * made).sum(1), found.mu[row].double(), rtol=1e-3, atol=1e-6
        )


def test_many_outputs_keep_to_their_memory():
    layer = BilinearLayer(*(torch.randn(*s) for s in ((8, 9), (8, 9), (9, 8), (9,), (9,), (8,))))
    with pytest.raises(ArgumentError, match="take eigen for a few outputs"):
        leading_metric_pairs(
            layer, torch.randn(3, 8), torch.randn(4, 8), lambda row: torch.arange(4), torch.eye(8), memory=1000
        )
