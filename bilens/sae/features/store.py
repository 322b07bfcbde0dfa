"""The feature store: what every feature of some SAEs fires on, over a corpus of any size, in a folder.

    store = build_feature_store(model, {"1-mlp-out": sae}, "stories.jsonl.gz", "features/")
    store = FeatureStore.load("features/")
    print(store["1-mlp-out"].feature(12))

`build_feature_store` runs the model over the corpus once (`bilens.sae.features.collecting`) and writes the files
(`bilens.sae.features.files`); a `FeatureStore` reads from them what is asked for, when it is asked for.
"""

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from sae_lens import SAE
from torch import Tensor

from bilens._core import parallel
from bilens._core.bare import require_bare
from bilens._core.checks import check_amounts, check_file_name, check_flags, check_index, check_memory
from bilens._core.display import Tabular
from bilens._core.files import destination_folder, read_json, to_path
from bilens._core.fingerprint import check_same, fingerprint, model_fingerprint, sae_fingerprint
from bilens._core.folders import alone_in, differing, make_room, write_json
from bilens.errors import ArgumentError, CheckpointError, ModelNotFoundError, nearest
from bilens.model.attached import splice_hooks
from bilens.model.transformer import HookedBilinearTransformer
from bilens.sae.features.collecting import FeaturePass, PassState
from bilens.sae.features.corpus import open_corpus
from bilens.sae.features.examples import Example, FeatureSummary
from bilens.sae.features.files import (
    CONTEXTS_FILE,
    STATISTICS_FILE,
    TOP,
    FeatureFiles,
    stored_names,
    vocabulary_strings,
    write_features,
)
from bilens.sae.features.names import FeatureNames
from bilens.sae.features.names_file import names_beside, read_names, write_names
from bilens.sae.features.statistics import OVERSAMPLED, FeatureStatistics, Window, histogram_edges
from bilens.sae.origin import NAMES_FILE
from bilens.sae.train.evaluation import DENSE

MANIFEST_FILE, VOCABULARY_FILE = "manifest.json", "vocabulary.json"
CHECKPOINT_FOLDER, PLAN_FILE = "checkpoint", "plan.json"
FORMAT = 1
BUILD_ANEW = "Delete the folder and build the store again."
COUNTED_PAIRS = 2**26  # (feature, token) pairs of all SAEs that are counted one by one: 12 bytes each, 805 MB


@dataclass(frozen=True)
class FeatureStoreConfig:
    """What is kept of each feature.

    Args:
        n_top: strongest contexts, one per context of the model.
        bands, per_band: quantile bands of the activation, and random contexts from each.
        before, after: tokens kept around where a feature fires.
        n_tokens: tokens it fires on, those that carry most activation.
        n_effects: tokens it promotes, and as many that it suppresses.
        max_texts: the largest number of texts to read from the corpus.
        seed: the seed of the choice of random contexts.
        batch_texts: texts that are tokenized together, and shared and resumed by.
        batch_tokens: tokens in a forward pass.
    """

    n_top: int = 12
    bands: int = 5
    per_band: int = 3
    before: int = 12
    after: int = 6
    n_tokens: int = 10
    n_effects: int = 10
    max_texts: int | None = None
    seed: int = 0
    batch_texts: int = 64
    batch_tokens: int = 4096

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            least = 0 if name in ("before", "after", "n_effects", "seed") else 1
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
                raise ArgumentError(f"{name} is {value!r}; expected a whole number, at least {least}.")
        if self.bands > 100:  # stored in a byte, and nobody looks at more
            raise ArgumentError(f"bands is {self.bands}; expected at most 100.")


