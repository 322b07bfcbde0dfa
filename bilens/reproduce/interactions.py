"""Figure 27: one output feature's interactions between input features, and its eigenvalues against a random matrix."""

import torch
from jaxtyping import Float
from torch import Tensor

from bilens.decompose import Decomposer
from bilens.draw import plots
from bilens.layer.eigen.solve import top_eigenpairs
from bilens.reproduce.language_runs import model_and_texts, one_decomposer, ran_on
from bilens.reproduce.reproduction import NOT_IN_PAPER, PICTURE, Made, Settings

MIN_ACTIVE = 20


def random_symmetric(Q: Float[Tensor, "d d"], seed: int = 0) -> Float[Tensor, "d d"]:
    """A symmetric matrix with Gaussian entries, of the standard deviation that the entries of `Q` have."""
    upper = torch.randn(Q.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).triu()
    return (Q.double().std().cpu() * (upper + upper.triu(1).T)).to(Q)


def random_edge(norms: Float[Tensor, "n"], d: int) -> Float[Tensor, "n"]:
    """The largest eigenvalue to expect of a random symmetric matrix as large as `Q` in Frobenius norm, `2 s sqrt(d)`
    with entries of standard deviation `s = ||Q||_F / d` (Wigner's semicircle)."""
    return 2 * norms / d**0.5


def self_and_cross(Q: Float[Tensor, "d_sae d_sae"]) -> tuple[Float[Tensor, "d_sae"], Float[Tensor, "pair"]]:
    """The interactions of features with themselves, and those of two different ones, each pair once."""
    row, column = torch.triu_indices(len(Q), len(Q), 1)
    return Q.diagonal(), Q[row, column]


def chosen_feature(decomposer: Decomposer, texts: list[str]) -> tuple[int, Tensor, float]:
    """The output feature, among those that fire, whose leading eigenvalue stands out most from a random matrix; how
    far it does, of all; and its correlation with two eigenvectors."""
    found = decomposer.fidelity(texts, k=2)
    u = decomposer.directions(found.features)
    sweep = top_eigenpairs(decomposer.weights, u, 1, progress=False)
    d_model = decomposer.model.cfg.d_model
    stands_out = (sweep.values[:, 0].abs() / random_edge(sweep.norms, d_model).clamp_min(1e-30)).cpu()
    fires = found.eligible(MIN_ACTIVE)
    at = int(stands_out.where(fires, 0.0).argmax())
    return at, stands_out[fires], found.correlation[at, 1].item()


def interactions(settings: Settings) -> Made:
    """Figure 27."""
    model, texts = model_and_texts(settings)
    d = one_decomposer(settings, model)
    feature, stands_out, correlation = chosen_feature(d, texts)
    Q = d.interaction(feature)
    own, cross = self_and_cross(d.interaction(feature, basis="features"))
    values = torch.linalg.eigvalsh(Q.double())
    random = torch.linalg.eigvalsh(random_symmetric(Q, settings.seed).double())
    outside = int((values.abs() > random.abs().max()).sum())
    rows = [
        ("largest positive and negative eigenvalue", "0.62, -0.66", f"{values[-1]:.2f}, {values[0]:.2f}"),
        ("largest |eigenvalue| of the random matrix", PICTURE, f"{random.abs().max():.2f}"),
        ("eigenvalues outside the random matrix's", "2 outliers", str(outside)),
        ("standard deviation of cross-interactions", "0.004", f"{cross.std():.2g}"),
        (
            "largest |self-interaction| and |cross-interaction|",
            PICTURE,
            f"{own.abs().max():.2g}, {cross.abs().max():.2g}",
        ),
        ("correlation of two eigenvectors with the feature, where it is active", "0.66", f"{correlation:.2f}"),
        (
            "leading |eigenvalue| over the largest to expect of a random matrix: this feature; median of all that fire",
            NOT_IN_PAPER,
            f"{stands_out.max():.1f}; {stands_out.median():.1f}",
        ),
    ]
    index = list(range(len(values)))
    curves = {"interaction matrix": values.flip(0), "random symmetric matrix": random.flip(0)}
    figures = {
        "27A: interactions of input features with themselves": plots.histogram(own, x_title="self-interaction"),
        "27A: interactions of two input features": plots.histogram(cross, x_title="cross-interaction", bins=80),
        "27B: eigenvalues of the feature, and of a random symmetric matrix": plots.line(
            index, curves, x_title="index", y_title="eigenvalue"
        ),
    }
    words = [
        f"The paper shows the feature not-good of its own model; here it is output feature {feature} of layer "
        f"{d.layer}, which stands out most from a random matrix of those active on {MIN_ACTIVE} tokens or more: its "
        f"leading eigenvalue is {stands_out.max():.1f} times the largest to expect of one, the median feature's "
        f"{stands_out.median():.1f} times. Eigenvalues scale with the norms of the SAE's encoder, so only their ratios "
        "to the random ones compare.",
    ]
    return Made(ran_on(model, texts, d), rows, figures, words)
