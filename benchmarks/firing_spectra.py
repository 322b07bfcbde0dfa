"""The two leading squares of every output feature in the metric of the tokens on which it fires, against a dense loop.

    python benchmarks/firing_spectra.py [--layer 3] [--threads 1]

The dense loop forms `Q` and `M` of each feature, takes `M^1/2` from `torch.linalg.eigh`, and then
`torch.linalg.eigvalsh(M^1/2 Q M^1/2)`; in float32, and in float64, as `Decomposer.eigen(metric="firing")` does. It is
timed on a sample of the features that fire. Times are the best of three, in CPU seconds, so that what else runs on the
machine counts little.
Accuracy is against the dense loop in float64. The texts are the bundled ones.
"""

import argparse
import time

import torch
from torch import Tensor

import bilens
from bilens.decompose import Decomposer
from bilens.layer.bilinear import interaction_matrix
from bilens.layer.eigen.metric import moment, roots

SAMPLE, TIMES = 96, 3


def dense(d: Decomposer, firing: "bilens.decompose.firing.Firing", features: list[int], dtype: torch.dtype) -> Tensor:
    """The two eigenvalues of largest absolute value, from float32 weights and inputs."""
    weights, u, every = d.weights.to(dtype), d.directions(features).to(dtype), firing.second_moment.to(dtype)
    found = []
    for row, feature in zip(u, features, strict=True):
        Q, x = interaction_matrix(weights, row), firing.inputs_of(feature).to(dtype)
        root, _ = roots(moment(x, every).to(dtype))
        values = torch.linalg.eigvalsh(root @ Q @ root)
        found.append(values[values.abs().topk(2).indices])
    return torch.stack(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layer", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    d = Decomposer(bilens.load_model(), options.layer, output_sae=bilens.load_sae("ts-tiny", "mlp-out", options.layer))
    firing = d.firing()
    firing.second_moment  # noqa: B018  both use it
    each = float("inf")
    for _ in range(TIMES):
        start = time.process_time()
        found = d.spectra(fit=firing)
        each = min(each, (time.process_time() - start) / len(found.features))
    fires = (firing.n_active > 0).nonzero().flatten()
    sample = fires[torch.randperm(len(fires), generator=torch.Generator().manual_seed(0))[:SAMPLE]].tolist()
    print(
        f"layer {options.layer}, {len(found.features)} features: {1e3 * each:.2f} ms each, "
        f"{int(found.pairs.whole.sum())} of them solved whole"
    )
    for dtype in (torch.float32, torch.float64):
        there = float("inf")
        for _ in range(TIMES):
            start = time.process_time()
            expected = dense(d, firing, sample, dtype)
            there = min(there, (time.process_time() - start) / len(sample))
        print(f"dense loop in {dtype}: {1e3 * there:.2f} ms each, {there / each:.1f} times as long")
    error = ((found.pairs.mu[sample].double().abs() - expected.abs()).abs() / expected.abs()).max().item()
    print(f"largest relative error of {len(sample)} features: {error:.1e}")


if __name__ == "__main__":
    main()
