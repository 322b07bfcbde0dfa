"""What a feature store counts, for all features of one SAE at once, in memory that does not grow with the corpus.

    1. a forward pass is a flat list of tokens (`Places`) and, for each SAE, where its features fire on them (`Firings`)
    2. `add` counts firings, sums and histograms them, counts them by token, and keeps the best few of each feature:
       the strongest (one per context), and a random sample (those whose seeded hash is smallest)
    3. `merge` puts the statistics of two parts of a corpus together

Everything kept is independent of the order, bit for bit: counts are integers, sums are exact (fixed point), and the
best few are the first of one total order over all firings. So statistics of parts, merged in any order, are those of
the whole; which is what resuming and sharing the pass among processes rest on.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray

Array = NDArray[Any]

LAST = np.iinfo(np.int64).max  # the key of a place that is still empty
LARGEST = 2.0**31  # activations from there on are refused: sums of them would not fit
COARSE, FINE = 16, 40  # bits behind the point of the two words of a sum: exact to 2^-56
MASS = 24  # the same for the activation a feature spends on a token

BINS_PER_OCTAVE = 4
SMALLEST_EXPONENT, LARGEST_EXPONENT = -16, 16
N_BINS = (LARGEST_EXPONENT - SMALLEST_EXPONENT) * BINS_PER_OCTAVE
_FIRST_BIN = (127 + SMALLEST_EXPONENT) * BINS_PER_OCTAVE  # float32 counts its exponents from -127
_MANTISSA_BITS = 21  # that do not tell bins apart: 23 less the two that divide an octave by four

OVERSAMPLED = 2  # random firings kept for each one shown, so that every band of the quantiles gets its share
TOKEN_SAMPLE = 256  # firings from which tokens are counted where there is no room to count all


@dataclass(frozen=True)
class Window:
    """How many tokens are kept before and after the one that counts."""

    before: int
    after: int

    @property
    def width(self) -> int:
        return self.before + 1 + self.after


@dataclass(frozen=True)
class Places:
    """The tokens of one forward pass, flat: contexts one after another, `[BOS]` and padding left out.

    Attributes:
        ids: token ids.
        text: the number of the text in the corpus, from 0.
        position: the index in `model.to_tokens(text, truncate=False)`, where `[BOS]` is 0.
        start, end: the first token of the context in this list, and the one behind its last.
    """

    ids: Int[np.ndarray, "n"]
    text: Int[np.ndarray, "n"]
    position: Int[np.ndarray, "n"]
    start: Int[np.ndarray, "n"]
    end: Int[np.ndarray, "n"]


@dataclass(frozen=True)
class Firings:
    """Where features fire on `Places`, and how strongly; sorted by place, then by feature."""

    place: Int[np.ndarray, "m"]
    feature: Int[np.ndarray, "m"]
    value: Float[np.ndarray, "m"]

    def around(self, places: Places, chosen: Int[np.ndarray, "c"], window: Window, d_sae: int) -> tuple[Array, Array]:
        """Token ids (-1 outside of the context) and the feature's activations around some of the firings."""
        place = self.place[chosen]
        near = place[:, None] + np.arange(-window.before, window.after + 1)
        inside = (near >= places.start[place][:, None]) & (near < places.end[place][:, None])
        near = np.where(inside, near, place[:, None])
        tokens = np.where(inside, places.ids[near], -1).astype(np.int32)
        keys = self.place * d_sae + self.feature  # ascending, as firings are sorted
        wanted = near * d_sae + self.feature[chosen][:, None]
        found = np.minimum(np.searchsorted(keys, wanted), max(len(keys) - 1, 0))
        fires = inside & (keys[found] == wanted)
        return tokens, np.where(fires, self.value[found], 0).astype(np.float32)


