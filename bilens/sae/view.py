"""What the mathematics needs of an SAE: linear reads, linear writes, and a check that it has them.

SAELens' classes differ in what their stored weights mean: decoder norms folded or applied at run time, `b_dec`
subtracted from the input or not, activations normalised per token or not. `SAEView` gives the effective directions, so
that for every token (with its activation scale frozen)

    pre-activation  z_i = e_i . (a (y - m) - s b_dec) + b_i          s = 1 where b_dec is subtracted, else 0
    reconstruction  x^  = sum_i f_i (r d_i) + r b_dec + m
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from sae_lens import SAE
from torch import Tensor

from bilens.errors import SAEMismatchError

LINEAR_ENCODERS = ("standard", "topk", "batchtopk", "jumprelu", "matryoshka_batchtopk", "bilens_scope")
LAYER_NORM_EPS = 1e-5  # SAELens' own


@dataclass(frozen=True)
class FrozenNorm:
    """An SAE's normalisation at one token: `(x - shift) * scale_in` goes in, `* scale_out + shift` comes out."""

    scale_in: Float[Tensor, ""]
    scale_out: Float[Tensor, ""]
    shift: Float[Tensor, ""]


@dataclass(frozen=True)
class SAEView:
    """An SAE as directions in the space it reads and writes."""

    sae: SAE[Any]

    def __post_init__(self) -> None:
        architecture = self.sae.cfg.architecture()
        if architecture not in LINEAR_ENCODERS:
            raise SAEMismatchError(
                f"an SAE of architecture {architecture!r} has no single linear read and write per feature; "
                f"expected one of {', '.join(LINEAR_ENCODERS)}."
            )
        if self.sae.cfg.reshape_activations != "none":
            raise SAEMismatchError("an SAE on reshaped activations (hook_z) does not read the residual stream.")

    @property
    def hook_name(self) -> str | None:
        """The hook it was trained on, where its metadata says so."""
        return self.sae.cfg.metadata.hook_name

    @property
    def d_sae(self) -> int:
        return self.sae.cfg.d_sae

    @property
    def d_in(self) -> int:
        return self.sae.cfg.d_in

    @property
    def has_bilinear_encoder(self) -> bool:
        return bool(getattr(self.sae.cfg, "bilinear_encoder", False))

    @property
    def _norms(self) -> Float[Tensor, "d_sae"] | None:
        """Decoder norms, where the SAE multiplies its activations by them at run time."""
        rescaled = getattr(self.sae.cfg, "rescale_acts_by_decoder_norm", False)
        return self.sae.W_dec.norm(dim=-1) if rescaled else None

    @property
    def encoder(self) -> Float[Tensor, "d_sae d_model"]:
        """Encoder directions `e_i`.

        Raises:
            SAEMismatchError: a bilinear encoder, which has none.
        """
        if self.has_bilinear_encoder:
            raise SAEMismatchError(
                "this SAE has a bilinear encoder: a feature is a product of two reads, so it has no encoder direction. "
                'Use side="decoder", or an SAE with a linear encoder.'
            )
        W_enc = self.sae.W_enc.detach().T
        return W_enc if self._norms is None else W_enc * self._norms.detach()[:, None]

    @property
    def encoder_bias(self) -> Float[Tensor, "d_sae"]:
        bias = getattr(self.sae, "b_enc", None)
        if bias is None:
            return self.sae.b_dec.new_zeros(self.d_sae)
        return bias.detach() if self._norms is None else bias.detach() * self._norms.detach()

    @property
    def decoder(self) -> Float[Tensor, "d_sae d_model"]:
        """Decoder directions `d_i`: what one unit of activation adds to the reconstruction."""
        W_dec = self.sae.W_dec.detach()
        return W_dec if self._norms is None else W_dec / self._norms.detach()[:, None]

    @property
    def b_dec(self) -> Float[Tensor, "d_model"]:
        return self.sae.b_dec.detach()

    @property
    def subtracts_b_dec(self) -> bool:
        return bool(self.sae.cfg.apply_b_dec_to_input)

    def directions(self, side: str) -> Float[Tensor, "d_sae d_model"]:
        """Encoder or decoder directions by name."""
        if side == "encoder":
            return self.encoder
        if side == "decoder":
            return self.decoder
        raise ValueError(f"side {side!r} is not 'encoder' or 'decoder'.")

    @torch.no_grad()
    def activations(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_sae"]:
        """Feature activations, as the SAE itself gives them."""
        return self.sae.encode(x.to(self.sae.dtype))

    @torch.no_grad()
    def pre_activations(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_sae"]:
        """What the SAE's activation function is given: read from its own forward pass, not from the directions."""
        seen: list[Tensor] = []
        with self.sae.hooks(fwd_hooks=[("hook_sae_acts_pre", lambda acts, hook: seen.append(acts))]):  # type: ignore[func-returns-value]
            self.sae.encode(x.to(self.sae.dtype))
        return seen[0] if self._norms is None else seen[0] * self._norms.detach()

    def frozen_norm(self, x: Float[Tensor, "d_model"]) -> FrozenNorm:
        """The SAE's run-time normalisation at one token."""
        one, zero = x.new_ones(()), x.new_zeros(())
        kind = self.sae.cfg.normalize_activations
        if kind == "constant_norm_rescale":
            scale = self.d_in**0.5 / x.norm()
            return FrozenNorm(scale, 1 / scale, zero)
        if kind == "layer_norm":
            shift = x.mean()
            std = (x - shift).std()
            return FrozenNorm(1 / (std + LAYER_NORM_EPS), std, shift)
        return FrozenNorm(one, one, zero)
