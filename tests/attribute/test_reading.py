"""Where an explanation's eigencircuits are read: exact, and refused on another text."""

import pytest
import torch

from bilens.attribute import Target, freeze, read_positions, split
from bilens.decompose import Decomposer
from bilens.errors import ArgumentError
from tests.attribute.conftest import TOKENS, model_of, saes_of


@pytest.mark.parametrize("normalization", [False, True])
def test_positions_and_biases_are_the_projections(normalization: bool) -> None:
    """What is left of a projection is what attention's biases give; the tolerance is float32 rounding."""
    model = model_of(True, normalization)
    found = Decomposer(model, 1, *saes_of()[2:4]).attribute(TOKENS, 3, 4)
    frozen = freeze(model, TOKENS[:5])
    read = read_positions(frozen, found, n=3).explanation
    assert read.reads.shape == (3, 5)
    for vector, positions, projection in zip(read.vectors, read.reads, read.projections, strict=False):
        target = Target.direction(vector, "blocks.1.ln2.hook_normalized", 4)
        biases = split(frozen, target, attention="paths", mlps="whole").groups["constant"]
        assert (positions.sum() + biases).item() == pytest.approx(projection.item(), rel=1e-5, abs=1e-5)
    again = read_positions(freeze(model, TOKENS), found, n=3).explanation  # what comes after the token is not read
    torch.testing.assert_close(again.reads, read.reads, rtol=1e-5, atol=1e-5)
    with pytest.raises(ArgumentError, match=r"the frozen pass is on .*, the attribution on"):
        read_positions(freeze(model, TOKENS.flip(0)), found)
