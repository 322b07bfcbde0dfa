"""Edits of weights under TransformerLens' names: each takes effect in the stored weights, or raises."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bilens.errors import ArgumentError
from bilens.model.transformer import HookedBilinearTransformer
from bilens.vision.config import ClassifierConfig
from bilens.vision.model import BilinearClassifier
from tests.conftest import make_model

TOKENS = torch.tensor([[1, 7, 42, 7, 0, 13, 29]])
ATTENTION, MLP = ("W_Q", "W_K", "W_V", "W_O"), ("W_in", "W_gate", "W_out", "b_in", "b_gate", "b_out")


def owners(model: HookedBilinearTransformer, stacked: bool) -> dict[str, tuple[Any, str]]:
    """Every name that can be edited, with the object that has it."""
    if stacked:
        return {name: (model, name) for name in (*ATTENTION, *MLP, "W_E", "W_U")}
    block = model.blocks[1]
    named = {f"attn.{name}": (block.attn, name) for name in ATTENTION} | {
        f"mlp.{name}": (block.mlp, name) for name in MLP
    }
    return named | {"embed.W_E": (model.embed, "W_E"), "unembed.W_U": (model.unembed, "W_U")}


# Each leaves the negative of the weight behind.
EDITS: dict[str, Callable[[Any, str], Any]] = {
    "in place": lambda owner, name: getattr(owner, name).neg_(),
    "item": lambda owner, name: getattr(owner, name).__setitem__(slice(None), -getattr(owner, name)),
    "of a part": lambda owner, name: [part.neg_() for part in getattr(owner, name)],
    "of a view": lambda owner, name: getattr(owner, name).swapaxes(0, -1).detach().neg_(),
    "through data": lambda owner, name: getattr(owner, name).data.mul_(-1),
    "of data": lambda owner, name: setattr(getattr(owner, name), "data", -getattr(owner, name)),
    "set_": lambda owner, name: getattr(owner, name).set_(-getattr(owner, name)),
    "assigned": lambda owner, name: setattr(owner, name, -getattr(owner, name)),
    "assigned as a parameter": lambda owner, name: setattr(owner, name, nn.Parameter(-getattr(owner, name))),
    "augmented": lambda owner, name: setattr(owner, name, getattr(owner, name).__imul__(-1)),
    "out": lambda owner, name: torch.neg(getattr(owner, name), out=getattr(owner, name)),
    "foreach": lambda owner, name: torch._foreach_mul_([getattr(owner, name)], -1.0),
}


@pytest.mark.parametrize("stacked", [False, True], ids=["one layer", "all layers"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("way", EDITS)
def test_every_way_to_write_into_a_name_changes_the_model(way: str, mode: Callable, stacked: bool) -> None:
    """What was written is what the name shows afterwards, and the logits move."""
    model = make_model(bias=True)
    before = model(TOKENS).detach()
    start = {name: weight.clone() for name, weight in model.state_dict().items()}
    for name, (owner, attribute) in owners(model, stacked).items():
        with mode():
            expected = -getattr(owner, attribute).clone()
            EDITS[way](owner, attribute)
            assert torch.equal(getattr(owner, attribute), expected), name
            assert (model(TOKENS) - before).abs().max() > 1e-2, name
        with torch.no_grad():
            model.load_state_dict(start)


def test_zeroing_a_heads_output_is_ablating_it() -> None:
    """`W_O[head] = 0` gives the logits of zeroing that head's z, in one layer or through the stack of all."""
    model = make_model(n_layer=3)

    def silence(z: Tensor, hook: Any) -> None:
        z[:, :, 1] = 0

    ablated = model.run_with_hooks(TOKENS, fwd_hooks=[("blocks.2.attn.hook_z", silence)])
    for edited in (model.blocks[2].attn.W_O[1], model.W_O[2, 1], model.OV[2, 1].B):
        with torch.no_grad():
            kept = model.blocks[2].attn.o.weight.clone()
            edited.zero_()
            torch.testing.assert_close(model(TOKENS), ablated, atol=1e-5, rtol=1e-5)  # the same sums less zeros
            model.blocks[2].attn.o.weight.copy_(kept)


def test_writing_into_w_o_leaves_the_bits_of_the_rest() -> None:
    """The residual scale of three layers is no power of two: entries that were not written are not rounded again."""
    model = make_model(n_layer=3)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    with torch.no_grad():
        model.W_O[1, 0] = 1.0
    for name, weight in model.state_dict().items():
        assert name == "blocks.1.attn.o.weight" or torch.equal(weight, before[name]), name
    o, old = model.blocks[1].attn.o.weight, before["blocks.1.attn.o.weight"]
    assert torch.equal(o[:, 8:], old[:, 8:])
    torch.testing.assert_close(model.blocks[1].attn.W_O[0], torch.ones(8, 16))


