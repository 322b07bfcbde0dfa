"""Superposition: enough dimensions are exact, too few are not, and sparse features fit better."""

import pytest
import torch

from bilens.errors import ArgumentError, OutOfRangeError
from bilens.toy import SuperpositionConfig, train_superposition
from bilens.toy.superposition import sparse_features

SMALL = SuperpositionConfig(n_features=6, d_model=3, d_hidden=12, steps=500, sparsities=(0.0, 0.95))


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.9])
def test_features_are_as_sparse_as_said(sparsity: float) -> None:
    """The share of zeros within four standard errors, and the mean of the active ones is 1/2."""
    features = sparse_features(5000, 4, sparsity, torch.Generator().manual_seed(0))
    off = 4 * (sparsity * (1 - sparsity) / features.numel()) ** 0.5
    assert (features == 0).double().mean().item() == pytest.approx(sparsity, abs=off + 1e-9)
    assert features[features > 0].mean().item() == pytest.approx(0.5, abs=0.05)
    assert features.max() <= 1


@pytest.mark.parametrize("target", ["squares", "products"])
def test_with_enough_dimensions_nothing_interferes(target: str) -> None:
    """d = n has an exact solution, which training nears: all variance, coefficients 1, nothing elsewhere."""
    config = SuperpositionConfig(4, 4, 16, target, (0.0,), steps=1500, lr=1e-2)  # type: ignore[arg-type]
    model = train_superposition(config, progress=False)[0]
    # What is left is far below what a missing feature would leave: a quarter of the variance, a coefficient of one.
    assert model.explained > 0.995
    torch.testing.assert_close(model.on_target, torch.ones(len(config.pairs)).double(), atol=0.05, rtol=0)
    assert model.alone.max() < 0.05
    assert model.together.max() < 0.1


def test_interactions_are_those_of_the_whole_model() -> None:
    """Features in, outputs out: the feature basis gives `y_o = f^T (D Q_o D^T) f` exactly."""
    model = train_superposition(SMALL, progress=False)[1]
    features = sparse_features(10, 6, 0.3, torch.Generator().manual_seed(1))
    with torch.no_grad():
        outputs = model.layer(features @ model.directions.float())
    f = features.double()
    # float32 of the forward pass, on numbers of size one.
    torch.testing.assert_close(
        torch.einsum("ni,oij,nj->no", f, model.interactions, f).float(), outputs, atol=1e-5, rtol=1e-4
    )
    at = torch.arange(6)
    torch.testing.assert_close(model.on_target, model.interactions[at, at, at])


def test_sparse_features_fit_where_dense_ones_do_not() -> None:
    """Six squares in three dimensions: of dense features little variance is explained, of sparse ones most of it,
    with cross interactions that they seldom meet."""
    found = train_superposition(SMALL, progress=False)
    dense, sparse = found.models
    assert sparse.explained > dense.explained + 0.2
    assert sparse.on_target.mean() > dense.on_target.mean()
    assert sparse.together.mean() > 2 * sparse.alone.mean()
    assert torch.linalg.matrix_rank(sparse.gram, atol=1e-9) <= 3
    assert torch.equal(sparse.gram, sparse.gram.T)
    assert sparse.gram.diagonal().max() == 1
    assert list(found.to_frame()["sparsity"]) == [0.0, 0.95]
    assert list(sparse.to_frame()["output"])[:2] == ["f0 f0", "f1 f1"]
    for figure in (found.plot(), found.plot_geometry(), sparse.plot(2)):
        assert figure.data
    assert "6 features in 3 dimensions" in str(found)
    assert "sparsity 0.95" in str(sparse)
    assert train_superposition(SMALL, progress=False).to_frame().equals(found.to_frame())
    with pytest.raises(OutOfRangeError, match="output 6 is outside the 6 outputs"):
        sparse.plot(6)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"target": "square"}, r"target is 'square', expected 'squares' or 'products'.* Did you mean 'squares'"),
        ({"target": "products", "n_features": 5}, "n_features is 5; products pair features"),
        ({"sparsities": ()}, "sparsities is empty"),
        ({"sparsities": 0.9}, r"sparsities is 0\.9, expected a list of them: \[0\.9\]"),
        ({"sparsities": (0.5, 1.0)}, r"sparsity 1\.0: expected a probability"),
        ({"d_model": -2}, "d_model is -2"),
    ],
)
def test_config_refuses(wrong: dict, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        SuperpositionConfig(**wrong)
