"""Kinds of sentences told apart: AUCs that are quick to relabel, and what they are compared with.

Everything is of values (word, negated or not, rendering, ...), as the sentences of `probes` give them, the
positive words first; nothing here knows of a model.

1. `win_rates` compares every two (word, negated) once; AUCs between kinds of sentences are means of those
   (`cell_aucs`), so that permuted labels cost no comparison again
2. a target (`TARGETS`) is a list of comparisons, and its score the least of their AUCs
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tutorials.negation.probes import CELLS, Cell

Pairs = tuple[tuple[Cell, Cell], ...]
TARGETS: dict[str, Pairs] = {
    "positive word": (("P", "N"), ("nP", "nN")),
    "negative word": (("N", "P"), ("nN", "nP")),
    "negated": (("nP", "P"), ("nP", "N"), ("nN", "P"), ("nN", "N")),
    "not positive": (("nP", "P"), ("nP", "N"), ("nP", "nN")),
    "not negative": (("nN", "P"), ("nN", "N"), ("nN", "nP")),
    "positive clause": (("P", "N"), ("nN", "nP")),
    "negative clause": (("N", "P"), ("nP", "nN")),
}
COLUMNS = 64  # values compared at a time


def win_rates(values: Float[Tensor, "word 2 rendering column"]) -> Float[Tensor, "column unit unit"]:
    """The share of pairs of sentences in which one (word, negated) has the larger value than another; ties half.

    AUCs between any sets of (word, negated) are means over its blocks, so relabelling words needs no sentence again.
    """
    columns = values.shape[-1]
    flat = values.flatten(0, 1).permute(2, 0, 1)  # column, unit, rendering
    units = flat.shape[1]
    lower = flat.new_zeros(columns, units, units)
    for low in range(0, columns, COLUMNS):
        part = flat[low : low + COLUMNS].contiguous()
        for u in range(1, units):
            one, others = part[:, u, None, :, None], part[:, :u, None, :]
            lower[low : low + COLUMNS, u, :u] = ((one > others).float() + 0.5 * (one == others).float()).mean((-2, -1))
    return lower + (1 - lower.mT).triu(1) + 0.5 * torch.eye(units)


def cell_aucs(
    rates: Float[Tensor, "column unit unit"],
    positive: Bool[Tensor, "word"],
    swapped: Bool[Tensor, "word"] | None = None,
) -> Float[Tensor, "column 4 4"]:
    """The AUC of every kind of sentence (in the order of `CELLS`) against every other.

    Args:
        rates: `win_rates`; units are (word, negated).
        positive: of each word.
        swapped: words whose plain sentences are taken for the negated ones.
    """
    negated = torch.zeros(len(positive), 2, dtype=torch.bool)
    negated[:, 1] = True
    negated = negated if swapped is None else negated ^ swapped[:, None]
    members = torch.stack([(positive[:, None] == p) & (negated == n) for n in (False, True) for p in (True, False)])
    weights = members.flatten(1).float()
    weights /= weights.sum(1, keepdim=True)
    return weights @ (rates @ weights.T)


def least_auc(aucs: Float[Tensor, "*column 4 4"], pairs: Pairs) -> Float[Tensor, "*column"]:
    """The least of a target's comparisons: 1 if all of them are separated."""
    return torch.stack([aucs[..., CELLS.index(high), CELLS.index(low)] for high, low in pairs]).amin(0)


def cell_margins(values: Float[Tensor, "word 2 rendering column"]) -> Float[Tensor, "column 4 4"]:
    """By how many standard deviations each kind's mean exceeds each other's: what decides between equal AUCs."""
    means = cell_means(values).T
    spread = values.flatten(0, 2).std(0).clamp_min(torch.finfo(values.dtype).tiny)
    return (means[:, :, None] - means[:, None, :]) / spread[:, None, None]


def signs(words: int) -> tuple[slice, slice]:
    """Positive words come first, as many as negative ones."""
    return slice(None, words // 2), slice(words // 2, None)


def cell_means(values: Float[Tensor, "word 2 rendering *d"]) -> Float[Tensor, "4 *d"]:
    """Means over the four kinds of sentences, in the order of `CELLS`."""
    return torch.stack([values[words, n].flatten(0, 1).mean(0) for n in (0, 1) for words in signs(len(values))])


def positive_minus_negative(values: Float[Tensor, "word rendering *d"]) -> Float[Tensor, "*d"]:
    """Mean of the positive words less that of the negative ones."""
    positive, negative = (values[words].flatten(0, 1).mean(0) for words in signs(len(values)))
    return positive - negative


def negated_interval(rates: Float[Tensor, "unit unit"], draws: int, generator: torch.Generator) -> tuple[float, float]:
    """Of the AUC of not positive against not negative: 95 % of what other adjectives might give (bootstrap).

    Args:
        rates: `win_rates` of one column.
        draws: how many.
        generator: of the draws.
    """
    words = len(rates) // 2
    positive, negative = (
        torch.randint(words // 2, (draws, words // 2), generator=generator) + start for start in (0, words // 2)
    )
    drawn = rates[2 * positive[:, :, None] + 1, 2 * negative[:, None, :] + 1].mean((1, 2))
    low, high = drawn.quantile(torch.tensor([0.025, 0.975])).tolist()
    return low, high
