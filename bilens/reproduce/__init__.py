"""Figures of the papers, made again on this machine: `bilens reproduce`."""

from bilens.reproduce.negation import NegationStudy, negation_study
from bilens.reproduce.negation_gates import Gate
from bilens.reproduce.registry import RECIPES, recipe
from bilens.reproduce.reproduction import Recipe, Reproduction, Settings

__all__ = [
    "RECIPES",
    "Gate",
    "NegationStudy",
    "Recipe",
    "Reproduction",
    "Settings",
    "negation_study",
    "recipe",
]
