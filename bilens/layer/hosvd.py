"""Higher-order singular value decomposition of a layer's tensor: which directions matter, without choosing an output.

The tensor is T_oij = (Q_{e_o})_ij, symmetric in ij. Its unfoldings, d_model x d_model^2, are never formed; the
singular values and vectors of each come from its d_model x d_model Gram matrix, which the factors give exactly:

1. output mode:  A_ab = <Q_{e_a}, Q_{e_b}> = (W_out^T K W_out)_ab                           (`bilens.layer.inner`)
2. input modes:  B = sum_o Q_{e_o}^2. With P = W_out W_out^T, and * entry by entry,
       B = 1/4 (L^T (P * R R^T) L + L^T (P * R L^T) R + R^T (P * L R^T) L + R^T (P * L L^T) R)
3. singular values are the roots of their eigenvalues, singular vectors their eigenvectors

Both modes' squared singular values add up to ||T||^2. Keeping the first r directions of one mode misses exactly the
squares of the discarded singular values of that mode; keeping r of the output and s of the input misses
||T||^2 - ||core||^2, at most the sum of the discarded squares of every mode (the input's twice: it is two modes).

Roots of a Gram matrix in float64: singular values below 1e-8 of the largest are rounding.

Source: De Lathauwer, De Moor, Vandewalle, A multilinear singular value decomposition, 2000; Pearce et al. 2025,
section 3, for the output mode.
"""

from dataclasses import dataclass, field, replace
from typing import Literal

import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Float
from torch import Tensor

from bilens._core.checks import MEMORY, how_many_fit
from bilens._core.display import Tabular
from bilens._core.typing import typed
from bilens.draw import plots
from bilens.errors import OutOfRangeError
from bilens.layer.bilinear import BilinearLayer, double, hidden_coefficients
from bilens.layer.eigen.circuits import Eigencircuits
from bilens.layer.inner import BLOCK, BLOCK_ENTRY, branch_rows, inner_products, tensor_norm
from bilens.layer.reading import Lexicon

Mode = Literal["output", "input"]


@dataclass(frozen=True)
class HOSVD(Tabular):
    """A layer's directions by importance, and what they read.

    Attributes:
        output_values, input_values: singular values of each mode, falling; the squares of either add up to `||T||^2`.
        output_directions, input_directions: orthonormal rows, largest entry positive.
        layer: the weights decomposed.
        circuits: eigencircuits of the first output directions (as many as were asked for).
        outputs, inputs: the names that directions are given.
    """

    output_values: Float[Tensor, "d_model"]
    output_directions: Float[Tensor, "d_model d_model"] = field(repr=False)
    input_values: Float[Tensor, "d_model"]
    input_directions: Float[Tensor, "d_model d_model"] = field(repr=False)
    layer: BilinearLayer = field(repr=False)
    circuits: Eigencircuits = field(repr=False)
    outputs: Lexicon = field(repr=False)
    inputs: Lexicon = field(repr=False)

    @property
    def norm(self) -> float:
        """`||T||`."""
        return (self.output_values**2).sum().sqrt().item()

    def error(self, n_output: int | None = None, n_input: int | None = None) -> float:
        """`||T - T'|| / ||T||` with the first directions of each mode only; `None` keeps all.

        Raises:
            OutOfRangeError: not in 1..d_model.
        """
        d = len(self.output_values)
        kept_out, kept_in = (d if n is None else _check_rank(n, d) for n in (n_output, n_input))
        total = (self.output_values**2).sum()
        if kept_in == d:
            missed = (self.output_values[kept_out:] ** 2).sum()
        else:
            exact = BilinearLayer(*map(double, vars(self.layer).values()))
            missed = total - tensor_norm(self._projected(exact, kept_out, kept_in)) ** 2
        return (missed / total).clamp_min(0).sqrt().item()

    def truncated(self, n_output: int | None = None, n_input: int | None = None) -> BilinearLayer:
        """The layer reading only the first input directions and writing only the first output directions.

        Biases stay those of the layer.
        """
        d = len(self.output_values)
        return self._projected(self.layer, *(d if n is None else _check_rank(n, d) for n in (n_output, n_input)))

    def core(self, n_output: int, n_input: int) -> Float[Tensor, "n_output n_input n_input"]:
        """The tensor in the first directions of each mode, in float64: `n_output * n_input^2` numbers."""
        d = len(self.output_values)
        out, in_ = self.output_directions[: _check_rank(n_output, d)], self.input_directions[: _check_rank(n_input, d)]
        return core(self.layer, out, in_)

    def _projected(self, layer: BilinearLayer, kept_out: int, kept_in: int) -> BilinearLayer:
        out, in_ = self.output_directions[:kept_out].to(layer.W_out), self.input_directions[:kept_in].to(layer.W_out)
        return replace(
            layer,
            W_gate=in_.T @ (in_ @ layer.W_gate),
            W_in=in_.T @ (in_ @ layer.W_in),
            W_out=(layer.W_out @ out.T) @ out,
        )

    @typed
    def to_frame(self, mode: Mode = "output", top: int = 3) -> pd.DataFrame:
        """One row per direction: `rank, singular_value, share, cumulative, like` and, of the first output directions,
        `eigenvalue_1, reads_1, eigenvalue_2, reads_2`: the leading eigenvectors of what they read.

        Args:
            mode: `"output"` or `"input"`.
            top: the number of names in `like` and `reads`.

        Raises:
            ArgumentError: another mode.
        """
        output = mode == "output"
        values = (self.output_values if output else self.input_values).cpu()
        n = len(self.circuits.outputs)
        share = values**2 / (values**2).sum()
        frame = pd.DataFrame(
            {"rank": range(n), "singular_value": values[:n], "share": share[:n], "cumulative": share.cumsum(0)[:n]}
        )
        if not output:
            return frame.assign(like=self.inputs.nearest(self.input_directions[:n], top).describe())
        frame["like"] = self.outputs.nearest(self.output_directions[:n], top).describe()
        for place in range(min(2, self.circuits.values.shape[1])):
            frame[f"eigenvalue_{place + 1}"] = self.circuits.values[:, place].tolist()
            frame[f"reads_{place + 1}"] = self.inputs.nearest(self.circuits.vectors[:, place], top).describe()
        return frame

    def plot(self) -> go.Figure:
        """The share of `||T||^2` that the first directions of each mode hold."""
        curves = {
            name: ((values**2).cumsum(0) / (values**2).sum()).tolist()
            for name, values in (("output", self.output_values), ("input", self.input_values))
        }
        ranks = list(range(1, len(self.output_values) + 1))
        return plots.line(ranks, curves, "HOSVD", x_title="directions kept", y_title="share of the squared norm")

    def __str__(self) -> str:
        return f"HOSVD of a layer, norm {self.norm:.4g}\n{self.to_frame().head(10).to_string(index=False)}"


