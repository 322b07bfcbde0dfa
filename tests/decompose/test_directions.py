"""Directions through the model, against the model's own forward pass, and the largest interactions between them.

The models run in float64, where what is stated as equal is equal to 1e-9.
"""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from bilens.decompose import Decomposer
from bilens.decompose.directions import head_basis, through_ov, token_basis
from bilens.errors import ArgumentError, OutOfRangeError, SAEMismatchError
from bilens.layer import pairs
from bilens.layer.bilinear import BilinearLayer, interaction_matrix
from bilens.layer.pairs import top_pairs
from tests.conftest import make_model
from tests.layer.test_inner import make_layer, random
from tests.random_saes import D_SAE, make_sae

D = 16
EXACT = {"atol": 1e-9, "rtol": 1e-9}
TEXT = "the little fox found a red kite."


@pytest.fixture(scope="module")
def model(tokenizer):
    return make_model(tokenizer=tokenizer, seed=3).double()


@pytest.fixture(scope="module")
def plain(tokenizer):
    """One layer, no normalisation: with its patterns frozen, the MLP's input is linear in the embeddings."""
    return make_model(tokenizer=tokenizer, seed=4, n_layer=1, normalization=False).double()


@pytest.fixture(scope="module")
def cache(model):
    return model.run_with_cache(TEXT)[1]


# --- output directions ------------------------------------------------------------------------------------------------


def test_unembedding_with_the_norms_scale_gives_logits(model, cache):
    ids = [model.to_single_token(token) for token in ("fox", "kite", "red")]
    logits = model(TEXT)[0, -1]
    resid, scale = cache["resid_post", 1][0, -1], cache["ln_final.hook_scale"][0, -1]
    assert_close(model.tokens_to_residual_directions(["fox", "kite", "red"]) @ resid / scale, logits[ids], **EXACT)
    assert_close(model.tokens_to_residual_directions(torch.tensor(ids)) @ resid / scale, logits[ids], **EXACT)
    for one in ("fox", ids[0], np.int64(ids[0]), torch.tensor(ids[0])):
        assert torch.equal(model.tokens_to_residual_directions(one), model.W_U[:, ids[0]])


def test_what_a_head_reads_is_what_it_writes(model, cache):
    """All heads and source positions, with pattern and scale of the run, add up to what attention writes along `u`."""
    u = random(0, 3, D)
    scales, patterns, resid = (
        cache[f"blocks.1.{at}"] for at in ("ln1.hook_scale", "attn.hook_pattern", "hook_resid_pre")
    )
    query = resid.shape[1] - 1
    total = torch.zeros(3, dtype=torch.float64)
    for source in range(resid.shape[1]):
        reads = through_ov(model, 1, None, u, scale=scales[0, source])
        assert reads.shape == (2, 3, D)
        total += torch.einsum("h,hnd,d->n", patterns[0, :, query, source], reads, resid[0, source])
    assert_close(total, u @ cache["attn_out", 1][0, query], **EXACT)
    for head in (0, 1):
        one = through_ov(model, -1, head, u)
        assert_close(one, through_ov(model, 1, None, u)[head])
        assert_close(through_ov(model, 1, head, u[0]), one[0])
        # Reading before the head is writing behind it: the two directions of one map.
        assert_close(head_basis(model, 1, head, resid[0]) @ u.T, resid[0] @ one.T, **EXACT)


def test_what_an_mlp_reads_of_the_stream(model, cache):
    """An eigenvector of a later layer is an output direction of an earlier one as it is, over the norm's divisor."""
    v, scale = random(0, 4, D), cache["blocks.1.ln2.hook_scale"][0, 3]
    resid, normalized = cache["resid_mid", 1][0, 3], cache["blocks.1.ln2.hook_normalized"][0, 3]
    assert_close(v @ resid / scale, v @ normalized, **EXACT)


def test_token_directions_are_what_the_norm_makes_of_embeddings(model, plain):
    assert_close(token_basis(model), model.blocks[0].ln2(model.W_E[None])[0], **EXACT)
    # But for the norm's epsilon, 1e-8 of a mean square near one, every embedding has mean square one.
    squares = token_basis(model).pow(2).mean(-1)
    assert_close(squares, torch.ones_like(squares), atol=1e-6, rtol=0)
    assert torch.equal(token_basis(model, normalised=False), model.W_E)
    assert torch.equal(token_basis(plain), plain.W_E)


# --- between input directions -----------------------------------------------------------------------------------------


