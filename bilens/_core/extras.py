"""Packages that only an extra of bilens installs."""

from importlib import import_module
from types import ModuleType

from bilens.errors import MissingPackageError


def need(module: str, extra: str, purpose: str) -> ModuleType:
    """Import a module that an extra of bilens brings.

    Args:
        module: its name, such as `kornia.augmentation`.
        extra: the extra that installs it, such as `vision`.
        purpose: the purpose it is needed for, as the message's subject.

    Raises:
        MissingPackageError: it is not installed; the message says how to install it.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        package = module.split(".")[0]
        if error.name is None or error.name.split(".")[0] != package:
            raise
        raise MissingPackageError(
            f"{purpose} needs the package {package}, which is not installed: pip install 'bilens[{extra}]'."
        ) from error
