"""Attention without softmax: with its pattern frozen it is as linear as any, so every split is as complete.

The gap that is allowed is the contract's, 1e-5 of the sum of absolute parts, as in `test_splitting.py`.
"""

import itertools
from typing import Any

import pytest
import torch

from bilens.attribute import Circuit, FrozenPass, Target, attribute_tokens, freeze, split
from bilens.attribute.interventions import frozen_hooks, read_values, rerun
from bilens.attribute.targets import read_targets
from bilens.decompose import Decomposer
from tests.attribute.conftest import TOKENS, model_of, saes_of
from tests.random_saes import make_sae

COMPLETE = 1e-5
KINDS: list[dict[str, Any]] = [
    {"attention": "bilinear", "normalization": False, "bias": False, "d_head": 6},
    {"attention": "bilinear", "normalization": True, "bias": True},
    {"attention": "quadratic", "normalization": False, "bias": True, "rotary": False, "residual_scale": 0.2},
]
TARGETS = [Target.logit(7, 4), Target.feature("1-mlp-in", 5, 4), Target.logit(7, 5, minus=9)]


@pytest.fixture(scope="module", params=KINDS, ids=str)
def frozen(request: pytest.FixtureRequest) -> FrozenPass:
    return freeze(model_of(n_layer=2, **request.param), TOKENS, saes_of(2))


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_every_split_is_complete(frozen: FrozenPass, target: Target) -> None:
    for attention, mlps in itertools.product(("heads", "paths"), ("whole", "features", "pairs")):
        found: Any = split(frozen, target, attention=attention, mlps=mlps)  # type: ignore[arg-type]
        assert found.relative_error <= COMPLETE, (attention, mlps)
    by_token: Any = attribute_tokens(frozen, target, pairs=True)
    assert by_token.relative_error <= COMPLETE
    assert by_token.actual == found.actual


def test_a_circuit_is_complete(frozen: FrozenPass) -> None:
    for target in (None, TARGETS[1]):  # the likeliest token: logits reach so far that no other has a probability
        circuit = Circuit.trace(frozen.model, saes_of(2), TOKENS, target, max_nodes=40)
        assert circuit.largest_relative_error <= COMPLETE
        assert len(circuit.nodes) > 1


@torch.no_grad()
def test_what_a_head_moved_is_what_goes_without_it(frozen: FrozenPass) -> None:
    """A part of a split is what the target loses, patterns frozen, where the last layer's head looks away."""
    target, layer = TARGETS[0], 1
    found = split(frozen, target).to_frame()
    reads, names = read_targets(frozen, target), ["ln_final.hook_normalized"]
    for head, position in ((0, 4), (1, 2)):

        def away(z: Any, hook: Any, head: int = head, position: int = position) -> Any:
            v = frozen.values(layer)[head, position].to(z)
            z[:, 4, head] -= frozen.pattern[layer, head, 4, position].to(z) * v
            return z

        # What the last MLP makes of it is not the head's own part.
        held = [
            *frozen_hooks(frozen),
            ("blocks.1.attn.hook_z", away),
            ("blocks.1.hook_mlp_out", lambda x, hook: frozen.cache[hook.name][None]),
        ]
        changed = read_values(reads, rerun(frozen, 1, held, names)).item()
        part = found[(found.kind == "head") & (found.layer == layer) & (found["head"] == head)]
        part = part[part.position == position].value.item()
        assert reads.actual.item() - changed == pytest.approx(part, abs=1e-5 * found.value.abs().sum())


def test_a_layer_without_a_norm_decomposes() -> None:
    """`Decomposer` on a polynomial model: the pairs of features add up to an output's pre-activation."""
    model = model_of(n_layer=2, **KINDS[0])
    sae_in, sae_out = (make_sae(hook=f"blocks.1.{hook}") for hook in ("ln2.hook_normalized", "hook_mlp_out"))
    decomposer = Decomposer(model, 1, sae_in, sae_out)
    text = decomposer.attribute(TOKENS, 3, position=-1)
    assert text.relative_error <= COMPLETE
