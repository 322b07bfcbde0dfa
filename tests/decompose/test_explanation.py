"""Explanations by eigencircuits: exact for any sum of squares, counted honestly, and told in a sentence."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bilens.decompose import Decomposer
from bilens.decompose.explanation import explain, parts_needed
from bilens.decompose.sentences import DENSE, Circuit, Family, Member, families, quote, tell, word
from bilens.errors import ArgumentError, OutOfRangeError
from bilens.layer.bilinear import BilinearLayer, constant_term, interaction_matrix
from bilens.model.files import DEFAULT_MODEL

D, SOURCES = 6, 5


@given(seed=st.integers(0, 10**6), n_features=st.integers(0, 4))
def test_any_exact_sum_of_squares_adds_up(seed: int, n_features: int) -> None:
    """Squares found in another metric, whose vectors are not orthonormal: still all of `Q`, and of each projection."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    layer = BilinearLayer(draw(D, 9), draw(D, 9), draw(9, D), draw(9), draw(9), draw(D))
    u, sources = draw(D), draw(n_features + 2, D)
    root = torch.linalg.cholesky(draw(D, D) @ draw(D, D).T * 0 + torch.eye(D) + (s := draw(D, D)) @ s.T)
    values, columns = torch.linalg.eigh(root.T @ interaction_matrix(layer, u) @ root)
    vectors = (torch.linalg.inv(root).T @ columns).T
    x = sources.sum(0)
    actual = (u @ layer(x)).item()
    found = explain(
        layer, u, sources, values, vectors,
        layer=0, feature=0, position=0, tokens=["a"], inputs=torch.arange(n_features),
        activations=torch.ones(n_features), output_bias=0.25, actual=actual + 0.25, active=True,
    )  # fmt: skip
    assert found.total == pytest.approx(found.actual, abs=1e-9 * found.absolute_sum)
    torch.testing.assert_close(found.projections, (found.vectors @ x))
    assert found.layer_bias != constant_term(layer, u).item()  # the part linear in the input is in it
    found.sentence  # noqa: B018 (whatever the numbers, there is one)


def test_circuits_found_where_the_feature_fires_add_up() -> None:
    """`fit` takes the squares in the firing metric; they are as complete as eigenpairs, and not both can be given."""
    d = Decomposer.from_pretrained(DEFAULT_MODEL, 1)
    text, fit = "She was sad and did not know", d.firing(["She did not know what to do. He was sad."])
    found = d.attribute(text, 101, -1, fit=fit)
    assert found.explanation.relative_error < 1e-5
    circuits = d.eigen(101, metric="firing", fit=fit)
    assert found.sentence == d.attribute(text, 101, -1, circuits=circuits).sentence
    with pytest.raises(ArgumentError, match="both circuits and fit"):
        d.attribute(text, 101, -1, fit=fit, circuits=circuits)


def test_circuits_that_are_not_all_are_refused() -> None:
    d = Decomposer.from_pretrained(DEFAULT_MODEL, 3)
    text = "She was sad and did not know"
    whole = d.attribute(text, 101, -1, circuits=d.eigen(101))
    assert whole.explanation.relative_error < 1e-5
    assert whole.sentence == d.attribute(text, 101, -1).sentence
    with pytest.raises(ArgumentError, match=r"the 2 circuits add up to .* expected all circuits"):
        d.attribute(text, 101, -1, circuits=d.eigen(101, k=2))
    with pytest.raises(OutOfRangeError, match="no circuit 256 among the 256"):
        whole.explanation.part_frame(256)
    assert str(whole).startswith("Fires because ")
    assert whole.explanation.plot_circuit().data
    assert whole.plot_pairs().data


def test_the_feature_of_the_readme_takes_one_circuit() -> None:
    """A fact about the bundled weights: one circuit where pairs take dozens."""
    d = Decomposer.from_pretrained(DEFAULT_MODEL, 3)
    found = d.attribute("Lily looked everywhere for her red ball. She was sad and did not know", 101, -1)
    assert found.explanation.needed() == 1
    assert found.explanation.shares[0] > 0.8
    assert found.pairs_needed() > 10


