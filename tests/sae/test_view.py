"""`SAEView`: for every class, its directions reproduce the SAE's own numbers as plain linear algebra."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sae_lens import (
    JumpReLUTranscoder,
    JumpReLUTranscoderConfig,
    MatchingPursuitSAE,
    MatchingPursuitSAEConfig,
    SkipTranscoder,
    SkipTranscoderConfig,
    TemporalSAE,
    TemporalSAEConfig,
    TopKSAE,
    TopKTrainingSAE,
    TopKTrainingSAEConfig,
    Transcoder,
    TranscoderConfig,
)
from torch.testing import assert_close

from bilens.errors import SAEMismatchError
from bilens.sae.view import SAEView
from tests.random_saes import CLASSES, D_IN, D_SAE, LINEAR, NORMS, VARIANTS, Oracle, make_sae, variant_name

# Sums of 16 to 40 float32 terms of order one.
ROUNDING = {"atol": 2e-5, "rtol": 1e-4}


def inputs(seed=0, n=20):
    """Tokens of different sizes and means, so that a normalisation shows."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, D_IN, generator=generator) * (torch.rand(n, 1, generator=generator) * 5 + 0.2)
    return x + torch.randn(n, 1, generator=generator)


def linear_reads(view, x):
    """`z = a e . (x - m) + b`, as the module's docstring states it, token by token."""
    norms = [view.frozen_norm(token) for token in x]
    reads = [view.encoder @ (norm.scale_in * (token - norm.shift)) for norm, token in zip(norms, x, strict=True)]
    return torch.stack(reads) + view.encoder_bias


def linear_writes(view, acts, x):
    """`x^ = sum_i f_i (r d_i) + r b_dec + m`."""
    rows = []
    for f, token in zip(acts, x, strict=True):
        norm = view.frozen_norm(token)
        rows.append(norm.scale_out * (f @ view.decoder + view.b_dec) + norm.shift)
    return torch.stack(rows)


@pytest.mark.parametrize("variant", VARIANTS, ids=variant_name)
def test_directions_reproduce_reads_and_writes(variant):
    sae = make_sae(**variant)
    view, x = SAEView(sae), inputs()
    oracle = Oracle(sae, x)
    assert_close(linear_reads(view, x).double(), torch.from_numpy(oracle.pre), **ROUNDING)
    assert_close(view.pre_activations(x), linear_reads(view, x), **ROUNDING)
    acts = view.activations(x)
    assert torch.equal(acts, sae.encode(x).detach())
    assert_close(acts.double(), torch.from_numpy(oracle.acts), **ROUNDING)
    assert_close(linear_writes(view, acts, x), sae(x).detach(), **ROUNDING)
    assert_close(sae(x).detach().double(), torch.from_numpy(oracle.reconstruction), **ROUNDING)


@given(st.sampled_from(LINEAR), st.booleans(), st.sampled_from(NORMS), st.integers(0, 2**31))
def test_what_the_activation_function_is_given(kind, apply_b_dec, norm, seed):
    """`pre_activations` are the last numbers before the activation function, read from the SAE's own forward pass."""
    sae = make_sae(kind, seed=seed, apply_b_dec_to_input=apply_b_dec, normalize_activations=norm)
    seen = []

    class Spy(torch.nn.Module):
        def forward(self, pre):
            seen.append(pre)
            return pre

    sae.activation_fn = Spy()
    assert torch.equal(SAEView(sae).pre_activations(inputs(seed, n=3)), seen[0])


def test_a_bilinear_encoder_has_everything_but_an_encoder_direction():
    sae = make_sae("scope-bilinear")
    view, x = SAEView(sae), inputs()
    assert view.has_bilinear_encoder
    with pytest.raises(SAEMismatchError, match=r'no encoder direction.*side="decoder"'):
        _ = view.encoder
    with pytest.raises(SAEMismatchError, match="no encoder direction"):
        view.directions("encoder")
    assert torch.equal(view.directions("decoder"), sae.W_dec)
    assert_close(view.pre_activations(x).double(), torch.from_numpy(Oracle(sae, x).pre), **ROUNDING)
    assert_close(linear_writes(view, view.activations(x), x), sae(x).detach(), **ROUNDING)


