"""Ways to find eigencircuits, compared: each is what `eigen` gives, and all squares follow a feature wholly."""

import pytest
import torch
from torch.testing import assert_close

from bilens.decompose import Decomposer
from bilens.decompose.comparison import FIRING, FITTED, LINEAR, MEAN, METHODS, SIZE, VARIANCE
from bilens.errors import ArgumentError, OutOfRangeError
from tests.random_saes import D_SAE, make_sae

D = 16
TEXTS = ["the little fox saw a tired owl near the river", "Mira", "a green frog", "the old gardener sang"] * 3
OTHERS = ["a tired owl lost the silver key", "the little fox painted three stones", "Mira counted a red kite ."] * 4


@pytest.fixture(scope="module")
def decomposer(models):
    return Decomposer(models(True, True), 1, output_sae=make_sae("topk", "blocks.1.hook_mlp_out", seed=2))


@pytest.fixture(scope="module")
def both(decomposer):
    return decomposer.firing(TEXTS), decomposer.firing(OTHERS)


def test_each_method_is_what_eigen_gives(decomposer, both):
    measured, fit = both
    feature = int(torch.minimum(measured.n_active, fit.n_active).argmax())
    found = decomposer.fidelity(measured, [feature], 3, fit=fit)
    options = {
        SIZE: {"metric": "weights", "order": "size"},
        VARIANCE: {"order": "variance"},
        MEAN: {"order": "mean"},
        FIRING: {"metric": "firing", "order": "size"},
        LINEAR: {"metric": "mean", "order": "size"},
    }
    for firing, correlation in ((measured, found.correlation), (fit, found.correlation_on_fit)):
        x, f = firing.inputs_of(feature), firing.activations_of(feature)
        for k in (1, 3):
            for method, option in [*options.items(), (FITTED, {})]:
                circuits = decomposer.eigen(feature, k, fit=fit, **option)
                total = circuits.activations(x).sum(1)
                if method == LINEAR:
                    total = total + x @ circuits.linear
                expected = torch.corrcoef(torch.stack([total, f]))[0, 1]
                # L-BFGS in float32 from inputs that differ by rounding; the others are float64 against float32.
                tolerance = 1e-2 if method == FITTED else 1e-3
                assert_close(correlation[method][0, k - 1], expected, atol=tolerance, rtol=0)


def test_by_size_it_is_the_fidelity_without_texts_to_fit(decomposer, both):
    found, plain = decomposer.fidelity(TEXTS, k=2, fit=both[1]), decomposer.fidelity(TEXTS, k=2)
    often = plain.eligible(5)
    assert often.sum() > 5
    assert_close(found.correlation[SIZE][often], plain.correlation[often], atol=1e-3, rtol=0, equal_nan=True)
    assert_close(found.n_active, plain.n_active)


def test_all_squares_follow_a_feature_wholly(models):
    """Of an SAE whose activation is linear where it fires, without MLP biases; but for fitted squares, four at most."""
    d = Decomposer(models(False, True), 1, output_sae=make_sae("topk", "blocks.1.hook_mlp_out", seed=2))
    found = d.fidelity(TEXTS, [int(d.firing(TEXTS).n_active.argmax())], D, fit=OTHERS)
    for method in METHODS:
        if method != FITTED:
            assert_close(found.correlation[method][0, -1], torch.tensor(1.0), atol=1e-4, rtol=0)
    assert found.correlation[FITTED][0, 3].isfinite()
    assert found.correlation[FITTED][0, 4:].isnan().all()


def test_tables_figures_and_what_is_refused(decomposer, both):
    found = decomposer.fidelity(both[0], k=5, fit=both[1])
    frame = found.to_frame(min_active=5)
    assert set(frame.method) == set(METHODS)
    assert len(frame) == 5 * 5 + 4
    assert frame["> 0.75"].between(0, 1).all()
    assert len(found.plot(min_active=5).data) == len(METHODS)
    assert FITTED in str(found)
    assert len(found.features) == D_SAE
    with pytest.raises(ArgumentError, match="no feature fires on 1000"):
        found.to_frame(min_active=1000)
    with pytest.raises(OutOfRangeError, match="k is 17"):
        decomposer.fidelity(TEXTS, k=17, fit=both[1])
    with pytest.raises(ArgumentError, match="only a comparison takes"):
        decomposer.fidelity(both[0])
