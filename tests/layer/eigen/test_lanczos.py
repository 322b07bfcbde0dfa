"""The leading eigenpairs without forming any interaction matrix, against `eigh` of every one in float64.

Two eigensolvers agree where their results are defined: values always; vectors where the value stands apart from the
others. Values are asked for to a relative 1e-4, the default; errors are estimated cautiously, so they keep it.
"""

import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

import bilens
from bilens.errors import ArgumentError, OutOfRangeError, SAEMismatchError
from bilens.layer import inner
from bilens.layer.bilinear import BilinearLayer, interaction_matrix
from bilens.layer.eigen import blocks, lanczos, refine, solve
from bilens.layer.eigen.lanczos import _Lanczos, _random_unit, leading_eigenpairs
from bilens.layer.eigen.pairs import sorted_eigenpairs
from bilens.layer.eigen.refine import InteractionOperator, Wanted, errors_of
from bilens.layer.eigen.solve import STATUSES, frobenius_norms, operations, top_eigenpairs
from bilens.sae.view import SAEView

D, M = 96, 256
seeds = st.integers(0, 2**31)
TOLERANCE = 1e-4
SEARCHES = ["lanczos", "block"]


def random(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layer_of(left, right, out):
    """A layer from branch rows (d_mlp, d_model) and output directions (d_mlp, d_model)."""
    m, d = left.shape
    zeros = left.new_zeros
    return BilinearLayer(left.T.contiguous(), right.T.contiguous(), out, zeros(m), zeros(m), zeros(d))


def gaussian(seed, d=D, m=M):
    return layer_of(random(seed, m, d), random(seed + 1, m, d), random(seed + 2, m, d))


def decaying(seed, d=D, m=M):
    one, two = (torch.linalg.qr(random(seed + i, d, d))[0] for i in (3, 4))
    shrink = one * torch.arange(1, d + 1) ** -0.5 @ two
    scale = torch.exp(-torch.linspace(0, 3, d))
    return layer_of(random(seed, m, d) @ shrink, random(seed + 1, m, d) @ shrink, random(seed + 2, m, d) * scale)


def holding(matrices):
    """A layer whose output `e_i` has the interaction matrix `matrices[i]`: `Q = sum_j lambda_j v_j v_j^T`."""
    values, columns = torch.linalg.eigh(matrices)
    n, d = values.shape
    rows = columns.mT.reshape(n * d, d)
    out = torch.zeros(n * d, d, dtype=matrices.dtype)
    out[torch.arange(n * d), torch.arange(n).repeat_interleave(d)] = values.flatten()
    return layer_of(rows, rows, out), torch.eye(d, dtype=matrices.dtype)[:n]


def with_spectrum(seed, values):
    basis = torch.linalg.qr(random(seed, len(values), len(values)).double())[0]
    return basis * torch.tensor(values, dtype=torch.float64) @ basis.T


def expected(layer, u):
    return sorted_eigenpairs(interaction_matrix(layer.to(torch.float64), u.double()))


def sweep(layer, u, k=2, method="lanczos", **options):
    return top_eigenpairs(layer, u, k, method=method, progress=False, **options)


def assert_leading(found, layer, u, tolerance=TOLERANCE):
    """Sizes, residuals and orthogonality; and the sign, where no opposite value is as large up to the tolerance."""
    k = found.values.shape[1]
    values, _ = expected(layer, u)
    size = values.abs()
    bound = tolerance * size[:, :k] + 1e-5 * size[:, :1]
    assert ((found.values.double().abs() - size[:, :k]).abs() <= bound).all()
    Q = interaction_matrix(layer.to(torch.float64), u.double())
    vectors = found.vectors.double()
    residual = (vectors @ Q - found.values.double()[..., None] * vectors).norm(dim=2)
    # Rounding of float32 products, relative to the norm that they are computed at.
    assert (residual <= found.residuals.double() * 1.01 + 1e-5 * found.norms.double()[:, None] + 1e-12).all()
    assert_close(vectors @ vectors.mT, torch.eye(k).double().expand(len(u), k, k), atol=1e-5, rtol=0)
    largest = found.vectors.abs().argmax(-1, keepdim=True)
    assert (found.vectors.gather(-1, largest) > 0).all()


# --- against eigh -----------------------------------------------------------------------------------------------------


@settings(max_examples=8)
@given(seeds, st.sampled_from([gaussian, decaying]), st.integers(1, 5), st.sampled_from(SEARCHES))
def test_the_leading_pairs_are_those_of_eigh(seed, make, k, method):
    layer, u = make(seed), random(seed + 9, 24, D)
    found = sweep(layer, u, k, method)
    assert_leading(found, layer, u)
    values, vectors = expected(layer, u)
    apart = (values.abs()[:, : k + 1].diff(dim=1).abs().amin(1) > 0.02 * values[:, 0].abs())[:, None].expand(-1, k)
    # Where nothing is within 2 percent: the sine of the angle is at most the residual over that gap.
    cosines = (found.vectors.double() * vectors[:, :k]).sum(-1)[apart].abs()
    assert (cosines > 1 - 1e-3).all()
    assert_close(found.values.double()[apart], values[:, :k][apart], rtol=TOLERANCE, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("search", [torch.bfloat16, torch.float32, torch.float64])
def test_the_dtype_of_the_search_does_not_matter(dtype, search):
    layer, u = decaying(0).to(dtype), random(1, 16, D).to(dtype)
    operator = InteractionOperator.of(layer.W_gate.T, layer.W_in.T)
    c = u @ layer.W_out.T / frobenius_norms(layer, u)[:, None]
    found = leading_eigenpairs(operator, operator.to(search), c, Wanted(3, 1e-5), u.new_zeros(16))
    assert found.resolved.all()
    assert found.values.dtype == dtype
    reference = expected(layer, u)[0][:, :3] / frobenius_norms(layer, u)[:, None]
    assert_close(found.values.double(), reference.double(), rtol=2e-5, atol=0)


def test_float64_reaches_small_tolerances():
    layer, u = gaussian(3).to(torch.float64), random(4, 8, D).double()
    found = sweep(layer, u, tolerance=1e-10)
    assert_close(found.values, expected(layer, u)[0][:, :2], rtol=1e-10, atol=0)


@pytest.mark.parametrize("method", SEARCHES)
@pytest.mark.parametrize("layer", range(4))
def test_the_bundled_model(layer, method):
    model = bilens.load_model()
    weights = BilinearLayer.of(model, layer)
    u = SAEView(bilens.load_sae("ts-tiny", "mlp-out", layer)).directions("encoder").detach()[::64]
    found = sweep(weights, u, method=method)
    assert_leading(found, weights, u)
    assert set(found.status.tolist()) == {STATUSES.index("converged")}


@pytest.mark.parametrize("method", [*SEARCHES, "dense", "auto"])
@pytest.mark.parametrize("d", [1, 2, 5, 13])
def test_small_layers_and_all_pairs(d, method):
    layer, u = gaussian(5, d, 2 * d), random(6, 7, d)
    for k in {1, d}:
        assert_leading(sweep(layer, u, k, method), layer, u)


@pytest.mark.parametrize("method", [*SEARCHES, "dense", "auto"])
@pytest.mark.parametrize("k", [2, 5, 12, 13, D])
def test_layers_of_few_hidden_units(method, k):
    """Six units make rank twelve: pairs of that many are found where the units read, those beyond are zero."""
    layer, u = gaussian(5, D, 6), random(6, 7, D)
    found = sweep(layer, u, k, method)
    assert_leading(found, layer, u)
    assert found.vectors.isfinite().all()
    assert (found.values[:, 12:].abs() <= 1e-6 * found.norms[:, None]).all()
    if method == "auto" and k > 3:  # more than a quarter of the pairs that there are
        assert found.method == "dense"


def test_methods_agree():
    layer, u = gaussian(8), random(9, 20, D)
    dense = sweep(layer, u, method="dense")
    for method in SEARCHES:
        assert_close(sweep(layer, u, method=method).values.abs(), dense.values.abs(), rtol=TOLERANCE, atol=0)
    assert (dense.status == STATUSES.index("dense")).all()
    assert (dense.steps == 0).all()


# --- where Lanczos goes wrong -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", SEARCHES)
def test_plus_minus_pairs_have_the_positive_value_first(method):
    """`Q = (a b^T + b a^T) / 2` with `a` orthogonal to `b`: the eigenvalues are exactly plus and minus a half."""
    left, right = torch.linalg.qr(random(0, D, 2))[0].T
    layer = layer_of(left[None], right[None], torch.eye(D)[:1])
    found = sweep(layer, torch.eye(D)[:1], method=method)
    assert_close(found.values, torch.tensor([[0.5, -0.5]]), rtol=TOLERANCE, atol=0)
    assert_close((found.vectors[0] @ (left + right)).abs(), torch.tensor([2**0.5, 0.0]), atol=0.01, rtol=0)
    assert sweep(layer, torch.eye(D)[:1], 1, method).values.item() == pytest.approx(0.5, rel=TOLERANCE)


@settings(max_examples=6)
@given(seeds, st.sampled_from([0.0, 1e-6, 1e-4, 1e-3, 1e-2]), st.sampled_from([1, 2, 3]), st.sampled_from(SEARCHES))
def test_near_ties(seed, gap, k, method):
    """Values of either sign closer to each other than the search can tell."""
    tail = (0.5 * random(seed, D - 4).clamp(-1.5, 1.5)).tolist()
    matrix = with_spectrum(seed, [1.0, -1.0 + gap, 1.0 - 2 * gap, -1.0 + 3 * gap, *tail])
    layer, u = holding(matrix[None].float())
    assert_leading(sweep(layer, u, k, method), layer, u)


@pytest.mark.parametrize("multiplicity", [2, 3, 5])
@pytest.mark.parametrize("search", [torch.bfloat16, torch.float64])
def test_repeated_eigenvalues(multiplicity, search):
    """In exact arithmetic Lanczos finds one vector of every eigenspace."""
    tail = (0.6 * random(1, D - multiplicity).clamp(-1.5, 1.5)).tolist()
    layer, u = holding(with_spectrum(2, [1.0] * multiplicity + tail)[None])
    operator = InteractionOperator.of(layer.W_gate.T, layer.W_in.T)
    nothing = u.new_zeros(1)
    found = leading_eigenpairs(operator, operator.to(search), u @ layer.W_out.T, Wanted(multiplicity, 1e-6), nothing)
    # Rounding brings in the others, the last of them so late that the search may end before: it says so.
    assert found.resolved.all() or multiplicity > 2
    values = found.values[found.resolved]
    assert_close(values, torch.ones_like(values), atol=1e-6, rtol=0)


@pytest.mark.parametrize("method", SEARCHES)
def test_a_spectrum_where_everything_is_repeated(method):
    block = with_spectrum(3, random(4, D // 2).tolist())
    layer, u = holding(torch.block_diag(block, block)[None].float())
    assert_leading(sweep(layer, u, 4, method), layer, u)


@pytest.mark.parametrize("search", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("coarse", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", [1.02, 1.5, 5.0])
def test_a_start_vector_orthogonal_to_the_largest_eigenvector(search, coarse, size):
    """Vectors rounded to float32 mix in so little of it that only the probe sees it in time."""
    start = _random_unit(D, 0, torch.zeros(1, dtype=torch.float64))
    hidden = torch.linalg.qr(torch.stack([start, random(5, D).double()]).T)[0][:, 1]
    base = with_spectrum(6, [1.0, -0.95, *(0.8 * random(7, D - 2).clamp(-1, 1)).tolist()])
    project = torch.eye(D).double() - torch.outer(hidden, hidden)
    matrix = project @ base @ project + size * torch.outer(hidden, hidden)
    layer, u = holding(matrix[None])
    operator = InteractionOperator.of(layer.W_gate.T, layer.W_in.T)
    c, wanted = u @ layer.W_out.T, Wanted(2, 1e-6)
    found = leading_eigenpairs(operator, operator.to(search), c, wanted, u.new_zeros(1), coarse=coarse)
    reference = sorted_eigenpairs(matrix)[0][:2]
    assert_close(found.values[0], reference, rtol=1e-5, atol=0)


def test_only_the_probe_sees_what_the_start_vector_has_nothing_of(monkeypatch):
    """The largest eigenvector is a coordinate that nothing else reads, which rounding does not mix in, either."""
    draw = lanczos._random_unit

    def without_first(d, seed, like):
        vector = draw(d, seed, like)
        vector[0] *= seed != 0  # the search's start; the probe has another
        return vector / vector.norm()

    monkeypatch.setattr(lanczos, "_random_unit", without_first)
    rest = torch.linalg.qr(random(5, D - 1, D - 1))[0].T
    rows = torch.block_diag(torch.ones(1, 1), rest)
    out = torch.zeros(D, D)
    out[:, 0] = torch.cat([torch.tensor([2.0, 1.0, -0.9]), 0.2 * random(7, D - 3)])
    found = sweep(layer_of(rows, rows, out), torch.eye(D)[:1])
    assert_close(found.values, torch.tensor([[2.0, 1.0]]), rtol=TOLERANCE, atol=0)


@pytest.mark.parametrize("method", SEARCHES)
def test_low_rank_and_zero_outputs(method):
    layer = gaussian(1)
    layer.W_out[:, :4] = 0.0
    for rank in (1, 2, 3):
        layer.W_out[:rank, rank] = torch.arange(1, rank + 1).float()
    u = torch.eye(D)[:5]
    found = sweep(layer, u, 3, method)
    assert_leading(found, layer, u)
    assert found.values[0].tolist() == [0.0, 0.0, 0.0]
    assert found.shares[0] == 1.0
    assert STATUSES[found.status[0]] == "bounded"
    # One hidden unit makes rank two, of which two pairs are everything.
    assert found.shares[1].item() == pytest.approx(1.0, abs=1e-5)
    assert STATUSES[sweep(layer, u, 2, method).status[1]] == "bounded"


@pytest.mark.parametrize("method", SEARCHES)
@pytest.mark.parametrize("scale", [1e-18, 1e-6, 1e6, 1e15])
def test_the_scale_of_the_weights_does_not_matter(scale, method):
    layer, u = decaying(2), random(3, 6, D)
    found, reference = (sweep(layer, v, method=method) for v in (scale * u, u))
    assert_close(found.values / scale, reference.values, rtol=TOLERANCE, atol=0)


@pytest.mark.parametrize("method", SEARCHES)
def test_an_output_of_rank_one_among_outputs_with_flat_spectra(method):
    # A block's filters have the median output's degree, high for flat spectra; one of rank one grows without bounds.
    eye = torch.eye(D)
    layer, u = layer_of(eye, eye, eye), torch.ones(5, D)
    u[1, : D // 2], u[2] = -1, eye[0]
    found = sweep(layer, u, method=method)
    assert_close(found.values[:3].abs(), torch.tensor([[1.0, 1.0], [1.0, 1.0], [1.0, 0.0]]), rtol=TOLERANCE, atol=1e-6)


# --- behind a giant one -----------------------------------------------------------------------------------------------


def giant(seed, size, d=D, n=24, tied=False):
    """`Q_n = V diag(S_n) V^T`, whose first eigenvalue is 1, the others about `size`, or tied."""
    basis, values = torch.linalg.qr(random(seed, d, d))[0].T.contiguous(), size * random(seed + 1, n, d)
    values[:, 0] = 1.0
    if tied:
        values[:, 1:5] = 5 * size * torch.tensor([1.0, -1.0, 1.0, 1 - 1e-3])
    out = torch.zeros(d, d)
    out[:, :n] = values.T
    return layer_of(basis, basis, out), torch.eye(d)[:n]


def assert_honest(found, layer, u, order="size", tolerance=TOLERANCE):
    """Every value is exact to the tolerance of itself, and to its own stated error."""
    exact = torch.linalg.eigvalsh(interaction_matrix(layer.to(torch.float64), u.double()))
    exact = {"size": exact.abs(), "positive": exact, "negative": -exact}[order].sort(dim=1, descending=True).values
    values, exact = found.values.double(), exact[:, : found.values.shape[1]]
    values = {"size": values.abs(), "positive": values, "negative": -values}[order]
    assert ((values - exact).abs() <= found.errors).all()
    Q, vectors = interaction_matrix(layer.to(torch.float64), u.double()), found.vectors.double()
    assert ((vectors @ Q - found.values.double()[..., None] * vectors).norm(dim=2) <= found.residuals).all()
    assert (found.errors <= (tolerance + 1e-6) * found.values.double().abs()).all()


@pytest.mark.parametrize("method", [*SEARCHES, "dense", "auto"])
@pytest.mark.parametrize("size", [0.1, 1e-2, 1e-3, 1e-4, 1e-6])
@pytest.mark.parametrize("tied", [False, True])
def test_pairs_behind_a_giant_one(method, size, tied):
    layer, u = giant(3, size, tied=tied)
    found = sweep(layer, u, 3, method)
    assert_honest(found, layer, u)
    assert_leading(found, layer, u)
    if method == "lanczos":  # without forming any matrix
        assert set(found.status.tolist()) == {STATUSES.index("converged")}
    if tied:  # 5, -5, 5 and 5 (1 - 1e-3): a positive one comes first
        assert_close(found.values[:, 1], torch.full((24,), 5 * size), rtol=TOLERANCE, atol=0)


@pytest.mark.parametrize("method", [*SEARCHES, "dense"])
def test_directions_whose_coefficients_cancel(method):
    """All but what is behind a giant one is left of numbers of order one: float32 would have it off by a tenth."""
    layer, u = giant(3, 1e-6)
    layer.W_out[:, D - 1] = random(5, D)
    rotation = torch.linalg.qr(random(6, D, D))[0]
    layer, u = layer_of(layer.W_gate.T, layer.W_in.T, layer.W_out @ rotation), u @ rotation
    assert_honest(sweep(layer, u, 3, method), layer, u)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_block_misses_nothing_that_its_filters_have_taken_out(monkeypatch, dtype):
    """The pairs after the first are in the bulk of the first filters, which is too large here, some at their zeros."""
    monkeypatch.setattr(solve, "search_dtype", lambda *_: dtype)
    monkeypatch.setattr(blocks, "BULK", 2.0)
    for seed in (3, 13, 23):
        layer, u = giant(seed, 0.1)
        assert_honest(sweep(layer, u, 3, "block"), layer, u)


@pytest.mark.parametrize("order", ["positive", "negative"])
@pytest.mark.parametrize("method", ["lanczos", "dense"])
def test_pairs_by_sign_behind_a_giant_one(method, order):
    for size in (1e-4, 1.0):
        layer, u = giant(4, size)
        for side in (u, -u):
            assert_honest(sweep(layer, side, 2, method, order=order), layer, side, order)


def test_a_giant_too_large_for_float64_is_said():
    layer, u = giant(5, 1e-14)
    found = sweep(layer, u)
    exact = torch.linalg.eigvalsh(interaction_matrix(layer.to(torch.float64), u.double())).abs().sort(descending=True)
    exact = exact.values[:, :2]
    # `eigh` in float64 is no more exact than that, either.
    assert ((found.values.double().abs() - exact).abs() <= 2 * found.errors).all()
    assert (found.errors[:, 1] > TOLERANCE * found.values[:, 1].abs()).all()
    assert {STATUSES[i] for i in found.status.tolist()} == {"dense"}


@pytest.mark.parametrize("method", SEARCHES)
def test_hidden_units_that_cancel(method):
    """To a millionth, in pairs: in float32 next to nothing is right, neither the products nor the norms."""
    small, twice = gaussian(6, D, M), gaussian(7, D, M)
    layer = layer_of(
        twice.W_gate.T.repeat(2, 1),
        twice.W_in.T.repeat(2, 1),
        torch.cat([twice.W_out + 1e-6 * small.W_out, -twice.W_out]),
    )
    u = random(8, 12, D)
    found = sweep(layer, u, method=method)
    assert_honest(found, layer, u)
    norms = torch.linalg.matrix_norm(interaction_matrix(layer.to(torch.float64), u.double()))
    assert_close(found.norms.double(), norms, rtol=1e-6, atol=0)


@pytest.mark.parametrize("method", [*SEARCHES, "dense"])
def test_layers_of_extreme_weights(method):
    """Scaled by powers of two whose squares float32 does not hold: the same numbers to the bit but for exponents."""
    layer, u = decaying(9), random(10, 6, D)
    reference = sweep(layer, u, method=method)
    units, columns = 2.0 ** random(11, M).mul(8).round(), 2.0 ** random(12, D).mul(8).round()
    for left, right, out, power in [
        (2.0**30, 2.0**30, 2.0**30, 90),
        (2.0**-30, 2.0**-30, 2.0**-30, -90),
        (2.0**80, 2.0**-90, 2.0**10, 0),
    ]:
        other = BilinearLayer(
            layer.W_gate * left * units,
            layer.W_in * right / units,
            layer.W_out * out * columns,
            layer.b_gate,
            layer.b_in,
            layer.b_out,
        )
        found = sweep(other, u / columns, method=method)
        assert torch.equal(found.values, reference.values * 2.0**power)
        assert torch.equal(found.vectors, reference.vectors)
        assert torch.equal(found.norms, reference.norms * 2.0**power)
        assert torch.equal(found.shares, reference.shares)
        assert torch.equal(found.missed_bound, reference.missed_bound * 2.0**power)


# --- by sign ----------------------------------------------------------------------------------------------------------


@settings(max_examples=6)
@given(seeds, st.sampled_from([gaussian, decaying]), st.integers(1, 4), st.sampled_from(["positive", "negative"]))
def test_the_leading_pairs_of_one_sign(seed, make, k, order):
    layer, u = make(seed), random(seed + 9, 16, D)
    found = sweep(layer, u, k, order=order)
    assert_honest(found, layer, u, order)
    Q, vectors = interaction_matrix(layer.to(torch.float64), u.double()), found.vectors.double()
    residual = (vectors @ Q - found.values.double()[..., None] * vectors).norm(dim=2)
    assert (residual <= found.residuals + 1e-6 * found.norms[:, None]).all()
    assert_close(found.traces.double(), Q.diagonal(dim1=1, dim2=2).sum(1), atol=1e-3, rtol=1e-4)


def test_fewer_pairs_of_a_sign_than_asked_for():
    layer, u = holding(with_spectrum(1, [3.0, *(-random(2, D - 1).abs() - 0.1).tolist()])[None].float())
    assert_honest(sweep(layer, u, 3, order="positive"), layer, u, "positive")


# --- the parts --------------------------------------------------------------------------------------------------------


def test_the_basis_stays_orthonormal_behind_a_giant_one():
    layer, u = giant(1, 1e-6, n=3)
    layer, u = layer.to(torch.float64), u.double()
    operator = InteractionOperator.of(layer.W_gate.T, layer.W_in.T)
    run = _Lanczos(operator, 0.5 * u @ layer.W_out.T, u.new_zeros(3, 0, D), Wanted(2, 1e-4), torch.float32, 0)
    run.advance(40)
    assert_close(run.basis @ run.basis.mT, torch.eye(41).double().expand(3, 41, 41), atol=1e-12, rtol=0)


def test_a_correction_takes_the_residuals_down(monkeypatch):
    """`(Q - lambda)^-1` as the search knows it: the residuals left are several times smaller."""
    layer, u = gaussian(2).to(torch.float64), random(3, 8, D).double()
    u = u / frobenius_norms(layer, u)[:, None]
    residuals = {}
    for rounds in (0, 1):
        monkeypatch.setattr(refine, "REFINEMENTS", rounds)
        operator = InteractionOperator.of(layer.W_gate.T, layer.W_in.T)
        # Vectors are rounded to bfloat16, so that the search alone leaves residuals of a thousandth.
        found = leading_eigenpairs(operator, operator, u @ layer.W_out.T, Wanted(2, 1e-13), u.new_zeros(8))
        residuals[rounds] = found.residuals.amax(1)
    assert (residuals[1] < 0.4 * residuals[0]).all()


def test_an_error_is_never_more_than_the_residual():
    values, residuals = torch.tensor([[1.0, 0.5]]), torch.tensor([[1e-2, 1e-2]])
    spectrum, outside = torch.tensor([[0.9999, 0.1]]), torch.zeros(1, 2, dtype=torch.bool)
    # Next to a value of the spectrum the residual is the bound; far from all, its square over the gap.
    found = errors_of(values, residuals, spectrum[:, :1], outside[:, :1])
    assert_close(found, torch.tensor([[1e-2, 1e-4 / 0.4999]]))
    # A gap that may be blurred away is none.
    assert_close(errors_of(values, residuals, spectrum[:, :1], outside[:, :1], 0.5), torch.tensor([[1e-2, 1e-2]]))


@pytest.mark.parametrize(("seed", "of_tail"), [(1, 2), (50, 0)])
def test_more_near_ties_than_are_carried_along_are_solved_otherwise(seed, of_tail):
    crowd = (1 - 1e-4 * torch.arange(12)).tolist()
    tail = (0.5 * random(of_tail, D - 12).clamp(-1.5, 1.5)).tolist()
    layer, u = holding(with_spectrum(seed, [*crowd, *tail])[None].float())
    for method in SEARCHES:
        assert_honest(sweep(layer, u, 2, method), layer, u)


# --- invariances ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", SEARCHES)
def test_a_result_does_not_depend_on_the_rest_of_the_batch(method):
    layer, u = gaussian(10), random(11, 40, D)
    together = sweep(layer, u, method=method)
    for rows in ([3], [7, 3, 31], list(range(39, -1, -1))):
        alone = sweep(layer, u[rows], method=method)
        assert_close(alone.values, together.values[rows], rtol=TOLERANCE, atol=0)
        if method == "lanczos":  # a block's degrees are those of the median output
            assert (alone.steps == together.steps[rows]).float().mean() > 0.8


def test_the_same_seed_gives_the_same_bits():
    layer, u = gaussian(12), random(13, 10, D)
    first, second = sweep(layer, u, seed=3), sweep(layer, u, seed=3)
    assert torch.equal(first.vectors, second.vectors)
    assert_close(sweep(layer, u, seed=4).values.abs(), first.values.abs(), rtol=TOLERANCE, atol=0)


@settings(max_examples=4)
@given(seeds, st.sampled_from(SEARCHES))
def test_swapped_branches_rescaled_units_and_rotated_bases(seed, method):
    layer, u = gaussian(seed), random(seed + 5, 8, D)
    values = sweep(layer, u, method=method).values.abs()
    left, right, out = layer.W_gate.T, layer.W_in.T, layer.W_out
    factor = random(seed + 6, M, 1).exp()
    rotation = torch.linalg.qr(random(seed + 7, D, D))[0]
    for other, directions in [
        (layer_of(right, left, out), u),
        (layer_of(left * factor, right / factor, out), u),
        (layer_of(left @ rotation, right @ rotation, out), u),
        (layer_of(left, right, out @ rotation), u @ rotation),
    ]:
        assert_close(sweep(other, directions, method=method).values.abs(), values, rtol=2 * TOLERANCE, atol=0)


@pytest.mark.parametrize("method", SEARCHES)
def test_memory_and_chunks_do_not_change_the_result(method):
    layer, u = gaussian(14), random(15, 300, D)
    seen = []
    whole = sweep(layer, u, method=method)
    chunked = top_eigenpairs(
        layer, u, method=method, memory=2**26, progress=lambda done, total: seen.append((done, total))
    )
    assert_close(chunked.values.abs(), whole.values.abs(), rtol=TOLERANCE, atol=0)
    assert seen[-1] == (300, 300)
    assert seen == sorted(seen)


# --- the numbers beside -----------------------------------------------------------------------------------------------


@given(seeds)
def test_norms_traces_shares_and_the_bound(seed):
    layer, u = gaussian(seed, 12, 20), random(seed + 1, 5, 12)
    found = sweep(layer, u, 3, "dense")
    Q = interaction_matrix(layer.to(torch.float64), u.double())
    norms = torch.linalg.matrix_norm(Q)
    assert_close(found.norms.double(), norms, rtol=1e-5, atol=0)
    assert_close(found.norms.double(), inner.norms(layer, u), rtol=1e-5, atol=0)
    assert_close(found.traces.double(), Q.diagonal(dim1=1, dim2=2).sum(-1), atol=1e-3, rtol=1e-5)
    values = sorted_eigenpairs(Q)[0]
    assert_close(found.shares.double(), (values[:, :3] ** 2).sum(1) / norms**2, rtol=1e-5, atol=0)
    assert (found.missed_bound.double() >= values[:, 3].abs()).all()
    # And no looser than float32 makes it.
    left = (values[:, 3:] ** 2).sum(1) / norms**2
    assert (found.missed_bound.double() / norms <= (left + 2e-5).sqrt()).all()


@pytest.mark.parametrize(("second", "status"), [(0.7, "bounded"), (0.71, "converged")])
def test_a_pair_is_bounded_where_the_norm_leaves_no_room_for_a_larger_one(second, status):
    """`1, s, s`: what is left of the squared norm is `2 s^2`, less than one up to `s = 0.7071`."""
    out = torch.zeros(D, D)
    out[:3, 0] = torch.tensor([1.0, second, second])
    layer, u = layer_of(torch.eye(D), torch.eye(D), out), torch.eye(D)[:1]
    assert STATUSES[sweep(layer, u, 1).status] == status
    assert STATUSES[sweep(layer, u, 1, "dense").status] == "dense"


def test_table_text_and_figure():
    layer, u = decaying(1), random(2, 6, D)
    found = sweep(layer, u)
    frame = found.to_frame()
    columns = ["output", "eigenvalue_1", "eigenvalue_2", "error", "share", "norm", "trace", "status", "steps"]
    assert list(frame.columns) == columns
    assert isinstance(frame, pd.DataFrame)
    assert frame.eigenvalue_1.tolist() == found.values[:, 0].tolist()
    assert repr(found).startswith("LeadingEigenpairs(6 outputs, 2 eigenpairs each; ")
    assert "lanczos, as asked" in repr(found)
    assert "searching in" in repr(found)
    assert sum(found.plot().data[0].y) == 6
    empty = sweep(layer, u[:0])
    assert empty.values.shape == (0, 2)
    assert len(empty.to_frame()) == 0


@pytest.mark.parametrize(
    ("number", "feature", "seed", "k"), [(0, 110, 0, 1), (0, 946, 2, 1), (0, 722, 4, 1), (1, 1181, 4, 2)]
)
def test_near_ties_of_a_trained_layer_are_not_missed(number, feature, seed, k):
    """Those of some 50,000 in which the pair after the last one wanted was found in its place, 1 to 3 % smaller."""
    sae = bilens.load_sae("ts-tiny", "mlp-out", number)
    layer, u = BilinearLayer.of(bilens.load_model(), number), SAEView(sae).directions("encoder").detach()[[feature]]
    exact = sorted_eigenpairs(interaction_matrix(layer, u).double())[0][:, :k]
    found = top_eigenpairs(layer, u, k, method="lanczos", seed=seed, progress=False).values
    assert_close(found.double(), exact, rtol=TOLERANCE, atol=0)


def test_eigen_of_many_features_forms_no_matrix(monkeypatch):
    """As many numbers as the sweep finds, to the bit, in either order, and to its tolerance those of `eigh`."""
    model = bilens.load_model()
    decomposer = bilens.Decomposer(model, 3, output_sae=bilens.load_sae("ts-tiny", "mlp-out", 3))
    features = torch.arange(0, 2048, 32)
    every = decomposer.interaction(features).double()
    monkeypatch.setattr("bilens.decompose.decomposer.interaction_matrix", None)
    monkeypatch.setattr("bilens.layer.eigen.solve.sorted_eigenpairs", None)
    found = decomposer.eigen(features, k=2)
    assert torch.equal(found.values, decomposer.spectra(features, k=2, progress=False).eigen.values)
    assert torch.equal(found.vectors, decomposer.eigen(features, k=2).vectors)
    assert_close(found.norms.double(), torch.linalg.matrix_norm(every), rtol=1e-5, atol=0)
    assert_close(found.values.abs().double(), sorted_eigenpairs(every, 2)[0].abs(), rtol=TOLERANCE, atol=0)
    lowest = decomposer.eigen(features, k=3, order="negative")
    assert_close(lowest.values.double(), torch.linalg.eigvalsh(every)[:, :3], rtol=TOLERANCE, atol=0)
    with pytest.raises(ArgumentError, match=r"needs 545,259,520 bytes, and memory is 1,000"):
        decomposer.eigen(torch.arange(2048), memory=1000)


def test_the_method_follows_the_shapes_and_the_steps(monkeypatch):
    def fewest(d_model, d_mlp, n, k=2, steps=30, names=("lanczos", "block", "dense")):
        count = operations(d_model, d_mlp, n, k, steps)
        return min(names, key=lambda name: count[name])

    # Few outputs, small layers and many pairs are solved whole; blocks share their tensor among many outputs.
    assert fewest(256, 1024, 1) == fewest(16, 64, 512) == fewest(256, 1024, 2048, 64, 340) == "dense"
    assert fewest(512, 2048, 2048, steps=18) == fewest(512, 2048, 64, steps=40) == "lanczos"
    assert fewest(512, 2048, 2048, steps=40) == fewest(256, 1024, 2048, steps=18) == "block"

    # The spectrum is learnt from a first chunk, where blocks are possible and Lanczos may be better.
    layer, u = decaying(0), random(1, 300, D)
    methods = {}
    for dtype in (torch.float32, torch.bfloat16):
        monkeypatch.setattr(solve, "search_dtype", lambda *_, dtype=dtype: dtype)
        monkeypatch.setattr(solve, "operations", lambda *_: {"lanczos": _[-1], "block": 25, "dense": 1000})
        methods[dtype] = [sweep(x, u, method="auto").method.split(",")[0] for x in (layer, gaussian(0))]
        assert ("as a first 64 took lanczos " in sweep(layer, u, method="auto").method) == (dtype == torch.bfloat16)
    assert methods == {torch.float32: ["lanczos", "lanczos"], torch.bfloat16: ["lanczos", "block"]}
    # More than a quarter of all pairs is a whole spectrum.
    monkeypatch.undo()
    assert sweep(gaussian(0, 16, 32), random(1, 3, 16), 5, "auto").method == "dense"
    # Blocks look for absolute values only.
    found = top_eigenpairs(layer, u[:3], method="block", order="positive", progress=False)
    assert found.method.startswith("lanczos, as asked")


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"k": 0}, OutOfRangeError, "k is 0, expected 1 to 96"),
        ({"k": 97}, OutOfRangeError, "k is 97, expected 1 to 96"),
        ({"u": torch.zeros(3, 95)}, SAEMismatchError, r"shape \(3, 95\): expected \(n, 96\)"),
        ({"u": torch.zeros(96)}, SAEMismatchError, r"shape \(96,\)"),
        ({"u": torch.full((2, 96), torch.nan)}, ArgumentError, "NaN or infinite"),
        ({"tolerance": 0.0}, ArgumentError, "tolerance is 0.0"),
        ({"tolerance": float("nan")}, ArgumentError, "tolerance is nan"),
        (
            {"method": "lanzcos"},
            ArgumentError,
            "'lanzcos', expected one of 'auto', 'lanczos', 'block', 'dense'. Did you mean 'lan",
        ),
        ({"memory": 1000}, ArgumentError, "memory is 1,000 bytes.*needs"),
        ({"order": "negativ"}, ArgumentError, "order is 'negativ', expected one of .*Did you mean 'negative'"),
        ({"layer": layer_of(*torch.full((3, M, D), torch.inf))}, ArgumentError, "W_gate hold NaN or infinite"),
        ({"layer": layer_of(*torch.full((3, M, D), 1e30))}, ArgumentError, "eigenvalues of 2 outputs.* too large"),
    ],
)
def test_bad_input(change, error, message):
    arguments = {"layer": gaussian(0), "u": random(1, 2, D)} | change
    with pytest.raises(error, match=message):
        sweep(**arguments)
