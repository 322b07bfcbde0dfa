"""A device for the tests that is not the CPU: a GPU where there is one, else one that torch is told of here.

`Far` tensors say that they are on the device `far:0` and hold their numbers in a tensor on the CPU. Inside `far_mode()`
every operation of torch is looked at on its way to its kernel, and what CUDA refuses is refused: operands on two
devices (0-d tensors of the CPU may join elementwise operations, indices may come from the CPU), a generator of another
device, numpy's view of what is not on the CPU.
"""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.backend_registration import (
    _DummyBackendModule,
    _DummyPrivateUse1Hook,
    _setup_privateuseone_for_python_backend,
)

COPIES = ("aten::copy_", "aten::_to_copy", "aten::_copy_from", "aten::set_data")
INDEXING = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_", "aten::_unsafe_index")


class MixedDevicesError(RuntimeError):
    """What CUDA would refuse."""


class _Hook(_DummyPrivateUse1Hook):
    def is_available(self) -> bool:
        return False  # nobody shall take it for the machine's accelerator


class _Backend(_DummyBackendModule):
    def is_available(self) -> bool:
        return False

    def device_count(self) -> int:
        return 0


@functools.cache
def far_device() -> torch.device:
    """The GPU, or `far:0`, which torch is told of at the first call."""
    if torch.cuda.is_available():
        return torch.device("cuda", 0)
    _setup_privateuseone_for_python_backend("far", backend_module=_Backend(), hook=_Hook())
    return torch.device("far", 0)


class Far(Tensor):
    """A tensor that says it is on the far device."""

    inner: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, inner: Tensor) -> "Far":
        far = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=far_device(),
        )
        far.inner = inner
        return far

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _dispatch(func, args, kwargs or {})

    def as_subclass(self, cls: type) -> Any:  # a class of weights that write themselves back: not on this device
        return self.view_as(self)

    def tolist(self) -> Any:
        return self.inner.tolist()

    def numpy(self, *, force: bool = False) -> Any:
        if force:
            return self.inner.detach().numpy()
        raise MixedDevicesError("numpy reads no tensor of another device; take .cpu() first.")

    def __array__(self, dtype: Any = None) -> Any:
        return self.numpy()

    def __format__(self, spec: str) -> str:
        return format(self.inner, spec)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Far({self.inner!r})"

    __str__ = __repr__

    def __deepcopy__(self, memo: Any) -> "Far":
        copied = Far(self.inner.detach().clone())
        return copied.requires_grad_(self.requires_grad)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return Far, (self.inner.detach(),)


class _Mode(TorchDispatchMode):
    def __enter__(self) -> Any:
        # `torch.tensor(..., device="far")` makes the tensor on the CPU and moves it through here.
        self._lifted = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)
        return super().__enter__()

    def __exit__(self, *raised: Any) -> None:
        torch._C._set_only_lift_cpu_tensors(self._lifted)
        super().__exit__(*raised)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _dispatch(func, args, kwargs or {})


@contextlib.contextmanager
def far_mode() -> Iterator[torch.device]:
    """Tensors may be made on `far:0` here, and mixing them with those of the CPU raises."""
    with contextlib.nullcontext() if far_device().type == "cuda" else _Mode():
        yield far_device()


def _dispatch(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    far = far_device()
    given = tree_flatten((args, kwargs))[0]
    tensors = [x for x in given if isinstance(x, Tensor)]
    is_far = any(isinstance(x, Far) for x in tensors)
    name = func._schema.name
    if is_far:
        _check(func, name, args, tensors)
    wanted = kwargs.get("device")
    if wanted is not None:
        wanted = torch.device(wanted)
        if wanted.type == far.type:
            kwargs = kwargs | {"device": torch.device("cpu")}
        is_far = wanted.type == far.type
    generator = kwargs.get("generator")
    if generator is not None and is_far:
        raise MixedDevicesError(f"{name} on {far} with a generator of {generator.device}")
    if name == "aten::copy_" and not isinstance(args[0], Far):
        is_far = False
    if "pin_memory" in kwargs:
        kwargs = kwargs | {"pin_memory": None}

    def near(x: Any) -> Any:
        return x.inner if isinstance(x, Far) else x

    out = func(*tree_map(near, args), **tree_map(near, kwargs))
    owners = {id(x.inner): x for x in tensors if isinstance(x, Far)}

    if torch.Tag.inplace_view in func.tags:  # another shape for the same tensor: the outside changes with the inside
        with torch._C._DisableTorchDispatch():
            func(*args, **kwargs)

    def back(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        if id(x) in owners:  # written in place
            return owners[id(x)]
        return Far(x) if is_far else x

    return tree_map(back, out)


def _check(func: Any, name: str, args: Any, tensors: list[Tensor]) -> None:
    near = [x for x in tensors if not isinstance(x, Far)]
    if not near or name in COPIES:
        return
    if name in INDEXING and isinstance(args[0], Far) and not any(x is args[0] for x in near):
        values = args[2] if len(args) > 2 else None
        if not isinstance(values, Tensor) or isinstance(values, Far) or values.ndim == 0:
            return
    if torch.Tag.pointwise in func.tags and all(x.ndim == 0 for x in near):
        return
    shapes = ", ".join(f"{'far' if isinstance(x, Far) else 'cpu'} {tuple(x.shape)}" for x in tensors)
    raise MixedDevicesError(f"{name} mixes devices: {shapes}")


def to_far(module: Any) -> Any:
    """A module (model or SAE), moved in place."""
    device = far_device()
    if device.type == "cuda":
        return module.to(device)
    for part in module.modules():
        for name, weight in part._parameters.items():
            if weight is not None:
                part._parameters[name] = nn.Parameter(Far(weight.detach()), requires_grad=weight.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = Far(buffer.detach())
    if hasattr(module, "cfg"):
        module.cfg.device = str(device)
    if isinstance(getattr(module, "device", None), torch.device):
        module.device = device
    return module
