"""Figures of the papers, made again on this machine: `bilens reproduce`.

The names of the negation study are imported where they are first used (PEP 562), so that recipes are listed at once.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from bilens.reproduce.registry import RECIPES, recipe
from bilens.reproduce.reproduction import Recipe, Reproduction, Settings, check_settings

if TYPE_CHECKING:
    from bilens.reproduce.negation import NegationStudy, negation_study
    from bilens.reproduce.negation_gates import Gate

_HOME = {"Gate": "negation_gates", "NegationStudy": "negation", "negation_study": "negation"}

__all__ = [
    "RECIPES",
    "Gate",
    "NegationStudy",
    "Recipe",
    "Reproduction",
    "Settings",
    "check_settings",
    "negation_study",
    "recipe",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'bilens.reproduce' has no attribute {name!r}")
    return getattr(import_module(f"bilens.reproduce.{_HOME[name]}"), name)
