"""The configuration of a bilinear transformer, and its translation from and to the published `config.json`.

TransformerLens reads a `TransformerLensConfig`; the published checkpoints carry a flat JSON of other names. The second
is kept whole in `cfg.published`, so that saving gives back every key that loading saw.
"""

import json
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformer_lens.config import TransformerLensConfig
from transformers import PretrainedConfig

from bilens.errors import CheckpointError, nearest

NEEDED_KEYS = ("n_head", "n_layer", "n_ctx", "d_model", "d_hidden")
SWITCHES = {
    "bilinear": True,
    "bias": False,
    "attention_bias": False,
    "scale_attn": True,
    "rotary": True,
    "normalization": True,
}
# What polynomial attention's product of scores is divided by, as the power of d_head that each of its two factors is.
ATTENTION_SCALES = {"d_head": -0.5, "d_head^2": -1.0}
ATTENTION_KINDS = ("softmax", "bilinear", "quadratic")
# Beyond this, float32 cannot tell the angles of neighbouring positions apart.
MAX_POSITIONS = 2**24
# Keys of the authors' and of neighbouring code that change the forward pass, with the value under which they do not.
NOT_IMPLEMENTED: dict[str, Any] = {
    "norm_bias": False,
    "post_norm": False,
    "qk_norm": False,
    "mlp_bias": False,
    "mlp": "blp",
    "rms": True,
    "rope_theta": 10_000,
    "rope_base": 10_000,
    "rope_scaling": None,
    "rope_parameters": None,
    "tie_word_embeddings": False,
}
# Keys that say nothing about the forward pass, beside those that every Hugging Face configuration has.
HARMLESS = {
    *("architectures", "auto_map", "dtype", "model_type", "repo", "tokenizer", "torch_dtype", "transformers_version"),
    *("modifier", "n_vocab", "noise", "vocab_size", "_name_or_path"),
    *("use_cache", "bos_token_id", "eos_token_id", "pad_token_id"),
    *("attn_dropout", "resid_dropout", "mlp_dropout", "embed_dropout"),
}
# What `bilens.model.hf` is registered under; the Auto classes and TransformerLens find it by these.
MODEL_TYPE, HF_ARCHITECTURE, HF_TOKENIZER = "bilinear", "BilinearForCausalLM", "BilinearTokenizer"
GATES = (None, "relu", "silu", "gelu")


@dataclass
class BilinearTransformerConfig(TransformerLensConfig):
    """A `TransformerLensConfig` with the fields of the bilinear MLP.

    Args:
        bilinear: two branches multiplied (true), or a plain one-branch MLP (false).
        gate: activation on the left branch (`None` is the identity: the bilinear model), or of the one branch.
        bias: biases in the MLP.
        attention_bias: biases of queries, keys and values.
        attention: what makes the mixing matrix of a head: `"softmax"` of its scores, or a polynomial of them that is
            zero where nobody looks: `"bilinear"`, `(q1 . k1)(q2 . k2)` over a scale, or `"quadratic"`, `(q . k)^2` over
            one.
        attention_scale: that scale, `"d_head"` or `"d_head^2"`.
        rotary: positions turn queries and keys; without, attention knows no positions but what is behind.
        scale_attn: attention's output is scaled by `1 / sqrt(2 n_layers)`.
        residual_scale: that factor itself, where it is another; `W_O` is exposed with it folded in.
        tokenizer_name: the published name of the tokenizer (`ts-4096`, `mistral`, `gpt2`) or a hub id.
        model_name: the name or path that the model came from; SAELens writes it into the SAEs it trains.
        init_range: standard deviation of new weights.
        use_attn_in, use_hook_mlp_in, use_hook_tokens: TransformerLens' switches of hook points that cost memory.
        published: the `config.json` as it was read, keys that bilens does not use included.
    """

    bilinear: bool = True
    gate: str | None = None
    bias: bool = False
    attention_bias: bool = False
    attention: str = "softmax"
    attention_scale: str = "d_head"
    rotary: bool = True
    scale_attn: bool = True
    residual_scale: float | None = None
    tokenizer_name: str | None = None
    model_name: str = "bilinear"
    init_range: float = 0.02
    use_attn_in: bool = False
    use_hook_mlp_in: bool = False
    use_hook_tokens: bool = False
    published: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gate not in GATES:
            raise CheckpointError(
                f"config: gate {self.gate!r} is not one of null, relu, silu, gelu."
                + nearest(str(self.gate), [g for g in GATES if g])
            )
        for name, choices in (("attention", ATTENTION_KINDS), ("attention_scale", tuple(ATTENTION_SCALES))):
            if (value := getattr(self, name)) not in choices:
                raise CheckpointError(
                    f"config: {name} is {value!r:.100}, expected one of {', '.join(choices)}."
                    + nearest(str(value), choices)
                )
        if self.rotary and self.d_head % 2:
            raise CheckpointError(f"config: d_head {self.d_head} is odd; rotary positions need an even one.")
        if self.residual_scale is None:
            self.residual_scale = self.implied_residual_scale
        self.gated_mlp = self.bilinear
        self.act_fn = self.gate or "identity"
        self.positional_embedding_type = "rotary" if self.rotary else "none"
        self.eps = 1e-8
        self.attn_only = False
        self.uses_rms_norm = self.normalization_type is not None

    @property
    def is_bilinear(self) -> bool:
        """Whether the MLP is an exact quadratic form: two branches and no gate."""
        return self.bilinear and self.gate is None

    @property
    def implied_residual_scale(self) -> float:
        """The factor on attention's output that `scale_attn` stands for: `1 / sqrt(2 n_layers)`, or 1."""
        return (2 * self.n_layers) ** -0.5 if self.scale_attn else 1.0

    @property
    def attention_parts(self) -> tuple[str, ...]:
        """What the fused `qkv` holds, in order; bilinear attention has queries and keys for each factor."""
        return ("q1", "k1", "q2", "k2", "v") if self.attention == "bilinear" else ("q", "k", "v")

    @property
    def score_names(self) -> tuple[str, ...]:
        """The hook points of a head's scores: those of each factor where there are two."""
        return ("attn_scores_1", "attn_scores_2") if self.attention == "bilinear" else ("attn_scores",)

    @property
    def score_scale(self) -> float:
        """What a query times a key is multiplied by: the scores of each factor, where there are two."""
        return self.d_head ** (-0.5 if self.attention == "softmax" else ATTENTION_SCALES[self.attention_scale])


