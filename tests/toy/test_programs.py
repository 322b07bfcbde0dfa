"""Compiled programs compute what they say, and their tokens do together exactly what their edges say.

Weights by distance are solved in float64 and turned by float32 angles: 1e-4 of an edge is far above that.
"""

import pytest
import torch

from bilens.errors import ArgumentError
from bilens.toy.programs import PROGRAMS, compile_program

EXACT = 1e-4


@pytest.mark.parametrize("name", PROGRAMS)
def test_interactions_are_the_edges(name: str) -> None:
    """Every interaction at the program's offsets is its edge's, and every other is zero."""
    program = compile_program(name)
    order = len(program.offsets)
    found = program.model.expand(order, program.offsets).interaction(program.offsets)
    expected = torch.zeros_like(found)
    for edge, value in program.edges.items():
        expected[edge] = value
    assert program.edges
    assert (found - expected).abs().max() < EXACT


@torch.no_grad()
def test_texts_are_continued() -> None:
    """The likeliest next token of texts, by program."""
    texts = {
        "copy": ("abcdec", "e"),
        "induction": ("bdcafb", "d"),
        "skip-trigram": ("cbccx", "z"),
        "and": ("bacbx", "z"),
        "xor": ("byayb", "z"),
    }
    for name, (text, following) in texts.items():
        program = compile_program(name)
        tokens = torch.tensor([[program.vocabulary.index(letter) for letter in text]])
        assert program.vocabulary[int(program.model(tokens)[0, -1].argmax())] == following, name
    brackets = compile_program("brackets")
    for text, depth in {"((": "2", "().": "0", "(()": "1", "(.(.": "2", ".": "0"}.items():
        tokens = torch.tensor([[brackets.vocabulary.index(letter) for letter in text]])
        assert brackets.vocabulary[3 + int(brackets.model(tokens)[0, -1, 3:].argmax())] == depth, text


def test_no_such_program() -> None:
    with pytest.raises(ArgumentError, match=r"no program 'nand'; there are copy, and.*mean 'and'"):
        compile_program("nand")
