"""The exact expansion of one pre-activation: complete, independent of what it explains, and right in every part.

Tolerances: the contract allows a completeness error of 1e-5 of the sum of absolute parts (float32 rounding of the model
itself is about a tenth of that), and the same holds for sums of parts that are compared with one another. Single parts
come from float64 products rounded once, so they are compared at 1e-5 relative.
"""

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from bilens.decompose import Attribution, Decomposer
from bilens.decompose.explanation import Explanation
from bilens.errors import ContextLengthError, EmptyTextError, OutOfRangeError, SAEMismatchError
from bilens.sae.loading import load_sae
from bilens.sae.view import SAEView
from tests.conftest import SHARED
from tests.random_saes import CLASSES, D_SAE, LINEAR, NORMS, VARIANTS, Oracle, array, make_sae, variant_name

IN, MID, OUT = (f"blocks.{{}}.{hook}" for hook in ("ln2.hook_normalized", "hook_resid_mid", "hook_mlp_out"))
COMPLETE = 1e-5
TOKENS = torch.tensor([1, 17, 42, 8, 42, 3])
COLUMNS = ["i", "j", "kind", "f_i", "f_j", "coefficient", "contribution", "i_name", "j_name"]


def make(model, layer, sae_in, sae_out, on_resid_mid=False) -> Decomposer:
    """SAEs given by their options, put on their hooks."""
    hook = (MID if on_resid_mid else IN).format(layer)
    return Decomposer(
        model, layer, make_sae(hook=hook, seed=1, **sae_in), make_sae(hook=OUT.format(layer), seed=2, **sae_out)
    )


def check(decomposer: Decomposer, tokens: torch.Tensor, feature: int, position: int) -> Attribution:
    """Everything that an attribution promises, against the model's own activations and the SAEs' formulas."""
    found = decomposer.attribute(tokens, feature, position)
    at = position % tokens.numel()
    layer, sae_in, sae_out = decomposer.layer, decomposer.input_sae, decomposer.output_sae
    hooks, scale_hook = [sae_in.cfg.metadata.hook_name, OUT.format(layer)], f"blocks.{layer}.ln2.hook_scale"
    _, cache = decomposer.model.run_with_cache(tokens.reshape(1, -1), names_filter=[*hooks, scale_hook])
    ins, outs = (Oracle(sae, cache[hook][0]) for sae, hook in zip((sae_in, sae_out), hooks, strict=True))

    # What it explains: from the model's own output, before top-k.
    scale = 1 + np.abs(outs.pre[at]).max()
    assert found.actual == pytest.approx(outs.pre[at, feature], abs=1e-5 * scale)
    assert found.active == (outs.acts[at, feature] != 0)
    assert (found.layer, found.feature, found.position) == (layer, feature, at)
    assert len(found.tokens) == tokens.numel()

    # The sources: every active input feature, each as strong as the SAE says.
    assert found.inputs.tolist() == np.flatnonzero(ins.acts[at]).tolist()
    scale = 1 + np.abs(ins.acts[at]).max()
    assert found.activations.tolist() == pytest.approx(ins.acts[at][ins.acts[at] != 0].tolist(), abs=1e-5 * scale)

    # Complete: the parts are the pre-activation.
    m, parts = len(found.inputs), array(found.contributions)
    assert parts.shape == (m + 3, m + 3)
    once = np.triu(parts, 1) * 2 + np.diag(np.diag(parts))
    absolute = np.abs(once).sum() + abs(found.output_bias)
    assert found.absolute_sum == pytest.approx(absolute, rel=1e-5)
    assert abs(found.completeness_error) <= COMPLETE * absolute
    assert found.relative_error == pytest.approx(abs(found.completeness_error) / absolute, rel=1e-4)
    assert found.completeness_error == found.total - found.actual
    assert found.total == pytest.approx(parts.sum() + found.output_bias, abs=COMPLETE * absolute)
    assert sum(found.groups.values()) == pytest.approx(found.total, abs=COMPLETE * absolute)

    # The error is what the input SAE does not reconstruct, in the space that the layer reads.
    error = ins.x[at] - ins.reconstruction[at]
    if hooks[0] == MID.format(layer):
        error = error / cache[scale_hook][0, at].item()
    expected = error @ array(decomposer.interaction(feature)) @ error / outs.divisor[at]
    assert found.groups["error x error"] == pytest.approx(expected, abs=COMPLETE * absolute)

    check_circuits(found.explanation, decomposer, absolute)
    labels, values = found.pair_bars(top=3)
    assert sum(values) == pytest.approx(found.total, abs=COMPLETE * absolute)
    assert len(labels) == len(values) <= 6

    # The table: each pair once, and what it adds is coefficient times activations.
    frame = found.pair_frame()
    assert list(frame.columns) == COLUMNS
    assert len(frame) == m * (m + 1) // 2
    assert ((frame.i == frame.j) == (frame.kind == "self")).all()
    assert (frame.i <= frame.j).all()
    assert not frame.duplicated(["i", "j"]).any()
    assert (frame.contribution.abs().diff().dropna() <= 0).all()
    product = frame.coefficient * frame.f_i * frame.f_j
    np.testing.assert_allclose(frame.contribution.tolist(), product.tolist(), rtol=1e-5, atol=1e-12)
    for kind in ("self", "cross"):
        total = frame.contribution[frame.kind == kind].sum()
        assert total == pytest.approx(found.groups[f"{kind} interactions"], abs=COMPLETE * absolute)
    activation = dict(zip(found.inputs.tolist(), found.activations.tolist(), strict=True))
    assert frame.f_i.tolist() == [activation[i] for i in frame.i]
    assert frame.f_j.tolist() == [activation[j] for j in frame.j]
    return found


