"""Exact expansions: all parts add up to the output, absent tokens are zero rows, and the given rules come out.

Tables are in float64, so sums are compared to 1e-9 of the largest value; positions are counted from elsewhere in a text
than in a table, and the angles of rotary positions are float32 in any model, so those are compared to 1e-5.
"""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from bilens.errors import (
    AlteredModelError,
    ArgumentError,
    ContextLengthError,
    HookNameError,
    NotPolynomialError,
    OutOfRangeError,
)
from bilens.expand import interaction, order_weights, parts_of
from bilens.model.loading import load_model
from tests.conftest import make_model

POLYNOMIAL: dict[str, Any] = {"attention": "bilinear", "normalization": False, "d_vocab": 7, "scale_attn": False}


@pytest.fixture(scope="module")
def model() -> Any:
    return make_model(**POLYNOMIAL, residual_scale=0.3).double()


# --- the algebra ------------------------------------------------------------------------------------------------------


def test_interactions_add_up() -> None:
    """Whatever `f` is, the interactions of all parts of a set add up to `f` of it."""
    torch.manual_seed(0)
    sizes = {0: 2, 1: 3, 4: 2, 5: 4}
    whole = tuple(sizes)
    values = {p: torch.randn(*(sizes[o] for o in p), 3, dtype=torch.float64) for p in parts_of(whole, 4)}
    total = sum(interaction(values, part)[tuple(slice(None) if o in part else None for o in whole)] for part in values)
    torch.testing.assert_close(total.expand_as(values[whole]), values[whole], atol=1e-12, rtol=0)


@pytest.mark.parametrize("n", [0, 1, 4, 6])
def test_order_weights(n: int) -> None:
    """The sum of all interactions of up to k tokens, by its weights and by its definition, for any `f`."""
    torch.manual_seed(n)
    whole = tuple(range(n + 1))
    values = {part: torch.randn(1, dtype=torch.float64).view(*[1] * len(part), 1) for part in parts_of(whole, n + 1)}
    sums = [sum(v.sum() for p, v in values.items() if len(p) == size) for size in range(1, n + 2)]
    for order in range(1, n + 2):
        expected = sum(interaction(values, part).sum() for part in values if len(part) <= order)
        found = sum(w * s for w, s in zip(order_weights(n, order), sums, strict=False))
        assert abs(float(found - expected)) < 1e-9


# --- on a model -------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize(
    "variant", [{}, {"attention": "quadratic", "rotary": False, "n_head": 1, "d_head": 6}], ids=str
)
def test_f_is_the_model_with_zero_rows(variant: dict[str, Any]) -> None:
    """A part's value is what the model gives where the embeddings of all other positions are zero."""
    model = make_model(**POLYNOMIAL | variant).double()
    expansion = model.expand(3, (0, 2, 5))
    for part, chosen in {(0,): (3,), (0, 2): (1, 6), (0, 5): (2, 2), (0, 2, 5): (4, 0, 1)}.items():
        rows = torch.zeros(1, 9, 16, dtype=torch.float64)
        for offset, token in zip(part, chosen, strict=True):
            rows[0, 8 - offset] = model.W_E[token]
        logits = model(rows, start_at_layer=0)[0, -1]
        torch.testing.assert_close(
            expansion.values[part][chosen], logits, atol=1e-5 * float(logits.abs().max()), rtol=0
        )


@torch.no_grad()
def test_all_parts_are_the_output(model: Any) -> None:
    """Tokens 3, 5, 1, 2: the interactions of every subset that holds the last add up to the model's own logits."""
    text = torch.tensor([[3, 5, 1, 2]])
    expansion = model.expand(4, range(4))
    total = 0
    for part in expansion.values:
        total = total + expansion.interaction(part)[tuple(int(text[0, 3 - offset]) for offset in part)]
    logits = model(text)[0, -1]
    torch.testing.assert_close(total, logits, atol=1e-9 * float(logits.abs().max()), rtol=0)
    left = expansion.fidelity(text)
    assert left.left[0, -1].abs() < 1e-9
    assert left.left.shape == (1, 4)
    assert (left.left > -1e-9).all()


@torch.no_grad()
def test_targets_and_candidates(model: Any) -> None:
    """The logit of a token, its direction at the last hook, and the column of all logits are one; candidates are rows
    of the whole table; any other hook gives its own activation's directions."""
    everything = model.expand(2, (0, 3))
    some = model.expand(2, (0, 3), target=[4], tokens={0: [5, 1], 3: torch.tensor([2])})
    torch.testing.assert_close(some.values[0, 3][..., 0], everything.values[0, 3][[5, 1]][:, [2], 4])
    assert "all but 2 of 7 tokens at offset 0; all but 1 of 7 tokens at offset 3" in str(some)
    by_direction = model.expand(2, (0, 3), target=model.W_U[:, 4])
    torch.testing.assert_close(by_direction.values[0, 3][..., 0], everything.values[0, 3][..., 4])
    read = model.expand(1, target=torch.eye(16), hook="blocks.0.hook_mlp_out")
    cache = model.run_with_cache(torch.tensor([[6]]))[1]
    torch.testing.assert_close(read.values[0,][6], cache["blocks.0.hook_mlp_out"][0, 0], atol=1e-9, rtol=1e-9)


