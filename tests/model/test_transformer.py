"""The forward pass, against the authors' numbers and against a numpy oracle; weights under TransformerLens' names."""

import copy
import io
import pickle
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor
from transformer_lens import FactoredMatrix
from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache

from bilens.errors import (
    ArgumentError,
    ContextLengthError,
    EmptyTextError,
    NotBilinearError,
    OutOfRangeError,
    TokenizationError,
)
from bilens.model.config import config_from_published
from bilens.model.transformer import HookedBilinearTransformer, RMSNorm
from tests.conftest import SMALL, Reference, make_model
from tests.oracle import oracle
from tests.random_saes import make_sae

# Two orders of summing the same float32 products, through two layers, on activations of size 1 to 100.
TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}
TOKENS = [1, 7, 42, 7, 0, 13, 29, 3, 3, 11]


def close(actual: Tensor, expected: Tensor, **tolerance: float) -> None:
    torch.testing.assert_close(actual, expected, **(TOLERANCE | tolerance))


# --- parity with the authors' implementation --------------------------------------------------------------------------

EXPECTED_HOOKS = {
    "resid_pre": "blocks.{}.hook_resid_pre",
    "resid_mid": "blocks.{}.hook_resid_mid",
    "resid_post": "blocks.{}.hook_resid_post",
    "mlp_in": "blocks.{}.ln2.hook_normalized",
    "mlp_out": "blocks.{}.hook_mlp_out",
    "pattern": "blocks.{}.attn.hook_pattern",
}


@pytest.mark.parametrize("prompt", range(3))
def test_every_expected_activation_agrees_with_the_authors(ts_micro: Reference, prompt: int) -> None:
    """The explicit attention path (the pattern is watched) gives the authors' activations, logits and loss to 1e-4."""
    model, expected = ts_micro.model, ts_micro.expected
    (logits, loss), cache = model.run_with_cache(expected[f"{prompt}.input_ids"], return_type="both")
    close(logits, expected[f"{prompt}.logits"], rtol=0)
    close(loss, expected[f"{prompt}.loss"], rtol=0)
    compared = {f"{prompt}.{rest}" for rest in ("input_ids", "logits", "loss")}
    for layer in range(model.cfg.n_layers):
        for name, hook in EXPECTED_HOOKS.items():
            close(cache[hook.format(layer)], expected[f"{prompt}.{layer}.{name}"], rtol=0)
            compared.add(f"{prompt}.{layer}.{name}")
        # The authors' attn_out is what comes before the factor s.
        attn_out = expected[f"{prompt}.{layer}.attn_out"] * model.cfg.residual_scale
        close(cache[f"blocks.{layer}.hook_attn_out"], attn_out, rtol=0)
        compared.add(f"{prompt}.{layer}.attn_out")
    assert compared == {key for key in expected if key.startswith(f"{prompt}.")}


@pytest.mark.parametrize("prompt", range(3))
def test_the_fused_path_agrees_with_the_authors(
    ts_micro: Reference, prompt: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With nobody watching scores the fused kernel runs, in every layer, and gives the same logits and loss."""
    calls = []
    fused = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda *args, **kwargs: (calls.append(1), fused(*args, **kwargs))[1],
    )
    model, expected = ts_micro.model, ts_micro.expected
    logits, loss = model(expected[f"{prompt}.input_ids"], return_type="both")
    assert len(calls) == model.cfg.n_layers
    close(logits, expected[f"{prompt}.logits"], rtol=0)
    close(loss, expected[f"{prompt}.loss"], rtol=0)


def test_text_gives_the_expected_tokens_and_logits(ts_micro: Reference) -> None:
    """The prompts as text become exactly the authors' input ids, and so their logits."""
    for i, prompt in enumerate(ts_micro.prompts):
        assert torch.equal(ts_micro.model.to_tokens(prompt), ts_micro.expected[f"{i}.input_ids"])
        close(ts_micro.model(prompt), ts_micro.expected[f"{i}.logits"], rtol=0)


def test_the_oracle_agrees_with_the_authors(ts_micro: Reference) -> None:
    """The oracle used below is itself right: it gives the authors' logits and activations."""
    tensors = {name: w.detach().numpy() for name, w in ts_micro.model.published_tensors().items()}
    seen = oracle(ts_micro.model.cfg.published, tensors, ts_micro.expected["0.input_ids"][0].tolist())
    np.testing.assert_allclose(seen["logits"], ts_micro.expected["0.logits"][0], atol=1e-4)
    np.testing.assert_allclose(seen["loss"], ts_micro.expected["0.loss"], atol=1e-4)
    for name, hook in EXPECTED_HOOKS.items():
        np.testing.assert_allclose(seen[hook.format(1)], ts_micro.expected[f"0.1.{name}"][0], atol=1e-4)


# --- parity with the oracle, for every variant ------------------------------------------------------------------------

VARIANTS = {
    "bilinear": {},
    "bias": {"bias": True},
    "relu": {"gate": "relu"},
    "silu, bias": {"gate": "silu", "bias": True},
    "gelu": {"gate": "gelu"},
    "gelu, bias": {"gate": "gelu", "bias": True},
    "one branch": {"bilinear": False},
    "one branch, relu": {"bilinear": False, "gate": "relu"},
    "one branch, gelu, bias": {"bilinear": False, "gate": "gelu", "bias": True},
    "one branch, silu, no norm": {"bilinear": False, "gate": "silu", "normalization": False},
    "no norm": {"normalization": False},
    "no norm, bias": {"normalization": False, "bias": True},
    "one head": {"n_head": 1},
    "four heads": {"n_head": 4},
    "eight heads, bias": {"n_head": 8, "bias": True},
    "three layers": {"n_layer": 3},
    "attention not scaled": {"scale_attn": False, "n_layer": 3},
    "biases in attention": {"bias": True, "attention_bias": True},
    "one layer": {"n_layer": 1},
    "bilinear attention": {"attention": "bilinear", "normalization": False},
    "bilinear attention, over d_head^2, biases": {
        "attention": "bilinear",
        "attention_scale": "d_head^2",
        "bias": True,
        "attention_bias": True,
    },
    "bilinear attention in the authors' word": {"attention2": True},
    "quadratic attention": {"attention": "quadratic", "n_layer": 3},
    "quadratic attention, no norm, no positions": {"attention": "quadratic", "rotary": False, "normalization": False},
    "softmax without positions": {"rotary": False},
    "heads of their own width": {"d_head": 6, "n_head": 3, "attention": "bilinear"},
    "wide softmax heads": {"d_head": 10},
    "odd heads without positions": {"d_head": 3, "rotary": False},
    "its own residual scale": {"residual_scale": 0.3},
}


def compare_with_oracle(model: HookedBilinearTransformer, published: dict, tokens: list[int]) -> None:
    """Every hook of the model, its logits and loss, on the explicit and the fused path."""
    tensors = {name: weight.detach().numpy() for name, weight in model.published_tensors().items()}
    expected = oracle(SMALL | published, tensors, tokens)
    batch = torch.tensor([tokens])
    model.set_use_attn_result(True)
    (logits, loss), cache = model.run_with_cache(batch, return_type="both")
    assert set(cache) == set(expected) - {"logits", "loss"}
    # Without norms the stream may grow to size 1000: what is compared is relative to the largest entry.
    for name, array in expected.items():
        actual = logits[0] if name == "logits" else loss if name == "loss" else cache[name][0]
        assert actual.shape == array.shape, name
        size = max(1.0, np.abs(array[np.isfinite(array)]).max())
        np.testing.assert_allclose(actual.detach().numpy(), array, atol=1e-4 * size, rtol=0, err_msg=name)
    model.set_use_attn_result(False)
    size = max(1.0, logits.abs().max().item())
    close(model(batch), logits, atol=1e-4 * size)
    close(model(batch, return_type="loss"), loss, atol=1e-4 * size)


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())
def test_every_variant_agrees_with_the_oracle(variant: dict) -> None:
    """All activations of the variant, by name and shape, are those of the numpy forward pass."""
    compare_with_oracle(make_model(**variant), variant, TOKENS)