@given(st.lists(st.floats(-100, 100), max_size=30), st.floats(0.5, 0.99))
def test_parts_needed_are_the_fewest_that_stay_near_the_sum(parts: list[float], share: float) -> None:
    needed = parts_needed(torch.tensor(parts, dtype=torch.float64), share)
    ordered = sorted(parts, key=abs, reverse=True)
    whole = math.fsum(parts)

    def near(n: int) -> bool:
        return abs(math.fsum(ordered[:n]) - whole) <= (1 - share) * abs(whole) + 1e-9

    assert 0 <= needed <= len(parts)
    assert all(near(n) for n in range(max(needed, 1), len(parts) + 1))


def test_parts_needed_of_known_parts() -> None:
    assert parts_needed(torch.tensor([8.0, 1.0, 1.0]), 0.8) == 1
    assert parts_needed(torch.tensor([1.0, 7.0, 2.0]), 0.8) == 2
    assert parts_needed(torch.tensor([8.0, -6.0, 5.0, 3.0]), 0.8) == 4  # the third reaches 70 %
    assert parts_needed(torch.tensor([]), 0.8) == 0


@pytest.mark.parametrize(
    ("name", "token", "expected"),
    [
        ("17 something/thing", "", ("something", "")),
        ("17 17", "", ("17", "")),
        ("17", "", ("", "")),
        ("a dog", "", ("a dog", "")),
        ("17 (silent)", "", ("(silent)", "")),
        ("17 went/go/walk", "walk", ("walk", "")),
        ("17 went/go/Walk", " Walk", ("walk", "")),
        ("17 went/go/walk", "dog", ("went", "")),
        ("17 didn't → know/see", "see", ("see", "didn't")),
        ("17 the/a (dense)", "a", (DENSE, "the/a")),
    ],
)
def test_a_features_word_is_that_of_its_name(name: str, token: str, expected: tuple[str, str]) -> None:
    assert word(17, name, token) == expected


def test_features_of_one_word_are_a_family() -> None:
    members = [
        (1, "1 then", 0.9),
        (2, "2 for a → walk", 1.8),
        (3, "3 went/Walk", 1.0),
        (4, "4", -0.5),
        (5, "5 a (dense)", 0.1),
    ]
    found = families(members, "walk")
    assert list(map(str, found)) == [
        "*walk* (2 after “for a”, 3)",
        "*then* (1)",
        "dense features (5 a)",
        "feature 4",
    ]
    assert sum(family.part for family in found) == pytest.approx(3.3)


def test_words_that_a_feature_needs_are_said_where_the_text_has_them() -> None:
    members = [(1, "1 said/went for a → walk", 2.0), (2, "2 not … → walk", 1.0)]
    for before, expected in [
        (["Tom", " went", " for", " a"], "*walk* (1 after “went for a”, 2)"),
        (["mom", "said", "the"], "*walk* (1 after “said”, 2)"),
        (["not", "the"], "*walk* (1, 2 after “not”)"),
        (["not", "a", "day", "that", "you"], "*walk* (1, 2)"),  # too far away
        ([], "*walk* (1, 2)"),
        (None, "*walk* (1 after “said/went for a”, 2 after “not …”)"),
    ]:
        assert str(families(members, "walk", before)[0]) == expected


def test_what_a_direction_reads_is_quoted_in_the_order_of_the_text() -> None:
    tokens = ["[BOS]", ".", "did", " not", "often", "know"]
    assert quote(tokens, [0.0, 0.01, 0.02, 0.34, 0.03, 0.6]) == "not … know"
    assert quote(tokens, [0.0, 0.3, 0.1, 0.3, 0.0, 0.3]) == "did not … know"
    assert quote(tokens, [0.0] * 6) == "know"


def circuit(share: float, *members: tuple[str, float], error: float = 0.0) -> Circuit:
    made = [Family(name, (Member(place, part),)) for place, (name, part) in enumerate(members)]
    return Circuit(made, share * 10, share, 4.0, error)


