"""Text to tokens and back, under TransformerLens' method names.

One convention differs from a bare Hugging Face tokenizer, and on purpose: neither whether a tokenizer prepends `[BOS]`
by itself (the published ts-4096 does, GPT-2's does not) nor whether a text has it written out matters here. `encode`
gives the tokens of texts without it, and `to_tokens(prepend_bos=True)` puts exactly one in front, `prepend_bos=False`
none. The passes over texts (`bilens.train.data.TokenizedTexts`, `bilens.sae.features.corpus`) encode with it too.
"""

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from bilens._core.checks import check_flags
from bilens.errors import (
    ArgumentError,
    ContextLengthError,
    EmptyTextError,
    OutOfRangeError,
    TokenizationError,
    nearest,
)

PaddingSide = Literal["left", "right"]
TOKEN_DTYPES = (torch.int64, torch.int32)  # what an embedding takes


def encode(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """The tokens of each text without `[BOS]`, which is the caller's to put in front.

    What is written out of it is left out, wherever it stands; where one token is `[BOS]` and `[EOS]` (GPT-2's), only in
    front, since later ones end a text.

    Raises:
        ArgumentError: something that is no text.
        TokenizationError: a text with half of a surrogate pair, which is no character.
    """
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise ArgumentError(f"text {i} of {len(texts)} is {text!r:.80}; expected a string.")
        if not text.isascii() and (lone := next((c for c in text if "\ud800" <= c <= "\udfff"), None)):
            raise TokenizationError(
                f"text {i} of {len(texts)} holds {lone!r} at {text.index(lone)}, half of a surrogate pair and no "
                "character: read the file as UTF-8, or take it out."
            )
    if not texts:
        return []
    rows = tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    bos = tokenizer.bos_token_id
    if bos is None:
        return rows
    rows = [row[next((i for i, token in enumerate(row) if token != bos), len(row)) :] for row in rows]
    return rows if bos == tokenizer.eos_token_id else [[token for token in row if token != bos] for row in rows]


def token_strings(tokenizer: Any, tokens: Int[Tensor, "p"]) -> list[str]:
    """Each token as a string; its number where there is no tokenizer."""
    if tokenizer is None:
        return [str(token) for token in tokens.tolist()]
    return tokenizer.batch_decode([[token] for token in tokens.tolist()], clean_up_tokenization_spaces=False)


def attended(
    tokens: Int[Tensor, "batch pos"], pad: int | None, bos: int | None, side: PaddingSide, prepend_bos: bool = True
) -> Int[Tensor, "batch pos"]:
    """1 where a token is of the text, 0 where it is padding: `transformer_lens.utils.get_attention_mask`'s rule.

    Padding is what stands at the end of a row on the side of padding (`pad` elsewhere is a token of the text). Where
    `[BOS]` and padding are one token, the one next to the text is `[BOS]`. Two things go beyond TransformerLens: a row
    of nothing but `pad` is taken as text, and leading padding is padding whatever the side, if texts begin with a
    `[BOS]` of their own.

    Args:
        tokens: the tokens of texts, padded or not.
        pad, bos: the tokenizer's, `None` where it has none.
        side: the side on which texts are padded.
        prepend_bos: true if the texts begin with `[BOS]`.
    """
    mask = torch.ones_like(tokens)
    if pad is None:
        return mask
    is_text = tokens != pad
    if side == "left" or bos not in (None, pad):
        mask *= is_text.cumsum(1) > 0
    if side == "right":
        mask *= is_text.flip(1).cumsum(1).flip(1) > 0
    elif prepend_bos and bos == pad:
        leading = (mask == 0).sum(1)
        rows = torch.arange(len(tokens), device=tokens.device)
        mask[rows, (leading - 1).clamp_min(0)] = 1
    return mask.masked_fill(~is_text.any(1, keepdim=True), 1)


# Ones for tokens and zeros for padding, in whatever dtype; of the positions in a cache too, where there is one.
Mask: TypeAlias = Shaped[Tensor, "... key"]


class TokenizationMixin:
    """The tokenizer half of `HookedBilinearTransformer`: needs `self.cfg` and `self.tokenizer`."""

    cfg: Any
    tokenizer: Any

    def _require_tokenizer(self) -> Any:
        if self.tokenizer is None:
            raise TokenizationError(
                f"the model {self.cfg.model_name!r} has no tokenizer: put its tokenizer.json beside the weights, set "
                "model.tokenizer to a transformers tokenizer, or pass tokens instead of text."
            )
        return self.tokenizer

    def _prepends_bos(self, prepend_bos: bool | None) -> bool:
        """Whether `[BOS]` goes in front of a text; by default where the config says so and there is one."""
        bos = self._require_tokenizer().bos_token_id
        if not isinstance(prepend_bos, bool | None):
            raise ArgumentError(f"prepend_bos is {prepend_bos!r:.80}, expected True, False or None.")
        if prepend_bos and bos is None:
            raise TokenizationError("this tokenizer has no [BOS] token; pass prepend_bos=False.")
        return bos is not None and bool(self.cfg.default_prepend_bos if prepend_bos is None else prepend_bos)

    @property
    def n_bos(self) -> int:
        """How many tokens in front of a text are not of it: 1, or 0 where no `[BOS]` is prepended by default."""
        return int(self.cfg.default_prepend_bos if self.tokenizer is None else self._prepends_bos(None))

    def set_tokenizer(self, tokenizer: Any, default_padding_side: PaddingSide | None = None) -> None:
        """Give the model another tokenizer.

        Args:
            tokenizer: a transformers tokenizer; it is not changed but for its padding side.
            default_padding_side: the side on which it pads from now on; `None` leaves that as it is.

        Raises:
            ArgumentError: no transformers tokenizer, or no side.
            TokenizationError: more tokens than the model has embeddings.
        """
        from transformers import PreTrainedTokenizerBase

        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            raise ArgumentError(f"{tokenizer!r} is no transformers tokenizer.")
        if default_padding_side not in (None, "left", "right"):
            raise ArgumentError(f"default_padding_side {default_padding_side!r} is not 'left' or 'right'.")
        if len(tokenizer) > self.cfg.d_vocab:
            raise TokenizationError(
                f"the tokenizer has {len(tokenizer)} tokens, the model embeddings for {self.cfg.d_vocab} (d_vocab)."
            )
        self.tokenizer = tokenizer
        if default_padding_side is not None:
            tokenizer.padding_side = default_padding_side

    @property
    def is_wordpiece(self) -> bool:
        """Whether tokens carry no spaces and `##` marks those that continue a word."""
        return self.tokenizer is not None and any(token.startswith("##") for token in self.tokenizer.get_vocab())

    def to_tokens(
        self,
        input: str | list[str],
        prepend_bos: bool | None = None,
        padding_side: PaddingSide | None = None,
        move_to_device: bool = True,
        truncate: bool = True,
    ) -> Int[Tensor, "batch pos"]:
        """Tokens of a text, or of a list of texts padded to the longest.

        Args:
            input: the text(s).
            prepend_bos: one `[BOS]` in front, or none, whatever is written out in the text; `None` takes
                `cfg.default_prepend_bos`, and none where the tokenizer has no `[BOS]`.
            padding_side: the side on which shorter texts of a list are padded; `None` takes the tokenizer's own.
            move_to_device: put the result on the model's device.
            truncate: cut to the model's context.

        Raises:
            ArgumentError: neither a text nor a list of them.
            EmptyTextError: a text without a token in it, when no `[BOS]` stands for it.
            TokenizationError: the model has no tokenizer, or `[BOS]` is asked of one that has none.
        """
        tokenizer = self._require_tokenizer()
        bos = [tokenizer.bos_token_id] if self._prepends_bos(prepend_bos) else []
        side = self._side(padding_side)
        check_flags(move_to_device=move_to_device, truncate=truncate)
        if not isinstance(input, str | list | tuple):
            raise ArgumentError(f"{input!r:.80} is neither a text nor a list of texts.")
        texts = [input] if isinstance(input, str) else input
        if not texts:
            raise EmptyTextError("an empty list of texts has no tokens.")
        rows = [[*bos, *row] for row in encode(tokenizer, texts)]
        for text, row in zip(texts, rows, strict=True):
            if not row:
                raise EmptyTextError(f"the text {text!r} has no tokens (and no [BOS] is prepended).")
        if truncate:
            rows = [row[: self.cfg.n_ctx] for row in rows]
        tokens = self._pad(rows, side)
        return tokens.to(self.cfg.device) if move_to_device else tokens

    def _side(self, padding_side: PaddingSide | None) -> PaddingSide:
        side = padding_side
        if padding_side is None:
            side = "right" if self.tokenizer is None else self.tokenizer.padding_side
        if not isinstance(side, str) or side not in ("left", "right"):
            raise ArgumentError(f"padding_side {side!r} is not 'left' or 'right'.")
        return side

    def _pad(self, rows: list[list[int]], side: PaddingSide) -> Int[Tensor, "batch pos"]:
        longest = max(map(len, rows))
        if all(len(row) == longest for row in rows):
            return torch.tensor(rows)
        pad = self.tokenizer.pad_token_id
        if pad is None:
            raise TokenizationError("texts of different lengths need a padding token; set model.tokenizer.pad_token.")
        filled = [(longest - len(row)) * [pad] for row in rows]
        return torch.tensor([f + r if side == "left" else r + f for r, f in zip(rows, filled, strict=True)])

    def attention_mask(
        self, texts: list[str], prepend_bos: bool | None = None, padding_side: PaddingSide | None = None
    ) -> Int[Tensor, "batch pos"]:
        """1 where `to_tokens(texts)` with the same arguments holds a token of the text, 0 where it holds padding."""
        lengths = torch.tensor([self.to_tokens(text, prepend_bos).shape[1] for text in texts])[:, None]
        places = torch.arange(int(lengths.max()))
        left = self._side(padding_side) == "left"
        mask = places >= places.numel() - lengths if left else places < lengths
        return mask.long().to(self.cfg.device)

    def get_attention_mask(
        self,
        tokens: Int[Tensor, "batch pos"],
        prepend_bos: bool | None = None,
        padding_side: PaddingSide | None = None,
    ) -> Int[Tensor, "batch pos"]:
        """1 where a token is of the text and 0 where it is padding, read off the tokens; see `attended` for the rule.

        `forward` and `generate` read it so where they are given tokens and no `attention_mask`.
        """
        if self.tokenizer is None:
            return torch.ones_like(tokens)
        return attended(
            tokens,
            self.tokenizer.pad_token_id,
            self.tokenizer.bos_token_id,
            self._side(padding_side),
            bool(self.cfg.default_prepend_bos if prepend_bos is None else prepend_bos),
        )

    def input_to_tokens(
        self,
        input: str | list[str] | Int[Tensor, "*batch pos"],
        prepend_bos: bool | None = None,
        padding_side: PaddingSide | None = None,
    ) -> Int[Tensor, "batch pos"]:
        """What `forward` accepts, as `(batch, pos)` tokens that fit the model.

        Raises:
            ArgumentError: neither text nor integer tokens of one or two axes.
            EmptyTextError: nothing to run on.
            ContextLengthError: longer than `cfg.n_ctx` (nothing is cut silently).
            OutOfRangeError: a token id outside the vocabulary.
        """
        if isinstance(input, str | list):
            if isinstance(input, list) and not all(isinstance(text, str) for text in input):
                raise ArgumentError(f"{input!r} is no list of texts; token ids are given as a tensor.")
            if not input or any(not text.strip() for text in ([input] if isinstance(input, str) else input)):
                raise EmptyTextError(f"the text {input!r} is empty; give at least one word.")
            tokens = self.to_tokens(input, prepend_bos=prepend_bos, padding_side=padding_side, truncate=False)
        else:
            if not isinstance(input, Tensor):
                raise ArgumentError(f"{input!r} is neither a text, nor a list of texts, nor a tensor of token ids.")
            if input.ndim not in (1, 2) or input.dtype not in TOKEN_DTYPES:
                raise ArgumentError(
                    f"{input.dtype} of shape {tuple(input.shape)}: expected token ids as integers of shape (pos,) or "
                    "(batch, pos); a residual stream needs start_at_layer=."
                )
            tokens = (input if input.ndim > 1 else input[None]).to(self.cfg.device)
        if tokens.numel() == 0:
            raise EmptyTextError(f"tokens of shape {tuple(tokens.shape)} hold nothing to run on.")
        if tokens.shape[-1] > self.cfg.n_ctx:
            raise ContextLengthError(
                f"{tokens.shape[-1]} tokens do not fit the model's context of {self.cfg.n_ctx}; "
                "shorten the text (in Python, model.to_tokens(text, truncate=True) does)."
            )
        low, high = tokens.min().item(), tokens.max().item()
        if low < 0 or high >= self.cfg.d_vocab:
            raise OutOfRangeError(
                f"token {low if low < 0 else high} is outside the vocabulary, 0 to {self.cfg.d_vocab - 1}."
            )
        return tokens

    def to_string(
        self, tokens: Int[Tensor, "..."] | np.ndarray | list[int] | list[list[int]] | list[Tensor] | int
    ) -> str | list[str]:
        """The text of a token sequence; a list of texts for a batch. Special tokens are shown."""
        ids: Any = tokens.tolist() if isinstance(tokens, Tensor | np.ndarray) else tokens
        if isinstance(ids, list) and ids and np.ndim(ids[0]):
            return [self.to_string(row) for row in ids]  # type: ignore[misc]
        text = self._require_tokenizer().decode(ids, clean_up_tokenization_spaces=False)
        # The published ts-4096 tokenizer has no decoder to join its word pieces.
        return text.replace(" ##", "") if self.is_wordpiece else text

    def to_str_tokens(
        self,
        input: str | Int[Tensor, "..."] | np.ndarray | list,
        prepend_bos: bool | None = None,
        padding_side: PaddingSide | None = None,
    ) -> Any:
        """Each token as a string; for a list of inputs, a list of lists."""
        tokenizer = self._require_tokenizer()
        if isinstance(input, list):
            return [self.to_str_tokens(item, prepend_bos, padding_side) for item in input]
        if isinstance(input, str):
            input = self.to_tokens(input, prepend_bos, padding_side)[0]
        try:
            tokens = torch.as_tensor(input)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ArgumentError(f"{input!r:.80} is neither a text nor tokens.") from error
        if tokens.dtype not in (torch.int64, torch.int32, torch.int16, torch.uint8) or (tokens < 0).any():
            raise ArgumentError(f"tokens are whole numbers, 0 or more; given is {input!r:.80}.")
        ids = tokens.squeeze().reshape(-1) if tokens.numel() == 1 else tokens.squeeze()
        if ids.ndim != 1:
            raise TokenizationError(f"to_str_tokens takes one sequence, not tokens of shape {tuple(tokens.shape)}.")
        return token_strings(tokenizer, ids)

    def to_single_token(self, string: str) -> int:
        """The id of a string that is exactly one token.

        Raises:
            TokenizationError: it is several tokens, none, or unknown to the vocabulary.
        """
        tokenizer = self._require_tokenizer()
        if not isinstance(string, str):
            raise ArgumentError(f"string is {string!r:.80}, expected text.")
        special = tokenizer.convert_tokens_to_ids(string) if string in tokenizer.all_special_tokens else None
        ids = self.to_tokens(string, prepend_bos=False)[0].tolist() if special is None else [special]
        unknown = tokenizer.unk_token_id
        if len(ids) != 1 or (ids[0] == unknown and string != tokenizer.unk_token):
            pieces = tokenizer.convert_ids_to_tokens(ids)
            raise TokenizationError(
                f"{string!r} is not a single token: it is {pieces}." + nearest(string, tokenizer.get_vocab())
            )
        return ids[0]

    def to_single_str_token(self, int_token: int) -> str:
        """The string of one token id."""
        return self.to_str_tokens(torch.tensor([int_token]))[0]

    def get_token_position(
        self,
        single_token: str | int,
        input: str | Int[Tensor, "*batch pos"],
        mode: Literal["first", "last"] = "first",
        prepend_bos: bool | None = None,
    ) -> int:
        """Where a token stands in a text: its first or last position.

        Raises:
            TokenizationError: it does not occur, or is not a single token; or `input` is several sequences.
        """
        if mode not in ("first", "last"):
            raise ArgumentError(f"mode {mode!r} is not 'first' or 'last'.")
        tokens = self.to_tokens(input, prepend_bos) if isinstance(input, str) else input
        if tokens.ndim > 1 and tokens.shape[0] > 1:
            raise TokenizationError(
                f"get_token_position takes one sequence, not tokens of shape {tuple(tokens.shape)}."
            )
        wanted = self.to_single_token(single_token) if isinstance(single_token, str) else single_token
        places = (tokens.flatten() == wanted).nonzero().flatten().tolist()
        if not places:
            raise TokenizationError(f"the token {single_token!r} does not occur in {self.to_str_tokens(input)}.")
        return places[0 if mode == "first" else -1]
