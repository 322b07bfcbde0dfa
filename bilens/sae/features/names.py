"""Names that people can read: the tokens that a feature prefers, after the words that it needs before them.

    101 didn't → know              it fires on "know", and on those that follow "didn't"
    358 not … → scared/nice        "not" is among the few words before
    1494 better/very (dense)       it fires on more than a tenth of all tokens, so it tells little

1. tokens by activation times PMI, the activation where it is strong counting more. By activation alone every other
   feature would be called "," or "the"
2. the words before, from the feature's strongest firings, one per text: a word belongs to the name if it precedes most
   of them, and does so much more often than it precedes the same tokens everywhere (odds `ODDS` times as high)
3. where there is such a word, the tokens after the arrow are those of the strongest firings that follow it
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from bilens.errors import ArgumentError
from bilens.sae.train.evaluation import DENSE

TOKENS = 3  # in a name
STRONGEST = 12  # firings of a feature that its words before are taken from, one per text
BEFORE = 4  # tokens before a firing that are looked at
NEEDED = 4  # firings without which no words before are looked for
MOST, NEARLY_ALL = 0.6, 0.8  # of the strongest firings: the share that the words before must precede, at once or at all
EACH = 0.2  # the share that each of several words must precede
ODDS = 3.0  # how much higher the odds are than before the same tokens everywhere
LEAST = 1 / 3  # of the best token's score, or count: a token below it is left out of the name

Array = NDArray[Any]


@dataclass(frozen=True, eq=False)
class FeatureNames(Sequence[str]):
    """The names of an SAE's features: `names[101]` is `"101 didn't → know"`, the index and what the feature fires on.

    Attributes:
        n: the number of features.
        find: what is known of them, called when the first name is asked for: the text of each name, without the index,
            and the dense features. A silent feature's text is empty.
    """

    n: int
    find: Callable[[], "tuple[Sequence[str], frozenset[int]]"] = field(repr=False)

    @classmethod
    def of(cls, texts: Sequence[str], dense: Sequence[int] | frozenset[int] = ()) -> "FeatureNames":
        """Names that are known already."""
        found = (tuple(texts), frozenset(dense))
        return cls(len(found[0]), lambda: found)

    @cached_property
    def found(self) -> "tuple[Sequence[str], frozenset[int]]":
        """What `find` gives."""
        return self.find()

    @property
    def texts(self) -> Sequence[str]:
        """The names without the index: `didn't → know`."""
        return self.found[0]

    @property
    def dense(self) -> frozenset[int]:
        """The features that fire on more than a tenth of all tokens; their names end in `(dense)`."""
        return self.found[1]

    def renamed(self, texts: Mapping[int, str]) -> "FeatureNames":
        """The same names, but for some features.

        Raises:
            ArgumentError: there is no such feature.
        """
        if outside := [feature for feature in texts if not 0 <= feature < self.n]:
            raise ArgumentError(f"feature {outside[0]} is given a name, and there are only {self.n} features.")

        def find() -> tuple[Sequence[str], frozenset[int]]:
            return [texts.get(feature, text) for feature, text in enumerate(self.texts)], self.dense

        return FeatureNames(self.n, find)

    @cached_property
    def _labels(self) -> list[str]:
        marks = (" (dense)" if feature in self.dense else "" for feature in range(self.n))
        return [f"{i} {text or '(silent)'}{mark}" for i, (text, mark) in enumerate(zip(self.texts, marks, strict=True))]

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[str]: ...

    def __getitem__(self, index: int | slice) -> str | Sequence[str]:
        return self._labels[index]

    def __len__(self) -> int:
        return self.n

    def __eq__(self, other: object) -> bool:
        return (
            list(self) == list(other) if isinstance(other, Sequence) and not isinstance(other, str) else NotImplemented
        )

    __hash__ = None  # type: ignore[assignment]

    def __reduce__(self) -> Any:
        return FeatureNames.of, (tuple(self.texts), self.dense)


# --- pure functions ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TokenUse:
    """The tokens that each feature fires on, one entry per feature and token, sorted by feature.

    Attributes:
        feature, token: the pair.
        count: on how many occurrences of the token the feature fires.
        share: the share of the feature's |activation| that the token carries.
        pmi: `log(p(token | fires) / p(token))`, in nats.
    """

    feature: Array
    token: Array
    count: Array
    share: Array
    pmi: Array


def find_names(
    d_sae: int,
    use: TokenUse,
    strongest: tuple[Array, Array],
    everywhere: Array,
    frequency: Array,
    strings: Sequence[str],
) -> tuple[Sequence[str], frozenset[int]]:
    """Name features after what they fire on (see the module): the texts of the names, and the dense features.

    Args:
        d_sae: the number of features.
        use: the tokens that each fires on.
        strongest: the features' strongest firings, one per text and `STRONGEST` of each: the feature, sorted, and the
            `grams` there.
        everywhere: the grams of every token of the corpus, or of a sample of it.
        frequency: the share of all tokens on which each feature fires.
        strings: the tokens' strings.
    """
    corpus = _Corpus(everywhere)
    rows = np.searchsorted(use.feature, np.arange(d_sae + 1))
    firings = np.searchsorted(strongest[0], np.arange(d_sae + 1))
    dense = frozenset(np.flatnonzero(frequency > DENSE).tolist())
    texts = []
    for feature in range(d_sae):
        at = slice(rows[feature], rows[feature + 1])
        scores = _scores(use, at)
        if not scores:
            texts.append("")
            continue
        best = [token for token, score in scores.items() if score >= LEAST * next(iter(scores.values()))][:TOKENS]
        words, after = "", np.zeros(0, bool)
        grams = strongest[1][firings[feature] : firings[feature + 1]]
        if len(grams) >= NEEDED and feature not in dense:
            words, after = _words_before(grams, corpus, strings)
        if words:
            tokens, counts = np.unique(grams[after, 0], return_counts=True)
            order = sorted(range(len(tokens)), key=lambda k: (-counts[k], -scores.get(int(tokens[k]), 0.0)))
            best = [int(tokens[k]) for k in order if counts[k] >= max(2, LEAST * counts[order[0]])][:TOKENS]
        text = "/".join(readable([strings[token]]) for token in best)
        texts.append(f"{words} → {text}" if words else text)
    return texts, dense


def grams(tokens: Array, inside: Array, rows: Array, positions: Array) -> Array:
    """Tokens at some places and the `BEFORE` ones in front of each, the nearest first; -1 where the text has begun.

    Args:
        tokens: `(text, pos)`.
        inside: of the same shape: what counts as the text.
        rows, positions: the places.
    """
    places = positions[:, None] - np.arange(BEFORE + 1)
    there = (places >= 0) & (inside[rows[:, None], np.maximum(places, 0)] > 0)
    return np.where(there, tokens[rows[:, None], np.maximum(places, 0)], -1)


def readable(tokens: Sequence[str]) -> str:
    """Token strings as running text: `["didn", "'", "t"]` is `didn't`, `["Ġgo", "Ġthere"]` is `go there`."""
    text = "".join(tokens) if any(token[:1] in "Ġ▁" for token in tokens if token) else " ".join(tokens)
    text = re.sub("[Ġ▁]", " ", text).replace("Ċ", "↵").strip() or "␣"
    if len(tokens) == 1:
        return text
    text = re.sub(r"(\w) ' (s|t|m|d|re|ve|ll)\b", r"\1'\2", text.replace(" ##", ""))
    return re.sub(r" ([.,!?])", r"\1", text)


class _Corpus:
    """How often words precede a token everywhere."""

    def __init__(self, everywhere: Array):
        self.grams = everywhere[everywhere[:, 0].argsort(kind="stable")]
        self._known: dict[tuple[int, int], dict[int, float]] = {}

    def before(self, token: int, distance: int) -> dict[int, float]:
        """The share of a token's occurrences that each word precedes at a distance, or within `BEFORE` (0)."""
        key = (token, distance)
        if key not in self._known:
            low, high = np.searchsorted(self.grams[:, 0], [token, token + 1])
            here = self.grams[low:high, distance] if distance else _distinct(self.grams[low:high, 1:])
            words, counts = np.unique(here, return_counts=True)
            self._known[key] = dict(zip(words.tolist(), (counts / max(1, high - low)).tolist(), strict=True))
        return self._known[key]

    def needed(self, found: Array, distance: int) -> Iterator[tuple[int, float, bool]]:
        """Words before some firings, the commonest first: the share that each precedes, and whether it is needed."""
        here = found[:, distance] if distance else _distinct(found[:, 1:])
        words, counts = np.unique(here[here >= 0], return_counts=True)
        for place in np.argsort(-counts, kind="stable").tolist():
            word, count = int(words[place]), int(counts[place])
            if count < EACH * len(found):
                return
            usual = float(np.mean([self.before(token, distance).get(word, 0.0) for token in found[:, 0].tolist()]))
            odds = (count + 0.5) / (len(found) - count + 0.5)
            yield word, count / len(found), odds * (1 - usual) >= ODDS * usual


