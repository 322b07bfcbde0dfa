"""A deep model, read from the classes down to the pixels.

1. a class is a direction of the last layer's output; the eigenvectors of its interaction matrix are directions of what
   that layer reads
2. that is the output of the layer below: an eigenvector v of it is a direction there, with an interaction matrix of its
   own, whose eigenvalues say how `v . x` comes about; and so on
3. eigenvectors of the first layer are seen in the pixels through the embedding

With all eigenpairs kept it is the model: `logit = sum_k lambda_k (sum_j mu_kj (w_kj . x)^2)^2` for two layers. Biases
and residual additions are exact in homogeneous coordinates: `v . (x, 1) = v_x . x + v_1`, where `v_1` belongs into the
corner of the matrix of the layer below.

The paper (Pearce et al. 2025) names "the decompilation of later layers" as a source of output directions (section 3.2)
and shows no deeper image model.
"""

from dataclasses import dataclass, field

import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Float
from torch import Tensor

from bilens._core.display import Tabular
from bilens._core.typing import typed
from bilens.draw.images import image_grid
from bilens.errors import OutOfRangeError
from bilens.layer.bilinear import interaction_matrix
from bilens.layer.eigen.pairs import signed, sorted_eigenpairs
from bilens.vision.model import BilinearClassifier
from bilens.vision.spectral import Class, as_images, class_index, is_quadratic, pictures_of


@dataclass(frozen=True)
class Branch:
    """An eigenvector of one layer, and how it comes about in the layers below.

    Attributes:
        layer: the layer that reads it.
        rank: among its siblings, by falling |eigenvalue|.
        value: the eigenvalue: what it adds is `value * (v . x)^2`.
        norm: the root of the sum of all its siblings' squared eigenvalues, those cut off included.
        picture: in the first layer, the image that it reads in the pixels.
        offset: the number added to `picture . pixels`, or in higher layers the constant that `below` accounts for; zero
            without biases and residual additions.
        below: in higher layers, the eigenvectors of the layer below, which add up to `v . x`.
    """

    layer: int
    rank: int
    value: float
    norm: float
    picture: Float[Tensor, "d_input"] | None = field(repr=False)
    offset: float
    below: tuple["Branch", ...]

    def activation(self, pixels: Float[Tensor, "batch d_input"]) -> Float[Tensor, "batch"]:
        """`value * (v . x)^2` on images, `v . x` as far as the branches below say."""
        if self.picture is not None:
            return self.value * (pixels @ self.picture + self.offset) ** 2
        total = pixels.new_zeros(len(pixels))
        for branch in self.below:
            total = total + branch.activation(pixels)
        return self.value * total**2


@dataclass(frozen=True)
class TopDown(Tabular):
    """Classes of a deep model as trees of eigenvectors, with images at the bottom.

    Attributes:
        labels: the names of the classes.
        trees: the branches of every class.
        model: whose they are.
    """

    labels: tuple[str, ...]
    trees: tuple[tuple[Branch, ...], ...] = field(repr=False)
    model: BilinearClassifier = field(repr=False)

    @torch.no_grad()
    def logits(self, images: Float[Tensor, "batch *image"]) -> Float[Tensor, "batch n_class"]:
        """What the branches kept make of images; with all of them, the model's logits."""
        pixels = self.model.flatten(images).double()
        zeros = pixels.new_zeros(len(pixels))
        return torch.stack([sum((branch.activation(pixels) for branch in tree), zeros) for tree in self.trees], 1)

    def to_frame(self) -> pd.DataFrame:
        """One row per branch: `class, layer, path, eigenvalue, share` (of the squared eigenvalues of all siblings)."""
        rows: list[dict[str, object]] = []

        def visit(label: str, branch: Branch, path: tuple[int, ...]) -> None:
            path = (*path, branch.rank)
            rows.append({"class": label, "layer": branch.layer, "path": " > ".join(map(str, path))})
            rows[-1] |= {"eigenvalue": branch.value, "share": branch.value**2 / max(branch.norm**2, 1e-300)}
            for each in branch.below:
                visit(label, each, path)

        for label, tree in zip(self.labels, self.trees, strict=True):
            for branch in tree:
                visit(label, branch, ())
        return pd.DataFrame(rows)

    def plot(self) -> go.Figure:
        """The pictures of the first layer, a row for every branch above them; rows name the eigenvalues on the way."""
        grid, titles, names = [], [], []

        def visit(name: str, branches: tuple[Branch, ...]) -> None:
            pictures = [as_images(each.picture, self.model.cfg) for each in branches if each.picture is not None]
            if pictures:
                grid.append(pictures)
                titles.append([f"λ = {each.value:+.3g}" for each in branches])
                names.append(name)
            for each in branches:
                visit(f"{name}\nλ = {each.value:+.3g}", each.below)

        for label, tree in zip(self.labels, self.trees, strict=True):
            visit(label, tree)
        return image_grid(
            grid, titles, row_labels=names, title="from classes (left, last layer first) to pixels (first layer)"
        )

    def __str__(self) -> str:
        return self.to_frame().head(20).to_string(index=False, float_format="{:.4g}".format)


