"""More features than dimensions: how a bilinear layer computes with features that share directions.

1. n features, each zero with probability S (the sparsity) and otherwise uniform in 0..1, are embedded in d < n
   dimensions: `x = sum_i f_i d_i`, with trained directions `d_i`
2. a bilinear layer on `x` is to give their squares `f_i^2`, or products `f_i f_j` of pairs, with squared error
3. for every output the interaction matrix in the feature basis, `D Q D^T` (`bilens.layer.bilinear`), should be 1 (or
   1/2 twice) at the target's place and zero elsewhere; what is elsewhere is interference

The columns of every `D Q D^T` lie in the d dimensions that the columns of D span. These do not hold the unit vectors of
all n features, so not all outputs can be zero everywhere else. But an entry `(i, j)` only matters where both features
are active, which is seldom where features are sparse; and there are `d (d + 1) / 2` independent quadratic forms of x,
so up to that many squares can be right whenever one feature is active alone. Sparse features therefore fit with cross
interactions that are large and rarely met.

Source: the setting is that of Elhage et al. 2022, "Toy models of superposition" (arXiv 2209.10652), with a bilinear
layer in place of the ReLU.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import Literal

import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Float
from torch import Tensor, nn
from tqdm.auto import tqdm

from bilens._core.checks import check_index, check_rates, check_sizes
from bilens._core.display import Tabular
from bilens.draw import plots
from bilens.draw.toys import matrix_grid
from bilens.errors import ArgumentError, nearest
from bilens.layer.bilinear import in_basis, interaction_matrix
from bilens.toy.layer import ToyLayer, optimise

Target = Literal["squares", "products"]
N_JUDGED = 20_000  # samples on which a model is judged


@dataclass(frozen=True)
class SuperpositionConfig:
    """What to learn, and how.

    Args:
        n_features: the number of features.
        d_model: dimensions they share.
        d_hidden: hidden units.
        target: `"squares"` of every feature, or `"products"` of features 0 and 1, 2 and 3, ...
        sparsities: the probability that a feature is zero; one model is trained for each.
        steps, batch_size, lr: the settings of the training; the learning rate falls to zero as a cosine.
        seed: the seed of the weights and the features.

    Raises:
        ArgumentError: a number outside its range, or no such target.
    """

    n_features: int = 12
    d_model: int = 5
    d_hidden: int = 32
    target: Target = "squares"
    sparsities: Sequence[float] = (0.0, 0.5, 0.8, 0.9, 0.97)
    steps: int = 3000
    batch_size: int = 512
    lr: float = 5e-3
    seed: int = 0

    def __post_init__(self) -> None:
        sizes = ("n_features", "d_model", "d_hidden", "steps", "batch_size")
        check_sizes(**{name: getattr(self, name) for name in sizes})
        check_rates(lr=self.lr)
        if self.target not in ("squares", "products"):
            raise ArgumentError(
                f"target is {self.target!r}, expected 'squares' or 'products'."
                + nearest(str(self.target), ("squares", "products"))
            )
        if self.target == "products" and self.n_features % 2:
            raise ArgumentError(f"n_features is {self.n_features}; products pair features, expected an even number.")
        if isinstance(self.sparsities, float | int):
            raise ArgumentError(f"sparsities is {self.sparsities!r}, expected a list of them: [{self.sparsities!r}].")
        if not self.sparsities:
            raise ArgumentError("sparsities is empty; expected one or more probabilities.")
        for sparsity in self.sparsities:
            if not (isfinite(sparsity) and 0 <= sparsity < 1):
                raise ArgumentError(f"sparsity {sparsity!r}: expected a probability, at least 0 and below 1.")

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """The two features whose product each output is."""
        if self.target == "squares":
            return [(i, i) for i in range(self.n_features)]
        return [(i, i + 1) for i in range(0, self.n_features, 2)]


@dataclass(frozen=True)
class SuperposedModel(Tabular):
    """One trained model.

    Attributes:
        sparsity: the sparsity of the features it was trained on.
        pairs: the features whose product each output is.
        directions: the directions of the features.
        interactions: the interaction matrix of each output, in the feature basis.
        explained: share of the variance of all outputs on features of that sparsity.
        layer: the trained layer.
    """

    sparsity: float
    pairs: list[tuple[int, int]] = field(repr=False)
    directions: Float[Tensor, "feature d_model"] = field(repr=False)
    interactions: Float[Tensor, "output feature feature"] = field(repr=False)
    explained: float
    layer: ToyLayer = field(repr=False)

    @property
    def gram(self) -> Float[Tensor, "feature feature"]:
        """Inner products of the directions, in units of the longest's square."""
        products = self.directions @ self.directions.T
        return products / products.diagonal().max()

    @property
    def on_target(self) -> Float[Tensor, "output"]:
        """The coefficient of the wanted product, which should be 1."""
        at = torch.arange(len(self.pairs))
        i, j = torch.tensor(self.pairs).T
        return self.interactions[at, i, j] * torch.where(i == j, 1.0, 2.0).to(self.interactions)

    @property
    def alone(self) -> Float[Tensor, "output"]:
        """The largest wrong coefficient of a self interaction: what one feature alone does to another's output."""
        return self._wrong().diagonal(dim1=-2, dim2=-1).abs().amax(-1)

    @property
    def together(self) -> Float[Tensor, "output"]:
        """The largest wrong coefficient `2 Q_ij` of a cross interaction: only pairs of active features meet it."""
        wrong = self._wrong()
        return 2 * (wrong - torch.diag_embed(wrong.diagonal(dim1=-2, dim2=-1))).abs().amax((-2, -1))

    def _wrong(self) -> Float[Tensor, "output feature feature"]:
        wrong = self.interactions.clone()
        for output, (i, j) in enumerate(self.pairs):
            wrong[output, i, j] = wrong[output, j, i] = 0
        return wrong

    def to_frame(self) -> pd.DataFrame:
        """One row per output: `output, on_target, alone, together`."""
        names = [f"f{i} f{j}" for i, j in self.pairs]
        columns = {name: getattr(self, name).tolist() for name in ("on_target", "alone", "together")}
        return pd.DataFrame({"output": names} | columns)

    def plot(self, output: int = 0) -> go.Figure:
        """The geometry of the features (Gram matrix), and the interactions of one output.

        Raises:
            OutOfRangeError: no such output.
        """
        output = check_index(output, len(self.pairs), "output {} is outside the {} outputs")
        i, j = self.pairs[output]
        names = [f"f{k}" for k in range(len(self.directions))]
        return matrix_grid(
            [[self.gram, self.interactions[output]]],
            [f"sparsity {self.sparsity:g}"],
            ["directions: inner products", f"interactions of output f{i} f{j}"],
            names,
        )

    def __str__(self) -> str:
        head = f"sparsity {self.sparsity:g}: {self.explained:.1%} of the variance"
        return f"{head}\n{self.to_frame().to_string(index=False)}"


