"""Splits are complete on every kind of model, SAE and target, and every part is what removing it takes away.

Tolerances: the contract allows a completeness error of 1e-5 of the sum of absolute parts (float32 rounding of the model
itself is about a tenth of that); changes measured on the float32 model are compared at the same.
"""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bilens.attribute import Target, freeze, split
from bilens.attribute.interventions import frozen_hooks, holding_hooks, read_values, rerun
from bilens.attribute.splitting import KINDS
from bilens.attribute.targets import READABLE, read_targets
from bilens.decompose import Decomposer
from bilens.errors import (
    AlteredModelError,
    ArgumentError,
    ContextLengthError,
    EmptyTextError,
    HookNameError,
    MissingSAEError,
    NotBilinearError,
    OutOfRangeError,
    SAEMismatchError,
)
from bilens.layer.bilinear import BilinearLayer
from bilens.sae.loading import list_saes, load_sae
from tests.attribute.conftest import MODEL_KINDS, N_LAYERS, POINTS, TOKENS, model_of, saes_of
from tests.random_saes import make_sae

COMPLETE = 1e-5
MODES = list(itertools.product(["heads", "paths"], ["whole", "features", "pairs"]))
LAST = len(TOKENS) - 1


def every_hook():
    return [name.format(layer) for name in READABLE for layer in range(N_LAYERS if "{}" in name else 1)]


def targets():
    positions = st.integers(-len(TOKENS), LAST)
    vectors = st.integers(0, 99).map(lambda seed: torch.randn(16, generator=torch.Generator().manual_seed(seed)))
    labels = st.tuples(st.integers(0, N_LAYERS - 1), st.sampled_from(POINTS)).map(lambda at: f"{at[0]}-{at[1]}")
    return st.one_of(
        st.builds(Target.direction, vectors, st.sampled_from(every_hook()), positions),
        st.builds(Target.feature, labels, st.integers(0, 39), positions),
        st.builds(Target.logit, st.integers(0, 24), positions, minus=st.none() | st.integers(25, 49)),
    )


@pytest.mark.parametrize("mode", MODES, ids="-".join)
@pytest.mark.parametrize("kind", MODEL_KINDS, ids=str)
@settings(max_examples=8)  # by 24 kinds and modes
@given(target=targets())
def test_complete(frozen_kinds, kind, mode, target):
    frozen = frozen_kinds[kind]
    attention, mlps = mode
    found = split(frozen, target, attention=attention, mlps=mlps)
    absolute = found.values.abs().sum().item()
    assert abs(found.values.sum().item() - found.actual) <= COMPLETE * absolute
    assert found.relative_error <= COMPLETE
    assert found.completeness_error == found.total - found.actual
    assert sum(found.groups.values()) == pytest.approx(found.total, abs=COMPLETE * absolute)
    folded = found.folded()
    assert folded.values.sum().item() == pytest.approx(found.values.sum().item(), abs=1e-9 * absolute)
    assert not any(" x " in name or name == "pair" for name in folded.groups)
    frame = found.to_frame()
    assert len(frame) == len(found.values)
    assert (frame.position <= found.position).all()
    assert not frame.duplicated(["kind", "layer", "head", "position", "i", "j"]).any()


@pytest.mark.parametrize("kind", MODEL_KINDS, ids=str)
def test_actual_is_the_models(frozen_kinds, kind):
    frozen, model = frozen_kinds[kind], model_of(*kind)
    logits, cache = model.run_with_cache(TOKENS[None])
    assert split(frozen, Target.logit(7, 2)).actual == pytest.approx(logits[0, 2, 7].item(), abs=1e-5)
    difference = (logits[0, 2, 7] - logits[0, 2, 9]).item()
    assert split(frozen, Target.logit(7, 2, minus=9)).actual == pytest.approx(difference, abs=1e-5)
    for sae in frozen.saes.values():
        expected = sae.view.pre_activations(cache[sae.hook][0])[4, 11].item()
        assert split(frozen, Target.feature(sae.label, 11, 4)).actual == pytest.approx(expected, abs=1e-5)


# --- parts are what removing them takes away --------------------------------------------------------------------------


@pytest.fixture(scope="module", params=MODEL_KINDS, ids=str)
def frozen(request, frozen_kinds):
    return frozen_kinds[request.param]


def change(frozen, target, hooks):
    """By how much hooks change a target, as the model computes it (the first row is left as it was)."""
    reads = read_targets(frozen, target)
    values = read_values(reads, rerun(frozen, 2, hooks, reads.hooks))[:, 0]
    return (values[1] - values[0]).item()


