"""TransformerLens' bridge boots our models, and shows the one computation there is under its canonical names.

The bridge calls the very modules of the hooked model, so agreement is to the last bit but for the choice between the
fused attention kernel and the explicit one; 1e-5 allows for that.
"""

import os
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformer_lens import SVDInterpreter
from transformer_lens.factories.architecture_adapter_factory import ArchitectureAdapterFactory
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoTokenizer

from bilens.errors import ArgumentError, TokenizationError
from bilens.model.bridge import BilinearArchitectureAdapter
from bilens.model.hf import BilinearForCausalLM
from bilens.model.transformer import HookedBilinearTransformer
from tests.conftest import Reference, make_model

CLOSE: dict[str, Any] = {"atol": 1e-5, "rtol": 1e-5}
VARIANTS: list[dict[str, Any]] = [
    {"bias": True, "n_layer": 3},
    {"gate": "silu"},
    {"bilinear": False, "gate": "gelu", "bias": True},
    {"normalization": False},
    {"attention": "bilinear", "normalization": False, "d_head": 6, "residual_scale": 0.4},
    {"attention": "quadratic", "rotary": False},
]


def boot(model: HookedBilinearTransformer, folder: Path) -> Any:
    model.save_pretrained(folder)
    return TransformerBridge.boot_transformers(str(folder), device="cpu")


@pytest.fixture
def pair(tokenizer: Any, tmp_path: Path) -> tuple[Any, HookedBilinearTransformer, Tensor]:
    """A bridge, the model it was saved from, and tokens."""
    model = make_model(tokenizer=tokenizer, bias=True, n_layer=3)
    return boot(model, tmp_path), model, model.to_tokens("the old gardener lost three stones")


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@torch.no_grad()
def test_every_activation_under_its_name(variant: dict[str, Any], tokenizer: Any, tmp_path: Path) -> None:
    """Logits, loss and every activation of the model's own cache, in every variant; and each weight."""
    model = make_model(tokenizer=tokenizer, **variant)
    bridge = boot(model, tmp_path)
    tokens = model.to_tokens("the old gardener lost three stones")
    assert bridge.original_model(tokens).attentions is None, "patterns are at their hook points, and only there"
    torch.testing.assert_close(bridge(tokens), model(tokens), **CLOSE)
    torch.testing.assert_close(bridge(tokens, return_type="loss"), model(tokens, return_type="loss"), **CLOSE)
    found, expected = bridge.run_with_cache(tokens)[1], model.run_with_cache(tokens)[1]
    for name, activation in expected.items():
        torch.testing.assert_close(found[name], activation, **CLOSE)
    weights = ["W_E", "W_U", "b_U", "W_V", "W_O", "W_in", "W_out", "b_in", "b_out"]
    weights += ["W_Q", "W_K"] if "q" in model.cfg.attention_parts else []
    for name in [*weights, *(["W_gate"] if model.cfg.bilinear else [])]:
        assert torch.equal(getattr(bridge, name), getattr(model, name)), name
    assert torch.equal(bridge.OV.AB, model.OV.AB)
    for part in model.cfg.attention_parts:
        of_block = (getattr(m.blocks[1].attn, f"W_{part.upper()}") for m in (bridge, model))
        assert torch.equal(*of_block), part
    for name in ("act_fn", "d_head", "d_mlp", "d_vocab", "eps", "gated_mlp", "n_ctx", "n_heads", "normalization_type"):
        assert getattr(bridge.cfg, name) == getattr(model.cfg, name), name


@torch.no_grad()
def test_the_published_checkpoint(ts_micro: Reference) -> None:
    """A published folder, whose config names no model_type, goes in as a loaded model, with our tokenizer."""
    bridge = TransformerBridge.boot_transformers(
        "ts-micro", hf_model=BilinearForCausalLM.from_pretrained(ts_micro.folder), tokenizer=ts_micro.model.tokenizer
    )
    for prompt in ts_micro.prompts:
        tokens = ts_micro.model.to_tokens(prompt)
        assert torch.equal(bridge.to_tokens(prompt), tokens)
        torch.testing.assert_close(bridge(tokens), ts_micro.model(tokens), **CLOSE)


@torch.no_grad()
def test_hooks_act_on_the_stream_itself(pair: tuple) -> None:
    """Editing any canonical point gives what editing it on the model gives, and nothing stays behind."""
    bridge, model, tokens = pair
    before = bridge(tokens)

    def scaled(x: Tensor, hook: Any) -> Tensor:
        return x * torch.linspace(0.5, 1.5, x.shape[-1])  # not one factor for all: a norm would undo it

    for name in model.hook_dict:
        if model._is_switched_off(name):
            continue
        expected = model.run_with_hooks(tokens, fwd_hooks=[(name, scaled)])
        assert (expected - before).abs().max() > 1e-4, name
        torch.testing.assert_close(bridge.run_with_hooks(tokens, fwd_hooks=[(name, scaled)]), expected, **CLOSE)
    assert torch.equal(bridge(tokens), before)


