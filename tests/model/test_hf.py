"""The Hugging Face class: published names in and out, transformers' conventions, and one forward pass behind all.

The class calls the hooked model, so logits are compared to the bit where both take the same attention path, and to 1e-5
(float32 rounding of sums of a few dozen terms) where one takes the fused kernel and the other the explicit one.
"""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    Trainer,
    TrainingArguments,
    pipeline,
)

from bilens.errors import ArgumentError, CheckpointError, ContextLengthError, OutOfRangeError
from bilens.model.hf import BilinearConfig, BilinearForCausalLM, stored
from bilens.model.hf_tokenizer import BilinearTokenizer
from bilens.model.loading import load_model
from bilens.model.transformer import HookedBilinearTransformer
from tests.conftest import Reference, make_model

CLOSE: dict[str, Any] = {"atol": 1e-5, "rtol": 1e-5}
TEXTS = ["a tired owl found three stones near", "the fox"]
TOKENS = torch.tensor([[1, 7, 42, 7, 3, 9], [2, 4, 8, 16, 32, 5]])
VARIANTS: list[dict[str, Any]] = [
    {},
    {"bias": True, "gate": "relu", "n_head": 4},
    {"bilinear": False, "gate": "gelu", "bias": True},
    {"normalization": False, "n_layer": 3},
    {"scale_attn": False, "bias": True, "attention_bias": True},
    {"attention": "bilinear", "normalization": False, "d_head": 6, "residual_scale": 0.4},
    {"attention": "quadratic", "attention_scale": "d_head^2", "rotary": False},
]


@pytest.fixture
def hf() -> BilinearForCausalLM:
    return BilinearForCausalLM.from_hooked(make_model(bias=True))


# --- checkpoints ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_published_folder(ts_micro: Reference) -> None:
    """A published folder, without model_type, loads with nothing missing or left over, and gives the same logits."""
    model, info = BilinearForCausalLM.from_pretrained(ts_micro.folder, output_loading_info=True)
    assert not any(info.values())
    assert model.config.vocab_size == 4096
    for prompt in ts_micro.prompts:
        tokens = ts_micro.model.to_tokens(prompt)
        assert torch.equal(model(tokens).logits, ts_micro.model(tokens))


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@torch.no_grad()
def test_what_either_saves_both_load(variant: dict[str, Any], tokenizer: Any, tmp_path: Path) -> None:
    """HookedBilinearTransformer's folder through Auto classes, that one's through load_model: same tensors, logits."""
    model = make_model(tokenizer=tokenizer, **variant)
    model.save_pretrained(tmp_path / "ours")
    assert type(AutoConfig.from_pretrained(tmp_path / "ours")) is BilinearConfig
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert type(theirs) is BilinearForCausalLM
    assert torch.equal(theirs(TOKENS).logits, model(TOKENS))
    theirs.save_pretrained(tmp_path / "theirs")
    tokenizer.save_pretrained(tmp_path / "theirs")
    saved, again = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "theirs"))
    assert saved.keys() == again.keys()
    assert all(torch.equal(saved[name], again[name]) for name in saved)
    assert any(name.endswith("rotary.inv_freq") for name in saved)
    back = load_model(tmp_path / "theirs", device="cpu")
    assert torch.equal(back(TOKENS), model(TOKENS))
    for key in ("n_head", "n_layer", "n_ctx", "d_model", "d_hidden", "bilinear", "gate", "bias", "normalization"):
        assert back.cfg.published[key] == theirs.config.to_dict()[key] == getattr(theirs.config, key)


def test_published_names(hf: BilinearForCausalLM) -> None:
    """state_dict has the published names and nothing else, each tensor once."""
    layers = [
        f"transformer.h.{layer}.{part}" for layer in range(2) for part in ("attn.qkv", "attn.o", "mlp.w", "mlp.p")
    ]
    expected = {"transformer.wte.weight", "lm_head.weight", *(f"{name}.weight" for name in layers)}
    expected |= {f"{name}.bias" for name in layers if ".mlp." in name}
    assert set(hf.state_dict()) == {name for name, _ in hf.named_parameters()} == expected
    assert hf.num_parameters() == sum(weight.numel() for weight in hf.hooked.parameters())


