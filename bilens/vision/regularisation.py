"""How regularisation makes eigenfeatures clean: one model for every strength of it, and their eigenfeatures in a row.

Source: Pearce et al. 2025, section 4.1 (Gaussian noise on the pixels) and appendices B and E; any number of
`ImageTrainConfig` can be varied.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from tqdm.auto import tqdm

from bilens._core.display import Tabular
from bilens._core.typing import typed
from bilens.draw.images import image_grid
from bilens.errors import ArgumentError, nearest
from bilens.vision.data import ImageDataset, load_images
from bilens.vision.model import BilinearClassifier
from bilens.vision.spectral import Class, Eigenfeatures, Space, class_index, eigenfeatures
from bilens.vision.training import ImageTrainConfig, TrainedClassifier, train_classifier


@dataclass(frozen=True)
class RegularisationStudy(Tabular):
    """Models that differ in one training argument.

    Attributes:
        vary: the argument.
        settings: its value for each model.
        runs: the trained models.
        train_accuracy: the accuracy of each on the training images as they are.
        space: the space of the eigenvectors.
    """

    vary: str
    settings: tuple[float, ...]
    runs: tuple[TrainedClassifier, ...] = field(repr=False)
    train_accuracy: tuple[float, ...]
    space: Space

    @property
    def models(self) -> list[BilinearClassifier]:
        """The models."""
        return [run.model for run in self.runs]

    def features(self, which: Class) -> list[Eigenfeatures]:
        """The eigenfeatures of one class, of every model."""
        return [eigenfeatures(model, [which], space=self.space) for model in self.models]

    def to_frame(self) -> pd.DataFrame:
        """One row per model: the argument varied, `train_accuracy, test_accuracy, top_10_share` (of the first ten
        eigenfeatures of a class in the squared eigenvalues, the mean over classes)."""
        shares = []
        for model in self.models:
            squares = eigenfeatures(model, space=self.space).values ** 2
            shares.append((squares[:, :10].sum(1) / squares.sum(1)).mean().item())
        return pd.DataFrame(
            {
                self.vary: self.settings,
                "train_accuracy": self.train_accuracy,
                "test_accuracy": [run.test_accuracy for run in self.runs],
                "top_10_share": shares,
            }
        )

    def plot(self, which: Class = 0, positive: int = 4, negative: int = 2) -> go.Figure:
        """A row of eigenfeatures of one class for every model.

        Args:
            which: the class.
            positive, negative: the numbers of positive and negative ones shown.

        Raises:
            ArgumentError: no such class, or models of several layers.
        """
        grid, titles, rows = [], [], []
        for setting, run, found in zip(self.settings, self.runs, self.features(which), strict=True):
            ranks = [*found.signed_ranks(0, 1, positive), *found.signed_ranks(0, -1, negative)]
            grid.append([found.images[0, rank] for rank in ranks])
            titles.append([f"λ = {found.values[0, rank]:+.3g}" for rank in ranks])
            rows.append(f"{self.vary} {setting:g}\n{run.test_accuracy:.1%}")
        label = self.models[0].cfg.labels[class_index(self.models[0].cfg, which)]
        title = f"eigenfeatures of {label} over the {self.space}, test accuracy at the left"
        return image_grid(grid, titles, row_labels=rows, title=title)

    def __str__(self) -> str:
        return self.to_frame().to_string(index=False, float_format="{:.4g}".format)


@typed
def regularisation_study(
    data: str | os.PathLike[str] | ImageDataset,
    settings: Sequence[float | int] = (0.0, 0.15, 0.3, 0.6, 1.0),
    config: ImageTrainConfig | None = None,
    *,
    vary: str = "noise",
    space: Space = "embedding",
    progress: bool = True,
) -> RegularisationStudy:
    """Train a one-layer model for every setting of one argument, all from the same seed.

    Args:
        data: a dataset, or where to load it from.
        settings: values of the argument.
        config: everything else; `None` takes the defaults.
        vary: the argument of `ImageTrainConfig` to vary: `"noise"`, `"weight_decay"`, `"latent_noise"`, ...
        space: the space of the eigenvectors.
        progress: show a bar.

    Raises:
        ArgumentError: no settings, an argument that is no number or does not exist, or a value outside its range.
        ImageDataError: the data cannot be read.
    """
    config = config or ImageTrainConfig()
    known = [entry.name for entry in fields(ImageTrainConfig) if isinstance(getattr(config, entry.name), float)]
    if vary not in known:
        raise ArgumentError(f"vary is {vary!r}, expected one of {', '.join(known)}.{nearest(vary, known)}")
    if len(settings) == 0:
        raise ArgumentError("no settings, expected at least one.")
    data = load_images(data)
    varied: list[dict[str, Any]] = [{vary: float(setting)} for setting in settings]
    configs = [replace(config, **each) for each in varied]
    runs = tuple(
        train_classifier(data, each, progress=False)
        for each in tqdm(configs, desc=vary, unit="model", disable=not progress)
    )
    train = tuple(run.model.accuracy(data.train_images, data.train_labels) for run in runs)
    return RegularisationStudy(vary, tuple(map(float, settings)), runs, train, space)
