"""The algebra of the negation study, its AUCs, its sentences, and that it finds what is planted."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score
from torch.testing import assert_close

from bilens.errors import ArgumentError, TokenizationError
from bilens.layer.bilinear import BilinearLayer, interaction_matrix
from bilens.model.loading import load_model
from tutorials.negation.algebra import bilinear_form, split_difference
from tutorials.negation.auc import (
    TARGETS,
    cell_aucs,
    least_auc,
    negated_interval,
    win_rates,
)
from tutorials.negation.gates import FAMILIES, families, family_contributions
from tutorials.negation.probes import (
    ADJECTIVES,
    CELLS,
    NEGATIONS,
    RENDERINGS,
    WORDS,
    halves,
    sentences,
    tokens_of,
    valences,
)
from tutorials.negation.study import negation_study


def random_layer(seed: int, biases: bool, d: int = 6, hidden: int = 9) -> BilinearLayer:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(d, hidden), (d, hidden), (hidden, d), (hidden,), (hidden,), (d,)]
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return BilinearLayer(*(t if t.ndim == 2 or biases else torch.zeros_like(t) for t in tensors))


def mlp(layer: BilinearLayer, x: torch.Tensor) -> torch.Tensor:
    return ((x @ layer.W_gate + layer.b_gate) * (x @ layer.W_in + layer.b_in)) @ layer.W_out + layer.b_out


# --- the sentences ----------------------------------------------------------------------------------------------------


def test_the_sentences_are_balanced_and_the_halves_disjoint():
    probes = sentences()
    assert len(probes) == len({probe.text for probe in probes}) == WORDS * NEGATIONS * RENDERINGS
    first, second = halves()
    for cell in CELLS:
        for half in (first, second):
            words = {ADJECTIVES[place] for place in half.tolist()}
            chosen = [probe for probe in probes if probe.cell == cell and probe.adjective in words]
            assert len(chosen) == len(probes) // 8
    assert not set(first.tolist()) & set(second.tolist())
    assert len(first) == len(second) == WORDS // 2
    assert valences()[first].sum() == valences()[second].sum() == 0
    for place, probe in enumerate(probes):  # what `view(WORDS, NEGATIONS, RENDERINGS)` relies on
        word, rest = divmod(place, NEGATIONS * RENDERINGS)
        assert probe.adjective == ADJECTIVES[word]
        assert probe.negated == (rest >= RENDERINGS)
        assert (valences()[word] > 0) == probe.positive
        assert ("not" in probe.text or "n't" in probe.text) == probe.negated


def test_the_adjective_and_the_full_stop_are_where_they_are_read():
    model = load_model()
    tokens, adjective = tokens_of(model)
    for row, at, probe in zip(tokens, adjective.tolist(), sentences(), strict=True):
        assert model.to_str_tokens(row[at : at + 2]) == [probe.adjective, "."]


def test_a_model_to_which_an_adjective_is_several_tokens_is_refused(text_model):
    with pytest.raises(TokenizationError, match=r"'\w+' is \d+ tokens to this model"):
        tokens_of(text_model)


# --- AUCs -------------------------------------------------------------------------------------------------------------


@given(seed=st.integers(0, 10**6), ties=st.booleans())
def test_means_of_win_rates_are_aucs(seed, ties):
    """scikit-learn's, ties included."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(4, 2, 5, 3, generator=generator)
    values = values.round() if ties else values
    positive = torch.tensor([True, True, False, False])
    aucs = cell_aucs(win_rates(values), positive)
    for a, b, cells in ((0, 3, ((0, 0), (1, 1))), (2, 3, ((0, 1), (1, 1))), (1, 2, ((1, 0), (0, 1)))):
        high, low = (values[positive == (not sign), n].flatten(0, 1) for sign, n in cells)
        for column in range(3):
            expected = roc_auc_score([1] * len(high) + [0] * len(low), torch.cat([high, low])[:, column].tolist())
            assert aucs[column, a, b].item() == pytest.approx(expected, abs=1e-6)
    assert_close(aucs + aucs.mT, torch.ones_like(aucs))


