"""What the analyses of image classifiers say is exactly so: parts add up, everything kept is the model, masks are fair.

Random models in float64: sums of some dozen terms round at about 1e-15 of their size, squared once a layer; 1e-9 of the
size of the logits is far from what any mistake of a formula would give.
"""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bilens.errors import ArgumentError, OutOfRangeError
from bilens.vision import (
    BilinearClassifier,
    ClassifierConfig,
    ImageDataset,
    ImageTrainConfig,
    TrainedClassifier,
    adversarial_mask,
    class_difference,
    class_hosvd,
    class_matrices,
    eigenfeatures,
    explain,
    feature_similarity,
    load_images,
    mask_study,
    pseudo_inverse_masks,
    regularisation_study,
    shared_neurons,
    top_down,
    train_classifier,
    truncation,
    with_one,
)
from bilens.vision.spectral import is_quadratic
from tests.vision.conftest import make_classifier

LABELS = torch.tensor([0, 1, 2, 3, 3, 1])


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(
        a.detach().double(), b.detach().double(), rtol=1e-9, atol=1e-9 * max(1.0, b.abs().max().item())
    )


def spaces(model: BilinearClassifier) -> list[str]:
    return ["embedding", "pixels"] if model.cfg.n_layer == 1 else ["embedding"]


@pytest.fixture(scope="module")
def digits() -> ImageDataset:
    return load_images("digits")


@pytest.fixture(scope="module")
def trained(digits: ImageDataset) -> TrainedClassifier:
    """About a second."""
    return train_classifier(digits, ImageTrainConfig(d_hidden=32, epochs=15), progress=False)


# --- eigenfeatures ----------------------------------------------------------------------------------------------------


def test_eigenfeatures_add_up_to_the_logits(classifier: BilinearClassifier, images: Tensor) -> None:
    """In homogeneous coordinates always, in either space and at every depth."""
    for space in spaces(classifier):
        found = eigenfeatures(classifier, space=space, homogeneous=True)
        close(found.activations(images).sum(-1), classifier(images))


def test_pictures_read_the_pixels(images: Tensor) -> None:
    """`lambda (picture . pixels + offset)^2` is the activation: what is drawn is what the model reads."""
    for switches in ((False, False), (True, True)):
        model = make_classifier(1, *switches)
        for space in spaces(model):
            found = eigenfeatures(model, space=space, homogeneous=any(switches))
            read = torch.einsum("bp,nkp->bnk", images.flatten(1), found.pictures) + found.offsets
            close(found.values * read**2, found.activations(images))
            assert found.images.shape == (*found.values.shape, 3, 4)
            strongest = found.pictures.gather(-1, found.pictures.abs().argmax(-1, keepdim=True))
            assert (strongest > 0).all()


def test_without_homogeneous_coordinates_it_is_the_quadratic_part(images: Tensor) -> None:
    model = make_classifier(1, bias=True, residual=True)
    x = images.flatten(1)
    quadratic = torch.einsum("bi,cij,bj->bc", x, class_matrices(model), x)
    for space in ("embedding", "pixels"):
        found = eigenfeatures(model, space=space)
        close(found.activations(images).sum(-1), quadratic)
        assert "of the quadratic part" in str(found)
    assert "quadratic" not in str(eigenfeatures(model, homogeneous=True))


def test_a_difference_subtracts_matrices(images: Tensor) -> None:
    model = make_classifier()
    forward, back = class_difference(model, 2, 0), class_difference(model, 0, 2)
    logits = model(images)
    close(forward.activations(images).sum(-1)[:, 0], logits[:, 2] - logits[:, 0])
    close(forward.values.sort().values, (-back.values).sort().values)
    assert forward.labels == ("2 - 0",)
    mixed = eigenfeatures(model, [1, (2, 0)])
    assert mixed.labels == ("1", "2 - 0")
    close(mixed.values[1], forward.values[0])


