"""Every annotated tensor shape of the package is checked while the tests run (`tests/__init__.py` asks for it).

At run time only the public edge is checked (`bilens._core.typing.typed`). Here an import hook puts a check on all other
functions and dataclasses with a shape in their annotations, so that a wrong one fails a test. Arguments and result are
looked at together after the call: the function may refuse what does not fit, and the tests of that want its own error.
"""

import ast
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import wraps
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from inspect import signature
from itertools import chain, cycle, repeat
from types import CodeType, GenericAlias, ModuleType
from typing import Any, ForwardRef, TypeVar, get_args

import numpy as np
from beartype import BeartypeConf
from beartype.door import is_bearable
from jaxtyping import AbstractArray, jaxtyped
from torch import Tensor

from bilens._core.typing import NUMBERS

F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")
CONF = BeartypeConf(hint_overrides=NUMBERS)
# The calls of a function that are checked: the first ones, and then one of so many, since a check in every call of an
# inner loop doubles the time of its tests.
FIRST, EVERY = 100, 64
DRAWS = random.Random(0).getstate()


class WrongShape(AssertionError):
    """A value does not have the shape that its annotation promises."""


def check_every_shape(package: str) -> None:
    """Check the shapes of every module of a package that is imported from now on."""
    sys.meta_path.insert(0, Finder(package))


class Finder(MetaPathFinder):
    def __init__(self, package: str) -> None:
        self.package = package

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path, target) if f"{name}.".startswith(f"{self.package}.") else None
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = Loader(name, spec.loader.path)
        return spec


class Loader(SourceFileLoader):
    """Decorates functions with `checked`, below their other decorators, and dataclasses with `checked_fields`."""

    def get_code(self, name: str) -> CodeType | None:
        source = self.get_data(self.path)
        if b"jaxtyping" not in source:
            return super().get_code(name)
        tree = ast.parse(source, self.path)
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and "typed" not in decorators(node):
                node.decorator_list.append(ast.copy_location(ast.Name("__checked__", ast.Load()), node))
            if isinstance(node, ast.ClassDef) and "dataclass" in decorators(node):
                node.decorator_list.insert(0, ast.copy_location(ast.Name("__checked_fields__", ast.Load()), node))
        return compile(tree, self.path, "exec", dont_inherit=True)

    def exec_module(self, module: ModuleType) -> None:
        module.__dict__.update(__checked__=checked, __checked_fields__=checked_fields)
        super().exec_module(module)


def decorators(node: ast.FunctionDef | ast.ClassDef) -> set[str]:
    return {ast.unparse(decorator).partition("(")[0] for decorator in node.decorator_list}


def checked(function: F) -> F:
    """Check arguments and result of a function after a call: one memo of sizes holds for all of them."""
    shaped = with_shape(function.__annotations__)
    if not shaped:
        return function
    parameters = signature(function)
    for name, parameter in parameters.parameters.items():
        if parameter.kind is parameter.VAR_POSITIONAL and name in shaped:
            shaped[name] = GenericAlias(tuple, (shaped[name], ...))
    due = calls()

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        if next(due):
            bound = parameters.bind(*args, **kwargs)
            bound.apply_defaults()
            check(function.__qualname__, shaped, {**bound.arguments, "return": result})
        return result

    return call  # type: ignore[return-value]


def checked_fields(cls: type[T]) -> type[T]:
    """Check the fields of a dataclass when an instance was made."""
    make, shaped, due = cls.__init__, with_shape(cls.__annotations__), calls()
    if not shaped:
        return cls

    @wraps(make)
    def __init__(self: T, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        if next(due):
            check(cls.__qualname__, shaped, {name: getattr(self, name) for name in shaped})

    cls.__init__ = __init__  # type: ignore[assignment, method-assign]
    return cls


def calls() -> Iterator[bool]:
    """For one call after the other, whether it is checked."""
    return chain(repeat(True, FIRST), cycle([*repeat(False, EVERY - 1), True]))


def check(name: str, shaped: dict[str, Any], values: dict[str, Any]) -> None:
    state = random.getstate()
    random.setstate(DRAWS)  # beartype looks at one entry of a list, which it draws
    try:
        with jaxtyped("context"):
            for key, hint in shaped.items():
                if not is_bearable(values[key], hint, conf=CONF):
                    found = {key: shape_of(values[key]) for key in shaped}
                    raise WrongShape(f"{name}: {key} is not {hint}; the shapes are {found}.")
    finally:
        random.setstate(state)


def shape_of(value: Any) -> Any:
    if isinstance(value, Tensor | np.ndarray):
        return str(value.dtype), tuple(value.shape)
    if isinstance(value, list | tuple):
        return [shape_of(entry) for entry in value]
    return {key: shape_of(entry) for key, entry in value.items()} if isinstance(value, dict) else type(value)


def with_shape(annotations: dict[str, Any]) -> dict[str, Any]:
    """The annotations that mention a shape, and nothing that only a type checker resolves."""
    parts = {name: leaves(hint) for name, hint in annotations.items()}
    return {
        name: hint
        for name, hint in annotations.items()
        if not any(isinstance(part, str | ForwardRef) for part in parts[name])
        and any(isinstance(part, type) and issubclass(part, AbstractArray) for part in parts[name])
    }


def leaves(hint: Any) -> list[Any]:
    return [leaf for part in get_args(hint) for leaf in leaves(part)] or [hint]
