"""TransformerLens habits: hooks by name, `run_with_cache`, and every decomposition of `ActivationCache`."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformer_lens import ActivationCache
from transformer_lens.HookedRootModule import HookedRootModule
from transformer_lens.utilities import Slice

from bilens.errors import ArgumentError, HookNameError, OutOfRangeError
from bilens.model.transformer import HookedBilinearTransformer
from bilens.vision.config import ClassifierConfig
from bilens.vision.model import BilinearClassifier
from tests.conftest import make_model
from tests.random_saes import make_sae

TOKENS = torch.tensor([[1, 7, 42, 7, 0, 13, 29], [3, 3, 11, 8, 21, 5, 2]])
PATTERN = "blocks.0.attn.hook_pattern"
RESULT = "blocks.0.attn.hook_result"


def close(actual: Tensor, expected: Tensor) -> None:
    """Equal up to float32 sums taken in another order."""
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


def keep(value: Tensor, hook: Any) -> None:
    """A hook that changes nothing."""


# --- names ------------------------------------------------------------------------------------------------------------


SWITCHED = {
    "set_use_attn_result": ["attn.hook_result"],
    "set_use_split_qkv_input": ["hook_q_input", "hook_k_input", "hook_v_input"],
    "set_use_attn_in": ["hook_attn_in"],
    "set_use_hook_mlp_in": ["hook_mlp_in", "mlp.hook_in"],
}


@pytest.mark.parametrize("bilinear", [True, False])
def test_the_named_points_and_no_others(bilinear: bool) -> None:
    """The hook dictionary holds the documented names, and those that TransformerLens' switches turn on."""
    per_layer = [f"hook_{name}" for name in ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")]
    per_layer += [f"{norm}.hook_{name}" for norm in ("ln1", "ln2") for name in ("scale", "normalized")]
    per_layer += [f"attn.hook_{name}" for name in ("q", "k", "v", "z", "rot_q", "rot_k", "attn_scores", "pattern")]
    per_layer += [f"mlp.hook_{name}" for name in (("pre", "pre_linear", "post") if bilinear else ("pre", "post"))]
    per_layer += [name for names in SWITCHED.values() for name in names]
    names = {f"blocks.{layer}.{name}" for layer in range(2) for name in per_layer}
    names |= {"hook_tokens", "hook_embed", "ln_final.hook_scale", "ln_final.hook_normalized"}
    model = make_model(bilinear=bilinear)
    assert isinstance(model, HookedRootModule)
    assert set(model.hook_dict) == names


def ways_to_name_a_hook() -> dict[str, Callable[[HookedBilinearTransformer, str], Any]]:
    """Every public call that takes a hook's name."""

    def with_hooks(direction: str) -> Callable[[HookedBilinearTransformer, str], None]:
        def enter(model: HookedBilinearTransformer, name: str) -> None:
            with model.hooks(**{direction: [(name, keep)]}):
                model(TOKENS)

        return enter

    return {
        "run_with_cache(str)": lambda model, name: model.run_with_cache(TOKENS, names_filter=name),
        "run_with_cache(list)": lambda model, name: model.run_with_cache(TOKENS, names_filter=["hook_embed", name]),
        "run_with_cache(tuple)": lambda model, name: model.run_with_cache(TOKENS, names_filter=(name,)),
        "get_caching_hooks": lambda model, name: model.get_caching_hooks(name),
        "add_caching_hooks": lambda model, name: model.add_caching_hooks(name),
        "add_hook": lambda model, name: model.add_hook(name, keep),
        "add_perma_hook": lambda model, name: model.add_perma_hook(name, keep),
        "run_with_hooks": lambda model, name: model.run_with_hooks(TOKENS, fwd_hooks=[(name, keep)]),
        "hooks(fwd)": with_hooks("fwd_hooks"),
        "hooks(bwd)": with_hooks("bwd_hooks"),
    }


@pytest.mark.parametrize("way", ways_to_name_a_hook().values(), ids=ways_to_name_a_hook().keys())
def test_a_misspelt_hook_is_refused_with_the_nearest_name(way: Callable) -> None:
    """HookNameError (also a KeyError) quotes the name and suggests the right one, and leaves no hook behind."""
    model = make_model()
    with pytest.raises(
        HookNameError, match=r"no hook 'blocks.0.attn.hook_patern'.*'blocks.0.attn.hook_pattern'"
    ) as info:
        way(model, "blocks.0.attn.hook_patern")
    assert isinstance(info.value, KeyError)
    assert not any(hook.fwd_hooks or hook.bwd_hooks for hook in model.hook_points())


@pytest.mark.parametrize("way", ways_to_name_a_hook().values(), ids=ways_to_name_a_hook().keys())
@pytest.mark.parametrize("switch", SWITCHED)
def test_what_is_computed_on_request_must_be_switched_on(switch: str, way: Callable) -> None:
    """A hook that would never be called is refused, saying how to switch it on; then it is accepted, and off again."""
    model = make_model()
    for name in SWITCHED[switch]:
        for _ in range(2):
            with pytest.raises(HookNameError, match=rf"blocks.1.{name}.*model.{switch}\(True\)"):
                way(model, f"blocks.1.{name}")
            getattr(model, switch)(True)
            way(model, f"blocks.1.{name}")
            model.reset_hooks(including_permanent=True)
            getattr(model, switch)(False)


def test_hook_tokens_must_be_switched_on() -> None:
    """As in TransformerLens by the config; a hook on it may change what is read, and is shown the tokens."""
    model = make_model()
    with pytest.raises(HookNameError, match="use_hook_tokens = True"):
        model.add_hook("hook_tokens", keep)
    model.cfg.use_hook_tokens = True
    _, cache = model.run_with_cache(TOKENS)
    assert torch.equal(cache["hook_tokens"], TOKENS)
    flipped = model.run_with_hooks(TOKENS, fwd_hooks=[("hook_tokens", lambda tokens, hook: tokens.flip(1))])
    close(flipped, model(TOKENS.flip(1)))
    _, last = model.run_with_cache(TOKENS, pos_slice=-1)
    assert torch.equal(last["hook_tokens"], TOKENS[:, -1:])


def test_a_module_that_is_no_hook_is_refused() -> None:
    """`blocks.0.attn` is a module, not a hook point."""
    with pytest.raises(HookNameError, match=r"no hook 'blocks.0.attn'"):
        make_model().add_hook("blocks.0.attn", keep)


# --- hooks act --------------------------------------------------------------------------------------------------------


def test_a_forward_hook_replaces_the_activation() -> None:
    """Zeroing a head's z is the same as zeroing its W_O; the hook is gone after run_with_hooks."""
    model, reference = make_model(), make_model()

    def silence(z: Tensor, hook: Any) -> Tensor:
        z = z.clone()
        z[:, :, 1] = 0
        return z

    ablated = model.run_with_hooks(TOKENS, fwd_hooks=[("blocks.0.attn.hook_z", silence)])
    with torch.no_grad():
        reference.blocks[0].attn.o.weight[:, 8:] = 0
    close(ablated, reference(TOKENS))
    close(model(TOKENS), make_model()(TOKENS))


def test_hooks_on_scores_and_pattern_act() -> None:
    """Looking at the pattern leaves the fused kernel: a hook there is obeyed, and one that keeps it changes nothing."""
    model = make_model()

    def to_self(pattern: Tensor, hook: Any) -> Tensor:
        return torch.eye(pattern.shape[-1]).expand_as(pattern)

    close(model.run_with_hooks(TOKENS, fwd_hooks=[(PATTERN, keep)]), model(TOKENS))
    with model.hooks(fwd_hooks=[(PATTERN, to_self)]):
        _, cache = model.run_with_cache(TOKENS, names_filter=lambda name: name.startswith("blocks.0.attn"))
    close(cache["blocks.0.attn.hook_z"], cache["blocks.0.attn.hook_v"])

    def flatten(scores: Tensor, hook: Any) -> Tensor:
        return scores.masked_fill(scores.isfinite(), 0)

    with model.hooks(fwd_hooks=[("blocks.0.attn.hook_attn_scores", flatten)]):
        _, cache = model.run_with_cache(TOKENS)
    close(cache[PATTERN][0, 0, -1], torch.full((7,), 1 / 7))


def test_patching_one_heads_result() -> None:
    """With results switched on, what a hook does to one head's result is what is added to the stream."""
    model = make_model()
    model.set_use_attn_result(True)
    _, clean = model.run_with_cache(TOKENS)

    def double(result: Tensor, hook: Any) -> Tensor:
        return result * torch.tensor([2.0, 1.0])[:, None]

    with model.hooks(fwd_hooks=[(RESULT, double)]):
        _, cache = model.run_with_cache(TOKENS)
    close(cache["blocks.0.hook_attn_out"], clean["blocks.0.hook_attn_out"] + clean[RESULT][:, :, 0])


@pytest.mark.parametrize("published", [{}, {"normalization": False}, {"attention_bias": True}], ids=str)
def test_what_a_head_reads_can_be_changed_alone(published: dict) -> None:
    """Copies for every head give the same logits; a hook on one head's query, key or value moves that one alone."""
    model = make_model(**published)
    model.set_use_attn_result(True)
    expected, clean = model.run_with_cache(TOKENS)

    def silence(stream: Tensor, hook: Any) -> None:
        assert stream.shape == (2, 7, 2, 16)
        stream[:, :, 1] = 0

    model.set_use_split_qkv_input(True)
    output, cache = model.run_with_cache(TOKENS)
    close(output, expected)
    for kind in "qkv":
        close(cache[f"blocks.1.hook_{kind}_input"][:, :, 1], clean["blocks.1.hook_resid_pre"])
        with model.hooks(fwd_hooks=[(f"blocks.1.hook_{kind}_input", silence)]):
            _, changed = model.run_with_cache(TOKENS)
        silent = getattr(model.blocks[1].attn, f"b_{kind.upper()}")[1].expand(2, 7, 8)
        close(changed[f"blocks.1.attn.hook_{kind}"][:, :, 1], silent)
        close(changed[f"blocks.1.attn.hook_{kind}"][:, :, 0], clean[f"blocks.1.attn.hook_{kind}"][:, :, 0])
        for other in set("qkv") - {kind}:
            close(changed[f"blocks.1.attn.hook_{other}"], clean[f"blocks.1.attn.hook_{other}"])
        close(changed["blocks.1.hook_resid_pre"], clean["blocks.1.hook_resid_pre"])
        close(changed["blocks.1.attn.hook_result"][:, :, 0], clean["blocks.1.attn.hook_result"][:, :, 0])
    with pytest.raises(ArgumentError, match=r"exclude each other: first model.set_use_split_qkv_input\(False\)"):
        model.set_use_attn_in(True)
    model.set_use_split_qkv_input(False)
    model.set_use_attn_in(True)
    close(model(TOKENS), expected)
    with model.hooks(fwd_hooks=[("blocks.1.hook_attn_in", silence)]):
        _, changed = model.run_with_cache(TOKENS)
    for kind in "qkv":
        silent = getattr(model.blocks[1].attn, f"b_{kind.upper()}")[1].expand(2, 7, 8)
        close(changed[f"blocks.1.attn.hook_{kind}"][:, :, 1], silent)
    close(changed["blocks.1.attn.hook_z"][:, :, 0], clean["blocks.1.attn.hook_z"][:, :, 0])
    with pytest.raises(ArgumentError, match="exclude each other"):
        model.set_use_split_qkv_input(True)


def test_what_the_mlp_reads_can_be_changed_alone() -> None:
    """`hook_mlp_in` is the stream before ln2, `mlp.hook_in` after it; zeroing the first leaves the stream as it was."""
    model = make_model()
    model.set_use_hook_mlp_in(True)
    expected, clean = model.run_with_cache(TOKENS)
    close(expected, make_model()(TOKENS))
    assert torch.equal(clean["blocks.1.hook_mlp_in"], clean["blocks.1.hook_resid_mid"])
    assert torch.equal(clean["blocks.1.mlp.hook_in"], clean["blocks.1.ln2.hook_normalized"])
    for name in ("hook_mlp_in", "mlp.hook_in"):
        with model.hooks(fwd_hooks=[(f"blocks.1.{name}", lambda x, hook: x.zero_())]):
            _, changed = model.run_with_cache(TOKENS)
        assert not changed["blocks.1.hook_mlp_out"].any()
        close(changed["blocks.1.hook_resid_post"], clean["blocks.1.hook_resid_mid"])


@pytest.mark.parametrize("switch", SWITCHED)
def test_a_switch_is_true_or_false(switch: str) -> None:
    """The text "false" would switch it on."""
    with pytest.raises(ArgumentError, match="expected True or False"):
        getattr(make_model(), switch)("false")


def test_a_frozen_scale_is_used() -> None:
    """Patching hook_scale changes what is read: normalized = x / scale."""
    model = make_model()
    with model.hooks(fwd_hooks=[("blocks.1.ln2.hook_scale", lambda scale, hook: torch.full_like(scale, 2.0))]):
        _, cache = model.run_with_cache(TOKENS)
    close(cache["blocks.1.ln2.hook_normalized"], cache["blocks.1.hook_resid_mid"] / 2)


def test_hooks_last_as_long_as_the_block() -> None:
    """Inside `with model.hooks(...)` they are called, afterwards not; an added hook lasts until reset_hooks."""
    model, calls = make_model(), []

    def count(value: Tensor, hook: Any) -> None:
        calls.append(hook.name)

    with model.hooks(fwd_hooks=[("hook_embed", count), (lambda name: name.endswith("mlp_out"), count)]) as same:
        assert same is model
        model(TOKENS)
    assert calls == ["hook_embed", "blocks.0.hook_mlp_out", "blocks.1.hook_mlp_out"]
    model(TOKENS)
    assert len(calls) == 3
    model.add_hook(lambda name: name.endswith("resid_mid"), count)
    model(TOKENS)
    model.run_with_cache(TOKENS)  # takes its own hooks away, not this one
    model(TOKENS)
    assert len(calls) == 9
    model.reset_hooks()
    model(TOKENS)
    assert len(calls) == 9


def test_a_hook_that_raises_is_removed() -> None:
    """An exception inside a hook does not leave it on the model."""
    model = make_model()

    def fail(value: Tensor, hook: Any) -> None:
        raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        model.run_with_hooks(TOKENS, fwd_hooks=[("hook_embed", fail)])
    model(TOKENS)


@pytest.mark.parametrize("name", [PATTERN, "blocks.0.attn.hook_attn_scores"])
def test_a_backward_hook_alone_leaves_the_fused_kernel(name: str) -> None:
    """It never forms scores, so their gradient would not be seen."""
    model, seen = make_model(), []
    with model.hooks(bwd_hooks=[(name, lambda grad, hook: seen.append(grad.shape))]):
        model(TOKENS, return_type="loss").backward()
    assert seen == [(2, 2, 7, 7)]


def test_backward_hooks_see_the_gradients() -> None:
    """`run_with_cache(incl_bwd=True)` keeps the gradient of the loss at every point, as autograd gives it."""
    model = make_model()
    loss, cache = model.run_with_cache(TOKENS, return_type="loss", incl_bwd=True)
    residual = model(TOKENS, stop_at_layer=1).detach().requires_grad_()
    again = model(residual, start_at_layer=1, tokens=TOKENS, return_type="loss")
    (gradient,) = torch.autograd.grad(again, residual)
    close(loss, again)
    close(cache["blocks.1.hook_resid_pre_grad"], gradient)
    assert gradient.abs().max() > 1e-3


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_gradients_that_are_turned_off_are_refused(mode: Callable) -> None:
    """`incl_bwd` without gradients is said in a sentence, and leaves no hook behind."""
    model = make_model()
    with mode(), pytest.raises(ArgumentError, match="incl_bwd needs gradients"):
        model.run_with_cache(TOKENS, return_type="loss", incl_bwd=True)
    assert not model._is_hooked()


# --- run_with_cache ---------------------------------------------------------------------------------------------------


def test_the_cache_holds_everything_that_is_computed() -> None:
    """Without a filter: every hook but those that are switched off; of the two ways to give heads copies only one."""
    model = make_model()
    output, cache = model.run_with_cache(TOKENS)
    close(output, model(TOKENS))
    assert isinstance(cache, ActivationCache)
    switched = {f"blocks.{layer}.{name}" for layer in range(2) for names in SWITCHED.values() for name in names}
    assert set(model.hook_dict) - set(cache) == switched | {"hook_tokens"}
    model.set_use_attn_result(True)
    model.set_use_split_qkv_input(True)
    model.set_use_hook_mlp_in(True)
    model.cfg.use_hook_tokens = True
    off = {f"blocks.{layer}.hook_attn_in" for layer in range(2)}
    assert set(model.run_with_cache(TOKENS)[1]) == set(model.hook_dict) - off


@pytest.mark.parametrize("activation", ["pattern", "resid_pre", "scale", "pre_linear", "normalized"])
def test_shorthand_names(activation: str) -> None:
    """TransformerLens' short keys find the activation."""
    _, cache = make_model().run_with_cache(TOKENS)
    full = {
        "pattern": PATTERN,
        "resid_pre": "blocks.0.hook_resid_pre",
        "scale": "blocks.0.ln1.hook_scale",
        "pre_linear": "blocks.0.mlp.hook_pre_linear",
        "normalized": "blocks.0.ln1.hook_normalized",
    }[activation]
    key = (activation, 0, "ln1") if "ln1" in full else (activation, 0, "mlp") if "mlp" in full else (activation, 0)
    assert torch.equal(cache[key], cache[full])


def test_names_filter() -> None:
    """One name, several names, or a function of the name: exactly those are kept."""
    model = make_model()

    def kept(names_filter: Any) -> set[str]:
        return set(model.run_with_cache(TOKENS, names_filter=names_filter)[1])

    assert kept(PATTERN) == {PATTERN}
    assert kept([PATTERN, "hook_embed"]) == kept({PATTERN, "hook_embed"}) == {PATTERN, "hook_embed"}
    assert kept(lambda name: name.endswith("mlp_out")) == {f"blocks.{layer}.hook_mlp_out" for layer in (0, 1)}
    assert kept(lambda name: "hook_result" in name) == set()
    assert kept([]) == set()


def test_remove_batch_dim() -> None:
    """On a batch of one the batch axis goes, from a new cache or an old one; on more it cannot."""
    model = make_model()
    _, with_batch = model.run_with_cache(TOKENS[:1])
    _, without = model.run_with_cache(TOKENS[:1], remove_batch_dim=True)
    assert without.has_batch_dim is False
    for name in with_batch:
        assert torch.equal(with_batch[name][0], without[name]), name
    close(without.decompose_resid().sum(0), without["resid_post", 1])
    with_batch.remove_batch_dim()
    assert torch.equal(with_batch[PATTERN], without[PATTERN])
    with pytest.raises(AssertionError):
        model.run_with_cache(TOKENS)[1].remove_batch_dim()


def test_a_plain_dictionary_on_request() -> None:
    """`return_cache_object=False` gives the dictionary."""
    _, cache = make_model().run_with_cache(TOKENS, return_cache_object=False)
    assert type(cache) is dict


@pytest.mark.parametrize("remove_batch_dim", [False, True])
@pytest.mark.parametrize("pos_slice", [2, -1, [1, 5], (2, 6), (0, 7, 3), torch.tensor([0, 6])])
def test_pos_slice(pos_slice: Any, remove_batch_dim: bool) -> None:
    """Of every activation and gradient, inside attached SAEs too, the positions asked for: not heads, not features."""
    model, tokens = make_model(), TOKENS[:1]
    model.set_use_attn_result(True)
    model.set_use_split_qkv_input(True)
    model.set_use_hook_mlp_in(True)
    for hook in ("blocks.0.attn.hook_z", "blocks.1.hook_mlp_out"):
        sae = make_sae(hook=hook, reshape_activations="hook_z" if hook.endswith("z") else "none")
        model.add_sae(sae, use_error_term=True)
    every: Any = {"incl_bwd": True, "return_type": "loss", "remove_batch_dim": remove_batch_dim}
    _, whole = model.run_with_cache(tokens, **every)
    _, cut = model.run_with_cache(tokens, pos_slice=pos_slice, **every)
    kept = torch.arange(7)[Slice.unwrap(pos_slice).slice]
    assert set(cut) == set(whole) > {name for name in model.hook_dict if model._is_switched_off(name) is None}
    for name, activation in whole.items():
        axis = (2 if "attn_scores" in name or "pattern" in name else 1) - remove_batch_dim
        assert torch.equal(cut[name], activation.index_select(axis, kept)), name
        assert activation.shape[axis] == 7


@pytest.mark.parametrize("pos_slice", [True, "2", 1.5, {2: 3}])
def test_a_pos_slice_that_is_none_is_refused(pos_slice: Any) -> None:
    """A flag, a text or a fraction is no position; position 7 of 7 is outside."""
    model = make_model()
    with pytest.raises(ArgumentError, match=r"pos_slice .* is no position"):
        model.run_with_cache(TOKENS, pos_slice=pos_slice)
    with pytest.raises(OutOfRangeError, match="outside the 7 positions"):
        model.run_with_cache(TOKENS, pos_slice=7)
    assert not model._is_hooked()


def test_a_classifier_has_no_positions() -> None:
    """`pos_slice` would cut its hidden units: refused."""
    model = BilinearClassifier(ClassifierConfig(d_input=6, d_hidden=4, d_output=3, n_layer=1), seed=0)
    with pytest.raises(ArgumentError, match="no positions"):
        model.run_with_cache(torch.rand(2, 6), pos_slice=1)


# --- compiled ---------------------------------------------------------------------------------------------------------


def test_a_compiled_model_obeys_hooks() -> None:
    """At every point, added after a first run or exchanged for another; without hooks it is itself again."""
    torch.compiler.reset()
    model, plain = make_model(n_layer=1), make_model(n_layer=1)
    run = torch.compile(model, backend="eager")  # has the guards and needs no compiler
    before = run(TOKENS)
    close(before, plain(TOKENS))
    for name in model.run_with_cache(TOKENS)[1]:
        for factor in (0.5, 2.0):
            hook = (name, lambda x, hook, factor=factor: x * factor)
            with model.hooks(fwd_hooks=[hook]):
                close(run(TOKENS), plain.run_with_hooks(TOKENS, fwd_hooks=[hook]))
    seen: list[str] = []
    with model.hooks(bwd_hooks=[("hook_embed", lambda grad, hook: seen.append(hook.name))]):
        run(TOKENS, return_type="loss").backward()
    assert seen == ["hook_embed"]
    for seed in (0, 1):  # exchanged for another of the same shape
        sae = make_sae(hook="blocks.0.hook_mlp_out", seed=seed)
        with model.saes(sae):
            close(run(TOKENS), plain.run_with_saes(TOKENS, saes=[sae]))
    assert torch.equal(run(TOKENS), before)


def test_a_model_that_compiled_itself_obeys_hooks() -> None:
    """`model.compile()`, with `run_with_hooks` and `run_with_cache` of the model itself."""
    torch.compiler.reset()
    model, plain = make_model(n_layer=1), make_model(n_layer=1)
    model.compile(backend="eager")
    close(model(TOKENS), plain(TOKENS))
    model.add_hook("hook_embed", lambda x, hook: x * 2)
    plain.add_hook("hook_embed", lambda x, hook: x * 2)
    expected, cache = plain.run_with_cache(TOKENS)
    found, compiled_cache = model.run_with_cache(TOKENS)
    close(found, expected)
    close(model(TOKENS), expected)
    for name in cache:
        close(compiled_cache[name], cache[name])


def test_a_model_compiled_while_it_has_hooks_obeys_others() -> None:
    """The other order: what is compiled with a hook on it does not keep that hook."""
    torch.compiler.reset()
    model = make_model(n_layer=1)
    expected = model(TOKENS)
    model.add_hook("blocks.0.hook_mlp_out", lambda x, hook: x * 3)
    run = torch.compile(model, backend="eager")
    run(TOKENS)
    model.reset_hooks()
    close(run(TOKENS), expected)
    model.add_hook("blocks.0.hook_mlp_out", lambda x, hook: x * 0)
    close(run(TOKENS), model(TOKENS))


# --- what ActivationCache adds up -------------------------------------------------------------------------------------

VARIANTS = {"plain": {}, "bias": {"bias": True}, "no norm": {"normalization": False}, "one branch": {"bilinear": False}}
VARIANTS["gate, bias"] = {"gate": "silu", "bias": True, "n_layer": 3}


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS.keys())
def cached(request: pytest.FixtureRequest) -> tuple[HookedBilinearTransformer, Tensor, ActivationCache]:
    """A model of each variant, its logits and its cache."""
    model = make_model(**request.param)
    logits, cache = model.run_with_cache(TOKENS)
    return model, logits, cache


