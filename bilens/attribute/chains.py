"""Circuits from the weights alone: chains of eigencircuits across layers, without any input.

1. an output direction of an MLP has an interaction matrix; its leading eigenvectors `v` say what the MLP looks for
2. an eigenvector reads the residual stream, and every earlier module writes there: an MLP `m` below adds what the
   direction `v` reads of it, directly or moved by a head `(l, h)` above `m`, as the direction `W_V W_O v`; so do the
   embeddings
3. these ways are ranked by how strong each would be on white noise of the norm that layers see: the standard deviation
   of `n^T Q n` is `sqrt(2) |Q|_F` for an MLP, and that over the vocabulary for embeddings
4. each MLP found is an output direction again: back to 1, `depth` times

What is left out is large, so every step says on data how faithful it is: for an MLP that a chain starts at, the
correlation of its leading eigencircuits with the direction's real activation; for a way, the correlation of what comes
by it (attention as it really is) with what the eigenvector reads.

Source: Pearce et al. 2025, section 5 (single layers).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Float
from torch import Tensor

from bilens._core.checks import check_index
from bilens._core.display import Tabular
from bilens.attribute.frozen import FrozenPass, freeze
from bilens.draw import plots
from bilens.errors import ArgumentError, SAEMismatchError
from bilens.layer.bilinear import BilinearLayer, constant_term, interaction_matrix, linear_term
from bilens.layer.eigen.pairs import sorted_eigenpairs
from bilens.layer.inner import norms
from bilens.model.transformer import HookedBilinearTransformer

SHOWN_TOKENS = 6
COLUMNS = ("node", "parent", "depth", "kind", "layer", "via", "rank", "eigenvalue", "strength", "fidelity", "tokens")


@dataclass(frozen=True)
class Chain(Tabular):
    """A tree of eigencircuits.

    Attributes:
        frame: one row per node: `node, parent, depth, kind`: an `mlp` output direction (`layer`; `via` is how its
            parent reads it, `direct` or a head), its eigenvectors (`rank, eigenvalue`), and the `embedding`, with the
            `tokens` read most strongly, of either sign. `strength` is what ways are ranked by, `fidelity` the
            correlation on data (NaN without).
        directions: the direction of each node: the output direction, eigenvector, or read of the embeddings.
    """

    frame: pd.DataFrame = field(repr=False)
    directions: Float[Tensor, "node d_model"] = field(repr=False)

    def to_frame(self) -> pd.DataFrame:
        return self.frame

    def plot(self) -> go.Figure:
        """The fidelity of every step, deepest last."""
        shown = self.frame[self.frame.fidelity.notna()].to_dict("records")
        return plots.bars([self._label(row) for row in shown], [row["fidelity"] for row in shown], "fidelity")

    def __str__(self) -> str:
        lines: list[str] = []
        rows = self.frame.to_dict("records")

        def show(node: int, indent: int) -> None:
            row = rows[node]
            fidelity = "" if pd.isna(row["fidelity"]) else f", fidelity {row['fidelity']:.2f}"
            lines.append(f"{'  ' * indent}{self._label(row)}{fidelity}")
            for child in rows:
                if child["parent"] == node:
                    show(child["node"], indent + 1)

        show(0, 0)
        return "\n".join(lines)

    @staticmethod
    def _label(row: dict[Any, Any]) -> str:
        if row["kind"] == "eigenvector":
            return f"eigenvector {row['rank']} ({row['eigenvalue']:+.3g})"
        way = f" via {row['via']}" if row["via"] else ""
        shown = f": {row['tokens']}" if row["tokens"] else ""
        name = "embedding" if row["kind"] == "embedding" else f"mlp {row['layer']}"
        return f"{name}{way} (strength {row['strength']:.3g}){shown}"


@torch.no_grad()
def trace_chain(
    model: HookedBilinearTransformer,
    layer: int,
    direction: Float[Tensor, "d_model"],
    *,
    k: int = 2,
    width: int = 3,
    depth: int = 2,
    texts: Sequence[str] = (),
) -> Chain:
    """Follow an output direction of an MLP down through the weights.

    Args:
        model: a bilinear model.
        layer: the layer of the MLP.
        direction: the output direction, for example an output feature's encoder row.
        k: eigenvectors of each MLP output.
        width: ways (MLPs and embeddings, direct or by a head) of each eigenvector.
        depth: the number of MLPs to go down.
        texts: the texts to measure fidelity on.

    Raises:
        ArgumentError: `k`, `width` or `depth` below 1.
        NotBilinearError: a gated or one-branch model.
        OutOfRangeError: no such layer, or more eigenvectors than dimensions.
        SAEMismatchError: a direction of another width.
    """
    layer = check_index(layer, model.cfg.n_layers, "layer {} is outside the model's {}", negative=True)
    if direction.shape != (model.cfg.d_model,):
        raise SAEMismatchError(f"a direction of shape {tuple(direction.shape)}: the layer writes {model.cfg.d_model}.")
    for name, value in (("k", k), ("width", width), ("depth", depth)):
        if value < 1:
            raise ArgumentError(f"{name} is {value}, expected at least 1.")
    search = _Search(model, k, width, depth, [freeze(model, text, dtype=torch.float32) for text in texts])
    u = direction.detach().to(search.W_E)
    root = search.add(None, 0, "mlp", layer, u, strength=_noise(search.layer(layer), u[None])[0].item())
    search.expand(root, layer, u, 1)
    return Chain(pd.DataFrame(search.rows, columns=list(COLUMNS)), torch.stack(search.directions))


class _Search:
    """The tree as it grows."""

    def __init__(self, model: HookedBilinearTransformer, k: int, width: int, depth: int, data: list[FrozenPass]):
        for frozen in data:
            frozen.check_current()
        self.model, self.k, self.width, self.depth, self.data = model, k, width, depth, data
        self.W_E = model.W_E.detach().float()
        self.W_V, self.W_O = model.W_V.detach().float(), model.W_O.detach().float()
        self.layers: dict[int, BilinearLayer] = {}
        self.rows: list[dict[str, Any]] = []
        self.directions: list[Tensor] = []

    def layer(self, layer: int) -> BilinearLayer:
        if layer not in self.layers:
            self.layers[layer] = BilinearLayer.of(self.model, layer).to(torch.float32)
        return self.layers[layer]

    def add(self, parent: int | None, depth: int, kind: str, layer: int, direction: Tensor, **columns: Any) -> int:
        node = len(self.rows)
        empty = {"via": "", "rank": -1, "eigenvalue": 0.0, "strength": 0.0, "fidelity": float("nan"), "tokens": ""}
        where = {"node": node, "parent": -1 if parent is None else parent, "depth": depth, "kind": kind, "layer": layer}
        self.rows.append(where | empty | columns)
        self.directions.append(direction)
        return node

    def expand(self, node: int, layer: int, u: Float[Tensor, "d_model"], depth: int) -> None:
        """Add the eigenvectors of an MLP's output direction, and the ways into each."""
        mlp = self.layer(layer)
        values, vectors = sorted_eigenpairs(interaction_matrix(mlp, u), self.k)
        x = [frozen.cache[f"blocks.{layer}.ln2.hook_normalized"].float() for frozen in self.data]
        if x:
            inputs = torch.cat(x)
            leading = (values * (inputs @ vectors.T) ** 2).sum(-1)
            # Exact, biases and all: what the leading eigencircuits are to reproduce.
            whole = torch.cat([frozen.mlp_out[layer] for frozen in self.data]) @ u
            rest = inputs @ linear_term(mlp, u) + constant_term(mlp, u)
            self.rows[node]["fidelity"] = correlation(leading + rest, whole)
        for rank, (value, vector) in enumerate(zip(values.tolist(), vectors, strict=True)):
            child = self.add(node, depth, "eigenvector", layer, vector, rank=rank, eigenvalue=value)
            self.ways(child, layer, vector, depth)

    def ways(self, node: int, layer: int, v: Float[Tensor, "d_model"], depth: int) -> None:
        """Add the strongest ways into an eigenvector of a layer, and follow the MLPs among them."""
        heads = [(above, head) for above in range(layer + 1) for head in range(self.model.cfg.n_heads)]
        reads = torch.stack([v, *(self.W_V[at] @ (self.W_O[at] @ v) for at in heads)])
        tops = [layer, *(above for above, _ in heads)]  # modules below this one write what the way reads
        names = ["direct", *(f"L{above}H{head}" for above, head in heads)]
        found = [(std, "embedding", -1, way) for way, std in enumerate((reads @ self.W_E.T).std(-1).tolist())]
        for below in range(layer):
            open_ways = [way for way, top in enumerate(tops) if below < top]
            strengths = _noise(self.layer(below), reads[open_ways]).tolist()
            found += [(std, "mlp", below, way) for std, way in zip(strengths, open_ways, strict=True)]
        for strength, kind, below, way in sorted(found, key=lambda each: -each[0])[: self.width]:
            place = None if way == 0 else heads[way - 1]
            fidelity = self.fidelity(layer, v, kind, below, place, reads[way])
            shown = self.tokens(reads[way]) if kind == "embedding" else ""
            columns = {"via": names[way], "strength": strength, "fidelity": fidelity, "tokens": shown}
            child = self.add(node, depth, kind, below, reads[way], **columns)
            if kind == "mlp" and depth < self.depth:
                # An MLP's row keeps the fidelity of the way to it; its eigencircuits' is that of a chain started there.
                self.expand(child, below, reads[way], depth + 1)
                self.rows[child]["fidelity"] = fidelity

    def fidelity(
        self, layer: int, v: Tensor, kind: str, below: int, head: tuple[int, int] | None, read: Tensor
    ) -> float:
        """On data, the correlation of what comes by a way with what the eigenvector reads."""
        comes, reads = [], []
        for frozen in self.data:
            written = frozen.embed if kind == "embedding" else frozen.mlp_out[below]
            value = written @ read
            if head is not None:
                value = frozen.pattern[head] @ (value / frozen.scale1[head[0]])
            comes.append(value / frozen.scale2[layer])
            reads.append(frozen.cache[f"blocks.{layer}.ln2.hook_normalized"].float() @ v)
        return correlation(torch.cat(comes), torch.cat(reads)) if comes else float("nan")

    def tokens(self, read: Float[Tensor, "d_model"]) -> str:
        """The tokens whose embeddings a direction reads most strongly, each with its sign."""
        effect = self.W_E @ read
        strongest = effect.abs().topk(min(SHOWN_TOKENS, len(effect))).indices.tolist()
        tokenizer = self.model.tokenizer
        names = [str(token) if tokenizer is None else tokenizer.decode([token]) for token in strongest]
        return " ".join(f"{'+' if effect[t] > 0 else '-'}{name}" for t, name in zip(strongest, names, strict=True))


def _noise(layer: BilinearLayer, u: Float[Tensor, "n d_model"]) -> Float[Tensor, "n"]:
    """The standard deviation of each output direction on white noise: `Var(n^T Q n + g . n) = 2 |Q|_F^2 + |g|^2`."""
    quadratic = norms(layer, u) ** 2
    return (2 * quadratic + linear_term(layer, u).to(quadratic).pow(2).sum(-1)).sqrt().to(u)


def correlation(a: Float[Tensor, "n"], b: Float[Tensor, "n"]) -> float:
    """Pearson's, 0 where either side is constant."""
    a, b = a.double() - a.double().mean(), b.double() - b.double().mean()
    norm = (a.norm() * b.norm()).item()
    return 0.0 if norm == 0.0 else (a @ b).item() / norm
