"""The top 1,000 interactions of whole layers against the dense loop, in time and in what they find.

    python benchmarks/top_interactions.py [THREADS] [LAYER ...]

The dense loop: per output form `Q`, `D Q D^T` into a buffer that is reused, keep what is above a running threshold. It
is timed in chunks, and the fastest chunk times their number is taken for its whole run, so that a busy machine slows
down only ours, of which the faster of two runs counts. Layers: a decaying one (Gaussian branch rows times a matrix with
singular values `i^-1/2`, output projection scaled by `exp(-linspace(0, 3))`), a Gaussian one, and the bundled model's.
"""

import resource
import sys
import time

import torch

import bilens
from bilens.layer.bilinear import BilinearLayer, interaction_matrix, triple_coefficients
from bilens.layer.triples import Triples, top_triples

N, CHUNK = 1000, 64
D_MODEL, D_MLP, FEATURES = 512, 2048, 2048
Layer = tuple[BilinearLayer, torch.Tensor, torch.Tensor]


def synthetic(decaying: bool) -> Layer:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    left, right, out = random(D_MLP, D_MODEL), random(D_MLP, D_MODEL), random(D_MLP, D_MODEL)
    if decaying:
        (u, _), (v, _) = torch.linalg.qr(random(D_MODEL, D_MODEL)), torch.linalg.qr(random(D_MODEL, D_MODEL))
        spread = (u * torch.arange(1, D_MODEL + 1) ** -0.5) @ v
        left, right = left @ spread, right @ spread
        out = out * torch.exp(-torch.linspace(0, 3, D_MLP))[:, None]
    none = torch.zeros(D_MLP)
    layer = BilinearLayer(left.T.contiguous(), right.T.contiguous(), out, none, none, torch.zeros(D_MODEL))
    outputs, inputs = (torch.nn.functional.normalize(random(FEATURES, D_MODEL), dim=1) for _ in range(2))
    return layer, outputs, inputs


def bundled(number: int) -> Layer:
    model = bilens.load_model()
    saes = [bilens.load_sae(model.cfg.model_name, point, number) for point in ("mlp-in", "mlp-out")]
    decomposer = bilens.Decomposer(model, number, *saes)
    return decomposer.weights, decomposer.output_view.encoder, decomposer.input_view.decoder


def clock() -> float:
    """Seconds; of this process alone where it has one thread, so that a busy machine counts less."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def dense(layer: BilinearLayer, outputs: torch.Tensor, inputs: torch.Tensor) -> tuple[torch.Tensor, list[float]]:
    """(output, i, j) of the top N by float64 values, and the seconds of every chunk."""
    n_in = len(inputs)
    half, full, absolute = torch.empty(n_in, outputs.shape[1]), torch.empty(n_in, n_in), torch.empty(n_in, n_in)
    found, values, threshold = torch.zeros(3, 0, dtype=torch.long), torch.zeros(0), 0.0
    seconds = []
    for low in range(0, len(outputs), CHUNK):
        start = clock()
        for output in range(low, min(low + CHUNK, len(outputs))):
            torch.mm(inputs, interaction_matrix(layer, outputs[output]), out=half)
            torch.mm(half, inputs.T, out=full)
            full.diagonal().mul_(0.5)  # in units of 2 Q
            rows = (torch.abs(full, out=absolute).amax(1) >= threshold / 2).nonzero().flatten()
            row, j = (absolute[rows] >= threshold / 2).nonzero(as_tuple=True)
            i = rows[row]
            i, j = i[i <= j], j[i <= j]
            found = torch.cat([found, torch.stack([torch.full_like(i, output), i, j])], 1)
            values = torch.cat([values, 2 * absolute[i, j]])
            if len(values) > 2 * N:
                keep = values.topk(N + 50).indices  # a few to spare for rounding
                found, values = found[:, keep], values[keep]
                threshold = values.min().item()
        seconds.append(clock() - start)
    exact = triple_coefficients(layer.to(torch.float64), outputs.double(), inputs.double(), *found)
    order = exact.abs().argsort(descending=True, stable=True)[:N]
    return found[:, order], seconds


def as_set(triples: torch.Tensor) -> set[tuple[int, ...]]:
    return set(map(tuple, triples.T.tolist()))


def main(threads: int = 2, *names: str) -> None:
    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    layers = {"decaying": lambda: synthetic(True), "gaussian": lambda: synthetic(False)}
    layers |= {f"bundled {number}": lambda number=number: bundled(number) for number in range(4)}
    print(f"{threads} threads, top {N}\n{'layer':12} {'ours':>8} {'dense':>8} {'ratio':>6}  equal")
    for place, name in enumerate(names or layers):
        layer = layers[name]()
        ours, seconds = [], []
        for _ in range(2):
            start = clock()
            result: Triples = top_triples(*layer, N, progress=False)
            ours.append(clock() - start)
            if not seconds:
                if not place:  # later ones would count the dense loop's memory, too
                    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
                    print(f"peak memory of ours {peak:.2f} GiB, everything imported included")
                found, seconds = dense(*layer)
        total = min(seconds) * len(layer[1]) / CHUNK
        equal = as_set(found) == as_set(torch.stack([result.outputs, result.i, result.j]))
        print(
            f"{name:12} {min(ours):7.1f}s {total:7.1f}s {total / min(ours):6.1f}  {equal}"
            f"  (dense as it ran {sum(seconds):.1f} s; {result.method})",
            flush=True,
        )


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]), *sys.argv[2:])