def _distinct(words: Array) -> Array:
    """The distinct words of each row, flat."""
    words = np.sort(words, axis=1)
    new = np.ones(words.shape, bool)
    new[:, 1:] = words[:, 1:] != words[:, :-1]
    return words[new & (words >= 0)]


def _scores(use: TokenUse, at: slice) -> dict[int, float]:
    """Activation times PMI of a feature's tokens, the best first; by activation alone where it prefers none."""
    share, count = use.share[at].astype(np.float64), use.count[at]
    if not len(share):
        return {}
    strength = share**2 / count  # the mean activation counts twice: near to the sum of squares
    scores = strength * use.pmi[at] / strength.sum()
    if scores.max() <= 0:
        scores = strength / strength.sum()
    order = np.argsort(-scores, kind="stable")
    return dict(zip(use.token[at][order].tolist(), scores[order].tolist(), strict=True))


def _words_before(found: Array, corpus: _Corpus, strings: Sequence[str]) -> tuple[str, Array]:
    """The words that the strongest firings need before them, and which of the firings follow them; "" for none."""
    nearest = list(corpus.needed(found, 1))
    several = [word for word, _, needed in nearest if needed][:TOKENS]
    covered = np.isin(found[:, 1], several)
    if len(several) > 1 and covered.mean() >= MOST and nearest[0][1] < covered.mean():
        return "/".join(_with_apostrophe(found[found[:, 1] == word], strings) for word in several), covered
    run: list[int] = []
    deep, follows, after = 0, np.ones(len(found), bool), np.zeros(0, bool)
    for distance in range(1, BEFORE):
        word, share, needed = next(corpus.needed(found, distance), (-1, 0.0, False))
        if share < MOST:
            break
        run.append(word)
        follows = follows & (found[:, distance] == word)
        if needed and follows.mean() >= MOST / 2:
            deep, after = distance, follows
    if deep:
        return readable([strings[word] for word in reversed(run[:deep])]), after
    anywhere = [(share, word) for word, share, needed in corpus.needed(found, 0) if needed and share >= NEARLY_ALL]
    if not anywhere:
        return "", after
    word = max(anywhere)[1]
    return f"{readable([strings[word]])} …", (found[:, 1:] == word).any(1)


def _with_apostrophe(found: Array, strings: Sequence[str]) -> str:
    """The word before some firings, with what it is the end of: `didn't` rather than `t`."""
    common = [np.unique(found[:, distance], return_counts=True) for distance in (1, 2, 3)]
    words = [int(words[counts.argmax()]) for words, counts in common]
    whole = words[2] >= 0 and words[1] >= 0 and readable([strings[words[1]]]) == "'"
    return readable([strings[word] for word in (reversed(words) if whole else words[:1])])
