"""Writing a file whole or not at all."""

import os
import secrets
import stat
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from safetensors import SafetensorError

from bilens.errors import ArgumentError, BilensError, OverwriteError, WriteError


def destination(path: str | os.PathLike[str], replaces: bytes = b"") -> Path:
    """Where a file is to go, its folder made if need be: to be asked before the work that the file is to hold.

    Args:
        path: of the file; a link leads to what it points to, which is what will be written.
        replaces: how a file that may be replaced begins; another one that is not empty is somebody's work.

    Raises:
        ArgumentError: it is a folder, a device or a pipe, or in a folder that cannot be made or written to.
        OverwriteError: it is a file of another kind.
    """
    path = _target(path)
    if path.exists() and replaces:
        with path.open("rb") as file:
            head = file.read(len(replaces))
        if head and head.lower() != replaces.lower():
            raise OverwriteError(
                f"{path} is a file of another kind, which would be lost: expected one that begins with "
                f"{replaces.decode()!r}, or none. Give another name, or delete it."
            )
    try:
        _create_beside(path).unlink()
    except OSError as error:
        raise ArgumentError(f"{path} cannot be written: {error.strerror or error}.") from error
    return path


def destination_folder(path: str | os.PathLike[str]) -> Path:
    """A folder that files are to go into; nothing is made yet, but it is tried out that it could be.

    Raises:
        ArgumentError: it is a file, or a place where nothing can be written.
    """
    folder = there = Path(path)
    while not there.exists():
        there = there.parent
    if not there.is_dir():
        raise ArgumentError(f"{folder} cannot be a folder to write into: {there} is a file.")
    try:
        _create_beside(there / "new").unlink()
    except OSError as error:
        raise ArgumentError(f"{folder} cannot be written: {error.strerror or error}.") from error
    return folder


def write_atomically(path: str | os.PathLike[str], write: Callable[[Path], Any]) -> None:
    """Let `write` fill a file beside `path`, then rename it over `path`; whatever fails leaves `path` as it was.

    Raises:
        ArgumentError: nothing can be written there (see `destination`).
        WriteError: the disk is full, or whatever else the system says.
    """
    path = _target(path)
    beside = None
    try:
        beside = _create_beside(path)
        mode = beside.stat().st_mode
        write(beside)
        # safetensors writes private files; these are to have the permissions of any other.
        beside.chmod(mode)
        os.replace(beside, path)
    except BilensError:
        raise
    except (OSError, SafetensorError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        raise WriteError(f"{path} could not be written: {reason}. What was there before is as it was.") from error
    finally:
        if beside is not None:
            beside.unlink(missing_ok=True)


def write_files(folder: Path, write: Callable[[str], Any]) -> None:
    """Let `write` fill an empty folder, then move its files into `folder` one by one, each whole or not at all.

    Raises:
        WriteError: as `write_atomically`.
    """
    try:
        with TemporaryDirectory(dir=folder, prefix=".part") as beside:
            write(beside)
            for file in sorted(Path(beside).iterdir(), reverse=True):
                os.replace(file, _target(folder / file.name))
    except BilensError:
        raise
    except Exception as error:  # tokenizers raises nothing narrower
        raise WriteError(f"the files in {folder} could not be written: {error}.") from error


def _target(path: str | os.PathLike[str]) -> Path:
    """What a path leads to, its folder made; refused where no regular file is or could be.

    Raises:
        ArgumentError: as `destination`.
    """
    given = Path(path)
    if given.is_dir():
        raise ArgumentError(f"{given} is a folder, expected the name of a file to write.")
    if given.exists() and not stat.S_ISREG(given.stat().st_mode):
        raise ArgumentError(f"{given} is a device or a pipe, expected the name of a file to write.")
    target = Path(os.path.realpath(given))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArgumentError(f"{given} cannot be written, there is no folder to be had for it: {error}.") from error
    return target


def _create_beside(path: Path) -> Path:
    """A new empty file with an unforeseeable name in the folder of `path`: never one that is there, nor a link."""
    beside = path.with_name(f".{path.name[:40]}.{secrets.token_hex(8)}.part")
    os.close(os.open(beside, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    return beside
