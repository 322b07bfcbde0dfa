"""What an eigensolver would take per output on this machine: measured once per layer shape, then compared.

The pieces are timed on random numbers of the layer's shape (a few milliseconds each), and multiplied by how often the
solver needs them; how many steps a spectrum takes is not known before, so a typical number stands for it.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch

from bilens.decompose.lanczos import InteractionOperator

# Typical counts: products of the search (steps and probe), and small eigenproblems, per output.
SEARCH_PRODUCTS, CHECKS, BASIS = 45, 5, 24
BATCH = 128
LARGEST_EIGH = 384  # larger ones are extrapolated: measuring must stay cheap


@dataclass(frozen=True)
class Cost:
    """Estimated seconds per output.

    Attributes:
        search_dtype: what the search of `lanczos` multiplies in, the faster of bfloat16 and the layer's own dtype.
        lanczos, dense: seconds per output.
    """

    search_dtype: torch.dtype
    lanczos: float
    dense: float

    @property
    def method(self) -> str:
        return "lanczos" if self.lanczos < self.dense else "dense"

    def __str__(self) -> str:
        return (
            f"estimated {1e3 * self.lanczos:.2g} ms per output by lanczos (searching in "
            f"{str(self.search_dtype).removeprefix('torch.')}), {1e3 * self.dense:.2g} ms dense"
        )


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
    search = SEARCH_PRODUCTS * (product[fastest] + orthogonal) + CHECKS * check
    # Two rounds of refinement, with a tied vector beside the k wanted.
    refine = 2 * (k + 1) * product[dtype]

    # A product of one vector is 8 d_model d_mlp operations; forming Q is 2 d_model^2 d_mlp.
    form = product[dtype] * d_model / 4
    d = min(d_model, LARGEST_EIGH)
    matrix = random(d, d)
    matrix = matrix + matrix.T
    dense = form + seconds(lambda: torch.linalg.eigh(matrix), device) * (d_model / d) ** 3
    return Cost(fastest, search + refine, dense)


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
