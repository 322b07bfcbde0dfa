"""`load_classifier`: an image classifier from a folder or the hub."""

import os
from pathlib import Path

import torch

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
        dtype: the type of the weights in memory; `"auto"` keeps the file's.
        revision, token, cache_dir, local_files_only: the options for a hub repository; see `bilens.load_model`.

    Raises:
        ModelNotFoundError: there is no such folder, it has no such files, or the hub does not give it.
        CheckpointError: the files are truncated, incomplete, of the wrong shapes, or hold NaN.
    """
    return BilinearClassifier.from_pretrained(
        source,
        device=device,
        dtype=dtype,
        revision=revision,
        token=token,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
    )
