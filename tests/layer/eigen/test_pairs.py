"""Eigencircuits: order, signs, what they add up to, and the authors' numbers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from bilens.decompose import Decomposer
from bilens.errors import ArgumentError, MissingSAEError, OutOfRangeError
from bilens.layer.eigen.pairs import eigh, sorted_eigenpairs
from tests.conftest import make_model
from tests.random_saes import make_sae

D = 16
seeds = st.integers(0, 2**31)


def random(seed, *shape, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def symmetric(seed, *shape):
    matrix = random(seed, *shape, shape[-1])
    return matrix + matrix.mT


@pytest.fixture(scope="module")
def decomposer(models):
    at = "blocks.1"
    return Decomposer(
        models(True, True),
        1,
        make_sae("topk", f"{at}.ln2.hook_normalized", seed=1),
        make_sae("topk", f"{at}.hook_mlp_out", seed=2),
        input_names=[f"in {i}" for i in range(40)],
    )


# --- the solver -------------------------------------------------------------------------------------------------------


@given(seeds, st.integers(1, 24), st.sampled_from([(), (1,), (3,), (2, 2)]))
def test_all_pairs_are_orthonormal_ordered_and_rebuild_the_matrix(seed, d, batch):
    matrix = symmetric(seed, *batch, d)
    values, vectors = sorted_eigenpairs(matrix)
    assert values.shape == (*batch, d)
    assert vectors.shape == (*batch, d, d)
    # float64: eigh is backward stable, so 1e-12 of the norm (order 10) is ample.
    assert_close(vectors @ vectors.mT, torch.eye(d, dtype=torch.float64).expand(*batch, d, d), atol=1e-11, rtol=0)
    assert_close(vectors.mT @ (values[..., None] * vectors), matrix, atol=1e-11, rtol=0)
    assert (values.abs().diff(dim=-1) <= 1e-12).all()
    largest = vectors.abs().argmax(-1, keepdim=True)
    assert (vectors.gather(-1, largest) > 0).all()


@given(seeds, st.integers(2, 24), st.data())
def test_k_takes_the_first(seed, d, data):
    matrix, k = symmetric(seed, d), data.draw(st.integers(1, d))
    values, vectors = sorted_eigenpairs(matrix, k)
    all_values, all_vectors = sorted_eigenpairs(matrix)
    assert torch.equal(values, all_values[:k])
    assert torch.equal(vectors, all_vectors[:k])


@given(seeds, st.integers(2, 24), st.data())
def test_by_sign(seed, d, data):
    matrix, k = symmetric(seed, d), data.draw(st.integers(1, d))
    ascending = torch.linalg.eigvalsh(matrix)
    for order, expected in (("positive", ascending.flip(0)), ("negative", ascending)):
        values, vectors = sorted_eigenpairs(matrix, k, order)
        assert_close(values, expected[:k], atol=1e-11, rtol=0)
        # Of a matrix of norm about d, in float64.
        assert_close(matrix @ vectors.T, vectors.T * values, atol=1e-11, rtol=0)
    with pytest.raises(ArgumentError, match=r"order is 'positiv', expected one of .* 'positive'"):
        sorted_eigenpairs(matrix, k, "positiv")


@pytest.mark.parametrize("k", [0, -1, 5, 100])
def test_k_out_of_range(k):
    with pytest.raises(OutOfRangeError, match=f"k is {k}, expected 1 to 4"):
        sorted_eigenpairs(symmetric(0, 4), k)


@settings(max_examples=60)
@given(
    seeds,
    st.sampled_from([2, 3, 8, 64, 256]),
    st.sampled_from([torch.float32, torch.float64]),
    st.floats(1e-6, 1e6),
)
def test_on_ties_the_positive_one_comes_first(seed, d, dtype, size):
    """`l` orthogonal to `r`: the eigenvalues are exactly `+a` and `-a`, and rounding alone would order them."""
    left, right = torch.linalg.qr(random(seed, d, 2))[0].T.to(dtype)
    values, vectors = sorted_eigenpairs(0.5 * size * (torch.outer(left, right) + torch.outer(right, left)), 2)
    # QR and the cast leave |l|, |r| and l . r off by a few units of rounding.
    tolerance = 32 * torch.finfo(dtype).eps
    assert_close(values / size, torch.tensor([0.5, -0.5], dtype=dtype), atol=tolerance, rtol=0)
    plane = torch.stack([left + right, left - right]) / 2**0.5
    # The two eigenspaces are one apart in units of `size`, so the vectors are as exact as the values.
    assert_close((plane * vectors).sum(-1).abs(), torch.ones(2, dtype=dtype), atol=tolerance, rtol=0)


@given(seeds, st.integers(1, 8))
def test_on_ties_in_every_plane(seed, planes):
    """Several `+-a` pairs in one spectrum: each pair has its positive value first, larger pairs come before smaller."""
    d = 2 * planes + 1
    sizes = torch.arange(planes, 0, -1).to(torch.float32)
    basis = torch.linalg.qr(random(seed, d, d))[0].T.float()
    matrix = torch.zeros(d, d)
    for size, left, right in zip(sizes, basis[0::2], basis[1::2], strict=False):
        matrix += size * (torch.outer(left, right) + torch.outer(right, left))
    values, _ = sorted_eigenpairs(0.5 * (matrix + matrix.T))
    expected = torch.stack([sizes, -sizes], dim=1).flatten()
    assert_close(values[:-1], expected, atol=1e-4, rtol=0)  # float32 rounding of an 8 times larger norm


@given(st.permutations([3.0, -3.001, 1.0, -1.001, 0.5]))
def test_values_that_differ_are_not_taken_for_ties(diagonal):
    values, _ = sorted_eigenpairs(torch.diag(torch.tensor(diagonal)))
    assert_close(values, torch.tensor([-3.001, 3.0, -1.001, 1.0, 0.5]))


def test_equal_values_and_zeros_keep_their_number():
    values, vectors = sorted_eigenpairs(torch.diag(torch.tensor([0.0, 2.0, -2.0, 2.0, 0.0, -2.0])))
    assert values.tolist() == [2.0, 2.0, -2.0, -2.0, 0.0, 0.0]
    assert_close(vectors @ vectors.T, torch.eye(6))
    values, vectors = sorted_eigenpairs(torch.zeros(3, 3))
    assert values.tolist() == [0.0] * 3
    assert_close(vectors @ vectors.T, torch.eye(3))


# --- Eigencircuits ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["encoder", "decoder"])
def test_shapes_for_every_form_of_output(decomposer, side):
    for output, batch in [(3, ()), (torch.tensor(3), ()), (torch.tensor([3]), (1,)), (torch.tensor([3, 0, 3]), (3,))]:
        for k, kept in [(None, D), (2, 2)]:
            eigen = decomposer.eigen(output, k=k, side=side)
            assert eigen.values.shape == (*batch, kept)
            assert eigen.vectors.shape == (*batch, kept, D)
    for directions, batch in [(torch.randn(D), ()), (torch.randn(1, D), (1,)), (torch.randn(5, D), (5,))]:
        assert decomposer.eigen(directions, k=4).vectors.shape == (*batch, 4, D)


def test_eigenpairs_are_those_of_the_interaction_matrix(decomposer):
    Q, eigen = decomposer.interaction(7), decomposer.eigen(7)
    # float32 eigh of a matrix of norm about one.
    assert_close(Q @ eigen.vectors.T, eigen.vectors.T * eigen.values, atol=1e-5, rtol=0)
    lowest = decomposer.eigen(torch.tensor([7, 7]), k=3, order="negative")
    # One matrix and a batch of two are multiplied in other orders: float32 rounding of a norm of about one.
    assert_close(lowest.values[1], eigen.values.sort().values[:3], atol=1e-6, rtol=0)


def test_orthogonal_branches_give_a_plus_minus_pair():
    """The same tie as above, arising in a layer: one hidden unit whose branches are orthogonal."""
    model = make_model()
    decomposer, mlp = Decomposer(model, 0), model.blocks[0].mlp
    left, right = torch.eye(D)[[2, 5]]
    with torch.no_grad():
        mlp.W_gate[:, 0], mlp.W_in[:, 0] = left, right
        mlp.W_out.zero_()
        mlp.W_out[0, 0] = 3.0
    eigen = decomposer.eigen(torch.eye(D)[0])
    assert_close(eigen.values, torch.tensor([1.5, -1.5] + [0.0] * (D - 2)))
    assert_close(eigen.vectors[0], (left + right) / 2**0.5)
    assert_close(eigen.vectors[1].abs(), (left + right) / 2**0.5)


def test_k_is_checked(decomposer):
    for k in (0, D + 1):
        with pytest.raises(OutOfRangeError, match=f"k is {k}, expected 1 to {D}"):
            decomposer.eigen(0, k=k)


@pytest.mark.parametrize("points", [(), (1,), (5,), (2, 5), (2, 1, 3)])
@pytest.mark.parametrize(("output", "batch"), [(4, ()), (torch.tensor([4]), (1,)), (torch.tensor([4, 1, 9]), (3,))])
def test_activations_have_their_shapes_and_add_up_to_the_quadratic_part(decomposer, points, output, batch):
    x = random(0, *points, D, dtype=torch.float32)
    eigen = decomposer.eigen(output)
    activations = eigen.activations(x)
    assert activations.shape == (*points, *batch, D)
    Q = decomposer.interaction(output)
    expected = torch.einsum("...i,nij,...j->...n", x, Q.reshape(-1, D, D), x).reshape((*points, *batch))
    # float32, 16 terms of size up to ten.
    assert_close(activations.sum(-1), expected, atol=1e-4, rtol=1e-4)
    assert decomposer.eigen(output, k=3).activations(x).shape == (*points, *batch, 3)


def test_one_activation_is_lambda_times_the_squared_projection(decomposer):
    x, eigen = random(1, 5, D, dtype=torch.float32), decomposer.eigen(torch.tensor([4, 1]), k=3)
    activations = eigen.activations(x)
    for p in range(5):
        for n in range(2):
            for rank in range(3):
                one = eigen.values[n, rank] * (eigen.vectors[n, rank] @ x[p]) ** 2
                assert_close(activations[p, n, rank], one, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_activations_of_inputs_in_another_precision(decomposer, dtype):
    """A model in half precision caches half-precision inputs; they are read in that of the eigenvectors."""
    eigen, x = decomposer.eigen([1, 2]), random(3, 5, D).to(dtype)
    assert torch.equal(eigen.activations(x), eigen.activations(x.float()))


def test_the_cosines_with_decoder_directions(decomposer):
    eigen, decoder = decomposer.eigen(torch.tensor([2, 8]), k=3), decomposer.input_sae.W_dec.detach()
    expected = torch.nn.functional.cosine_similarity(eigen.vectors[:, :, None], decoder[None, None], dim=-1)
    assert_close(eigen.cosines(), expected, atol=1e-6, rtol=0)
    frame = eigen.in_features(top=4)
    assert list(frame.columns) == ["output", "rank", "eigenvalue", "i", "name", "cosine"]
    assert len(frame) == 2 * 3 * 4
    for (output, rank), rows in frame.groupby(["output", "rank"]):
        n = [2, 8].index(output)
        order = expected[n, rank].abs().argsort(descending=True)[:4]
        assert rows.i.tolist() == order.tolist()
        assert rows["name"].tolist() == [f"in {i}" for i in order.tolist()]
        assert rows.cosine.tolist() == pytest.approx(expected[n, rank][order].tolist(), abs=1e-6)
        assert rows.eigenvalue.tolist() == [eigen.values[n, rank].item()] * 4
    assert len(decomposer.eigen(2, k=1).in_features(top=1000)) == 40


def test_the_cosines_of_one_output_have_no_batch_axis(decomposer):
    assert decomposer.eigen(2, k=3).cosines().shape == (3, 40)
    assert set(decomposer.eigen(2, k=3).in_features()["output"]) == {2}


def test_cosines_without_an_input_sae(models):
    with pytest.raises(MissingSAEError, match="input_sae"):
        Decomposer(models(False, True), 0).eigen(torch.randn(D)).cosines()


def test_table_and_text(decomposer):
    eigen = decomposer.eigen(torch.tensor([2, 8]))
    frame = eigen.to_frame()
    assert list(frame.columns) == ["output", "rank", "eigenvalue", "share"]
    assert frame.groupby("output").share.sum().tolist() == pytest.approx([1.0, 1.0])
    # Fewer pairs, or those of one output, are the same shares of the whole matrix.
    few = decomposer.eigen(torch.tensor([2, 8]), k=3)
    assert torch.allclose(few.shares, eigen.shares[:, :3])
    assert torch.equal(few[1].shares, few.shares[1])
    assert torch.equal(eigen.top(3).shares, eigen.shares[:, :3])
    assert decomposer.eigen(torch.zeros(D), k=2).shares.tolist() == [0, 0]
    assert frame.eigenvalue.tolist() == eigen.values.flatten().tolist()
    assert str(eigen).startswith(f"Eigencircuits((2, {D}))")


# --- the authors' numbers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("side", "prefix"), [("encoder", "enc"), ("decoder", "dec")])
def test_parity_of_spectra(tracer, side, prefix):
    eigen = tracer.decomposer.eigen(torch.arange(4), side=side)
    expected = tracer.expected[f"{prefix}.eigvals"]
    assert_close(eigen.values.sort(dim=-1).values, expected.sort(dim=-1).values, atol=1e-4, rtol=0)

    every = tracer.decomposer.eigen(torch.arange(256), side=side).values
    assert_close(every[:, :2].abs().sum(-1), tracer.expected[f"{prefix}.top2_abs_eig_sum"], atol=1e-4, rtol=0)
    effective_rank = every.abs().sum(-1) ** 2 / (every**2).sum(-1)
    # A number of order 30 from a ratio of float32 sums: 1e-4 relative is as far as the definition is stable.
    assert_close(effective_rank, tracer.expected[f"{prefix}.effective_rank"], atol=1e-4, rtol=1e-5)


def test_many_matrices_in_threads_are_what_each_is_alone(monkeypatch):
    """Whatever the shape of the batch."""
    threads = torch.get_num_threads()
    raw = torch.randn(3, 2, 6, 6, dtype=torch.float64)
    matrices = raw + raw.mT
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    values, columns = eigh(matrices)
    alone, _ = eigh(matrices[1, 0])
    monkeypatch.undo()
    torch.set_num_threads(threads)
    assert_close((columns * values[..., None, :]) @ columns.mT, matrices, rtol=0, atol=1e-12)
    assert_close(values[1, 0], alone, rtol=0, atol=1e-12)  # rounding of numbers of order ten
    assert eigh(matrices[:0])[0].shape == (0, 2, 6)
