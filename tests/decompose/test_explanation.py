"""Explanations by eigencircuits: exact for any sum of squares, counted honestly, and told in a sentence."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bilens.decompose import Decomposer
from bilens.decompose.explanation import explain, parts_needed
from bilens.decompose.sentences import Circuit, Family, families, tell, word
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
    ("feature", "name", "expected"),
    [
        (1765, "1765 something/thing", "something"),
        (17, "17 1765", "1765"),
        (3, "3", ""),
        (3, "a dog", "a dog"),
        (5, "5 (silent)", "(silent)"),
    ],
)
def test_a_features_word_is_its_name_without_the_number(feature: int, name: str, expected: str) -> None:
    assert word(feature, name) == expected


def test_features_of_one_name_are_a_family() -> None:
    found = families([(1, "1 then", 0.9), (2, "2 something", 1.8), (3, "3 Something/thing", 1.0), (4, "4", -0.5)])
    assert [(f.word, f.features) for f in found] == [("something", (2, 3)), ("then", (1,)), ("", (4,))]
    assert sum(family.part for family in found) == pytest.approx(3.2)
    assert list(map(str, found)) == ["*something* (2, 3)", "*then* (1)", "feature 4"]


def circuit(share: float, *members: tuple[str, float], error: float = 0.0, projection: float = 4.0) -> Circuit:
    made = [Family(name, (place,), part) for place, (name, part) in enumerate(members)]
    return Circuit(made, share * 10, share, projection, error)


@pytest.mark.parametrize(
    ("circuits", "needed", "expected"),
    [
        (
            [circuit(0.81, ("something", 2.7), ("then", 1.2))],
            1,
            "Fires because *something* (0) meets *then* (1): one direction gives 81 %.",
        ),
        ([circuit(0.9, ("know", 3.0), ("see", 0.5))], 1, "Fires because of *know* (0): one direction gives 90 %."),
        (
            [circuit(0.5, ("know", 3.0)), circuit(0.3, ("not", 3.0))],
            2,
            "Fires because of *know* (0), and of *not* (0): two directions give 80 %.",
        ),
        (
            [circuit(0.5, ("know", 3.0)), circuit(0.3, ("know", 3.0))],
            2,
            "Fires because of *know* (0): two directions give 80 %.",
        ),
        (
            [circuit(1.1, ("know", 3.0)), circuit(-0.12, ("dog", 3.0))],
            1,
            "Fires because of *know* (0): one direction gives 110 %, although *dog* (0) takes off 12 %.",
        ),
    ],
)
def test_sentences(circuits: list[Circuit], needed: int, expected: str) -> None:
    assert tell(circuits, needed, active=True, written=10.0).replace(" ", " ") == expected
