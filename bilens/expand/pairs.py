"""What one head makes of pairs of tokens: the score of a pair, times what the value of the earlier one moves.

A head with polynomial attention has no sign of its own: `A -> -A, OV -> -OV` leaves the model as it is. So the pattern
is never shown by itself; only its product with what it moves means anything.
"""

from dataclasses import dataclass, field

import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Float
from torch import Tensor

from bilens._core.checks import check_sizes
from bilens._core.display import Tabular
from bilens.draw import plots


@dataclass(frozen=True, repr=False)
class TokenPairs(Tabular):
    """Score times OV times unembedding, for every pair of tokens; made by `model.token_pairs`.

    Attributes:
        layer, head, offset: the head, and how far before the reading token the other stands.
        pattern: the mixing matrix of every pair (of softmax attention: the scores before the softmax).
        moved: what the head moves from each earlier token to each logit, where its pattern is 1.
        strings: the tokens.
    """

    layer: int
    head: int
    offset: int
    pattern: Float[Tensor, "reading earlier"] = field(repr=False)
    moved: Float[Tensor, "earlier d_vocab"] = field(repr=False)
    strings: list[str] = field(repr=False)

    def product(self, reading: int | None = None) -> Float[Tensor, "*reading earlier d_vocab"]:
        """The product: for one reading token, or for all (the vocabulary to the third power)."""
        if reading is None:
            return self.pattern[:, :, None] * self.moved
        return self.pattern[reading, :, None] * self.moved

    def top(self, n: int = 20) -> pd.DataFrame:
        """The `n` largest products by absolute value, found one reading token at a time."""
        check_sizes(n=n)
        best = self.pattern.new_zeros(0)
        index = torch.zeros(0, 3, dtype=torch.long)
        for reading in range(len(self.pattern)):
            values = self.product(reading)
            found = values.abs().flatten().topk(min(n, values.numel())).indices
            earlier, target = found // values.shape[1], found % values.shape[1]
            best = torch.cat([best, values.flatten()[found]])
            index = torch.cat([index, torch.stack([torch.full_like(found, reading), earlier, target], 1)])
            kept = best.abs().topk(min(n, len(best))).indices
            best, index = best[kept], index[kept]
        columns = {"earlier": 1, "reading": 0, "target": 2}
        names = {name: [self.strings[i] for i in index[:, column].tolist()] for name, column in columns.items()}
        ids = {f"{name}_id": index[:, column].tolist() for name, column in columns.items()}
        return pd.DataFrame(names | ids | {"value": best.tolist()})

    def to_frame(self) -> pd.DataFrame:
        """The largest 100 products."""
        return self.top(100)

    def plot(self, top: int = 20) -> go.Figure:
        """The largest products as signed bars."""
        frame = self.top(top)
        labels = [f"{a} … {b} → {c}" for a, b, c in zip(frame.earlier, frame.reading, frame.target, strict=True)]
        return plots.bars(labels, frame.value.tolist(), f"L{self.layer}H{self.head}, {self.offset} tokens apart")

    def __str__(self) -> str:
        rows = self.top(8).itertuples()
        lines = [f"  {row.value:+9.4g}  {row.earlier} … {row.reading} → {row.target}" for row in rows]
        return "\n".join([f"L{self.layer}H{self.head}, {self.offset} tokens apart: score x OV x unembedding", *lines])
