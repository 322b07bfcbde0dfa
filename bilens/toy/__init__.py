"""Toy tasks: one bilinear layer, trained on something whose solution is known, and read from its weights."""

from bilens.toy.boolean import BooleanConfig, BooleanRecovery, train_boolean
from bilens.toy.layer import ToyLayer
from bilens.toy.modular import FourierStructure, ModularAddition, ModularConfig, train_modular
from bilens.toy.superposition import SuperposedModel, Superposition, SuperpositionConfig, train_superposition

__all__ = [
    "BooleanConfig",
    "BooleanRecovery",
    "FourierStructure",
    "ModularAddition",
    "ModularConfig",
    "SuperposedModel",
    "Superposition",
    "SuperpositionConfig",
    "ToyLayer",
    "train_boolean",
    "train_modular",
    "train_superposition",
]
