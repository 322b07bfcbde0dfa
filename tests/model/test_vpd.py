"""The given program, whose config and tensors have names of their own: what its own code computes, in and out again."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformers import PreTrainedTokenizerFast

from bilens.errors import CheckpointError
from bilens.model.hf import BilinearForCausalLM
from bilens.model.loading import load_model

SIZES = {"n_layers": 2, "seq_len": 16, "d_model": 8, "d_mlp": 12, "d_head": 6, "vocab_size": 11}


@pytest.fixture(scope="session")
def truth(shared: Path) -> Path:
    """`shared/truth`; without that folder the test is skipped."""
    if not (shared / "truth").exists():
        pytest.skip(f"the known program is not here: no folder {shared / 'truth'}")
    return shared / "truth"


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A small random model in this format; the test may damage it."""
    generator = torch.Generator().manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {"embed.weight": (11, 8), "unembed.weight": (11, 8), "final_norm.scale": (8,)}
    for layer in range(2):
        at = f"blocks.{layer}"
        shapes |= {f"{at}.attn.{part}_proj.weight": (6, 8) for part in ("q1", "q2", "k1", "k2", "v")}
        shapes |= {f"{at}.attn.o_proj.weight": (8, 6), f"{at}.norm_attn.scale": (8,), f"{at}.norm_mlp.scale": (8,)}
        shapes |= {f"{at}.mlp.w_m.weight": (12, 8), f"{at}.mlp.w_n.weight": (12, 8), f"{at}.mlp.w_proj.weight": (8, 12)}
    save_file(
        {name: torch.randn(shape, generator=generator) * 0.3 for name, shape in shapes.items()},
        tmp_path / "model.safetensors",
    )
    (tmp_path / "config.json").write_text(json.dumps(SIZES | {"norm_type": "channel", "norm_init": 1.0}))
    return tmp_path


def edit(folder: Path, tensors: Callable[[dict[str, Tensor]], Any] | None = None, **config: Any) -> None:
    """Change tensors, and keys of the config; `...` removes one."""
    if tensors is not None:
        there = load_file(folder / "model.safetensors")
        tensors(there)
        save_file(there, folder / "model.safetensors")
    changed = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps({key: v for key, v in changed.items() if v is not ...}))


def numbers(n: int, folder: Path) -> Any:
    """A tokenizer whose words are the numbers of the tokens."""
    words = Tokenizer(WordLevel({str(i): i for i in range(n)}, unk_token="0"))
    words.save(str(folder / "tokenizer.json"))
    return PreTrainedTokenizerFast.from_pretrained(folder, bos_token="0", eos_token="1", pad_token="2")


@torch.no_grad()
def test_the_given_program_gives_its_logits(truth: Path, tmp_path: Path) -> None:
    """As it lies there, as a Hugging Face model, saved and loaded again, and through TransformerLens' bridge: every
    logit to 1e-4 of the largest, which is 218. The bridge boots what was saved, since it asks for `model_type`, and
    with a tokenizer that is made up, since TransformerLens' bridge has to have one."""
    expected = load_file(truth / "expected.safetensors")
    tokens = expected["input_ids"]
    model = load_model(truth, device="cpu")
    assert (model.cfg.attention, model.cfg.n_heads, model.cfg.d_head, model.cfg.d_model) == ("bilinear", 1, 32, 64)
    assert model.cfg.normalization_type is None
    model.save_pretrained(tmp_path)
    again = load_model(tmp_path, device="cpu")
    assert torch.equal(again(tokens), model(tokens))
    hf = BilinearForCausalLM.from_pretrained(truth)
    bridge: Any = TransformerBridge.boot_transformers(str(tmp_path), device="cpu", tokenizer=numbers(63, tmp_path))
    saved: Any = BilinearForCausalLM.from_pretrained(tmp_path)
    for logits in (
        model(tokens),
        hf(tokens, attention_mask=torch.ones_like(tokens)).logits,
        saved(tokens, attention_mask=torch.ones_like(tokens)).logits,
        bridge(tokens),
    ):
        assert (logits - expected["logits"]).abs().max() < 1e-4 * expected["logits"].abs().max()


