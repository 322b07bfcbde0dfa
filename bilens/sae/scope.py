"""The published SAEs (`tdooms/<model>-scope`) as a SAELens class.

    pre = W_enc (x - b_dec) + b_enc          with a bilinear encoder, the product of the two halves of this
    f   = topk_k(pre)                        by signed value; no ReLU, so kept negatives stay negative
    x'  = W_dec f + b_dec

SAELens' own `TopKSAE` differs in the second line. Importing this module registers the class, after which
`SAE.load_from_disk` reads what `ScopeSAE.save_model` wrote, and with it `ScopeTrainingSAE`, which SAELens' trainers
train.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.registry import (
    SAE_CLASS_REGISTRY,
    SAE_TRAINING_CLASS_REGISTRY,
    register_sae_class,
    register_sae_training_class,
)
from sae_lens.saes.sae import SAE, SAEConfig
from torch import Tensor, nn

ARCHITECTURE = "bilens_scope"


class _Published:
    """What the configurations of a published SAE, trained or in training, have in common; before SAELens' class."""

    k: int
    d_sae: int
    bilinear_encoder: bool

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[misc]
        if not 1 <= self.k <= self.d_sae:
            raise ValueError(f"k is {self.k}, expected between 1 and d_sae = {self.d_sae}.")

    @property
    def d_enc(self) -> int:
        """Columns of `W_enc`: left then right with a bilinear encoder."""
        return 2 * self.d_sae if self.bilinear_encoder else self.d_sae

    @classmethod
    def architecture(cls) -> str:
        return ARCHITECTURE


@dataclass
class ScopeSAEConfig(_Published, SAEConfig):
    """Configuration of a published SAE.

    Args:
        k: the number of features that stay active, those with the largest signed pre-activations.
        bilinear_encoder: pre-activations are products of two linear maps.
    """

    k: int = 30
    bilinear_encoder: bool = False


def signed_topk(pre_acts: Float[Tensor, "*batch d_sae"], k: int) -> Float[Tensor, "*batch d_sae"]:
    """The `k` largest entries of each row where they were, zeros elsewhere; the kept may be negative.

    Source: the published training code, which keeps `x * mask` and has no ReLU.
    """
    values, indices = pre_acts.topk(k, dim=-1, sorted=False)
    return torch.zeros_like(pre_acts).scatter(-1, indices, values)


class ScopeSAE(SAE[ScopeSAEConfig]):
    """A published SAE.

    Weights have SAELens' names and shapes: `W_enc (d_in, d_sae)`, or `(d_in, 2 d_sae)` with a bilinear encoder;
    `b_enc`, zeros where the SAE has no encoder bias; `W_dec (d_sae, d_in)`; `b_dec (d_in)`.
    """

    b_enc: nn.Parameter

    def initialize_weights(self) -> None:
        super().initialize_weights()
        _initialize_encoder(self)

    def get_activation_fn(self) -> Callable[[Tensor], Tensor]:
        return partial(signed_topk, k=self.cfg.k)

    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """Feature activations: at most `k` nonzero per input, of either sign."""
        return self.hook_sae_acts_post(self.activation_fn(_pre_activations(self, x)))

    def decode(self, feature_acts: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_in"]:
        """The reconstruction `W_dec f + b_dec`."""
        recons = self.hook_sae_recons(feature_acts @ self.W_dec + self.b_dec)
        return self.reshape_fn_out(self.run_time_activation_norm_fn_out(recons), self.d_head)

    def fold_W_dec_norm(self) -> None:
        """Refused, as SAELens does for top-k: rescaled pre-activations would select other features."""
        raise NotImplementedError("folding decoder norms into the encoder would change which k features are kept.")


@dataclass
class ScopeTrainingSAEConfig(_Published, TopKTrainingSAEConfig):
    """Configuration of one that is to be trained: SAELens' of top-k, with decoder norms left alone, and what differs.

    Args:
        bilinear_encoder: the same as in `ScopeSAEConfig`.
        encoder_bias: train `b_enc`; otherwise it stays zero.
    """

    rescale_acts_by_decoder_norm: bool = False
    bilinear_encoder: bool = False
    encoder_bias: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rescale_acts_by_decoder_norm:
            raise ValueError("rescale_acts_by_decoder_norm is not what a published SAE computes.")


class ScopeTrainingSAE(TopKTrainingSAE):
    """A published SAE in training; `save_inference_model` writes a `ScopeSAE` of the same function.

    Loss, auxiliary loss for dead features included, and decoder are those of SAELens' top-k.
    """

    cfg: ScopeTrainingSAEConfig

    def initialize_weights(self) -> None:
        super().initialize_weights()
        _initialize_encoder(self)
        self.b_enc.requires_grad_(self.cfg.encoder_bias)

    def get_activation_fn(self) -> Callable[[Tensor], Tensor]:
        return partial(signed_topk, k=self.cfg.k)

    def encode_with_hidden_pre(
        self, x: Float[Tensor, "*batch d_in"]
    ) -> tuple[Float[Tensor, "*batch d_sae"], Float[Tensor, "*batch d_sae"]]:
        """Feature activations, and what they were chosen from."""
        pre = _pre_activations(self, x)
        return self.hook_sae_acts_post(self.activation_fn(pre)), pre


def _initialize_encoder(sae: Any) -> None:
    """`b_enc`, and `W_enc` where it is not as SAELens makes it."""
    sae.b_enc = nn.Parameter(torch.zeros(sae.cfg.d_enc, dtype=sae.dtype, device=sae.device))
    if sae.cfg.bilinear_encoder:
        rows = torch.empty(sae.cfg.d_enc, sae.cfg.d_in, dtype=sae.dtype, device=sae.device)
        sae.W_enc = nn.Parameter(nn.init.kaiming_uniform_(rows).T.contiguous())


def _pre_activations(sae: Any, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
    """`W_enc (x - b_dec) + b_enc`, with a bilinear encoder the product of its halves."""
    pre = sae.process_sae_in(x) @ sae.W_enc + sae.b_enc
    if sae.cfg.bilinear_encoder:
        left, right = pre.chunk(2, dim=-1)
        pre = left * right
    return sae.hook_sae_acts_pre(pre)


for registry in (SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY):
    registry.pop(ARCHITECTURE, None)  # a reload in a notebook registers the new class
register_sae_class(ARCHITECTURE, ScopeSAE, ScopeSAEConfig)
register_sae_training_class(ARCHITECTURE, ScopeTrainingSAE, ScopeTrainingSAEConfig)
