"""Figure 9: how well the leading eigenvectors of output features reproduce their activation on text."""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bilens.decompose import Decomposer
from bilens.draw import plots
from bilens.layer.eigen.solve import top_eigenpairs
from bilens.reproduce.language_runs import decomposers, model_and_texts, ran_on
from bilens.reproduce.reproduction import NOT_IN_PAPER, Made, Settings

THRESHOLD = 0.75
MIN_ACTIVE = 20  # tokens that a feature must be active on; the paper's appendix H has 10
SHOWN = 9


@torch.no_grad()
def approximations(
    decomposer: Decomposer, texts: Sequence[str], features: Int[Tensor, "n"], k: int = 2
) -> list[tuple[Float[Tensor, "active"], Float[Tensor, "active"]]]:
    """Of every feature, its activation on the tokens it is active on, and what its `k` leading eigenvectors, the MLP's
    bias terms and the SAE's biases give there. With all eigenvectors the two are equal (of a ReLU or top-k SAE)."""
    view, e = decomposer.output_view, decomposer.directions(features)
    eigen = top_eigenpairs(decomposer.weights, e, k, progress=False)
    linear = decomposer.linear(features)
    constant = decomposer.constant(features) + view.encoder_bias[features].to(e)
    found: list[list[Tensor]] = [[] for _ in features]
    for x, y in decomposer.run_texts(texts):
        activations = view.activations(y)[:, features].to(e)
        for row, (values, vectors) in enumerate(zip(eigen.values, eigen.vectors, strict=True)):
            active = activations[:, row] != 0
            approximate = (x[active] @ vectors.T).square() @ values + x[active] @ linear[row] + constant[row]
            found[row].append(torch.stack([activations[active, row], approximate]).cpu())
    joined = [torch.cat(parts, 1) for parts in found]
    return [(both[0], both[1]) for both in joined]


def low_rank(settings: Settings) -> Made:
    """Figure 9."""
    model, texts = model_and_texts(settings)
    layers = decomposers(settings, model)
    measured = {f"layer {d.layer}": d.fidelity(texts, k=4 if settings.reduced else 16) for d in layers}
    rows, means = [], {}
    for name, found in measured.items():
        kept = found.correlation[found.eligible(MIN_ACTIVE)]
        means[name] = kept.nanmean(0).tolist()
        share = found.shares([THRESHOLD], min_active=MIN_ACTIVE).set_index("k")
        rows += [
            (f"mean correlation with one eigenvector, {name}", "starts around 0.65", f"{means[name][0]:.2f}"),
            (
                f"features with a correlation above {THRESHOLD} by two eigenvectors, {name}",
                "most (32 to 65 % in the reproduction by openreview 6k7qRdz7rD)",
                f"{share.loc[2, f'> {THRESHOLD:g}']:.0%} of {len(kept)}",
            ),
            (
                f"median correlation with 1, 2 and 4 eigenvectors, {name}",
                NOT_IN_PAPER,
                ", ".join(f"{share['median'].loc[k]:.2f}" for k in (1, 2, 4)),
            ),
        ]
    last, found = layers[-1], measured[f"layer {layers[-1].layer}"]
    eligible = found.features[found.eligible(MIN_ACTIVE)]
    chosen = eligible[torch.randperm(len(eligible), generator=torch.Generator().manual_seed(settings.seed))[:SHOWN]]
    pairs = zip(chosen.tolist(), approximations(last, texts, chosen), strict=True)
    panels = {f"feature {i}: {torch.corrcoef(torch.stack(pair))[0, 1]:.2f}": pair for i, pair in pairs}
    where = f"layer {last.layer}"
    ks = list(range(1, found.k + 1))
    curves = plots.line(ks, means, x_title="eigenvectors", y_title="mean correlation, active tokens", log_x=True)
    figures = {
        "9A: mean correlation over features against eigenvectors, over the tokens where a feature is active": curves,
        f"9B: features by correlation with two eigenvectors, {where}": found.histogram(2),
        f"9C: activation (across) and approximation by two eigenvectors (up) of nine features drawn at random, "
        f"{where}; over each its correlation": plots.scatter_grid(
            panels, x_title="activation", y_title="approximation"
        ),
        f"Correlation against how often a feature fires, {where} (not in the paper)": found.scatter(2),
    }
    words = [
        f"One eigenvector gives a mean correlation of {_numbers(means, 0)}, two of {_numbers(means, 1)} "
        f"({', '.join(means)}); the paper's three models start around 0.65 with one.",
        f"Features active on fewer than {MIN_ACTIVE} tokens are left out. The approximations of figure 9C include what "
        "the SAE's biases add, so that they are on the activation's own scale.",
    ]
    return Made(ran_on(model, texts, *layers), rows, figures, words)


def _numbers(means: Mapping[str, Sequence[float]], at: int) -> str:
    return ", ".join(f"{curve[at]:.2f}" for curve in means.values())
