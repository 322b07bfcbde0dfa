"""Interaction tensors, eigencircuits, and the `Decomposer` over them."""

from bilens.decompose.decomposer import Decomposer
from bilens.decompose.explanation import Explanation
from bilens.decompose.interactions import Interactions
from bilens.decompose.layers import strongest_interactions
from bilens.decompose.replacing import replace_mlp
from bilens.decompose.results import Attribution
from bilens.decompose.sweep import Sweep, sweep_layers
from bilens.layer.eigen.circuits import Eigencircuits
from bilens.layer.inner import LayerSimilarity, layer_similarity

__all__ = [
    "Attribution",
    "Decomposer",
    "Eigencircuits",
    "Explanation",
    "Interactions",
    "LayerSimilarity",
    "Sweep",
    "layer_similarity",
    "replace_mlp",
    "strongest_interactions",
    "sweep_layers",
]