def removing(name, *index):
    def remove(value, hook):
        value = value.clone()
        value[(1, *index)] = 0.0
        return value

    return name, remove


TARGETS = [Target.logit(7, 4, minus=9), Target.feature("2-mlp-in", 5, 4), Target.feature("1-resid-post", 3, 3)]


@pytest.mark.parametrize("target", TARGETS, ids=lambda t: t.hook)
def test_embeddings_and_mlps_by_removal(frozen, target):
    found = split(frozen, target, attention="paths", mlps="whole")
    tolerance = COMPLETE * found.absolute_sum
    outs = [f"blocks.{layer}.hook_mlp_out" for layer in range(N_LAYERS)]
    for row, value in zip(found.index.tolist(), found.values.tolist(), strict=True):
        kind, layer, position = KINDS[row[0]], row[1], row[3]
        if kind == "constant":
            continue
        name = "hook_embed" if kind == "embedding" else outs[layer]
        hooks = [*holding_hooks(frozen, outs), removing(name, position), *frozen_hooks(frozen)]
        assert -change(frozen, target, hooks) == pytest.approx(value, abs=tolerance)


@pytest.mark.parametrize("target", TARGETS, ids=lambda t: t.hook)
def test_heads_by_removal(frozen, target):
    found = split(frozen, target, mlps="whole")
    heads, tolerance = found.heads(), COMPLETE * found.absolute_sum
    outs = [f"blocks.{layer}.hook_mlp_out" for layer in range(N_LAYERS)]
    for layer, head, source in itertools.product(*map(range, heads.shape)):
        above = [f"blocks.{later}.hook_attn_out" for later in range(layer + 1, N_LAYERS)]
        hooks = [*holding_hooks(frozen, [*outs, *above]), removing(f"blocks.{layer}.attn.hook_v", source, head)]
        assert -change(frozen, target, [*frozen_hooks(frozen), *hooks]) == pytest.approx(
            heads[layer, head, source].item(), abs=tolerance
        )


def test_folded_pairs_are_shapley_values_by_brute_force():
    """Over all 2^n coalitions of a layer's input sources, from the layer's formula alone."""
    model = model_of(True, True)
    saes = saes_of(points=("mlp-in",), kind="scope", k=3)
    frozen = freeze(model, TOKENS, saes)
    target = Target.direction(torch.randn(16, generator=torch.Generator().manual_seed(0)), "blocks.1.hook_mlp_out", 3)
    found = split(frozen, target, mlps="pairs").folded()
    sources, ones = frozen.input_sources(1, 3)
    n = len(sources)
    layer = BilinearLayer.of(model, 1).to(torch.float64)

    def worth(coalition):
        chosen = list(coalition)
        x, one = sources[chosen].sum(0), ones[chosen].sum()
        left, right = x @ layer.W_gate + one * layer.b_gate, x @ layer.W_in + one * layer.b_in
        return ((left * right) @ layer.W_out + one * layer.b_out) @ target.of.double()

    shapley = torch.zeros(n, dtype=torch.float64)
    for player in range(n):
        others = [other for other in range(n) if other != player]
        for size in range(n):
            weight = math.factorial(size) * math.factorial(n - size - 1) / math.factorial(n)
            for coalition in itertools.combinations(others, size):
                shapley[player] += weight * (worth((*coalition, player)) - worth(coalition))
    ordered = {KINDS[row[0]]: value for row, value in zip(found.index.tolist(), found.values, strict=True)}
    features = found.values[found.index[:, 0] == KINDS.index("input feature")]
    names = ("input b_dec", "input error", "input mlp bias")
    torch.testing.assert_close(torch.cat([features, torch.stack([ordered[name] for name in names])]), shapley)


def test_pairs_are_those_of_the_decomposer(frozen):
    """`Decomposer.attribute` of the same feature, pair by pair."""
    sae_in, sae_out = (frozen.sae(name).view.sae for name in ("1-mlp-in", "1-mlp-out"))
    expected = Decomposer(frozen.model, 1, sae_in, sae_out).attribute(TOKENS, 6, 4)
    found = split(frozen, Target.feature("1-mlp-out", 6, 4), mlps="pairs")
    frame = found.to_frame()
    pairs = frame[frame.kind == "pair"].set_index(["i", "j"]).value
    for row in expected.pair_frame().itertuples():
        assert pairs[row.i, row.j] == pytest.approx(row.contribution, abs=1e-6 * expected.absolute_sum)
    assert len(pairs) == len(expected.pair_frame())
    assert found.groups["error x error"] == pytest.approx(
        expected.groups["error x error"], abs=1e-6 * expected.absolute_sum
    )


