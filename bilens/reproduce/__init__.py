"""Figures of the papers, made again on this machine: `bilens reproduce`."""

from bilens.reproduce.registry import RECIPES, recipe
from bilens.reproduce.reproduction import Recipe, Reproduction, Settings, check_settings

__all__ = ["RECIPES", "Recipe", "Reproduction", "Settings", "check_settings", "recipe"]
