"""Generation: the cache changes nothing, seeds decide everything, the context and [EOS] are kept to."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bilens.errors import ArgumentError, ContextLengthError, EmptyTextError, TokenizationError
from bilens.model.generation import sample, sample_texts
from bilens.model.transformer import HookedBilinearTransformer
from tests.conftest import make_model

PROMPT = torch.tensor([[1, 7, 42, 7]])


# --- sampling one token -----------------------------------------------------------------------------------------------


@given(
    logits=st.lists(st.floats(-20, 20, width=32), min_size=2, max_size=8, unique=True),
    top_k=st.integers(1, 10),
    temperature=st.floats(0.05, 5),
    seed=st.integers(0, 1000),
)
def test_sample_stays_within_the_top_k(logits: list[float], top_k: int, temperature: float, seed: int) -> None:
    """Only the k likeliest are drawn; k = 1 and temperature 0 are the likeliest itself."""
    row = torch.tensor([logits])
    chosen = sample(row, temperature, top_k, torch.Generator().manual_seed(seed))
    assert chosen.item() in row[0].topk(min(top_k, len(logits))).indices
    assert sample(row, temperature, top_k=1).item() == row.argmax().item()
    assert sample(row, 0.0, top_k).item() == row.argmax().item()


def test_sample_follows_the_tempered_distribution() -> None:
    """Of 20,000 draws the shares are softmax(logits / T) within five standard errors, 5 sqrt(p (1 - p) / n) < 0.018."""
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0])
    for temperature in (1.0, 0.5, 3.0):
        drawn = sample(logits.expand(20_000, 4), temperature, generator=torch.Generator().manual_seed(0))
        shares = drawn.bincount(minlength=4) / 20_000
        torch.testing.assert_close(shares, (logits / temperature).softmax(-1), atol=0.018, rtol=0)


def test_top_p_keeps_the_fewest_that_reach_it() -> None:
    """Of 0.5, 0.3, 0.15, 0.05 in any order: exactly those are drawn whose likelier ones sum to less than top_p."""
    logits = torch.tensor([0.15, 0.5, 0.05, 0.3]).log()
    for top_p, kept in ((0.4, {1}), (0.6, {1, 3}), (0.9, {0, 1, 3}), (1.0, {0, 1, 2, 3})):
        drawn = sample(logits.expand(2_000, 4), top_p=top_p, generator=torch.Generator().manual_seed(0))
        assert set(drawn.tolist()) == kept


# --- continuing tokens ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "variant",
    [
        {},
        {"bias": True, "gate": "silu"},
        {"normalization": False, "n_layer": 3},
        {"attention": "bilinear", "d_head": 6},
        {"attention": "quadratic", "rotary": False},
    ],
    ids=str,
)
def test_the_cache_changes_nothing(variant: dict) -> None:
    """Greedy tokens with and without the key-value cache are the same, and are the argmax of a plain run."""
    model = make_model(**variant)
    cached = model.generate(PROMPT, 15, temperature=0)
    assert torch.equal(cached, model.generate(PROMPT, 15, temperature=0, use_past_kv_cache=False))
    assert cached.shape == (1, 19)
    assert torch.equal(cached[:, :4], PROMPT)
    assert torch.equal(cached[:, 4:], model(cached).argmax(-1)[:, 3:-1])


def test_three_ways_to_be_greedy() -> None:
    """Temperature 0, do_sample=False and top_k=1 give the same tokens."""
    model = make_model()
    greedy = model.generate(PROMPT, 12, temperature=0)
    assert torch.equal(model.generate(PROMPT, 12, do_sample=False), greedy)
    assert torch.equal(model.generate(PROMPT, 12, top_k=1, seed=5), greedy)


def test_a_seed_reproduces() -> None:
    """The same seed gives the same tokens, cached or not, whatever torch's own generator does; another gives others."""
    model = make_model()
    torch.manual_seed(1)
    first = model.generate(PROMPT, 20, seed=3)
    torch.manual_seed(2)
    assert torch.equal(model.generate(PROMPT, 20, seed=3), first)
    assert torch.equal(model.generate(PROMPT, 20, seed=3, use_past_kv_cache=False), first)
    assert not torch.equal(model.generate(PROMPT, 20, seed=4), first)


@pytest.mark.parametrize("use_past_kv_cache", [True, False])
def test_never_past_the_context(use_past_kv_cache: bool) -> None:
    """Generation ends where the context is full; a prompt that fills it gains nothing; a longer one is refused."""
    model = make_model(n_ctx=8)
    kwargs = {"temperature": 0, "use_past_kv_cache": use_past_kv_cache}
    assert model.generate(PROMPT, 100, **kwargs).shape == (1, 8)
    full = torch.arange(8)[None]
    assert torch.equal(model.generate(full, 3, **kwargs), full)
    with pytest.raises(ContextLengthError, match="9 tokens"):
        model.generate(torch.arange(9)[None], 1, **kwargs)


