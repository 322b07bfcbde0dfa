"""Fine-tuning brings the spliced model nearer to the model, keeps the SAE's form, and resumes bit for bit."""

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bilens.errors import ArgumentError, OverwriteError, SAEMismatchError, TrainingError
from bilens.model.transformer import HookedBilinearTransformer
from bilens.sae import evaluate_saes, load_sae
from bilens.sae.loading import load_sae_folder
from bilens.sae.train.finetuning import CHECKPOINT_FILE, FinetuneConfig, FinetuneRun, finetune_saes
from bilens.sae.train.training import SAETrainConfig, train_saes
from bilens.train.data import TokenizedTexts
from tests.conftest import make_model

pytestmark = pytest.mark.usefixtures("datasets_cache")

HOOK, NAME = "blocks.0.hook_mlp_out", "0-mlp-out-x2-k4"
TINY = FinetuneConfig(tokens=24 * 2 * 32, batch_size=2, lr=1e-2, bf16=False, checkpoint_every=5)


@pytest.fixture(scope="module")
def trained(tokenizer: Any, texts: list[str], tmp_path_factory: Any) -> Path:
    """A folder with one SAE of a few steps."""
    out = tmp_path_factory.mktemp("saes")
    config = SAETrainConfig(expansion=2, k=4, tokens=2048, batch_size=64, bf16=False)
    train_saes(make_model(tokenizer=tokenizer), texts, out, config, hooks=[HOOK])
    return out


@pytest.fixture
def sae(trained: Path) -> Any:
    return load_sae_folder(trained / NAME, device="cpu")


def new_run(model: HookedBilinearTransformer, sae: Any, texts: list[str], path: Path, **changes: Any) -> FinetuneRun:
    pieces = TokenizedTexts.from_texts(texts, model.tokenizer).pieces(model.cfg.n_ctx)
    return FinetuneRun(model, sae, pieces, replace(TINY, **changes), path)


def test_the_spliced_model_loses_less(
    text_model: HookedBilinearTransformer, texts: list[str], trained: Path, sae: Any, tmp_path: Path
) -> None:
    """Loss recovered rises; decoder norms, hook and k stay; what is on disk is what was returned, in half precision."""
    before = evaluate_saes(text_model, {"sae": sae}, texts[:50]).scores[0]
    norms = sae.W_dec.detach().norm(dim=-1).clone()
    weights = {name: weight.clone() for name, weight in text_model.state_dict().items()}
    tuned = finetune_saes(text_model, {NAME: sae}, texts, tmp_path, TINY)[NAME]
    after = evaluate_saes(text_model, {"sae": tuned}, texts[:50]).scores[0]
    assert abs(1 - after.loss_recovered) < abs(1 - before.loss_recovered)
    # Renormalised at every step: rounding of float32 alone.
    torch.testing.assert_close(tuned.W_dec.norm(dim=-1), norms, rtol=1e-5, atol=0)
    assert all(torch.equal(weights[name], weight) for name, weight in text_model.state_dict().items())
    assert all(weight.requires_grad for weight in text_model.parameters())
    loaded = load_sae(tmp_path, "mlp-out", 0)
    assert (loaded.cfg.k, loaded.cfg.metadata.hook_name) == (4, HOOK)
    assert loaded.cfg.metadata.finetuning["tokens"] == TINY.tokens
    torch.testing.assert_close(loaded.W_enc, tuned.W_enc.half().float(), rtol=0, atol=0)
    assert [path.name for path in (tmp_path / NAME).iterdir() if "safetensors" in path.name] == [
        "sae_weights.safetensors"
    ]


