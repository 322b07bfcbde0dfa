"""Checkpoints in and out, bit for bit; and every way a checkpoint can be wrong, each refused by name."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from bilens._core.files import write_atomically
from bilens.errors import ArgumentError, CheckpointError, ModelNotFoundError, OverwriteError
from bilens.model import files, published
from bilens.model.config import config_from_published
from bilens.model.files import list_models, load_tokenizer
from bilens.model.hf import BilinearForCausalLM
from bilens.model.loading import load_model
from bilens.model.transformer import HookedBilinearTransformer
from tests.conftest import SHARED, SMALL, Reference, make_model

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def assert_same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    """The same names, dtypes, shapes and bits."""
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype, name
        assert tensor.shape == other[name].shape, name
        bits = (t.contiguous().view(torch.uint8) for t in (tensor, other[name]))
        assert torch.equal(*bits), name


@pytest.fixture
def checkpoint(tmp_path: Path, tokenizer: Any) -> Path:
    """A folder with a good small checkpoint, tokenizer included; the test may damage it."""
    make_model(bias=True, tokenizer=tokenizer).save_pretrained(tmp_path / "good")
    return tmp_path / "good"


def edit_config(folder: Path, **changes: Any) -> None:
    """Change keys of config.json; `...` removes one."""
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({key: v for key, v in config.items() if v is not ...}))


def edit_tensors(folder: Path, edit: Callable[[dict[str, Tensor]], Any]) -> None:
    """Change the tensors of model.safetensors."""
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


# --- round trips ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_reference_checkpoint_comes_back_bit_for_bit(
    ts_micro: Reference, tmp_path: Path, dtype: torch.dtype
) -> None:
    """Loading with dtype="auto" and saving gives every tensor's bits, the rotary buffer's included, in any dtype."""
    source = shutil.copytree(ts_micro.folder, tmp_path / "source", copy_function=shutil.copyfile)
    source.chmod(0o755)
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(source / "model.safetensors").items()}
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    model = load_model(source, dtype="auto", device="cpu")
    assert model.cfg.dtype == model.W_E.dtype == dtype
    model.save_pretrained(tmp_path / "saved")
    assert_same_bits(load_file(tmp_path / "saved" / "model.safetensors"), tensors)


def test_the_reference_config_and_tokenizer_come_back(ts_micro: Reference, tmp_path: Path) -> None:
    """Every key of the published config keeps its value, and the tokenizer still encodes and pads the same."""
    ts_micro.model.save_pretrained(tmp_path)
    published = json.loads((ts_micro.folder / "config.json").read_text())
    loads_itself = {"model_type": "bilinear", "architectures": [*published["architectures"], "BilinearForCausalLM"]}
    assert json.loads((tmp_path / "config.json").read_text()) == published | loads_itself
    again = load_model(tmp_path, device="cpu")
    for prompt in ts_micro.prompts:
        assert torch.equal(again(prompt), ts_micro.model(prompt))
    assert again.tokenizer.pad_token_id == ts_micro.model.tokenizer.pad_token_id
    assert again.tokenizer.get_vocab() == ts_micro.model.tokenizer.get_vocab()


@given(
    n_head=st.sampled_from([1, 2, 4]),
    n_layer=st.integers(1, 3),
    bias=st.booleans(),
    gate=st.sampled_from([None, "relu", "silu", "gelu"]),
    bilinear=st.booleans(),
    normalization=st.booleans(),
    attention=st.sampled_from(["softmax", "bilinear", "quadratic"]),
    d_head=st.sampled_from([2, 4, 16]),
    rotary=st.booleans(),
    residual_scale=st.sampled_from([1.0, 0.3]),
    dtype=st.sampled_from(DTYPES),
)
def test_any_variant_comes_back(tmp_path_factory: pytest.TempPathFactory, dtype: torch.dtype, **published: Any) -> None:
    """A model of any variant and dtype, saved, loaded and saved again: same bits, same config, same logits."""
    folder = tmp_path_factory.mktemp("any")
    model = make_model(**published).to(dtype)
    model.save_pretrained(folder / "one")
    again = load_model(folder / "one", dtype="auto", device="cpu")
    again.save_pretrained(folder / "two")
    assert_same_bits(*(load_file(folder / name / "model.safetensors") for name in ("one", "two")))
    assert_same_bits(
        {name: tensor for name, tensor in again.published_tensors().items() if "inv_freq" not in name},
        {name: tensor.detach() for name, tensor in model.published_tensors().items() if "inv_freq" not in name},
    )
    written = json.loads((folder / "one" / "config.json").read_text())
    absent = {"attention": "softmax", "rotary": True, "d_head": 16 // published["n_head"]}
    absent["residual_scale"] = (2 * published["n_layer"]) ** -0.5
    assert {key: written.get(key, absent.get(key)) for key in published} == published
    tokens = torch.tensor([[1, 2, 3, 4]])
    # Polynomials of a high degree overflow half precision, alike in both.
    assert torch.equal(*(one(tokens).nan_to_num() for one in (again, model)))
    assert not again.training


def test_the_published_names_and_shapes(tmp_path: Path) -> None:
    """What is written has the names, shapes and metadata that the authors' own code reads."""
    make_model(bias=True, d_vocab=50).save_pretrained(tmp_path)
    shapes = {"transformer.wte.weight": (50, 16), "lm_head.weight": (50, 16)}
    for layer in range(2):
        shapes |= {
            f"transformer.h.{layer}.{name}": shape
            for name, shape in {
                "attn.qkv.weight": (48, 16),
                "attn.o.weight": (16, 16),
                "attn.rotary.inv_freq": (4,),
                "mlp.w.weight": (48, 16),
                "mlp.w.bias": (48,),
                "mlp.p.weight": (16, 24),
                "mlp.p.bias": (16,),
            }.items()
        }
    tensors = load_file(tmp_path / "model.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == shapes
    config = json.loads((tmp_path / "config.json").read_text())
    assert {key: config[key] for key in SMALL} == SMALL
    assert config["bias"] is True
    assert config["repo"] == "bilinear"


def test_o_is_written_without_the_residual_scale(tmp_path: Path) -> None:
    """`attn.o.weight` on disk is the raw projection: W_O divided by s."""
    model = make_model()
    model.save_pretrained(tmp_path)
    raw = load_file(tmp_path / "model.safetensors")["transformer.h.0.attn.o.weight"]
    torch.testing.assert_close(raw * model.cfg.residual_scale, model.W_O[0].reshape(16, 16).T)


def test_extra_config_keys_are_kept(checkpoint: Path, tmp_path: Path) -> None:
    """Keys that bilens does not know survive loading and saving, whatever they hold."""
    extra = {"repo": "someone/else", "weird": {"nested": [1, None, "x"]}, "transformers_version": "4.0", "lr": 0.1}
    edit_config(checkpoint, **extra)
    load_model(checkpoint).save_pretrained(tmp_path / "again")
    written = json.loads((tmp_path / "again" / "config.json").read_text())
    assert written == json.loads((checkpoint / "config.json").read_text())
    assert {key: written[key] for key in extra} == extra


def test_absent_config_keys_have_the_published_meaning(tmp_path: Path) -> None:
    """Only the five needed keys: bilinear, no gate, no bias, normalised; d_vocab is the rows of wte."""
    model = make_model(d_vocab=37)
    model.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    again = load_model(tmp_path)
    cfg = again.cfg
    assert (cfg.bilinear, cfg.gate, cfg.bias, cfg.normalization_type) == (True, None, False, "RMSPre")
    assert cfg.d_vocab == 37
    assert torch.equal(again(torch.tensor([[1, 36]])), model(torch.tensor([[1, 36]])))


def test_the_dtype_in_memory_and_on_disk(checkpoint: Path, tmp_path: Path) -> None:
    """dtype= decides memory (float32 unless asked), save's dtype= the disk; the config says which."""
    load_model(checkpoint).save_pretrained(tmp_path / "half", dtype=torch.float16)
    assert {t.dtype for t in load_file(tmp_path / "half" / "model.safetensors").values()} == {torch.float16}
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "float16"
    assert load_model(tmp_path / "half").W_E.dtype == torch.float32
    assert load_model(tmp_path / "half", dtype="auto").W_E.dtype == torch.float16
    assert load_model(tmp_path / "half", dtype="bfloat16").cfg.dtype == torch.bfloat16
    assert load_model(tmp_path / "half", dtype="torch.bfloat16").cfg.dtype == torch.bfloat16
    assert load_model(tmp_path / "half", dtype=torch.float64).cfg.dtype == torch.float64
    with pytest.raises(ArgumentError, match=r"'flaot32' is not one of auto, .* Did you mean 'float32'"):
        load_model(checkpoint, dtype="flaot32")


def test_a_device_that_is_not_there(checkpoint: Path) -> None:
    with pytest.raises(ArgumentError, match="device 'gpu' cannot be used here"):
        load_model(checkpoint, device="gpu")
    assert load_model(checkpoint, device=torch.device("cpu")).cfg.device == "cpu"


def test_the_stored_rotary_buffer_is_ignored(checkpoint: Path) -> None:
    """`inv_freq` in a file is neither needed nor believed."""
    before = load_model(checkpoint)(torch.tensor([[1, 2, 3]]))
    edit_tensors(checkpoint, lambda t: t["transformer.h.0.attn.rotary.inv_freq"].fill_(7))
    assert torch.equal(load_model(checkpoint)(torch.tensor([[1, 2, 3]])), before)
    edit_tensors(checkpoint, lambda t: [t.pop(name) for name in list(t) if "inv_freq" in name])
    assert torch.equal(load_model(checkpoint)(torch.tensor([[1, 2, 3]])), before)


def test_from_pretrained_is_load_model(checkpoint: Path) -> None:
    """The class method loads the same; a folder may be a string or a path."""
    one, other = HookedBilinearTransformer.from_pretrained(str(checkpoint)), load_model(checkpoint)
    assert torch.equal(one("the fox"), other("the fox"))
    assert one.cfg.model_name == str(checkpoint)


def test_loading_leaves_new_models_alone(checkpoint: Path) -> None:
    """Models made after loading one draw the same initial weights as before."""
    cfg = make_model().cfg
    before = HookedBilinearTransformer(cfg, seed=0).published_tensors()
    load_model(checkpoint)
    assert_same_bits(before, HookedBilinearTransformer(cfg, seed=0).published_tensors())


# --- damaged checkpoints ----------------------------------------------------------------------------------------------

DAMAGE: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "missing tensor": (
        lambda t: t.pop("transformer.h.1.attn.o.weight"),
        r"no tensor 'transformer.h.1.attn.o.weight'",
    ),
    "misnamed tensor": (
        lambda t: t.update({"transformer.h.1.attn.out.weight": t.pop("transformer.h.1.attn.o.weight")}),
        r"no tensor 'transformer.h.1.attn.o.weight'.*Did you mean 'transformer.h.1.attn.out.weight'",
    ),
    "missing bias": (lambda t: t.pop("transformer.h.0.mlp.p.bias"), r"no tensor 'transformer.h.0.mlp.p.bias'"),
    "no embedding": (lambda t: t.pop("transformer.wte.weight"), r"no tensor 'transformer.wte.weight'"),
    "extra tensor": (
        lambda t: t.update({"transformer.h.2.attn.o.weight": torch.zeros(16, 16)}),
        r"\['transformer.h.2.attn.o.weight'\] have no place",
    ),
    "wrong shape": (
        lambda t: t.update({"transformer.h.0.mlp.w.weight": torch.zeros(48, 17)}),
        r"transformer.h.0.mlp.w.weight has shape \(48, 17\), the config asks for \(48, 16\)",
    ),
    "other vocabulary": (
        lambda t: t.update({"lm_head.weight": torch.zeros(3, 16)}),
        r"lm_head.weight has shape \(3, 16\)",
    ),
    "NaN": (
        lambda t: t["transformer.h.1.mlp.p.weight"][2, 3:5].fill_(torch.nan),
        r"transformer.h.1.mlp.p.weight holds 2 values that are NaN or infinite, of 384",
    ),
    "infinity": (lambda t: t["lm_head.weight"][0, 0].fill_(-torch.inf), r"lm_head.weight holds 1 values"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE.keys())
def test_damaged_tensors_are_refused_by_name(checkpoint: Path, damage: Callable, message: str) -> None:
    """A tensor that is missing, left over, of another shape or not finite is named in a CheckpointError."""
    load_model(checkpoint)
    edit_tensors(checkpoint, damage)
    with pytest.raises(CheckpointError, match=message):
        load_model(checkpoint)


@pytest.mark.parametrize("kept", [0, 5, 200, 0.5, 0.999])
def test_a_truncated_file_is_refused(checkpoint: Path, kept: float) -> None:
    """A download that stopped, anywhere, is a CheckpointError that names the file and its size."""
    path = checkpoint / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: kept if isinstance(kept, int) else int(kept * len(data))])
    with pytest.raises(CheckpointError, match=rf"model.safetensors \({path.stat().st_size} bytes\) cannot be read"):
        load_model(checkpoint)


