"""Weights under TransformerLens' names: tensors made from the stored weights, whose edits take effect there.

A name is a view of what is stored (`W_in`), a product with it (`W_O`), a stack of all layers (`model.W_in`), or zeros
where the architecture has no such weight (`b_O`). To a user they are alike: every way that torch has to write into a
tensor, or assigning another one to the name, changes the model or raises. Reading and gradients are as of any tensor.
"""

import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor

from bilens.errors import ArgumentError, nearest

Store = Callable[[Tensor], None]
# What torch calls its functions that write: `zero_`, `__setitem__`, `__iadd__`, `_foreach_mul_`.
WRITES = re.compile(
    r".*[^_]_|__setitem__|__i(add|sub|mul|matmul|div|truediv|floordiv|mod|pow|and|or|xor|lshift|rshift)__"
)
SET_DATA = Tensor.data.__set__  # type: ignore[attr-defined]
AS_PLAIN_TENSOR = (Tensor.__repr__, Tensor.__reduce_ex__, Tensor.__deepcopy__, Tensor.as_subclass)


class NamedWeight(Tensor):
    """A weight under its name, or a part of one: what is written into it is stored."""

    _whole: Tensor
    _store: Store | None

    @classmethod
    def viewing(cls, stored: Tensor) -> "NamedWeight":
        """A view of a stored weight."""
        return cls._of(stored, stored, None)

    @classmethod
    def computed(cls, values: Tensor, store: Store) -> "NamedWeight":
        """Values of their own; `store` is given them again, whole, after each write."""
        return cls._of(values, values, store)

    @classmethod
    def zeros(cls, like: Tensor, shape: tuple[int, ...], reason: str) -> "NamedWeight":
        """Zeros for a weight that the architecture does not have: nothing else can be written into them."""

        def refuse(values: Tensor) -> None:
            raise ArgumentError(f"{reason}: it stays zero.")

        return cls.computed(like.new_zeros(shape), refuse)

    @classmethod
    def _of(cls, values: Tensor, whole: Tensor, store: Store | None) -> "NamedWeight":
        with torch._C.DisableTorchFunctionSubclass():
            named = values.as_subclass(cls)
            named._whole, named._store = whole.as_subclass(Tensor), store
            return named

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func == SET_DATA:
            named, values = args[:2]
            check_shape(named, values)
            with torch.no_grad():
                return named.copy_(values)
        with torch._C.DisableTorchFunctionSubclass():
            if func in AS_PLAIN_TENSOR and isinstance(args[0], cls):
                return func(args[0].as_subclass(Tensor), *args[1:], **kwargs)
            named = next(_named((*args, *kwargs.values())))
            writes = "out" in kwargs or WRITES.fullmatch(getattr(func, "__name__", ""))
            edited = [n for n in _named((*args, *kwargs.values())) if n._store is not None] if writes else []
            before = [n._whole.detach().clone() for n in edited]
            result = func(*args, **kwargs)
        for one, old in zip(edited, before, strict=True):
            one._write_back(old)
        if type(result) not in (tuple, list) and not isinstance(result, Tensor):
            if named._store is not None and hasattr(result, "setflags"):
                result.setflags(write=False)  # numpy's writes go past torch
            return result
        return _linked(result, list(_named((*args, *kwargs.values()))))

    def set_(self, source: Tensor) -> "NamedWeight":  # type: ignore[override]  # torch lets no one watch this one
        self.data = source
        return self

    def _write_back(self, old: Tensor) -> None:
        assert self._store is not None
        with torch._C.DisableTorchFunctionSubclass():
            if torch.equal(self._whole, old):
                return
        try:
            self._store(self._whole.detach())
        except Exception:
            self._whole.data.copy_(old)
            raise


def _named(values: Any) -> Iterator[NamedWeight]:
    for value in values:
        if isinstance(value, NamedWeight):
            yield value
        elif isinstance(value, tuple | list):
            yield from _named(value)


def _linked(result: Any, sources: list[NamedWeight]) -> Any:
    """What shares memory with a named weight is one too."""
    if type(result) in (tuple, list):
        return type(result)(_linked(part, sources) for part in result)
    if not isinstance(result, Tensor) or isinstance(result, NamedWeight) or is_functorch_wrapped_tensor(result):
        return result
    for source in sources:
        if result.untyped_storage()._cdata == source._whole.untyped_storage()._cdata:
            return NamedWeight._of(result, source._whole, source._store)
    return result


def check_shape(weight: Tensor, values: Any, name: str = "a weight") -> None:
    """Refuse (`ArgumentError`) what cannot be put in a weight's place."""
    if not isinstance(values, Tensor) or values.shape != weight.shape:
        found = f"shape {tuple(values.shape)}" if isinstance(values, Tensor) else repr(values)
        raise ArgumentError(f"{name} is given {found}, expected a tensor of shape {tuple(weight.shape)}.")


class NamedWeightsMixin(nn.Module):
    """A module whose named weights are properties: assigning to one copies the values into what is stored."""

    _stored: tuple[str, ...] = ()  # parameters of its own

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(getattr(type(self), name, None), property):
            weight = getattr(self, name)
            if not isinstance(weight, Tensor):
                return object.__setattr__(self, name, value)
            check_shape(weight, value, name)
            with torch.no_grad():
                weight.copy_(value)
        elif isinstance(value, nn.Parameter) and name not in self._stored:
            raise ArgumentError(f"{type(self).__name__} has no weight {name!r}." + nearest(name, dir(type(self))))
        else:
            super().__setattr__(name, value)
