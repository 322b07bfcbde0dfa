"""Text to tokens and back: exactly one [BOS] or none, positions, and one exception for each thing that can be wrong."""

from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from bilens.errors import ContextLengthError, EmptyTextError, OutOfRangeError, TokenizationError
from bilens.model.transformer import HookedBilinearTransformer
from tests.conftest import Reference, make_model

SENTENCE = "Mira found a red kite."


@pytest.fixture(scope="module")
def bare_tokenizer() -> Any:
    """A tokenizer that adds no [BOS] by itself, as GPT-2's does not, and has no padding token."""
    words = ["[UNK]", "[BOS]", "the", "red", "kite", "."]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", bos_token="[BOS]")


# --- [BOS] ------------------------------------------------------------------------------------------------------------


def test_exactly_one_bos_or_none(text_model: HookedBilinearTransformer) -> None:
    """The tokenizer adds [BOS] by itself; to_tokens(True) has exactly one all the same, to_tokens(False) none."""
    bos = text_model.tokenizer.bos_token_id
    by_itself = text_model.tokenizer(SENTENCE)["input_ids"]
    assert by_itself[0] == bos
    assert text_model.to_tokens(SENTENCE, prepend_bos=True)[0].tolist() == by_itself
    assert text_model.to_tokens(SENTENCE, prepend_bos=False)[0].tolist() == by_itself[1:]
    assert bos not in by_itself[1:]
    assert text_model.tokenizer.eos_token_id not in by_itself


def test_a_tokenizer_that_adds_no_bos(bare_tokenizer: Any) -> None:
    """The same convention where the tokenizer adds nothing by itself."""
    model = make_model(tokenizer=bare_tokenizer)
    assert bare_tokenizer("the red")["input_ids"] == [2, 3]
    assert model.to_tokens("the red").tolist() == [[1, 2, 3]]
    assert model.to_tokens("the red", prepend_bos=False).tolist() == [[2, 3]]


@pytest.mark.parametrize("prepend_bos", [True, False, None])
@pytest.mark.parametrize("text", ["[BOS] " + SENTENCE, "[BOS][BOS]" + SENTENCE, "Mira [BOS] found a red kite. [BOS]"])
def test_a_bos_that_is_written_out_is_none(
    text_model: HookedBilinearTransformer, text: str, prepend_bos: bool | None
) -> None:
    """Whatever a text has written out: exactly one [BOS] with prepend_bos, none without."""
    assert torch.equal(text_model.to_tokens(text, prepend_bos), text_model.to_tokens(SENTENCE, prepend_bos))
    batch = text_model.to_tokens([text, SENTENCE], prepend_bos)
    assert torch.equal(batch[0], batch[1])
    assert text_model.to_single_token("[BOS]") == text_model.tokenizer.bos_token_id


def test_bos_that_also_ends_texts(bare_tokenizer: Any) -> None:
    """Where [BOS] and [EOS] are one token, as in GPT-2, one that is written behind a text stays."""
    both = PreTrainedTokenizerFast(
        tokenizer_object=bare_tokenizer.backend_tokenizer, unk_token="[UNK]", bos_token="[BOS]", eos_token="[BOS]"
    )
    model = make_model(tokenizer=both)
    assert model.to_tokens("[BOS] the [BOS] red").tolist() == [[1, 2, 1, 3]]
    assert model.to_tokens("[BOS] the [BOS] red", prepend_bos=False).tolist() == [[2, 1, 3]]


def test_half_a_character(text_model: HookedBilinearTransformer) -> None:
    """A lone surrogate, which no tokenizer takes, is refused by its place; a whole pair is a character."""
    for call in (text_model, text_model.to_tokens, text_model.generate, lambda text: text_model(["the fox", text])):
        with pytest.raises(TokenizationError, match=r"holds '\\ud83d' at 4, half of a surrogate pair"):
            call("the \ud83d fox")
    assert text_model.to_tokens("the 🦊").shape == (1, 3)


def test_the_default_is_the_configs(text_model: HookedBilinearTransformer) -> None:
    """`prepend_bos=None` takes cfg.default_prepend_bos."""
    assert torch.equal(text_model.to_tokens(SENTENCE), text_model.to_tokens(SENTENCE, prepend_bos=True))
    text_model.cfg.default_prepend_bos = False
    assert torch.equal(text_model.to_tokens(SENTENCE), text_model.to_tokens(SENTENCE, prepend_bos=False))