BAD_CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "no n_layer": ({"n_layer": ...}, "no 'n_layer'; needed are n_head, n_layer, n_ctx, d_model, d_hidden"),
    "misspelt": ({"n_head": ..., "n_heads": 2}, "no 'n_head'.*Did you mean 'n_heads'"),
    "not a number": ({"d_model": "16"}, "d_model is '16', expected a positive integer"),
    "zero": ({"n_ctx": 0}, "n_ctx is 0"),
    "true": ({"n_layer": True}, "n_layer is True"),
    "bad gate": ({"gate": "sillu"}, "gate 'sillu' is not one of null, relu, silu, gelu. Did you mean 'silu'"),
    "indivisible": ({"n_head": 3}, "d_model 16 is not divisible by n_head 3"),
    "odd head": ({"n_head": 16}, "d_head 1 is odd"),
    "more layers": ({"n_layer": 3}, "no tensor 'transformer.h.2.attn"),
    "fewer layers": ({"n_layer": 1}, r"transformer.h.1.attn.o.weight.* have no place"),
    "no bias": ({"bias": False}, r"transformer.h.0.mlp.p.bias.* have no place"),
    **{
        f"{key} {value!r}": ({key: value}, rf"{key} is .*, expected true or false")
        for key in ("bilinear", "bias", "normalization", "scale_attn", "attention_bias", "rotary", "attention2")
        for value in ("false", None, 0, [], {})
    },
    "positions": ({"n_ctx": 10**15}, "n_ctx is 1000000000000000, expected at most 16777216"),
    **{f"{key} {n}": ({key: n}, "") for key in ("n_layer", "d_hidden", "d_model", "n_head") for n in (10**6, 2**62)},
    "tokenizer": ({"tokenizer": 5}, "tokenizer is 5, expected a name or null"),
    **{
        key: ({key: value}, f"{key} is .*, which bilens does not implement")
        for key, value in {
            "norm_bias": True,
            "post_norm": True,
            "mlp": "glp",
            "rms": False,
            "rope_theta": 5e5,
            "rope_base": 5e5,
        }.items()
    },
    "attention2 of three parts": (
        {"attention2": True},
        r"attn.qkv.weight has shape \(48, 16\), the config asks for \(80, 16\)",
    ),
    "attention2 against attention": (
        {"attention2": False, "attention": "bilinear"},
        "attention is 'bilinear' and attention2 is false, which is the authors' word for bilinear attention",
    ),
    "unknown attention": ({"attention": "bilinar"}, "attention is 'bilinar', expected one of .*mean 'bilinear'"),
    "scale of softmax": ({"attention_scale": "d_head"}, "attention_scale is 'd_head', which only bilinear"),
    "unknown scale": (
        {"attention": "quadratic", "attention_scale": "d_head2"},
        r"attention_scale is 'd_head2', expected one of d_head, d_head\^2",
    ),
    "residual scale": ({"residual_scale": 0}, "residual_scale is 0, expected a number above 0"),
    "heads of another width": ({"d_head": 4}, r"qkv.weight has shape \(48, 16\), the config asks for \(24, 16\)"),
    "no width": ({"d_head": "8"}, "d_head is '8', expected a positive integer"),
    "one branch": ({"bilinear": False}, r"mlp.w.weight has shape \(48, 16\), the config asks for \(24, 16\)"),
}


