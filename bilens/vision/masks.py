"""Adversarial masks from the weights alone: one image that, added to any other, makes it a class.

1. the interaction matrix over the pixels of the class aimed at, minus the mean of all others, or minus that of the
   class to be mistaken for it
2. restricted to the pixels that the mask may use: its eigenvectors are the masks of unit length there which add most by
   themselves, `m^T Q m`. The leading ones with positive eigenvalues are summed, each weighted by its eigenvalue
3. where only a number of pixels is to be used, the strongest are kept. The result has unit length

The sign of an eigenvector is free, and a quadratic form does not tell `m` from `-m`; brightness is positive, so a mask
is turned to be bright rather than dark. No image is looked at, and no gradient.

The study adds masks to images of the classes attacked, at several strengths (lengths, in units of brightness), and
compares with the same masks with their pixels in random order among those allowed: equal in norm, in sparsity and in
the distribution of values. The logits of an image plus `s` times a mask are a parabola in `s`, which is all computed.

One layer; the quadratic part only decides a mask (with biases or residual additions, the accuracies are still those of
the whole model).

`pseudo_inverse_masks` are those of Pearce et al. 2025, section 4.4, to compare with: the eigenvectors V of all classes
overlap, so that an image along one activates others; a row m_i of the pseudo-inverse of V does not, `v_j . m_i = 1` for
`j = i` and 0 else, as long as there are no more eigenvectors than dimensions.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import pandas as pd
import plotly.graph_objects as go
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from bilens._core.display import Tabular
from bilens._core.typing import typed
from bilens.draw import plots
from bilens.draw.images import image_grid
from bilens.errors import ArgumentError, OutOfRangeError
from bilens.layer.bilinear import branches, interaction_matrix, products
from bilens.layer.eigen.pairs import sorted_eigenpairs
from bilens.vision.model import BilinearClassifier, with_one
from bilens.vision.spectral import Class, as_images, class_directions, class_index, last_layer
from bilens.vision.truncated import checked_labels


@dataclass(frozen=True)
class Mask(Tabular):
    """An image of unit length to be added to others.

    Attributes:
        pixels: the mask.
        allowed: the pixels it may use.
        target: the class aimed at.
        away_from: the class to be mistaken for it; `None` is every other.
        gain: `m^T Q m`, what the mask adds by itself at strength 1 (the quadratic part).
        model: whose weights it is made of.
    """

    pixels: Float[Tensor, "d_input"] = field(repr=False)
    allowed: Bool[Tensor, "d_input"] = field(repr=False)
    target: int
    away_from: int | None
    gain: float
    model: BilinearClassifier = field(repr=False)

    @property
    def name(self) -> str:
        """`target`, or `away_from -> target`."""
        labels = self.model.cfg.labels
        return ("" if self.away_from is None else f"{labels[self.away_from]} -> ") + labels[self.target]

    def shuffled(self, n: int, seed: int = 0) -> Float[Tensor, "n d_input"]:
        """The mask with its values in random order among the pixels allowed, `n` times."""
        generator = torch.Generator().manual_seed(seed)
        places = torch.nonzero(self.allowed.cpu())[:, 0]
        random = self.pixels.new_zeros(n, len(self.pixels))
        for row in random:
            row[places] = self.pixels[places[torch.randperm(len(places), generator=generator)]]
        return random

    def to_frame(self) -> pd.DataFrame:
        """One row: `mask, gain, pixels` (those that are not zero)`, allowed`."""
        used = int((self.pixels != 0).sum())
        columns = {"mask": self.name, "gain": self.gain, "pixels": used, "allowed": int(self.allowed.sum())}
        return pd.DataFrame([columns])

    def plot(self) -> go.Figure:
        """The mask as an image."""
        return image_grid([[as_images(self.pixels, self.model.cfg)]], [[f"gain {self.gain:.3g}"]], title=self.name)

    def __str__(self) -> str:
        return self.to_frame().to_string(index=False)


@dataclass(frozen=True)
class MaskStudy(Tabular):
    """What masks and random ones like them do to images.

    Attributes:
        masks: those added.
        strengths: their length.
        accuracy, hits: share of the images attacked that are still recognised, and that are taken for the target.
        random_accuracy, random_hits: the same with shuffled masks, one column each.
        n_images: images attacked with each mask.
        mean_norm: the mean length of an image.
        example: an image as it is attacked, per mask.
    """

    masks: tuple[Mask, ...] = field(repr=False)
    strengths: tuple[float, ...]
    accuracy: Float[Tensor, "mask strength"] = field(repr=False)
    hits: Float[Tensor, "mask strength"] = field(repr=False)
    random_accuracy: Float[Tensor, "mask strength random"] = field(repr=False)
    random_hits: Float[Tensor, "mask strength random"] = field(repr=False)
    n_images: tuple[int, ...] = field(repr=False)
    mean_norm: float
    example: Float[Tensor, "mask d_input"] = field(repr=False)

    def to_frame(self) -> pd.DataFrame:
        """One row per mask and strength: `mask, strength, images, accuracy, random_accuracy, lowest_random, hits,
        random_hits` (random ones: the mean, and the lowest accuracy of any)."""
        n = len(self.strengths)
        return pd.DataFrame(
            {
                "mask": [mask.name for mask in self.masks for _ in range(n)],
                "strength": self.strengths * len(self.masks),
                "images": [count for count in self.n_images for _ in range(n)],
                "accuracy": self.accuracy.flatten(),
                "random_accuracy": self.random_accuracy.mean(-1).flatten(),
                "lowest_random": self.random_accuracy.amin(-1).flatten(),
                "hits": self.hits.flatten(),
                "random_hits": self.random_hits.mean(-1).flatten(),
            }
        )

    def by_strength(self) -> pd.DataFrame:
        """The means over masks: one row per strength."""
        return self.to_frame().drop(columns=["mask", "images"]).groupby("strength", as_index=False).mean()

    def plot(self) -> go.Figure:
        """Accuracy and hits against strength, of masks and of random ones; means over masks."""
        frame = self.by_strength()
        curves = {
            "accuracy, eigenvector mask": frame["accuracy"],
            "accuracy, random mask": frame["random_accuracy"],
            "taken for the target, eigenvector mask": frame["hits"],
            "taken for the target, random mask": frame["random_hits"],
        }
        title = "masks from the weights" if len(self.masks) > 1 else f"mask {self.masks[0].name}"
        x_title = f"length of the mask (the mean image has {self.mean_norm:.3g})"
        return plots.line(frame["strength"], curves, title, x_title=x_title, y_title="share of images attacked")

    def plot_masks(self, strength: float | None = None) -> go.Figure:
        """Every mask, an image, and the sum of both.

        Args:
            strength: the mask's strength in the sum; by default the middle one of those studied.
        """
        strength = self.strengths[len(self.strengths) // 2] if strength is None else strength
        grid, titles, cfg = [], [], self.masks[0].model.cfg
        for mask, image in zip(self.masks, self.example.double(), strict=True):
            attacked = image + strength * mask.pixels
            with torch.no_grad():
                classes = [cfg.labels[int(c)] for c in mask.model.predict(torch.stack([image, attacked]))]
            grid.append([as_images(each, cfg) for each in (mask.pixels, image, attacked)])
            titles.append([f"mask {mask.name}", f"taken for {classes[0]}", f"+ {strength:g} x mask: {classes[1]}"])
        return image_grid(grid, titles, title="masks, images, and their sums")

    def __str__(self) -> str:
        return (
            f"{len(self.masks)} masks; the mean image has length {self.mean_norm:.3g}; means over masks:\n"
            f"{self.by_strength().to_string(index=False, float_format='{:.3f}'.format)}"
        )


@typed
@torch.no_grad()
def adversarial_mask(
    model: BilinearClassifier,
    target: Class,
    away_from: Class | None = None,
    *,
    k: int = 1,
    border: int | None = None,
    pixels: int | None = None,
) -> Mask:
    """A mask that makes images a class, from the weights.

    Args:
        model: a one-layer classifier.
        target: the class aimed at.
        away_from: the class to be mistaken for it; `None` for all others.
        k: the number of eigenfeatures to sum, each weighted by its eigenvalue.
        border: only pixels so near to the edge; `None` allows all.
        pixels: only so many pixels, the strongest; `None` keeps all.

    Raises:
        ArgumentError: no such class, twice the same, a model of several layers, or no positive eigenvalue.
        OutOfRangeError: `k`, `border` or `pixels` is not in its range.
    """
    cfg = model.cfg
    aim = class_index(cfg, target)
    if away_from is None:
        u = torch.full((cfg.d_output,), -1 / max(1, cfg.d_output - 1), dtype=torch.float64)
        u[aim] = 1
    else:
        u = class_directions(cfg, [(aim, class_index(cfg, away_from))])[0][0]
    layer = last_layer(model, space="pixels", homogeneous=False)
    allowed = _allowed(model, border)
    n_allowed = int(allowed.sum())
    for name, value in (("k", k), ("pixels", pixels)):
        if value is not None and not 1 <= value <= n_allowed:
            raise OutOfRangeError(f"{name} is {value}, expected 1 to {n_allowed}, the number of pixels allowed.")
    Q = interaction_matrix(layer, u.to(layer.W_out))
    values, vectors = sorted_eigenpairs(Q[allowed][:, allowed])
    positive = torch.nonzero(values > 0)[:k, 0]
    if len(positive) == 0:
        raise ArgumentError("no eigenvalue is positive: no mask adds to this class by itself.")
    bright = torch.where(vectors.sum(-1, keepdim=True) < 0, -vectors, vectors)[positive]
    mask = Q.new_zeros(cfg.d_input)
    mask[allowed] = values[positive] @ bright
    if pixels is not None:
        strongest = mask.abs().topk(pixels).indices
        mask = torch.zeros_like(mask).index_copy(0, strongest, mask[strongest])
    mask = mask / mask.norm()
    source = None if away_from is None else class_index(cfg, away_from)
    return Mask(mask, allowed, aim, source, (mask @ Q @ mask).item(), model)


@typed
@torch.no_grad()
def pseudo_inverse_masks(
    model: BilinearClassifier,
    target: Class,
    images: Float[Tensor, "batch *image"],
    *,
    n: int = 3,
    k: int = 10,
    allowed: Bool[Tensor, "d_input"] | None = None,
) -> list[Mask]:
    """The masks of Pearce et al. 2025, section 4.4, for the leading positive eigenvectors of one class.

    V is the first `k` positive eigenvectors of every class, in the embedding; a mask is the row of V's pseudo-inverse
    for an eigenvector, seen in the pixels through the embedding as eigenvectors are. (`v_j . m_i = 0` so holds in the
    embedding, and in the pixels only as far as the embedding keeps angles.) The sign is the authors': that of the
    eigenvector's read of the mean image.

    Args:
        model: A one-layer classifier.
        target: The class aimed at.
        images: Images to turn the masks by; those attacked.
        n: How many of the class' eigenvectors to make a mask of, each.
        k: How many positive eigenvectors of every class V holds.
        allowed: The pixels that the mask may use, the others being set to zero. `None` allows all.

    Raises:
        ArgumentError: No such class, a model of several layers, fewer than `k` positive eigenvalues of some class, or
            a mask that is zero on the pixels allowed.
        OutOfRangeError: `n` is not in 1..k.
    """
    cfg = model.cfg
    aim = class_index(cfg, target)
    if not 1 <= n <= k:
        raise OutOfRangeError(f"n is {n}, expected 1 to {k}, the eigenvectors of a class in the pseudo-inverse (k).")
    if cfg.n_layer > 1:
        raise ArgumentError(f"the model has {cfg.n_layer} layers; masks are made for one.")
    layer = last_layer(model, space="embedding", homogeneous=False)
    each = torch.eye(cfg.d_output, dtype=layer.W_out.dtype, device=layer.W_out.device)
    values, vectors = sorted_eigenpairs(interaction_matrix(layer, each))
    ranks = [torch.nonzero(row > 0)[:k, 0] for row in values]
    fewest = min(map(len, ranks))
    if fewest < k:
        raise ArgumentError(f"k is {k}, but some class has only {fewest} positive eigenvalues.")
    V = torch.stack([vectors[row, rank] for row, rank in enumerate(ranks)]).flatten(0, 1)
    rows = torch.linalg.pinv(V).T[aim * k : aim * k + n]
    embedding = model.W_E.detach().double()
    mean = model.flatten(images).double().mean(0)
    turned = rows * torch.where(V[aim * k : aim * k + n] @ (mean @ embedding) < 0, -1.0, 1.0)[:, None]
    allowed = torch.ones_like(mean, dtype=torch.bool) if allowed is None else allowed.to(mean.device)
    pixels = (turned @ embedding.T) * allowed
    if not pixels.any(-1).all():
        raise ArgumentError(f"a mask of {cfg.labels[aim]} is zero on the {int(allowed.sum())} pixels allowed.")
    pixels = pixels / pixels.norm(dim=-1, keepdim=True)
    Q = interaction_matrix(last_layer(model, space="pixels", homogeneous=False), each[aim])
    return [Mask(mask, allowed, aim, None, (mask @ Q @ mask).item(), model) for mask in pixels]


@typed
@torch.no_grad()
def mask_study(
    masks: Mask | Sequence[Mask],
    images: Float[Tensor, "batch *image"],
    labels: Int[Tensor, "batch"],
    strengths: Sequence[float | int] = (1.0, 2.0, 3.0, 4.0, 6.0, 8.0),
    *,
    n_random: int = 20,
    seed: int = 0,
    progress: bool = True,
) -> MaskStudy:
    """Accuracy with masks and with random ones of equal norm and sparsity.

    Args:
        masks: the masks of one model, from `adversarial_mask`.
        images: those of a mask's `away_from` are attacked, or all that are not of its target already.
        labels: their classes.
        strengths: lengths of the masks; negative ones subtract.
        n_random: shuffled masks to compare each mask with.
        seed: the seed of the shuffles.
        progress: show a bar.

    Raises:
        ArgumentError: no masks or strengths, no images to attack, labels outside the model's classes, or images of
            another size.
        OutOfRangeError: no random masks.
    """
    masks = [masks] if isinstance(masks, Mask) else list(masks)
    if not masks or len(strengths) == 0:
        raise ArgumentError(f"{len(masks)} masks and {len(strengths)} strengths, expected at least one of each.")
    if n_random < 1:
        raise OutOfRangeError(f"n_random is {n_random}, expected 1 or more.")
    model = masks[0].model
    labels, x = checked_labels(model, images, labels), model.flatten(images)
    lengths = torch.tensor(strengths, dtype=torch.float64, device=x.device)
    shares: list[Tensor] = []
    counts: list[int] = []
    examples: list[Tensor] = []
    for mask in tqdm(masks, desc="masks", unit="mask", disable=not progress):
        attacked = labels != mask.target if mask.away_from is None else labels == mask.away_from
        if not attacked.any():
            raise ArgumentError(f"no image to attack with mask {mask.name}: the labels hold none of its classes.")
        added = torch.cat([mask.pixels[None], mask.shuffled(n_random, seed)])
        guesses = _classes_along(model, x[attacked], added, lengths)
        right = (guesses == labels[attacked]).double().mean(-1)
        hits = (guesses == mask.target).double().mean(-1)
        shares.append(torch.stack([right, hits]).cpu())
        counts.append(int(attacked.sum()))
        examples.append(x[attacked][len(examples) % counts[-1]])
    accuracy, hits = torch.stack(shares, 1)
    return MaskStudy(
        masks=tuple(masks),
        strengths=tuple(map(float, strengths)),
        accuracy=accuracy[..., 0],
        hits=hits[..., 0],
        random_accuracy=accuracy[..., 1:],
        random_hits=hits[..., 1:],
        n_images=tuple(counts),
        mean_norm=x.norm(dim=-1).mean().item(),
        example=torch.stack(examples),
    )


def _classes_along(
    model: BilinearClassifier,
    x: Float[Tensor, "batch d_input"],
    masks: Float[Tensor, "mask d_input"],
    strengths: Float[Tensor, "strength"],
) -> Int[Tensor, "strength mask batch"]:
    """The most likely class of every image with every mask added: all of the model, as a parabola in the strength."""
    layer = last_layer(model, space="pixels", homogeneous=True)
    inputs, added = with_one(x.double()), F.pad(masks.double(), (0, 1))
    own, of_masks = branches(layer, inputs), branches(layer, added)
    plain, quadratic = products(own, own) @ layer.W_out, products(of_masks, of_masks) @ layer.W_out
    classes = []
    for row in range(len(added)):
        linear = 2 * products(own, of_masks[row]) @ layer.W_out
        s = strengths[:, None, None]
        classes.append((plain + s * linear + s**2 * quadratic[row]).argmax(-1))
    return torch.stack(classes, 1)


def _allowed(model: BilinearClassifier, border: int | None) -> Bool[Tensor, "d_input"]:
    everywhere = torch.ones(model.cfg.d_input, dtype=torch.bool, device=model.W_E.device)
    if border is None:
        return everywhere
    image = as_images(everywhere, model.cfg).clone()
    if not 1 <= border <= min(image.shape):
        raise OutOfRangeError(f"border is {border}, expected 1 to {min(image.shape)} pixels, or None for all of them.")
    image[border:-border, border:-border] = False
    return image.flatten()
