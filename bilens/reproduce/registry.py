"""All recipes, by name."""

from bilens.errors import ArgumentError, nearest
from bilens.reproduce.images import IMAGES
from bilens.reproduce.language import LANGUAGE
from bilens.reproduce.negation import NEGATION
from bilens.reproduce.reproduction import Recipe

RECIPES: dict[str, Recipe] = {one.name: one for one in [*IMAGES, *LANGUAGE, NEGATION]}
"""All there are, by name."""


def recipe(name: str) -> Recipe:
    """One of them.

    Raises:
        ArgumentError: no such recipe.
    """
    if name not in RECIPES:
        raise ArgumentError(f"there is no recipe {name!r}; there are {', '.join(RECIPES)}." + nearest(name, RECIPES))
    return RECIPES[name]
