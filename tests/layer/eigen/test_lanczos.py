"""The leading eigenpairs without forming any interaction matrix, against `eigh` of every one in float64.

Two eigensolvers agree where their results are defined: values always; vectors where the value stands apart from the
others. Values are asked for to a relative 1e-4, the default; errors are estimated cautiously, so they keep it.
"""

from dataclasses import replace

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
from bilens.layer.eigen.cost import Cost, Pilot, estimate
from bilens.layer.eigen.lanczos import _random_unit, leading_eigenpairs
from bilens.layer.eigen.pairs import sorted_eigenpairs
from bilens.layer.eigen.refine import InteractionOperator
from bilens.layer.eigen.solve import STATUSES, frobenius_norms, top_eigenpairs
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
    found = leading_eigenpairs(operator, operator.to(search), c, 3, tolerance=1e-5)
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
    found = leading_eigenpairs(operator, operator.to(search), u @ layer.W_out.T, multiplicity, tolerance=1e-6)
    assert found.resolved.all()
    assert_close(found.values, torch.ones(1, multiplicity).double(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("method", SEARCHES)
def test_a_spectrum_where_everything_is_repeated(method):
    block = with_spectrum(3, random(4, D // 2).tolist())
    layer, u = holding(torch.block_diag(block, block)[None].float())
    assert_leading(sweep(layer, u, 4, method), layer, u)


@pytest.mark.parametrize("search", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("size", [1.02, 1.5, 5.0])
def test_a_start_vector_orthogonal_to_the_largest_eigenvector(search, size):
    start = _random_unit(D, 0, torch.zeros(1, dtype=torch.float64))
    hidden = torch.linalg.qr(torch.stack([start, random(5, D).double()]).T)[0][:, 1]
    base = with_spectrum(6, [1.0, -0.95, *(0.8 * random(7, D - 2).clamp(-1, 1)).tolist()])
    project = torch.eye(D).double() - torch.outer(hidden, hidden)
    matrix = project @ base @ project + size * torch.outer(hidden, hidden)
    layer, u = holding(matrix[None])
    operator = InteractionOperator.of(layer.W_gate.T, layer.W_in.T)
    found = leading_eigenpairs(operator, operator.to(search), u @ layer.W_out.T, 2, tolerance=1e-6, seed=0)
    reference = sorted_eigenpairs(matrix)[0][:2]
    assert_close(found.values[0], reference, rtol=1e-5, atol=0)


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


def test_table_text_and_figure():
    layer, u = decaying(1), random(2, 6, D)
    found = sweep(layer, u)
    frame = found.to_frame()
    columns = ["output", "eigenvalue_1", "eigenvalue_2", "error", "share", "norm", "trace", "status", "steps"]
    assert list(frame.columns) == columns
    assert isinstance(frame, pd.DataFrame)
    assert frame.eigenvalue_1.tolist() == found.values[:, 0].tolist()
    assert repr(found).startswith("EigenSweep(6 outputs, 2 eigenpairs each; ")
    assert "lanczos, as asked" in repr(found)
    assert "ms dense" in repr(found)
    assert sum(found.plot().data[0].y) == 6
    empty = sweep(layer, u[:0])
    assert empty.values.shape == (0, 2)
    assert len(empty.to_frame()) == 0


@pytest.mark.parametrize(("number", "feature", "seed", "k"), [(0, 110, 0, 1), (0, 946, 2, 1), (1, 1181, 4, 2)])
def test_near_ties_of_a_trained_layer_are_not_missed(number, feature, seed, k):
    """The three of some 50,000 in which the pair after the last one wanted was found in its place, 1 to 3 % smaller."""
    sae = bilens.load_sae("ts-tiny", "mlp-out", number)
    layer, u = BilinearLayer.of(bilens.load_model(), number), SAEView(sae).directions("encoder").detach()[[feature]]
    exact = sorted_eigenpairs(interaction_matrix(layer, u).double())[0][:, :k]
    found = top_eigenpairs(layer, u, k, method="lanczos", seed=seed, progress=False).values
    assert_close(found.double(), exact, rtol=TOLERANCE, atol=0)


def test_the_choice_follows_the_cost(monkeypatch):
    cost = estimate(16, 32, 2, torch.float32, torch.device("cpu"))
    assert all(seconds > 0 for seconds in cost.per_output(100).values())
    # The tensor is made once, and blocks are the better, the more steps a spectrum takes.
    slow = Cost(torch.bfloat16, step=1e-5, finish=1e-4, tensor=0.1, block_step=2e-6, block_finish=1e-4, dense=2e-3)
    cheapest = {
        (n, steps): min(slow.per_output(n, Pilot(steps, 1e-4 + 1e-5 * steps)).items(), key=lambda item: item[1])[0]
        for n in (10, 1000)
        for steps in (10, 50)
    }
    assert cheapest == {(10, 10): "lanczos", (10, 50): "lanczos", (1000, 10): "lanczos", (1000, 50): "block"}
    assert cost is estimate(16, 32, 2, torch.float32, torch.device("cpu"))
    # The spectrum is learnt from a first chunk, unless blocks are faster whatever it is.
    for costs, known in ((slow, False), (replace(slow, tensor=0.0), True)):
        monkeypatch.setattr("bilens.layer.eigen.solve.estimate", lambda *_, costs=costs: costs)
        method = sweep(gaussian(0), random(1, 300, D), method="auto").method
        assert method.startswith("block, 1") if known else ", as a first 64 took lanczos " in method
    # More than a quarter of all pairs is a whole spectrum.
    assert "dense" in sweep(gaussian(0, 16, 32), random(1, 3, 16), 5, "auto").method.split(";")[0]


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
    ],
)
def test_bad_input(change, error, message):
    arguments = {"layer": gaussian(0), "u": random(1, 2, D)} | change
    with pytest.raises(error, match=message):
        sweep(**arguments)
