"""Texts through `datasets`, a WordPiece tokenizer through `tokenizers`, and packing into full contexts."""

import hashlib
import os
import re
import zlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, Union

import torch
from jaxtyping import Int
from torch import Tensor

from bilens._core.files import to_path
from bilens.errors import ArgumentError, EmptyTextError, TrainingError
from bilens.model.tokenization import encode

if TYPE_CHECKING:
    from datasets import Dataset

Texts: TypeAlias = Union[str, os.PathLike[str], Sequence[str], "Dataset"]
BROKEN = (OSError, ValueError, EOFError, zlib.error)  # what the readers of files raise; the last two: of a cut .gz
LARGEST_VOCABULARY = 2**24
SPECIAL_TOKENS = ("[UNK]", "[BOS]", "[EOS]")


def load_texts(source: Texts, split: str = "train", column: str = "text") -> list[str]:
    """Texts from a file or a hub dataset, through `datasets`, or those that are given.

    Args:
        source: a `.jsonl`/`.json` file (or `.gz` of one) with a text column, a `.txt` file whose paragraphs are the
            texts, a `.parquet` file, a hub dataset id, a `datasets.Dataset`, or texts.
        split: the split of a hub dataset.
        column: the field that holds the text.

    Raises:
        TrainingError: no such file, one that cannot be read, no such column, or a column of something else than text.
        EmptyTextError: nothing but empty texts, or nothing at all.
    """
    data: Any = source
    name = where = "the data"
    if isinstance(source, str | os.PathLike):
        data, name = open_dataset(source, split), str(source)
    if hasattr(data, "column_names"):
        if not isinstance(column, str) or column not in data.column_names:
            raise TrainingError(f"{name} has no column {column!r}; it has {data.column_names}.")
        data, where = data[column], f"{name}: column {column!r}"
    try:
        data = list(data)
    except UnicodeDecodeError as error:  # datasets reads the rows only now
        raise TrainingError(f"{name} is not UTF-8: {error}.") from error
    except TypeError as error:
        raise ArgumentError(f"source is {source!r:.80}, expected texts, or where to load them.") from error
    other = next((text for text in data if not isinstance(text, str | None)), None)
    if other is not None:
        raise TrainingError(f"{where} holds {other!r}, expected text.")
    texts = [text for text in data if text and text.strip()]
    if not texts:
        raise EmptyTextError(f"{name}: every text is empty.")
    return texts


def pieces_identity(pieces: Sequence[list[int]]) -> dict[str, Any]:
    """What tells token pieces from others: how many tokens, and a digest of them in their order."""
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(array("q", [len(piece), *piece]).tobytes())
    return {"n_tokens": sum(map(len, pieces)), "sha256": digest.hexdigest()[:32]}


