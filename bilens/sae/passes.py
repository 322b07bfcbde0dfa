"""An SAE on a forward pass, in parts that add up: its active features' writes, `b_dec`, and what it misses.

The SAE's own run-time normalisation is frozen position by position, so that reconstructions are sums and a feature's
pre-activation is a linear read.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bilens.model.hook_points import point_of
from bilens.sae.view import LINEAR_ENCODERS, SAEView

WRITES_BYTES = 2**26  # of the features' writes held at a time


@dataclass(frozen=True)
class SAEPass:
    """One SAE on one text: its active features, filled up to one length `s` at every position.

    Attributes:
        view: the SAE as directions.
        hook, point, layer: the place of the SAE.
        features, values, real: the active features of each position, their activations, and which are not filling.
        b_dec: the reconstruction without any feature.
        error: the part that the reconstruction misses.
        scale_in, scale_out, shift: the frozen normalisation.
    """

    view: SAEView
    hook: str
    point: str
    layer: int
    features: Int[Tensor, "p s"]
    values: Float[Tensor, "p s"]
    real: Bool[Tensor, "p s"]
    b_dec: Float[Tensor, "p d_model"]
    error: Float[Tensor, "p d_model"]
    scale_in: Float[Tensor, "p"]
    scale_out: Float[Tensor, "p"]
    shift: Float[Tensor, "p"]

    @classmethod
    def of(cls, view: SAEView, hook: str, x: Float[Tensor, "p d_model"], dtype: torch.dtype) -> "SAEPass":
        """An SAE on what its hook has at some positions, with algebra in `dtype`."""
        point, layer = point_of(hook)
        features, values, real = padded_nonzero(view.activations(x))
        norm = view.frozen_norm(x.to(dtype))
        b_dec = view.b_dec.to(dtype) * norm.scale_out[:, None] + norm.shift[:, None]
        without = cls(
            view, hook, point, layer, features, values, real, b_dec, x.to(dtype) - b_dec,
            norm.scale_in, norm.scale_out, norm.shift,
        )  # fmt: skip
        error = without.error.clone()
        for at in without.blocks(len(x)):
            error[at] -= without.writes(at).sum(1)
        return replace(without, error=error)

    @property
    def label(self) -> str:
        """`2-mlp-in`, the way the folders of SAEs begin."""
        return f"{self.layer}-{self.point}"

    @property
    def has_reads(self) -> bool:
        """Whether a feature is a linear read: not with a bilinear encoder, and not in matching pursuit."""
        return not self.view.has_bilinear_encoder and self.view.sae.cfg.architecture() in LINEAR_ENCODERS

    @cached_property
    def _decoder(self) -> Float[Tensor, "d_sae d_model"]:
        return self.view.decoder

    def writes(self, *at: Any) -> Float[Tensor, "*n d_model"]:
        """The part of the reconstruction that active features add, `f_i d_i`.

        They are made when they are asked for: all of a text with a dense SAE would fill gigabytes.

        Args:
            at: which, as an index of `features`: positions, or positions and slots.
        """
        amounts = self.values[at].to(self.error) * self.scale_out[:, None].expand_as(self.values)[at]
        return self._decoder[self.features[at]].to(amounts) * amounts[..., None]

    def blocks(self, n: int) -> tuple[Int[Tensor, "b"], ...]:
        """The places of `n` positions, as many at a time as have writes of `WRITES_BYTES`."""
        row = self.features.shape[1] * self.error.shape[1] * self.error.element_size()
        return torch.arange(n, device=self.error.device).split(max(1, WRITES_BYTES // max(row, 1)))

    @cached_property
    def _encoder_bias(self) -> Float[Tensor, "d_sae"]:
        return self.view.encoder_bias.to(self.error)

    def reads(
        self, positions: Int[Tensor, "t"], features: Int[Tensor, "t"]
    ) -> tuple[Float[Tensor, "t d_model"], Float[Tensor, "t"]]:
        """`(r, c)` with pre-activation `r . y + c` at the SAE's hook.

        Raises:
            SAEMismatchError: an SAE without linear reads.
        """
        rows = self.view.encoder[features].to(self.error)
        scale = self.scale_in[positions]
        constants = self._encoder_bias[features] - scale * self.shift[positions] * rows.sum(-1)
        return rows * scale[:, None], constants

    def sources(
        self, scale: Float[Tensor, "p"], positions: int | Int[Tensor, "n"]
    ) -> tuple[Float[Tensor, "*n source d_model"], Float[Tensor, "source"]]:
        """What an MLP's input is made of: each active feature's write, `b_dec`, the error, and the constant that MLP
        biases multiply; and each one's last homogeneous coordinate (1 for the last).

        Args:
            scale: the divisor of the norm in front of the MLP, for an SAE in front of that.
            positions: several, with the filling; at one there is none.
        """
        one = isinstance(positions, int)
        writes = self.writes(positions, self.real[positions]) if one else self.writes(positions)
        parts = torch.cat([writes, self.b_dec[positions].unsqueeze(-2), self.error[positions].unsqueeze(-2)], -2)
        if self.point == "resid-mid":
            parts = parts / scale[positions][..., None, None]
        sources = torch.cat([parts, torch.zeros_like(parts[..., :1, :])], -2)
        ones = sources.new_zeros(sources.shape[-2])
        ones[-1] = 1.0
        return sources, ones


def padded_nonzero(
    values: Float[Tensor, "p n"],
) -> tuple[Tensor, Float[Tensor, "p s"], Bool[Tensor, "p s"]]:
    """The nonzero entries of every row in ascending order, rows filled up to one length.

    Returns:
        indices (0 where filled up), values (0 there), and which are real.
    """
    active = values != 0
    counts = active.sum(1)
    width = int(counts.max()) if len(values) else 0
    rows, columns = active.nonzero(as_tuple=True)
    starts = counts.cumsum(0) - counts
    slots = torch.arange(len(rows), device=values.device) - starts[rows]
    indices = rows.new_zeros(len(values), width)
    indices[rows, slots] = columns
    real = torch.arange(width, device=values.device) < counts[:, None]
    return indices, values.gather(1, indices) * real, real
