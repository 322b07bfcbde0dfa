"""What a direction is like, in words: the named directions (features or tokens) nearest to it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Lexicon:
    """Directions that have names.

    Attributes:
        kind: the word for what they are.
        directions: the directions, of any length above zero.
        names: one each; `None` names them by number.
    """

    kind: Literal["feature", "token"]
    directions: Float[Tensor, "n d_model"]
    names: Sequence[str] | None = None

    def nearest(self, vectors: Float[Tensor, "*v d_model"], k: int = 3) -> "Nearest":
        """The `k` entries of largest absolute cosine with each vector."""
        unit = torch.nn.functional.normalize(self.directions, dim=-1)
        cosines = torch.nn.functional.normalize(vectors.to(unit), dim=-1) @ unit.T
        entries = cosines.abs().topk(min(k, len(unit)), dim=-1).indices
        return Nearest(entries, cosines.gather(-1, entries), self)

    def name(self, entry: int) -> str:
        return str(entry) if self.names is None else self.names[entry]


@dataclass(frozen=True)
class Nearest:
    """The entries of a lexicon nearest to some vectors, by falling absolute cosine."""

    entries: Int[Tensor, "*v k"]
    cosines: Float[Tensor, "*v k"]
    lexicon: Lexicon

    def describe(self) -> list[str]:
        """One line per vector: `name +0.51, name -0.32`."""
        k = self.entries.shape[-1]
        rows = zip(self.entries.reshape(-1, k).tolist(), self.cosines.reshape(-1, k).tolist(), strict=True)
        return [
            ", ".join(f"{self.lexicon.name(entry)} {cosine:+.2f}" for entry, cosine in zip(*row, strict=True))
            for row in rows
        ]
