"""Annealing: the model as it was at the start, an ordinary bilinear one at the end, the function that was trained."""

import copy
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from typer.testing import CliRunner

from bilens.cli import app
from bilens.decompose import Decomposer
from bilens.errors import ArgumentError, NotBilinearError, OverwriteError, TrainingError
from bilens.layer.bilinear import BilinearLayer
from bilens.model.loading import load_model
from bilens.model.transformer import ACTIVATIONS, HookedBilinearTransformer
from bilens.train.annealing import (
    SHARES,
    AnnealConfig,
    AnnealedGate,
    AnnealingRun,
    anneal,
    annealable,
    fit_linear,
    folded,
    set_progress,
)
from bilens.train.data import TokenizedTexts
from bilens.train.language_model import TrainConfig, train_lm, validate
from tests.conftest import make_model

pytestmark = pytest.mark.usefixtures("datasets_cache")

GATES = ["silu", "gelu", "relu"]
# 17 steps an epoch on the 432 training texts.
TINY = AnnealConfig(epochs=2, batch_size=8, lr=3e-3, bf16=False, eval_every=12, checkpoint_every=7)


@pytest.fixture(scope="module")
def split(texts: list[str]) -> tuple[list[str], list[str]]:
    """Training and validation texts; every tenth validates."""
    return [text for i, text in enumerate(texts) if i % 10], texts[::10]


@pytest.fixture(scope="module")
def data(split: tuple, tokenizer: Any) -> tuple[TokenizedTexts, TokenizedTexts]:
    """The same as tokens."""
    train, valid = (TokenizedTexts.from_texts(part, tokenizer) for part in split)
    return train, valid


