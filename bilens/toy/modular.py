"""Modular addition: a bilinear layer that learns `(a + b) mod p`, and the waves in its eigenvectors.

1. the input is `(e_a, e_b)`, two one-hot halves; the outputs are p logits; no biases, so that each logit is
   `x^T Q_c x` with the interaction matrix of its class (`bilens.layer.bilinear`)
2. a part of all `p^2` pairs is trained on, all of it in every step, with weight decay: memorising comes first, the rule
   that holds for the other pairs later
3. the rule is a sum of waves, `logit_c ~ sum_f w_f cos(2 pi f (a + b - c) / p)`: of each frequency a pair of halves,
   `cos(a' + b' - c') = cos(a' - c') cos b' - sin(a' - c') sin b'`. An eigenvector of `Q_c` then has one wave of that
   frequency in each half
4. so the discrete Fourier transform of each half says how much of an eigenvector lies in which frequency

Of `Q_c` the pairs see only the block between the halves, and of the others the diagonal (`e_a` has one entry): the rest
of those two blocks is what weight decay leaves of it.

Source: the waves are Nanda et al. 2023 (arXiv 2301.05217) and, for a quadratic activation, Gromov 2023 (arXiv
2301.02679).
"""

from dataclasses import dataclass, field

import pandas as pd
import plotly.graph_objects as go
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from bilens._core.checks import check_amounts, check_index, check_rates, check_sizes
from bilens._core.display import Tabular
from bilens.draw import plots
from bilens.draw.toys import curve_grid
from bilens.errors import ArgumentError, OutOfRangeError
from bilens.layer.bilinear import BilinearLayer, interaction_matrix
from bilens.layer.eigen.circuits import Eigencircuits
from bilens.layer.eigen.pairs import sorted_eigenpairs
from bilens.toy.layer import ToyLayer, optimise

LOG_EVERY = 20


@dataclass(frozen=True)
class ModularConfig:
    """What to learn, and how.

    Args:
        p: the modulus.
        d_hidden: hidden units.
        train_share: the share of all pairs that is trained on.
        steps, lr, weight_decay: AdamW's settings, on all training pairs at once; the learning rate falls as a cosine.
        seed: the seed of the weights and the split.

    Raises:
        ArgumentError: a number outside its range.
    """

    p: int = 53
    d_hidden: int = 64
    train_share: float = 0.6
    steps: int = 1500
    lr: float = 1e-2
    weight_decay: float = 3.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_sizes(p=self.p, d_hidden=self.d_hidden, steps=self.steps)
        check_rates(lr=self.lr)
        check_amounts(weight_decay=self.weight_decay)
        if self.p < 3:
            raise ArgumentError(f"p is {self.p}, expected 3 or more.")
        if not 0 < self.train_share < 1:
            raise ArgumentError(f"train_share is {self.train_share!r}, expected a share of the pairs between 0 and 1.")
        if not 0 < self.n_train < self.p**2:
            raise ArgumentError(
                f"train_share {self.train_share} of {self.p**2} pairs leaves no pairs to train or test on."
            )

    @property
    def n_train(self) -> int:
        """Pairs trained on."""
        return round(self.train_share * self.p**2)


@dataclass(frozen=True)
class ModularAddition(Tabular):
    """A finished run: the layer, and what it could do while it was trained.

    Attributes:
        config: the settings of the run.
        layer: reads `(e_a, e_b)`, writes p logits.
        steps, train_loss, train_accuracy, test_accuracy: the curve; the test is on the pairs not trained on.
    """

    config: ModularConfig
    layer: ToyLayer = field(repr=False)
    steps: list[int] = field(repr=False)
    train_loss: list[float] = field(repr=False)
    train_accuracy: list[float] = field(repr=False)
    test_accuracy: list[float] = field(repr=False)

    def fourier(self, k: int = 8) -> "FourierStructure":
        """The first `k` eigenvectors of every class, and the waves in them."""
        return fourier_structure(self.layer.weights(), k)

    def to_frame(self) -> pd.DataFrame:
        """One row per point of the curve: `step, train_loss, train_accuracy, test_accuracy`."""
        names = ("train_loss", "train_accuracy", "test_accuracy")
        return pd.DataFrame({"step": self.steps} | {name: getattr(self, name) for name in names})

    def plot(self) -> go.Figure:
        """Accuracy on the pairs trained on, and on the others, against steps."""
        curves = {"pairs trained on": self.train_accuracy, "other pairs": self.test_accuracy}
        return plots.line(self.steps, curves, f"a + b mod {self.config.p}", x_title="step", y_title="accuracy")

    def __str__(self) -> str:
        cfg = self.config
        return (
            f"a + b mod {cfg.p}, {cfg.d_hidden} hidden units, trained on {cfg.train_share:.0%} of the pairs: "
            f"{self.train_accuracy[-1]:.2%} of these right, {self.test_accuracy[-1]:.2%} of the others"
        )


