"""What outlives a model notices when the model (or an SAE) is no longer what it was made from."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from bilens._core.fingerprint import Snapshot, check_same, model_fingerprint
from bilens.attribute import Target, attribute_tokens, freeze, split
from bilens.decompose import Decomposer
from bilens.errors import CheckpointError, StaleError
from bilens.model.transformer import HookedBilinearTransformer
from bilens.sae.features.examples import feature_activations
from bilens.sae.features.store import FeatureStore, build_feature_store
from bilens.vision.config import ClassifierConfig
from bilens.vision.model import BilinearClassifier
from tests.conftest import make_model
from tests.random_saes import make_sae

MLP_IN, MLP_OUT = "blocks.1.ln2.hook_normalized", "blocks.1.hook_mlp_out"
TOKENS = torch.tensor([1, 17, 42, 8])


def swap_rows(weight: torch.Tensor) -> None:
    weight.data[:2] = weight.data[:2].flip(0).clone()


def swap_columns(weight: torch.Tensor) -> None:
    weight.data[:, :2] = weight.data[:, :2].flip(1).clone()


def one_number(weight: torch.Tensor) -> None:
    with torch.no_grad():
        weight[0, 0] *= 1.5


EDITS: dict[str, Callable[[HookedBilinearTransformer], Any]] = {
    "one number": lambda m: one_number(m.blocks[1].mlp.w.weight),
    "rows swapped past autograd": lambda m: swap_rows(m.blocks[1].mlp.p.weight),
    "columns swapped past autograd": lambda m: swap_columns(m.blocks[1].attn.o.weight),
    "a replaced parameter": lambda m: setattr(m.blocks[1].mlp.w, "weight", nn.Parameter(m.blocks[1].mlp.w.weight * 2)),
    "assigned": lambda m: m.load_state_dict({k: v * 2 for k, v in m.state_dict().items()}, assign=True),
    "another dtype": lambda m: m.to(torch.bfloat16),
}


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_snapshot_notices_every_edit(edit: str, dtype: torch.dtype) -> None:
    """In place or not, with or without autograd's knowledge; and not where nothing has changed."""
    model = make_model().to(torch.float64 if edit == "another dtype" else dtype)
    snapshot = Snapshot(model)
    model.set_use_attn_result(True)  # shows more, computes the same
    model.run_with_cache(TOKENS)
    assert snapshot.changed() is None
    EDITS[edit](model)
    assert snapshot.changed() == "the model"


def test_a_snapshot_is_of_values() -> None:
    """What was edited and restored has not changed, nor what was moved and back without a loss."""
    model = make_model()
    snapshot, weight = Snapshot(model), model.blocks[0].mlp.w.weight
    before = weight.detach().clone()
    with torch.no_grad():
        weight.zero_()
    assert snapshot.changed() == "the model"
    with torch.no_grad():
        weight.copy_(before)
    model.double().float()
    assert snapshot.changed() is None


@pytest.mark.parametrize("edit", EDITS)
def test_a_decomposer_is_of_the_weights_as_they_are(edit: str) -> None:
    """Of a model in half precision too, where what it reads is a float32 copy."""
    model = make_model().to(torch.float32 if edit == "another dtype" else torch.bfloat16)
    decomposer, u = Decomposer(model, 1), torch.arange(16.0)
    before = decomposer.interaction(u)
    EDITS[edit](model)
    assert_close(decomposer.interaction(u), Decomposer(model, 1).interaction(u), rtol=0, atol=0)
    assert not torch.equal(decomposer.interaction(u), before) or edit.startswith("columns")  # attention's alone


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_decomposer_is_of_the_saes_as_they_are(dtype: torch.dtype) -> None:
    """An SAE in half precision is read through a float32 copy, one in float32 directly."""
    model, sae = make_model(), make_sae(hook=MLP_OUT).to(dtype)
    decomposer = Decomposer(model, 1, output_sae=sae)
    before = decomposer.interaction(3)
    sae.W_enc.data *= 2  # what SAELens' own folding does
    assert_close(decomposer.interaction(3), 2 * before, rtol=1e-6, atol=0)
    sae.to(torch.float16)
    assert decomposer.output_view.sae.dtype == torch.float32


@pytest.mark.parametrize("edit", EDITS)
def test_a_frozen_pass_refuses_other_weights(edit: str) -> None:
    model = make_model()
    frozen = freeze(model, TOKENS)
    split(frozen, Target.logit(5))
    EDITS[edit](model)
    for analysis in (split, attribute_tokens):
        with pytest.raises(StaleError, match=r"the model was changed .* call freeze again"):
            analysis(frozen, Target.logit(5))