@pytest.mark.parametrize(("changes", "message"), BAD_CONFIGS.values(), ids=BAD_CONFIGS.keys())
def test_a_bad_config_is_refused_by_name(checkpoint: Path, changes: dict[str, Any], message: str) -> None:
    """A config that lacks a key, holds nonsense, or describes another model is a CheckpointError naming what."""
    edit_config(checkpoint, **changes)
    with pytest.raises(CheckpointError, match=message):
        load_model(checkpoint)


def test_keys_that_nobody_knows_are_named_once(checkpoint: Path, recwarn: Any) -> None:
    """What changes nothing passes in silence; what bilens never heard of is named."""
    edit_config(
        checkpoint, attention2=False, norm_bias=None, noise=0.3, use_cache=True, vocab_size=5, rope_theta=10_000
    )
    load_model(checkpoint)
    assert not [w for w in recwarn if "config.json" in str(w.message)]
    edit_config(checkpoint, residual_gain=True)
    with pytest.warns(UserWarning, match=r"does not know the keys \['residual_gain'\]"):
        load_model(checkpoint)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn], ids=str)
def test_weights_without_fractions_are_refused(checkpoint: Path, dtype: torch.dtype) -> None:
    """Quantised or mistaken weights are named with their dtype, not cast."""
    edit_tensors(checkpoint, lambda t: t.update({"lm_head.weight": t["lm_head.weight"].to(dtype)}))
    with pytest.raises(CheckpointError, match=r"lm_head.weight is of dtype \w+, expected one of F64, F32, F16, BF16"):
        load_model(checkpoint)


