"""The two leading eigenpairs of every output feature of a layer: `top_eigenpairs` against forming every `Q`.

    python benchmarks/eigensweep.py [--threads 2] [--growth] [--large]

(a) a dense loop, well batched: `Q = (L^T c) R`, symmetrised, `torch.linalg.eigvalsh`
(b) the authors' einsum per feature, in their order: `hid in1, hid in2, out hid -> out in1 in2`, symmetrised, `eigh`

Layers: Gaussian; one of decaying spectrum (branch rows times a matrix with singular values `i^-1/2`, output columns
times `exp(-linspace(0, 3))`), both of d_model 512 and d_mlp 2048; and one of the bundled model; 2048 features each.

(a) and (b) are timed on a sample of the features and multiplied up: their time per feature is constant. The three take
turns within every round, and the shortest round of each counts, so that a slow moment of the machine hits all alike.
Accuracy is against `eigh` in float64, for every feature. `--growth` adds how the time grows with d_model, d_mlp and the
number of features; `--large` one sweep at d_model 1024, d_mlp 4096, 8192 features, with its peak memory.
"""

import argparse
import math
import resource
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

import bilens
from bilens.layer.bilinear import BilinearLayer, hidden_coefficients
from bilens.layer.eigen.solve import LeadingEigenpairs, top_eigenpairs
from bilens.sae.view import SAEView

ROUNDS, SAMPLE_A, SAMPLE_B = 3, 48, 2
FEATURES, BUNDLED_LAYER = 2048, 3


def made_up(d_model: int, d_mlp: int, n: int, decaying: bool) -> tuple[BilinearLayer, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    left, right, out = random(d_mlp, d_model), random(d_mlp, d_model), random(d_mlp, d_model)
    if decaying:
        one, two = (torch.linalg.qr(random(d_model, d_model))[0] for _ in range(2))
        shrink = (one * torch.arange(1, d_model + 1) ** -0.5) @ two
        left, right, out = left @ shrink, right @ shrink, out * torch.exp(-torch.linspace(0, 3, d_model))
    zero = torch.zeros(d_mlp)
    layer = BilinearLayer(left.T.contiguous(), right.T.contiguous(), out, zero, zero, torch.zeros(d_model))
    return layer, random(n, d_model)


def bundled() -> tuple[BilinearLayer, Tensor]:
    model = bilens.load_model()
    sae = bilens.load_sae(model.cfg.model_name, "mlp-out", BUNDLED_LAYER)
    return BilinearLayer.of(model, BUNDLED_LAYER), SAEView(sae).directions("encoder").detach()[:FEATURES]


def dense(layer: BilinearLayer, u: Tensor, batch: int = 16) -> Tensor:
    values = []
    for c in hidden_coefficients(layer, u).split(batch):
        raw = (layer.W_gate * c[:, None]) @ layer.W_in.T
        values.append(torch.linalg.eigvalsh(0.5 * (raw + raw.mT)))
    return torch.cat(values)


def as_written(layer: BilinearLayer, u: Tensor) -> Tensor:
    values = []
    for c in hidden_coefficients(layer, u):
        raw = torch.einsum("hi, hj, oh -> oij", layer.W_gate.T, layer.W_in.T, c[None])
        values.append(torch.linalg.eigh(0.5 * (raw + raw.mT))[0])
    return torch.cat(values)


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def ours(layer: BilinearLayer, u: Tensor) -> LeadingEigenpairs:
    return top_eigenpairs(layer, u, progress=False)


def compare(name: str, layer: BilinearLayer, u: Tensor) -> LeadingEigenpairs:
    n, times = len(u), {"ours": math.inf, "a": math.inf, "b": math.inf}
    sweep = ours(layer, u)
    for _ in range(ROUNDS):
        times["ours"] = min(times["ours"], seconds(lambda: ours(layer, u)))
        times["a"] = min(times["a"], seconds(lambda: dense(layer, u[:SAMPLE_A])) * n / SAMPLE_A)
        times["b"] = min(times["b"], seconds(lambda: as_written(layer, u[:SAMPLE_B])) * n / SAMPLE_B)
    print(
        f"{name:18} ours {times['ours']:6.2f} s   (a) {times['a']:6.1f} s = {times['a'] / times['ours']:5.1f}x"
        f"   (b) {times['b']:7.0f} s = {times['b'] / times['ours']:5.0f}x"
    )
    print(f"{'':18} {sweep!r}")
    return sweep


def accuracy(layer: BilinearLayer, u: Tensor, sweep: LeadingEigenpairs) -> None:
    """The largest relative error of both values; more than 1e-3 is not an error but another eigenvalue."""
    exact = dense(layer.to(torch.float64), u.double())
    exact = exact.abs().sort(dim=1, descending=True).values[:, : sweep.values.shape[1]]
    errors = (sweep.values.double().abs() - exact).abs() / exact
    cautious = ((sweep.values.double().abs() - exact).abs() <= sweep.errors + 4e-6 * exact[:, :1]).all()
    print(
        f"{'':18} largest relative error {errors.max():.1e}, median {errors.amax(1).median():.1e}; "
        f"missed {(errors > 1e-3).any(1).sum()}; errors within the estimates: {bool(cautious)}"
    )


def growth() -> None:
    """Exponents of the time in each size, the others fixed: the slope over three sizes."""
    fixed = {"d_model": 256, "d_mlp": 1024, "features": 1024}
    for which, sizes in {"d_model": (128, 256, 512), "d_mlp": (512, 1024, 2048), "features": (512, 1024, 2048)}.items():
        times = []
        for size in sizes:
            shape = fixed | {which: size}
            layer, u = made_up(shape["d_model"], shape["d_mlp"], shape["features"], decaying=True)
            top_eigenpairs(layer, u[:64], method="lanczos", progress=False)
            times.append(
                min(seconds(partial(top_eigenpairs, layer, u, method="lanczos", progress=False)) for _ in range(ROUNDS))
            )
        exponent = math.log(times[-1] / times[0]) / math.log(sizes[-1] / sizes[0])
        table = "  ".join(f"{size}: {t:.2f} s" for size, t in zip(sizes, times, strict=True))
        print(f"{which:10} {table}   exponent {exponent:.2f}")


def large() -> None:
    layer, u = made_up(1024, 4096, 8192, decaying=True)
    left = torch.randn(2048, 1024)
    rate = 2 * 2048 * 1024 * 8192 / min(seconds(lambda: left @ torch.randn(1024, 8192)) for _ in range(3))
    taken = seconds(lambda: print(repr(top_eigenpairs(layer, u))))
    steps = 40 * 2 * 8192 * 1024 * 4096 * 4 / rate
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"d_model 1024, d_mlp 4096, 8192 features: {taken:.1f} s; 40 Lanczos steps at this machine's "
        f"{rate / 1e9:.0f} GFLOP/s would be {steps:.1f} s; peak memory {peak:.2f} GB"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--growth", action="store_true")
    parser.add_argument("--large", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.set_grad_enabled(False)
    for name, layer, u in [
        ("decaying 512/2048", *made_up(512, 2048, FEATURES, decaying=True)),
        ("Gaussian 512/2048", *made_up(512, 2048, FEATURES, decaying=False)),
        ("bundled 256/1024", *bundled()),
    ]:
        accuracy(layer, u, compare(name, layer, u))
    if options.growth:
        growth()
    if options.large:
        large()


if __name__ == "__main__":
    main()
