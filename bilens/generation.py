"""Sampling from a model with a key-value cache."""

from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from bilens.errors import ArgumentError, EmptyTextError
from bilens.kv_cache import KeyValueCache

if TYPE_CHECKING:
    from bilens.model import HookedBilinearTransformer


def sample(
    logits: Float[Tensor, "batch d_vocab"],
    temperature: float = 1.0,
    top_k: int | None = None,
    generator: torch.Generator | None = None,
    top_p: float | None = None,
) -> Int[Tensor, "batch"]:
    """One token per row from `softmax(logits / temperature)`; temperature 0 is greedy.

    Args:
        top_k: of so many likeliest tokens.
        top_p: of the fewest likeliest tokens that together have this probability.
    """
    if temperature == 0.0:
        return logits.argmax(-1)
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    probabilities = (logits.float() / temperature).softmax(-1)
    if top_p is not None:
        likeliest = probabilities.sort(-1, descending=True)
        above = likeliest.values.cumsum(-1) - likeliest.values  # what the likelier ones have already
        probabilities = probabilities.masked_fill((above >= top_p).gather(-1, likeliest.indices.argsort(-1)), 0.0)
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0]


@torch.no_grad()  # not inference_mode: its tokens could not be run with gradients afterwards
def generate(
    model: "HookedBilinearTransformer",
    input: str | list[str] | Int[Tensor, "*batch pos"] = "",
    max_new_tokens: int = 50,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    do_sample: bool = True,
    stop_at_eos: bool = True,
    eos_token_id: int | None = None,
    use_past_kv_cache: bool = True,
    prepend_bos: bool | None = None,
    return_type: Literal["input", "str", "tokens"] = "input",
    seed: int | None = None,
    verbose: bool = False,
) -> Any:
    """Continue text or tokens.

    Args:
        input: text, texts (padded on the left) or tokens; an empty text starts from `[BOS]` alone.
        max_new_tokens: how many to add; fewer where the context ends first.
        temperature: 0 is greedy.
        top_k: sample among the k likeliest only.
        top_p: sample among the fewest likeliest that together have this probability.
        do_sample: false is greedy too.
        stop_at_eos: end a row at end-of-text, and the run when all rows have ended (ended rows are filled with it).
        eos_token_id: `None` takes the tokenizer's.
        use_past_kv_cache: run only the new token at each step; the result is the same.
        return_type: `"input"` gives text for text and tokens for tokens.
        seed: the same seed gives the same text.
        verbose: show a progress bar.

    Raises:
        ArgumentError: a negative temperature, `top_k` below 1, `top_p` outside (0, 1], or neither text nor tokens.
        ContextLengthError: the prompt alone does not fit.
        EmptyTextError: an empty list, or an empty text without `[BOS]`.
        TokenizationError: text is given or asked for, and the model has no tokenizer.
    """
    if temperature < 0 or (top_k is not None and top_k < 1):
        raise ArgumentError(f"temperature {temperature} must be >= 0 and top_k {top_k} at least 1.")
    if top_p is not None and not 0 < top_p <= 1:
        raise ArgumentError(f"top_p {top_p} must be above 0 and at most 1.")
    is_text = isinstance(input, str | list)
    mask = None
    if is_text:
        texts = [input] if isinstance(input, str) else input
        if not texts:
            raise EmptyTextError("an empty list of texts has nothing to continue.")
        rows = [model.to_tokens(text, prepend_bos=prepend_bos, truncate=False)[0].tolist() for text in texts]
        tokens = model._pad(rows, "left").to(model.cfg.device)
        longest = tokens.shape[1]
        if any(len(row) != longest for row in rows):
            mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=tokens.device)
    else:
        tokens = input  # type: ignore[assignment]
    tokens = model.input_to_tokens(tokens)
    eos = eos_token_id
    if eos is None and model.tokenizer is not None:
        eos = model.tokenizer.eos_token_id
    generator = None if seed is None else torch.Generator(device=tokens.device).manual_seed(int(seed))
    cache = KeyValueCache.empty(model.cfg.n_layers) if use_past_kv_cache else None
    ended = torch.zeros(tokens.shape[0], dtype=torch.bool, device=tokens.device)
    new = tokens
    n_new = min(max_new_tokens, model.cfg.n_ctx - tokens.shape[1])
    for _ in tqdm(range(n_new), desc="generating", unit="token", disable=not verbose):
        new_mask = None if mask is None else mask[:, -new.shape[1] :]
        logits = model(new if cache else tokens, attention_mask=new_mask if cache else mask, past_kv_cache=cache)[:, -1]
        greedy = not do_sample
        chosen = sample(logits, 0.0 if greedy else temperature, top_k, generator, top_p)
        if stop_at_eos and eos is not None:
            chosen = chosen.masked_fill(ended, eos)
            ended |= chosen == eos
        new = chosen[:, None]
        tokens = torch.cat([tokens, new], dim=1)
        mask = None if mask is None else torch.cat([mask, torch.ones_like(new)], dim=1)
        if stop_at_eos and eos is not None and ended.all():
            break
    if return_type == "tokens" or (return_type == "input" and not is_text):
        return tokens
    tokenizer = model._require_tokenizer()
    drop = {i for i in (tokenizer.bos_token_id, tokenizer.pad_token_id, eos) if i is not None}
    texts_out = [model.to_string([t for t in row if t not in drop]) for row in tokens.tolist()]
    return texts_out if isinstance(input, list) or (not is_text and len(texts_out) > 1) else texts_out[0]


def sample_texts(
    model: "HookedBilinearTransformer", n: int, *, temperature: float = 0.8, seed: int = 0, batch_size: int = 64
) -> list[str]:
    """Texts the model itself writes from `[BOS]`, each to end-of-text or the end of the context."""
    tokenizer = model._require_tokenizer()
    texts: list[str] = []
    for batch in range(-(-n // batch_size)):
        start = torch.full((min(batch_size, n - len(texts)), 1), tokenizer.bos_token_id, device=model.cfg.device)
        written = generate(
            model, start, model.cfg.n_ctx, temperature=temperature, return_type="str", seed=seed * 1_000_003 + batch
        )
        texts += [written] if isinstance(written, str) else written
    return texts
