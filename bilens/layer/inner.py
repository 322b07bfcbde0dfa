"""Exact inner products of interaction matrices and of whole layers' tensors, from the factors alone.

With l_m, r_m the branch rows of one layer and l'_k, r'_k those of another (or the same), the symmetrised products of
two hidden units have the inner product

    K_mk = <sym(l_m r_m^T), sym(l'_k r'_k^T)> = 1/2 ((l_m . l'_k)(r_m . r'_k) + (l_m . r'_k)(r_m . l'_k))

1. between output directions:   <Q_u, Q'_w> = c_u^T K c'_w,                       c = W_out u
2. between whole layers:        <T, T'> = sum_mk K_mk (W_out W_out'^T)_mk,         T_oij = (Q_{e_o})_ij
3. between input features:      the same with every input product taken in the metric G = D^T D, because
                                <D Q D^T, D Q' D^T> = tr(G Q G Q')

No `Q` and no third-order tensor is formed: the cost is that of a few products of the branches. Sums run in float64, and
over blocks of K and of outputs, as many at a time as fit the memory given. Two layers, or two models, can be compared
wherever they read and write the same space; two models trained apart share no basis, and then only norms and spectra
compare.

All of it is about the quadratic part: MLP biases do not enter.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Float
from torch import Tensor

from bilens._core.checks import MEMORY, check_budget, how_many_fit
from bilens._core.display import Tabular
from bilens.draw import plots
from bilens.errors import SAEMismatchError
from bilens.layer.bilinear import BilinearLayer, double, hidden_coefficients
from bilens.model.transformer import HookedBilinearTransformer

BLOCK = 2**21  # entries of K at a time, at most: 16 MB
BLOCK_ENTRY = 32  # bytes of an entry, while it is made


@dataclass(frozen=True)
class LayerSimilarity(Tabular):
    """Inner products of the tensors of a model's layers, with themselves or with another model's.

    Attributes:
        inner: `<T, T'>` of every pair.
        norms, other_norms: `||T||` of the rows' and the columns' layers.
        names, other_names: the names of the layers.
    """

    inner: Float[Tensor, "layer other"] = field(repr=False)
    norms: Float[Tensor, "layer"]
    other_norms: Float[Tensor, "other"]
    names: Sequence[str]
    other_names: Sequence[str]

    @property
    def cosines(self) -> Float[Tensor, "layer other"]:
        return self.inner / (self.norms[:, None] * self.other_norms)

    @property
    def distances(self) -> Float[Tensor, "layer other"]:
        """`||T - T'||`."""
        return (self.norms[:, None] ** 2 + self.other_norms**2 - 2 * self.inner).clamp_min(0).sqrt()

    def to_frame(self) -> pd.DataFrame:
        """One row per pair of layers: `layer, other, inner, cosine, distance`."""
        cosines, distances = self.cosines, self.distances
        return pd.DataFrame(
            [
                {
                    "layer": layer,
                    "other": other,
                    "inner": self.inner[i, j].item(),
                    "cosine": cosines[i, j].item(),
                    "distance": distances[i, j].item(),
                }
                for i, layer in enumerate(self.names)
                for j, other in enumerate(self.other_names)
            ]
        )

    def plot(self) -> go.Figure:
        """Heat map of the cosines."""
        return plots.heatmap(self.cosines.tolist(), self.names, self.other_names, "cosine of layer tensors", scale=1.0)

    def __str__(self) -> str:
        table = pd.DataFrame(self.cosines.tolist(), index=list(self.names), columns=list(self.other_names))
        return f"cosines of layer tensors\n{table.to_string(float_format='{:+.4f}'.format)}"


def layer_similarity(
    model: HookedBilinearTransformer, other: HookedBilinearTransformer | None = None
) -> LayerSimilarity:
    """How alike the layers of a model are, as tensors; or those of one model and another.

    Args:
        model: a bilinear model.
        other: of the same d_model, and in the same basis for the numbers to mean something: a checkpoint of the same
            run, a fine-tuned copy. `None` is the model itself.

    Raises:
        NotBilinearError: a gated or one-branch model.
        SAEMismatchError: models of different d_model.
    """
    rows = [BilinearLayer.of(model, layer) for layer in range(model.cfg.n_layers)]
    names = [f"layer {layer}" for layer in range(len(rows))]
    if other is None or other is model:
        inner = torch.zeros(len(rows), len(rows), dtype=torch.float64)
        for i, a in enumerate(rows):
            for j in range(i, len(rows)):
                inner[i, j] = inner[j, i] = tensor_inner(a, rows[j])
        norms = inner.diagonal().sqrt()
        return LayerSimilarity(inner, norms, norms, names, names)
    columns = [BilinearLayer.of(other, layer) for layer in range(other.cfg.n_layers)]
    return LayerSimilarity(
        inner=torch.stack([torch.stack([tensor_inner(a, b).cpu() for b in columns]) for a in rows]),
        norms=torch.stack([tensor_norm(a).cpu() for a in rows]),
        other_norms=torch.stack([tensor_norm(b).cpu() for b in columns]),
        names=names,
        other_names=[f"layer {layer}" for layer in range(len(columns))],
    )


# --- of output directions ---------------------------------------------------------------------------------------------


def inner_products(
    layer: BilinearLayer,
    u: Float[Tensor, "n d_model"],
    other: BilinearLayer | None = None,
    w: Float[Tensor, "m d_model"] | None = None,
    metric: Float[Tensor, "d_model d_model"] | None = None,
    memory: int = MEMORY,
) -> Float[Tensor, "n m"]:
    """`<Q_u, Q'_w>` of every pair of output directions, in float64.

    Args:
        layer: the layer that `u` reads.
        u: output directions.
        other: the layer that `w` reads; `None` is `layer`.
        w: its output directions; `None` is `u`.
        metric: `D^T D` for the interaction matrices between the input features `D`; `None` for the residual basis.
        memory: bytes to work in, and at most as many for the result; 1 GiB by default.

    Raises:
        ArgumentError: less memory than the result or the smallest step takes.
        SAEMismatchError: layers of different d_model.
    """
    same = other is None and w is None
    w, reads = u if w is None else w, layer if other is None else other
    call = f"inner_products of {len(u):,} and {len(w):,} outputs"
    check_budget(call, 8 * len(u) * len(w), memory, "ask for fewer outputs at a time")
    total = double(u).new_zeros(len(u), len(w))
    for rows, _, images in coefficient_images(call, layer, u, other, metric, memory):
        for start in range(0, len(w), images.shape[1]):
            columns = slice(start, start + images.shape[1])
            total[rows, columns] = images @ hidden_coefficients(reads, w[columns], exact=True).T
    if same:
        for row in range(len(total)):  # symmetric to the bit, in place
            total[row, :row] = total[:row, row] = 0.5 * (total[row, :row] + total[:row, row])
    return total


def norms(
    layer: BilinearLayer,
    u: Float[Tensor, "n d_model"],
    metric: Float[Tensor, "d_model d_model"] | None = None,
    memory: int = MEMORY,
) -> Float[Tensor, "n"]:
    """Frobenius norm of every `Q_u`, in float64."""
    parts = coefficient_images(f"norms of {len(u):,} outputs", layer, u, None, metric, memory)
    squares = [(images * c).sum(-1) for _, c, images in parts]
    return torch.cat(squares).clamp_min(0).sqrt() if squares else double(u).new_zeros(0)


def coefficient_images(
    call: str,
    layer: BilinearLayer,
    u: Float[Tensor, "n d_model"],
    other: BilinearLayer | None,
    metric: Float[Tensor, "d_model d_model"] | None,
    memory: int,
) -> Iterator[tuple[slice, Float[Tensor, "rows d_mlp"], Float[Tensor, "rows other_d_mlp"]]]:
    """`c_u` and `c_u K` of as many outputs at a time as fit the memory, in float64, with their places."""
    (d_model, d_mlp), d_other = layer.W_gate.shape, (other or layer).W_gate.shape[1]
    fixed = 8 * d_model * (3 * d_mlp + (0 if other is None else 3 * d_other) + (0 if metric is None else 2 * d_mlp))
    each = 8 * (2 * d_mlp + 4 * d_other + 2 * d_model)
    of_gram = BLOCK_ENTRY * d_other
    how_many_fit(call, each, memory, besides=fixed + of_gram)
    step = max(1, min(BLOCK // d_other, (memory - fixed) // 2 // of_gram))
    n_rows = max(1, int((memory - fixed - step * of_gram) // each))
    for start in range(0, len(u), n_rows):
        rows = slice(start, min(start + n_rows, len(u)))
        c = hidden_coefficients(layer, u[rows], exact=True)
        images = c.new_zeros(len(c), d_other)
        for units, block in factor_gram_blocks(layer, other, metric, step):
            images.addmm_(c[:, units], block)
        yield rows, c, images


def traces(
    layer: BilinearLayer, u: Float[Tensor, "n d_model"], metric: Float[Tensor, "d_model d_model"] | None = None
) -> Float[Tensor, "n"]:
    """Trace of every `Q_u` (of `D Q_u D^T`, given `D^T D`), in float64."""
    left, right = branch_rows(layer)
    return hidden_coefficients(layer, u, exact=True) @ (
        (left if metric is None else left @ double(metric)) * right
    ).sum(-1)


def cosines(inner: Float[Tensor, "n m"], row_norms: Float[Tensor, "n"], column_norms: Float[Tensor, "m"]) -> Tensor:
    """Inner products to cosines; 0 for what has no length."""
    lengths = row_norms[:, None] * column_norms
    return torch.where(lengths > 0, inner / lengths.clamp_min(torch.finfo(inner.dtype).tiny), 0.0).clamp(-1, 1)


# --- of whole layers --------------------------------------------------------------------------------------------------


def tensor_inner(
    layer: BilinearLayer,
    other: BilinearLayer,
    metric: Float[Tensor, "d_model d_model"] | None = None,
    memory: int = MEMORY,
) -> Float[Tensor, ""]:
    """`<T, T'> = sum_o <Q_{e_o}, Q'_{e_o}>` of two layers' tensors, in float64.

    Raises:
        ArgumentError: less memory than the smallest step takes.
        SAEMismatchError: layers of different d_model.
    """
    out, other_out = double(layer.W_out), double(other.W_out)
    total = out.new_zeros(())
    d_model, units, others = len(layer.W_gate), len(layer.W_out), len(other.W_out)
    fixed = 8 * d_model * (3 + 2 * (metric is not None)) * (units + others)
    fit = how_many_fit("the inner product of two layers", BLOCK_ENTRY * others, memory, besides=fixed)
    for rows, block in factor_gram_blocks(layer, other, metric, min(fit, max(1, BLOCK // others))):
        total += (block * (out[rows] @ other_out.T)).sum()
    return total


def tensor_norm(
    layer: BilinearLayer, metric: Float[Tensor, "d_model d_model"] | None = None, memory: int = MEMORY
) -> Float[Tensor, ""]:
    """Frobenius norm of a layer's tensor, in float64."""
    return tensor_inner(layer, layer, metric, memory).clamp_min(0).sqrt()


