"""Where features fire: sparse entries against a dense computation, windows, tokens and names."""

import pytest
import torch
from torch.testing import assert_close

from bilens.errors import ArgumentError, EmptyTextError, HookNameError, OutOfRangeError, SAEMismatchError
from bilens.sae.features.examples import FeatureActivations, FeatureSummary, feature_activations
from tests.random_saes import D_SAE, make_sae

MLP_IN, MLP_OUT = "blocks.0.ln2.hook_normalized", "blocks.1.hook_mlp_out"


@pytest.fixture
def sample(texts):
    """Texts of different lengths, so that there is padding, and one cut at the context of 32."""
    return [*texts[::30], "the little fox found a red kite near the river! " * 5]


@pytest.fixture
def found(text_model, sample):
    saes = [make_sae("scope", MLP_IN), make_sae("topk", MLP_OUT, seed=1), make_sae("jumprelu", MLP_OUT, seed=2)]
    return saes, feature_activations(text_model, saes, sample, batch_size=5)


@torch.no_grad()
def dense(model, sae, text):
    """`(pos, d_sae)` of one text by itself, `[BOS]` set to zero."""
    hook = sae.cfg.metadata.hook_name
    _, cache = model.run_with_cache(model.to_tokens(text, truncate=True), names_filter=hook)
    acts = sae.encode(cache[hook])[0]
    acts[0] = 0
    return acts


def by_hand(rows, tokens=None, strings=None):
    """A `FeatureActivations` of one feature from dense rows; a token's id is its position unless given."""
    values = torch.tensor(rows)
    n, length = values.shape
    tokens = torch.arange(length).expand(n, length).clone() if tokens is None else torch.tensor(tokens)
    mask = torch.ones_like(tokens)
    mask[:, 0] = 0
    row, position = values.nonzero(as_tuple=True)
    strings = strings or [f"t{i}" for i in range(max(length, int(tokens.max()) + 1))]
    offsets = torch.tensor([0, len(row)])
    return FeatureActivations(tokens, mask, strings, row, position, values[row, position], offsets)


# --- the entries ------------------------------------------------------------------------------------------------------


def test_entries_are_the_dense_activations(text_model, sample, found):
    """Padding and `[BOS]` hold nothing, and company in a batch changes nothing."""
    for sae, activations in zip(*found, strict=True):
        assert activations.d_sae == D_SAE
        expected = torch.zeros(len(sample), activations.tokens.shape[1], D_SAE)
        for row, text in enumerate(sample):
            acts = dense(text_model, sae, text)
            expected[row, : len(acts)] = acts
        assert len(activations.values) == (expected != 0).sum()
        for feature in range(D_SAE):
            # One text by itself and in a batch: float32 sums in another order.
            torch.testing.assert_close(activations.dense(feature), expected[..., feature], atol=1e-5, rtol=1e-4)


def test_entries_are_sorted_by_feature(found):
    for activations in found[1]:
        assert activations.offsets[0] == 0
        assert activations.offsets[-1] == len(activations.values) == len(activations.rows) == len(activations.positions)
        assert (activations.values != 0).all()
        assert activations.mask[activations.rows, activations.positions].all()
        for feature in (0, 7, D_SAE - 1):
            at = activations.entries(feature)
            keys = list(zip(activations.rows[at].tolist(), activations.positions[at].tolist(), strict=True))
            assert keys == sorted(set(keys))


def test_negative_activations_are_entries(found):
    assert (found[1][0].values < 0).any()


def test_density_is_the_share_of_tokens(text_model, sample, found):
    n_tokens = sum(text_model.to_tokens(text, truncate=True).shape[1] - 1 for text in sample)
    for sae, activations in zip(*found, strict=True):
        assert int(activations.mask.sum()) == n_tokens
        fires = sum((dense(text_model, sae, text) != 0).sum(0) for text in sample)
        torch.testing.assert_close(activations.density(), fires / n_tokens)


def test_a_feature_out_of_range(found):
    for feature in (-1, D_SAE):
        for call in (found[1][0].entries, found[1][0].dense, found[1][0].summary):
            with pytest.raises(
                OutOfRangeError, match=f"feature {feature} is outside the SAE's {D_SAE}, 0 to {D_SAE - 1}"
            ):
                call(feature)


