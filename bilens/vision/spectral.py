"""Eigenfeatures of classes, as images.

1. the last layer with the head as a direction has an interaction matrix for every class (`bilens.layer.bilinear`);
   a difference of two classes subtracts their matrices
2. its eigenpairs (`bilens.layer.eigen.pairs`) are the class' eigenfeatures: each adds `lambda (v . x)^2` to the logit
3. as images: a one-layer model's eigenvectors, seen through the embedding

Two spaces to find eigenvectors in, of what the last layer reads:
- `"embedding"` (as the paper): `x` is the last `hook_resid_pre`. With one layer `x = W_E^T pixels`, and the picture of
  v is `W_E v`, so that `v . x` is the picture times the pixels. It is small and works at every depth; the pictures are
  neither of unit length nor orthogonal, and an eigenvalue is as large as the embedding makes its picture short
- `"pixels"`: one layer with the embedding folded in. Pictures are orthonormal, and eigenvalues compare: the largest is
  what an image of unit length can add at most. Both add up to the same logits

Biases and residual additions are exact in homogeneous coordinates, `(x, 1)`: an eigenvector then has one more entry,
the `offset`, and adds `lambda (v . x + offset)^2`. Without, the eigenfeatures are of the quadratic part only.
What is linear in the image shows as a pair with opposite eigenvalues and offsets and nearly the same picture:
`(v . x + o)^2 - (v . x - o)^2 = 4 o (v . x)`.

Source: Pearce et al. 2025, sections 3 and 4.1.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import index
from typing import Literal, SupportsIndex, TypeAlias

import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from bilens._core.bare import require_bare
from bilens._core.display import Tabular
from bilens._core.typing import typed
from bilens.draw.images import image_grid, spectrum_with_images
from bilens.errors import ArgumentError, OutOfRangeError, nearest
from bilens.layer.bilinear import BilinearLayer, interaction_matrix
from bilens.layer.eigen.circuits import Eigencircuits
from bilens.layer.eigen.pairs import signed, sorted_eigenpairs
from bilens.vision.config import ClassifierConfig
from bilens.vision.model import BilinearClassifier, class_layer, with_one

Space = Literal["embedding", "pixels"]
Class: TypeAlias = SupportsIndex | str
ClassOutput: TypeAlias = "Class | tuple[Class, Class]"


@dataclass(frozen=True)
class Eigenfeatures(Tabular):
    """Eigenpairs of the interaction matrices of classes, or of class differences.

    Attributes:
        circuits: eigenvalues and unit eigenvectors, by falling absolute value, over what the last layer reads; with
            `homogeneous`, the last entry is that of the 1.
        pictures: for a one-layer model, the image that each eigenvector reads in the pixels, in float64.
        labels: the names of the outputs.
        space: the space of the eigenvectors.
        homogeneous: true if they are those of the whole logit, false if of its quadratic part.
        model: whose they are.
    """

    circuits: Eigencircuits = field(repr=False)
    pictures: Float[Tensor, "n k d_input"] | None = field(repr=False)
    labels: tuple[str, ...]
    space: Space
    homogeneous: bool
    model: BilinearClassifier = field(repr=False)

    @property
    def values(self) -> Float[Tensor, "n k"]:
        """Eigenvalues."""
        return self.circuits.values

    @property
    def offsets(self) -> Float[Tensor, "n k"]:
        """What is added to `v . x` before it is squared; zero unless `homogeneous`."""
        return self.circuits.vectors[..., -1] if self.homogeneous else torch.zeros_like(self.values)

    @property
    def images(self) -> Float[Tensor, "n k height width"]:
        """The pictures in rows and columns.

        Raises:
            ArgumentError: a deeper model, whose last layer does not read pixels, or images of no known shape.
        """
        if self.pictures is None:
            raise ArgumentError(
                f"the model has {self.model.cfg.n_layer} layers: eigenvectors of its last layer are directions of the "
                "layer before it, not images. top_down(model) follows them to the pixels."
            )
        return as_images(self.pictures, self.model.cfg)

    @torch.no_grad()
    def activations(self, images: Float[Tensor, "batch *image"]) -> Float[Tensor, "batch n k"]:
        """`lambda (v . x + offset)^2` of every eigenfeature on every image; all of them add up to the logit, or to its
        quadratic part."""
        x = read_by_last_layer(self.model, images, space=self.space, homogeneous=self.homogeneous)
        return self.circuits.activations(x)

    def signed_ranks(self, row: int, sign: int, k: int) -> list[int]:
        """The first `k` eigenfeatures of one output with positive (`sign` 1) or negative (-1) eigenvalues."""
        return torch.nonzero(self.values[row] * sign > 0)[:k, 0].tolist()

    def to_frame(self, top: int | None = 10) -> pd.DataFrame:
        """One row per eigenfeature: `output, rank, eigenvalue, offset, share` (of the squared eigenvalues found).

        Args:
            top: the number of rows for every output; `None` gives all.
        """
        share = self.values**2 / (self.values**2).sum(-1, keepdim=True).clamp_min(1e-300)
        kept = self.values[:, :top].shape[1]
        return pd.DataFrame(
            {
                "output": [label for label in self.labels for _ in range(kept)],
                "rank": list(range(kept)) * len(self.labels),
                "eigenvalue": self.values[:, :top].flatten(),
                "offset": self.offsets[:, :top].flatten(),
                "share": share[:, :top].flatten(),
            }
        )

    def plot(self, positive: int = 3, negative: int = 2) -> go.Figure:
        """The first positive and negative eigenfeatures of every output as images, eigenvalues over them.

        Args:
            positive, negative: the numbers of positive and negative ones shown.

        Raises:
            ArgumentError: a deeper model; see `images`.
        """
        images = self.images
        grid, titles = [], []
        for row in range(len(self.labels)):
            chosen: list[int | None] = []
            for sign, count in ((1, positive), (-1, negative)):
                found = self.signed_ranks(row, sign, count)
                chosen += [*found, *[None] * (count - len(found))]
            grid.append([None if rank is None else images[row, rank] for rank in chosen])
            titles.append(["" if rank is None else f"λ = {self.values[row, rank]:+.3g}" for rank in chosen])
        return image_grid(grid, titles, row_labels=self.labels, title=self._title())

    def plot_spectrum(self, output: Class | None = None, top: int = 3) -> go.Figure:
        """All eigenvalues of one output from the most positive to the most negative, and its first eigenfeatures.

        Args:
            output: one of `labels`; the first by default.
            top: eigenfeatures of either sign; a deeper model's are not shown.

        Raises:
            ArgumentError: not one of the labels.
        """
        row = 0 if output is None else self.row(output)
        shown = [] if self.pictures is None else [self.signed_ranks(row, sign, top) for sign in (1, -1)]
        return spectrum_with_images(
            self.values[row],
            [[self.images[row, rank] for rank in ranks] for ranks in shown],
            [[f"λ = {self.values[row, rank]:+.3g}" for rank in ranks] for ranks in shown],
            f"eigenspectrum of {self.labels[row]}",
        )

    def row(self, output: Class) -> int:
        """Where an output stands in `labels`.

        Raises:
            ArgumentError: nowhere.
        """
        label = output if isinstance(output, str) else str(index(output))
        if label not in self.labels:
            raise ArgumentError(f"no output {label!r} among {', '.join(self.labels)}.{nearest(label, self.labels)}")
        return self.labels.index(label)

    def _title(self) -> str:
        quadratic_only = "" if self.homogeneous or is_quadratic(self.model.cfg) else ", of the quadratic part"
        return f"eigenfeatures over the {self.space}{quadratic_only}"

    def __str__(self) -> str:
        return f"{self._title()}\n{self.to_frame(3).to_string(index=False)}"


@typed
def eigenfeatures(
    model: BilinearClassifier,
    outputs: Sequence[ClassOutput] | None = None,
    *,
    space: Space = "embedding",
    homogeneous: bool = False,
    k: int | None = None,
) -> Eigenfeatures:
    """Eigenfeatures of classes and of class differences, from the weights (Pearce et al. 2025, section 4.1).

    Args:
        model: the classifier.
        outputs: classes (numbers or names) and differences of two, `(a, b)` for `a - b`; `None` takes every class.
        space: `"embedding"`, as in the paper, or `"pixels"`; see the module's header.
        homogeneous: over `(x, 1)`, so that biases and residual additions take part; without, of the quadratic part.
        k: the number of eigenpairs of each output; `None` gives all.

    Raises:
        ArgumentError: no such class, or pixels of a model of several layers.
        OutOfRangeError: `k` is not in 1..d, or no outputs.
    """
    names = model.cfg.labels if outputs is None else outputs
    if len(names) == 0:
        raise OutOfRangeError("no outputs, expected at least one class.")
    directions, labels = class_directions(model.cfg, names)
    layer = last_layer(model, space=space, homogeneous=homogeneous)
    matrices = interaction_matrix(layer, directions.to(layer.W_out))
    values, vectors = sorted_eigenpairs(matrices, k)
    pictures = None
    if model.cfg.n_layer == 1:
        pictures = pictures_of(model, vectors, space=space, homogeneous=homogeneous)
        # The sign of an eigenvector is free: pictures show their strongest pixel as positive.
        flip = torch.where((signed(pictures) * pictures).sum(-1, keepdim=True) < 0, -1.0, 1.0)
        vectors, pictures = vectors * flip, pictures * flip
    circuits = Eigencircuits(values, vectors, torch.linalg.matrix_norm(matrices), torch.arange(len(labels)))
    return Eigenfeatures(circuits, pictures, labels, space, homogeneous, model)


def class_difference(
    model: BilinearClassifier,
    a: Class,
    b: Class,
    *,
    space: Space = "embedding",
    homogeneous: bool = False,
    k: int | None = None,
) -> Eigenfeatures:
    """What tells class `a` from class `b`: eigenfeatures of `Q_a - Q_b`, positive for `a`, negative for `b`.

    Args:
        model: the classifier.
        a, b: classes, by number or name.
        space, homogeneous, k: the same as for `eigenfeatures`.

    Raises:
        ArgumentError: no such class, twice the same, or pixels of a model of several layers.
        OutOfRangeError: `k` is not in 1..d.
    """
    return eigenfeatures(model, [(a, b)], space=space, homogeneous=homogeneous, k=k)


# --- shared by the analyses -------------------------------------------------------------------------------------------


def is_quadratic(cfg: ClassifierConfig) -> bool:
    """Whether each layer is a quadratic form of its input; else only of `(x, 1)`."""
    return not (cfg.bias or cfg.residual)


def last_layer(model: BilinearClassifier, *, space: Space, homogeneous: bool) -> BilinearLayer:
    """The last layer with the head folded in, in float64: its output directions are mixtures of classes.

    Raises:
        ArgumentError: pixels of a model of several layers.
    """
    return class_layer(model, pixels=space == "pixels", homogeneous=homogeneous).to(torch.float64)


def read_by_last_layer(
    model: BilinearClassifier, images: Float[Tensor, "batch *image"], *, space: Space, homogeneous: bool
) -> Float[Tensor, "batch d"]:
    """What `last_layer` reads on these images, in float64."""
    if space == "pixels":
        x = model.flatten(images)
    else:
        require_bare(model)
        name = f"blocks.{model.cfg.n_layer - 1}.hook_resid_pre"
        x = model.run_with_cache(images, return_cache_object=False, names_filter=name)[1][name]
    return with_one(x.double()) if homogeneous else x.double()


def pictures_of(
    model: BilinearClassifier, vectors: Float[Tensor, "*n d"], *, space: Space, homogeneous: bool
) -> Float[Tensor, "*n d_input"]:
    """What directions of a first layer's input read in the pixels, the entry for the 1 left out."""
    plain = vectors[..., :-1] if homogeneous else vectors
    return plain if space == "pixels" else plain @ model.W_E.detach().to(plain).T