def check_circuits(told: Explanation, decomposer: Decomposer, absolute: float) -> None:
    """An exact sum of squares, each of them a sum over the input's parts, largest first and turned to the positive."""
    assert told.relative_error < COMPLETE
    assert told.total == pytest.approx(told.actual, abs=COMPLETE * absolute)
    projections, contributions = array(told.projections), array(told.contributions)
    assert told.parts.dtype == torch.float64
    assert told.parts.shape == (len(told.values), len(told.inputs) + 2)
    assert (projections >= 0).all()
    assert (np.diff(np.abs(contributions)) <= 0).all()
    np.testing.assert_allclose(contributions, array(told.values) * projections**2)
    if told.written:
        assert told.shares.sum().item() + told.layer_bias / told.written == pytest.approx(1, abs=1e-9)

    # The squares are those of the interaction matrix.
    matrix = told.vectors.T @ (told.values[:, None] * told.vectors)
    expected = decomposer.interaction(told.feature).double()
    ratio = (matrix * expected).sum() / (expected**2).sum()  # the SAE's own scale on this token
    np.testing.assert_allclose(array(matrix), array(ratio * expected), atol=1e-5 * array(matrix).max())

    # The tables add up as they say, and the picture does.
    frame = told.to_frame()
    assert frame.contribution.sum() == pytest.approx(told.total, abs=COMPLETE * absolute)
    parts = told.part_frame(1)
    assert parts.value.sum() == pytest.approx(projections[1])
    assert parts.i[parts.part == "feature"].isin(told.inputs.tolist()).all()
    for top in (2, 100):
        labels, values = told.bars(top)
        assert sum(values) == pytest.approx(told.total, abs=COMPLETE * absolute)
        assert len(labels) == len(values)
    assert 1 <= told.needed() <= len(told.values) + 1
    assert str(told).startswith(told.sentence)


# --- complete, on every kind of model and SAE -------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS, ids=variant_name)
def test_every_class_of_output_sae(models, variant):
    decomposer = make(models(True, True), 1, {"kind": "scope"}, variant)
    for feature, position in [(0, 0), (13, 3), (39, 5)]:
        check(decomposer, TOKENS, feature, position)


@pytest.mark.parametrize("on_resid_mid", [False, True])
@pytest.mark.parametrize(
    "variant", [*VARIANTS, {"kind": "scope-bilinear"}], ids=lambda v: variant_name(v) if len(v) > 1 else v["kind"]
)
def test_every_class_of_input_sae(models, variant, on_resid_mid):
    decomposer = make(models(True, True), 1, variant, {"kind": "topk"}, on_resid_mid)
    for feature, position in [(0, 0), (13, 3), (39, 5)]:
        check(decomposer, TOKENS, feature, position)


def options(kinds):
    return st.fixed_dictionaries(
        {
            "kind": st.sampled_from(kinds),
            "apply_b_dec_to_input": st.booleans(),
            "normalize_activations": st.sampled_from(NORMS),
        }
    )