def training_and_validation(data: Texts, valid: Texts | None, *, column: str = "text") -> tuple[list[str], list[str]]:
    """Texts to train on and texts to validate on; without `valid`, 1 % of the first are set aside.

    Raises:
        TrainingError, EmptyTextError: the same cases as for `load_texts`; one text alone cannot be divided.
    """
    texts = load_texts(data, column=column)
    if valid is not None:
        return texts, load_texts(valid, column=column)
    if len(texts) == 1:
        raise TrainingError("the data hold one text; with no validation texts at least two are needed.")
    held = max(1, len(texts) // 100)
    return texts[held:], texts[:held]


def open_dataset(source: str | os.PathLike[str], split: str = "train", *, streaming: bool = False) -> Any:
    """A file or a hub dataset as `datasets` gives it: a `Dataset`, or with `streaming` an `IterableDataset`.

    Args:
        source, split: the same as for `load_texts`.
        streaming: read it piece by piece; what cannot be read shows when the stream comes to it.

    Raises:
        TrainingError: no such file, one of no known kind, or one that cannot be read.
        EmptyTextError: a file without a row.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    path, kind = to_path(source, "source"), _kind(source)
    if path.exists() and kind is not None:
        options = {"sample_by": "paragraph"} if kind == "text" else {}
        try:
            return load_dataset(kind, data_files=str(path.resolve()), split="train", streaming=streaming, **options)
        except StopIteration as error:  # datasets' answer to a file without a row
            raise EmptyTextError(f"{source}: the file is empty.") from error
        except DatasetGenerationError as error:
            raise TrainingError(f"{source} cannot be read as {kind}: {error.__cause__ or error}") from error
        except BROKEN as error:  # of the format's reader, where nothing is generated first
            raise TrainingError(f"{source} cannot be read as {kind}: {error}") from error
    if path.exists():
        raise TrainingError(f"{path}: a data file must end in .jsonl, .json, .txt or .parquet (.gz may follow).")
    check_source(source)
    try:
        return load_dataset(str(source), split=split, streaming=streaming)
    except (*BROKEN, DatasetGenerationError) as error:
        raise TrainingError(f"{source} is no file here, and not to be had from the hub: {error}") from error


def check_source(source: str | os.PathLike[str]) -> None:
    """Refuse to ask the hub for what is not here and can be no dataset there, such as a text.

    Raises:
        TrainingError: the name of a data file.
        ArgumentError: no name at all.
    """
    if _kind(source) is not None:
        raise TrainingError(f"no file {source} (in {Path.cwd()}).")
    if not re.fullmatch(r"[\w.-]{1,96}(/[\w.-]{1,96})?", str(source)):
        raise ArgumentError(
            f"{str(source)!r:.80} is neither a file nor the name of a dataset (owner/name). A text is given in a list: "
            "[text]."
        )


def stream_texts(source: str | os.PathLike[str], split: str = "train", column: str = "text") -> Iterator[str]:
    """The texts of `load_texts`, in its order, one after another: nothing is kept in memory or in a cache.

    Args:
        source, split, column: the same as for `load_texts`.

    Raises:
        TrainingError: the same cases as for `load_texts`; what cannot be read shows when the stream comes to it.
        EmptyTextError: nothing but empty texts, or nothing at all.
    """
    rows = iter(open_dataset(source, split, streaming=True))
    empty = True
    while True:
        try:
            row = next(rows, None)
        except BROKEN as error:
            raise TrainingError(f"{source} cannot be read as {_kind(source) or 'a dataset'}: {error}") from error
        if row is None:
            break
        if not isinstance(column, str) or column not in row:
            raise TrainingError(f"{source} has no column {column!r}; it has {list(row)}.")
        text = row[column]
        if not isinstance(text, str | None):
            raise TrainingError(f"{source}: column {column!r} holds {text!r}, expected text.")
        if text and text.strip():
            empty = False
            yield text
    if empty:
        raise EmptyTextError(f"{source}: every text is empty.")


def _kind(source: str | os.PathLike[str]) -> str | None:
    """What `datasets` calls a data file of this name; `None` for anything else."""
    suffixes = [s for s in Path(source).suffixes if s not in (".gz", ".zst", ".xz")]
    kinds = {".jsonl": "json", ".json": "json", ".txt": "text", ".parquet": "parquet"}
    return kinds.get(suffixes[-1] if suffixes else "")


def train_tokenizer(texts: Iterable[str], vocab_size: int = 4096, n_ctx: int = 256) -> Any:
    """A lower-cased WordPiece tokenizer of the published kind (`[UNK] [BOS] [EOS]`, `[BOS]` added by itself).

    `tokenizers` breaks ties between equally frequent pieces in an order that differs from run to run, so two trainings
    on the same texts agree in all but a few rare pieces: to repeat a training run exactly, keep its tokenizer.

    Returns:
        A `transformers.PreTrainedTokenizerFast`, padding with `[EOS]`.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    if not isinstance(vocab_size, int) or not 0 < vocab_size <= LARGEST_VOCABULARY:
        raise ArgumentError(f"vocab_size is {vocab_size!r:.80}, expected 1 to {LARGEST_VOCABULARY}.")
    unk, bos, eos = SPECIAL_TOKENS
    tokenizer = Tokenizer(models.WordPiece(unk_token=unk, max_input_chars_per_word=100))
    tokenizer.normalizer = normalizers.Sequence(
        [
            # Typographic quotes and dashes would each cost a vocabulary entry, or an [UNK].
            normalizers.Replace(Regex("[“”]"), '"'),
            normalizers.Replace(Regex("[‘’]"), "'"),
            normalizers.NFD(),
            normalizers.StripAccents(),
            normalizers.Lowercase(),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Punctuation("isolated"),
            pre_tokenizers.Whitespace(),
            pre_tokenizers.Digits(individual_digits=True),
        ]
    )
    trainer = trainers.WordPieceTrainer(vocab_size=vocab_size, special_tokens=list(SPECIAL_TOKENS), min_frequency=2)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=unk,
        bos_token=bos,
        eos_token=eos,
        pad_token=eos,
        model_max_length=n_ctx,
        clean_up_tokenization_spaces=False,
    )


