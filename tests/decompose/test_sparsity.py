"""Outliers and kurtosis of interactions are what numpy says of the dense matrices."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pandas.testing import assert_frame_equal
from torch.testing import assert_close

from bilens.decompose import Decomposer, sparsity
from bilens.decompose.motifs import find_motifs
from bilens.decompose.sparsity import (
    SAMPLE,
    SORTED_WHOLE,
    Entries,
    Triangle,
    excess_kurtosis,
    feature_entries,
    find_outliers,
    measure_sparsity,
    quartiles,
)
from bilens.errors import ArgumentError, MissingSAEError, OutOfRangeError
from tests.layer.test_inner import make_layer, random
from tests.random_saes import D_SAE, make_sae


@pytest.fixture(scope="module")
def decomposer(models):
    saes = [
        make_sae("topk", f"blocks.1.{hook}", seed=s) for s, hook in enumerate(("ln2.hook_normalized", "hook_mlp_out"))
    ]
    return Decomposer(models(True, True), 1, *saes)


@pytest.mark.parametrize("n", [1, 2, 3, 255, 256, 257, 600])
def test_a_triangle_has_every_pair_once_where_it_says(n):
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(n, 3, generator=generator), torch.randn(n, 3, generator=generator)
    triangle = Triangle(n)
    entries = torch.full((len(triangle),), torch.nan)
    for low, high, start in triangle.blocks:
        triangle.fill(entries[start:], (low, high, start), left[low:high], right)
    i, j = triangle.pairs(torch.arange(len(triangle)))
    assert (i < j).all()
    assert len((i * n + j).unique()) == len(triangle) == n * (n - 1) // 2
    # the same three terms, in another order
    assert_close(entries, (left @ right.T)[j, i], atol=1e-6, rtol=1e-5)


@given(st.integers(1, 200), st.integers(0, 100))
def test_quartiles_of_few_are_numpys(n, seed):
    x = torch.randn(n, generator=torch.Generator().manual_seed(seed))
    assert_close(
        quartiles(Entries.of(x)), torch.from_numpy(np.quantile(x.numpy(), [0.25, 0.75])).float(), atol=1e-6, rtol=1e-5
    )


@pytest.mark.parametrize("kind", ["random", "heavy", "sorted", "constant", "ties", "misleading"])
@pytest.mark.parametrize("more", [1, 2, 3, 40_001, 200_000])
def test_quartiles_of_many_are_numpys(kind, more):
    """Whatever the sample says: the sampled entries of *misleading* are far from the others."""
    n = SORTED_WHOLE + more
    x = torch.randn(n, generator=torch.Generator().manual_seed(1))
    if kind == "heavy":
        x = x**5
    if kind == "sorted":
        x = x.sort().values
    if kind == "constant":
        x = torch.full_like(x, 0.3)
    if kind == "ties":
        x = x.round()
    if kind == "misleading":
        x[:: n // SAMPLE] += 100
    assert_close(quartiles(Entries.of(x)), torch.from_numpy(np.quantile(x.double().numpy(), [0.25, 0.75])).float())


def test_kurtosis():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300_000, generator=generator) * 2 + 5
    y = x.double().numpy()
    expected = ((y - y.mean()) ** 4).mean() / ((y - y.mean()) ** 2).mean() ** 2 - 3
    assert excess_kurtosis(Entries.of(x[:1000]), Entries.of(x[1000:])) == pytest.approx(expected, rel=1e-9)
    assert abs(expected) < 0.05  # a Gaussian has none; its standard error is sqrt(24 / n)
    assert excess_kurtosis(*map(Entries.of, torch.tensor([[-1.0, 1.0], [1.0, -1.0]]))) == pytest.approx(-2)
    # far from zero, where float32 moments would have no digit left
    assert excess_kurtosis(Entries.of(x.double() + 1e6)) == pytest.approx(expected, rel=1e-6)
    assert np.isnan(excess_kurtosis(Entries.of(torch.ones(5)), Entries.of(torch.ones(2))))


@pytest.mark.parametrize("fence", [0.0, 1.5, 3.0])
def test_sparsity_is_numpys_of_the_dense_matrices(decomposer, fence):
    found = decomposer.sparsity(fence=fence, progress=False)
    assert found.outputs.tolist() == list(range(D_SAE))
    matrices = decomposer.interaction(found.outputs, basis="features").double().numpy()
    lower, column = np.tril_indices(D_SAE, -1)
    outliers = decomposer.outliers(found.outputs, n=None, fence=fence, progress=False).to_frame()
    for output, matrix in enumerate(matrices):
        cross, own = matrix[lower, column], np.diagonal(matrix)
        everything = np.concatenate([cross, own])
        deviations = everything - everything.mean()
        # float32 products; kurtosis and quartiles of them to about five digits
        kurtosis = (deviations**4).mean() / (deviations**2).mean() ** 2 - 3
        assert found.kurtosis[output].item() == pytest.approx(kurtosis, rel=1e-4, abs=1e-4)
        listed = outliers[outliers.output == output]
        for kind, entries, quartile, count in (
            ("cross", cross, found.cross_quartiles[output], found.cross_outliers[output]),
            ("self", own, found.self_quartiles[output], found.self_outliers[output]),
        ):
            q1, q3 = np.quantile(entries, [0.25, 0.75])
            assert quartile.tolist() == pytest.approx([q1, q3], rel=1e-4, abs=1e-5)
            low, high = q1 - fence * (q3 - q1), q3 + fence * (q3 - q1)
            chosen = (entries < low) | (entries > high)
            # An entry within rounding of a fence may fall on either side of it.
            near = (np.minimum(abs(entries - low), abs(entries - high)) < 1e-4).sum()
            assert abs(int(count) - chosen.sum()) <= near
            assert int(count) == (listed.kind == kind).sum()
        assert found.largest_cross[output].item() == pytest.approx(abs(cross).max(), rel=1e-4)
        assert found.largest_self[output].item() == pytest.approx(abs(own).max(), rel=1e-4)
        for row in listed.itertuples():
            entry = matrix[row.i, row.j] * (1 if row.kind == "self" else 2)
            assert row.coefficient == pytest.approx(entry, rel=1e-3, abs=2e-4)
        assert listed.coefficient.abs().is_monotonic_decreasing


def test_the_memory_changes_nothing(monkeypatch):
    """600 input features: the blocks of their pairs, and quartiles from a sample and brackets, held or made anew."""
    layer, u, inputs = (part for part in (make_layer(0, 5, 7), random(1, 3, 5), random(2, 600, 5)))
    for name, value in {
        "SORTED_WHOLE": 1000,
        "SAMPLE": 1000,
        "MARGIN": 0.05,
        "PIECE": 5000,
        "FEWEST": 1000,
        "BLOCK": 32,
    }.items():
        monkeypatch.setattr(sparsity, name, value)
    rich, poor = 2**25, 1_500_000
    held = [next(feature_entries(layer, u, inputs, memory=memory, progress=False))[0] for memory in (rich, poor)]
    assert [len(list(entries)) for entries in held] == [36, 45]
    tables = [measure_sparsity(layer, u, inputs, memory=memory, progress=False).to_frame() for memory in (rich, poor)]
    assert_frame_equal(*tables)
    lists = [find_outliers(layer, u, inputs, 300, memory=memory, progress=False) for memory in (rich, poor)]
    motifs = [find_motifs(layer, u, inputs, 50, memory=memory, progress=False) for memory in (rich, poor)]
    assert_frame_equal(*(found.to_frame() for found in motifs))
    assert motifs[0].counts == motifs[1].counts
    for part, other in zip(*lists, strict=True):
        assert_close(part, other)


def test_results_show_themselves(decomposer):
    found = decomposer.sparsity([5, 3], progress=False)
    assert found.to_frame().output.tolist() == [5, 3]
    assert len(found.plot().data[0].x) == 2
    assert "kurtosis" in str(found)
    assert 0 <= found.cross_share.max() < 1
    outliers = decomposer.outliers(7, n=6, progress=False)
    assert outliers.output.tolist() == [7] * 6
    assert len(outliers.plot(top=4).data[0].x) == 4
    assert "coefficient" in str(outliers)
    none = decomposer.outliers(7, n=1, fence=1e9, progress=False)
    assert len(none) == len(none.to_frame()) == 0
    assert len(none.plot().data[0].x) == 0


def test_bad_arguments(decomposer, models):
    with pytest.raises(ArgumentError, match=r"fence is -1.0, expected 0 or more"):
        decomposer.sparsity(0, fence=-1.0)
    with pytest.raises(ArgumentError, match="fence is nan"):
        decomposer.outliers(0, fence=float("nan"))
    with pytest.raises(OutOfRangeError, match="n is 0, expected at least 1"):
        decomposer.outliers(0, n=0)
    with pytest.raises(OutOfRangeError, match="outside the output SAE"):
        decomposer.sparsity(D_SAE)
    with pytest.raises(MissingSAEError, match="input_sae"):
        Decomposer(models(True, True), 0).sparsity(torch.randn(16))
    with pytest.raises(MissingSAEError, match="output_sae"):
        Decomposer(models(True, True), 0).sparsity()