@given(st.integers(0, 2**31), st.integers(1, 12), st.integers(1, 12), st.booleans(), st.booleans(), st.data())
def test_the_largest_pairs_are_found_block_by_block(seed, n, m, within, skewed, data):
    """Against every pair, in blocks of three by three; lengths alike, or falling fast."""
    layer, u, left, right = make_layer(seed, 5, 7), random(seed + 1, 5), random(seed + 2, n, 5), random(seed + 3, m, 5)
    if skewed:
        left, right = left * random(seed + 4, n, 1).exp() ** 3, right * random(seed + 5, m, 1).exp() ** 3
    Q = interaction_matrix(layer, u)
    every = 2 * left @ Q @ (left if within else right).T
    if within:
        every = every.triu(1) + 0.5 * every.diag().diag()
        places = torch.ones_like(every).triu().flatten().nonzero()[:, 0]
    else:
        places = torch.arange(every.numel())
    k = data.draw(st.integers(1, len(places)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pairs, "SIDE", 3)
        i, j, coefficients = top_pairs(layer, u, left, None if within else right, k)
    expected = every.flatten()[places].abs().sort(descending=True).values[:k]
    assert_close(coefficients.abs(), expected, atol=1e-9 * (1 + expected[0].item()), rtol=1e-9)
    assert_close(every[i, j], coefficients, atol=1e-9 * (1 + expected[0].item()), rtol=1e-9)
    assert len({*zip(i.tolist(), j.tolist(), strict=True)}) == k


@pytest.mark.parametrize("within", [True, False])
def test_a_search_in_bfloat16_finds_the_same_pairs(within, monkeypatch):
    """Its products are wrong in the third digit, where the hundred largest of 3,000 stand close together."""
    layer, u, left, right = make_layer(7, 16, 24), random(8, 16), random(9, 60, 16), random(10, 50, 16)
    layer, u, left, right = layer.to(torch.float32), u.float(), left.float(), None if within else right.float()
    monkeypatch.setattr(pairs, "SIDE", 7)
    expected = top_pairs(layer, u, left, right, 100)
    monkeypatch.setattr(pairs, "search_dtype", lambda *_: torch.bfloat16)
    found = top_pairs(layer, u, left, right, 100)
    assert {*zip(*(part.tolist() for part in found[:2]), strict=True)} == {
        *zip(*(part.tolist() for part in expected[:2]), strict=True)
    }
    assert_close(found[2], expected[2])


@given(st.integers(0, 2**31), st.integers(14, 22), st.booleans())
def test_the_memory_does_not_matter_to_the_largest_pairs(seed, log_memory, within):
    layer, u, left, right = (
        make_layer(seed, 5, 7),
        random(seed + 1, 5),
        random(seed + 2, 90, 5),
        random(seed + 3, 80, 5),
    )
    right = None if within else right
    expected, found = (top_pairs(layer, u, left, right, 20, memory=memory) for memory in (2**30, 2**log_memory))
    for part, other in zip(found, expected, strict=True):
        assert_close(part, other)


def test_between_the_features_it_is_top_interactions(models):
    """With the input SAE's decoder on both sides."""
    hooks = "blocks.1.ln2.hook_normalized", "blocks.1.hook_mlp_out"
    decomposer = Decomposer(models(True, True), 1, *(make_sae(hook=hook, seed=seed) for seed, hook in enumerate(hooks)))
    expected = decomposer.top_interactions([3, 5], n=30)
    found = decomposer.between([3, 5], decomposer.input_view.decoder, n=30)
    # In float32, where equally large ones may change places.
    assert_close(found.coefficient, expected.coefficient, atol=1e-4, rtol=1e-4)
    for output in (3, 5):
        best = [of[of.output == output][:25] for of in (found, expected)]
        both = [set(zip(of.i.tolist(), of.j.tolist(), strict=True)) for of in best]
        assert len(both[0] & both[1]) >= 24
    assert found.output.tolist() == [3] * 30 + [5] * 30
    assert (found.i <= found.j).all()
    assert found.j.max() < D_SAE


def test_trigrams_are_what_tokens_add_on_a_text(plain):
    """One layer, no norms, patterns frozen: the MLP's input is the token's embedding and every earlier token's, moved
    by every head; the interactions between them, times the patterns, are `u . mlp(x)` to the last part."""
    _, cache = plain.run_with_cache(TEXT)
    tokens, pattern = plain.to_tokens(TEXT)[0], cache["blocks.0.attn.hook_pattern"][0]
    query, u = len(tokens) - 1, random(0, D)
    embeddings, decomposer = token_basis(plain), Decomposer(plain, 0)
    moved = [head_basis(plain, 0, head, embeddings) for head in range(2)]
    n = plain.cfg.d_vocab

    def coefficients(left, right=None):
        """Every pair, as a matrix: the frozen result with every pair asked for."""
        found = decomposer.between(u, left, right, n=n * (n + 1) // 2 if right is None else n * n)
        return torch.zeros(n, n, dtype=torch.float64).index_put((found.i, found.j), found.coefficient)

    def within(left, weights_i, weights_j):
        """A pair within one set stands once, at `i <= j`; two different weights see the symmetric form."""
        upper = coefficients(left)
        return weights_i @ (0.5 * (upper + upper.T)) @ weights_j

    present = torch.zeros(n, dtype=torch.float64)
    present[tokens[query]] = 1.0
    attended = [torch.zeros(n, dtype=torch.float64).index_add(0, tokens, pattern[head, query]) for head in range(2)]
    bigram = within(embeddings, present, present)
    trigrams = sum(present @ coefficients(embeddings, moved[head]) @ attended[head] for head in range(2))
    heads = sum(within(moved[head], attended[head], attended[head]) for head in range(2))
    across = attended[0] @ coefficients(moved[0], moved[1]) @ attended[1]
    assert_close(bigram + trigrams + heads + across, u @ cache["mlp_out", 0][0, query], **EXACT)
    assert abs(trigrams) > 0.01


def test_the_table_names_both_sides(plain):
    names = plain.to_str_tokens(torch.arange(plain.cfg.d_vocab))
    basis = token_basis(plain)
    found = Decomposer(plain, 0).between(
        plain.tokens_to_residual_directions(["fox", "owl"]),
        basis,
        head_basis(plain, 0, 1, basis),
        n=7,
        left_names=names,
        right_names=names,
    )
    frame = found.to_frame()
    assert list(frame) == ["layer", "output", "i", "j", "kind", "coefficient", "output_name", "i_name", "j_name"]
    assert set(frame.kind) == {"cross"}  # of two sets, wherever the numbers agree
    assert frame.output.tolist() == [0] * 7 + [1] * 7
    assert frame.i_name[3] == names[frame.i[3]]
    assert frame.j_name[3] == names[frame.j[3]]
    assert (frame.coefficient[:7].abs().diff().dropna() <= 0).all()
    assert len(found.plot(top=5).data[0].x) == 5
    within = (
        Decomposer(plain, 0)
        .between(plain.tokens_to_residual_directions("fox"), basis, n=3, left_names=names)
        .to_frame()
    )
    assert within.j_name[0] == names[within.j[0]]


# --- bad input --------------------------------------------------------------------------------------------------------


def test_what_is_refused(model):
    u = random(0, 2, D)
    with pytest.raises(ArgumentError, match="scale is 0, expected a norm's divisor, above zero"):
        through_ov(model, 0, 0, u, scale=0)
    with pytest.raises(OutOfRangeError, match="head 2 is outside layer 1's 2 heads, 0 to 1"):
        through_ov(model, -1, 2, u)
    with pytest.raises(OutOfRangeError, match="layer 5 is outside the model's 2 layers"):
        head_basis(model, 5, 0, u)
    for of in (through_ov, head_basis):
        with pytest.raises(SAEMismatchError, match=r"shape \(2, 5\): the residual stream has 16 dimensions"):
            of(model, 0, 0, random(0, 2, 5))

    decomposer = Decomposer(model, 0)
    with pytest.raises(SAEMismatchError, match=r"right directions of shape \(3, 5\): the layer reads 16 dimensions"):
        decomposer.between(u, u, random(0, 3, 5))
    with pytest.raises(OutOfRangeError, match="n is 50, expected 1 to 3, the number of pairs"):
        decomposer.between(u, u)
    with pytest.raises(ArgumentError, match="1 left_names for 2 left directions"):
        decomposer.between(u, u, n=1, left_names=["one"])
    with pytest.raises(ArgumentError, match="1 right_names for 0 right directions"):
        decomposer.between(u, u, n=1, right_names=["one"])


def test_a_row_whose_bound_is_just_above_the_threshold_is_looked_at(monkeypatch):
    """The longest row is off the direction by more than the next one, which lies along it, is shorter."""
    monkeypatch.setattr(pairs, "SIDE", 1)
    eye, zero = torch.eye(2), torch.zeros(2)
    right = torch.tensor([[0.8, 0.6]])
    left = torch.stack([torch.tensor([1.0, 0.0]), 0.9 * right[0]])
    found = top_pairs(BilinearLayer(eye, eye, eye, zero, zero, zero), torch.ones(2), left, right, 1)
    assert [part.tolist() for part in found[:2]] == [[1], [0]]
    assert found[2].item() == pytest.approx(1.8)
