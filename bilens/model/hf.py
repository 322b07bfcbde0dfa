"""The model as a Hugging Face class, for `AutoModelForCausalLM`, `pipeline`, the `Trainer` and nnsight.

`HookedBilinearTransformer` owns the forward pass; the class here owns nothing but the published names.

1. it builds a `HookedBilinearTransformer` and registers that model's own modules as `transformer.wte`, `transformer.h`
   and `lm_head`, so every tensor has its published name and exists once
2. `forward` translates the arguments (mask, cache, labels), runs the hooked model, and wraps the result
3. `hooked` is the model inside: hooks, `run_with_cache` and writing into weights act on both

Importing this module registers the classes with `AutoConfig` and `AutoModelForCausalLM`, and the adapter of
`bilens.model.bridge` with TransformerLens. `import bilens.model` and whatever imports it, such as `bilens.load_model`,
is enough; `import bilens` alone is not, since that would import transformers.
"""

import copy
import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, GenerationMixin, PretrainedConfig
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import cached_file

from bilens._core.checks import check_finite
from bilens._core.files import open_tensors
from bilens.errors import ArgumentError, CheckpointError
from bilens.model.bridge import register_adapter
from bilens.model.config import (
    HF_ARCHITECTURE,
    MODEL_TYPE,
    any_attention_bias,
    config_from_published,
    config_to_published,
)
from bilens.model.files import EMBEDDING, INDEX_FILE, TOKENIZER_FILES, WEIGHTS_FILE, load_tokenizer, read_index
from bilens.model.hf_tokenizer import register_tokenizer
from bilens.model.loading import load_model
from bilens.model.tokenization import Mask, attended
from bilens.model.transformer import Embed, HookedBilinearTransformer, Rotary
from bilens.model.vpd import FORMAT_KEYS

HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


class BilinearConfig(PretrainedConfig):
    """The published `config.json` as a Hugging Face configuration; keys it does not know are kept and saved again.

    Args:
        n_head, n_layer, n_ctx, d_model, d_hidden: the published sizes.
        vocab_size: rows of the embedding; reading a checkpoint counts them, whatever its config says.
        bilinear, gate, bias, attention_bias, scale_attn, normalization: the published variants.
        attention, attention_scale, d_head, rotary, residual_scale: those of `BilinearTransformerConfig`; `None` is what
            the published models have.
        tokenizer: the published name of the tokenizer.
        repo: the repository that the model came from.
    """

    model_type = MODEL_TYPE
    attribute_map = {  # noqa: RUF012  transformers declares it so
        "head_dim": "d_head",
        "hidden_size": "d_model",
        "intermediate_size": "d_hidden",
        "max_position_embeddings": "n_ctx",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    }

    def __init__(
        self,
        n_head: int = 4,
        n_layer: int = 4,
        n_ctx: int = 256,
        d_model: int = 256,
        d_hidden: int = 1024,
        vocab_size: int = 4096,
        bilinear: bool = True,
        gate: str | None = None,
        bias: bool = False,
        attention_bias: bool = False,
        scale_attn: bool = True,
        normalization: bool = True,
        attention: str | None = None,
        attention_scale: str | None = None,
        d_head: int | None = None,
        rotary: bool = True,
        residual_scale: float | None = None,
        tokenizer: str | None = None,
        repo: str | None = None,
        **kwargs: Any,
    ):
        self.n_head, self.n_layer, self.n_ctx = n_head, n_layer, n_ctx
        self.d_model, self.d_hidden, self.vocab_size = d_model, d_hidden, vocab_size
        self.bilinear, self.gate, self.bias, self.normalization = bilinear, gate, bias, normalization
        self.attention_bias, self.scale_attn = attention_bias, scale_attn
        self.attention, self.attention_scale, self.d_head = attention, attention_scale, d_head
        self.rotary, self.residual_scale = rotary, residual_scale
        self.tokenizer, self.repo = tokenizer, repo
        # The published configs name the authors' class; TransformerLens looks for the one that has an adapter.
        named = kwargs.get("architectures") or []
        architectures = [*(name for name in named if name != HF_ARCHITECTURE), HF_ARCHITECTURE]
        kwargs |= {"architectures": architectures, "tie_word_embeddings": False}
        super().__init__(**kwargs)

    def published(self) -> dict[str, Any]:
        """The published `config.json`, and what else this configuration holds beside transformers' defaults."""
        needed = [key for key in inspect.signature(BilinearConfig).parameters if key not in ("vocab_size", "kwargs")]
        return self.to_diff_dict() | {key: getattr(self, key) for key in needed}

    @classmethod
    def from_hooked(cls, model: HookedBilinearTransformer) -> "BilinearConfig":
        """The configuration of a hooked model."""
        published = config_to_published(model.cfg) | {"vocab_size": model.cfg.d_vocab, "dtype": model.cfg.dtype}
        return cls(**{key: value for key, value in published.items() if key not in ("model_type", "torch_dtype")})


