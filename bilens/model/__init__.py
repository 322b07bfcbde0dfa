"""The model: its configuration, the forward pass, text and generation, and the classes other libraries know it by."""

import logging
import os

import transformer_lens  # noqa: F401
from transformers.utils.logging import log_levels

from bilens._core.warnings_of_transformers import LEVEL_BEFORE

if LEVEL_BEFORE is not None:  # 0 is that nothing was set yet, so that the default holds
    default = log_levels.get(os.environ.get("TRANSFORMERS_VERBOSITY", ""), logging.WARNING)
    logging.getLogger("transformers").setLevel(LEVEL_BEFORE or default)

from bilens.model.config import BilinearTransformerConfig
from bilens.model.files import list_models
from bilens.model.generation import sample_texts
from bilens.model.hf import BilinearConfig, BilinearForCausalLM
from bilens.model.loading import load_model
from bilens.model.transformer import HookedBilinearTransformer

__all__ = [
    "BilinearConfig",
    "BilinearForCausalLM",
    "BilinearTransformerConfig",
    "HookedBilinearTransformer",
    "list_models",
    "load_model",
    "sample_texts",
]
