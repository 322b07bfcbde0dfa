"""Figures 5 and 20: eigenvectors of image classifiers across seeds and sizes, and how few are enough."""

from collections.abc import Mapping, Sequence

import plotly.graph_objects as go
import torch
from jaxtyping import Float
from torch import Tensor

from bilens.draw import plots
from bilens.reproduce.image_runs import data_and_config, ran_on, trained_by_size
from bilens.reproduce.reproduction import NOT_IN_PAPER, PICTURE, Made, Settings
from bilens.vision import (
    BilinearClassifier,
    FeatureSimilarity,
    ImageDataset,
    Truncation,
    feature_similarity,
    truncation,
)

RANKS, KEPT = 20, 30  # eigenvectors compared, and the most that are kept, as in the authors' scripts
COMPARED = (
    "Only eigenvectors with positive eigenvalues are compared, each with the one of the same class and the same rank "
    "by size, and it is their pictures in the pixels whose cosine is taken."
)


def with_self_pairs(mean: float, seeds: int) -> float:
    """A mean over all pairs of models as it becomes where each model is compared with itself too, at cosine 1."""
    return ((seeds - 1) * mean + 2) / (seeds + 1)


def stability(settings: Settings) -> Made:
    """Figure 5."""
    data, config = data_and_config(settings)
    seeds, sizes = (2, (16, 32)) if settings.reduced else (5, (64, 128, 256))
    models = trained_by_size(data, config, sizes, seeds)
    alike = feature_similarity(models, k=_ranks(sizes))
    first = alike.to_frame().query("rank == 0").set_index("comparison")
    rows = []
    for size in models:
        same, best, other = (first.loc[size, name] for name in ("same_rank", "best", "other_class"))
        what = f"{size} hidden units: |cosine| of the leading eigenvectors of a class"
        rows += [
            (what, "0.8 to 0.9, by size", f"{same:.2f}"),
            (f"{what}, pairs of a model with itself counted", "", f"{with_self_pairs(same, seeds):.2f}"),
            (
                f"{what}, with the most alike one of the class, and of other classes",
                NOT_IN_PAPER,
                f"{best:.2f}, {other:.2f}",
            ),
        ]
    cuts = _truncations(data, models)
    rows += [
        (
            f"{size} hidden units: eigenvectors of a class that keep the accuracy within a point, seed by seed",
            "only a handful (section 4.2)",
            ", ".join(str(cut.enough()) for cut in group),
        )
        for size, group in cuts.items()
    ]
    figures = {
        "5A: eigenvectors of equal rank, models of one size that differ in the seed": _cosines(alike, list(models)),
        "5B: classification error with so many eigenvectors of every class kept": _against_kept(
            {size: 1 - _accuracy(group) for size, group in cuts.items()}, "classification error"
        ),
    }
    likeness = [f"{first.loc[size, 'same_rank']:.2f}" for size in models]
    words = [
        f"The leading eigenvectors of a class are alike across seeds with a mean |cosine| of {', '.join(likeness)} for "
        f"{', '.join(models)} hidden units; the paper has 0.8 to 0.9.",
        f"Means over {seeds} seeds (the paper: 5) and all classes. {COMPARED}",
        "The script for this figure in the authors' repository counts the pairs of a model with itself too, whose "
        "cosine is 1; the table has the mean without them, and with them.",
    ]
    return Made(ran_on(data, config, d_hidden=", ".join(models)), rows, figures, words)