@torch.no_grad()
def test_positions_are_cut_of_every_activation(pair: tuple) -> None:
    """`pos_slice` cuts positions, not heads, at the points that TransformerLens does not know either."""
    bridge, model, tokens = pair
    for pos_slice in (2, [0, -1]):
        found, expected = (m.run_with_cache(tokens, pos_slice=pos_slice)[1] for m in (bridge, model))
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], **CLOSE)


@torch.no_grad()
def test_positions_are_cut_of_both_factors(tokenizer: Any, tmp_path: Path) -> None:
    """The queries, keys and scores of bilinear attention have their positions where the others have them."""
    model = make_model(tokenizer=tokenizer, attention="bilinear")
    bridge, tokens = boot(model, tmp_path), model.to_tokens("the old gardener lost three stones")
    whole = model.run_with_cache(tokens)[1]
    found, expected = (m.run_with_cache(tokens, pos_slice=[0, -1])[1] for m in (bridge, model))
    for name in expected:
        axis = 2 if "scores" in name or name.endswith("pattern") else 1
        torch.testing.assert_close(expected[name], whole[name].index_select(axis, torch.tensor([0, 6])), **CLOSE)
        torch.testing.assert_close(found[name], expected[name], **CLOSE)


@torch.no_grad()
def test_weights_can_be_edited_through_the_bridge(pair: tuple) -> None:
    """In place and by assignment: what is shown, and computed, is what was written."""
    bridge, model, tokens = pair
    for name in ("W_O", "W_Q", "W_in", "b_out"):
        part = "attn" if name in ("W_O", "W_Q") else "mlp"
        for write in (
            lambda owner, name: getattr(owner, name).mul_(2),
            lambda owner, name: setattr(owner, name, nn.Parameter(3 * getattr(owner, name))),
        ):
            for blocks in (bridge.blocks, model.blocks):
                write(getattr(blocks[1], part), name)
            assert torch.equal(getattr(getattr(bridge.blocks[1], part), name), getattr(model, name)[1])
            torch.testing.assert_close(bridge(tokens), model(tokens), **CLOSE)
    with pytest.raises(ArgumentError, match="no bias"):
        bridge.blocks[0].attn.b_O = nn.Parameter(torch.ones(16))


@torch.no_grad()
def test_the_input_of_an_mlp_is_shown_on_request(pair: tuple) -> None:
    """`set_use_hook_mlp_in` shows what ln2 reads, and to edit it leaves the stream as it is; `mlp.hook_in` is after."""
    bridge, _, tokens = pair
    name = "blocks.1.hook_mlp_in"
    bridge.set_use_hook_mlp_in(True)
    try:
        _, cache = bridge.run_with_cache(tokens)
        assert torch.equal(cache[name], cache["blocks.1.hook_resid_mid"])
        assert torch.equal(cache["blocks.1.mlp.hook_in"], cache["blocks.1.ln2.hook_normalized"])
        with bridge.hooks(fwd_hooks=[(name, lambda x, hook: x * torch.linspace(0.5, 1.5, 16))]):
            _, changed = bridge.run_with_cache(tokens)
        assert torch.equal(changed["blocks.1.hook_resid_mid"], cache["blocks.1.hook_resid_mid"])
        assert not torch.equal(changed["blocks.1.hook_mlp_out"], cache["blocks.1.hook_mlp_out"])
    finally:
        bridge.set_use_hook_mlp_in(False)
    for absent in ("hook_attn_in", "hook_q_input"):
        assert f"blocks.1.{absent}" not in bridge.hook_dict
        with pytest.raises(NotImplementedError):
            bridge.set_use_attn_in(True)


@torch.no_grad()
def test_head_results_are_made_on_request(pair: tuple) -> None:
    """`set_use_attn_result` switches `attn.hook_result` on and off."""
    bridge, model, tokens = pair
    name = "blocks.1.attn.hook_result"
    assert name not in bridge.run_with_cache(tokens)[1]
    bridge.set_use_attn_result(True)
    model.set_use_attn_result(True)
    found, expected = bridge.run_with_cache(tokens)[1][name], model.run_with_cache(tokens)[1][name]
    torch.testing.assert_close(found, expected, **CLOSE)
    bridge.set_use_attn_result(False)
    assert name not in bridge.run_with_cache(tokens)[1]