def test_decompose_resid_sums_to_the_stream(cached: tuple) -> None:
    """Embedding, attention and MLP outputs up to a layer add up to the stream entering it (and to its MLP's input)."""
    model, _, cache = cached
    components, labels = cache.decompose_resid(return_labels=True)
    n_layers = model.cfg.n_layers
    assert labels == ["embed"] + [f"{layer}_{part}" for layer in range(n_layers) for part in ("attn_out", "mlp_out")]
    close(components.sum(0), cache["resid_post", n_layers - 1])
    for layer in range(n_layers):
        close(cache.decompose_resid(layer).sum(0), cache["resid_pre", layer])
        close(cache.decompose_resid(layer, mlp_input=True).sum(0), cache["resid_mid", layer])
    normalized = cache.decompose_resid(apply_ln=True).sum(0)
    close(normalized, cache["ln_final.hook_normalized"])
    close(cache.decompose_resid(1, mlp_input=True, apply_ln=True).sum(0), cache["blocks.1.ln2.hook_normalized"])


def test_accumulated_resid_is_the_stream(cached: tuple) -> None:
    """Row for row the stream at every point; with `apply_ln` each row is normalised by itself (logit lens)."""
    model, logits, cache = cached
    components, labels = cache.accumulated_resid(incl_mid=True, return_labels=True)
    n_layers = model.cfg.n_layers
    expected = {f"{layer}_{at}": cache[f"resid_{at}", layer] for layer in range(n_layers) for at in ("pre", "mid")}
    expected["final_post"] = cache["resid_post", n_layers - 1]
    assert labels == list(expected)
    for component, label in zip(components, labels, strict=True):
        assert torch.equal(component, expected[label]), label
    lens = cache.accumulated_resid(apply_ln=True)
    close(lens[-1] @ model.W_U, logits)
    close(lens[0], model.ln_final(cache["resid_pre", 0]))


