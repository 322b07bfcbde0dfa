"""Models, SAEs and every result that holds one can be pickled: the copy computes and shows what the original does."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch

from bilens.attribute import (
    Circuit,
    Target,
    attribute_tokens,
    check_circuit,
    check_edges,
    freeze,
    gradient_times_input,
    split,
)
from bilens.decompose import Decomposer
from bilens.decompose.feature import feature_circuit
from bilens.model.transformer import HookedBilinearTransformer
from bilens.sae.features.examples import feature_activations
from bilens.sae.train.evaluation import evaluate_saes
from bilens.sae.view import SAEView
from bilens.train.annealing import annealable
from bilens.vision import eigenfeatures
from bilens.vision.config import ClassifierConfig
from bilens.vision.model import BilinearClassifier, class_layer
from tests.conftest import make_model
from tests.random_saes import CLASSES, make_sae

TOKENS = torch.tensor([1, 17, 42, 8, 42, 3])
TARGET = Target.logit(5)


class Setting:
    """A model with a tokenizer, SAEs before and behind an MLP, and what is made of them."""

    def __init__(self, model: HookedBilinearTransformer, texts: list[str]):
        self.model, self.texts = model, texts[:3]
        self.saes = [make_sae(hook="blocks.1.ln2.hook_normalized"), make_sae(hook="blocks.1.hook_mlp_out", seed=1)]
        self.decomposer = Decomposer(self.model, 1, *self.saes)
        self.frozen = freeze(self.model, TOKENS, self.saes)
        self.circuit = Circuit.trace(self.model, self.saes, TOKENS, TARGET)


RESULTS: dict[str, Callable[[Setting], Any]] = {
    "model": lambda s: s.model,
    "decomposer": lambda s: s.decomposer,
    "eigencircuits": lambda s: s.decomposer.eigen(3),
    "top interactions": lambda s: s.decomposer.top_interactions(3),
    "strongest interactions": lambda s: s.decomposer.strongest_interactions(5),
    "spectra": lambda s: s.decomposer.spectra([3, 4], k=2),
    "fidelity": lambda s: s.decomposer.fidelity(s.texts, k=2),
    "attribution": lambda s: s.decomposer.attribute(TOKENS, 3, -1),
    "feature circuit": lambda s: feature_circuit(s.decomposer, s.texts[0], 3),
    "neighbours": lambda s: s.decomposer.neighbours(),
    "clusters": lambda s: s.decomposer.clusters(),
    "motifs": lambda s: s.decomposer.motifs(),
    "hosvd": lambda s: s.decomposer.hosvd(),
    "frozen pass": lambda s: s.frozen,
    "circuit": lambda s: s.circuit,
    "split": lambda s: split(s.frozen, TARGET),
    "token attribution": lambda s: attribute_tokens(s.frozen, TARGET),
    "gradients": lambda s: gradient_times_input(s.frozen, TARGET),
    "faithfulness": lambda s: check_circuit(s.frozen, s.circuit, TARGET),
    "edges": lambda s: check_edges(s.frozen, s.circuit, TARGET),
    "scores": lambda s: evaluate_saes(s.model, {"a": s.saes[0]}, s.texts),
    "activations": lambda s: feature_activations(s.model, s.saes, s.texts),
    "view of half precision": lambda s: SAEView.of(make_sae().to(torch.bfloat16)),
}


@pytest.fixture
def setting(text_model: HookedBilinearTransformer, texts: list[str]) -> Setting:
    return Setting(text_model, texts)


def test_results_can_be_pickled(setting: Setting) -> None:
    """And say the same afterwards."""
    for name, make in RESULTS.items():
        result = make(setting)
        again = pickle.loads(pickle.dumps(result))
        assert type(again) is type(result), name
        assert hasattr(result, "acts_to_saes") or str(again) == str(result), name


def test_a_pickled_decomposer_and_pass_go_on(setting: Setting) -> None:
    """What they compute next is what the originals compute, also in the other's place."""
    d, frozen = pickle.loads(pickle.dumps((setting.decomposer, setting.frozen)))
    assert torch.equal(d.eigen(3).values, setting.decomposer.eigen(3).values)
    assert torch.equal(split(frozen, TARGET).values, split(setting.frozen, TARGET).values)
    assert frozen.model is d.model
    assert frozen.model is not setting.model


@pytest.mark.parametrize("kind", CLASSES)
def test_saes_can_be_pickled_and_copied(kind: str) -> None:
    """With their hooks' names, metadata and settings; a copy's weights are its own."""
    sae = make_sae(kind, hook="blocks.0.hook_mlp_out")
    SAEView(sae)
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    for again in (pickle.loads(pickle.dumps(sae)), copy.deepcopy(sae)):
        assert torch.equal(again(x), sae(x))
        assert again.cfg.to_dict() == sae.cfg.to_dict()
        assert list(again.hook_dict) == list(sae.hook_dict)
        _, cache = again.run_with_cache(x)
        assert torch.equal(cache["hook_sae_acts_post"], sae.encode(x))
        with torch.no_grad():
            again.W_dec.zero_()
        assert sae.W_dec.any()


def test_a_classifier_can_be_pickled() -> None:
    """With its layers and eigenfeatures."""
    model = BilinearClassifier(ClassifierConfig(d_input=6, d_hidden=4, d_output=3, n_layer=1), seed=0)
    images = torch.rand(3, 6)
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(again(images), model(images))
    for result in (class_layer(model), eigenfeatures(model)):
        assert type(pickle.loads(pickle.dumps(result))) is type(result)


@pytest.mark.parametrize("gate", ["silu", "gelu", "relu"])
def test_a_model_that_is_being_annealed_can_be_pickled(gate: str) -> None:
    """Its gates are between two functions."""
    model = annealable(make_model(gate=gate), [TOKENS[None]], normalization=True)
    assert torch.equal(pickle.loads(pickle.dumps(model))(TOKENS), model(TOKENS))
