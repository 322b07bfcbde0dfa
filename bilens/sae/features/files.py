"""From the statistics of a pass to a feature store's files, and from the files to one feature or all of them.

    manifest.json                    what the store is of, and its sizes; written last: a folder with it is complete
    vocabulary.json                  the token strings
    <sae>/statistics.safetensors     numbers, one row per feature
    <sae>/contexts.parquet           where features fire, sorted by feature; `FEATURES_PER_GROUP` of them a row group

Everything is written and read in blocks of features; one feature is read without the others.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor

from bilens._core.files import regular_file, write_atomically
from bilens.errors import BilensError, CheckpointError
from bilens.model.attached import splice_hooks
from bilens.sae.features.names import BEFORE, STRONGEST, TokenUse, find_names
from bilens.sae.features.statistics import LAST, Array, BestPlaces, FeatureStatistics, blocks, first_of_groups

if TYPE_CHECKING:
    import pyarrow as pa

STATISTICS_FILE, CONTEXTS_FILE = "statistics.safetensors", "contexts.parquet"
FEATURES_PER_GROUP = 128
LOGITS_AT_ONCE = 2**25  # effects of features on tokens in memory, 128 MB
ROW = ("fired", "sum", "maximum", "histogram", "tokens", "token_counts", "token_share", "token_pmi")
EFFECTS = ("promoted", "promotes", "suppressed", "suppresses")  # where the SAE writes to the residual stream
TOP, RANDOM = -1, 0  # the band of a strongest context; random ones have theirs from 0
# What is written there is added to the residual stream, or (ln_final) multiplied by the unembedding at once.
WRITES_TO_LOGITS = (
    "hook_embed",
    "hook_resid_pre",
    "hook_resid_mid",
    "hook_resid_post",
    "hook_attn_out",
    "hook_mlp_out",
    "ln_final.hook_normalized",
)


def write_features(
    folder: Path,
    model: Any,
    sae: Any,
    statistics: FeatureStatistics,
    vocabulary: Array,
    *,
    bands: int,
    per_band: int,
    n_tokens: int,
    n_effects: int,
) -> None:
    """Write the two files of one SAE.

    Args:
        folder: its own; is made.
        model, sae: the model and the SAE, for the direct effects on the logits.
        statistics: the statistics of the whole corpus.
        vocabulary: the number of times each token occurs in it.
        bands, per_band: quantile bands, and random contexts shown from each.
        n_tokens: tokens a feature fires on that are kept.
        n_effects: tokens kept that it promotes, and as many that it suppresses.
    """
    folder.mkdir(parents=True, exist_ok=True)
    fires_always = statistics.fired == vocabulary.sum()
    arrays = {
        "fired": statistics.fired,
        "sum": statistics.sum(),
        # Where it does not fire a feature is 0, which is the largest where it is negative everywhere else.
        "maximum": np.where(fires_always, statistics.maximum, np.maximum(statistics.maximum, 0)).astype(np.float32),
        "histogram": statistics.histogram,
        **firing_tokens(statistics, vocabulary, n_tokens),
        **logit_effects(model, sae, n_effects),
    }
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    write_atomically(folder / STATISTICS_FILE, lambda path: save_file(arrays, path))
    write_atomically(folder / CONTEXTS_FILE, lambda path: _write_contexts(path, statistics, bands, per_band))


class FeatureFiles:
    """One SAE's files, opened when they are first read."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._last: tuple[int, Any] = (-1, None)

    @cached_property
    def _statistics(self) -> Any:
        with self._damage():
            return safe_open(regular_file(self.folder / STATISTICS_FILE), framework="np")

    @cached_property
    def _contexts(self) -> Any:
        import pyarrow.parquet as pq

        with self._damage():
            return pq.ParquetFile(regular_file(self.folder / CONTEXTS_FILE), memory_map=True)

    def column(self, name: str) -> Array:
        """One number (or row of numbers) for each feature."""
        with self._damage():
            return self._statistics.get_tensor(name)

    def row(self, feature: int) -> dict[str, Array]:
        """Every number of one feature."""
        with self._damage():
            names = self._statistics.keys()
            needed = (*ROW, *(EFFECTS if any(name in names for name in EFFECTS) else ()))
            if missing := [name for name in needed if name not in names]:
                raise KeyError(f"{STATISTICS_FILE} has no {', '.join(missing)}")
            return {name: self._statistics.get_slice(name)[feature : feature + 1][0] for name in names}

    def contexts(self, feature: int) -> list[dict[str, Any]]:
        """The contexts of one feature: only their row group is read."""
        import pyarrow.compute as pc

        number = feature // FEATURES_PER_GROUP
        with self._damage():
            if self._last[0] != number:  # features are often looked at one after another
                self._last = (number, self._contexts.read_row_group(number))
            group = self._last[1]
            return group.filter(pc.equal(group["feature"], feature)).to_pylist()

    def windows(self, at_most: int = 2**18) -> dict[str, Array]:
        """Contexts of all features, no more than so many, evenly spread: everything but the activations.

        Returns:
            `feature, band, text, position, focus`, one each, and their `tokens` one after another: those of context `i`
            are `offsets[i] : offsets[i + 1]`.
        """
        columns = ["feature", "band", "text", "position", "focus", "tokens"]
        with self._damage():
            table = self._contexts.read(columns)
            table = table.take(np.arange(0, len(table), max(1, -(-len(table) // at_most)))).combine_chunks()
            lists = table["tokens"].combine_chunks()
            offsets = np.append(0, np.cumsum(lists.value_lengths().to_numpy(zero_copy_only=False)))
            return {name: table[name].to_numpy() for name in columns[:-1]} | {
                "tokens": lists.flatten().to_numpy(),
                "offsets": offsets.astype(np.int64),
            }

    @contextmanager
    def _damage(self) -> Iterator[None]:
        """What reading raises, in our words."""
        try:
            yield
        except BilensError:
            raise
        except (SafetensorError, OSError, ValueError, KeyError, IndexError, NotImplementedError) as error:
            raise CheckpointError(
                f"the files in {self.folder} are damaged: {error}. Delete the store and build it again."
            ) from error


# --- the numbers ------------------------------------------------------------------------------------------------------


def firing_tokens(statistics: FeatureStatistics, vocabulary: Array, n: int) -> dict[str, Array]:
    """The `n` tokens that carry most of each feature's activation, with how often it fires on them.

    `token_pmi` is the pointwise mutual information in nats, `log(p(token | fires) / p(token))`; `token_share` the share
    of the feature's |activation|. Unused places hold token -1.
    """
    d_sae, n_seen = statistics.d_sae, int(vocabulary.sum())
    n = min(n, len(vocabulary))
    tokens, counts = np.full((d_sae, n), -1, np.int32), np.zeros((d_sae, n), np.int64)
    share, pmi = np.zeros((d_sae, n), np.float32), np.zeros((d_sae, n), np.float32)
    for start, stop in blocks(d_sae, max(1, 2**24 // len(vocabulary))):
        feature, token, count, mass = statistics.tokens.pairs(start, stop, statistics.fired)
        total = np.bincount(feature - start, mass, stop - start)
        kept = first_of_groups((token, -count, -mass), feature - start, n)
        feature, token, count, mass = feature[kept], token[kept], count[kept], mass[kept]
        place = np.arange(len(kept)) - np.searchsorted(feature, feature)
        tokens[feature, place], counts[feature, place] = token, count
        share[feature, place] = mass / np.maximum(total[feature - start], 1e-300)
        expected = statistics.fired[feature] * (vocabulary[token] / n_seen)
        pmi[feature, place] = np.log(count / expected)
    return {"tokens": tokens, "token_counts": counts, "token_share": share, "token_pmi": pmi}


@torch.no_grad()
def logit_effects(model: Any, sae: Any, n: int) -> dict[str, Array]:
    """The tokens whose logits each feature raises and lowers most by the direct path, per unit of activation.

    That is `W_dec @ W_U`, before the final norm's division. It has a meaning only where an SAE writes to the residual
    stream; anywhere else (the input of an MLP, say) a feature acts through the layer that reads it: nothing is given.
    """
    writes = splice_hooks(model, sae)[1]
    if not writes.endswith(WRITES_TO_LOGITS):
        return {}
    W_dec: Float[Tensor, "d_sae d_model"] = sae.W_dec.detach().float()
    if getattr(sae.cfg, "rescale_acts_by_decoder_norm", False):
        W_dec = W_dec / W_dec.norm(dim=-1, keepdim=True)
    W_U = model.W_U.detach().float().to(W_dec.device)
    n = min(n, W_U.shape[1])
    parts: dict[str, list[Array]] = {"promoted": [], "promotes": [], "suppressed": [], "suppresses": []}
    for start, stop in blocks(len(W_dec), max(1, LOGITS_AT_ONCE // W_U.shape[1])):
        effects = W_dec[start:stop] @ W_U
        for tokens, values, largest in (("promoted", "promotes", True), ("suppressed", "suppresses", False)):
            top = effects.topk(n, dim=-1, largest=largest)
            parts[tokens].append(top.indices.int().cpu().numpy())
            parts[values].append(top.values.cpu().numpy())
    return {name: np.concatenate(arrays) for name, arrays in parts.items()}


def stored_names(
    files: FeatureFiles, n_tokens: int, before: int, strings: Sequence[str]
) -> tuple[Sequence[str], frozenset[int]]:
    """The names of a store's features, and which are dense: `find_names` on what is stored.

    The contexts of all features together stand for the corpus.

    Args:
        files: the files of the SAE.
        n_tokens: the number of tokens of the corpus.
        before: the number of tokens that were stored before each firing.
        strings: the tokens' strings.
    """
    tokens = files.column("tokens")
    feature, place = np.nonzero(tokens >= 0)
    use = TokenUse(
        feature,
        tokens[feature, place],
        *(files.column(name)[feature, place] for name in ("token_counts", "token_share", "token_pmi")),
    )
    held = files.windows()
    top = np.flatnonzero(held["band"] == TOP)
    rank = np.arange(len(top)) - np.searchsorted(held["feature"][top], held["feature"][top])
    top = top[rank < STRONGEST]
    context = np.repeat(np.arange(len(held["text"])), np.diff(held["offsets"]))
    at = np.arange(len(held["tokens"])) - held["offsets"][context]
    # What stands before the first tokens of a window was not stored, unless the context begins there.
    whole = np.flatnonzero((at >= BEFORE) | (held["focus"][context] < before))
    places = np.stack([held["text"][context], (held["position"] - held["focus"])[context] + at], axis=1)[whole]
    whole = whole[np.unique(places, axis=0, return_index=True)[1]]
    return find_names(
        len(tokens),
        use,
        (held["feature"][top], _window_grams(held, top, held["focus"][top])),
        _window_grams(held, context[whole], at[whole]),
        files.column("fired") / max(n_tokens, 1),
        strings,
    )


def _window_grams(held: dict[str, Array], context: Array, at: Array) -> Array:
    """`grams` at places in stored windows."""
    places = at[:, None].astype(np.int64) - np.arange(BEFORE + 1)
    return np.where(places >= 0, held["tokens"][held["offsets"][context][:, None] + np.maximum(places, 0)], -1)


# --- the contexts -----------------------------------------------------------------------------------------------------


def _write_contexts(path: Path, statistics: FeatureStatistics, bands: int, per_band: int) -> None:
    import pyarrow.parquet as pq

    # Sorted in before anything is read: what waits is not in the arrays.
    statistics.top.settle()
    statistics.random.settle()
    with pq.ParquetWriter(path, _schema(), compression="zstd") as writer:
        for table in _context_tables(statistics, bands, per_band):
            writer.write_table(table, row_group_size=max(1, len(table)))


def _context_tables(statistics: FeatureStatistics, bands: int, per_band: int) -> Iterator["pa.Table"]:
    """One table, hence one row group, for every `FEATURES_PER_GROUP` features."""
    import pyarrow as pa

    for start, stop in blocks(statistics.d_sae, FEATURES_PER_GROUP):
        parts = []
        for best in (statistics.top, statistics.random):
            feature, place = np.nonzero(best.key[start:stop] < LAST)
            feature += start
            if best is statistics.top:
                band: Array = np.full(len(feature), TOP)
                quantile: Array = np.full(len(feature), np.nan)
                rank = place
            else:
                quantile = statistics.quantiles(feature, best.value[feature, place], place)
                band = (quantile * bands).astype(np.int64)
                # Places are in the order of the hashes, so the first of a band are random ones of it.
                kept = first_of_groups((place,), (feature - start) * bands + band, per_band)
                feature, place, quantile, band = feature[kept], place[kept], quantile[kept], band[kept]
                group = feature * bands + band
                rank = np.arange(len(group)) - np.searchsorted(group, group)
            parts.append(_columns(best, feature, place) | {"band": band, "rank": rank, "quantile": quantile})
        order = np.lexsort([np.concatenate([part[name] for part in parts]) for name in ("rank", "band", "feature")])
        columns = []
        for field in _schema():
            if pa.types.is_list(field.type):
                array = pa.concat_arrays([part[field.name] for part in parts]).take(pa.array(order))
            else:
                array = pa.array(np.concatenate([part[field.name] for part in parts])[order])
            columns.append(array.cast(field.type))
        yield pa.Table.from_arrays(columns, schema=_schema())


def _schema() -> "pa.Schema":
    import pyarrow as pa

    return pa.schema(
        {
            "feature": pa.int32(),
            "band": pa.int8(),
            "rank": pa.int32(),
            "activation": pa.float32(),
            "quantile": pa.float32(),
            "text": pa.int64(),
            "position": pa.int64(),
            "focus": pa.int32(),
            "tokens": pa.list_(pa.int32()),
            "values": pa.list_(pa.float32()),
        }
    )


def _columns(best: BestPlaces, feature: Array, place: Array) -> dict[str, Any]:
    """What is known of some of the best places, windows as lists without what is outside of the context."""
    import pyarrow as pa

    tokens, values = best.tokens[feature, place], best.values[feature, place]
    inside = tokens >= 0
    offsets = np.concatenate([[0], inside.sum(1).cumsum()]).astype(np.int32)
    return {
        "feature": feature,
        "activation": best.value[feature, place],
        "text": best.text[feature, place],
        "position": best.position[feature, place],
        "focus": inside[:, : best.window.before].sum(1),
        "tokens": pa.ListArray.from_arrays(offsets, tokens[inside]),
        "values": pa.ListArray.from_arrays(offsets, values[inside]),
    }


def vocabulary_strings(tokenizer: Any, d_vocab: int) -> Sequence[str]:
    """Every token's string; ids past the tokenizer's (padding of the embedding) have a name of their own."""
    found = tokenizer.convert_ids_to_tokens(list(range(d_vocab)))
    return [f"[{i}]" if token is None else token for i, token in enumerate(found)]
