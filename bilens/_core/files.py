"""Paths that users give, files that are read with care, and files that are written whole or not at all.

1. `to_path` turns what a caller gave for a path into one, or says what is wrong with it
2. `regular_file` refuses what could hang or fill the memory: pipes, devices, files of an absurd size
3. `read_json` and `open_tensors` read through it, and name the file that is damaged and what to do about it
4. `write_atomically` writes beside and renames
"""

import json
import os
import secrets
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from safetensors import SafetensorError, safe_open

from bilens.errors import ArgumentError, BilensError, CheckpointError, ModelNotFoundError, OverwriteError, WriteError

PAGE = b"<!DOCTYPE html>"  # how a page begins
MAX_JSON_BYTES = 2**28  # the largest tokenizer.json on the hub has a tenth of this


# --- reading ----------------------------------------------------------------------------------------------------------


def to_path(path: Any, name: str = "path") -> Path:
    """The path that a caller gave, `~` expanded; every path and every source that may be one comes through here.

    Args:
        path: text or a `Path`.
        name: the argument's name, for the message.

    Raises:
        ArgumentError: of another type, empty, with a NUL in it, too long, of a user that does not exist, or in a place
            that the system does not let us look at.
    """
    if not isinstance(path, str | os.PathLike) or not isinstance(os.fspath(path), str):
        raise ArgumentError(f"{name} is {path!r}, expected text or a Path, not {type(path).__name__}.")
    if not os.fspath(path):
        raise ArgumentError(f"{name} is empty, expected the name of a file or folder.")
    try:
        found = Path(path).expanduser()
        os.stat(found)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: a home that nobody has
        reason = error.strerror if isinstance(error, OSError) else error
        shown = os.fspath(path) if len(os.fspath(path)) <= 100 else os.fspath(path)[:100] + "..."
        raise ArgumentError(f"{name} {shown!r} cannot be looked up: {reason}.") from error
    return found


def regular_file(path: Path, at_most: int | None = None) -> Path:
    """The path, if it is a regular file of a sensible size: a pipe would wait for ever, a device never end.

    Args:
        path: the file; a link counts as what it points to.
        at_most: bytes that a file of this kind can sensibly have; `None` where what reads it checks the size itself.

    Raises:
        ModelNotFoundError: there is no file.
        CheckpointError: it is something else than a regular file, or it is larger.
    """
    try:
        found = os.stat(path)
    except FileNotFoundError as error:
        raise ModelNotFoundError(f"no file {path}.") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
    if not stat.S_ISREG(found.st_mode):
        kind = "a folder" if stat.S_ISDIR(found.st_mode) else "a pipe, a socket or a device"
        raise CheckpointError(f"{path} is {kind}, expected a regular file.")
    if at_most is not None and found.st_size > at_most:
        raise CheckpointError(f"{path} has {found.st_size:,} bytes, expected at most {at_most:,}.")
    return path


def read_json(path: Path, expected: type = dict, remedy: str = "") -> Any:
    """What a JSON file holds.

    Args:
        path: the file.
        expected: the type of the outermost value: `dict` or `list`.
        remedy: a sentence that says what to do where the file is damaged ("Delete the folder and build it again.").

    Raises:
        ModelNotFoundError: there is no file.
        CheckpointError: not a regular file, too large, or see `parse_json`.
    """
    regular_file(path, MAX_JSON_BYTES)
    try:
        text = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}. {remedy}".rstrip()) from error
    return parse_json(text, path, expected, remedy)


def parse_json(text: str | bytes, where: Any, expected: type = dict, remedy: str = "") -> Any:
    """The value of a JSON text; arguments as in `read_json`, `where` it stands for the message.

    Raises:
        CheckpointError: not UTF-8, not JSON, nested without end, with a number of thousands of digits, or of another
            type than `expected`.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError, TypeError) as error:
        raise CheckpointError(f"{where} is not JSON: {error}. {remedy}".rstrip()) from error
    if not isinstance(value, expected):
        kind = "an object" if expected is dict else f"a {expected.__name__}"
        raise CheckpointError(f"{where} holds a {type(value).__name__}, expected {kind}. {remedy}".rstrip())
    return value


@contextmanager
def open_tensors(path: Path, framework: str = "pt", remedy: str = "") -> Iterator[Any]:
    """An open safetensors file (`safetensors.safe_open`); arguments as in `read_json`.

    Raises:
        ModelNotFoundError: there is no file.
        CheckpointError: not a regular file, or truncated or damaged.
    """
    try:
        with safe_open(regular_file(path), framework=framework) as file:
            yield file
    except BilensError:
        raise
    except (SafetensorError, OSError) as error:
        size = f" ({path.stat().st_size} bytes)" if path.is_file() else ""
        raise CheckpointError(f"{path}{size} cannot be read: {error}. {remedy}".rstrip()) from error


# --- writing ----------------------------------------------------------------------------------------------------------


def destination(path: str | os.PathLike[str], replaces: bytes = b"") -> Path:
    """Where a file will be written; its folder is made if it is missing. Call this before the work that the file holds.

    Args:
        path: the file's path; where it is a link, the file that it points to is written.
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
    folder = there = to_path(path)
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
        WriteError: the same cases as for `write_atomically`.
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
        ArgumentError: the same cases as for `destination`.
    """
    given = to_path(path)
    if given.is_dir():
        raise ArgumentError(f"{given} is a folder, expected the name of a file to write.")
    if given.exists() and not stat.S_ISREG(given.stat().st_mode):
        raise ArgumentError(f"{given} is a device or a pipe, expected the name of a file to write.")
    target = Path(os.path.realpath(given))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArgumentError(f"{given} cannot be written, because its folder cannot be made: {error}.") from error
    return target


def _create_beside(path: Path) -> Path:
    """A new empty file with an unforeseeable name in the folder of `path`: never one that is there, nor a link."""
    beside = path.with_name(f".{path.name[:40]}.{secrets.token_hex(8)}.part")
    os.close(os.open(beside, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    return beside
