"""SAEs spliced into the running model: what flows on, what can be hooked, and that nothing of it stays behind."""

import copy
import inspect
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sae_lens import (
    BatchTopKTrainingSAE,
    BatchTopKTrainingSAEConfig,
    JumpReLUSkipTranscoder,
    JumpReLUSkipTranscoderConfig,
    JumpReLUTranscoder,
    JumpReLUTranscoderConfig,
    MatchingPursuitSAE,
    MatchingPursuitSAEConfig,
    MatryoshkaBatchTopKTrainingSAE,
    MatryoshkaBatchTopKTrainingSAEConfig,
    SkipTranscoder,
    SkipTranscoderConfig,
    TemporalSAE,
    TemporalSAEConfig,
    Transcoder,
    TranscoderConfig,
)
from sae_lens.analysis.hooked_sae_transformer import HookedSAETransformer
from safetensors.torch import load_file
from torch import Tensor
from transformer_lens import ActivationCache
from transformer_lens.hook_points import HookPoint

from bilens.errors import ArgumentError, HookNameError, SAEMismatchError, TokenizationError
from bilens.model.attached import hook_width
from bilens.model.loading import load_model
from bilens.model.transformer import HookedBilinearTransformer
from tests.conftest import make_model
from tests.random_saes import CLASSES, D_SAE, make_sae

# All but the scores: while they are watched, attention sums in another order.
FUSED = lambda name: not name.endswith(("attn_scores", "pattern"))  # noqa: E731
RESID, MLP_IN, MLP_OUT = "blocks.0.hook_resid_mid", "blocks.1.ln2.hook_normalized", "blocks.1.hook_mlp_out"
HOOK_Z = "blocks.0.attn.hook_z"
TOKENS = torch.randint(0, 50, (3, 12), generator=torch.Generator().manual_seed(1))

TRAINING: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "batchtopk": (BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig, {"k": 7.0}),
    "matryoshka": (
        MatryoshkaBatchTopKTrainingSAE,
        MatryoshkaBatchTopKTrainingSAEConfig,
        {"k": 7.0, "matryoshka_widths": [10, 20, D_SAE]},
    ),
    # One feature at a time, until nothing is left.
    "matching_pursuit": (
        MatchingPursuitSAE,
        MatchingPursuitSAEConfig,
        {"residual_threshold": 0.3, "max_iterations": 5},
    ),
}
TRANSCODERS: dict[str, tuple[Any, Any]] = {
    "transcoder": (Transcoder, TranscoderConfig),
    "skip": (SkipTranscoder, SkipTranscoderConfig),
    "jumprelu": (JumpReLUTranscoder, JumpReLUTranscoderConfig),
    "jumprelu-skip": (JumpReLUSkipTranscoder, JumpReLUSkipTranscoderConfig),
}


def randomise(sae: Any, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, weight in sorted(sae.named_parameters()):
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.3)
    return sae


def any_sae(kind: str, hook: str = MLP_OUT, **config: Any) -> Any:
    """A random SAE of any of SAELens' classes, or of the published one."""
    if kind in CLASSES:
        return make_sae(kind, hook, **config)
    sae_class, config_class, defaults = TRAINING[kind]
    sae = randomise(sae_class(config_class(d_in=16, d_sae=D_SAE, **(defaults | config))))
    sae.cfg.metadata.hook_name = hook
    return sae


def transcoder(kind: str = "transcoder", reads: str = MLP_IN, writes: str = MLP_OUT, **config: Any) -> Any:
    transcoder_class, config_class = TRANSCODERS[kind]
    cfg = config_class(**({"d_in": 16, "d_out": 16, "d_sae": D_SAE, "apply_b_dec_to_input": False} | config))
    cfg.metadata.hook_name, cfg.metadata.hook_name_out = reads, writes
    return randomise(transcoder_class(cfg))


@pytest.fixture
def model() -> HookedBilinearTransformer:
    return make_model()


def replaced(model: HookedBilinearTransformer, sae: Any, tokens: Tensor = TOKENS) -> Tensor:
    """The logits with the SAE's own output written over the activation by an ordinary hook."""
    reads, writes = sae.cfg.metadata.hook_name, sae.cfg.metadata.hook_name_out or sae.cfg.metadata.hook_name
    _, cache = model.run_with_cache(tokens, names_filter=reads)
    return model.run_with_hooks(tokens, fwd_hooks=[(writes, lambda act, hook: sae(cache[reads]).to(act))])


def state(model: HookedBilinearTransformer, *saes: Any) -> list[Any]:
    """Everything that attaching could change: modules, names, hooks of any kind, and the same of the SAEs."""
    found: list[Any] = [
        list(model.acts_to_saes.items()),
        list(model.hook_dict),
        model.state_dict().keys(),
        model.context_level,
    ]
    for root in (model, *saes):
        for name, module in root.named_modules():
            kept = {k for k in vars(module) if k not in ("name", "_modules")}
            found.append((name, id(module), getattr(module, "name", None), kept, list(module._modules)))
            found.append(list(module._forward_hooks.values()) + list(module._backward_hooks.values()))
            found.append(list(module._forward_pre_hooks.values()))
    return [*found, [sae.use_error_term for sae in saes]]


