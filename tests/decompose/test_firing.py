"""Eigencircuits on texts: sums that are exact on what the layer reads, their order and shares, and what is refused."""

import pytest
import torch
from torch.testing import assert_close

import bilens
from bilens.decompose import Decomposer
from bilens.errors import ArgumentError, EmptyTextError, MissingSAEError, OutOfRangeError, SAEMismatchError
from bilens.layer.eigen.metric import moment
from tests.random_saes import D_SAE, make_sae

D = 16
TEXTS = ["the little fox saw a tired owl near the river", "Mira found", "a green frog", "the old gardener sang"] * 3


@pytest.fixture(scope="module")
def decomposer(models):
    return Decomposer(
        models(True, True),
        1,
        make_sae("topk", "blocks.1.ln2.hook_normalized", seed=1),
        make_sae("topk", "blocks.1.hook_mlp_out", seed=2),
    )


@pytest.fixture(scope="module")
def firing(decomposer):
    return decomposer.firing(TEXTS)


@pytest.fixture(scope="module")
def trained():
    """Of the bundled model, on a few stories."""
    d = Decomposer(bilens.load_model(), 3, output_sae=bilens.load_sae("ts-tiny", "mlp-out", 3))
    return d, d.firing(bilens.sae.example_texts(d.model)[:16])


def test_firing_is_what_the_sae_says(decomposer, firing):
    x, y = (torch.cat(parts) for parts in zip(*decomposer.run_texts(TEXTS, 5), strict=True))
    f = decomposer.output_view.activations(y)
    assert_close(firing.inputs, x, atol=1e-5, rtol=1e-5)
    assert_close(firing.n_active, (f != 0).sum(0))
    for feature in (0, 7, D_SAE - 1):
        assert_close(firing.tokens_of(feature).long(), f[:, feature].nonzero().flatten())
        assert_close(firing.activations_of(feature), f[f[:, feature] != 0, feature], atol=1e-5, rtol=1e-5)
        assert_close(firing.inputs_of(feature), x[f[:, feature] != 0], atol=1e-5, rtol=1e-5)
    assert_close(firing.second_moment, x.double().T @ x.double() / len(x))
    frame = firing.to_frame()
    assert frame.n_active.tolist() == firing.n_active.tolist()
    fires = int(firing.n_active.argmax())
    assert frame.mean_activation[fires] == pytest.approx(firing.activations_of(fires).mean().item(), rel=1e-5)
    assert "output features fire" in str(firing)


@pytest.mark.parametrize("which", ["random", "trained"])
@pytest.mark.parametrize("metric", ["weights", "firing", "mean"])
def test_all_squares_are_the_form(which, metric, decomposer, firing, trained):
    """To float32 rounding of the squares: on the tokens, on others, and of a feature that never fires."""
    d, firing = (decomposer, firing) if which == "random" else trained
    most, silent = int(firing.n_active.argmax()), int(firing.n_active.argmin())
    found = d.eigen([most, silent], metric=metric, order="variance", fit=firing)
    x = torch.cat([firing.inputs[:50], torch.randn(20, firing.inputs.shape[1])])
    for row, feature in enumerate((most, silent)):
        one, Q = found[row], d.interaction(feature)
        total = one.activations(x).sum(1)
        if metric == "mean":
            total = total + one.constant + (x - one.about) @ one.linear
        size = one.activations(x).abs().sum(1).max().item()
        assert_close(total, ((x @ Q) * x).sum(1), atol=1e-5 * size, rtol=0)
        assert_close(one.norms, Q.norm())
    if metric != "mean":
        assert_close(found.variance_shares[0].sum(), torch.tensor(1.0), atol=1e-3, rtol=0)
        assert_close(found.mean_shares[0].sum(), torch.tensor(1.0), atol=1e-3, rtol=0)


@pytest.mark.parametrize("order", ["variance", "mean"])
@pytest.mark.parametrize("metric", ["weights", "firing", "fitted"])
def test_the_order_is_of_what_the_squares_do(order, metric, decomposer, firing):
    feature = int(firing.n_active.argmax())
    found = decomposer.eigen(feature, 4, order=order, metric=metric, fit=firing)
    done = found.activations(firing.inputs_of(feature))
    size = done.var(0) if order == "variance" else done.mean(0).abs()
    assert (size.diff() <= 1e-5 * size[0]).all()
    whole = ((firing.inputs_of(feature) @ decomposer.interaction(feature)) * firing.inputs_of(feature)).sum(1)
    covariance = ((done - done.mean(0)) * (whole - whole.mean())[:, None]).mean(0)
    assert_close(found.variance_shares, covariance / whole.var(correction=0), atol=1e-3, rtol=1e-3)
    assert_close(found.mean_shares, done.mean(0) / whole.mean(), atol=1e-3, rtol=1e-3)


