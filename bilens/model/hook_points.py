"""TransformerLens' hooks, with names that are checked: a misspelt hook is an error that says what was meant.

`HookedRootModule` is where TransformerLens keeps hooks and caches, in every version. Added here:

1. a name it does not know raises `HookNameError` instead of doing nothing
2. caches are `ActivationCache`s, and `pos_slice` cuts the positions of every activation, whatever its axes are
3. a compiled model obeys hooks: while it has any, it runs as if it were not compiled
4. the published names of hooks (`mlp-in`), by which SAEs are stored: `hook_of`, `point_of`
"""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformer_lens import ActivationCache
from transformer_lens.HookedRootModule import HookedRootModule
from transformer_lens.utilities import Slice
from typing_extensions import Self

from bilens._core.checks import check_flags
from bilens.errors import ArgumentError, HookNameError, OutOfRangeError, SAEMismatchError, nearest

# The published names of places in a block, and any other hook of a block by itself.
POINT_TO_HOOK = {
    "resid-pre": "hook_resid_pre",
    "resid-mid": "hook_resid_mid",
    "resid-post": "hook_resid_post",
    "mlp-in": "ln2.hook_normalized",
    "mlp-out": "hook_mlp_out",
    "attn-out": "hook_attn_out",
}
HOOK_TO_POINT = {hook: point for point, hook in POINT_TO_HOOK.items()}
OTHER_POINT = r"(?:\w+\.)*hook_\w+"

F = TypeVar("F", bound=Callable[..., Any])


def eager_while_hooked(forward: F) -> F:
    """A `forward` that `torch.compile` leaves alone while the model has hooks.

    What is compiled is guarded by whether there are hooks, not by which: torch does not look at a module's hooks again.
    """
    eager = torch.compiler.disable(forward)

    @wraps(forward)
    def run(self: "CheckedHooks", *args: Any, **kwargs: Any) -> Any:
        return (eager if self._is_hooked() else forward)(self, *args, **kwargs)

    return run  # type: ignore[return-value]


