"""Models in and out of the published format: `config.json` + `model.safetensors` (+ the tokenizer).

1. find the files: a bundled name, a folder, or a hub id
2. read the config, refuse it by name where a key is missing
3. check every tensor's name and shape against the model the config describes, and that it is finite
4. copy; the parameters are stored as published, so nothing is computed and saving gives the same bits back
"""

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from bilens.config import config_from_published, config_to_published
from bilens.errors import CheckpointError, ModelNotFoundError, nearest
from bilens.files import write_atomically
from bilens.model import HookedBilinearTransformer

PRETRAINED = Path(__file__).parent / "pretrained"
DEFAULT_MODEL = "ts-tiny"
CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class HubTokenizer:
    """Where a published tokenizer name points, and what pads with it."""

    repo: str
    pad_token: str | None


PUBLISHED_TOKENIZERS = {
    "ts-4096": HubTokenizer("tdooms/ts-tokenizer-4096", "[EOS]"),
    "mistral": HubTokenizer("mistral-community/Mixtral-8x22B-v0.1", "</s>"),
    "gpt2": HubTokenizer("openai-community/gpt2", "<|endoftext|>"),
}


def list_models() -> list[str]:
    """Names of the models that come with bilens; the first is what `load_model()` loads."""
    names = sorted(path.parent.name for path in PRETRAINED.glob(f"*/{CONFIG_FILE}"))
    return sorted(names, key=lambda name: name != DEFAULT_MODEL)


def load_model(
    source: str | os.PathLike[str] | None = None,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str = torch.float32,
    tokenizer: Any = None,
) -> HookedBilinearTransformer:
    """Load a model in the published format.

    Args:
        source: a bundled name (`bilens.list_models()`), a folder, or a Hugging Face hub id such as `tdooms/ts-medium`;
            `None` is the default bundled model.
        device: `None` takes CUDA where there is one.
        dtype: of the weights in memory (`torch.float32`, `"bfloat16"`, ...); `"auto"` keeps the file's.
        tokenizer: a transformers tokenizer to use instead of the checkpoint's.

    Raises:
        ModelNotFoundError: nothing of that name (with the nearest bundled names).
        CheckpointError: the files are truncated, incomplete, of the wrong shapes, or hold NaN.
    """
    folder, name = find_model(source)
    published = read_config(folder / CONFIG_FILE)
    tensors = read_tensors(folder / WEIGHTS_FILE)
    embedding = tensors.get("transformer.wte.weight")
    if embedding is None:
        raise CheckpointError(
            f"{folder / WEIGHTS_FILE}: no tensor 'transformer.wte.weight'; is this a published bilinear transformer? "
            f"It holds {', '.join(sorted(tensors)[:4])}, ..."
        )
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    cfg = config_from_published(
        published,
        d_vocab=embedding.shape[0],
        device=str(device),
        dtype=resolve_dtype(dtype, embedding.dtype),
        model_name=name,
    )
    if tokenizer is None:
        tokenizer = load_tokenizer(folder, cfg.tokenizer_name)
    model = HookedBilinearTransformer(cfg, tokenizer, init_weights=False)
    _copy_weights(model, tensors, folder / WEIGHTS_FILE)
    return model.eval()


def save_model(
    model: HookedBilinearTransformer, folder: str | os.PathLike[str], dtype: torch.dtype | None = None
) -> None:
    """Write `config.json`, `model.safetensors` and the tokenizer, in the format the authors' own code reads.

    Args:
        model: the model.
        folder: made where it does not exist; files in it are replaced one by one, each whole or not at all.
        dtype: of the weights on disk; `None` keeps the model's. Loading with `dtype="auto"` and saving gives the same
            bits back.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: weight.detach().to("cpu", dtype or model.cfg.dtype).contiguous()
        for name, weight in published_tensors(model).items()
    }
    write_atomically(folder / WEIGHTS_FILE, lambda path: save_file(tensors, path, metadata={"format": "pt"}))
    config = config_to_published(model.cfg) | {"dtype": str(dtype or model.cfg.dtype).removeprefix("torch.")}
    write_atomically(folder / CONFIG_FILE, lambda path: path.write_text(json.dumps(config, indent=2) + "\n"))
    if model.tokenizer is not None:
        with TemporaryDirectory(dir=folder, prefix=".tokenizer") as beside:
            model.tokenizer.save_pretrained(beside)
            for file in Path(beside).iterdir():
                os.replace(file, folder / file.name)


def published_tensors(model: HookedBilinearTransformer) -> dict[str, Tensor]:
    """The model's weights under their published names: the parameters themselves, not copies."""
    tensors = {
        "transformer.wte.weight": model.embed.W_E,
        "lm_head.weight": model.unembed.head.weight,
    }
    for layer, block in enumerate(model.blocks):
        at = f"transformer.h.{layer}"
        tensors[f"{at}.attn.qkv.weight"] = block.attn.qkv.weight
        tensors[f"{at}.attn.o.weight"] = block.attn.o.weight
        tensors[f"{at}.attn.rotary.inv_freq"] = block.attn.rotary.inv_freq
        for name in ("w", "p"):
            linear = getattr(block.mlp, name)
            tensors[f"{at}.mlp.{name}.weight"] = linear.weight
            if linear.bias is not None:
                tensors[f"{at}.mlp.{name}.bias"] = linear.bias
    return tensors


# --- finding ----------------------------------------------------------------------------------------------------------


