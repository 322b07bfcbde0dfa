"""Motifs are what their truth tables say, and all of them are found."""

import pytest
import torch
from torch.testing import assert_close

from bilens.decompose import Decomposer
from bilens.decompose.motifs import MOTIFS, classify, find_motifs
from bilens.errors import ArgumentError, OutOfRangeError
from bilens.layer.bilinear import BilinearLayer
from bilens.sae.features.examples import FeatureActivations
from tests.random_saes import D_SAE, make_sae


@pytest.fixture(scope="module")
def decomposer(models):
    saes = [
        make_sae("topk", f"blocks.1.{hook}", seed=s) for s, hook in enumerate(("ln2.hook_normalized", "hook_mlp_out"))
    ]
    return Decomposer(models(True, True), 1, *saes, input_names=[f"in {i}" for i in range(D_SAE)])


def layer_with(matrix):
    """A layer whose output 0 has this interaction matrix, and whose others have none."""
    d = len(matrix)
    i, j = (index.flatten() for index in torch.meshgrid(torch.arange(d), torch.arange(d), indexing="ij"))
    unit = torch.eye(d)
    out = torch.zeros(d * d, d)
    out[:, 0] = matrix.flatten()
    none = torch.zeros(d * d)
    return BilinearLayer(unit[:, i], unit[:, j], out, none, none, torch.zeros(d))


@pytest.mark.parametrize(
    ("table", "motif", "strength"),
    [
        ((0, 0, 1), "and", 1),
        ((0.2, -0.5, 1), "and", 0.8),
        ((1, 1, 0), "xor", 1),
        ((1, 0.6, 0.1), "xor", 0.5),
        ((1, 0, 0), "negation", 1),
        ((0.1, 1, -0.4), "negation", 0.9),
        ((1, -0.2, 0.1), "negation", 0.9),
        ((0, 0, -1), "inhibition", 1),
        ((-0.3, 0.1, -1), "inhibition", 0.7),
        ((1, 1, 1), None, 0),  # or
        ((1, 1, 2), None, 0),  # nothing but the sum
        ((1, 0, 1), None, 0),  # i alone
        ((1, -1, 0), None, 0),  # the sum again: no cross term
        ((0.4, 0, 1), None, 0),  # between on and off
        ((-1, -1, -2), None, 0),  # the sum
        ((0, 0, 0), None, 0),
    ],
)
def test_truth_tables(table, motif, strength):
    """Also turned round, and at any scale: `M` is the unit."""
    for scale in (1.0, 1e-3, 64.0):
        for first, second, both in (table, (table[1], table[0], table[2])):
            cases = [torch.tensor([scale * float(case)]) for case in (first, second, both)]
            kind, found = classify(*cases)
            assert (MOTIFS[kind] if kind >= 0 else None) == motif
            assert found.item() == pytest.approx(scale * strength)


def test_a_layer_made_of_motifs():
    """One of each in a matrix of zeros, read through the unit vectors."""
    matrix = torch.zeros(12, 12)
    for i, j, first, second, cross in (
        (0, 1, 0.0, 0.0, 4.0),  # and
        (2, 3, 1.0, 1.0, -2.0),  # xor
        (4, 5, 0.0, 2.0, -2.5),  # negation: 4 negates 5
        (6, 7, 0.0, 0.0, -3.0),  # inhibition
    ):
        matrix[i, i], matrix[j, j] = first, second
        matrix[i, j] = matrix[j, i] = cross / 2
    found = find_motifs(layer_with(matrix), torch.eye(12)[:2], torch.eye(12), 10, progress=False)
    frame = found.to_frame()
    assert list(zip(frame.motif, frame.i, frame.j, frame.strength, strict=True)) == [
        ("and", 0, 1, 4.0),
        ("inhibition", 6, 7, 3.0),
        ("negation", 5, 4, 2.0),
        ("xor", 2, 3, 1.0),
    ]
    assert frame.output.unique().tolist() == [0]
    assert frame[["z_10", "z_01", "z_11"]].iloc[2].tolist() == [2.0, 0.0, -0.5]
    assert found.counts == dict.fromkeys(MOTIFS, 1)
    activations = torch.ones(12)
    activations[5], activations[0] = 10.0, 0.0  # 5 alone far outweighs what 4 takes away; 0 never fires
    frame = find_motifs(
        layer_with(matrix), torch.eye(12)[:1], torch.eye(12), 10, activations=activations, progress=False
    ).to_frame()
    assert frame.motif.tolist() == ["inhibition", "xor"]


