"""What a result was made from: whether that is still the same, or the same as what it is used with.

1. on disk, a `fingerprint`: a short string, equal for the same weights and configuration (`check_same` compares two)
2. in memory, a `Snapshot`: integer sums of the bits of every row and column, some milliseconds for ten million weights.
   It is of the values: what was moved back and forth, or edited and restored, has not changed
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from bilens.errors import StaleError

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# Where a thing is or came from, and which of its points are shown: not what it computes.
_PLACES = ("device", "metadata", "published", "model_name", "dtype")
_SHOWN = ("use_attn_result", "use_split_qkv_input", "use_attn_in", "use_hook_mlp_in", "use_hook_tokens")


def fingerprint(weights: Mapping[str, Tensor], facts: Mapping[str, Any] | None = None) -> str:
    """Of named tensors (names, dtypes, shapes and every bit of the values) and of what else decides the result.

    Args:
        weights: the tensors by name, for example `module.state_dict()`; their order does not matter.
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
    return fingerprint(*_model_parts(model))


def sae_fingerprint(sae: Any) -> str:
    """Of a SAELens SAE or transcoder: weights, configuration, and the hooks it reads and writes."""
    return fingerprint(*_sae_parts(sae))


def check_same(made_from: str, given: str, what: str, of: str) -> None:
    """Refuse what was made from something else than what it is used with.

    Args:
        made_from, given: fingerprints.
        what: what the message calls the result, for example `"the feature store features/"`.
        of: what it was made from, for example `"model"` or `"SAE on blocks.1.hook_mlp_out"`.

    Raises:
        StaleError: they differ.
    """
    if made_from != given:
        raise StaleError(
            f"{what} was made from another {of} than the one given, or before its weights were changed: make it anew, "
            f"or give the {of} that it was made from."
        )


class Snapshot:
    """Notices when models or SAEs are not what they were.

    Args:
        model: a `HookedBilinearTransformer`, or `None`.
        saes: the SAEs by the names that a message calls them.
    """

    def __init__(self, model: Any = None, saes: Mapping[str, Any] | None = None):
        self._watched = ({} if model is None else {"the model": (model, _model_parts)}) | {
            called: (sae, _sae_parts) for called, sae in (saes or {}).items()
        }
        self._then = {called: _sums(*parts(thing)) for called, (thing, parts) in self._watched.items()}

    def changed(self) -> str | None:
        """What is not as it was: the first such name."""
        for called, (thing, parts) in self._watched.items():
            now, then = _sums(*parts(thing)), self._then[called]
            if now.keys() != then.keys() or any(not _equal(now[name], then[name]) for name in now):
                return called
        return None

    def check(self, what: str, again: str) -> None:
        """Refuse to go on with numbers of weights that are gone.

        Args:
            what: holds them, for the message: `"this frozen pass"`.
            again: the advice on how to make it anew.

        Raises:
            StaleError: something has changed.
        """
        if called := self.changed():
            raise StaleError(
                f"{called} was changed (weights, dtype, device or configuration) after {what} was made, whose numbers "
                f"are of what it was: {again}"
            )


def _model_parts(model: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    shown = {"use_attn_result": False}  # as in the fingerprints that are on disk
    return model.state_dict(), _decisive(asdict(model.cfg)) | shown


def _sae_parts(sae: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    metadata = sae.cfg.metadata
    hooks = {"reads": metadata.hook_name, "writes": metadata.hook_name_out}
    return sae.state_dict(), _decisive(sae.cfg.to_dict()) | hooks


def _decisive(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in _PLACES + _SHOWN}


def _sums(weights: Mapping[str, Tensor], facts: Mapping[str, Any]) -> dict[str, Any]:
    """What is compared of each weight, and the configuration."""
    found: dict[str, Any] = {"configuration": json.dumps(facts, sort_keys=True, default=str)}
    for name, tensor in weights.items():
        bits = torch.atleast_1d(tensor.detach()).view(_BITS[tensor.element_size()])
        # Sums may wrap: they are compared, not used. Two of them, for swapped rows or columns.
        sums = [bits.sum(axis, dtype=bits.dtype) for axis in {0, bits.ndim - 1}]
        found[name] = (tensor.dtype, tensor.device, tensor.shape, sums)
    return found


def _equal(now: Any, then: Any) -> bool:
    if isinstance(now, str):
        return now == then
    return now[:3] == then[:3] and all(map(torch.equal, now[3], then[3]))