def build_feature_store(
    model: HookedBilinearTransformer,
    saes: Mapping[str, SAE[Any]],
    source: Sequence[str] | str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    config: FeatureStoreConfig | None = None,
    split: str = "train",
    column: str = "text",
    checkpoint_seconds: float = 60.0,
    overwrite: bool = False,
) -> "FeatureStore":
    """Run a corpus through the model once and store what every feature of every SAE fires on.

    Each text is run from its `[BOS]`, a longer one in several contexts that each start with `[BOS]`; the `[BOS]`
    position is left out. A pass that was stopped goes on when it is called again with the same arguments, and ends in
    the same files; so it does when several processes share it, under `torchrun` or `accelerate launch`.

    Args:
        model: the model.
        saes: SAEs and transcoders by name; each knows its hook.
        source: texts, a file (streamed, see `bilens.train.data.load_texts` for the kinds), or a hub dataset (streamed).
        folder: the folder of the store, which is made.
        config: the settings of what is stored; `None` takes the defaults.
        split, column: the split of a dataset, and the field that holds the text.
        checkpoint_seconds: between checkpoints.
        overwrite: remove another store that is in the folder, instead of refusing.

    Raises:
        AlteredModelError: SAEs are attached to the model, or there are hooks on it or on an SAE.
        ArgumentError: there are no SAEs, they are not given by name, or a name cannot be that of a folder.
        HookNameError, SAEMismatchError: an SAE that does not belong to this model (see `bilens.model.attached`), or
            whose activations are not finite.
        EmptyTextError: no texts, or one with nothing in it.
        TrainingError: a source that cannot be read.
        OverwriteError: the folder holds a store of another model, other SAEs, another corpus or configuration.
        CheckpointError: the folder holds a damaged store.
        WriteError: another process is at work in the folder, or the disk is full.
    """
    config = FeatureStoreConfig() if config is None else config
    folder = destination_folder(folder)
    check_amounts(checkpoint_seconds=checkpoint_seconds)
    check_flags(overwrite=overwrite)
    if not isinstance(config, FeatureStoreConfig):
        raise ArgumentError(f"config is {config!r:.80}; expected a FeatureStoreConfig.")
    if not isinstance(saes, Mapping) or not saes:
        raise ArgumentError(f'saes is {saes!r:.80}; expected SAEs by name: {{"mine": sae}}.')
    for name in saes:
        _folder_name(name)
    hooks = {name: splice_hooks(model, sae, f"the SAE {name!r}") for name, sae in saes.items()}
    require_bare(model, *saes.values())
    tokenizer = model._require_tokenizer()
    corpus = open_corpus(source, split, column, config.max_texts)
    vocabulary = vocabulary_strings(tokenizer, model.cfg.d_vocab)
    identity = {
        "format": FORMAT,
        "model": model_fingerprint(model),
        "tokenizer": fingerprint({}, {"vocabulary": vocabulary}),
        "corpus": corpus.identity,
        "config": asdict(config),
        "saes": {name: sae_fingerprint(sae) for name, sae in saes.items()},
    }
    window = Window(config.before, config.after)
    n_pairs = sum(sae.cfg.d_sae for sae in saes.values()) * model.cfg.d_vocab
    counts_all = n_pairs <= COUNTED_PAIRS
    kept = config.n_top + OVERSAMPLED * config.bands * config.per_band
    a_context = 28 + 8 * (config.before + 1 + config.after)
    n_features = sum(sae.cfg.d_sae for sae in saes.values())
    check_memory(f"keeping {kept:,} contexts of each of {n_features:,} features", n_features * kept * a_context)

    def new_state() -> PassState:
        statistics = {
            name: FeatureStatistics(
                sae.cfg.d_sae,
                model.cfg.d_vocab,
                config.n_top,
                OVERSAMPLED * config.bands * config.per_band,
                window,
                counts_all,
                config.seed,
            )
            for name, sae in saes.items()
        }
        return PassState(np.zeros(model.cfg.d_vocab, np.int64), statistics)

    with parallel.processes(), alone_in(folder) if parallel.is_main() else nullcontext():
        if _claim(folder, identity, overwrite):
            return FeatureStore.load(folder)
        checkpoint = folder / CHECKPOINT_FOLDER
        state = FeaturePass(
            model,
            saes,
            corpus,
            new_state,
            checkpoint,
            batch_texts=config.batch_texts,
            batch_tokens=config.batch_tokens,
            checkpoint_seconds=checkpoint_seconds,
        ).run()
        if parallel.is_main():
            for name, sae in saes.items():
                write_features(
                    folder / _folder_name(name),
                    model,
                    sae,
                    state.saes[name],
                    state.vocabulary,
                    bands=config.bands,
                    per_band=config.per_band,
                    n_tokens=config.n_tokens,
                    n_effects=config.n_effects,
                )
            write_json(folder / VOCABULARY_FILE, vocabulary)
            manifest = {
                "identity": identity,
                "model_name": model.cfg.model_name,
                "wordpiece": model.is_wordpiece,
                "n_tokens": state.n_tokens,
                "n_texts": state.n_texts,
                "counts_all_tokens": counts_all,
                "saes": {
                    name: {"reads": hooks[name][0], "writes": hooks[name][1], "d_sae": sae.cfg.d_sae}
                    for name, sae in saes.items()
                },
            }
            write_json(folder / MANIFEST_FILE, manifest)
            shutil.rmtree(checkpoint)
            store = FeatureStore.load(folder)
            for name, sae in saes.items():
                beside, labels = names_beside(sae), store[name].labels()
                labels = labels if beside is None else beside.over(labels)
                write_names(folder / _folder_name(name) / NAMES_FILE, labels, f"{state.n_texts:,} texts")
        parallel.barrier()
        return FeatureStore.load(folder)


