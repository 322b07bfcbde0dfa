"""`names.json`: the names of an SAE's features, beside its weights or in a store; people may write and edit it.

    {
     "names": {"101": "didn't → know", "358": "not … → scared"},
     "dense": [1915],
     "corpus": "192 texts of ts-tiny",
     "weights": "9f86d081884c7d65..."
    }

Only `names` has to be there. Each entry is a feature and what it is called, without its index; features that are left
out are named after what they fire on, and a silent feature's name is empty. `dense` lists those that fire on more than
a tenth of all tokens, `corpus` says in words what the names were made from, and `weights` is the SHA-256 of the file
with the SAE's weights: names of other weights are refused.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bilens._core.files import read_json, write_atomically
from bilens.errors import CheckpointError, StaleError, nearest
from bilens.sae.features.names import FeatureNames
from bilens.sae.origin import NAMES_FILE, weights_of

KEYS = ("names", "dense", "corpus", "weights")
LONGEST = 200  # characters of a name


@dataclass(frozen=True)
class KeptNames:
    """What a `names.json` says.

    Attributes:
        n: the number of the SAE's features.
        texts: the names of some features, or of all.
        dense: the dense features; `None` where the file does not say.
    """

    n: int
    texts: Mapping[int, str]
    dense: frozenset[int] | None

    @property
    def complete(self) -> bool:
        """Whether it says of every feature what it is called, and which are dense."""
        return len(self.texts) == self.n and self.dense is not None

    def over(self, found: FeatureNames) -> FeatureNames:
        """These names, and the found ones of features that the file leaves out, which are looked for if there are."""
        if self.complete:
            return FeatureNames.of([self.texts[feature] for feature in range(self.n)], self.dense or ())
        return found.renamed(self.texts)


def write_names(path: Path, names: FeatureNames, corpus: str, weights: str | None = None) -> None:
    """Write a `names.json` with all names, whole or not at all.

    Args:
        path: the file.
        names: the names.
        corpus: what they were made from, in words.
        weights: the digest of the SAE's weights (`digest_of_file`).
    """
    facts = {"corpus": corpus, "weights": weights, "dense": sorted(names.dense)}
    lines = [f" {json.dumps(key)}: {_quoted(value)}" for key, value in facts.items() if value is not None]
    entries = ",\n".join(f'  "{feature}": {_quoted(text)}' for feature, text in enumerate(names.texts))
    text = "{\n" + ",\n".join([*lines, f' "names": {{\n{entries}\n }}']) + "\n}\n"
    write_atomically(path, lambda beside: beside.write_text(text, encoding="utf-8"))


def _quoted(value: Any) -> str:
    """As JSON that people read, but for half characters, which UTF-8 has no place for."""
    halves = isinstance(value, str) and any("\ud800" <= character <= "\udfff" for character in value)
    return json.dumps(value, ensure_ascii=halves)


def read_names(path: Path, n: int) -> KeptNames:
    """Read a `names.json` for an SAE of `n` features.

    Raises:
        CheckpointError: it is not JSON, or an entry is not what the format says; the message names the entry.
    """
    held = read_json(path)
    for key in held:
        if key not in KEYS:
            raise CheckpointError(
                f"{path}: there is no entry {key!r}, expected {', '.join(KEYS)}." + nearest(key, KEYS)
            )
    names, dense = held.get("names"), held.get("dense")
    if not isinstance(names, dict):
        raise CheckpointError(f"{path}: names is {names!r:.80}, expected an object of features and their names.")
    for key in ("corpus", "weights"):
        if not isinstance(held.get(key, ""), str):
            raise CheckpointError(f"{path}: {key} is {held[key]!r:.80}, expected text.")
    for feature, text in names.items():
        if not feature.isascii() or not feature.isdigit() or str(int(feature)) != feature or int(feature) >= n:
            raise CheckpointError(f"{path}: names has the entry {feature!r:.40}, expected a feature from 0 to {n - 1}.")
        if not isinstance(text, str) or len(text) > LONGEST:
            raise CheckpointError(
                f"{path}: the name of feature {feature} is {text!r:.80}, expected text of at most {LONGEST} characters."
            )
    if dense is not None:
        if not isinstance(dense, list):
            raise CheckpointError(f"{path}: dense is {dense!r:.80}, expected a list of features.")
        for feature in dense:
            if type(feature) is not int or not 0 <= feature < n:
                raise CheckpointError(f"{path}: dense holds {feature!r:.40}, expected features from 0 to {n - 1}.")
    return KeptNames(n, {int(f): text for f, text in names.items()}, None if dense is None else frozenset(dense))


def names_beside(sae: Any) -> KeptNames | None:
    """The names that are kept beside an SAE's weights; `None` where there are none, or the SAE is not from a folder.

    Raises:
        CheckpointError: the file is damaged.
        StaleError: it is of other weights than those beside it.
    """
    weights = weights_of(sae)
    if weights is None or not (path := weights.parent / NAMES_FILE).exists():
        return None
    check_weights(path, read_json(path).get("weights"), weights)
    return read_names(path, sae.cfg.d_sae)


def check_weights(path: Path, digest: str | None, weights: Path) -> None:
    """Refuse what was made of other weights than those in a file (`StaleError`); without a digest, nothing is said."""
    if digest and digest != digest_of_file(weights):
        raise StaleError(
            f"{path} is of other weights than those in {weights.name} beside it: delete it, or make it anew with "
            "`bilens names --overwrite`. To keep names of your own, delete the entry 'weights' in it."
        )


def digest_of_file(path: Path) -> str:
    """The SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
