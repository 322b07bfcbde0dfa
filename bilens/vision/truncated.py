"""Accuracy against the number of eigenfeatures kept of every class.

1. all eigenfeatures of every class, in homogeneous coordinates where the model has biases or residual additions, so
   that keeping all of them is the model
2. their activations on every image, summed from the largest |eigenvalue| on: the logits of every truncation at once

Source: Pearce et al. 2025, section 4.2, figures 5B and 20A (there in the embedding, by |eigenvalue|).
"""

from dataclasses import dataclass, field

import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Float, Int
from torch import Tensor

from bilens._core.display import Tabular
from bilens._core.typing import typed
from bilens.draw import plots
from bilens.errors import ArgumentError
from bilens.vision.model import BilinearClassifier
from bilens.vision.spectral import Space, eigenfeatures, is_quadratic

BATCH = 256  # images whose activations of all eigenfeatures are held at once


@dataclass(frozen=True)
class Truncation(Tabular):
    """What a classifier can do with a few eigenfeatures of every class.

    Attributes:
        by_class: share of every class' images recognised with `kept = 0, 1, ..., d` eigenfeatures of every class
            (nothing kept makes all logits zero, which is the first class); NaN where a class has no image.
        accuracy: share of all images recognised.
        agreement: share of images of which the class is that of the whole model.
        labels: the names of the classes.
        space: the space of the eigenvectors.
    """

    by_class: Float[Tensor, "kept d_output"] = field(repr=False)
    accuracy: Float[Tensor, "kept"] = field(repr=False)
    agreement: Float[Tensor, "kept"] = field(repr=False)
    labels: tuple[str, ...]
    space: Space

    def enough(self, loss: float = 0.01) -> int:
        """The smallest number of eigenfeatures from which on the accuracy is within `loss` of the whole model's."""
        short = torch.nonzero(self.accuracy < self.accuracy[-1] - loss)
        return 0 if len(short) == 0 else int(short[-1]) + 1

    def to_frame(self) -> pd.DataFrame:
        """One row per number kept: `kept, accuracy, mean_over_classes, worst_class, agreement`."""
        known = self.by_class[:, ~self.by_class.isnan().any(0)]
        return pd.DataFrame(
            {
                "kept": range(len(self.accuracy)),
                "accuracy": self.accuracy,
                "mean_over_classes": known.mean(1),
                "worst_class": known.amin(1),
                "agreement": self.agreement,
            }
        )

    def plot(self) -> go.Figure:
        """Accuracy, that of the worst class, and agreement with the whole model, against the number kept."""
        frame = self.to_frame().iloc[1:]
        curves = {
            "accuracy": frame["accuracy"],
            "worst class": frame["worst_class"],
            "agreement with the whole model": frame["agreement"],
        }
        title, x_title = f"truncation, over the {self.space}", "eigenfeatures kept of every class, by |eigenvalue|"
        return plots.line(frame["kept"], curves, title, x_title=x_title, y_title="share of images", log_x=True)

    def __str__(self) -> str:
        frame, last = self.to_frame(), len(self.accuracy) - 1
        rows = [kept for kept in (0, 1, 2, 3, 5, 8, 10, 15, 20, 30, 50, 100, 200) if kept < last] + [last]
        return (
            f"{self.enough()} of {last} eigenfeatures a class ({self.space}) are within one point of the whole model\n"
            f"{frame.iloc[rows].to_string(index=False)}"
        )


@typed
@torch.no_grad()
def truncation(
    model: BilinearClassifier,
    images: Float[Tensor, "batch *image"],
    labels: Int[Tensor, "batch"],
    *,
    space: Space = "embedding",
) -> Truncation:
    """Accuracy with the first 0, 1, ..., d eigenfeatures of every class, by falling |eigenvalue|.

    Args:
        model: the classifier; of a deeper one, the last layer is truncated.
        images: the images to recognise.
        labels: their classes.
        space: the space of the eigenvectors; see `bilens.vision.spectral`.

    Raises:
        ArgumentError: no images, labels outside the model's classes, images of another size, or pixels of a deeper
            model.
    """
    labels = checked_labels(model, images, labels)
    features = eigenfeatures(model, space=space, homogeneous=not is_quadratic(model.cfg))
    guesses = []
    for part in images.split(BATCH):
        logits = features.activations(part).cumsum(-1).argmax(1)
        guesses.append(torch.cat([torch.zeros_like(logits[:, :1]), logits], 1))
    guess = torch.cat(guesses)
    right = (guess == labels[:, None]).double()
    members = torch.nn.functional.one_hot(labels, model.cfg.d_output).double()
    return Truncation(
        by_class=(right.T @ members) / members.sum(0),
        accuracy=right.mean(0),
        agreement=(guess == guess[:, -1:]).double().mean(0),
        labels=model.cfg.labels,
        space=space,
    )


def checked_labels(model: BilinearClassifier, images: Tensor, labels: Int[Tensor, "batch"]) -> Int[Tensor, "batch"]:
    """Labels on the model's device.

    Raises:
        ArgumentError: none, or outside the model's classes.
    """
    if len(labels) == 0:
        raise ArgumentError("no images, expected at least one.")
    if not 0 <= labels.min() <= labels.max() < model.cfg.d_output:
        raise ArgumentError(
            f"labels are from {labels.min()} to {labels.max()}, expected classes 0 to {model.cfg.d_output - 1}."
        )
    return labels.to(model.W_E.device).long()
