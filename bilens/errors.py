"""What can go wrong, one exception each.

Every message names the value, says what was expected and, where there is one, the nearest right choice. Each class also
derives from the builtin that a caller would catch without knowing bilens (`ValueError`, `KeyError`, ...).
"""

import difflib
from collections.abc import Iterable


class BilensError(Exception):
    """Base of every exception that bilens raises on purpose."""

    def __str__(self) -> str:  # KeyError would show the repr of the message
        return str(self.args[0]) if self.args else ""


class HookNameError(BilensError, KeyError):
    """A hook name that the model does not have, or that is switched off."""


class ModelNotFoundError(BilensError, FileNotFoundError):
    """A model or SAE source that is neither bundled, nor a folder, nor reachable on the hub."""


class UploadError(BilensError, OSError):
    """A model or SAEs that the hub did not take."""


class CheckpointError(BilensError, ValueError):
    """A checkpoint that is truncated, misses a key, has a tensor of the wrong shape, or holds NaN."""


class NotBilinearError(BilensError, ValueError):
    """An analysis that needs `y = W_out((W_gate x) * (W_in x))` was asked of another kind of MLP."""


class NotPolynomialError(BilensError, ValueError):
    """An exact expansion over tokens was asked of a model with a softmax, norms, biases or a gate."""


class SAEMismatchError(BilensError, ValueError):
    """An SAE that does not belong where it was put: wrong d_in, wrong hook, wrong layer, wrong encoder."""


class MissingSAEError(BilensError, ValueError):
    """An analysis needs an input or output SAE that the `Decomposer` was not given."""


class OutOfRangeError(BilensError, IndexError):
    """A feature, layer or position index outside its range."""


class ArgumentError(BilensError, ValueError, TypeError):
    """An argument of a kind, shape or value that the function does not take."""


class AlteredModelError(BilensError, RuntimeError):
    """A measurement of a model (or SAE) by itself was asked of one with SAEs attached or hooks on it."""


class StaleError(BilensError, RuntimeError):
    """Something made from a model or SAE, used after that changed or with another one."""


class EmptyTextError(BilensError, ValueError):
    """A text (or token sequence) with nothing in it."""


class ContextLengthError(BilensError, ValueError):
    """More tokens than the model's context."""


class TokenizationError(BilensError, ValueError):
    """A string that is not the single token it was taken for, or a model without a tokenizer."""


class ImageDataError(BilensError, ValueError):
    """Images or labels that are nowhere, cannot be read, or do not belong together."""


class TrainingError(BilensError, RuntimeError):
    """A training run that cannot start or go on."""


class OverwriteError(BilensError, FileExistsError):
    """A file or folder that holds other work, which nothing replaces unasked."""


class WriteError(BilensError, OSError):
    """A file that could not be written: the disk is full, or another process is at work in its folder."""


class MissingPackageError(BilensError, ImportError):
    """A package that comes with an extra of bilens, which was not installed."""


def nearest(word: object, choices: Iterable[str], n: int = 3) -> str:
    """` Did you mean 'a', 'b'?` for the closest choices, or an empty string: appended to an error message."""
    close = difflib.get_close_matches(str(word), list(choices), n=n, cutoff=0.5)
    return f" Did you mean {', '.join(map(repr, close))}?" if close else ""
