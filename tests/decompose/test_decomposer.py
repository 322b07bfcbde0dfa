"""The `Decomposer` on weights alone: forms of `output`, bases, top interactions, and what is refused."""

import itertools
import pickle
from inspect import signature

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sae_lens import Transcoder, TranscoderConfig
from torch.testing import assert_close

from bilens.attribute import freeze
from bilens.decompose import Decomposer
from bilens.errors import (
    ArgumentError,
    MissingSAEError,
    ModelNotFoundError,
    NotBilinearError,
    OutOfRangeError,
    SAEMismatchError,
)
from bilens.model.hf import BilinearForCausalLM
from bilens.sae.features import examples
from tests.conftest import make_model
from tests.random_saes import D_SAE, VARIANTS, make_sae, variant_name

D = 16
IN, MID, OUT = (f"blocks.{{}}.{hook}" for hook in ("ln2.hook_normalized", "hook_resid_mid", "hook_mlp_out"))
# Sums of at most 256 float32 terms of size up to ten, taken in another order.
ROUNDING = {"atol": 1e-4, "rtol": 1e-4}


def make(model, layer=1, kind_in="topk", kind_out="topk", **kwargs):
    """A `Decomposer` with random SAEs on both sides."""
    number = layer % model.cfg.n_layers
    sae_in = make_sae(kind_in, IN.format(number), seed=1)
    return Decomposer(model, layer, sae_in, make_sae(kind_out, OUT.format(number), seed=2), **kwargs)


@pytest.fixture(scope="module")
def decomposer(models):
    return make(models(True, True))


# --- the shapes of answers (the class' docstring states them) ---------------------------------------------------------

# The tensors that a call answers with, by the shape of what is found of one output.
INDEXED = {
    "directions": lambda d, output: {(D,): d.directions(output)},
    "interaction": lambda d, output: {(D, D): d.interaction(output), (D_SAE,) * 2: d.interaction(output, "features")},
    "linear": lambda d, output: {(D,): d.linear(output)},
    "constant": lambda d, output: {(): d.constant(output)},
    "eigen": lambda d, output: {(5,): d.eigen(output, 5).values, (5, D): d.eigen(output, 5).vectors},
}
# The output of each row of the table that a call answers with.
TABLES = {
    "top_interactions": lambda d, output: d.top_interactions(output, 2).output,
    "between": lambda d, output: d.between(output, torch.eye(D), n=2).output,
    "spectra": lambda d, output: d.spectra(output, progress=False).outputs,
    "strongest_interactions": lambda d, output: d.strongest_interactions(9, output, progress=False).output,
    "sparsity": lambda d, output: d.sparsity(output, progress=False).outputs,
    "outliers": lambda d, output: d.outliers(output, 2, progress=False).output,
    "motifs": lambda d, output: d.motifs(output, progress=False).outputs,
}
OF_FEATURES = {  # these take no directions
    "fidelity": lambda d, output: d.fidelity(["the little fox"], output, 2).features,
    "neighbours": lambda d, output: d.neighbours(output, 2).outputs,
    "clusters": lambda d, output: d.clusters(output).features,
}
OUTPUTS = [3, [3], [5, 3, 9], torch.eye(D)[2], torch.eye(D)[:1], torch.eye(D)[1:5]]
OUTPUT_NAMES = ["a feature", "a list of one", "features", "a direction", "a row of one", "directions"]


@pytest.mark.parametrize("output", OUTPUTS, ids=OUTPUT_NAMES)
@pytest.mark.parametrize("call", INDEXED)
def test_tensors_are_indexed_as_the_output_is(decomposer, call, output):
    front = np.shape(output)[: np.ndim(output) - torch.is_tensor(output)]
    for own, found in INDEXED[call](decomposer, output).items():
        assert found.shape == front + own
        if front:
            for one, row in zip(output, found, strict=True):  # block sums of one output are taken in another order
                assert_close(INDEXED[call](decomposer, one)[own], row, **ROUNDING)


