"""Names of features: tokens by activation and PMI, the words that a feature needs before them, and names as a list."""

import pickle

import pytest
import torch

from bilens.errors import ArgumentError
from bilens.sae.features.examples import FeatureActivations
from bilens.sae.features.names import FeatureNames, readable


def fires_where(texts, fires):
    """A `FeatureActivations` of one feature: `fires(words, position)` is its activation."""
    strings = ["[BOS]", *sorted({word for text in texts for word in text.split()})]
    words = [["[BOS]", *text.split()] for text in texts]
    length = max(map(len, words))
    tokens = torch.zeros(len(texts), length, dtype=torch.long)
    mask = torch.zeros(len(texts), length, dtype=torch.long)
    values = torch.zeros(len(texts), length)
    for row, text in enumerate(words):
        for position, word in enumerate(text):
            tokens[row, position] = strings.index(word)
            mask[row, position] = position > 0
            values[row, position] = fires(text, position) if position else 0.0
    at = values.nonzero(as_tuple=True)
    return FeatureActivations(tokens, mask, strings, *at, values[at], torch.tensor([0, len(at[0])]))


def name(texts, fires):
    return fires_where(texts, fires).labels()[0]


FILLER = ["we saw a cat on a mat and it sat", "you had to go to the shop by the sea"] * 8
KNOW = ["he did not know it at all", "i know that all is well", "they know her and so do we", "she did not know him"]


def after(before, token):
    """Fires on a token that stands behind these words."""
    words = [*before.split(), token]
    return lambda text, at: 2.0 * (text[max(0, at + 1 - len(words)) : at + 1] == words)


def test_a_token_is_named_before_one_that_carries_more_but_is_everywhere():
    """It fires on every "a", weakly, and strongly on "mat": most of its activation is on "a"."""
    activations = fires_where(FILLER, lambda text, at: {"a": 1.0, "mat": 1.5}.get(text[at], 0.0))
    assert activations.values.sum() < 2 * (activations.values == 1).sum()  # "a" carries more than half
    assert activations.labels().texts[0].split("/")[0] == "mat"


def test_the_word_before_that_it_needs():
    assert name(FILLER + KNOW * 4, after("not", "know")) == "0 did not → know"


def test_a_word_that_stands_before_the_token_everywhere_is_not_in_its_name():
    """ "know" follows "not" in every text there is: nothing says that the feature needs it."""
    texts = FILLER + [text for text in KNOW if "not know" in text] * 8
    assert name(texts, after("not", "know")) == "0 know"
    assert name(FILLER + KNOW * 4, lambda text, at: 2.0 * (text[at] == "know")) == "0 know"


def test_a_run_of_words():
    texts = ["he went for a walk", "they went for a walk", "we like to walk there", "do not walk so fast"] * 4
    assert name(FILLER + texts, after("went for a", "walk")) == "0 went for a → walk"


def test_one_of_several_words():
    texts = ["he did not know", "she can never know", "i know that", "we know it", "you know him"] * 5
    fires = lambda text, at: 2.0 * (text[at] == "know" and text[at - 1] in ("not", "never"))  # noqa: E731
    assert name(FILLER + texts, fires) in ("0 not/never → know", "0 never/not → know")


def test_a_word_some_way_before():
    plain = ["it is so good", "it is too bad", "he was very glad", "she was sad"]
    negated = ["it is not good", "it is not too bad", "he was not very glad", "she was not so sad"]
    fires = lambda text, at: 3.0 * ("not" in text and text[at] in ("good", "bad", "glad", "sad"))  # noqa: E731
    found = name(FILLER + (plain + negated) * 4, fires)
    assert found.startswith("0 not … → ")
    assert set(found.removeprefix("0 not … → ").split("/")) <= {"good", "bad", "glad", "sad"}


def test_too_few_firings_say_nothing_of_the_words_before():
    assert name([*FILLER, *KNOW], after("not", "know")) == "0 know"


def test_what_fires_on_more_than_a_tenth_is_dense():
    often = fires_where(FILLER, lambda text, at: 1.0 * (text[at] in ("a", "to")))
    assert often.density() > 0.1
    assert often.labels().dense == {0}
    assert often.labels()[0].endswith(" (dense)")
    assert fires_where(FILLER, lambda text, at: 1.0 * (text[at] == "sea")).labels().dense == frozenset()


def test_a_silent_feature():
    assert name(FILLER, lambda text, at: 0.0) == "0 (silent)"


@pytest.mark.parametrize(
    ("tokens", "text"),
    [
        (["didn", "'", "t"], "didn't"),
        (["said", ",", '"'], 'said, "'),
        (["play", "##ing", "ball"], "playing ball"),
        (["Ġwent", "Ġfor", "Ġa"], "went for a"),
        (["▁went", "ing"], "wenting"),
        (["##ing"], "##ing"),
        (["Ġ"], "␣"),
        (["Ċ"], "↵"),
    ],
)
def test_tokens_as_running_text(tokens, text):
    assert readable(tokens) == text


def test_names_are_a_sequence_of_strings():
    calls = []

    def find():
        calls.append(1)
        return ["a", "", "b → c"], frozenset({2})

    names = FeatureNames(3, find)
    assert len(names) == 3
    assert not calls  # nothing is looked for until a name is asked for
    assert names[0] == "0 a"
    assert names[-1] == "2 b → c (dense)"
    assert names[:2] == ["0 a", "1 (silent)"]
    assert list(names) == names
    assert calls == [1]
    assert pickle.loads(pickle.dumps(names)) == names
    assert pickle.loads(pickle.dumps(names)).dense == {2}
    with pytest.raises(IndexError):
        names[3]


def test_names_with_some_of_ones_own():
    names = FeatureNames.of(["a", "b"], dense=[1]).renamed({1: "the second"})
    assert list(names) == ["0 a", "1 the second (dense)"]
    with pytest.raises(ArgumentError, match="feature 2 is given a name, and there are only 2 features"):
        names.renamed({2: "x"})
