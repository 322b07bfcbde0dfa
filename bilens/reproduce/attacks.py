"""Figures 7 and 26: masks from the weights, the paper's and ours, added to images."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from bilens.reproduce.image_runs import data_and_config, ran_on
from bilens.reproduce.reproduction import PICTURE, Made, Settings
from bilens.vision import (
    BilinearClassifier,
    ImageDataset,
    Mask,
    MaskStudy,
    adversarial_mask,
    mask_study,
    pseudo_inverse_masks,
    train_classifier,
)

LENGTHS = (0.1, 0.25, 0.5, 0.75, 1.0)  # of the mean image's
EIGENVECTORS, IN_V = 3, 10  # masks of a class, and positive eigenvectors of every class in the pseudo-inverse
RARE = 0.01  # the share of the images that light a pixel of the outer edge, at most


def masks(settings: Settings) -> Made:
    """Figure 7A with the paper's masks and ours, and 7B with the paper's."""
    data, config = data_and_config(settings, noise=0.15)
    model = train_classifier(data, config, progress=False).model
    n_random = 3 if settings.reduced else 20

    def study(chosen: Sequence[Mask]) -> MaskStudy:
        scale = data.test_images.flatten(1).norm(dim=1).mean().item()
        strengths = [round(part * scale, 2) for part in LENGTHS]
        return mask_study(chosen, data.test_images, data.test_labels, strengths, n_random=n_random, progress=False)

    theirs = study(_theirs(model, data))
    ours = study([adversarial_mask(model, target) for target in range(data.n_classes)])
    accuracy = model.accuracy(data.test_images, data.test_labels)
    rows = [("test accuracy without a mask", "", f"{accuracy:.1%}")]
    rows += [
        (
            f"accuracy under masks {length:.0%} as long as the mean image: the paper's, ours, random ones",
            "drops significantly more than under random masks",
            f"{a.accuracy:.1%}, {b.accuracy:.1%}, {a.random_accuracy:.1%}",
        )
        for length, a, b in _by_length(theirs, ours)
    ]
    rows += [
        (
            f"taken for the class aimed at, masks {length:.0%} as long: the paper's, ours, random ones",
            "rises",
            f"{a.hits:.1%}, {b.hits:.1%}, {a.random_hits:.1%}",
        )
        for length, a, b in _by_length(theirs, ours)
    ]
    figures = {
        "7A: the paper's masks, one for each of the first three eigenvectors of every class": theirs.plot(),
        "Our masks, one for every class (not in the paper)": ours.plot(),
        "26: the paper's masks, images, and their sums": _first_of_each(theirs).plot_masks(),
        "Our masks, images, and their sums (not in the paper)": ours.plot_masks(),
    }
    words = [
        "The paper's mask is a row of the pseudo-inverse of the first ten positive eigenvectors of all classes (here "
        f"{_in_v(model)} of each). Ours is the leading eigenvector, over the pixels, of a class' matrix minus the mean "
        "of all others. Random masks are the paper's with their pixels in random order. Images of the class aimed at "
        "are left out; the authors' script counts them too.",
        _verdict(theirs, ours),
    ]
    edge = (data.train_images.flatten(1) > 0).double().mean(0) < RARE
    if edge.any():
        plain = train_classifier(data, replace(config, noise=0.0, weight_decay=0.0), progress=False).model
        outer = study(_theirs(plain, data, edge))
        rows += [
            (
                f"no regularisation, masks {length:.0%} as long on the {int(edge.sum())} pixels that fewer than 1 % of "
                "images use: accuracy under the paper's, and under random ones",
                PICTURE,
                f"{a.accuracy:.1%}, {a.random_accuracy:.1%}",
            )
            for length, a, _ in _by_length(outer, outer)
        ]
        figures["7B: masks on the outer edge only, of a model trained without regularisation"] = outer.plot()
    else:
        words.append("Every pixel is used by 1 % of the images or more, so that figure 7B has no outer edge to use.")
    return Made(ran_on(data, config, noise="0.15, as in the paper's figure 7A,"), rows, figures, words)


def _in_v(model: BilinearClassifier) -> int:
    """Eigenvectors of every class in the pseudo-inverse: ten, or so many that all of them fit the embedding."""
    return max(1, min(IN_V, model.cfg.d_hidden // model.cfg.d_output))


def _theirs(model: BilinearClassifier, data: ImageDataset, allowed: Tensor | None = None) -> list[Mask]:
    """The paper's masks for every class, each turned by the images of the others."""
    k = _in_v(model)
    return [
        mask
        for target in range(data.n_classes)
        for mask in pseudo_inverse_masks(
            model, target, data.train_images[data.train_labels != target], n=min(EIGENVECTORS, k), k=k, allowed=allowed
        )
    ]


def _by_length(theirs: MaskStudy, ours: MaskStudy) -> "list[tuple[float, Any, Any]]":
    """A length of the masks, and the row of each study for it."""
    frames = (found.by_strength().itertuples() for found in (theirs, ours))
    return list(zip(LENGTHS, *frames, strict=True))


def _first_of_each(found: MaskStudy) -> MaskStudy:
    """The study of the first mask of every class alone."""
    first = [i for i, mask in enumerate(found.masks) if i == 0 or found.masks[i - 1].target != mask.target]
    parts: dict[str, Any] = {
        name: getattr(found, name)[first] for name in ("accuracy", "hits", "random_accuracy", "random_hits", "example")
    }
    masks = tuple(found.masks[i] for i in first)
    return replace(found, masks=masks, n_images=tuple(found.n_images[i] for i in first), **parts)


def _verdict(theirs: MaskStudy, ours: MaskStudy) -> str:
    """Which masks do more, at half and three quarters of the mean length."""
    at = {length: rows for length, *rows in _by_length(theirs, ours)}
    left = [" and ".join(f"{at[length][i].accuracy:.0%}" for length in (0.5, 0.75)) for i in range(2)]
    return (
        "At half and three quarters of the mean image's length, the paper's masks leave an accuracy of "
        f"{left[0]}, ours of {left[1]}."
    )
