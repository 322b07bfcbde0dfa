"""`load_model`: the hooked model from a name, a folder or the hub."""

import os
from pathlib import Path
from typing import Any

import torch

from bilens.model.transformer import HookedBilinearTransformer


def load_model(
    source: str | os.PathLike[str] | None = None,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str = torch.float32,
    tokenizer: Any = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> HookedBilinearTransformer:
    """Load a model in the published format.

    Args:
        source: a bundled name (`bilens.list_models()`), a folder, or a Hugging Face hub id such as `tdooms/ts-medium`;
            `None` is the default bundled model.
        device: `None` takes CUDA where there is one.
        dtype: the type of the weights in memory (`torch.float32`, `"bfloat16"`, ...); `"auto"` keeps the file's.
        tokenizer: a transformers tokenizer to use instead of the checkpoint's.
        revision: the branch, tag or commit hash of a hub repository; `None` is `main`.
        token: a token for a private or gated hub repository; `None` takes the one of `hf auth login`.
        cache_dir: the folder of hub downloads; `None` is the Hugging Face cache.
        local_files_only: use what the cache has and do not ask the hub, as `HF_HUB_OFFLINE=1` does for everything.

    Raises:
        ArgumentError: torch has no such dtype or device.
        ModelNotFoundError: there is nothing of that name (with the nearest bundled names), or the hub does not give it.
        CheckpointError: the files are truncated, incomplete, of the wrong shapes, or hold NaN.
    """
    return HookedBilinearTransformer.from_pretrained(
        source,
        device=device,
        dtype=dtype,
        tokenizer=tokenizer,
        revision=revision,
        token=token,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
    )
