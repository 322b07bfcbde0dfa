"""The classifier is what its formula says, and its matrices are the classifier.

Float64 throughout: sums of a few dozen terms of size one round at about 1e-15 of their size; three layers multiply
magnitudes, so 1e-11 of the size of the logits is asked for, which no mistake of a formula would meet.
"""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformer_lens import ActivationCache

from bilens.errors import ArgumentError, CheckpointError, HookNameError, OutOfRangeError
from bilens.layer.bilinear import constant_term, interaction_matrix, linear_term
from bilens.layer.cp import cp_decompose
from bilens.layer.eigen.pairs import sorted_eigenpairs
from bilens.vision import BilinearClassifier, ClassifierConfig, class_layer, class_matrices, with_one
from tests.vision.conftest import make_classifier


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a.detach(), b.detach(), rtol=1e-11, atol=1e-11 * max(1.0, b.abs().max().item()))


def quadratic(Q: Tensor, x: Tensor) -> Tensor:
    """`x^T Q_c x` of every row x and matrix c."""
    return torch.einsum("bi,cij,bj->bc", x, Q, x)


def test_forward_is_the_formula_of_the_format(classifier: BilinearClassifier, images: Tensor) -> None:
    """Unit by unit, from the tensors by their published names: rows of a block's weight are left, then right."""
    weights = {name: weight.detach() for name, weight in classifier.named_parameters()}
    h = classifier.cfg.d_hidden
    x = images.reshape(6, 12) @ weights["embed.weight"].T
    for layer in range(classifier.cfg.n_layer):
        weight = weights[f"blocks.{layer}.weight"]
        bias = weights.get(f"blocks.{layer}.bias", torch.zeros(2 * h))
        columns = [(x @ weight[m] + bias[m]) * (x @ weight[h + m] + bias[h + m]) for m in range(h)]
        x = torch.stack(columns, 1) + (x if classifier.cfg.residual else 0)
    close(classifier(images), x @ weights["head.weight"].T)


def test_images_in_every_shape(images: Tensor) -> None:
    model = make_classifier()
    for shaped in (images[:, None], images.flatten(1), images.float()):
        torch.testing.assert_close(model(shaped), model(images), rtol=1e-6, atol=1e-6)  # float32 pixels


def test_hooks_see_the_pieces_and_change_the_rest(images: Tensor) -> None:
    model = make_classifier(2, bias=True, residual=True)
    logits, cache = model.run_with_cache(images)
    assert isinstance(cache, ActivationCache)
    assert set(cache) == set(model.hook_dict)
    close(cache["pre", 1] * cache["pre_linear", 1], cache["post", 1])
    close(cache["resid_pre", 1] + cache["post", 1], cache["resid_post", 1])
    close(cache["hook_embed"], cache["resid_pre", 0])
    close(cache["pre", 0], cache["resid_pre", 0] @ model.blocks[0].W_gate + model.blocks[0].b_gate)
    close(cache["resid_post", 1] @ model.W_U, logits)
    ablated = model.run_with_hooks(images, fwd_hooks=[("blocks.1.mlp.hook_post", lambda x, hook: 0 * x)])
    close(ablated, cache["resid_pre", 1] @ model.W_U)


# --- the link to bilens.decompose -------------------------------------------------------------------------------------


def test_homogeneous_class_matrices_are_the_classifier(classifier: BilinearClassifier, images: Tensor) -> None:
    """`logits = (x, 1)^T Q (x, 1)`, of the pixels with one layer, of what the last layer reads with more."""
    logits, cache = classifier.run_with_cache(images)
    last = classifier.cfg.n_layer - 1
    x = images.flatten(1) if last == 0 else cache["resid_pre", last]
    Q = class_matrices(classifier, homogeneous=True)
    assert Q.shape == (4, x.shape[1] + 1, x.shape[1] + 1)
    assert torch.equal(Q, Q.mT)
    close(quadratic(Q, with_one(x)), logits)


def test_quadratic_linear_and_constant_part(classifier: BilinearClassifier, images: Tensor) -> None:
    """Without homogeneous coordinates: `tensors`' three terms, and the residual addition apart."""
    logits, cache = classifier.run_with_cache(images)
    last = classifier.cfg.n_layer - 1
    x = images.flatten(1) if last == 0 else cache["resid_pre", last]
    layer, classes = class_layer(classifier), torch.eye(4, dtype=torch.float64)
    parts = quadratic(class_matrices(classifier), x) + x @ linear_term(layer, classes).T + constant_term(layer, classes)
    skip = cache["resid_pre", last] @ classifier.W_U if classifier.cfg.residual else 0
    close(parts + skip, logits)
    # The quadratic block of the homogeneous matrix is the plain matrix: the additions are all linear or constant.
    close(class_matrices(classifier, homogeneous=True)[:, :-1, :-1], class_matrices(classifier))