@contextmanager
def untouched(model: HookedBilinearTransformer, *saes: Any, error: type[BaseException] | None = None) -> Iterator[None]:
    """The model is bit for bit the same afterwards, and so are the SAEs; `error` is what must come out of the block."""
    before, logits = state(model, *saes), model(TOKENS)
    alone = [sae.encode(torch.ones(1, 1, sae.cfg.d_in)) for sae in saes if not sae.hook_z_reshaping_mode]
    if error is None:
        yield
    else:
        with pytest.raises(error):
            yield
    assert state(model, *saes) == before
    assert torch.equal(model(TOKENS), logits)
    again = [sae.encode(torch.ones(1, 1, sae.cfg.d_in)) for sae in saes if not sae.hook_z_reshaping_mode]
    assert all(map(torch.equal, alone, again))


# --- what flows on ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*CLASSES, *TRAINING])
@torch.no_grad()
def test_the_reconstruction_takes_the_activations_place(model, kind):
    """Bit for bit what `sae.decode(sae.encode(x))` gives there; every hook point inside the SAE is seen."""
    sae = any_sae(kind)
    with untouched(model, sae):
        expected = replaced(model, sae)
        assert torch.equal(model.run_with_saes(TOKENS, saes=sae), expected)
        assert not torch.allclose(expected, model(TOKENS), atol=0.1)
        logits, cache = model.run_with_cache_with_saes(TOKENS, saes=[sae], names_filter=FUSED)
    assert torch.equal(logits, expected)
    _, clean = model.run_with_cache(TOKENS, names_filter=FUSED)
    x, acts = clean[MLP_OUT], sae.encode(clean[MLP_OUT])
    assert torch.equal(cache[f"{MLP_OUT}.hook_sae_input"], x)
    assert torch.equal(cache[f"{MLP_OUT}.hook_sae_output"], sae.decode(acts))
    # The hook itself shows what flows on, so that the cache still adds up.
    assert torch.equal(cache[MLP_OUT], sae.decode(acts))
    torch.testing.assert_close(cache["blocks.1.hook_resid_mid"] + cache[MLP_OUT], cache["blocks.1.hook_resid_post"])
    assert isinstance(cache, ActivationCache)
    # SAELens' matching pursuit has hook points for its features, and does not use them.
    unused = {"hook_sae_acts_pre", "hook_sae_acts_post"} if kind == "matching_pursuit" else set()
    assert {name for name in sae.hook_dict if f"{MLP_OUT}.{name}" not in cache} == {"hook_sae_error", *unused}
    if not unused:
        assert torch.equal(cache[f"{MLP_OUT}.hook_sae_acts_post"], acts)


@pytest.mark.parametrize("kind", [*CLASSES, *TRAINING])
def test_with_the_error_term_the_model_is_itself(model, kind):
    """To rounding: `r + (x - r)`. The error carries no gradient, the features do."""
    sae = any_sae(kind)
    clean = model(TOKENS)
    with untouched(model, sae):
        logits, cache = model.run_with_cache_with_saes(TOKENS, saes=sae, use_error_term=True)
        # Random reconstructions are up to a hundred times larger than the activations; float32 keeps 1e-7 of them.
        torch.testing.assert_close(logits, clean, atol=1e-4, rtol=1e-4)
        assert f"{MLP_OUT}.hook_sae_error" in cache
        logits[:, -1, 7].sum().backward()
    assert sae.W_dec.grad.abs().sum() > 0
    assert kind == "matching_pursuit" or sae.W_enc.grad.abs().sum() > 0
    assert model.embed.W_E.grad.abs().sum() > 0
    model.zero_grad()


def test_gradients_are_those_of_the_reconstruction_alone(model):
    """Of `r + stop_gradient(x - r)`, written down directly."""
    sae = make_sae("topk", MLP_OUT)

    def frozen_error(x: Tensor, hook: HookPoint) -> Tensor:
        reconstruction = sae(x)
        return reconstruction + (x - reconstruction).detach()

    model.run_with_hooks(TOKENS, fwd_hooks=[(MLP_OUT, frozen_error)]).pow(2).sum().backward()
    expected = {name: w.grad.clone() for root in (model, sae) for name, w in root.named_parameters()}
    model.zero_grad(), sae.zero_grad()
    model.run_with_saes(TOKENS, saes=sae, use_error_term=True).pow(2).sum().backward()
    for name, weight in (*model.named_parameters(), *sae.named_parameters()):
        torch.testing.assert_close(weight.grad, expected[name], msg=name)