@pytest.mark.parametrize("output", OUTPUTS, ids=OUTPUT_NAMES)
@pytest.mark.parametrize("call", TABLES | OF_FEATURES)
def test_tables_have_rows_for_each_output(decomposer, call, output):
    if torch.is_tensor(output) and call in OF_FEATURES:
        with pytest.raises(ArgumentError, match="these are directions"):
            OF_FEATURES[call](decomposer, output)
        return
    rows = (TABLES | OF_FEATURES)[call](decomposer, output)
    assert rows.ndim == 1
    asked = range(len(torch.atleast_2d(output))) if torch.is_tensor(output) else np.atleast_1d(output)
    found = list(dict.fromkeys(rows.tolist()))
    assert set(found) <= set(asked) if call in ("strongest_interactions", "motifs", "outliers") else found == [*asked]


@pytest.mark.parametrize("output", OUTPUTS, ids=OUTPUT_NAMES)
def test_what_is_between_outputs_is_square(decomposer, output):
    n = np.shape(output)[0] if np.ndim(output) > torch.is_tensor(output) else 1
    assert decomposer.inner_products(output).shape == (n, n)


def test_every_call_that_takes_an_output_is_held_to_a_shape():
    calls = {name for name, call in vars(Decomposer).items() if name[0] != "_" and callable(call)}
    takes = {name for name in calls if "output" in signature(getattr(Decomposer, name)).parameters}
    assert takes == {*INDEXED, *TABLES, *OF_FEATURES, "inner_products"}


# --- interaction: what an output may be -------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("side", ["encoder", "decoder"])
def test_the_three_terms_are_the_layers_read_of_a_feature(models, bias, layer, side):
    """`x^T Q x + g . x + h == u . mlp(x)` with `u` the feature's encoder or decoder direction."""
    model = models(bias, True)
    decomposer = make(model, layer)
    features = torch.tensor([5, 0, 39])
    sae = decomposer.output_sae
    u = (sae.W_enc.T if side == "encoder" else sae.W_dec).detach()[features]
    x = torch.randn(1, 20, D, generator=torch.Generator().manual_seed(0))
    Q, g, h = (of(features, side=side) for of in (decomposer.interaction, decomposer.linear, decomposer.constant))
    assert (Q.shape, g.shape, h.shape) == ((3, D, D), (3, D), (3,))
    found = torch.einsum("pi,nij,pj->pn", x[0], Q, x[0]) + x[0] @ g.T + h
    assert_close(found, model.blocks[layer].mlp(x)[0].detach() @ u.T, **ROUNDING)
    assert torch.equal(Q, Q.mT)
    if not bias:
        assert not g.any()
        assert not h.any()


@pytest.mark.parametrize("side", ["encoder", "decoder"])
@pytest.mark.parametrize(("basis", "d"), [("residual", D), ("features", D_SAE)])
def test_integers_of_every_width_are_features(decomposer, basis, d, side):
    one = decomposer.interaction(7, basis=basis, side=side)
    assert one.shape == (d, d)
    assert torch.equal(one, one.T)
    for dtype in (torch.int64, torch.int32, torch.int8):
        assert torch.equal(decomposer.interaction(torch.tensor(7, dtype=dtype), basis=basis, side=side), one)
    several = decomposer.interaction(torch.tensor([7, 3, 7]), basis=basis, side=side)
    assert torch.equal(several, several.mT)


def test_as_many_integers_as_dimensions_are_still_features(decomposer):
    features = torch.arange(D)
    assert decomposer.interaction(features).shape == (D, D, D)
    assert_close(decomposer.interaction(features)[4], decomposer.interaction(4), **ROUNDING)


def test_no_features_give_an_empty_batch(decomposer):
    assert decomposer.interaction(torch.tensor([], dtype=torch.long)).shape == (0, D, D)


@pytest.mark.parametrize("basis", ["residual", "features"])
def test_floats_are_directions_taken_as_they_are(decomposer, basis):
    u = torch.randn(3, D, generator=torch.Generator().manual_seed(0)) * 5
    batch, one = decomposer.interaction(u, basis=basis), decomposer.interaction(u[0], basis=basis)
    assert batch.ndim == 3
    assert one.ndim == 2
    assert_close(batch[0], one, **ROUNDING)
    assert_close(decomposer.interaction(u[:1], basis=basis)[0], one, **ROUNDING)
    assert_close(decomposer.interaction(2 * u[0], basis=basis), 2 * one, **ROUNDING)  # not normalised
    assert torch.equal(decomposer.interaction(u[0], basis=basis, side="decoder"), one)
    assert_close(decomposer.interaction(u[0].double(), basis=basis), one, **ROUNDING)