class CheckedHooks(HookedRootModule):
    """A `HookedRootModule` whose methods check the names of hooks."""

    def _is_switched_off(self, name: str) -> str | None:
        """Why a hook point that exists sees nothing at present; `None` if it is in use."""
        return None

    def _is_hooked(self) -> bool:
        """Whether any hook point has a hook."""
        return any(point.fwd_hooks or point.bwd_hooks for point in self.hook_dict.values())

    def _position_axis(self, name: str) -> int | None:
        """The axis of the positions in the activation at a hook point; `None` for a model that has none."""
        return None

    def check_hook_name(self, name: str) -> None:
        """Raises `HookNameError`, with the nearest names, for a hook the model does not have or has switched off."""
        if name not in self.hook_dict:
            raise HookNameError(f"the model has no hook {name!r}." + nearest(name, self.hook_dict))
        if reason := self._is_switched_off(name):
            raise HookNameError(f"{name!r} {reason}.")

    def run_with_cache(
        self,
        *args: Any,
        return_cache_object: bool = True,
        remove_batch_dim: bool = False,
        pos_slice: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Run and keep activations: `(output, ActivationCache)`; see TransformerLens for the arguments.

        Raises:
            ArgumentError, HookNameError, OutOfRangeError: the same cases as for `get_caching_hooks`.
        """
        check_flags(return_cache_object=return_cache_object, remove_batch_dim=remove_batch_dim)
        if kwargs.get("incl_bwd") and not torch.is_grad_enabled():
            raise ArgumentError("incl_bwd needs gradients, which torch.no_grad() or torch.inference_mode() turned off.")
        kwargs |= {"remove_batch_dim": remove_batch_dim, "pos_slice": _positions(pos_slice)}
        output, cache = super().run_with_cache(*args, **kwargs)
        if not return_cache_object:
            return output, cache
        return output, ActivationCache(cache, self, has_batch_dim=not remove_batch_dim)

    def get_caching_hooks(
        self,
        names_filter: Any = None,
        incl_bwd: bool = False,
        device: Any = None,
        remove_batch_dim: bool = False,
        cache: dict[str, Tensor] | None = None,
        pos_slice: Any = None,
    ) -> tuple[dict[str, Tensor], list, list]:
        """The hooks of `run_with_cache`: names are checked; a function, or `None` for all, picks among them.

        Raises:
            ArgumentError: the filter does not choose names, or the slice does not choose positions.
            HookNameError: the model has no such hook.
            OutOfRangeError: (when they run) the activation has no such position.
        """
        names = self._hooks_in_use(names_filter)
        cache, fwd, bwd = super().get_caching_hooks(names, incl_bwd, device, remove_batch_dim, cache)
        positions = _positions(pos_slice)
        if positions is not None:
            fwd, bwd = ([(name, self._sliced(save, positions)) for name, save in hooks] for hooks in (fwd, bwd))
        return cache, fwd, bwd

    def add_caching_hooks(self, names_filter: Any = None, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Keep activations of every run until `reset_hooks`; raises as `get_caching_hooks`."""
        return super().add_caching_hooks(self._hooks_in_use(names_filter), *args, **kwargs)

    def _hooks_in_use(self, names_filter: Any) -> list[str]:
        if names_filter is not None and not isinstance(names_filter, str | list | tuple | set):
            if not callable(names_filter):
                raise ArgumentError(f"names_filter {names_filter!r} is no hook's name, list of names or function.")
        elif names_filter is not None:
            names = [names_filter] if isinstance(names_filter, str) else list(names_filter)
            for name in names:
                self.check_hook_name(name)
            return names
        return [
            name
            for name in self.hook_dict
            if self._is_switched_off(name) is None and (names_filter is None or names_filter(name))
        ]

    def _sliced(self, save: Callable, positions: Slice) -> Callable:
        """A caching hook that is shown some positions only."""

        def save_positions(activation: Tensor, hook: Any) -> None:
            axis = self._position_axis(hook.name)
            if axis is None:
                raise ArgumentError(f"{hook.name!r} has no positions: leave pos_slice out.")
            try:
                kept = positions.apply(activation, dim=axis)
            except TypeError as error:
                raise ArgumentError(f"pos_slice {positions.slice!r:.80} is no position.") from error
            except IndexError as error:
                n = activation.shape[axis]
                raise OutOfRangeError(f"pos_slice {positions.slice} is outside the {n} positions.") from error
            save(kept, hook=hook)

        return save_positions

    def add_hook(self, name: str | Callable[[str], bool], *args: Any, **kwargs: Any) -> None:
        """Add a hook to one point by name, or to all that a function of the name picks."""
        if isinstance(name, str):
            self.check_hook_name(name)
        super().add_hook(name, *args, **kwargs)

    @contextmanager
    def hooks(
        self,
        fwd_hooks: Sequence[tuple[Any, Callable]] = (),
        bwd_hooks: Sequence[tuple[Any, Callable]] = (),
        *args: Any,
        **kwargs: Any,
    ) -> Iterator[Self]:
        """Hooks that last as long as the `with` block."""
        for name, _ in (*fwd_hooks, *bwd_hooks):
            if isinstance(name, str):
                self.check_hook_name(name)
        with super().hooks(list(fwd_hooks), list(bwd_hooks), *args, **kwargs):
            yield self


def _positions(pos_slice: Any) -> Slice | None:
    """What `pos_slice` keeps; `None` is all."""
    if pos_slice is None:
        return None
    try:
        if isinstance(pos_slice, bool):
            raise TypeError("a flag")
        positions = Slice.unwrap(pos_slice)
    except (TypeError, ValueError) as error:
        raise ArgumentError(f"pos_slice {pos_slice!r} is no position, list of positions or (start, stop).") from error
    return None if positions.mode == "identity" else positions


def hook_of(point: str, layer: int) -> str:
    """The TransformerLens hook of a published point: `("mlp-in", 3)` is `blocks.3.ln2.hook_normalized`.

    Any other hook of a block is its own point: `("mlp.hook_post", 3)` is `blocks.3.mlp.hook_post`.

    Raises:
        SAEMismatchError: no such point (with the nearest).
    """
    if re.fullmatch(OTHER_POINT, point):
        return f"blocks.{layer}.{point}"
    if point not in POINT_TO_HOOK:
        raise SAEMismatchError(
            f"point {point!r} is not one of {', '.join(POINT_TO_HOOK)}." + nearest(point, POINT_TO_HOOK)
        )
    return f"blocks.{layer}.{POINT_TO_HOOK[point]}"


def point_of(hook_name: str) -> tuple[str, int]:
    """The published point and layer of a hook: the inverse of `hook_of`.

    Raises:
        SAEMismatchError: a hook that has no published point.
    """
    match = re.fullmatch(r"blocks\.(\d+)\.(.+)", hook_name)
    if match is None or match[2] not in HOOK_TO_POINT:
        hooks = [f"blocks.{match[1] if match else 0}.{hook}" for hook in HOOK_TO_POINT]
        raise SAEMismatchError(
            f"hook {hook_name!r} has no published point; those that have are {', '.join(hooks)}."
            + nearest(hook_name, hooks)
        )
    return HOOK_TO_POINT[match[2]], int(match[1])