@pytest.mark.parametrize("error_term", [False, True])
@pytest.mark.parametrize("kind", TRANSCODERS)
@torch.no_grad()
def test_transcoders_read_one_place_and_write_another(model, kind, error_term):
    """The skip connection included; their insides are named after the place they write."""
    it = transcoder(kind)
    with untouched(model, it):
        expected = model(TOKENS) if error_term else replaced(model, it)
        logits, cache = model.run_with_cache_with_saes(TOKENS, saes=it, use_error_term=error_term, names_filter=FUSED)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    _, clean = model.run_with_cache(TOKENS, names_filter=MLP_IN)
    assert torch.equal(cache[f"{MLP_OUT}.hook_sae_acts_post"], it.encode(clean[MLP_IN]))
    assert not any(name.startswith(f"{MLP_IN}.") for name in cache)


@pytest.mark.parametrize(
    ("hook", "d_in", "config"),
    [
        ("hook_embed", 16, {}),
        (RESID, 16, {}),
        (MLP_IN, 16, {}),
        ("blocks.0.hook_attn_out", 16, {}),
        ("blocks.1.hook_resid_post", 16, {}),
        ("ln_final.hook_normalized", 16, {}),
        ("blocks.1.mlp.hook_post", 24, {}),
        (HOOK_Z, 16, {"reshape_activations": "hook_z"}),
        (HOOK_Z, 16, {}),
        ("blocks.1.attn.hook_k", 16, {}),
    ],
)
@torch.no_grad()
def test_every_kind_of_place(model, hook, d_in, config):
    """Also where activations have heads: an SAE that does not reshape them gets them side by side."""
    sae = make_sae("topk", hook, d_in=d_in)
    if config:
        sae.cfg.reshape_activations = "hook_z"
        sae.turn_on_forward_pass_hook_z_reshaping()

    def by_hand(act: Tensor, hook: HookPoint) -> Tensor:
        plain = make_sae("topk", d_in=d_in)
        return plain(act.flatten(2)).view(act.shape)

    expected = model.run_with_hooks(TOKENS, fwd_hooks=[(hook, by_hand)])
    clean = model(TOKENS)
    with untouched(model, sae):
        assert torch.equal(model.run_with_saes(TOKENS, saes=sae), expected)
        with_error = model.run_with_saes(TOKENS, saes=sae, use_error_term=True)
        torch.testing.assert_close(with_error, clean, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_several_at_once(model):
    """In-place SAEs at three depths and a transcoder: as ordinary hooks, from the bottom up."""
    saes = [make_sae("topk", RESID), make_sae("scope", HOOK_Z, seed=1), transcoder("skip")]
    kept: dict[str, Tensor] = {}
    hooks = [
        (HOOK_Z, lambda act, hook: saes[1](act.flatten(2)).view(act.shape)),
        (RESID, lambda act, hook: saes[0](act)),
        (MLP_IN, lambda act, hook: kept.update(x=act)),
        (MLP_OUT, lambda act, hook: saes[2](kept["x"])),
    ]
    expected = model.run_with_hooks(TOKENS, fwd_hooks=hooks)
    with untouched(model, *saes), model.saes(saes) as attached:
        assert attached is model
        assert list(model.acts_to_saes.items()) == [(RESID, saes[0]), (HOOK_Z, saes[1]), (MLP_IN, saes[2])]
        assert torch.equal(model(TOKENS), expected)


@pytest.mark.parametrize("hook", [MLP_IN, MLP_OUT])
@torch.no_grad()
def test_dtypes_of_sae_and_model_may_differ(model, hook):
    """float16 in a float32 model, float32 in float64 and bfloat16 ones: the model's dtype flows on."""
    sae = make_sae("topk", hook).to(dtype=torch.float16)
    with untouched(model, sae):
        logits = model.run_with_saes(TOKENS, saes=sae)
        assert logits.dtype == torch.float32
        assert torch.equal(logits, replaced(model, sae))
        clean = model(TOKENS)
        # What half precision loses is part of the error term, so nothing is lost.
        torch.testing.assert_close(
            model.run_with_saes(TOKENS, saes=sae, use_error_term=True), clean, atol=1e-4, rtol=1e-4
        )
    sae = sae.to(dtype=torch.float32)
    with model.saes(sae):
        for dtype in (torch.float64, torch.bfloat16, torch.float32):
            model.to(dtype)
            assert model(TOKENS).dtype == dtype
            assert sae.W_dec.dtype == torch.float32


@given(seed=st.integers(0, 1000), kind=st.sampled_from(["topk", "scope", "jumprelu"]), error_term=st.booleans())
@torch.no_grad()
def test_generation_with_and_without_the_cache_agree(seed, kind, error_term):
    """SAEs work token by token, so one new token at a time gives the same."""
    model = make_model(seed=seed)
    saes = [make_sae(kind, RESID, seed=seed), make_sae(kind, HOOK_Z, seed=seed + 1), transcoder("skip")]
    prompt = TOKENS[:2, :3]
    with model.saes(saes, use_error_term=error_term):
        whole = model(TOKENS)
        cached = model.generate(prompt, 8, do_sample=False, stop_at_eos=False)
        assert torch.equal(
            cached, model.generate(prompt, 8, do_sample=False, stop_at_eos=False, use_past_kv_cache=False)
        )
        # Causal as well: a prefix by itself gives what it gave in the whole.
        torch.testing.assert_close(model(TOKENS[:, :5]), whole[:, :5], atol=1e-3, rtol=1e-3)


def test_generating_text(text_model):
    sae = make_sae("topk", MLP_OUT)
    with text_model.saes(sae):
        text = text_model.generate("the little fox", 5, do_sample=False)
        assert text_model.generate(["the little fox", "Mira"], 5, do_sample=False)[0] == text
    assert text.startswith("the little fox")


# --- hooks on the inside ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error_term", [False, True])
@pytest.mark.parametrize("make", [lambda: make_sae("topk", MLP_OUT), lambda: transcoder("skip")], ids=["sae", "skip"])
@torch.no_grad()
def test_ablating_a_feature_removes_its_decoder_direction(model, make, error_term):
    """Exactly `- f_i d_i` in what flows on, and with the error term nothing else changes."""
    sae = make()
    _, cache = model.run_with_cache_with_saes(TOKENS, saes=sae, use_error_term=error_term)
    acts, flows = cache[f"{MLP_OUT}.hook_sae_acts_post"], cache[MLP_OUT]
    feature = int(acts.abs().sum((0, 1)).argmax())

    def ablate(acts: Tensor, hook: HookPoint) -> Tensor:
        acts[..., feature] = 0.0
        return acts

    seen: dict[str, Tensor] = {}
    with untouched(model, sae):
        model.run_with_hooks_with_saes(
            TOKENS,
            saes=[sae],
            use_error_term=error_term,
            fwd_hooks=[
                (f"{MLP_OUT}.hook_sae_acts_post", ablate),
                (MLP_OUT, lambda act, hook: seen.update(flows=act)),
            ],
        )
    torch.testing.assert_close(
        seen["flows"], flows - acts[..., feature, None] * sae.W_dec[feature], atol=1e-4, rtol=1e-4
    )


@torch.no_grad()
def test_steering_inside_the_block(model):
    """Hooks by `model.hooks`, by `add_hook` and by a function of the name, inside `with model.saes`."""
    sae = make_sae("topk", MLP_OUT)
    _, clean = model.run_with_cache(TOKENS, names_filter=MLP_OUT)
    steered = sae.encode(clean[MLP_OUT])
    steered[:, :, 3] += 5.0
    expected = model.run_with_hooks(TOKENS, fwd_hooks=[(MLP_OUT, lambda act, hook: sae.decode(steered))])

    def steer(acts: Tensor, hook: HookPoint) -> Tensor:
        assert hook.name == f"{MLP_OUT}.hook_sae_acts_post"
        return acts + 5.0 * torch.eye(D_SAE)[3]

    with untouched(model, sae), model.saes(sae):
        plain = model(TOKENS)
        for name in (f"{MLP_OUT}.hook_sae_acts_post", lambda name: name.endswith("acts_post")):
            with model.hooks([(name, steer)]):
                assert torch.equal(model(TOKENS), expected)
            assert torch.equal(model(TOKENS), plain)
        model.add_hook(f"{MLP_OUT}.hook_sae_acts_post", steer)
        assert torch.equal(model(TOKENS), expected)  # and it is gone with the SAE
        # SAE code run on the side, in a hook say, is not hooked by what is on the model.
        assert torch.equal(sae.encode(clean[MLP_OUT]) + 5.0 * torch.eye(D_SAE)[3], steered)


@torch.no_grad()
def test_the_saes_own_hooks_and_the_error_term(model):
    """A hook on the SAE itself works in the model as well, and the error term does not undo it."""
    sae = make_sae("topk", MLP_OUT)
    clean = model(TOKENS)
    sae.add_hook("hook_sae_acts_post", lambda acts, hook: acts * 0)
    with untouched(model, sae):
        logits, cache = model.run_with_cache_with_saes(TOKENS, saes=sae, use_error_term=True)
        assert (cache[f"{MLP_OUT}.hook_sae_acts_post"] == 0).all()
        assert not torch.allclose(logits, clean, atol=0.1)
    sae.reset_hooks()
    _, raw = model.run_with_cache(TOKENS, names_filter=MLP_OUT)
    torch.testing.assert_close(cache[f"{MLP_OUT}.hook_sae_error"], raw[MLP_OUT] - sae(raw[MLP_OUT]))


def test_gradients_on_features(model):
    """Backward hooks on the inside: attribution of a logit to features, as finite differences say."""
    sae = make_sae("standard", MLP_OUT)
    grads: dict[str, Tensor] = {}
    hooks = [(f"{MLP_OUT}.hook_sae_acts_post", lambda grad, hook: grads.update(acts=grad))]
    with untouched(model, sae), model.saes(sae), model.hooks(bwd_hooks=hooks):
        model(TOKENS)[:, -1, 5].sum().backward()
    model.zero_grad()

    def nudged(by: float) -> float:
        def nudge(acts: Tensor, hook: HookPoint) -> Tensor:
            return acts + by * torch.eye(D_SAE)[4]

        hooks = [(f"{MLP_OUT}.hook_sae_acts_post", nudge)]
        with torch.no_grad():
            return model.run_with_hooks_with_saes(TOKENS, saes=sae, fwd_hooks=hooks)[:, -1, 5].sum().item()

    # A central difference of step 1e-2 in float32: truncation and rounding are both below 1e-2 of it.
    difference = (nudged(1e-2) - nudged(-1e-2)) / 2e-2
    assert grads["acts"][..., 4].sum().item() == pytest.approx(difference, rel=3e-2, abs=1e-3)


@torch.no_grad()
def test_a_transcoder_reads_what_a_hook_wrote(model):
    """A patch on the hook it reads reaches it, whenever it was put there."""
    it = transcoder()
    _, cache = model.run_with_cache(TOKENS, names_filter=MLP_IN)
    patched = cache[MLP_IN].flip(0)
    expected = model.run_with_hooks(TOKENS, fwd_hooks=[(MLP_OUT, lambda act, hook: it(patched))])
    with untouched(model, it), model.saes(it), model.hooks([(MLP_IN, lambda act, hook: patched)]):
        torch.testing.assert_close(model(TOKENS), expected)
    with model.hooks([(MLP_IN, lambda act, hook: patched)]), model.saes(it):
        torch.testing.assert_close(model(TOKENS), expected)


@torch.no_grad()
def test_names(model):
    """Names are checked while attached, with those inside among the suggestions, and afterwards they are gone."""
    sae, inside = make_sae("topk", MLP_OUT), f"{MLP_OUT}.hook_sae_acts_post"
    with model.saes(sae):
        model.check_hook_name(inside)
        _, cache = model.run_with_cache(TOKENS, names_filter=[inside, RESID])
        assert set(cache.keys()) == {inside, RESID}
        _, cache = model.run_with_cache(TOKENS, names_filter=lambda name: "sae_acts" in name)
        assert set(cache.keys()) == {inside, f"{MLP_OUT}.hook_sae_acts_pre"}
        with pytest.raises(HookNameError, match=f"Did you mean '{inside}'"):
            model.run_with_cache(TOKENS, names_filter=f"{MLP_OUT}.hook_sae_act_post")
        with pytest.raises(HookNameError, match=r"hook_sae_error' is computed only with use_error_term=True"):
            model.run_with_cache(TOKENS, names_filter=f"{MLP_OUT}.hook_sae_error")
        assert torch.equal(model(TOKENS, stop_at_layer=1), model.run_with_hooks(TOKENS, stop_at_layer=1))
    with pytest.raises(HookNameError, match="no hook"):
        model.check_hook_name(inside)


# --- special tokens ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error_term", [False, True])
@torch.no_grad()
def test_excluded_tokens_keep_their_activation(model, error_term):
    saes = [make_sae("topk", HOOK_Z), transcoder("skip")]
    excluded = [int(TOKENS[0, 0]), int(TOKENS[1, 4])]
    keep = torch.isin(TOKENS, torch.tensor(excluded))
    with untouched(model, *saes):
        arguments = {"saes": saes, "use_error_term": error_term, "exclude_special_tokens": excluded}
        _, cache = model.run_with_cache_with_saes(TOKENS, **arguments)
        _, without = model.run_with_cache_with_saes(TOKENS, saes=saes, use_error_term=error_term)
    _, clean = model.run_with_cache(TOKENS)
    z = f"{HOOK_Z}.hook_sae_output"
    assert torch.equal(cache[z][keep], clean[HOOK_Z][keep])
    torch.testing.assert_close(cache[z][~keep], without[z][~keep])
    if error_term:
        assert (cache[f"{MLP_OUT}.hook_sae_error"][keep] == 0).all()
    with model.saes(saes[1], exclude_special_tokens=excluded), pytest.raises(ArgumentError, match="pass tokens="):
        model(torch.zeros(1, 3, 16), start_at_layer=1)


@torch.no_grad()
def test_special_tokens_are_the_tokenizers(text_model, model):
    sae = make_sae("topk", MLP_OUT)
    tokens = text_model.to_tokens(["the little fox", "Mira found three stones."])
    _, cache = text_model.run_with_cache_with_saes(tokens, saes=sae, exclude_special_tokens=True)
    _, clean = text_model.run_with_cache(tokens)
    same = (cache[MLP_OUT] == clean[MLP_OUT]).all(-1)
    special = (tokens == text_model.tokenizer.bos_token_id) | (tokens == text_model.tokenizer.eos_token_id)
    assert torch.equal(same, special)
    with pytest.raises(TokenizationError, match="needs the model's tokenizer"):
        model.run_with_saes(TOKENS, saes=sae, exclude_special_tokens=True)


# --- the model is itself again ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, GeneratorExit])
@pytest.mark.parametrize("where", ["block", "hook", "sae hook", "between"])
@torch.no_grad()
def test_whatever_happens_inside(model, error, where):
    saes = [make_sae("topk", RESID), transcoder()]

    def fail(act: Tensor, hook: HookPoint) -> None:
        raise error

    names = {"hook": "blocks.1.hook_resid_post", "sae hook": f"{MLP_OUT}.hook_sae_acts_post", "between": MLP_IN}
    with untouched(model, *saes, error=error), model.saes(saes, use_error_term=True):
        if where == "block":
            raise error
        model.run_with_hooks(TOKENS, fwd_hooks=[(names[where], fail)])
    with untouched(model, *saes, error=error):
        model.run_with_hooks_with_saes(
            TOKENS, saes=saes, fwd_hooks=[(names.get(where, f"{RESID}.hook_sae_input"), fail)]
        )


@pytest.mark.parametrize("step", range(3))
def test_interrupted_while_attaching(model, monkeypatch, step):
    """Ctrl-C between two steps of attaching."""
    saes, count = [make_sae("topk", RESID), make_sae("topk", MLP_OUT)], iter(range(100))
    original = model.setup

    def setup() -> None:
        if next(count) == step:
            raise KeyboardInterrupt
        original()

    with untouched(model, *saes):
        monkeypatch.setattr(model, "setup", setup)
        with suppress(KeyboardInterrupt), model.saes(saes):
            assert step >= 2
        monkeypatch.undo()
        if step == 2:  # while detaching: what is left can still be reset
            model.reset_saes()


def test_a_bad_sae_in_the_list(model):
    """The good one before it is not attached either."""
    good, bad = make_sae("topk", RESID), make_sae("topk", MLP_OUT, d_in=8)
    for end in (True, False):
        with untouched(model, good, error=SAEMismatchError), model.saes([good, bad], reset_saes_end=end):
            raise AssertionError("never here")


@torch.no_grad()
def test_nested(model):
    """The inner block's SAEs give way to the outer's, with their settings and the hooks on them."""
    outer, inner, deep = make_sae("topk", MLP_OUT), make_sae("scope", MLP_OUT, seed=1), make_sae("topk", RESID)
    with untouched(model, outer, inner, deep):
        expected = model.run_with_saes(TOKENS, saes=[inner, deep])
        with model.saes(outer, use_error_term=True):
            model.add_hook(f"{MLP_OUT}.hook_sae_acts_post", lambda acts, hook: acts * 0)
            before, logits = state(model, outer, inner, deep), model(TOKENS)
            with model.saes([inner, deep]):
                assert model.acts_to_saes == {MLP_OUT: inner, RESID: deep}
                assert torch.equal(model(TOKENS), expected)
            with suppress(RuntimeError), model.saes([deep, inner]):
                model.reset_saes()
                model.add_sae(make_sae("topk", "blocks.0.hook_mlp_out"))
                raise RuntimeError
            with model.saes(outer, use_error_term=False):
                assert not torch.equal(model(TOKENS), logits)
            assert state(model, outer, inner, deep) == before
            assert torch.equal(model(TOKENS), logits)


def test_the_order_is_kept(model):
    first, second, instead = make_sae("topk", MLP_OUT), make_sae("topk", RESID), make_sae("scope", MLP_OUT)
    with model.saes([first, second]):
        with model.saes(instead):
            pass
        assert list(model.acts_to_saes.values()) == [first, second]


@torch.no_grad()
def test_add_and_reset(model):
    first, second, other = make_sae("topk", MLP_OUT), make_sae("scope", MLP_OUT, seed=1), make_sae("topk", RESID)
    with untouched(model, first, second, other):
        expected = model.run_with_saes(TOKENS, saes=second)
        model.add_sae(first)
        model.add_sae(second)  # replaces it
        assert model.acts_to_saes == {MLP_OUT: second}
        assert torch.equal(model(TOKENS), expected)
        model.add_sae(other)
        model.reset_saes(RESID)
        assert torch.equal(model(TOKENS), expected)
        model.reset_saes([MLP_OUT], prev_saes=[first])
        assert model.acts_to_saes == {MLP_OUT: first}
        with pytest.raises(HookNameError, match=rf"no SAE is attached at 'blocks.1.hook_mlp_ou'.*'{MLP_OUT}'"):
            model.reset_saes(["blocks.1.hook_mlp_ou"])
        with pytest.raises(ArgumentError, match="2 prev_saes for 1 act_names"):
            model.reset_saes(MLP_OUT, prev_saes=[first, None])
        assert model.acts_to_saes == {MLP_OUT: first}
        model.reset_saes()
        model.reset_saes()


@torch.no_grad()
def test_left_attached(model):
    sae = make_sae("topk", MLP_OUT)
    with untouched(model, sae):
        logits = model.run_with_saes(TOKENS, saes=sae, reset_saes_end=False)
        assert torch.equal(model(TOKENS), logits)
        model.reset_hooks(including_permanent=True)
        assert torch.equal(model(TOKENS), logits)
        model.reset_saes(MLP_OUT)


@torch.no_grad()
def test_a_transcoder_and_an_sae_that_write_to_one_place(model):
    """The newer replaces the older, whichever hook they read."""
    sae, it = make_sae("topk", MLP_OUT), transcoder()
    with untouched(model, sae, it):
        for pair in ([sae, it], [it, sae]):
            with model.saes(pair):
                assert list(model.acts_to_saes.values()) == pair[1:]
                assert torch.equal(model(TOKENS), replaced(make_model(), pair[1]))


@torch.no_grad()
def test_the_width_of_every_hook():
    """Is that of its activation at one token, all heads together."""
    model = make_model(d_hidden=40)
    model.set_use_attn_result(True)
    model.set_use_hook_mlp_in(True)
    every = dict(model.run_with_cache(TOKENS)[1].items())
    model.set_use_split_qkv_input(True)
    every |= model.run_with_cache(TOKENS, names_filter=lambda name: name.endswith("_input"))[1].items()
    for name, activation in every.items():
        if name.endswith(("hook_attn_scores", "hook_pattern")):
            with pytest.raises(SAEMismatchError, match="as wide as the text is long"):
                hook_width(model.cfg, name)
        else:
            assert hook_width(model.cfg, name) == activation[0, 0].numel(), name
    with pytest.raises(SAEMismatchError, match="token ids"):
        hook_width(model.cfg, "hook_tokens")


@torch.no_grad()
def test_a_transcoder_and_an_sae_that_read_one_place(model):
    """The newer replaces the older, wherever that writes: nothing of a transcoder stays where it wrote."""
    it, sae = transcoder(), make_sae("topk", MLP_IN)
    with untouched(model, sae, it):
        for pair in ([it, sae], [sae, it]):
            with model.saes(pair):
                assert list(model.acts_to_saes.values()) == pair[1:]
                assert torch.equal(model(TOKENS), model_with(pair[1])(TOKENS))


def model_with(sae):
    """A new model with this alone attached."""
    model = make_model()
    model.add_sae(sae)
    return model


@torch.no_grad()
def test_hooks_that_were_there_before_stay(model):
    """They see what flows on; in SAELens they would be lost. The SAE's own setting decides where none is given."""
    sae = make_sae("topk", MLP_OUT)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sae.use_error_term = True
    seen: list[Tensor] = []
    model.add_perma_hook(MLP_OUT, lambda act, hook: seen.append(act))
    model.add_perma_hook(MLP_IN, lambda act, hook: None)
    with untouched(model, sae):
        _, cache = model.run_with_cache_with_saes(TOKENS, saes=sae)
        assert f"{MLP_OUT}.hook_sae_error" in cache
        assert torch.equal(seen[-1], cache[f"{MLP_OUT}.hook_sae_output"])
        model.run_with_saes(TOKENS, saes=transcoder())


def test_saving_and_copying_while_attached(text_model, tmp_path):
    """The SAE is no part of the model's weights; a copy has a copy of the SAE."""
    sae, it = make_sae("topk", RESID), transcoder()
    before = {name: tensor.clone() for name, tensor in text_model.state_dict().items()}
    parameters = [name for name, _ in text_model.named_parameters()]
    with text_model.saes([sae, it]):
        assert text_model.state_dict().keys() == before.keys()
        assert [name for name, _ in text_model.named_parameters()] == parameters
        text_model.load_state_dict(before)
        text_model.save_pretrained(tmp_path / "attached")
        text_model.to("cpu")
        tokens = text_model.to_tokens("the little fox")
        spliced = text_model(tokens)
        twin = copy.deepcopy(text_model)
    text_model.save_pretrained(tmp_path / "plain")
    attached, plain = (load_file(tmp_path / which / "model.safetensors") for which in ("attached", "plain"))
    assert attached.keys() == plain.keys()
    assert all(torch.equal(attached[name], plain[name]) for name in plain)
    torch.testing.assert_close(load_model(tmp_path / "attached")(tokens), text_model(tokens))
    assert torch.equal(twin(tokens), spliced)
    twin.reset_saes()
    assert torch.equal(twin(tokens), text_model(tokens))


@pytest.mark.parametrize(
    "name",
    ["saes", "add_sae", "reset_saes", "run_with_saes", "run_with_cache_with_saes", "run_with_hooks_with_saes"],
)
def test_saelens_arguments(name):
    """In SAELens' order, so that a call written for it means the same here; defaults too, empty lists apart."""
    ours = inspect.signature(getattr(HookedBilinearTransformer, name)).parameters
    for place, (argument, theirs) in enumerate(
        inspect.signature(getattr(HookedSAETransformer, name)).parameters.items()
    ):
        assert ours[argument].kind == theirs.kind
        assert ours[argument].default == (() if theirs.default == [] else theirs.default)
        if theirs.kind == inspect.Parameter.POSITIONAL_OR_KEYWORD:
            assert list(ours)[place] == argument


# --- what is refused --------------------------------------------------------------------------------------------------


def with_metadata(sae: Any, **metadata: Any) -> Any:
    for name, value in metadata.items():
        setattr(sae.cfg.metadata, name, value)
    return sae


TEMPORAL = {"d_in": 16, "d_sae": 8, "n_heads": 1, "bottleneck_factor": 1}


@pytest.mark.parametrize(
    ("sae", "error", "message"),
    [
        (lambda: "blocks.1", ArgumentError, r"expected a SAELens SAE .* not str 'blocks.1'"),
        (lambda: make_sae("topk"), SAEMismatchError, r"no metadata.hook_name; set it"),
        (lambda: make_sae("topk", "blocks.1.hook_mlp_ou"), HookNameError, rf"Did you mean '{MLP_OUT}'"),
        (lambda: make_sae("topk", "blocks.9.hook_mlp_out"), HookNameError, r"no hook 'blocks.9.hook_mlp_out'"),
        (lambda: make_sae("topk", "blocks.1.attn.hook_result"), HookNameError, r"set_use_attn_result"),
        (lambda: make_sae("topk", MLP_OUT, d_in=8), SAEMismatchError, rf"d_in 8; '{MLP_OUT}' is 16 wide"),
        (lambda: make_sae("topk", "blocks.0.mlp.hook_post"), SAEMismatchError, r"d_in 16; .* is 24 wide"),
        (lambda: make_sae("topk", HOOK_Z, d_in=8), SAEMismatchError, r"is 16 wide"),
        (lambda: transcoder(d_in=24), SAEMismatchError, rf"d_in 24; '{MLP_IN}' is 16 wide"),
        (lambda: transcoder(d_out=24), SAEMismatchError, rf"d_out 24; '{MLP_OUT}' is 16 wide"),
        (lambda: with_metadata(transcoder(), hook_name_out=None), SAEMismatchError, "without metadata.hook_name_out"),
        (lambda: transcoder(writes="blocks.1.hook_mlp"), HookNameError, rf"Did you mean .*'{MLP_OUT}'"),
        (lambda: make_sae("topk", "blocks.0.attn.hook_pattern"), SAEMismatchError, "as wide as the text is long"),
        (lambda: with_metadata(make_sae("topk", HOOK_Z), hook_head_index=1), SAEMismatchError, "head 1 of"),
        (
            lambda: with_metadata(TemporalSAE(TemporalSAEConfig(**TEMPORAL)), hook_name=MLP_OUT),
            SAEMismatchError,
            "is temporal",
        ),
    ],
)
def test_bad_saes(model, sae, error, message):
    bad = sae()
    with untouched(model):
        for attach in (model.add_sae, lambda sae: model.run_with_saes(TOKENS, saes=sae)):
            with pytest.raises(error, match=message):
                attach(bad)


def test_an_sae_inside_an_sae(model):
    inside = f"{MLP_OUT}.hook_sae_acts_post"
    with model.saes(make_sae("topk", MLP_OUT)), pytest.raises(SAEMismatchError, match="inside an attached SAE"):
        model.add_sae(make_sae("topk", inside))


def test_a_transcoder_whose_input_this_pass_does_not_compute(model):
    """Never the input of an earlier pass."""
    it, backwards = transcoder(reads="blocks.0.ln2.hook_normalized"), transcoder(reads=MLP_OUT, writes=MLP_IN)
    with untouched(model, it, backwards):
        with model.saes(it):
            model(TOKENS, stop_at_layer=1)
            with pytest.raises(SAEMismatchError, match="start_at_layer is past it"):
                model(torch.zeros(3, 12, 16), start_at_layer=1)
            model(TOKENS)
        with pytest.raises(SAEMismatchError, match="the wrong way round"):
            model.run_with_saes(TOKENS, saes=backwards)


def test_the_model_does_not_need_sae_lens():
    """Its import takes seconds, and without an SAE nothing needs it."""
    code = """
import sys, bilens.model.transformer
from bilens.model.config import config_from_published
model = bilens.model.transformer.HookedBilinearTransformer(
    config_from_published({"n_head": 1, "n_layer": 1, "n_ctx": 4, "d_model": 4, "d_hidden": 4}, 5))
model.generate(__import__("torch").zeros(1, 1, dtype=int), 1)
assert "sae_lens" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