@dataclass(frozen=True)
class FourierStructure(Tabular):
    """Eigenpairs of the interaction matrices of all classes, and the frequencies of their halves.

    Attributes:
        circuits: eigenvalues and unit eigenvectors over `(e_a, e_b)`, a row for every class.
        power: the power of each eigenvector's halves at frequencies 0, 1, ..., p / 2; one eigenvector's add up to 1.
    """

    circuits: Eigencircuits = field(repr=False)
    power: Float[Tensor, "class k 2 frequency"] = field(repr=False)

    @property
    def p(self) -> int:
        """The modulus."""
        return self.circuits.vectors.shape[-1] // 2

    @property
    def frequencies(self) -> Int[Tensor, "class k"]:
        """The frequency that holds most of each eigenvector, both halves together."""
        return self.power.sum(-2).argmax(-1)

    @property
    def shares(self) -> Float[Tensor, "class k"]:
        """How much of each eigenvector that frequency holds: 1 is a pure wave."""
        return self.power.sum(-2).amax(-1)

    @property
    def mean_share(self) -> float:
        """The mean of `shares`, each weighted with its squared eigenvalue."""
        weights = self.circuits.values**2
        return ((self.shares * weights).sum() / weights.sum()).item()

    @property
    def spectrum(self) -> Float[Tensor, "frequency"]:
        """How much of the squared eigenvalues of all classes lies in each frequency; adds up to 1."""
        weights = self.circuits.values**2
        return (self.power.sum(-2) * weights[..., None]).sum((0, 1)) / weights.sum()

    def to_frame(self) -> pd.DataFrame:
        """One row per eigenvector: `class, rank, eigenvalue, frequency, share, in_a` (of its square in the a-half)."""
        n, k = self.shares.shape
        return pd.DataFrame(
            {
                "class": [c for c in range(n) for _ in range(k)],
                "rank": list(range(k)) * n,
                "eigenvalue": self.circuits.values.flatten(),
                "frequency": self.frequencies.flatten(),
                "share": self.shares.flatten(),
                "in_a": self.power[:, :, 0].sum(-1).flatten(),
            }
        )

    def plot(self, which: int = 0, k: int = 4) -> go.Figure:
        """The first `k` eigenvectors of one class, half by half.

        Raises:
            OutOfRangeError: no such class, or `k` below 1.
        """
        if k < 1:
            raise OutOfRangeError(f"k is {k}, expected at least 1.")
        row = self._class(which)
        halves = self.circuits.vectors[row, :k].unflatten(-1, (2, self.p))
        curves = [{"a": a, "b": b} for a, b in halves]
        titles = [
            f"eigenvalue {value:.3g}: frequency {frequency}, {share:.1%}"
            for value, frequency, share in zip(
                self.circuits.values[row, :k], self.frequencies[row, :k], self.shares[row, :k], strict=True
            )
        ]
        return curve_grid(curves, titles, f"eigenvectors of class {row}", x_title="number")

    def plot_power(self, which: int | None = None) -> go.Figure:
        """The power of every eigenvector of one class by frequency; without a class, that of all of them together."""
        if which is None:
            return plots.bars(
                [f"frequency {f}" for f in range(len(self.spectrum))],
                self.spectrum,
                "where the squared eigenvalues of all classes lie",
                value_title="share",
            )
        row = self._class(which)
        labels = [f"{rank}: {value:+.3g}" for rank, value in enumerate(self.circuits.values[row].tolist())]
        return plots.heatmap(
            self.power[row].sum(-2),
            labels,
            title=f"power of the eigenvectors of class {row}",
            row_title="rank: eigenvalue",
            col_title="frequency",
        )

    def plot_spectrum(self, which: int = 0) -> go.Figure:
        """Eigenvalues of one class."""
        row = self._class(which)
        return plots.spectrum(self.circuits.values[row], f"eigenvalues of class {row}")

    def _class(self, which: int) -> int:
        return check_index(which, self.p, "class {} is outside the {} classes")

    def __str__(self) -> str:
        found = self.spectrum.argsort(descending=True)[:6].tolist()
        strongest = ", ".join(f"{f} ({self.spectrum[f]:.0%})" for f in found if self.spectrum[f] > 0.005)
        pure = f"{self.mean_share:.1%} of an eigenvector in its own, weighted by squared eigenvalue"
        return f"frequencies {strongest}; {pure}"