def config_from_published(
    published: dict[str, Any],
    d_vocab: int,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    model_name: str = "bilinear",
) -> BilinearTransformerConfig:
    """Read the published `config.json` (a flat dictionary).

    Args:
        published: the JSON object; needs `n_head n_layer n_ctx d_model d_hidden`.
        d_vocab: number of rows of the embedding (configs do not carry it reliably).
        device, dtype: the device and type of the model.
        model_name: recorded in `cfg.model_name`.

    Raises:
        CheckpointError: a needed key is missing or not a positive integer, a switch is neither true nor false, a gate
            is unknown, or a key asks for something that changes the forward pass and is not implemented.
    """
    check_positive_integers(published, NEEDED_KEYS)
    check_switches(published, tuple(SWITCHES))
    _check_other_keys(published)
    if published["n_ctx"] > MAX_POSITIONS:
        raise CheckpointError(f"config.json: n_ctx is {published['n_ctx']}, expected at most {MAX_POSITIONS}.")
    n_heads, d_model = published["n_head"], published["d_model"]
    if published.get("d_head") is not None:
        check_positive_integers(published, ("d_head",))
    elif d_model % n_heads:
        raise CheckpointError(
            f"config.json: d_model {d_model} is not divisible by n_head {n_heads}, and there is no d_head."
        )
    attention = _attention_kind(published)
    return BilinearTransformerConfig(
        d_model=d_model,
        d_head=published.get("d_head") or d_model // n_heads,
        n_layers=published["n_layer"],
        n_ctx=published["n_ctx"],
        n_heads=n_heads,
        d_mlp=published["d_hidden"],
        d_vocab=d_vocab,
        device=device,
        dtype=dtype,
        normalization_type="RMSPre" if published.get("normalization", SWITCHES["normalization"]) else None,
        gate=published.get("gate"),
        attention=attention,
        attention_scale=published.get("attention_scale") or "d_head",
        residual_scale=published.get("residual_scale"),
        **{key: published.get(key, default) for key, default in SWITCHES.items() if key != "normalization"},
        tokenizer_name=published.get("tokenizer"),
        model_name=model_name,
        published=dict(published),
    )


def _attention_kind(published: dict[str, Any]) -> str:
    """The kind of attention, which the authors' later code calls `attention2` where it is bilinear.

    Raises:
        CheckpointError: the keys contradict each other, or a scale is none.
    """
    check_switches(published, ("attention2",))
    attention = published.get("attention") or ("bilinear" if published.get("attention2") else "softmax")
    if "attention2" in published and published["attention2"] != (attention == "bilinear"):
        raise CheckpointError(
            f"config.json: attention is {attention!r:.100} and attention2 is {json.dumps(published['attention2'])}, "
            "which is the authors' word for bilinear attention; leave one of them out."
        )
    if attention == "softmax" and published.get("attention_scale") is not None:
        raise CheckpointError(
            f"config.json: attention_scale is {published['attention_scale']!r:.100}, which only bilinear and quadratic "
            "attention have; the scores of softmax attention are divided by sqrt(d_head)."
        )
    scale = published.get("residual_scale")
    if scale is not None and (
        not isinstance(scale, int | float) or isinstance(scale, bool) or not 0 < scale < float("inf")
    ):
        raise CheckpointError(f"config.json: residual_scale is {scale!r:.100}, expected a number above 0.")
    return attention