@given(
    n_head=st.sampled_from([1, 2, 3, 4]),
    half_head=st.integers(1, 4),
    n_layer=st.integers(1, 3),
    d_hidden=st.integers(1, 20),
    bias=st.booleans(),
    gate=st.sampled_from([None, "relu", "silu", "gelu"]),
    bilinear=st.booleans(),
    normalization=st.booleans(),
    attention=st.sampled_from(["softmax", "bilinear", "quadratic"]),
    rotary=st.booleans(),
    seed=st.integers(0, 2**31),
    tokens=st.lists(st.integers(0, 49), min_size=2, max_size=12),
)
def test_any_config_agrees_with_the_oracle(
    n_head: int, half_head: int, tokens: list[int], seed: int, **published: object
) -> None:
    """The same, for whatever shape and combination of variants."""
    published |= {"n_head": n_head, "d_model": 2 * n_head * half_head}
    if published["attention"] != "softmax":  # three such layers without norms are a polynomial of degree 1000
        published["normalization"] = True
    compare_with_oracle(make_model(seed=seed, **published), published, tokens)


def test_gelu_is_the_exact_one() -> None:
    """`gate: gelu` is x Phi(x), which the tanh approximation misses by up to 5e-4: far more than the tolerance here."""
    x = torch.linspace(-4, 4, 41, dtype=torch.float64)
    mlp = make_model(gate="gelu", bilinear=False).blocks[0].mlp
    torch.testing.assert_close(mlp.act(x), x * 0.5 * (1 + torch.erf(x / 2**0.5)), atol=1e-12, rtol=0)


def test_a_bilinear_layer_is_quadratic() -> None:
    """Without biases `mlp(c x) = c^2 mlp(x)`; with them the second difference along any line is constant."""
    torch.manual_seed(0)
    x = torch.randn(1, 3, 16)
    mlp = make_model().blocks[0].mlp
    close(mlp(-2.5 * x), 6.25 * mlp(x))
    mlp = make_model(bias=True).blocks[0].mlp
    second = [mlp((t + 1) * x) - 2 * mlp(t * x) + mlp((t - 1) * x) for t in (0.0, 1.0, -2.0)]
    close(second[0], second[1])
    close(second[0], second[2])


# --- positions --------------------------------------------------------------------------------------------------------


def test_attention_is_causal() -> None:
    """Changing a token changes its own position and later ones, and not one bit before it."""
    model = make_model()
    one, other = torch.tensor([TOKENS]), torch.tensor([TOKENS])
    other[0, 6] = 48
    a, b = model(one), model(other)
    assert torch.equal(a[:, :6], b[:, :6])
    assert ((a - b).abs().amax(-1)[0, 6:] > 1e-3).all()