# --- reading ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Context(Example):
    """An `Example` of a stored feature, and where it is.

    Attributes:
        text: the number of the text in the corpus, from 0.
        position: the position in `model.to_tokens(text, truncate=False)[0]` of the token that fires.
        quantile: in a random context, the share of the feature's firings that are weaker, to within a few hundredths,
            as it is estimated from the histogram and the sample. NaN for the strongest contexts.
    """

    text: int
    position: int
    quantile: float


@dataclass(frozen=True)
class FiringToken:
    """A token a feature fires on.

    Attributes:
        count: firings on it.
        share: the share of the feature's |activation| that this token carries.
        pmi: `log(p(token | fires) / p(token))`, in nats.
    """

    token: str
    count: int
    share: float
    pmi: float


@dataclass(frozen=True)
class FeatureRecord(Tabular):
    """Everything a store knows of one feature.

    Attributes:
        sae, hook_name: whose it is, and the hook that SAE reads.
        fired: tokens it fires on, of `n_tokens`.
        mean: its activation over all tokens; `mean_active`: over those it fires on (NaN where it never does).
        maximum: over all tokens.
        histogram: firings by |activation| in the bins between `edges`.
        top: the strongest contexts, one per context of the model.
        random: some random contexts of each quantile band, the weakest first.
        tokens: the tokens it fires on, by the activation they carry; `tokens_exact` says if the counts are exact.
        promoted, suppressed: the tokens whose logits one unit of activation raises and lowers most, before the norm;
            `None` where the SAE does not write to the residual stream.
        wordpiece: true if the tokens are word pieces.
    """

    sae: str
    hook_name: str
    feature: int
    label: str
    n_tokens: int
    fired: int
    mean: float
    mean_active: float
    maximum: float
    histogram: Int[np.ndarray, "bin"] = field(repr=False)
    edges: Float[np.ndarray, "bin_plus_1"] = field(repr=False)
    top: tuple[Context, ...] = field(repr=False)
    random: tuple[tuple[Context, ...], ...] = field(repr=False)
    tokens: tuple[FiringToken, ...] = field(repr=False)
    tokens_exact: bool = field(repr=False)
    promoted: tuple[tuple[str, float], ...] | None = field(repr=False)
    suppressed: tuple[tuple[str, float], ...] | None = field(repr=False)
    wordpiece: bool = field(repr=False)

    @property
    def frequency(self) -> float:
        """The share of the tokens on which it fires."""
        return self.fired / self.n_tokens if self.n_tokens else 0.0

    @property
    def summary(self) -> FeatureSummary:
        """As the report takes it."""
        return FeatureSummary(self.feature, self.frequency, self.label, self.top)

    def to_frame(self) -> pd.DataFrame:
        """One row per context: the strongest (band `top`), then the random ones of each band."""
        groups = {"top": self.top} | {str(i): contexts for i, contexts in enumerate(self.random)}
        columns = ["band", "activation", "quantile", "text", "position", "token", "context"]
        rows = [
            [band, c.activation, c.quantile, c.text, c.position, c.tokens[c.focus], _line(c, self.wordpiece)]
            for band, contexts in groups.items()
            for c in contexts
        ]
        return pd.DataFrame(rows, columns=columns)

    def __str__(self) -> str:
        lines = [
            f"{self.sae}, feature {self.label}: fires on {self.frequency:.3%} of {self.n_tokens:,} tokens, "
            f"mean {self.mean_active:.4g} where it does, maximum {self.maximum:.4g}"
        ]
        if self.tokens:
            lines.append("fires on " + ", ".join(f"{t.token} ({t.count}, PMI {t.pmi:+.1f})" for t in self.tokens[:6]))
        for title, effects in (("promotes", self.promoted), ("suppresses", self.suppressed)):
            if effects:
                lines.append(f"{title} " + ", ".join(f"{token} ({value:+.2f})" for token, value in effects[:6]))
        lines += [f"{c.activation:8.3f}  {_line(c, self.wordpiece)}" for c in self.top[:5]]
        return "\n".join(lines)


