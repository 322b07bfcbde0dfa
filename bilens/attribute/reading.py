"""Where in the text an explanation's eigencircuits are read: their projections, split exactly over positions."""

from dataclasses import replace

import torch

from bilens.attribute.frozen import FrozenPass
from bilens.attribute.splitting import split
from bilens.attribute.targets import Target
from bilens.decompose.explanation import Explanation
from bilens.decompose.results import Attribution
from bilens.errors import ArgumentError
from bilens.model.hook_points import hook_of


def read_positions(frozen: FrozenPass, attribution: Attribution, n: int = 2) -> Attribution:
    """The attribution with `explanation.reads`, what each position of the text adds to its first `n` projections.

    A projection `v . x` is linear in the residual stream where the norm's scale is frozen, and with attention patterns
    frozen it goes through all attention down to what the embedding and the MLPs of each position write.

    Args:
        frozen: the forward pass of the same model on the same text, or on the part of it up to the position.
        attribution: one of `Decomposer.attribute`.
        n: the number of circuits.

    Raises:
        ArgumentError: the pass is on another text.
        others: the same as for `split`.
    """
    told: Explanation = attribution.explanation
    tokens = told.tokens[: told.position + 1]
    if frozen.strings[: told.position + 1] != tokens:
        raise ArgumentError(f"the frozen pass is on {frozen.strings}, the attribution on {tokens}.")
    hook = hook_of("mlp-in", told.layer)
    targets = [Target.direction(vector, hook, told.position) for vector in told.vectors[:n]]
    reads = [split(frozen, target, attention="paths", mlps="whole").by_position() for target in targets]
    return replace(attribution, explanation=replace(told, reads=torch.stack(reads)[:, : told.position + 1]))