@pytest.mark.parametrize("weighted", [False, True])
def test_all_motifs_of_a_layer_are_found(decomposer, weighted):
    """Against every outlier pair, one at a time."""
    scale = torch.rand(D_SAE, generator=torch.Generator().manual_seed(0)) + 0.5 if weighted else torch.ones(D_SAE)
    found = decomposer.motifs(n=10**6, activations=scale if weighted else None, progress=False)
    matrices = decomposer.interaction(list(range(D_SAE)), basis="features")
    outliers = decomposer.outliers(list(range(D_SAE)), n=None, progress=False).to_frame()
    expected = {}
    for row in outliers[outliers.kind == "cross"].itertuples():
        at = [row.i, row.j]
        block = matrices[row.output][at][:, at] * scale[at] * scale[at][:, None]
        kind, strength = classify(block[:1, 0], block[1:, 1], block.sum()[None])
        if kind >= 0:
            expected[row.output, row.i, row.j] = (MOTIFS[kind], strength.item())
    frame = found.to_frame()
    assert len(frame) == sum(found.counts.values())
    # A case within rounding of a threshold may go either way.
    keys = {(row.output, *sorted((row.i, row.j))): (row.motif, row.strength) for row in frame.itertuples()}
    assert len(keys.keys() ^ expected.keys()) <= 0.01 * len(expected) + 1
    for key in keys.keys() & expected.keys():
        assert keys[key][0] == expected[key][0]
        assert keys[key][1] == pytest.approx(expected[key][1], rel=1e-2, abs=1e-2)
    assert frame.strength.is_monotonic_decreasing
    assert len(frame.motif.unique()) == len(MOTIFS)
    negations = frame[frame.motif == "negation"]
    assert (negations.z_10 > negations.z_01).all()


def test_the_strongest_of_a_kind(decomposer):
    everything = decomposer.motifs([4, 2, 9], n=10**6, progress=False).to_frame()
    for kind in MOTIFS:
        some = decomposer.motifs([4, 2, 9], kind, n=3, progress=False)
        best = everything[everything.motif == kind].head(3)
        assert some.to_frame().strength.tolist() == best.strength.tolist()
        assert set(some.to_frame().motif) <= {kind}
        assert set(some.outputs.tolist()) <= {4, 2, 9}
    assert sum(some.counts.values()) == len(everything)
    together = torch.zeros(D_SAE, D_SAE)
    together[:20, :20] = 1.0
    some = decomposer.motifs([4, 2, 9], n=10**6, together=together, progress=False).to_frame()
    inside = everything[(everything.i < 20) & (everything.j < 20)].reset_index(drop=True)
    assert some.equals(inside)
    figure = decomposer.motifs(4, n=5, progress=False).plot(top=2)
    assert len(figure.data[0].z) == 2
    assert "among the outlier pairs" in str(decomposer.motifs(4, n=5, progress=False))


def test_typical_activations():
    offsets = torch.tensor([0, 2, 2, 3])
    none = torch.zeros(3, dtype=torch.long)
    activations = FeatureActivations(none[None], none[None], [], none, none, torch.tensor([1.0, 3.0, 0.5]), offsets)
    assert_close(activations.typical_activations(), torch.tensor([2.0, 0.0, 0.5]))


def test_bad_arguments(decomposer):
    with pytest.raises(ArgumentError, match=r"kind is 'xnor', expected one of and, xor.*Did you mean 'xor'"):
        decomposer.motifs(0, "xnor")
    with pytest.raises(ArgumentError, match="kind is 'nand', expected one of and, xor"):
        find_motifs(decomposer.weights, torch.zeros(1, 16), torch.zeros(2, 16), 1, kind="nand")
    with pytest.raises(OutOfRangeError, match="n is 0, expected at least 1"):
        decomposer.motifs(0, n=0)
    with pytest.raises(ArgumentError, match="fence is -1"):
        decomposer.motifs(0, fence=-1.0)
    with pytest.raises(ArgumentError, match=r"activations of shape \(3,\): expected one finite number for each of 40"):
        decomposer.motifs(0, activations=torch.ones(3))
    with pytest.raises(ArgumentError, match=r"together of shape \(3, 3\): expected one number per pair of 40"):
        find_motifs(decomposer.weights, torch.zeros(1, 16), decomposer.input_directions(), 1, together=torch.ones(3, 3))
    with pytest.raises(ArgumentError, match="one finite number"):
        decomposer.motifs(0, activations=torch.full((D_SAE,), torch.nan))