def test_a_feature_is_its_direction(decomposer):
    sae = decomposer.output_sae
    assert_close(decomposer.interaction(9), decomposer.interaction(sae.W_enc[:, 9].detach()), **ROUNDING)
    assert_close(decomposer.interaction(9, side="decoder"), decomposer.interaction(sae.W_dec[9].detach()), **ROUNDING)
    # A float that happens to be whole is a direction, not a feature.
    assert decomposer.interaction(torch.ones(D)).shape == (D, D)


def test_the_feature_basis_is_the_decoders(decomposer):
    decoder, Q = decomposer.input_sae.W_dec.detach(), decomposer.interaction(3)
    assert_close(decomposer.interaction(3, basis="features"), decoder @ Q @ decoder.T, **ROUNDING)


def test_results_carry_no_gradient(decomposer):
    assert not decomposer.interaction(3, basis="features").requires_grad
    assert not decomposer.eigen(3).vectors.requires_grad
    assert not decomposer.top_interactions(3, n=2).coefficient.requires_grad


@pytest.mark.parametrize("variant", VARIANTS, ids=variant_name)
def test_every_class_of_sae_has_interactions(models, variant):
    """With decoder norms or a gate's magnitudes applied at run time, the effective directions are meant."""
    sae = make_sae(hook=OUT.format(0), **variant)
    decomposer = Decomposer(models(False, True), 0, make_sae(hook=IN.format(0), **variant), sae)
    norms = sae.W_dec.norm(dim=-1).detach() if variant["kind"] == "topk-rescaled" else torch.ones(D_SAE)
    magnitudes = sae.r_mag.detach().exp() if variant["kind"] == "gated" else torch.ones(D_SAE)
    u = sae.W_enc.T.detach() * (norms * magnitudes)[:, None]
    assert_close(decomposer.interaction(4), decomposer.interaction(u[4]), **ROUNDING)
    u = sae.W_dec.detach() / norms[:, None]
    assert_close(decomposer.interaction(4, side="decoder"), decomposer.interaction(u[4]), **ROUNDING)
    assert decomposer.interaction(4, basis="features").shape == (D_SAE, D_SAE)


def test_a_negative_layer_counts_from_the_end(models):
    first, last = make(models(False, True), -1), make(models(False, True), 1)
    assert first.layer == 1
    assert torch.equal(first.interaction(3), last.interaction(3))


def test_an_sae_that_does_not_name_its_hook_is_taken_on_trust(models):
    decomposer = Decomposer(models(False, True), 0, make_sae("topk"), make_sae("topk", seed=2))
    assert decomposer.interaction(1, basis="features").shape == (D_SAE, D_SAE)


def test_shows_what_it_is_made_of(models):
    shown = repr(Decomposer(models(False, True), -1, output_sae=make_sae("topk", "blocks.1.hook_mlp_out")))
    assert shown.endswith(f"layer 1, output_sae of {D_SAE} features on 'blocks.1.hook_mlp_out')")


# --- the authors' numbers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("side", "prefix"), [("encoder", "enc"), ("decoder", "dec")])
def test_parity_of_interaction_matrices(tracer, side, prefix):
    raw = tracer.expected[f"{prefix}.q_raw"]
    found = tracer.decomposer.interaction(torch.arange(4), side=side)
    assert_close(found, (raw + raw.mT) / 2, atol=1e-4, rtol=0)
    assert torch.equal(found, found.mT)

    features = tracer.expected[f"{prefix}.q_features"]
    found = tracer.decomposer.interaction(torch.arange(2), basis="features", side=side)
    assert_close(found, (features + features.mT) / 2, atol=1e-4, rtol=0)
    assert torch.equal(found, found.mT)


# --- top interactions -------------------------------------------------------------------------------------------------


def brute_force(Q):
    """Every self and cross interaction of a `(d, d)` matrix once, by falling absolute coefficient, in loops."""
    pairs = []
    for i, j in itertools.combinations_with_replacement(range(len(Q)), 2):
        pairs.append((i, j, (1 if i == j else 2) * Q[i, j].item()))
    return sorted(pairs, key=lambda pair: -abs(pair[2]))


