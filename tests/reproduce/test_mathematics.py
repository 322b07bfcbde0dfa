"""What the recipes compute, on small cases: against definitions, brute force, and what must hold exactly."""

import itertools

import pytest
import torch

from bilens.decompose import Decomposer
from bilens.layer.bilinear import BilinearLayer
from bilens.reproduce.eigenvectors import parts_of
from bilens.reproduce.interactions import random_edge, random_symmetric, self_and_cross
from bilens.reproduce.low_rank import approximations
from bilens.reproduce.reexpressed import loss_with, reexpressed, run_layer
from bilens.reproduce.regularised import near_sparsity
from bilens.reproduce.sae_quality import loss_added
from bilens.reproduce.similarity_task import best_threshold, similarity, similarity_data
from bilens.reproduce.sizes import with_self_pairs
from bilens.sae.train.evaluation import evaluate_saes
from bilens.train.data import TokenizedTexts
from bilens.train.language_model import validate
from bilens.vision import ImageDataset, eigenfeatures, load_images
from tests.conftest import make_model
from tests.random_saes import make_sae
from tests.vision.conftest import make_classifier


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_layer(d: int = 6, hidden: int = 9) -> BilinearLayer:
    shapes = [(d, hidden), (d, hidden), (hidden, d), (hidden,), (hidden,), (d,)]
    return BilinearLayer(*(draw(*shape, seed=i) for i, shape in enumerate(shapes)))


# --- appendix K -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("m", [6, 15])
def test_all_eigenvectors_of_directions_that_span_the_output_are_the_layer(m):
    """Complete and over-complete, biases included; to the rounding of float64 at eigenvectors of unit length."""
    layer, x = random_layer(), draw(20, 6, seed=7)
    rebuilt = reexpressed(layer, draw(m, 6, seed=8), 7)  # six dimensions and the 1 of the biases
    torch.testing.assert_close(run_layer(rebuilt, x), run_layer(layer, x), rtol=1e-8, atol=1e-8)


def test_directions_that_do_not_span_the_output_give_its_projection():
    layer, x, U = random_layer(), draw(20, 6, seed=7), draw(4, 6, seed=8)
    onto = torch.linalg.pinv(U) @ U
    expected = (run_layer(layer, x) - layer.b_out) @ onto + layer.b_out
    torch.testing.assert_close(run_layer(reexpressed(layer, U, 7), x), expected, rtol=1e-8, atol=1e-8)


def test_the_papers_kronecker_delta_is_of_a_complete_set_only():
    for m, delta in ((6, True), (15, False)):
        U = draw(m, 6, seed=8)
        overlaps = U @ torch.linalg.pinv(U)  # u_k . u'_l
        assert torch.allclose(overlaps, torch.eye(m, dtype=torch.float64), atol=1e-9) == delta
        torch.testing.assert_close(torch.linalg.pinv(U) @ U, torch.eye(6, dtype=torch.float64))


def test_the_loss_with_the_layer_itself_is_the_models(text_model, texts):
    own = BilinearLayer.of(text_model, 1)
    tokenized = TokenizedTexts.from_texts(texts[:8], text_model.tokenizer)
    clean = validate(text_model, tokenized).nats_per_token
    assert loss_with(text_model, 1, own, texts[:8]) == pytest.approx(clean, rel=1e-5)
    assert loss_with(text_model, 1, None, texts[:8]) != pytest.approx(clean, rel=1e-3)


# --- figures 9C, 23 and 27 --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
def test_all_eigenvectors_give_the_activation_itself(tokenizer, texts, bias):
    model = make_model(tokenizer=tokenizer, bias=bias)
    sae = make_sae(hook="blocks.1.hook_mlp_out")
    d, features = Decomposer(model, 1, output_sae=sae), torch.arange(5)
    found = approximations(d, d.firing(texts[:12]), features, d.eigen(features, 16))
    assert sum(len(activation) for activation, _ in found) > 20
    for activation, approximate in found:
        torch.testing.assert_close(approximate, activation, rtol=1e-3, atol=1e-3)  # float32 sums of 16 squares


def test_loss_added_is_the_spliced_loss_relative_to_the_clean_one(text_model, texts):
    score = evaluate_saes(text_model, {"sae": make_sae(hook="blocks.0.hook_mlp_out")}, texts[:8]).scores[0]
    assert loss_added(score) == pytest.approx(score.loss_spliced / score.loss_clean - 1)