@torch.no_grad()
def test_reading_the_cache_of_a_bridge(pair: tuple) -> None:
    """Logit lens, decomposition, shorthand names and the SVD interpreter as on the model."""
    bridge, model, tokens = pair
    found, expected = bridge.run_with_cache(tokens)[1], model.run_with_cache(tokens)[1]
    assert torch.equal(found["pattern", 1], expected["pattern", 1])
    for ask in (
        lambda cache: cache.accumulated_resid(apply_ln=True),
        lambda cache: cache.decompose_resid(mode="all"),
        lambda cache: cache.stack_head_results(pos_slice=-1),
        lambda cache: cache.logit_attrs(cache.decompose_resid(), tokens=tokens, has_batch_dim=True),
    ):
        torch.testing.assert_close(ask(found), ask(expected), **CLOSE)
    for kind in ("OV", "w_in", "w_out"):
        vectors = [
            SVDInterpreter(m).get_singular_vectors(kind, 1, num_vectors=3, head_index=1) for m in (bridge, model)
        ]
        torch.testing.assert_close(vectors[0].abs(), vectors[1].abs(), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_stop_generate_and_pad(pair: tuple) -> None:
    """stop_at_layer, greedy generation with a cache, and a left-padded batch agree with the model."""
    bridge, model, tokens = pair
    torch.testing.assert_close(
        bridge.run_with_cache(tokens, stop_at_layer=2)[0], model(tokens, stop_at_layer=2), **CLOSE
    )
    assert torch.equal(
        bridge.generate(tokens, max_new_tokens=6, do_sample=False, verbose=False, stop_at_eos=False),
        model.generate(tokens, 6, do_sample=False, stop_at_eos=False),
    )
    texts = ["the old gardener lost three stones", "Mira"]
    mask = model.attention_mask(texts, padding_side="left").bool()
    found = bridge(model.to_tokens(texts, padding_side="left"), attention_mask=mask.long())
    for i, text in enumerate(texts):
        torch.testing.assert_close(found[i, mask[i]], model(text)[0], **CLOSE)


def test_a_folder_without_a_tokenizer(text_model: HookedBilinearTransformer, tmp_path: Path) -> None:
    """It is said where one is missed, and at once; one that is given serves."""
    text_model.save_pretrained(tmp_path / "text")
    folder = tmp_path / "tokens"
    make_model(d_vocab=len(text_model.tokenizer)).save_pretrained(folder)
    with pytest.raises(TokenizationError, match=r"has no tokenizer\.json.*boot_transformers\(\.\.\., tokenizer="):
        TransformerBridge.boot_transformers(str(folder), device="cpu")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "text")
    bridge = TransformerBridge.boot_transformers(str(folder), device="cpu", tokenizer=tokenizer)
    assert bridge("the fox").shape == (1, 3, bridge.cfg.d_vocab)


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding(pair: tuple, side: Any) -> None:
    """Padded texts, and left-padded tokens without a mask, come out as each text alone does."""
    bridge, model, _ = pair
    texts = ["the old gardener lost three stones", "Mira"]
    kept = model.attention_mask(texts, padding_side=side).bool()
    tokens = model.to_tokens(texts, padding_side=side)
    for found in (bridge(texts, padding_side=side), bridge(tokens), bridge(tokens, attention_mask=kept.long())):
        for i, text in enumerate(texts):
            torch.testing.assert_close(found[i, kept[i]], model(text)[0], **CLOSE)


def test_compatibility_mode(pair: tuple) -> None:
    """Without weight processing it changes nothing; processing is refused, since there is nothing to process."""
    bridge, model, tokens = pair
    bridge.enable_compatibility_mode(no_processing=True)
    torch.testing.assert_close(bridge(tokens), model(tokens), **CLOSE)
    with pytest.raises(NotImplementedError, match="no_processing=True"):
        bridge.enable_compatibility_mode()
    torch.testing.assert_close(bridge(tokens), model(tokens), **CLOSE)


def test_the_entry_point() -> None:
    """pyproject.toml announces the adapter in TransformerLens' group, and the name resolves to it."""
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    group = "transformer_lens.architectures"
    (name, value), *_ = project["entry-points"][group].items()
    assert EntryPoint(name, value, group).load() is BilinearArchitectureAdapter
    assert name == BilinearForCausalLM.__name__
    assert ArchitectureAdapterFactory._adapters[name] is BilinearArchitectureAdapter


def test_importing_the_classes_is_enough(text_model: HookedBilinearTransformer, tmp_path: Path) -> None:
    """In a fresh interpreter `import bilens.model.hf` is enough for a saved folder; TransformerLens is silent."""
    text_model.save_pretrained(tmp_path)
    script = (
        "import sys, bilens.model.hf\n"
        "from transformer_lens.model_bridge import TransformerBridge\n"
        "print(TransformerBridge.boot_transformers(sys.argv[1], device='cpu').cfg.architecture)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True, env=environment
    )
    assert run.stdout.strip() == "BilinearForCausalLM"
    assert "adapter" not in run.stderr
