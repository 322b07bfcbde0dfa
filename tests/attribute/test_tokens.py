"""Token attributions are complete, are Shapley values through one MLP, and agree with gradients where those are exact.

Tolerances: 1e-5 of the sum of absolute parts, as for every attribution of the float32 model.
"""

import itertools
import math

import pytest
import torch

from bilens.attribute import (
    Target,
    attribute_tokens,
    compare_tokens,
    freeze,
    gradient_times_input,
    integrated_gradients,
    split,
)
from bilens.attribute.interventions import FINAL, frozen_hooks, read_values, rerun
from bilens.attribute.targets import read_targets
from bilens.errors import ArgumentError, NotBilinearError
from tests.attribute.conftest import MODEL_KINDS, N_LAYERS, TOKENS, model_of
from tests.conftest import make_model

COMPLETE = 1e-5
DIRECTION = torch.randn(16, generator=torch.Generator().manual_seed(1))
TARGETS = [
    Target.logit(7, 4),
    Target.logit(7, 5, minus=9),
    Target.feature("2-mlp-in", 5, 4),
    Target.feature("1-mlp-out", 6, 3),
    Target.direction(DIRECTION, "blocks.2.hook_attn_out", 5),
    Target.direction(DIRECTION, "blocks.0.hook_resid_pre", 2),
    Target.direction(DIRECTION, "hook_embed", 2),
]


@pytest.fixture(scope="module", params=MODEL_KINDS, ids=str)
def frozen(request, frozen_kinds):
    return frozen_kinds[request.param]


def test_complete(frozen):
    together = attribute_tokens(frozen, TARGETS, pairs=True)
    for target, found in zip(TARGETS, together, strict=True):
        assert found.relative_error <= COMPLETE
        assert (found.values[found.position + 1 :] == 0).all()
        alone = attribute_tokens(frozen, target)
        torch.testing.assert_close(alone.values, found.values)
        # Rows of the pair matrix are the contributions.
        assert (found.pairs - found.pairs.T).abs().max() <= 1e-12 * found.pairs.abs().sum()
        rows = torch.cat([found.values, torch.tensor([found.bias], dtype=torch.float64)])
        torch.testing.assert_close(found.pairs.sum(1), rows, atol=1e-9 * found.pairs.abs().sum().item(), rtol=0)
        assert found.actual == split(frozen, target).actual
        if found.target == "logit '7'":
            torch.testing.assert_close(found.heads, split(frozen, target).heads()[:, :, : len(TOKENS)])


def test_shapley_through_one_mlp_by_brute_force():
    """Over all coalitions of tokens, the other embeddings zero, by the model itself with attention and norms frozen."""
    model = model_of(False, True, n_layer=1)
    frozen = freeze(model, TOKENS)
    target, n = Target.logit(7, -1), len(TOKENS)
    reads = read_targets(frozen, target)
    coalitions = list(itertools.product([0.0, 1.0], repeat=n))
    chosen = torch.tensor(coalitions)

    def keep(value, hook):
        return value * chosen[..., None]

    seen = rerun(frozen, len(chosen), [("hook_embed", keep), *frozen_hooks(frozen)], reads.hooks)
    worth = dict(zip(coalitions, read_values(reads, seen)[:, 0].tolist(), strict=True))
    shapley = []
    for player in range(n):
        without = [c for c in coalitions if not c[player]]
        sizes = [int(sum(c)) for c in without]
        weights = [math.factorial(s) * math.factorial(n - s - 1) / math.factorial(n) for s in sizes]
        gains = [worth[(*c[:player], 1.0, *c[player + 1 :])] - worth[c] for c in without]
        shapley.append(sum(w * g for w, g in zip(weights, gains, strict=True)))
    found = attribute_tokens(frozen, target)
    assert found.values.tolist() == pytest.approx(shapley, abs=COMPLETE * found.absolute_sum)


def test_nested_products():
    """Of `(a b) c`, made by two MLPs in turn, `c` gets a half, `a` and `b` a quarter each.

    Written by hand: tokens live in dimensions of their own and are brought together by attention; the first MLP writes
    `a b` into dimension 6, the second multiplies that with `c` into dimension 7. No norms, so numbers are plain.
    """
    model = make_model(n_layer=2, n_head=1, d_model=8, d_hidden=1, normalization=False)
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
        model.embed.W_E[0, 0] = model.embed.W_E[1, 1] = model.embed.W_E[2, 2] = 2.0
        for layer, (left, right, out) in enumerate([(0, 1, 6), (6, 2, 7)]):
            mlp = model.blocks[layer].mlp
            mlp.W_gate[left, 0] = mlp.W_in[right, 0] = mlp.W_out[0, out] = 1.0
        attention = model.blocks[0].attn  # even attention; what comes to the last token is a third of each
        attention.W_V[0].copy_(torch.eye(8))
        attention.o.weight.copy_(torch.eye(8))
    found = attribute_tokens(freeze(model, torch.tensor([0, 1, 2])), Target.direction(torch.eye(8)[7], FINAL))
    assert found.actual != 0
    torch.testing.assert_close(found.values / found.actual, torch.tensor([0.25, 0.25, 0.5], dtype=torch.float64))


