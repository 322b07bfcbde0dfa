"""Checkpoints of a training run: weights, optimiser state and the facts of the run, as one safetensors file.

Written beside and renamed, so that a kill leaves the checkpoint before; nothing is pickled.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from bilens._core.files import open_tensors, parse_json, write_atomically
from bilens._core.folders import differences
from bilens.errors import CheckpointError, TrainingError

WEIGHT = "model"
REMEDY = "Delete it to train from the start."


def save_checkpoint(
    path: Path, weights: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, facts: Mapping[str, Any]
) -> None:
    """Write weights, what the optimiser knows of each, and JSON-able facts.

    Args:
        path: the file's path; its folder must exist.
        weights: the parameters by name, and what other tensors change in training.
        optimizer: an optimizer like Adam, whose state is tensors by parameter.
        facts: step, configuration, history, ...
    """
    tensors = {}
    for name, weight in weights.items():
        tensors[f"{WEIGHT}:{name}"] = weight.detach()
        tensors |= {f"{key}:{name}": value for key, value in optimizer.state.get(weight, {}).items()}
    # A copy where a tensor is a view of another's memory: safetensors refuses shared storage.
    stored = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {key: json.dumps(value) for key, value in facts.items()}
    write_atomically(path, lambda beside: save_file(stored, beside, metadata=metadata))


@contextmanager
def resumable(
    title: str, total: int, done: int, save: Callable[[], int] | None, *, hidden: bool = False
) -> Iterator[Any]:
    """The bar of a loop over tokens; Ctrl-C in the loop leaves a checkpoint, and says how to go on.

    Args:
        title: the title of the bar.
        total, done: the tokens of the whole run, and of the steps taken before.
        save: writes the checkpoint, and returns its step; `None` if the run keeps none.
        hidden: show no bar.
    """
    bar = tqdm(desc=title, total=total, initial=done, unit="tok", unit_scale=True, mininterval=1.0, disable=hidden)
    try:
        yield bar
    except KeyboardInterrupt:
        if save is not None:
            bar.write(f"interrupted at step {save()}; run the same command to go on.")
        raise
    finally:
        bar.close()


def read_facts(path: Path) -> dict[str, Any]:
    """The facts of a checkpoint, without its weights.

    Raises:
        CheckpointError: it is damaged.
    """
    with open_tensors(path, remedy=REMEDY) as file:
        return _facts(file, path)


@torch.no_grad()
def load_checkpoint(
    path: Path, weights: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, same: Mapping[str, Any]
) -> dict[str, Any]:
    """Put weights and optimiser back to where `save_checkpoint` was called.

    Args:
        path: the file's path.
        weights: the parameters by name, overwritten.
        optimizer: its state is overwritten.
        same: facts of this run that must be those of the checkpoint's.

    Returns:
        The stored facts.

    Raises:
        TrainingError: the checkpoint is of another run (what differs is named, with both values).
        CheckpointError: it is damaged.
    """
    with open_tensors(path, remedy=REMEDY) as file:
        facts = _facts(file, path)
        if differ := differences(facts, same):
            raise TrainingError(
                f"{path} is of another run; (there, here): {differ}. Use another folder, or delete the file."
            )
        held = set(file.keys())
        if missing := {f"{WEIGHT}:{name}" for name in weights} - held:
            raise CheckpointError(f"{path} has no {min(missing)!r}. {REMEDY}")
        for entry in held:
            key, _, name = entry.partition(":")
            value, weight = file.get_tensor(entry), weights.get(name)
            if weight is None or (value.ndim and value.shape != weight.shape):
                raise CheckpointError(f"{path}: {entry!r} of shape {list(value.shape)} has no place here. {REMEDY}")
            if key == WEIGHT:
                weight.copy_(value)
            else:  # Adam's step counter stays where torch keeps it, on the CPU unless fused
                optimizer.state[weight][key] = value if value.ndim == 0 else value.to(weight.device)
    return facts


def _facts(file: Any, path: Path) -> dict[str, Any]:
    stored = file.metadata() or {}
    return {key: parse_json(value, f"{key!r} of {path}", object, REMEDY) for key, value in stored.items()}
