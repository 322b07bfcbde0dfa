"""SAE training on a tiny model: what comes out is good, loads everywhere, is half precision, and comes out again.

One run (two hooks, 20,000 tokens, a few seconds) is shared by the tests that only look at its result.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from sae_lens import SAE, TopKSAE
from safetensors.torch import load_file

from bilens.errors import HookNameError, SAEMismatchError
from bilens.model import HookedBilinearTransformer
from bilens.sae.evaluation import evaluate_saes
from bilens.sae.loading import list_saes, load_sae
from bilens.sae.training import SAETrainConfig, train_saes
from tests.conftest import make_model

HOOKS = ["blocks.0.ln2.hook_normalized", "blocks.1.hook_mlp_out"]
FOLDERS = ["0-mlp-in-x4-k4", "1-mlp-out-x4-k4"]
CONFIG = SAETrainConfig(expansion=4, k=4, tokens=20_000, batch_size=256, lr=3e-3, bf16=False)


class Run(NamedTuple):
    model: HookedBilinearTransformer
    texts: list[str]
    out: Path
    saes: dict[str, SAE[Any]]


def weights(out: Path) -> dict[str, dict[str, torch.Tensor]]:
    return {folder: load_file(out / folder / "sae_weights.safetensors") for folder in FOLDERS}


@pytest.fixture(scope="module")
def run(tokenizer: Any, texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Run:
    model, out = make_model(tokenizer=tokenizer), tmp_path_factory.mktemp("saes")
    return Run(model, texts, out, train_saes(model, texts[1::2], out, CONFIG, hooks=HOOKS))


def test_one_folder_per_hook(run):
    assert sorted(run.saes) == FOLDERS
    assert [entry.folder for entry in list_saes(run.out)] == FOLDERS
    assert [entry.hook_name for entry in list_saes(run.out)] == HOOKS
    assert sorted(path.name for path in (run.out / FOLDERS[0]).iterdir()) == ["cfg.json", "sae_weights.safetensors"]


def test_they_explain_the_activations(run):
    """Far better than nothing on texts not trained on: the scale estimated in training is folded in, on both hooks."""
    scores = evaluate_saes(run.model, run.saes, run.texts[::8]).scores
    for score in scores:
        assert score.explained_variance > 0.5
        assert 3 < score.l0 <= 4


def test_the_folders_load_as_bilens_and_as_saelens_do(run):
    for folder, hook, (point, layer) in zip(FOLDERS, HOOKS, [("mlp-in", 0), ("mlp-out", 1)], strict=True):
        ours = load_sae(run.out, point, layer, expansion=4, k=4, device="cpu")
        theirs = SAE.load_from_disk(run.out / folder, dtype="float32")
        for sae in (ours, theirs, run.saes[folder]):
            assert isinstance(sae, TopKSAE)
            assert (sae.cfg.d_in, sae.cfg.d_sae, sae.cfg.k) == (16, 64, 4)
            assert sae.cfg.metadata.hook_name == hook
            assert sae.cfg.normalize_activations == "none"  # folded
            assert not sae.cfg.rescale_acts_by_decoder_norm  # folded
            for name, weight in ours.state_dict().items():
                assert torch.equal(sae.state_dict()[name], weight)


def test_half_precision_on_disk(run):
    for folder, tensors in weights(run.out).items():
        assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
        assert all(tensor.isfinite().all() for tensor in tensors.values())
        assert SAE.load_from_disk(run.out / folder).dtype == torch.float16
        assert run.saes[folder].dtype == torch.float32
        for name, tensor in tensors.items():
            assert torch.equal(run.saes[folder].state_dict()[name], tensor.float())  # returned as they are on disk


def test_decoder_norms_are_folded(run):
    for folder, tensors in weights(run.out).items():
        norms = tensors["W_dec"].float().norm(dim=-1)
        # One, times the scale of the activations that is folded in after it: the same for all features.
        assert (norms / norms.mean() - 1).abs().max() < 5e-3, folder  # float16 has three digits


def test_what_was_run_is_written_down(run):
    for sae in run.saes.values():
        assert SAETrainConfig(**sae.cfg.metadata.training) == CONFIG
        assert sae.cfg.metadata.model_name == run.model.cfg.model_name


def test_the_same_seed_gives_the_same_saes(run, tmp_path):
    """To the bit; whatever torch's generator was before."""
    torch.manual_seed(12345)
    again = train_saes(run.model, run.texts[1::2], tmp_path, CONFIG, hooks=HOOKS)
    first, second = weights(run.out), weights(tmp_path)
    for folder in FOLDERS:
        for name, tensor in first[folder].items():
            assert torch.equal(second[folder][name], tensor), (folder, name)
    assert list(again) == list(run.saes)


def test_another_seed_gives_others(run, tmp_path):
    config = SAETrainConfig(expansion=4, k=4, tokens=2_560, batch_size=256, lr=3e-3, bf16=False, seed=1)
    short = train_saes(run.model, run.texts, tmp_path, config, hooks=HOOKS[:1])[FOLDERS[0]]
    assert not torch.allclose(short.W_enc, run.saes[FOLDERS[0]].W_enc, atol=1e-2)


def test_data_from_a_file_and_the_default_hooks(run, tmp_path):
    """As the command calls it: a jsonl file, both sides of every MLP, bfloat16."""
    file = tmp_path / "stories.jsonl"
    file.write_text("".join(json.dumps({"story": text}) + "\n" for text in run.texts))
    config = SAETrainConfig(expansion=2, k=3, tokens=2_560, batch_size=256)
    saes = train_saes(run.model, file, tmp_path / "saes", config, column="story")
    assert list(saes) == ["0-mlp-in-x2-k3", "0-mlp-out-x2-k3", "1-mlp-in-x2-k3", "1-mlp-out-x2-k3"]
    assert [entry.folder for entry in list_saes(tmp_path / "saes")] == list(saes)
    for sae in saes.values():
        assert all(weight.isfinite().all() for weight in sae.parameters())


def test_the_model_is_left_as_it_was(run):
    fresh = make_model(tokenizer=run.model.tokenizer)
    for (name, weight), other in zip(run.model.named_parameters(), fresh.parameters(), strict=True):
        assert torch.equal(weight, other), name
    assert not any(point.fwd_hooks for point in run.model.hook_dict.values())


@pytest.mark.parametrize(
    ("hook", "error", "message"),
    [
        ("blocks.0.hook_mlp_uot", HookNameError, "no hook 'blocks.0.hook_mlp_uot'.*'blocks.0.hook_mlp_out'"),
        ("blocks.2.hook_mlp_out", HookNameError, "no hook 'blocks.2.hook_mlp_out'"),
        ("blocks.0.mlp.hook_post", SAEMismatchError, "'blocks.0.mlp.hook_post' has no published point"),
    ],
)
def test_a_hook_that_cannot_be(run, tmp_path, hook, error, message):
    with pytest.raises(error, match=message):
        train_saes(run.model, run.texts, tmp_path, CONFIG, hooks=[HOOKS[0], hook])
    assert not list(tmp_path.iterdir())