def find_model(source: str | os.PathLike[str] | None) -> tuple[Path, str]:
    """The folder that holds a source's files (fetched from the hub where need be), and the name to remember it by."""
    if source is None:
        source = DEFAULT_MODEL
    if str(source) in list_models():
        return PRETRAINED / str(source), str(source)
    path = Path(source).expanduser()
    if path.is_dir():
        for file in (CONFIG_FILE, WEIGHTS_FILE):
            if not (path / file).exists():
                found = sorted(p.name for p in path.iterdir())
                raise ModelNotFoundError(f"{path} has no {file}; it holds {found}.")
        return path, str(source)
    if isinstance(source, str) and HUB_ID.fullmatch(source):
        files = [CONFIG_FILE, WEIGHTS_FILE, *TOKENIZER_FILES]
        return fetch_from_hub(source, files, needed=(CONFIG_FILE, WEIGHTS_FILE)), source
    raise ModelNotFoundError(
        f"no model {str(source)!r}: not a bundled name ({', '.join(list_models()) or 'none here'}), not a folder, and "
        "not a hub id of the form owner/name." + nearest(str(source), list_models())
    )


def fetch_from_hub(repo: str, files: list[str], needed: tuple[str, ...] = ()) -> Path:
    """Download what a hub repository has of `files` into the Hugging Face cache; the snapshot's folder.

    Args:
        repo: a hub id.
        files: names or glob patterns; nothing else is downloaded.
        needed: names that have to be there afterwards.

    Raises:
        ModelNotFoundError: no such repository, a gated one, a needed file missing, or no connection and no cache.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        folder = Path(snapshot_download(repo, allow_patterns=files))
    except GatedRepoError as error:
        raise ModelNotFoundError(
            f"{repo!r} is gated: ask for access at its page on the hub, then log in with `hf auth login`."
        ) from error
    except RepositoryNotFoundError as error:
        raise ModelNotFoundError(f"the hub has no repository {repo!r} (or it is private; `hf auth login`).") from error
    except LocalEntryNotFoundError as error:
        raise ModelNotFoundError(
            f"{repo!r} is not in the Hugging Face cache and the hub cannot be reached. Bundled models work offline: "
            f"{', '.join(list_models())}."
        ) from error
    except HfHubHTTPError as error:
        raise ModelNotFoundError(f"the hub refused {repo!r}: {error}") from error
    for file in needed:
        if not (folder / file).exists():
            raise ModelNotFoundError(f"the hub repository {repo!r} has no {file}.")
    return folder


def load_tokenizer(folder: Path, name: str | None) -> Any:
    """The tokenizer beside the weights, or the one `config.tokenizer` names; `None` where neither is to be had.

    A model without a tokenizer is usable with tokens, so a tokenizer that cannot be fetched is not an error here; its
    absence is one where text is first used.

    Raises:
        CheckpointError: the tokenizer's own files are damaged.
    """
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if (folder / "tokenizer.json").exists():
        special = {"unk_token": "[UNK]", "bos_token": "[BOS]", "eos_token": "[EOS]", "pad_token": "[EOS]"}
        options = folder / "tokenizer_config.json"
        read = read_config(options) if options.exists() else special
        # Older files hold {"content": "[BOS]", ...} where newer ones hold "[BOS]".
        found = {key: token["content"] if isinstance(token := read.get(key), dict) else token for key in special}
        try:
            backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # tokenizers raises nothing narrower
            raise CheckpointError(f"{folder / 'tokenizer.json'} cannot be read: {error}") from error
        # A special token that the vocabulary lacks would be added to it, with an id that the model has no row for.
        return PreTrainedTokenizerFast(
            tokenizer_object=backend,
            clean_up_tokenization_spaces=False,
            **{key: token for key, token in found.items() if token and backend.token_to_id(token) is not None},
        )
    if name is None:
        return None
    published = PUBLISHED_TOKENIZERS.get(name, HubTokenizer(name, None))
    try:
        tokenizer = AutoTokenizer.from_pretrained(published.repo)
    except OSError:
        return None
    if published.pad_token is not None:
        tokenizer.pad_token = published.pad_token
    return tokenizer


# --- reading ----------------------------------------------------------------------------------------------------------


def resolve_dtype(dtype: torch.dtype | str, stored: torch.dtype) -> torch.dtype:
    """A torch dtype from itself, its name, or `"auto"` (the stored one)."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        return stored
    known = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}
    if dtype not in known:
        raise ValueError(f"dtype {dtype!r} is not one of auto, {', '.join(known)}." + nearest(dtype, known))
    return known[dtype]


def read_config(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        CheckpointError: not JSON, or not an object.
    """
    try:
        config = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} holds a {type(config).__name__}, expected an object.")
    return config


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a safetensors file, each finite.

    Raises:
        CheckpointError: the file is truncated or damaged, or a tensor holds NaN or infinity (named).
    """
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} ({path.stat().st_size if path.exists() else 0} bytes) cannot be read: {error}. "
            "A truncated download? Fetch it again."
        ) from error
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            bad = int((~tensor.isfinite()).sum())
            raise CheckpointError(f"{path}: {name} holds {bad} values that are NaN or infinite, of {tensor.numel()}.")
    return tensors


def check_shapes(tensors: dict[str, Tensor], wanted: dict[str, tuple[int, ...]], path: Path) -> None:
    """Compare the tensors of the file at `path` with the names and shapes that its config asks for.

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


@torch.no_grad()
def _copy_weights(model: HookedBilinearTransformer, tensors: dict[str, Tensor], path: Path) -> None:
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith("rotary.inv_freq")}
    wanted = {name: w for name, w in published_tensors(model).items() if not name.endswith("rotary.inv_freq")}
    check_shapes(tensors, {name: tuple(weight.shape) for name, weight in wanted.items()}, path)
    for name, weight in wanted.items():
        weight.copy_(tensors[name])
