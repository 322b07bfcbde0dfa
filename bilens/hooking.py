"""TransformerLens' hooks, with names that are checked: a misspelt hook is an error that says what was meant.

`HookedRootModule` is where TransformerLens keeps hooks and caches, in every version; what is added here is that a name
it does not know raises `HookNameError` instead of doing nothing, and that caches are `ActivationCache`s.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from transformer_lens import ActivationCache
from transformer_lens.HookedRootModule import HookedRootModule
from typing_extensions import Self

from bilens.errors import HookNameError, nearest


class CheckedHooks(HookedRootModule):
    """A `HookedRootModule` whose methods check the names of hooks."""

    def _is_switched_off(self, name: str) -> str | None:
        """Why a hook point that exists sees nothing at present; `None` if it is in use."""
        return None

    def check_hook_name(self, name: str) -> None:
        """Raises `HookNameError`, with the nearest names, for a hook the model does not have or has switched off."""
        if name not in self.hook_dict:
            raise HookNameError(f"the model has no hook {name!r}." + nearest(name, self.hook_dict))
        if reason := self._is_switched_off(name):
            raise HookNameError(f"{name!r} {reason}.")

    def run_with_cache(
        self, *args: Any, return_cache_object: bool = True, remove_batch_dim: bool = False, **kwargs: Any
    ) -> Any:
        """Run and keep activations: `(output, ActivationCache)`; see TransformerLens for the arguments."""
        output, cache = super().run_with_cache(*args, remove_batch_dim=remove_batch_dim, **kwargs)
        if not return_cache_object:
            return output, cache
        return output, ActivationCache(cache, self, has_batch_dim=not remove_batch_dim)

    def get_caching_hooks(self, names_filter: Any = None, *args: Any, **kwargs: Any) -> Any:
        """The hooks of `run_with_cache`: names are checked; a function, or `None` for all, picks among them."""
        if isinstance(names_filter, str | list | tuple | set):
            names = [names_filter] if isinstance(names_filter, str) else list(names_filter)
            for name in names:
                self.check_hook_name(name)
            return super().get_caching_hooks(names, *args, **kwargs)

        def wanted(name: str) -> bool:
            return self._is_switched_off(name) is None and (names_filter is None or names_filter(name))

        return super().get_caching_hooks(wanted, *args, **kwargs)

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