@given(text=st.text(max_size=40))
def test_any_text_gets_one_bos(tokenizer: Any, text: str) -> None:
    """Whatever is written: one [BOS] in front, lower-cased tokens of the vocabulary behind, the same as without it."""
    assume("[BOS]" not in text)
    model = make_model(tokenizer=tokenizer, n_ctx=64)
    with_bos = model.to_tokens(text, prepend_bos=True)[0].tolist()
    assert with_bos.count(tokenizer.bos_token_id) == 1
    assert with_bos[0] == tokenizer.bos_token_id
    assert all(0 <= token < model.cfg.d_vocab for token in with_bos)
    if len(with_bos) > 1:
        assert model.to_tokens(text, prepend_bos=False)[0].tolist() == with_bos[1:]
        assert not any(c.isupper() for piece in model.to_str_tokens(text)[1:] if piece != "[UNK]" for c in piece)
    else:
        with pytest.raises(EmptyTextError):
            model.to_tokens(text, prepend_bos=False)


def test_without_a_bos_token_it_cannot_be_prepended(bare_tokenizer: Any) -> None:
    """A tokenizer without [BOS] has none to give: by default none is prepended, and asking for one is refused."""
    no_bos = PreTrainedTokenizerFast(tokenizer_object=bare_tokenizer.backend_tokenizer, unk_token="[UNK]")
    model = make_model(tokenizer=no_bos)
    with pytest.raises(TokenizationError, match="no \\[BOS\\]"):
        model.to_tokens("the red", prepend_bos=True)
    assert model.to_tokens("the red").tolist() == model.to_tokens("the red", prepend_bos=False).tolist() == [[2, 3]]
    assert model.n_bos == 0


# --- batches, context, and what is refused ----------------------------------------------------------------------------


def test_a_list_is_padded_on_the_side_asked_for(text_model: HookedBilinearTransformer) -> None:
    """Each row of a batch holds its text's tokens at the side asked for, the padding token elsewhere."""
    pad = text_model.tokenizer.pad_token_id
    alone = [text_model.to_tokens(text)[0].tolist() for text in (SENTENCE, "the fox")]
    n_pad = len(alone[0]) - len(alone[1])
    assert n_pad > 0
    right = text_model.to_tokens([SENTENCE, "the fox"], padding_side="right").tolist()
    left = text_model.to_tokens([SENTENCE, "the fox"], padding_side="left").tolist()
    assert right == [alone[0], alone[1] + [pad] * n_pad]
    assert left == [alone[0], [pad] * n_pad + alone[1]]


