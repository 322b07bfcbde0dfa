"""What is kept beside an SAE's weights, so that pages need no pass over texts: `names.json` and some examples.

    names.json                  see `bilens.sae.features.names_file`
    examples.safetensors.gz     how often and how strongly each feature fires, and its strongest examples

The examples are places in texts, whose tokens the file holds as well, with the feature's activations around them.
"""

import gzip
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from sae_lens import SAE
from safetensors import SafetensorError
from safetensors.numpy import load, save
from torch import Tensor

from bilens._core.checks import check_flags, check_index
from bilens._core.files import parse_json, regular_file, to_path, write_atomically
from bilens.errors import ArgumentError, CheckpointError
from bilens.model.transformer import HookedBilinearTransformer
from bilens.sae.features.examples import (
    DescribedFeatures,
    Example,
    FeatureActivations,
    FeatureSummary,
    feature_activations,
)
from bilens.sae.features.files import vocabulary_strings
from bilens.sae.features.names import FeatureNames
from bilens.sae.features.names_file import check_weights, digest_of_file, names_beside, write_names
from bilens.sae.loading import list_saes, load_sae_folder
from bilens.sae.origin import EXAMPLES_FILE, NAMES_FILE, forget_origin, weights_of
from bilens.sae.texts import example_texts

KEPT_EXAMPLES = 6  # of each feature
BEFORE, AFTER = 12, 6  # tokens around each
LARGEST = 2**30  # bytes that the file may unfold to
ANEW = "Make it anew with `bilens names --overwrite`."

Array = NDArray[Any]


@dataclass(frozen=True)
class KeptFeatures:
    """The features of an SAE as they are kept beside its weights: names, and what they fire on.

    Attributes:
        names: their names.
        n_tokens: the number of tokens of the texts they were made from.
    """

    names: FeatureNames = field(repr=False)
    strings: Sequence[str] = field(repr=False)
    n_tokens: int
    arrays: dict[str, Array] = field(repr=False)

    @property
    def d_sae(self) -> int:
        return len(self.names)

    def density(self) -> Float[Tensor, "d_sae"]:
        """Share of the tokens on which each feature fires."""
        return torch.from_numpy(self.arrays["fired"] / max(self.n_tokens, 1)).float()

    def typical_activations(self) -> Float[Tensor, "d_sae"]:
        """The mean of each feature's activation over the tokens where it is active; zero for one that never is."""
        return torch.from_numpy(self.arrays["typical"])

    def maxima(self) -> Float[Tensor, "d_sae"]:
        """The largest activation of each feature, in half precision; zero for one that is never above."""
        feature = torch.arange(self.d_sae).repeat_interleave(
            torch.from_numpy(np.diff(self.arrays["offsets"]).astype(int))
        )
        values = torch.from_numpy(self.arrays["values"][:, BEFORE].astype(np.float32))
        return torch.zeros(self.d_sae).scatter_reduce(0, feature, values, "amax")

    def labels(self) -> FeatureNames:
        """The names of the features."""
        return self.names

    def summary(self, feature: int, n_examples: int = KEPT_EXAMPLES) -> FeatureSummary:
        """A feature's name and its strongest examples, at most `KEPT_EXAMPLES`.

        Raises:
            OutOfRangeError: no such feature.
        """
        feature = check_index(feature, self.d_sae, "feature {} is outside the SAE's {}")
        first, last = self.arrays["offsets"][feature : feature + 2].tolist()
        examples = tuple(self._example(place) for place in range(first, min(last, first + n_examples)))
        density = float(self.arrays["fired"][feature]) / max(self.n_tokens, 1)
        return FeatureSummary(feature, density, self.names[feature], examples)

    @cached_property
    def _starts(self) -> Array:
        return np.append(0, np.cumsum(self.arrays["lengths"].astype(np.int64)))

    def _example(self, place: int) -> Example:
        start, end = self._starts[self.arrays["text"][place] :][:2]
        position = start + int(self.arrays["position"][place])
        low, high = max(start, position - BEFORE), min(end, position + AFTER + 1)
        values = self.arrays["values"][place].astype(np.float32)
        around = values[low - position + BEFORE : high - position + BEFORE]
        return Example([self.strings[t] for t in self.arrays["tokens"][low:high]], around.tolist(), int(position - low))


def describe_features(
    model: HookedBilinearTransformer, saes: Sequence[SAE[Any]], texts: Sequence[str] | None = None
) -> list[DescribedFeatures]:
    """What is known of the features of some SAEs: what is kept beside them, or else what they fire on in texts.

    Args:
        model, saes: the same as for `feature_activations`.
        texts: texts to see what features fire on, which then are looked at for all of the SAEs; `None` runs those of
            `example_texts` for SAEs that have nothing beside them.

    Raises:
        CheckpointError: what is kept is damaged.
        StaleError: it is of other weights than those beside it.
        others: the same as for `feature_activations`.
    """
    kept = [None if texts is not None else read_kept(model, sae) for sae in saes]
    others = [sae for sae, there in zip(saes, kept, strict=True) if there is None]
    texts = example_texts(model) if texts is None and others else texts or []
    found = iter(feature_activations(model, others, texts) if others else [])
    return [next(found) if there is None else there for there in kept]