@pytest.fixture(scope="module")
def gated(split: tuple, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> HookedBilinearTransformer:
    """A small SiLU-gated model with norms, trained for a moment."""
    folder = tmp_path_factory.mktemp("gated")
    tokenizer.save_pretrained(folder / "tokenizer")
    (folder / "texts.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in split[0]))
    config = TrainConfig(
        d_model=16, n_layer=2, n_head=2, d_hidden=32, n_ctx=32, batch_size=8, gate="silu", epochs=3, lr=1e-2, bf16=False
    )
    return train_lm(folder / "texts.jsonl", folder / "model", config, tokenizer=folder / "tokenizer").model


def batches(model: HookedBilinearTransformer, seed: int = 0) -> list[Tensor]:
    """Two batches of random tokens."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(model.cfg.d_vocab, (3, 20), generator=generator) for _ in range(2)]


# --- the two ends -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gate", GATES)
@given(z=st.floats(-30, 30), s=st.floats(-3, 3))
def test_a_gate_goes_from_itself_to_a_multiple(gate: str, z: float, s: float) -> None:
    """At t = 0 the gate, whatever `s`; at t = 1 `s z / 2`; in between never farther from zero than both together."""
    module = AnnealedGate(gate, torch.tensor([s], dtype=torch.float64))
    x = torch.tensor([z], dtype=torch.float64)
    # float64 rounding of a product of three factors of size 30.
    torch.testing.assert_close(module(x), ACTIVATIONS[gate](x), atol=1e-12, rtol=1e-9)
    module.t = 1.0
    torch.testing.assert_close(module(x), s * x / 2, atol=1e-12, rtol=1e-9)
    module.t = 0.5
    assert module(x).abs() <= (0.5 + abs(s) / 2) * x.abs() + 1e-9


@pytest.mark.parametrize("gate", [*GATES, None])
@pytest.mark.parametrize("normalization", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_both_ends_are_ordinary_models(gate: str | None, normalization: bool, bias: bool) -> None:
    """The start is the model itself; the end is the folded checkpoint, which is bilinear; the model is left alone."""
    if gate is None and not normalization:
        return
    model = make_model(gate=gate, bias=bias)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    tokens = batches(model, 1)[0]
    expected = model(tokens)
    annealed = annealable(model, batches(model), normalization=normalization)
    # The same operations in another order, on logits of size one to ten.
    torch.testing.assert_close(annealed(tokens), expected, atol=1e-5, rtol=1e-5)
    set_progress(annealed, 1.0)
    end = folded(annealed)
    # Without norms float32 streams reach hundreds, and rounding with them.
    torch.testing.assert_close(end(tokens), annealed(tokens), atol=1e-3, rtol=1e-4)
    assert end.cfg.is_bilinear
    assert (end.cfg.normalization_type is None) == normalization
    assert end.cfg.published["gate"] is None
    BilinearLayer.of(end, 0)
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())
    assert model.cfg.gate == gate


def test_folding_does_not_depend_on_t() -> None:
    """The folded model is that of t = 1 wherever the annealed one stands."""
    model = make_model(gate="gelu")
    annealed = annealable(model, batches(model), normalization=True)
    start = folded(annealed)
    set_progress(annealed, 0.7)
    for a, b in zip(start.parameters(), folded(annealed).parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("gate", GATES)
def test_the_fits_are_least_squares(gate: str) -> None:
    """Against torch's least squares, unit by unit; and any other `c` leaves more of the normalised stream."""
    model = make_model(gate=gate)
    tokens = batches(model)
    fits = fit_linear(model, tokens)
    caches = [model.run_with_cache(batch)[1] for batch in tokens]
    for layer in range(model.cfg.n_layers):
        z = torch.cat([cache["pre", layer].flatten(0, 1) for cache in caches]).double()
        for unit in (0, 5):
            wanted = torch.linalg.lstsq(z[:, [unit]] / 2, ACTIVATIONS[gate](z[:, [unit]])).solution.item()
            assert fits.gates[layer][unit].item() == pytest.approx(wanted, rel=1e-5)
    x = torch.cat([cache["resid_mid", 1].flatten(0, 1) for cache in caches]).double()
    normed = F.rms_norm(x, x.shape[-1:], eps=1e-8)
    wanted = torch.linalg.lstsq(x.reshape(-1, 1), normed.reshape(-1, 1)).solution.item()
    assert fits.norms["blocks.1.ln2"] == pytest.approx(wanted, rel=1e-5)


def test_norms_keep_their_hooks() -> None:
    """`hook_normalized` is `resid / hook_scale` at every t, under the names it had."""
    model = make_model(gate="silu")
    annealed = annealable(model, batches(model), normalization=True)
    for t in (0.0, 0.4, 1.0):
        set_progress(annealed, t)
        _, cache = annealed.run_with_cache(batches(model)[0])
        found = cache["blocks.1.ln2.hook_normalized"]
        torch.testing.assert_close(found, cache["blocks.1.hook_resid_mid"] / cache["blocks.1.ln2.hook_scale"])


# --- the run ----------------------------------------------------------------------------------------------------------


def test_annealing_a_trained_model(gated: HookedBilinearTransformer, split: tuple, tmp_path: Path) -> None:
    """What it writes is bilinear and loads; it is better than replacing at once and no worse than the gate by much."""
    train, valid = split
    result = anneal(gated, train, tmp_path, TINY, valid=valid, scratch=gated)
    loaded = load_model(tmp_path)
    assert loaded.cfg.is_bilinear
    Decomposer(loaded, layer=1)
    held_out = TokenizedTexts.from_texts(valid, gated.tokenizer)
    assert validate(loaded, held_out).nats_per_token == pytest.approx(result.after.nats_per_token, abs=1e-5)
    assert result.after.nats_per_token < result.at_once.nats_per_token
    # The gated model was stopped early, so that training on makes up for what the gate was worth.
    assert result.after.nats_per_token < result.before.nats_per_token + 0.05
    # The last step's own validation is of the model before folding: the same function.
    assert result.validations[-1].nats_per_token == pytest.approx(result.after.nats_per_token, abs=1e-4)
    assert [v.step for v in result.validations] == [12, 24, 34]
    assert result.scratch == result.before
    assert list(result.to_frame()["stage"]) == ["before", "replaced at once", "annealed", "from scratch"]
    assert result.plot().data
    assert "annealed" in str(result)
    facts = json.loads((tmp_path / "annealing.json").read_text())
    assert facts["stages"]["annealed"]["nats_per_token"] == result.after.nats_per_token
    assert not list(tmp_path.glob("*checkpoint*"))


def test_annealing_norms(gated: HookedBilinearTransformer, split: tuple, tmp_path: Path) -> None:
    """Gate and norms together: the checkpoint has neither, and is worth more than the word frequencies."""
    config = replace(TINY, normalization=True)
    result = anneal(gated, split[0], tmp_path, config, valid=split[1])
    published = json.loads((tmp_path / "config.json").read_text())
    assert published["gate"] is None
    assert published["normalization"] is False
    assert result.after.nats_per_token < result.before.nats_per_token + 0.3
    assert result.scratch is None


def test_another_model_reads_the_texts_with_its_own_tokenizer(
    gated: HookedBilinearTransformer, split: tuple, tmp_path: Path
) -> None:
    other = load_model()
    result = anneal(gated, split[0], tmp_path, replace(TINY, epochs=0.1), valid=split[1], scratch=other)
    assert result.scratch == validate(other, TokenizedTexts.from_texts(split[1], other.tokenizer))


def test_the_scales_are_trained_and_progress_reaches_one(gated: HookedBilinearTransformer, data: tuple) -> None:
    run = AnnealingRun(gated, *data, TINY)
    start = [block.mlp.act.scale.clone() for block in run.model.blocks]
    run.fit()
    assert all((block.mlp.act.scale != s).any() for block, s in zip(run.model.blocks, start, strict=True))
    assert {block.mlp.act.t for block in run.model.blocks} == {1.0}
    assert [run.progress(step) for step in (0, 17, 34)] == [0.0, 1.0, 1.0]


def test_a_resumed_run_is_the_same_run(gated: HookedBilinearTransformer, data: tuple, tmp_path: Path) -> None:
    """Killed between checkpoints, and within the ramp: the same bits as one that was not."""
    whole = AnnealingRun(gated, *data, TINY)
    whole.fit()
    first = AnnealingRun(gated, *data, TINY, tmp_path / "checkpoint.safetensors")
    take = first._take_step

    def take_or_stop(batch: Tensor) -> Tensor:
        if first.step == 10:
            raise RuntimeError("killed")
        return take(batch)

    first._take_step = take_or_stop
    with pytest.raises(RuntimeError, match="killed"):
        first.fit()
    second = AnnealingRun(gated, *data, TINY, tmp_path / "checkpoint.safetensors")
    assert second.fit() == whole.validations
    for a, b in zip(second.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(TrainingError, match=r"ramp.*0\.5"):
        AnnealingRun(gated, *data, replace(TINY, ramp=1.0), tmp_path / "checkpoint.safetensors").fit()
    other = copy.deepcopy(gated)
    with torch.no_grad():
        other.embed.W_E[0, 0] += 1
    with pytest.raises(TrainingError, match=r"of another run.*source"):
        AnnealingRun(other, *data, TINY, tmp_path / "checkpoint.safetensors").fit()


def test_the_command(gated: HookedBilinearTransformer, split: tuple, tmp_path: Path) -> None:
    """`bilens anneal` writes the model and prints the losses."""
    gated.save_pretrained(tmp_path / "gated")
    for name, texts in (("train", split[0]), ("valid", split[1])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    arguments = [
        *(
            "anneal",
            tmp_path / "gated",
            tmp_path / "train.jsonl",
            tmp_path / "out",
            "--valid",
            tmp_path / "valid.jsonl",
        ),
        *("--epochs", "0.2", "--batch-size", "8", "--scratch", tmp_path / "gated", "--no-bf16"),
    ]
    shown = CliRunner().invoke(app, list(map(str, arguments)))
    assert shown.exit_code == 0, shown.output
    assert "annealed" in shown.output
    assert "from scratch" in shown.output
    assert load_model(tmp_path / "out").cfg.is_bilinear
    again = CliRunner().invoke(app, list(map(str, arguments)))
    assert again.exit_code == 0
    assert again.output.strip() == shown.output[shown.output.rindex("before ") :].strip()  # read back, not measured
    refused = CliRunner().invoke(app, [*map(str, arguments), "--lr", "0.5"])
    assert isinstance(refused.exception, OverwriteError)
    assert "lr (0.001 there, 0.5 here)" in str(refused.exception)
    with pytest.raises(ArgumentError, match="gated', the folder of the model to anneal"):
        anneal(tmp_path / "gated", split[0], tmp_path / "gated")


# --- bad input --------------------------------------------------------------------------------------------------------


def test_what_cannot_be_annealed_is_refused(tmp_path: Path, tokenizer: Any, split: tuple) -> None:
    """By name, and before anything is read or written."""
    with pytest.raises(ArgumentError, match=r"no gate.*bilinear already; AnnealConfig\(normalization=True\)"):
        anneal(make_model(tokenizer=tokenizer), split[0], tmp_path / "out")
    with pytest.raises(ArgumentError, match=r"no gate: it is bilinear already\.$"):
        anneal(make_model(tokenizer=tokenizer, normalization=False), split[0], tmp_path / "out")
    unnormalized = make_model(tokenizer=tokenizer, normalization=False, gate="silu")
    with pytest.raises(ArgumentError, match="no norms to anneal"):
        anneal(unnormalized, split[0], tmp_path / "out", AnnealConfig(normalization=True))
    with pytest.raises(NotBilinearError, match="one-branch"):
        anneal(make_model(tokenizer=tokenizer, bilinear=False, gate="relu"), split[0], tmp_path / "out")
    with pytest.raises(TrainingError, match="no tokenizer"):
        anneal(make_model(gate="silu"), split[0], tmp_path / "out")
    with pytest.raises(TrainingError, match="no tokenizer"):
        anneal(make_model(gate="silu", tokenizer=tokenizer), split[0], tmp_path / "out", scratch=make_model())
    with pytest.raises(TrainingError, match="at least two"):
        anneal(make_model(gate="silu", tokenizer=tokenizer), ["one text"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"ramp": 0}, "ramp is 0, expected a share of the steps"),
        ({"ramp": 1.5}, "ramp is 1.5"),
        ({"lr": math.nan}, "lr is nan, expected a number above 0"),
        ({"epochs": 0}, "epochs is 0"),
        ({"batch_size": -1}, "batch_size is -1"),
        ({"batch_size": 2.5}, r"batch_size is 2\.5, expected a positive whole number"),
        ({"warmup": 1.0}, r"warmup is 1\.0, expected a share of the steps"),
        ({"weight_decay": -0.1}, r"weight_decay is -0\.1, expected 0 or more"),
    ],
)
def test_config_refuses(wrong: dict, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        AnnealConfig(**wrong)


def test_every_gate_has_a_way() -> None:
    """A gate that the model learns to know is not forgotten here."""
    assert set(SHARES) == {gate for gate in ACTIVATIONS if gate is not None}


@pytest.mark.parametrize("gate", GATES)
def test_gates_train_in_half_precision(gate: str) -> None:
    """Under autocast a gate gives what it gives in float32, to bfloat16's three digits, and passes gradients back."""
    module = AnnealedGate(gate, torch.ones(4))
    module.t = 0.3
    z = torch.linspace(-4, 4, 12).view(3, 4).requires_grad_()
    half = module(z.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), module(z.detach()), atol=0.02, rtol=0.02)
    half.sum().backward()
    assert z.grad is not None
    assert module.scale.grad is not None
    assert module.scale.grad.isfinite().all()