@typed
@torch.no_grad()
def top_down(
    model: BilinearClassifier, classes: list[Class] | None = None, *, k: int | list[int] | None = 4
) -> TopDown:
    """Follow classes down to the pixels, layer by layer.

    Args:
        model: the classifier, of any depth.
        classes: the classes, by number or name; `None` takes all.
        k: eigenvectors to follow, by |eigenvalue|: a number for every layer from the last one down, or one for all of
            them; `None` follows all, which is exact, and `d_hidden ** n_layer` branches a class.

    Raises:
        ArgumentError: no such class.
        OutOfRangeError: numbers for more or fewer layers than there are, below one, or more than a layer reads.
    """
    cfg = model.cfg
    width = cfg.d_hidden + (not is_quadratic(cfg))
    counts = k if isinstance(k, list) else [width if k is None else min(k, width)] * cfg.n_layer
    if len(counts) != cfg.n_layer or not all(1 <= count <= width for count in counts):
        raise OutOfRangeError(f"k is {k}, expected 1 to {width} for each of {cfg.n_layer} layers, the last one first.")
    chosen = range(cfg.d_output) if classes is None else [class_index(cfg, which) for which in classes]
    rows = model.W_U.detach().double().T
    trees = tuple(_branches(model, cfg.n_layer - 1, rows[which], 0.0, counts) for which in chosen)
    return TopDown(tuple(cfg.labels[which] for which in chosen), trees, model)


def _branches(
    model: BilinearClassifier, layer: int, direction: Float[Tensor, "d_hidden"], constant: float, counts: list[int]
) -> tuple[Branch, ...]:
    """Eigenvectors behind `direction . output + constant` of one layer, and what is below them."""
    homogeneous = not is_quadratic(model.cfg)
    weights = model.layer(layer, homogeneous=homogeneous).to(torch.float64)
    Q = interaction_matrix(weights, direction)
    if homogeneous:
        Q[-1, -1] += constant
    values, vectors = sorted_eigenpairs(Q)
    norm = values.norm().item()
    found = []
    for rank in range(counts[0]):
        vector, offset = vectors[rank], 0.0
        if homogeneous:
            vector, offset = vector[:-1], vector[-1].item()
        picture, below = None, tuple[Branch, ...]()
        if layer == 0:
            picture = pictures_of(model, vector, space="embedding", homogeneous=False)
            if (signed(picture) * picture).sum() < 0:  # the sign is free: the strongest pixel is shown as positive
                picture, offset = -picture, -offset
        else:
            below = _branches(model, layer - 1, vector, offset, counts[1:])
        found.append(Branch(layer, rank, values[rank].item(), norm, picture, offset, below))
    return tuple(found)
