"""How alike the eigenfeatures of models are that differ in their seed or size.

1. the pictures of every class' eigenfeatures, in the pixels, which all models share
2. for two models, a class and a rank: the largest |cosine| of that eigenfeature with any of the other model's
   eigenfeatures of that class and of the same sign, both ways (`best`); and with that of the same rank (`same_rank`,
   as the paper). `other_class` is the best with another class' eigenfeatures: what likeness of any two features is
3. means over classes and pairs of models: within a group (other seeds) and between two groups (other sizes)

Quadratic part only: biases and residual additions do not enter. Ranks count within a sign, by |eigenvalue|.

Source: Pearce et al. 2025, section 4.2, figures 5A and 20 (there by equal rank).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from typing import Literal

import pandas as pd
import plotly.graph_objects as go
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from bilens._core.display import Tabular
from bilens._core.typing import typed
from bilens.draw import plots
from bilens.errors import ArgumentError, OutOfRangeError
from bilens.vision.model import BilinearClassifier
from bilens.vision.spectral import Eigenfeatures, Space, eigenfeatures

ZERO = 1e-9  # of the largest eigenvalue: smaller ones have no eigenvector to compare


@dataclass(frozen=True)
class FeatureSimilarity(Tabular):
    """Mean cosines of eigenfeatures of several models, by rank.

    Attributes:
        comparisons: groups compared: `"a"` for the models of group a among themselves, `"a ~ b"` for two groups.
        pairs: the number of pairs of models in each comparison.
        best, same_rank, other_class: mean |cosine| with the most alike eigenfeature of the same class and sign, with
            that of the same rank, and with the most alike one of other classes; 0 where a model has none.
    """

    comparisons: tuple[str, ...]
    pairs: tuple[int, ...]
    best: Float[Tensor, "comparison rank"]
    same_rank: Float[Tensor, "comparison rank"]
    other_class: Float[Tensor, "comparison rank"]

    def to_frame(self) -> pd.DataFrame:
        """One row per comparison and rank: `comparison, pairs, rank, best, same_rank, other_class`."""
        k = self.best.shape[1]
        return pd.DataFrame(
            {
                "comparison": [name for name in self.comparisons for _ in range(k)],
                "pairs": [count for count in self.pairs for _ in range(k)],
                "rank": list(range(k)) * len(self.comparisons),
                "best": self.best.flatten(),
                "same_rank": self.same_rank.flatten(),
                "other_class": self.other_class.flatten(),
            }
        )

    def plot(self, measure: Literal["same_rank", "best"] = "same_rank") -> go.Figure:
        """Mean cosine against rank, and the best with other classes (the mean over comparisons).

        Args:
            measure: With the eigenfeature of the same rank, as the paper has it, or with the most alike one.
        """
        others = "best with other classes"
        curves = dict(zip(self.comparisons, getattr(self, measure), strict=True)) | {others: self.other_class.mean(0)}
        ranks = list(range(self.best.shape[1]))
        y_title = f"mean |cosine|, {'equal rank' if measure == 'same_rank' else 'best match'}"
        figure = plots.line(ranks, curves, "similarity of eigenfeatures", x_title="rank", y_title=y_title)
        return figure.update_traces(line={"color": plots.GREY, "dash": "dot"}, selector={"name": others})

    def __str__(self) -> str:
        return self.to_frame().to_string(index=False, float_format="{:.3f}".format)


@typed
def feature_similarity(
    models: Mapping[str, Sequence[BilinearClassifier]],
    *,
    k: int = 10,
    space: Space = "embedding",
) -> FeatureSimilarity:
    """Compare eigenfeatures with positive eigenvalues across seeds (within a group) and across sizes (between groups).

    Args:
        models: groups of one-layer models that read the same images, such as `{"30": [...], "300": [...]}` for two
            sizes, with a model for every seed.
        k: ranks to compare.
        space: the space of the eigenvectors; cosines compare their pictures in the pixels.

    Raises:
        ArgumentError: fewer than two models, models of other images or classes, or of several layers.
        OutOfRangeError: no ranks.
    """
    everything = [model for group in models.values() for model in group]
    if len(everything) < 2:
        raise ArgumentError(f"{len(everything)} models, expected at least two to compare.")
    if k < 1:
        raise OutOfRangeError(f"k is {k}, expected 1 or more.")
    for model in everything:
        sizes = [(cfg.d_input, cfg.d_output) for cfg in (model.cfg, everything[0].cfg)]
        if model.cfg.n_layer > 1 or sizes[0] != sizes[1]:
            raise ArgumentError(
                f"a model of {model.cfg.n_layer} layers, {sizes[0][0]} pixels and {sizes[0][1]} classes; expected one "
                f"layer, {sizes[1][0]} pixels and {sizes[1][1]} classes, as the first model."
            )
    features = {name: [eigenfeatures(model, space=space) for model in group] for name, group in models.items()}
    found: dict[str, list[Tensor]] = {}
    for name, first, second in _pairs(features):
        both_ways = [_cosines(a, b, k) for a, b in ((first, second), (second, first))]
        found.setdefault(name, []).append(torch.stack(both_ways).mean(0))
    best, same, other = torch.stack([torch.stack(values).mean(0) for values in found.values()]).unbind(1)
    return FeatureSimilarity(tuple(found), tuple(map(len, found.values())), best, same, other)


def _pairs(
    features: Mapping[str, Sequence[Eigenfeatures]],
) -> Iterator[tuple[str, Eigenfeatures, Eigenfeatures]]:
    for name, group in features.items():
        for first, second in combinations(group, 2):
            yield name, first, second
    for (name, group), (other, others) in combinations(features.items(), 2):
        for first, second in product(group, others):
            yield f"{name} ~ {other}", first, second


def _cosines(a: Eigenfeatures, b: Eigenfeatures, k: int) -> Float[Tensor, "measure k"]:
    """Best, same rank and other class, for the first k eigenfeatures of `a`; means over classes."""
    units = [[_unit_pictures(x, row) for row in range(len(x.labels))] for x in (a, b)]
    measured = torch.zeros(3, len(a.labels), k, dtype=torch.float64)
    for row, mine in enumerate(units[0]):
        mine = mine[:k]
        for column, theirs in enumerate(units[1]):
            if len(mine) == 0 or len(theirs) == 0:
                continue
            cosines = (mine @ theirs.T).abs()
            best = cosines.amax(1).cpu()
            if column != row:
                measured[2, row, : len(mine)] += best / max(1, len(units[1]) - 1)
                continue
            measured[0, row, : len(mine)] = best
            same = cosines.diagonal().cpu()
            measured[1, row, : len(same)] = same
    return measured.mean(1)


def _unit_pictures(features: Eigenfeatures, row: int) -> Float[Tensor, "n d_input"]:
    values = features.values[row]
    assert features.pictures is not None  # one layer, as checked
    return F.normalize(features.pictures[row, values > ZERO * values.abs().max()], dim=-1)