@dataclass(frozen=True)
class TokenizedTexts:
    """Texts as token ids without the special tokens around them, with what is needed to count characters.

    Args:
        rows: the tokens of each text.
        n_characters: the number of characters of each text.
        bos, eos: the tokens in front of a text and behind it, `None` for none.
    """

    rows: list[list[int]]
    n_characters: list[int]
    bos: int | None
    eos: int | None

    @classmethod
    def from_texts(
        cls, texts: Sequence[str], tokenizer: Any, prepend_bos: bool = True, *, keep_empty: bool = False
    ) -> "TokenizedTexts":
        """Encode with a transformers tokenizer.

        Args:
            texts: the texts; a `[BOS]` or final `[EOS]` that is written out does not count as text.
            tokenizer: whose `[BOS]` and `[EOS]`, where it has them, go around each text.
            prepend_bos: false for none in front.
            keep_empty: keep texts without a token (a lone accent normalises to nothing), so that rows are texts.

        Raises:
            ArgumentError, TokenizationError: the same cases as for `bilens.model.tokenization.encode`.
        """
        bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        rows, lengths = [], []
        for text, row in zip(texts, encode(tokenizer, texts), strict=True):
            while eos is not None and row and row[-1] == eos:
                row = row[:-1]
            if row or keep_empty:
                rows.append(row)
                lengths.append(len(_without(text, tokenizer.bos_token, tokenizer.eos_token)))
        return cls(rows, lengths, bos if prepend_bos else None, eos)

    @property
    def front(self) -> list[int]:
        """What every piece starts with: `[BOS]`, or nothing."""
        return [] if self.bos is None else [self.bos]

    @property
    def back(self) -> list[int]:
        """What every text ends with: `[EOS]`, or nothing."""
        return [] if self.eos is None else [self.eos]

    @property
    def n_tokens(self) -> int:
        """All tokens, one BOS and one EOS per text included."""
        return sum(map(len, self.rows)) + len(self.front + self.back) * len(self.rows)

    def pieces(self, n_ctx: int) -> list[list[int]]:
        """`[BOS] text [EOS]`, a text longer than the context in several pieces that each start with `[BOS]`.

        Raises:
            TrainingError: the tokenizer has neither token, so that packed texts would run into one another.
        """
        if not self.front + self.back:
            raise TrainingError("the tokenizer needs a BOS or an EOS token to separate texts.")
        room = n_ctx - len(self.front)
        pieces = []
        for row in self.rows:
            row = row + self.back
            pieces += [self.front + row[at : at + room] for at in range(0, len(row), room)]
        return pieces

    def starts(self, n_ctx: int) -> tuple[Int[Tensor, "text pos"], Int[Tensor, "text pos"]]:
        """`[BOS] text`, cut to the context and padded on the right with `[EOS]`; and its attention mask."""
        rows = [(self.front + row)[:n_ctx] for row in self.rows]
        lengths = torch.tensor([len(row) for row in rows])
        tokens = torch.full((len(rows), int(lengths.max())), self.eos or 0)
        for i, row in enumerate(rows):
            tokens[i, : lengths[i]] = torch.tensor(row)
        return tokens, (torch.arange(tokens.shape[1]) < lengths[:, None]).long()


def _without(text: str, *special: str | None) -> str:
    """A text without what is written out of special tokens, and without the space that stood between."""
    bare = text
    for token in special:
        bare = re.sub(rf"\s*{re.escape(token)}", "", bare) if token else bare
    return text if bare == text else bare.strip()


def pack(pieces: Sequence[list[int]], n_ctx: int, seed: int) -> Int[Tensor, "row pos"]:
    """Full contexts, each starting at the start of a piece: pieces in a seeded order, cut where the context is full.

    A piece's overhang is dropped for this order and seen in others. Every row so starts with `[BOS]`, as every text
    does when the model is used. With too few tokens for one row, the pieces are repeated.
    """
    if not any(pieces):
        raise EmptyTextError("there are no tokens to pack.")
    order = torch.randperm(len(pieces), generator=torch.Generator().manual_seed(seed)).tolist()
    rows: list[list[int]] = []
    row: list[int] = []
    while not rows:
        for i in order:
            row += pieces[i]
            if len(row) >= n_ctx:
                rows.append(row[:n_ctx])
                row = []
    return torch.tensor(rows)