# --- SAEs of every kind, gated models, precision ----------------------------------------------------------------------


def test_features_without_reads_are_written_all_the_same():
    saes = saes_of(kind="scope-bilinear")
    frozen = freeze(model_of(True, True), TOKENS, saes)
    for attention, mlps in MODES:
        assert split(frozen, Target.logit(3), attention=attention, mlps=mlps).relative_error <= COMPLETE
    with pytest.raises(SAEMismatchError, match=r"Target\.direction"):
        split(frozen, Target.feature("0-mlp-in", 3))


def test_gated_models_are_split_around_their_mlps():
    model = model_of(True, True, gate="relu")
    frozen = freeze(model, TOKENS, saes_of())
    for attention in ("heads", "paths"):
        for mlps in ("whole", "features"):
            assert split(frozen, Target.logit(3), attention=attention, mlps=mlps).relative_error <= COMPLETE
    with pytest.raises(NotBilinearError, match="gated by 'relu'"):
        split(frozen, Target.logit(3), mlps="pairs")


def test_float32_algebra_is_close(frozen_kinds):
    kind = (True, True)
    exact = split(frozen_kinds[kind], TARGETS[0], attention="paths", mlps="pairs")
    frozen = freeze(model_of(*kind), TOKENS, saes_of(points=tuple(POINTS)), dtype=torch.float32)
    found = split(frozen, TARGETS[0], attention="paths", mlps="pairs")
    assert found.values.dtype == torch.float32
    assert found.relative_error <= COMPLETE
    torch.testing.assert_close(found.values.double(), exact.values, atol=1e-6 * exact.absolute_sum, rtol=1e-3)


def test_reference_and_bundled(ts_micro, shared):
    import bilens

    folder = shared / "reference" / "ts-micro-scope"
    saes = [
        load_sae(folder, e.point, e.layer, k=e.k, expansion=e.expansion, device="cpu", dtype=torch.float32)
        for e in list_saes(folder)
        if e.point.startswith("mlp") and e.k == 8
    ]
    bundled = bilens.load_model("ts-tiny", device="cpu")
    own = [bilens.load_sae("ts-tiny", point, layer) for layer in range(4) for point in ("mlp-in", "mlp-out")]
    for model, given_saes, text in ((ts_micro.model, saes, ts_micro.prompts[0]), (bundled, own, "Tom was not happy.")):
        frozen = freeze(model, text, given_saes)
        features = [Target.feature(sae.label, 5, position) for sae in frozen.saes.values() for position in (1, -1)]
        for target in [Target.logit(9, -1), Target.logit(9, 2, minus=11), *features]:
            for attention, mlps in MODES:
                found = split(frozen, target, attention=attention, mlps=mlps)
                assert found.relative_error <= COMPLETE


# --- showing itself, bad input ----------------------------------------------------------------------------------------


def test_shows_itself(frozen_kinds):
    frozen = frozen_kinds[True, True]
    names = {"1-mlp-out-x2-k7": [f"label {i}" for i in range(40)]}
    found = split(frozen, Target.feature("2-mlp-in", 5, 4, name="mine"), attention="paths", names=names)
    assert "mine at position 4 ('42')" in str(found)
    labels = found.to_frame().label
    assert labels[found.to_frame().kind == "feature"].str.contains("1-mlp-out/label").any()
    assert len(found.plot(top=5).data[0].y) == 6
    assert "<table" in found._repr_html_()
    whole = found.by_position().sum() + found.groups["constant"]
    assert whole.item() == pytest.approx(found.values.sum().item())
    with pytest.raises(ArgumentError, match='attention="heads"'):
        found.heads()
    with pytest.raises(ArgumentError, match="what an MLP or the embedding adds alone"):
        split(frozen, Target.feature("1-mlp-out", 5, 4)).heads()


