"""The published format on disk: `config.json` + `model.safetensors` (+ the tokenizer), before any model is made.

The weights may also be in shards, `model-00001-of-0000N.safetensors`, which `model.safetensors.index.json` names.

1. find the files: a bundled name, a folder, or a hub id
2. read the weights' header, and compare its names, shapes and dtypes with what a config asks for, before anything of
   that size is made
3. read the tensors and the tokenizer
"""

import os
import re
import warnings
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bilens._core.checks import check_finite
from bilens._core.files import (
    MAX_JSON_BYTES,
    open_tensors,
    read_json,
    regular_file,
    to_path,
)
from bilens._core.folders import differing, other_work
from bilens.errors import ArgumentError, CheckpointError, ModelNotFoundError, nearest
from bilens.model.config import (
    BilinearTransformerConfig,
)
from bilens.model.hub import HubOptions, fetch_from_hub

PRETRAINED = Path(__file__).parents[1] / "pretrained"
DEFAULT_MODEL = "ts-tiny"
CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
EMBEDDING = "transformer.wte.weight"
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
HUB_TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    CONFIG_FILE,
)
# What decides a model's computation and is written only where it says something: what it is where it is absent.
WRITTEN: dict[str, Any] = {"attention": "softmax", "scale_attn": True, "residual_scale": None, "rotary": True}
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
SHARD_NAME = re.compile(r"[\w.-]+\.safetensors")  # of a file in the index's own folder


@dataclass(frozen=True)
class HubTokenizer:
    """Where a published tokenizer name points, and what pads with it."""

    repo: str
    pad_token: str | None


PUBLISHED_TOKENIZERS = {
    "ts-4096": HubTokenizer("tdooms/ts-tokenizer-4096", "[EOS]"),
    "ss-4096": HubTokenizer("tdooms/ss-tokenizer-4096", "[EOS]"),
    "mistral": HubTokenizer("mistral-community/Mixtral-8x22B-v0.1", "</s>"),
    "gpt2": HubTokenizer("openai-community/gpt2", "<|endoftext|>"),
}


def list_models() -> list[str]:
    """Names of the models that come with bilens; the first is what `load_model()` loads."""
    names = sorted(path.parent.name for path in PRETRAINED.glob(f"*/{CONFIG_FILE}"))
    return sorted(names, key=lambda name: name != DEFAULT_MODEL)


