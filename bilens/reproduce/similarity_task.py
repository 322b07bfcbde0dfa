"""Figure 6: a classifier whose labels follow a known rule, and the rule in its first eigenvector.

Images are *true* if their cosine with a target image, or with its negative (1 - target), is above a threshold; the
target is the first image of a 1. The classifier has biases, so its matrices are over `(x, 1)`; eigenvectors are of
*true - false*, and the entry of the matrix for the 1 alone is what biases add to every image.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bilens.draw.images import image_grid
from bilens.layer.bilinear import interaction_matrix
from bilens.reproduce.image_runs import data_and_config, ran_on
from bilens.reproduce.reproduction import Made, Settings
from bilens.vision import Eigenfeatures, ImageDataset, class_difference, class_layer, train_classifier
from bilens.vision.spectral import as_images

THRESHOLD = 0.4  # of the authors' script, on MNIST


def similarity(images: Float[Tensor, "n height width"], target: Float[Tensor, "height width"]) -> Float[Tensor, "n"]:
    """The larger of the cosines with the target and with its negative."""
    x, t = images.flatten(1), target.flatten()
    return torch.maximum(F.cosine_similarity(x, t[None]), F.cosine_similarity(x, 1 - t[None]))


def best_threshold(scores: Float[Tensor, "n"], labels: Bool[Tensor, "n"]) -> float:
    """The score above which to say *true*, so that most of `labels` are met."""
    order = scores.argsort()
    sorted_labels = labels[order].long()
    # Cut after i scores: those below are to be false, those above true.
    met = F.pad((1 - sorted_labels).cumsum(0), (1, 0)) + F.pad(sorted_labels.flip(0).cumsum(0).flip(0), (0, 1))
    cut = int(met.argmax())
    ordered = scores[order]
    if cut == 0:
        return ordered[0].item() - 1
    return ordered[cut - 1].item() if cut == len(scores) else ((ordered[cut - 1] + ordered[cut]) / 2).item()


def similarity_data(
    data: ImageDataset, threshold: float = THRESHOLD
) -> tuple[ImageDataset, Float[Tensor, "height width"], float]:
    """The images with labels *false* and *true*, the target, and the threshold taken: the one given, or the median
    similarity where less than a tenth of the images would be of one label."""
    ones = (data.train_labels == min(1, data.n_classes - 1)).nonzero()
    target = data.train_images[ones[0, 0]]
    train, test = similarity(data.train_images, target), similarity(data.test_images, target)
    if not 0.1 <= (train > threshold).double().mean() <= 0.9:
        threshold = train.median().item()
    labels: list[Int[Tensor, "n"]] = [(each > threshold).long() for each in (train, test)]
    relabelled = ImageDataset(data.train_images, labels[0], data.test_images, labels[1], ("false", "true"), data.source)
    return relabelled, target, threshold


def similarity_task(settings: Settings) -> Made:
    """Figure 6."""
    data, config = data_and_config(settings, d_hidden=64, noise=0.1, weight_decay=1.0, bias=True)  # as in their script
    data, target, threshold = similarity_data(data)
    model = train_classifier(data, config, progress=False).model
    plain = train_classifier(data, replace(config, bias=False), progress=False).model
    accuracies = [each.accuracy(data.test_images, data.test_labels) for each in (model, plain)]

    found = class_difference(model, "true", "false")
    assert found.pictures is not None  # one layer
    positive, negative = found.signed_ranks(0, 1, 2), found.signed_ranks(0, -1, 1)
    first, picture = positive[0], found.pictures[0, positive[0]].cpu()
    scores = [found.activations(part)[:, 0, first].cpu() for part in (data.train_images, data.test_images)]
    right = (scores[1] > best_threshold(scores[0], data.train_labels == 1)) == (data.test_labels == 1)
    likeness = torch.corrcoef(torch.stack([picture, target.flatten().double()]))[0, 1].abs().item()
    layer = class_layer(model, homogeneous=True)
    Q = interaction_matrix(layer, torch.tensor([-1.0, 1.0]).to(layer.W_out))
    rows = [
        (
            "similarity above which an image is true, and the share of the test images that are",
            "high (0.4 in the authors' script)",
            f"{threshold:.2f}, {data.test_labels.double().mean():.0%}",
        ),
        ("test accuracy, and that of a model without biases", "greatly benefits from biases", _percent(accuracies)),
        (
            "test accuracy of the first eigenvector alone, with a threshold found on the training images",
            "sufficient for completing the task",
            _percent([right.double().mean().item()]),
        ),
        ("positive eigenvalues, the largest two", "one high, the rest (close to) zero", _values(found, positive)),
        ("negative eigenvalues, the largest", "(close to) zero", _values(found, negative)),
        (
            "|correlation| of the first eigenvector's picture with the target, over pixels",
            "blue where the target is, red where its negative is",
            f"{likeness:.2f}",
        ),
        ("what biases add to true - false in every image", "a negative contribution", f"{Q[-1, -1]:+.3g}"),
    ]
    pictures = [target, as_images(picture, model.cfg), as_images(2 * Q[-1, :-1], model.cfg)]
    titles = ["target", f"λ = {found.values[0, first]:+.3g}", "linear part"]
    figures = {
        "6: eigenvalues of true - false, and its leading eigenvectors": found.plot_spectrum(top=2),
        "6: the target, the first eigenvector, and what is linear in the image, from the biases": image_grid(
            [pictures], [titles]
        ),
        "The same over (x, 1), with the biases inside the eigenvectors": class_difference(
            model, "true", "false", homogeneous=True
        ).plot_spectrum(top=2),
    }
    words = [
        f"The first positive eigenvector alone is right on {right.double().mean():.1%} of the test images, the model "
        f"on {accuracies[0]:.1%}. Positive eigenvalues are {_values(found, positive)}; the largest negative one is "
        f"{_values(found, negative)}, where the paper has one high eigenvalue and the rest close to zero.",
        "Eigenvectors here are of the part that is quadratic in the image; what the biases add is linear and "
        "constant, and is shown beside it. The last figure has both in one matrix, as the paper's appendix L.",
    ]
    return Made(ran_on(data, config), rows, figures, words)


def _percent(shares: Sequence[float]) -> str:
    return ", ".join(f"{share:.1%}" for share in shares)


def _values(found: Eigenfeatures, ranks: Sequence[int]) -> str:
    return ", ".join(f"{found.values[0, rank]:+.3g}" for rank in ranks) or "none"