@dataclass(frozen=True)
class StoredFeatures(Tabular):
    """The features of one SAE in a store, read when they are asked for."""

    name: str
    reads: str
    writes: str
    d_sae: int
    store: "FeatureStore" = field(repr=False)

    @cached_property
    def _files(self) -> FeatureFiles:
        return FeatureFiles(self.store.folder / _folder_name(self.name))

    def __len__(self) -> int:
        return self.d_sae

    def feature(self, feature: int) -> FeatureRecord:
        """Everything known of one feature.

        Raises:
            OutOfRangeError: no such feature.
        """
        feature = check_index(feature, self.d_sae, "feature {} is outside the SAE's {}")
        store, strings = self.store, self.store.vocabulary
        row = self._files.row(feature)
        fired, total = int(row["fired"]), float(row["sum"])
        tokens = tuple(
            FiringToken(_string(strings, token), int(count), float(share), float(pmi))
            for token, count, share, pmi in zip(
                row["tokens"], row["token_counts"], row["token_share"], row["token_pmi"], strict=True
            )
            if token >= 0
        )
        top: list[Context] = []
        random: list[list[Context]] = [[] for _ in range(store.config.bands)]
        for found in self._files.contexts(feature):
            context = Context(
                [_string(strings, token) for token in found["tokens"]],
                found["values"],
                found["focus"],
                found["text"],
                found["position"],
                found["quantile"],
            )
            (top if found["band"] == TOP else random[found["band"]]).append(context)
        return FeatureRecord(
            sae=self.name,
            hook_name=self.reads,
            feature=feature,
            label=self.labels()[feature],
            n_tokens=store.n_tokens,
            fired=fired,
            mean=total / store.n_tokens,
            mean_active=total / fired if fired else float("nan"),
            maximum=float(row["maximum"]),
            histogram=row["histogram"],
            edges=histogram_edges(),
            top=tuple(top),
            random=tuple(map(tuple, random)),
            tokens=tokens,
            tokens_exact=store.counts_all_tokens,
            promoted=_effects(strings, row, "promoted", "promotes"),
            suppressed=_effects(strings, row, "suppressed", "suppresses"),
            wordpiece=store.wordpiece,
        )

    def __iter__(self) -> Iterator[FeatureRecord]:
        return map(self.feature, range(self.d_sae))

    def labels(self) -> FeatureNames:
        """The names of the features, for `Decomposer(input_names=..., output_names=...)`."""
        return self._names

    @cached_property
    def _names(self) -> FeatureNames:
        def find() -> tuple[Sequence[str], frozenset[int]]:
            return stored_names(self._files, self.store.n_tokens, self.store.config.before, self.store.vocabulary)

        found, path = FeatureNames(self.d_sae, find), self._files.folder / NAMES_FILE
        return read_names(path, self.d_sae).over(found) if path.exists() else found

    def summary(self, feature: int) -> FeatureSummary:
        """A feature in words, with its strongest contexts."""
        return self.feature(feature).summary

    def density(self) -> Float[Tensor, "d_sae"]:
        """Share of the tokens on which each feature fires."""
        return torch.from_numpy(self._files.column("fired") / max(self.store.n_tokens, 1)).float()

    def typical_activations(self) -> Float[Tensor, "d_sae"]:
        """The mean of each feature's activation over the tokens where it is active; zero for one that never is."""
        fired = self._files.column("fired")
        return torch.from_numpy(self._files.column("sum") / np.maximum(fired, 1)).float()

    def maxima(self) -> Float[Tensor, "d_sae"]:
        """The largest activation of each feature; zero for one that is never above."""
        return torch.from_numpy(np.maximum(self._files.column("maximum"), 0))

    def to_frame(self) -> pd.DataFrame:
        """One row per feature: how often and how strongly it fires, its name, whether it is dead or dense."""
        fired, total = self._files.column("fired"), self._files.column("sum")
        frequency = fired / self.store.n_tokens
        with np.errstate(invalid="ignore"):
            mean_active = total / np.where(fired, fired, np.nan)
        return pd.DataFrame(
            {
                "feature": np.arange(self.d_sae),
                "label": list(self.labels()),
                "frequency": frequency,
                "mean": total / self.store.n_tokens,
                "mean_active": mean_active,
                "maximum": self._files.column("maximum"),
                "dead": fired == 0,
                "dense": frequency > DENSE,
            }
        )

    def __str__(self) -> str:
        fired = self._files.column("fired")
        dense = int((fired > DENSE * self.store.n_tokens).sum())
        return (
            f"{self.name} at {self.reads}: {self.d_sae} features, {int((fired == 0).sum())} dead, {dense} dense, "
            f"{fired.sum() / self.store.n_tokens:.1f} active per token"
        )


