"""The algebra of subsets of tokens, in pure functions.

    f(S)              what a model without norms, biases and softmax gives where the tokens of S are there and the
                      embeddings of all others are zero
    I(S) = sum over T in S of (-1)^(|S| - |T|) f(T)          what the tokens of S do together and no fewer of them do

All `I(S)` add up to the output (Moebius inversion: Rota 1964, "On the foundations of combinatorial theory I"). A token
is known by its offset, how far before the reading position it stands; without the reading token itself, offset 0, its
row is zero all the way up and so is what is read there, so every subset here holds 0.
"""

from collections.abc import Mapping
from itertools import combinations
from math import comb

from jaxtyping import Float
from torch import Tensor

Subset = tuple[int, ...]  # offsets, ascending, 0 first


def parts_of(whole: Subset, order: int) -> list[Subset]:
    """The subsets of `whole` that hold 0 and at most `order` tokens, the smaller first."""
    others = [offset for offset in whole if offset]
    return [(0, *chosen) for n in range(order) for chosen in combinations(others, n)]


def interaction(values: Mapping[Subset, Float[Tensor, "*tokens target"]], subset: Subset) -> Tensor:
    """`I(subset)` from `f` of its parts.

    Args:
        values: `f` of every part, an axis for each of its offsets in their order, and the targets last.
        subset: the tokens.

    Returns:
        Axes as those of `values[subset]`.
    """
    total = values[subset].clone()
    for part in parts_of(subset, len(subset) - 1):
        total += (-1) ** (len(subset) - len(part)) * spread(values[part], part, subset)
    return total


def spread(value: Float[Tensor, "*tokens target"], part: Subset, subset: Subset) -> Tensor:
    """`f(part)` with an axis of length 1 for each offset that `subset` has besides."""
    return value[tuple(slice(None) if offset in part else None for offset in subset)]


def order_weights(n_others: int, order: int) -> list[int]:
    """What the sums of `f` over all subsets of 1, 2, ... tokens count in the sum of all `I` of up to `order` tokens.

    `sum over |S| <= k of I(S) = sum over j <= k of (-1)^(k - j) C(n - j - 1, k - j) sum over |T| = j of f(T)`, with `n`
    tokens to choose from besides the one at offset 0 and sizes counted without it.

    Args:
        n_others: tokens before the reading one.
        order: tokens in a subset, the reading one included.
    """
    n, k = n_others, min(order - 1, n_others)
    return [1 if k == n and j == k else 0 if k == n else (-1) ** (k - j) * comb(n - j - 1, k - j) for j in range(k + 1)]
