"""Word-piece tokenizers as Hugging Face finds them beside a model: what `pipeline` and `AutoTokenizer` read and write.

In bilens a text goes through `bilens.model.tokenization`, which needs nothing of a tokenizer but its vocabulary. What
transformers does by itself with the published kind of tokenizer comes out wrong twice, and `save_tokenizer` mends it:
a `[BOS]` that a text has written out gets a second one in front, and the words of a continuation that is decoded alone
have no space before the first. Tokens are the same either way.
"""

import json
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from bilens._core.files import read_json
from bilens.model.config import HF_TOKENIZER

# Each token on its own first: a space before a word, none before a mark that ends one, nor before the rest of a word.
# Then all in one, where it shows that an apostrophe stands within a word.
TEXT = decoders.Sequence(
    [
        decoders.Replace(Regex(r"^(?!##)(?![.,!?;:])"), " "),
        decoders.Replace(Regex("^##"), ""),
        decoders.Fuse(),
        decoders.Replace(Regex(r"(?<=\w) ' (?=(?:s|t|m|d|re|ll|ve)\b)"), "'"),
    ]
)


class BilinearTokenizer(PreTrainedTokenizerFast):
    """The tokenizer of the published models: exactly one `[BOS]` in front of a text, whatever is written out in it."""

    def _encode_plus(  # type: ignore[override]  # transformers' other arguments go on by keyword
        self, text: Any, text_pair: Any = None, add_special_tokens: bool = True, **kwargs: Any
    ) -> Any:
        if add_special_tokens and self.bos_token is not None:
            text, text_pair = self._without_bos(text), self._without_bos(text_pair)
        return super()._encode_plus(text, text_pair, add_special_tokens, **kwargs)

    def _without_bos(self, text: Any) -> Any:
        if isinstance(text, str):
            return text.replace(self.bos_token, " ")
        return [self._without_bos(part) for part in text] if isinstance(text, list | tuple) else text


def save_tokenizer(tokenizer: Any, folder: str) -> None:
    """Write a transformers tokenizer for `AutoTokenizer` and `load_tokenizer` to find.

    Args:
        tokenizer: a tokenizer of any kind; one without word pieces is written as it is.
        folder: exists.
    """
    tokenizer.save_pretrained(folder)
    file, options = Path(folder) / "tokenizer.json", Path(folder) / "tokenizer_config.json"
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not isinstance(backend.model, models.WordPiece):
        return
    saved = Tokenizer.from_file(str(file))
    saved.decoder = TEXT
    saved.save(str(file))
    if backend.num_special_tokens_to_add(False):  # it is the tokenizer that puts [BOS] in front
        options.write_text(json.dumps(read_json(options) | {"tokenizer_class": HF_TOKENIZER}, indent=2) + "\n")


def register_tokenizer(config: type) -> None:
    """Make the tokenizer known to `AutoTokenizer`, for models of this configuration."""
    AutoTokenizer.register(config, fast_tokenizer_class=BilinearTokenizer, exist_ok=True)