def as_images(pictures: Shaped[Tensor, "*n d_input"], cfg: ClassifierConfig) -> Shaped[Tensor, "*n height width"]:
    """Pixels in rows and columns.

    Raises:
        ArgumentError: the model does not say how high and wide its images are.
    """
    if cfg.image_shape is None:
        raise ArgumentError(
            f"{cfg.d_input} pixels are no square, and the model's config has no height and width: it cannot be drawn."
        )
    return pictures.unflatten(-1, cfg.image_shape)


def class_index(cfg: ClassifierConfig, which: Class) -> int:
    """A class by its number or name.

    Raises:
        ArgumentError: no such class.
    """
    known = f"classes 0 to {cfg.d_output - 1}" + (f" ({', '.join(cfg.labels)})" if cfg.class_names else "")
    if isinstance(which, str):
        if which not in cfg.labels:
            raise ArgumentError(f"no class {which!r} among the model's {known}.{nearest(which, cfg.labels)}")
        return cfg.labels.index(which)
    try:
        number = index(which)  # a Python, numpy or 0-d tensor integer, such as a label of the data
    except TypeError as error:
        raise ArgumentError(f"class {which!r}: expected one of the model's {known}.") from error
    if isinstance(which, bool) or not 0 <= number < cfg.d_output:
        raise ArgumentError(f"no class {which} among the model's {known}.")
    return number


def class_directions(
    cfg: ClassifierConfig, outputs: Sequence[ClassOutput]
) -> tuple[Float[Tensor, "n d_output"], tuple[str, ...]]:
    """One-hot rows for classes, `e_a - e_b` for differences, in float64; and a name for each.

    Raises:
        ArgumentError: no such class, or a class minus itself.
    """
    rows, labels = torch.zeros(len(outputs), cfg.d_output, dtype=torch.float64), []
    for row, output in zip(rows, outputs, strict=True):
        pair = [class_index(cfg, which) for which in (output if isinstance(output, tuple) else (output,))]
        if len(set(pair)) < len(pair):
            raise ArgumentError(f"output {output!r} is a class minus itself; expected two classes.")
        row[pair[0]] = 1
        row[pair[1:]] = -1
        labels.append(" - ".join(cfg.labels[which] for which in pair))
    return rows, tuple(labels)
