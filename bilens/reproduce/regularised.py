"""Figures 4, 13, 14 and 19: eigenvectors of image classifiers trained with noise, augmentation and weight decay."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import plotly.graph_objects as go
import torch
from jaxtyping import Float
from torch import Tensor

from bilens.draw import plots
from bilens.draw.images import image_grid
from bilens.reproduce.image_runs import data_and_config, ran_on
from bilens.reproduce.reproduction import PICTURE, Made, Settings
from bilens.vision import (
    BilinearClassifier,
    Eigenfeatures,
    ImageDataset,
    ImageTrainConfig,
    eigenfeatures,
    regularisation_study,
    train_classifier,
)

TOP = 5  # eigenvectors of a class whose pixels appendix E counts


def near_sparsity(values: Float[Tensor, "*n d"]) -> Float[Tensor, "*n"]:
    """`(L1 / L2)^2`, a continuous count of the entries that are not small (appendix E): d where all are equal in size,
    1 where one is all there is."""
    return values.abs().sum(-1) ** 2 / values.square().sum(-1)


def effective_rank(found: Eigenfeatures) -> float:
    """`near_sparsity` of the eigenvalues, the mean over classes."""
    return near_sparsity(found.values).mean().item()


def effective_pixels(found: Eigenfeatures) -> float:
    """`near_sparsity` of the pictures of each class' first five eigenvectors by |eigenvalue|, the mean over all."""
    assert found.pictures is not None  # one layer
    return near_sparsity(found.pictures[:, :TOP]).mean().item()


def noise(settings: Settings) -> Made:
    """Figure 4."""
    data, config = data_and_config(settings)
    noises = (0.0, 0.3) if settings.reduced else (0.0, 0.15, 0.3, 0.6, 1.0)
    found = regularisation_study(data, noises, config, progress=False)
    rms = data.train_images.flatten(1).square().mean(1).sqrt().mean().item()
    rows = [("root mean square of an image's pixels, the mean over images", "about 0.3 (MNIST)", f"{rms:.2f}")]
    frame = found.to_frame()
    rows += [
        (f"test accuracy with noise of standard deviation {row.noise:g}", PICTURE, f"{row.test_accuracy:.1%}")
        for row in frame.itertuples()
    ]
    best = frame.loc[frame.test_accuracy.idxmax()]
    figures = {
        f"Eigenfeatures of {data.class_names[c]} against input noise": found.plot(c)
        for c in (0, min(5, data.n_classes - 1))
    }
    words = [
        f"Accuracy is highest, {best.test_accuracy:.1%}, with noise {best.noise:g}, and "
        f"{frame.test_accuracy.iloc[-1]:.1%} with the most. That eigenvectors lose single pixels and become like "
        "digits is to be seen, not measured."
    ]
    return Made(ran_on(data, config, noise=_listed(noises)), rows, figures, words)


def augmentation(settings: Settings) -> Made:
    """Figures 13 and 14."""
    data, config = data_and_config(settings)
    shift = data.width / 4  # the paper's 7 of 28 pixels
    noises = (0.0, 0.4) if settings.reduced else (0.0, 0.2, 0.4)
    strengths = (0.0, 1.0) if settings.reduced else (0.0, 0.5, 1.0)
    largest = {"translation": shift, "rotation": 32.0, "blur": 0.8}
    shown = {"translation": 0, "rotation": min(5, data.n_classes - 1), "blur": 0}
    units = {"translation": "pixels", "rotation": "degrees", "blur": "pixels"}
    figures: dict[str, go.Figure] = {}
    rows: list[tuple[str, str, str]] = []
    spectrum, shifted = None, []
    for vary, most in largest.items():
        grid = [
            [
                train_classifier(data, _varied(config, noise=n, **{vary: s * most}), progress=False).model
                for s in strengths
            ]
            for n in noises
        ]
        labels = [f"{s * most:g} {units[vary]}" for s in strengths]
        caption = f"14: {vary} from left to right, noise from top to bottom; class {data.class_names[shown[vary]]}"
        figures[caption] = _grid(grid, data, shown[vary], labels, noises)
        if vary == "translation":
            spectrum = eigenfeatures(grid[0][-1], [shown[vary]]).plot_spectrum()
        for n, models in ((noises[0], grid[0]), (noises[-1], grid[-1])):
            ranks = [effective_rank(eigenfeatures(model)) for model in (models[0], models[-1])]
            paper = "higher with translation" if vary == "translation" else ""
            what = f"effective rank without and with {vary} of {most:g} {units[vary]}, noise {n:g}"
            rows.append((what, paper, f"{ranks[0]:.1f}, {ranks[1]:.1f}"))
            if vary == "translation":
                shifted.append(f"{ranks[0]:.1f} to {ranks[1]:.1f}")
    assert spectrum is not None
    figures = {
        f"13: the class {data.class_names[0]} under translation by up to {shift:g} pixels either way": spectrum
    } | figures
    words = [
        f"Of translation the paper says that it raises the rank. Here the effective rank goes with it from "
        f"{shifted[0]} without noise, and from {shifted[1]} with the most.",
        "Effective rank is (L1/L2)^2 of a class' eigenvalues, the mean over classes, as the paper's appendix E has "
        "it. The strengths of rotation and blur are those of the authors' script, up to 32 degrees and 0.8 "
        "pixels.",
    ]
    return Made(ran_on(data, config, noise=_listed(noises)), rows, figures, words)