@settings(max_examples=15)
@given(st.integers(0, D_SAE - 1), st.integers(1, D_SAE * (D_SAE + 1) // 2), st.sampled_from(["encoder", "decoder"]))
def test_the_largest_of_all_pairs(decomposer, output, n, side):
    Q = decomposer.interaction(output, basis="features", side=side)
    top, expected = decomposer.top_interactions(output, n=n, side=side), brute_force(Q)[:n]
    assert top.output.tolist() == [output] * n
    found = dict(zip(zip(top.i.tolist(), top.j.tolist(), strict=True), top.coefficient.tolist(), strict=True))
    every = {(i, j): coefficient for i, j, coefficient in brute_force(Q)}
    assert len(found) == n
    # float32 sums of a few dozen terms; pairs that differ by less may change places.
    assert found == pytest.approx({pair: every[pair] for pair in found}, abs=1e-5)
    assert top.coefficient.abs().tolist() == pytest.approx([abs(pair[2]) for pair in expected], abs=1e-5)
    assert (top.i <= top.j).all()


def test_all_pairs_of_several_outputs(decomposer):
    outputs = torch.tensor([8, 2])
    Q = decomposer.interaction(outputs, basis="features")
    top = decomposer.top_interactions(outputs, n=5)
    assert top.output.tolist() == [8] * 5 + [2] * 5
    for row, output in enumerate(outputs.tolist()):
        some, expected = top[top.output == output], brute_force(Q[row])[:5]
        assert list(zip(some.i.tolist(), some.j.tolist(), strict=True)) == [(i, j) for i, j, _ in expected]
    assert len(decomposer.top_interactions(outputs, n=D_SAE * (D_SAE + 1) // 2)) == D_SAE * (D_SAE + 1)


def test_the_default_is_fifty(decomposer):
    assert len(decomposer.top_interactions(1)) == 50


@pytest.mark.parametrize("n", [0, -3, D_SAE * (D_SAE + 1) // 2 + 1])
def test_the_number_of_pairs_is_checked(decomposer, n):
    with pytest.raises(OutOfRangeError, match=f"n is {n}, expected 1 to {D_SAE * (D_SAE + 1) // 2}"):
        decomposer.top_interactions(0, n=n)


def test_the_table_has_indices_kinds_and_names(models):
    names_in, names_out = [f"in {i}" for i in range(D_SAE)], [f"out {i}" for i in range(D_SAE)]
    decomposer = make(models(False, True), input_names=names_in, output_names=names_out)
    top = decomposer.top_interactions(torch.tensor([8, 2]), n=40)
    frame = top.to_frame()
    columns = ["layer", "output", "i", "j", "kind", "coefficient", "output_name", "i_name", "j_name"]
    assert list(frame.columns) == columns
    assert frame.output.tolist() == [8] * 40 + [2] * 40
    assert frame.i.tolist() == top.i.tolist()
    assert frame.j.tolist() == top.j.tolist()
    assert frame.coefficient.tolist() == top.coefficient.tolist()
    assert set(frame.kind) == {"self", "cross"}
    assert ((frame.i == frame.j) == (frame.kind == "self")).all()
    assert frame.i_name.tolist() == [names_in[i] for i in frame.i]
    assert frame.j_name.tolist() == [names_in[j] for j in frame.j]
    assert frame.output_name.tolist() == [names_out[o] for o in frame.output]
    assert "out 8" in str(top)


def test_directions_have_no_feature_names(models):
    decomposer = make(models(False, True), output_names=[f"out {i}" for i in range(D_SAE)])
    frame = decomposer.top_interactions(torch.randn(2, D), n=3).to_frame()
    assert frame.output.tolist() == [0] * 3 + [1] * 3
    assert frame.output_name.tolist() == ["0"] * 3 + ["1"] * 3


def test_a_single_feature_has_one_interaction(models):
    sae = make_sae("standard", IN.format(0), d_sae=1)
    decomposer, u = Decomposer(models(False, True), 0, sae), torch.randn(D)
    top = decomposer.top_interactions(u, n=1)
    assert top.i.tolist() == top.j.tolist() == [0]
    assert_close(top.coefficient, decomposer.interaction(u, basis="features")[0])


def test_attribution_uses_the_same_coefficients(decomposer):
    """`contribution = coefficient * f_i * f_j`, the coefficient being that of the weights alone."""
    every = decomposer.top_interactions(6, n=D_SAE * (D_SAE + 1) // 2).to_frame().set_index(["i", "j"]).coefficient
    frame = decomposer.attribute(torch.tensor([1, 7, 4]), 6, 2).pair_frame()
    assert len(frame) == 28  # 7 active features
    # One from a float32 matrix, one from float64 products of the branches.
    expected = [every[pair] for pair in zip(frame.i, frame.j, strict=True)]
    assert frame.coefficient.tolist() == pytest.approx(expected, abs=1e-4, rel=1e-4)


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("published", "kind"), [({"gate": "gelu"}, "gated by 'gelu'"), ({"bilinear": False}, "one-branch")]
)
def test_a_model_that_is_not_bilinear(published, kind):
    with pytest.raises(NotBilinearError, match=f"{kind}.*not a quadratic form"):
        Decomposer(make_model(**published), 0)


@pytest.mark.parametrize("layer", [2, -3, 100])
def test_a_layer_out_of_range(models, layer):
    with pytest.raises(OutOfRangeError, match=f"layer {layer} is outside the model's 2 layers, 0 to 1"):
        Decomposer(models(False, True), layer)


def test_a_layer_is_any_integer(models):
    for layer in (np.int64(1), torch.tensor(1), -1):
        assert type(Decomposer(models(False, True), layer).layer) is int
    for wrong in (1.0, "1", None):
        with pytest.raises(ArgumentError, match="is not an integer: layer"):
            Decomposer(models(False, True), wrong)


@pytest.mark.parametrize("which", ["input", "output"])
def test_an_sae_of_another_width(models, which):
    hook = (IN if which == "input" else OUT).format(0)
    with pytest.raises(SAEMismatchError, match=f"{which} SAE has d_in 12, the model's d_model is 16"):
        Decomposer(models(False, True), 0, **{f"{which}_sae": make_sae("topk", hook, d_in=12)})


@pytest.mark.parametrize(
    ("which", "hook"),
    [
        ("input", IN.format(1)),
        ("input", MID.format(1)),
        ("input", "blocks.0.hook_resid_pre"),
        ("input", "blocks.0.ln1.hook_normalized"),
        ("input", OUT.format(0)),
        ("output", OUT.format(1)),
        ("output", "blocks.0.hook_resid_post"),
        ("output", IN.format(0)),
    ],
)
def test_an_sae_of_another_hook_or_layer(models, which, hook):
    expected = (
        "'blocks.0.ln2.hook_normalized' or 'blocks.0.hook_resid_mid'" if which == "input" else f"'{OUT.format(0)}'"
    )
    with pytest.raises(SAEMismatchError, match=f"{which} SAE is on '{hook}'; layer 0 needs one on {expected}"):
        Decomposer(models(False, True), 0, **{f"{which}_sae": make_sae("topk", hook)})


def test_a_transcoder_is_no_sae_of_either_side(models):
    sae = Transcoder(TranscoderConfig(d_in=D, d_out=D, d_sae=D_SAE, apply_b_dec_to_input=False))
    sae.cfg.metadata.hook_name, sae.cfg.metadata.hook_name_out = IN.format(0), OUT.format(0)
    for saes in ((sae, None), (None, sae)):
        with pytest.raises(SAEMismatchError, match=r"a transcoder reads one place and writes another"):
            Decomposer(models(False, True), 0, *saes)
    u = sae.W_dec.detach()[3]  # the way out that the message names
    assert Decomposer(models(False, True), 0).interaction(u).shape == (D, D)


@given(
    feature=st.integers(0, D_SAE - 1),
    as_type=st.sampled_from([int, np.int64, np.uint8, torch.tensor, lambda i: torch.tensor(i, dtype=torch.int32)]),
)
@pytest.mark.filterwarnings("error:The given NumPy array")
def test_a_feature_is_any_integer(models, feature, as_type):
    """Those of a numpy array or data frame column too; several as a list, an array or a column of one."""
    decomposer, expected = make(models(False, True), 0), make(models(False, True), 0).interaction(feature)
    assert torch.equal(decomposer.interaction(as_type(feature)), expected)
    for several in ([feature, 1], np.array([feature, 1]), pd.Series([feature, 1]), torch.tensor([feature, 1]).int()):
        # One matrix and a batch of two are multiplied in other orders: float32 rounding.
        assert_close(decomposer.interaction(several)[0], expected, atol=1e-6, rtol=0)
        assert decomposer.eigen(several, k=2).to_frame()["output"].tolist() == [feature, feature, 1, 1]
    assert decomposer.eigen(as_type(feature), k=1).outputs.tolist() == [feature]


def test_directions_may_be_arrays(models):
    decomposer, u = make(models(False, True), 0), torch.randn(3, D)
    expected = decomposer.interaction(u)
    for same in (u.numpy(), u.double(), u.tolist()):
        assert_close(decomposer.interaction(same), expected, **ROUNDING)
    assert decomposer.eigen(u, k=1).outputs.tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda d: d.interaction(2.0), r"output is 2.0, expected|an output of shape \(\)"),
        (lambda d: d.interaction(torch.tensor(True)), r"type torch.bool: expected features"),
        (lambda d: d.interaction("walk"), r"'walk'"),
        (lambda d: d.interaction(torch.zeros(2, 2, D)), r"shape \(2, 2, 16\).*\(16,\) or \(n, 16\)"),
        (lambda d: d.interaction(torch.zeros(2, 2, dtype=torch.long)), r"features of shape \(2, 2\)"),
        (lambda d: d.interaction(torch.full((D,), torch.nan)), "NaN or infinite"),
        (lambda d: d.interaction(1, side="encodr"), r"side is 'encodr'.*Did you mean 'encoder'"),
        (lambda d: d.interaction(1, basis="feature"), r"basis is 'feature'.*Did you mean 'features'"),
        (lambda d: d.attribute("the little fox", 1.5, 1), r"feature is 1.5, expected"),
        (lambda d: d.attribute("the little fox", 1, "last"), r"position is 'last', expected"),
        (lambda d: d.attribute(torch.ones(2, 3, dtype=torch.long), 1, 1), r"text_or_tokens is i64\[2,3\]"),
        (lambda d: d.attribute(["the little fox", "Mira"], 1, 1), r"text_or_tokens is \["),
    ],
)
def test_what_is_no_argument(models, call, message):
    """One exception, which says what was given and what was expected."""
    with pytest.raises(ArgumentError, match=message):
        call(make(models(False, True), 0))


def test_as_many_names_as_features(models):
    with pytest.raises(ArgumentError, match="2 input_names for 40 input features"):
        make(models(False, True), 0, input_names=["a", "b"])
    with pytest.raises(ArgumentError, match="1 output_names for 0 output features: there is no output_sae"):
        Decomposer(models(False, True), 0, output_names=["a"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_saes_are_read_in_float32(models, dtype):
    """The user's SAE stays as it is; what it computes from is raised, so the parts add up as they do in float32."""
    out = make_sae("topk", OUT.format(0), seed=2).to(dtype)
    decomposer = Decomposer(models(False, True), 0, make_sae("topk", IN.format(0)).to(dtype), out)
    assert out.W_enc.dtype == dtype
    for feature in range(5):
        assert decomposer.attribute("the little fox", feature, -1).relative_error < 1e-5


def test_an_sae_on_resid_mid_has_no_fixed_interactions(models):
    out = make_sae("topk", OUT.format(0), seed=2)
    decomposer = Decomposer(models(False, True), 0, make_sae("topk", MID.format(0)), out)
    for call in (lambda: decomposer.interaction(0, basis="features"), lambda: decomposer.top_interactions(0)):
        with pytest.raises(
            SAEMismatchError, match=r"'blocks.0.hook_resid_mid'.*norm scale.*ln2.hook_normalized.*attribute"
        ):
            call()
    assert decomposer.interaction(0).shape == (D, D)  # nothing of the input SAE in it
    assert decomposer.eigen(0, k=2).in_features(top=1).shape == (2, 6)  # cosines do not depend on the scale


def test_without_normalisation_resid_mid_is_the_layers_input(models):
    sae, out = make_sae("topk", MID.format(0)), make_sae("topk", OUT.format(0), seed=2)
    decomposer = Decomposer(models(False, False), 0, sae, out)
    expected = sae.W_dec.detach() @ decomposer.interaction(0) @ sae.W_dec.detach().T
    assert_close(decomposer.interaction(0, basis="features"), expected, **ROUNDING)
    assert len(decomposer.top_interactions(0, n=3)) == 3


def test_a_bilinear_encoder_has_no_encoder_direction(models):
    decomposer = make(models(False, True), kind_out="scope-bilinear")
    calls = [
        lambda: decomposer.interaction(0),
        lambda: decomposer.interaction(torch.tensor([0, 1]), basis="features"),
        lambda: decomposer.linear(0),
        lambda: decomposer.constant(0),
        lambda: decomposer.eigen(0),
        lambda: decomposer.top_interactions(0),
        lambda: decomposer.attribute(torch.tensor([1, 2]), 0, 1),
    ]
    for call in calls:
        with pytest.raises(SAEMismatchError, match=r'bilinear encoder.*no encoder direction.*side="decoder"'):
            call()
    u = decomposer.output_sae.W_dec[0].detach()
    assert_close(decomposer.interaction(0, side="decoder"), decomposer.interaction(u), **ROUNDING)
    assert decomposer.eigen(0, k=1, side="decoder").values.shape == (1,)
    assert len(decomposer.top_interactions(0, n=1, side="decoder")) == 1


def test_a_bilinear_encoder_is_welcome_on_the_input(models):
    decomposer = make(models(False, True), kind_in="scope-bilinear")
    assert decomposer.interaction(0, basis="features").shape == (D_SAE, D_SAE)
    assert len(decomposer.top_interactions(0, n=2)) == 2


def test_a_missing_sae(models):
    bare = Decomposer(models(False, True), 0)
    assert bare.input_sae is None
    assert bare.output_sae is None
    u, tokens = torch.randn(D), torch.tensor([1, 2])
    assert bare.interaction(u).shape == (D, D)
    assert bare.eigen(u).values.shape == (D,)
    only_in = Decomposer(models(False, True), 0, make_sae("topk", IN.format(0)))
    only_out = Decomposer(models(False, True), 0, output_sae=make_sae("topk", OUT.format(0)))
    needs_output = [lambda: bare.interaction(0), lambda: bare.eigen(torch.tensor([1])), lambda: bare.linear(0)]
    needs_output += [lambda: only_in.top_interactions(0), lambda: only_in.attribute(tokens, 0, 0)]
    needs_input = [lambda: bare.interaction(u, basis="features"), lambda: bare.top_interactions(u)]
    needs_input += [lambda: only_out.interaction(0, basis="features"), lambda: only_out.attribute(tokens, 0, 0)]
    for which, calls in (("an output_sae", needs_output), ("an input_sae", needs_input)):
        for call in calls:
            with pytest.raises(MissingSAEError, match=f"needs {which}"):
                call()


@pytest.mark.parametrize("feature", [-1, D_SAE, 10_000])
def test_a_feature_out_of_range(decomposer, feature):
    forms = [feature, torch.tensor(feature), torch.tensor([0, feature])]
    calls = [
        decomposer.interaction,
        decomposer.linear,
        decomposer.constant,
        decomposer.eigen,
        decomposer.top_interactions,
    ]
    for call, output in itertools.product(calls, forms):
        with pytest.raises(OutOfRangeError, match=f"feature {feature} is outside the output SAE's 40, 0 to 39"):
            call(output)


@pytest.mark.parametrize("shape", [(D_SAE,), (15,), (3, 17), (0,)])
def test_directions_of_another_width(decomposer, shape):
    for call in (decomposer.interaction, decomposer.linear, decomposer.constant, decomposer.eigen):
        with pytest.raises(SAEMismatchError, match=r"directions of shape \(.*layer writes 16 dimensions"):
            call(torch.zeros(shape))
        with pytest.raises(ArgumentError, match="output is empty"):
            call([])


@pytest.mark.parametrize("names", ["x" * D_SAE, [1] * D_SAE, dict.fromkeys(map(str, range(D_SAE))), 5, {0: "a"}])
def test_names_are_a_list_of_strings(models, names):
    """A text of as many letters, or a mapping of as many entries, is none."""
    with pytest.raises(ArgumentError, match="output_names"):
        make(models(False, True), 0, output_names=names)


def test_flags_and_fractions_are_neither_outputs_nor_numbers(models):
    decomposer = make(models(False, True), 0)
    for output in (True, [0, True], [True, False], torch.tensor(True), 3.0, "3", None):
        with pytest.raises(ArgumentError, match=r"output|integer"):
            decomposer.interaction(output)
    counted = {"k": (decomposer.eigen, decomposer.spectra), "n": (decomposer.top_interactions, decomposer.outliers)}
    for name, calls in counted.items():
        for call, number in itertools.product(calls, (True, 2.0, "3", 0)):
            with pytest.raises((ArgumentError, OutOfRangeError), match=f"{name} is"):
                call(3, **{name: number})
    for name, calls in (("k", counted["k"]), ("n", counted["n"][:1])):
        for call in calls:
            with pytest.raises(OutOfRangeError, match=f"{name} is 999999999999999, expected 1 to"):
                call(3, **{name: 999999999999999})
    for memory in (True, None, "x", 1.5, float("nan"), 0, -1):
        with pytest.raises(ArgumentError, match="memory"):
            decomposer.spectra([3], memory=memory)


def test_a_model_of_another_kind_is_told_which_it_should_be(models):
    hugging = BilinearForCausalLM.from_hooked(models(False, True))
    for analysis in (lambda model: Decomposer(model, 0), lambda model: freeze(model, [1, 2])):
        with pytest.raises(ArgumentError, match=r"model is a BilinearForCausalLM, .* inside it, \.hooked"):
            analysis(hugging)
        with pytest.raises(ArgumentError, match=r"model is a NoneType, .*load_model"):
            analysis(None)


# --- from where it is published ---------------------------------------------------------------------------------------


def test_one_line_gives_model_saes_and_names(monkeypatch):
    """Nothing runs until a name is asked for; then one pass names both SAEs' features, where they have no names yet."""
    runs = []
    monkeypatch.setattr(examples, "names_beside", lambda sae: None)
    original = examples.feature_activations
    monkeypatch.setattr(examples, "feature_activations", lambda *args: runs.append(1) or original(*args))
    texts = ["Tim saw a big dog.", "Lily was sad. She did not play."]
    found = Decomposer.from_pretrained("ts-tiny", layer=-1, texts=texts)
    assert found.layer == 3
    assert found.input_sae.cfg.metadata.hook_name == "blocks.3.ln2.hook_normalized"
    assert found.output_sae.cfg.metadata.hook_name == "blocks.3.hook_mlp_out"
    top = found.top_interactions(101, n=5)
    assert found.attribute(texts[0], 101, -1).is_rounding
    assert not runs
    inputs, outputs = original(found.model, [found.input_sae, found.output_sae], texts)
    frame = top.to_frame()
    assert frame.output_name.tolist() == [outputs.labels()[101]] * 5
    assert frame.i_name.tolist() == [inputs.labels()[i] for i in frame.i]
    assert runs == [1]
    kept = pickle.loads(pickle.dumps(top)).names[3]
    assert list(kept.i) == inputs.labels()
    assert runs == [1]  # what was found travels with the names
    monkeypatch.undo()
    monkeypatch.setattr(examples, "feature_activations", None)
    assert Decomposer.from_pretrained("ts-tiny", layer=-1).output_names[101] == "101 didn't → know"


def test_from_a_folder_or_a_model_with_saes_of_ones_own(models, tmp_path):
    model = models(False, True)
    saes = [make_sae("topk", hook.format(1), d_sae=32, seed=seed) for seed, hook in enumerate((IN, OUT))]
    for sae, point in zip(saes, ("mlp-in", "mlp-out"), strict=True):
        sae.save_model(tmp_path / f"1-{point}-x2-k{sae.cfg.k}")
    model.save_pretrained(tmp_path / "model")
    for source in (model, tmp_path / "model"):
        found = Decomposer.from_pretrained(source, 1, saes=tmp_path)
        expected = Decomposer(model, 1, *saes)
        assert torch.equal(found.interaction(3, "features"), expected.interaction(3, "features"))
        assert len(found.input_names) == 32
    with pytest.raises(ModelNotFoundError, match="say where they are"):
        Decomposer.from_pretrained(model, 1)
    with pytest.raises(OutOfRangeError, match="layer 5 is outside the model's 2 layers"):
        Decomposer.from_pretrained(model, 5, saes=tmp_path)
