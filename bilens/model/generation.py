"""Sampling from a model with a key-value cache."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm
from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache

from bilens._core.checks import check_counts, check_index, check_seeds, check_sizes
from bilens._core.typing import typed
from bilens.errors import ArgumentError, TokenizationError
from bilens.model.tokenization import PaddingSide, TokenizationMixin

LARGEST = 1e30  # temperature: anything above is as even


def sample(
    logits: Float[Tensor, "batch d_vocab"],
    temperature: float = 1.0,
    top_k: int | None = None,
    generator: torch.Generator | None = None,
    top_p: float | None = None,
) -> Int[Tensor, "batch"]:
    """One token per row from `softmax(logits / temperature)`; temperature 0 is greedy.

    Args:
        top_k: the number of likeliest tokens to draw from.
        top_p: the probability that the fewest likeliest tokens, which are drawn from, have together.
    """
    if temperature == 0.0:
        return logits.argmax(-1)
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    probabilities = (logits.float() / float(temperature)).softmax(-1)
    if top_p is not None:
        likeliest = probabilities.sort(-1, descending=True)
        above = likeliest.values.cumsum(-1) - likeliest.values  # what the likelier ones have already
        probabilities = probabilities.masked_fill((above >= top_p).gather(-1, likeliest.indices.argsort(-1)), 0.0)
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0]


class TextGenerationMixin(TokenizationMixin):
    """The half of `HookedBilinearTransformer` that continues texts."""

    run_with_cache: Callable[..., Any]
    checked_mask: Callable[..., Any]
    __call__: Callable[..., Any]

    @torch.no_grad()  # not inference_mode: its tokens could not be run with gradients afterwards
    @typed
    def generate(
        self,
        input: str | list[str] | Int[Tensor, "*batch pos"] = "",
        max_new_tokens: int = 50,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        do_sample: bool = True,
        stop_at_eos: bool | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        use_past_kv_cache: bool = True,
        prepend_bos: bool | None = None,
        padding_side: PaddingSide | None = None,
        attention_mask: "Tensor | None" = None,  # `checked_mask` says better what is wrong with it
        return_type: Literal["input", "str", "tokens"] = "input",
        output_logits: bool = False,
        return_cache: bool = False,
        names_filter: Any = None,
        device: str | torch.device | None = None,
        seed: int | None = None,
        verbose: bool = False,
    ) -> Any:
        """Continue text or tokens.

        Args:
            input: text, texts (padded on the left) or tokens; an empty text starts from `[BOS]` alone. Each row of
                padded tokens, on whatever side, goes on as it would alone.
            max_new_tokens: the number of tokens to add; fewer if the context ends first.
            temperature: 0 is greedy.
            top_k: sample among the k likeliest only.
            top_p: sample among the fewest likeliest that together have this probability.
            do_sample: false is greedy too.
            stop_at_eos: end a row at end-of-text, and the run when all rows have ended (ended rows are filled with it);
                `None` is true where there is an end token.
            eos_token_id: one or several; `None` takes the tokenizer's.
            use_past_kv_cache: run only the new token at each step; the result is the same.
            prepend_bos: true puts `[BOS]` in front of text; `None` takes `cfg.default_prepend_bos`.
            padding_side: the side on which tokens are padded; `None` takes the tokenizer's own.
            attention_mask: the mask of tokens: 1 for a token, 0 for padding; `None` finds padding as `forward` does.
            return_type: `"input"` gives text for text and tokens for tokens.
            output_logits: give transformers' `GenerateDecoderOnlyOutput` instead: `sequences`, the tokens, and
                `logits`, what each new token was sampled from, `(batch, d_vocab)`.
            return_cache: give `(output, cache)`, the `ActivationCache` of one forward pass over what was generated.
            names_filter, device: the activations in that cache, and its device; see `run_with_cache`.
            seed: the same seed gives the same text.
            verbose: show a progress bar.

        Raises:
            ArgumentError: an unknown return type, a negative temperature or number of tokens, `top_k` below 1,
                `top_p` outside (0, 1], `stop_at_eos` without an end token, a mask that does not fit, or neither text
                nor tokens.
            ContextLengthError: the prompt alone does not fit.
            EmptyTextError: an empty list, or an empty text without `[BOS]`.
            TokenizationError: text is given or asked for, and the model has no tokenizer.
        """
        check_counts(max_new_tokens=max_new_tokens)
        check_seeds(**({} if seed is None else {"seed": seed}))
        if not 0 <= temperature < LARGEST or (top_k is not None and top_k < 1):
            raise ArgumentError(f"temperature {temperature} must be 0 to {LARGEST:g} and top_k {top_k} at least 1.")
        if top_p is not None and not 0 < top_p <= 1:
            raise ArgumentError(f"top_p {top_p} must be above 0 and at most 1.")
        eos = self._end_tokens(eos_token_id, stop_at_eos)
        is_text = isinstance(input, str | list)
        if is_text:
            if attention_mask is not None:
                raise ArgumentError("attention_mask goes with tokens; the padding of texts is known.")
            texts: Any = [input] if isinstance(input, str) else input
            tokens = self.to_tokens(texts, prepend_bos, "left", truncate=False)
            lengths = [self.to_tokens(text, prepend_bos, truncate=False).shape[1] for text in texts]
            places = torch.arange(tokens.shape[1])
            mask = (places >= len(places) - torch.tensor(lengths)[:, None]).long().to(tokens.device)
        else:
            tokens, mask = input, attention_mask  # type: ignore[assignment]
        tokens = self.input_to_tokens(tokens)
        if mask is None:
            mask = self.get_attention_mask(tokens, prepend_bos, padding_side)
        mask = self.checked_mask(mask, tokens)
        if not bool(mask.any(1).all()):
            raise ArgumentError("attention_mask has a row without a token: there is nothing to continue.")
        generator = None if seed is None else torch.Generator(device=tokens.device).manual_seed(int(seed))
        cache = None
        if use_past_kv_cache:
            cache = TransformerLensKeyValueCache.init_cache(self.cfg, tokens.device, tokens.shape[0])
        ended = torch.zeros(tokens.shape[0], dtype=torch.bool, device=tokens.device)
        rows = torch.arange(tokens.shape[0], device=tokens.device)
        all_logits = []
        n_new = min(max_new_tokens, self.cfg.n_ctx - tokens.shape[1])
        n_run = tokens.shape[1]  # at this step: all of the prompt, then one, or all again without a cache
        for _ in tqdm(range(n_new), desc="generating", unit="token", disable=not verbose):
            new_mask = mask[:, -n_run:]
            last = n_run - 1 - new_mask.flip(1).argmax(1)  # of the text: padding may follow it
            logits = self(tokens[:, -n_run:], attention_mask=new_mask, past_kv_cache=cache)[rows, last]
            chosen = sample(logits, temperature if do_sample else 0.0, top_k, generator, top_p)
            if eos:
                chosen = chosen.masked_fill(ended, eos[0])
                ended |= torch.isin(chosen, torch.tensor(eos, device=chosen.device))
            tokens = torch.cat([tokens, chosen[:, None]], dim=1)
            mask = torch.cat([mask, torch.ones_like(chosen[:, None])], dim=1)
            n_run = tokens.shape[1] if cache is None else 1
            if output_logits:
                all_logits.append(logits)
            if eos and ended.all():
                break
        output: Any = tokens
        if output_logits:
            from transformers.generation.utils import GenerateDecoderOnlyOutput

            output = GenerateDecoderOnlyOutput(sequences=tokens, logits=tuple(all_logits))  # type: ignore[arg-type]
        elif return_type == "str" or (return_type == "input" and is_text):
            tokenizer = self._require_tokenizer()
            drop = {tokenizer.bos_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id, *eos}
            written = [self.to_string([t for t in row if t not in drop]) for row in tokens.tolist()]
            output = written if isinstance(input, list) or (not is_text and len(written) > 1) else written[0]
        if not return_cache:
            return output
        _, activations = self.run_with_cache(tokens, attention_mask=mask, names_filter=names_filter, device=device)
        return output, activations

    def _end_tokens(self, eos_token_id: int | Sequence[int] | None, stop_at_eos: bool | None) -> list[int]:
        """The tokens that end a row, none where nothing does; the first fills ended rows."""
        if eos_token_id is None and self.tokenizer is not None:
            eos_token_id = self.tokenizer.eos_token_id
        if stop_at_eos and eos_token_id is None:
            raise ArgumentError(
                "stop_at_eos=True needs an end token, and the model has no tokenizer with one: pass eos_token_id, or "
                "stop_at_eos=False."
            )
        if eos_token_id is None or stop_at_eos is False:
            return []
        ids = [eos_token_id] if isinstance(eos_token_id, int) else eos_token_id
        return [check_index(i, self.cfg.d_vocab, "end token {} is outside the vocabulary of {}") for i in ids]


def sample_texts(
    model: TextGenerationMixin, n: int, *, temperature: float = 0.8, seed: int = 0, batch_size: int = 64
) -> list[str]:
    """Texts the model itself writes from `[BOS]`, each to end-of-text or the end of the context.

    Raises:
        ArgumentError: a negative number of texts, or a batch size below 1.
        TokenizationError: the model has no tokenizer, or that one no `[BOS]` to start from.
    """
    check_counts(n=n)
    check_sizes(batch_size=batch_size)
    bos = model._require_tokenizer().bos_token_id
    if bos is None:
        raise TokenizationError("this tokenizer has no [BOS] token for a text to start from; continue texts: generate.")
    texts: list[str] = []
    for batch in range(-(-n // batch_size)):
        start = torch.full((min(batch_size, n - len(texts)), 1), bos, device=model.cfg.device)
        written = model.generate(
            start, model.cfg.n_ctx, temperature=temperature, return_type="str", seed=seed * 1_000_003 + batch
        )
        texts += [written] if isinstance(written, str) else written
    return texts
