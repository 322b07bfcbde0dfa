"""What all classes share: the classifier's tensor by higher-order SVD, and by shared neurons.

HOSVD (`bilens.layer.hosvd`), over the pixels, so that directions of the input are orthonormal images:
1. input mode: images by how much of all classes' matrices lies along them. Keeping the first r of them in what the
   layer reads gives a classifier of r numbers per image
2. output mode: mixtures of classes by how much of the tensor they are, each with eigenfeatures of its own

CP (`bilens.layer.cp`): the layer replaced by one of few hidden units, fitted from the weights alone, and the
accuracy that the classifier has with it.

Biases and residual additions take part, in homogeneous coordinates. Source: Pearce et al. 2025, section 3.3 and
appendix D for the output mode of the HOSVD, there in the embedding; the input mode and CP are not in the paper.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Float, Int
from torch import Tensor

from bilens._core.display import Tabular
from bilens._core.typing import typed
from bilens.draw import plots
from bilens.draw.images import image_grid
from bilens.errors import ArgumentError, OutOfRangeError
from bilens.layer.bilinear import BilinearLayer, interaction_matrix
from bilens.layer.cp import CPDecomposition, cp_decompose, largest_units
from bilens.layer.eigen.pairs import sorted_eigenpairs
from bilens.layer.hosvd import input_gram, output_gram, singular
from bilens.vision.model import BilinearClassifier
from bilens.vision.spectral import (
    Space,
    as_images,
    is_quadratic,
    last_layer,
    pictures_of,
    read_by_last_layer,
)
from bilens.vision.truncated import BATCH, checked_labels


@dataclass(frozen=True)
class ClassHOSVD(Tabular):
    """A one-layer classifier's directions by importance.

    Attributes:
        output_values, input_values: singular values of each mode, falling; the squares of either add up to the squared
            norm of the tensor.
        output_directions: mixtures of classes, orthonormal rows.
        input_directions: orthonormal rows over the pixels, and the 1 where there are biases or residual additions.
        layer: the classifier as one layer over them.
        model: whose it is.
    """

    output_values: Float[Tensor, "d_output"]
    output_directions: Float[Tensor, "d_output d_output"] = field(repr=False)
    input_values: Float[Tensor, "d"] = field(repr=False)
    input_directions: Float[Tensor, "d d"] = field(repr=False)
    layer: BilinearLayer = field(repr=False)
    model: BilinearClassifier = field(repr=False)

    @property
    def images(self) -> Float[Tensor, "d height width"]:
        """The input directions as images (their entry for the 1 left out)."""
        return as_images(self.input_directions[:, : self.model.cfg.d_input], self.model.cfg)

    @torch.no_grad()
    def accuracy(
        self,
        images: Float[Tensor, "batch *image"],
        labels: Int[Tensor, "batch"],
        kept: Sequence[int] = (1, 2, 5, 10, 20, 30, 50, 100),
    ) -> pd.DataFrame:
        """Of the classifier that reads only the first input directions: `kept, share` (of the squared norm they hold),
        `accuracy`.

        Args:
            images: the images to recognise.
            labels: their classes.
            kept: numbers of directions; those above the number there are, are left out.

        Raises:
            ArgumentError: no images, labels outside the model's classes, or images of another size.
            OutOfRangeError: a number below 1.
        """
        if min(kept) < 1:
            raise OutOfRangeError(f"kept is {list(kept)}, expected numbers of 1 or more.")
        labels = checked_labels(self.model, images, labels)
        homogeneous = not is_quadratic(self.model.cfg)
        x = read_by_last_layer(self.model, images, space="pixels", homogeneous=homogeneous)
        share = (self.input_values**2).cumsum(0) / (self.input_values**2).sum()
        rows = []
        for n in (n for n in kept if n <= len(self.input_values)):
            basis = self.input_directions[:n]
            right = self.layer(x @ basis.T @ basis).argmax(-1) == labels
            rows.append({"kept": n, "share": share[n - 1].item(), "accuracy": right.double().mean().item()})
        return pd.DataFrame(rows)

    def to_frame(self, top: int = 20) -> pd.DataFrame:
        """One row per direction of either mode: `mode, rank, singular_value, share, cumulative, like` (of output
        directions, the classes with the largest weights).

        Args:
            top: directions of each mode.
        """
        frames = []
        for mode, values in (("output", self.output_values), ("input", self.input_values)):
            share = values**2 / (values**2).sum()
            n = min(top, len(values))
            columns = {"singular_value": values[:n], "share": share[:n], "cumulative": share.cumsum(0)[:n]}
            like = [self._mixture(row) for row in self.output_directions[:n]] if mode == "output" else [""] * n
            frames.append(pd.DataFrame({"mode": mode, "rank": range(n), **columns, "like": like}))
        return pd.concat(frames, ignore_index=True)

    def plot(self, top: int = 20) -> go.Figure:
        """The first input directions as images, with the share of the squared norm that each holds.

        Args:
            top: the number of rows shown.
        """
        share = self.input_values**2 / (self.input_values**2).sum()
        ranks = range(min(top, len(share)))
        titles = [f"{rank}: {share[rank]:.1%}" for rank in ranks]
        title = "HOSVD: directions that all classes share, by importance"
        return image_grid([[self.images[rank] for rank in ranks]], [titles], title=title)

    def plot_outputs(self, positive: int = 3, negative: int = 2) -> go.Figure:
        """Every output direction, named by its classes, with its leading eigenfeatures over the pixels.

        Args:
            positive, negative: the numbers of positive and negative ones shown.
        """
        values, vectors = sorted_eigenpairs(interaction_matrix(self.layer, self.output_directions))
        pictures = as_images(vectors[..., : self.model.cfg.d_input], self.model.cfg)
        share = self.output_values**2 / (self.output_values**2).sum()
        grid, titles, names = [], [], []
        for row, direction in enumerate(self.output_directions):
            ranks = [
                rank
                for sign, count in ((1, positive), (-1, negative))
                for rank in torch.nonzero(values[row] * sign > 0)[:count, 0].tolist()
            ]
            grid.append([pictures[row, rank] for rank in ranks])
            titles.append([f"λ = {values[row, rank]:+.3g}" for rank in ranks])
            names.append(f"{share[row]:.1%}\n{self._mixture(direction)}")
        return image_grid(grid, titles, row_labels=names, title="HOSVD: mixtures of classes, by importance")

    def _mixture(self, direction: Float[Tensor, "d_output"], top: int = 3) -> str:
        order = direction.abs().argsort(descending=True)[:top].tolist()
        return " ".join(f"{'+' if direction[c] >= 0 else '-'}{self.model.cfg.labels[c]}" for c in order)

    def __str__(self) -> str:
        return self.to_frame(10).to_string(index=False, float_format="{:.3g}".format)


@typed
def class_hosvd(model: BilinearClassifier) -> ClassHOSVD:
    """Directions that all classes share, and mixtures of classes, by importance.

    Args:
        model: a one-layer classifier.

    Raises:
        ArgumentError: a model of several layers.
    """
    layer = last_layer(model, space="pixels", homogeneous=not is_quadratic(model.cfg))
    outputs, inputs = singular(output_gram(layer)), singular(input_gram(layer))
    return ClassHOSVD(*outputs, *inputs, layer, model)


@dataclass(frozen=True)
class SharedNeurons(Tabular):
    """Classifiers whose last layer has few hidden units, shared by all classes.

    Attributes:
        fits: one per rank.
        accuracy: the classifier's accuracy with each.
        pruned_accuracy: the accuracy if the layer's largest hidden units are kept as they are instead.
        whole_accuracy: the accuracy of the whole model.
        space: the space that the layers read.
        model: whose last layer is replaced.
    """

    fits: tuple[CPDecomposition, ...] = field(repr=False)
    accuracy: tuple[float, ...]
    pruned_accuracy: tuple[float, ...]
    whole_accuracy: float
    space: Space
    model: BilinearClassifier = field(repr=False)

    def to_frame(self) -> pd.DataFrame:
        """One row per rank: `rank, accuracy, pruned_accuracy, cosine, pruned_cosine, cancellation, converged`."""
        return pd.DataFrame(
            {
                "rank": [fit.rank for fit in self.fits],
                "accuracy": self.accuracy,
                "pruned_accuracy": self.pruned_accuracy,
                "cosine": [fit.cosine for fit in self.fits],
                "pruned_cosine": [fit.pruned for fit in self.fits],
                "cancellation": [fit.cancellation for fit in self.fits],
                "converged": [fit.converged for fit in self.fits],
            }
        )

    def plot(self) -> go.Figure:
        """Accuracy against hidden units: fitted, the largest kept, and the whole model."""
        curves = {
            "fitted": self.accuracy,
            "largest units kept": self.pruned_accuracy,
            "whole model": [self.whole_accuracy] * len(self.fits),
        }
        title = f"shared neurons, fitted over the {self.space}"
        ranks = [fit.rank for fit in self.fits]
        return plots.line(ranks, curves, title, x_title="hidden units", y_title="accuracy")

    def plot_neurons(self, rank: int | None = None, top: int = 8) -> go.Figure:
        """The largest hidden units of one fit: both branches as images, and the classes they write to most.

        Args:
            rank: the rank of the fit; by default the largest.
            top: units to show.

        Raises:
            ArgumentError: no fit of that rank, or a deeper model, whose last layer does not read pixels.
        """
        found = {fit.rank: fit for fit in self.fits}
        fit = self.fits[-1] if rank is None else found.get(rank)
        if fit is None:
            raise ArgumentError(f"no fit of rank {rank}, expected one of {', '.join(map(str, found))}.")
        if self.model.cfg.n_layer > 1:
            raise ArgumentError("the last layer of a deeper model does not read pixels: its units are no images.")
        homogeneous = not is_quadratic(self.model.cfg)
        reads = {"space": self.space, "homogeneous": homogeneous}
        branches = [
            as_images(pictures_of(self.model, branch.T[:top], **reads), self.model.cfg)  # type: ignore[arg-type]
            for branch in (fit.layer.W_gate, fit.layer.W_in)
        ]
        labels = self.model.cfg.labels
        titles = []
        for writes in fit.layer.W_out[:top]:
            strongest = writes.abs().argsort(descending=True)[:3].tolist()
            titles.append(" ".join(f"{'+' if writes[c] >= 0 else '-'}{labels[c]}" for c in strongest))
        grid = [list(branch) for branch in branches]
        return image_grid(
            grid,
            [titles, [""] * len(titles)],
            row_labels=["left", "right"],
            title=f"{fit.rank} shared neurons: the largest, and the classes they add to (+) and take from (-)",
        )

    def __str__(self) -> str:
        table = self.to_frame().to_string(index=False, float_format="{:.4f}".format)
        return f"shared neurons over the {self.space}; the whole model has accuracy {self.whole_accuracy:.4f}\n{table}"


@typed
@torch.no_grad()
def shared_neurons(
    model: BilinearClassifier,
    images: Float[Tensor, "batch *image"],
    labels: Int[Tensor, "batch"],
    ranks: Sequence[int] = (5, 10, 20, 40, 80),
    *,
    space: Space = "embedding",
    max_sweeps: int = 100,
    tolerance: float = 1e-4,
    progress: bool = True,
) -> SharedNeurons:
    """Replace the last layer by few hidden units, fitted by CP decomposition, and measure the classifier with it.

    Args:
        model: the classifier; of a deeper one, the last layer is replaced.
        images: the images to recognise. The fits do not see them.
        labels: their classes.
        ranks: hidden units.
        space: the space over which the fit compares layers: `"embedding"`, or (one layer) `"pixels"`.
        max_sweeps, tolerance: when the fit stops; see `bilens.layer.cp.cp_decompose`.
        progress: show a bar.

    Raises:
        OutOfRangeError: a rank that is not in 1..d_hidden (twice that with residual additions), or none.
        ArgumentError: no images, labels outside the model's classes, images of another size, or pixels of a deeper
            model.
    """
    if len(ranks) == 0:
        raise OutOfRangeError("no ranks, expected at least one.")
    labels = checked_labels(model, images, labels)
    homogeneous = not is_quadratic(model.cfg)
    layer = last_layer(model, space=space, homogeneous=homogeneous)
    x = torch.cat(
        [read_by_last_layer(model, part, space=space, homogeneous=homogeneous) for part in images.split(BATCH)]
    )

    def accuracy(weights: BilinearLayer) -> float:
        return (weights(x).argmax(-1) == labels).double().mean().item()

    fits = tuple(
        cp_decompose(layer, rank, max_sweeps=max_sweeps, tolerance=tolerance, progress=progress) for rank in ranks
    )
    return SharedNeurons(
        fits=fits,
        accuracy=tuple(accuracy(fit.layer) for fit in fits),
        pruned_accuracy=tuple(accuracy(largest_units(layer, rank)) for rank in ranks),
        whole_accuracy=accuracy(layer),
        space=space,
        model=model,
    )