@torch.no_grad()
def test_what_is_cut_is_zero(model: Any) -> None:
    """Without both heads of both layers there are no interactions; without everything, the unembedded embedding."""
    heads = model.all_head_labels()
    alone = model.expand(2, (0, 1), cut=heads)
    assert alone.interaction((0, 1)).abs().max() < 1e-12 * alone.values[0,].abs().max()
    nothing = model.expand(1, cut=[*heads, "mlp 0", "mlp 1"])
    torch.testing.assert_close(nothing.values[0,], model.W_E @ model.W_U)
    one = model.expand(2, (0, 1), cut="L1H0").interaction((0, 1))
    assert not torch.allclose(one, model.expand(2, (0, 1)).interaction((0, 1)))


def test_tables(model: Any) -> None:
    """Every rule's gain is over any fewer tokens; the largest interactions come first; tables have a row per part."""
    expansion = model.expand(2, (0, 1, 4))
    assert list(expansion.values) == [(0,), (0, 1), (0, 4)]
    assert len(expansion.to_frame()) == 3
    assert "parts of more than 2 tokens" in expansion.left_out
    rules = expansion.rules(0.2, (0, 4))
    alone, both = (expansion.probabilities(part) for part in ((0,), (0, 4)))
    for row in rules.to_dict("records"):
        a, b, c = row["id -4"], row["id -0"], row["target_id"]
        assert row["probability"] == pytest.approx(both[b, a, c].item())
        assert row["gain"] == pytest.approx(both[b, a, c].item() - max(alone[b, c].item(), 1 / 7))
    assert rules.gain.is_monotonic_decreasing
    top = expansion.top(5, (0, 4))
    assert top.interaction.abs().is_monotonic_decreasing
    assert len(top) == 5
    expansion.plot()
    expansion.fidelity(torch.tensor([[1, 2, 3]])).plot()
    assert "Expansion of all 7 logits over up to 2 tokens" in str(expansion)


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"order": 3, "offsets": (0, 2)}, ArgumentError, r"order is 3, and there are 2 offsets, \[0, 2\]"),
    ({"order": 0}, ArgumentError, "order"),
    ({"order": 1, "offsets": (0, 0)}, ArgumentError, "different distances"),
    ({"order": 2, "offsets": (0, -1)}, ArgumentError, "none below 0"),
    ({"order": 2, "offsets": 3}, ArgumentError, "offsets is 3, expected distances"),
    ({"order": 2, "offsets": (0, 99)}, ContextLengthError, "offset 99 is outside the model's context of 32"),
    ({"order": 1, "tokens": [99]}, OutOfRangeError, "not all in the vocabulary, 0 to 6"),
    ({"order": 1, "tokens": "fox"}, ArgumentError, "expected token ids"),
    ({"order": 1, "target": 99}, OutOfRangeError, "not all in the vocabulary"),
    ({"order": 1, "target": torch.randn(5)}, ArgumentError, "expected directions of 16"),
    ({"order": 1, "hook": "blocks.0.hook_mlp_ot"}, HookNameError, "Did you mean 'blocks.0.hook_mlp_out'"),
    ({"order": 1, "hook": "blocks.0.hook_mlp_out"}, ArgumentError, "directions are read"),
    ({"order": 1, "cut": ["L2H0"]}, OutOfRangeError, "expected heads and MLPs, L0H0 to mlp 1.*mean 'L1H0'"),
    ({"order": 9, "offsets": range(20), "tokens": None}, ArgumentError, "GB of memory.*Give candidates, tokens="),
]