def test_shards_dtypes_and_extra_keys(tmp_path: Path) -> None:
    """Sharded weights, half precision, and a vocabulary size counted from the weights whatever the config says."""
    model = make_model()
    model.save_pretrained(tmp_path / "one")
    hf = BilinearForCausalLM.from_pretrained(tmp_path / "one", dtype=torch.bfloat16)
    assert hf.dtype == hf.hooked.cfg.dtype == hf.hooked.W_E.dtype == torch.bfloat16
    rotary = hf.hooked.blocks[0].attn.rotary
    assert torch.equal(rotary.inv_freq, model.blocks[0].attn.rotary.inv_freq), "frequencies stay float32"
    hf.float().save_pretrained(tmp_path / "shards", max_shard_size="4KB")
    assert (tmp_path / "shards" / "model.safetensors.index.json").exists()
    config = json.loads((tmp_path / "shards" / "config.json").read_text())
    (tmp_path / "shards" / "config.json").write_text(json.dumps(config | {"vocab_size": 7, "note": "kept"}))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "shards")
    assert again.config.vocab_size == stored(tmp_path / "shards")[1] == 50
    assert again.config.note == again.hooked.cfg.published["note"] == "kept"
    assert torch.equal(again(TOKENS).logits, hf(TOKENS).logits)


def test_bad_checkpoints(tmp_path: Path) -> None:
    """An unknown gate, a d_model that the heads do not divide, and a folder without weights are refused by name."""
    with pytest.raises(CheckpointError, match=r"'rleu'.*Did you mean 'relu'"):
        BilinearForCausalLM(BilinearConfig(gate="rleu"))
    with pytest.raises(CheckpointError, match="d_model 256 is not divisible by n_head 3"):
        BilinearForCausalLM(BilinearConfig(n_head=3))
    BilinearConfig().save_pretrained(tmp_path)
    with pytest.raises(OSError, match=r"model\.safetensors"):
        BilinearForCausalLM.from_pretrained(tmp_path)


# --- sharing ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_weights_and_hooks_are_shared(hf: BilinearForCausalLM) -> None:
    """from_hooked and to_hooked copy nothing: a write or a hook on either side acts on both."""
    model = hf.to_hooked()
    assert model is hf.hooked
    assert hf.transformer.wte.weight is model.embed.weight
    assert BilinearForCausalLM.from_hooked(model).lm_head is hf.lm_head
    before = hf(TOKENS).logits
    with model.hooks([("blocks.0.hook_mlp_out", lambda x, hook: torch.zeros_like(x))]):
        ablated = hf(TOKENS).logits
    model.blocks[0].mlp.p.weight.zero_()
    model.blocks[0].mlp.p.bias.zero_()
    assert torch.equal(hf(TOKENS).logits, ablated)
    assert not torch.equal(before, ablated)


def test_casting_and_copying(hf: BilinearForCausalLM) -> None:
    """The hooked model follows casts of the Hugging Face one; a deep copy is a model of its own."""
    other = copy.deepcopy(hf).double()
    assert other.hooked.cfg.dtype == other.hooked(TOKENS).dtype == torch.float64
    assert hf.hooked.cfg.dtype == torch.float32
    assert other.hooked is not hf.hooked
    assert other.hooked.embed is other.transformer.wte
    torch.testing.assert_close(other(TOKENS).logits.float(), hf(TOKENS).logits, **CLOSE)