@pytest.mark.parametrize("bias", [False, True])
def test_a_bias_that_the_model_does_not_have_cannot_be_written(bias: bool) -> None:
    """Attention and unembedding have none at all, an MLP none without `bias`: the refusal says so; zeros are as is."""
    model = make_model(bias=bias)
    block, names = model.blocks[1], [] if bias else ["b_in", "b_gate", "b_out"]
    zeros = [(block.mlp, name) for name in names] + [(block.attn, name) for name in ("b_Q", "b_K", "b_V", "b_O")]
    zeros += [(model, name) for name in (*names, "b_Q", "b_K", "b_V", "b_O", "b_U")] + [(model.unembed, "b_U")]
    before = model(TOKENS).detach()
    for owner, name in zeros:
        held = getattr(owner, name)
        ones = nn.Parameter(torch.ones_like(held))
        with torch.no_grad():
            for write in ("fill_", "add_", "sub_"):
                with pytest.raises(ArgumentError, match=rf"{name}: .*ha(s|ve) no"):
                    getattr(held, write)(1.0)
                assert not held.any()  # what was refused is not half there
            held.zero_()
        with pytest.raises(ArgumentError, match=name):
            setattr(owner, name, ones)
    assert torch.equal(model(TOKENS), before)


def test_what_cannot_be_assigned_is_refused() -> None:
    """Another shape, no tensor, a name the architecture has not, and products: nothing is registered beside."""
    model = make_model()
    names = set(model.state_dict())
    attn = model.blocks[0].attn
    with pytest.raises(ArgumentError, match=r"W_O is given shape \(3,\), expected a tensor of shape \(2, 8, 16\)"):
        attn.W_O = nn.Parameter(torch.zeros(3))
    with pytest.raises(ArgumentError, match=r"shape \(16, 24\), expected a tensor of shape \(24, 16\)"):
        model.blocks[0].mlp.W_out.data = torch.zeros(16, 24)
    with pytest.raises(ArgumentError, match="b_in is given None"):
        model.blocks[0].mlp.b_in = None
    with pytest.raises(ArgumentError, match="Attention has no weight 'W_o'"):
        attn.W_o = nn.Parameter(torch.zeros(3))
    for owner, name in ((model.blocks[0].ln1, "w"), (model, "W_pos"), (model.embed, "W_pos")):
        with pytest.raises(ArgumentError, match=f"no weight '{name}'"):
            setattr(owner, name, nn.Parameter(torch.zeros(16)))
    with pytest.raises(AttributeError, match="QK"):
        model.QK = torch.zeros(3)
    assert set(model.state_dict()) == names


@pytest.mark.parametrize("name", ["W_O", "W_in"])
def test_writing_with_gradients_on_is_refused_as_torch_does(name: str) -> None:
    """Outside `no_grad` a parameter cannot be written in place; nothing changes."""
    model = make_model()
    before = model(TOKENS).detach()
    for owner in (model, model.blocks[0].attn if name == "W_O" else model.blocks[0].mlp):
        with pytest.raises(RuntimeError, match="requires grad is being used in an in-place operation"):
            getattr(owner, name)[0] = 0.0
    assert torch.equal(model(TOKENS), before)


def test_numpy_cannot_write_past_torch() -> None:
    """The array of a product is read-only; that of a view is the stored weight."""
    model = make_model()
    with pytest.raises(ValueError, match="read-only"):
        model.blocks[0].attn.W_O.detach().numpy()[0] = 0
    model.blocks[0].mlp.W_in.detach().numpy()[:] = 0
    assert not model.blocks[0].mlp.w.weight[24:].any()


def test_gradients_go_through_the_names() -> None:
    """A loss of the named weights has the gradient of the same loss of the stored ones."""
    model = make_model()
    attn = model.blocks[1].attn
    (gradient,) = torch.autograd.grad(model.W_O[1].pow(2).sum() + attn.W_O.sum(), attn.o.weight)
    s = model.cfg.residual_scale
    torch.testing.assert_close(gradient, 2 * s * s * attn.o.weight + s)
    reads = torch.func.grad(lambda w: (w * model.blocks[1].mlp.W_in).sum())(torch.zeros(16, 24))
    assert torch.equal(reads, model.blocks[1].mlp.W_in)


def test_what_is_computed_from_a_name_is_a_plain_tensor() -> None:
    """Products, copies, pickles and prints have no tie to the model: writing into them leaves it alone."""
    model = make_model()
    W = model.W_O.detach()
    plain = [W + 0, W.clone(), W.double(), copy.deepcopy(W), pickle.loads(pickle.dumps(W)), W.as_subclass(Tensor)]
    assert all(type(tensor) is Tensor and torch.equal(tensor, W.to(tensor)) for tensor in plain)
    assert repr(W).startswith("tensor(")
    before = model(TOKENS).detach()
    for tensor in plain:
        tensor.zero_()
    assert torch.equal(model(TOKENS), before)


def test_the_image_classifiers_names_too() -> None:
    """Its views are written through, and a bias it does not have is refused."""
    images = torch.rand(3, 6, generator=torch.Generator().manual_seed(0))
    model = BilinearClassifier(ClassifierConfig(d_input=6, d_hidden=4, d_output=3, n_layer=1, bias=False), seed=0)
    for owner, name in ((model, "W_E"), (model, "W_U"), (model.blocks[0], "W_in"), (model.blocks[0], "W_gate")):
        before = model(images)
        for edit in (lambda w: w.data.__setitem__(0, 0.0), lambda w: setattr(w, "data", torch.ones_like(w))):
            edit(getattr(owner, name))
        assert torch.equal(getattr(owner, name), torch.ones_like(getattr(owner, name)))
        setattr(owner, name, nn.Parameter(2 * getattr(owner, name)))
        assert not torch.equal(model(images), before)
    with pytest.raises(ArgumentError, match="no biases"):
        model.blocks[0].b_in = nn.Parameter(torch.ones(4))
