"""Keys and values of positions already run, in TransformerLens' own cache: what the forward pass asks of it."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache
from transformer_lens.cache.key_value_cache_entry import TransformerLensKeyValueCacheEntry

from bilens.errors import ArgumentError, ContextLengthError


def cached_positions(cache: TransformerLensKeyValueCache, layers: range) -> int:
    """How many positions are in the cache, at the layers that will run.

    Raises:
        ArgumentError: no cache of this model, or not as many at one layer as at another (an earlier pass stopped
            between them).
    """
    try:
        counts = {layer: cache[layer].past_keys.shape[1] for layer in layers}
    except (TypeError, AttributeError, LookupError) as error:
        raise ArgumentError(f"past_kv_cache is {cache!r:.80}, expected a KeyValueCache of this model.") from error
    if len(set(counts.values())) > 1:
        raise ArgumentError(
            f"past_kv_cache holds {counts} positions by layer; expected as many at each. A pass with stop_at_layer or "
            "start_at_layer fills some layers only: freeze the cache before it."
        )
    return next(iter(counts.values()), 0)


def extended_mask(
    cache: TransformerLensKeyValueCache, mask: Int[Tensor, "batch pos"], past: int, n_new: int
) -> Int[Tensor, "batch key"]:
    """The mask of the positions in the cache and the new ones; the cache keeps it, unless it is frozen.

    Args:
        cache: a cache with `past` positions.
        mask: the mask of the new positions, or of all.
        past, n_new: the numbers of positions in the cache, and of new ones.

    Raises:
        ArgumentError: a mask or a cache of another shape.
    """
    batch, width = mask.shape
    previous = cache.previous_attention_mask.to(mask.device)
    if previous.shape[0] != batch or width not in (n_new, past + n_new):
        raise ArgumentError(
            f"attention_mask has shape {(batch, width)}, expected ({previous.shape[0]}, {n_new}) for the new positions "
            f"or ({previous.shape[0]}, {past + n_new}) with the {past} in past_kv_cache."
        )
    if width == n_new:
        # A cache that another model's pass filled may know more than it holds, or nothing of padding.
        known = previous[:, :past]
        mask = torch.cat([known, mask.new_ones(batch, past - known.shape[1]), mask], dim=1)
    if not cache.frozen:
        cache.previous_attention_mask = mask
    return mask


def append(
    entry: Any, keys: Sequence[Float[Tensor, "batch pos head d_head"]], values: Float[Tensor, "batch pos head d_head"]
) -> tuple[list[Float[Tensor, "batch all head d_head"]], Float[Tensor, "batch all head d_head"]]:
    """Keys and values of a layer, those in the cache first. The keys of both factors of bilinear attention are kept as
    those of twice as many heads."""
    kept = torch.cat(list(keys), dim=2)
    if isinstance(entry, TransformerLensKeyValueCacheEntry) and entry.past_keys.shape[1] == 0:
        entry.past_keys = kept[:, :0]  # made for one factor
    kept, values = entry.append(kept, values)
    return list(kept.chunk(len(keys), dim=2)), values


def check_room(past: int, n_new: int, n_ctx: int) -> None:
    """`ContextLengthError` where the new positions do not fit behind those in the cache."""
    if past + n_new > n_ctx:
        raise ContextLengthError(
            f"{n_new} tokens after the {past} in the cache do not fit the model's context of {n_ctx}."
        )
