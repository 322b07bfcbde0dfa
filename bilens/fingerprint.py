"""What a stored result was computed from, as a short string: two that are equal are of the same weights."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

_PLACES = ("device", "metadata", "published", "model_name", "dtype")  # where a thing is or came from, not what it is


def fingerprint(weights: Mapping[str, Tensor], facts: Mapping[str, Any] | None = None) -> str:
    """Of named tensors (names, dtypes, shapes and every bit of the values) and of what else decides the result.

    Args:
        weights: such as `module.state_dict()`; the order does not matter.
        facts: JSON-able; other values count by their `str`.
    """
    digest = hashlib.sha256(json.dumps(facts or {}, sort_keys=True, default=str).encode())
    for name, tensor in sorted(weights.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        # A view as bytes: numpy has no bfloat16.
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]


def model_fingerprint(model: Any) -> str:
    """Of a `HookedBilinearTransformer`: weights and the configuration that decides what they compute."""
    return fingerprint(model.state_dict(), _decisive(asdict(model.cfg)))


def sae_fingerprint(sae: Any) -> str:
    """Of a SAELens SAE or transcoder: weights, configuration, and the hooks it reads and writes."""
    metadata = sae.cfg.metadata
    hooks = {"reads": metadata.hook_name, "writes": metadata.hook_name_out}
    return fingerprint(sae.state_dict(), _decisive(sae.cfg.to_dict()) | hooks)


def _decisive(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in _PLACES}
