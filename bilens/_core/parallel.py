"""Passes over data shared among processes, under `torchrun` or `accelerate launch`: who does what, and one result.

    1. `processes()` joins the processes that the launcher started (it sets RANK, WORLD_SIZE, MASTER_ADDR, ...); a
       program that was started by itself is one process, and nothing below does anything
    2. `share(batches)` gives each process every N-th of them
    3. results meet by `sum_over_processes` (added in the order of the ranks, so the same in every run), by
       `gather_tensors`, or in files that process 0 puts together after a `barrier()`

Only `torch.distributed` is used, which both launchers start; a program that has initialised it already keeps its own.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from itertools import islice
from math import prod
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")

PATIENCE = timedelta(days=1)  # a barrier waits for the slowest process, which may be at work for hours


@contextmanager
def processes() -> Iterator[None]:
    """Join the launcher's processes for the length of the block; what was joined before stays joined after."""
    joins = not _joined() and int(os.environ.get("WORLD_SIZE", "1")) > 1
    if joins:
        # CPU tensors always have gloo; on GPUs, NCCL beside it.
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=PATIENCE)
    try:
        yield
    finally:
        if joins:
            dist.destroy_process_group()


def rank() -> int:
    """Which process this is, from 0."""
    return dist.get_rank() if _joined() else 0


def world_size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if _joined() else 1


def is_main() -> bool:
    """Whether this is the process that writes and prints."""
    return rank() == 0


def local_device() -> str | None:
    """The GPU that the launcher meant for this process; `None` (the default device) without GPUs or a launcher."""
    local = os.environ.get("LOCAL_RANK")
    return f"cuda:{local}" if local is not None and torch.cuda.is_available() else None


def share(items: Iterable[T]) -> Iterator[T]:
    """Every N-th item: this process's part. The parts of all processes are all items, each once."""
    return islice(items, rank(), None, world_size())


def barrier() -> None:
    """Wait until every process is here."""
    if _joined():
        dist.all_reduce(torch.zeros(1))  # on the CPU: NCCL's own barrier would need a device per process


def gather_tensors(tensor: Tensor) -> list[Tensor]:
    """Every process's tensor, in the order of the ranks; they may differ in shape, not in rank or dtype."""
    if not _joined():
        return [tensor]
    shape = torch.tensor(tensor.shape, dtype=torch.long)
    shapes = [torch.empty_like(shape) for _ in range(world_size())]
    dist.all_gather(shapes, shape)
    longest = max(prod(s.tolist()) for s in shapes)
    flat = torch.zeros(longest, dtype=tensor.dtype)
    flat[: tensor.numel()] = tensor.detach().cpu().flatten()
    parts = [torch.empty_like(flat) for _ in range(world_size())]
    dist.all_gather(parts, flat)
    sizes = [tuple(s.tolist()) for s in shapes]
    return [part[: prod(size)].view(size).to(tensor.device) for part, size in zip(parts, sizes, strict=True)]


def sum_over_processes(tensor: Tensor) -> Tensor:
    """The sum of every process's tensor, the same bits in each of them: added in the order of the ranks."""
    total, *others = gather_tensors(tensor)
    for other in others:
        total = total + other
    return total


def _joined() -> bool:
    return dist.is_available() and dist.is_initialized()
