"""Padding, wherever it can be: every row of padded tokens comes out as its text alone does.

A padded run takes the explicit attention where the single one takes the fused kernel, so logits and losses, sums of a
few dozen terms in float32, are compared to 1e-5.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformer_lens import utils
from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache

from bilens.errors import ArgumentError
from bilens.model.tokenization import attended
from bilens.model.transformer import HookedBilinearTransformer
from tests.conftest import make_model

CLOSE: dict[str, Any] = {"atol": 1e-5, "rtol": 1e-5}
TEXTS = ["a tired owl found three stones near the river", "the fox", "Mira lost a red kite"]


@pytest.fixture(params=["left", "right"])
def side(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture
def padded(text_model: HookedBilinearTransformer, side: Any) -> tuple[Tensor, Tensor]:
    """`TEXTS` as tokens padded on `side`, and what is of the texts."""
    return text_model.to_tokens(TEXTS, padding_side=side), text_model.attention_mask(TEXTS, padding_side=side).bool()


def each_as_alone(found: Tensor, kept: Tensor, alone: Callable[[str], Tensor]) -> None:
    """Rows of a padded batch at their texts' tokens, against each text's own run."""
    for row, mask, text in zip(found, kept, TEXTS, strict=True):
        torch.testing.assert_close(row[mask], alone(text)[0], **CLOSE)


# --- what is padding --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prepend_bos", [True, False])
@pytest.mark.parametrize("bos", [1, 2])
def test_the_rule_is_transformer_lens(tokenizer: Any, side: Any, bos: int, prepend_bos: bool) -> None:
    """On random tokens with padding at both ends, `get_attention_mask`'s own result, with [BOS] the padding or not.

    Left out are the two cases in which ours knows more: rows of nothing but padding, and leading padding under
    right-padding where [BOS] is another token.
    """
    generator = torch.Generator().manual_seed(0)
    pad = tokenizer.pad_token_id
    tokens = torch.randint(0, 5, (200, 8), generator=generator)
    tokens = tokens[(tokens != pad).any(1) & ((tokens[:, 0] != pad) | torch.tensor(side == "left"))]
    theirs = type("Tokenizer", (), {"pad_token_id": pad, "bos_token_id": bos, "padding_side": side})()
    expected = utils.get_attention_mask(theirs, tokens, prepend_bos)
    assert torch.equal(attended(tokens, pad, bos, side, prepend_bos), expected)


def test_where_more_is_known() -> None:
    """A row of nothing but padding is text; leading padding is padding on either side, if [BOS] is another token."""
    tokens = torch.tensor([[2, 2, 2], [2, 5, 2]])
    assert attended(tokens, 2, 1, "left").tolist() == [[1, 1, 1], [0, 1, 1]]
    assert attended(tokens, 2, 1, "right").tolist() == [[1, 1, 1], [0, 1, 0]]
    assert attended(tokens, 2, 2, "right").tolist() == [[1, 1, 1], [1, 1, 0]]
    assert attended(tokens, None, None, "left").all()


# --- the forward pass -------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_padded_tokens(text_model: HookedBilinearTransformer, padded: tuple[Tensor, Tensor], side: Any) -> None:
    """Logits, activations and losses of padded tokens are those of the texts, with and without `padding_side`."""
    tokens, kept = padded
    losses = torch.cat([text_model(t, return_type="loss", loss_per_token=True)[0] for t in TEXTS])
    for kwargs in ({"padding_side": side}, {"attention_mask": kept}, {"attention_mask": kept.float()}, {}):
        each_as_alone(text_model(tokens, **kwargs), kept, text_model)
        _, cache = text_model.run_with_cache(tokens, **kwargs)
        each_as_alone(cache["mlp_out", 1], kept, lambda text: text_model.run_with_cache(text)[1]["mlp_out", 1])
        torch.testing.assert_close(text_model(tokens, return_type="loss", **kwargs), losses.mean(), **CLOSE)
        per_token = text_model(tokens, return_type="loss", loss_per_token=True, **kwargs)
        torch.testing.assert_close(per_token[kept[:, 1:] & kept[:, :-1]], losses, **CLOSE)


@torch.no_grad()
def test_an_explicit_mask_decides(text_model: HookedBilinearTransformer) -> None:
    """With a mask of ones a last [EOS], which is the padding token too, is predicted like any other."""
    eos = text_model.tokenizer.eos_token_id
    tokens = torch.cat([text_model.to_tokens("the fox"), torch.tensor([[eos]])], dim=1)
    losses = -text_model(tokens, attention_mask=torch.ones_like(tokens))[0, :-1].log_softmax(-1)
    losses = losses.gather(1, tokens[0, 1:, None])[:, 0]
    whole = text_model(tokens, attention_mask=torch.ones_like(tokens), return_type="loss")
    torch.testing.assert_close(whole, losses.mean(), **CLOSE)
    torch.testing.assert_close(text_model(tokens, return_type="loss"), losses[:-1].mean(), **CLOSE)


@torch.no_grad()
def test_a_padded_residual(text_model: HookedBilinearTransformer, padded: tuple[Tensor, Tensor], side: Any) -> None:
    """From a later layer on the padding is known from the tokens, or from the mask; the loss leaves it out."""
    tokens, kept = padded
    residual = text_model(tokens, padding_side=side, stop_at_layer=1)
    for kwargs in ({"tokens": tokens}, {"attention_mask": kept.long()}):
        each_as_alone(text_model(residual, start_at_layer=1, padding_side=side, **kwargs), kept, text_model)
    loss = text_model(residual, start_at_layer=1, tokens=tokens, padding_side=side, return_type="loss")
    torch.testing.assert_close(loss, text_model(TEXTS, return_type="loss"), **CLOSE)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(2, 3), r"shape \(2, 3\), expected that of the tokens, \(2, 4\)"),
        (torch.full((2, 4), 2), "other values than 1"),
        (torch.tensor([[-torch.inf, 0, 0, 0]]), "other values than 1"),
        (torch.ones(2, 1, 4, 4), r"shape \(2, 1, 4, 4\)"),
        ([[1, 1, 1, 1]], r"is \[\[1, 1, 1, 1\]\]"),
    ],
)
def test_masks_that_are_none(mask: Any, message: str) -> None:
    """A mask of another shape, of other values or of another kind is refused."""
    with pytest.raises(ArgumentError, match=message):
        make_model()(torch.tensor([[3, 4, 5, 6], [7, 8, 9, 10]]), attention_mask=mask)


# --- the key-value cache ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("then", ["left", "right"])
@torch.no_grad()
def test_padded_pieces_over_a_cache(
    text_model: HookedBilinearTransformer, padded: tuple[Tensor, Tensor], side: Any, then: Any
) -> None:
    """Padded texts go on with padded texts, padding on any sides: each as the two together, frozen or not."""
    more = ["the old gardener", "and then went home very happy", "found the silver key"]
    tokens, _ = padded
    new = text_model.to_tokens(more, prepend_bos=False, padding_side=then)
    kept = text_model.attention_mask(more, prepend_bos=False, padding_side=then).bool()
    cache = TransformerLensKeyValueCache.init_cache(text_model.cfg, "cpu", len(TEXTS))
    text_model(tokens, past_kv_cache=cache, padding_side=side)
    expected = [text_model(f"{first} {second}") for first, second in zip(TEXTS, more, strict=True)]
    for freeze in (True, False, False):
        cache.freeze() if freeze else cache.unfreeze()
        logits = text_model(new, past_kv_cache=cache, padding_side=then, prepend_bos=False)
        for found, mask, whole in zip(logits, kept, expected, strict=True):
            torch.testing.assert_close(found[mask], whole[0, -int(mask.sum()) :], **CLOSE)
        n_positions = tokens.shape[1] + (0 if freeze else new.shape[1])
        assert cache.previous_attention_mask.shape[1] == cache[1].past_keys.shape[1] == n_positions
        if not freeze:
            break


@torch.no_grad()
def test_a_mask_of_all_positions(text_model: HookedBilinearTransformer, padded: tuple[Tensor, Tensor]) -> None:
    """A mask may cover the positions in the cache too, as with TransformerLens' `start_at_layer`."""
    tokens, kept = padded
    new = torch.full((len(TEXTS), 1), text_model.to_single_token("fox"))
    cache = TransformerLensKeyValueCache.init_cache(text_model.cfg, "cpu", len(TEXTS))
    text_model(tokens, attention_mask=kept, past_kv_cache=cache)
    cache.freeze()
    expected = text_model(new, past_kv_cache=cache)
    whole = torch.cat([kept, torch.ones_like(new)], dim=1)
    assert torch.equal(text_model(new, attention_mask=whole, past_kv_cache=cache), expected)
    residual = text_model(new, stop_at_layer=1, past_kv_cache=cache)
    found = text_model(residual, start_at_layer=1, attention_mask=whole, past_kv_cache=cache)
    torch.testing.assert_close(found, expected, **CLOSE)