KNOW, DOG = ("know", 3.0), ("dog", 3.0)


@pytest.mark.parametrize(
    ("circuits", "needed", "expected"),
    [
        (
            [circuit(0.81, ("something", 2.7), ("then", 1.5))],
            1,
            "because *something* (0) meets *then* (1): one direction gives 81 %.",
        ),
        ([circuit(0.9, KNOW, ("see", 0.5))], 1, "because of *know* (0): one direction gives 90 %."),
        ([circuit(0.9, KNOW, (DENSE, 3.0))], 1, "because of *know* (0): one direction gives 90 %."),
        (
            [circuit(0.9, (DENSE, 2.0), ("know", 1.0))],
            1,
            "because of *know* (1; 25 %) and dense features (0; 50 %): one direction gives 90 %.",
        ),
        ([circuit(0.9, (DENSE, 3.0))], 1, "because of dense features (0): one direction gives 90 %."),
        ([circuit(0.9, ("know", 0.5))], 1, "because of *know* (0; 12 %) among many: one direction gives 90 %."),
        ([circuit(0.9, ("know", -0.5))], 1, "because of no feature in particular: one direction gives 90 %."),
        (
            [circuit(0.5, KNOW), circuit(0.3, DOG)],
            2,
            "because of *know* (0), and because of *dog* (0): two directions give 80 %.",
        ),
        (
            [circuit(0.3, ("know", 0.5)), circuit(0.2, DOG)],
            7,
            "for no short reason: seven directions give 80 %, the first of them 30 %, "
            "made of *know* (0; 12 %) among many.",
        ),
        (
            [circuit(0.3, KNOW), circuit(0.2, DOG)],
            13,
            "for no short reason: 13 directions give 80 %, the first of them 30 %, made of *know* (0).",
        ),
        ([circuit(0.5, KNOW), circuit(0.3, KNOW)], 2, "because of *know* (0): two directions give 80 %."),
        (
            [circuit(0.3, KNOW), circuit(0.2, DOG)],
            7,
            "because of *know* (0): seven directions give 80 %, this one 30 %.",
        ),
        (
            [circuit(1.1, KNOW), circuit(-0.12, DOG)],
            1,
            "because of *know* (0): one direction gives 110 %, although *dog* (0) takes off 12 %.",
        ),
        (
            [circuit(1.1, KNOW), circuit(-0.12, ("dog", 0.5)), circuit(-0.03, DOG)],
            1,
            "because of *know* (0): one direction gives 110 %, although other directions take off 15 %.",
        ),
        (
            [circuit(0.9, KNOW, error=0.5)],
            1,
            "because of *know* (0): one direction gives 90 %; much of the first comes from what the SAE misses.",
        ),
    ],
)
def test_sentences(circuits: list[Circuit], needed: int, expected: str) -> None:
    assert tell(circuits, needed, active=True, written=10.0) == f"Fires {expected}"
    silent = tell(circuits, needed, active=False, written=10.0)
    assert silent == f"Does not fire{', but would' * expected.startswith('because')} {expected}"


def test_a_sentence_where_the_layer_writes_against_it() -> None:
    assert tell([], 0, active=False, written=0.0) == "Does not fire."
    against = [Circuit(circuit(1.0, DOG).families, -2.5, 1.25, 4.0, 0.0), circuit(-0.1, KNOW)]
    assert tell(against, 1, active=False, written=-2.0) == "Does not fire: *dog* (0) takes off 2.5."


def test_reads_are_quoted() -> None:
    told = tell([circuit(0.9, KNOW)], 1, active=True, written=10.0, read="not know")
    assert told == "Fires because of *know* (0), read from “not know”: one direction gives 90 %."
    weak = [circuit(0.9, ("know", 0.5))]
    told = tell(weak, 1, active=True, written=10.0, read="not see")
    assert told == "Fires because of “not see”, read by many features: one direction gives 90 %."
    told = tell(weak, 1, active=True, written=10.0, read="not know")  # the name is that of the token
    assert told == "Fires because of *know* (0; 12 %) among many, read from “not know”: one direction gives 90 %."