def test_resizing_the_vocabulary(hf: BilinearForCausalLM) -> None:
    """resize_token_embeddings keeps the old rows, and both sides have the new ones."""
    before = hf(TOKENS).logits
    hf.resize_token_embeddings(60)
    assert hf.hooked.cfg.d_vocab == hf.config.vocab_size == 60
    assert hf.hooked.unembed.head is hf.lm_head
    assert hf.hooked.embed is hf.transformer.wte
    assert hf(torch.full_like(TOKENS, 59)).logits.shape == (2, 6, 60)
    with pytest.raises(OutOfRangeError, match="0 to 59"):
        hf(torch.full_like(TOKENS, 60))
    torch.testing.assert_close(hf(TOKENS).logits[..., :50], before, **CLOSE)


def test_new_weights() -> None:
    """From a config alone: zero biases, and the deviations that HookedBilinearTransformer starts with."""
    torch.manual_seed(0)
    config = BilinearConfig(n_layer=2, d_model=64, d_hidden=96, vocab_size=300, bias=True)
    for name, weight in BilinearForCausalLM(config).named_parameters():
        std = 0.02 * (0.5 if name.endswith(("attn.o.weight", "mlp.p.weight")) else 1.0)
        if name.endswith(".bias"):
            assert not weight.any()
        else:  # of 4,096 draws or more the deviation is known to 1.1 %; five times that
            assert abs(weight.std().item() / std - 1) < 0.06, name


# --- transformers' conventions ----------------------------------------------------------------------------------------


def test_labels(hf: BilinearForCausalLM) -> None:
    """The loss shifts inside, leaves -100 out, and is the hooked model's where labels are the tokens."""
    labels = TOKENS.clone()
    output = hf(TOKENS, labels=labels)
    torch.testing.assert_close(output.loss, hf.hooked(TOKENS, return_type="loss"), **CLOSE)
    labels[0, 3:] = -100
    found = hf(TOKENS, labels=labels).loss
    expected = torch.cat([output.logits[0, :2], output.logits[1, :-1]])
    torch.testing.assert_close(found, F.cross_entropy(expected, torch.cat([labels[0, 1:3], labels[1, 1:]])), **CLOSE)
    found.backward()
    assert hf.transformer.wte.weight.grad.abs().max() > 0


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding(hf: BilinearForCausalLM, side: str) -> None:
    """Padding on either side changes no logit of a token."""
    short, n_pad = TOKENS[1, :4], 2
    pad = torch.zeros(n_pad, dtype=torch.long)
    row, keep = (torch.cat([pad, short]), slice(n_pad, None)) if side == "left" else (torch.cat([short, pad]), slice(4))
    mask = torch.ones_like(TOKENS)
    mask[1] = 0
    mask[1, keep] = 1
    logits = hf(torch.stack([TOKENS[0], row]), attention_mask=mask).logits
    torch.testing.assert_close(logits[1, keep], hf(short[None]).logits[0], **CLOSE)
    torch.testing.assert_close(logits[0], hf(TOKENS[:1]).logits[0], **CLOSE)


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_the_loss_of_padded_tokens(text_model: HookedBilinearTransformer, side: Any) -> None:
    """With labels that are the tokens, padding and what follows it left out or not: the texts' own mean loss.

    Without a mask, leading padding is seen by itself; what is behind a text the labels must leave out.
    """
    hf = BilinearForCausalLM.from_hooked(text_model)
    tokens = text_model.to_tokens(TEXTS, padding_side=side)
    mask = text_model.attention_mask(TEXTS, padding_side=side)
    losses = torch.cat([text_model(text, return_type="loss", loss_per_token=True)[0] for text in TEXTS])
    left_out = tokens.masked_fill(mask == 0, -100)
    for labels, attention_mask in ((tokens, mask), (left_out, mask), (left_out, None)):
        found = hf(tokens, attention_mask=attention_mask, labels=labels)
        torch.testing.assert_close(found.loss, losses.mean(), **CLOSE)
        for row, kept, text in zip(found.logits, mask.bool(), TEXTS, strict=True):
            torch.testing.assert_close(row[kept], text_model(text)[0], **CLOSE)
    found = hf(tokens, attention_mask=mask, labels=tokens, num_items_in_batch=7).loss
    torch.testing.assert_close(found, losses.sum() / 7, **CLOSE)


