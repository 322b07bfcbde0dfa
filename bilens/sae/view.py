"""What the mathematics needs of an SAE: linear reads, linear writes, and a check that it has them.

SAELens' classes differ in what their stored weights mean: decoder norms folded or applied at run time, `b_dec`
subtracted from the input or not, activations normalised per token or not. `SAEView` gives the effective directions, so
that for every token (with its activation scale frozen)

    pre-activation  z_i = a e_i . (y - m) + b_i           b_i less e_i . b_dec, where b_dec is subtracted from the input
    reconstruction  x^  = sum_i f_i (r d_i) + r b_dec + m

The pre-activation is what the activation function is given: of a gated SAE that of its magnitudes, with the gate, like
the choice of a top-k, deciding afterwards which features are let through.
"""

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from sae_lens import SAE
from torch import Tensor

from bilens._core.checks import check_finite
from bilens._core.fingerprint import Snapshot
from bilens.errors import ArgumentError, SAEMismatchError, nearest
from bilens.model.attached import make_picklable

LINEAR_ENCODERS = (
    "standard",
    "topk",
    "abstopk",
    "batchtopk",
    "matryoshka_batchtopk",
    "jumprelu",
    "gated",
    "bilens_scope",
)
# Their features are fitted one after the other, so they have linear writes but no linear reads.
LINEAR_DECODERS = (*LINEAR_ENCODERS, "matching_pursuit")
LAYER_NORM_EPS = 1e-5  # SAELens' own


@dataclass(frozen=True)
class FrozenNorm:
    """An SAE's normalisation, token by token: `(x - shift) * scale_in` goes in, `* scale_out + shift` comes out."""

    scale_in: Float[Tensor, "*batch"]
    scale_out: Float[Tensor, "*batch"]
    shift: Float[Tensor, "*batch"]


@dataclass(frozen=True)
class SAEView:
    """An SAE as directions in the space it reads and writes.

    Attributes:
        sae: the SAE that is read.
        given: the SAE that `sae` is a float32 copy of, where it is in half precision.

    Raises:
        CheckpointError: weights that are not finite.
        SAEMismatchError: a kind of SAE without one linear write per feature.
    """

    sae: SAE[Any]
    given: SAE[Any] | None = None
    _snapshot: Snapshot | None = field(default=None, repr=False)

    @classmethod
    def of(cls, sae: SAE[Any]) -> "SAEView":
        """In float32 at least: directions are exact only where the SAE's own rounding is."""
        if not isinstance(sae, SAE):
            raise ArgumentError(f"{sae!r:.80} is no SAE; bilens.load_sae gives one.")
        if torch.finfo(sae.dtype).bits >= 32:
            return cls(sae)
        return cls(copy.deepcopy(sae).to(torch.float32), sae, Snapshot(saes={"the SAE": sae}))

    def current(self) -> "SAEView":
        """This view, or one of the SAE as it is now: a float32 copy does not follow what it was copied from."""
        halved = torch.finfo(self.sae.dtype).bits < 32
        return SAEView.of(self.original) if halved or (self._snapshot and self._snapshot.changed()) else self

    @property
    def original(self) -> SAE[Any]:
        """The SAE that was given."""
        return self.sae if self.given is None else self.given

    def __post_init__(self) -> None:
        make_picklable(self.sae)
        architecture = self.sae.cfg.architecture()
        if "transcoder" in architecture:
            raise SAEMismatchError(
                f"a {architecture} reads one place and writes another, so its features are no parts of either's "
                "activation. Its directions can be given as outputs themselves, such as W_dec of one that writes "
                "hook_mlp_out: interaction(transcoder.W_dec[3])."
            )
        if architecture not in LINEAR_DECODERS:
            raise SAEMismatchError(
                f"an SAE of architecture {architecture!r} has no single linear write per feature; "
                f"expected one of {', '.join(LINEAR_DECODERS)}." + nearest(architecture, LINEAR_DECODERS)
            )
        if self.sae.cfg.reshape_activations != "none":
            raise SAEMismatchError("an SAE on reshaped activations (hook_z) does not read the residual stream.")
        for name, weight in self.sae.named_parameters():
            check_finite(name, weight.detach(), f"the SAE on {self.hook_name!r}")

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
        return self.sae.W_dec.detach().norm(dim=-1) if rescaled else None

    @property
    def encoder(self) -> Float[Tensor, "d_sae d_model"]:
        """Encoder directions `e_i`.

        Raises:
            SAEMismatchError: a bilinear encoder or matching pursuit, which have none.
        """
        if self.has_bilinear_encoder:
            raise SAEMismatchError(
                "this SAE has a bilinear encoder: a feature is a product of two reads, so it has no encoder direction. "
                'Use side="decoder", or an SAE with a linear encoder.'
            )
        architecture = self.sae.cfg.architecture()
        if architecture not in LINEAR_ENCODERS:
            raise SAEMismatchError(
                f"an SAE of architecture {architecture!r} fits its features one after the other, so a feature has no "
                f'encoder direction. Use side="decoder", or one of {", ".join(LINEAR_ENCODERS)}.'
            )
        rows = self.sae.W_enc.detach().T
        if self._norms is not None:
            rows = rows * self._norms[:, None]
        return rows * self.sae.r_mag.detach().exp()[:, None] if architecture == "gated" else rows

    @property
    def encoder_bias(self) -> Float[Tensor, "d_sae"]:
        """`b_i`: what of the pre-activation does not come from the input, the read of a subtracted `b_dec` included."""
        rows = self.encoder
        bias = getattr(self.sae, "b_mag" if self.sae.cfg.architecture() == "gated" else "b_enc", None)
        bias = rows.new_zeros(self.d_sae) if bias is None else bias.detach()
        if self._norms is not None:
            bias = bias * self._norms
        return bias - rows @ self.b_dec if self.sae.cfg.apply_b_dec_to_input else bias

    @property
    def decoder(self) -> Float[Tensor, "d_sae d_model"]:
        """Decoder directions `d_i`: what one unit of activation adds to the reconstruction."""
        W_dec = self.sae.W_dec.detach()
        return W_dec if self._norms is None else W_dec / self._norms[:, None]

    @property
    def b_dec(self) -> Float[Tensor, "d_model"]:
        return self.sae.b_dec.detach()

    def directions(self, side: str) -> Float[Tensor, "d_sae d_model"]:
        """Encoder or decoder directions by name."""
        if side == "encoder":
            return self.encoder
        if side == "decoder":
            return self.decoder
        raise ArgumentError(
            f"side {side!r} is not 'encoder' or 'decoder'." + nearest(str(side), ("encoder", "decoder"))
        )

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
        return seen[0] if self._norms is None else seen[0] * self._norms

    def frozen_norm(self, x: Float[Tensor, "*batch d_model"]) -> FrozenNorm:
        """The SAE's run-time normalisation of each token."""
        one, zero = x.new_ones(x.shape[:-1]), x.new_zeros(x.shape[:-1])
        kind = self.sae.cfg.normalize_activations
        if kind == "constant_norm_rescale":
            scale = self.d_in**0.5 / x.norm(dim=-1)
            return FrozenNorm(scale, 1 / scale, zero)
        if kind == "layer_norm":
            shift = x.mean(-1)
            std = (x - shift[..., None]).std(-1)
            return FrozenNorm(1 / (std + LAYER_NORM_EPS), std, shift)
        return FrozenNorm(one, one, zero)
