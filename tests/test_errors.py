"""The exceptions: one base, the builtin that a caller would catch, messages that read, the nearest right choice."""

import inspect
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bilens import errors
from bilens.errors import BilensError, HookNameError, nearest

ALL = [c for _, c in inspect.getmembers(errors, inspect.isclass) if issubclass(c, BilensError)]


@pytest.mark.parametrize("error", ALL, ids=lambda c: c.__name__)
def test_every_exception_shows_its_message(error: type[BilensError]) -> None:
    """str() is the message itself (a KeyError's would be its repr), also after pickling; empty without one."""
    assert str(error("no hook 'x'")) == "no hook 'x'"
    assert str(pickle.loads(pickle.dumps(error("no hook 'x'")))) == "no hook 'x'"
    assert str(error()) == ""
    with pytest.raises(BilensError):
        raise error("...")


@pytest.mark.parametrize(
    ("name", "builtin"),
    [
        ("HookNameError", KeyError),
        ("ModelNotFoundError", FileNotFoundError),
        ("UploadError", OSError),
        ("MissingPackageError", ImportError),
        ("CheckpointError", ValueError),
        ("NotBilinearError", ValueError),
        ("SAEMismatchError", ValueError),
        ("MissingSAEError", ValueError),
        ("OutOfRangeError", IndexError),
        ("ArgumentError", ValueError),
        ("ArgumentError", TypeError),
        ("AlteredModelError", RuntimeError),
        ("StaleError", RuntimeError),
        ("EmptyTextError", ValueError),
        ("ContextLengthError", ValueError),
        ("TokenizationError", ValueError),
        ("TrainingError", RuntimeError),
        ("OverwriteError", FileExistsError),
        ("WriteError", OSError),
    ],
)
def test_the_builtin_behind_each(name: str, builtin: type[Exception]) -> None:
    """A caller who does not know bilens catches the builtin."""
    assert issubclass(getattr(errors, name), builtin)


def test_hook_name_error_is_caught_as_key_error() -> None:
    """And then reads as it was written."""
    with pytest.raises(KeyError, match=r"^the model has no hook 'x'\.$"):
        raise HookNameError("the model has no hook 'x'.")


def test_nearest() -> None:
    """The closest first, at most n, and nothing where nothing is close."""
    assert nearest("ts-tinny", ["ts-tiny", "fw-small"]) == " Did you mean 'ts-tiny'?"
    assert nearest("hook_patern", ["hook_pattern", "hook_patter", "hook_z"], n=1) == " Did you mean 'hook_pattern'?"
    assert nearest("zzz", ["ts-tiny"]) == ""
    assert nearest("x", []) == ""


@given(word=st.text(min_size=1, max_size=12), others=st.lists(st.text(max_size=12), max_size=5))
def test_the_word_itself_is_its_nearest(word: str, others: list[str]) -> None:
    """Whatever the word: among choices that hold it, it comes first."""
    assert nearest(word, [*others, word]).startswith(f" Did you mean {word!r}")