@torch.no_grad()
def test_what_else_transformers_passes(hf: BilinearForCausalLM) -> None:
    """Positions that the mask implies, one kind of token and chosen logits are taken; anything else is refused."""
    mask = torch.ones_like(TOKENS)
    mask[0, :2] = 0
    whole = hf(TOKENS, attention_mask=mask)
    positions = (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)
    arguments = {"attention_mask": mask, "position_ids": positions, "token_type_ids": torch.zeros_like(TOKENS)}
    assert torch.equal(hf(TOKENS, cache_position=torch.arange(6), **arguments).logits, whole.logits)
    assert torch.equal(hf(TOKENS, position_ids=torch.arange(6)[None]).logits, hf(TOKENS).logits)
    for wanted, kept in ((2, slice(-2, None)), (torch.tensor([0, 5]), [0, 5]), (0, slice(None))):
        output = hf(TOKENS, attention_mask=mask, logits_to_keep=wanted, labels=TOKENS, output_hidden_states=True)
        torch.testing.assert_close(output.logits, whole.logits[:, kept], **CLOSE)
        assert output.hidden_states[-1].shape[1] == 6
        torch.testing.assert_close(
            hf(TOKENS, attention_mask=mask, logits_to_keep=wanted).logits, output.logits, **CLOSE
        )
    cache = DynamicCache()
    hf(TOKENS[:, :4], past_key_values=cache)
    step = hf(
        TOKENS[:, 4:], past_key_values=cache, position_ids=torch.tensor([[4, 5]]), cache_position=torch.arange(4, 6)
    )
    torch.testing.assert_close(step.logits, hf(TOKENS).logits[:, 4:], **CLOSE)
    for bad, message in (
        (
            {"position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]])},
            r"row 0 are \[0, 1, 2, 0, 1, 2\], expected \[0, 1, 2, 3,",
        ),
        ({"position_ids": torch.arange(6)[None], "attention_mask": mask}, r"expected \[0, 0, 0, 1, 2, 3\]"),
        ({"cache_position": torch.arange(1, 7)}, "expected 0 to 5"),
        ({"token_type_ids": torch.ones_like(TOKENS)}, "one kind of token"),
        ({"attention_mask": torch.ones(2, 1, 6, 6)}, r"shape \(2, 1, 6, 6\)"),
    ):
        with pytest.raises(ArgumentError, match=message):
            hf(TOKENS, **bad)


@torch.no_grad()
def test_a_cache_in_pieces(hf: BilinearForCausalLM) -> None:
    """Run in pieces over transformers' cache, left padding included, the logits are those of one run."""
    mask = torch.ones_like(TOKENS)
    mask[0, :2] = 0
    whole = hf(TOKENS, attention_mask=mask).logits
    cache, pieces = DynamicCache(), []
    for first, last in ((0, 3), (3, 4), (4, 6)):
        output = hf(TOKENS[:, first:last], attention_mask=mask[:, :last], past_key_values=cache)
        assert output.past_key_values is cache
        pieces.append(output.logits)
    assert cache.get_seq_length() == 6
    real = mask.bool()
    torch.testing.assert_close(torch.cat(pieces, 1)[real], whole[real], **CLOSE)
    assert hf(TOKENS).past_key_values is None
    assert hf(TOKENS, use_cache=True).past_key_values.get_seq_length() == 6
    with pytest.raises(ValueError, match=r"attention_mask has 1 positions, expected 7: the 6 in past_key_values"):
        hf(TOKENS[:, :1], attention_mask=torch.tensor([[1], [0]]), past_key_values=cache)


@torch.no_grad()
def test_inner_activations(hf: BilinearForCausalLM) -> None:
    """hidden_states and attentions are the cached activations; embeddings may stand for tokens; tuples on request."""
    _, cache = hf.hooked.run_with_cache(TOKENS)
    output = hf(TOKENS, output_hidden_states=True, output_attentions=True)
    streams = [*(cache["resid_pre", layer] for layer in range(2)), cache["ln_final.hook_normalized"]]
    for found, expected in zip(output.hidden_states, streams, strict=True):
        assert torch.equal(found, expected)
    for layer, found in enumerate(output.attentions):
        assert torch.equal(found, cache["pattern", layer])
    embedded = hf(inputs_embeds=hf.get_input_embeddings()(TOKENS)).logits
    torch.testing.assert_close(embedded, output.logits, **CLOSE)
    assert torch.equal(hf(TOKENS, return_dict=False)[0], hf(TOKENS).logits)


def test_bad_inputs(hf: BilinearForCausalLM) -> None:
    """Neither or both kinds of input, tokens outside the vocabulary, and more than the context holds."""
    for arguments in ({}, {"input_ids": TOKENS, "inputs_embeds": torch.zeros(2, 6, 16)}):
        with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
            hf(**arguments)
    with pytest.raises(OutOfRangeError, match="token 50 is outside"):
        hf(torch.tensor([[50]]))
    with pytest.raises(ContextLengthError, match="33 tokens do not fit"):
        hf(torch.zeros(1, 33, dtype=torch.long))
    with pytest.raises(ContextLengthError, match="in the cache do not fit"):
        hf.generate(TOKENS[:1], max_new_tokens=40, do_sample=False)


# --- generation -------------------------------------------------------------------------------------------------------


def greedy(hf: BilinearForCausalLM, tokens: Tensor, **kwargs: Any) -> Tensor:
    return hf.generate(tokens, max_new_tokens=10, do_sample=False, **kwargs)


def test_generation(hf: BilinearForCausalLM) -> None:
    """Greedy tokens with and without a cache, and beams, are those of the hooked model or of a run without a cache."""
    assert torch.equal(greedy(hf, TOKENS), hf.hooked.generate(TOKENS, 10, temperature=0))
    assert torch.equal(greedy(hf, TOKENS, use_cache=False), greedy(hf, TOKENS))
    beams = greedy(hf, TOKENS, num_beams=3)
    assert torch.equal(beams, greedy(hf, TOKENS, num_beams=3, use_cache=False))
    assert not torch.equal(beams, greedy(hf, TOKENS))


def test_a_padded_batch_generates_as_its_texts_do(text_model: HookedBilinearTransformer) -> None:
    """Left-padded texts of different lengths, with their mask: each row is its text's own continuation."""
    hf = BilinearForCausalLM.from_hooked(text_model)
    texts = ["the fox", "a tired owl found three stones near", "Mira"]
    tokens = text_model.to_tokens(texts, padding_side="left")
    mask = text_model.attention_mask(texts, padding_side="left")
    batch = greedy(hf, tokens, attention_mask=mask, eos_token_id=None)
    for text, row in zip(texts, batch, strict=True):
        alone = greedy(hf, text_model.to_tokens(text), eos_token_id=None)[0]
        assert torch.equal(row[-10:], alone[-10:])


def test_padding_that_generate_finds(text_model: HookedBilinearTransformer) -> None:
    """Left-padded tokens without a mask, which transformers cannot infer where padding is [EOS], go on as alone."""
    hf = BilinearForCausalLM.from_hooked(text_model)
    batch = greedy(hf, text_model.to_tokens(TEXTS, padding_side="left"), eos_token_id=None)
    for text, row in zip(TEXTS, batch, strict=True):
        assert torch.equal(row[-10:], greedy(hf, text_model.to_tokens(text), eos_token_id=None)[0, -10:])


def test_transformers_still_warns() -> None:
    """Importing TransformerLens silences transformers; after bilens is imported, right padding is warned of again."""
    script = (
        "from bilens.decompose import Decomposer\n"  # imports TransformerLens before the model
        "import logging, torch\n"
        "from bilens.model.hf import BilinearConfig, BilinearForCausalLM\n"
        "print(logging.getLogger('transformers').level)\n"
        "model = BilinearForCausalLM(BilinearConfig(n_layer=1, n_head=2, d_model=8, d_hidden=8, vocab_size=9))\n"
        "mask = torch.tensor([[1, 1, 1], [1, 1, 0]])\n"
        "model.generate(mask, attention_mask=mask, max_new_tokens=2, pad_token_id=0)\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRANSFORMERS_VERBOSITY"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment)
    assert run.stdout.strip() == "30"
    assert "right-padding was detected" in run.stderr


def test_the_saved_tokenizer(text_model: HookedBilinearTransformer, tmp_path: Path) -> None:
    """AutoTokenizer's encodings are to_tokens', one [BOS] however many are written out; decoded, it is proper text."""
    text_model.save_pretrained(tmp_path)
    saved, back = AutoTokenizer.from_pretrained(tmp_path), load_model(tmp_path, device="cpu")
    assert type(saved) is BilinearTokenizer
    for text in ("the fox", "[BOS] the foxes", "[BOS][BOS]the [BOS] fox", "Mira's kite, 3 stones!", "[BOS]"):
        assert saved(text)["input_ids"] == saved.encode(text) == text_model.to_tokens(text)[0].tolist()
        assert saved([text, text])["input_ids"] == 2 * [saved.encode(text)]
        assert torch.equal(back.to_tokens(text), text_model.to_tokens(text))
        assert back.to_str_tokens(text) == text_model.to_str_tokens(text)
        assert back.to_string(back.to_tokens(text)[0]) == text_model.to_string(text_model.to_tokens(text)[0])
    assert saved("the fox", add_special_tokens=False)["input_ids"] == saved.encode("the fox")[1:]
    ids = saved.encode("Mira's foxes, a tired owl! then home.")
    assert saved.decode(ids, skip_special_tokens=True) == " mira's foxes, a tired owl! then home."
    saved.save_pretrained(tmp_path / "again")
    assert AutoTokenizer.from_pretrained(tmp_path / "again").encode("[BOS] the fox") == saved.encode("the fox")


def test_pipeline(text_model: HookedBilinearTransformer, tmp_path: Path) -> None:
    """pipeline("text-generation") on a saved folder continues as the hooked model does."""
    text_model.save_pretrained(tmp_path)
    generate = pipeline("text-generation", model=str(tmp_path), device="cpu")
    found = generate("the old gardener", max_new_tokens=6, do_sample=False, return_tensors=True)
    tokens = found[0]["generated_token_ids"]
    expected = text_model.generate(text_model.to_tokens("the old gardener"), 6, temperature=0)
    assert tokens == expected[0].tolist()
    found = generate("[BOS] the old gardener", max_new_tokens=6, do_sample=False, return_tensors=True)
    assert found[0]["generated_token_ids"] == tokens
    text = generate("the old gardener", max_new_tokens=6, do_sample=False)[0]["generated_text"]
    assert text == generate.tokenizer.decode(tokens, skip_special_tokens=True).strip()


def test_generation_ends_where_the_tokenizer_does(text_model: HookedBilinearTransformer, tmp_path: Path) -> None:
    """A folder's tokenizer, or the hooked model's, names the token that ends a text; without one nothing does."""
    text_model.save_pretrained(tmp_path / "text")
    make_model().save_pretrained(tmp_path / "tokens")
    eos = text_model.tokenizer.eos_token_id
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "text")
    for model in (loaded, BilinearForCausalLM.from_hooked(text_model)):
        assert model.generation_config.eos_token_id == eos
        with torch.no_grad():  # the end token's logit is far above the others wherever the stream is not zero
            model.hooked.unembed.head.weight.zero_()
            model.hooked.blocks[1].hook_resid_post.add_perma_hook(lambda x, hook: torch.ones_like(x))
            model.hooked.unembed.head.weight[eos] = 1
        assert model.generate(torch.tensor([[1, 7]]), max_new_tokens=5).tolist() == [[1, 7, eos]]
    without = AutoModelForCausalLM.from_pretrained(tmp_path / "tokens")
    assert without.generation_config.eos_token_id is None