# --- the factors ------------------------------------------------------------------------------------------------------


def factor_gram_blocks(
    layer: BilinearLayer,
    other: BilinearLayer | None,
    metric: Float[Tensor, "d_model d_model"] | None,
    step: int | None = None,
) -> Iterator[tuple[slice, Float[Tensor, "rows other_d_mlp"]]]:
    """`K` in blocks of `step` rows, each with the hidden units it belongs to; `None` is blocks of `BLOCK` entries."""
    left, right = branch_rows(layer)
    left_other, right_other = (left, right) if other is None else branch_rows(other)
    if left.shape[1] != left_other.shape[1]:
        raise SAEMismatchError(
            f"a layer of d_model {left.shape[1]} and one of {left_other.shape[1]}: their tensors have no inner product."
        )
    if metric is not None:
        left, right = left @ double(metric), right @ double(metric)
    step = max(1, BLOCK // len(left_other)) if step is None else step
    for start in range(0, len(left), step):
        rows = slice(start, start + step)
        block = (left[rows] @ left_other.T) * (right[rows] @ right_other.T)
        block += (left[rows] @ right_other.T) * (right[rows] @ left_other.T)
        yield rows, block.mul_(0.5)


def branch_rows(layer: BilinearLayer) -> tuple[Float[Tensor, "d_mlp d_model"], Float[Tensor, "d_mlp d_model"]]:
    """The branch rows `l_m` and `r_m`, in float64."""
    return double(layer.W_gate.T).contiguous(), double(layer.W_in.T).contiguous()