@pytest.mark.parametrize("tokenizers_own", ["left", "right"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_side_is_an_argument_everywhere(
    text_model: HookedBilinearTransformer, side: Any, tokenizers_own: str
) -> None:
    """Tokens, mask, logits and loss of a padded list agree with each text alone, whatever the tokenizer's own side."""
    text_model.tokenizer.padding_side = tokenizers_own
    try:
        texts = [SENTENCE, "the fox"]
        mask = text_model.attention_mask(texts, padding_side=side).bool()
        tokens = text_model.to_tokens(texts, padding_side=side)
        logits, losses = text_model(texts, padding_side=side, return_type="both", loss_per_token=True)
        for i, text in enumerate(texts):
            assert torch.equal(tokens[i, mask[i]], text_model.to_tokens(text)[0])
            # 1e-5: the padded run takes the explicit attention, the single one the fused kernel
            torch.testing.assert_close(logits[i, mask[i]], text_model(text)[0], atol=1e-5, rtol=1e-5)
            alone = text_model(text, return_type="loss", loss_per_token=True).sum()
            torch.testing.assert_close(losses[i].sum(), alone, atol=1e-4, rtol=1e-5)
    finally:
        text_model.tokenizer.padding_side = "right"


def test_an_unknown_padding_side(text_model: HookedBilinearTransformer) -> None:
    """A misspelt side is refused by name."""
    with pytest.raises(ValueError, match="'centre' is not 'left' or 'right'"):
        text_model.to_tokens([SENTENCE, "the fox"], padding_side="centre")  # type: ignore[arg-type]


def test_padding_needs_a_padding_token(bare_tokenizer: Any) -> None:
    """Texts of different lengths without a padding token are refused; of one length they are not."""
    model = make_model(tokenizer=bare_tokenizer)
    with pytest.raises(TokenizationError, match="padding token"):
        model.to_tokens(["the red", "kite"])
    assert model.to_tokens(["red", "kite"]).tolist() == [[1, 3], [1, 4]]


def test_too_long_a_text(text_model: HookedBilinearTransformer) -> None:
    """to_tokens cuts to the context unless told not to; the model itself never cuts, it refuses."""
    long = "the fox " * 40
    n_ctx = text_model.cfg.n_ctx
    assert text_model.to_tokens(long).shape == (1, n_ctx)
    whole = text_model.to_tokens(long, truncate=False)
    assert whole.shape == (1, 81)
    assert torch.equal(whole[:, :n_ctx], text_model.to_tokens(long))
    for long_input in (long, [long, "the fox"], whole):
        with pytest.raises(ContextLengthError, match=f"81 tokens do not fit the model's context of {n_ctx}"):
            text_model(long_input)


@pytest.mark.parametrize("empty", ["", [], ["the fox", ""], [""]])
def test_empty_text(text_model: HookedBilinearTransformer, empty: Any) -> None:
    """Nothing to run on is EmptyTextError, alone or within a list."""
    with pytest.raises(EmptyTextError):
        text_model(empty)


def test_an_empty_text_is_a_bare_bos_to_to_tokens(text_model: HookedBilinearTransformer) -> None:
    """To start from nothing is possible with [BOS] in front; without it there is no token."""
    assert text_model.to_tokens("").tolist() == [[text_model.tokenizer.bos_token_id]]
    with pytest.raises(EmptyTextError, match=r"no \[BOS\] is prepended"):
        text_model.to_tokens(" \n", prepend_bos=False)
    with pytest.raises(EmptyTextError):
        text_model.to_tokens([])


def test_a_tokenizer_larger_than_the_model(tokenizer: Any) -> None:
    """A token id that the model has no row for is OutOfRangeError, not a crash in the embedding."""
    model = make_model()
    assert len(tokenizer) > model.cfg.d_vocab
    model.tokenizer = tokenizer
    with pytest.raises(OutOfRangeError, match="0 to 49"):
        model(SENTENCE)


def test_without_a_tokenizer(text_model: HookedBilinearTransformer) -> None:
    """Every method that needs a tokenizer says so; tokens still run."""
    text_model.tokenizer = None
    for call in (
        lambda: text_model("the fox"),
        lambda: text_model(["the fox", "the owl"]),
        lambda: text_model.to_tokens("the fox"),
        lambda: text_model.to_string([1, 2]),
        lambda: text_model.to_str_tokens("the fox"),
        lambda: text_model.to_single_token("fox"),
        lambda: text_model.get_token_position("fox", "the fox"),
        lambda: text_model.generate("the"),
    ):
        with pytest.raises(TokenizationError, match="no tokenizer"):
            call()
    assert text_model(torch.tensor([[1, 2]])).shape == (1, 2, text_model.cfg.d_vocab)


# --- back to strings --------------------------------------------------------------------------------------------------


def test_to_string_gives_the_text_back(text_model: HookedBilinearTransformer, texts: list[str]) -> None:
    """Decoding restores the words (the tokenizer lower-cases and sets punctuation apart); a batch gives a list."""
    tokens = text_model.to_tokens(SENTENCE, prepend_bos=False)
    assert text_model.to_string(tokens[0]) == "mira found a red kite ."
    assert text_model.to_string(tokens) == ["mira found a red kite ."]
    assert text_model.to_string(tokens[0].tolist()) == "mira found a red kite ."
    assert text_model.to_string(text_model.to_single_token("fox")) == "fox"
    for batch in (tokens.numpy(), tokens.tolist(), list(tokens)):  # what TransformerLens takes
        assert text_model.to_string(batch) == ["mira found a red kite ."]
    for text in texts[::37]:
        words = text_model.to_string(text_model.to_tokens(text, prepend_bos=False)[0])
        assert words.replace(" ", "") == text.lower().replace(" ", "")


def test_to_str_tokens(text_model: HookedBilinearTransformer) -> None:
    """One string per token, pieces of words marked ##, for text, tokens, one token, and lists of them."""
    tokens = text_model.to_tokens("the foxes found kites")
    strings = text_model.to_str_tokens("the foxes found kites")
    assert strings[0] == "[BOS]"
    assert len(strings) == tokens.shape[1]
    assert strings == text_model.tokenizer.convert_ids_to_tokens(tokens[0].tolist())
    assert any(string.startswith("##") for string in strings)
    assert text_model.to_str_tokens(tokens) == text_model.to_str_tokens(tokens[0]) == strings
    assert text_model.to_str_tokens(tokens[0].numpy()) == strings
    assert text_model.to_str_tokens("the foxes found kites", prepend_bos=False) == strings[1:]
    assert text_model.to_str_tokens(["the fox", tokens]) == [["[BOS]", "the", "fox"], strings]
    assert text_model.to_str_tokens(tokens[0, 1]) == text_model.to_str_tokens(tokens[:, 1:2]) == ["the"]
    with pytest.raises(TokenizationError, match=r"shape \(2, 3\)"):
        text_model.to_str_tokens(torch.ones(2, 3, dtype=torch.long))


def test_to_single_token(text_model: HookedBilinearTransformer) -> None:
    """A word of the vocabulary has one id, whatever its case; and back."""
    fox = text_model.to_single_token("fox")
    assert fox == text_model.to_single_token("Fox") == text_model.tokenizer.convert_tokens_to_ids("fox")
    assert text_model.to_single_str_token(fox) == "fox"
    assert text_model.to_single_token("[UNK]") == text_model.tokenizer.unk_token_id


@pytest.mark.parametrize(
    ("string", "exception", "message"),
    [
        ("the fox", TokenizationError, r"'the fox' is not a single token: it is \['the', 'fox'\]"),
        ("gardner", TokenizationError, "Did you mean 'gardener'"),
        ("☃", TokenizationError, r"it is \['\[UNK\]'\]"),
        ("", EmptyTextError, "no tokens"),
    ],
)
def test_what_is_not_a_single_token(
    text_model: HookedBilinearTransformer, string: str, exception: type[Exception], message: str
) -> None:
    """Several tokens, a misspelling, an unknown character, nothing: refused with what it is, or the nearest word."""
    with pytest.raises(exception, match=message):
        text_model.to_single_token(string)


def test_get_token_position(text_model: HookedBilinearTransformer) -> None:
    """First and last place of a token, counted from [BOS] where there is one; a token that is not there is refused."""
    text = "the fox and the owl and the fox"
    assert text_model.get_token_position("fox", text) == 2
    assert text_model.get_token_position("fox", text, mode="last") == 8
    assert text_model.get_token_position("fox", text, prepend_bos=False) == 1
    tokens = text_model.to_tokens(text)
    assert text_model.get_token_position(text_model.to_single_token("owl"), tokens) == 5
    assert text_model.get_token_position("the", tokens[0], mode="last") == 7
    with pytest.raises(TokenizationError, match="'kite' does not occur"):
        text_model.get_token_position("kite", text)


def test_get_token_position_refuses_what_has_no_answer(text_model: HookedBilinearTransformer) -> None:
    """A misspelt mode, or several texts at once, is an error and not a position."""
    with pytest.raises(ValueError, match="'frist' is not 'first' or 'last'"):
        text_model.get_token_position("fox", "the fox", mode="frist")
    with pytest.raises(TokenizationError, match="one sequence"):
        text_model.get_token_position("fox", text_model.to_tokens(["the fox", "fox the"]))


# --- the published tokenizer ------------------------------------------------------------------------------------------


def test_the_published_tokenizer(ts_micro: Reference) -> None:
    """ts-4096: lower-cased, [BOS] by itself and no [EOS], padding with [EOS]; 4096 tokens."""
    model = ts_micro.model
    assert len(model.tokenizer) == model.cfg.d_vocab == 4096
    assert model.tokenizer.pad_token == "[EOS]"
    assert model.to_str_tokens("Once upon a time, Lily") == ["[BOS]", "once", "upon", "a", "time", ",", "lily"]
    assert model.to_tokens("Lily", prepend_bos=False).shape == (1, 1)
