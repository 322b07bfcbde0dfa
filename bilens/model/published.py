"""Models in and out of the published format: what `bilens.model.files` finds and reads becomes a model, and back.

The parameters are stored as published, so that loading and saving are copies, nothing is computed, and saving gives the
same bits back.
"""

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from typing_extensions import Self

from bilens._core.checks import check_finite, check_flags
from bilens._core.files import destination_folder, read_json, write_atomically, write_files
from bilens.errors import CheckpointError
from bilens.model.config import any_attention_bias, config_from_published, config_to_published
from bilens.model.files import (
    CONFIG_FILE,
    EMBEDDING,
    FLOATS,
    INDEX_FILE,
    WEIGHTS_FILE,
    WRITTEN,
    check_layers,
    check_shapes,
    find_model,
    header_of,
    load_tokenizer,
    published_shapes,
    read_header,
    read_tensors,
    refuse_other_model,
    resolve_device,
    resolve_dtype,
    weights_file,
)
from bilens.model.hf_tokenizer import save_tokenizer
from bilens.model.hub import HubOptions, model_card, push_to_hub
from bilens.model.vpd import is_vpd, read_vpd


class PublishedMixin:
    """The half of `HookedBilinearTransformer` that is about files and the hub."""

    cfg: Any
    tokenizer: Any
    embed: Any
    blocks: Any
    unembed: Any

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike[str] | None = None,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | str = torch.float32,
        tokenizer: Any = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
    ) -> Self:
        """Load a model in the published format; arguments and exceptions are those of `bilens.load_model`."""
        hub = HubOptions(revision, token, cache_dir, local_files_only)
        folder, name = find_model(source, hub)
        published = read_json(folder / CONFIG_FILE)
        weights = weights_file(folder)
        tensors = None
        if is_vpd(published):
            published, tensors = read_vpd(published, weights)
        header = read_header(weights) if tensors is None else header_of(tensors)
        embedding = header.get(EMBEDDING)
        if embedding is None or len(embedding.shape) != 2:
            raise CheckpointError(
                f"{weights}: no tensor {EMBEDDING!r} with two axes; is this a published bilinear transformer? "
                f"It holds {', '.join(sorted(header)[:4])}, ..."
            )
        if published.get("bias") is True and any_attention_bias(header):
            published.setdefault("attention_bias", True)
        cfg = config_from_published(
            published,
            d_vocab=embedding.shape[0],
            device=resolve_device(device),
            dtype=resolve_dtype(dtype, FLOATS[embedding.dtype]),
            model_name=name,
        )
        header = {name: info for name, info in header.items() if not name.endswith("rotary.inv_freq")}
        check_layers(cfg.n_layers, header, weights)
        check_shapes(header, published_shapes(cfg), weights)
        if tokenizer is None:
            tokenizer = load_tokenizer(folder, cfg.tokenizer_name, hub)
        build: Any = cls
        model = build(cfg, tokenizer, init_weights=False)
        model._copy_weights(read_tensors(weights) if tensors is None else tensors, weights)
        return model.eval()

    def save_pretrained(
        self, folder: str | os.PathLike[str], dtype: torch.dtype | str | None = None, *, overwrite: bool = False
    ) -> None:
        """Write `config.json`, `model.safetensors` and the tokenizer, in the format the authors' own code reads.

        Args:
            folder: made where it does not exist; files in it are replaced one by one, each whole or not at all.
            dtype: the type of the weights on disk; `None` keeps the model's. Loading with `dtype="auto"` and saving
                gives the same bits back.
            overwrite: replace another model that is in the folder, instead of refusing; the same one may be written
                again.

        Raises:
            OverwriteError: the folder holds another model, or this one with other weights.
            CheckpointError: a weight that is not finite, or not in this dtype: nothing could load the file.
            ArgumentError: a dtype that holds no weights.
            ArgumentError, WriteError: the folder cannot be written to.
        """
        check_flags(overwrite=overwrite)
        dtype = resolve_dtype("auto" if dtype is None else dtype, self.cfg.dtype)
        folder = destination_folder(folder)
        tensors = {
            name: weight.detach().to("cpu", dtype).contiguous() for name, weight in self.published_tensors().items()
        }
        for name, tensor in tensors.items():
            check_finite(name, tensor, "the model")
        config = config_to_published(self.cfg) | {"dtype": str(dtype).removeprefix("torch.")}
        if not overwrite:
            keys = ("n_head", "n_layer", "n_ctx", "d_model", "d_hidden", "bilinear", "gate", "bias", "normalization")
            decides = {key: config[key] for key in keys} | {key: config.get(key, WRITTEN[key]) for key in WRITTEN}
            refuse_other_model(folder, decides, tensors)
        write_atomically(folder / WEIGHTS_FILE, lambda path: save_file(tensors, path, metadata={"format": "pt"}))
        write_atomically(folder / CONFIG_FILE, lambda path: path.write_text(json.dumps(config, indent=2) + "\n"))
        if self.tokenizer is not None:
            write_files(folder, lambda beside: save_tokenizer(self.tokenizer, beside))

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        commit_message: str = "Upload model",
        dtype: torch.dtype | str | None = None,
    ) -> Any:
        """Save into a Hugging Face hub repository, with a model card where it has none; see `bilens.model.hub`.

        Args:
            repo_id: `owner/name`; made where it does not exist.
            private: true makes a new repository private; `None` takes the owner's default.
            token: a token with permission to write; `None` takes the one of `hf auth login`.
            revision: the branch, made where it does not exist; `None` is `main`.
            commit_message: one line.
            dtype: the type of the weights on the hub; `None` keeps the model's.

        Returns:
            `huggingface_hub.CommitInfo`: `.oid`, `.commit_url`.

        Raises:
            UploadError: no permission, no connection, or the hub refused it.
        """
        return push_to_hub(
            lambda folder: self.save_pretrained(folder, dtype),
            repo_id,
            lambda folder, repo: model_card(self.cfg, repo),
            private=private,
            token=token,
            revision=revision,
            commit_message=commit_message,
            delete_patterns=[INDEX_FILE, "model-*-of-*.safetensors"],
        )

    def published_tensors(self) -> dict[str, Tensor]:
        """The model's weights under their published names: the parameters themselves, not copies."""
        tensors = {
            "transformer.wte.weight": self.embed.W_E,
            "lm_head.weight": self.unembed.head.weight,
        }
        for layer, block in enumerate(self.blocks):
            at = f"transformer.h.{layer}"
            tensors[f"{at}.attn.qkv.weight"] = block.attn.qkv.weight
            if block.attn.qkv.bias is not None:
                tensors[f"{at}.attn.qkv.bias"] = block.attn.qkv.bias
            tensors[f"{at}.attn.o.weight"] = block.attn.o.weight
            tensors[f"{at}.attn.rotary.inv_freq"] = block.attn.rotary.inv_freq
            for name in ("w", "p"):
                linear = getattr(block.mlp, name)
                tensors[f"{at}.mlp.{name}.weight"] = linear.weight
                if linear.bias is not None:
                    tensors[f"{at}.mlp.{name}.bias"] = linear.bias
        return tensors

    @torch.no_grad()
    def _copy_weights(self, tensors: dict[str, Tensor], path: Path) -> None:
        for name, weight in self.published_tensors().items():
            if not name.endswith("rotary.inv_freq"):
                weight.copy_(tensors[name])
                check_finite(name, weight, path, before=tensors[name])