def test_pixel_eigenvalues_do_not_depend_on_the_basis_of_the_embedding() -> None:
    """Any invertible change of the hidden basis leaves the function, so the pixels' eigenvalues, not its own."""
    model, other = make_classifier(), make_classifier()
    change = torch.randn(7, 7, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    with torch.no_grad():
        other.embed.weight.copy_(change @ model.embed.weight)
        other.blocks[0].weight.copy_(model.blocks[0].weight @ torch.linalg.inv(change))
    close(eigenfeatures(model, space="pixels").values, eigenfeatures(other, space="pixels").values)
    assert not torch.allclose(eigenfeatures(model).values, eigenfeatures(other).values)


@pytest.mark.parametrize("label", [np.int64(2), np.uint8(2), torch.tensor(2)], ids=repr)
def test_a_label_of_the_data_is_a_class(label) -> None:
    model = make_classifier(1, bias=True)
    assert torch.equal(eigenfeatures(model, [label], k=2).values, eigenfeatures(model, [2], k=2).values)
    assert torch.equal(adversarial_mask(model, label).pixels, adversarial_mask(model, 2).pixels)
    images = torch.rand(3, model.cfg.d_input)
    assert torch.equal(model(images.numpy()), model(images))
    with pytest.raises(ArgumentError, match=r"outputs is \[2\.0\], expected"):
        eigenfeatures(model, [2.0])


def test_classes_by_name() -> None:
    cfg = ClassifierConfig(12, 7, 3, height=3, width=4, class_names=("cat", "dog", "owl"))
    model = BilinearClassifier(cfg, seed=0)
    found = eigenfeatures(model, ["owl", ("cat", "dog")], k=2)
    assert found.labels == ("owl", "cat - dog")
    assert found.row("owl") == 0
    with pytest.raises(ArgumentError, match=r"no class 'dgo' .* Did you mean 'dog'"):
        eigenfeatures(model, ["dgo"])
    with pytest.raises(ArgumentError, match="no output 'dog' among owl"):
        found.plot_spectrum("dog")


# --- explanation, truncation ------------------------------------------------------------------------------------------


def test_an_explanation_adds_up(classifier: BilinearClassifier, images: Tensor) -> None:
    logits = classifier(images[:1])[0]
    for space in spaces(classifier):
        found = explain(classifier, images[0], 2, positive=2, negative=1, space=space)
        totals = found.to_frame().groupby("class")["activation"].sum()
        assert found.classes == logits.topk(2).indices.tolist()
        for label, which in zip(found.features.labels, found.classes, strict=True):
            assert totals[label] == pytest.approx(logits[which].item(), rel=1e-9, abs=1e-9)
        for values in found.activations:
            assert sum(value > 0 for value in values) <= 2
            assert sum(value < 0 for value in values) <= 1


def test_all_eigenfeatures_kept_is_the_model(classifier: BilinearClassifier, images: Tensor) -> None:
    for space in spaces(classifier):
        found = truncation(classifier, images, LABELS, space=space)
        assert found.accuracy[-1].item() == pytest.approx(classifier.accuracy(images, LABELS))
        assert found.agreement[-1] == 1
        width = (12 if space == "pixels" else 7) + (not is_quadratic(classifier.cfg))
        assert len(found.accuracy) == width + 1
        assert found.accuracy[0] == (LABELS == 0).double().mean()
        members = LABELS.bincount(minlength=4).double() / len(LABELS)
        close(found.by_class @ members, found.accuracy)
        kept = found.enough(0.0)
        assert (found.accuracy[kept:] >= found.accuracy[-1]).all()


def test_a_trained_classifier_needs_few(trained: TrainedClassifier, digits: ImageDataset) -> None:
    """Measured: ten of 32 eigenfeatures are within a point or two of the whole model; guessing has 0.1."""
    found = truncation(trained.model, digits.test_images, digits.test_labels)
    assert found.accuracy[12] > found.accuracy[-1] - 0.05
    assert found.accuracy[-1] == pytest.approx(trained.test_accuracy, abs=0.003)  # float64 may decide a tie otherwise


# --- deeper models ----------------------------------------------------------------------------------------------------


def test_all_branches_are_the_model(classifier: BilinearClassifier, images: Tensor) -> None:
    close(top_down(classifier, k=None).logits(images), classifier(images))


def test_branches_of_one_layer_are_its_eigenfeatures() -> None:
    model = make_classifier(1, bias=True)
    tree, found = top_down(model, [2], k=3), eigenfeatures(model, [2], homogeneous=True, k=3)
    close(torch.tensor([branch.value for branch in tree.trees[0]], dtype=torch.float64), found.values[0])
    for branch, picture in zip(tree.trees[0], found.pictures[0], strict=True):
        close(branch.picture.abs(), picture.abs())


def test_three_layers_are_cut_as_asked(images: Tensor) -> None:
    tree = top_down(make_classifier(3, residual=True), [0, 3], k=[2, 1, 3])
    assert tree.to_frame()["layer"].value_counts().to_dict() == {2: 4, 1: 4, 0: 12}
    assert tree.logits(images).shape == (6, 2)
    assert len(tree.plot().data) == 12


# --- similarity -------------------------------------------------------------------------------------------------------


def test_a_model_is_like_itself_and_no_basis_matters() -> None:
    model, other = make_classifier(seed=0), make_classifier(seed=0)
    with torch.no_grad():  # a rotation of the hidden space turns eigenvectors and embedding alike
        turn = torch.linalg.qr(torch.randn(7, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64))[0]
        other.embed.weight.copy_(turn @ model.embed.weight)
        other.blocks[0].weight.copy_(model.blocks[0].weight @ turn.T)
    found = feature_similarity({"one": [model], "turned": [other], "else": [make_classifier(seed=1)]}, k=2)
    assert found.comparisons == ("one ~ turned", "one ~ else", "turned ~ else")
    close(found.best[0], torch.ones(2))
    close(found.same_rank[0], torch.ones(2))
    close(found.best[1], found.best[2])
    assert (found.best >= found.same_rank).all()
    assert (found.best[1] < 0.99).all()


def test_seeds_agree_where_they_were_trained(trained: TrainedClassifier, digits: ImageDataset) -> None:
    """Features of the same class of another seed are more alike than those of other classes."""
    again = train_classifier(digits, ImageTrainConfig(d_hidden=32, epochs=15, seed=1), progress=False)
    found = feature_similarity({"seeds": [trained.model, again.model]}, k=2)
    assert found.pairs == (1,)
    assert (found.best > found.other_class).all()


# --- masks ------------------------------------------------------------------------------------------------------------


@given(
    k=st.integers(1, 4),
    border=st.sampled_from([None, 1, 2]),
    pixels=st.sampled_from([None, 3, 8]),
    seed=st.integers(0, 3),
)
def test_random_masks_are_as_long_and_as_sparse(k: int, border: int | None, pixels: int | None, seed: int) -> None:
    mask = adversarial_mask(make_classifier(seed=seed), 1, k=k, border=border, pixels=pixels)
    random = mask.shuffled(5, seed)
    close(mask.pixels.norm(), torch.tensor(1.0))
    for other in random:
        assert torch.equal(other.sort().values, mask.pixels.sort().values)  # so norm, sparsity and all moments
    assert not random[:, ~mask.allowed].any()
    assert not mask.pixels[~mask.allowed].any()
    assert (mask.pixels != 0).sum() <= (pixels or 12)


def test_the_first_mask_adds_most_by_itself() -> None:
    """Of all masks of unit length the leading eigenvector has the largest quadratic part (Rayleigh)."""
    model = make_classifier()
    mask, Q = adversarial_mask(model, 2, 0), class_matrices(model)
    others = torch.nn.functional.normalize(torch.randn(500, 12, dtype=torch.float64), dim=-1)
    gains = torch.einsum("bi,ij,bj->b", others, Q[2] - Q[0], others)
    assert gains.max() < mask.gain
    assert mask.gain == pytest.approx(torch.linalg.eigvalsh(Q[2] - Q[0])[-1].item(), rel=1e-9)


@pytest.mark.parametrize("switches", [(False, False), (True, True)])
def test_the_study_is_the_model_on_sums(switches: tuple[bool, bool], images: Tensor) -> None:
    """The parabola gives the accuracies of the model on images with masks really added, biases and all."""
    model = make_classifier(1, *switches)
    masks = [adversarial_mask(model, 1), adversarial_mask(model, 0, 3)]
    strengths = (0.0, -2.0, 0.5, 3.0)
    found = mask_study(masks, images, LABELS, strengths, n_random=3, seed=5, progress=False)
    for m, mask in enumerate(masks):
        attacked = LABELS == 3 if m else LABELS != 1
        assert found.n_images[m] == attacked.sum()
        for s, strength in enumerate(strengths):
            for r, added in enumerate([mask.pixels, *mask.shuffled(3, 5)]):
                guess = model.predict(images.flatten(1)[attacked] + strength * added)
                right, hits = (guess == LABELS[attacked]).double().mean(), (guess == mask.target).double().mean()
                got = (
                    (found.accuracy[m, s], found.hits[m, s])
                    if r == 0
                    else (found.random_accuracy[m, s, r - 1], found.random_hits[m, s, r - 1])
                )
                close(torch.stack(got), torch.stack([right, hits]))


def test_masks_of_a_trained_classifier_beat_random_ones(trained: TrainedClassifier, digits: ImageDataset) -> None:
    masks = [adversarial_mask(trained.model, which) for which in range(10)]
    study = mask_study(masks, digits.test_images, digits.test_labels, (3.0,), n_random=5, progress=False)
    row = study.by_strength().iloc[0]
    assert row["accuracy"] < row["lowest_random"] - 0.2
    assert row["hits"] > 0.5 > row["random_hits"]


# --- structure --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("switches", [(False, False), (True, True)])
def test_hosvd_is_that_of_the_class_matrices(switches: tuple[bool, bool], images: Tensor) -> None:
    """Singular values of both unfoldings, from the matrices themselves; all directions kept are the model."""
    model = make_classifier(1, *switches)
    found, Q = class_hosvd(model), class_matrices(model, homogeneous=any(switches))
    d = Q.shape[-1]
    for values, unfolding in ((found.output_values, Q.flatten(1)), (found.input_values, Q.transpose(0, 1).flatten(1))):
        expected = torch.linalg.svdvals(unfolding)
        torch.testing.assert_close(values, expected, rtol=1e-7, atol=1e-6 * expected[0].item())  # roots of a Gram
    basis = found.input_directions
    close(basis @ basis.T, torch.eye(d))
    accuracy = found.accuracy(images, LABELS, [1, d]).iloc[-1]
    assert accuracy["accuracy"] == pytest.approx(model.accuracy(images, LABELS))
    assert accuracy["share"] == pytest.approx(1)
    assert found.images.shape == (d, 3, 4)


def test_all_hidden_units_shared_are_the_model(classifier: BilinearClassifier, images: Tensor) -> None:
    units = classifier.cfg.d_hidden * (1 + classifier.cfg.residual)
    for space in spaces(classifier):
        found = shared_neurons(classifier, images, LABELS, [1, units], space=space, max_sweeps=3, progress=False)
        assert found.fits[-1].cosine == pytest.approx(1, abs=1e-8)
        right = classifier.accuracy(images, LABELS)
        for accuracy in (found.accuracy[-1], found.pruned_accuracy[-1], found.whole_accuracy):
            assert accuracy == pytest.approx(right)
        assert found.fits[0].cosine >= found.fits[0].pruned - 1e-12


# --- regularisation ---------------------------------------------------------------------------------------------------


def test_regularisation_study_varies_one_argument(digits: ImageDataset) -> None:
    config = ImageTrainConfig(d_hidden=8, epochs=1)
    study = regularisation_study(digits, (0.0, 0.5), config, vary="weight_decay", progress=False)
    assert [run.config.weight_decay for run in study.runs] == [0.0, 0.5]
    assert all(run.config.d_hidden == 8 for run in study.runs)
    frame = study.to_frame()
    assert list(frame.columns) == ["weight_decay", "train_accuracy", "test_accuracy", "top_10_share"]
    assert (frame["top_10_share"] == 1).all()  # eight of eight
    assert len(study.plot(3, 2, 1).data) <= 6


# --- what everything shows, and what it refuses -----------------------------------------------------------------------


def _square_classifier() -> BilinearClassifier:
    """As many hidden units as pixels, and an embedding that keeps angles."""
    model = BilinearClassifier(ClassifierConfig(12, 12, 3, height=3, width=4), seed=0).double()
    with torch.no_grad():
        draws = torch.randn(12, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        model.embed.weight.copy_(torch.linalg.qr(draws)[0])
    return model.eval()


def test_a_pseudo_inverse_mask_activates_one_eigenvector_of_all(images: Tensor) -> None:
    model = _square_classifier()
    found = eigenfeatures(model, space="embedding")
    assert found.pictures is not None
    masks = pseudo_inverse_masks(model, 1, images, n=2, k=3)
    for place, mask in enumerate(masks):
        assert mask.pixels.norm().item() == pytest.approx(1)
        for row in range(3):
            for rank, index in enumerate(found.signed_ranks(row, 1, 3)):
                read = (found.pictures[row, index] @ mask.pixels).abs().item()
                assert (read > 0.1) == ((row, rank) == (1, place))
                assert read > 0.1 or read < 1e-10


def test_a_pseudo_inverse_mask_adds_to_what_its_eigenvector_reads_already(images: Tensor) -> None:
    model = _square_classifier()
    found = eigenfeatures(model, [1], space="embedding")
    first = found.signed_ranks(0, 1, 1)[0]
    for attacked in (images, -images):
        (mask,) = pseudo_inverse_masks(model, 1, attacked, n=1, k=3)
        mean = attacked.mean(0, keepdim=True)
        before, after = (found.activations(x)[0, 0, first] for x in (mean, mean + 0.1 * mask.pixels.view(1, 3, 4)))
        assert after > before


def test_a_pseudo_inverse_mask_keeps_to_the_pixels_allowed(images: Tensor) -> None:
    model = _square_classifier()
    allowed = torch.arange(12) % 3 == 0
    (mask,) = pseudo_inverse_masks(model, 0, images, n=1, k=2, allowed=allowed)
    assert not mask.pixels[~allowed].any()
    assert mask.pixels.norm().item() == pytest.approx(1)
    with pytest.raises(ArgumentError, match="zero on the 0 pixels allowed"):
        pseudo_inverse_masks(model, 0, images, n=1, k=2, allowed=torch.zeros(12, dtype=torch.bool))
    with pytest.raises(ArgumentError, match=r"only \d positive"):
        pseudo_inverse_masks(model, 0, images, n=1, k=12)
    with pytest.raises(OutOfRangeError, match="n is 4, expected 1 to 3"):
        pseudo_inverse_masks(model, 0, images, n=4, k=3)
    with pytest.raises(ArgumentError, match="2 layers"):
        pseudo_inverse_masks(make_classifier(2), 0, images)


def test_similarity_is_drawn_by_equal_rank_as_in_the_paper_or_by_the_best_match() -> None:
    found = feature_similarity({"a": [make_classifier(seed=seed) for seed in range(3)]}, k=2)
    for figure, measure in ((found.plot(), found.same_rank), (found.plot("best"), found.best)):
        close(torch.as_tensor(np.asarray(figure.data[0].y)), measure[0])


def test_everything_prints_tabulates_and_plots(trained: TrainedClassifier, digits: ImageDataset) -> None:
    model, x, y = trained.model, digits.test_images[:40], digits.test_labels[:40]
    mask = adversarial_mask(model, 3)
    results: list[Any] = [
        eigenfeatures(model),
        class_difference(model, 4, 9),
        explain(model, x[0]),
        explain(make_classifier(2), torch.rand(3, 4)),
        truncation(model, x, y),
        top_down(model, [0, 1]),
        feature_similarity({"a": [model], "b": [model]}, k=3),
        mask,
        mask_study(mask, x, y, n_random=2, progress=False),
        class_hosvd(model),
        shared_neurons(model, x, y, [2, 4], max_sweeps=2, progress=False),
    ]
    figures = [result.plot() for result in results]
    figures += [
        results[0].plot_spectrum(4),
        eigenfeatures(make_classifier(2)).plot_spectrum(),
        results[8].plot_masks(),
        results[9].plot_outputs(),
        results[10].plot_neurons(4),
    ]
    for result in results:
        assert str(result)
        assert result._repr_html_()
    for figure in figures:
        assert figure.to_json()
        assert len(figure.data) > 0


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m, x: eigenfeatures(m, [4]), ArgumentError, "no class 4 among the model's classes 0 to 3"),
        (lambda m, x: eigenfeatures(m, []), OutOfRangeError, "no outputs"),
        (lambda m, x: eigenfeatures(m, k=8), OutOfRangeError, "k is 8, expected 1 to 7"),
        (lambda m, x: eigenfeatures(m, space="pixel"), ArgumentError, "Did you mean 'pixels'"),
        (lambda m, x: class_difference(m, 1, 1), ArgumentError, "a class minus itself"),
        (lambda m, x: explain(m, x), ArgumentError, "expected one image of 12 pixels"),
        (lambda m, x: explain(m, x[0], 5), OutOfRangeError, "classes is 5, expected 1 to 4"),
        (lambda m, x: explain(m, x[0], negative=-1), OutOfRangeError, "negative -1"),
        (lambda m, x: truncation(m, x, LABELS + 1), ArgumentError, "labels are from 1 to 4, expected classes 0 to 3"),
        (lambda m, x: truncation(m, x[:0], LABELS[:0]), ArgumentError, "no images"),
        (lambda m, x: truncation(m, x, LABELS[:3]), ArgumentError, "labels"),
        (lambda m, x: top_down(m, k=0), OutOfRangeError, "k is 0, expected 1 to 7"),
        (lambda m, x: top_down(m, k=[1, 2]), OutOfRangeError, "for each of 1 layers"),
        (lambda m, x: feature_similarity({"a": [m]}), ArgumentError, "1 models, expected at least two"),
        (
            lambda m, x: feature_similarity({"a": [m, make_classifier(2)]}),
            ArgumentError,
            "a model of 2 layers.*expected one layer",
        ),
        (lambda m, x: feature_similarity({"a": [m, m]}, k=0), OutOfRangeError, "k is 0"),
        (lambda m, x: adversarial_mask(m, 1, 1), ArgumentError, "a class minus itself"),
        (lambda m, x: adversarial_mask(m, 1, pixels=0), OutOfRangeError, "pixels is 0, expected 1 to 12"),
        (lambda m, x: adversarial_mask(m, 1, border=4), OutOfRangeError, "border is 4, expected 1 to 3"),
        (lambda m, x: adversarial_mask(make_classifier(2), 1), ArgumentError, "layer -1 is not the first"),
        (lambda m, x: mask_study([], x, LABELS), ArgumentError, "0 masks"),
        (
            lambda m, x: mask_study(adversarial_mask(m, 1, 0), x[1:], LABELS[1:], progress=False),
            ArgumentError,
            "no image to attack with mask 0 -> 1",
        ),
        (lambda m, x: mask_study(adversarial_mask(m, 1), x, LABELS, n_random=0), OutOfRangeError, "n_random is 0"),
        (lambda m, x: class_hosvd(make_classifier(2)), ArgumentError, "only layer 0 is a quadratic form"),
        (lambda m, x: class_hosvd(m).accuracy(x, LABELS, [0]), OutOfRangeError, "numbers of 1 or more"),
        (lambda m, x: shared_neurons(m, x, LABELS, []), OutOfRangeError, "no ranks"),
        (lambda m, x: shared_neurons(m, x, LABELS, [8]), OutOfRangeError, "rank is 8, expected 1 to 7"),
        (lambda m, x: eigenfeatures(make_classifier(2)).plot(), ArgumentError, "2 layers.*top_down"),
        (lambda m, x: regularisation_study("digits", vary="nois"), ArgumentError, "Did you mean 'noise'"),
        (
            lambda m, x: regularisation_study("digits", vary="epochs"),
            ArgumentError,
            "vary is 'epochs', expected one of",
        ),
        (lambda m, x: regularisation_study("digits", []), ArgumentError, "no settings"),
        (lambda m, x: regularisation_study("digits", [-1.0]), ArgumentError, "noise is -1.0, expected 0 or more"),
    ],
)
def test_what_cannot_be_is_said(call: Any, error: type[Exception], message: str, images: Tensor) -> None:
    with pytest.raises(error, match=message):
        call(make_classifier(), images)


def test_images_of_no_known_shape_are_analysed_but_not_drawn() -> None:
    model = BilinearClassifier(ClassifierConfig(6, 4, 3), seed=0)
    found = eigenfeatures(model)
    assert found.pictures.shape == (3, 4, 6)
    with pytest.raises(ArgumentError, match="6 pixels are no square"):
        found.plot()


def test_float32_models_are_analysed_in_float64(trained: TrainedClassifier, digits: ImageDataset) -> None:
    """Weights are taken as they are: what differs is the forward pass' own rounding, about 1e-5 of logits near ten."""
    x = digits.test_images[:20]
    total = eigenfeatures(trained.model).activations(x).sum(-1)
    torch.testing.assert_close(total, trained.model(x).double(), rtol=1e-4, atol=1e-4)
    assert total.dtype == torch.float64
    assert with_one(x).shape == (20, 8, 9)