def test_hook_result_sums_to_attn_out(cached: tuple) -> None:
    """What each head adds, computed in the forward pass, is z W_O; over heads it sums to hook_attn_out."""
    model, logits, plain = cached
    model.set_use_attn_result(True)
    with_results, cache = model.run_with_cache(TOKENS)
    close(with_results, logits)
    for layer in range(model.cfg.n_layers):
        result = cache["result", layer, "attn"]
        assert result.shape == (*TOKENS.shape, model.cfg.n_heads, model.cfg.d_model)
        close(result.sum(2), cache["attn_out", layer])
        close(result, torch.einsum("bphe,hem->bphm", plain["z", layer], model.W_O[layer]))


@pytest.mark.parametrize("switched_on", [True, False])
def test_stack_head_results(cached: tuple, switched_on: bool) -> None:
    """All heads and the remainder add up to the final stream, in the order of all_head_labels; computed if need be."""
    model, _, cache = cached
    if switched_on:
        model.set_use_attn_result(True)
        _, cache = model.run_with_cache(TOKENS)
    stack, labels = cache.stack_head_results(incl_remainder=True, return_labels=True)
    assert labels == [*model.all_head_labels(), "remainder"]
    last = model.cfg.n_layers - 1
    close(stack.sum(0), cache["resid_post", last])
    others = cache["hook_embed"] + sum(cache["mlp_out", layer] for layer in range(last + 1))
    close(stack[-1], others)
    close(stack[1], torch.einsum("bpe,em->bpm", cache["z", 0][:, :, 1], model.W_O[0, 1]))