def keep_features(
    model: HookedBilinearTransformer,
    folder: Path | str,
    texts: Sequence[str] | None = None,
    *,
    corpus: str | None = None,
    overwrite: bool = False,
) -> list[Path]:
    """Write names and examples beside every SAE in a folder, where pages find them instead of running texts.

    Args:
        model: the model of the SAEs.
        folder: a folder of SAE folders, or one of those.
        texts: texts to see what features fire on; `None` takes those of `example_texts`.
        corpus: what the texts are, in words.
        overwrite: replace names that are there, edited or not. Without it SAEs that have a `names.json` keep it.

    Returns:
        the files that were written.

    Raises:
        ArgumentError: the folder is none, or holds no SAEs.
        WriteError: nothing can be written there.
        others: the same as for `feature_activations`.
    """
    check_flags(overwrite=overwrite)
    folder = to_path(folder, "folder")
    entries = list_saes(folder)
    if not folder.is_dir() or not entries:
        raise ArgumentError(f"{folder} holds no SAEs on this machine.")
    about = {"device": model.W_E.device, "n_layers": model.cfg.n_layers, "scale_attn": model.cfg.scale_attn}
    if texts is None:
        texts, corpus = example_texts(model), corpus or f"the example texts of {model.cfg.model_name}"
    written: list[Path] = []
    for _, group in groupby(entries, lambda entry: entry.layer):  # one pass for the SAEs of a layer
        places = [folder if folder.name == entry.folder else folder / entry.folder for entry in group]
        places = [p for p in places if overwrite or not all((p / f).exists() for f in (NAMES_FILE, EXAMPLES_FILE))]
        saes = [load_sae_folder(place, **about) for place in places]
        digests = [digest_of_file(weights) for sae in saes if (weights := weights_of(sae)) is not None]
        if overwrite:
            for sae in saes:
                forget_origin(sae)
        activations = feature_activations(model, saes, texts) if saes else []
        for place, digest, found in zip(places, digests, activations, strict=True):
            if found.kept is None:
                write_names(place / NAMES_FILE, found.labels(), corpus or f"{len(texts)} texts", digest)
                written.append(place / NAMES_FILE)
            data = pack_examples(found, digest)
            write_atomically(place / EXAMPLES_FILE, lambda beside, data=data: beside.write_bytes(data))  # type: ignore[misc]
            written.append(place / EXAMPLES_FILE)
    return written


def read_kept(model: HookedBilinearTransformer, sae: SAE[Any]) -> KeptFeatures | None:
    """What is kept beside an SAE's weights; `None` where there are no names for all features, or no examples."""
    names, weights = names_beside(sae), weights_of(sae)
    if names is None or weights is None or not (path := weights.parent / EXAMPLES_FILE).exists():
        return None
    if not names.complete:
        return None
    facts, arrays = _unpack(path, sae.cfg.d_sae, model.cfg.d_vocab)
    check_weights(path, facts["weights"], weights)
    strings = vocabulary_strings(model._require_tokenizer(), model.cfg.d_vocab)
    return KeptFeatures(names.over(FeatureNames.of([""] * names.n)), strings, facts["n_tokens"], arrays)


# --- the file ---------------------------------------------------------------------------------------------------------


def pack_examples(found: FeatureActivations, weights: str, n: int = KEPT_EXAMPLES) -> bytes:
    """The bytes of an `examples.safetensors.gz`: the `n` strongest firings of every feature, one per text.

    Args:
        found: what the features fire on.
        weights: the digest of the SAE's weights.
        n: examples of each feature.
    """
    first = found.mask.argmax(1)
    firings = found.strongest(n)
    rows, positions = found.rows[firings], found.positions[firings]
    offsets = np.append(0, np.bincount(found.features[firings].numpy(), minlength=found.d_sae).cumsum())
    arrays = {
        "fired": found.offsets.diff().int().numpy(),
        "typical": found.typical_activations().numpy(),
        "tokens": found.tokens[found.mask > 0].numpy().astype(np.uint16 if len(found.strings) < 2**16 else np.int32),
        "lengths": found.mask.sum(1).int().numpy(),
        "offsets": offsets.astype(np.int32),
        "text": rows.int().numpy(),
        "position": (positions - first[rows]).numpy().astype(np.int32),
        "values": found.around(firings, BEFORE, AFTER).numpy().astype(np.float16),
    }
    facts = {"weights": weights, "n_tokens": int(found.mask.sum())}
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    return gzip.compress(save(arrays, metadata={"facts": json.dumps(facts)}), mtime=0)


def _unpack(path: Path, d_sae: int, d_vocab: int) -> tuple[dict[str, Any], dict[str, Array]]:
    """The facts and arrays of a file, checked (`CheckpointError`)."""
    try:
        with gzip.open(regular_file(path), "rb") as file:
            data = file.read(LARGEST + 1)
        arrays = load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        facts = parse_json(header["__metadata__"]["facts"], path, dict, ANEW)
        n, tokens = len(arrays["text"]), arrays["tokens"]
        sizes: dict[str, tuple[int, ...]] = {
            "fired": (d_sae,),
            "typical": (d_sae,),
            "offsets": (d_sae + 1,),
            "position": (n,),
        }
        sizes |= {"values": (n, BEFORE + 1 + AFTER)}
        lengths, offsets = arrays["lengths"], arrays["offsets"]
        fits = (
            len(data) <= LARGEST
            and all(arrays[name].shape == shape for name, shape in sizes.items())
            and lengths.sum() == len(tokens)
            and offsets[-1] == n
            and (np.diff(offsets) >= 0).all()
            and all(((arrays["text"] >= 0) & (arrays["text"] < len(lengths))).tolist())
            and (arrays["position"] < lengths[arrays["text"]]).all()
            and (arrays["position"] >= 0).all()
            and (len(tokens) == 0 or int(tokens.max()) < d_vocab)
            and type(facts["n_tokens"]) is int
            and isinstance(facts["weights"], str)
        )
    except (OSError, EOFError, SafetensorError, KeyError, ValueError, IndexError, TypeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} cannot be read: {error!r}. {ANEW}") from error
    if not fits:
        raise CheckpointError(f"{path} does not fit together: it is damaged, or of another SAE. {ANEW}")
    return facts, arrays