def test_the_obvious_call_fits(decomposer, firing):
    """With texts, the squares that follow the feature best; the same from the texts as from what was kept of them."""
    feature = int(firing.n_active.argmax())
    found = decomposer.eigen(feature, 2, fit=firing)
    assert found.metric == "fitted"
    assert_close(found.values, decomposer.eigen(feature, 2, fit=iter(TEXTS)).values, rtol=1e-3, atol=1e-4)
    x, Q = firing.inputs_of(feature), decomposer.interaction(feature)
    whole = ((x @ Q) * x).sum(1)

    def left(circuits):
        return (whole - circuits.activations(x).sum(1)).var()

    assert left(found) < left(decomposer.eigen(feature, 2))
    plain = decomposer.eigen(feature, 2)
    assert (plain.metric, plain.variance_shares) == ("weights", None)
    assert "fit=d.firing()" in str(plain)
    assert "fit=d.firing()" not in str(decomposer.eigen(torch.randn(D), 2))


def test_trained_features_are_followed(trained):
    """On stories that were not fitted, over the features that fire often on both: a fact of these weights."""
    d, firing = trained
    other = d.firing(bilens.sae.example_texts(d.model)[16:32])
    often = (torch.minimum(firing.n_active, other.n_active) >= 100).nonzero().flatten()[:12]
    correlations = {}
    for name, options in {"fitted": {"fit": firing}, "weights": {}}.items():
        found = d.eigen(often, 2, **options)
        correlations[name] = [
            torch.corrcoef(torch.stack([found[i].activations(other.inputs_of(f)).sum(1), other.activations_of(f)]))[
                0, 1
            ]
            for i, f in enumerate(often.tolist())
        ]
    assert sum(correlations["fitted"]) > sum(correlations["weights"]) + 0.3


def test_spectra_where_features_fire_are_those_of_eigen(decomposer, firing):
    found, each = (
        decomposer.spectra(fit=firing),
        decomposer.eigen(range(D_SAE), 2, metric="firing", order="size", fit=firing),
    )
    assert_close(found.n_active, firing.n_active)
    assert_close(found.pairs.values.abs(), each.values.abs(), rtol=2e-2, atol=1e-4)
    Q, M = decomposer.interaction(3).double(), moment(firing.inputs_of(3), firing.second_moment)
    assert_close(found.pairs.norms[3].double() ** 2, torch.trace(M @ Q @ M @ Q), rtol=1e-3, atol=1e-6)
    assert (found.shares <= 1.001).all()
    frame = found.to_frame()
    assert frame.columns.tolist() == ["feature", "name", "n_active", "mu_1", "mu_2", "share"]
    assert len(found.plot().data[0].x) == D_SAE
    assert "where they fire" in str(found)
    with pytest.raises(OutOfRangeError, match="k is 17"):
        decomposer.spectra(k=17, fit=firing)
    with pytest.raises(ArgumentError, match="directions"):
        decomposer.spectra(torch.randn(2, D), fit=firing)


def test_tables_and_parts(decomposer, firing):
    most = firing.n_active.topk(2).indices
    found = decomposer.eigen(most, 3, metric="mean", fit=firing)
    frame = found.to_frame()
    assert frame.columns.tolist() == ["output", "rank", "eigenvalue", "variance_share", "mean_share"]
    assert frame["output"].tolist() == [n for n in most.tolist() for _ in range(3)]
    assert found[1].top(2).variance_shares.shape == (2,)
    assert found[1].about.shape == (D,)
    with pytest.raises(ArgumentError, match="not orthogonal"):
        _ = found.shares
    weights = decomposer.eigen(int(most[0]), 2, order="variance", fit=firing)
    assert {"share", "variance_share"} <= set(weights.to_frame().columns)
    silent = int(firing.n_active.argmin())
    assert firing.n_active[silent] == 0
    kept = decomposer.eigen(silent, 2, fit=firing)
    assert kept.variance_shares.isnan().all()
    assert kept.values.isfinite().all()
    assert f"Not firing on the texts, and so by all tokens: {silent}." in str(kept)


def test_what_is_refused(decomposer, firing, models):
    d = decomposer
    with pytest.raises(ArgumentError, match="k is None"):
        d.eigen(3, fit=firing)
    with pytest.raises(ArgumentError, match="metric is 'fireing', expected"):
        d.eigen(3, 2, metric="fireing", fit=firing)
    with pytest.raises(ArgumentError, match="order is 'varience'"):
        d.eigen(3, 2, order="varience", fit=firing)
    with pytest.raises(OutOfRangeError, match="k is 17"):
        d.eigen(3, 17, fit=firing)
    with pytest.raises(ArgumentError, match="directions"):
        d.eigen(torch.randn(D), 2, fit=firing)
    with pytest.raises(SAEMismatchError, match="fit is of layer 1"):
        Decomposer(models(True, True), 0, output_sae=make_sae("topk", "blocks.0.hook_mlp_out")).eigen(3, 2, fit=firing)
    with pytest.raises(EmptyTextError):
        d.firing([])
    with pytest.raises(ArgumentError, match=r"firing of the first .* give fewer texts"):
        d.firing(TEXTS, memory=1000)
    with pytest.raises(MissingSAEError):
        Decomposer(models(True, True), 1).firing(TEXTS)
