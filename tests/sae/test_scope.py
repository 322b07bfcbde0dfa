"""The published SAEs' mathematics, against plain formulas and against SAELens' own conventions."""

import runpy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sae_lens import SAE
from sae_lens.registry import SAE_CLASS_REGISTRY, get_sae_class
from torch.testing import assert_close

import bilens.sae.scope
from bilens.sae.scope import ARCHITECTURE, ScopeSAE, ScopeSAEConfig, signed_topk

D_IN, D_SAE, K = 6, 10, 4


def random_sae(bilinear: bool, seed: int = 0) -> ScopeSAE:
    torch.manual_seed(seed)
    sae = ScopeSAE(ScopeSAEConfig(d_in=D_IN, d_sae=D_SAE, k=K, bilinear_encoder=bilinear, dtype="float64"))
    for weight in sae.parameters():
        torch.nn.init.normal_(weight)
    return sae


@given(st.lists(st.floats(-5, 5, width=32), min_size=5, max_size=12, unique=True), st.integers(1, 5))
def test_topk_keeps_the_largest_signed_values(row, k):
    x = torch.tensor(row)
    kept = signed_topk(x, k)
    threshold = sorted(row)[-k]
    assert_close(kept, torch.tensor([value if value >= threshold else 0.0 for value in row]))


@pytest.mark.parametrize("bilinear", [False, True])
def test_encode_and_decode_follow_the_formulas(bilinear):
    sae = random_sae(bilinear)
    x = torch.randn(2, 3, D_IN, dtype=torch.float64)
    pre = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
    if bilinear:
        pre = pre[..., :D_SAE] * pre[..., D_SAE:]
    kept = torch.zeros_like(pre)
    for batch in range(2):
        for pos in range(3):
            for index in pre[batch, pos].argsort()[-K:]:
                kept[batch, pos, index] = pre[batch, pos, index]
    assert_close(sae.encode(x), kept)
    assert_close(sae(x), kept @ sae.W_dec + sae.b_dec)


def test_negatives_survive_where_k_reaches_them():
    sae = random_sae(bilinear=False)
    sae.b_enc.data.fill_(-100.0)
    acts = sae.encode(torch.randn(5, D_IN, dtype=torch.float64))
    assert (acts < 0).sum() == 5 * K


@pytest.mark.parametrize("bilinear", [False, True])
def test_every_saelens_hook_fires_and_can_edit(bilinear):
    sae = random_sae(bilinear)
    x = torch.randn(3, D_IN, dtype=torch.float64)
    out, cache = sae.run_with_cache(x)
    shapes = {name: tuple(value.shape) for name, value in cache.items()}
    assert shapes == {
        "hook_sae_input": (3, D_IN),
        "hook_sae_acts_pre": (3, D_SAE),
        "hook_sae_acts_post": (3, D_SAE),
        "hook_sae_recons": (3, D_IN),
        "hook_sae_output": (3, D_IN),
    }
    assert_close(signed_topk(cache["hook_sae_acts_pre"], K), cache["hook_sae_acts_post"])
    silenced = sae.run_with_hooks(x, fwd_hooks=[("hook_sae_acts_post", lambda acts, hook: acts * 0)])
    assert_close(silenced, sae.b_dec.expand_as(out))


@pytest.mark.parametrize("bilinear", [False, True])
def test_saelens_saves_and_loads_it(tmp_path, bilinear):
    sae = random_sae(bilinear)
    sae.cfg.metadata.hook_name = "blocks.0.hook_mlp_out"
    sae.save_model(tmp_path)
    loaded = SAE.load_from_disk(tmp_path)
    assert isinstance(loaded, ScopeSAE)
    assert loaded.cfg == sae.cfg
    for name, weight in sae.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name


def test_new_weights_have_the_conventional_shapes():
    sae = ScopeSAE(ScopeSAEConfig(d_in=D_IN, d_sae=D_SAE, k=K, bilinear_encoder=True))
    assert {name: tuple(weight.shape) for name, weight in sae.named_parameters()} == {
        "W_enc": (D_IN, 2 * D_SAE),
        "b_enc": (2 * D_SAE,),
        "W_dec": (D_SAE, D_IN),
        "b_dec": (D_IN,),
    }
    left, right = sae.W_enc.chunk(2, dim=-1)
    assert not torch.equal(left, right)


@pytest.mark.parametrize("k", [0, D_SAE + 1])
def test_k_outside_the_features_is_refused(k):
    with pytest.raises(ValueError, match=f"k is {k}"):
        ScopeSAEConfig(d_in=D_IN, d_sae=D_SAE, k=k)


def test_decoder_norms_are_not_folded():
    with pytest.raises(NotImplementedError, match="which k features"):
        random_sae(bilinear=False).fold_W_dec_norm()


def test_registering_again_is_no_error(monkeypatch):
    monkeypatch.setitem(SAE_CLASS_REGISTRY, ARCHITECTURE, (ScopeSAE, ScopeSAEConfig))  # put back afterwards
    again = runpy.run_path(bilens.sae.scope.__file__)
    assert get_sae_class(ARCHITECTURE)[0] is again["ScopeSAE"]
