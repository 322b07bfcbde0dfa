"""What stands in a gallery is in the weights and in the data, and all of it is found."""

import html
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

import bilens.decompose.gallery
from bilens.decompose import Decomposer
from bilens.decompose.gallery import (
    CASES,
    FIRING,
    FLOOR,
    SAME_TOKENS,
    MotifGallery,
    cases_of,
    formula,
    measure,
    motif_gallery,
    pair_motifs,
    pairs_together,
)
from bilens.decompose.motifs import MOTIFS, classify
from bilens.errors import ArgumentError, MissingSAEError, SAEMismatchError
from bilens.layer.bilinear import BilinearLayer, in_basis, interaction_matrix
from bilens.pages.report import LabelledLayer, label_layers
from bilens.sae import example_texts
from bilens.sae.train.evaluation import DENSE

MIN_TOKENS = 12


@pytest.fixture(scope="module")
def labelled() -> LabelledLayer:
    decomposer = Decomposer.from_pretrained("ts-tiny", 3)
    return label_layers([decomposer], example_texts(decomposer.model)[:12])[3]


@pytest.fixture(scope="module")
def gallery(labelled) -> MotifGallery:
    return motif_gallery(
        [labelled.decomposer], [labelled.inputs], [labelled.outputs], 4, min_tokens=MIN_TOKENS, progress=False
    )