def test_every_layer_is_exact_over_its_own_input(classifier: BilinearClassifier, images: Tensor) -> None:
    """So that a deep model can be read from the top down: any direction of any layer's output is a quadratic form."""
    _, cache = classifier.run_with_cache(images)
    u = torch.randn(5, 7, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for at in range(classifier.cfg.n_layer):
        Q = interaction_matrix(classifier.layer(at, homogeneous=True), u)
        close(quadratic(Q, with_one(cache["resid_pre", at])), cache["resid_post", at] @ u.T)
    Q = interaction_matrix(classifier.layer(0, pixels=True, homogeneous=True), u)
    close(quadratic(Q, with_one(images.flatten(1))), cache["resid_post", 0] @ u.T)


def test_head_rows_are_directions_of_the_layer(images: Tensor) -> None:
    """Folding the head in, or giving its rows as directions, is the same; differences of classes subtract."""
    model = make_classifier()
    folded, rows = class_matrices(model), interaction_matrix(model.layer(0, pixels=True), model.head.weight.detach())
    close(folded, rows)
    difference = torch.tensor([1.0, 0, -1, 0], dtype=torch.float64)
    close(interaction_matrix(class_layer(model), difference), folded[0] - folded[2])


def test_eigenfeatures_add_up_to_the_logit(images: Tensor) -> None:
    """`logit_c = sum_k lambda_k (v_k . x)^2`: decompose's eigensolver on a class matrix."""
    model = make_classifier()
    values, vectors = sorted_eigenpairs(class_matrices(model)[1])
    activations = (images.flatten(1) @ vectors.mT) ** 2 * values
    close(activations.sum(-1), model(images)[:, 1])


def test_cp_at_full_rank_is_the_layer(images: Tensor) -> None:
    """The class tensor is an ordinary `BilinearLayer`: whole-layer analyses take it as it is, biases included."""
    layer = class_layer(make_classifier(bias=True))
    assert cp_decompose(layer, 7, progress=False).cosine == pytest.approx(1, abs=1e-9)


def test_layers_do_not_carry_gradients_and_are_float32_at_least() -> None:
    layer = make_classifier().to(torch.bfloat16).layer(0, pixels=True)
    assert all(part.dtype == torch.float32 and not part.requires_grad for part in vars(layer).values())


# --- what it refuses --------------------------------------------------------------------------------------------------


def test_wrong_images() -> None:
    model = make_classifier()
    with pytest.raises(ArgumentError, match=r"shape \(2, 5, 5\), expected 12 numbers each \(d_input, 3 x 4 pixels\)"):
        model(torch.rand(2, 5, 5))
    with pytest.raises(ArgumentError, match=r"pass image\[None\]"):
        model(torch.rand(3, 4))
    with pytest.raises(ArgumentError, match=r"uint8.*divide by 255"):
        model(torch.zeros(2, 3, 4, dtype=torch.uint8))


def test_wrong_layers_and_hooks(images: Tensor) -> None:
    model = make_classifier(2)
    with pytest.raises(OutOfRangeError, match="layer 2 is outside the model's 2 layers"):
        model.layer(2)
    with pytest.raises(ArgumentError, match="only layer 0"):
        model.layer(-1, pixels=True)
    for use in (
        lambda name: model.run_with_cache(images, names_filter=name),
        lambda name: model.run_with_hooks(images, fwd_hooks=[(name, lambda x, hook: x)]),
        lambda name: model.add_hook(name, lambda x, hook: x),
    ):
        with pytest.raises(HookNameError, match=r"Did you mean 'blocks.0.mlp.hook_post'"):
            use("blocks.0.hook_post")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"d_hidden": 0}, "d_hidden is 0, expected a positive integer"),
        ({"bias": 1}, "bias is 1, expected true or false"),
        ({"class_names": ("a", "b")}, "class_names has 2 names, d_output is 4"),
    ],
)
def test_wrong_configs(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        ClassifierConfig(**{"d_input": 12, "d_hidden": 7, "d_output": 4} | wrong)