def test_logit_attrs_sum_to_the_logit(cached: tuple) -> None:
    """Components, frozen final norm applied, times a token's direction add up to its logit; so do differences."""
    _, logits, cache = cached
    stack = cache.decompose_resid()
    for token in (0, 17, 49):
        close(cache.logit_attrs(stack, token).sum(0), logits[..., token])
    close(cache.logit_attrs(stack, 17, incorrect_tokens=3).sum(0), logits[..., 17] - logits[..., 3])
    each = torch.randint(0, 50, TOKENS.shape, generator=torch.Generator().manual_seed(0))
    close(cache.logit_attrs(stack, each).sum(0), logits.gather(-1, each[..., None])[..., 0])
    last = cache.decompose_resid(pos_slice=-1)
    close(cache.logit_attrs(last, 17, pos_slice=-1, has_batch_dim=True).sum(0), logits[:, -1, 17])


def test_logit_attrs_of_words(text_model: HookedBilinearTransformer, texts: list[str]) -> None:
    """Words stand for their single tokens."""
    logits, cache = text_model.run_with_cache(texts[0])
    fox, owl = text_model.to_single_token("fox"), text_model.to_single_token("owl")
    attrs = cache.logit_attrs(cache.decompose_resid(), "fox", incorrect_tokens="owl")
    close(attrs.sum(0), logits[..., fox] - logits[..., owl])


