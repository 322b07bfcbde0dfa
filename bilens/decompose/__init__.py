"""Interaction tensors, eigencircuits, and the `Decomposer` over them."""

from bilens.decompose.decomposer import Decomposer
from bilens.decompose.results import Attribution, Eigencircuits, TopInteractions

__all__ = ["Attribution", "Decomposer", "Eigencircuits", "TopInteractions"]
