"""Texts as the passes over data take them: each from its `[BOS]`, cut to the context, none of them empty."""

import gzip
import json
from collections.abc import Iterable

import numpy as np
from jaxtyping import Int
from torch import Tensor

from bilens.errors import ArgumentError, EmptyTextError
from bilens.model.files import PRETRAINED, list_models
from bilens.model.generation import sample_texts
from bilens.model.transformer import HookedBilinearTransformer
from bilens.train.data import TokenizedTexts

STORIES_FILE = "stories.jsonl.gz"
N_SAMPLED = 192


def example_texts(model: HookedBilinearTransformer) -> list[str]:
    """Texts to see features fire on: those that come with a bundled model, or else sampled from the model itself."""
    return bundled_texts(model) or [text for text in sample_texts(model, N_SAMPLED) if text.strip()]


def bundled_texts(model: HookedBilinearTransformer) -> list[str]:
    """The texts that come with a bundled model; none for another."""
    bundled = PRETRAINED / model.cfg.model_name / STORIES_FILE
    if model.cfg.model_name not in list_models() or not bundled.exists():
        return []
    with gzip.open(bundled, "rt", encoding="utf-8") as file:
        return [json.loads(line)["text"] for line in file]


def checked_texts(texts: Iterable[str], at_most: int | None = None) -> list[str]:
    """Texts as a list, the first `at_most` of them.

    Raises:
        ArgumentError: one text instead of a list, or something in it that is no text.
        EmptyTextError: no texts, or one that is empty or only whitespace.
    """
    if isinstance(texts, str):
        raise ArgumentError(f"texts is the one text {texts[:40]!r}; expected a list of them: [text].")
    if not isinstance(texts, Iterable) or isinstance(texts, Tensor | np.ndarray):
        raise ArgumentError(f"texts is {texts!r:.80}, expected a list of texts.")
    texts = list(texts)[:at_most]
    if not texts:
        raise EmptyTextError("the list of texts is empty.")
    for place, text in enumerate(texts):
        if not isinstance(text, str):
            raise ArgumentError(f"text {place} of {len(texts)} is {text!r:.80}; expected a string.")
        if not text.strip():
            raise EmptyTextError(f"text {place} of {len(texts)}, {text!r}, has nothing in it; leave it out.")
    return texts


def text_starts(
    model: HookedBilinearTransformer, texts: Iterable[str]
) -> tuple[Int[Tensor, "text pos"], Int[Tensor, "text pos"]]:
    """`[BOS] text`, cut to the model's context and padded on the right; and its attention mask. One row per text.

    The first `model.n_bos` tokens are not of the text.

    Raises:
        ArgumentError: one text instead of a list, or something in it that is no text.
        EmptyTextError: no texts, one that is empty or only whitespace, or none with a token in it.
        TokenizationError: the model has no tokenizer.
    """
    texts = checked_texts(texts)
    tokenized = TokenizedTexts.from_texts(texts, model._require_tokenizer(), bool(model.n_bos), keep_empty=True)
    if not any(tokenized.rows):
        raise EmptyTextError(f"none of the {len(texts)} texts has a token in it; the first is {texts[0]!r}.")
    return tokenized.starts(model.cfg.n_ctx)