@torch.no_grad()
def test_the_formula_of_the_format(small: Path) -> None:
    """Token by token, from the stored tensors: what the folded model computes, scales included."""
    w = {name: tensor.double() for name, tensor in load_file(small / "model.safetensors").items()}
    tokens = torch.tensor([[3, 1, 4, 1, 5]])
    angles = torch.arange(5.0).double()[:, None] * 10_000.0 ** (-torch.arange(3).double() / 3)
    turn = torch.polar(torch.ones_like(angles), angles)

    def rotated(x: Tensor) -> Tensor:
        turned = torch.complex(x[:, :3], x[:, 3:]) * turn
        return torch.cat([turned.real, turned.imag], 1)

    x = w["embed.weight"][tokens[0]]
    for layer in range(2):
        at = f"blocks.{layer}"
        read = x * w[f"{at}.norm_attn.scale"]
        q1, k1, q2, k2 = (rotated(read @ w[f"{at}.attn.{n}_proj.weight"].T) for n in ("q1", "k1", "q2", "k2"))
        pattern = ((q1 @ k1.T) * (q2 @ k2.T) / 6).tril()
        x = x + pattern @ (read @ w[f"{at}.attn.v_proj.weight"].T) @ w[f"{at}.attn.o_proj.weight"].T
        read = x * w[f"{at}.norm_mlp.scale"]
        hidden = (read @ w[f"{at}.mlp.w_m.weight"].T) * (read @ w[f"{at}.mlp.w_n.weight"].T)
        x = x + hidden @ w[f"{at}.mlp.w_proj.weight"].T
    logits = (x * w["final_norm.scale"]) @ w["unembed.weight"].T
    found = load_model(small, device="cpu", dtype=torch.float64)(tokens)[0]
    # The scales were folded in float32.
    torch.testing.assert_close(found, logits, atol=1e-6 * float(logits.abs().max()), rtol=0)


@torch.no_grad()
def test_a_model_without_scales(small: Path) -> None:
    """`norm_type: none` is the model whose scales are 1."""
    edit(small, lambda t: [t[name].fill_(1.0) for name in t if name.endswith(".scale")])
    tokens = torch.tensor([[3, 1, 4]])
    ones = load_model(small, device="cpu")(tokens)
    edit(small, lambda t: [t.pop(name) for name in list(t) if name.endswith(".scale")], norm_type="none")
    assert torch.equal(load_model(small, device="cpu")(tokens), ones)


BAD: dict[str, tuple[Callable[[dict[str, Tensor]], Any] | None, dict[str, Any], str]] = {
    "no scale": (lambda t: t.pop("blocks.1.norm_mlp.scale"), {}, r"no tensor 'blocks.1.norm_mlp.scale'"),
    "scales too many": (None, {"norm_type": "none"}, r"\['blocks.0.norm_attn.scale'.* have no place"),
    "another norm": (None, {"norm_type": "chanel"}, "norm_type is 'chanel', expected one of channel, none.*'channel'"),
    "another attention": (
        None,
        {"attention": "softmax"},
        "attention is 'softmax', expected one of bilinear, quadratic",
    ),
    "another base": (None, {"rope_base": 5e5}, "rope_base is 500000.0, which bilens does not implement"),
    "no size": (None, {"d_head": ...}, "config.json has no 'd_head'"),
    "more layers": (None, {"n_layers": 3}, r"no tensor 'blocks.2.norm_attn.scale'"),
    "more heads": (None, {"n_heads": 2}, "n_heads is 2, which bilens does not implement"),
    "an unknown key": (None, {"norm_place": "post"}, r"the keys \['norm_place'\] are none of this format"),
}


@pytest.mark.parametrize(("damage", "config", "message"), BAD.values(), ids=BAD.keys())
def test_what_is_missing_or_unknown_is_named(
    small: Path, damage: Callable[[dict[str, Tensor]], Any] | None, config: dict[str, Any], message: str
) -> None:
    load_model(small, device="cpu")
    edit(small, damage, **config)
    with pytest.raises(CheckpointError, match=message):
        load_model(small, device="cpu")