def test_neuron_results(cached: tuple) -> None:
    """Each hidden unit's contribution is its post-activation times its row of W_out; with b_out they sum to mlp_out."""
    model, _, cache = cached
    for layer in range(model.cfg.n_layers):
        neurons = cache.get_neuron_results(layer)
        assert neurons.shape == (*TOKENS.shape, model.cfg.d_mlp, model.cfg.d_model)
        close(neurons.sum(-2) + model.b_out[layer], cache["mlp_out", layer])
    stack = cache.stack_neuron_results(-1, incl_remainder=True)
    close(stack.sum(0), cache["resid_post", model.cfg.n_layers - 1])


@pytest.mark.parametrize("expand_neurons", [True, False])
def test_full_resid_decomposition(cached: tuple, expand_neurons: bool) -> None:
    """Heads, neurons (or MLPs), embedding and biases: nothing is counted twice, nothing is left out."""
    model, logits, cache = cached
    n_layers = model.cfg.n_layers
    parts, labels = cache.get_full_resid_decomposition(expand_neurons=expand_neurons, return_labels=True)
    assert len(parts) == len(labels) == len(set(labels))
    close(parts.sum(0), cache["resid_post", n_layers - 1])
    normalized = cache.get_full_resid_decomposition(expand_neurons=expand_neurons, apply_ln=True)
    close(cache.logit_attrs(parts, 17).sum(0), logits[..., 17])
    close(normalized.sum(0), cache["ln_final.hook_normalized"])
    for layer in range(n_layers):
        into_mlp = cache.get_full_resid_decomposition(layer, mlp_input=True, expand_neurons=expand_neurons)
        close(into_mlp.sum(0), cache["resid_mid", layer])