def test_half_precision_saes(text_model, sample):
    sae = make_sae("topk", MLP_IN)
    full = feature_activations(text_model, [sae], sample)[0]
    half = feature_activations(text_model, [sae.to(dtype=torch.float16)], sample)[0]
    assert len(half.values) == pytest.approx(len(full.values), rel=0.02)
    assert half.summary(int(half.offsets.diff().argmax())).examples
    assert len(half.labels()) == D_SAE


def test_an_sae_that_does_not_know_its_hook(text_model, sample):
    with pytest.raises(SAEMismatchError, match=r"SAE 1 has no metadata.hook_name"):
        feature_activations(text_model, [make_sae("topk", MLP_IN), make_sae("topk")], sample)


@pytest.mark.parametrize(
    ("hook", "d_in", "error", "message"),
    [
        (MLP_OUT, 8, SAEMismatchError, "SAE 0 has d_in 8"),
        ("blocks.1.hook_mlp_outt", 16, HookNameError, f"Did you mean '{MLP_OUT}'"),
        ("blocks.9.hook_mlp_out", 16, HookNameError, "no hook 'blocks.9.hook_mlp_out'"),
    ],
)
def test_an_sae_that_does_not_belong(text_model, sample, hook, d_in, error, message):
    with pytest.raises(error, match=message):
        feature_activations(text_model, [make_sae("topk", hook, d_in=d_in)], sample)


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        ([], EmptyTextError, "the list of texts is empty"),
        (["Mira", "  "], EmptyTextError, r"text 1 of 2, '  ', has nothing in it"),
        ("Mira", ArgumentError, "expected a list"),
    ],
)
def test_texts_with_nothing_in_them(text_model, bad, error, message):
    with pytest.raises(error, match=message):
        feature_activations(text_model, [make_sae("topk", MLP_OUT)], bad)


def test_a_text_that_normalises_to_nothing(text_model):
    """A lone accent has no tokens: its row is `[BOS]`, and rows are still numbered as the texts are."""
    sae = make_sae("topk", MLP_OUT)
    found = feature_activations(text_model, [sae], ["Mira", "\u0301", "the little fox"])[0]
    assert found.mask.sum(1).tolist() == [1, 0, 3]
    assert set(found.rows.tolist()) == {0, 2}
    with pytest.raises(EmptyTextError, match="none of the 1 texts has a token in it"):
        feature_activations(text_model, [sae], ["\u0301"])


def test_places_outside_the_blocks_and_with_heads(text_model, sample):
    """The model runs as far as the last of them."""
    hooks = ["hook_embed", "blocks.0.attn.hook_z", "ln_final.hook_normalized"]
    saes = [make_sae("topk", hook) for hook in hooks]
    together = feature_activations(text_model, saes, sample)
    for sae, hook, found in zip(saes, hooks, together, strict=True):
        _, cache = text_model.run_with_cache(text_model.to_tokens(sample[3]), names_filter=hook)
        expected = sae.encode(cache[hook].flatten(2))[0]
        expected[0] = 0
        for feature in range(0, D_SAE, 5):
            torch.testing.assert_close(
                found.dense(feature)[3, : len(expected)], expected[:, feature], atol=1e-5, rtol=1e-4
            )
    assert feature_activations(text_model, [], sample) == []
    alone = feature_activations(text_model, saes[:1], sample)[0]
    torch.testing.assert_close(alone.values, together[0].values)


# --- summaries --------------------------------------------------------------------------------------------------------


def test_examples_are_the_strongest_one_per_text(found):
    for activations in found[1]:
        for feature in (0, 7, 20):
            dense_values = activations.dense(feature)
            summary = activations.summary(feature, n_examples=4)
            best = dense_values.abs().amax(1).sort(descending=True).values
            assert [abs(e.activation) for e in summary.examples] == best[best > 0][:4].tolist()
            assert summary.density == activations.density()[feature].item()