@dataclass(frozen=True)
class Superposition(Tabular):
    """Models of several sparsities, in the order of the config."""

    config: SuperpositionConfig
    models: list[SuperposedModel] = field(repr=False)

    def __getitem__(self, index: int) -> SuperposedModel:
        return self.models[index]

    def to_frame(self) -> pd.DataFrame:
        """One row per sparsity: `sparsity, explained`, how many features have a direction (half the longest's squared
        length or more), and means over outputs of `on_target, alone, together` (see `SuperposedModel`)."""
        return pd.DataFrame(
            [
                {
                    "sparsity": model.sparsity,
                    "explained": model.explained,
                    "n_embedded": int((model.gram.diagonal() > 0.5).sum()),
                    "on_target": model.on_target.mean().item(),
                    "alone": model.alone.mean().item(),
                    "together": model.together.mean().item(),
                }
                for model in self.models
            ]
        )

    def plot(self) -> go.Figure:
        """Interference and explained variance against how often a feature is active."""
        frame = self.to_frame()
        curves = {
            "explained variance": frame["explained"],
            "interference of one feature alone": frame["alone"],
            "interference of two together": frame["together"],
        }
        title = f"{self.config.n_features} features in {self.config.d_model} dimensions"
        return plots.line(frame["sparsity"], curves, title, x_title="sparsity", y_title="coefficient, or share")

    def plot_geometry(self) -> go.Figure:
        """Gram matrices of the feature directions, a row of them."""
        names = [f"f{k}" for k in range(self.config.n_features)]
        columns = [f"sparsity {model.sparsity:g}" for model in self.models]
        return matrix_grid(
            [[model.gram for model in self.models]], [""], columns, names, "inner products of directions"
        )

    def __str__(self) -> str:
        cfg = self.config
        head = f"{cfg.target} of {cfg.n_features} features in {cfg.d_model} dimensions"
        return f"{head}\n{self.to_frame().to_string(index=False)}"


def train_superposition(config: SuperpositionConfig | None = None, *, progress: bool = True) -> Superposition:
    """Train one model for every sparsity.

    Args:
        config: `None` takes the defaults.
        progress: show a bar.

    Raises:
        TrainingError: the loss is no number any more.
    """
    config = config or SuperpositionConfig()
    bar = tqdm(config.sparsities, unit="model", desc="sparsities", disable=not progress)
    return Superposition(config, [_train(config, sparsity) for sparsity in bar])


def _train(config: SuperpositionConfig, sparsity: float) -> SuperposedModel:
    generator = torch.Generator().manual_seed(config.seed)
    n, d = config.n_features, config.d_model
    directions = nn.Parameter(torch.randn(n, d, generator=generator) * d**-0.5)
    layer = ToyLayer(d, config.d_hidden, len(config.pairs), bias=False, generator=generator)
    i, j = torch.tensor(config.pairs).T

    def errors_and_targets(batch_size: int) -> tuple[Tensor, Tensor]:
        features = sparse_features(batch_size, n, sparsity, generator)
        targets = features[:, i] * features[:, j]
        return layer(features @ directions) - targets, targets

    def loss_at(step: int) -> Tensor:
        return errors_and_targets(config.batch_size)[0].pow(2).mean()

    optimise([directions, *layer.parameters()], loss_at, config.steps, lr=config.lr, progress=False)
    with torch.no_grad():
        errors, targets = errors_and_targets(N_JUDGED)
        explained = 1 - (errors.pow(2).sum() / (targets - targets.mean(0)).pow(2).sum()).item()
        weights = layer.weights()
        matrices = interaction_matrix(weights, torch.eye(len(config.pairs), dtype=torch.float64))
        found = directions.detach().double()
    return SuperposedModel(sparsity, config.pairs, found, in_basis(matrices, found), explained, layer)


def sparse_features(
    n_samples: int, n_features: int, sparsity: float, generator: torch.Generator
) -> Float[Tensor, "sample feature"]:
    """Features that are zero with probability `sparsity`, and otherwise uniform in 0..1."""
    active = torch.rand(n_samples, n_features, generator=generator) >= sparsity
    return torch.rand(n_samples, n_features, generator=generator) * active
