"""Keys and values of positions already run, so that generation runs only the new token."""

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor


@dataclass
class KeyValueCache:
    """Rotated keys and values of the positions already run, one pair per layer, each `(batch, pos, head, d_head)`."""

    entries: list[tuple[Tensor, Tensor] | None]
    mask: Int[Tensor, "batch pos"] | None = None

    @classmethod
    def empty(cls, n_layers: int) -> "KeyValueCache":
        return cls([None] * n_layers)

    @property
    def n_positions(self) -> int:
        return 0 if self.entries[0] is None else self.entries[0][0].shape[1]

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add new positions to a layer; return all of its keys and values."""
        past = self.entries[layer]
        if past is not None:
            k, v = torch.cat([past[0], k], dim=1), torch.cat([past[1], v], dim=1)
        self.entries[layer] = (k, v)
        return k, v