def test_how_many_examples(found):
    activations = found[1][0]
    feature = int(activations.offsets.diff().argmax())
    assert activations.summary(feature, n_examples=0).examples == ()
    assert len(activations.summary(feature, n_examples=1).examples) == 1
    assert activations.summary(feature, n_examples=0).label == activations.summary(feature).label
    for bad in ({"n_examples": -1}, {"before": -1}, {"after": -2}):
        with pytest.raises(ArgumentError, match="must be at least 0"):
            activations.summary(feature, **bad)


def test_the_window_around_an_example(found):
    activations = found[1][0]
    for before, after in [(12, 6), (2, 1), (0, 0)]:
        for feature in (3, 11):
            dense_values = activations.dense(feature)
            for example in activations.summary(feature, before=before, after=after).examples:
                # Texts that start alike share activations, so one value may stand in several places.
                windows = []
                for row, position in (dense_values == example.activation).nonzero().tolist():
                    last = int(activations.mask[row].nonzero().max())
                    low, high = max(1, position - before), min(last, position + after)
                    tokens = [activations.strings[t] for t in activations.tokens[row, low : high + 1]]
                    windows.append((tokens, dense_values[row, low : high + 1].tolist(), position - low))
                assert (example.tokens, example.values, example.focus) in windows
                assert "[BOS]" not in example.tokens


def test_windows_end_at_the_text():
    activations = by_hand([[0.0, 5.0, 0.0, 0.0], [0.0, 0.0, 0.0, 3.0], [0.0, 0.0, -4.0, 1.0]])
    first, second, third = activations.summary(0, before=2, after=2).examples
    assert (first.tokens, first.values, first.focus) == (["t1", "t2", "t3"], [5.0, 0.0, 0.0], 0)
    assert (second.tokens, second.values, second.focus) == (["t1", "t2", "t3"], [0.0, -4.0, 1.0], 1)
    assert (third.tokens, third.values, third.focus) == (["t1", "t2", "t3"], [0.0, 0.0, 3.0], 2)
    assert [one.activation for one in (first, second, third)] == [5.0, -4.0, 3.0]


def test_padding_is_not_shown():
    activations = by_hand([[0.0, 5.0, 0.0, 0.0]])
    activations.mask[0, 3] = 0
    assert activations.summary(0).examples[0].tokens == ["t1", "t2"]


def test_a_silent_feature(found):
    activations = by_hand([[0.0, 0.0, 0.0]])
    assert activations.summary(0) == FeatureSummary(0, 0.0, "0 (silent)", ())
    assert activations.labels() == ["0 (silent)"]


def test_every_label_is_the_summarys(found):
    for activations in found[1]:
        labels = activations.labels()
        assert len(labels) == D_SAE
        for feature in range(0, D_SAE, 7):
            assert labels[feature] == activations.summary(feature).label


def test_the_memory_changes_nothing(text_model, sample, found):
    """Some positions of a batch at a time, one token at a time."""
    saes, expected = found
    cheap = feature_activations(text_model, saes, sample, batch_size=17, memory=600_000)
    for one, other in zip(cheap, expected, strict=True):
        for name in ("rows", "positions", "values", "offsets"):
            assert_close(getattr(one, name), getattr(other, name))
        memory = 4 * D_SAE**2 + 48 * len(other.values) + 8 * D_SAE
        for call in ("cofiring", "cofiring_counts", "token_cosines"):
            # float32 sums of a few hundred terms in another order
            assert_close(getattr(one, call)(memory=memory), getattr(other, call)(), atol=1e-5, rtol=1e-4)
    with pytest.raises(ArgumentError, match=r"cofiring of 40 features needs .* bytes, and memory is 5: allow more"):
        expected[0].cofiring(memory=5)
    with pytest.raises(ArgumentError, match=r"activations needs 9,600 bytes, and memory is 5: take a smaller batch"):
        feature_activations(text_model, saes, sample, batch_size=5, memory=5)
    with pytest.raises(ArgumentError, match=r"activations, about .* of them, needs .* give fewer texts"):
        feature_activations(text_model, saes, sample, batch_size=5, memory=9600)
