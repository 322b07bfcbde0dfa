"""Modular addition: the transform adds up, a layer of known waves is read as such, a trained one generalises."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bilens.errors import ArgumentError, OutOfRangeError
from bilens.layer.bilinear import BilinearLayer, interaction_matrix
from bilens.toy import ModularConfig, train_modular
from bilens.toy.modular import all_pairs, fourier_structure, wave_power


def waves(p: int, frequencies: dict[int, float]) -> BilinearLayer:
    """The exact layer of `logit_c = sum_f w_f cos(2 pi f (a + b - c) / p)`: four hidden units for each frequency.

    `cos(a' + b' - c') = cos c' (cos a' cos b' - sin a' sin b') + sin c' (sin a' cos b' + cos a' sin b')`.
    """
    gate, right, out = [], [], []
    zero, angle = torch.zeros(p).double(), 2 * torch.pi * torch.arange(p).double() / p
    for f, weight in frequencies.items():
        cos, sin = (f * angle).cos(), (f * angle).sin()
        for a, b, c in ((cos, cos, cos), (sin, sin, -cos), (sin, cos, sin), (cos, sin, sin)):
            gate.append(torch.cat([a, zero]))
            right.append(torch.cat([zero, b]))
            out.append(weight * c)
    none = torch.zeros(len(gate)).double()
    return BilinearLayer(torch.stack(gate, 1), torch.stack(right, 1), torch.stack(out), none, none, zero)


@given(p=st.integers(3, 40), seed=st.integers(0, 100))
def test_power_adds_up_to_the_length(p: int, seed: int) -> None:
    """Parseval, for odd and even p; and it does not see where a wave starts."""
    curve = torch.randn(2, p, generator=torch.Generator().manual_seed(seed)).double()
    power = wave_power(curve)
    assert power.shape == (2, p // 2 + 1)
    torch.testing.assert_close(power.sum(-1), curve.pow(2).sum(-1))
    torch.testing.assert_close(wave_power(curve.roll(seed, -1)), power)


@pytest.mark.parametrize("p", [11, 12])
def test_a_wave_lies_in_its_own_frequency(p: int) -> None:
    """Every frequency's cosine, of any phase, has all its power there."""
    for f in range(p // 2 + 1):
        curve = (2 * torch.pi * f * torch.arange(p).double() / p + 0.3).cos()
        power = wave_power(curve)
        torch.testing.assert_close(power[f], curve.pow(2).sum())


def test_known_waves_are_found() -> None:
    """Two frequencies of weights 3 and 1: four eigenvectors each, of eigenvalue +-p w / 4, half of it in each half."""
    p = 13
    layer = waves(p, {2: 3.0, 5: 1.0})
    inputs, sums = all_pairs(p)
    x = inputs.double()
    logits = torch.einsum("ni,cij,nj->nc", x, interaction_matrix(layer, torch.eye(p).double()), x)
    assert torch.equal(logits.argmax(-1), sums)
    found = fourier_structure(layer, 8)
    # Q_c couples the halves by w/2 cos(2 pi f (a + b - c) / p), whose singular values are w p / 4, twice each.
    expected = torch.tensor([3.0] * 4 + [1.0] * 4).double() * p / 4
    torch.testing.assert_close(found.circuits.values.abs(), expected.expand(p, 8))
    assert (found.circuits.values > 0).sum() == 4 * p
    assert torch.equal(found.frequencies, torch.tensor([2] * 4 + [5] * 4).expand(p, 8))
    torch.testing.assert_close(found.shares, torch.ones(p, 8).double())
    torch.testing.assert_close(found.power[..., 0, :].sum(-1), torch.full((p, 8), 0.5).double())
    assert found.mean_share == pytest.approx(1)
    torch.testing.assert_close(found.spectrum[[2, 5]], torch.tensor([0.9, 0.1]).double())
    assert "2 (90%), 5 (10%)" in str(found)


def test_a_trained_layer_generalises_by_waves() -> None:
    """Nearly all pairs right that were not trained on, and eigenvectors nearer to waves than chance would have them."""
    config = ModularConfig(p=23, d_hidden=48, train_share=0.8, steps=800, weight_decay=2.0)
    run = train_modular(config, progress=False)
    assert run.train_accuracy[-1] == 1
    assert run.test_accuracy[-1] > 0.95
    assert run.test_accuracy[0] < 0.5
    found = run.fourier(4)
    noise = wave_power(torch.randn(500, 2, 23, generator=torch.Generator().manual_seed(0)).double())
    chance = (noise.sum(-2) / noise.sum((-2, -1))[:, None]).amax(-1).mean().item()
    assert found.mean_share > chance + 0.15
    frame = run.to_frame()
    assert frame["step"].iloc[-1] == 800
    assert len(found.to_frame()) == 23 * 4
    for figure in (run.plot(), found.plot(3), found.plot_power(3), found.plot_power(), found.plot_spectrum(3)):
        assert figure.data
    assert "mod 23" in str(run)
    assert train_modular(config, progress=False).test_accuracy == run.test_accuracy


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"p": 2}, "p is 2, expected 3 or more"),
        ({"p": 5.0}, r"p is 5\.0, expected a positive whole number"),
        ({"train_share": 1}, "train_share is 1, expected a share"),
        ({"train_share": 0.01, "p": 3}, r"train_share 0\.01 of 9 pairs leaves no pairs"),
        ({"weight_decay": -1}, "weight_decay is -1"),
        ({"weight_decay": float("nan")}, "weight_decay is nan"),
        ({"lr": float("nan")}, "lr is nan"),
    ],
)
def test_config_refuses(wrong: dict, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        ModularConfig(**wrong)


def test_what_cannot_be_read_is_refused() -> None:
    layer = waves(7, {1: 1.0})
    found = fourier_structure(layer, 2)
    with pytest.raises(OutOfRangeError, match="class 7 is outside the 7 classes"):
        found.plot(7)
    with pytest.raises(OutOfRangeError, match="k is 15, expected 1 to 14"):
        fourier_structure(layer, 15)
    wrong = BilinearLayer(*(t[..., :6] if t.shape[-1] == 7 else t for t in vars(layer).values()))
    with pytest.raises(ArgumentError, match="reads 14 inputs and writes 6 outputs"):
        fourier_structure(wrong)
    with pytest.raises(OutOfRangeError, match="k is 0, expected at least 1"):
        found.plot(k=0)