def test_scores_depend_on_relative_position_only() -> None:
    """Rotary scores of queries and keys at (p + shift) are those at p; a single shifted one is not."""
    rotary = make_model().blocks[0].attn.rotary
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 1, 2, 8, generator=generator) for _ in range(2))

    def score(at_q: int, at_k: int) -> Tensor:
        return (rotary(q, torch.tensor([[at_q]])) * rotary(k, torch.tensor([[at_k]]))).sum(-1)

    close(score(5, 2), score(25, 22))
    assert (score(5, 2) - score(6, 2)).abs().min() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_rotary_frequencies_keep_float32_in_any_dtype(dtype: torch.dtype) -> None:
    """A bfloat16 frequency is off by up to 2^-9, half a turn at position 800: frequencies do not follow the dtype."""
    model = make_model()
    exact = model.blocks[0].attn.rotary.inv_freq.clone()
    model.to(dtype)
    assert model.W_E.dtype == model.cfg.dtype == dtype
    assert torch.equal(model.blocks[0].attn.rotary.inv_freq, exact)


@pytest.mark.parametrize(("cast", "dtype"), [("half", torch.float16), ("bfloat16", torch.bfloat16)])
def test_cfg_dtype_follows_every_way_to_cast(cast: str, dtype: torch.dtype) -> None:
    """`model.half()` and the like keep `cfg.dtype` true, as `model.to(...)` does."""
    model = getattr(make_model(), cast)()
    assert model.cfg.dtype == model.W_U.dtype == dtype


def test_half_precision_norm_does_not_overflow() -> None:
    """Entries of 300 square beyond float16's largest number; the norm is nevertheless 1 with the right sign."""
    cfg = make_model().cfg
    x = torch.tensor([300.0, -300.0] * 8, dtype=torch.float16)[None, None]
    normalized = RMSNorm(cfg)(x)
    assert normalized.dtype == torch.float16
    close(normalized, x / 300, atol=1e-3)


def test_a_norm_adds_eps_to_the_mean_square() -> None:
    """Of a stream as small as eps: x / sqrt(mean(x^2) + 1e-8), which is a third of it less; and zero stays zero."""
    x = torch.linspace(-2e-5, 2e-5, 16)[None, None]
    close(RMSNorm(make_model().cfg)(x), x / (x.pow(2).mean() + 1e-8).sqrt(), atol=1e-7)
    assert torch.equal(RMSNorm(make_model().cfg)(torch.zeros(1, 1, 16)), torch.zeros(1, 1, 16))


