"""An SAE on a forward pass: its parts are those of the oracle, not only parts that add up.

Tolerance: the activations are the SAE's own, in float32; the rest is in float64.
"""

import pytest
import torch

from bilens.sae.passes import SAEPass
from bilens.sae.view import SAEView
from tests.random_saes import D_IN, VARIANTS, Oracle, make_sae, variant_name

HOOK = "blocks.0.hook_mlp_out"


@pytest.mark.parametrize("variant", VARIANTS, ids=variant_name)
def test_writes_and_reads_are_those_of_the_sae(variant):
    """The error takes up whatever the writes miss, so a sum of all parts would say nothing of them."""
    sae = make_sae(hook=HOOK, **variant)
    x = torch.randn(6, D_IN, generator=torch.Generator().manual_seed(1)) * 3 + 1
    oracle, positions = Oracle(sae, x), torch.arange(6)
    run = SAEPass.of(SAEView.of(sae), HOOK, x, torch.float64)
    reconstruction = torch.from_numpy(oracle.reconstruction)
    torch.testing.assert_close(run.b_dec + run.writes(positions).sum(1), reconstruction, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(run.error, x.double() - reconstruction, rtol=1e-5, atol=1e-5)
    if run.has_reads:
        rows, constants = run.reads(positions, positions + 3)
        pre = torch.from_numpy(oracle.pre)[positions, positions + 3]
        torch.testing.assert_close((rows * x).sum(1) + constants, pre, rtol=1e-5, atol=1e-5)
