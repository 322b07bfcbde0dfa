"""Fidelity of truncated interaction matrices: running sums against numpy on the whole data, and what must be exact."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from bilens.decompose import Decomposer, fidelity
from bilens.errors import ArgumentError, EmptyTextError, MissingSAEError, OutOfRangeError
from tests.random_saes import D_SAE, make_sae

D = 16
TEXTS = ["the little fox saw a tired owl near the river", "Mira", "a green frog", "the old gardener sang"] * 3


def make(model, kind="topk", **kwargs):
    out = make_sae(kind, "blocks.1.hook_mlp_out", seed=2)
    return Decomposer(model, 1, output_sae=out, **kwargs)


def by_hand(decomposer, texts, k):
    """Every token's truncated form, activation and read, without running sums."""
    model, sae = decomposer.model, decomposer.output_sae
    x, y = [], []
    for text in texts:
        _, cache = model.run_with_cache(text)
        x.append(cache["blocks.1.ln2.hook_normalized"][0, 1:])
        y.append(cache["blocks.1.hook_mlp_out"][0, 1:])
    x, y = torch.cat(x).double(), torch.cat(y).double()
    e = decomposer.directions(torch.arange(D_SAE)).double()
    eigen = decomposer.eigen(torch.arange(D_SAE), k=k)
    q = (eigen.values.double() * torch.einsum("pd,nkd->pnk", x, eigen.vectors.double()) ** 2).cumsum(-1)
    bias = x @ decomposer.linear(torch.arange(D_SAE)).double().T + decomposer.constant(torch.arange(D_SAE)).double()
    return q.detach().numpy(), sae.encode(y.float()).double().detach().numpy(), (y @ e.T - bias).detach().numpy()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", ["topk", "jumprelu", "gated", "scope"])
@pytest.mark.parametrize("batch_size", [1, 5])
def test_the_running_sums_are_the_statistics(models, bias, kind, batch_size):
    decomposer = make(models(bias, True), kind)
    found = decomposer.fidelity(TEXTS, k=3, batch_size=batch_size)
    q, f, t = by_hand(decomposer, TEXTS, 3)
    assert found.n_tokens == len(f)
    for o in range(D_SAE):
        active = f[:, o] != 0
        assert found.n_active[o] == active.sum()
        if active.sum() < 2:
            assert found.correlation[o].isnan().all()
            continue
        for r in range(3):
            # Correlations of a handful of nearly equal tokens cancel most of float32's digits in q and t.
            if f[active, o].std() > 1e-3 and q[active, o, r].std() > 1e-3:
                expected = np.corrcoef(f[active, o], q[active, o, r])[0, 1]
                assert found.correlation[o, r].item() == pytest.approx(expected, abs=2e-3)
            everywhere = np.corrcoef(f[:, o], q[:, o, r])[0, 1]
            assert found.correlation_all[o, r].item() == pytest.approx(everywhere, abs=2e-3)
            if t[active, o].std() > 1e-2:
                left = ((t[active, o] - q[active, o, r]) ** 2).sum() / ((t[active, o] - t[active, o].mean()) ** 2).sum()
                assert found.explained_variance[o, r].item() == pytest.approx(1 - left, rel=1e-2, abs=1e-2)


def test_the_memory_changes_nothing(models, monkeypatch):
    decomposer = make(models(True, True))
    expected = decomposer.fidelity(TEXTS, k=3)
    monkeypatch.setattr(fidelity, "ENTRY", 2**18)  # a token takes 30 MB
    found = decomposer.fidelity(TEXTS, k=3, memory=2**27)
    for name in ("correlation", "correlation_all", "explained_variance"):
        # float32 products in another order; the variance of a read that is nearly constant has few digits
        assert_close(getattr(found, name), getattr(expected, name), atol=1e-5, rtol=1e-4, equal_nan=True)
    with pytest.raises(ArgumentError, match=r"fidelity .3 pairs of 40 outputs. needs .* bytes, and memory is .*fewer"):
        decomposer.fidelity(TEXTS, k=3, memory=1000)