def test_self_and_cross_interactions_are_each_entry_once():
    Q = draw(5, 5)
    Q = Q + Q.T
    own, cross = self_and_cross(Q)
    assert own.tolist() == [Q[i, i].item() for i in range(5)]
    assert cross.tolist() == [Q[i, j].item() for i, j in itertools.combinations(range(5), 2)]


def test_a_random_matrix_has_the_entries_spread_and_the_largest_eigenvalue_expected():
    Q = 3 * draw(300, 300)
    Q = (Q + Q.T) / 2
    random = random_symmetric(Q)
    torch.testing.assert_close(random, random.T)
    assert random.std().item() == pytest.approx(Q.std().item(), rel=0.02)  # of 45,000 draws
    largest = torch.linalg.eigvalsh(random).abs().max().item()
    edge = random_edge(random.norm()[None], 300).item()
    assert largest == pytest.approx(edge, rel=0.05)  # fluctuates by d^(-2/3), some 2 %


# --- image classifiers ------------------------------------------------------------------------------------------------


def test_near_sparsity_counts_entries_of_equal_size():
    assert near_sparsity(torch.tensor([[2.0, -2.0, 2.0, 0.0], [0.0, 5.0, 0.0, 0.0]])).tolist() == [3.0, 1.0]


def test_self_pairs_are_those_of_a_triangle_with_its_diagonal():
    for n in (2, 5):
        cosines = draw(n, n).abs()
        cosines = (cosines + cosines.T) / 2
        cosines.fill_diagonal_(1.0)
        pairs = [cosines[i, j] for i, j in itertools.combinations(range(n), 2)]
        row, column = torch.triu_indices(n, n)
        assert with_self_pairs(torch.stack(pairs).mean().item(), n) == pytest.approx(cosines[row, column].mean().item())


def test_an_eigenvector_fires_on_either_sign_and_cancels_on_both():
    model = make_classifier()
    found = eigenfeatures(model, space="embedding")
    picture, value = found.pictures[0, 0], found.values[0, 0]
    positive, negative = picture.clamp_min(0), (-picture).clamp_min(0)
    activations = found.activations(parts_of(picture))[:, 0, 0]
    expected = value * torch.stack(
        [
            positive.square().sum(),
            negative.square().sum(),
            (positive.square().sum() - negative.square().sum()) ** 2 / picture.square().sum(),
            picture.square().sum(),
        ]
    )
    torch.testing.assert_close(activations, expected)


def test_labels_follow_the_cosine_with_the_target_or_its_negative():
    images = torch.rand(7, 3, 4, generator=torch.Generator().manual_seed(3))
    images[1], images[2] = 0.5 * images[0], 1 - images[0]
    found = similarity(images, images[0])
    assert found[:3].tolist() == pytest.approx([1.0, 1.0, 1.0])
    for i in range(3, 7):
        x, t = images[i].flatten(), images[0].flatten()
        cosines = [(x @ y / x.norm() / y.norm()).item() for y in (t, 1 - t)]
        assert found[i].item() == pytest.approx(max(cosines))


def test_the_threshold_is_lowered_to_the_median_where_labels_would_be_of_one_kind():
    digits = load_images("digits")
    relabelled, target, threshold = similarity_data(digits)
    assert threshold > 0.4  # every 8 x 8 digit is more similar than that
    assert relabelled.train_labels.double().mean().item() == pytest.approx(0.5, abs=0.01)
    assert torch.equal(target, digits.train_images[digits.train_labels == 1][0])
    # Images of one pixel each: half of them like the target, half orthogonal to it and to its negative's other pixels.
    images = torch.eye(4).reshape(4, 2, 2)[torch.tensor([1, 1, 2, 3])]
    data = ImageDataset(images, torch.tensor([1, 1, 0, 0]), images, torch.tensor([1, 1, 0, 0]), ("0", "1"))
    kept = similarity_data(data, 0.6)
    assert kept[2] == 0.6
    assert kept[0].train_labels.tolist() == [1, 1, 0, 0]  # cosines of 1 and of 1 / sqrt(3)


def test_the_best_threshold_beats_every_other():
    scores, labels = draw(40), draw(40, seed=1) > 0.3
    labels = labels | (scores > 0.8)

    def met(cut: float) -> float:
        return ((scores > cut) == labels).double().mean().item()

    best = max(met(cut) for cut in [*scores.tolist(), scores.min().item() - 1])
    assert met(best_threshold(scores, labels)) == best
    for everything in (torch.ones(40, dtype=torch.bool), torch.zeros(40, dtype=torch.bool)):
        assert ((scores > best_threshold(scores, everything)) == everything).all()
