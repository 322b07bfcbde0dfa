"""The expansion of an output over subsets of tokens: tables of every part, what they say, and how much they leave."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Float, Int
from torch import Tensor

from bilens._core.checks import check_shares, check_sizes
from bilens._core.display import Tabular
from bilens.draw import plots
from bilens.errors import ArgumentError, OutOfRangeError
from bilens.expand.subsets import Subset, interaction, order_weights, parts_of, spread

# What is read at the last of some positions, from the embeddings that stand at them and nothing else.
Run = Callable[[Float[Tensor, "batch n d_model"], Int[Tensor, "#batch n"]], Float[Tensor, "batch target"]]


TEXTS_AT_ONCE = 2**14


@dataclass(frozen=True, repr=False)
class Expansion(Tabular):
    """An output as a sum over subsets of tokens; made by `model.expand`.

    Attributes:
        offsets: the offsets of the tokens before the reading position, 0 first.
        order: the most tokens in a part.
        tokens: the token ids at each offset: the whole vocabulary, or the candidates that were given.
        values: `f` of every part: what is read where its tokens are there and no others. An axis for each offset, its
            tokens, and the targets last.
        targets: the targets' names; the ids of tokens, where they are logits.
        all_logits: the targets are the logits of the whole vocabulary, so that there are probabilities.
        left_out: what was not computed, in words; empty where all was.
        embeddings, strings: the embedding and the name of every token.
        run: the model.
    """

    offsets: Subset
    order: int
    tokens: dict[int, Int[Tensor, "n"]]
    values: dict[Subset, Float[Tensor, "*tokens target"]]
    targets: list[str]
    all_logits: bool
    left_out: str
    embeddings: Float[Tensor, "d_vocab d_model"]
    strings: list[str]
    run: Run

    def subset(self, offsets: Sequence[int] | None = None) -> Subset:
        """The part of these offsets; `None` is the first of the highest order.

        Raises:
            OutOfRangeError: there is no such part in this expansion.
        """
        if offsets is None:
            return next(part for part in self.values if len(part) == self.order)
        part = tuple(sorted({0, *offsets}))
        if part not in self.values:
            raise OutOfRangeError(
                f"there is no part of the offsets {list(offsets)}; this expansion has offsets {list(self.offsets)}, up "
                f"to {self.order} of them at a time."
            )
        return part

    def interaction(self, offsets: Sequence[int] | None = None) -> Float[Tensor, "*tokens target"]:
        """What the tokens at these offsets do together that no fewer of them do, for every choice of tokens.

        Args:
            offsets: the part; `None` is the first of the highest order. Axes come in the order of offsets, 0 first.
        """
        return interaction(self.values, self.subset(offsets))

    def probabilities(self, offsets: Sequence[int] | None = None) -> Float[Tensor, "*tokens target"]:
        """The probability of every next token where these tokens are there and no others.

        Raises:
            ArgumentError: the expansion is not of all logits.
        """
        if not self.all_logits:
            raise ArgumentError("probabilities need the logits of the whole vocabulary: expand with target=None.")
        return self.values[self.subset(offsets)].softmax(-1)

    def rules(self, threshold: float = 0.5, offsets: Sequence[int] | None = None) -> pd.DataFrame:
        """What these tokens together make likely, and no fewer of them do.

        A rule is a choice of tokens and a next token whose probability is higher, by at least `threshold`, than with
        any fewer of the tokens (and, with the reading token alone, than by chance).

        Args:
            threshold: between 0 and 1.
            offsets: the part, as in `interaction`.

        Returns:
            One row per rule, the largest gain first: the token ids and names by offset, the next token, its probability
            and its gain.
        """
        check_shares(threshold=threshold)
        part = self.subset(offsets)
        probability = self.probabilities(part)
        without = torch.full_like(probability, 1 / len(self.targets))
        for fewer in parts_of(part, len(part) - 1):
            without = torch.maximum(without, spread(self.probabilities(fewer), fewer, part))
        gain = probability - without
        frame = self._frame(gain >= threshold, part, {"probability": probability, "gain": gain})
        return frame.sort_values("gain", ascending=False, ignore_index=True)

    def top(self, n: int = 20, offsets: Sequence[int] | None = None) -> pd.DataFrame:
        """The `n` largest interactions at these offsets, by absolute value.

        Logits are taken relative to their mean over the vocabulary, which no probability depends on.
        """
        check_sizes(n=n)
        part = self.subset(offsets)
        found = self.interaction(part)
        if self.all_logits:
            found = found - found.mean(-1, keepdim=True)
        largest = found.abs().flatten().topk(min(n, found.numel())).indices
        chosen = torch.zeros(found.numel(), dtype=torch.bool).index_fill(0, largest, True).view(found.shape)
        frame = self._frame(chosen, part, {"interaction": found})
        return frame.sort_values("interaction", key=abs, ascending=False, ignore_index=True)

    def _frame(self, chosen: Tensor, part: Subset, columns: dict[str, Tensor]) -> pd.DataFrame:
        *rows, targets = chosen.nonzero(as_tuple=True)
        data: dict[str, Any] = {}
        for offset, row in reversed(list(zip(part, rows, strict=True))):  # as they stand in a text
            ids = self.tokens[offset][row].tolist()
            data |= {f"id -{offset}": ids, f"token -{offset}": [self.strings[i] for i in ids]}
        data["target"] = [self.targets[i] for i in targets.tolist()]
        if self.all_logits:
            data["target_id"] = targets.tolist()
        return pd.DataFrame(data | {name: values[chosen].tolist() for name, values in columns.items()})

    @torch.no_grad()
    def fidelity(self, tokens: Int[Tensor, "text pos"], order: int | None = None) -> "Fidelity":
        """How much of the output at the last position of texts is in the parts of up to 1, 2, ... tokens.

        Args:
            tokens: texts as tokens, all of one length; the last is where the output is read.
            order: the most tokens in a part; `None` is that of the expansion. All positions are chosen from, whatever
                the offsets of the expansion.

        Raises:
            ArgumentError: tokens that are none, or the expansion is not of all logits.
        """
        order = self.order if order is None else order
        check_sizes(order=order)
        if not self.all_logits:
            raise ArgumentError("what is left is measured in nats, of all logits: expand with target=None.")
        if not isinstance(tokens, Tensor) or tokens.ndim != 2 or tokens.is_floating_point() or not tokens.numel():
            raise ArgumentError(f"tokens is {tokens!r:.80}, expected texts as tokens, (text, pos).")
        if not 0 <= tokens.min() <= tokens.max() < len(self.embeddings):
            raise OutOfRangeError(f"tokens are not all in the vocabulary, 0 to {len(self.embeddings) - 1}.")
        n = tokens.shape[1] - 1
        order = min(order, n + 1)
        embedded = self.embeddings[tokens]
        whole = self.run(embedded, torch.arange(n + 1)[None]).log_softmax(-1)
        sums: list[Tensor] = []
        for size in range(order):
            sums.append(torch.zeros_like(whole))
            at = torch.tensor([[*chosen, n] for chosen in combinations(range(n), size)])
            for some in at.split(max(1, TEXTS_AT_ONCE // len(tokens))):
                rows = embedded[:, some].flatten(0, 1)
                sums[-1] += self.run(rows, some.repeat(len(tokens), 1)).view(len(tokens), len(some), -1).sum(1)
        left = []
        for k in range(1, order + 1):
            weights = order_weights(n, k)
            part = sum((w * s for w, s in zip(weights, sums, strict=False)), start=torch.zeros_like(whole))
            left.append((whole.exp() * (whole - part.log_softmax(-1))).sum(-1))
        chance = (whole.exp() * whole).sum(-1) + torch.tensor(float(whole.shape[1])).log()
        return Fidelity(n_texts=len(tokens), position=n, left=torch.stack(left, 1), chance=float(chance.mean()))

    def to_frame(self) -> pd.DataFrame:
        """One row per part: its offsets, how many choices of tokens it has, and the size of its interactions."""
        return pd.DataFrame(
            [
                {
                    "offsets": part,
                    "order": len(part),
                    "choices": value[..., 0].numel(),
                    "rms": self.interaction(part).pow(2).mean().sqrt().item(),
                    "largest": self.interaction(part).abs().max().item(),
                }
                for part, value in self.values.items()
            ]
        )

    def plot(self) -> go.Figure:
        """The size of the interactions of every part."""
        frame = self.to_frame()
        labels = [", ".join(f"-{offset}" for offset in part) for part in frame.offsets]
        return plots.bars(labels, frame.rms.tolist(), "interactions by the offsets of their tokens (root mean square)")

    def __str__(self) -> str:
        what = f"all {len(self.targets)} logits" if self.all_logits else ", ".join(self.targets[:4])
        lines = [f"Expansion of {what} over up to {self.order} tokens at offsets {list(self.offsets)}"]
        for row in self.to_frame().itertuples():
            at = ", ".join(f"-{offset}" for offset in row.offsets)  # type: ignore[attr-defined]
            lines.append(f"  {at:12} {row.choices:>9,} choices, rms {row.rms:.4g}, largest {row.largest:.4g}")
        return "\n".join([*lines, *([f"  left out: {self.left_out}"] if self.left_out else [])])


@dataclass(frozen=True, repr=False)
class Fidelity(Tabular):
    """What the parts of up to 1, 2, ... tokens leave of the output at one position.

    Attributes:
        n_texts, position: the texts, and the position that was read, counted from 0.
        left: the divergence of what these parts give from the model's own output, in nats, for every text and order.
        chance: the mean divergence of what is given without any part, that all tokens are as likely.
    """

    n_texts: int
    position: int
    left: Float[Tensor, "text order"]
    chance: float

    def to_frame(self) -> pd.DataFrame:
        """One row per order: the mean and the largest divergence in nats. A higher order may leave more than a lower
        one."""
        frame = pd.DataFrame({"order": range(1, self.left.shape[1] + 1)})
        frame["nats"], frame["largest"] = self.left.mean(0).tolist(), self.left.max(0).values.tolist()
        return frame

    def plot(self) -> go.Figure:
        """The nats that are left by order, 0 being chance."""
        values = [self.chance, *self.left.mean(0).tolist()]
        return plots.bars([f"up to {k} tokens" for k in range(len(values))], values, "nats that are left")

    def __str__(self) -> str:
        means = ", ".join(f"{value:.3f}" for value in self.left.mean(0).tolist())
        orders = ", ".join(str(k) for k in range(1, self.left.shape[1] + 1))
        return (
            f"parts of up to {orders} tokens leave {means} nats at position {self.position}, over {self.n_texts} texts "
            f"({self.chance:.3f} without any)"
        )
