"""Values that a configuration or a command is given, and weights, checked by name: importing this costs nothing."""

import os
from collections.abc import Collection, Sequence
from math import isfinite
from operator import index
from typing import TYPE_CHECKING, Any, SupportsIndex, TypeGuard

from bilens.errors import ArgumentError, CheckpointError, OutOfRangeError, nearest

if TYPE_CHECKING:
    from torch import Tensor

LARGEST_SEED = 2**32 - 1  # of every generator: numpy's takes no larger one
MEMORY = 2**30  # bytes that a call works in, if it is not told otherwise


def check_sizes(**sizes: object) -> None:
    """Refuse what is no positive whole number (`ArgumentError`, named)."""
    for name, value in sizes.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ArgumentError(f"{name} is {value!r}, expected a positive whole number.")


def check_seeds(**seeds: object) -> None:
    """Refuse what no generator takes as its seed (`ArgumentError`, named)."""
    for name, value in seeds.items():
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= LARGEST_SEED:
            raise ArgumentError(f"{name} is {value!r}, expected a whole number from 0 to {LARGEST_SEED}.")


def check_counts(**counts: object) -> None:
    """Refuse what is no whole number, zero or above (`ArgumentError`, named)."""
    for name, value in counts.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise ArgumentError(f"{name} is {value!r}, expected a whole number, 0 or more.")


def check_rates(**rates: object) -> None:
    """Refuse a rate (such as a learning rate) that is no finite number above zero (`ArgumentError`, named)."""
    for name, value in rates.items():
        if not _is_number(value) or value <= 0:
            raise ArgumentError(f"{name} is {value!r}, expected a number above 0.")


def check_amounts(**amounts: object) -> None:
    """Refuse an amount (such as a weight decay) that is no finite number, zero or above (`ArgumentError`, named)."""
    for name, value in amounts.items():
        if not _is_number(value) or value < 0:
            raise ArgumentError(f"{name} is {value!r}, expected 0 or more.")


def check_shares(**shares: object) -> None:
    """Refuse what is no number from 0 to 1 (`ArgumentError`, named)."""
    for name, value in shares.items():
        if not _is_number(value) or not 0 <= value <= 1:
            raise ArgumentError(f"{name} is {value!r}, expected a share from 0 to 1.")


def check_flags(**flags: object) -> None:
    """Refuse what is neither true nor false (`ArgumentError`, named): the text "false" is true to Python."""
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise ArgumentError(f"{name} is {value!r}, expected True or False.")


def whole_number(value: object, what: str = "") -> int:
    """A Python, numpy or 0-d tensor integer as an int (`ArgumentError` for others, and for flags, which Python counts).

    Args:
        value: the value to check.
        what: the message's beginning, for example `"layer 1.5 is no layer of the model"`.
    """
    try:
        if isinstance(value, bool) or str(getattr(value, "dtype", "")) in ("bool", "torch.bool"):
            raise TypeError("a flag")
        return index(value)  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        raise ArgumentError(f"{value!r} is not an integer{': ' if what else ''}{what}.") from error


def check_choice(choices: Collection[str], **values: object) -> None:
    """Refuse what is none of `choices` (`ArgumentError`, named, with the nearest)."""
    for name, value in values.items():
        if not isinstance(value, str) or value not in choices:
            raise ArgumentError(
                f"{name} {value!r:.80} is not one of {', '.join(choices)}." + nearest(str(value), choices)
            )


def check_file_name(name: object, what: str = "name") -> None:
    """Refuse what is no name of a file in a folder (`ArgumentError`): one that leads out of it, or nowhere."""
    if not isinstance(name, str):
        raise ArgumentError(f"{what} is {name!r:.80}, expected text.")
    if name in ("", ".", "..") or any(character in name for character in "/\\\0"):
        raise ArgumentError(f"{what} is {name!r:.80}, expected the name of a file or folder, without a path.")
    if len(os.fsencode(name)) > 255:
        raise ArgumentError(f"{what} is {name!r:.40}..., too long for the name of a file.")


def check_memory(what: str, n_bytes: float) -> None:
    """Refuse what would need more memory than this machine has (`ArgumentError`, with both), where that is known."""
    try:
        there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return
    if n_bytes > there:
        raise ArgumentError(f"{what} needs {n_bytes / 1e9:,.3g} GB of memory; this machine has {there / 1e9:,.3g}.")


def check_budget(call: str, n_bytes: float, memory: int, instead: str = "") -> None:
    """Refuse a call that would need more bytes than it was given (`ArgumentError`).

    Args:
        call: the name of the call.
        n_bytes: the bytes that it would need.
        memory: the bytes that it may use.
        instead: what the user can do, such as `"ask for fewer outputs at a time"`.
    """
    check_sizes(memory=memory)
    if n_bytes > memory:
        ways = f"{instead}, or allow more memory" if instead else "allow more memory"
        raise ArgumentError(f"{call} needs {int(n_bytes):,} bytes, and memory is {memory:,}: {ways}.")


def how_many_fit(call: str, each: float, memory: int, instead: str = "", *, besides: float = 0) -> int:
    """How many rows a call can work on at a time; it is refused where not even one fits (`ArgumentError`).

    Args:
        call, memory, instead: the same as for `check_budget`.
        each: the bytes that one row takes.
        besides: the bytes that are needed for as long as it works, however many rows there are.
    """
    check_budget(call, besides + each, memory, instead)
    return int((memory - besides) // max(each, 1))


def _is_number(value: object) -> TypeGuard[float]:
    """A finite one, within the range of a float."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    try:
        return isfinite(value)
    except OverflowError:
        return False


def check_finite(name: str, tensor: "Tensor", where: Any, before: "Tensor | None" = None) -> None:
    """Refuse a weight that holds NaN or infinity.

    Args:
        name, tensor: the weight's name and values.
        where: the file or object that holds it.
        before: the weight before it was cast, if it was finite.

    Raises:
        CheckpointError: it does (with how many, and the largest number that the cast lost).
    """
    # A sum takes a tenth of the time of looking at every number, and is finite unless they are huge or not finite.
    if tensor.sum().isfinite() or tensor.isfinite().all():
        return
    bad = int((~tensor.isfinite()).sum())
    lost = ""
    if before is not None:
        lost = f": in {tensor.dtype} there is no room for {before.abs().max():.4g}. Take bfloat16 or float32"
    raise CheckpointError(f"{where}: {name} holds {bad} values that are NaN or infinite, of {tensor.numel()}{lost}.")


def name_of(names: Sequence[str] | None, index: int) -> str:
    """The name of a feature, or its index where features have none."""
    return str(index) if names is None else names[index]


def check_index(value: SupportsIndex, n: int, what: str, *, negative: bool = False) -> int:
    """An index as an int, counted from the front.

    Args:
        value: a Python, numpy or 0-d tensor integer.
        n: the number of entries.
        what: the message, for example `"feature {} is outside the output SAE's {}"`, with places for the value and `n`.
        negative: true if `-1` means the last entry.

    Raises:
        ArgumentError: not an integer.
        OutOfRangeError: outside `0..n-1`.
    """
    at = whole_number(value, what.format(value, n))
    if not (-n if negative else 0) <= at < n:
        raise OutOfRangeError(f"{what.format(at, n)}, 0 to {n - 1}.")
    return at % n
