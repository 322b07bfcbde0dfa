"""What features fire on: top-activating examples and the tokens they prefer, over a set of texts."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from itertools import pairwise
from typing import Any, Protocol, overload

import torch
from jaxtyping import Float, Int
from sae_lens import SAE
from torch import Tensor

from bilens._core.bare import require_bare
from bilens._core.checks import MEMORY, check_budget, check_finite, check_index, check_sizes, how_many_fit
from bilens.errors import ArgumentError
from bilens.model.attached import encode, splice_hooks
from bilens.model.transformer import HookedBilinearTransformer
from bilens.sae.texts import example_texts, text_starts

NAMING_SHARE = 0.05  # tokens that carry less of a feature's activation would only blur its name

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
    """A feature in words: how often it fires, on which tokens most, and where most strongly."""

    feature: int
    density: float
    tokens: tuple[str, ...]
    examples: tuple[Example, ...] = field(repr=False)

    @property
    def label(self) -> str:
        """`137 not/n't/never`: the index and the tokens it fires on most."""
        return f"{self.feature} {'/'.join(self.tokens[:3])}" if self.tokens else f"{self.feature} (silent)"


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

    def labels(self) -> list[str]:
        """A short name for every feature."""

    def summary(self, feature: int) -> FeatureSummary:
        """A feature in words and examples."""


@dataclass(frozen=True)
class FeatureActivations:
    """An SAE's activations on texts, sparse: where each feature fires and how strongly.

    Attributes:
        tokens: the texts, `[BOS]` first, padded on the right; `mask` is 1 on what counts (not `[BOS]`, not padding).
        rows, positions, values: one entry per activation, sorted by feature.
        offsets: entries of feature `i` are `offsets[i] : offsets[i + 1]`.
    """

    tokens: Int[Tensor, "text pos"]
    mask: Int[Tensor, "text pos"]
    strings: list[str] = field(repr=False)
    rows: Int[Tensor, "entry"] = field(repr=False)
    positions: Int[Tensor, "entry"] = field(repr=False)
    values: Float[Tensor, "entry"] = field(repr=False)
    offsets: Int[Tensor, "d_sae_plus_1"] = field(repr=False)

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
        """A feature's strongest examples (one per text, in a window) and the tokens that carry most activation.

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
        mass = torch.zeros(len(self.strings)).index_add_(0, self.tokens[rows, positions], values.abs())
        words = naming(self._shares(mass, 5))
        return FeatureSummary(feature, self.density()[feature].item(), words, tuple(examples))

    def labels(self) -> list[str]:
        """A short name for every feature: see `FeatureSummary.label`."""
        return [label(feature, self._shares(mass, 3)) for feature, mass in enumerate(self._mass())]

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

    def _shares(self, mass: Float[Tensor, "d_vocab"], n: int) -> list[tuple[str, float]]:
        """The `n` tokens that carry most of a feature's activation, and the share of each; none for a silent one."""
        top = mass.topk(min(n, len(mass)))
        shares = (top.values / mass.sum().clamp_min(1e-12)).tolist()
        return [(self.strings[i], s) for i, s in zip(top.indices.tolist(), shares, strict=True) if s > 0]

    def _mass(self) -> Float[Tensor, "d_sae d_vocab"]:
        """Every feature's absolute activation, summed by token of the vocabulary."""
        mass = torch.zeros(self.d_sae, len(self.strings))
        words = self.tokens[self.rows, self.positions]
        return mass.index_put_((self.features, words), self.values.abs(), accumulate=True)

    def _products(
        self, call: str, places: Int[Tensor, "entry"], values: Float[Tensor, "entry"], memory: int
    ) -> Float[Tensor, "d_sae d_sae"]:
        """The sum over places of products of every two features' values there, a few places at a time."""
        besides = 4 * self.d_sae**2 + 48 * len(values)
        most = how_many_fit(f"{call} of {self.d_sae:,} features", 4 * self.d_sae, memory, besides=besides)
        order = places.argsort(stable=True)
        features, values = self.features[order], values[order]
        places = places[order].unique_consecutive(return_inverse=True)[1]
        total = torch.zeros(self.d_sae, self.d_sae)
        n = int(places[-1]) + 1 if len(places) else 0
        step = min(most, max(1, 2**24 // self.d_sae), max(n, 1))
        edges = torch.searchsorted(places, torch.arange(0, n + step, step)).tolist()
        for chunk, (low, high) in enumerate(pairwise(edges)):
            dense = torch.zeros(step, self.d_sae)
            at = places[low:high] - chunk * step, features[low:high]
            total.addmm_(dense.index_put_(at, values[low:high], accumulate=True).T, dense)
        return total


class FeatureNames(Sequence[str]):
    """Labels of an SAE's features that are found when the first of them is asked for."""

    def __init__(self, n: int, find: Callable[[], Sequence[str]]):
        self._n, self._find = n, find

    @cached_property
    def _names(self) -> Sequence[str]:
        return self._find()

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[str]: ...

    def __getitem__(self, index: int | slice) -> str | Sequence[str]:
        return self._names[index]

    def __len__(self) -> int:
        return self._n

    def __reduce__(self) -> Any:
        return list, (list(self),)

    def __repr__(self) -> str:
        return f"FeatureNames({self._n} features)"


def names_from_texts(
    model: HookedBilinearTransformer, saes: Sequence[SAE[Any]], texts: Sequence[str] | None = None
) -> list[FeatureNames]:
    """Labels of the features of some SAEs, after the tokens they fire on; the texts run when a label is asked for.

    Args:
        model, saes: the same as for `feature_activations`.
        texts: the texts in which to see what features fire on; `None` is `example_texts` of the model.
    """

    @cache
    def labels() -> list[list[str]]:
        there = example_texts(model) if texts is None else texts
        return [found.labels() for found in feature_activations(model, saes, there)]

    return [FeatureNames(sae.cfg.d_sae, lambda place=place: labels()[place]) for place, sae in enumerate(saes)]  # type: ignore[misc]


def naming(tokens: Sequence[tuple[str, float]]) -> tuple[str, ...]:
    """The tokens that name a feature: those that carry a good part of its activation, or the one that carries most."""
    return tuple(token for token, share in tokens if share > NAMING_SHARE) or tuple(token for token, _ in tokens[:1])


def label(feature: int, tokens: Sequence[tuple[str, float]]) -> str:
    """See `FeatureSummary.label`."""
    return FeatureSummary(feature, 0.0, naming(tokens), ()).label


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
        CheckpointError: activations that are not finite.
        HookNameError, SAEMismatchError: an SAE that does not belong to this model (see `bilens.model.attached`).
        EmptyTextError: no texts, or one with nothing in it.
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
        results.append(FeatureActivations(tokens, mask, strings, row[order], position[order], value[order], offsets))
    return results


def stop_after(hooks: Sequence[str]) -> int | None:
    """The first layer that none of the hooks needs; `None` where one is behind the last."""
    if any(hook.startswith("ln_final.") for hook in hooks):
        return None
    layers = [re.match(r"blocks\.(\d+)\.", hook) for hook in hooks]
    return max((int(layer[1]) + 1 for layer in layers if layer), default=0)