@pytest.mark.parametrize(("arguments", "error", "message"), BAD, ids=[str(n) for n in range(len(BAD))])
def test_bad_arguments_are_named(model: Any, arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        model.expand(**arguments)


def test_what_is_no_polynomial_is_refused(model: Any) -> None:
    """A softmax, norms, biases and a gate are named; so are hooks that someone left; a part that there is not."""
    kinds = {
        "its attention is a softmax": {"attention": "softmax"},
        "it has norms": {"normalization": True},
        "it has biases": {"bias": True},
        r"a gate \(silu\)": {"gate": "silu"},
    }
    for message, kind in kinds.items():
        with pytest.raises(NotPolynomialError, match=message):
            make_model(**POLYNOMIAL | kind).expand(1)
    expansion = model.expand(2, (0, 1), target=3)
    with pytest.raises(OutOfRangeError, match=r"no part of the offsets \[2\]"):
        expansion.interaction([2])
    with pytest.raises(ArgumentError, match="expand with target=None"):
        expansion.rules()
    hooked = make_model(**POLYNOMIAL)
    hooked.add_hook("hook_embed", lambda x, hook: x)
    with pytest.raises(AlteredModelError):
        hooked.expand(1)


# --- pairs of tokens at a head ----------------------------------------------------------------------------------------


@torch.no_grad()
def test_token_pairs_are_what_a_head_adds(model: Any) -> None:
    """In the first layer, for two tokens alone: the pattern between them times what the value moves to each logit; and
    a head whose scores and values both change sign gives the same products."""
    found = model.token_pairs(0, 1, 3)
    text = torch.zeros(1, 4, 16, dtype=torch.float64)
    text[0, 0], text[0, 3] = model.W_E[2], model.W_E[5]
    _, cache = model.run_with_cache(text, start_at_layer=0)
    moved = cache["blocks.0.attn.hook_v"][0, 0, 1] @ model.W_O[0, 1] @ model.W_U
    expected = cache["blocks.0.attn.hook_pattern"][0, 1, 3, 0] * moved
    torch.testing.assert_close(found.product(5)[2], expected)
    top = found.top(4)
    assert top.value.abs().is_monotonic_decreasing
    row = top.iloc[0]
    assert found.product()[row.reading_id, row.earlier_id, row.target_id].item() == pytest.approx(row.value)
    assert found.product().abs().max().item() == pytest.approx(abs(row.value))
    other = make_model(**POLYNOMIAL, residual_scale=0.3).double()
    other.blocks[0].attn.W_Q1[1] *= -1
    other.blocks[0].attn.W_V[1] *= -1
    torch.testing.assert_close(other.token_pairs(0, 1, 3).product(), found.product())
    with pytest.raises(OutOfRangeError):
        model.token_pairs(0, 2, 1)


# --- the given program ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def truth(shared: Path) -> Any:
    if not (shared / "truth").exists():
        pytest.skip(f"the known program is not here: no folder {shared / 'truth'}")
    return load_model(shared / "truth", device="cpu"), json.loads((shared / "truth" / "rules.json").read_text())


def test_the_rules_of_the_given_program(truth: Any) -> None:
    """Bigrams: 24 of 24 and none besides. Skip-trigrams: 24 of 24 among 63^3 triples and none besides, as far as the
    window of 12 reaches, and none beyond. From the weights alone."""
    model, rules = truth
    bigrams = {(rule["subject"], int(verb)) for rule in rules["bigram"] for verb in rule["verbs"]}
    skips = {(rule["loc"], rule["adj"], rule["conn"]) for rule in rules["skip"]["rules"]}
    found = model.expand(2, (0, 1, 5, 12, 13))
    assert {tuple(row) for row in found.rules(0.05, (0,))[["id -0", "target_id"]].to_numpy().tolist()} == bigrams
    for offset in (1, 5, 12):
        frame = found.rules(0.5, (0, offset))
        assert {tuple(row) for row in frame[[f"id -{offset}", "id -0", "target_id"]].to_numpy().tolist()} == skips
    assert found.rules(0.5, (0, 13)).empty


def test_a_later_place_wins(truth: Any) -> None:
    """Where two places have a rule with one adjective, the later decides: 52 of 52."""
    model, rules = truth
    next_of = {(rule["loc"], rule["adj"]): rule["conn"] for rule in rules["skip"]["rules"]}
    places, adjectives = range(23, 31), range(31, 39)
    found = model.expand(3, (0, 3, 7), tokens={0: adjectives, 3: places, 7: places}).values[0, 3, 7].argmax(-1)
    cases = [
        (int(found[adj - 31, late - 23, early - 23]), next_of[late, adj])
        for adj, late, early in itertools.product(adjectives, places, places)
        if (late, adj) in next_of and next_of.get((early, adj), next_of[late, adj]) != next_of[late, adj]
    ]
    assert len(cases) == 52
    assert all(one == other for one, other in cases)


def test_orders_leave_less_and_less(truth: Any, shared: Path) -> None:
    """On the given texts parts of up to three tokens hold what parts of up to two do not; the second order alone may
    leave more than the first."""
    model, _ = truth
    texts = load_file(shared / "truth" / "expected.safetensors")["input_ids"][:, :15]
    nats = model.expand(1).fidelity(texts, order=3).to_frame().nats
    assert nats[0] > 0.4
    assert nats[2] < 0.001