@pytest.mark.parametrize("dtype", ["int8", "bool", torch.int8, torch.bool, "nothing", 7, None, ["float32"]], ids=repr)
def test_dtypes_that_hold_no_weights(checkpoint: Path, dtype: Any) -> None:
    with pytest.raises(ArgumentError, match=r"^dtype .* is not one of auto, float32"):
        load_model(checkpoint, dtype=dtype)


@pytest.mark.parametrize("device", ["foo", 7, "", ["cpu"], "meta", "cuda:99"], ids=repr)
def test_devices_that_are_none(checkpoint: Path, device: Any) -> None:
    with pytest.raises(ArgumentError, match=r"^device "):
        load_model(checkpoint, device=device)


def test_what_a_dtype_has_no_room_for_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    """A weight of 1e6 is infinite in float16: neither loading nor saving makes that of it; bfloat16 has room."""
    edit_tensors(checkpoint, lambda t: t["lm_head.weight"].view(-1)[:1].fill_(1e6))
    with pytest.raises(CheckpointError, match=r"lm_head.weight holds 1 values .* no room for 1e\+06. Take bfloat16"):
        load_model(checkpoint, dtype="float16")
    model = load_model(checkpoint, dtype="bfloat16")
    with pytest.raises(CheckpointError, match=r"lm_head.weight holds 1 values"):
        model.save_pretrained(tmp_path / "half", dtype=torch.float16)
    assert not (tmp_path / "half").exists()