def _grid(
    models: Sequence[Sequence[BilinearClassifier]],
    data: ImageDataset,
    row: int,
    labels: Sequence[str],
    noises: Sequence[float],
) -> go.Figure:
    """The leading positive eigenfeature of one class, of every model, under its test accuracy."""
    images, titles = [], []
    for line in models:
        features = [eigenfeatures(model, [row]) for model in line]
        images.append([found.images[0, found.signed_ranks(0, 1, 1)[0]] for found in features])
        accuracies = [model.accuracy(data.test_images, data.test_labels) for model in line]
        titles.append([f"{label}: {accuracy:.1%}" for label, accuracy in zip(labels, accuracies, strict=True)])
    return image_grid(images, titles, row_labels=[f"noise {n:g}" for n in noises], title="leading eigenfeature")


def sparsity(settings: Settings) -> Made:
    """Figure 19."""
    data, config = data_and_config(settings)
    levels = (0.0, 1.0) if settings.reduced else (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)  # of both, as in the authors' script
    ranks, pixels = (torch.zeros(len(levels), len(levels)) for _ in range(2))
    for i, decay in enumerate(levels):
        for j, noise in enumerate(levels):
            varied = replace(config, noise=noise, weight_decay=decay)
            found = eigenfeatures(train_classifier(data, varied, progress=False).model)
            ranks[i, j], pixels[i, j] = effective_rank(found), effective_pixels(found)
    rows = []
    for what, measured, paper in (
        ("effective rank (eigenvalues)", ranks, ("more with noise", "less with decay")),
        (f"effective pixels (first {TOP} eigenvectors)", pixels, ("noise plays a large role", "weight decay does not")),
    ):
        rows += [
            (f"{what}, noise from 0 to 1, mean over weight decays", paper[0], _change(measured.mean(0))),
            (f"{what}, weight decay from 0 to 1, mean over noises", paper[1], _change(measured.mean(1))),
        ]
    names = [f"{level:g}" for level in levels]
    titles: Any = {"row_title": "weight decay", "col_title": "input noise"}
    figures = {
        "19: effective rank, (L1/L2)^2 of the eigenvalues, mean over classes": plots.heatmap(
            ranks, names, names, **titles
        ),
        f"19: effective pixels, (L1/L2)^2 of the pictures of the first {TOP} eigenvectors": plots.heatmap(
            pixels, names, names, **titles
        ),
    }
    words = [
        "The paper says two things of noise and rank: that more noise gives a lower-rank spectrum (section 4.1, which "
        "refers to appendix E), and that noise increases the number of important eigenvectors (appendix E). "
        f"Here the effective rank {'grows' if ranks.mean(0)[-1] > ranks.mean(0)[0] else 'falls'} with noise."
    ]
    return Made(ran_on(data, config, noise=_listed(levels), weight_decay=_listed(levels)), rows, figures, words)


def _varied(config: ImageTrainConfig, **changes: Any) -> ImageTrainConfig:
    return replace(config, **changes)


def _change(means: Float[Tensor, "n"]) -> str:
    return f"{means[0]:.1f} to {means[-1]:.1f}"


def _listed(values: Sequence[float]) -> str:
    return f"{', '.join(f'{value:g}' for value in values[:-1])} and {values[-1]:g}"