def test_the_interval_holds_the_auc_it_is_of():
    """Not positive against not negative, by rows of `win_rates`; without noise between words it is a point."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(12, 2, 4, 1, generator=generator)
    values[:6, 1] += 0.7
    positive = torch.arange(12) < 6
    rates = win_rates(values)
    low, high = negated_interval(rates[0], 400, generator)
    assert 0 <= low < cell_aucs(rates, positive)[0, 2, 3] < high <= 1
    same = values[[0, 6]].repeat_interleave(6, 0)
    auc = cell_aucs(win_rates(same), positive)[0, 2, 3].item()
    assert negated_interval(win_rates(same)[0], 50, generator) == pytest.approx((auc, auc))


def test_relabelling_words_is_moving_them():
    values = torch.randn(6, 2, 4, 2, generator=torch.Generator().manual_seed(0))
    positive = torch.tensor([True, False, True, False, False, True])
    order = positive.int().argsort(descending=True)
    sorted_labels = positive[order]
    assert_close(cell_aucs(win_rates(values), positive), cell_aucs(win_rates(values[order]), sorted_labels))
    swapped = torch.tensor([False, True, True, False, False, False])
    exchanged = values.clone()
    exchanged[swapped] = exchanged[swapped].flip(1)
    assert_close(cell_aucs(win_rates(values), positive, swapped), cell_aucs(win_rates(exchanged), positive))


@pytest.mark.parametrize("target", TARGETS)
def test_each_target_is_met_by_what_it_describes_alone(target):
    """A value per kind of sentence: 1 where the target's comparisons want the larger one."""
    ideal = {
        "positive word": [1, 0, 1, 0],
        "negative word": [0, 1, 0, 1],
        "negated": [0, 0, 1, 1],
        "not positive": [0, 0, 1, 0],
        "not negative": [0, 0, 0, 1],
        "positive clause": [1, 0, 0, 1],
        "negative clause": [0, 1, 1, 0],
    }
    columns = torch.tensor(list(ideal.values()), dtype=torch.float)  # target, cell
    values = columns.view(-1, 2, 2).permute(2, 1, 0)[:, :, None].repeat_interleave(2, 0)  # word, negated, 1, column
    scores = least_auc(cell_aucs(win_rates(values), torch.tensor([True, True, False, False])), TARGETS[target])
    met = [name for name, score in zip(ideal, scores.tolist(), strict=True) if score == 1]
    assert met == [target]


# --- the layer's algebra ----------------------------------------------------------------------------------------------


@given(seed=st.integers(0, 10**6))
def test_polarisation(seed):
    """`4 B(x, y) = mlp(x + y) - mlp(x - y)`, symmetric, and `u . B(x, y) = x^T Q_u y`."""
    layer = random_layer(seed, biases=False)
    x, y, u = torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + 1))
    both = bilinear_form(layer, x, y)
    assert_close(4 * both, mlp(layer, x + y) - mlp(layer, x - y))
    assert_close(both, bilinear_form(layer, y, x))
    assert_close(bilinear_form(layer, x, x), mlp(layer, x))
    assert_close(u @ both, x @ interaction_matrix(layer, u) @ y)


@given(seed=st.integers(0, 10**6), biases=st.booleans())
def test_the_difference_of_differences_splits_exactly(seed, biases):
    """If every word of a kind has the same input there is no spread; the cross term is then the inputs' alone."""
    layer = random_layer(seed, biases)
    generator = torch.Generator().manual_seed(seed)
    m, n, s, d = torch.randn(4, 6, dtype=torch.float64, generator=generator)
    labels = torch.tensor([1.0, -1.0, -1.0, 1.0], dtype=torch.float64)
    a, b = torch.tensor([-0.5, 0.5], dtype=torch.float64)[None, :, None], 0.5 * labels[:, None, None]
    x = m + a * n + b * s + a * b * d
    y = mlp(layer, x)
    found = split_difference(layer, x, y, labels)
    assert_close(found.s, s)
    assert_close(found.n, n)
    assert_close(found.measured, (y[0, 1] - y[1, 1]) - (y[0, 0] - y[1, 0]))
    assert_close(found.spread, torch.zeros_like(m), atol=1e-10, rtol=0)
    if not biases:
        assert_close(found.cross, 2 * bilinear_form(layer, n, s))
    # Parts of the fade add up, and it is what a projection of the negated valence says.
    parts = [found.fade(part) for part in (found.cross, found.passed_on, found.spread)]
    negated = y[0, 1] - y[1, 1]
    assert_close(sum(parts), 1 - (negated @ found.valence) / found.valence.square().sum())
    many = split_difference(layer, x, y, torch.stack([labels, -labels, labels.roll(1)]))
    assert_close(many.cross[0], found.cross)
    assert_close(many.fade(many.cross)[1], found.fade(found.cross))  # which words are called positive is no matter


