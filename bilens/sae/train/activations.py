"""Activations of several hooks in batches that nothing but the data, the seed and the step decide.

    1. texts -> packed rows of `n_ctx` tokens, one endless sequence: texts in memory make epochs in seeded orders, texts
       read as they are needed keep the order they come in
    2. block b = the tokens from b T to (b + 1) T of that sequence, T = 16 batches; a row that straddles two blocks is
       run for both
    3. one pass of the model over a block's rows, up to the highest hook
    4. the block's tokens in an order that (seed, b) decides, cut into batches

So a stream has no state but the number of its step: to resume is to set it.
"""

import re
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bilens._core.bare import require_bare
from bilens.errors import EmptyTextError, SAEMismatchError, TrainingError
from bilens.model.transformer import HookedBilinearTransformer
from bilens.train.data import TokenizedTexts, pack, pieces_identity

BATCHES_PER_BLOCK = 16
ROWS_PER_PASS = 16


class Rows(Protocol):
    """An endless sequence of packed rows."""

    def read(self, first: int, last: int) -> Int[Tensor, "row pos"]:
        """Rows `first` to `last - 1`."""

    def identity(self) -> dict[str, Any]:
        """What tells these rows from others, as JSON."""

    def position(self) -> dict[str, int]:
        """Where the rows last read begin, for `seek`; JSON too."""

    def seek(self, position: dict[str, int]) -> None:
        """Spare the next `read` the way from the start."""


class PackedRows:
    """Rows of token pieces in memory (`TokenizedTexts.pieces`): epoch after epoch, each in an order of its own."""

    def __init__(self, pieces: Sequence[list[int]], n_ctx: int, seed: int):
        self.pieces, self.n_ctx, self.seed = pieces, n_ctx, seed
        self._starts = [0]  # the first row of each epoch known so far, and of the one after
        self._packed: dict[int, Tensor] = {}

    def read(self, first: int, last: int) -> Int[Tensor, "row pos"]:
        parts, epoch = [], 0
        while first < last:
            rows = self._epoch(epoch) if self._reaches(epoch, first) else None
            if rows is not None:
                part = rows[first - self._starts[epoch] :][: last - first]
                parts.append(part)
                first += len(part)
            epoch += 1
        return torch.cat(parts)

    def _reaches(self, epoch: int, row: int) -> bool:
        """Whether an epoch's rows go on beyond `row`."""
        if epoch + 1 == len(self._starts):
            self._starts.append(self._starts[epoch] + len(self._epoch(epoch)))
        return row < self._starts[epoch + 1]

    def _epoch(self, epoch: int) -> Int[Tensor, "row pos"]:
        if epoch not in self._packed:
            # A block may lie in two epochs, and the next one begin in the first of them.
            self._packed = {e: rows for e, rows in self._packed.items() if e == epoch - 1}
            self._packed[epoch] = pack(self.pieces, self.n_ctx, self.seed * 1_000_003 + epoch)
        return self._packed[epoch]

    def identity(self) -> dict[str, Any]:
        return pieces_identity(self.pieces)

    def position(self) -> dict[str, int]:
        return {}

    def seek(self, position: dict[str, int]) -> None:
        pass


class StreamedRows:
    """Rows of a `datasets.IterableDataset`, read once in its own order, and again from the start where it ends.

    Texts are not shuffled (blocks of activations are): a set sorted by anything is to be shuffled before, with
    `dataset.shuffle(seed=0, buffer_size=...)`.
    """

    def __init__(self, dataset: Any, column: str, tokenizer: Any, n_ctx: int, prepend_bos: bool = True):
        self.dataset, self.column, self.tokenizer, self.n_ctx = dataset, column, tokenizer, n_ctx
        self.prepend_bos = prepend_bos
        self.seek({"row": 0, "text": 0, "piece": 0})

    def seek(self, position: dict[str, int]) -> None:
        self._next = position["row"]
        self._kept: list[tuple[list[int], dict[str, int]]] = []  # the rows last read: the next block may share one
        self._rows = self._packed(position)

    def read(self, first: int, last: int) -> Int[Tensor, "row pos"]:
        if first < self._next - len(self._kept):
            self.seek({"row": 0, "text": 0, "piece": 0})
        while self._next < last:
            self._kept.append(next(self._rows))
            self._next += 1
            if self._next <= first:
                self._kept.clear()
        self._kept = self._kept[first - self._next :]
        return torch.tensor([row for row, _ in self._kept[: last - first]])

    def position(self) -> dict[str, int]:
        return self._kept[0][1] if self._kept else {"row": 0, "text": 0, "piece": 0}

    def _packed(self, position: dict[str, int]) -> Iterator[tuple[list[int], dict[str, int]]]:
        """Rows and where each begins: its number, the text in this pass over the data, the piece of the text."""
        n_row, skip_texts, skip_pieces = position["row"], position["text"], position["piece"]
        row: list[int] = []
        begins = position
        while True:
            n_pieces = 0
            for text, pieces in enumerate(self._pieces(skip_texts), start=skip_texts):
                n_pieces += len(pieces)
                for piece in range(skip_pieces, len(pieces)):
                    if not row:
                        begins = {"row": n_row, "text": text, "piece": piece}
                    row += pieces[piece]
                    if len(row) >= self.n_ctx:
                        yield row[: self.n_ctx], begins
                        n_row, row = n_row + 1, []
                skip_pieces = 0
            if skip_texts == n_pieces == 0:
                raise EmptyTextError("the data has no text in it.")
            skip_texts = 0

    def _pieces(self, skip: int) -> Iterator[list[list[int]]]:
        """The pieces of each text, from the `skip`-th on."""
        for example in self.dataset.skip(skip):
            text = example.get(self.column)
            if text is None and self.column not in example:
                raise TrainingError(f"the data has no column {self.column!r}; it has {list(example)}.")
            if not isinstance(text, str | None):
                raise TrainingError(f"the data's column {self.column!r} holds {text!r}, expected text.")
            yield TokenizedTexts.from_texts([text or ""], self.tokenizer, self.prepend_bos).pieces(self.n_ctx)

    def identity(self) -> dict[str, Any]:
        """Of data of any length: its first row."""
        first, _ = next(self._packed({"row": 0, "text": 0, "piece": 0}))
        return {"first_row": zlib.crc32(torch.tensor(first).numpy().data)}


