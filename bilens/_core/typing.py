"""The one decorator that checks the public edge: jaxtyping shapes, enforced by beartype at every call."""

import re
from collections.abc import Callable
from functools import wraps
from inspect import signature
from typing import Any, Literal, TypeVar, get_args, get_origin

import numpy as np
from beartype import BeartypeConf, BeartypeHintOverrides, beartype
from jaxtyping import TypeCheckError, jaxtyped

from bilens.errors import ArgumentError, nearest

F = TypeVar("F", bound=Callable[..., Any])
# What users take for numbers: a whole one where a float is expected, and numpy's, such as a data frame's entries.
NUMBERS = BeartypeHintOverrides({int: int | np.integer, float: float | int | np.integer | np.floating})
PARAMETER = re.compile(r"parameter '(\w+)'\.\nActual value: (.*)\nExpected type: (.*)\.\n")


def typed(function: F) -> F:
    """Check a function's arguments and result against its annotations, except for those in quotes, which only a type
    checker resolves.

    Raises:
        ArgumentError: an argument of another type or shape; it names the argument, its value and what was expected.
    """
    numbers = {n for n, hint in function.__annotations__.items() if {int, float} & {hint, *get_args(hint)}}
    flags = {n for n, hint in function.__annotations__.items() if bool in (hint, *get_args(hint))}
    arguments = signature(function)
    checked = jaxtyped(typechecker=beartype(conf=BeartypeConf(hint_overrides=NUMBERS)))(_without_quoted(function))

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if any(isinstance(value, bool) for value in (*args, *kwargs.values())):
            for name, value in arguments.bind_partial(*args, **kwargs).arguments.items():
                if isinstance(value, bool) and name in numbers - flags:  # which Python counts among its integers
                    raise ArgumentError(f"{function.__name__}: {name} is {value}, expected a number.")
        try:
            return checked(*args, **kwargs)
        except TypeCheckError as error:
            found = PARAMETER.search(str(error))
            if found is None:  # the result, or an annotation that contradicts itself: not the caller's doing
                raise
            name, actual, expected = found.groups()
            hint = function.__annotations__[name]
            if get_origin(hint) is Literal:
                choices = get_args(hint)
                message = f"one of {', '.join(map(repr, choices))}." + nearest(actual.strip("'\""), map(str, choices))
            else:
                message = re.sub(r"^<class '(.*)'>$", r"\1", expected).replace("typing.", "") + "."
            raise ArgumentError(f"{function.__name__}: {name} is {actual}, expected {message}") from None

    return call  # type: ignore[return-value]


def _without_quoted(function: Any) -> Any:
    whole = signature(function)
    hints = {name: hint for name, hint in function.__annotations__.items() if not isinstance(hint, str)}
    if hints == function.__annotations__:
        return function

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    call.__signature__ = whole.replace(  # type: ignore[attr-defined]
        parameters=[p.replace(annotation=hints.get(name, p.empty)) for name, p in whole.parameters.items()],
        return_annotation=hints.get("return", whole.empty),
    )
    return call
