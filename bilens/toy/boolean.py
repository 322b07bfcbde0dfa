"""Boolean gates on pairs of inputs: what a bilinear layer learns, against the closed form.

1. n bits; every output is one gate on one pair of them. On 0 and 1 each gate is `c + s (x + y) + m x y`: a matrix over
   `(x, 1)` with `m / 2` between the two bits, `s / 2` between each bit and the 1, and `c` in the corner
2. a bilinear layer with biases is trained on random bits, with squared error
3. its `Q`, `g` and `h` (`bilens.layer.bilinear`) make a matrix over `(x, 1)` as well

Bits have `x^2 = x`: only `Q_ii + g_i` matters, and how training splits that sum is an accident. So the matrices are
compared after the diagonal has been moved into the linear part. As `1, x_i, x_i x_j` are linearly independent functions
of bits, that form is unique: the layers that compute the gates exactly are those whose form is the closed one.

Source: Pearce et al. 2025, section 3 (interaction matrices); the gates as quadratic forms are elementary algebra.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import TypeAlias

import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from bilens._core.checks import check_rates, check_sizes
from bilens._core.display import Tabular
from bilens.draw.toys import matrix_grid
from bilens.errors import ArgumentError, nearest
from bilens.layer.bilinear import BilinearLayer, constant_term, interaction_matrix, linear_term
from bilens.toy.layer import ToyLayer, optimise

# The constant, the coefficient of each bit, and that of their product.
GATES: dict[str, tuple[float, float, float]] = {
    "and": (0, 0, 1),
    "or": (0, 1, -1),
    "xor": (0, 1, -2),
    "nand": (1, 0, -1),
    "nor": (1, -1, 1),
    "xnor": (1, -1, 2),
}
BooleanTask: TypeAlias = tuple[str, int, int]
N_JUDGED = 4096  # random inputs on which a layer is judged, where there are too many to take all


@dataclass(frozen=True)
class BooleanConfig:
    """What to learn, and how.

    Args:
        tasks: one per output: a gate and its two inputs, as `("xor", 0, 3)`; or the name of a gate alone, which takes
            the next pair of inputs in the order (0, 1), (2, 3), ... and, those used up, (0, 2), ...
        n_inputs: bits.
        d_hidden: hidden units.
        steps, batch_size, lr: the settings of the training; the learning rate falls to zero as a cosine.
        seed: the seed of the weights and the bits.

    Raises:
        ArgumentError: no such gate or input, a gate on one input twice, or a number outside its range.
    """

    tasks: Sequence[str | BooleanTask] = tuple(GATES)
    n_inputs: int = 6
    d_hidden: int = 32
    steps: int = 3000
    batch_size: int = 256
    lr: float = 1e-2
    seed: int = 0

    def __post_init__(self) -> None:
        sizes = ("n_inputs", "d_hidden", "steps", "batch_size")
        check_sizes(**{name: getattr(self, name) for name in sizes})
        check_rates(lr=self.lr)
        if self.n_inputs < 2:
            raise ArgumentError(f"n_inputs is {self.n_inputs}; a gate needs two.")
        if isinstance(self.tasks, str):
            raise ArgumentError(f"tasks is {self.tasks!r}, expected a list of them: [{self.tasks!r}].")
        if not self.resolved:
            raise ArgumentError(f"tasks is empty; expected gates among {', '.join(GATES)}.")

    @property
    def resolved(self) -> list[BooleanTask]:
        """The tasks, each with its inputs."""
        apart = [(i, i + 1) for i in range(0, self.n_inputs - 1, 2)]
        pairs = apart + [pair for pair in combinations(range(self.n_inputs), 2) if pair not in apart]
        tasks = [(t, *pairs[n % len(pairs)]) if isinstance(t, str) else t for n, t in enumerate(self.tasks)]
        for task in tasks:
            if not isinstance(task, Sequence) or len(task) != 3:
                raise ArgumentError(f"task {task!r}: expected a gate and its two inputs, as ('xor', 0, 3).")
            gate, i, j = task
            if gate not in GATES:
                raise ArgumentError(f"no gate {gate!r}; there are {', '.join(GATES)}." + nearest(gate, GATES))
            if i == j or not {i, j} <= set(range(self.n_inputs)):
                raise ArgumentError(
                    f"{gate} of inputs {i} and {j}: expected two different ones of 0..{self.n_inputs - 1}."
                )
        return tasks


@dataclass(frozen=True)
class BooleanRecovery(Tabular):
    """A trained layer's matrices over `(x, 1)`, beside the closed ones.

    Attributes:
        tasks: gate and inputs of every output.
        learned: the learned matrices in the unique form, with the diagonal moved into the linear part.
        as_trained: before that was moved.
        closed: the closed forms.
        accuracy: share of inputs on which each output, rounded, is right.
        error: root mean square of each output's error on them.
        layer: the trained layer.
    """

    tasks: list[BooleanTask]
    learned: Float[Tensor, "task n_plus_one n_plus_one"] = field(repr=False)
    as_trained: Float[Tensor, "task n_plus_one n_plus_one"] = field(repr=False)
    closed: Float[Tensor, "task n_plus_one n_plus_one"] = field(repr=False)
    accuracy: Float[Tensor, "task"] = field(repr=False)
    error: Float[Tensor, "task"] = field(repr=False)
    layer: ToyLayer = field(repr=False)

    @property
    def deviations(self) -> Float[Tensor, "task"]:
        """The largest difference of an entry from the closed form, for every output."""
        return (self.learned - self.closed).abs().amax((-2, -1))

    @property
    def max_deviation(self) -> float:
        """The largest difference of any entry."""
        return self.deviations.max().item()

    @property
    def names(self) -> list[str]:
        """`xor(x0, x1)`, ..."""
        return [f"{gate}(x{i}, x{j})" for gate, i, j in self.tasks]

    def to_frame(self) -> pd.DataFrame:
        """One row per output: `output, accuracy, rms_error, max_deviation`."""
        return pd.DataFrame(
            {
                "output": self.names,
                "accuracy": self.accuracy.tolist(),
                "rms_error": self.error.tolist(),
                "max_deviation": self.deviations.tolist(),
            }
        )

    def plot(self) -> go.Figure:
        """Heat maps of every output: as trained, in the unique form, and the closed one."""
        axis = [f"x{i}" for i in range(self.closed.shape[-1] - 1)] + ["1"]
        rows = list(zip(self.as_trained, self.learned, self.closed, strict=True))
        columns = ["as trained", "diagonal moved", "closed form"]
        return matrix_grid(rows, self.names, columns, axis, "boolean gates as quadratic forms of (x, 1)")

    def __str__(self) -> str:
        head = f"{len(self.tasks)} gates, largest deviation {self.max_deviation:.2g}"
        return f"{head}\n{self.to_frame().to_string(index=False)}"


def train_boolean(config: BooleanConfig | None = None, *, progress: bool = True) -> BooleanRecovery:
    """Train a bilinear layer on boolean gates and read them back from its weights.

    Args:
        config: `None` takes the defaults: all six gates, on six bits.
        progress: show a bar.

    Raises:
        TrainingError: the loss is no number any more.
    """
    config = config or BooleanConfig()
    tasks, generator = config.resolved, torch.Generator().manual_seed(config.seed)
    layer = ToyLayer(config.n_inputs, config.d_hidden, len(tasks), bias=True, generator=generator)

    def loss_at(step: int) -> Tensor:
        bits = torch.randint(2, (config.batch_size, config.n_inputs), generator=generator).bool()
        return (layer(bits.float()) - truth(tasks, bits)).pow(2).mean()

    optimise(layer.parameters(), loss_at, config.steps, lr=config.lr, desc="boolean gates", progress=progress)
    return recover(layer, tasks)


@torch.no_grad()
def recover(layer: ToyLayer, tasks: Sequence[BooleanTask]) -> BooleanRecovery:
    """Compare a layer with the closed forms of the gates it is to compute."""
    n_inputs = len(layer.W_gate)
    as_trained = homogeneous_matrices(layer.weights())
    bits = _judged_bits(n_inputs)
    errors = layer(bits.float()).double() - truth(tasks, bits)
    return BooleanRecovery(
        list(tasks),
        diagonal_moved(as_trained),
        as_trained,
        torch.stack([closed_form(task, n_inputs) for task in tasks]),
        (errors.abs() < 0.5).double().mean(0),
        errors.pow(2).mean(0).sqrt(),
        layer,
    )


def _judged_bits(n_inputs: int) -> Bool[Tensor, "input n"]:
    """All inputs, or random ones where those are too many."""
    if 2**n_inputs <= N_JUDGED:
        return torch.arange(2**n_inputs)[:, None].bitwise_right_shift(torch.arange(n_inputs)).bitwise_and(1).bool()
    return torch.randint(2, (N_JUDGED, n_inputs), generator=torch.Generator().manual_seed(0)).bool()


# --- closed forms -----------------------------------------------------------------------------------------------------


def truth(tasks: Sequence[BooleanTask], bits: Bool[Tensor, "*batch n"]) -> Float[Tensor, "*batch task"]:
    """What the gates give, by logic."""
    columns = []
    for gate, i, j in tasks:
        x, y = bits[..., i], bits[..., j]
        plain = {"and": x & y, "or": x | y, "xor": x ^ y}
        columns.append(plain[gate] if gate in plain else ~plain[gate.replace("n", "", 1)])
    return torch.stack(columns, -1).float()


def closed_form(task: BooleanTask, n_inputs: int) -> Float[Tensor, "n_plus_one n_plus_one"]:
    """The symmetric matrix `M` with `(x, 1)^T M (x, 1)` the gate, without a diagonal among the bits."""
    gate, i, j = task
    constant, single, product = GATES[gate]
    matrix = torch.zeros(n_inputs + 1, n_inputs + 1, dtype=torch.float64)
    matrix[i, j] = matrix[j, i] = product / 2
    for k in (i, j):
        matrix[k, -1] = matrix[-1, k] = single / 2
    matrix[-1, -1] = constant
    return matrix


def homogeneous_matrices(layer: BilinearLayer) -> Float[Tensor, "output n_plus_one n_plus_one"]:
    """The matrix over `(x, 1)` of every output: `Q`, half of `g` at its sides, `h` in the corner."""
    u = torch.eye(layer.W_out.shape[1], dtype=layer.W_out.dtype)
    quadratic, linear, constant = interaction_matrix(layer, u), linear_term(layer, u), constant_term(layer, u)
    sides = linear[..., None] / 2
    return torch.cat([torch.cat([quadratic, sides], -1), torch.cat([sides.mT, constant[..., None, None]], -1)], -2)


def diagonal_moved(matrices: Float[Tensor, "*n d d"]) -> Float[Tensor, "*n d d"]:
    """The same function of bits with nothing on the diagonal but the constant: `x_i^2 = x_i`."""
    moved = matrices.clone()
    diagonal = matrices.diagonal(dim1=-2, dim2=-1)[..., :-1]
    moved[..., :-1, -1] += diagonal / 2
    moved[..., -1, :-1] += diagonal / 2
    moved.diagonal(dim1=-2, dim2=-1)[..., :-1] = 0
    return moved