class ActivationStream:
    """An endless iterator of `{hook: (batch_size, d)}`, float32, on the model's device.

    Args:
        model: whose activations; left as it is.
        rows: the token rows that the model reads.
        hooks: names of hooks with one vector per token; a hook of every head (`hook_z`) gives the heads side by side.
        batch_size: tokens per batch.
        seed: the seed of the order within a block.
        bf16: run the model under bfloat16 autocast.

    Attributes:
        step: the number of the next batch, which may be set.

    Raises:
        HookNameError: the model has no such hook.
        SAEMismatchError: a hook without one vector per token.
    """

    def __init__(
        self,
        model: HookedBilinearTransformer,
        rows: Rows,
        hooks: Sequence[str],
        batch_size: int,
        *,
        seed: int = 0,
        bf16: bool = False,
    ):
        require_bare(model)
        self.widths = hook_widths(model, hooks)
        self.model, self.rows, self.batch_size, self.seed, self.bf16 = model, rows, batch_size, seed, bf16
        self.step = 0
        self._block: tuple[int, dict[str, Tensor], Tensor] | None = None
        layers = [re.match(r"blocks\.(\d+)\.", hook) for hook in hooks]
        self._stop_at_layer = max(int(layer[1]) for layer in layers if layer) + 1 if all(layers) else None

    def __iter__(self) -> "ActivationStream":
        return self

    def __next__(self) -> dict[str, Float[Tensor, "batch d"]]:
        block, at = divmod(self.step, BATCHES_PER_BLOCK)
        if self._block is None or self._block[0] != block:
            self._block = None  # before the next is made: two need not fit the memory
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + block)
            order = torch.randperm(BATCHES_PER_BLOCK * self.batch_size, generator=generator)
            self._block = block, self._activations(block), order
        _, activations, order = self._block
        chosen = order[at * self.batch_size : (at + 1) * self.batch_size].to(self.model.cfg.device)
        self.step += 1
        return {hook: tokens[chosen] for hook, tokens in activations.items()}

    @torch.no_grad()
    def _activations(self, block: int) -> dict[str, Float[Tensor, "token d"]]:
        """Of the tokens of a block, in the order of the text."""
        n_ctx, n_tokens = self.model.cfg.n_ctx, BATCHES_PER_BLOCK * self.batch_size
        first = block * n_tokens // n_ctx
        rows = self.rows.read(first, -(-(block + 1) * n_tokens // n_ctx))
        begin = block * n_tokens - first * n_ctx
        device = self.model.cfg.device
        seen = {hook: torch.empty(n_tokens, d, device=device) for hook, d in self.widths.items()}
        for at, part in zip(range(0, len(rows), ROWS_PER_PASS), rows.split(ROWS_PER_PASS), strict=True):
            with torch.autocast(torch.device(device or "cpu").type, torch.bfloat16, enabled=self.bf16):
                _, cache = self.model.run_with_cache(
                    part.to(device),
                    return_type=None,
                    names_filter=list(self.widths),
                    stop_at_layer=self._stop_at_layer,
                    return_cache_object=False,
                )
            lo, hi = at * n_ctx - begin, (at + len(part)) * n_ctx - begin  # of this part's tokens in the block
            for hook, tokens in seen.items():
                tokens[max(lo, 0) : hi] = cache[hook].flatten(0, 1).flatten(1)[max(-lo, 0) : n_tokens - lo]
        return seen


@torch.no_grad()
def hook_widths(model: HookedBilinearTransformer, hooks: Sequence[str]) -> dict[str, int]:
    """How long the vector is that each hook has for a token.

    Raises:
        HookNameError: the model has no such hook.
        SAEMismatchError: a hook without one vector per token.
    """
    for hook in hooks:
        model.check_hook_name(hook)
    _, cache = model.run_with_cache(
        torch.zeros(1, 2, dtype=torch.long, device=model.cfg.device),
        return_type=None,
        names_filter=list(hooks),
        return_cache_object=False,
    )
    for hook in hooks:
        shape = tuple(cache[hook].shape)
        if shape[:2] != (1, 2) or not (len(shape) == 3 or (len(shape) == 4 and hook.endswith("hook_z"))):
            raise SAEMismatchError(
                f"{hook!r} has activations of shape {shape} for two tokens, expected one vector per token, as in "
                "hook_resid_post, ln2.hook_normalized, hook_mlp_out or attn.hook_z."
            )
    return {hook: cache[hook].flatten(2).shape[-1] for hook in dict.fromkeys(hooks)}
