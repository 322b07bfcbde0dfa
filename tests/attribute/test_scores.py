"""A score is the sum over pairs of parts of two streams, for every head and kind of attention.

The gap is the float32 rounding of the model's own pass: within the contract's 1e-5 of the sum of absolute parts. Where
the model runs in float64 it is within 1e-6: in the first layer a score has one part, and cancels inside it.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import bilens
from bilens.attribute import Target, freeze, split, split_score
from bilens.errors import ArgumentError, OutOfRangeError
from bilens.model.loading import load_model
from tests.attribute.conftest import TOKENS, model_of, saes_of

COMPLETE, WIDE = 1e-5, 1e-6
KINDS: list[dict[str, Any]] = [
    {"bias": True, "normalization": True},
    {"bias": False, "normalization": False, "rotary": False},
    {"attention": "bilinear", "normalization": False, "bias": False, "d_head": 6},
    {"attention": "quadratic", "normalization": True, "bias": True},
]


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("points", [(), ("mlp-out",), ("resid-pre",)], ids=str)
def test_every_head_is_complete(kind: dict[str, Any], points: tuple[str, ...]) -> None:
    """Between any two positions; of polynomial attention the sum is the head's own part of the target's split."""
    frozen = freeze(model_of(n_layer=2, **kind), TOKENS, saes_of(2, points) if points else ())
    polynomial = frozen.model.cfg.attention != "softmax"
    target = Target.logit(7, 4)
    heads = split(frozen, target).heads() if polynomial else None
    for layer in range(2):
        for head in range(2):
            for key in (0, 4):
                found = split_score(frozen, layer, head, key, 4, target=target if polynomial else None)
                assert found.relative_error <= COMPLETE
                if heads is not None:
                    assert abs(found.total - heads[layer, head, key].item()) <= COMPLETE * found.absolute_sum
    frame = found.to_frame()
    assert len(frame) == found.values.numel()
    assert frame.value.abs().is_monotonic_decreasing
    expected = {(): "mlp 0", ("mlp-out",): "0-mlp-out/", ("resid-pre",): "1-resid-pre/"}[points]
    assert any(name.startswith(expected) for name in found.key_parts)
    found.plot()
    assert f"L1H1 at 4 {frozen.strings[4]!r}" in str(found)


def test_a_gauge_changes_nothing() -> None:
    """Changing the signs of the first queries and of the values leaves every part of what is moved as it is."""
    target = Target.logit(7, 4)
    model = model_of(n_layer=2, **KINDS[2])
    other = bilens.HookedBilinearTransformer(model.cfg)
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        other.blocks[1].attn.W_Q1[0] *= -1
        other.blocks[1].attn.W_V[0] *= -1
    one, two = (split_score(freeze(m, TOKENS), 1, 0, 2, 4, target=target).values for m in (model, other))
    torch.testing.assert_close(one, two, atol=1e-5 * float(one.abs().max()), rtol=0)


def test_every_head_of_the_bundled_model_and_of_the_given_one(shared: Path) -> None:
    """Completeness over all heads, from the last position to the first, the middle and itself."""
    model = load_model("ts-tiny", device="cpu", dtype="float64")
    frozen = freeze(model, "Once upon a time there was a little fox")
    for layer in range(model.cfg.n_layers):
        for head in range(model.cfg.n_heads):
            for key in (0, 3, -1):
                assert split_score(frozen, layer, head, key).relative_error <= WIDE
    if not (shared / "truth").exists():
        pytest.skip(f"the known program is not here: no folder {shared / 'truth'}")
    model = load_model(shared / "truth", device="cpu", dtype="float64")
    tokens = load_file(shared / "truth" / "expected.safetensors")["input_ids"][0, :16]
    frozen = freeze(model, tokens)
    for layer in range(2):
        for key in (0, 7, 15):
            target = Target.logit(int(tokens[3]), 15)
            assert split_score(frozen, layer, 0, key, target=target).relative_error <= WIDE


def test_bad_arguments() -> None:
    softmax, bilinear = (freeze(model_of(n_layer=2, **kind), TOKENS) for kind in (KINDS[0], KINDS[2]))
    with pytest.raises(ArgumentError, match="a bilinear score has no sign of its own: pass target="):
        split_score(bilinear, 0, 0, 1)
    with pytest.raises(ArgumentError, match="target goes with polynomial attention"):
        split_score(softmax, 0, 0, 1, target=Target.logit(1))
    with pytest.raises(ArgumentError, match="key 4 comes after query 2"):
        split_score(softmax, 0, 0, 4, 2)
    with pytest.raises(ArgumentError, match="does not read what layer 1 adds at position 3"):
        split_score(bilinear, 1, 0, 1, 3, target=Target.logit(1, 4))
    for layer, head, key in ((2, 0, 1), (0, 2, 1), (0, 0, 9)):
        with pytest.raises(OutOfRangeError):
            split_score(softmax, layer, head, key)