@torch.no_grad()
def test_the_scale_of_attention_is_that_of_the_config(tmp_path: Path) -> None:
    """`scale_attn: false` is written back, and loads to the same logits; where it is true nothing is written."""
    model, tokens = make_model(scale_attn=False), torch.tensor([[1, 2, 3]])
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["scale_attn"] is False
    assert torch.equal(load_model(tmp_path)(tokens), model(tokens))
    assert torch.equal(model.W_O[0].reshape(16, 16).T, model.blocks[0].attn.o.weight)
    make_model().save_pretrained(tmp_path / "scaled")
    assert "scale_attn" not in json.loads((tmp_path / "scaled" / "config.json").read_text())


@pytest.mark.parametrize("name", ["ts-unscaled", "ts-attention2"])
@torch.no_grad()
def test_references_of_the_later_code(name: str) -> None:
    """The logits and the stream of the authors' later code, without the factor on attention's output and with bilinear
    attention, to 1e-4 of the largest."""
    folder = SHARED / "reference" / name
    if not folder.exists():
        pytest.skip(f"the reference checkpoint is not here: no folder {folder}")
    model, expected = load_model(folder, device="cpu"), load_file(folder / "expected.safetensors")
    for prompt in range(sum(name.endswith("logits") for name in expected)):
        tokens = expected[f"{prompt}.input_ids"].reshape(1, -1)
        logits, cache = model.run_with_cache(tokens)
        found = {"logits": logits} | {f"{n}.resid_post": cache[f"blocks.{n}.hook_resid_post"] for n in range(2)}
        for name, value in found.items():
            wanted = expected[f"{prompt}.{name}"].reshape(value.shape)
            assert (value - wanted).abs().max() < 1e-4 * wanted.abs().max(), name


@pytest.mark.parametrize("changes", [{"attention": "quadratic"}, {"rotary": False}, {"scale_attn": False}], ids=str)
def test_another_computation_of_the_same_weights_is_another_model(tmp_path: Path, changes: dict[str, Any]) -> None:
    """Neither is written over the other unasked; each may be written again over itself, whatever word it came under."""
    make_model().save_pretrained(tmp_path / "one")
    with pytest.raises(OverwriteError):
        make_model(**changes).save_pretrained(tmp_path / "one")
    make_model(**changes).save_pretrained(tmp_path / "other")
    with pytest.raises(OverwriteError):
        make_model().save_pretrained(tmp_path / "other")
    make_model(**changes).save_pretrained(tmp_path / "other")
    bilinear = make_model(attention="bilinear")
    bilinear.save_pretrained(tmp_path / "later")
    edit_config(tmp_path / "later", attention=..., attention_scale=...)
    bilinear.save_pretrained(tmp_path / "later")


