"""What the tests of the decompositions share: random models of every bilinear kind, and the reference `Decomposer`."""

import itertools
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from bilens.decompose import Decomposer
from bilens.model.transformer import HookedBilinearTransformer
from bilens.sae.loading import load_sae
from tests.conftest import SHARED, Reference, make_model


class Models(NamedTuple):
    """Random models by (MLP biases, normalisation)."""

    by_kind: dict[tuple[bool, bool], HookedBilinearTransformer]

    def __call__(self, bias: bool, normalization: bool) -> HookedBilinearTransformer:
        return self.by_kind[bias, normalization]


@pytest.fixture(scope="session")
def models(tokenizer: Any) -> Models:
    """Never changed by a test."""
    kinds = itertools.product([False, True], repeat=2)
    return Models({(b, n): make_model(tokenizer=tokenizer, bias=b, normalization=n, seed=3) for b, n in kinds})


class Tracer(NamedTuple):
    """The reference layer with its SAEs, and what the authors' implementation gave for it."""

    decomposer: Decomposer
    expected: dict[str, Tensor]


@pytest.fixture(scope="session")
def tracer(ts_micro: Reference) -> Tracer:
    """`shared/reference/ts-micro-scope`; without that folder the test is skipped."""
    folder = SHARED / "reference" / "ts-micro-scope"
    if not folder.exists():
        pytest.skip(f"the reference SAEs are not here: no folder {folder}")
    saes = [load_sae(folder, point, 1, k=8, device="cpu", dtype=torch.float32) for point in ("mlp-in", "mlp-out")]
    return Tracer(Decomposer(ts_micro.model, 1, *saes), load_file(folder / "tracer_expected.safetensors"))
