"""What features fire on: top-activating examples and the tokens they prefer, over a set of texts."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Float, Int
from sae_lens import SAE
from scipy.sparse import csr_array
from torch import Tensor

from bilens._core.bare import require_bare
from bilens._core.checks import MEMORY, check_budget, check_finite, check_index, check_sizes, how_many_fit
from bilens.errors import ArgumentError
from bilens.model.attached import encode, splice_hooks
from bilens.model.transformer import HookedBilinearTransformer
from bilens.sae.features.names import STRONGEST, FeatureNames, TokenUse, find_names, grams
from bilens.sae.features.names_file import KeptNames, names_beside
from bilens.sae.texts import example_texts, text_starts

# Bytes: of one activation of a feature while it is looked at, and of one that is kept.
ENTRY, RESULT_ENTRY = 48, 28


@dataclass(frozen=True)
class Example:
    """One place where a feature fires, with the activations around it. `focus` indexes `tokens`."""

    tokens: list[str]
    values: list[float]
    focus: int

    @property
    def activation(self) -> float:
        return self.values[self.focus]


@dataclass(frozen=True)
class FeatureSummary:
    """A feature in words: its name (`137 did not → know`), how often it fires, and where most strongly."""

    feature: int
    density: float
    label: str
    examples: tuple[Example, ...] = field(repr=False)


class DescribedFeatures(Protocol):
    """What is known of an SAE's features on texts: in memory (`FeatureActivations`) or on disk (`store["1-mlp-out"]`).

    Whatever takes one of them takes the other. What needs single tokens takes `FeatureActivations`.
    """

    @property
    def d_sae(self) -> int:
        """How many features there are."""

    def density(self) -> Float[Tensor, "d_sae"]:
        """Share of the tokens on which each feature fires."""

    def typical_activations(self) -> Float[Tensor, "d_sae"]:
        """The mean of each feature's activation over the tokens where it is active; zero for one that never is."""

    def maxima(self) -> Float[Tensor, "d_sae"]:
        """The largest activation of each feature; zero for one that is never above."""

    def labels(self) -> FeatureNames:
        """The names of the features; see `bilens.sae.features.names`."""

    def summary(self, feature: int) -> FeatureSummary:
        """A feature in words and examples."""