@torch.no_grad()
def test_biases_of_attention_are_those_of_the_file(tmp_path: Path) -> None:
    """The authors' earlier code has `bias` in the MLP alone, their later code in `attn.qkv` too: the file decides."""
    tokens = torch.tensor([[1, 2, 3]])
    for attention_bias in (False, True):
        model = make_model(bias=True, attention_bias=attention_bias)
        model.save_pretrained(tmp_path, overwrite=True)
        edit_config(tmp_path, attention_bias=...)
        again = load_model(tmp_path)
        assert again.cfg.attention_bias == attention_bias
        assert again.b_Q.any() == again.b_K.any() == again.b_V.any() == attention_bias
        assert ("blocks.0.attn.b_V" in again.tl_parameters()) == attention_bias
        for one in (again, BilinearForCausalLM.from_pretrained(tmp_path).hooked):
            assert torch.equal(one(tokens), model(tokens))
    rows = model.blocks[1].attn.qkv.bias[16:32]  # q, then k, head by head
    assert torch.equal(model.b_K[1], rows.reshape(2, 8))
    edit_config(tmp_path, bias=False)
    with pytest.raises(CheckpointError, match=r"attn.qkv.bias.* have no place"):
        load_model(tmp_path)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json"])
def test_pipes_and_devices_are_not_read(checkpoint: Path, file: str) -> None:
    """A pipe would wait for ever, /dev/zero never end: both are refused by name, and a folder of that name too."""
    for put in (os.mkfifo, lambda path: path.symlink_to("/dev/zero"), Path.mkdir):
        (checkpoint / file).unlink()
        put(checkpoint / file)
        with pytest.raises(CheckpointError, match=rf"{file} is a (pipe|folder)"):
            load_model(checkpoint)
        (checkpoint / file).rmdir() if (checkpoint / file).is_dir() else None
        (checkpoint / file).touch()


@pytest.mark.parametrize("source", [5, True, b"ts-tiny", ["ts-tiny"], {}, "", "a\0b", "x" * 5000, "~nobody-at-all"])
def test_sources_that_are_none(source: Any) -> None:
    with pytest.raises(ArgumentError, match=r"^source "):
        load_model(source)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{'n_head': 2}", "is not JSON"), ("", "is not JSON"), ("[1, 2]", "holds a list, expected an object")],
)
@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_what_is_not_json_is_refused(checkpoint: Path, file: str, text: str, message: str) -> None:
    """Configs that are not a JSON object are CheckpointErrors that name the file."""
    (checkpoint / file).write_text(text)
    with pytest.raises(CheckpointError, match=rf"{file} {message}"):
        load_model(checkpoint)


def test_binary_config_is_refused(checkpoint: Path) -> None:
    """Bytes that are no text are not JSON either."""
    (checkpoint / "config.json").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(CheckpointError, match="is not JSON"):
        load_model(checkpoint)


@pytest.mark.parametrize("gate", ["tanh", 3, ["relu"], False])
def test_a_gate_is_checked_whatever_its_type(gate: Any) -> None:
    """Nothing but null, relu, silu and gelu is a gate."""
    with pytest.raises(CheckpointError, match="gate"):
        config_from_published(SMALL | {"gate": gate}, 50)


# --- finding ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(checkpoint: Path, file: str) -> None:
    """A folder without one of the two files: ModelNotFoundError (a FileNotFoundError) says which, and what is there."""
    (checkpoint / file).unlink()
    with pytest.raises(ModelNotFoundError, match=rf"has no {file}; it holds .*tokenizer\.json"):
        load_model(checkpoint)
    assert issubclass(ModelNotFoundError, FileNotFoundError)


