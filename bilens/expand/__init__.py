"""Exact expansions of a polynomial model over the tokens that it reads, from its weights alone."""

from bilens.expand.expansion import Expansion, Fidelity
from bilens.expand.pairs import TokenPairs
from bilens.expand.subsets import interaction, order_weights, parts_of

__all__ = ["Expansion", "Fidelity", "TokenPairs", "interaction", "order_weights", "parts_of"]