def test_verbose_shows_a_bar(capsys: pytest.CaptureFixture[str]) -> None:
    """A progress bar on request, and the same tokens."""
    model = make_model()
    quiet = model.generate(PROMPT, 4, seed=0)
    assert capsys.readouterr().err == ""
    assert torch.equal(model.generate(PROMPT, 4, seed=0, verbose=True), quiet)
    assert "4/4" in capsys.readouterr().err


def test_no_new_tokens() -> None:
    """Asking for none gives the prompt."""
    assert torch.equal(make_model().generate(PROMPT, 0), PROMPT)


def test_stops_at_eos() -> None:
    """A run ends right after the end token; in a batch, ended rows are filled with it until all have ended."""
    model = make_model()
    free = model.generate(PROMPT, 20, temperature=0)[0].tolist()
    eos = free[8]
    first = free.index(eos, 4)
    stopped = model.generate(PROMPT, 20, temperature=0, eos_token_id=eos)[0].tolist()
    assert stopped == free[: first + 1]
    assert len(model.generate(PROMPT, 20, temperature=0, eos_token_id=eos, stop_at_eos=False)[0]) == 24

    other = torch.tensor([[9, 8, 30, 2]])
    other_free = model.generate(other, 20, temperature=0)[0].tolist()
    assert eos not in other_free[4 : first + 2]
    batch = model.generate(torch.cat([PROMPT, other]), 20, temperature=0, eos_token_id=eos).tolist()
    assert batch[0] == free[: first + 1] + [eos] * (len(batch[0]) - first - 1)
    assert batch[1] == (other_free[: other_free.index(eos, 4) + 1] if eos in other_free[4:] else other_free)


def test_generated_tokens_can_be_trained_on() -> None:
    """What comes out is an ordinary tensor: a loss on it has gradients, and generating leaves none behind."""
    model = make_model()
    tokens = model.generate(PROMPT, 5, seed=0)
    assert all(weight.grad is None for weight in model.parameters())
    model(tokens, return_type="loss").backward()
    assert model.W_E.requires_grad
    assert model.embed.W_E.grad.abs().max() > 0


@pytest.mark.parametrize("kwargs", [{"temperature": -1}, {"top_k": 0}, {"top_k": -3}, {"top_p": 0}, {"top_p": 1.5}])
def test_impossible_sampling_is_refused(kwargs: dict) -> None:
    """A negative temperature, a top_k below 1 or a top_p outside (0, 1] is a ValueError."""
    with pytest.raises(ValueError, match="must be"):
        make_model().generate(PROMPT, 3, **kwargs)


# --- continuing text --------------------------------------------------------------------------------------------------


def test_text_in_text_out(text_model: HookedBilinearTransformer) -> None:
    """A text gives a text that starts with it, without special tokens; a list gives a list; tokens on request."""
    text = text_model.generate("the little fox", 6, temperature=0)
    tokens = text_model.generate("the little fox", 6, temperature=0, return_type="tokens")
    assert isinstance(text, str)
    assert text.startswith("the little fox")
    assert text == text_model.to_string(tokens[0, 1:])
    prompt = text_model.to_tokens("the little fox")
    assert torch.equal(tokens[:, :4], prompt)
    assert torch.equal(text_model.generate(prompt, 6, temperature=0), tokens)
    assert text_model.generate(prompt, 6, temperature=0, return_type="str") == text
    assert text_model.generate(["the little fox"], 6, temperature=0) == [text]


def test_a_batch_of_different_lengths_equals_single_runs(text_model: HookedBilinearTransformer) -> None:
    """Greedy continuations of a left-padded batch are those of each text alone, cached or not."""
    prompts = ["the fox", "a tired owl found three stones near", "Mira"]
    singles = [text_model.generate(prompt, 10, temperature=0) for prompt in prompts]
    for use_past_kv_cache in (True, False):
        batch = text_model.generate(prompts, 10, temperature=0, use_past_kv_cache=use_past_kv_cache)
        assert batch == singles


def test_from_nothing(text_model: HookedBilinearTransformer) -> None:
    """An empty text starts from [BOS] alone; without [BOS] there is nothing to start from, nor in an empty list."""
    tokens = text_model.generate(max_new_tokens=4, return_type="tokens", seed=0, stop_at_eos=False)
    assert tokens.shape == (1, 5)
    assert tokens[0, 0] == text_model.tokenizer.bos_token_id
    with pytest.raises(EmptyTextError):
        text_model.generate("", prepend_bos=False)
    with pytest.raises(EmptyTextError):
        text_model.generate([])


def test_eos_is_the_tokenizers(text_model: HookedBilinearTransformer) -> None:
    """Without `eos_token_id` the tokenizer's ends a text, and is not shown."""
    eos = text_model.tokenizer.eos_token_id
    with torch.no_grad():  # nothing but [EOS]: its logit is the squared norm of the stream, the others are zero
        text_model.unembed.head.weight.zero_()
        text_model.blocks[1].hook_resid_post.add_perma_hook(lambda x, hook: torch.ones_like(x))
        text_model.unembed.head.weight[eos] = 1
    assert text_model.generate("the fox", 5, temperature=0) == "the fox"
    tokens = text_model.generate("the fox", 5, temperature=0, return_type="tokens")
    assert tokens[0, -1] == eos
    assert tokens.shape == (1, 4)


