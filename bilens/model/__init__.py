"""The model: its configuration, the forward pass, text and generation, and the classes other libraries know it by."""

import logging
import os

import transformer_lens  # noqa: F401
from transformers.utils.logging import log_levels

from bilens import TRANSFORMERS_LEVEL

if TRANSFORMERS_LEVEL is not None:  # 0 is that nothing was set yet, so that the default holds
    default = log_levels.get(os.environ.get("TRANSFORMERS_VERBOSITY", ""), logging.WARNING)
    logging.getLogger("transformers").setLevel(TRANSFORMERS_LEVEL or default)
