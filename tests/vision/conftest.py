"""Small image classifiers with random weights, and every combination of their switches."""

import itertools

import pytest
import torch

from bilens.vision import BilinearClassifier, ClassifierConfig

VARIANTS = list(itertools.product([1, 2, 3], [False, True], [False, True]))


def make_classifier(n_layer: int = 1, bias: bool = False, residual: bool = False, seed: int = 0) -> BilinearClassifier:
    """12 pixels, 7 hidden units, 4 classes, in float64; biases as large as the weights' effect, not zero as new."""
    cfg = ClassifierConfig(12, 7, 4, n_layer, bias, residual, height=3, width=4)
    model = BilinearClassifier(cfg, seed=seed).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 1:
                weight.copy_(0.5 * torch.randn(weight.shape, generator=generator))
    return model.eval()


@pytest.fixture(params=VARIANTS, ids=lambda v: f"{v[0]} layers{', bias' * v[1]}{', residual' * v[2]}")
def classifier(request: pytest.FixtureRequest) -> BilinearClassifier:
    """One, two or three layers, with and without biases and residual additions."""
    return make_classifier(*request.param)


@pytest.fixture
def images() -> torch.Tensor:
    """Six random images of 3 x 4 pixels."""
    return torch.rand(6, 3, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
