"""Figures 2, 3, 10 to 12, 15 and 16: the eigenvectors of an image classifier, and what they add to a logit.

An eigenvector v with eigenvalue lambda adds `lambda (v . x)^2`: much if the image is like the positive pixels of its
picture, as much if it is like the negative ones, and little if it is like both, whose reads cancel.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from bilens.draw import plots
from bilens.draw.images import image_grid
from bilens.reproduce.image_runs import ran_on, trained
from bilens.reproduce.reproduction import Made, Settings
from bilens.vision import eigenfeatures, explain
from bilens.vision.spectral import as_images

PARTS = ("the positive pixels alone", "the negative pixels alone", "both at once", "the picture itself, signed")


def parts_of(picture: Float[Tensor, "d_input"]) -> Float[Tensor, "part d_input"]:
    """Four inputs of unit length made of a picture: its positive pixels, its negative ones as brightness, both as
    brightness, and the picture itself."""
    return F.normalize(torch.stack([picture.clamp_min(0), (-picture).clamp_min(0), picture.abs(), picture]), dim=-1)


def quadratic(settings: Settings) -> Made:
    """Figure 2A, on the leading positive eigenvector of one class."""
    data, model, config = trained(settings)
    found = eigenfeatures(model, space="embedding")
    assert found.pictures is not None  # one layer
    row = min(5, data.n_classes - 1)  # the paper's figure 3 shows the digit 5
    rank = found.signed_ranks(row, 1, 1)[0]
    label, value = found.labels[row], found.values[row, rank].item()
    inputs = parts_of(found.pictures[row, rank])
    activations = found.activations(inputs.to(torch.float64))[:, row, rank].tolist()
    whole = activations[-1]
    rows = [
        (f"activation on {part}, of that on the picture", paper, f"{activation / whole:.0%}")
        for part, activation, paper in zip(
            PARTS[:3],
            activations,
            ("large", "large", "small: large on the one or the other, but not both"),
            strict=False,
        )
    ]
    x = data.test_images.flatten(1).double()
    reads = (x @ found.pictures[row, rank]).cpu()
    added = found.activations(data.test_images)[:, row, rank].cpu()
    own = data.test_labels == row
    rows.append(
        (
            f"mean activation on images of {label}, and on all others",
            "",
            f"{added[own].mean():.3g}, {added[~own].mean():.3g}",
        )
    )
    labels = [f"an image of {data.class_names[c]}" for c in data.test_labels.tolist()]
    titles = [
        f"{part}: {activation:.3g}"
        for part, activation in zip(("positive", "negative", "both", "picture"), activations, strict=True)
    ]
    figures = {
        "Inputs of unit length made of the eigenvector's picture, and its activation on each": image_grid(
            [list(as_images(inputs, model.cfg))], [titles], title=f"{label}: eigenvector with eigenvalue {value:.3g}"
        ),
        "Activation on the test images": plots.scatter(
            reads, added, labels, x_title="v . x", y_title="activation: eigenvalue times (v . x)^2"
        ),
    }
    words = [
        f"The leading positive eigenvector of {label}, on inputs of equal length: its positive pixels or its negative "
        f"ones make it fire at {activations[0] / whole:.0%} and {activations[1] / whole:.0%} of what its own picture "
        f"does, both at once at {activations[2] / whole:.0%}. Images are nowhere negative, so that most read it by the "
        "larger of the two."
    ]
    return Made(ran_on(data, config), rows, figures, words)


def eigenvectors(settings: Settings) -> Made:
    """Figures 2B and 3 (10 to 12 for the other classes), and explained predictions as in 15 and 16."""
    data, model, config = trained(settings)
    found = eigenfeatures(model)
    size = found.circuits.values.abs()
    share = (size[:, :10].sum(1) / size.sum(1)).mean()
    rows = [
        (
            "test accuracy",
            "no number given (97 to 98 % by openreview 6k7qRdz7rD)",
            f"{model.accuracy(data.test_images, data.test_labels):.1%}",
        ),
        (
            "share of the ten largest |eigenvalues| in the sum of all, mean over classes",
            "only a small fraction have non-negligible magnitude",
            f"{share:.0%} of {size.shape[1]} eigenvalues",
        ),
    ]
    figures = {
        "2B, 10 to 12: eigenfeatures of every class": found.plot(),
        "3: all eigenvalues of one class, with its leading eigenfeatures": found.plot_spectrum(
            found.labels[min(5, data.n_classes - 1)]
        ),
    }
    right = model.predict(data.test_images).cpu() == data.test_labels
    for number, name, chosen in ((15, "rightly", right), (16, "wrongly", ~right)):
        if chosen.any():
            image = data.test_images[chosen.nonzero()[0, 0]]
            figures[f"{number}: an image that is {name} recognised; the parts add up to the logit"] = explain(
                model, image
            ).plot()
    words = [
        f"The ten largest of {size.shape[1]} eigenvalues of a class are {share:.0%} of the sum of all. Pictures have "
        "the images' own pixels: of 8 x 8 they are coarse, and strokes show with --images mnist."
    ]
    return Made(ran_on(data, config), rows, figures, words)