def test_pairs_that_fire_together(labelled):
    """Against the tokens themselves."""
    i, j = pairs_together(labelled.inputs, MIN_TOKENS)
    assert len(i) > 100
    assert (i < j).all()
    cosines, rare = labelled.inputs.token_cosines(), labelled.inputs.density() <= DENSE
    assert (~rare).sum() > 0
    assert rare[i].all()
    assert rare[j].all()
    for at in range(0, len(i), len(i) // 20):
        first, second = (labelled.inputs.dense(int(feature)) != 0 for feature in (i[at], j[at]))
        counts = cases_of(first.flatten(), second.flatten()).bincount(minlength=4)
        assert counts[1:].min() >= MIN_TOKENS
        assert cosines[i[at], j[at]] <= SAME_TOKENS
    listed = set(zip(i.tolist(), j.tolist(), strict=True))
    dense = [labelled.inputs.dense(feature) != 0 for feature in range(24)]
    for a in range(24):
        for b in range(a + 1, 24):
            counts = cases_of(dense[a].flatten(), dense[b].flatten()).bincount(minlength=4)
            some = rare[a] and rare[b] and counts[1:].min() >= MIN_TOKENS and cosines[a, b] <= SAME_TOKENS
            assert ((a, b) in listed) == bool(some)


def test_cosines_by_token(labelled):
    cosines = labelled.inputs.token_cosines()
    tokens = labelled.inputs.tokens

    def mass(feature):
        dense = labelled.inputs.dense(feature).abs().flatten()
        return torch.zeros(len(labelled.inputs.strings)).index_add_(0, tokens.flatten(), dense)

    some = (labelled.inputs.offsets.diff() > 0).nonzero().flatten()[:4].tolist()
    for a in some:
        for b in some:
            assert cosines[a, b].item() == pytest.approx(
                torch.cosine_similarity(mass(a), mass(b), dim=0).item(), abs=1e-5
            )


@pytest.mark.parametrize(("n_out", "size"), [(20, 512), (20, 3), (4, 3)])
def test_all_motifs_of_pairs_are_found(monkeypatch, n_out, size):
    """Against the truth table of every output and pair, one at a time; in one block or many."""
    monkeypatch.setattr(bilens.decompose.gallery, "OUTPUTS", size)
    monkeypatch.setattr(bilens.decompose.gallery, "PAIRS", size)
    generator = torch.Generator().manual_seed(0)
    shapes = [(5, 8), (5, 8), (8, 5)]
    layer = BilinearLayer(*(torch.randn(s, generator=generator) for s in shapes), *(torch.zeros(n) for n in (8, 8, 5)))
    outputs, inputs = torch.randn(n_out, 5, generator=generator), torch.randn(9, 5, generator=generator)
    usual, units = torch.rand(9, generator=generator) + 0.5, 10 * torch.rand(n_out, generator=generator) + 5
    i, j = torch.triu_indices(9, 9, 1)
    found = pair_motifs(layer, outputs, inputs, i, j, usual, units, 1000, progress=False)
    expected = {}
    for o, u in enumerate(outputs):
        matrix = in_basis(interaction_matrix(layer, u), inputs * usual[:, None])
        for a, b in zip(i.tolist(), j.tolist(), strict=True):
            first, second = matrix[a, a], matrix[b, b]
            kind, strength = classify(first[None], second[None], (first + second + 2 * matrix[a, b])[None])
            if kind >= 0 and strength / units[o] >= FLOOR:
                expected[o, a, b] = int(kind), (strength / units[o]).item()
    keys = [(o, *sorted((a, b))) for o, a, b in found.triples]
    assert len(keys) == len(set(keys)) == len(expected)
    for key, kind, strength in zip(keys, found.kinds.tolist(), found.strengths.tolist(), strict=True):
        assert expected[key][0] == kind
        assert strength == pytest.approx(expected[key][1], rel=1e-4)
    assert found.counts.tolist() == found.kinds.bincount(minlength=4).tolist()
    assert (found.counts > 0).all() or n_out == 4
    negations = found.kinds == MOTIFS.index("negation")
    assert (found.table[negations, 0] > found.table[negations, 1]).all()
    for o, a, b in torch.stack([found.outputs, found.i, found.j], 1)[negations].tolist():
        expected_first = interaction_matrix(layer, outputs[o]) @ inputs[a] @ inputs[a] * usual[a] ** 2
        at = found.triples.index((o, a, b))
        assert_close(found.table[at, 0], expected_first, rtol=1e-3, atol=1e-4)
    few = pair_motifs(layer, outputs, inputs, i, j, usual, units, 2, progress=False)
    for kind in range(len(MOTIFS)):
        assert_close(few.strengths[few.kinds == kind], found.strengths[found.kinds == kind][:2])
    assert few.counts.tolist() == found.counts.tolist()


def test_means_of_cases():
    first, second = torch.tensor([0, 1, 1, 0, 1]).bool(), torch.tensor([0, 0, 1, 0, 1]).bool()
    z = torch.tensor([1.0, 2.0, 3.0, 5.0, 5.0])
    found = measure(z, z > 2.5, cases_of(first, second), torch.tensor([0.0, 0.0, 1.0, 0.0, 2.0]))
    assert found.part == 1.5
    assert dict(zip(CASES, found.counts.tolist(), strict=True)) == {
        "neither": 2,
        "first alone": 1,
        "second alone": 0,
        "both": 2,
    }
    assert found.means.tolist() == [3.0, 2.0, 0.0, 4.0]
    assert found.fires.tolist() == [0.5, 0.0, 0.0, 1.0]


def test_entries_hold_in_weights_and_data(labelled, gallery):
    """Their tables again, from the decomposer and the activations; `part` is what `attribute` gives the pair."""
    d, inputs = labelled.decomposer, labelled.inputs
    assert {entry.kind for entry in gallery.entries} >= {"and", "negation", "inhibition"}
    frame = gallery.to_frame()
    assert len(frame) == len(gallery.entries)
    for entry in gallery.entries:
        usual = [inputs.values[inputs.entries(feature)].mean() for feature in (entry.i, entry.j)]
        ends = d.input_directions()[[entry.i, entry.j]] * torch.stack(usual)[:, None]
        block = in_basis(d.interaction(entry.output), ends)
        weights = torch.stack([block[0, 0], block[1, 1], block.sum()])
        assert_close(torch.tensor(entry.table), weights, rtol=1e-3, atol=1e-3)
        kind, strength = classify(*weights[:, None])
        assert MOTIFS[int(kind)] == entry.kind
        above = torch.tensor(entry.measured[1:]) - entry.measured[0]
        kind, gap = classify(*above[:, None])
        assert MOTIFS[int(kind)] == entry.kind
        assert entry.strength == pytest.approx(
            min(strength.item(), gap.item(), abs(entry.part)) / entry.typical, rel=1e-2
        )
        assert (entry.part > 0) == (entry.kind == "and")
        more, less = ([entry.fires[case] for case in cases] for cases in FIRING[entry.kind])
        assert min(more) > max(less)
        assert min(entry.counts) >= MIN_TOKENS
        assert sum(entry.counts) == gallery.n_tokens
        f_i, f_j = inputs.dense(entry.i), inputs.dense(entry.j)
        both = (f_i != 0) & (f_j != 0)
        coefficient = 2 * block[0, 1] / (usual[0] * usual[1])
        assert entry.part == pytest.approx((coefficient * f_i * f_j)[both].mean().item(), rel=1e-3)
        assert entry.whole == pytest.approx(entry.measured[3], rel=1e-4)
        signs = [example.activation * entry.part > 0 for example in entry.examples]
        assert all(signs)
        assert len(entry.x) == len(entry.y) == len(entry.z) == len(entry.case)
    entry = gallery.entries[0]
    row, position = map(int, ((inputs.dense(entry.i) != 0) & (inputs.dense(entry.j) != 0)).nonzero()[0])
    found = d.attribute(inputs.tokens[row, : position + 1], entry.output, position).pair_frame()
    pair = found[(found.i == min(entry.i, entry.j)) & (found.j == max(entry.i, entry.j))].iloc[0]
    part = (
        2
        * (d.input_directions()[entry.i] @ d.interaction(entry.output) @ d.input_directions()[entry.j])
        * inputs.dense(entry.i)[row, position]
        * inputs.dense(entry.j)[row, position]
    )
    assert pair.contribution == pytest.approx(part.item(), rel=1e-3)


def test_no_dense_feature_is_in_it(labelled, gallery):
    dense = [(each.density() > DENSE).nonzero().flatten().tolist() for each in (labelled.inputs, labelled.outputs)]
    assert all(dense)
    for entry in gallery.entries:
        assert entry.i not in dense[0]
        assert entry.j not in dense[0]
        assert entry.output not in dense[1]


def test_the_meaning_of_an_entry(gallery):
    entry = replace(gallery.entries[0], output_name="3 did not → know", i_name="5 know", j_name="7 not")
    meanings = {kind: replace(entry, kind=kind).meaning for kind in MOTIFS}
    output, i, j = "“did not → know” (3)", "“know” (5)", "“not” (7)"
    assert meanings == {
        "and": f"{output} fires where {i} and {j} come together, and for neither of them alone.",
        "xor": f"{output} fires for {i} or for {j}, and not where they come together.",
        "negation": f"{output} fires for {i}, unless {j} is there as well.",
        "inhibition": f"{i} and {j} together keep {output} from firing; neither of them does so alone.",
    }
    assert replace(entry, output_name="3", kind="and").meaning.startswith("3 fires")
    page = gallery.to_page().to_html()
    assert all(html.escape(entry.meaning) in page for entry in gallery.entries)


def test_counts_narrow_down(gallery):
    counts = gallery.counts
    assert counts.kind.tolist() == list(MOTIFS)
    assert (counts.in_weights >= counts.measured).all()
    assert (counts.measured >= counts.held).all()
    assert (counts.held >= counts.families).all()
    shown = gallery.to_frame().motif.value_counts()
    for row in counts.itertuples():
        assert shown.get(row.kind, 0) <= min(4, row.families)
    assert not gallery.to_frame().duplicated(["motif", "output"]).any()


def test_it_prints_and_plots(gallery):
    assert "in_weights" in str(gallery)
    assert gallery.plot().data[0].z.shape == (1, len(MOTIFS))
    assert formula("negation", "5 but", "1 so", "2 not") == "5 but ← 1 so AND NOT 2 not"
    assert formula("inhibition", "5", "1", "2") == "5 ⊣ 1 AND 2"


def test_nothing_holds_where_nothing_fires_so_often(labelled):
    none = motif_gallery([labelled.decomposer], [labelled.inputs], [labelled.outputs], min_tokens=10**6, progress=False)
    assert not none.entries
    assert (none.counts.families == 0).all()
    assert "no entries" in str(none)
    assert {"motif", "output", "z_10", "first_alone", "alike"} <= set(none.to_frame().columns)
    assert "None holds on these texts" in none.to_page().to_html()


def test_bad_arguments(labelled):
    d, ins, outs = labelled.decomposer, labelled.inputs, labelled.outputs
    with pytest.raises(ArgumentError, match="0 decomposers, 0 input and 0 output activations"):
        motif_gallery([], [], [])
    with pytest.raises(ArgumentError, match="1 decomposers, 2 input"):
        motif_gallery([d], [ins, ins], [outs])
    with pytest.raises(ArgumentError, match="n 0 and min_tokens 30 must be at least 1"):
        motif_gallery([d], [ins], [outs], 0)
    fewer = replace(ins, offsets=ins.offsets[:101])
    with pytest.raises(SAEMismatchError, match="layer 3: activations of 100 input features, and an SAE of 2048"):
        motif_gallery([d], [fewer], [outs])
    with pytest.raises(ArgumentError, match="layer 3: output activations on other texts"):
        motif_gallery([d], [ins], [replace(outs, tokens=outs.tokens[1:], mask=outs.mask[1:])])
    with pytest.raises(MissingSAEError, match="output_sae"):
        motif_gallery([Decomposer(d.model, 3, d.input_view.sae)], [ins], [outs])
