"""Values that are checked by name."""

from typing import Any

import numpy as np
import pytest
import torch

from bilens._core.checks import check_index, whole_number
from bilens.errors import ArgumentError


@pytest.mark.parametrize("value", [3, np.int64(3), np.uint8(3), torch.tensor(3), torch.tensor([3])])
def test_whole_numbers(value: Any) -> None:
    """Python's, numpy's and torch's."""
    assert whole_number(value) == 3
    assert type(whole_number(value)) is int
    assert check_index(value, 5, "feature {} is outside {}") == 3


@pytest.mark.parametrize("value", [True, np.bool_(True), torch.tensor(True), 1.0, "1", None, [1], torch.tensor([1, 2])])
def test_a_flag_is_no_whole_number(value: Any) -> None:
    """`True` would be 1 to Python, and an index of the second feature."""
    with pytest.raises(ArgumentError, match="is not an integer: a layer"):
        whole_number(value, "a layer")
    with pytest.raises(ArgumentError, match="is not an integer: feature"):
        check_index(value, 5, "feature {} is outside {}")