@pytest.mark.parametrize("step", [1, 5, 12, 17])
def test_a_killed_run_resumes_bit_for_bit(
    text_model: HookedBilinearTransformer, texts: list[str], trained: Path, tmp_path: Path, step: int
) -> None:
    """Interrupted at any step, in the first epoch over the texts or a later one, it ends in the same weights."""
    texts = texts[:40]  # several epochs

    def fresh() -> Any:
        return load_sae_folder(trained / NAME, device="cpu")

    whole = new_run(text_model, fresh(), texts, tmp_path / "whole.safetensors")
    whole.fit()
    stopped = new_run(text_model, fresh(), texts, tmp_path / "run.safetensors")
    take = stopped._take_step

    def take_until(tokens: Any) -> float:
        if stopped.step == step:
            raise KeyboardInterrupt
        return take(tokens)

    stopped._take_step = take_until  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        stopped.fit()
    resumed = new_run(text_model, fresh(), texts, tmp_path / "run.safetensors")
    resumed.fit()
    assert resumed.step == whole.n_steps
    for name, weight in whole.sae.state_dict().items():
        assert torch.equal(weight, resumed.sae.state_dict()[name]), name


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_in_place_and_again(
    text_model: HookedBilinearTransformer, texts: list[str], trained: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    """Tuned where it was loaded from; the same call again gives what is there; other arguments are refused."""
    shutil.copytree(trained / NAME, tmp_path / NAME)

    def tune(config: FinetuneConfig = TINY, data: Any = texts, **options: Any) -> Any:
        return finetune_saes(text_model, {NAME: load_sae_folder(tmp_path / NAME)}, data, tmp_path, config, **options)

    tune()
    before = files(tmp_path / NAME)
    with monkeypatch.context() as patch:
        patch.setattr(FinetuneRun, "_take_step", lambda *args: pytest.fail("took a step"))
        found = tune(overwrite=True)[NAME]
        assert found.cfg.metadata.finetuning["tokens"] == TINY.tokens
        # The untuned one, given again: it becomes what is on disk.
        from_start = finetune_saes(text_model, {NAME: load_sae_folder(trained / NAME)}, texts, tmp_path, TINY)[NAME]
        assert torch.equal(from_start.W_enc, found.W_enc)
    wrong: dict[str, Any]
    for wrong, says in (
        ({"config": replace(TINY, lr=0.5)}, r"fine-tuned already.*lr \(0.01 there, 0.5 here\)"),
        ({"data": texts[1:]}, "fine-tuned already.*the texts"),
    ):
        with pytest.raises(OverwriteError, match=says):
            tune(**wrong)
    assert files(tmp_path / NAME) == before
    tune(replace(TINY, lr=1e-3), overwrite=True)
    assert load_sae_folder(tmp_path / NAME).cfg.metadata.finetuning["lr"] == 1e-3


def test_other_saes_are_not_replaced(
    text_model: HookedBilinearTransformer, texts: list[str], trained: Path, sae: Any, tmp_path: Path
) -> None:
    """Another SAE in the folder, or the checkpoint of another run; names that lead elsewhere."""
    shutil.copytree(trained / NAME, tmp_path / NAME)
    with torch.no_grad():
        sae.W_enc.mul_(2)
    before = files(tmp_path / NAME)
    with pytest.raises(OverwriteError, match=f"{NAME} is another SAE than the one given"):
        finetune_saes(text_model, {NAME: sae}, texts, tmp_path, TINY)
    new_run(text_model, sae, texts[1:], tmp_path / NAME / CHECKPOINT_FILE)._save()
    with pytest.raises(OverwriteError, match=rf"the checkpoint of {NAME} differs in n_tokens"):
        finetune_saes(text_model, {NAME: sae}, texts, tmp_path, TINY)
    (tmp_path / NAME / CHECKPOINT_FILE).unlink()
    assert files(tmp_path / NAME) == before
    for name in ("..", "", "a/b", "\0", 3):
        with pytest.raises(ArgumentError, match="name is "):
            finetune_saes(text_model, {name: sae}, texts, tmp_path, TINY)  # type: ignore[dict-item]
    with pytest.raises(ArgumentError, match="expected SAEs by the names"):
        finetune_saes(text_model, [sae], texts, tmp_path, TINY)  # type: ignore[arg-type]


@pytest.mark.parametrize("killed_before", ["cfg.json", CHECKPOINT_FILE])
def test_a_kill_while_the_result_is_written(
    text_model: HookedBilinearTransformer,
    texts: list[str],
    trained: Path,
    tmp_path: Path,
    monkeypatch: Any,
    killed_before: str,
) -> None:
    """Weights replaced and the configuration not yet, in the folder the SAE comes from: the same files in the end."""
    for name in ("whole", "killed"):
        shutil.copytree(trained / NAME, tmp_path / name / NAME)

    def tune(name: str) -> None:
        folder = tmp_path / name
        finetune_saes(text_model, {NAME: load_sae_folder(folder / NAME)}, texts, folder, TINY)

    tune("whole")

    class Killed(BaseException):
        pass

    replacing, unlinking = os.replace, Path.unlink

    def replace_or_die(source: Any, target: Any) -> None:
        if Path(target).name == killed_before:
            raise Killed
        replacing(source, target)

    def unlink_or_die(path: Path, missing_ok: bool = False) -> None:
        if path.name == killed_before:
            raise Killed
        unlinking(path, missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", unlink_or_die)
        if killed_before != CHECKPOINT_FILE:
            patch.setattr(os, "replace", replace_or_die)
        with pytest.raises(Killed):
            tune("killed")
    assert (tmp_path / "killed" / NAME / CHECKPOINT_FILE).exists()
    tune("killed")
    assert files(tmp_path / "killed" / NAME) == files(tmp_path / "whole" / NAME)


@pytest.mark.parametrize(
    "wrong",
    [{"tokens": 0}, {"batch_size": 0}, {"lr": float("nan")}, {"lr": -1}, {"seed": -1}, {"bf16": 1}, {"tokens": 1.5}],
)
def test_configurations_that_cannot_be(wrong: dict) -> None:
    with pytest.raises(ArgumentError, match=f"{next(iter(wrong))} is "):
        FinetuneConfig(**wrong)


def test_what_cannot_be_tuned(
    text_model: HookedBilinearTransformer, texts: list[str], sae: Any, tmp_path: Path
) -> None:
    """Another run's checkpoint, an SAE without a place in a block, weights that are no numbers."""
    path = tmp_path / "run.safetensors"
    run = new_run(text_model, sae, texts, path)
    run._save()
    with pytest.raises(TrainingError, match=r"of another run.*'lr': \(0.01, 0.5\)"):
        new_run(text_model, sae, texts, path, lr=0.5).fit()
    with pytest.raises(ArgumentError, match="tokens is 63, fewer than the 64 of one step"):
        new_run(text_model, sae, texts, path, tokens=63)
    path.unlink()
    with torch.no_grad():
        sae.b_dec[0] = torch.nan
    with pytest.raises(TrainingError, match="the loss is nan at step 0"):
        new_run(text_model, sae, texts, path).fit()
    sae.cfg.metadata.hook_name = "hook_embed"
    with pytest.raises(SAEMismatchError, match=r"is on 'hook_embed'.*one of the model's blocks"):
        new_run(text_model, sae, texts, path)
