"""Questions asked of several layers at once."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import repeat

import torch
from jaxtyping import Float
from torch import Tensor

from bilens._core.checks import MEMORY
from bilens.decompose.decomposer import Decomposer, Side
from bilens.decompose.interactions import Interactions, merge, unequal_rows
from bilens.decompose.outputs import Output
from bilens.errors import ArgumentError


def strongest_interactions(
    decomposers: Sequence[Decomposer],
    n: int = 1000,
    output: Output | None = None,
    side: Side = "encoder",
    *,
    inputs: Output | None = None,
    weights: Sequence[Float[Tensor, "d_sae d_sae"]] | None = None,
    memory: int = MEMORY,
    progress: bool = True,
) -> Interactions:
    """The `n` largest interactions over all (layer, output, input, input), exactly: of a whole model.

    Coefficients of different layers are compared as they are: pre-activation per unit of activation squared. A layer is
    searched only for what beats the n-th best of the layers before it.

    Args:
        decomposers: one per layer, with an input SAE.
        n: the number of interactions.
        output: features or directions, the same in every layer; `None` is every output feature.
        side: encoder or decoder directions of features.
        inputs: between these input features only.
        weights: the weight of every pair of input features, one matrix per layer.
        memory: bytes to work in, and at most as many for the result; 1 GiB by default.
        progress: show a bar per layer.

    Raises:
        ArgumentError: no decomposers, two of one layer, or another number of weights; and as for
            `Decomposer.strongest_interactions`.
        MissingSAEError, OutOfRangeError, SAEMismatchError: the same cases as for `Decomposer.strongest_interactions`.
    """
    layers = [decomposer.layer for decomposer in decomposers]
    if not layers or len(set(layers)) < len(layers):
        raise ArgumentError(f"decomposers of layers {layers}: expected one or more, each of another layer.")
    if weights is not None and (isinstance(weights, Tensor) or len(weights) != len(layers)):
        given = 1 if isinstance(weights, Tensor) else len(weights)
        raise ArgumentError(f"{given} weight matrices for {len(layers)} layers: expected one each.")
    found: list[Interactions] = []
    floor = 0.0
    for decomposer, matrix in zip(decomposers, weights or repeat(None), strict=False):
        of_layer = decomposer._strongest(
            n, output, side, inputs, matrix, floor=floor, at_most=len(layers) > 1, memory=memory, progress=progress
        )
        found = [merge([*found, of_layer], n)]
        if len(found[0]) == n:
            floor = found[0].score[-1].abs().item()
    note = "" if weights is not None else unequal_rows(torch.cat([d.input_directions().cpu() for d in decomposers]))
    return replace(found[0], note=note)