@dataclass(frozen=True)
class FeatureActivations:
    """An SAE's activations on texts, sparse: where each feature fires and how strongly.

    Attributes:
        tokens: the texts, `[BOS]` first, padded on the right; `mask` is 1 on what counts (not `[BOS]`, not padding).
        rows, positions, values: one entry per activation, sorted by feature.
        offsets: entries of feature `i` are `offsets[i] : offsets[i + 1]`.
        kept: the names that are kept beside the SAE; the others are made from the texts.
    """

    tokens: Int[Tensor, "text pos"]
    mask: Int[Tensor, "text pos"]
    strings: list[str] = field(repr=False)
    rows: Int[Tensor, "entry"] = field(repr=False)
    positions: Int[Tensor, "entry"] = field(repr=False)
    values: Float[Tensor, "entry"] = field(repr=False)
    offsets: Int[Tensor, "d_sae_plus_1"] = field(repr=False)
    kept: KeptNames | None = field(default=None, repr=False)

    @property
    def d_sae(self) -> int:
        return len(self.offsets) - 1

    def density(self) -> Float[Tensor, "d_sae"]:
        """Share of the tokens on which each feature fires."""
        return self.offsets.diff() / self.mask.sum()

    def entries(self, feature: int) -> slice:
        """Where a feature's entries are."""
        feature = check_index(feature, self.d_sae, "feature {} is outside the SAE's {}")
        return slice(int(self.offsets[feature]), int(self.offsets[feature + 1]))

    def dense(self, feature: int) -> Float[Tensor, "text pos"]:
        """One feature's activation at every position."""
        at = self.entries(feature)
        out = torch.zeros(self.tokens.shape)
        out[self.rows[at], self.positions[at]] = self.values[at]
        return out

    def summary(self, feature: int, n_examples: int = 8, before: int = 12, after: int = 6) -> FeatureSummary:
        """A feature's name and its strongest examples (one per text, in a window).

        Args:
            feature: its index.
            n_examples: the largest number of examples; 0 gives none.
            before, after: tokens shown around where it fires.

        Raises:
            OutOfRangeError: no such feature.
            ArgumentError: a negative number of examples or tokens.
        """
        if min(n_examples, before, after) < 0:
            raise ArgumentError(f"n_examples {n_examples}, before {before} and after {after} must be at least 0.")
        at = self.entries(feature)
        rows, positions, values = self.rows[at], self.positions[at], self.values[at]
        dense = self.dense(feature)
        examples: list[Example] = []
        seen: set[int] = set()
        for entry in values.abs().argsort(descending=True).tolist():
            if len(examples) == n_examples:
                break
            row, position = int(rows[entry]), int(positions[entry])
            if row in seen:
                continue
            seen.add(row)
            first, last = (int(end) for end in self.mask[row].nonzero().aminmax())
            low, high = max(first, position - before), min(last, position + after)
            window = self.tokens[row, low : high + 1].tolist()
            examples.append(
                Example([self.strings[t] for t in window], dense[row, low : high + 1].tolist(), position - low)
            )
        return FeatureSummary(feature, self.density()[feature].item(), self.labels()[feature], tuple(examples))

    def labels(self) -> FeatureNames:
        """The names of the features, found when the first is asked for; see `bilens.sae.features.names`."""
        return self._names

    @cached_property
    def _names(self) -> FeatureNames:
        def find() -> tuple[Sequence[str], frozenset[int]]:
            tokens, mask = self.tokens.numpy(), self.mask.numpy()
            firings = self.strongest(STRONGEST)
            strongest = grams(tokens, mask, self.rows[firings].numpy(), self.positions[firings].numpy())
            return find_names(
                self.d_sae,
                self._token_use(),
                (self.features[firings].numpy(), strongest),
                grams(tokens, mask, *mask.nonzero()),
                self.density().numpy(),
                self.strings,
            )

        found = FeatureNames(self.d_sae, find)
        return found if self.kept is None else self.kept.over(found)

    def maxima(self) -> Float[Tensor, "d_sae"]:
        """The largest activation of each feature; zero for one that is never above."""
        return torch.zeros(self.d_sae).scatter_reduce(0, self.features, self.values, "amax")

    def typical_activations(self) -> Float[Tensor, "d_sae"]:
        """The mean of each feature's activation over the tokens where it is active; zero for one that never is."""
        total = torch.zeros(self.d_sae).index_add_(0, self.features, self.values)
        return total / self.offsets.diff().clamp_min(1)

    def cofiring(self, *, memory: int = MEMORY) -> Float[Tensor, "d_sae d_sae"]:
        """`w_ij`, the mean of `f_i f_j` over all tokens: weights for pairs of features.

        With them `coefficient * weight` is what a pair adds to an output's pre-activation on the average token.

        Args:
            memory: bytes to work in, and at most as many for the result; 1 GiB by default.

        Raises:
            ArgumentError: less memory than a number for every two features takes, and one token's activations.
        """
        return self._products("cofiring", self._tokens, self.values, memory).div_(max(int(self.mask.sum()), 1))

    def cofiring_counts(self, *, memory: int = MEMORY) -> Float[Tensor, "d_sae d_sae"]:
        """On how many tokens every two features fire together; on the diagonal, on how many each fires.

        Args and errors are those of `cofiring`.
        """
        return self._products("cofiring_counts", self._tokens, torch.ones_like(self.values), memory)

    def token_cosines(self, *, memory: int = MEMORY) -> Float[Tensor, "d_sae d_sae"]:
        """Of every two features' activation summed by token of the vocabulary: 1 if they fire on the same words.

        Args and errors are those of `cofiring`.
        """
        words = self.tokens[self.rows, self.positions]
        found = self._products("token_cosines", words, self.values.abs(), memory)
        lengths = found.diagonal().sqrt().clamp_min(1e-12)
        return found.div_(lengths[:, None]).div_(lengths)

    @property
    def _tokens(self) -> Int[Tensor, "entry"]:
        """The place of every entry's token among all."""
        return self.rows * self.tokens.shape[1] + self.positions

    @property
    def features(self) -> Int[Tensor, "entry"]:
        """The feature of every entry."""
        return torch.repeat_interleave(torch.arange(self.d_sae), self.offsets.diff())

    def strongest(self, n: int) -> Int[Tensor, "m"]:
        """The entries where each feature fires most strongly, the best first: one per text, `n` of each feature."""
        features, values = self.features.numpy(), self.values.abs().numpy()
        order = np.lexsort((self.positions.numpy(), self.rows.numpy(), -values, features))
        key = features[order] * len(self.tokens) + self.rows.numpy()[order]
        order = order[np.sort(np.unique(key, return_index=True)[1])]
        rank = np.arange(len(order)) - np.searchsorted(features[order], features[order])
        return torch.from_numpy(order[rank < n])

    def by_place(self) -> csr_array:
        """1 where each feature fires, sparse: `(d_sae, text * pos)`."""
        places = self.rows * self.tokens.shape[1] + self.positions
        ones = np.ones(len(places), dtype=np.int32)
        shape = (self.d_sae, self.tokens.numel())
        return csr_array((ones, places.numpy(), self.offsets.numpy()), shape=shape, copy=True)

    def by_token(self) -> csr_array:
        """Each feature's absolute activation, summed by token of the vocabulary, sparse: `(d_sae, d_vocab)`."""
        words, shape = self.tokens[self.rows, self.positions].numpy(), (self.d_sae, len(self.strings))
        values = self.values.abs().double().numpy()
        mass = csr_array((values, words, self.offsets.numpy()), shape=shape, copy=True)
        mass.sum_duplicates()  # in place
        return mass

    def around(self, entries: Int[Tensor, "n"], before: int, after: int) -> Float[Tensor, "n width"]:
        """The activations of each entry's feature around it; zero outside of the text."""
        n_texts, length = self.tokens.shape
        keys = (self.features * n_texts + self.rows) * length + self.positions  # ascending, as entries are sorted
        near = self.positions[entries, None] + torch.arange(-before, after + 1)
        row = (self.features[entries] * n_texts + self.rows[entries])[:, None] * length
        found = torch.searchsorted(keys, row + near).clamp_max(len(keys) - 1)
        there = (near >= 0) & (near < length) & (keys[found] == row + near)
        return torch.where(there, self.values[found], 0.0)

    def _token_use(self) -> TokenUse:
        d_vocab, features = len(self.strings), self.features.numpy()
        words, values = self.tokens[self.rows, self.positions].numpy(), self.values.abs().double().numpy()
        pairs, group, count = np.unique(features * d_vocab + words, return_inverse=True, return_counts=True)
        feature, token = np.divmod(pairs, d_vocab)
        seen = np.bincount(self.tokens[self.mask > 0].numpy(), minlength=d_vocab)
        total = np.bincount(features, values, self.d_sae)
        expected = self.offsets.diff().numpy()[feature] * (seen[token] / seen.sum())
        share = np.bincount(group, values, len(pairs)) / np.maximum(total[feature], 1e-300)
        return TokenUse(feature, token, count, share, np.log(count / expected))

    def _products(
        self, call: str, places: Int[Tensor, "entry"], values: Float[Tensor, "entry"], memory: int
    ) -> Float[Tensor, "d_sae d_sae"]:
        """The sum over places of products of every two features' values there, a few places at a time."""
        besides = 4 * self.d_sae**2 + 48 * len(values)
        most = how_many_fit(f"{call} of {self.d_sae:,} features", 8 * self.d_sae, memory, besides=besides)
        order = places.argsort(stable=True)
        features, values = self.features[order], values[order]
        places = places[order].unique_consecutive(return_inverse=True)[1]
        total = torch.zeros(self.d_sae, self.d_sae)
        n = int(places[-1]) + 1 if len(places) else 0
        step = min(most, max(1, 2**23 // self.d_sae), max(n, 1))
        edges = torch.searchsorted(places, torch.arange(0, n + step, step)).tolist()
        for chunk, (low, high) in enumerate(pairwise(edges)):
            dense = torch.zeros(step, self.d_sae)
            at = places[low:high] - chunk * step, features[low:high]
            total.addmm_(dense.index_put_(at, values[low:high], accumulate=True).T, dense)
        return total


def names_from_texts(
    model: HookedBilinearTransformer, saes: Sequence[SAE[Any]], texts: Sequence[str] | None = None
) -> list[FeatureNames]:
    """The names of the features of some SAEs: those kept beside them (`names.json`), or else after what they fire on.

    Where names have to be made, the texts run when the first of them is asked for.

    Args:
        model, saes: the same as for `feature_activations`.
        texts: the texts in which to see what features fire on; `None` is `example_texts` of the model.
    """

    @cache
    def names() -> list[FeatureNames]:
        there = example_texts(model) if texts is None else texts
        return [found.labels() for found in feature_activations(model, saes, there)]

    found = [FeatureNames(sae.cfg.d_sae, lambda place=place: names()[place].found) for place, sae in enumerate(saes)]  # type: ignore[misc]
    kept = [names_beside(sae) for sae in saes]
    return [there.over(made) if there else made for there, made in zip(kept, found, strict=True)]


@torch.no_grad()
def feature_activations(
    model: HookedBilinearTransformer,
    saes: Sequence[SAE[Any]],
    texts: Sequence[str],
    *,
    batch_size: int = 32,
    memory: int = MEMORY,
) -> list[FeatureActivations]:
    """Run texts once and keep where every feature of every SAE fires.

    Args:
        model: the model.
        saes: each knows its hook (`metadata.hook_name`); transcoders too.
        texts: each is run from its `[BOS]`, cut to the context.
        batch_size: texts at a time.
        memory: bytes to work in besides the model's pass, and at most as many for the result; 1 GiB by default.

    Raises:
        AlteredModelError: SAEs are attached to the model, or there are hooks on it or on an SAE.
        ArgumentError: the batch size is no positive whole number; less memory than a batch's activations at one
            position take, or, by what the texts run so far give, than the result will take.
        CheckpointError: activations that are not finite, or a damaged `names.json` beside an SAE.
        HookNameError, SAEMismatchError: an SAE that does not belong to this model (see `bilens.model.attached`).
        EmptyTextError: no texts, or one with nothing in it.
        StaleError: the `names.json` beside an SAE is of other weights.
    """
    check_sizes(batch_size=batch_size)
    hooks = [splice_hooks(model, sae, f"SAE {i}")[0] for i, sae in enumerate(saes)]
    require_bare(model, *saes)
    tokens, mask = text_starts(model, texts)
    mask[:, : model.n_bos] = 0
    stop, what = stop_after(hooks), "keeping the features' activations"
    found: list[list[tuple[Tensor, ...]]] = [[] for _ in saes]
    for at in range(0, len(tokens), batch_size):
        rows = tokens[at : at + batch_size].to(model.cfg.device)
        _, cache = model.run_with_cache(rows, names_filter=list(set(hooks)), stop_at_layer=stop)
        for entries, sae, hook in zip(found, saes, hooks, strict=True):
            step = how_many_fit(what, ENTRY * len(rows) * sae.cfg.d_sae, memory, "take a smaller batch_size")
            for start in range(0, tokens.shape[1], step):
                some = slice(start, start + step)
                acts = encode(sae, cache[hook][:, some]).float().cpu() * mask[at : at + batch_size, some, None]
                check_finite("the features' activations", acts, f"the SAE on {hook}")
                row, position, feature = acts.nonzero(as_tuple=True)
                entries.append((row + at, position + start, feature, acts[row, position, feature]))
        n_entries = sum(len(part[0]) for entries in found for part in entries) * len(tokens) // (at + len(rows))
        check_budget(f"{what}, about {n_entries:,} of them,", 2 * RESULT_ENTRY * n_entries, memory, "give fewer texts")
    strings = model.tokenizer.convert_ids_to_tokens(list(range(model.cfg.d_vocab)))
    results = []
    for entries, sae in zip(found, saes, strict=True):
        row, position, feature, value = (torch.cat(parts) for parts in zip(*entries, strict=True))
        entries.clear()
        order = ((feature * len(tokens) + row) * tokens.shape[1] + position).argsort()
        counts = torch.bincount(feature, minlength=sae.cfg.d_sae)
        offsets = torch.cat([torch.zeros(1, dtype=torch.long), counts.cumsum(0)])
        entries_of = (row[order], position[order], value[order], offsets)
        results.append(FeatureActivations(tokens, mask, strings, *entries_of, names_beside(sae)))
    return results


def stop_after(hooks: Sequence[str]) -> int | None:
    """The first layer that none of the hooks needs; `None` where one is behind the last."""
    if any(hook.startswith("ln_final.") for hook in hooks):
        return None
    layers = [re.match(r"blocks\.(\d+)\.", hook) for hook in hooks]
    return max((int(layer[1]) + 1 for layer in layers if layer), default=0)
