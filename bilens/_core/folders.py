"""Folders that a run fills: one process at a time, and never over other work unasked.

1. `alone_in` keeps a second run out of a folder for as long as the first is at work
2. `claim` compares what the folder says of itself (a record of what decides the run, and of the files it wrote) with
   the run that is about to start: the same and finished is returned, the same and interrupted goes on, anything
   else is refused with what differs, or removed where that was asked for
3. `finish` writes the record of a run that is over

Where the facts of a run stand elsewhere (in an SAE's metadata, a checkpoint, a store's manifest), `differing` compares
them and `make_room` refuses or removes.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bilens._core.checks import check_flags
from bilens._core.files import destination_folder, read_json, write_atomically
from bilens._core.parallel import barrier, is_main
from bilens.errors import CheckpointError, OverwriteError, WriteError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


@contextmanager
def alone_in(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Make the folder, and let no other process write into it for the length of the block.

    The lock is on the folder itself and goes with the process, however that ends: no file is left behind. A file
    system without locks has none.

    Raises:
        ArgumentError: it is a file, or a place where nothing can be written.
        WriteError: another process is at work in it.
    """
    folder = destination_folder(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WriteError(f"{folder} cannot be made: {error.strerror}.") from error
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise WriteError(
                f"another process is writing to {folder}; wait until it is done, or use another folder."
            ) from error
        except OSError:
            pass
        yield
    finally:
        os.close(handle)


def claim(
    record: Path, identity: Mapping[str, Any], work: Sequence[str], *, others: Sequence[str] = (), overwrite: bool
) -> dict[str, Any] | None:
    """The record of this very run, if it is finished; otherwise the folder is made ready for it.

    Args:
        record: the JSON file that `finish` writes; in the folder.
        identity: JSON-able, by name: what decides the result.
        work: names of the files that hold what a run has come to: its checkpoint, its results.
        others: names of files that it writes besides, and soon makes again; they hold work if they are not its own.
        overwrite: remove other work, instead of refusing it; this run's own is never removed.

    Raises:
        OverwriteError: the folder holds other work.
        CheckpointError: the record is damaged.
    """
    check_flags(overwrite=overwrite)
    folder, identity = record.parent, json.loads(json.dumps(identity))
    try:
        found = read_json(record, remedy="Delete it if nothing in its folder is needed.") if record.exists() else {}
    except CheckpointError:
        if not overwrite:
            raise
        found = {}
    there, digests = found.get("identity"), found.get("files")
    present = [name for name in (*work, *others) if (folder / name).exists()]
    if there == identity:
        changed = [name for name in present if name in (digests or {}) and _digest(folder / name) != digests[name]]
        if not changed:
            return found if digests and all(name in present for name in digests) else None
        refused = f"{', '.join(changed)} changed since this very run wrote it"
    elif there is None:
        refused = f"it has {', '.join(present)}, which {record.name} says nothing of"
    else:
        refused = differing(there, identity)
    # A run that was stopped before its first checkpoint has come to nothing.
    at_stake = present if there is None or digests else [name for name in work if name in present]
    if at_stake and not overwrite:
        raise other_work(folder, refused)
    for name in present:
        (folder / name).unlink()
    record.unlink(missing_ok=True)
    write_json(record, {"identity": identity})
    return None


def make_room(folder: Path, other: str, remove: Callable[[], None], *, overwrite: bool) -> None:
    """Refuse a folder with other work, or have it removed by one process, when all have looked.

    Args:
        folder: the folder, for the message.
        other: what there is to lose, in words; empty if there is nothing.
        remove: removes it.
        overwrite: remove it, instead of refusing.

    Raises:
        OverwriteError: the folder holds other work.
    """
    if other and not overwrite:
        raise other_work(folder, other)
    barrier()
    if other and is_main():
        remove()
    barrier()


def finish(record: Path, identity: Mapping[str, Any], files: Sequence[str], facts: Mapping[str, Any]) -> None:
    """Write the record of a finished run: what decided it, the digests of its files, and what else is to be known."""
    digests = {name: _digest(record.parent / name) for name in files}
    write_json(record, {"identity": identity, "files": digests, **facts})
    for leftover in record.parent.glob(".*.part"):  # of writes that were killed
        leftover.unlink(missing_ok=True)


def other_work(folder: Path, why: str) -> OverwriteError:
    """The refusal of a folder, to be raised: the same words everywhere."""
    return OverwriteError(
        f"{folder} holds other work: {why}. Use another folder, or overwrite=True (--overwrite) to replace it."
    )


def differing(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """What differs between two runs, one level deep, in words: `lr (0.001 there, 0.01 here)`."""
    found = differences(there, here)
    return "; ".join(f"{name} ({a!r} there, {b!r} here)" for name, (a, b) in found.items())


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """What differs between two runs by name, one level deep: what is there, what is wanted here.

    Args:
        there: facts that were read from JSON; those that `here` has no name of are not looked at.
        here: JSON-able.
    """
    found: dict[str, tuple[Any, Any]] = {}
    for key, b in json.loads(json.dumps(here)).items():
        a = there.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found |= {k: (a.get(k), b.get(k)) for k in [*b, *(k for k in a if k not in b)] if a.get(k) != b.get(k)}
        elif a != b:
            found[key] = (a, b)
    return found


def write_json(path: Path, value: Any) -> None:
    """JSON, whole or not at all."""
    write_atomically(path, lambda beside: beside.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8"))


def digest_of(texts: Sequence[str]) -> str:
    """Of texts in their order: two runs that agree in it read the same."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(f"{len(text)} {text}".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()[:32]


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()[:32]