def test_families_and_their_contributions_add_up():
    generator = torch.Generator().manual_seed(0)
    activations = torch.zeros(4, 2, 3, 6)
    activations[:, 1, :, 0] = 1  # negated, whatever the word
    activations[:, 0, :, 1] = 1  # plain
    activations[:2, :, :, 2] = 1  # positive words
    activations[2:, :, :, 3] = 1  # negative words
    activations[:, :, :, 4] = 1  # everywhere; the sixth is silent
    family = families(activations)
    named = [FAMILIES[index] for index in family.tolist()]
    assert named[:5] == ["negation", "plain", "positive words", "negative words", "others"]
    decoder, matrix = torch.randn(6, 5, generator=generator), torch.randn(5, 5, generator=generator)
    matrix = matrix + matrix.T
    acts = activations.flatten(0, 2)
    x = acts @ decoder + 0.1 * torch.randn(len(acts), 5, generator=generator)
    parts = family_contributions(matrix, x, acts, decoder, family)
    assert_close(parts, parts.T)
    assert_close(parts.sum(), torch.einsum("td,de,te->t", x, matrix, x).mean(), rtol=1e-4, atol=1e-4)
    assert_close(parts[0, 0], decoder[0] @ matrix @ decoder[0] / 2)  # half of the sentences are negated
    assert not family_contributions(matrix, x[:0], acts[:0], decoder, family).any()


# --- the study --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def study():
    return negation_study(permutations=150, seed=1)


def test_what_the_bundled_model_has(study):
    rows = study.screen.set_index("target")
    negated = rows.loc["negated"]
    assert (negated.layer, negated.feature) == (3, 358)
    assert negated.tested > 0.99
    assert (negated["fires P"], negated["fires N"]) == (0, 0)
    for target in ("not positive", "not negative", "positive clause", "negative clause"):
        assert rows.loc[target].tested < 0.7
    assert study.verdict[0].startswith("ts-tiny has no circuit that turns sentiment round")
    assert any("358 of layer 3 (“negated”) is no AND of negation and sentiment" in line for line in study.verdict)
    assert (study.algebra.fade < 1).all()
    parts = study.algebra[["fade_cross", "fade_passed_on", "fade_spread"]].sum(axis=1)
    assert parts.tolist() == pytest.approx(study.algebra.fade.tolist(), abs=1e-4)


def test_the_gate_is_its_product(study):
    """`a b` of the plane is `l1 p1^2 + l2 p2^2`: what two eigenvectors give."""
    gate = study.gates[0]
    assert gate.product
    plane = gate.x * gate.y
    assert torch.corrcoef(torch.stack([plane, gate.values]))[0, 1].item() == pytest.approx(gate.correlation, abs=1e-4)
    frame = gate.to_frame()
    assert frame.share.abs().sum() == pytest.approx(1)
    assert frame.contribution.sum() == pytest.approx(gate.families.sum().item(), rel=1e-4)


def test_it_prints_and_plots(study):
    assert "next-token distributions" in str(study)
    figure = study.plot()
    assert [trace.name for trace in figure.data] == ["positive", "not positive", "negative", "not negative"]
    assert sum(len(trace.x) for trace in figure.data) == len(sentences())
    assert "<table" in study._repr_html_()


def test_a_study_without_permutations_is_refused():
    with pytest.raises(ArgumentError, match="permutations is 0, expected at least 1"):
        negation_study(permutations=0)


def test_a_seed_gives_the_same_study(study):
    again = negation_study(permutations=150, seed=1)
    assert again.verdict == study.verdict
