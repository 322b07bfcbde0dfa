"""What on one image makes the logits: the eigenfeatures that add most to the most likely classes, and take most away.

1. all eigenfeatures of the most likely classes, in homogeneous coordinates where the model has biases or residual
   additions: their activations `lambda (v . x + offset)^2` add up to the logits
2. of every class, the largest positive and the most negative activations on this image are parts; all others together
   are one more part, so that the parts add up to the logit

Source: Pearce et al. 2025, section 4.1 and appendix C.
"""

from dataclasses import dataclass, field

import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Float
from torch import Tensor

from bilens._core.bare import require_bare
from bilens._core.display import Tabular
from bilens._core.typing import typed
from bilens.draw.images import explanation_figure
from bilens.errors import ArgumentError, OutOfRangeError
from bilens.vision.model import BilinearClassifier
from bilens.vision.spectral import (
    Class,
    Eigenfeatures,
    Space,
    as_images,
    class_index,
    eigenfeatures,
    is_quadratic,
)


@dataclass(frozen=True)
class Explanation(Tabular):
    """One image, its logits, and the eigenfeatures behind the most likely ones.

    Attributes:
        image: the pixels.
        logits: the logit of every class.
        classes: those explained, the most likely first.
        ranks: the ranks of the eigenfeatures shown for every class: first those that add most, then those that take
            most away.
        activations: `lambda (v . x + offset)^2` of those.
        others: the sum over all other eigenfeatures; with the activations it is the logit.
        features: all eigenfeatures of the classes explained, a row each.
    """

    image: Float[Tensor, "d_input"] = field(repr=False)
    logits: Float[Tensor, "d_output"]
    classes: list[int]
    ranks: list[list[int]]
    activations: list[list[float]]
    others: list[float]
    features: Eigenfeatures = field(repr=False)

    def to_frame(self) -> pd.DataFrame:
        """One row per part: `class, part, eigenvalue, activation`; the rows of one class add up to its logit."""
        rows = []
        for row, label in enumerate(self.features.labels):
            for rank, activation in zip(self.ranks[row], self.activations[row], strict=True):
                value = self.features.values[row, rank].item()
                rows.append({"class": label, "part": f"eigenfeature {rank}", "eigenvalue": value})
                rows[-1]["activation"] = activation
            rows.append({"class": label, "part": f"all {self._n_others(row)} others", "activation": self.others[row]})
        return pd.DataFrame(rows, columns=["class", "part", "eigenvalue", "activation"])

    def plot(self) -> go.Figure:
        """The image and its logits; below, of every class explained, its parts as bars and its eigenfeatures as images.

        An eigenfeature is shown with the sign in which it goes along with the image: blue where it wants brightness.
        A deeper model's eigenfeatures are no images: bars only.
        """
        cfg, pictures = self.features.model.cfg, self.features.pictures
        images: list[list[Tensor]] = []
        for row, ranks in enumerate(self.ranks):
            if pictures is None:
                images.append([])
                continue
            along = pictures[row, ranks] @ self.image.double() + self.features.offsets[row, ranks]
            images.append(list(as_images(pictures[row, ranks] * torch.where(along < 0, -1.0, 1.0)[:, None], cfg)))
        parts = [
            [(f"eigenfeature {rank}", value) for rank, value in zip(ranks, values, strict=True)]
            + [(f"all {self._n_others(row)} others", self.others[row])]
            for row, (ranks, values) in enumerate(zip(self.ranks, self.activations, strict=True))
        ]
        names = [
            f"{label}: logit {self.logits[which]:.3g}"
            for label, which in zip(self.features.labels, self.classes, strict=True)
        ]
        return explanation_figure(as_images(self.image, cfg), cfg.labels, self.logits, names, parts, images)

    def _n_others(self, row: int) -> int:
        return self.features.values.shape[1] - len(self.ranks[row])

    def __str__(self) -> str:
        logits = ", ".join(
            f"{label} {self.logits[which]:.4g}" for label, which in zip(self.features.labels, self.classes, strict=True)
        )
        return f"logits: {logits}\n{self.to_frame().to_string(index=False, na_rep='')}"


@typed
def explain(
    model: BilinearClassifier,
    image: Float[Tensor, "*image"],
    classes: int | list[Class] = 3,
    *,
    positive: int = 3,
    negative: int = 2,
    space: Space = "embedding",
) -> Explanation:
    """The eigenfeatures behind the logits of one image; exact, biases and residual additions included.

    Args:
        model: the classifier, of any depth; of a deeper one, eigenfeatures are of the last layer.
        image: one, `(height, width)` or `(d_input)`, brightness from 0 to 1.
        classes: the classes to explain, or the number of the most likely ones.
        positive, negative: eigenfeatures of every class to show, by their activation on this image.
        space: the space of the eigenvectors; see `bilens.vision.spectral`.

    Raises:
        ArgumentError: not one image of the model's size, no such class, or pixels of a deeper model.
        OutOfRangeError: fewer classes than one or more than there are, or a negative number of eigenfeatures.
    """
    cfg = model.cfg
    if image.numel() != cfg.d_input:
        raise ArgumentError(f"image has shape {tuple(image.shape)}, expected one image of {cfg.d_input} pixels.")
    if min(positive, negative) < 0:
        raise OutOfRangeError(f"positive is {positive} and negative {negative}, expected 0 or more.")
    require_bare(model)
    with torch.no_grad():
        logits = model(image.reshape(1, -1))[0].double()
    if isinstance(classes, int):
        if not 1 <= classes <= cfg.d_output:
            raise OutOfRangeError(f"classes is {classes}, expected 1 to {cfg.d_output}, or a list of them.")
        chosen = logits.topk(classes).indices.tolist()
    else:
        chosen = [class_index(cfg, which) for which in classes]
    features = eigenfeatures(model, chosen, space=space, homogeneous=not is_quadratic(cfg))
    activations = features.activations(image.reshape(1, -1))[0]
    ranks, shown, others = [], [], []
    for row in activations:
        order = row.argsort(descending=True).tolist()
        adds = [rank for rank in order[:positive] if row[rank] > 0]
        takes = [rank for rank in order[::-1][:negative] if row[rank] < 0]
        ranks.append(adds + takes)
        shown.append(row[ranks[-1]].tolist())
        rest = torch.ones(len(row), dtype=torch.bool, device=row.device).index_fill(
            0, row.new_tensor(ranks[-1]).long(), 0
        )
        others.append(row[rest].sum().item())
    pixels = image.detach().flatten()
    return Explanation(pixels, logits, chosen, ranks, shown, others, features)