@dataclass(frozen=True)
class FeatureStore(Tabular):
    """A folder that `build_feature_store` filled: `store["1-mlp-out"].feature(12)`.

    Attributes:
        folder: the folder of the store.
        model_name: the model's name.
        n_tokens, n_texts: the numbers of tokens and texts in the corpus.
        counts_all_tokens: true if tokens are counted on all firings, false if on a sample of each feature's.
        config: the settings of what is stored.
        names: the names of the SAEs.
        identity: fingerprints of what it was made from, and the configuration.
    """

    folder: Path
    model_name: str
    n_tokens: int
    n_texts: int
    counts_all_tokens: bool
    wordpiece: bool = field(repr=False)
    config: FeatureStoreConfig = field(repr=False)
    saes: Mapping[str, Mapping[str, Any]] = field(repr=False)
    identity: Mapping[str, Any] = field(repr=False)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> "FeatureStore":
        """Open a store; numbers and contexts are read when they are asked for.

        Raises:
            ModelNotFoundError: no store there.
            CheckpointError: one that is not finished, or of another version of the format.
        """
        folder = to_path(folder, "folder")
        path = folder / MANIFEST_FILE
        if not path.exists():
            if (folder / CHECKPOINT_FOLDER).exists():
                raise CheckpointError(f"{folder} is not finished: build it again with the same arguments to go on.")
            raise ModelNotFoundError(f"no feature store at {folder} (no {MANIFEST_FILE} in it).")
        manifest = read_json(path, remedy=BUILD_ANEW)
        try:
            identity = manifest["identity"]
            if identity["format"] != FORMAT:
                raise CheckpointError(f"{folder} has format {identity['format']}, not {FORMAT}. {BUILD_ANEW}")
            names = ("model_name", "n_tokens", "n_texts", "counts_all_tokens", "wordpiece", "saes")
            if not all(type(manifest[name]) is int for name in ("n_tokens", "n_texts")):
                raise TypeError("n_tokens and n_texts are no whole numbers")
            config = FeatureStoreConfig(**identity["config"])
            return cls(folder=folder, config=config, identity=identity, **{name: manifest[name] for name in names})
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"{path} is no manifest that bilens wrote: {error!r}. {BUILD_ANEW}") from error

    def check_made_from(self, model: HookedBilinearTransformer, saes: Mapping[str, SAE[Any]]) -> None:
        """Refuse to describe the features of other SAEs, or of another model's.

        Args:
            model: must be the one that the store was made from.
            saes: the SAEs by their names in the store; they must not have changed either.

        Raises:
            StaleError: one of them is not.
        """
        check_same(self.identity["model"], model_fingerprint(model), f"the feature store {self.folder}", "model")
        for name, sae in saes.items():
            what = f"the feature store {self.folder} of {name!r}"
            check_same(self.identity["saes"][name], sae_fingerprint(sae), what, "SAE")

    @property
    def names(self) -> tuple[str, ...]:
        """Of the SAEs."""
        return tuple(self.saes)

    @cached_property
    def vocabulary(self) -> list[str]:
        """The token strings.

        Raises:
            CheckpointError: the file is damaged, or of another tokenizer than the store.
        """
        vocabulary = read_json(self.folder / VOCABULARY_FILE, list, BUILD_ANEW)
        if fingerprint({}, {"vocabulary": vocabulary}) != self.identity["tokenizer"]:
            raise CheckpointError(f"{self.folder / VOCABULARY_FILE} is not what the store was made with. {BUILD_ANEW}")
        return vocabulary

    def __getitem__(self, name: str) -> StoredFeatures:
        if name not in self.saes:
            raise ArgumentError(f"the store has no SAE {name!r}; it has {list(self.saes)}." + nearest(name, self.saes))
        return StoredFeatures(name, store=self, **self.saes[name])

    def labels(self, name: str) -> FeatureNames:
        """The names of an SAE's features; see `StoredFeatures.labels`."""
        return self[name].labels()

    def to_frame(self) -> pd.DataFrame:
        """One row per feature of every SAE; see `StoredFeatures.to_frame`."""
        frames = {name: self[name].to_frame() for name in self.names}
        return pd.concat(frames, names=["sae"]).reset_index(level="sae").reset_index(drop=True)

    def __str__(self) -> str:
        head = f"features of {self.model_name} on {self.n_tokens:,} tokens of {self.n_texts:,} texts"
        return "\n".join([head, *(str(self[name]) for name in self.names)])