@pytest.fixture
def bundled(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two bundled models, and a folder that is none."""
    home = tmp_path / "pretrained"
    for name in ("ts-small", "ts-tiny"):
        shutil.copytree(checkpoint, home / name)
    (home / "zz-scope").mkdir()
    monkeypatch.setattr(files, "PRETRAINED", home)
    return home


def test_bundled_models(bundled: Path) -> None:
    """Bundled names are listed with the default first, and load by name; no name at all is the default."""
    assert list_models() == ["ts-tiny", "ts-small"]
    default = load_model()
    assert default.cfg.model_name == "ts-tiny"
    assert torch.equal(load_model("ts-small")("the fox"), default("the fox"))


@pytest.mark.parametrize("wrong", ["ts-tinny", "tstiny", Path("ts-tiny-2")])
def test_a_misspelt_model_gets_a_suggestion(bundled: Path, wrong: Any) -> None:
    """The message holds the wrong name, all bundled ones, and the nearest."""
    with pytest.raises(ModelNotFoundError, match=rf"no model '{wrong}'.*ts-tiny, ts-small.*Did you mean 'ts-tiny'"):
        load_model(wrong)


def test_no_default_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing is bundled, `load_model()` says so."""
    monkeypatch.setattr(files, "PRETRAINED", tmp_path)
    with pytest.raises(ModelNotFoundError, match="none here"):
        load_model()


# --- tokenizers -------------------------------------------------------------------------------------------------------


def test_the_tokenizer_beside_the_weights_wins(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a tokenizer.json there, the one that the config names is not asked for; one given by hand beats both."""
    edit_config(checkpoint, tokenizer="gpt2")
    to_the_hub = "transformers.AutoTokenizer.from_pretrained"
    monkeypatch.setattr(to_the_hub, lambda *args, **kwargs: pytest.fail("went to the hub"))
    model = load_model(checkpoint)
    assert model.tokenizer.pad_token == "[EOS]"
    assert model.cfg.tokenizer_name == "gpt2"
    mine = model.tokenizer
    assert load_model(checkpoint, tokenizer=mine).tokenizer is mine


@pytest.mark.parametrize(
    ("name", "repo", "pad"),
    [
        ("ts-4096", "tdooms/ts-tokenizer-4096", "[EOS]"),
        ("mistral", "mistral-community/Mixtral-8x22B-v0.1", "</s>"),
        ("gpt2", "openai-community/gpt2", "<|endoftext|>"),
        ("someone/own", "someone/own", None),
    ],
)
def test_the_named_tokenizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, repo: str, pad: str | None
) -> None:
    """Without a file, the published name says where the tokenizer is and what pads with it."""

    class Fetched:
        pad_token = None

        def __init__(self, source: Path):
            self.source = source

    monkeypatch.setattr("bilens.model.files.fetch_from_hub", lambda repo, files, options: Path(repo))
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", Fetched)
    found = load_tokenizer(tmp_path, name)
    assert (found.source, found.pad_token) == (Path(repo), pad)


def test_a_tokenizer_that_cannot_be_fetched(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model loads without one, for use with tokens, and says so; it says nothing where no tokenizer is named."""

    def offline(*args: Any, **kwargs: Any) -> None:
        raise ModelNotFoundError("no connection")

    (checkpoint / "tokenizer.json").unlink()
    assert load_model(checkpoint).tokenizer is None
    edit_config(checkpoint, tokenizer="gpt2")
    monkeypatch.setattr("bilens.model.files.fetch_from_hub", offline)
    with pytest.warns(UserWarning, match="the tokenizer openai-community/gpt2 cannot be loaded.*no connection"):
        model = load_model(checkpoint)
    assert model.tokenizer is None
    assert model(torch.tensor([[1, 2]])).shape == (1, 2, model.cfg.d_vocab)


def test_special_tokens_in_either_spelling(checkpoint: Path) -> None:
    """tokenizer_config.json may hold "[BOS]" or {"content": "[BOS]", ...}; without the file they are the published."""
    expected = {"unk_token": "[UNK]", "bos_token": "[BOS]", "eos_token": "[EOS]", "pad_token": "[EOS]"}
    spelled = {key: {"__type": "AddedToken", "content": token, "lstrip": False} for key, token in expected.items()}
    for content in (expected, spelled, None):
        if content is None:
            (checkpoint / "tokenizer_config.json").unlink()
        else:
            (checkpoint / "tokenizer_config.json").write_text(json.dumps(content))
        found = load_tokenizer(checkpoint, None)
        assert {key: getattr(found, key) for key in expected} == expected


@pytest.mark.parametrize("length", [32, 10**30])
def test_the_tokenizers_length_survives(checkpoint: Path, tmp_path: Path, length: int) -> None:
    """`model_max_length` is read and written back; 10^30 or so is how transformers writes that there is none."""
    config = json.loads((checkpoint / "tokenizer_config.json").read_text())
    (checkpoint / "tokenizer_config.json").write_text(json.dumps(config | {"model_max_length": length}))
    model = load_model(checkpoint)
    assert model.tokenizer.model_max_length == length
    model.save_pretrained(tmp_path / "again")
    assert load_tokenizer(tmp_path / "again", None).model_max_length == length


def test_loading_a_tokenizer_adds_no_tokens(checkpoint: Path) -> None:
    """A special token that the vocabulary lacks is left out: added, it would have an id without a row in wte."""
    size = len(load_tokenizer(checkpoint, None))
    (checkpoint / "tokenizer_config.json").write_text(json.dumps({"unk_token": "[UNK]", "bos_token": "<s>"}))
    found = load_tokenizer(checkpoint, None)
    assert len(found) == size
    assert found.bos_token_id is None
    assert found.unk_token == "[UNK]"


def test_a_damaged_tokenizer_is_refused(checkpoint: Path) -> None:
    """Half a tokenizer.json is a CheckpointError that names it."""
    path = checkpoint / "tokenizer.json"
    path.write_text(path.read_text()[:1000])
    with pytest.raises(CheckpointError, match=r"tokenizer.json cannot be read"):
        load_model(checkpoint)


# --- writing whole or not at all --------------------------------------------------------------------------------------


def test_a_crash_while_writing_leaves_the_old_file(tmp_path: Path) -> None:
    """Whatever fails, before or during the writing: the file is as it was, and nothing lies beside it."""
    path = tmp_path / "file"

    def half(beside: Path) -> None:
        beside.write_text("half of the ne")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, half)
    assert list(tmp_path.iterdir()) == []
    write_atomically(path, lambda beside: beside.write_text("old"))
    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, half)
    assert path.read_text() == "old"
    write_atomically(path, lambda beside: beside.write_text("new"))
    assert path.read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_full_disk_leaves_the_old_checkpoint(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Saving over a checkpoint that fails halfway through leaves a checkpoint that loads as before."""
    model = load_model(checkpoint)
    before = {path.name: path.read_bytes() for path in checkpoint.iterdir()}

    def full(tensors: dict, path: Path, **kwargs: Any) -> None:
        Path(path).write_bytes(b"\x00" * 100)
        raise OSError("no space left on device")

    monkeypatch.setattr(published, "save_file", full)
    with torch.no_grad():
        model.W_E.add_(1)
    with pytest.raises(OSError, match="no space"):
        model.save_pretrained(checkpoint, overwrite=True)
    assert {path.name: path.read_bytes() for path in checkpoint.iterdir()} == before


def test_a_crash_in_the_tokenizer_leaves_the_old_one(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tokenizer's files are replaced whole too."""
    model = load_model(checkpoint)
    before = sorted(os.listdir(checkpoint))
    text = (checkpoint / "tokenizer.json").read_text()

    def crash(folder: str) -> None:
        (Path(folder) / "tokenizer.json").write_text("{")
        raise OSError("no space left on device")

    monkeypatch.setattr(model.tokenizer, "save_pretrained", crash)
    with pytest.raises(OSError, match="no space"):
        model.save_pretrained(checkpoint)
    assert (checkpoint / "tokenizer.json").read_text() == text
    assert sorted(os.listdir(checkpoint)) == before


def test_another_model_is_not_written_over(checkpoint: Path, tmp_path: Path) -> None:
    """The same one may be written again; another, or other weights, only by the word; all files stay till then."""
    model = load_model(checkpoint)
    model.save_pretrained(checkpoint)
    before = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    other = make_model(d_hidden=12)
    with pytest.raises(OverwriteError, match=r"holds other work: another model, .*d_hidden \(24 there, 12 here\)"):
        other.save_pretrained(checkpoint)
    with torch.no_grad():
        model.W_E.add_(1)
    with pytest.raises(OverwriteError, match=r"a model with other weights.*overwrite=True"):
        model.save_pretrained(checkpoint)
    assert {path.name: path.read_bytes() for path in checkpoint.iterdir()} == before
    model.save_pretrained(checkpoint, overwrite=True)
    assert torch.equal(load_model(checkpoint).W_E, model.W_E)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(OverwriteError, match=r"another model, in config.json"):
        model.save_pretrained(tmp_path)
