"""Boolean gates: the closed forms are the gates, the form is unique, and training finds it."""

from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bilens.errors import ArgumentError, TrainingError
from bilens.toy import BooleanConfig, ToyLayer, train_boolean
from bilens.toy.boolean import GATES, closed_form, diagonal_moved, homogeneous_matrices, recover, truth

TABLES = {
    "and": [0, 0, 0, 1],
    "or": [0, 1, 1, 1],
    "xor": [0, 1, 1, 0],
    "nand": [1, 1, 1, 0],
    "nor": [1, 0, 0, 0],
    "xnor": [1, 0, 0, 1],
}
BITS = torch.tensor(list(product([False, True], repeat=3)))
PAIRS = torch.tensor([[False, False], [False, True], [True, False], [True, True]])


def quadratic(matrices: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """`(x, 1)^T M (x, 1)` of every row and matrix."""
    full = torch.cat([x.double(), torch.ones(len(x), 1).double()], 1)
    return torch.einsum("ni,mij,nj->nm", full, matrices, full)


@pytest.mark.parametrize("gate", GATES)
def test_closed_forms_are_the_truth_tables(gate: str) -> None:
    """By the written-down table, by logic, and by the quadratic form."""
    assert set(TABLES) == set(GATES)
    table = torch.tensor(TABLES[gate]).double()
    assert torch.equal(truth([(gate, 0, 1)], PAIRS)[:, 0].double(), table)
    assert torch.equal(quadratic(closed_form((gate, 0, 1), 2)[None], PAIRS)[:, 0], table)
    swapped = closed_form((gate, 2, 0), 3)
    assert torch.equal(swapped, swapped.T)
    assert torch.equal(quadratic(swapped[None], BITS)[:, 0], truth([(gate, 0, 2)], BITS)[:, 0].double())


@given(seed=st.integers(0, 1000))
def test_moving_the_diagonal_keeps_the_function_of_bits(seed: int) -> None:
    """On bits the same, elsewhere not; and two layers are the same function exactly where the moved forms agree."""
    generator = torch.Generator().manual_seed(seed)
    layer = ToyLayer(3, 5, 2, bias=True, generator=generator)
    with torch.no_grad():
        for weight in layer.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator))
    matrices = homogeneous_matrices(layer.weights())
    x = torch.randn(7, 3, generator=generator).double()
    with torch.no_grad():
        exact = layer.double()(x)
        on_bits = layer(BITS.double())
    # float64 sums of a few dozen terms of size one to ten.
    torch.testing.assert_close(quadratic(matrices, x), exact, atol=1e-10, rtol=1e-10)
    moved = diagonal_moved(matrices)
    torch.testing.assert_close(quadratic(moved, BITS), on_bits, atol=1e-10, rtol=1e-10)
    assert not moved.diagonal(dim1=-2, dim2=-1)[:, :-1].any()
    # Unique: 1, x_i, x_i x_j are independent on bits, so a least-squares fit of the outputs gives the moved form back.
    i, j = torch.triu_indices(4, 4, offset=1)
    full = torch.cat([BITS.double(), torch.ones(8, 1).double()], 1)
    design = torch.cat([2 * full[:, i] * full[:, j], torch.ones(8, 1).double()], 1)
    found = torch.linalg.lstsq(design, on_bits).solution
    torch.testing.assert_close(found[:-1].T, moved[:, i, j], atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(found[-1], moved[:, -1, -1], atol=1e-9, rtol=1e-9)


def test_training_recovers_the_closed_forms() -> None:
    """A mixture of gates, two of them on one pair: every entry of every matrix, seeded bit for bit."""
    config = BooleanConfig(["xor", ("nand", 0, 1), ("or", 1, 3), "xnor"], n_inputs=4, d_hidden=24, steps=1200)
    found = train_boolean(config, progress=False)
    assert found.tasks == [("xor", 0, 1), ("nand", 0, 1), ("or", 1, 3), ("xnor", 0, 3)]
    # An exact solution exists and the learning rate falls to zero: what is left is float32 rounding of the weights.
    assert found.max_deviation < 1e-4
    assert (found.accuracy == 1).all()
    assert (found.error < 1e-4).all()
    # As trained, the diagonal is not zero: without moving it the matrices would not agree.
    assert (found.as_trained - found.closed).abs().max() > 1e-2
    again = train_boolean(config, progress=False)
    assert torch.equal(again.learned, found.learned)
    assert list(found.to_frame()["output"]) == found.names
    assert len(found.plot().data) == 12
    assert "largest deviation" in str(found)


def test_many_inputs_are_judged_on_random_ones() -> None:
    """An untrained layer on 14 bits: an error for every output, on fewer than all inputs."""
    layer = ToyLayer(14, 4, 1, bias=True, generator=torch.Generator().manual_seed(0))
    found = recover(layer, [("and", 3, 12)])
    assert found.error > 0.1
    assert found.learned.shape == (1, 15, 15)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"tasks": ["xorr"]}, r"no gate 'xorr'; there are and, or, .*Did you mean 'xor'"),
        ({"tasks": [("and", 2, 2)]}, r"and of inputs 2 and 2: expected two different ones of 0\.\.5"),
        ({"tasks": [("and", 0, 6)]}, "and of inputs 0 and 6"),
        ({"tasks": []}, "tasks is empty"),
        ({"tasks": "xor"}, r"tasks is 'xor', expected a list of them: \['xor'\]"),
        ({"tasks": [("xor", 0)]}, r"task \('xor', 0\): expected a gate and its two inputs"),
        ({"tasks": [("xor", 0.5, 1)]}, r"xor of inputs 0\.5 and 1"),
        ({"n_inputs": 1}, "n_inputs is 1; a gate needs two"),
        ({"d_hidden": 0}, "d_hidden is 0, expected a positive whole number"),
        ({"steps": 2.5}, r"steps is 2\.5"),
        ({"lr": 0}, "lr is 0, expected a number above 0"),
    ],
)
def test_config_refuses(wrong: dict, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        BooleanConfig(**wrong)


def test_a_run_that_diverges_says_so() -> None:
    with pytest.raises(TrainingError, match="lower the learning rate 1000000"):
        train_boolean(BooleanConfig(lr=1e6, steps=100), progress=False)
