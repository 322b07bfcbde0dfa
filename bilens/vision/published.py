"""Image classifiers in and out of the authors' format: `config.json` + `model.safetensors`.

Tensors: `embed.weight (d_hidden, d_input)`, `blocks.L.weight (2 d_hidden, d_hidden)` rows left then right,
`blocks.L.bias (2 d_hidden)` where `bias`, `head.weight (d_output, d_hidden)`: the parameters of `BilinearClassifier`
under their own names, so that nothing is computed and saving gives the same bits back.
"""

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from typing_extensions import Self

from bilens._core.checks import check_finite, check_flags
from bilens._core.files import destination_folder, read_json, to_path, write_atomically
from bilens.errors import CheckpointError, ModelNotFoundError
from bilens.model.files import (
    CONFIG_FILE,
    FLOATS,
    HUB_ID,
    WEIGHTS_FILE,
    TensorInfo,
    check_layers,
    check_shapes,
    holds,
    read_header,
    read_tensors,
    refuse_other_model,
    resolve_device,
    resolve_dtype,
)
from bilens.model.hub import HubOptions, fetch_from_hub
from bilens.vision.config import (
    SIZE_KEYS,
    SWITCH_KEYS,
    ClassifierConfig,
    classifier_config_from_published,
    classifier_config_to_published,
)


class PublishedClassifierMixin:
    """The half of `BilinearClassifier` that is about files."""

    cfg: ClassifierConfig
    named_parameters: Any

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike[str],
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | str = "auto",
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
    ) -> Self:
        """Load an image classifier in the authors' format.

        Args:
            source: a folder, or a Hugging Face hub id.
            device: `None` takes CUDA where there is one.
            dtype: the type of the weights in memory; `"auto"` keeps the file's.
            revision, token, cache_dir, local_files_only: the options for a hub repository; see `bilens.load_model`.

        Raises:
            ModelNotFoundError: there is no such folder, it has no such files, or the hub does not give it.
            CheckpointError: the files are truncated, incomplete, of the wrong shapes, or hold NaN.
        """
        folder = _find(source, HubOptions(revision, token, cache_dir, local_files_only))
        cfg = classifier_config_from_published(read_json(folder / CONFIG_FILE))
        path = folder / WEIGHTS_FILE
        header = read_header(path)
        check_layers(cfg.n_layer, header, path)
        device = resolve_device(device)
        dtype = resolve_dtype(dtype, _stored_dtype(header, path))
        check_shapes(header, _shapes(cfg), path)
        build: Any = cls
        with torch.device("meta"):  # the weights come from the file
            model = build(cfg)
        tensors = read_tensors(path)
        model.to(dtype).to_empty(device=device)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                weight.copy_(tensors[name])
                check_finite(name, weight, path, before=tensors[name])
        return model.eval()

    def save_pretrained(self, folder: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write `config.json` and `model.safetensors`; the folder is made, each file is replaced whole or not at all.

        Args:
            folder: of the files.
            overwrite: replace another model that is in the folder, instead of refusing; the same one may be written
                again.

        Raises:
            OverwriteError: the folder holds another model, or this one with other weights.
            CheckpointError: a weight that is not finite: nothing could load the file.
            ArgumentError, WriteError: the folder cannot be written to.
        """
        check_flags(overwrite=overwrite)
        folder = destination_folder(folder)
        tensors = {name: weight.detach().cpu().contiguous() for name, weight in self.named_parameters()}
        for name, tensor in tensors.items():
            check_finite(name, tensor, "the classifier")
        published = classifier_config_to_published(self.cfg)
        if not overwrite:
            refuse_other_model(folder, {key: published[key] for key in (*SIZE_KEYS, *SWITCH_KEYS)}, tensors)
        config = json.dumps(published, indent=2) + "\n"
        write_atomically(folder / WEIGHTS_FILE, lambda path: save_file(tensors, path, metadata={"format": "pt"}))
        write_atomically(folder / CONFIG_FILE, lambda path: path.write_text(config))


def _find(source: str | os.PathLike[str], hub: HubOptions) -> Path:
    path = to_path(source, "source")
    if path.is_dir():
        hub.refuse_revision(str(source))
        for file in (CONFIG_FILE, WEIGHTS_FILE):
            if not (path / file).exists():
                raise ModelNotFoundError(f"{path} has no {file}; it holds {holds(path)}.")
        return path
    if isinstance(source, str) and HUB_ID.fullmatch(source):
        files = (CONFIG_FILE, WEIGHTS_FILE)
        return fetch_from_hub(source, files, needed=files, options=hub)
    raise ModelNotFoundError(f"no classifier {str(source)!r}: not a folder, and not a hub id of the form owner/name.")


def _shapes(cfg: ClassifierConfig) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"embed.weight": (cfg.d_hidden, cfg.d_input)}
    for layer in range(cfg.n_layer):
        shapes[f"blocks.{layer}.weight"] = (2 * cfg.d_hidden, cfg.d_hidden)
        if cfg.bias:
            shapes[f"blocks.{layer}.bias"] = (2 * cfg.d_hidden,)
    return shapes | {"head.weight": (cfg.d_output, cfg.d_hidden)}


def _stored_dtype(header: dict[str, TensorInfo], path: Path) -> torch.dtype:
    dtypes = {info.dtype for info in header.values()}
    if len(dtypes) != 1:
        raise CheckpointError(f"{path} holds {', '.join(sorted(dtypes)) or 'nothing'}, expected weights of one dtype.")
    return FLOATS[dtypes.pop()]
