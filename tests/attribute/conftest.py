"""What the tests of attribution share: random models of every bilinear kind with SAEs on every point, frozen."""

import functools
import itertools
from dataclasses import fields
from typing import Any

import pandas as pd
import pytest
import torch

from bilens.attribute import Circuit, FrozenPass, freeze
from bilens.model.hook_points import POINT_TO_HOOK
from bilens.model.transformer import HookedBilinearTransformer
from tests.conftest import make_model
from tests.random_saes import VARIANTS, make_sae

TOKENS = torch.tensor([1, 17, 42, 8, 42, 3])
N_LAYERS = 3
MODEL_KINDS = list(itertools.product([False, True], [False, True]))  # biases (of attention too), normalisation
POINTS = list(POINT_TO_HOOK)


@functools.cache
def model_of(bias: bool, normalization: bool, n_layer: int = N_LAYERS, **config: Any) -> HookedBilinearTransformer:
    """Never changed by a test."""
    config = {"bias": bias, "attention_bias": bias, "normalization": normalization, "n_layer": n_layer} | config
    return make_model(seed=3, **config)


def saes_of(n_layers: int = N_LAYERS, points: tuple[str, ...] = ("mlp-in", "mlp-out"), **options: Any) -> list[Any]:
    """An SAE on each of these points of every layer; without options, every one of another class and normalisation."""
    places = list(itertools.product(range(n_layers), points))
    # 17 shares no divisor with the number of variants, so that they are gone through in a mixed order.
    return [
        make_sae(
            hook=f"blocks.{layer}.{POINT_TO_HOOK[point]}", seed=n, **(options or VARIANTS[(17 * n) % len(VARIANTS)])
        )
        for n, (layer, point) in enumerate(places)
    ]


@pytest.fixture(scope="session")
def frozen_kinds() -> dict[tuple[bool, bool], FrozenPass]:
    """One pass per kind of model, with SAEs on every point."""
    saes = saes_of(points=tuple(POINTS))
    return {kind: freeze(model_of(*kind), TOKENS, saes) for kind in MODEL_KINDS}


def same(one: Circuit, other: Circuit) -> None:
    """Two circuits with the same numbers and names."""
    frames = ("nodes", "edges", "hyperedges", "heads")
    for name in frames:
        pd.testing.assert_frame_equal(getattr(one, name), getattr(other, name), check_dtype=False)
    for name in (field.name for field in fields(Circuit) if field.name not in frames):
        assert getattr(one, name) == getattr(other, name)