# --- training, nnsight ------------------------------------------------------------------------------------------------


def test_trainer(tmp_path: Path) -> None:
    """A few steps of the Trainer: the loss falls, and its checkpoint is a published folder."""
    torch.manual_seed(0)
    model = BilinearForCausalLM(BilinearConfig(n_layer=1, n_head=2, d_model=32, d_hidden=48, vocab_size=20, n_ctx=16))
    rows = [(torch.arange(12) + start) % 20 for start in range(20)]
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            str(tmp_path),
            max_steps=10,
            per_device_train_batch_size=20,
            learning_rate=1e-2,
            logging_steps=1,
            save_steps=10,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            seed=0,
        ),
        train_dataset=[{"input_ids": row, "labels": row} for row in rows],  # type: ignore[arg-type]
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.8 * losses[0]
    again = BilinearForCausalLM.from_pretrained(tmp_path / "checkpoint-10")
    assert torch.equal(again(TOKENS % 20).logits, model.eval()(TOKENS % 20).logits)


@torch.no_grad()
def test_nnsight_with_two_prompts(text_model: HookedBilinearTransformer, tmp_path: Path) -> None:
    """LanguageModel on a folder finds the tokenizer there; prompts of two lengths run together as alone."""
    nnsight = pytest.importorskip("nnsight", reason="nnsight is not a dependency")
    text_model.save_pretrained(tmp_path)
    traced = nnsight.LanguageModel(str(tmp_path), device_map="cpu", dispatch=True)
    assert type(traced.tokenizer) is BilinearTokenizer
    with traced.trace(TEXTS):
        together = traced.output.logits.save()
    with traced.trace() as tracer:
        with tracer.invoke(TEXTS[0]):
            first = traced.lm_head.output[0, -1].save()
        with tracer.invoke(TEXTS[1]):
            second = traced.lm_head.output[0, -1].save()
    for found, invoked, text in zip(together, (first, second), TEXTS, strict=True):
        expected = text_model(text)[0, -1]
        torch.testing.assert_close(found[-1], expected, **CLOSE)
        torch.testing.assert_close(invoked, expected, **CLOSE)


@torch.no_grad()
def test_nnsight(hf: BilinearForCausalLM) -> None:
    """nnsight reads an inner module's output and edits it; the result is that of our hooks."""
    nnsight = pytest.importorskip("nnsight", reason="nnsight is not a dependency")
    traced = nnsight.NNsight(hf)
    logits, cache = hf.hooked.run_with_cache(TOKENS)
    with traced.trace(TOKENS):
        read = traced.transformer.h[1].ln2.output.save()
        written = traced.transformer.h[1].mlp.output.save()
        found = traced.lm_head.output.save()
    torch.testing.assert_close(written, cache["mlp_out", 1], **CLOSE)
    torch.testing.assert_close(read, cache["blocks.1.ln2.hook_normalized"], **CLOSE)
    torch.testing.assert_close(found, logits, **CLOSE)
    with traced.trace(TOKENS):
        traced.transformer.h[0].attn.output[:] = 0
        edited = traced.lm_head.output.save()
    expected = hf.hooked.run_with_hooks(
        TOKENS, fwd_hooks=[("blocks.0.hook_attn_out", lambda x, hook: torch.zeros_like(x))]
    )
    torch.testing.assert_close(edited, expected, **CLOSE)