class BilinearForCausalLM(PreTrainedModel, GenerationMixin):
    """A bilinear transformer with transformers' interface; `hooked` is the same model with TransformerLens'.

    Args:
        config: the architecture. New weights start as those of `HookedBilinearTransformer`.
    """

    config_class = BilinearConfig
    base_model_prefix = ""
    _no_split_modules = ["Block"]  # noqa: RUF012
    _keys_to_ignore_on_load_unexpected = [r"\.rotary\.inv_freq$"]  # noqa: RUF012
    _supports_sdpa = True
    accepts_loss_kwargs = True  # num_items_in_batch, which the Trainer counts

    def __init__(self, config: BilinearConfig):
        super().__init__(config)
        # transformers chooses both by context: it loads on "meta", in the dtype that was asked for.
        device, dtype = str(torch.get_default_device()), torch.get_default_dtype()
        cfg = config_from_published(
            config.published(), config.vocab_size, device=device, dtype=dtype, model_name=config.repo or "bilinear"
        )
        self._hold(HookedBilinearTransformer(cfg, init_weights=False))
        self.post_init()

    def _hold(self, hooked: HookedBilinearTransformer) -> None:
        self.__dict__["_hooked"] = hooked  # not a submodule of its own: its modules have their published names
        self.transformer = nn.ModuleDict({"wte": hooked.embed, "h": hooked.blocks})
        self.lm_head = hooked.unembed.head

    @property
    def hooked(self) -> HookedBilinearTransformer:
        """The model inside, which runs the forward pass; weights and hooks are shared."""
        hooked: HookedBilinearTransformer = self.__dict__["_hooked"]
        weight = self.lm_head.weight
        hooked.cfg.device, hooked.cfg.dtype = str(weight.device), weight.dtype
        hooked.cfg.d_vocab = hooked.cfg.d_vocab_out = weight.shape[0]
        return hooked

    # --- to and from the other classes --------------------------------------------------------------------------------

    @classmethod
    def from_hooked(cls, model: HookedBilinearTransformer) -> "BilinearForCausalLM":
        """A Hugging Face model around `model`: the same weights, not copies of them."""
        config = BilinearConfig.from_hooked(model)
        with torch.device("meta"):
            wrapped = cls(config)
        wrapped._hold(model)
        wrapped.train(model.training)
        wrapped._end_where_the_tokenizer_does(model.tokenizer)
        return wrapped

    def to_hooked(self, tokenizer: Any = None) -> HookedBilinearTransformer:
        """The hooked model with the same weights, not copies of them.

        Args:
            tokenizer: for the hooked model; `None` keeps the one it has, if any.
        """
        hooked = self.hooked
        if tokenizer is not None:
            hooked.tokenizer = tokenizer
        return hooked

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, config: Any = None, **kwargs: Any) -> Any:
        """Load a published folder or hub repository, `model_type` in its config or not; see transformers.

        `generate` and `pipeline` stop at the end-of-text of the tokenizer beside the weights, where there is one.
        """
        source = pretrained_model_name_or_path
        hub = {key: kwargs[key] for key in HUB_OPTIONS if key in kwargs}
        if not isinstance(config, PretrainedConfig):
            config, kwargs = BilinearConfig.from_pretrained(config or source, return_unused_kwargs=True, **kwargs)
            kwargs = hub | kwargs
        if source is not None:
            config = copy.deepcopy(config)
            names, rows = stored(source, **hub)
            if names and EMBEDDING not in names and config.to_dict().keys() >= FORMAT_KEYS:
                known = {key: hub[key] for key in ("cache_dir", "local_files_only", "revision", "token") if key in hub}
                dtype = kwargs.get("dtype") or kwargs.get("torch_dtype") or torch.float32
                return cls.from_hooked(load_model(source, device="cpu", dtype=dtype, **known))
            if names and config.num_hidden_layers > len(names):
                raise CheckpointError(
                    f"{source} holds {len(names)} tensors; its config asks for {config.num_hidden_layers} layers."
                )
            config.vocab_size = rows or config.vocab_size
            config.attention_bias = config.attention_bias or (config.bias and any_attention_bias(names))
        loaded = super().from_pretrained(source, *args, config=config, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        for name, weight in model.named_parameters():
            if weight.is_floating_point() and not weight.is_meta:
                check_finite(name, weight, source)
        if source is not None and model.generation_config.eos_token_id is None:
            model._end_where_the_tokenizer_does(tokenizer_beside(source, **hub))
        return loaded

    def _end_where_the_tokenizer_does(self, tokenizer: Any) -> None:
        """Neither the published config nor anything else beside the weights says which tokens begin, end and pad."""
        if tokenizer is not None:
            for token in ("bos_token_id", "eos_token_id", "pad_token_id"):
                setattr(self.generation_config, token, getattr(tokenizer, token))

    def save_pretrained(  # type: ignore[override]  # transformers' other arguments go on by keyword
        self, save_directory: str | os.PathLike[str], *, state_dict: dict[str, Tensor] | None = None, **kwargs: Any
    ) -> Any:
        """Write the published format: as transformers does, and the rotary buffers, which the authors' code expects."""
        tensors = dict(self.state_dict() if state_dict is None else state_dict)
        for layer, block in enumerate(self.hooked.blocks):
            tensors.setdefault(f"transformer.h.{layer}.attn.rotary.inv_freq", block.attn.rotary.inv_freq)
        return super().save_pretrained(save_directory, state_dict=tensors, **kwargs)

    # --- what transformers asks for -----------------------------------------------------------------------------------

    def get_input_embeddings(self) -> nn.Module:
        return self.transformer["wte"]

    def set_input_embeddings(self, value: nn.Module) -> None:
        hooked = self.hooked
        if not isinstance(value, Embed):
            embed = Embed(hooked.cfg)
            embed.weight, embed.num_embeddings = value.weight, value.weight.shape[0]  # type: ignore[assignment]
            value = embed
        self.transformer["wte"] = hooked.embed = value

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.lm_head = self.hooked.unembed.head = new_embeddings  # type: ignore[assignment]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Weights that no file gave; transformers marks the others."""
        hooked: HookedBilinearTransformer = self.__dict__["_hooked"]
        if isinstance(module, Rotary):
            module.inv_freq.copy_(module.frequencies())
        elif isinstance(module, nn.Linear | nn.Embedding):
            into_residual = any(module is block.attn.o or module is block.mlp.p for block in hooked.blocks)
            std = hooked.cfg.init_range * (hooked.cfg.residual_scale if into_residual else 1.0)
            if not getattr(module.weight, "_is_hf_initialized", False):
                module.weight.normal_(std=std)
            bias = getattr(module, "bias", None)
            if bias is not None and not getattr(bias, "_is_hf_initialized", False):
                bias.zero_()

    def forward(
        self,
        input_ids: Int[Tensor, "batch pos"] | None = None,
        attention_mask: Mask | None = None,
        position_ids: Int[Tensor, "#batch pos"] | None = None,
        past_key_values: Any = None,
        inputs_embeds: Float[Tensor, "batch pos d_model"] | None = None,
        labels: Int[Tensor, "batch pos"] | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cache_position: Int[Tensor, "pos"] | None = None,
        logits_to_keep: int | Int[Tensor, "kept"] = 0,
        num_items_in_batch: int | Tensor | None = None,
        token_type_ids: Int[Tensor, "batch pos"] | None = None,
    ) -> Any:
        """Run the hooked model with transformers' arguments.

        Args:
            input_ids: tokens; or give `inputs_embeds`, rows in place of `W_E`'s.
            attention_mask: 1 for tokens, 0 for padding, the positions in the cache included. Positions are counted from
                the first token. `None` takes tokens that lead a row as padding (see `bilens.model.tokenization`).
            position_ids: only those that the mask implies; padding may have any.
            past_key_values: a transformers cache; new keys and values are added to it.
            labels: targets, not shifted; -100 is left out, and so are padding and what would be predicted from it. Adds
                `loss`, the mean next-token cross-entropy.
            use_cache: make a cache where none is given.
            output_attentions: add `attentions`, each layer's pattern `(batch, head, query, key)`.
            output_hidden_states: add `hidden_states`: the stream entering each block, and the last one normalised.
            return_dict: false gives a tuple.
            cache_position: only the positions that follow those in the cache.
            logits_to_keep: give the logits of so many last positions (0 is all), or of these positions.
            num_items_in_batch: divide the loss's sum by it instead of by the number of targets (the `Trainer` does,
                to accumulate gradients).
            token_type_ids: only zeros: there is one kind of token.

        Raises:
            ArgumentError: positions or kinds of tokens that this model cannot have, or a mask that does not fit.
            ContextLengthError, EmptyTextError, OutOfRangeError: the input does not fit the model.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds.")
        config = self.config
        output_attentions = config.output_attentions if output_attentions is None else output_attentions
        output_hidden_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        hooked = self.hooked
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        given: Any = input_ids if inputs_embeds is None else inputs_embeds
        past = 0 if past_key_values is None else int(past_key_values.get_seq_length())
        mask = self._whole_mask(attention_mask, input_ids, given, past)
        self._check_positions(position_ids, cache_position, mask, past)
        if token_type_ids is not None and bool(token_type_ids.any()):
            raise ArgumentError("token_type_ids holds other kinds than 0; this model knows one kind of token.")
        streams: list[Any] = []
        patterns: list[Any] = []
        kept = _keep(patterns, hooked, "attn.hook_pattern") if output_attentions else []
        if output_hidden_states:
            kept += [*_keep(streams, hooked, "hook_resid_pre"), ("ln_final.hook_normalized", _into(streams))]
        with hooked.hooks(kept):
            stream = hooked(
                given,
                start_at_layer=None if inputs_embeds is None else 0,
                stop_at_layer=len(hooked.blocks),
                attention_mask=mask,
                past_kv_cache=None if past_key_values is None else _Cache(past_key_values, given),
            )
            stream = hooked.ln_final(stream)
            wanted = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = hooked.unembed(stream[:, wanted] if labels is None else stream)
        loss = None
        if labels is not None:
            targets = _predicted(labels.to(logits.device), mask[:, past:])
            loss = self.loss_function(
                logits, targets, vocab_size=logits.shape[-1], num_items_in_batch=num_items_in_batch
            )
            logits = logits[:, wanted]
        output = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=past_key_values,
            hidden_states=tuple(streams) if output_hidden_states else None,
            attentions=tuple(patterns) if output_attentions else None,
        )
        return output if return_dict is None or return_dict else output.to_tuple()

    def generate(self, inputs: Any = None, *args: Any, **kwargs: Any) -> Any:
        """transformers' `generate`; without an `attention_mask`, padding that leads a row is seen as by `forward`."""
        tokens = inputs if inputs is not None else kwargs.get("input_ids")
        if isinstance(tokens, Tensor) and tokens.ndim == 2 and kwargs.get("attention_mask") is None:
            mask = self._leading_padding(tokens)
            if not bool(mask.all()):
                kwargs["attention_mask"] = mask
        return super().generate(inputs, *args, **kwargs)  # type: ignore[misc]

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """transformers' inputs for a step, without its positions: those that the mask implies follow padding too."""
        kwargs.pop("position_ids", None)
        return super().prepare_inputs_for_generation(*args, **kwargs)  # type: ignore[misc]

    def _leading_padding(self, tokens: Int[Tensor, "batch pos"]) -> Int[Tensor, "batch pos"]:
        """The mask of tokens that came without one: labels or the caller know what is padding behind a text."""
        special = self.generation_config
        return attended(tokens, special.pad_token_id, special.bos_token_id, "left")

    def _whole_mask(self, mask: Any, tokens: Tensor | None, given: Tensor, past: int) -> Int[Tensor, "batch key"]:
        """The mask of the positions in the cache and the new ones."""
        batch, n_new = given.shape[:2] if given.ndim > 1 else (1, given.shape[0])
        if mask is not None:
            mask = self.hooked.checked_mask(mask, given)
            if tuple(mask.shape) != (batch, past + n_new):
                raise ArgumentError(
                    f"attention_mask has {mask.shape[1]} positions, expected {past + n_new}: the {past} in "
                    f"past_key_values and the {n_new} new ones (in {batch} rows, not {mask.shape[0]})."
                )
            return mask
        if tokens is None:
            return torch.ones(batch, past + n_new, dtype=torch.long, device=given.device)
        new = self._leading_padding(tokens.view(batch, n_new))
        return torch.cat([new.new_ones(batch, past), new], dim=1)

    def _check_positions(self, position_ids: Any, cache_position: Any, mask: Tensor, past: int) -> None:
        if cache_position is not None and cache_position.tolist() != list(range(past, mask.shape[1])):
            raise ArgumentError(
                f"cache_position is {cache_position.tolist()}, expected {past} to {mask.shape[1] - 1}: new positions "
                f"follow the {past} in past_key_values."
            )
        if position_ids is None:
            return
        implied = (mask.cumsum(1) - 1)[:, past:]
        wrong = (position_ids.to(implied.device) != implied) & (mask[:, past:] == 1)
        if bool(wrong.any()):
            row = int(wrong.any(1).nonzero()[0])
            raise ArgumentError(
                f"position_ids of row {row} are {position_ids.expand_as(implied)[row].tolist()}, expected "
                f"{implied[row].clamp_min(0).tolist()}: positions are counted over the tokens that attention_mask lets "
                "through. Leave position_ids out, or mask the padding."
            )


def _predicted(labels: Int[Tensor, "batch pos"], mask: Int[Tensor, "batch pos"]) -> Int[Tensor, "batch pos"]:
    """The targets that a text alone would have: none that is padding, or that follows it."""
    after = F.pad(mask[:, :-1], (1, 0), value=1)
    return labels.masked_fill((mask == 0) | (after == 0), -100)


class _Cache:
    """A transformers cache where the hooked model expects TransformerLens' own, for one forward pass."""

    frozen = False

    def __init__(self, cache: Any, tokens: Tensor):
        self.cache = cache
        past = cache.get_seq_length()
        self.previous_attention_mask = tokens.new_ones(tokens.shape[0], past, dtype=torch.long)

    def __getitem__(self, layer: int) -> "_CachedLayer":
        return _CachedLayer(self.cache, layer)


class _CachedLayer:
    """One layer of it: transformers keeps keys and values as `(batch, head, pos, d_head)`."""

    def __init__(self, cache: Any, layer: int):
        self.cache, self.layer = cache, layer

    @property
    def past_keys(self) -> Float[Tensor, "1 pos 0 0"]:
        """Only as many as there are: what the forward pass asks for."""
        return torch.empty(1, self.cache.get_seq_length(self.layer), 0, 0)

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        k, v = self.cache.update(k.transpose(1, 2), v.transpose(1, 2), self.layer)
        return k.transpose(1, 2), v.transpose(1, 2)


def _into(kept: list[Tensor]) -> Callable[..., None]:
    def hook(activation: Tensor, hook: Any) -> None:
        kept.append(activation)

    return hook


def _keep(kept: list[Tensor], model: HookedBilinearTransformer, name: str) -> list[tuple[str, Callable]]:
    """Hooks that put the activation of every block into `kept`, in order, still attached to the graph."""
    return [(f"blocks.{layer}.{name}", _into(kept)) for layer in range(model.cfg.n_layers)]


def stored(source: str | os.PathLike[str], **hub: Any) -> tuple[set[str], int | None]:
    """Which tensors a folder or hub repository has, and the rows of its embedding, from the weights' header or index.

    Args:
        source: a folder or hub id.
        hub: `revision`, `token`, `cache_dir`, ... as `from_pretrained` takes them.

    Returns:
        The names, and `None` where there are no safetensors weights or no embedding; what reads them will say so.
    """
    names: set[str] = set()
    for name in (WEIGHTS_FILE, INDEX_FILE):
        found = cached_file(str(source), name, _raise_exceptions_for_missing_entries=False, **hub)
        if found is None:
            continue
        if name.endswith(".json"):
            shards = read_index(Path(found))
            names = set().union(*shards.values())
            shard = next((file for file, held in shards.items() if EMBEDDING in held), None)
            found = shard and cached_file(str(source), shard, **hub)
        if found:
            with open_tensors(Path(found)) as file:
                names |= set(file.keys())
                return names, file.get_slice(EMBEDDING).get_shape()[0] if EMBEDDING in file.keys() else None  # noqa: SIM118
    return names, None


def tokenizer_beside(source: str | os.PathLike[str], **hub: Any) -> Any:
    """The tokenizer in a folder or hub repository, `None` where there is none; arguments as of `stored`."""
    found = [cached_file(str(source), n, _raise_exceptions_for_missing_entries=False, **hub) for n in TOKENIZER_FILES]
    return None if found[0] is None else load_tokenizer(Path(found[0]).parent, None)


AutoConfig.register(MODEL_TYPE, BilinearConfig)
AutoModelForCausalLM.register(BilinearConfig, BilinearForCausalLM)
register_tokenizer(BilinearConfig)
register_adapter()
