"""Measurements are of the model by itself: with anything attached or hooked, every one of them refuses."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from bilens._core.bare import require_bare
from bilens.attribute import Circuit, Target, check_circuit, feature_means, freeze
from bilens.decompose import Decomposer
from bilens.decompose.feature import feature_circuit
from bilens.decompose.gallery import motif_gallery
from bilens.errors import AlteredModelError
from bilens.model.transformer import HookedBilinearTransformer
from bilens.sae.features.examples import feature_activations
from bilens.sae.features.store import build_feature_store
from bilens.sae.train.evaluation import evaluate_saes
from bilens.sae.train.finetuning import FinetuneConfig, finetune_saes
from bilens.sae.train.training import SAETrainConfig, train_saes
from bilens.train.data import TokenizedTexts
from bilens.train.language_model import TrainConfig, TrainingRun, validate
from bilens.vision.config import ClassifierConfig
from bilens.vision.explanation import explain
from bilens.vision.model import BilinearClassifier
from bilens.vision.spectral import read_by_last_layer
from tests.conftest import make_model
from tests.random_saes import make_sae

MLP_IN, MLP_OUT = "blocks.1.ln2.hook_normalized", "blocks.1.hook_mlp_out"
TOKENS = torch.tensor([1, 17, 42, 8])


class Setting:
    """A model, its SAEs, texts, and what some measurements are made on, from before anything is changed."""

    def __init__(self, tokenizer: Any, texts: list[str], folder: Path):
        self.model, self.texts, self.folder = make_model(tokenizer=tokenizer), texts[:4], folder
        self.saes = {"in": make_sae(hook=MLP_IN), "out": make_sae(hook=MLP_OUT, seed=1)}
        self.decomposer = Decomposer(self.model, 1, *self.saes.values())
        self.tokenized = TokenizedTexts.from_texts(texts, tokenizer)
        self.activations = feature_activations(self.model, list(self.saes.values()), self.texts)
        self.frozen = freeze(self.model, TOKENS, list(self.saes.values()))
        self.target = Target.logit(5)
        self.circuit = Circuit.trace(self.model, list(self.saes.values()), TOKENS, self.target)


@pytest.fixture
def setting(tokenizer: Any, texts: list[str], tmp_path: Path) -> Setting:
    return Setting(tokenizer, texts, tmp_path)


MEASUREMENTS: dict[str, Callable[[Setting], Any]] = {
    "evaluate_saes": lambda s: evaluate_saes(s.model, s.saes, s.texts),
    "feature_activations": lambda s: feature_activations(s.model, list(s.saes.values()), s.texts),
    "feature_means": lambda s: feature_means(s.model, list(s.saes.values()), s.texts),
    "build_feature_store": lambda s: build_feature_store(s.model, s.saes, s.texts, s.folder / "store"),
    "motif_gallery": lambda s: motif_gallery([s.decomposer], [s.activations[0]], [s.activations[1]], progress=False),
    "attribute": lambda s: s.decomposer.attribute(TOKENS, 3, -1),
    "fidelity": lambda s: s.decomposer.fidelity(s.texts, k=2),
    "feature_circuit": lambda s: feature_circuit(s.decomposer, s.texts[0], 3),
    "run": lambda s: s.decomposer.run(TOKENS[None]),
    "freeze": lambda s: freeze(s.model, TOKENS, list(s.saes.values())),
    "trace": lambda s: Circuit.trace(s.model, list(s.saes.values()), TOKENS, s.target),
    "check_circuit": lambda s: check_circuit(s.frozen, s.circuit, s.target),
    "validate": lambda s: validate(s.model, s.tokenized),
    "train": lambda s: TrainingRun(
        s.model, s.tokenized, s.tokenized, TrainConfig(n_ctx=16, batch_size=4, epochs=0.1)
    ).fit(),
    "train_saes": lambda s: train_saes(
        s.model, s.texts, s.folder / "saes", SAETrainConfig(expansion=2, k=4, tokens=64, batch_size=32), hooks=[MLP_OUT]
    ),
    "finetune_saes": lambda s: finetune_saes(
        s.model, {"out": s.saes["out"]}, s.texts, s.folder / "saes", FinetuneConfig(tokens=32)
    ),
}

WITHOUT_SAE = {"train", "validate", "train_saes", "run", "check_circuit"}


@contextmanager
def torch_hook(model: HookedBilinearTransformer, kind: str) -> Iterator[None]:
    handle = getattr(model.blocks[0].mlp, kind)(lambda *args: None)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def permanent(module: Any, name: str) -> Iterator[None]:
    module.add_hook(name, lambda value, hook: value * 0, is_permanent=True)
    try:
        yield
    finally:
        module.reset_hooks(including_permanent=True)


@contextmanager
def copies(model: HookedBilinearTransformer) -> Iterator[None]:
    model.set_use_split_qkv_input(True)
    try:
        yield
    finally:
        model.set_use_split_qkv_input(False)


ALTERED: dict[str, Callable[[Setting], Any]] = {
    "an SAE attached": lambda s: s.model.saes(make_sae(hook=MLP_OUT, seed=2)),
    "a temporary hook": lambda s: s.model.hooks([("blocks.0.hook_mlp_out", lambda value, hook: value * 0)]),
    "a permanent hook": lambda s: permanent(s.model, "blocks.0.hook_mlp_out"),
    "a torch hook": lambda s: torch_hook(s.model, "register_forward_hook"),
    "a torch pre-hook": lambda s: torch_hook(s.model, "register_forward_pre_hook"),
    "a backward hook": lambda s: torch_hook(s.model, "register_full_backward_hook"),
    "heads with copies": lambda s: copies(s.model),
}


@pytest.mark.parametrize("alteration", ALTERED)
def test_what_is_attached_or_hooked_enters_no_measurement(setting: Setting, alteration: str) -> None:
    """One sentence from all of them, and nothing is written."""
    for measure in MEASUREMENTS.values():
        with (
            ALTERED[alteration](setting),
            pytest.raises(AlteredModelError, match=r"by itself, and (an SAE|a hook|use_split)"),
        ):
            measure(setting)
    assert not list(setting.folder.rglob("*.safetensors"))
    require_bare(setting.model)


@pytest.mark.parametrize("name", sorted(MEASUREMENTS.keys() - WITHOUT_SAE))
def test_hooks_on_an_sae_enter_no_measurement(setting: Setting, name: str) -> None:
    """An SAE is a hooked module too: what sits on its features would change them."""
    with permanent(setting.saes["out"], "hook_sae_acts_post"), pytest.raises(AlteredModelError, match="a hook is on"):
        MEASUREMENTS[name](setting)


def test_a_guarded_measurement_runs_again_once_the_model_is_bare(setting: Setting) -> None:
    """Leaving the `with` block, or resetting, is all there is to do; observing afterwards changes nothing."""
    before = setting.decomposer.attribute(TOKENS, 3, -1)
    with setting.model.saes(make_sae(hook=MLP_OUT, seed=2)):
        pass
    setting.model.add_hook("blocks.0.hook_mlp_out", lambda value, hook: value * 0)
    setting.model.reset_hooks()
    setting.model.run_with_cache(TOKENS)
    assert torch.equal(setting.decomposer.attribute(TOKENS, 3, -1).contributions, before.contributions)


def test_a_classifier_is_measured_by_itself_too() -> None:
    model = BilinearClassifier(ClassifierConfig(d_input=6, d_hidden=4, d_output=3))
    images, labels = torch.rand(5, 6), torch.arange(5) % 3
    model.accuracy(images, labels)
    with model.hooks([("hook_embed", lambda value, hook: value * 0)]):
        for measure in (
            lambda: model.accuracy(images, labels),
            lambda: explain(model, images[0]),
            lambda: read_by_last_layer(model, images, space="embedding", homogeneous=False),
        ):
            with pytest.raises(AlteredModelError, match="measures BilinearClassifier by itself, and a hook is on"):
                measure()
