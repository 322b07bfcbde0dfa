"""A polynomial model's exact expansion over subsets of tokens: the model's side of `bilens.expand`.

Absent tokens are rows of zeros, and without norms, biases and softmax a row of zeros stays one and nobody reads
anything of it. So the rows that are there are run alone, at their positions, by the model's own blocks.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bilens._core.bare import require_bare
from bilens._core.checks import check_index, check_memory, check_sizes, whole_number
from bilens.errors import ArgumentError, ContextLengthError, NotPolynomialError, OutOfRangeError, nearest
from bilens.expand.expansion import Expansion, Run
from bilens.expand.pairs import TokenPairs
from bilens.expand.subsets import parts_of

ROWS_AT_ONCE = 2**14
FINAL = "ln_final.hook_normalized"


def require_polynomial(cfg: Any) -> None:
    """Refuse a model that is not a polynomial of its embeddings without a constant.

    Raises:
        NotPolynomialError: it has a softmax, norms, biases or a gate.
    """
    found = ["its attention is a softmax"] if cfg.attention == "softmax" else []
    found += ["it has norms"] if cfg.normalization_type is not None else []
    found += ["it has biases"] if cfg.bias or cfg.attention_bias else []
    found += [f"its MLPs have a gate ({cfg.gate})"] if cfg.gate is not None else []
    if found:
        raise NotPolynomialError(
            f"an output is an exact sum over subsets of tokens only in a polynomial model, and {', and '.join(found)}. "
            "What is exact here with attention patterns and norms frozen: bilens.attribute.attribute_tokens of a text."
        )


class ExpansionMixin:
    """The half of `HookedBilinearTransformer` that is expanded over tokens."""

    cfg: Any
    tokenizer: Any
    W_E: Any
    W_U: Any
    blocks: Any
    check_hook_name: Callable[..., None]
    state_dict: Callable[..., Any]

    @torch.no_grad()
    def expand(
        self,
        order: int,
        offsets: Sequence[int] = (0,),
        *,
        target: "int | Sequence[int] | Float[Tensor, '*n d_model'] | None" = None,
        hook: str = FINAL,
        tokens: "Sequence[int] | Int[Tensor, 'n'] | Mapping[int, Sequence[int]] | None" = None,
        cut: Iterable[str] = (),
        dtype: torch.dtype = torch.float64,
    ) -> Expansion:
        """An output as an exact sum over subsets of tokens, from the weights alone, for a whole vocabulary.

        `f(S)` is what is read where the tokens of `S` are there and the embeddings of all others are zero;
        `expansion.interaction()` is what they do together and no fewer of them do.

        Args:
            order: the most tokens in a part, the reading one included.
            offsets: how far the tokens stand before the position that is read; 0, the token there, is always one.
            target: what is read: the logits of these tokens, directions of `hook`'s activation, or `None` for the
                logits of the whole vocabulary.
            hook: where directions are read; it has `d_model` entries.
            tokens: the candidates: token ids for every offset, or by offset; `None` is the whole vocabulary.
            cut: heads (`"L0H0"`) and MLPs (`"mlp 1"`) to leave out: their outputs are zero.
            dtype: the type of the tables.

        Raises:
            NotPolynomialError: the model has a softmax, norms, biases or a gate, so such a sum is not exact.
            ArgumentError: an order above the number of offsets, offsets that repeat or are negative, tokens or targets
                that are none, or tables that this machine has no memory for.
            ContextLengthError: an offset beyond the model's context.
            OutOfRangeError, HookNameError: a token, head, MLP or hook that the model does not have.
            AlteredModelError: SAEs are attached to the model, or there are hooks on it.
        """
        require_polynomial(self.cfg)
        require_bare(self)  # type: ignore[arg-type]
        whole = self._checked_offsets(order, offsets)
        d_vocab = self.cfg.d_vocab
        candidates = {offset: self._candidates(tokens, offset) for offset in whole}
        directions, names, all_logits = self._targets(target, hook)
        parts = parts_of(whole, order)
        n_values = sum(prod(len(candidates[offset]) for offset in part) for part in parts) * len(names)
        try:
            check_memory(f"expanding {n_values:.3g} values", 4 * n_values * directions.to(dtype).element_size())
        except ArgumentError as error:
            raise ArgumentError(
                f"{error} Give candidates, tokens={{offset: ids}}, such as those of the largest interactions of order "
                f"{order - 1}; fewer targets, or fewer offsets at a time."
            ) from error
        run = self._runner(directions.to(dtype), hook, cut, dtype)
        embeddings = self.W_E.detach().to(dtype)
        values = {part: _tabulate(run, embeddings, part, [candidates[offset] for offset in part]) for part in parts}
        left_out = [
            f"all but {len(ids)} of {d_vocab} tokens at offset {offset}"
            for offset, ids in candidates.items()
            if len(ids) < d_vocab
        ]
        left_out += [f"parts of more than {order} tokens"] if order < len(whole) else []
        return Expansion(
            offsets=whole,
            order=order,
            tokens=candidates,
            values=values,
            targets=names,
            all_logits=all_logits,
            left_out="; ".join(left_out),
            embeddings=embeddings,
            strings=self._vocabulary(),
            run=run,
        )

    @torch.no_grad()
    def token_pairs(self, layer: int, head: int, offset: int) -> TokenPairs:
        """What a head adds to every logit for every pair of tokens `offset` apart: score times OV times unembedding.

        Tokens are read as their embeddings alone, which is all there is of them in the first layer; in later layers
        this is the head's direct path. A softmax is left out: the scores before it stand in for the pattern. With
        norms, each embedding is normalised by itself and the last norm is left out.

        Raises:
            OutOfRangeError: the model has no such layer or head.
            ArgumentError, ContextLengthError: an offset that is none, or beyond the model's context.
        """
        layer = check_index(layer, self.cfg.n_layers, "layer {} is outside the model's {} layers")
        head = check_index(head, self.cfg.n_heads, "head {} is outside the layer's {} heads")
        offset = max(self._checked_offsets(1, [offset]))
        block = self.blocks[layer]
        read = block.ln1(self.W_E.detach()[:, None])  # one position for each token
        at = torch.tensor([[offset], [0]], device=read.device)
        *turning, v = block.attn._project(read)
        scores = []
        for q, k in zip(turning[::2], turning[1::2], strict=True):
            if self.cfg.rotary:
                q, k = block.attn.rotary(q, at[:1]), block.attn.rotary(k, at[1:])
            scores.append(q[:, 0, head] @ k[:, 0, head].T * self.cfg.score_scale)
        pattern = scores[0] if self.cfg.attention == "softmax" else scores[0] * scores[-1]
        moved = v[:, 0, head] @ block.attn.W_O[head] @ self.W_U
        return TokenPairs(layer, head, offset, pattern, moved, self._vocabulary())

    def _checked_offsets(self, order: int, offsets: Any) -> tuple[int, ...]:
        check_sizes(order=order)
        if not isinstance(offsets, Iterable) or isinstance(offsets, str | bytes):
            raise ArgumentError(
                f"offsets is {offsets!r:.80}, expected distances before the reading token, such as (0, 3)."
            )
        given = [whole_number(offset, "an offset is how many tokens before the reading one") for offset in offsets]
        if len(set(given)) < len(given) or min(given, default=0) < 0:
            raise ArgumentError(f"offsets is {given}, expected different distances, none below 0.")
        if max(given, default=0) >= self.cfg.n_ctx:
            raise ContextLengthError(f"offset {max(given)} is outside the model's context of {self.cfg.n_ctx} tokens.")
        whole = tuple(sorted({0, *given}))
        if order > len(whole):
            raise ArgumentError(
                f"order is {order}, and there are {len(whole)} offsets, {list(whole)}: a part has at most one token at "
                "each. Give more offsets, or a lower order."
            )
        return whole

    def _candidates(self, tokens: Any, offset: int) -> Int[Tensor, "n"]:
        if isinstance(tokens, Mapping):
            tokens = tokens.get(offset)
        if tokens is None:
            return torch.arange(self.cfg.d_vocab)
        try:
            ids = torch.as_tensor(tokens)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ArgumentError(f"tokens at offset {offset} are {tokens!r:.80}, expected token ids.") from error
        if ids.ndim != 1 or not len(ids) or ids.is_floating_point() or ids.dtype == torch.bool:
            raise ArgumentError(f"tokens at offset {offset} are {tokens!r:.80}, expected token ids.")
        if not 0 <= ids.min() <= ids.max() < self.cfg.d_vocab:
            raise OutOfRangeError(
                f"tokens at offset {offset} are not all in the vocabulary, 0 to {self.cfg.d_vocab - 1}."
            )
        return ids.cpu()

    def _targets(self, target: Any, hook: str) -> tuple[Float[Tensor, "target d_model"], list[str], bool]:
        """Directions at the hook, their names, and whether they are all logits."""
        self.check_hook_name(hook)
        strings = self._vocabulary()
        if isinstance(target, Tensor) and target.is_floating_point():
            directions = target.detach().to(self.W_U.device).view(-1, target.shape[-1])
            if directions.shape[1] != self.cfg.d_model:
                raise ArgumentError(
                    f"target has shape {tuple(target.shape)}, expected directions of {self.cfg.d_model}."
                )
            return directions, [f"direction {i}" for i in range(len(directions))], False
        if hook != FINAL:
            raise ArgumentError(
                f"target is {target!r:.80}, and at {hook!r} directions are read: give a tensor of them."
            )
        ids = self._candidates(None if target is None else [target] if isinstance(target, int) else target, 0)
        return self.W_U.detach().T[ids], [strings[i] for i in ids.tolist()], target is None

    def _vocabulary(self) -> list[str]:
        if self.tokenizer is None:
            return [str(i) for i in range(self.cfg.d_vocab)]
        return self.tokenizer.batch_decode([[i] for i in range(self.cfg.d_vocab)], clean_up_tokenization_spaces=False)

    def _runner(self, directions: Float[Tensor, "target d_model"], hook: str, cut: Any, dtype: torch.dtype) -> Run:
        """What is read at the last of the rows that are there, by a copy of this model in `dtype`."""
        build: Any = type(self)
        model = build(replace(self.cfg, dtype=dtype), init_weights=False)
        model.load_state_dict(self.state_dict())
        hooks = [self._cutting(label) for label in ([cut] if isinstance(cut, str) else cut)]

        @torch.no_grad()
        def run(embeddings: Float[Tensor, "batch n d_model"], positions: Int[Tensor, "#batch n"]) -> Tensor:
            seen: list[Tensor] = []
            at_once = max(1, ROWS_AT_ONCE // embeddings.shape[1])
            positions = positions.to(embeddings.device).expand(len(embeddings), -1)
            with model.hooks(fwd_hooks=[*hooks, (hook, lambda value, hook: seen.append(value[:, -1]))]):
                found = []
                for stream, at in zip(embeddings.split(at_once), positions.split(at_once), strict=True):
                    for block in model.blocks:
                        stream = block(stream, at, None, None)
                    model.ln_final(stream[:, -1:])
                    found.append(seen.pop() @ directions.T)
            return torch.cat(found)

        return run

    def _cutting(self, label: Any) -> tuple[str, Callable[..., Tensor]]:
        """The hook that leaves a head or an MLP out."""
        known = [*(f"L{n}H{h}" for n in range(self.cfg.n_layers) for h in range(self.cfg.n_heads))]
        known += [f"mlp {n}" for n in range(self.cfg.n_layers)]
        if label not in known:
            raise OutOfRangeError(
                f"cut has {label!r:.80}, expected heads and MLPs, {known[0]} to {known[-1]}." + nearest(label, known)
            )
        layer, *head = (int(number) for number in re.findall(r"\d+", label))
        if not head:
            return f"blocks.{layer}.hook_mlp_out", lambda value, hook: torch.zeros_like(value)

        def without_head(z: Tensor, hook: Any) -> Tensor:
            z = z.clone()
            z[:, :, head[0]] = 0.0
            return z

        return f"blocks.{layer}.attn.hook_z", without_head


def _tabulate(
    run: Run, embeddings: Float[Tensor, "d_vocab d_model"], part: tuple[int, ...], candidates: list[Int[Tensor, "n"]]
) -> Float[Tensor, "*tokens target"]:
    """`f` of every choice of tokens, axes in the order of offsets."""
    sizes = [len(ids) for ids in candidates]
    positions = (max(part) - torch.tensor(part).flip(0))[None]
    found = []
    for flat in torch.arange(prod(sizes)).split(max(1, ROWS_AT_ONCE // len(part))):
        chosen = [ids[at] for ids, at in zip(candidates, torch.unravel_index(flat, sizes), strict=True)]
        found.append(run(embeddings[torch.stack(chosen[::-1], 1)], positions))  # as they stand in a text
    return torch.cat(found).view(*sizes, -1)
