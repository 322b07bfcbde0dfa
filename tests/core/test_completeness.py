"""A gap is called rounding only where the dtype of the forward pass explains it."""

import copy
from dataclasses import replace

import pytest
import torch

from bilens._core.completeness import is_rounding
from bilens.attribute import Target, attribute_tokens, freeze, split
from bilens.decompose import Decomposer
from tests.attribute.conftest import TOKENS, model_of, saes_of


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("normalization", [False, True])
def test_what_rounding_leaves_is_called_that(dtype: torch.dtype, normalization: bool) -> None:
    """Measured: at most 11 units of rounding in float32, 3 in half precision, where 84 and 8 are let pass."""
    model = copy.deepcopy(model_of(True, normalization)).to(dtype)
    frozen = freeze(model, TOKENS, saes_of())
    results = [split(frozen, target) for target in (Target.logit(5), Target.feature("2-mlp-out", 3))]
    results.append(attribute_tokens(frozen, Target.logit(5)))
    results.append(Decomposer(model, 1, *saes_of()[2:4]).attribute(TOKENS, 3, -1))
    for found in results:
        assert found.dtype == dtype
        assert found.is_rounding
        assert f"{str(dtype).removeprefix('torch.')} rounding)" in str(found)


def test_a_larger_gap_is_not() -> None:
    """One part of a hundredth left out of a float32 sum: three digits above what rounding takes."""
    found = split(freeze(model_of(True, True), TOKENS), Target.logit(5))
    short = replace(found, values=found.values.clone())
    short.values[0] += 0.01 * short.absolute_sum
    assert not short.is_rounding
    assert "MORE THAN float32 ROUNDING EXPLAINS" in str(short)
    assert not is_rounding(float("nan"), torch.float32)
    assert not is_rounding(0.076, torch.float32)  # what a hooked MLP left
