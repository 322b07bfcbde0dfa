"""Texts as the passes over data take them: each from its `[BOS]`, cut to the context, none of them empty."""

import gzip
import json
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Int
from torch import Tensor

from bilens.errors import ArgumentError, EmptyTextError
from bilens.model.files import PRETRAINED, list_models
from bilens.model.generation import sample_texts
from bilens.train.data import TokenizedTexts

if TYPE_CHECKING:
    from bilens.model.transformer import HookedBilinearTransformer

STORIES_FILE = "stories.jsonl.gz"
N_SAMPLED = 192


def example_texts(model: "HookedBilinearTransformer") -> list[str]:
    """Texts to see features fire on: those that come with a bundled model, or else sampled from the model itself."""
    bundled = PRETRAINED / model.cfg.model_name / STORIES_FILE
    if model.cfg.model_name in list_models() and bundled.exists():
        with gzip.open(bundled, "rt", encoding="utf-8") as file:
            return [json.loads(line)["text"] for line in file]
    return [text for text in sample_texts(model, N_SAMPLED) if text.strip()]


def text_starts(
    model: "HookedBilinearTransformer", texts: Iterable[str]
) -> tuple[Int[Tensor, "text pos"], Int[Tensor, "text pos"]]:
    """`[BOS] text`, cut to the model's context and padded on the right; and its attention mask. One row per text.

    The first `model.n_bos` tokens are not of the text.

    Raises:
        ArgumentError: one text instead of a list, or something in it that is no text.
        EmptyTextError: no texts, one that is empty or only whitespace, or none with a token in it.
        TokenizationError: the model has no tokenizer.
    """
    if isinstance(texts, str):
        raise ArgumentError(f"texts is the one text {texts[:40]!r}; expected a list of them: [text].")
    if not isinstance(texts, Iterable) or isinstance(texts, Tensor | np.ndarray):
        raise ArgumentError(f"texts is {texts!r:.80}, expected a list of texts.")
    texts = list(texts)
    other = next((i for i, text in enumerate(texts) if not isinstance(text, str)), None)
    if other is not None:
        raise ArgumentError(f"text {other} of {len(texts)} is {texts[other]!r:.80}; expected a string.")
    if not texts:
        raise EmptyTextError("the list of texts is empty.")
    blank = next((i for i, text in enumerate(texts) if not text.strip()), None)
    if blank is not None:
        raise EmptyTextError(f"text {blank} of {len(texts)}, {texts[blank]!r}, has nothing in it; leave it out.")
    tokenized = TokenizedTexts.from_texts(texts, model._require_tokenizer(), bool(model.n_bos), keep_empty=True)
    if not any(tokenized.rows):
        raise EmptyTextError(f"none of the {len(texts)} texts has a token in it; the first is {texts[0]!r}.")
    return tokenized.starts(model.cfg.n_ctx)