# Shrinking a failure takes minutes and says little more than the first one found.
@settings(max_examples=80, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(
    bias=st.booleans(),
    normalization=st.booleans(),
    layer=st.integers(0, 1),
    sae_in=options(list(CLASSES)),
    sae_out=options(LINEAR),
    on_resid_mid=st.booleans(),
    tokens=st.lists(st.integers(0, 49), min_size=1, max_size=32),
    feature=st.integers(0, D_SAE - 1),
    data=st.data(),
)
def test_any_combination(models, bias, normalization, layer, sae_in, sae_out, on_resid_mid, tokens, feature, data):
    position = data.draw(st.integers(-len(tokens), len(tokens) - 1))
    decomposer = make(models(bias, normalization), layer, sae_in, sae_out, on_resid_mid)
    check(decomposer, torch.tensor(tokens), feature, position)


def test_negative_activations_are_sources_too(models):
    decomposer = make(models(False, True), 0, {"kind": "scope"}, {"kind": "topk"})
    found = check(decomposer, TOKENS, 3, 4)
    assert (found.activations < 0).any()
    assert len(found.inputs) == 30


def test_an_input_without_active_features(models):
    """Everything is then in the bias and error groups."""
    decomposer = make(models(True, True), 0, {"kind": "standard"}, {"kind": "topk"})
    decomposer.input_sae.b_enc.data.fill_(-1000.0)
    found = check(decomposer, TOKENS, 3, 4)
    assert len(found.inputs) == 0
    assert found.groups["self interactions"] == found.groups["cross interactions"] == 0.0
    assert found.pair_frame().empty


def test_active_or_not(models):
    """The expansion is of the pre-activation, so that of a feature below the top k is just as exact."""
    decomposer = make(models(True, True), 1, {"kind": "topk"}, {"kind": "topk"})
    found = [decomposer.attribute(TOKENS, feature, 3) for feature in range(D_SAE)]
    assert max(one.relative_error for one in found) <= COMPLETE
    assert sum(one.active for one in found) == 7
    lowest_active = min(one.actual for one in found if one.active)
    assert all(one.actual < lowest_active for one in found if not one.active)
    assert any(one.actual < 0 for one in found)


def test_the_same_token_under_every_name(models):
    decomposer = make(models(True, True), 1, {"kind": "topk"}, {"kind": "topk"})
    found = [
        decomposer.attribute(tokens, feature, position)
        for tokens in (TOKENS, TOKENS[None], TOKENS.int())
        for feature in (5, torch.tensor(5))
        for position in (4, -2)
    ]
    for other in found[1:]:
        assert torch.equal(other.contributions, found[0].contributions)
        assert (other.actual, other.position) == (found[0].actual, 4)


def test_a_text_is_its_tokens_after_bos(models, texts):
    model = models(True, True)
    decomposer = make(model, 1, {"kind": "topk"}, {"kind": "topk"})
    text = texts[100]
    tokens = model.to_tokens(text)
    by_text, by_tokens = (decomposer.attribute(source, 5, -1) for source in (text, tokens))
    assert by_text.position == tokens.shape[1] - 1
    assert by_text.tokens == by_tokens.tokens == model.to_str_tokens(tokens)
    assert by_text.tokens[0] == "[BOS]"
    assert by_text.total == by_tokens.total
    check(decomposer, tokens, 5, -1)


def test_one_token_and_a_full_context(models):
    decomposer = make(models(True, True), 1, {"kind": "topk"}, {"kind": "topk"})
    check(decomposer, torch.tensor([7]), 5, 0)
    check(decomposer, torch.arange(32), 5, 31)


def test_a_model_without_a_tokenizer(models):
    model = models(True, True)
    decomposer = make(model, 0, {"kind": "topk"}, {"kind": "topk"})
    tokenizer, model.tokenizer = model.tokenizer, None
    try:
        assert decomposer.attribute(TOKENS, 0, 0).tokens == [str(token) for token in TOKENS.tolist()]
    finally:
        model.tokenizer = tokenizer


# --- every group, against the expansion in numpy ----------------------------------------------------------------------


@pytest.mark.parametrize("normalization", [True, False])
@pytest.mark.parametrize("on_resid_mid", [False, True])
@pytest.mark.parametrize("apply_b_dec", [True, False])
def test_each_group_is_what_the_design_says(models, normalization, on_resid_mid, apply_b_dec):
    """`z_o` from homogeneous matrices `(d + 1) x (d + 1)`, hidden unit by hidden unit."""
    model, layer, feature, position = models(True, normalization), 1, 11, 3
    decomposer = make(
        model, layer, {"kind": "scope"}, {"kind": "topk-rescaled", "apply_b_dec_to_input": apply_b_dec}, on_resid_mid
    )
    found = check(decomposer, TOKENS, feature, position)
    _, cache = model.run_with_cache(TOKENS[None])
    x = array(cache[IN.format(layer)][0, position])
    scale = array(cache[f"blocks.{layer}.ln2.hook_scale"][0, position]) if on_resid_mid else 1.0
    sae_in, sae_out, mlp = decomposer.input_sae, decomposer.output_sae, model.blocks[layer].mlp

    norm = np.linalg.norm(array(sae_out.W_dec[feature]))
    e = array(sae_out.W_enc[:, feature]) * norm
    left = np.vstack([array(mlp.W_gate), array(mlp.b_gate)])
    right = np.vstack([array(mlp.W_in), array(mlp.b_in)])
    form = np.zeros((17, 17))
    for m in range(left.shape[1]):
        c = array(mlp.W_out)[m] @ e
        form += 0.5 * c * (np.outer(left[:, m], right[:, m]) + np.outer(right[:, m], left[:, m]))
    form[16, 16] += e @ array(mlp.b_out)

    acts = Oracle(sae_in, cache[sae_in.cfg.metadata.hook_name][0]).acts[position]
    parts = {f"f{i}": np.append(acts[i] * array(sae_in.W_dec)[i] / scale, 0) for i in np.flatnonzero(acts)}
    b_dec = array(sae_in.b_dec) / scale
    features = sum(parts.values())
    parts |= {
        "b_dec": np.append(b_dec, 0),
        "error": np.append(x - features[:16] - b_dec, 0),
        "mlp bias": np.append(np.zeros(16), 1),
    }
    rest = {name: parts[name] for name in ("b_dec", "error", "mlp bias")}
    self_part = sum(v @ form @ v for name, v in parts.items() if name not in rest)
    expected = {
        "self interactions": self_part,
        "cross interactions": features @ form @ features - self_part,
        **{f"features x {name}": 2 * features @ form @ v for name, v in rest.items()},
        **{f"{name} x {name}": v @ form @ v for name, v in rest.items()},
        "b_dec x error": 2 * rest["b_dec"] @ form @ rest["error"],
        "b_dec x mlp bias": 2 * rest["b_dec"] @ form @ rest["mlp bias"],
        "error x mlp bias": 2 * rest["error"] @ form @ rest["mlp bias"],
        "output bias": norm * array(sae_out.b_enc)[feature] - (e @ array(sae_out.b_dec) if apply_b_dec else 0),
    }
    # The model's float32 activations are its input here, so only float32 rounding of the results remains; the
    # activations f_i are float32 in bilens and float64 here, which the error source takes up with the other sign.
    assert found.groups.keys() == expected.keys()
    for name, value in expected.items():
        assert found.groups[name] == pytest.approx(value, abs=COMPLETE * found.absolute_sum), name


def test_without_mlp_biases_their_groups_are_zero(models):
    found = check(make(models(False, True), 1, {"kind": "topk"}, {"kind": "topk"}), TOKENS, 5, 2)
    assert {value for name, value in found.groups.items() if "mlp bias" in name} == {0.0}
    assert all(value != 0 for name, value in found.groups.items() if "mlp bias" not in name)


# --- the total is not made from the actual ----------------------------------------------------------------------------


def test_the_total_does_not_follow_a_wrong_actual(models, monkeypatch):
    decomposer = make(models(True, True), 1, {"kind": "topk"}, {"kind": "topk"})
    before = decomposer.attribute(TOKENS, 5, 2)
    true_values = SAEView.pre_activations
    monkeypatch.setattr(SAEView, "pre_activations", lambda view, x: true_values(view, x) + 3.0)
    after = decomposer.attribute(TOKENS, 5, 2)
    assert after.total == before.total
    assert torch.equal(after.contributions, before.contributions)
    assert after.actual == pytest.approx(before.actual + 3.0, abs=1e-5)
    assert after.completeness_error == pytest.approx(-3.0, abs=1e-4)


def test_an_edit_of_the_weights_is_followed_by_both(models):
    decomposer = make(models(True, True), 1, {"kind": "topk"}, {"kind": "topk"})
    before = decomposer.attribute(TOKENS, 5, 2)
    with torch.no_grad():
        decomposer.output_sae.b_enc[5] += 1.5
    after = decomposer.attribute(TOKENS, 5, 2)
    assert after.total - before.total == pytest.approx(1.5, abs=1e-4)
    assert after.actual - before.actual == pytest.approx(1.5, abs=1e-4)


def test_the_total_is_the_float32_sum_of_the_parts(models):
    found = make(models(True, True), 1, {"kind": "topk"}, {"kind": "topk"}).attribute(TOKENS, 5, 2)
    assert found.contributions.dtype == torch.float32
    assert found.total == (found.contributions.sum() + torch.tensor(found.output_bias)).item()


# --- the reference checkpoint -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", [None, *VARIANTS[:6]], ids=lambda v: variant_name(v) if v else "its own")
def test_complete_on_the_reference_model(tracer, ts_micro, variant):
    """Its own SAEs, and random ones as output."""
    model, sae_out = ts_micro.model, tracer.decomposer.output_sae
    if variant is not None:
        sae_out = make_sae(hook=OUT.format(1), d_in=64, d_sae=256, **variant)
    decomposer = Decomposer(model, 1, tracer.decomposer.input_sae, sae_out)
    for prompt, feature in zip(ts_micro.prompts, (0, 100, 255), strict=True):
        tokens = model.to_tokens(prompt)
        for position in (0, 5, -1):
            check(decomposer, tokens, feature, position)


@pytest.mark.parametrize(
    ("point", "layer", "k"),
    [("mlp-in", 1, 6), ("resid-mid", 1, 8), ("mlp-in", 0, 6)],
    ids=["bilinear", "resid-mid", "layer 0"],
)
def test_complete_with_the_other_reference_saes(ts_micro, point, layer, k):
    folder = SHARED / "reference" / "ts-micro-scope"
    if not folder.exists():
        pytest.skip(f"the reference SAEs are not here: no folder {folder}")
    sae_in = load_sae(folder, point, layer, k=k, device="cpu")
    sae_out = load_sae(folder, "mlp-out", layer, k=8, device="cpu")
    decomposer = Decomposer(ts_micro.model, layer, sae_in, sae_out)
    tokens = ts_micro.model.to_tokens(ts_micro.prompts[0])
    for feature in (3, 77):
        for position in (1, 8):
            check(decomposer, tokens, feature, position)


# --- names and text ---------------------------------------------------------------------------------------------------


def test_names_are_carried(models):
    model = models(True, True)
    saes = [make_sae("topk", hook.format(1), seed=seed) for seed, hook in enumerate((IN, OUT))]
    names = [f"in {i}" for i in range(D_SAE)], [f"out {i}" for i in range(D_SAE)]
    found = Decomposer(model, 1, *saes, input_names=names[0], output_names=names[1]).attribute(TOKENS, 5, 2)
    frame = found.pair_frame()
    assert frame.i_name.tolist() == [f"in {i}" for i in frame.i]
    assert frame.j_name.tolist() == [f"in {j}" for j in frame.j]
    assert "feature out 5 at position 2" in str(found)
    for group, value in found.groups.items():
        assert (group in str(found)) == (value != 0)


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def decomposer(models):
    return make(models(True, True), 1, {"kind": "topk"}, {"kind": "topk"})


@pytest.mark.parametrize("feature", [-1, D_SAE, torch.tensor(D_SAE)])
def test_a_feature_out_of_range(decomposer, feature):
    with pytest.raises(OutOfRangeError, match=f"feature {int(feature)} is outside the output SAE's 40, 0 to 39"):
        decomposer.attribute(TOKENS, feature, 0)


@pytest.mark.parametrize("position", [6, -7, 100])
def test_a_position_out_of_range(decomposer, position):
    with pytest.raises(OutOfRangeError, match=f"position {position} is outside the text's 6 tokens.*0 to 5"):
        decomposer.attribute(TOKENS, 0, position)


@pytest.mark.parametrize("text", ["", torch.tensor([], dtype=torch.long), torch.zeros(1, 0, dtype=torch.long)])
def test_an_empty_text(decomposer, text):
    with pytest.raises(EmptyTextError, match=r"empty|nothing to run on"):
        decomposer.attribute(text, 0, 0)


def test_a_text_longer_than_the_context(decomposer):
    with pytest.raises(ContextLengthError, match="33 tokens do not fit the model's context of 32"):
        decomposer.attribute(torch.zeros(33, dtype=torch.long), 0, 0)
    with pytest.raises(ContextLengthError, match="do not fit the model's context of 32"):
        decomposer.attribute("the little fox " * 20, 0, 0)


def test_a_token_outside_the_vocabulary(decomposer):
    with pytest.raises(OutOfRangeError, match="token 100000 is outside the vocabulary"):
        decomposer.attribute(torch.tensor([1, 100_000]), 0, 0)


def test_an_output_sae_with_a_bilinear_encoder(models):
    decomposer = make(models(True, True), 1, {"kind": "topk"}, {"kind": "scope-bilinear"})
    with pytest.raises(SAEMismatchError, match="bilinear encoder"):
        decomposer.attribute(TOKENS, 0, 0)
