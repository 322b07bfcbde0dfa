"""Chains through the weights are faithful where nothing is left out, and find what was written into the weights."""

import numpy as np
import pytest
import torch

from bilens.attribute import trace_chain
from bilens.attribute.chains import _noise
from bilens.errors import ArgumentError, NotBilinearError, OutOfRangeError, SAEMismatchError
from bilens.layer.bilinear import BilinearLayer
from tests.attribute.conftest import model_of
from tests.conftest import make_model

DIRECTION = torch.randn(16, generator=torch.Generator().manual_seed(1))
TEXTS = ["Mira lost a red kite", "a tired owl painted three stones", "the little fox found the silver key"]


def test_all_eigenvectors_leave_nothing_out(text_model):
    """The whole spectrum reproduces the direction (rounding aside), the leading eigenvectors less and less."""
    found = [trace_chain(text_model, 1, DIRECTION, k=k, width=1, depth=1, texts=TEXTS) for k in (16, 8, 1)]
    fidelity = [chain.frame.fidelity[0] for chain in found]
    assert fidelity[0] == pytest.approx(1.0, abs=1e-6)
    assert fidelity[0] > fidelity[1] > fidelity[2]


def test_biases_are_no_loss(tokenizer):
    model = make_model(tokenizer=tokenizer, bias=True)
    assert trace_chain(model, 1, DIRECTION, k=16, width=1, depth=1, texts=TEXTS).frame.fidelity[0] > 1 - 1e-6


def test_only_way_carries_everything():
    """Without attention and MLPs below, the embedding is all that an eigenvector reads."""
    model = make_model(n_layer=2, normalization=False)
    with torch.no_grad():
        model.blocks[0].mlp.w.weight.zero_()
        for block in model.blocks:
            block.attn.o.weight.zero_()
    tokens = [torch.tensor([3, 14, 15, 9, 2, 6])]
    found = trace_chain(model, 1, DIRECTION, k=2, width=1, depth=2, texts=tokens)
    ways = found.frame[found.frame.kind == "embedding"]
    assert len(ways) == 2
    assert (ways.via == "direct").all()
    assert ways.fidelity.tolist() == pytest.approx([1.0, 1.0])


def test_finds_the_head_and_mlp_that_were_written_in():
    """MLP 0 writes a product into dimension 6; a head of layer 1 moves it to 7; MLP 1 squares that into 5."""
    model = make_model(n_layer=2, n_head=2, d_model=8, d_hidden=1, normalization=False)
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
        for layer, (left, right, out) in enumerate([(0, 1, 6), (7, 7, 5)]):
            mlp = model.blocks[layer].mlp
            mlp.W_gate[left, 0] = mlp.W_in[right, 0] = mlp.W_out[0, out] = 1.0
        attention = model.blocks[1].attn
        attention.W_V[1, 6, 0] = 1.0
        attention.o.weight[7, 4] = 1.0  # the second head's first dimension
    found = trace_chain(model, 1, torch.eye(8)[5], k=1, width=1, depth=2)
    assert found.frame.kind.tolist() == ["mlp", "eigenvector", "mlp", "eigenvector", "embedding"]
    assert found.frame.via.tolist()[2] == "L1H1"
    torch.testing.assert_close(found.directions[1].abs(), torch.eye(8)[7])
    assert found.directions[2].nonzero().flatten().tolist() == [6]
    # The product of dimensions 0 and 1 has the eigenvectors (e0 + e1, e0 - e1) / sqrt 2.
    assert found.directions[3][:2].abs().tolist() == pytest.approx([0.5**0.5] * 2)
    assert found.frame.fidelity.isna().all()


def test_strength_is_the_deviation_on_noise():
    layer = BilinearLayer.of(model_of(True, True), 0)
    noise = torch.tensor(np.random.default_rng(0).standard_normal((200_000, 16)), dtype=torch.float32)
    hidden = (noise @ layer.W_gate + layer.b_gate) * (noise @ layer.W_in + layer.b_in)
    measured = (hidden @ layer.W_out @ DIRECTION).std().item()
    # 200,000 samples of a heavy-tailed quadratic: the deviation is good to about a percent.
    assert _noise(layer, DIRECTION[None])[0].item() == pytest.approx(measured, rel=0.03)


def test_shows_itself(text_model):
    found = trace_chain(text_model, -1, DIRECTION, texts=TEXTS[:1])
    assert str(found).count("eigenvector") == (found.frame.kind == "eigenvector").sum()
    assert "fidelity" in str(found)
    assert found.plot().data
    assert "<table" in found._repr_html_()
    assert len(found.directions) == len(found.frame)


def test_bad_input():
    model = model_of(False, True)
    with pytest.raises(OutOfRangeError, match="layer 3 is outside the model's 3, 0 to 2"):
        trace_chain(model, 3, DIRECTION)
    with pytest.raises(SAEMismatchError, match="the layer writes 16"):
        trace_chain(model, 0, torch.ones(8))
    for name in ("k", "width", "depth"):
        with pytest.raises(ArgumentError, match=f"{name} is 0"):
            trace_chain(model, 0, DIRECTION, **{name: 0})
    with pytest.raises(OutOfRangeError, match="k is 17"):
        trace_chain(model, 0, DIRECTION, k=17)
    with pytest.raises(NotBilinearError):
        trace_chain(model_of(False, True, gate="relu"), 0, DIRECTION)