def test_a_float64_norm_is_a_float64_norm() -> None:
    """Nothing is rounded to float32 on the way (which would be seen at 6e-8)."""
    x = torch.randn(1, 3, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = torch.nn.functional.rms_norm(x, (16,), eps=1e-8)
    close(RMSNorm(make_model().cfg)(x), expected, atol=1e-14, rtol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rotary_angles_are_exact_in_any_dtype(dtype: torch.dtype) -> None:
    """At positions past 256, which bfloat16 cannot count: the float32 rotation of the same entries, rounded once."""
    rotary = make_model().to(dtype).blocks[0].attn.rotary
    x = torch.randn(1, 600, 2, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    positions = torch.arange(600)[None]
    # cos, sin and three operations, each rounded to 8 bits (bfloat16)
    close(rotary(x, positions).float(), rotary(x.float(), positions), atol=0.05, rtol=0)
    assert (rotary(x[:, :1], torch.tensor([[300]])) - rotary(x[:, :1], torch.tensor([[301]]))).abs().max() > 0.1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_gives_nearly_the_same_logits(dtype: torch.dtype) -> None:
    """Logits of size 1 agree to a few percent (bfloat16 keeps 8 bits), explicit and fused path alike."""
    model, tokens = make_model(), torch.tensor([TOKENS])
    logits = model(tokens)
    model.to(dtype)
    for low in (model(tokens), model.run_with_cache(tokens)[0]):
        assert low.dtype == dtype
        assert (low.float() - logits).norm() / logits.norm() < 0.05


# --- weights under TransformerLens' names -----------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
def test_weight_shapes(bias: bool) -> None:
    """Per layer and stacked, every weight has the shape TransformerLens gives it."""
    model = make_model(n_head=2, n_layer=3, d_model=16, d_hidden=24, bias=bias, d_vocab=50)
    attn, mlp = model.blocks[1].attn, model.blocks[1].mlp
    shapes = {
        "W_Q": (2, 16, 8),
        "W_K": (2, 16, 8),
        "W_V": (2, 16, 8),
        "W_O": (2, 8, 16),
        "W_gate": (16, 24),
        "W_in": (16, 24),
        "W_out": (24, 16),
        "b_gate": (24,),
        "b_in": (24,),
        "b_out": (16,),
    }
    for name, shape in shapes.items():
        weight = getattr(attn if name in ("W_Q", "W_K", "W_V", "W_O") else mlp, name)
        stacked = getattr(model, name)
        assert weight.shape == shape, name
        assert stacked.shape == (3, *shape), name
        assert torch.equal(stacked[1], weight), name
        assert name[0] == "W" or bool(weight.any()) == bias
    assert model.W_E.shape == (50, 16)
    assert model.W_U.shape == (16, 50)
    assert model.b_U.shape == (50,)
    assert not model.b_U.any()
    assert not attn.b_O.any()


def test_one_branch_model_has_no_left_branch() -> None:
    """W_gate and b_gate of a one-branch MLP raise NotBilinearError, alone and stacked; W_in is the one branch."""
    model = make_model(bilinear=False, bias=True)
    assert torch.equal(model.W_in[0], model.blocks[0].mlp.w.weight.T)
    assert torch.equal(model.b_in[0], model.blocks[0].mlp.w.bias)
    for owner in (model, model.blocks[0].mlp):
        for name in ("W_gate", "b_gate"):
            with pytest.raises(NotBilinearError, match="one-branch"):
                getattr(owner, name)


@pytest.mark.parametrize("name", ["W_in", "W_gate", "W_out", "b_in", "b_gate", "b_out"])
def test_writing_into_an_mlp_weight_changes_the_model(name: str) -> None:
    """The named weights are views: zeroing one of a layer gives the output the formula asks for."""
    model = make_model(bias=True)
    tokens = torch.tensor([TOKENS])
    before, cache = model.run_with_cache(tokens)
    mlp = model.blocks[0].mlp
    with torch.no_grad():
        getattr(mlp, name).zero_()
    after, changed = model.run_with_cache(tokens)
    assert (before - after).abs().max() > 1e-3
    x = cache["blocks.0.ln2.hook_normalized"]
    formula = ((x @ mlp.W_gate + mlp.b_gate) * (x @ mlp.W_in + mlp.b_in)) @ mlp.W_out + mlp.b_out
    close(changed["blocks.0.hook_mlp_out"], formula)


@pytest.mark.parametrize("name", ["W_Q", "W_K", "W_V"])
def test_writing_into_an_attention_weight_changes_the_model(name: str) -> None:
    """Zeroing one head's W_Q, W_K or W_V silences that head's own activation and no other's."""
    model = make_model()
    with torch.no_grad():
        getattr(model.blocks[1].attn, name)[1].zero_()
    _, cache = model.run_with_cache(torch.tensor([TOKENS]))
    activation = cache[f"blocks.1.attn.hook_{name[-1].lower()}"]
    assert not activation[:, :, 1].any()
    assert activation[:, :, 0].any()


def test_w_o_has_the_residual_scale_folded_in() -> None:
    """`z W_O` summed over heads is hook_attn_out, and W_O is the published `o` times 1/sqrt(2 n_layers)."""
    model = make_model(n_layer=3)
    assert model.cfg.residual_scale == pytest.approx(1 / 6**0.5)
    _, cache = model.run_with_cache(torch.tensor([TOKENS]))
    for layer in range(3):
        attn = model.blocks[layer].attn
        added = torch.einsum("bphe,hem->bpm", cache[f"blocks.{layer}.attn.hook_z"], attn.W_O)
        close(added, cache[f"blocks.{layer}.hook_attn_out"])
        close(attn.W_O.reshape(16, 16).T, attn.o.weight / 6**0.5)


def test_named_weights_reproduce_q_k_v() -> None:
    """`hook_normalized W_Q` is hook_q, and so for k and v."""
    model = make_model(n_head=4)
    _, cache = model.run_with_cache(torch.tensor([TOKENS]))
    for name in "qkv":
        weight = getattr(model.blocks[1].attn, f"W_{name.upper()}")
        read = torch.einsum("bpm,hme->bphe", cache["blocks.1.ln1.hook_normalized"], weight)
        close(read, cache[f"blocks.1.attn.hook_{name}"])


def test_qk_and_ov_are_factored_matrices_of_the_products() -> None:
    """QK is W_Q W_K^T and OV is W_V W_O, per layer and stacked, with d_head as the inner dimension."""
    model = make_model(n_head=4, n_layer=3)
    for owner in (model, *(block.attn for block in model.blocks)):
        for factored, product in (
            (owner.QK, owner.W_Q @ owner.W_K.transpose(-2, -1)),
            (owner.OV, owner.W_V @ owner.W_O),
        ):
            assert isinstance(factored, FactoredMatrix)
            assert factored.mdim == model.cfg.d_head
            close(factored.AB, product)
    assert model.OV.AB.shape == (3, 4, 16, 16)


def test_tokens_to_residual_directions() -> None:
    """A token's direction is its column of W_U, for an id, a tensor of one, and any shape of ids."""
    model = make_model()
    assert torch.equal(model.tokens_to_residual_directions(7), model.W_U[:, 7])
    assert torch.equal(model.tokens_to_residual_directions(torch.tensor(7)), model.W_U[:, 7])
    assert torch.equal(model.tokens_to_residual_directions(torch.tensor([7])), model.W_U[:, 7])
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    directions = model.tokens_to_residual_directions(ids)
    assert directions.shape == (2, 3, 16)
    assert torch.equal(directions[1, 2], model.W_U[:, 6])
    for outside in (50, -1, torch.tensor([0, 50])):
        with pytest.raises(OutOfRangeError, match="0 to 49"):
            model.tokens_to_residual_directions(outside)


def test_direction_of_a_word(text_model: HookedBilinearTransformer) -> None:
    """A string is taken for its single token."""
    token = text_model.to_single_token("fox")
    assert torch.equal(text_model.tokens_to_residual_directions("fox"), text_model.W_U[:, token])


def test_all_head_labels() -> None:
    """Labels follow the order of the stacked heads."""
    assert make_model(n_head=2, n_layer=2).all_head_labels() == ["L0H0", "L0H1", "L1H0", "L1H1"]


def test_accumulated_bias_sums_the_output_biases_below() -> None:
    """The biases written by the MLPs of the layers below; nothing where MLP biases are left out."""
    model = make_model(bias=True, n_layer=3)
    close(model.accumulated_bias(2), model.b_out[0] + model.b_out[1])
    assert not model.accumulated_bias(0).any()
    assert not model.accumulated_bias(3, include_mlp_biases=False).any()


@pytest.mark.parametrize(
    ("bilinear", "gate", "answer"), [(True, None, True), (True, "relu", False), (False, None, False)]
)
def test_is_bilinear(bilinear: bool, gate: str | None, answer: bool) -> None:
    """Only two branches without a gate are a quadratic form."""
    assert make_model(bilinear=bilinear, gate=gate).cfg.is_bilinear is answer


def test_normalization_type() -> None:
    """TransformerLens asks `cfg.normalization_type`: RMSPre, or None without normalisation."""
    assert make_model().cfg.normalization_type == "RMSPre"
    assert make_model(normalization=False).cfg.normalization_type is None


def test_a_seed_decides_the_initial_weights() -> None:
    """The same seed gives the same weights whatever torch's own generator does; another seed gives others."""
    cfg = make_model(bias=True).cfg
    torch.manual_seed(1)
    one = HookedBilinearTransformer(cfg, seed=3)
    torch.manual_seed(2)
    same, other = HookedBilinearTransformer(cfg, seed=3), HookedBilinearTransformer(cfg, seed=4)
    for (name, a), b, c in zip(one.named_parameters(), same.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name
        assert name.endswith("bias") != bool((a != c).any()), name


# --- running a part, and what is returned -----------------------------------------------------------------------------


@pytest.mark.parametrize("middle", [0, 1, 2, 3, -1, -2, -3])
def test_stop_and_start_compose_to_the_whole(middle: int) -> None:
    """Running up to a layer and on from it gives the whole model's logits and loss, negative layers included."""
    model, tokens = make_model(n_layer=3, bias=True), torch.tensor([TOKENS, TOKENS[::-1]])
    logits, loss = model(tokens, return_type="both")
    residual = model(tokens, stop_at_layer=middle)
    assert residual.shape == (2, len(TOKENS), 16)
    close(model(residual, start_at_layer=middle), logits)
    close(model(residual, start_at_layer=middle, tokens=tokens, return_type="loss"), loss)


def test_stop_at_layer_gives_resid_pre() -> None:
    """What enters a layer is its hook_resid_pre, and what leaves the last its hook_resid_post."""
    model, tokens = make_model(n_layer=3), torch.tensor([TOKENS])
    _, cache = model.run_with_cache(tokens)
    for layer in range(3):
        close(model(tokens, stop_at_layer=layer), cache["resid_pre", layer])
        close(model(tokens, stop_at_layer=layer - 3), cache["resid_pre", layer])
    close(model(tokens, stop_at_layer=3), cache["resid_post", 2])


def test_stop_at_layer_runs_nothing_above() -> None:
    """Hooks of the layers from there on are not called."""
    model = make_model(n_layer=3)
    _, cache = model.run_with_cache(torch.tensor([TOKENS]), stop_at_layer=1)
    assert set(cache) == {"hook_embed", *(name for name in cache if name.startswith("blocks.0."))}


@pytest.mark.parametrize("layer", [3, -3, 17])
@pytest.mark.parametrize("bound", ["start_at_layer", "stop_at_layer"])
def test_a_layer_out_of_range_is_refused(layer: int, bound: str) -> None:
    """A layer that the model does not have raises OutOfRangeError naming it."""
    model = make_model(n_layer=2)
    given_input = torch.tensor([TOKENS]) if bound == "stop_at_layer" else torch.zeros(1, 3, 16)
    with pytest.raises(OutOfRangeError, match=f"layer {layer} "):
        model(given_input, **{bound: layer})


def test_return_types() -> None:
    """logits, loss, both and None give what they say; another word is refused."""
    model, tokens = make_model(), torch.tensor([TOKENS])
    logits = model(tokens)
    loss = model(tokens, return_type="loss")
    assert logits.shape == (1, len(TOKENS), 50)
    assert loss.shape == ()
    both = model(tokens, return_type="both")
    assert torch.equal(both[0], logits)
    assert torch.equal(both[1], loss)
    assert model(tokens, return_type=None) is None
    with pytest.raises(ValueError, match="'lgits' is not one of"):
        model(tokens, return_type="lgits")


def test_loss_from_a_residual_stream_needs_tokens() -> None:
    """Without tokens there is nothing to predict: refused, saying so."""
    with pytest.raises(ValueError, match="pass tokens="):
        make_model()(torch.zeros(1, 3, 16), start_at_layer=1, return_type="loss")


def test_loss_per_token_is_minus_the_log_probability() -> None:
    """Every position's loss is -log p of the next token; their mean is the loss; loss_fn says the same."""
    model, tokens = make_model(), torch.tensor([TOKENS, TOKENS[::-1]])
    logits, per_token = model(tokens, return_type="both", loss_per_token=True)
    assert per_token.shape == (2, len(TOKENS) - 1)
    log_p = logits[:, :-1].log_softmax(-1)
    for row in range(2):
        for i in range(len(TOKENS) - 1):
            assert per_token[row, i].item() == pytest.approx(-log_p[row, i, tokens[row, i + 1]].item(), abs=1e-5)
    close(model(tokens, return_type="loss"), per_token.mean())
    close(model.loss_fn(logits, tokens), per_token.mean())
    close(model.loss_fn(logits, tokens, per_token=True), per_token)


def test_one_sequence_without_a_batch_axis() -> None:
    """Tokens of shape (pos,) are a batch of one."""
    model = make_model()
    assert torch.equal(model(torch.tensor(TOKENS)), model(torch.tensor([TOKENS])))


def test_input_that_does_not_fit_is_refused() -> None:
    """Too long, outside the vocabulary, empty: each has its own exception, which names the value."""
    model = make_model()
    with pytest.raises(ContextLengthError, match="33 tokens do not fit the model's context of 32"):
        model(torch.zeros(1, 33, dtype=torch.long))
    with pytest.raises(OutOfRangeError, match="token 50 is outside the vocabulary, 0 to 49"):
        model(torch.tensor([[0, 50]]))
    with pytest.raises(OutOfRangeError, match="token -2 "):
        model(torch.tensor([[0, -2]]))
    with pytest.raises(EmptyTextError):
        model(torch.zeros(1, 0, dtype=torch.long))
    assert model(torch.zeros(1, 32, dtype=torch.long)).shape == (1, 32, 50)
    for what_is_no_input in ([1, 2], np.array([1, 2]), torch.tensor([1.0, 2.0]), torch.tensor(1), torch.ones(1, 1, 2)):
        with pytest.raises(ArgumentError, match=r"texts?,|as a tensor|token ids as integers"):
            model(what_is_no_input)


# --- padding ----------------------------------------------------------------------------------------------------------


@given(
    rows=st.lists(st.lists(st.integers(0, 49), min_size=2, max_size=9), min_size=1, max_size=4),
    side=st.sampled_from(["left", "right"]),
    pad=st.integers(0, 49),
    extra=st.integers(0, 3),
)
@example(rows=[[1, 2], [3, 4, 5, 6, 7]], side="left", pad=2, extra=2)
@example(rows=[[1, 2], [3, 4, 5, 6, 7]], side="right", pad=0, extra=0)
def test_padding_changes_nothing(rows: list[list[int]], side: str, pad: int, extra: int) -> None:
    """Logits on the real tokens, and each text's loss, are those of the text alone, whatever pads it on which side."""
    model = make_model(bias=True)
    length = max(map(len, rows)) + extra
    fill = [[pad] * (length - len(row)) for row in rows]
    ones = [[1] * len(row) for row in rows]
    zeros = [[0] * len(f) for f in fill]
    left = side == "left"
    tokens = torch.tensor([f + r if left else r + f for r, f in zip(rows, fill, strict=True)])
    mask = torch.tensor([z + o if left else o + z for o, z in zip(ones, zeros, strict=True)])
    logits, per_token = model(tokens, attention_mask=mask, return_type="both", loss_per_token=True)
    assert logits.isfinite().all()
    singles = []
    for i, row in enumerate(rows):
        alone, loss = model(torch.tensor([row]), return_type="both", loss_per_token=True)
        close(logits[i][mask[i].bool()], alone[0])
        assert per_token[i].sum().item() == pytest.approx(loss.sum().item(), abs=1e-3)
        singles.append(loss.flatten())
    mean = model(tokens, attention_mask=mask, return_type="loss")
    close(mean, torch.cat(singles).mean())


def test_positions_count_from_the_first_real_token() -> None:
    """Behind left padding queries are rotated as in the text alone, not only keys relative to them."""
    model, padded = make_model(), torch.tensor([[0, 0, 0, *TOKENS]])
    mask = torch.tensor([[0] * 3 + [1] * len(TOKENS)])
    _, cache = model.run_with_cache(padded, attention_mask=mask)
    _, alone = model.run_with_cache(torch.tensor([TOKENS]))
    for name in ("rot_q", "rot_k"):
        close(cache[f"blocks.1.attn.hook_{name}"][:, 3:], alone[f"blocks.1.attn.hook_{name}"])
    assert not cache["pattern", 1][..., :3].any()


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_list_of_texts_masks_itself(text_model: HookedBilinearTransformer, side: str, texts: list[str]) -> None:
    """A padded list of texts gives each text's own logits, though [EOS] pads and no mask is given."""
    text_model.tokenizer.padding_side, before = side, text_model.tokenizer.padding_side
    try:
        batch = [texts[0], texts[3], "the fox"]
        logits, loss = text_model(batch, return_type="both", loss_per_token=True)
        mask = text_model.attention_mask(batch).bool()
        tokens = text_model.to_tokens(batch)
        assert mask.shape == tokens.shape == logits.shape[:2]
        for i, text in enumerate(batch):
            alone, alone_loss = text_model(text, return_type="both", loss_per_token=True)
            assert torch.equal(tokens[i][mask[i]], text_model.to_tokens(text)[0])
            close(logits[i][mask[i]], alone[0])
            assert loss[i].sum().item() == pytest.approx(alone_loss.sum().item(), abs=1e-3)
    finally:
        text_model.tokenizer.padding_side = before


def test_gradients_of_a_left_padded_batch() -> None:
    """A padding query sees no key (its softmax is 0/0): the gradients are finite, and those of the text alone."""
    tokens = torch.tensor([[0, 0, 0, *TOKENS]])
    mask = torch.tensor([[0] * 3 + [1] * len(TOKENS)])
    gradients = []
    for arguments in ({"input": tokens, "attention_mask": mask}, {"input": torch.tensor([TOKENS])}):
        model = make_model()
        model(**arguments, return_type="loss").backward()
        gradients.append([weight.grad for weight in model.parameters()])
    for padded, alone in zip(*gradients, strict=True):
        assert padded.isfinite().all()
        close(padded, alone)


# --- the key-value cache ----------------------------------------------------------------------------------------------


@given(cuts=st.sets(st.integers(1, len(TOKENS) - 1)), watched=st.booleans())
def test_any_split_over_a_cache_gives_the_whole(cuts: set[int], watched: bool) -> None:
    """Tokens fed piece by piece with a key-value cache give the logits of one run, for every way to cut them."""
    model, whole = make_model(), torch.tensor([TOKENS, TOKENS[::-1]])
    cache = TransformerLensKeyValueCache.init_cache(model.cfg, "cpu", 2)
    bounds = [0, *sorted(cuts), len(TOKENS)]
    pieces = []
    for a, b in pairwise(bounds):
        if watched:
            logits, seen = model.run_with_cache(whole[:, a:b], past_kv_cache=cache)
            assert seen["blocks.0.attn.hook_pattern"].shape == (2, 2, b - a, b)
        else:
            logits = model(whole[:, a:b], past_kv_cache=cache)
        pieces.append(logits)
        assert cache[0].past_keys.shape[1] == b
    close(torch.cat(pieces, dim=1), model(whole))


def test_a_cache_remembers_padding() -> None:
    """After a left-padded start, later tokens need no mask of their own: each row goes on as if alone."""
    model = make_model()
    rows = [[3, 4, 5, 6], [8, 9]]
    tokens, mask = torch.tensor([[3, 4, 5, 6], [0, 0, 8, 9]]), torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    cache = TransformerLensKeyValueCache.init_cache(model.cfg, "cpu", 2)
    model(tokens, attention_mask=mask, past_kv_cache=cache)
    logits, loss = model(torch.tensor([[7, 1], [7, 1]]), past_kv_cache=cache, return_type="both")
    alone = [model(torch.tensor([[*row, 7, 1]])) for row in rows]
    for i in range(2):
        close(logits[i], alone[i][0, -2:])
    # The loss of the new tokens: the second given the first.
    close(loss, torch.stack([-a[0, -2].log_softmax(-1)[1] for a in alone]).mean())


def test_a_mask_may_come_later_than_the_cache() -> None:
    """Positions cached before any mask was given count as real tokens."""
    model = make_model()
    cache = TransformerLensKeyValueCache.init_cache(model.cfg, "cpu", 1)
    model(torch.tensor([[3, 4]]), past_kv_cache=cache)
    logits = model(torch.tensor([[5, 6, 0]]), attention_mask=torch.tensor([[1, 1, 0]]), past_kv_cache=cache)
    close(logits[:, :2], model(torch.tensor([[3, 4, 5, 6]]))[:, 2:])


def test_a_cache_works_from_a_later_layer() -> None:
    """With start_at_layer the layers below stay empty; positions still count on."""
    model, tokens = make_model(), torch.tensor([TOKENS])
    residual = model(tokens, stop_at_layer=1)
    cache = TransformerLensKeyValueCache.init_cache(model.cfg, "cpu", 1)
    pieces = [
        model(residual[:, a:b], start_at_layer=1, past_kv_cache=cache) for a, b in ((0, 4), (4, 5), (5, len(TOKENS)))
    ]
    close(torch.cat(pieces, dim=1), model(tokens))


def test_a_full_cache_refuses_more() -> None:
    """Positions past the context are refused though the new tokens alone would fit, and the cache stays as it was."""
    model = make_model(n_ctx=8)
    cache = TransformerLensKeyValueCache.init_cache(model.cfg, "cpu", 1)
    model(torch.tensor([TOKENS[:6]]), past_kv_cache=cache)
    with pytest.raises(ContextLengthError, match="3 tokens after the 6 in the cache"):
        model(torch.tensor([TOKENS[:3]]), past_kv_cache=cache)
    close(model(torch.tensor([TOKENS[6:8]]), past_kv_cache=cache), model(torch.tensor([TOKENS[:8]]))[:, 6:])


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_a_model_has_a_dtype_with_fractions(dtype: torch.dtype) -> None:
    """Integers, flags, complex numbers and 8-bit floats, by every way to cast and at construction; nothing changes."""
    model = make_model()
    casts = [lambda: model.to(dtype), lambda: model.to(dtype=dtype), lambda: model.type(dtype)]
    casts.append(lambda: HookedBilinearTransformer(replace(model.cfg, dtype=dtype)))
    for cast in casts:
        with pytest.raises(ArgumentError, match=str(dtype)):
            cast()
    assert model.W_E.dtype == model.cfg.dtype == torch.float32


@pytest.mark.parametrize("device", ["foo", "cuda:x", {}, [0]])
def test_a_device_that_is_none_is_refused(device: object) -> None:
    """Named in the message."""
    with pytest.raises(ArgumentError, match="cannot go to"):
        make_model().to(device)


@pytest.mark.parametrize("layer", [True, "1", 1.0, None, torch.tensor(True), np.bool_(True)])
def test_a_flag_or_text_is_no_layer(layer: object) -> None:
    """`True` would be layer 1, silently; numpy's and torch's integers are what they are."""
    model, tokens = make_model(), torch.tensor([TOKENS])
    calls = [lambda: model.accumulated_bias(layer)]
    if layer is not None:
        calls += [lambda: model(tokens, stop_at_layer=layer)]
        calls += [lambda: model(model(tokens, stop_at_layer=1), start_at_layer=layer)]
    for call in calls:
        with pytest.raises(ArgumentError, match="is not an integer"):
            call()
    for one in (np.int64(1), torch.tensor(1)):
        assert torch.equal(model(tokens, stop_at_layer=one), model(tokens, stop_at_layer=1))


@pytest.mark.parametrize("tokens", [True, 1.0, torch.tensor([True, False]), torch.tensor([1.0])])
def test_a_flag_is_no_token(tokens: object) -> None:
    """A mask would pick other directions than ids."""
    with pytest.raises(ArgumentError, match="no words or token ids"):
        make_model().tokens_to_residual_directions(tokens)  # type: ignore[arg-type]


# --- TransformerLens' other names -------------------------------------------------------------------------------------


def test_number_of_parameters() -> None:
    """Counted by hand: embedding and unembedding, then per layer qkv, o, both branches and the output matrix."""
    assert make_model().n_params_total == 2 * 50 * 16 + 2 * (3 * 16 * 16 + 16 * 16 + 2 * 16 * 24 + 24 * 16)
    assert make_model(bias=True).n_params_total - make_model().n_params_total == 2 * (2 * 24 + 16)


def test_input_to_embed_is_what_enters_the_first_block(text_model: HookedBilinearTransformer) -> None:
    """Text, texts and tokens: the stream, tokens and mask from which `start_at_layer=0` goes on to the same logits."""
    for side in ("left", "right"):
        for words in ("the little fox", ["the little fox", "Mira found a red kite."], torch.tensor(TOKENS)):
            residual, tokens, shortformer, mask = text_model.input_to_embed(words, padding_side=side)
            assert torch.equal(residual, text_model.W_E[tokens])
            assert shortformer is None
            assert mask.shape == tokens.shape
            again = text_model(residual, start_at_layer=0, tokens=tokens, attention_mask=mask, return_type="both")
            expected = text_model(words, return_type="both", padding_side=side)
            for found, part in zip(again, expected, strict=True):
                close(found, part)


def test_input_to_embed_with_a_cache(text_model: HookedBilinearTransformer) -> None:
    """The mask is that of all positions, the cache keeps it, and going on with both gives the logits of the whole."""
    texts = ["the little fox", "Mira found a red kite."]
    whole = text_model(texts, padding_side="left")
    tokens = text_model.to_tokens(texts, padding_side="left")
    mask = text_model.attention_mask(texts, padding_side="left")
    cache = TransformerLensKeyValueCache.init_cache(text_model.cfg, "cpu", 2)
    text_model(tokens[:, :-1], attention_mask=mask[:, :-1], past_kv_cache=cache)
    residual, _, _, full = text_model.input_to_embed(tokens[:, -1:], past_kv_cache=cache)
    assert torch.equal(full, mask)
    assert torch.equal(cache.previous_attention_mask, mask)
    last = text_model(residual, start_at_layer=0, attention_mask=full, past_kv_cache=cache)
    close(last[:, 0], whole[:, -1])


def test_set_tokenizer(tokenizer: Any) -> None:
    """It reads the texts from then on; its padding side may be set; one that does not fit is refused."""
    model, ready = make_model(d_vocab=len(tokenizer)), make_model(tokenizer=tokenizer)
    side = tokenizer.padding_side
    try:
        model.set_tokenizer(tokenizer, default_padding_side="left")
        assert torch.equal(model("the little fox"), ready("the little fox"))
        assert model.to_tokens(["a", "a red kite"])[0, 0] == tokenizer.pad_token_id
    finally:
        tokenizer.padding_side = side
    with pytest.raises(TokenizationError, match=r"tokens, the model embeddings for 50"):
        make_model().set_tokenizer(tokenizer)
    with pytest.raises(ArgumentError, match="no transformers tokenizer"):
        model.set_tokenizer("gpt2")
    with pytest.raises(ArgumentError, match="'up' is not"):
        model.set_tokenizer(tokenizer, default_padding_side="up")  # type: ignore[arg-type]


def test_initial_weights() -> None:
    """Normal with `init_range`; of what writes into the stream, 1 / sqrt(2 n_layers) of that."""
    published = {"n_head": 4, "n_layer": 8, "n_ctx": 8, "d_model": 64, "d_hidden": 128, "bias": True}
    model = HookedBilinearTransformer(config_from_published(published, 500), seed=0)
    for name, weight in model.named_parameters():
        if weight.ndim == 1:
            assert not weight.any(), name
            continue
        std = 0.02 * (0.25 if name.endswith((".o.weight", ".p.weight")) else 1.0)
        assert weight.std().item() == pytest.approx(std, rel=0.1), name  # of 4,096 numbers: 1 % off in the mean


def test_a_cache_of_the_layers_that_run() -> None:
    """A negative `stop_at_layer` or `start_at_layer` counts the positions at the layers that it means."""
    model, tokens = make_model(n_layer=3), torch.tensor([TOKENS])
    whole = model(tokens, stop_at_layer=-1)
    cache = TransformerLensKeyValueCache.init_cache(model.cfg, "cpu", 1)
    pieces = [model(part, stop_at_layer=-1, past_kv_cache=cache) for part in tokens.split(4, dim=1)]
    close(torch.cat(pieces, dim=1), whole)
    cache = TransformerLensKeyValueCache.init_cache(model.cfg, "cpu", 1)
    pieces = [model(part, start_at_layer=-1, past_kv_cache=cache) for part in whole.split(4, dim=1)]
    close(torch.cat(pieces, dim=1), model(tokens))


# --- copies -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", [{}, {"gate": "silu"}, {"bilinear": False}, {"bilinear": False, "gate": "relu"}])
def test_a_model_can_be_pickled(variant: dict) -> None:
    """By pickle, torch.save and deepcopy, with an SAE attached or without: the same logits, and weights of its own."""
    model, tokens = make_model(**variant), torch.tensor([TOKENS])
    sae = make_sae(hook="blocks.1.hook_mlp_out")
    for attached in (False, True):
        if attached:
            model.add_sae(sae, use_error_term=False)
        expected, file = model(tokens), io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        copies = [pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False), copy.deepcopy(model)]
        for again in copies:
            assert torch.equal(again(tokens), expected)
            assert list(again.acts_to_saes) == list(model.acts_to_saes)
            with torch.no_grad():
                again.W_U.zero_()
            assert not torch.equal(again(tokens), expected)
            again.reset_saes()
            assert set(again.hook_dict) == set(make_model(**variant).hook_dict)
        assert torch.equal(model(tokens), expected)