@pytest.mark.parametrize("kind", LINEAR)
def test_names_sizes_and_shapes(kind):
    view = SAEView(make_sae(kind, "blocks.0.hook_mlp_out"))
    assert (view.d_in, view.d_sae, view.hook_name) == (D_IN, D_SAE, "blocks.0.hook_mlp_out")
    assert SAEView(make_sae(kind)).hook_name is None
    assert view.encoder.shape == view.decoder.shape == (D_SAE, D_IN)
    assert view.encoder_bias.shape == (D_SAE,)
    assert view.b_dec.shape == (D_IN,)
    assert not view.has_bilinear_encoder
    assert torch.equal(view.directions("encoder"), view.encoder)
    assert torch.equal(view.directions("decoder"), view.decoder)
    assert not any(t.requires_grad for t in (view.encoder, view.decoder, view.encoder_bias, view.b_dec))


def test_decoder_norms_applied_at_run_time_are_in_the_directions():
    """The same SAE with its norms folded by SAELens has the same directions."""
    rescaled = make_sae("topk-rescaled")
    view = SAEView(rescaled)
    before = [view.encoder.clone(), view.decoder.clone(), view.encoder_bias.clone()]
    assert_close(before[1].norm(dim=-1), torch.ones(D_SAE))
    rescaled.fold_W_dec_norm()
    rescaled.cfg.rescale_acts_by_decoder_norm = False
    for folded, live in zip([view.encoder, view.decoder, view.encoder_bias], before, strict=True):
        assert_close(folded, live)


def test_an_sae_in_training_is_read_like_the_one_it_becomes():
    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=D_IN, d_sae=D_SAE, k=5))
    view, x = SAEView(sae), inputs()
    acts = view.activations(x)
    assert_close(linear_writes(view, acts, x), sae(x).detach(), **ROUNDING)
    assert_close(view.pre_activations(x), linear_reads(view, x), **ROUNDING)


def test_leading_axes_and_precision():
    view = SAEView(make_sae("topk"))
    x = inputs()
    assert view.activations(x.view(2, 10, D_IN)).shape == (2, 10, D_SAE)
    assert view.pre_activations(x.view(2, 2, 5, D_IN)).shape == (2, 2, 5, D_SAE)
    assert view.activations(x.double()).dtype == torch.float32  # the SAE's own


def test_an_unknown_side():
    with pytest.raises(ValueError, match="side 'left' is not 'encoder' or 'decoder'"):
        SAEView(make_sae("topk")).directions("left")


def test_matching_pursuit_writes_linearly_and_reads_one_feature_after_the_other():
    sae = MatchingPursuitSAE(MatchingPursuitSAEConfig(d_in=D_IN, d_sae=D_SAE))
    view, x = SAEView(sae), inputs()
    assert_close(linear_writes(view, view.activations(x), x), sae(x).detach(), **ROUNDING)
    with pytest.raises(SAEMismatchError, match=r'\'matching_pursuit\'.*no encoder direction. Use side="decoder"'):
        _ = view.encoder


@pytest.mark.parametrize("kind", [Transcoder, SkipTranscoder, JumpReLUTranscoder])
def test_a_transcoder_is_refused_with_the_way_out(kind):
    config = {Transcoder: TranscoderConfig, SkipTranscoder: SkipTranscoderConfig}.get(kind, JumpReLUTranscoderConfig)
    with pytest.raises(SAEMismatchError, match=r"transcoder reads one place and writes another.*W_dec"):
        SAEView(kind(config(d_in=D_IN, d_sae=D_SAE, d_out=D_IN, apply_b_dec_to_input=False)))


def test_what_has_no_linear_writes_is_refused():
    with pytest.raises(SAEMismatchError, match=r"'temporal'.*expected one of standard, topk"):
        SAEView(TemporalSAE(TemporalSAEConfig(d_in=D_IN, d_sae=512)))
    config = CLASSES["topk"][1](d_in=D_IN, d_sae=D_SAE, k=3, reshape_activations="hook_z")
    config.metadata.hook_name = "blocks.0.attn.hook_z"
    with pytest.raises(SAEMismatchError, match="hook_z"):
        SAEView(TopKSAE(config))
