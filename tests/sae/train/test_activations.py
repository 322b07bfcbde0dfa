"""The stream of activations: every token of an epoch once, the model's own activations, nothing but (seed, step)."""

import json
from functools import cache
from typing import Any

import pytest
import torch
from datasets import IterableDataset
from hypothesis import given
from hypothesis import strategies as st

from bilens.errors import EmptyTextError, HookNameError, SAEMismatchError, TrainingError
from bilens.sae.train.activations import BATCHES_PER_BLOCK, ActivationStream, PackedRows, StreamedRows
from bilens.train.data import TokenizedTexts, open_dataset, pack
from tests.conftest import make_model

EMBED, MLP_OUT, Z = "hook_embed", "blocks.0.hook_mlp_out", "blocks.1.attn.hook_z"


@pytest.fixture(scope="module")
def model(tokenizer):
    return make_model(tokenizer=tokenizer)


@pytest.fixture(scope="module")
def pieces(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    return TokenizedTexts.from_texts(texts[:200], tokenizer).pieces(32)


@pytest.mark.parametrize("batch_size", [32, 50, 7])  # a row per batch; rows that straddle batches; and blocks
def test_the_rows_tokens_once_each_with_the_models_activations(model, pieces, batch_size):
    rows = PackedRows(pieces, 32, seed=3)
    stream = ActivationStream(model, rows, [EMBED, MLP_OUT, Z], batch_size)
    n = 2 * BATCHES_PER_BLOCK * batch_size
    got = [next(stream) for _ in range(2 * BATCHES_PER_BLOCK)]
    tokens = PackedRows(pieces, 32, seed=3).read(0, -(-n // 32))
    _, own = model.run_with_cache(tokens, return_cache_object=False)
    for hook, width in ((EMBED, 16), (MLP_OUT, 16), (Z, 16)):
        for block in range(2):
            of_block = slice(block * n // 2, (block + 1) * n // 2)
            expected = own[hook].flatten(0, 1).reshape(-1, width)[of_block]
            seen = torch.cat([batch[hook] for batch in got[block * BATCHES_PER_BLOCK :][:BATCHES_PER_BLOCK]])
            assert seen.shape == expected.shape
            # The same vectors in another order: the passes differ in how many rows they hold, so not to the bit.
            order, other = seen.double().sum(-1).argsort(), expected.double().sum(-1).argsort()
            assert torch.allclose(seen[order].sum(-1), expected[other].sum(-1), atol=1e-4)
            assert torch.allclose(seen.mT @ seen, expected.mT @ expected, rtol=1e-4, atol=1e-3)


def test_the_hooks_of_a_batch_are_of_the_same_tokens(model, pieces):
    stream = ActivationStream(model, PackedRows(pieces, 32, 0), ["blocks.0.hook_resid_mid", MLP_OUT], 64)
    post = ActivationStream(model, PackedRows(pieces, 32, 0), ["blocks.0.hook_resid_post"], 64)
    for _ in range(3):
        batch = next(stream)
        total = batch["blocks.0.hook_resid_mid"] + batch[MLP_OUT]
        assert torch.allclose(total, next(post)["blocks.0.hook_resid_post"], atol=1e-5)


@given(steps=st.lists(st.integers(0, 3 * BATCHES_PER_BLOCK), min_size=1, max_size=5))
def test_a_batch_is_decided_by_seed_and_step(steps):
    """To the bit, in any order of the steps, alone or beside other hooks."""
    streams, first = _streams()
    for step in steps:
        for name, stream in streams.items():
            stream.step = step
            assert torch.equal(next(stream)[MLP_OUT], first[name][step]), (name, step)


@cache
def _streams() -> Any:
    model, pieces = make_model(), [[1, *range(3, 3 + n)] for n in range(5, 40)]
    hooks = {"alone": [MLP_OUT], "beside": [MLP_OUT, Z]}
    streams = {name: ActivationStream(model, PackedRows(pieces, 32, 0), of, 10) for name, of in hooks.items()}
    first = {
        name: [next(stream)[MLP_OUT] for _ in range(3 * BATCHES_PER_BLOCK + 1)] for name, stream in streams.items()
    }
    assert all(torch.equal(a, b) for a, b in zip(first["alone"], first["beside"], strict=True))
    return streams, first


def test_every_token_of_an_epoch_once(pieces):
    """All pieces but the overhangs, in each epoch's own order; rows are those of `pack`, one epoch after the other."""
    rows = PackedRows(pieces, 32, seed=1)
    epochs = torch.cat([pack(pieces, 32, 1_000_003 + epoch) for epoch in range(3)])
    assert torch.equal(rows.read(0, len(epochs)), epochs)
    for first, last in [(5, 9), (len(epochs) // 3 - 2, len(epochs) // 3 + 4), (0, 1), (len(epochs) - 1, len(epochs))]:
        assert torch.equal(rows.read(first, last), epochs[first:last])
        assert torch.equal(PackedRows(pieces, 32, seed=1).read(first, last), epochs[first:last])


@pytest.fixture(scope="module")
def stream_file(texts, tmp_path_factory):
    file = tmp_path_factory.mktemp("stream") / "stories.jsonl"
    long = " ".join(texts[:12])  # in several pieces
    lines = [{"story": text} for text in [*texts[:30], long, "", None, *texts[30:60]]]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def streamed(file, tokenizer, column="story"):
    return StreamedRows(open_dataset(file, streaming=True), column, tokenizer, 32)


def test_streamed_rows_are_the_texts_in_their_order_again_and_again(tokenizer, texts, stream_file):
    rows = streamed(stream_file, tokenizer).read(0, 60)
    ordered = [*texts[:30], " ".join(texts[:12]), *texts[30:60]]
    pieces = TokenizedTexts.from_texts(ordered, tokenizer).pieces(32)
    expected, row = [], []
    for piece in pieces * 4:
        row = row + piece
        if len(row) >= 32:
            expected.append(row[:32])
            row = []
    assert len(expected) > 60
    assert rows.tolist() == expected[:60]


def test_streamed_rows_from_any_position(tokenizer, stream_file):
    """Forwards, one row back as neighbouring blocks need it, all the way back, and in a new process by `seek`."""
    all_rows = streamed(stream_file, tokenizer).read(0, 50)
    rows = streamed(stream_file, tokenizer)
    for first, last in [(0, 3), (2, 6), (20, 24), (24, 30), (29, 31), (3, 5), (40, 49)]:
        assert torch.equal(rows.read(first, last), all_rows[first:last])
        other = streamed(stream_file, tokenizer)
        position = json.loads(json.dumps(rows.position()))
        assert position["row"] == first
        other.seek(position)
        assert torch.equal(other.read(first, last), all_rows[first:last])


def test_more_data_than_memory(tokenizer, texts):
    """A set without an end is read as far as it is needed, in blocks."""
    read = []

    def endless():
        while True:
            read.append(1)
            yield {"text": texts[len(read) % len(texts)]}

    rows = StreamedRows(IterableDataset.from_generator(endless), "text", tokenizer, 32)
    assert rows.read(0, 10).shape == (10, 32)
    assert len(read) < 10 * 32


@pytest.mark.parametrize(
    ("rows", "column", "error", "message"),
    [
        ([{"text": ""}, {"text": None}], "text", EmptyTextError, "no text in it"),
        ([{"text": "a fox"}], "story", TrainingError, r"no column 'story'; it has \['text'\]"),
        ([{"text": 3}], "text", TrainingError, "column 'text' holds 3, expected text"),
    ],
)
def test_streams_that_cannot_be(tokenizer, rows, column, error, message):
    data = IterableDataset.from_generator(lambda: iter(rows))
    with pytest.raises(error, match=message):
        StreamedRows(data, column, tokenizer, 32).read(0, 1)


@pytest.mark.parametrize(
    ("hook", "error", "message"),
    [
        ("blocks.0.hook_mlp_uot", HookNameError, "'blocks.0.hook_mlp_out'"),
        ("blocks.0.attn.hook_pattern", SAEMismatchError, r"shape \(1, 2, 2, 2\) for two tokens"),
        ("blocks.0.attn.hook_q", SAEMismatchError, "one vector per token"),
    ],
)
def test_hooks_that_cannot_be(model, pieces, hook, error, message):
    with pytest.raises(error, match=message):
        ActivationStream(model, PackedRows(pieces, 32, 0), [MLP_OUT, hook], 16)