def sizes(settings: Settings) -> Made:
    """Figure 20."""
    data, config = data_and_config(settings)
    seeds, all_sizes = (2, (16, 24, 32)) if settings.reduced else (3, (32, 64, 128, 256))
    models = trained_by_size(data, config, all_sizes, seeds)
    names, middle = list(models), str(all_sizes[len(all_sizes) // 2])
    alike = feature_similarity(models, k=_ranks(all_sizes))
    top = torch.tensor([[alike.same_rank[_row(alike, a, b), 0] for b in names] for a in names])
    cuts = _truncations(data, models)
    drops = {
        size: group[0].accuracy.new_tensor([cut.accuracy[-1] for cut in group]).mean() - _accuracy(group)
        for size, group in cuts.items()
    }
    rows = [
        (
            f"{size} hidden units: accuracy lost with 5, 10 and 20 eigenvectors of every class",
            PICTURE,
            ", ".join(f"{drop[n]:.1%}" for n in (5, 10, 20) if n < len(drop)),
        )
        for size, drop in drops.items()
    ]
    rows += [
        (
            f"|cosine| of the leading eigenvectors of a class, {size} with {middle} hidden units",
            "mostly similar where sizes are",
            f"{top[i, names.index(middle)]:.2f}",
        )
        for i, size in enumerate(names)
    ]
    figures = {
        "20A: accuracy lost with so many eigenvectors of every class kept": _against_kept(drops, "accuracy lost"),
        f"20B: eigenvectors of equal rank, models of every size with those of {middle} hidden units": _cosines(
            alike, names, middle
        ),
        "20C: the leading eigenvectors of every class, sizes with sizes": plots.heatmap(
            top, names, names, row_title="hidden units", col_title="hidden units", scale=1.0
        ),
    }
    place = names.index(middle)
    others = [f"{top[i, place]:.2f}" for i in range(len(names)) if i != place]
    most = max(drop[min(10, len(drop) - 1)].item() for drop in drops.values())
    words = [
        f"With ten eigenvectors of every class the accuracy falls by {most:.1%} at most. With those of {middle} hidden "
        f"units, the leading eigenvectors of the other sizes have a mean |cosine| of {', '.join(others)}, those of the "
        f"same size of {top[place, place]:.2f}.",
        f"Means over {seeds} seeds (the paper: 5) and all classes; within a size, over pairs of different seeds. "
        f"{COMPARED} The authors' script has sizes of 30, 50, 100, 300, 500 and 1000; figure 20B compares with 300.",
    ]
    return Made(ran_on(data, config, d_hidden=", ".join(models)), rows, figures, words)


def _ranks(sizes: Sequence[int]) -> int:
    """Ranks to compare: at most a quarter of the narrowest model's eigenvectors, as only some of them are positive."""
    return min(RANKS, min(sizes) // 4)


def _truncations(data: ImageDataset, models: Mapping[str, Sequence[BilinearClassifier]]) -> dict[str, list[Truncation]]:
    return {
        size: [truncation(model, data.test_images, data.test_labels) for model in group]
        for size, group in models.items()
    }


def _accuracy(cuts: Sequence[Truncation]) -> Float[Tensor, "kept"]:
    """The mean over seeds, for up to 30 kept."""
    return torch.stack([cut.accuracy for cut in cuts]).mean(0)[: KEPT + 1]


def _row(alike: FeatureSimilarity, a: str, b: str) -> int:
    """Where two sizes are compared; a size with itself is its own name."""
    known = alike.comparisons
    return known.index(a if a == b else f"{a} ~ {b}" if f"{a} ~ {b}" in known else f"{b} ~ {a}")


def _cosines(alike: FeatureSimilarity, sizes: Sequence[str], other: str | None = None) -> go.Figure:
    """|Cosine| against rank: of every size with itself, or with another."""
    curves = {size: alike.same_rank[_row(alike, size, other or size)] for size in sizes}
    ranks = list(range(alike.same_rank.shape[1]))
    return plots.line(ranks, curves, x_title="rank of the eigenvector", y_title="mean |cosine|, equal rank")


def _against_kept(curves: Mapping[str, Float[Tensor, "kept"]], y_title: str) -> go.Figure:
    """Curves over the eigenvectors kept; a narrow model's goes on level where it has no more."""
    longest = max(map(len, curves.values()))
    padded = {name: torch.cat([curve, curve[-1:].expand(longest - len(curve))]) for name, curve in curves.items()}
    return plots.line(list(range(longest)), padded, x_title="eigenvectors kept of every class", y_title=y_title)