# --- from the factors -------------------------------------------------------------------------------------------------


def output_gram(layer: BilinearLayer, memory: int = MEMORY) -> Float[Tensor, "d_model d_model"]:
    """`A_ab = <Q_{e_a}, Q_{e_b}>`: the output-mode unfolding times its transpose, in float64."""
    return inner_products(layer, torch.eye(layer.W_out.shape[1], device=layer.W_out.device), memory=memory)


def input_gram(layer: BilinearLayer, memory: int = MEMORY) -> Float[Tensor, "d_model d_model"]:
    """`B = sum_o Q_{e_o}^2`: the input-mode unfolding times its transpose, in float64."""
    d_model, d_mlp = layer.W_gate.shape
    fixed = 8 * d_model * (3 * d_mlp + 4 * d_model)
    each = BLOCK_ENTRY * d_mlp + 24 * d_model
    step = min(max(1, BLOCK // d_mlp), how_many_fit("hosvd", each, memory, besides=fixed))
    left, right = branch_rows(layer)
    out = double(layer.W_out)
    total = left.new_zeros(d_model, d_model)
    for start in range(0, d_mlp, step):
        rows = slice(start, start + step)
        written = out[rows] @ out.T
        for first, first_other in ((left, right), (right, left)):
            for second, second_other in ((left, right), (right, left)):
                total += first[rows].T @ ((written * (first_other[rows] @ second_other.T)) @ second)
    return 0.125 * (total + total.T)


def singular(gram: Float[Tensor, "d d"]) -> tuple[Float[Tensor, "d"], Float[Tensor, "d d"]]:
    """Singular values, falling, and left singular vectors as rows, largest entry positive, from `M M^T`."""
    values, columns = torch.linalg.eigh(gram)
    vectors = columns.T.flip(0)
    largest = vectors.abs().argmax(-1, keepdim=True)
    return values.flip(0).clamp_min(0).sqrt(), vectors * vectors.gather(-1, largest).sign()


def core(
    layer: BilinearLayer, output: Float[Tensor, "r d_model"], input: Float[Tensor, "s d_model"]
) -> Float[Tensor, "r s s"]:
    """The tensor in these directions: `input Q_u input^T` of every output direction `u`, in float64."""
    left, right = (branch @ double(input).T for branch in branch_rows(layer))
    c = hidden_coefficients(layer, output, exact=True)
    raw = (left.T * c[:, None, :]) @ right
    return 0.5 * (raw + raw.mT)


def _check_rank(n: int, d: int) -> int:
    if not 1 <= n <= d:
        raise OutOfRangeError(f"{n} directions, expected 1 to {d} (or None for all).")
    return n