@pytest.mark.parametrize("bias", [False, True])
def test_all_eigenpairs_explain_everything(models, bias):
    """With k = d_model nothing is cut off, so the read is reproduced to float32 rounding."""
    found = make(models(bias, True)).fidelity(TEXTS, k=D)
    eligible = found.eligible(5)
    assert eligible.sum() > 5
    assert_close(found.explained_variance[eligible, -1], torch.ones(int(eligible.sum())), atol=1e-3, rtol=0)


def test_some_features_are_those_rows_of_all(models):
    decomposer = make(models(False, True), output_names=[f"out {i}" for i in range(D_SAE)])
    every, some = decomposer.fidelity(TEXTS, k=2), decomposer.fidelity(TEXTS, output=[7, 3], k=2)
    assert some.features.tolist() == [7, 3]
    assert_close(some.correlation, every.correlation[[7, 3]], atol=1e-5, rtol=0, equal_nan=True)
    assert some.to_frame()["name"].tolist() == ["out 7", "out 3"]


def test_texts_may_be_any_iterable(models):
    decomposer = make(models(False, True))
    listed, drawn = (decomposer.fidelity(texts, output=[7], k=1) for texts in (TEXTS, iter(TEXTS)))
    assert torch.equal(listed.correlation_all, drawn.correlation_all)


def test_what_does_not_vary_has_no_correlation(models):
    """The same text again and again: a feature that fires at one place of it has one activation, up to rounding."""
    decomposer = make(models(False, True))
    once, found = (decomposer.fidelity(TEXTS[:1] * n, k=3) for n in (1, 7))
    alike = once.n_active == 1
    assert alike.sum() > 3
    assert (found.n_active[alike] == 7).all()
    assert found.correlation[alike].isnan().all()
    assert found.explained_variance[alike].isnan().all()
    assert found.correlation_all[alike].isfinite().all()
    assert not found.correlation.isinf().any()


def test_tables_and_figures(models):
    found = make(models(False, True)).fidelity(TEXTS, k=4)
    frame = found.to_frame(k=2)
    assert len(frame) == D_SAE
    assert frame.correlation.dropna().between(-1.001, 1.001).all()
    shares = found.shares((0.0, 0.5), min_active=3)
    assert shares.k.tolist() == [1, 2, 3, 4]
    assert (shares["> 0"] >= shares["> 0.5"]).all()
    assert found.shares((-1.1,), min_active=0)["> -1.1"].tolist() == [1.0] * 4  # those without a correlation left out
    assert len(found.plot(min_active=3).data) == 3
    assert sum(found.histogram(min_active=3).data[0].y) == found.correlation[found.eligible(3), 1].isfinite().sum()
    assert len(found.scatter(min_active=3).data[0].x) == found.correlation[found.eligible(3), 1].isfinite().sum()
    assert "features on" in str(found)
    with pytest.raises(OutOfRangeError, match="k is 5, expected 1 to 4"):
        found.to_frame(k=5)
    with pytest.raises(ArgumentError, match="features is active on 1000 or more of the"):
        found.plot(min_active=1000)


def test_what_is_refused(models):
    decomposer = make(models(False, True))
    with pytest.raises(EmptyTextError):
        decomposer.fidelity([])
    with pytest.raises(OutOfRangeError, match="feature 40"):
        decomposer.fidelity(TEXTS, output=40)
    with pytest.raises(ArgumentError, match="needs output features"):
        decomposer.fidelity(TEXTS, output=torch.randn(D))
    with pytest.raises(OutOfRangeError, match="k is 17"):
        decomposer.fidelity(TEXTS, k=17)
    with pytest.raises(MissingSAEError):
        Decomposer(models(False, True), 0).fidelity(TEXTS)
