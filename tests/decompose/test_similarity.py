"""Neighbours and clusters of output features, against the interaction matrices written out."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from bilens.decompose import Decomposer
from bilens.decompose.similarity import cluster, feature_cosines, nearest_others, within_means
from bilens.errors import ArgumentError, MissingSAEError, OutOfRangeError
from tests.layer.test_inner import make_layer, random, rescaled, rotated, rotation
from tests.random_saes import D_SAE, make_sae

seeds = st.integers(0, 2**31)
# The cosines are kept in float32.
ROUNDING = {"atol": 1e-5, "rtol": 0}


@pytest.fixture(scope="module")
def decomposer(models):
    saes = [
        make_sae(hook=f"blocks.1.{hook}", seed=seed)
        for seed, hook in enumerate(("ln2.hook_normalized", "hook_mlp_out"))
    ]
    return Decomposer(models(False, True), 1, *saes, output_names=[f"name {n}" for n in range(D_SAE)])


def matrix_cosines(matrices):
    unit = torch.nn.functional.normalize(matrices.flatten(1).double(), dim=-1)
    return (unit @ unit.T).float()


@pytest.mark.parametrize("basis", ["residual", "features"])
@pytest.mark.parametrize(("side", "against"), [("encoder", None), ("decoder", None), ("encoder", "decoder")])
def test_both_cosines_and_the_nearest_by_each(decomposer, basis, side, against):
    found = decomposer.neighbours([4, 0, 39], k=3, basis=basis, side=side, against=against)
    everything = list(range(D_SAE))
    interaction = matrix_cosines(decomposer.interaction(everything, basis=basis, side=side))
    direction = matrix_cosines(decomposer.directions(everything, against or side))
    assert_close(found.cosines.interaction, interaction, **ROUNDING)
    assert_close(found.cosines.direction, direction, **ROUNDING)
    for row, output in enumerate([4, 0, 39]):
        for cosines, neighbours in ((interaction, found.by_interaction), (direction, found.by_direction)):
            others = sorted(set(everything) - {output}, key=lambda other: -cosines[output, other])
            assert neighbours[row].tolist() == others[:3]
    frame = found.to_frame()
    assert len(frame) == 9
    first = frame.iloc[0]
    assert (first.output, first.output_name, first["rank"]) == (4, "name 4", 0)
    for kind, cosines, other in (("interaction", interaction, direction), ("direction", direction, interaction)):
        neighbour = int(first[f"{kind}_neighbour"])
        assert first[f"{kind}_name"] == f"name {neighbour}"
        assert abs(first[f"{kind}_cosine"] - cosines[4, neighbour]) < 1e-5
        assert abs(first[f"{kind}_other_cosine"] - other[4, neighbour]) < 1e-5
    shared = [
        len(set(a) & set(b)) / 3
        for a, b in zip(found.by_interaction.tolist(), found.by_direction.tolist(), strict=True)
    ]
    assert abs(found.overlap - sum(shared) / 3) < 1e-6


@given(seeds, st.integers(2, 9), st.integers(1, 12))
def test_cosines_belong_to_the_tensor(seed, d, m):
    layer, u, rotate = make_layer(seed, d, m), random(seed + 1, 5, d), rotation(seed + 2, d)
    expected = feature_cosines(layer, u, u)
    again, turned = (
        feature_cosines(rescaled(layer, seed + 3), u, u),
        feature_cosines(rotated(layer, rotate), u @ rotate.T, u @ rotate.T),
    )
    for found in (again, turned):
        assert_close(found.interaction, expected.interaction, **ROUNDING)
    assert_close(turned.direction, expected.direction, **ROUNDING)


@given(seeds, st.integers(14, 18))
def test_the_memory_changes_no_cosine(seed, log_memory):
    layer, u, metric = make_layer(seed, 6, 11), random(seed + 1, 40, 6), random(seed + 2, 6, 6)
    expected = feature_cosines(layer, u, u, metric @ metric.T)
    found = feature_cosines(layer, u, u, metric @ metric.T, 2**log_memory)
    for name in ("interaction", "direction"):
        assert_close(getattr(found, name), getattr(expected, name), **ROUNDING)
        assert torch.equal(getattr(found, name), getattr(found, name).T)


def test_directions_apart_may_have_one_interaction_matrix():
    """What the layer cannot write does not count: the reason to compare interaction matrices at all."""
    layer = make_layer(0, 9, 4)  # four hidden units write four of nine dimensions
    unseen = torch.linalg.svd(layer.W_out).Vh[4:]
    u = random(1, 1, 9)
    both = feature_cosines(layer, torch.cat([u, u + 30 * unseen[:1]]), torch.cat([u, u + 30 * unseen[:1]]))
    assert both.interaction[0, 1] > 1 - 1e-6
    assert both.direction[0, 1].abs() < 0.5


@given(seeds, st.integers(1, 6), st.sampled_from(["average", "complete", "single"]))
def test_groups_that_are_there_are_found(seed, n_groups, linkage):
    """Tight groups around orthogonal centres, in any order; 0 is the largest."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.arange(n_groups, 0, -1)
    labels = torch.arange(n_groups).repeat_interleave(sizes)[torch.randperm(int(sizes.sum()), generator=generator)]
    vectors = torch.eye(8)[labels] + 0.02 * torch.randn(len(labels), 8, generator=generator)
    found = cluster(matrix_cosines(vectors), 0.6, linkage)
    assert torch.equal(found, labels)


