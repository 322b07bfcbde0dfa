"""The public edge takes what users take for numbers, and names what it does not take."""

from typing import Literal

import numpy as np
import pytest
import torch
from jaxtyping import Float
from torch import Tensor

from bilens._core.typing import typed
from bilens.errors import ArgumentError


@typed
def scaled(x: Float[Tensor, "n d"], times: float, k: int | None = None, side: Literal["left", "right"] = "left"):
    return x[:, :k] * times


@pytest.mark.parametrize("times", [2.0, 2, np.float32(2), np.float64(2), np.int64(2)], ids=repr)
@pytest.mark.parametrize("k", [1, np.int64(1), np.uint8(1)], ids=repr)
def test_numbers_may_be_whole_or_numpys(times, k):
    assert torch.equal(scaled(torch.ones(2, 3), times, k=k), torch.full((2, 1), 2.0))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"times": "2"}, "scaled: times is '2', expected float"),
        ({"k": 1.0}, r"scaled: k is 1.0, expected int \| None"),
        ({"k": np.float64(1)}, "scaled: k is .*1.0.*, expected int"),
        ({"side": "lefd"}, "expected one of 'left', 'right'. Did you mean 'left'?"),
        ({"x": torch.ones(2)}, "scaled: x is "),
    ],
)
def test_other_things_are_named(bad, message):
    with pytest.raises(ArgumentError, match=message):
        scaled(**({"x": torch.ones(2, 3), "times": 2.0} | bad))


def test_a_flag_is_no_number():
    """Python counts `True` among its integers; where both may stand, a flag is one."""

    @typed
    def either(n: int, share: float | int | None = None, flag: bool = False, both: bool | int = 1) -> None: ...

    either(1, 0.5, True, both=True)
    for bad in (lambda: either(True), lambda: either(1, False), lambda: either(n=True)):
        with pytest.raises(ArgumentError, match=r"either: (n|share) is (True|False), expected a number"):
            bad()
