"""Texts in, tokens out: reading files, the tokenizer, pieces and packing."""

import gzip
import json
import random
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bilens.errors import EmptyTextError, TrainingError
from bilens.train.data import TokenizedTexts, load_texts, pack, train_tokenizer, training_and_validation

BOS, EOS = 1, 2

pytestmark = pytest.mark.usefixtures("datasets_cache")


# --- reading texts ----------------------------------------------------------------------------------------------------

STORIES = ["one day, a fox.", 'she said: "hello\nyou"', "crème brûlée ☃"]


def test_json_lines(tmp_path: Path) -> None:
    """Every line's text, in order, line breaks and accents kept; empty and missing ones left out; gzip or not."""
    rows = [*STORIES[:2], "", "  \n", None, STORIES[2]]
    lines = "".join(json.dumps({"text": text, "other": 1}) + "\n" for text in rows)
    (tmp_path / "a.jsonl").write_text(lines)
    with gzip.open(tmp_path / "b.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write(lines)
    assert load_texts(tmp_path / "a.jsonl") == STORIES
    assert load_texts(str(tmp_path / "b.jsonl.gz")) == STORIES


def test_another_column(tmp_path: Path) -> None:
    """`column` names the field; a wrong one is refused with those there are."""
    (tmp_path / "a.jsonl").write_text(json.dumps({"story": "hello", "n": 1}) + "\n")
    assert load_texts(tmp_path / "a.jsonl", column="story") == ["hello"]
    with pytest.raises(TrainingError, match=r"no column 'text'; it has \['story', 'n'\]"):
        load_texts(tmp_path / "a.jsonl")
    with pytest.raises(TrainingError, match="column 'n' holds 1, expected text"):
        load_texts(tmp_path / "a.jsonl", column="n")


def test_paragraphs(tmp_path: Path) -> None:
    """A .txt file's paragraphs are the texts: blank lines part them, single line breaks do not."""
    (tmp_path / "a.txt").write_text("first line\nstill the first\n\nsecond\n\n\n\nthird\n")
    assert [text.strip() for text in load_texts(tmp_path / "a.txt")] == [
        "first line\nstill the first",
        "second",
        "third",
    ]


def test_a_changed_file_is_read_anew(tmp_path: Path) -> None:
    """A file that was written again gives its new texts, not cached ones."""
    path = tmp_path / "a.jsonl"
    for text in ("old", "and something new"):
        path.write_text(json.dumps({"text": text}) + "\n")
        assert load_texts(path) == [text]


def test_texts_that_are_given() -> None:
    """Lists and `datasets` objects are read like files; 1 % is set aside where nothing else validates."""
    from datasets import Dataset

    dataset = Dataset.from_dict({"story": STORIES, "n": list(range(len(STORIES)))})
    assert load_texts([*STORIES, " "]) == load_texts(dataset, column="story") == STORIES
    with pytest.raises(TrainingError, match=r"the data holds 3, expected text"):
        load_texts(["hello", 3])  # type: ignore[list-item]
    with pytest.raises(TrainingError, match=r"the data has no column 'text'; it has \['story', 'n'\]"):
        load_texts(dataset)
    many = [f"story {i}" for i in range(300)]
    assert training_and_validation(many, None) == (many[3:], many[:3])
    assert training_and_validation(many, STORIES) == (many, STORIES)
    with pytest.raises(TrainingError, match=r"one text.*at least two"):
        training_and_validation(["alone"], None)


def test_what_cannot_be_read(tmp_path: Path) -> None:
    """No such file, another kind of file, a folder, broken JSON: TrainingError that names it."""
    with pytest.raises(TrainingError, match=r"no file .*gone.jsonl"):
        load_texts(tmp_path / "gone.jsonl")
    (tmp_path / "a.csv").write_text("text\nhello\n")
    for path in (tmp_path / "a.csv", tmp_path):
        with pytest.raises(TrainingError, match=r"must end in .jsonl, .json, .txt or .parquet"):
            load_texts(path)
    (tmp_path / "broken.jsonl").write_text('{"text": "hello"}\n{"tex')
    with pytest.raises(TrainingError, match=r"broken.jsonl cannot be read as json"):
        load_texts(tmp_path / "broken.jsonl")


@pytest.mark.parametrize("content", ["", '{"text": ""}\n{"text": " "}\n{"text": null}\n'])
def test_nothing_but_empty_texts(tmp_path: Path, content: str) -> None:
    """An empty file and a file of empty texts are EmptyTextErrors."""
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(EmptyTextError, match=r"a.jsonl"):
        load_texts(tmp_path / "a.jsonl")


# --- the tokenizer ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(texts: list[str]) -> Any:
    """A tokenizer trained on `texts`."""
    return train_tokenizer(texts, vocab_size=120, n_ctx=32)


def test_the_tokenizer_is_of_the_published_kind(trained: Any) -> None:
    """[UNK] [BOS] [EOS] come first, [BOS] is added by itself and no [EOS], padding is [EOS]."""
    assert trained.convert_ids_to_tokens([0, 1, 2]) == ["[UNK]", "[BOS]", "[EOS]"]
    ids = trained("the fox found a kite")["input_ids"]
    assert ids.count(BOS) == 1
    assert ids[0] == BOS
    assert EOS not in ids
    assert trained.pad_token_id == EOS
    assert len(trained) == 120
    assert trained.model_max_length == 32


def test_case_accents_quotes_and_digits(trained: Any, texts: list[str]) -> None:
    """Case and accents do not matter, typographic quotes are plain ones, digits and punctuation stand alone."""

    def pieces(text: str) -> list[str]:
        return trained.convert_ids_to_tokens(trained.encode(text, add_special_tokens=False))

    assert pieces("The FÓX found") == pieces("the fox found")
    assert "[UNK]" not in pieces("The FÓX found")
    own = train_tokenizer([*texts, '"I\'m 12," she said. "I\'m 12 - really!"'] * 2, 300)
    encode = own.encode
    assert encode("\u201cI\u2019m 12\u201d") == encode('"I\'m 12"')
    assert own.convert_ids_to_tokens(encode('"12!"', add_special_tokens=False)) == ['"', "1", "2", "!", '"']


def test_no_word_of_the_training_texts_is_unknown(trained: Any, texts: list[str]) -> None:
    """No [UNK] in the texts it was trained on; decoded, they are the texts, lower-cased and with punctuation apart."""
    for text, row in zip(texts, trained(texts, add_special_tokens=False)["input_ids"], strict=True):
        assert trained.unk_token_id not in row
        assert trained.decode(row).replace(" ", "") == text.lower().replace(" ", "")


# --- texts as tokens --------------------------------------------------------------------------------------------------

rows_of_tokens = st.lists(st.lists(st.integers(3, 99), min_size=1, max_size=20), min_size=1, max_size=8)


def tokenized(rows: list[list[int]]) -> TokenizedTexts:
    return TokenizedTexts(rows, [3 * len(row) for row in rows], BOS, EOS)


def test_from_texts(tokenizer: Any, texts: list[str]) -> None:
    """Tokens without special ones, and the characters of each text."""
    some = TokenizedTexts.from_texts(texts[:5], tokenizer)
    assert some.rows == [tokenizer(text)["input_ids"][1:] for text in texts[:5]]
    assert some.n_characters == [len(text) for text in texts[:5]]
    assert some.n_tokens == sum(len(row) + 2 for row in some.rows)


def test_special_tokens_that_are_written_out(tokenizer: Any, texts: list[str]) -> None:
    """[BOS] anywhere and [EOS] at the end of a text are none of it: same tokens, and the same number of characters."""
    plain = TokenizedTexts.from_texts(texts[:4], tokenizer)
    written = [f"[BOS] {texts[0]}", f"[BOS][BOS]{texts[1]} [EOS]", f"{texts[2]}[EOS][EOS]", f"{texts[3]} [BOS]"]
    assert TokenizedTexts.from_texts(written, tokenizer) == plain
    middle = TokenizedTexts.from_texts(["the fox [BOS] the owl [EOS] the frog"], tokenizer)
    assert tokenizer.convert_ids_to_tokens(middle.rows[0]) == ["the", "fox", "the", "owl", "[EOS]", "the", "frog"]
    assert TokenizedTexts.from_texts(["[BOS]", "the fox"], tokenizer).rows == [middle.rows[0][:2]]
    assert TokenizedTexts.from_texts(["[BOS]", "the fox"], tokenizer, keep_empty=True).rows[0] == []


def test_texts_without_bos_or_eos(texts: list[str]) -> None:
    """A tokenizer without [BOS], or no wish for it: none in front. Without [EOS] too, packed texts need a separator."""
    own = train_tokenizer(texts, 100)
    some = TokenizedTexts.from_texts(texts[:5], own)
    without = TokenizedTexts.from_texts(texts[:5], own, prepend_bos=False)
    assert without.pieces(20) == [piece[1:] for piece in some.pieces(21)]
    tokens, mask = without.starts(32)
    for row, kept, text in zip(tokens, mask.bool(), some.rows, strict=True):
        assert row[kept].tolist() == text
    own.bos_token = None
    assert TokenizedTexts.from_texts(texts[:5], own) == without
    own.eos_token = None
    assert TokenizedTexts.from_texts(texts[:5], own).starts(32)[1].equal(mask)
    with pytest.raises(TrainingError, match="BOS or an EOS token to separate texts"):
        TokenizedTexts.from_texts(texts[:5], own).pieces(20)


@given(rows=rows_of_tokens, n_ctx=st.integers(2, 25))
def test_pieces_cover_every_token_once(rows: list[list[int]], n_ctx: int) -> None:
    """The pieces without their [BOS], end to end, are the texts with [EOS] behind each; none exceeds the context."""
    pieces = tokenized(rows).pieces(n_ctx)
    assert all(piece[0] == BOS and 2 <= len(piece) <= n_ctx for piece in pieces)
    assert list(chain(*(piece[1:] for piece in pieces))) == list(chain(*([*row, EOS] for row in rows)))
    # A text ends a piece: no piece holds two texts.
    assert all(EOS not in piece[:-1] for piece in pieces)
    assert sum(len(piece) for piece in tokenized(rows).pieces(100)) == tokenized(rows).n_tokens


@given(rows=rows_of_tokens, n_ctx=st.integers(2, 25))
def test_starts_are_the_beginnings(rows: list[list[int]], n_ctx: int) -> None:
    """One row per text: [BOS] and as many tokens as fit; the mask says how many, [EOS] fills the rest."""
    tokens, mask = tokenized(rows).starts(n_ctx)
    assert tokens.shape == mask.shape
    assert tokens.shape[1] == min(n_ctx, 1 + max(map(len, rows)))
    for row, at, row_mask in zip(rows, tokens.tolist(), mask.tolist(), strict=True):
        kept = [BOS, *row][:n_ctx]
        assert row_mask == [1] * len(kept) + [0] * (len(at) - len(kept))
        assert at == kept + [EOS] * (len(at) - len(kept))


# --- packing ----------------------------------------------------------------------------------------------------------


@given(rows=rows_of_tokens, n_ctx=st.integers(2, 40), seed=st.integers(0, 2**40))
def test_pack_gives_full_rows_of_whole_beginnings(rows: list[list[int]], n_ctx: int, seed: int) -> None:
    """Every row is full, starts with [BOS], and is pieces end to end, only the last of them cut."""
    pieces = tokenized(rows).pieces(n_ctx)
    packed = pack(pieces, n_ctx, seed)
    assert packed.shape[1] == n_ctx
    assert packed.dtype == torch.long
    for row in packed.tolist():
        assert row[0] == BOS
        starts = [i for i, token in enumerate(row) if token == BOS] + [n_ctx]
        found = [row[a:b] for a, b in pairwise(starts)]
        assert all(piece in pieces for piece in found[:-1])
        assert any(piece[: len(found[-1])] == found[-1] for piece in pieces)
    assert torch.equal(packed, pack(pieces, n_ctx, seed))


@given(seed=st.integers(0, 1000))
def test_pack_uses_each_piece_at_most_once(seed: int) -> None:
    """With tokens enough for a row no piece is repeated: an order, not a draw; and only what overhangs is dropped."""
    lengths = random.Random(seed)
    rows = [[100 + i] * lengths.randint(1, 20) for i in range(60)]
    pieces = tokenized(rows).pieces(32)
    packed = pack(pieces, 32, seed)
    first_tokens = [row[i + 1] for row in packed.tolist() for i in range(31) if row[i] == BOS]
    assert len(first_tokens) == len(set(first_tokens))
    # A row drops at most one piece's overhang, shorter than the longest piece, 22; the end may leave a row unfilled.
    n_tokens = sum(map(len, pieces))
    assert n_tokens - (len(packed) + 1) * 22 - 32 <= packed.numel() <= n_tokens


def test_pack_depends_on_the_seed() -> None:
    """Another seed is another order, so that what is cut off in one epoch is seen in another."""
    pieces = tokenized([[i] * (i % 7 + 1) for i in range(3, 60)]).pieces(16)
    packings = [pack(pieces, 16, seed) for seed in range(40)]
    assert not torch.equal(packings[0], packings[1])
    assert set(torch.cat([rows.flatten() for rows in packings]).tolist()) == {BOS, EOS, *range(3, 60)}


def test_too_few_tokens_are_repeated() -> None:
    """Less than a row of text is repeated until a row is full; nothing at all is refused, not repeated for ever."""
    assert pack([[BOS, 5, EOS]], 7, 0).tolist() == [[BOS, 5, EOS, BOS, 5, EOS, BOS]]
    for nothing in ([], [[]]):
        with pytest.raises(EmptyTextError):
            pack(nothing, 7, 0)