def test_text_that_is_too_long(text_model: HookedBilinearTransformer) -> None:
    """A prompt is not cut silently."""
    with pytest.raises(ContextLengthError):
        text_model.generate("the fox " * 40)


def test_text_needs_a_tokenizer() -> None:
    """Without one, tokens go on; text, asked for or given, is refused."""
    model = make_model()
    assert model.generate(PROMPT, 2).shape == (1, 6)
    for call in (lambda: model.generate("the"), lambda: model.generate(PROMPT, 2, return_type="str")):
        with pytest.raises(TokenizationError, match="no tokenizer"):
            call()


def test_sample_texts(text_model: HookedBilinearTransformer) -> None:
    """As many texts as asked for, whatever the batch size; a seed decides them; special tokens are not shown."""
    texts = sample_texts(text_model, 7, batch_size=3, seed=1)
    assert len(texts) == 7
    assert len(set(texts)) > 1
    assert sample_texts(text_model, 7, batch_size=3, seed=1) == texts
    assert sample_texts(text_model, 7, batch_size=3, seed=2) != texts
    assert len(sample_texts(text_model, 1)) == 1
    assert sample_texts(text_model, 0) == []
    assert not any(special in text for text in texts for special in ("[BOS]", "[EOS]"))


def test_texts_need_a_start(text_model: HookedBilinearTransformer) -> None:
    """Without [BOS] there is nothing to start from, and that is said; so are counts that are none."""
    with pytest.raises(ArgumentError, match="batch_size is 0"):
        sample_texts(text_model, 2, batch_size=0)
    with pytest.raises(ArgumentError, match="n is -1"):
        sample_texts(text_model, -1)
    text_model.tokenizer = copy.deepcopy(text_model.tokenizer)
    text_model.tokenizer.bos_token = None
    with pytest.raises(TokenizationError, match="no \\[BOS\\] token for a text to start from"):
        sample_texts(text_model, 2)


# --- what else is asked for -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"return_type": "foo"}, "return_type is 'foo', expected one of 'input', 'str', 'tokens'"),
        ({"max_new_tokens": -1}, "max_new_tokens is -1"),
        ({"max_new_tokens": 1.5}, "max_new_tokens is 1.5"),
        ({"stop_at_eos": True}, "needs an end token"),
        ({"attention_mask": torch.zeros(1, 4)}, "a row without a token"),
        ({"attention_mask": torch.ones(1, 3)}, r"shape \(1, 3\)"),
        ({"temperature": float("nan")}, "temperature nan must be 0 to"),
    ],
)
def test_what_generate_refuses(kwargs: dict, message: str) -> None:
    """Unknown results, counts that are none, an end that cannot be told, and masks that do not fit."""
    with pytest.raises(ArgumentError, match=message):
        make_model().generate(PROMPT, **kwargs)


def test_several_end_tokens() -> None:
    """A row ends at the first of them."""
    model = make_model()
    free = model.generate(PROMPT, 12, temperature=0)[0].tolist()
    ends = [free[9], free[6]]
    first = min(free.index(end, 4) for end in ends)
    assert model.generate(PROMPT, 12, temperature=0, eos_token_id=ends)[0].tolist() == free[: first + 1]


@pytest.mark.parametrize("use_past_kv_cache", [True, False])
@torch.no_grad()
def test_logits_and_cache(text_model: HookedBilinearTransformer, use_past_kv_cache: bool) -> None:
    """output_logits gives what each token was sampled from; return_cache one pass over what was generated.

    1e-5: step by step, and in one run, sums of a few dozen terms round differently.
    """
    texts = ["a tired owl found", "the fox"]
    kwargs = {"temperature": 0, "stop_at_eos": False, "use_past_kv_cache": use_past_kv_cache}
    output, cache = text_model.generate(texts, 5, output_logits=True, return_cache=True, **kwargs)
    tokens = text_model.generate(texts, 5, return_type="tokens", **kwargs)
    assert torch.equal(output.sequences, tokens)
    assert len(output.logits) == 5
    assert torch.equal(torch.stack(output.logits, 1).argmax(-1), tokens[:, -5:])
    mask = torch.cat([text_model.attention_mask(texts, padding_side="left"), torch.ones(2, 5).long()], dim=1)
    logits, expected = text_model.run_with_cache(tokens, attention_mask=mask)
    torch.testing.assert_close(torch.stack(output.logits, 1), logits[:, -6:-1], atol=1e-5, rtol=1e-5)
    for name in expected:
        assert torch.equal(cache[name], expected[name])
    text, few = text_model.generate("the fox", 2, return_cache=True, names_filter="blocks.0.hook_mlp_out", **kwargs)
    assert text == text_model.generate("the fox", 2, **kwargs)
    assert list(few) == ["blocks.0.hook_mlp_out"]
