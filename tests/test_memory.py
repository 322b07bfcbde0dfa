"""Calls keep to the memory that they are given, or refuse beforehand with the bytes that they would need."""

import pytest
import torch

from bilens import Decomposer
from bilens.errors import ArgumentError
from tests.conftest import make_model
from tests.memory import peak_within
from tests.random_saes import make_sae

SLACK = 2**27  # of the allocator and of what is imported late


@pytest.fixture(scope="module")
def decomposer() -> Decomposer:
    """Of a layer with 1,024 input and output features."""
    model = make_model(n_layer=1, d_model=64, d_hidden=96)
    saes = [
        make_sae("topk", f"blocks.0.{point}", d_in=64, d_sae=1024) for point in ("ln2.hook_normalized", "hook_mlp_out")
    ]
    return Decomposer(model, 0, *saes)


def test_calls_refuse_beforehand(decomposer: Decomposer) -> None:
    every = torch.arange(1024)
    for call, said in (
        (lambda: decomposer.interaction(every, memory=2**20), "interaction of 1,024 outputs .* needs 50,331,648 bytes"),
        (lambda: decomposer.interaction(every, basis="features"), "needs 12,884,901,888 bytes, .* 4,294,967,296: ask"),
        (lambda: decomposer.eigen(every, 8, memory=2**20), "eigen .8 pairs of 1,024 outputs. needs .* fewer pairs"),
        (lambda: decomposer.top_interactions([0], memory=2**10), "largest pairs of 1,024 .* needs .* fewer pairs"),
    ):
        with pytest.raises(ArgumentError, match=said):
            call()


def test_calls_keep_to_their_memory(decomposer: Decomposer) -> None:
    """Under a limit of the address space. All pairs of all outputs would be 4 GiB of coefficients alone."""
    decomposer.top_interactions([0], n=5)
    every, budget = torch.arange(48), 2**26
    peak_within(lambda: decomposer.top_interactions(every[:4], n=20, memory=2**21), 2**21 + SLACK)
    peak_within(lambda: decomposer.interaction(every, memory=2**22), 2**22 + SLACK)
    peak_within(lambda: decomposer.eigen(torch.arange(1024), 2, memory=budget), 2 * budget + SLACK)
