"""A corpus as the passes over much data take it: a stream of texts, cut into groups that processes share and resume by.

    1. texts come one after another: from a list, or streamed from a file or the hub
    2. `batch_texts` of them are a group; process r of N takes the groups r, r + N, ... and tokenizes only those
    3. each text is `[BOS] text`; one that is longer than the context goes on in another, from `[BOS]` again
    4. contexts of about the same length run together, so that there is little padding

What runs together depends on nothing but the stream and the sizes, whoever runs it: so do the numbers, to the last bit.
"""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from bilens._core.files import to_path
from bilens._core.folders import digest_of
from bilens.sae.features.statistics import Places
from bilens.sae.texts import checked_texts
from bilens.train.data import TokenizedTexts, check_source, stream_texts

ENDS = 2**20  # bytes of a file that are hashed at either end


@dataclass(frozen=True)
class Corpus:
    """A stream of texts that can be started again, and what tells it from others."""

    texts: Callable[[], Iterator[str]]
    identity: dict[str, Any]
    n_texts: int | None

    def groups(self, size: int, skip: int = 0) -> Iterator[tuple[int, list[str]]]:
        """Each group's number and its texts, without the first `skip` groups."""
        texts = islice(self.texts(), skip * size, None)
        number = skip
        while group := list(islice(texts, size)):
            yield number, group
            number += 1


@dataclass(frozen=True)
class Batch:
    """Contexts that run together: tokens, padded on the right, and the places in them that count."""

    tokens: Int[Tensor, "context pos"]
    mask: Bool[Tensor, "context pos"]
    places: Places


def open_corpus(
    source: Sequence[str] | str | os.PathLike[str],
    split: str = "train",
    column: str = "text",
    max_texts: int | None = None,
) -> Corpus:
    """A corpus from a list of texts, a file, or a hub dataset.

    Args:
        source: texts, or where `bilens.train.data.stream_texts` finds them.
        split, column: the split of a dataset, and the field that holds the text.
        max_texts: the largest number of texts to read.

    Raises:
        ArgumentError: something else than text in the list, or a text alone.
        EmptyTextError: an empty list, or an empty text in it.
        TrainingError: a file that is not there.
    """
    if isinstance(source, str | os.PathLike):
        path = to_path(source, "source")
        if not path.exists():
            check_source(source)
        identity = _file_identity(path) if path.is_file() else {"dataset": str(source), "split": split}
        identity |= {"column": column, "max_texts": max_texts}
        return Corpus(lambda: islice(stream_texts(source, split, column), max_texts), identity, max_texts)
    texts = checked_texts(source, max_texts)
    return Corpus(lambda: iter(texts), {"texts": len(texts), "sha256": digest_of(texts)}, len(texts))


def batches(
    texts: Sequence[str], first_text: int, tokenizer: Any, n_ctx: int, max_tokens: int, prepend_bos: bool = True
) -> Iterator[Batch]:
    """A group's contexts, the shortest first, up to `max_tokens` at a time with padding.

    Args:
        texts: the texts of the group.
        first_text: the number of its first text in the corpus.
        tokenizer: a transformers tokenizer.
        n_ctx: the model's context.
        max_tokens: a single context may be longer.
        prepend_bos: whether a context starts with `[BOS]`, if the tokenizer has one.

    Raises:
        ArgumentError, TokenizationError: the same cases as for `bilens.model.tokenization.encode`.
    """
    tokenized = TokenizedTexts.from_texts(texts, tokenizer, prepend_bos, keep_empty=True)
    bos = tokenized.front
    room = n_ctx - len(bos)
    contexts = [
        (row[at : at + room], first_text + place, at + len(bos))
        for place, row in enumerate(tokenized.rows)
        for at in range(0, len(row), room)
    ]
    contexts.sort(key=lambda context: len(context[0]))  # stable: equal lengths stay in the order of the stream
    start = 0
    while start < len(contexts):
        stop = start + 1
        while stop < len(contexts) and (stop + 1 - start) * (len(contexts[stop][0]) + len(bos)) <= max_tokens:
            stop += 1
        yield _batch(contexts[start:stop], bos)
        start = stop


def _batch(contexts: list[tuple[list[int], int, int]], bos: list[int]) -> Batch:
    lengths = np.array([len(ids) for ids, _, _ in contexts])
    tokens = np.full((len(contexts), int(lengths.max()) + len(bos)), bos[0] if bos else 0)
    at = np.arange(tokens.shape[1]) - len(bos)
    mask = (at >= 0) & (at < lengths[:, None])
    ids = np.concatenate([np.asarray(ids) for ids, _, _ in contexts])
    tokens[mask] = ids
    ends = lengths.cumsum()
    offset = np.arange(len(ids)) - np.repeat(ends - lengths, lengths)
    places = Places(
        ids=ids,
        text=np.repeat([text for _, text, _ in contexts], lengths),
        position=offset + np.repeat([first for _, _, first in contexts], lengths),
        start=np.repeat(ends - lengths, lengths),
        end=np.repeat(ends, lengths),
    )
    return Batch(torch.from_numpy(tokens), torch.from_numpy(mask), places)


def _file_identity(path: Path) -> dict[str, Any]:
    """Size and both ends: enough to tell files apart, also where hashing all of it would take as long as the pass."""
    size = path.stat().st_size
    with path.open("rb") as file:
        digest = hashlib.sha256(file.read(ENDS))
        file.seek(max(0, size - ENDS))
        digest.update(file.read())
    return {"bytes": size, "sha256_of_ends": digest.hexdigest()[:32]}
