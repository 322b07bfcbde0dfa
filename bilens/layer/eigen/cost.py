"""What an eigensolver would take per output on this machine: measured once per layer shape, then compared.

The pieces are timed on random numbers of the layer's shape (a few milliseconds each), and multiplied by how often the
solver needs them. How many steps Lanczos takes depends on the spectrum, and how long a step takes on how many there
are: neither is known before a first few outputs are done, and until then a typical number stands for it. A block of
vectors takes about as many products as Lanczos has steps, times a constant.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch

from bilens.layer.eigen.blocks import block_size, outputs_at_hand
from bilens.layer.eigen.refine import InteractionOperator

TYPICAL_STEPS, STEPS_PER_PAIR, FEWEST_STEPS = 20, 5, 18
# Products per step of Lanczos (the probe's included); steps per small eigenproblem; vectors held, half way.
PRODUCTS_PER_STEP, STEPS_PER_CHECK, BASIS = 1.4, 5, 24
# Products of a block per step that Lanczos would take, and small eigenproblems.
BLOCK_PRODUCTS_PER_STEP, BLOCK_CHECKS = 0.5, 3
TWICE = 40  # after so many steps one takes twice as long: there is more to be orthogonal to, out of the cache
BATCH = 128
FEW = 0.65  # of what an output takes among a few is what it takes among many
LARGEST_EIGH = 384  # larger ones are extrapolated: measuring must stay cheap


class Pilot(NamedTuple):
    """What Lanczos took for a few outputs: steps, and seconds each."""

    steps: float
    seconds: float


@dataclass(frozen=True)
class Cost:
    """Estimated seconds.

    Attributes:
        search_dtype: what searches multiply in, the faster of bfloat16 and the layer's own dtype.
        step, finish: of Lanczos: per early step, and per output.
        tensor: of making the third-order tensor, once.
        block_step, block_finish: of blocks: per step that Lanczos would take, and per output.
        dense: per output.
        typical_steps: of Lanczos, for as many pairs as are wanted.
    """

    search_dtype: torch.dtype
    step: float
    finish: float
    tensor: float
    block_step: float
    block_finish: float
    dense: float
    typical_steps: float = TYPICAL_STEPS

    def per_output(self, n: int, pilot: Pilot | None = None) -> dict[str, float]:
        """Seconds per output of every method.

        Args:
            n: outputs in all.
            pilot: what Lanczos took for some of them; `None` is typical.
        """
        steps = self.typical_steps if pilot is None else pilot.steps
        return {
            "lanczos": self._lanczos(steps) if pilot is None else FEW * pilot.seconds,
            "block": self.tensor / max(n, 1) + steps * self.block_step + self.block_finish,
            "dense": self.dense,
        }

    def open_to_lanczos(self, n: int) -> bool:
        """Whether Lanczos might be faster than blocks, on a spectrum on which it takes as few steps as ever."""
        return self._lanczos(FEWEST_STEPS) < self.per_output(n)["block"]

    def _lanczos(self, steps: float) -> float:
        return steps * (1 + steps / TWICE) * self.step + self.finish


def estimate(d_model: int, d_mlp: int, k: int, dtype: torch.dtype, device: torch.device) -> Cost:
    """The cost of the `k` leading eigenpairs per output, for a layer of this shape."""
    return _measured(d_model, d_mlp, k, dtype, device, torch.get_num_threads())


@lru_cache(maxsize=64)
def _measured(d_model: int, d_mlp: int, k: int, dtype: torch.dtype, device: torch.device, threads: int) -> Cost:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    operator = InteractionOperator.of(random(d_mlp, d_model), random(d_mlp, d_model))
    vectors, half_c = random(BATCH, 1, d_model), random(BATCH, d_mlp)
    product = {}
    for search_dtype in (dtype, torch.bfloat16):
        converted, c, v = operator.to(search_dtype), half_c.to(search_dtype), vectors.to(search_dtype)
        product[search_dtype] = seconds(lambda o=converted, c=c, v=v: o(v, c), device) / BATCH  # type: ignore[misc]
    fastest = min(product, key=lambda search_dtype: product[search_dtype])

    basis = random(BATCH, BASIS, d_model)
    row = basis[:, :1]
    orthogonal = seconds(lambda: torch.bmm(torch.bmm(row, basis.mT), basis), device) / BATCH
    small = basis[:16] @ basis[:16].mT
    check = seconds(lambda: torch.linalg.eigh(small), device) / len(small)
    step = PRODUCTS_PER_STEP * (product[fastest] + orthogonal) + check / STEPS_PER_CHECK
    # Two rounds of refinement, with two vectors beside the k wanted.
    finish = 2 * (k + 2) * product[dtype]

    # Slices of the products that make the tensor (half of it: it is symmetric), and of those that make matrices of it;
    # the products of as many of these as are multiplied at a time.
    width, few, chunk = block_size(k), 4, outputs_at_hand(d_model, fastest, device)
    out, pairs = random(d_model, d_mlp).to(fastest), random(d_mlp, few * d_model).to(fastest)
    tensor = seconds(lambda: out @ pairs, device) * d_model / few / 2
    u, slab = random(BATCH, d_model).to(fastest), random(d_model, few * d_model).to(fastest)
    form_all = seconds(lambda: u @ slab, device) * d_model / few / BATCH
    block, matrices = random(chunk, d_model, width).to(fastest), random(chunk, d_model, d_model).to(fastest)
    block_product = seconds(lambda: torch.bmm(matrices, block), device) / chunk
    tiny = torch.bmm(block.to(dtype).mT, block.to(dtype))
    block_check = seconds(lambda: torch.linalg.eigh(tiny), device) / chunk

    # A product of one vector is 8 d_model d_mlp operations; forming Q is 2 d_model^2 d_mlp.
    form = product[dtype] * d_model / 4
    d = min(d_model, LARGEST_EIGH)
    matrix = random(d, d)
    matrix = matrix + matrix.T
    dense = form + seconds(lambda: torch.linalg.eigh(matrix), device) * (d_model / d) ** 3
    return Cost(
        fastest,
        step=step,
        finish=finish,
        tensor=tensor,
        block_step=BLOCK_PRODUCTS_PER_STEP * block_product,
        block_finish=form_all + BLOCK_CHECKS * block_check + finish,
        dense=dense,
        typical_steps=TYPICAL_STEPS + STEPS_PER_PAIR * k,
    )


def seconds(run: Callable[[], object], device: torch.device | None = None, repeats: int = 2) -> float:
    """The shortest of a few runs after a first that does not count."""
    run()
    shortest = float("inf")
    for _ in range(repeats):
        _synchronize(device)
        start = time.perf_counter()
        run()
        _synchronize(device)
        shortest = min(shortest, time.perf_counter() - start)
    return shortest


def _synchronize(device: torch.device | None) -> None:
    if device is not None and device.type != "cpu":
        torch.accelerator.synchronize(device)
