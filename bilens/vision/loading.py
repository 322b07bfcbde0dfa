"""Image classifiers in and out of the authors' format: `config.json` + `model.safetensors`.

Tensors: `embed.weight (d_hidden, d_input)`, `blocks.L.weight (2 d_hidden, d_hidden)` rows left then right,
`blocks.L.bias (2 d_hidden)` where `bias`, `head.weight (d_output, d_hidden)`: the parameters of `BilinearClassifier`
under their own names, so that nothing is computed and saving gives the same bits back.
"""

import json
import os
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from bilens.errors import CheckpointError, ModelNotFoundError
from bilens.files import destination_folder, read_json, to_path, write_atomically
from bilens.hub import HubOptions, fetch_from_hub
from bilens.loading import CONFIG_FILE, HUB_ID, WEIGHTS_FILE, check_shapes, read_tensors, resolve_dtype
from bilens.vision.config import classifier_config_from_published, classifier_config_to_published
from bilens.vision.model import BilinearClassifier


def load_classifier(
    source: str | os.PathLike[str],
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str = "auto",
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> BilinearClassifier:
    """Load an image classifier in the authors' format.

    Args:
        source: a folder, or a Hugging Face hub id.
        device: `None` takes CUDA where there is one.
        dtype: of the weights in memory; `"auto"` keeps the file's.
        revision, token, cache_dir, local_files_only: of a hub repository; see `bilens.load_model`.

    Raises:
        ModelNotFoundError: no such folder, no such files in it, or not to be had from the hub.
        CheckpointError: the files are truncated, incomplete, of the wrong shapes, or hold NaN.
    """
    folder = _find(source, HubOptions(revision, token, cache_dir, local_files_only))
    cfg = classifier_config_from_published(read_json(folder / CONFIG_FILE))
    path = folder / WEIGHTS_FILE
    tensors = read_tensors(path)
    with torch.device("meta"):  # shapes only: the weights come from the file
        model = BilinearClassifier(cfg)
    check_shapes(tensors, {name: tuple(weight.shape) for name, weight in model.named_parameters()}, path)
    model.to(resolve_dtype(dtype, _stored_dtype(tensors, path)))
    model.to_empty(device=device or ("cuda" if torch.cuda.is_available() else "cpu"))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(tensors[name])
    return model.eval()


def save_classifier(model: BilinearClassifier, folder: str | os.PathLike[str]) -> None:
    """Write `config.json` and `model.safetensors`; the folder is made, each file is replaced whole or not at all."""
    folder = destination_folder(folder)
    tensors = {name: weight.detach().cpu().contiguous() for name, weight in model.named_parameters()}
    config = json.dumps(classifier_config_to_published(model.cfg), indent=2) + "\n"
    write_atomically(folder / WEIGHTS_FILE, lambda path: save_file(tensors, path, metadata={"format": "pt"}))
    write_atomically(folder / CONFIG_FILE, lambda path: path.write_text(config))


def _find(source: str | os.PathLike[str], hub: HubOptions) -> Path:
    path = to_path(source, "source")
    if path.is_dir():
        hub.refuse_revision(str(source))
        for file in (CONFIG_FILE, WEIGHTS_FILE):
            if not (path / file).exists():
                raise ModelNotFoundError(f"{path} has no {file}; it holds {sorted(p.name for p in path.iterdir())}.")
        return path
    if isinstance(source, str) and HUB_ID.fullmatch(source):
        files = (CONFIG_FILE, WEIGHTS_FILE)
        return fetch_from_hub(source, files, needed=files, options=hub)
    raise ModelNotFoundError(f"no classifier {str(source)!r}: not a folder, and not a hub id of the form owner/name.")


def _stored_dtype(tensors: dict[str, Tensor], path: Path) -> torch.dtype:
    dtypes = {tensor.dtype for tensor in tensors.values()}
    if len(dtypes) > 1 or not all(dtype.is_floating_point for dtype in dtypes):
        found = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        raise CheckpointError(f"{path} holds {found}, expected weights of one floating-point dtype.")
    return dtypes.pop()
