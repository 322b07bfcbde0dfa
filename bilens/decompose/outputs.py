"""What an `output` may be: integers mean features of the output SAE, floats mean directions.

One of either or several of them; as Python numbers, sequences, tensors, numpy arrays or columns of a data frame.
"""

from collections.abc import Sequence
from typing import Any, Protocol, SupportsIndex, TypeAlias, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from bilens._core.checks import check_index, whole_number
from bilens.errors import ArgumentError, SAEMismatchError


@runtime_checkable
class SupportsArray(Protocol):
    """A numpy array, or what becomes one: a column of a data frame, a tensor."""

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any: ...


Output: TypeAlias = SupportsIndex | Sequence[Any] | SupportsArray


def read_output(output: Any, d_model: int) -> Int[Tensor, "*n"] | Float[Tensor, "*n d_model"]:
    """Features or directions as a tensor, which of them by its dtype.

    Raises:
        ArgumentError: neither integers nor floats, nothing at all, a float where a feature's number is meant, or NaN.
        SAEMismatchError: directions of another width than `d_model`.
    """
    if isinstance(output, Tensor):
        tensor = output.detach()
    elif isinstance(output, SupportsIndex) and not isinstance(output, np.ndarray):
        number = whole_number(output, "an output is a feature's number, or a direction")
        if abs(number) >= 2**63:
            raise ArgumentError(f"output {number} is no feature's number: no SAE has as many.")
        tensor = torch.tensor(number)
    else:
        if isinstance(output, list | tuple) and any(isinstance(each, bool) for each in output):
            raise ArgumentError(f"output {output!r} holds a flag: expected features, or directions as floats.")
        try:
            tensor = torch.as_tensor(np.array(output))  # a copy: torch warns of arrays it may not write to
        except (TypeError, ValueError) as error:
            raise ArgumentError(f"output {output!r} is neither features (integers) nor directions (floats).") from error
        if tensor.shape == (0,) and tensor.is_floating_point():  # numpy takes an empty list for floats
            raise ArgumentError("output is empty: expected at least one feature or direction.")
    if not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool):
        if tensor.ndim > 1:
            raise ArgumentError(
                f"output features of shape {tuple(tensor.shape)}: expected one feature, or a list of them."
            )
        return tensor
    if not tensor.is_floating_point() or tensor.ndim not in (1, 2):
        raise ArgumentError(
            f"an output of shape {tuple(tensor.shape)} and type {tensor.dtype}: expected features, as an integer or "
            f"several, or directions, as floats of shape ({d_model},) or (n, {d_model})."
        )
    if tensor.shape[-1] != d_model:
        raise SAEMismatchError(f"directions of shape {tuple(tensor.shape)}: the layer writes {d_model} dimensions.")
    if not tensor.isfinite().all():
        raise ArgumentError("the output directions hold NaN or infinite values.")
    return tensor


def check_feature(feature: SupportsIndex, d_sae: int) -> int:
    """A feature's number as an int; raises `OutOfRangeError` outside the output SAE."""
    return check_index(feature, d_sae, "feature {} is outside the output SAE's {}")
