"""Writing a file whole or not at all."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bilens.errors import ArgumentError


def destination(path: str | os.PathLike[str]) -> Path:
    """Where a file is to go, its folder made if need be: to be asked before the work that the file is to hold.

    Raises:
        ArgumentError: it is a folder, or in one that cannot be made or written to.
    """
    path = Path(path)
    if path.is_dir():
        raise ArgumentError(f"{path} is a folder, expected the name of a file to write.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArgumentError(f"{path} cannot be written, there is no folder to be had for it: {error}.") from error
    if not os.access(path.parent, os.W_OK):
        raise ArgumentError(f"{path} cannot be written: its folder is read-only.")
    return path


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` fill a file beside `path`, then rename it over `path`; whatever fails leaves `path` as it was.

    Raises:
        ArgumentError: nothing can be written there (see `destination`).
    """
    path = destination(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        beside.touch()
        mode = beside.stat().st_mode
        write(beside)
        # safetensors writes private files; these are to have the permissions of any other.
        beside.chmod(mode)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