def train_modular(config: ModularConfig | None = None, *, progress: bool = True) -> ModularAddition:
    """Train a bilinear layer on a part of all sums.

    Args:
        config: `None` takes the defaults.
        progress: show a bar.

    Raises:
        TrainingError: the loss is no number any more.
    """
    config = config or ModularConfig()
    p, generator = config.p, torch.Generator().manual_seed(config.seed)
    layer = ToyLayer(2 * p, config.d_hidden, p, bias=False, generator=generator)
    order = torch.randperm(p * p, generator=generator)
    inputs, sums = all_pairs(p)
    train, test = order[: config.n_train], order[config.n_train :]
    curve: dict[str, list] = {"steps": [], "train_loss": [], "train_accuracy": [], "test_accuracy": []}

    def loss_at(step: int) -> Tensor:
        return F.cross_entropy(layer(inputs[train]), sums[train])

    @torch.no_grad()
    def after(step: int) -> None:
        if step % LOG_EVERY and step != config.steps:
            return
        logits = layer(inputs)
        right = (logits.argmax(-1) == sums).double()
        curve["steps"].append(step)
        curve["train_loss"].append(F.cross_entropy(logits[train], sums[train]).item())
        curve["train_accuracy"].append(right[train].mean().item())
        curve["test_accuracy"].append(right[test].mean().item())

    optimise(
        layer.parameters(),
        loss_at,
        config.steps,
        lr=config.lr,
        weight_decay=config.weight_decay,
        after=after,
        desc=f"a + b mod {p}",
        progress=progress,
    )
    return ModularAddition(config, layer, **curve)


def all_pairs(p: int) -> tuple[Float[Tensor, "pair two_p"], Int[Tensor, "pair"]]:
    """`(e_a, e_b)` of all pairs, and their sums modulo p."""
    a, b = torch.arange(p).repeat_interleave(p), torch.arange(p).repeat(p)
    return torch.cat([F.one_hot(a, p), F.one_hot(b, p)], -1).float(), (a + b) % p


def fourier_structure(layer: BilinearLayer, k: int = 8) -> FourierStructure:
    """Eigenpairs of all outputs of a layer that reads `(e_a, e_b)`, and the power of their halves.

    Args:
        layer: a layer with p outputs.
        k: eigenpairs of each.

    Raises:
        ArgumentError: a layer that does not read twice as many inputs as it has outputs.
        OutOfRangeError: `k` is not in 1..2p.
    """
    two_p, p = len(layer.W_gate), layer.W_out.shape[1]
    if two_p != 2 * p:
        raise ArgumentError(
            f"the layer reads {two_p} inputs and writes {p} outputs, expected two inputs for each output."
        )
    matrices = interaction_matrix(layer, torch.eye(p, dtype=layer.W_out.dtype))
    values, vectors = sorted_eigenpairs(matrices, k)
    circuits = Eigencircuits(values, vectors, torch.linalg.matrix_norm(matrices), torch.arange(p))
    return FourierStructure(circuits, wave_power(vectors.unflatten(-1, (2, p))))


def wave_power(curves: Float[Tensor, "*n p"]) -> Float[Tensor, "*n frequency"]:
    """The squared length of each curve in the waves of each frequency (sine and cosine): adds up to `|curve|^2`."""
    p = curves.shape[-1]
    power = torch.fft.rfft(curves, norm="ortho").abs() ** 2
    # Of a real curve, f and p - f are one frequency; 0 and p / 2 are their own mirror.
    twice = torch.full((power.shape[-1],), 2.0, dtype=power.dtype)
    twice[0] = 1
    if p % 2 == 0:
        twice[-1] = 1
    return power * twice