# --- pure functions ---------------------------------------------------------------------------------------------------


def _folder_name(name: str) -> str:
    """The name of an SAE's folder in a store: what no file can be called is written as in a URL.

    Raises:
        ArgumentError: a name that leads elsewhere, or is that of the store's own files.
    """
    if not isinstance(name, str):
        raise ArgumentError(f"saes has {name!r:.80} for a name, expected text.")
    try:
        quoted = quote(name, safe="")
    except UnicodeEncodeError as error:
        raise ArgumentError(f"saes has {name!r:.80} for a name, which cannot be written as UTF-8.") from error
    if quoted.startswith(".") or quoted.casefold() in (CHECKPOINT_FOLDER, MANIFEST_FILE, VOCABULARY_FILE):
        raise ArgumentError(f"saes has {name!r:.80} for a name, which is taken in the store's folder; give another.")
    check_file_name(quoted, "the name of an SAE")
    return quoted


def _claim(folder: Path, identity: Mapping[str, Any], overwrite: bool) -> bool:
    """Whether the folder holds this very store, finished; otherwise it is made ready for it.

    Raises:
        OverwriteError: it holds another one.
        CheckpointError: what it holds is damaged.
    """
    manifest, plan = folder / MANIFEST_FILE, folder / CHECKPOINT_FOLDER / PLAN_FILE
    finished = manifest.exists()
    there = read_json(manifest, remedy=BUILD_ANEW).get("identity", {}) if finished else None
    if there is None and plan.exists():
        there = read_json(plan, remedy=BUILD_ANEW)
    if there is not None and not isinstance(there, dict):
        raise CheckpointError(f"{manifest} is no manifest that bilens wrote. {BUILD_ANEW}")
    if there is not None and (differ := differing(there, identity)):
        # A pass that was stopped before its first checkpoint has come to nothing.
        nothing = not finished and not any(plan.parent.glob("*.safetensors"))
        other = f"a feature store that differs in {differ}"
        make_room(folder, other, lambda: _remove(folder, there), overwrite=overwrite or nothing)
        finished = False
    parallel.barrier()
    if not finished and parallel.is_main():
        plan.parent.mkdir(parents=True, exist_ok=True)
        write_json(plan, identity)
    parallel.barrier()
    return finished


def _remove(folder: Path, identity: Mapping[str, Any]) -> None:
    """Remove the files of a store, the manifest first, and the folders that they leave empty."""
    for file in (MANIFEST_FILE, VOCABULARY_FILE):
        (folder / file).unlink(missing_ok=True)
    for name in identity.get("saes") or ():
        place = folder / _folder_name(name)
        for file in (STATISTICS_FILE, CONTEXTS_FILE, NAMES_FILE):
            (place / file).unlink(missing_ok=True)
        if place.is_dir() and not any(place.iterdir()):
            place.rmdir()
    shutil.rmtree(folder / CHECKPOINT_FOLDER, ignore_errors=True)


def _string(strings: Sequence[str], token: int) -> str:
    if not 0 <= token < len(strings):
        raise CheckpointError(f"a file of the store names token {token} of {len(strings)}: it is damaged. {BUILD_ANEW}")
    return strings[token]


def _effects(
    strings: Sequence[str], row: Mapping[str, Any], tokens: str, values: str
) -> tuple[tuple[str, float], ...] | None:
    if tokens not in row:
        return None
    return tuple((_string(strings, t), v) for t, v in zip(row[tokens].tolist(), row[values].tolist(), strict=True))


def _line(context: Context, wordpiece: bool) -> str:
    """A context as text, the token that fires in double brackets."""
    words = [f"[[{token}]]" if i == context.focus else token for i, token in enumerate(context.tokens)]
    if not wordpiece:
        return "".join(words)
    return " ".join(words).replace(" ##", "").replace("[[##", "[[")
