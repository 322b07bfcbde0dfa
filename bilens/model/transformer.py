"""The hooked bilinear transformer.

    x_0    = W_E[tokens]
    x      = x + s * attn(norm1(x))        s = 1/sqrt(2 n_layers), folded into the exposed W_O; 1 without `scale_attn`
                                           attn: softmax, or a polynomial of the scores (`cfg.attention`)
    x      = x + mlp(norm2(x))             mlp(n) = W_out (act(W_gate n + b_gate) * (W_in n + b_in)) + b_out
    logits = norm_f(x) W_U

`HookedBilinearTransformer` owns the forward pass, the only one there is. `bilens.model.hf.BilinearForCausalLM` holds
one, registers its modules under the published names, and translates Hugging Face's arguments; the adapter in
`bilens.model.bridge` wraps that class's modules in TransformerLens' bridge components, which call them and show
their hook points. Both share weights and hooks with the model they hold, and compute nothing themselves.

Parameters are stored in the layout of the published checkpoints (one fused `qkv`, one fused `w` of left then right
rows, the raw output projection `o`), so that loading and saving are copies and the matrix products are fused;
TransformerLens' names and shapes (`W_Q`, `W_O`, `W_gate`, ...) are made from them, and writing into `attn.W_O`,
`mlp.W_in` or `model.W_in` changes the model: see `bilens.model.named_weights`.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformer_lens import FactoredMatrix
from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache
from transformer_lens.hook_points import HookPoint

from bilens._core.checks import check_flags, whole_number
from bilens.errors import ArgumentError, NotBilinearError, OutOfRangeError
from bilens.model.attached import SAEAttachmentMixin
from bilens.model.config import BilinearTransformerConfig
from bilens.model.expanding import ExpansionMixin
from bilens.model.generation import TextGenerationMixin
from bilens.model.hook_points import CheckedHooks, eager_while_hooked
from bilens.model.kv_cache import append, cached_positions, check_room, extended_mask
from bilens.model.named_weights import NamedWeight, NamedWeightsMixin
from bilens.model.published import PublishedMixin
from bilens.model.tokenization import Mask, PaddingSide, TokenizationMixin


def identity(x: Tensor) -> Tensor:
    """The gate of a bilinear layer; a function with a name can be pickled."""
    return x


ACTIVATIONS: dict[str | None, Callable[[Tensor], Tensor]] = {
    None: identity,
    "relu": F.relu,
    "silu": F.silu,
    "gelu": F.gelu,
}
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
ReturnType = Literal["logits", "loss", "both"]
# The switch in the config for each hook point of a block that is not computed otherwise.
SWITCHES = {
    "attn.hook_result": "use_attn_result",
    "hook_attn_in": "use_attn_in",
    "hook_q_input": "use_split_qkv_input",
    "hook_k_input": "use_split_qkv_input",
    "hook_v_input": "use_split_qkv_input",
    "hook_mlp_in": "use_hook_mlp_in",
    "mlp.hook_in": "use_hook_mlp_in",
}


# What each head reads for its queries, keys and values.
HeadInputs = tuple[
    Float[Tensor, "batch pos head d_model"],
    Float[Tensor, "batch pos head d_model"],
    Float[Tensor, "batch pos head d_model"],
]


class RMSNorm(NamedWeightsMixin):
    """`x / sqrt(mean(x^2) + eps)`, without weights; the identity where the model has no normalisation."""

    def __init__(self, cfg: BilinearTransformerConfig):
        super().__init__()
        self.cfg = cfg
        self.hook_scale = HookPoint()
        self.hook_normalized = HookPoint()

    def forward(self, x: Float[Tensor, "batch pos *heads d_model"]) -> Float[Tensor, "batch pos *heads d_model"]:
        if self.cfg.normalization_type is None:
            return self.hook_normalized(x / self.hook_scale(torch.ones_like(x[..., :1])))
        # Half precision squares overflow: the mean is taken in float32 at least.
        wide = x if x.dtype == torch.float64 else x.float()
        scale = self.hook_scale((wide.pow(2).mean(-1, keepdim=True) + self.cfg.eps).sqrt())
        return self.hook_normalized((wide / scale).to(x.dtype))


class Rotary(nn.Module):
    """Rotary positions over the whole head, half-split (`rotate_half: (-x2, x1)`), base 10000."""

    def __init__(self, d_head: int, base: float = 10_000.0):
        super().__init__()
        self.d_head, self.base = d_head, base
        self.inv_freq: Tensor
        self.register_buffer("inv_freq", self.frequencies(), persistent=False)

    def frequencies(self) -> Float[Tensor, "half"]:
        """What `inv_freq` holds, anew: a loader that builds models on the meta device has lost it."""
        return 1.0 / self.base ** (torch.arange(0, self.d_head, 2).float() / self.d_head)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Rotary":
        """The frequencies follow the model to its device, never to its dtype."""
        exact = self.inv_freq
        super()._apply(fn, recurse)
        self.inv_freq = exact.to(self.inv_freq.device)
        return self

    def forward(
        self, x: Float[Tensor, "batch pos head d_head"], positions: Int[Tensor, "#batch pos"]
    ) -> Float[Tensor, "batch pos head d_head"]:
        # Angles in float32 whatever the weights are: bfloat16 cannot tell position 300 from 301.
        angles = positions[..., None].float() * self.inv_freq.float()
        cos, sin = (t[:, :, None, :].to(x.dtype) for t in (angles.cos(), angles.sin()))
        first, second = x.chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def _part_weight(part: str) -> Any:
    """`W_Q` and its like: the rows of one part of the fused `qkv`, `(head, d_model, d_head)`."""

    def weight(self: "Attention") -> Float[Tensor, "head d_model d_head"]:
        index = self.part_index(part, "W")
        rows = self.qkv.weight.unflatten(0, (len(self.parts), self.cfg.n_heads, self.cfg.d_head))[index]
        return NamedWeight.viewing(rearrange(rows, "head d_head d_model -> head d_model d_head"))

    return property(weight)


def _part_bias(part: str) -> Any:
    """`b_Q` and its like, `(head, d_head)`, or zeros where the model has none (TransformerLens asks for them)."""

    def bias(self: "Attention") -> Float[Tensor, "head d_head"]:
        index, shape = self.part_index(part, "b"), (self.cfg.n_heads, self.cfg.d_head)
        if self.qkv.bias is None:
            name = f"b_{part.upper()}"
            return NamedWeight.zeros(self.qkv.weight, shape, f"{name}: attention has no biases in this model")
        return NamedWeight.viewing(self.qkv.bias.unflatten(0, (len(self.parts), *shape))[index])

    return property(bias)


class Attention(NamedWeightsMixin):
    """Causal multi-head attention with one fused `qkv`; returns what is added to the residual stream.

    `hook_pattern` is the mixing matrix of each head, whatever the kind. Bilinear attention has two scores, each of its
    own queries and keys: `hook_q1`, `hook_k1`, `hook_rot_q1`, `hook_rot_k1`, `hook_attn_scores_1`, and the like with 2
    (weights `W_Q1`, ...). Quadratic attention squares the one score that softmax attention has too. The scores of both
    are zero where nobody looks, and their product is the pattern.
    """

    W_Q, W_K, W_V = _part_weight("q"), _part_weight("k"), _part_weight("v")
    W_Q1, W_K1, W_Q2, W_K2 = (_part_weight(part) for part in ("q1", "k1", "q2", "k2"))
    b_Q, b_K, b_V = _part_bias("q"), _part_bias("k"), _part_bias("v")
    b_Q1, b_K1, b_Q2, b_K2 = (_part_bias(part) for part in ("q1", "k1", "q2", "k2"))

    def __init__(self, cfg: BilinearTransformerConfig, layer: int):
        super().__init__()
        self.cfg, self.layer, self.parts = cfg, layer, cfg.attention_parts
        width = cfg.n_heads * cfg.d_head
        self.qkv = nn.Linear(cfg.d_model, len(self.parts) * width, bias=cfg.attention_bias)
        self.o = nn.Linear(width, cfg.d_model, bias=False)
        self.rotary = Rotary(cfg.d_head)
        turned = [f"rot_{part}" for part in self.parts[:-1]]
        for name in (*self.parts, "z", *turned, *cfg.score_names, "pattern", "result"):
            setattr(self, f"hook_{name}", HookPoint())

    def part_index(self, part: str, letter: str = "W") -> int:
        """Where a part is in the fused `qkv`.

        Raises:
            ArgumentError: this kind of attention has no such part.
        """
        if part not in self.parts:
            there = ", ".join(f"{letter}_{name.upper()}" for name in self.parts)
            raise ArgumentError(f"{self.cfg.attention} attention has no {letter}_{part.upper()}; it has {there}.")
        return self.parts.index(part)

    @property
    def W_O(self) -> Float[Tensor, "head d_head d_model"]:
        """The output projection with the residual scale `s` folded in."""
        return NamedWeight.computed(self._scaled_o(), self._store_scaled_o)

    def _scaled_o(self) -> Float[Tensor, "head d_head d_model"]:
        scaled = self.o.weight * self.cfg.residual_scale
        return rearrange(scaled, "d_model (head d_head) -> head d_head d_model", head=self.cfg.n_heads)

    def _store_scaled_o(self, values: Float[Tensor, "head d_head d_model"]) -> None:
        """What was not written keeps its bits, which `* s / s` would not."""
        new, old = (rearrange(w, "head d_head d_model -> d_model (head d_head)") for w in (values, self._scaled_o()))
        self.o.weight.copy_(torch.where(new == old, self.o.weight, new / self.cfg.residual_scale))

    @property
    def OV(self) -> FactoredMatrix:
        return FactoredMatrix(self.W_V, self.W_O)

    @property
    def QK(self) -> FactoredMatrix:
        return FactoredMatrix(self.W_Q, self.W_K.transpose(-2, -1))

    @property
    def b_O(self) -> Float[Tensor, "d_model"]:
        return NamedWeight.zeros(
            self.o.weight, (self.cfg.d_model,), "b_O: attention's output has no bias in this architecture"
        )

    def forward(
        self,
        x: Float[Tensor, "batch pos d_model"] | HeadInputs,
        positions: Int[Tensor, "#batch pos"],
        mask: Int[Tensor, "batch key"] | None = None,
        kv_cache: TransformerLensKeyValueCache | None = None,
    ) -> Float[Tensor, "batch pos d_model"]:
        *turning, v = (
            getattr(self, f"hook_{part}")(each) for part, each in zip(self.parts, self._project(x), strict=True)
        )
        turned = [
            getattr(self, f"hook_rot_{part}")(self.rotary(each, positions) if self.cfg.rotary else each)
            for part, each in zip(self.parts, turning, strict=False)
        ]
        queries, keys = turned[::2], turned[1::2]
        if kv_cache is not None:
            keys, v = append(kv_cache[self.layer], keys, v)
        z = self.hook_z(self._mix(queries, keys, v, mask))
        if self.cfg.use_attn_result:
            return self.hook_result(einsum(z, self._scaled_o(), "b p h e, h e m -> b p h m")).sum(2)
        return self.o(z.flatten(2)) * self.cfg.residual_scale

    def _project(self, x: Tensor | HeadInputs) -> tuple[Tensor, ...]:
        """Queries, keys and values, each `(batch, pos, head, d_head)`: of one input, or of every head's own three."""
        shape = (len(self.parts), self.cfg.n_heads, self.cfg.d_head)
        if isinstance(x, Tensor):
            return self.qkv(x).unflatten(-1, shape).unbind(2)
        weights = self.qkv.weight.unflatten(0, shape)
        biases = [0.0] * len(weights) if self.qkv.bias is None else self.qkv.bias.unflatten(0, shape)
        inputs = [x["qkv".index(part[0])] for part in self.parts]
        heads = zip(inputs, weights, biases, strict=True)
        return tuple(einsum(read, rows, "b p h m, h e m -> b p h e") + bias for read, rows, bias in heads)

    def _mix(
        self, queries: Sequence[Tensor], keys: Sequence[Tensor], v: Tensor, mask: Tensor | None
    ) -> Float[Tensor, "batch pos head d_head"]:
        """Attention proper. The fused kernel never forms scores, so it serves only while nobody looks at them."""
        hooks = [getattr(self, f"hook_{name}") for name in self.cfg.score_names]
        watched = any(h.fwd_hooks or h.bwd_hooks for h in (*hooks, self.hook_pattern))
        softmax, n_query, n_key = self.cfg.attention == "softmax", queries[0].shape[1], keys[0].shape[1]
        if softmax and not watched and mask is None and n_query == n_key:
            q, k, v = (t.transpose(1, 2) for t in (queries[0], keys[0], v))
            return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
        visible = torch.ones(n_query, n_key, dtype=torch.bool, device=v.device).tril(n_key - n_query)
        if mask is not None:
            visible = visible & mask.bool()[:, None, None, :]
        unseen = -torch.inf if softmax else 0.0
        scores = [
            hook((einsum(q, k, "b q h e, b k h e -> b h q k") * self.cfg.score_scale).masked_fill(~visible, unseen))
            for hook, q, k in zip(hooks, queries, keys, strict=True)
        ]
        if softmax:
            pattern = scores[0].softmax(-1)
            # A padding query before the first token sees nothing: its softmax is 0/0.
            pattern = self.hook_pattern(pattern if mask is None else pattern.nan_to_num())
        else:
            pattern = self.hook_pattern(scores[0] * scores[-1])
        return einsum(pattern.to(v.dtype), v, "b h q k, b k h e -> b q h e")


