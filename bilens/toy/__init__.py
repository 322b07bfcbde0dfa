"""Toy tasks: layers trained on something whose solution is known, and whole models compiled from known programs."""

from bilens.toy.boolean import BooleanConfig, BooleanRecovery, train_boolean
from bilens.toy.layer import ToyLayer
from bilens.toy.modular import FourierStructure, ModularAddition, ModularConfig, train_modular
from bilens.toy.programs import PROGRAMS, Program, compile_program
from bilens.toy.superposition import SuperposedModel, Superposition, SuperpositionConfig, train_superposition

__all__ = [
    "PROGRAMS",
    "BooleanConfig",
    "BooleanRecovery",
    "FourierStructure",
    "ModularAddition",
    "ModularConfig",
    "Program",
    "SuperposedModel",
    "Superposition",
    "SuperpositionConfig",
    "ToyLayer",
    "compile_program",
    "train_boolean",
    "train_modular",
    "train_superposition",
]
