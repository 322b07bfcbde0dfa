"""Running the model again with something changed: what attributions are compared with.

`rerun` is one batched pass of the model itself, through its hooks, every row of the batch a run of its own: with
attention patterns and norm scales either as they were (`frozen_hooks`) or as they come out, and with MLPs held at what
they gave (`holding_hooks`), so that what is measured is an edge and not everything behind it.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from bilens._core.bare import require_bare
from bilens.attribute.frozen import FrozenPass
from bilens.attribute.targets import LOGITS, Reads

Hook: TypeAlias = tuple[str, Callable[..., Any]]
FINAL = "ln_final.hook_normalized"


def frozen_hooks(frozen: FrozenPass) -> list[Hook]:
    """Attention patterns and norm scales as they were."""
    names = [name for name in frozen.cache if name.endswith(("hook_pattern", "hook_scale"))]
    return holding_hooks(frozen, names)


def holding_hooks(frozen: FrozenPass, names: Sequence[str]) -> list[Hook]:
    """Activations as they were."""
    return [(name, lambda value, hook: frozen.cache[hook.name].expand_as(value)) for name in names]


def rerun(
    frozen: FrozenPass, batch: int, fwd_hooks: Sequence[Hook], names: Sequence[str]
) -> dict[str, Float[Tensor, "batch p d_model"]]:
    """Run the text `batch` times at once.

    Args:
        frozen: the frozen pass of the text.
        batch: the number of rows; the hooks see all of them.
        fwd_hooks: the changes, made in this order.
        names: activation points to give back, as they are after the changes.
    """
    require_bare(frozen.model)
    seen: dict[str, Tensor] = {}

    def keep(value: Tensor, hook: Any) -> None:
        seen[hook.name] = value

    names = list(dict.fromkeys(FINAL if name == LOGITS else name for name in names))
    model, n_layers = frozen.model, frozen.n_layers
    with model.hooks(fwd_hooks=[*fwd_hooks, *((name, keep) for name in names)]):
        final = model(frozen.tokens.expand(batch, -1), stop_at_layer=n_layers)
        model.ln_final(final)
    return seen


def read_values(reads: Reads, seen: dict[str, Tensor]) -> Float[Tensor, "batch t"]:
    """What the targets are in every row of a rerun (an SAE's own normalisation stays frozen)."""
    columns = [
        seen[FINAL if hook == LOGITS else hook][:, position].to(reads.directions) @ direction + constant
        for hook, position, direction, constant in zip(
            reads.hooks, reads.positions.tolist(), reads.directions, reads.constants, strict=True
        )
    ]
    return torch.stack(columns, 1)