def refuse_other_model(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Let nothing be written over a model that is not this very one.

    Args:
        folder: the folder to write to.
        config: the part of its `config.json` that decides what the model computes.
        tensors: the content of its `model.safetensors`.

    Raises:
        OverwriteError: there is a model with another config, or with other weights.
        CheckpointError: its files are damaged.
    """
    there = [file for file in (CONFIG_FILE, WEIGHTS_FILE, INDEX_FILE) if (folder / file).exists()]
    if not there:
        return
    if WEIGHTS_FILE not in there or INDEX_FILE in there:
        raise other_work(folder, f"another model, in {', '.join(there)}")
    if CONFIG_FILE in there:
        found = read_json(folder / CONFIG_FILE)
        meant = WRITTEN | {"attention": "bilinear" if found.get("attention2") else "softmax"}
        if differ := differing({key: found.get(key, meant.get(key, value)) for key, value in config.items()}, config):
            raise other_work(folder, f"another model, {differ}")
    with open_tensors(folder / WEIGHTS_FILE) as file:
        names = set(file.keys())
        same = names == set(tensors) and all(torch.equal(file.get_tensor(name), tensors[name]) for name in names)
    if not same:
        raise other_work(folder, "a model with other weights")


def published_shapes(cfg: BilinearTransformerConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of `model.published_tensors()` of a model of this config, the rotary buffers left out."""
    assert cfg.d_mlp is not None
    wide, heads = (2 if cfg.bilinear else 1) * cfg.d_mlp, cfg.n_heads * cfg.d_head
    qkv = len(cfg.attention_parts) * heads
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys((EMBEDDING, "lm_head.weight"), (cfg.d_vocab, cfg.d_model))
    for layer in range(cfg.n_layers):
        at = f"transformer.h.{layer}"
        shapes[f"{at}.attn.qkv.weight"] = (qkv, cfg.d_model)
        shapes[f"{at}.attn.o.weight"] = (cfg.d_model, heads)
        shapes[f"{at}.mlp.w.weight"] = (wide, cfg.d_model)
        shapes[f"{at}.mlp.p.weight"] = (cfg.d_model, cfg.d_mlp)
        if cfg.attention_bias:
            shapes[f"{at}.attn.qkv.bias"] = (qkv,)
        if cfg.bias:
            shapes |= {f"{at}.mlp.w.bias": (wide,), f"{at}.mlp.p.bias": (cfg.d_model,)}
    return shapes


# --- finding ----------------------------------------------------------------------------------------------------------


def find_model(source: str | os.PathLike[str] | None, hub: HubOptions | None = None) -> tuple[Path, str]:
    """The folder that holds a source's files (fetched from the hub where need be), and the name to remember it by."""
    hub = hub or HubOptions()
    if source is None:
        source = DEFAULT_MODEL
    if str(source) in list_models():
        hub.refuse_revision(str(source))
        return PRETRAINED / str(source), str(source)
    path = to_path(source, "source")
    if path.is_dir():
        hub.refuse_revision(str(source))
        for file in (CONFIG_FILE, WEIGHTS_FILE):
            if not (path / file).exists() and not (file == WEIGHTS_FILE and (path / INDEX_FILE).exists()):
                raise ModelNotFoundError(f"{path} has no {file}; it holds {holds(path)}.")
        return path, str(source)
    if isinstance(source, str) and HUB_ID.fullmatch(source):
        return _fetch_model(source, hub), source
    raise ModelNotFoundError(
        f"no model {str(source)!r}: not a bundled name ({', '.join(list_models()) or 'none here'}), not a folder, and "
        "not a hub id of the form owner/name." + nearest(str(source), list_models())
    )


def holds(folder: Path, at_most: int = 12) -> str:
    """What is in a folder, for a message."""
    names = sorted(path.name for path in folder.iterdir())
    more = f", ... ({len(names)} in all)" if len(names) > at_most else ""
    return (", ".join(names[:at_most]) + more) or "nothing"


def _fetch_model(repo: str, hub: HubOptions) -> Path:
    files = [CONFIG_FILE, WEIGHTS_FILE, INDEX_FILE, *TOKENIZER_FILES]
    folder = fetch_from_hub(repo, files, needed=(CONFIG_FILE,), options=hub)
    if not (folder / WEIGHTS_FILE).exists():
        if not (folder / INDEX_FILE).exists():
            raise ModelNotFoundError(f"the hub repository {repo!r} has no {WEIGHTS_FILE} and no {INDEX_FILE}.")
        # The folder is named by its commit: the shards come from the index's, whatever has been pushed meanwhile.
        fetch_from_hub(repo, list(read_index(folder / INDEX_FILE)), options=replace(hub, revision=folder.name))
    return folder


def load_tokenizer(folder: Path, name: str | None, hub: HubOptions | None = None) -> Any:
    """The tokenizer beside the weights, or the one `config.tokenizer` names; `None` if neither can be loaded.

    A model without a tokenizer is usable with tokens, so a tokenizer that cannot be fetched is not an error here; its
    absence is one where text is first used.

    Args:
        folder: a folder with a `tokenizer.json`, or without one.
        name: a published name, or a hub id.
        hub: token and cache; the revision in it is the model's, and does not concern a tokenizer of another repository.

    Raises:
        CheckpointError: the tokenizer's own files are damaged.
    """
    from tokenizers import Tokenizer, decoders, models
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if (folder / "tokenizer.json").exists():
        special = {"unk_token": "[UNK]", "bos_token": "[BOS]", "eos_token": "[EOS]", "pad_token": "[EOS]"}
        options = folder / "tokenizer_config.json"
        read = read_json(options) if options.exists() else special
        # Older files hold {"content": "[BOS]", ...} where newer ones hold "[BOS]".
        found = {key: token.get("content") if isinstance(token := read.get(key), dict) else token for key in special}
        wrong = {key: token for key, token in found.items() if not isinstance(token, str | None)}
        if wrong:
            raise CheckpointError(f"{options}: the special tokens {wrong!r:.100} are no text.")
        regular_file(folder / "tokenizer.json", MAX_JSON_BYTES)
        try:
            backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # tokenizers raises nothing narrower
            raise CheckpointError(f"{folder / 'tokenizer.json'} cannot be read: {error}") from error
        if isinstance(backend.model, models.WordPiece):  # in the file it is for transformers, see `hf_tokenizer`
            backend.decoder = decoders.WordPiece(prefix="##", cleanup=False)
        length = read.get("model_max_length")
        # A special token that the vocabulary lacks would be added to it, with an id that the model has no row for.
        return PreTrainedTokenizerFast(
            tokenizer_object=backend,
            name_or_path=str(folder),  # TransformerLens and SAELens load it again from there
            clean_up_tokenization_spaces=False,
            model_max_length=length if isinstance(length, int | float) else None,
            **{key: token for key, token in found.items() if token and backend.token_to_id(token) is not None},
        )
    if name is None:
        return None
    published, hub = PUBLISHED_TOKENIZERS.get(name, HubTokenizer(name, None)), hub or HubOptions()
    try:
        # Not AutoTokenizer's own download: without a connection that one tries again for most of a minute.
        found_at = fetch_from_hub(published.repo, HUB_TOKENIZER_FILES, options=replace(hub, revision=None))
        tokenizer = AutoTokenizer.from_pretrained(found_at)
    except (ModelNotFoundError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        warnings.warn(
            f"the tokenizer {published.repo} cannot be loaded, only tokens can be used: {reason}", stacklevel=2
        )
        return None
    if published.pad_token is not None:
        tokenizer.pad_token = published.pad_token
    return tokenizer


# --- reading ----------------------------------------------------------------------------------------------------------


def resolve_device(device: str | torch.device | None) -> str:
    """A device's name; `None` is CUDA where there is one. `ArgumentError` for one that this machine does not have."""
    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    if not isinstance(device, str | torch.device):
        raise ArgumentError(f"device is {device!r}, expected a name such as 'cpu', or a torch.device.")
    try:
        torch.zeros(1, device=device).item()  # "meta" can make a tensor, but holds nothing
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        raise ArgumentError(f"device {str(device)!r} cannot be used here: {str(error).splitlines()[0]}") from error
    return str(device)


def resolve_dtype(dtype: torch.dtype | str, stored: torch.dtype) -> torch.dtype:
    """A torch dtype from itself, its name, or `"auto"` (the stored one); `ArgumentError` for one without fractions."""
    if isinstance(dtype, str) and dtype == "auto":
        return stored
    known = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}
    name = str(dtype).removeprefix("torch.")
    if not isinstance(dtype, str | torch.dtype) or name not in known:
        raise ArgumentError(f"dtype {dtype!r} is not one of auto, {', '.join(known)}." + nearest(name, known))
    return known[name]


def weights_file(folder: Path) -> Path:
    """What `read_tensors` reads in a model's folder: `model.safetensors`, or else the index of the shards."""
    one, index = folder / WEIGHTS_FILE, folder / INDEX_FILE
    return index if index.exists() and not one.exists() else one


def read_index(path: Path) -> dict[str, set[str]]:
    """The names of the tensors in each shard, by the shard's file name, from a `model.safetensors.index.json`.

    Raises:
        CheckpointError: not JSON, no tensors in it, or a shard that is no safetensors file in the same folder.
    """
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: weight_map is {weight_map!r}, expected the names of tensors and their files.")
    shards: dict[str, set[str]] = defaultdict(set)
    for name, file in weight_map.items():
        if not isinstance(file, str) or not SHARD_NAME.fullmatch(file):
            raise CheckpointError(
                f"{path}: {name} is said to be in {file!r}, expected a .safetensors file in the same folder."
            )
        shards[file].add(name)
    return dict(shards)


class TensorInfo(NamedTuple):
    """What a safetensors header says of a tensor; `dtype` in the format's own words (`F32`)."""

    shape: tuple[int, ...]
    dtype: str


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Shapes and dtypes of a safetensors file, or of the shards that an index names, without reading a weight.

    Raises:
        CheckpointError: a file is missing, truncated or damaged, a shard holds other tensors than the index says, or a
            tensor is not of floating point.
    """
    header: dict[str, TensorInfo] = {}
    for file in _files(path):
        with open_tensors(file, remedy=_fetch_again(file)) as opened:
            for name in opened.keys():  # noqa: SIM118
                part = opened.get_slice(name)
                header[name] = TensorInfo(tuple(part.get_shape()), part.get_dtype())
    for name, info in header.items():
        if info.dtype not in FLOATS:
            raise CheckpointError(f"{path}: {name} is of dtype {info.dtype}, expected one of {', '.join(FLOATS)}.")
    return header


def header_of(tensors: Mapping[str, Tensor]) -> dict[str, TensorInfo]:
    """What a header would say of these tensors."""
    names = {dtype: name for name, dtype in FLOATS.items()}
    return {name: TensorInfo(tuple(tensor.shape), names[tensor.dtype]) for name, tensor in tensors.items()}


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a safetensors file, or of the shards that an index names, each finite.

    Raises:
        CheckpointError: a file is missing, truncated or damaged, a shard holds other tensors than the index says, or a
            tensor holds NaN or infinity (named).
    """
    tensors: dict[str, Tensor] = {}
    for file in _files(path):
        with open_tensors(file, remedy=_fetch_again(file)) as opened:
            tensors |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    for name, tensor in tensors.items():
        if tensor.is_floating_point():
            check_finite(name, tensor, path)
    return tensors


def _fetch_again(path: Path) -> str:
    return f"A truncated download? Delete {path.resolve()} and fetch it again."


def _files(path: Path) -> list[Path]:
    """The safetensors file itself, or the shards of an index, which hold what it says."""
    if path.suffix != ".json":
        return [path]
    files = []
    for name, names in read_index(path).items():
        file = path.with_name(name)
        if not file.exists():
            raise CheckpointError(f"{path.parent} has no {name}, which {path.name} names for {len(names)} tensors.")
        with open_tensors(file, remedy=_fetch_again(file)) as opened:
            if set(opened.keys()) != names:
                differ = sorted(set(opened.keys()) ^ names)[:4]
                raise CheckpointError(f"{file}: {path.name} and the file disagree about {differ}.")
        files.append(file)
    return files


def check_layers(n_layers: int, header: Mapping[str, TensorInfo], path: Path) -> None:
    """Refuse more layers than the file has tensors, before names are made up for them (`CheckpointError`)."""
    if n_layers > len(header):
        raise CheckpointError(f"{path} holds {len(header)} tensors; the config asks for {n_layers} layers.")


def check_shapes(
    tensors: Mapping[str, TensorInfo] | Mapping[str, Tensor], wanted: Mapping[str, tuple[int, ...]], path: Path
) -> None:
    """Compare the tensors (or the header) of the file at `path` with the names and shapes that its config asks for.

    Raises:
        CheckpointError: a tensor is missing (with the nearest left over), of another shape, or left over.
    """
    unread = tensors.keys() - wanted.keys()
    for name, shape in wanted.items():
        if name not in tensors:
            raise CheckpointError(f"{path}: no tensor {name!r}, which the config asks for." + nearest(name, unread))
        if tensors[name].shape != shape:
            raise CheckpointError(
                f"{path}: {name} has shape {tuple(tensors[name].shape)}, the config asks for {shape}."
            )
    if unread:
        raise CheckpointError(f"{path}: tensors {sorted(unread)} have no place in the model the config describes.")