@pytest.mark.parametrize(
    ("target", "error", "match"),
    [
        (Target.logit(50), OutOfRangeError, "token 50 is outside the vocabulary of 50, 0 to 49"),
        (Target.logit(3, 6), OutOfRangeError, "position 6 is outside the text's 6 tokens"),
        (Target.feature("2-mlp-in", 40), OutOfRangeError, "feature 40 is outside the SAE's 40, 0 to 39"),
        (Target.feature("3-mlp-in", 4), MissingSAEError, "no SAE on '3-mlp-in' was given; there are 0-resid-pre"),
        (Target.direction(torch.ones(15), "hook_embed"), ArgumentError, "shape .15,. .* expected 16 finite floats"),
        (Target.direction(torch.full((16,), torch.nan), "hook_embed"), ArgumentError, "finite"),
        (Target.direction(torch.ones(16), "blocks.0.hook_mlpout"), HookNameError, r"Did you mean 'blocks\.0\.hook_mlp"),
        (Target.direction(torch.ones(16), "blocks.3.hook_mlp_out"), HookNameError, "no target can be at"),
        (Target.direction(torch.ones(16), "blocks.0.attn.hook_q"), HookNameError, "norm scales are frozen"),
        (Target.direction(torch.ones(16), "blocks.0.attn.hook_v"), HookNameError, "W_V.*at ln1.hook_normalized"),
        (Target.direction(torch.ones(16), "blocks.0.attn.hook_z"), HookNameError, "belongs to one head"),
        (Target.direction(torch.ones(16), "blocks.1.ln2.hook_scale"), HookNameError, "frozen"),
        (Target.direction(torch.ones(16), "blocks.1.mlp.hook_pre"), HookNameError, "W_gate"),
    ],
)  # fmt: skip
def test_bad_targets(frozen_kinds, target, error, match):
    with pytest.raises(error, match=match):
        split(frozen_kinds[True, True], target)


def test_a_feature_of_the_sae_itself(frozen_kinds):
    frozen = frozen_kinds[True, True]
    sae = frozen.sae("2-mlp-in").view.sae
    assert Target.feature(sae, 5, 4).hook == sae.cfg.metadata.hook_name
    named, given = (split(frozen, Target.feature(one, 5, 4)) for one in ("2-mlp-in", sae))
    assert torch.equal(named.values, given.values)
    with pytest.raises(ArgumentError, match="does not say which hook it is on"):
        Target.feature(make_sae(hook=None), 5)


def test_bad_passes():
    model = model_of(True, True)
    sae = make_sae(hook="blocks.0.hook_mlp_out")
    with pytest.raises(ArgumentError, match=r"two SAEs are on 'blocks\.0\.hook_mlp_out'"):
        freeze(model, TOKENS, [sae, sae])
    with pytest.raises(SAEMismatchError, match="names no hook"):
        freeze(model, TOKENS, [make_sae()])
    with pytest.raises(SAEMismatchError, match="the model has 3 layers"):
        freeze(model, TOKENS, {"blocks.7.hook_mlp_out": make_sae()})
    with pytest.raises(SAEMismatchError, match="no published point"):
        freeze(model, TOKENS, {"blocks.0.hook_attn": make_sae()})
    with pytest.raises(SAEMismatchError, match="d_in 8"):
        freeze(model, TOKENS, make_sae(hook="blocks.0.hook_mlp_out", d_in=8))
    with model.saes([sae]), pytest.raises(AlteredModelError, match=r"reset_saes"):
        freeze(model, TOKENS)
    with pytest.raises(ArgumentError, match="2 texts"):
        freeze(model, torch.stack([TOKENS, TOKENS]))
    with pytest.raises(ArgumentError, match=r"bfloat16, expected torch\.float32 or"):
        freeze(model, TOKENS, dtype=torch.bfloat16)
    with pytest.raises(EmptyTextError):
        freeze(model, torch.tensor([], dtype=torch.long))
    with pytest.raises(ContextLengthError):
        freeze(model, torch.ones(33, dtype=torch.long))
    with pytest.raises(MissingSAEError, match="none was given"):
        split(freeze(model, TOKENS), Target.logit(3), mlps="pairs")
    with pytest.raises(ArgumentError, match="mlps is 'pair', expected one of"):
        split(freeze(model, TOKENS), Target.logit(3), mlps="pair")
    with pytest.raises(ArgumentError, match="3 names for the 40 features"):
        split(freeze(model, TOKENS, sae), Target.logit(3), names={"0-mlp-out": ["a", "b", "c"]})
    with pytest.raises(ArgumentError, match="names are given for '1-mlp-out', which has no SAE here"):
        split(freeze(model, TOKENS, sae), Target.logit(3), names={"1-mlp-out": ["a"] * 40})
