"""The labelled sentences of the negation study: positive, negative, negated positive, negated negative.

Every subject with every adjective in six frames, three plain and three negated; the frames of one place say the same
with and without a "not". The adjectives are in two halves, each with as many positive as negative ones: what is picked
on one half of them is tested on words it has not seen.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bilens.errors import TokenizationError
from bilens.model.transformer import HookedBilinearTransformer

POSITIVE = ("happy", "glad", "good", "nice", "kind", "brave", "fun", "safe", "pretty", "clean", "strong", "friendly")
NEGATIVE = ("sad", "bad", "mean", "scared", "angry", "sick", "hurt", "ugly", "dirty", "weak", "lonely", "mad")
SUBJECTS = ("Lily", "Tom", "The dog", "The girl", "He", "She", "His mom", "The boy")
PLAIN = ("{} was {}.", "{} was very {}.", "{} felt so {}.")
NEGATED = ("{} was not {}.", "{} wasn't {}.", "{} did not feel {}.")
ADJECTIVES = (*POSITIVE, *NEGATIVE)

Cell = Literal["P", "N", "nP", "nN"]
CELLS: tuple[Cell, ...] = ("P", "N", "nP", "nN")
CELL_NAMES: dict[Cell, str] = {"P": "positive", "N": "negative", "nP": "not positive", "nN": "not negative"}

POSITIONS = ("adjective", "full stop")  # where everything is read

WORDS, NEGATIONS, RENDERINGS = len(ADJECTIVES), 2, len(SUBJECTS) * len(PLAIN)


@dataclass(frozen=True)
class Sentence:
    """One of them, with its labels."""

    text: str
    adjective: str
    positive: bool
    negated: bool

    @property
    def cell(self) -> Cell:
        return CELLS[2 * self.negated + (not self.positive)]


def sentences() -> list[Sentence]:
    """All of them: adjective by adjective, plain before negated; values per sentence are (word, negated, rendering)."""
    return [
        Sentence(frame.format(subject, word), word, word in POSITIVE, negated)
        for word in ADJECTIVES
        for negated, frames in ((False, PLAIN), (True, NEGATED))
        for subject in SUBJECTS
        for frame in frames
    ]


def halves() -> tuple[Int[Tensor, "words"], Int[Tensor, "words"]]:
    """Every other adjective, and the others, as places in `ADJECTIVES`."""
    places = torch.arange(WORDS)
    return places[::2], places[1::2]


def valences() -> Float[Tensor, "words"]:
    """+1 and -1."""
    return torch.tensor([1.0 if word in POSITIVE else -1.0 for word in ADJECTIVES])


def tokens_of(
    model: HookedBilinearTransformer,
) -> tuple[Int[Tensor, "sentence pos"], Int[Tensor, "sentence"]]:
    """The sentences' tokens, padded on the right, and where the adjective of each is; the full stop is the next one.

    Raises:
        TokenizationError: an adjective that is not one token to this model.
    """
    for word in ADJECTIVES:
        pieces = model.to_str_tokens(f" {word}", prepend_bos=False)
        if len(pieces) != 1:
            raise TokenizationError(f"{word!r} is {len(pieces)} tokens to this model, {pieces}: the study needs one.")
    rows = [model.to_tokens(sentence.text, prepend_bos=True)[0] for sentence in sentences()]
    tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return tokens, torch.tensor([len(row) - 2 for row in rows])