def test_caches_that_do_not_belong(text_model: HookedBilinearTransformer) -> None:
    """A cache of another batch size, or filled at some layers only, is refused rather than misread."""
    tokens = text_model.to_tokens("the fox")
    with pytest.raises(ArgumentError, match=r"shape \(1, 3\), expected \(2, 3\)"):
        text_model(tokens, past_kv_cache=TransformerLensKeyValueCache.init_cache(text_model.cfg, "cpu", 2))
    cache = TransformerLensKeyValueCache.init_cache(text_model.cfg, "cpu", 1)
    text_model(tokens, stop_at_layer=1, past_kv_cache=cache)
    with pytest.raises(ArgumentError, match=r"holds \{0: 3, 1: 0\} positions by layer"):
        text_model(tokens, past_kv_cache=cache)


# --- generation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_past_kv_cache", [True, False])
def test_padded_tokens_go_on_as_alone(
    text_model: HookedBilinearTransformer, padded: tuple[Tensor, Tensor], side: Any, use_past_kv_cache: bool
) -> None:
    """Greedy continuations of padded tokens, the mask found or given, are those of each text alone."""
    tokens, kept = padded
    alone = [text_model.generate(t, 6, temperature=0, stop_at_eos=False, return_type="tokens")[0, -6:] for t in TEXTS]
    for kwargs in ({"padding_side": side}, {"attention_mask": kept}, {}):
        found = text_model.generate(
            tokens, 6, temperature=0, stop_at_eos=False, use_past_kv_cache=use_past_kv_cache, **kwargs
        )
        assert torch.equal(found[:, -6:], torch.stack(alone))
        assert torch.equal(found[:, :-6], tokens)


@torch.no_grad()
def test_padding_that_nothing_follows_keeps_the_fused_kernel(
    text_model: HookedBilinearTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Causal attention never sees it: only padding in front needs scores of its own."""
    calls: list[int] = []
    fused = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda *args, **kwargs: (calls.append(1), fused(*args, **kwargs))[1],
    )
    for side, layers in (("right", text_model.cfg.n_layers), ("left", 0)):
        calls.clear()
        text_model(["the little fox", "Mira found a red kite."], padding_side=side)
        assert len(calls) == layers
