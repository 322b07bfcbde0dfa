"""Which output features do alike with their inputs, and which merely point alike.

A feature that a larger SAE splits leaves several with nearly the same interaction matrix, whatever their directions.
Two measures of every two output features, both cosines:

- of interaction matrices, `<Q_u, Q_w> / (||Q_u|| ||Q_w||)`, exact from the factors (`bilens.layer.inner`)
- of their encoder or decoder directions

`Q_u` is linear in `u`, so where directions nearly agree, so do interaction matrices. The reverse need not hold: the
layer may turn two directions into much the same matrix. Clusters are of the interaction matrices, by agglomeration
(`scipy.cluster.hierarchy`) at distance `1 - cosine`, cut where the cosine falls below a threshold.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Float, Int
from torch import Tensor

from bilens._core.checks import MEMORY, check_budget, name_of
from bilens._core.display import Tabular
from bilens.draw import plots
from bilens.errors import OutOfRangeError
from bilens.layer.bilinear import BilinearLayer, double, hidden_coefficients
from bilens.layer.inner import coefficient_images, cosines

Linkage = Literal["average", "complete", "single"]
MOST_POINTS = 4000


@dataclass(frozen=True)
class FeatureCosines:
    """Both cosines of every two outputs."""

    interaction: Float[Tensor, "n n"] = field(repr=False)
    direction: Float[Tensor, "n n"] = field(repr=False)

    def plot(self, features: Int[Tensor, "n"], names: Sequence[str] | None, seed: int = 0) -> go.Figure:
        """One cosine against the other, pair by pair; of many pairs some, drawn with a seed."""
        i, j = torch.tril_indices(len(features), len(features), -1)
        if len(i) > MOST_POINTS:
            # Half at random, half the closest of either kind: what a sample alone would miss.
            generator = torch.Generator().manual_seed(seed)
            drawn = torch.randint(len(i), (MOST_POINTS // 2,), generator=generator)
            closest = [of[i, j].topk(MOST_POINTS // 4).indices for of in (self.interaction, self.direction)]
            chosen = torch.cat([drawn, *closest]).unique()
            i, j = i[chosen], j[chosen]
        labels = [
            f"{name_of(names, a)} / {name_of(names, b)}"
            for a, b in zip(features[i].tolist(), features[j].tolist(), strict=True)
        ]
        return plots.scatter(
            self.direction[i, j].tolist(),
            self.interaction[i, j].tolist(),
            labels,
            f"pairs of output features ({len(i)} shown)",
            x_title="cosine of directions",
            y_title="cosine of interaction matrices",
            diagonal=True,
        )


@dataclass(frozen=True)
class Neighbours(Tabular):
    """The nearest neighbours of output features in interaction space and by direction, side by side.

    Attributes:
        outputs: the features (or places of the directions) whose neighbours these are.
        by_interaction, by_direction: the `k` nearest of all others by either cosine, nearest first.
        cosines: the cosine of every two of all of them.
        features: the features that are the rows of `cosines`.
        names: the names of the features.
    """

    outputs: Int[Tensor, "n"]
    by_interaction: Int[Tensor, "n k"] = field(repr=False)
    by_direction: Int[Tensor, "n k"] = field(repr=False)
    cosines: FeatureCosines = field(repr=False)
    features: Int[Tensor, "m"] = field(repr=False)
    names: Sequence[str] | None = field(default=None, repr=False)

    @property
    def overlap(self) -> float:
        """Share of the neighbours by interaction that are neighbours by direction, too."""
        same = self.by_interaction[:, :, None] == self.by_direction[:, None, :]
        return same.any(-1).float().mean().item()

    def to_frame(self) -> pd.DataFrame:
        """One row per output and rank: `output, output_name, rank`, then for the neighbour by interaction and the one
        by direction `<kind>_neighbour, <kind>_name, <kind>_cosine, <kind>_other_cosine` (the other measure's)."""
        place = {feature: row for row, feature in enumerate(self.features.tolist())}
        both = {"interaction": self.by_interaction, "direction": self.by_direction}
        rows = []
        for n, output in enumerate(self.outputs.tolist()):
            for rank in range(self.by_interaction.shape[1]):
                row = {"output": output, "output_name": name_of(self.names, output), "rank": rank}
                for kind, neighbours in both.items():
                    neighbour = int(neighbours[n, rank])
                    at = place[output], place[neighbour]
                    values = {"interaction": self.cosines.interaction[at], "direction": self.cosines.direction[at]}
                    row[f"{kind}_neighbour"] = neighbour
                    row[f"{kind}_name"] = name_of(self.names, neighbour)
                    row[f"{kind}_cosine"] = values.pop(kind).item()
                    row[f"{kind}_other_cosine"] = values.popitem()[1].item()
                rows.append(row)
        return pd.DataFrame(rows)

    def plot(self, seed: int = 0) -> go.Figure:
        """Both cosines of all pairs (of many, a sample and the closest)."""
        return self.cosines.plot(self.features, self.names, seed)

    def __str__(self) -> str:
        return f"{self.overlap:.0%} of the neighbours agree\n{self.to_frame().head(20).to_string(index=False)}"


@dataclass(frozen=True)
class FeatureClusters(Tabular):
    """Output features by their interaction matrices.

    Attributes:
        features: clustered.
        labels: the cluster of each: 0 is the largest.
        threshold: the cosine at which clusters are cut.
        cosines: the cosine of every two.
        names: the names of the features.
    """

    features: Int[Tensor, "n"] = field(repr=False)
    labels: Int[Tensor, "n"] = field(repr=False)
    threshold: float
    cosines: FeatureCosines = field(repr=False)
    names: Sequence[str] | None = field(default=None, repr=False)

    @property
    def sizes(self) -> Int[Tensor, "cluster"]:
        """Features in every cluster, falling."""
        return self.labels.bincount()

    def members(self, cluster: int) -> list[int]:
        """The features of one cluster."""
        if not 0 <= cluster < len(self.sizes):
            raise OutOfRangeError(f"cluster {cluster} is none of the {len(self.sizes)}, 0 to {len(self.sizes) - 1}.")
        return self.features[self.labels == cluster].tolist()

    def to_frame(self) -> pd.DataFrame:
        """One row per feature, by cluster: `feature, name, cluster, size, interaction_cosine, direction_cosine`: means
        over the pairs within its cluster; NaN for a cluster of one."""
        means = {
            "interaction_cosine": within_means(self.cosines.interaction, self.labels),
            "direction_cosine": within_means(self.cosines.direction, self.labels),
        }
        order = self.labels.argsort(stable=True)
        labels = self.labels[order]
        return pd.DataFrame(
            {
                "feature": self.features[order].tolist(),
                "name": [name_of(self.names, feature) for feature in self.features[order].tolist()],
                "cluster": labels.tolist(),
                "size": self.sizes[labels].tolist(),
            }
            | {name: of[labels].tolist() for name, of in means.items()}
        )

    def plot(self, seed: int = 0) -> go.Figure:
        """Both cosines of all pairs (of many, a sample and the closest)."""
        return self.cosines.plot(self.features, self.names, seed)

    def __str__(self) -> str:
        shared = int((self.sizes > 1).sum())
        return (
            f"{len(self.features)} features in {len(self.sizes)} clusters at cosine {self.threshold:g}, {shared} of "
            f"them of several\n{self.to_frame().head(20).to_string(index=False)}"
        )


def feature_cosines(
    layer: BilinearLayer,
    u: Float[Tensor, "n d_model"],
    directions: Float[Tensor, "n d_model"],
    metric: Float[Tensor, "d_model d_model"] | None = None,
    memory: int = MEMORY,
) -> FeatureCosines:
    """Both cosines of every two outputs.

    Args:
        layer: the layer.
        u: output directions.
        directions: what `direction` compares: `u` itself, or the same features' other side.
        metric: `D^T D` for interaction matrices between the input features `D`; `None` for the residual basis.
        memory: bytes to work in, and at most as many for the result; 1 GiB by default.

    Raises:
        ArgumentError: less memory than the result or the smallest step takes.
    """
    call = f"the cosines of every two of {len(u):,} outputs"
    check_budget(call, 8 * len(u) ** 2, memory, "ask for fewer outputs (clusters takes them)")
    # On the CPU, where they are sorted, clustered and shown.
    by_matrix, by_direction = (torch.empty(len(u), len(u)) for _ in range(2))
    lengths = double(u).new_zeros(len(u))
    for rows, c, images in coefficient_images(call, layer, u, None, metric, memory):
        lengths[rows] = (images * c).sum(-1).clamp_min(0).sqrt()
        # Both are symmetric: up to these rows, whose lengths are known by now.
        for start in range(0, rows.stop, images.shape[1]):
            columns = slice(start, min(start + images.shape[1], rows.stop))
            inner = images @ hidden_coefficients(layer, u[columns], exact=True).T
            block = cosines(inner, lengths[rows], lengths[columns]).float().cpu()
            by_matrix[rows, columns], by_matrix[columns, rows] = block, block.T
            ends = (torch.nn.functional.normalize(double(directions[at]), dim=-1) for at in (rows, columns))
            block = torch.mm(next(ends), next(ends).T).float().cpu()
            by_direction[rows, columns], by_direction[columns, rows] = block, block.T
    return FeatureCosines(by_matrix, by_direction)


def nearest_others(similarity: Float[Tensor, "n n"], rows: Int[Tensor, "r"], k: int) -> Int[Tensor, "r k"]:
    """The `k` columns of largest similarity in each of these rows, without the row itself."""
    n = len(similarity)
    if not 1 <= k < n:
        raise OutOfRangeError(f"k is {k}, expected 1 to {n - 1}: there are {n} outputs.")
    found = []
    for some in rows.split(max(1, 2**22 // n)):
        others = similarity[some]
        others[torch.arange(len(some)), some] = -torch.inf
        found.append(others.topk(k, dim=-1).indices)
    return torch.cat(found) if found else rows.new_zeros(0, k)


def cluster(similarity: Float[Tensor, "n n"], threshold: float, linkage: Linkage = "average") -> Int[Tensor, "n"]:
    """Agglomerative clusters, cut where the cosine falls below `threshold`: 0 is the largest."""
    from scipy.cluster.hierarchy import fcluster
    from scipy.cluster.hierarchy import linkage as agglomerate

    if len(similarity) < 2:
        return torch.zeros(len(similarity), dtype=torch.long)
    # The upper triangle, row by row, in one vector: as scipy takes it.
    n = len(similarity)
    distances = similarity.new_empty(n * (n - 1) // 2, dtype=torch.float64)
    torch.cat([similarity[row, row + 1 :] for row in range(n)], out=distances).neg_().add_(1).clamp_(min=0)
    tree = agglomerate(distances.numpy(), linkage)
    found = torch.from_numpy(fcluster(tree, 1 - threshold, "distance")).long() - 1
    by_size = found.bincount().argsort(descending=True, stable=True)
    return by_size.argsort()[found]


def within_means(similarity: Float[Tensor, "n n"], labels: Int[Tensor, "n"]) -> Float[Tensor, "cluster"]:
    """Mean over the pairs within every cluster; NaN where there are none."""
    means = torch.full((int(labels.max()) + 1,), torch.nan, dtype=torch.float64)
    sizes = labels.bincount()
    for number in (sizes > 1).nonzero().flatten().tolist():
        members, n = (labels == number).nonzero().flatten(), int(sizes[number])
        block = similarity[members][:, members]
        means[number] = (block.sum(dtype=torch.float64) - block.diagonal().sum(dtype=torch.float64)) / (n * (n - 1))
    return means
