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
        return next((entry[0].shape[1] for entry in self.entries if entry is not None), 0)

    def append_mask(self, mask: Int[Tensor, "batch new"] | None, new: Tensor) -> Int[Tensor, "batch pos"] | None:
        """Add the mask of the new positions of `new`, `(batch, new, ...)`; that of all, `None` where none is padded."""
        if mask is None and self.mask is None:
            return None
        batch, n_new = new.shape[:2]
        past = self.mask if self.mask is not None else mask.new_ones(batch, self.n_positions)  # type: ignore[union-attr]
        self.mask = torch.cat([past, past.new_ones(batch, n_new) if mask is None else mask], dim=1)
        return self.mask

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add new positions to a layer; return all of its keys and values."""
        past = self.entries[layer]
        if past is not None:
            k, v = torch.cat([past[0], k], dim=1), torch.cat([past[1], v], dim=1)
        self.entries[layer] = (k, v)
        return k, v