def test_a_frozen_pass_refuses_other_saes() -> None:
    """A feature's encoder row would not be the one that fired; an SAE in half precision counts as it was given."""
    model, sae = make_model(), make_sae(hook=MLP_OUT).to(torch.float16)
    frozen = freeze(model, TOKENS, sae)
    split(frozen, Target.feature(MLP_OUT, 3))
    sae.W_enc.data[0] = 0
    with pytest.raises(StaleError, match=r"the SAE on blocks\.1\.hook_mlp_out was changed"):
        split(frozen, Target.feature(MLP_OUT, 3))


@pytest.mark.usefixtures("datasets_cache")
def test_a_store_names_the_features_it_is_of_alone(tokenizer: Any, texts: list[str], tmp_path: Any) -> None:
    """Another SAE of the same size, and the same SAE on another model, have other features."""
    model, sae = make_model(tokenizer=tokenizer), make_sae(hook=MLP_OUT)
    build_feature_store(model, {"1-mlp-out": sae}, texts[:8], tmp_path / "store")
    store = FeatureStore.load(tmp_path / "store")
    named = split(freeze(model, texts[0], sae), Target.logit(5), names=store)
    assert named.names[MLP_OUT] == store.labels("1-mlp-out")
    for other, given, of in (
        (model, make_sae(hook=MLP_OUT, seed=1), "SAE"),
        (make_model(tokenizer=tokenizer, seed=1), sae, "model"),
    ):
        with pytest.raises(StaleError, match=f"was made from another {of}"):
            split(freeze(other, texts[0], given), Target.logit(5), names=store)


def test_fingerprints_differ_with_the_weights_and_not_with_what_is_shown() -> None:
    model = make_model()
    before = model_fingerprint(model)
    model.set_use_attn_result(True)
    check_same(before, model_fingerprint(model), "this", "model")
    one_number(model.blocks[0].mlp.w.weight)
    with pytest.raises(StaleError, match="this was made from another model than the one given"):
        check_same(before, model_fingerprint(model), "this", "model")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nothing_is_read_from_weights_that_are_not_finite(value: float) -> None:
    """They give 0 motifs, cosine 0 and a trace of 0 nodes; so an analysis does not start."""
    model, sae = make_model(), make_sae(hook=MLP_OUT)
    decomposer = Decomposer(model, 1, output_sae=sae)
    frozen_before = freeze(model, TOKENS)
    model.blocks[1].mlp.w.weight.data[3, 2] = value
    for analysis in (
        lambda: Decomposer(model, 1),
        lambda: decomposer.interaction(3),
        lambda: decomposer.clusters(),
        lambda: freeze(model, TOKENS),
    ):
        with pytest.raises(CheckpointError, match="values that are NaN or infinite"):
            analysis()
    with pytest.raises(StaleError):
        split(frozen_before, Target.logit(5))
    sae.W_dec.data[0, 0] = value
    with pytest.raises(CheckpointError, match=r"the SAE on 'blocks\.1\.hook_mlp_out': W_dec holds 1 values"):
        Decomposer(make_model(), 1, output_sae=sae)


def test_features_of_a_model_that_is_not_finite_are_not_counted(tokenizer: Any, texts: list[str]) -> None:
    """NaN is not 0, so every feature would fire on every token."""
    model, sae = make_model(tokenizer=tokenizer), make_sae("standard", MLP_OUT)
    model.blocks[0].attn.o.weight.data[0, 0] = float("nan")
    with pytest.raises(CheckpointError, match=r"activations holds .* values that are NaN"):
        feature_activations(model, [sae], texts[:2])


def test_a_classifier_that_is_not_finite_has_no_layers_to_read() -> None:
    model = BilinearClassifier(ClassifierConfig(d_input=6, d_hidden=4, d_output=3))
    model.blocks[0].weight.data[0, 0] = float("inf")
    with pytest.raises(CheckpointError, match=r"the classifier: blocks\.0\.weight holds 1 values"):
        model.layer(0)


def test_a_result_is_of_the_weights_it_was_made_from() -> None:
    """A model in float32 lends its own weights; what is read from them later is a copy."""
    model = make_model()
    found = Decomposer(model, 1).hosvd(2)
    before = found.core(3, 3)
    model.blocks[1].mlp.p.weight.data *= 2
    assert torch.equal(found.core(3, 3), before)