class BestPlaces:
    """For every feature the `n` firings with the smallest keys, each with the tokens around it.

    Ties go to the earlier text, then to the earlier position. Candidates wait until there are enough of them to be
    worth sorting in.
    """

    FIELDS = ("key", "text", "position", "value", "tokens", "values")

    def __init__(self, d_sae: int, n: int, window: Window):
        self.d_sae, self.n, self.window = d_sae, n, window
        self.key = np.full((d_sae, n), LAST)
        self.text = np.full((d_sae, n), -1)
        self.position = np.full((d_sae, n), -1)
        self.value = np.zeros((d_sae, n), np.float32)
        self.tokens = np.full((d_sae, n, window.width), -1, np.int32)
        self.values = np.zeros((d_sae, n, window.width), np.float32)
        self._waiting: list[tuple[Array, ...]] = []
        self._n_waiting = 0

    def candidates(self, feature: Array, key: Array) -> Array:
        """Indices of those that may still be among the best."""
        return np.flatnonzero(key <= self.key[:, -1][feature])

    def add(self, firings: Firings, places: Places, chosen: Array, key: Array) -> None:
        """Offer some of the firings, with their keys."""
        at = firings.place[chosen]
        windows = firings.around(places, chosen, self.window, self.d_sae)
        self._offer(firings.feature[chosen], key, places.text[at], places.position[at], firings.value[chosen], *windows)

    def merge(self, other: "BestPlaces") -> None:
        """Offer what another one kept."""
        other.settle()
        for at in range(0, self.d_sae, self._block):
            rows = slice(at, at + self._block)
            feature, place = np.nonzero(other.key[rows] < LAST)
            feature += at
            self._offer(feature, *(getattr(other, name)[feature, place] for name in self.FIELDS))

    def settle(self) -> None:
        """Sort in what waits."""
        if not self._waiting:
            return
        feature, *new = (np.concatenate(parts) for parts in zip(*self._waiting, strict=True))
        self._waiting, self._n_waiting = [], 0
        for at in range(0, self.d_sae, self._block):
            chosen = np.flatnonzero((feature >= at) & (feature < at + self._block))
            if len(chosen):
                self._sort_in(feature[chosen], [part[chosen] for part in new])

    @property
    def _block(self) -> int:
        """Features at a time, so that sorting copies no more than some tens of megabytes."""
        return max(1, 2**22 // (self.n * self.window.width))

    def _offer(self, *candidates: Array) -> None:
        if len(candidates[0]) == 0:
            return
        self._waiting.append(candidates)
        self._n_waiting += len(candidates[0])
        if self._n_waiting > max(2**15, self.d_sae * self.n // 4):
            self.settle()

    def _sort_in(self, feature: Array, new: list[Array]) -> None:
        touched, group = np.unique(feature, return_inverse=True)
        both = [
            np.concatenate([getattr(self, name)[touched].reshape(-1, *part.shape[1:]), part])
            for name, part in zip(self.FIELDS, new, strict=True)
        ]
        key, text, position = both[:3]
        group = np.concatenate([np.repeat(np.arange(len(touched)), self.n), group])
        kept = first_of_groups((position, text, key), group, self.n)
        for name, part in zip(self.FIELDS, both, strict=True):
            getattr(self, name)[touched] = part[kept].reshape(len(touched), self.n, *part.shape[1:])


class AllTokens:
    """Firings and activation of every (feature, token), all counted."""

    exact = True

    def __init__(self, d_sae: int, d_vocab: int):
        self.counts = np.zeros((d_sae, d_vocab), np.int32)
        self.mass = np.zeros((d_sae, d_vocab), np.int64)

    def add(self, firings: Firings, places: Places, hashes: Array) -> None:
        at = firings.feature * self.counts.shape[1] + places.ids[firings.place]
        mass = np.rint(np.abs(firings.value.astype(np.float64)) * 2.0**MASS).astype(np.int64)
        _index_add(self.counts.reshape(-1), at, np.ones(len(at), np.int32))
        _index_add(self.mass.reshape(-1), at, mass)

    def pairs(self, start: int, stop: int, fired: Array) -> tuple[Array, Array, Array, Array]:
        """Feature, token, count and mass of the pairs there are, of features `start` to `stop`."""
        feature, token = np.nonzero(self.counts[start:stop])
        feature += start
        return feature, token, self.counts[feature, token], self.mass[feature, token] / 2.0**MASS

    def merge(self, other: "AllTokens") -> None:
        self.counts += other.counts
        self.mass += other.mass

    def arrays(self) -> dict[str, Array]:
        return {"counts": self.counts, "mass": self.mass}


class SampledTokens:
    """The same, estimated from a random sample of each feature's firings; exact where it holds all of them."""

    exact = False

    def __init__(self, d_sae: int):
        self.sample = BestPlaces(d_sae, TOKEN_SAMPLE, Window(0, 0))

    def add(self, firings: Firings, places: Places, hashes: Array) -> None:
        chosen = self.sample.candidates(firings.feature, hashes)
        self.sample.add(firings, places, chosen, hashes[chosen])

    def pairs(self, start: int, stop: int, fired: Array) -> tuple[Array, Array, Array, Array]:
        """As `AllTokens.pairs`; counts and masses scaled up to all firings."""
        self.sample.settle()
        feature, place = np.nonzero(self.sample.key[start:stop] < LAST)
        feature += start
        tokens, values = self.sample.tokens[feature, place, 0], np.abs(self.sample.value[feature, place])
        n_tokens = int(tokens.max(initial=0)) + 1
        pairs, group, count = np.unique(feature * n_tokens + tokens, return_inverse=True, return_counts=True)
        mass = np.bincount(group, values.astype(np.float64), len(pairs))
        feature, token = np.divmod(pairs, n_tokens)
        scale = fired[feature] / np.minimum(fired[feature], TOKEN_SAMPLE)
        return feature, token, np.rint(count * scale).astype(np.int64), mass * scale

    def merge(self, other: "SampledTokens") -> None:
        self.sample.merge(other.sample)

    def arrays(self) -> dict[str, Array]:
        self.sample.settle()
        return {name: getattr(self.sample, name) for name in BestPlaces.FIELDS}


class FeatureStatistics:
    """Everything counted about the features of one SAE.

    Args:
        d_sae: features.
        d_vocab: tokens.
        n_top: strongest firings kept, one per context.
        n_random: random firings kept.
        window: tokens kept around each.
        count_all_tokens: count every (feature, token); otherwise estimate from a sample.
        seed: the seed of the random samples.
    """

    def __init__(
        self, d_sae: int, d_vocab: int, n_top: int, n_random: int, window: Window, count_all_tokens: bool, seed: int
    ):
        self.d_sae, self.seed = d_sae, seed
        self.fired = np.zeros(d_sae, np.int64)
        self.sums = np.zeros((2, d_sae), np.int64)
        self.maximum = np.full(d_sae, -np.inf, np.float32)
        self.histogram = np.zeros((d_sae, N_BINS), np.int64)
        self.top = BestPlaces(d_sae, n_top, window)
        self.random = BestPlaces(d_sae, n_random, window)
        self.tokens: Any = AllTokens(d_sae, d_vocab) if count_all_tokens else SampledTokens(d_sae)

    def add(self, firings: Firings, places: Places) -> None:
        """Count the firings of one forward pass.

        Its contexts must be whole: the strongest firing of a context is looked for here.
        """
        feature, value = firings.feature, firings.value
        if len(feature) == 0:
            return
        self.fired += np.bincount(feature, minlength=self.d_sae)
        add_exactly(self.sums, feature, value)
        np.maximum.at(self.maximum, feature, value)
        _index_add(self.histogram.reshape(-1), feature * N_BINS + histogram_bin(value), np.ones(len(feature), np.int64))
        at = firings.place
        hashes = place_hashes(self.seed, feature, places.text[at], places.position[at])
        self.tokens.add(firings, places, hashes)

        chosen = self.random.candidates(feature, hashes)
        self.random.add(firings, places, chosen, hashes[chosen])

        key = strength_key(value)
        chosen = self.top.candidates(feature, key)
        context = feature[chosen] * (len(places.ids) + 1) + places.start[at[chosen]]
        _, group = np.unique(context, return_inverse=True)
        chosen = chosen[first_of_groups((at[chosen], key[chosen]), group, 1)]
        self.top.add(firings, places, chosen, key[chosen])

    def merge(self, other: "FeatureStatistics") -> None:
        """Add what another part of the corpus gave."""
        self.fired += other.fired
        self.sums += other.sums
        _carry(self.sums)
        np.maximum(self.maximum, other.maximum, out=self.maximum)
        self.histogram += other.histogram
        self.top.merge(other.top)
        self.random.merge(other.random)
        self.tokens.merge(other.tokens)

    def sum(self) -> Float[np.ndarray, "d_sae"]:
        """Each feature's activations, added up exactly and rounded once."""
        return self.sums[0] / 2.0**COARSE + self.sums[1] / 2.0 ** (COARSE + FINE)

    def arrays(self) -> dict[str, Array]:
        """The whole state by name; views, not copies."""
        self.top.settle()
        self.random.settle()
        arrays = {name: getattr(self, name) for name in ("fired", "sums", "maximum", "histogram")}
        for part in ("top", "random"):
            arrays |= {f"{part}.{name}": getattr(getattr(self, part), name) for name in BestPlaces.FIELDS}
        return arrays | {f"tokens.{name}": array for name, array in self.tokens.arrays().items()}

    def load(self, read: Callable[[str], Array]) -> None:
        """Take over a state that `arrays` gave; `read` gives each by its name."""
        for name, array in self.arrays().items():
            array[...] = read(name)

    def quantiles(
        self, feature: Int[np.ndarray, "n"], value: Float[np.ndarray, "n"], tie: Int[np.ndarray, "n"]
    ) -> Float[np.ndarray, "n"]:
        """The share of a feature's firings that are weaker, estimated for a random sample of them.

        How many are in weaker bins of the histogram is known; within a bin, the sample's members are spread evenly.

        Args:
            feature, value: the feature and its activation in each sample.
            tie: a number that puts equal activations in order.
        """
        place = histogram_bin(value)
        _, group, size = np.unique(feature * N_BINS + place, return_inverse=True, return_counts=True)
        order = np.lexsort((tie, np.abs(value), group))
        rank = np.empty(len(order))
        rank[order] = np.arange(len(order)) - (size.cumsum() - size)[group[order]]
        counts = self.histogram[feature]
        below = np.where(np.arange(N_BINS) < place[:, None], counts, 0).sum(1)
        inside = counts[np.arange(len(place)), place] * (rank + 0.5) / size[group]
        return (below + inside) / self.fired[feature]


# --- pure functions ---------------------------------------------------------------------------------------------------


def first_of_groups(keys: tuple[Array, ...], group: Array, n: int) -> Array:
    """Indices of the first `n` of each group, group after group; the last of `keys` counts most."""
    order = np.lexsort((*keys, group))
    sorted_group = group[order]
    starts = np.searchsorted(sorted_group, np.arange(int(group.max(initial=-1)) + 1))
    return order[np.arange(len(order)) - starts[sorted_group] < n]


def add_exactly(sums: Int[np.ndarray, "2 d_sae"], feature: Int[np.ndarray, "n"], value: Float[np.ndarray, "n"]) -> None:
    """Add float32 values to sums in fixed point, two words each: exact from 2^-32 on, in whatever order.

    A float32 from 2^-32 on has no bits below 2^-56; smaller ones are rounded there, each by itself.
    """
    scaled = value.astype(np.float64) * 2.0**COARSE
    coarse = np.rint(scaled)
    fine = np.rint((scaled - coarse) * 2.0**FINE)
    _index_add(sums[0], feature, coarse.astype(np.int64))
    _index_add(sums[1], feature, fine.astype(np.int64))
    _carry(sums)


def _carry(sums: Int[np.ndarray, "2 d_sae"]) -> None:
    """The one way to write a sum: the lower word in [0, 2^FINE)."""
    sums[0] += sums[1] >> FINE
    sums[1] &= (1 << FINE) - 1


def histogram_edges() -> Float[np.ndarray, "n_bins_plus_1"]:
    """Edges of the bins of |activation|, four to an octave; what lies outside is counted in the first or last bin."""
    bits = (np.arange(N_BINS + 1, dtype=np.int32) + _FIRST_BIN) << _MANTISSA_BITS
    return bits.view(np.float32).astype(np.float64)


def histogram_bin(value: Float[np.ndarray, "n"]) -> Int[np.ndarray, "n"]:
    """The bin of each activation: its exponent and the first two bits behind."""
    bits = np.abs(value.astype(np.float32)).view(np.int32) >> _MANTISSA_BITS
    return np.clip(bits.astype(np.int64) - _FIRST_BIN, 0, N_BINS - 1)


def strength_key(value: Float[np.ndarray, "n"]) -> Int[np.ndarray, "n"]:
    """A key that is smaller the larger |value|: the bits of a float32 above zero are ordered as it is."""
    return np.iinfo(np.int32).max - np.abs(value.astype(np.float32)).view(np.int32).astype(np.int64)


def place_hashes(seed: int, feature: Array, text: Array, position: Array) -> Int[np.ndarray, "n"]:
    """63 random bits for each (feature, text, position), the same in every run: splitmix64's finaliser over the three.

    Source: Steele, Lea, Flood, *Fast splittable pseudorandom number generators*, OOPSLA 2014.
    """
    h: Array = np.full(len(feature), seed % 2**64, np.uint64)
    for part in (feature, text, position):
        h = (h ^ part.astype(np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
        h = (h ^ (h >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        h = (h ^ (h >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        h ^= h >> np.uint64(31)
    return (h >> np.uint64(1)).astype(np.int64)


def blocks(n: int, size: int) -> Iterator[tuple[int, int]]:
    """0 to `n` in pieces of `size`."""
    for start in range(0, n, size):
        yield start, min(start + size, n)


def _index_add(total: Array, index: Array, part: Array) -> None:
    """`np.add.at`, many times faster where the index is large."""
    torch.from_numpy(total).index_add_(0, torch.from_numpy(index), torch.from_numpy(part))
