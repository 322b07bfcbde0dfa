"""The configuration of a bilinear transformer, and its translation from and to the published `config.json`.

TransformerLens reads a `TransformerLensConfig`; the published checkpoints carry a flat JSON of other names. The second
is kept whole in `cfg.published`, so that saving gives back every key that loading saw.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from transformer_lens.config import TransformerLensConfig

from bilens.errors import CheckpointError, nearest

NEEDED_KEYS = ("n_head", "n_layer", "n_ctx", "d_model", "d_hidden")
# What `bilens.hf` is registered under; the Auto classes and TransformerLens find it by these.
MODEL_TYPE, HF_ARCHITECTURE = "bilinear", "BilinearForCausalLM"
GATES = (None, "relu", "silu", "gelu")


@dataclass
class BilinearTransformerConfig(TransformerLensConfig):
    """A `TransformerLensConfig` with the fields of the bilinear MLP.

    Args:
        bilinear: two branches multiplied (true), or a plain one-branch MLP (false).
        gate: activation on the left branch (`None` is the identity: the bilinear model), or of the one branch.
        bias: biases in the MLP (attention has none).
        tokenizer_name: the published name of the tokenizer (`ts-4096`, `mistral`, `gpt2`) or a hub id.
        model_name: where the model came from; SAELens writes it into the SAEs it trains.
        init_range: standard deviation of new weights.
        published: the `config.json` as it was read, keys that bilens does not use included.
    """

    bilinear: bool = True
    gate: str | None = None
    bias: bool = False
    tokenizer_name: str | None = None
    model_name: str = "bilinear"
    init_range: float = 0.02
    published: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gate not in GATES:
            raise CheckpointError(
                f"config: gate {self.gate!r} is not one of null, relu, silu, gelu."
                + nearest(str(self.gate), [g for g in GATES if g])
            )
        if self.d_model != self.n_heads * self.d_head:
            raise CheckpointError(f"config: d_model {self.d_model} is not divisible by n_head {self.n_heads}.")
        if self.d_head % 2:
            raise CheckpointError(f"config: d_head {self.d_head} is odd; rotary positions need an even one.")
        self.gated_mlp = self.bilinear
        self.act_fn = self.gate or "identity"
        self.positional_embedding_type = "rotary"
        self.eps = 1e-8
        self.attn_only = False
        self.uses_rms_norm = self.normalization_type is not None

    @property
    def is_bilinear(self) -> bool:
        """Whether the MLP is an exact quadratic form: two branches and no gate."""
        return self.bilinear and self.gate is None

    @property
    def residual_scale(self) -> float:
        """`s = 1 / sqrt(2 n_layers)`, the factor on attention's output (DESIGN: folded into `W_O`)."""
        return (2 * self.n_layers) ** -0.5


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
        device, dtype: where and in what precision the model will live.
        model_name: recorded in `cfg.model_name`.

    Raises:
        CheckpointError: a needed key is missing or not a positive integer, or a gate is unknown.
    """
    check_positive_integers(published, NEEDED_KEYS)
    n_heads, d_model = published["n_head"], published["d_model"]
    if d_model % n_heads:
        raise CheckpointError(f"config.json: d_model {d_model} is not divisible by n_head {n_heads}.")
    return BilinearTransformerConfig(
        d_model=d_model,
        d_head=d_model // n_heads,
        n_layers=published["n_layer"],
        n_ctx=published["n_ctx"],
        n_heads=n_heads,
        d_mlp=published["d_hidden"],
        d_vocab=d_vocab,
        device=device,
        dtype=dtype,
        normalization_type="RMSPre" if published.get("normalization", True) else None,
        bilinear=published.get("bilinear", True),
        gate=published.get("gate"),
        bias=published.get("bias", False),
        tokenizer_name=published.get("tokenizer"),
        model_name=model_name,
        published=dict(published),
    )


def check_positive_integers(published: dict[str, Any], keys: tuple[str, ...]) -> None:
    """Refuse a published config where one of `keys` is missing or not a positive integer (`CheckpointError`, named)."""
    for key in keys:
        if key not in published:
            raise CheckpointError(
                f"config.json has no {key!r}; needed are {', '.join(keys)}." + nearest(key, published)
            )
        value = published[key]
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise CheckpointError(f"config.json: {key} is {value!r}, expected a positive integer.")


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
    }