class MLP(NamedWeightsMixin):
    """The bilinear layer, or one of the published variants: gated (an activation on the left branch), or one-branch."""

    def __init__(self, cfg: BilinearTransformerConfig):
        super().__init__()
        self.cfg = cfg
        assert cfg.d_mlp is not None
        self.w = nn.Linear(cfg.d_model, (2 if cfg.bilinear else 1) * cfg.d_mlp, bias=cfg.bias)
        self.p = nn.Linear(cfg.d_mlp, cfg.d_model, bias=cfg.bias)
        self.act = ACTIVATIONS[cfg.gate]
        self.hook_in = HookPoint()
        self.hook_pre = HookPoint()
        self.hook_post = HookPoint()
        if cfg.bilinear:
            self.hook_pre_linear = HookPoint()

    def _bias(self, linear: nn.Linear, name: str, units: slice = slice(None)) -> Tensor:
        """The bias, or zeros where the model has none."""
        if linear.bias is not None:
            return NamedWeight.viewing(linear.bias[units])
        size = len(range(linear.out_features)[units])
        return NamedWeight.zeros(linear.weight, (size,), f"{name}: this model has no biases (config: bias is false)")

    def _left(self, of: str) -> None:
        if not self.cfg.bilinear:
            raise NotBilinearError(f"{of}: a one-branch MLP has only W_in and b_in (config: bilinear is false).")

    @property
    def W_gate(self) -> Float[Tensor, "d_model d_mlp"]:
        """The left branch."""
        self._left("W_gate")
        return NamedWeight.viewing(self.w.weight[: self.cfg.d_mlp].T)

    @property
    def W_in(self) -> Float[Tensor, "d_model d_mlp"]:
        """The right branch; the only one of a one-branch MLP."""
        return NamedWeight.viewing(self.w.weight[-self.cfg.d_mlp :].T)

    @property
    def W_out(self) -> Float[Tensor, "d_mlp d_model"]:
        return NamedWeight.viewing(self.p.weight.T)

    @property
    def b_gate(self) -> Float[Tensor, "d_mlp"]:
        """Bias of the left branch (zeros where the model has none)."""
        self._left("b_gate")
        return self._bias(self.w, "b_gate", slice(self.cfg.d_mlp))

    @property
    def b_in(self) -> Float[Tensor, "d_mlp"]:
        """Bias of the right branch, added before the product (zeros where the model has none)."""
        return self._bias(self.w, "b_in", slice(-self.cfg.d_mlp, None))

    @property
    def b_out(self) -> Float[Tensor, "d_model"]:
        return self._bias(self.p, "b_out")

    def forward(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        if self.cfg.use_hook_mlp_in:
            x = self.hook_in(x)
        if not self.cfg.bilinear:
            return self.p(self.hook_post(self.act(self.hook_pre(self.w(x)))))
        left, right = self.w(x).chunk(2, dim=-1)
        return self.p(self.hook_post(self.act(self.hook_pre(left)) * self.hook_pre_linear(right)))


class Block(nn.Module):
    def __init__(self, cfg: BilinearTransformerConfig, layer: int):
        super().__init__()
        self.cfg = cfg
        self.ln1, self.attn = RMSNorm(cfg), Attention(cfg, layer)
        self.ln2, self.mlp = RMSNorm(cfg), MLP(cfg)
        for name in ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post"):
            setattr(self, f"hook_{name}", HookPoint())
        for name in ("attn_in", "q_input", "k_input", "v_input", "mlp_in"):
            setattr(self, f"hook_{name}", HookPoint())

    def forward(
        self, x: Float[Tensor, "batch pos d_model"], *attention_args: Any
    ) -> Float[Tensor, "batch pos d_model"]:
        x = self.hook_resid_pre(x)
        x = self.hook_resid_mid(x + self.hook_attn_out(self.attn(self._attention_input(x), *attention_args)))
        mlp_in = self.hook_mlp_in(x.clone()) if self.cfg.use_hook_mlp_in else x
        return self.hook_resid_post(x + self.hook_mlp_out(self.mlp(self.ln2(mlp_in))))

    def _attention_input(self, x: Float[Tensor, "batch pos d_model"]) -> Tensor | HeadInputs:
        """The normalised stream; on request a copy for every head, or one for each of its queries, keys and values."""

        def copies(hook: Any) -> Float[Tensor, "batch pos head d_model"]:
            return self.ln1(hook(x[:, :, None].repeat(1, 1, self.cfg.n_heads, 1)))

        if self.cfg.use_split_qkv_input:
            return copies(self.hook_q_input), copies(self.hook_k_input), copies(self.hook_v_input)
        if self.cfg.use_attn_in:
            return (copies(self.hook_attn_in),) * 3
        return self.ln1(x)


class Embed(NamedWeightsMixin, nn.Embedding):
    _stored = ("weight",)

    def __init__(self, cfg: BilinearTransformerConfig):
        super().__init__(cfg.d_vocab, cfg.d_model, _weight=torch.empty(cfg.d_vocab, cfg.d_model))

    @property
    def W_E(self) -> Float[Tensor, "d_vocab d_model"]:
        return self.weight


class Unembed(NamedWeightsMixin):
    def __init__(self, cfg: BilinearTransformerConfig):
        super().__init__()
        self.head = nn.Linear(cfg.d_model, cfg.d_vocab, bias=False)

    @property
    def W_U(self) -> Float[Tensor, "d_model d_vocab"]:
        return NamedWeight.viewing(self.head.weight.T)

    @property
    def b_U(self) -> Float[Tensor, "d_vocab"]:
        reason = "b_U: the unembedding has no bias in this architecture"
        return NamedWeight.zeros(self.head.weight, (self.head.out_features,), reason)

    def forward(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_vocab"]:
        return self.head(x)


def _stacked(name: str) -> Any:
    """The weights of this name of every layer's attention, one layer after another."""
    return property(lambda self: self._stack("attn", name))


class HookedBilinearTransformer(
    SAEAttachmentMixin,
    TextGenerationMixin,
    TokenizationMixin,
    ExpansionMixin,
    PublishedMixin,
    NamedWeightsMixin,
    CheckedHooks,
):
    """A bilinear (or gated, or one-branch) transformer with TransformerLens' hooks, weights' names and habits.

    Args:
        cfg: the architecture.
        tokenizer: a transformers tokenizer, or `None` where only tokens are used.
        seed: the seed of the initial weights; `None` draws from torch's global generator.
        init_weights: false where they are overwritten at once.

    Weights start normal with `cfg.init_range`, the two projections into the residual stream at zero-mean scale
    `init_range / sqrt(2 n_layers)`, biases at zero.
    """

    blocks: Any  # an nn.ModuleList of Block, whose attributes a type checker would not know

    def __init__(
        self, cfg: BilinearTransformerConfig, tokenizer: Any = None, seed: int | None = None, init_weights: bool = True
    ):
        super().__init__()
        self.cfg = cfg
        self.tokenizer = tokenizer
        self.hook_tokens = HookPoint()
        self.hook_embed = HookPoint()
        self.embed = Embed(cfg)
        self.blocks = nn.ModuleList([Block(cfg, layer) for layer in range(cfg.n_layers)])
        self.ln_final = RMSNorm(cfg)
        self.unembed = Unembed(cfg)
        if init_weights:
            self._init_weights(seed)
        self.to(device=cfg.device, dtype=cfg.dtype)
        self.setup()

    def _init_weights(self, seed: int | None) -> None:
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        for name, weight in self.named_parameters():
            if name.endswith(".bias"):
                nn.init.zeros_(weight)
            else:
                into_residual = name.endswith((".mlp.p.weight", ".attn.o.weight"))
                std = self.cfg.init_range * (self.cfg.residual_scale if into_residual else 1.0)
                nn.init.normal_(weight, std=std, generator=generator)

    # --- the forward pass ---------------------------------------------------------------------------------------------

    @eager_while_hooked
    def forward(
        self,
        input: str | list[str] | Int[Tensor, "*batch pos"] | Float[Tensor, "batch pos d_model"],
        return_type: ReturnType | None = "logits",
        loss_per_token: bool = False,
        prepend_bos: bool | None = None,
        start_at_layer: int | None = None,
        tokens: Int[Tensor, "*batch pos"] | None = None,
        attention_mask: Mask | None = None,
        stop_at_layer: int | None = None,
        past_kv_cache: TransformerLensKeyValueCache | None = None,
        padding_side: PaddingSide | None = None,
        shortformer_pos_embed: None = None,
    ) -> Any:
        """Run the model.

        Args:
            input: text, texts, tokens, or (with `start_at_layer`) the residual stream entering that layer.
            return_type: `"logits"`, `"loss"` (mean next-token cross-entropy, nats), `"both"`, or `None` for nothing.
            loss_per_token: the loss of every position `(batch, pos - 1)` instead of its mean.
            prepend_bos: true puts `[BOS]` in front of text; `None` takes `cfg.default_prepend_bos`.
            start_at_layer: run from this block on; negative counts from the end.
            tokens: the tokens of a residual stream that is given as `input`, for the loss and to see what is padding.
            attention_mask: 1 for tokens, 0 for padding, of the new positions or with those in the cache. `None` finds
                padding by itself: in a list of texts, and in tokens as `get_attention_mask` does.
            stop_at_layer: return the residual stream entering this block; negative counts from the end.
            past_kv_cache: keys and values of earlier positions, and which of them are padding
                (`TransformerLensKeyValueCache.init_cache(model.cfg, device, batch_size)`); the new ones are added to
                it, unless it is frozen.
            padding_side: the side on which texts, or their tokens, are padded; `None` takes the tokenizer's own.
            shortformer_pos_embed: `None`, as `input_to_embed` gives it; positions are rotary.

        Raises:
            ArgumentError: an input or return type that does not exist, a loss without tokens, or a mask or cache that
                does not belong to the input.
            ContextLengthError, EmptyTextError, OutOfRangeError: the input does not fit the model.
        """
        if shortformer_pos_embed is not None:
            raise ArgumentError("shortformer_pos_embed is given, expected None: this model's positions are rotary.")
        first, last = self._layer_bound(start_at_layer, 0), self._layer_bound(stop_at_layer, self.cfg.n_layers)
        if start_at_layer is None:
            residual, tokens, mask = self._embed(input, prepend_bos, padding_side, attention_mask)  # type: ignore[arg-type]
        else:
            residual = input  # type: ignore[assignment]
            tokens = None if tokens is None else self.input_to_tokens(tokens)
            self._begin_splices(tokens)
            mask = self._mask(input, tokens, residual, prepend_bos, padding_side, attention_mask)
        past, n_new = 0, residual.shape[1]
        if past_kv_cache is not None:
            past = cached_positions(past_kv_cache, range(first, last))
            check_room(past, n_new, self.cfg.n_ctx)
            mask = extended_mask(past_kv_cache, mask, past, n_new)
        elif mask.shape != residual.shape[:2]:
            raise ArgumentError(
                f"attention_mask has shape {tuple(mask.shape)}, expected that of the tokens, "
                f"{tuple(residual.shape[:2])}."
            )
        if bool((mask[:, :-1] < mask[:, 1:]).any()):
            positions = (mask.cumsum(1) - 1)[
                :, past:
            ]  # counted from the first token of the text; before it nobody looks
            attended = mask
        else:  # causal attention never sees padding that nothing follows, and the fused kernel may run
            positions, attended = torch.arange(past, past + n_new, device=residual.device)[None], None
        for block in self.blocks[first:last]:
            residual = block(residual, positions, attended, past_kv_cache)
        if stop_at_layer is not None:
            return residual
        logits = self.unembed(self.ln_final(residual))
        if return_type is None:
            return None
        if return_type == "logits":
            return logits
        if return_type not in ("loss", "both"):
            raise ArgumentError(f"return_type {return_type!r} is not one of 'logits', 'loss', 'both', None.")
        if tokens is None:
            raise ArgumentError("a loss from a residual stream needs the tokens: pass tokens=.")
        loss = self.loss_fn(logits, tokens, mask[:, past:], loss_per_token)
        return loss if return_type == "loss" else (logits, loss)

    def input_to_embed(
        self,
        input: str | list[str] | Int[Tensor, "*batch pos"],
        prepend_bos: bool | None = None,
        padding_side: PaddingSide | None = None,
        attention_mask: Mask | None = None,
        past_kv_cache: TransformerLensKeyValueCache | None = None,
    ) -> tuple[Float[Tensor, "batch pos d_model"], Int[Tensor, "batch pos"], None, Int[Tensor, "batch key"]]:
        """The stream that enters the first block, and what else `forward(..., start_at_layer=0)` needs.

        Arguments as in `forward`.

        Returns:
            `hook_embed`, the tokens, `None` (TransformerLens' shortformer positions), and the attention mask, with that
            of the cache before it.

        Raises:
            ArgumentError, ContextLengthError, EmptyTextError, OutOfRangeError: the same cases as for `forward`.
        """
        residual, tokens, mask = self._embed(input, prepend_bos, padding_side, attention_mask)
        if past_kv_cache is not None:
            past, n_new = cached_positions(past_kv_cache, range(self.cfg.n_layers)), residual.shape[1]
            check_room(past, n_new, self.cfg.n_ctx)
            mask = extended_mask(past_kv_cache, mask, past, n_new)
        return residual, tokens, None, mask

    def _embed(
        self, input: Any, prepend_bos: bool | None, padding_side: PaddingSide | None, attention_mask: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The stream, the tokens and their mask."""
        tokens = self.input_to_tokens(input, prepend_bos, padding_side)
        mask = self._mask(input, tokens, tokens, prepend_bos, padding_side, attention_mask)
        self._begin_splices(tokens)
        if self.cfg.use_hook_tokens:
            tokens = self.hook_tokens(tokens)
        return self.hook_embed(self.embed(tokens)), tokens, mask

    def _mask(
        self,
        input: Any,
        tokens: Tensor | None,
        residual: Tensor,
        prepend_bos: bool | None,
        padding_side: PaddingSide | None,
        attention_mask: Any,
    ) -> Int[Tensor, "batch pos"]:
        """What is a token and what is padding: as given, or read off the texts or tokens."""
        if attention_mask is not None:
            return self.checked_mask(attention_mask, residual)
        if isinstance(input, list):
            return self.attention_mask(input, prepend_bos, padding_side)
        if isinstance(input, str) or tokens is None:
            return torch.ones(residual.shape[:2], dtype=torch.long, device=residual.device)
        return self.get_attention_mask(tokens, prepend_bos, padding_side)

    def checked_mask(self, mask: Any, residual: Tensor) -> Int[Tensor, "batch pos"]:
        """A mask that was given, as ones and zeros on the model's device."""
        if not isinstance(mask, Tensor) or mask.ndim not in (1, 2):
            kind = f"of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else f"{mask!r:.80}"
            raise ArgumentError(f"attention_mask is {kind}; expected a tensor of ones and zeros, one for each token.")
        mask = mask.to(residual.device)
        if not bool(((mask == 0) | (mask == 1)).all()):
            raise ArgumentError("attention_mask holds other values than 1 (a token) and 0 (padding).")
        return mask.long() if mask.ndim == 2 else mask.long()[None]

    def _layer_bound(self, layer: int | None, default: int) -> int:
        if layer is None:
            return default
        n_layers = self.cfg.n_layers
        layer = whole_number(layer, "start_at_layer and stop_at_layer are given one")
        if not -n_layers <= layer <= n_layers:
            raise OutOfRangeError(f"layer {layer} is outside the model's {n_layers} layers.")
        return layer % n_layers if layer < 0 else layer

    def loss_fn(
        self,
        logits: Float[Tensor, "batch pos d_vocab"],
        tokens: Int[Tensor, "batch pos"],
        attention_mask: Mask | None = None,
        per_token: bool = False,
    ) -> Tensor:
        """Next-token cross-entropy in nats, padding left out: its mean, or `(batch, pos - 1)` with `per_token`.

        In float32 at least: half precision has no room for its sums, and three digits for its values.
        """
        wide = logits[:, :-1].flatten(0, 1).to(torch.promote_types(logits.dtype, torch.float32))
        loss = F.cross_entropy(wide, tokens[:, 1:].flatten(), reduction="none")
        loss = loss.view(tokens[:, 1:].shape)
        if attention_mask is None or bool(attention_mask.all()):
            return loss if per_token else loss.mean()
        predicted = (attention_mask[:, :-1] * attention_mask[:, 1:]).to(loss.dtype)
        return loss * predicted if per_token else (loss * predicted).sum() / predicted.sum()

    # --- hooks --------------------------------------------------------------------------------------------------------

    def _position_axis(self, name: str) -> int:
        """After the batch; that of the query in a score or pattern, which has the heads before."""
        return 2 if ".attn.hook_attn_scores" in name or name.endswith("hook_pattern") else 1

    def _is_switched_off(self, name: str) -> str | None:
        if self._is_unused_error_hook(name):
            return "is computed only with use_error_term=True"
        if name == "hook_tokens":
            return (
                None if self.cfg.use_hook_tokens else "is shown the tokens only with model.cfg.use_hook_tokens = True"
            )
        switch = SWITCHES.get(name.split(".", 2)[-1]) if name.startswith("blocks.") else None
        if switch is None or getattr(self.cfg, switch):
            return None
        return f"is computed only after model.set_{switch}(True)"

    def set_use_attn_result(self, use_attn_result: bool) -> None:
        """Whether attention also forms what each head adds (`attn.hook_result`): `n_heads` times the memory."""
        check_flags(use_attn_result=use_attn_result)
        self.cfg.use_attn_result = use_attn_result

    def set_use_split_qkv_input(self, use_split_qkv_input: bool) -> None:
        """Whether every head reads its own copies of the stream for queries, keys and values.

        They are `hook_q_input`, `hook_k_input` and `hook_v_input` of a block, each `(batch, pos, head, d_model)`.
        `ln1` normalises every copy, so its hook points are called once for each and have the axis of heads too.

        Raises:
            ArgumentError: `set_use_attn_in` is on: what its hook did would not be read.
        """
        self._switch("use_split_qkv_input", use_split_qkv_input, unless="use_attn_in")

    def set_use_attn_in(self, use_attn_in: bool) -> None:
        """Whether every head reads its own copy of the stream, `hook_attn_in` of a block.

        Raises:
            ArgumentError: `set_use_split_qkv_input` is on.
        """
        self._switch("use_attn_in", use_attn_in, unless="use_split_qkv_input")

    def _switch(self, name: str, on: bool, *, unless: str) -> None:
        check_flags(**{name: on})
        if on and getattr(self.cfg, unless):
            raise ArgumentError(f"{name} and {unless} exclude each other: first model.set_{unless}(False).")
        setattr(self.cfg, name, on)

    def set_use_hook_mlp_in(self, use_hook_mlp_in: bool) -> None:
        """Whether the MLP's input has hook points: `hook_mlp_in` of a block, and normalised, `mlp.hook_in`.

        What a hook makes of `hook_mlp_in` is read by `ln2`; the residual stream stays as it is.
        """
        check_flags(use_hook_mlp_in=use_hook_mlp_in)
        self.cfg.use_hook_mlp_in = use_hook_mlp_in

    # --- weights under TransformerLens' names -------------------------------------------------------------------------

    @property
    def W_E(self) -> Float[Tensor, "d_vocab d_model"]:
        return self.embed.W_E

    @property
    def W_U(self) -> Float[Tensor, "d_model d_vocab"]:
        return self.unembed.W_U

    @property
    def b_U(self) -> Float[Tensor, "d_vocab"]:
        return self.unembed.b_U

    def _stack(self, part: str, name: str) -> Tensor:
        def store(values: Tensor) -> None:
            for block, layer in zip(self.blocks, values, strict=True):
                getattr(getattr(block, part), name).copy_(layer)

        stacked = torch.stack([getattr(getattr(block, part), name) for block in self.blocks])
        return NamedWeight.computed(stacked, store)

    W_Q, W_K, W_V = _stacked("W_Q"), _stacked("W_K"), _stacked("W_V")
    W_Q1, W_K1, W_Q2, W_K2 = (_stacked(name) for name in ("W_Q1", "W_K1", "W_Q2", "W_K2"))
    b_Q, b_K, b_V = _stacked("b_Q"), _stacked("b_K"), _stacked("b_V")
    b_Q1, b_K1, b_Q2, b_K2 = (_stacked(name) for name in ("b_Q1", "b_K1", "b_Q2", "b_K2"))

    @property
    def W_O(self) -> Float[Tensor, "layer head d_head d_model"]:
        return self._stack("attn", "W_O")

    @property
    def b_O(self) -> Float[Tensor, "layer d_model"]:
        return self._stack("attn", "b_O")

    @property
    def W_gate(self) -> Float[Tensor, "layer d_model d_mlp"]:
        return self._stack("mlp", "W_gate")

    @property
    def W_in(self) -> Float[Tensor, "layer d_model d_mlp"]:
        return self._stack("mlp", "W_in")

    @property
    def W_out(self) -> Float[Tensor, "layer d_mlp d_model"]:
        return self._stack("mlp", "W_out")

    @property
    def b_gate(self) -> Float[Tensor, "layer d_mlp"]:
        return self._stack("mlp", "b_gate")

    @property
    def b_in(self) -> Float[Tensor, "layer d_mlp"]:
        return self._stack("mlp", "b_in")

    @property
    def b_out(self) -> Float[Tensor, "layer d_model"]:
        return self._stack("mlp", "b_out")

    @property
    def QK(self) -> FactoredMatrix:
        return FactoredMatrix(self.W_Q, self.W_K.transpose(-2, -1))

    @property
    def OV(self) -> FactoredMatrix:
        return FactoredMatrix(self.W_V, self.W_O)

    def tl_parameters(self) -> dict[str, Tensor]:
        """Every weight under its TransformerLens name (`blocks.0.attn.W_Q`, ...); `SVDInterpreter` asks for it."""
        parts = [part.upper() for part in self.cfg.attention_parts]
        names = {"attn": [*(f"W_{part}" for part in parts), "W_O"], "mlp": ["W_in", "W_out"]}
        names["mlp"] += ["W_gate"] if self.cfg.bilinear else []
        names["attn"] += [f"b_{part}" for part in parts] if self.cfg.attention_bias else []
        if self.cfg.bias:
            names["mlp"] += ["b_in", "b_out", *(["b_gate"] if self.cfg.bilinear else [])]
        return {"embed.W_E": self.W_E, "unembed.W_U": self.W_U} | {
            f"blocks.{layer}.{part}.{name}": getattr(getattr(block, part), name)
            for layer, block in enumerate(self.blocks)
            for part in names
            for name in names[part]
        }

    def accumulated_bias(
        self, layer: int, mlp_input: bool = False, include_mlp_biases: bool = True
    ) -> Float[Tensor, "d_model"]:
        """Sum of the output biases of the layers below (attention has none): what `ActivationCache` asks for."""
        layer = whole_number(layer, "the layer up to which biases are added")
        biases = [block.mlp.b_out for block in self.blocks[:layer]] if include_mlp_biases else []
        return sum(biases, start=self.W_E.new_zeros(self.cfg.d_model))

    def tokens_to_residual_directions(
        self, tokens: str | int | Sequence[str] | Sequence[int] | Int[Tensor, "*batch"]
    ) -> Float[Tensor, "*n d_model"]:
        """The unembedding direction of each token: what the normalised residual stream is dotted with for its logit.

        Axes are those of the tokens; a single token, however it is given, has one direction without.
        """
        if isinstance(tokens, str):
            tokens = self.to_single_token(tokens)
        elif isinstance(tokens, list | tuple):
            tokens = [self.to_single_token(token) if isinstance(token, str) else token for token in tokens]
        ids = torch.as_tensor(tokens)
        if ids.dtype == torch.bool or ids.is_floating_point() or ids.is_complex():
            raise ArgumentError(f"tokens {tokens!r} are no words or token ids.")
        if ids.numel() and not 0 <= ids.min() <= ids.max() < self.cfg.d_vocab:
            raise OutOfRangeError(f"tokens {tokens} are not all in the vocabulary, 0 to {self.cfg.d_vocab - 1}.")
        return self.W_U.T[ids.squeeze() if ids.numel() == 1 else ids]

    @property
    def n_params_total(self) -> int:
        """How many numbers the weights are, embeddings and biases included."""
        return sum(weight.numel() for weight in self.parameters())

    def all_head_labels(self) -> list[str]:
        """`L0H0`, `L0H1`, ... in the order of the stacked head weights."""
        return [f"L{layer}H{head}" for layer in range(self.cfg.n_layers) for head in range(self.cfg.n_heads)]

    # --- where the model lives ----------------------------------------------------------------------------------------

    def to(self, *args: Any, **kwargs: Any) -> "HookedBilinearTransformer":
        """To a device, a dtype, or both, as torch does.

        Raises:
            ArgumentError: a dtype without fractions, or a device that torch does not have.
        """
        try:
            _, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        except (TypeError, RuntimeError) as error:
            given = ", ".join(map(repr, (*args, *kwargs.values())))
            raise ArgumentError(f"a model cannot go to {given}: {str(error).splitlines()[0]}") from error
        if dtype is not None:
            _check_dtype(dtype)
        return super().to(*args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "HookedBilinearTransformer":
        """Every `to`, `cuda`, `half`, ... comes through here: keeps `cfg.device` and `cfg.dtype` true."""
        _check_dtype(fn(self.embed.weight.new_empty(0)).dtype)
        super()._apply(fn, recurse)
        weight = self.embed.W_E
        self.cfg.device, self.cfg.dtype = str(weight.device), weight.dtype
        return self


def _check_dtype(dtype: torch.dtype) -> None:
    if dtype not in DTYPES:
        raise ArgumentError(f"a model computes in {', '.join(map(str, DTYPES))}, not in {dtype}.")
