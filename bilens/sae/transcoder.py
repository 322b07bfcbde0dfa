"""Transcoders in training: SAELens has the classes that transcoders are used as, not those that train them.

A batch is the activation read and the activation written, side by side, `(batch, d_in + d_out)`. SAELens' training
classes become transcoders by three overrides: they encode the first part, are scored against the second, and decode
into `d_out`.

    training class               saved and used as
    TopKTranscoderTraining       TopKTranscoder, here: SAELens has none
    BatchTopKTranscoderTraining  SAELens' JumpReLUTranscoder, the threshold being the one learned
    JumpReLUTranscoderTraining   SAELens' JumpReLUTranscoder

Importing this module registers them.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from sae_lens import (
    BatchTopKTrainingSAE,
    BatchTopKTrainingSAEConfig,
    JumpReLUTrainingSAE,
    JumpReLUTrainingSAEConfig,
    TopKTrainingSAE,
    TopKTrainingSAEConfig,
)
from sae_lens.registry import (
    SAE_CLASS_REGISTRY,
    SAE_TRAINING_CLASS_REGISTRY,
    register_sae_class,
    register_sae_training_class,
)
from sae_lens.saes.sae import SAEConfig, TrainStepInput, TrainStepOutput, mse_loss
from sae_lens.saes.topk_sae import TopK
from sae_lens.saes.transcoder import JumpReLUTranscoderConfig, Transcoder, TranscoderConfig
from torch import Tensor, nn


@dataclass
class TopKTranscoderConfig(TranscoderConfig):
    """SAELens' configuration of a transcoder, and `k`: how many features are kept, the largest; none is negative."""

    k: int = 32
    apply_b_dec_to_input: bool = False

    @classmethod
    def architecture(cls) -> str:
        return "bilens_topk_transcoder"


class TopKTranscoder(Transcoder):
    """`W_dec topk_k(relu(W_enc x + b_enc)) + b_dec`."""

    cfg: TopKTranscoderConfig

    def get_activation_fn(self) -> Callable[[Tensor], Tensor]:
        return TopK(self.cfg.k)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any]) -> "TopKTranscoder":
        return cls(TopKTranscoderConfig.from_dict(config_dict))


class TranscoderTraining:
    """What makes a SAELens training class a transcoder's: to stand before it among the bases."""

    cfg: Any

    def __init__(self, cfg: Any, use_error_term: bool = False):
        super().__init__(cfg, use_error_term)  # type: ignore[call-arg]
        self.mse_loss_fn = lambda out, both: mse_loss(out, self._target(both))

    def initialize_weights(self: Any) -> None:
        """Encoder and decoder rows start independent of each other, and of the norm that SAELens gives decoder rows."""
        super().initialize_weights()  # type: ignore[misc]
        norm = self.cfg.decoder_init_norm
        like = {"dtype": self.dtype, "device": self.device}
        for name, d in (("W_enc", self.cfg.d_in), ("W_dec", self.cfg.d_out)):
            rows = torch.randn(self.cfg.d_sae, d, **like)
            rows = rows if norm is None else rows * (norm / rows.norm(dim=-1, keepdim=True))
            setattr(self, name, nn.Parameter(rows.T.contiguous() if name == "W_enc" else rows))
        self.b_dec = nn.Parameter(torch.zeros(self.cfg.d_out, **like))

    def process_sae_in(self: Any, sae_in: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d_in"]:
        """What is read: all of an input, the first part of a training batch."""
        return self.hook_sae_input(sae_in[..., : self.cfg.d_in].to(self.dtype))

    def calculate_aux_loss(
        self, step_input: TrainStepInput, feature_acts: Tensor, hidden_pre: Tensor, sae_out: Tensor
    ) -> Any:
        target = replace(step_input, sae_in=self._target(step_input.sae_in))
        return super().calculate_aux_loss(target, feature_acts, hidden_pre, sae_out)  # type: ignore[misc]

    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        output = super().training_forward_pass(step_input)  # type: ignore[misc]
        return replace(output, sae_in=self._target(output.sae_in))

    @torch.no_grad()
    def fold_scales(self: Any, scale_in: float, scale_out: float) -> None:
        """From reading `scale_in x` and writing `scale_out y` to reading x and writing y, with the same choices."""
        self.fold_activation_norm_scaling_factor(scale_out)
        self.W_enc.data *= scale_in / scale_out

    def _target(self, both: Float[Tensor, "*batch d_both"]) -> Float[Tensor, "*batch d_out"]:
        return both[..., self.cfg.d_in :]


@dataclass
class TopKTranscoderTrainingConfig(TopKTrainingSAEConfig):
    """SAELens' configuration of a top-k SAE in training, and `d_out`."""

    d_out: int = 768
    apply_b_dec_to_input: bool = False

    @classmethod
    def architecture(cls) -> str:
        return TopKTranscoderConfig.architecture()


class TopKTranscoderTraining(TranscoderTraining, TopKTrainingSAE):
    """A top-k transcoder in training."""


@dataclass
class BatchTopKTranscoderTrainingConfig(BatchTopKTrainingSAEConfig):
    """SAELens' configuration of a batch-top-k SAE in training, and `d_out`."""

    d_out: int = 768
    apply_b_dec_to_input: bool = False

    @classmethod
    def architecture(cls) -> str:
        return "bilens_batchtopk_transcoder"

    def get_inference_config_class(self) -> type[SAEConfig]:
        return JumpReLUTranscoderConfig


class BatchTopKTranscoderTraining(TranscoderTraining, BatchTopKTrainingSAE):
    """A batch-top-k transcoder in training."""


@dataclass
class JumpReLUTranscoderTrainingConfig(JumpReLUTrainingSAEConfig):
    """SAELens' configuration of a JumpReLU SAE in training, and `d_out`."""

    d_out: int = 768
    apply_b_dec_to_input: bool = False

    @classmethod
    def architecture(cls) -> str:
        return JumpReLUTranscoderConfig.architecture()


class JumpReLUTranscoderTraining(TranscoderTraining, JumpReLUTrainingSAE):
    """A JumpReLU transcoder in training."""


SAE_CLASS_REGISTRY.pop(TopKTranscoderConfig.architecture(), None)  # a reload in a notebook registers the new classes
register_sae_class(TopKTranscoderConfig.architecture(), TopKTranscoder, TopKTranscoderConfig)
for training_class, config_class in (
    (TopKTranscoderTraining, TopKTranscoderTrainingConfig),
    (BatchTopKTranscoderTraining, BatchTopKTranscoderTrainingConfig),
    (JumpReLUTranscoderTraining, JumpReLUTranscoderTrainingConfig),
):
    SAE_TRAINING_CLASS_REGISTRY.pop(config_class.architecture(), None)
    register_sae_training_class(config_class.architecture(), training_class, config_class)