def any_attention_bias(names: Iterable[str]) -> bool:
    """Whether tensors of these names hold biases of queries, keys and values: `bias` alone does not tell.

    The authors' earlier code puts biases into the MLP alone, their later code into `attn.qkv` too.
    """
    return any(name.endswith(".attn.qkv.bias") for name in names)


def check_positive_integers(published: dict[str, Any], keys: tuple[str, ...], file: str = "config.json") -> None:
    """Refuse a published config where one of `keys` is missing or not a positive integer (`CheckpointError`, named)."""
    for key in keys:
        if key not in published:
            raise CheckpointError(f"{file} has no {key!r}; needed are {', '.join(keys)}." + nearest(key, published))
        value = published[key]
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise CheckpointError(f"{file}: {key} is {value!r:.100}, expected a positive integer.")


def check_switches(published: dict[str, Any], keys: tuple[str, ...], file: str = "config.json") -> None:
    """Refuse a published config where one of `keys` is there and neither true nor false (`CheckpointError`, named)."""
    for key in keys:
        if not isinstance(published.get(key, False), bool):
            raise CheckpointError(f"{file}: {key} is {published[key]!r:.100}, expected true or false.")


def _check_other_keys(published: dict[str, Any]) -> None:
    """Refuse keys that would change the forward pass, and warn of those that nobody knows."""
    if not isinstance(published.get("tokenizer"), str | None):
        raise CheckpointError(f"config.json: tokenizer is {published['tokenizer']!r:.100}, expected a name or null.")
    for key, neutral in NOT_IMPLEMENTED.items():
        if published.get(key) not in (None, neutral):
            raise CheckpointError(
                f"config.json: {key} is {published[key]!r:.100}, which bilens does not implement; it reads models "
                f"where {key} is {neutral!r} or absent."
            )
    implemented = {*NEEDED_KEYS, *SWITCHES, "gate", "attention", "attention2", "attention_scale", "d_head"}
    known = {*implemented, *NOT_IMPLEMENTED, *HARMLESS, "residual_scale", *PretrainedConfig().to_dict()}
    if unknown := sorted(published.keys() - known):
        warnings.warn(f"config.json: bilens does not know the keys {unknown} and does not use them.", stacklevel=3)


def config_to_published(cfg: BilinearTransformerConfig) -> dict[str, Any]:
    """The published `config.json` of a model: what was read, overwritten by what the model is now."""
    architectures = cfg.published.get("architectures") or ["Transformer"]
    return {
        "repo": cfg.model_name,
        **cfg.published,
        "architectures": [*(name for name in architectures if name != HF_ARCHITECTURE), HF_ARCHITECTURE],
        "model_type": MODEL_TYPE,
        "n_head": cfg.n_heads,
        "n_layer": cfg.n_layers,
        "n_ctx": cfg.n_ctx,
        "d_model": cfg.d_model,
        "d_hidden": cfg.d_mlp,
        "bilinear": cfg.bilinear,
        "gate": cfg.gate,
        "bias": cfg.bias,
        "normalization": cfg.normalization_type is not None,
        "tokenizer": cfg.tokenizer_name,
        # Code of the authors does not know these, or the older does not: they are written where they say something.
        **({"attention_bias": True} if cfg.attention_bias else {}),
        **({} if cfg.scale_attn else {"scale_attn": False}),
        **({} if cfg.residual_scale == cfg.implied_residual_scale else {"residual_scale": cfg.residual_scale}),
        **({} if cfg.rotary else {"rotary": False}),
        **({} if cfg.n_heads * cfg.d_head == cfg.d_model else {"d_head": cfg.d_head}),
        **({} if cfg.attention == "softmax" else _attention_to_published(cfg)),
    }


def _attention_to_published(cfg: BilinearTransformerConfig) -> dict[str, Any]:
    """The keys of polynomial attention; the authors' own code reads the second."""
    bilinear = {"attention2": True} if cfg.attention == "bilinear" else {}
    return {"attention": cfg.attention, "attention_scale": cfg.attention_scale, **bilinear}
