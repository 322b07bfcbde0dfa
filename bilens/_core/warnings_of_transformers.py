"""Importing TransformerLens silences transformers' warnings: what was set before, for `bilens.model` to put back.

`bilens/__init__.py` imports this, so that it is read before anything here imports TransformerLens.
"""

import logging
import sys

LEVEL_BEFORE = None if "transformer_lens" in sys.modules else logging.getLogger("transformers").level
