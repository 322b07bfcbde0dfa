"""What is asked of a frozen pass keeps to its memory, and comes out the same with any."""

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from bilens.attribute import (
    Target,
    attribute_tokens,
    check_circuit,
    check_edges,
    freeze,
    integrated_gradients,
    split,
    trace_circuit,
)
from bilens.errors import ArgumentError
from tests.attribute.conftest import TOKENS, model_of, saes_of

TARGETS = [Target.logit(7), Target.feature("1-mlp-out", 6, 4), Target.logit(3)]


@pytest.fixture(scope="module")
def rich():
    return freeze(model_of(True, True), TOKENS, saes_of(kind="topk", k=5))


def test_the_memory_changes_nothing(rich):
    """One read, run, position or step at a time."""
    poor = replace(rich, memory=80_000)
    for target in TARGETS:
        for attention in ("heads", "paths"):
            one, other = (split(frozen, target, attention=attention, mlps="pairs") for frozen in (rich, poor))
            assert torch.equal(one.index, other.index)
            assert_close(one.values, other.values)
        one, other = (integrated_gradients(frozen, target, steps=6) for frozen in (rich, poor))
        assert_close(one.values, other.values, atol=1e-5, rtol=1e-4)  # of the model in float32
    for one, other in zip(*(attribute_tokens(frozen, TARGETS, pairs=True) for frozen in (rich, poor)), strict=True):
        assert_close(one.values, other.values)
        assert_close(one.pairs, other.pairs)
        assert_close(one.pairs.sum(1)[:-1], one.values)
    circuits = [trace_circuit(frozen, TARGETS[0], max_nodes=30) for frozen in (rich, poor)]
    assert circuits[0].nodes.id.tolist() == circuits[1].nodes.id.tolist()
    for check in (check_circuit, check_edges):
        one, other = (
            check(frozen, circuit, TARGETS[0]).to_frame()
            for frozen, circuit in zip((rich, poor), circuits, strict=True)
        )
        numbers = one.select_dtypes("number").columns
        assert_close(
            *(torch.from_numpy(frame[numbers].to_numpy(copy=True)) for frame in (one, other)), atol=1e-4, rtol=1e-3
        )


def test_too_little_memory_is_said_beforehand(rich):
    poor = replace(rich, memory=3000)
    for call, said in (
        (
            lambda: freeze(rich.model, TOKENS, memory=1000),
            r"freeze of 6 tokens needs .* 1,000: give a short",
        ),
        (lambda: split(poor, TARGETS[0], attention="paths", mlps="pairs"), r"a split into .* parts needs .* bytes"),
        (lambda: attribute_tokens(poor, TARGETS[0]), r"attribute_tokens needs .* bytes, and memory is 3,000"),
        (
            lambda: attribute_tokens(replace(rich, memory=20_000), TARGETS[0], pairs=True),
            r"the pairs of 6 tokens needs",
        ),
        (lambda: trace_circuit(poor, TARGETS[0]), r"a trace needs .* bytes, and memory is 3,000: freeze a shorter"),
        (lambda: integrated_gradients(poor, TARGETS[0]), r"the gradient of a run of the model needs"),
    ):
        with pytest.raises(ArgumentError, match=said):
            call()