@pytest.mark.parametrize("target", TARGETS[:4], ids=lambda t: t.hook)
def test_integrated_gradients_are_complete_where_frozen(frozen, target):
    found = integrated_gradients(frozen, target)
    assert found.relative_error <= COMPLETE
    # Exact already: twice as many nodes change nothing.
    more = integrated_gradients(frozen, target, steps=2**N_LAYERS)
    torch.testing.assert_close(found.values, more.values, atol=COMPLETE * found.values.abs().sum().item(), rtol=0)


def test_all_agree_where_the_target_is_linear(frozen):
    """Below the first MLP nothing is multiplied: the exact split, gradient x input and integrated gradients are one."""
    target = Target.direction(DIRECTION, "blocks.0.ln2.hook_normalized", 4)
    exact = attribute_tokens(frozen, target)
    tolerance = COMPLETE * exact.absolute_sum
    for found in (gradient_times_input(frozen, target), integrated_gradients(frozen, target, steps=1)):
        torch.testing.assert_close(found.values, exact.values, atol=tolerance, rtol=0)
        unattributed = exact.bias - found.baseline  # gradient x input has no part for attention's biases
        assert abs(found.completeness_error + unattributed) <= tolerance


def test_gradient_times_input_counts_products_twice():
    """Of a purely quadratic target (one MLP, no biases) it adds up to two times the value."""
    frozen = freeze(model_of(False, True, n_layer=1), TOKENS)
    target = Target.direction(DIRECTION, "blocks.0.hook_mlp_out", 4)
    exact, found = attribute_tokens(frozen, target), gradient_times_input(frozen, target)
    torch.testing.assert_close(found.values, 2 * exact.values, atol=COMPLETE * exact.absolute_sum, rtol=0)


def test_real_attention_is_differentiated_too():
    """The gradient of the model itself, by finite differences of the embeddings in float64."""
    model = make_model(bias=True, n_layer=2).to(torch.float64)
    frozen = freeze(model, TOKENS)
    target = Target.logit(7, 4)
    found = gradient_times_input(frozen, target, attention="real")
    embeds = model.embed(TOKENS[None])
    step = 1e-6
    for position in range(5):
        moved = embeds.clone()
        moved[0, position] *= 1 + step
        up = model(moved, start_at_layer=0)[0, 4, 7]
        moved[0, position] = embeds[0, position] * (1 - step)
        down = model(moved, start_at_layer=0)[0, 4, 7]
        # Central differences in float64: the error is of the order of step^2, and rounding over step.
        assert found.values[position].item() == pytest.approx(((up - down) / (2 * step)).item(), abs=1e-7)


def test_shows_itself(frozen_kinds):
    frozen = frozen_kinds[True, True]
    found = attribute_tokens(frozen, TARGETS[0], pairs=True)
    assert "completeness error" in str(found)
    assert len(found.to_frame()) == len(TOKENS) + 1
    assert found.to_frame().value.sum() == pytest.approx(found.total, abs=1e-6)
    assert "ColoredTokens" in found._repr_html_()
    assert len(found.heads_view().props()["attention"]) == N_LAYERS * 2
    assert found.head_frame(5).value.abs().is_monotonic_decreasing
    assert found.plot().data
    assert found.plot_pairs().data
    gradient = integrated_gradients(frozen, TARGETS[0], attention="real")
    assert "integrated gradients (real attention)" in str(gradient)
    assert gradient.plot().data
    assert gradient.to_view().html()
    frame = compare_tokens(frozen, TARGETS[0])
    assert frame.shape == (len(TOKENS), 7)
    assert frame.exact.tolist() == found.values.tolist()


def test_bad_input(frozen_kinds):
    frozen = frozen_kinds[True, True]
    with pytest.raises(ArgumentError, match="no target was given"):
        attribute_tokens(frozen, [])
    with pytest.raises(ArgumentError, match=r"target 'what' is no Target; make one with Target\.logit"):
        read_targets(frozen, "what")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="steps is 0"):
        integrated_gradients(frozen, TARGETS[0], steps=0)
    with pytest.raises(ArgumentError, match="attention is 'froze', expected one of 'frozen', 'real'"):
        gradient_times_input(frozen, TARGETS[0], attention="froze")
    with pytest.raises(NotBilinearError):
        attribute_tokens(freeze(model_of(True, True, gate="relu"), TOKENS), Target.logit(3))
    with pytest.raises(ArgumentError, match="pairs=True"):
        attribute_tokens(frozen, TARGETS[0]).plot_pairs()


@pytest.mark.parametrize("attention", ["frozen", "real"])
def test_gradients_in_inference_mode(attention: str) -> None:
    """`torch.inference_mode()` around all of it, or around a part, changes no number."""
    model, direction = model_of(True, True), torch.randn(16, generator=torch.Generator().manual_seed(1))
    target = Target.direction(direction, "blocks.2.hook_resid_post")
    frozen = freeze(model, TOKENS)
    expected = gradient_times_input(frozen, target, attention=attention).values
    with torch.inference_mode():
        inside = freeze(model, TOKENS + 0)
        target = Target.direction(direction + 0, "blocks.2.hook_resid_post")
        found = [gradient_times_input(each, target, attention=attention).values for each in (frozen, inside)]
    found.append(gradient_times_input(inside, target, attention=attention).values)
    for values in found:
        assert torch.equal(values, expected)
