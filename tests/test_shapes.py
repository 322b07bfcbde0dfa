"""The check of shapes during the tests finds what is wrong."""

import sys
from pathlib import Path

import pytest
import torch

from bilens.layer.bilinear import interaction_matrix
from tests.conftest import make_model
from tests.shapes import EVERY, FIRST, WrongShape, check_every_shape

MODULE = """
from dataclasses import dataclass
from jaxtyping import Float, Int
from torch import Tensor

def twice(x: Float[Tensor, "n"], *more: Float[Tensor, "n"]) -> Float[Tensor, "n n"]:
    return x

def as_it_is(x: Float[Tensor, "n"] | None, *more: Float[Tensor, "n"]) -> "Float[Tensor, 'n']":
    return x

def plain(x: Tensor) -> Tensor:
    return x

@dataclass(frozen=True)
class Pair:
    left: Float[Tensor, "n"]
    right: list[Int[Tensor, "n"]]

class Square:
    def __init__(self, x: Tensor):
        self.x = x

    @property
    def side(self) -> Float[Tensor, "n n"]:
        return self.x
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "made_for_shapes.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    check_every_shape("made_for_shapes")
    import made_for_shapes

    yield made_for_shapes
    del sys.modules["made_for_shapes"]


def test_a_wrong_shape_is_found(module):
    two, three = torch.zeros(2), torch.zeros(3)
    with pytest.raises(WrongShape, match=r"twice: return is not .*'return': \('torch.float32', \(2,\)\)"):
        module.twice(two)
    with pytest.raises(WrongShape, match="as_it_is: more"):
        module.as_it_is(two, two, three)
    with pytest.raises(WrongShape, match="Pair: right"):
        module.Pair(two, [torch.zeros(3, dtype=torch.long)])
    with pytest.raises(WrongShape, match="Pair: right"):
        module.Pair(two, [two])
    with pytest.raises(WrongShape, match="side"):
        module.Square(two).side  # noqa: B018


def test_a_right_shape_passes(module):
    two = torch.zeros(2)
    assert module.as_it_is(two, two) is two
    assert module.as_it_is(None) is None
    assert module.Pair(two, [two.long()]).left is two
    assert module.Square(torch.zeros(2, 2)).side.shape == (2, 2)
    assert not hasattr(module.plain, "__wrapped__"), "what mentions no shape costs nothing"


def test_some_of_many_calls_are_checked(module):
    for _ in range(FIRST):
        module.as_it_is(torch.zeros(2))
    for _ in range(EVERY - 1):
        module.as_it_is(torch.zeros(2, 2))
    with pytest.raises(WrongShape):
        module.as_it_is(torch.zeros(2, 2))


def test_the_package_is_checked():
    assert hasattr(interaction_matrix, "__wrapped__")
    assert hasattr(type(make_model()).W_E.fget, "__wrapped__")