@given(seeds, st.integers(1, 20), st.integers(1, 5))
def test_means_within_clusters(seed, n, n_clusters):
    similarity = matrix_cosines(random(seed, n, 4))
    labels = torch.randint(n_clusters, (n,), generator=torch.Generator().manual_seed(seed))
    found = within_means(similarity, labels)
    for label in range(int(labels.max()) + 1):
        members = (labels == label).nonzero()[:, 0]
        pairs = [similarity[i, j].item() for i in members for j in members if i != j]
        if pairs:
            assert abs(found[label] - sum(pairs) / len(pairs)) < 1e-6
        else:
            assert not found[label].isfinite()


def test_clusters_of_a_decomposer(decomposer):
    found = decomposer.clusters(threshold=0.1)
    assert found.sizes.sum() == D_SAE
    assert (found.sizes.diff() <= 0).all()
    frame = found.to_frame()
    assert list(frame) == ["feature", "name", "cluster", "size", "interaction_cosine", "direction_cosine"]
    assert sorted(frame.feature) == list(range(D_SAE))
    assert frame.name[0] == f"name {frame.feature[0]}"
    members = found.members(0)
    assert set(members) == set(frame.feature[frame.cluster == 0])
    between = found.cosines.interaction[members][:, members]
    assert abs(frame.interaction_cosine[0] - between[~torch.eye(len(members), dtype=torch.bool)].mean()) < 1e-5
    some = decomposer.clusters([3, 5, 8], threshold=1)
    assert sorted(some.to_frame().feature) == [3, 5, 8]
    assert "clusters at cosine 1" in str(some)
    assert decomposer.clusters([3]).labels.tolist() == [0]


def test_the_scatter_is_seeded_and_holds_the_closest(decomposer, monkeypatch):
    found = decomposer.neighbours(k=2)
    assert len(found.plot().data[-1].x) == D_SAE * (D_SAE - 1) // 2
    monkeypatch.setattr("bilens.decompose.similarity.MOST_POINTS", 100)
    first, again, other = (found.plot(seed).data[-1] for seed in (0, 0, 1))
    assert tuple(first.y) == tuple(again.y)
    assert tuple(first.y) != tuple(other.y)
    i, j = torch.tril_indices(D_SAE, D_SAE, -1)
    assert max(first.y) == found.cosines.interaction[i, j].max()
    assert max(first.x) == found.cosines.direction[i, j].max()
    assert "name" in first.customdata[0]


def test_what_is_refused(decomposer, models):
    with pytest.raises(OutOfRangeError, match="k is 40, expected 1 to 39"):
        decomposer.neighbours(k=40)
    with pytest.raises(OutOfRangeError, match="k is 0"):
        nearest_others(torch.eye(3), torch.arange(3), 0)
    with pytest.raises(OutOfRangeError, match="feature 40 is outside"):
        decomposer.clusters([1, 40])
    with pytest.raises(OutOfRangeError, match="threshold is 2"):
        decomposer.clusters(threshold=2.0)
    with pytest.raises(OutOfRangeError, match="cluster 40 is none of the"):
        decomposer.clusters().members(40)
    with pytest.raises(ArgumentError, match="these are directions"):
        decomposer.neighbours(torch.randn(3, 16))
    with pytest.raises(ArgumentError, match=r"linkage is 'averge'.*Did you mean 'average'"):
        decomposer.clusters(linkage="averge")
    with pytest.raises(MissingSAEError, match="needs an output_sae"):
        Decomposer(models(False, True), 1).clusters()
