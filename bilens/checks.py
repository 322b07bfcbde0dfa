"""Numbers that a configuration is given, checked by name."""

from math import isfinite

from bilens.errors import ArgumentError


def check_sizes(**sizes: object) -> None:
    """Refuse what is no positive whole number (`ArgumentError`, named)."""
    for name, value in sizes.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ArgumentError(f"{name} is {value!r}, expected a positive whole number.")


def check_rates(**rates: float) -> None:
    """Refuse a learning rate and the like that is no finite number above zero (`ArgumentError`, named)."""
    for name, value in rates.items():
        if not (isinstance(value, int | float) and isfinite(value) and value > 0):
            raise ArgumentError(f"{name} is {value!r}, expected a number above 0.")


def check_amounts(**amounts: float) -> None:
    """Refuse a weight decay and the like that is no finite number, zero or above (`ArgumentError`, named)."""
    for name, value in amounts.items():
        if not (isinstance(value, int | float) and isfinite(value) and value >= 0):
            raise ArgumentError(f"{name} is {value!r}, expected 0 or more.")
