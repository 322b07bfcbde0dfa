"""Training: it learns, it resumes bit for bit, it refuses what cannot go on; validation counts what it says."""

import json
import math
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from bilens._core import checkpoint as checkpoint_module
from bilens._core.folders import alone_in
from bilens.errors import ArgumentError, OverwriteError, TrainingError, WriteError
from bilens.model.config import config_from_published
from bilens.model.loading import load_model
from bilens.model.transformer import HookedBilinearTransformer
from bilens.train import language_model as training
from bilens.train.data import TokenizedTexts
from bilens.train.language_model import TrainConfig, TrainingResult, TrainingRun, Validation, train_lm, validate
from tests.conftest import make_model

pytestmark = pytest.mark.usefixtures("datasets_cache")

# 18 steps an epoch on the 432 training texts; 54 in all.
TINY = TrainConfig(
    d_model=16,
    n_layer=1,
    n_head=2,
    d_hidden=32,
    n_ctx=32,
    batch_size=8,
    epochs=3,
    lr=1e-2,
    bf16=False,
    eval_every=10,
    checkpoint_every=6,
)


class Killed(Exception):
    """Stands for whatever ends a process without asking."""


@pytest.fixture(scope="module")
def data(texts: list[str], tokenizer: Any) -> tuple[TokenizedTexts, TokenizedTexts]:
    """Training and validation texts as tokens; every tenth text validates."""
    train = [text for i, text in enumerate(texts) if i % 10]
    return TokenizedTexts.from_texts(train, tokenizer), TokenizedTexts.from_texts(texts[::10], tokenizer)


def new_run(
    data: tuple, tokenizer: Any, config: TrainConfig = TINY, seed: int = 0, checkpoint: Path | None = None
) -> Any:
    """A run from the start, its model's weights drawn with `seed`."""
    cfg = config_from_published(config.published(None), len(tokenizer))
    return TrainingRun(HookedBilinearTransformer(cfg, tokenizer, seed=seed), *data, config, checkpoint)


def stop_at(run: TrainingRun, step: int, error: BaseException) -> None:
    """Let `run` raise `error` in place of taking the step after `step` of them."""
    take = run._take_step

    def take_or_stop(batch: Tensor) -> Tensor:
        if run.step == step:
            raise error
        return take(batch)

    run._take_step = take_or_stop


def assert_same_weights(one: HookedBilinearTransformer, other: HookedBilinearTransformer) -> None:
    for (name, a), b in zip(one.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.fixture(scope="module")
def finished(data: tuple, tokenizer: Any) -> TrainingRun:
    """An uninterrupted run of `TINY`."""
    run = new_run(data, tokenizer)
    run.fit()
    return run


@pytest.mark.parametrize("attention", ["bilinear", "quadratic"])
def test_a_polynomial_learns(data: tuple, tokenizer: Any, attention: str) -> None:
    """Without softmax and norms, from the same initial weights, the loss falls from that of chance, log(d_vocab)."""
    run = new_run(data, tokenizer, replace(TINY, attention=attention, normalization=False, d_head=6))
    first = validate(run.model, data[1]).nats_per_token
    run.fit()
    assert abs(first - math.log(len(tokenizer))) < 0.1
    assert run.validations[-1].nats_per_token < 0.75 * first
    assert run.model.cfg.attention == attention
    assert run.model.cfg.normalization_type is None


# --- it learns --------------------------------------------------------------------------------------------------------


def test_the_loss_falls_below_the_word_frequencies(finished: TrainingRun, data: tuple, tokenizer: Any) -> None:
    """It starts at ln(vocabulary) and ends where only the context can bring it: below the unigram entropy."""
    losses = [v.nats_per_token for v in finished.validations]
    assert [v.step for v in finished.validations] == [10, 20, 30, 40, 50, 54]
    start = validate(new_run(data, tokenizer).model, data[1])
    assert start.nats_per_token == pytest.approx(math.log(len(tokenizer)), abs=0.05)
    counts = Counter(token for row in data[1].rows for token in row)
    unigram = -sum(n / counts.total() * math.log(n / counts.total()) for n in counts.values())
    assert losses[-1] < unigram - 0.5
    assert losses == sorted(losses, reverse=True)
    assert all(weight.isfinite().all() for weight in finished.model.parameters())


@pytest.mark.parametrize(
    "variant",
    [{"bias": True}, {"gate": "silu"}, {"bilinear": False, "gate": "relu"}, {"normalization": False}, {"bf16": True}],
)
def test_every_variant_learns(data: tuple, tokenizer: Any, variant: dict) -> None:
    """Half an epoch lowers every variant's loss (least without norms: the stream starts tiny), moves every weight."""
    run = new_run(data, tokenizer, replace(TINY, epochs=0.5, **variant))
    before = validate(run.model, run.valid)
    start = [weight.clone() for weight in run.model.parameters()]
    (after,) = (v for v in run.fit() if v.step == run.n_steps)
    assert after.nats_per_token < before.nats_per_token - 0.02
    assert all(weight.dtype == torch.float32 for weight in run.model.parameters())
    for (name, weight), old in zip(run.model.named_parameters(), start, strict=True):
        assert (weight != old).any(), name


def test_the_same_seed_is_the_same_run(finished: TrainingRun, data: tuple, tokenizer: Any) -> None:
    """Nothing but data, config and seed decides: the same bits again, whatever torch's own generator does."""
    torch.manual_seed(99)
    again = new_run(data, tokenizer)
    assert again.fit() == finished.validations
    assert_same_weights(again.model, finished.model)
    other = new_run(data, tokenizer, replace(TINY, seed=1, epochs=0.2))
    same_start = new_run(data, tokenizer, replace(TINY, epochs=0.2))
    other.fit()
    same_start.fit()
    assert not torch.equal(other.model.W_E, same_start.model.W_E)  # the order differs, the initial weights do not


def test_every_step_sees_full_rows_of_its_own_epochs_packing(data: tuple, tokenizer: Any) -> None:
    """Batches are whole, start with [BOS], and are packed anew in every epoch."""
    run = new_run(data, tokenizer)
    seen = []
    for batch in run._batches():
        assert batch.shape == (TINY.batch_size, TINY.n_ctx)
        assert (batch[:, 0] == tokenizer.bos_token_id).all()
        seen.append(batch)
        run.step += 1
    assert len(seen) == run.n_steps == 3 * run.steps_per_epoch == 54
    assert not torch.equal(seen[0], seen[run.steps_per_epoch])


@given(warmup=st.floats(0, 1), epochs=st.floats(0.05, 5))
def test_learning_rate(data: tuple, tokenizer: Any, warmup: float, epochs: float) -> None:
    """It rises linearly to the peak, then falls linearly, is never zero in a step and would be zero after the last."""
    run = new_run(data, tokenizer, replace(TINY, warmup=warmup, epochs=epochs))
    rates = [run.learning_rate(step) for step in range(run.n_steps)]
    warm = max(1, round(warmup * run.n_steps))
    assert max(rates) <= TINY.lr * (1 + 1e-12)
    assert all(rate > 0 for rate in rates)
    assert run.learning_rate(run.n_steps) == 0
    assert rates[: warm - 1] == sorted(rates[: warm - 1])
    assert rates[warm:] == sorted(rates[warm:], reverse=True)
    if warm < run.n_steps:
        assert rates[warm - 1] == pytest.approx(TINY.lr)
        falls = [a - b for a, b in zip(rates[warm:], rates[warm + 1 :], strict=False)]
        assert falls == pytest.approx([TINY.lr / (run.n_steps - warm)] * len(falls))


# --- validation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_ctx", [32, 7])
def test_validate_is_the_per_story_computation(tokenizer: Any, texts: list[str], n_ctx: int) -> None:
    """Summed -log p of each story's tokens, [BOS] given, over its characters; a story cut off counts the share kept."""
    model = make_model(tokenizer=tokenizer, n_ctx=n_ctx)
    stories = [*texts[::53], " ".join(texts[:4]), "Mira"]
    total, n_tokens, n_characters = 0.0, 0, 0.0
    for story in stories:
        row = tokenizer.encode(story, add_special_tokens=False)
        tokens = torch.tensor([[tokenizer.bos_token_id, *row][:n_ctx]])
        log_p = model(tokens)[0].log_softmax(-1)
        kept = tokens.shape[1] - 1
        total -= sum(log_p[i, tokens[0, i + 1]].item() for i in range(kept))
        n_tokens += kept
        n_characters += len(story) * kept / len(row)
    whole = TokenizedTexts.from_texts(stories, tokenizer)
    assert max(map(len, whole.rows)) > 32
    for batch_size in (1, 4, 100):
        found = validate(model, whole, step=3, batch_size=batch_size)
        assert found.step == 3
        assert found.nats_per_token == pytest.approx(total / n_tokens, rel=1e-5)
        assert found.nats_per_character == pytest.approx(total / n_characters, rel=1e-5)


def test_a_uniform_model_costs_the_logarithm_of_the_vocabulary(tokenizer: Any, texts: list[str]) -> None:
    """Zero logits: every token costs ln(vocabulary), every character that times tokens per character."""
    model = make_model(tokenizer=tokenizer)
    with torch.no_grad():
        model.unembed.head.weight.zero_()
    tokenized = TokenizedTexts.from_texts(texts[:20], tokenizer)
    found = validate(model, tokenized)
    assert found.nats_per_token == pytest.approx(math.log(len(tokenizer)))
    per_character = sum(map(len, tokenized.rows)) / sum(map(len, texts[:20]))
    assert found.nats_per_character == pytest.approx(math.log(len(tokenizer)) * per_character)


# --- stopping and going on --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [3, 6, 7, 23, 53])
def test_a_killed_run_resumes_bit_for_bit(
    finished: TrainingRun, data: tuple, tokenizer: Any, tmp_path: Path, step: int
) -> None:
    """Killed before, at, or after a checkpoint, in the first epoch or later: resumed, it ends in the same weights."""
    path = tmp_path / "checkpoint.safetensors"
    killed = new_run(data, tokenizer, checkpoint=path)
    stop_at(killed, step, Killed())
    with pytest.raises(Killed):
        killed.fit()
    assert path.exists() == (step >= TINY.checkpoint_every)
    resumed = new_run(data, tokenizer, seed=0 if step < TINY.checkpoint_every else 7, checkpoint=path)
    steps = []
    take = resumed._take_step
    resumed._take_step = lambda batch: (steps.append(resumed.step), take(batch))[1]
    assert resumed.fit() == finished.validations
    assert steps == list(range(step - step % TINY.checkpoint_every, finished.n_steps))
    assert_same_weights(resumed.model, finished.model)


def test_a_keyboard_interrupt_saves_where_it_stopped(
    finished: TrainingRun, data: tuple, tokenizer: Any, tmp_path: Path
) -> None:
    """Ctrl-C is passed on after a checkpoint of the step it came at, between the regular ones; twice is fine."""
    path = tmp_path / "checkpoint.safetensors"
    for step in (0, 9, 25):
        run = new_run(data, tokenizer, checkpoint=path)
        stop_at(run, step, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            run.fit()
        with safe_open(path, framework="pt") as file:
            assert file.metadata()["step"] == str(step)
    resumed = new_run(data, tokenizer, seed=7, checkpoint=path)
    assert resumed.fit() == finished.validations
    assert_same_weights(resumed.model, finished.model)


def test_a_keyboard_interrupt_in_a_validation_loses_no_validation(
    finished: TrainingRun, data: tuple, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step was taken, its validation was not: the resumed run makes up for it, and the history is the same."""
    path = tmp_path / "checkpoint.safetensors"
    stopped = new_run(data, tokenizer, checkpoint=path)

    def interrupted(*args: Any, **kwargs: Any) -> Validation:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training, "validate", interrupted)
        with pytest.raises(KeyboardInterrupt):
            stopped.fit()
    assert stopped.step == finished.validations[0].step
    resumed = new_run(data, tokenizer, seed=7, checkpoint=path)
    assert resumed.fit() == finished.validations


def test_a_finished_run_takes_no_more_steps(finished: TrainingRun, data: tuple, tokenizer: Any, tmp_path: Path) -> None:
    """A checkpoint of the last step gives the finished weights and history at once."""
    path = tmp_path / "checkpoint.safetensors"
    new_run(data, tokenizer, checkpoint=path).fit()
    again = new_run(data, tokenizer, seed=7, checkpoint=path)
    stop_at(again, finished.n_steps, AssertionError("took a step"))
    assert again.fit() == finished.validations
    assert_same_weights(again.model, finished.model)


def test_a_crash_while_saving_keeps_the_checkpoint_before(
    finished: TrainingRun, data: tuple, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk at the second checkpoint leaves the first, from which the run ends as if nothing had been."""
    path = tmp_path / "checkpoint.safetensors"
    save, calls = checkpoint_module.save_file, []

    def full(tensors: dict, beside: Path, **kwargs: Any) -> None:
        calls.append(beside)
        if len(calls) == 2:
            Path(beside).write_bytes(b"half")
            raise OSError("no space left on device")
        save(tensors, beside, **kwargs)

    monkeypatch.setattr(checkpoint_module, "save_file", full)
    with pytest.raises(OSError, match="no space"):
        new_run(data, tokenizer, checkpoint=path).fit()
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    with safe_open(path, framework="pt") as file:
        assert file.metadata()["step"] == "6"
    resumed = new_run(data, tokenizer, checkpoint=path)
    resumed.fit()
    assert_same_weights(resumed.model, finished.model)


def test_another_config_does_not_resume(data: tuple, tokenizer: Any, tmp_path: Path) -> None:
    """What differs is named, with both values; the checkpoint is left as it was."""
    path = tmp_path / "checkpoint.safetensors"
    run = new_run(data, tokenizer, checkpoint=path)
    stop_at(run, 6, Killed())
    with pytest.raises(Killed):
        run.fit()
    before = path.read_bytes()
    other = new_run(data, tokenizer, replace(TINY, lr=0.5, betas=(0.5, 0.6)), checkpoint=path)
    with pytest.raises(TrainingError, match=r"'lr': \(0.01, 0.5\), 'betas'|'betas'.*'lr': \(0.01, 0.5\)"):
        other.fit()
    assert path.read_bytes() == before


# --- what cannot be trained -------------------------------------------------------------------------------------------


def test_a_loss_that_is_no_number_stops_the_run(data: tuple, tokenizer: Any) -> None:
    """NaN is not trained on: TrainingError with the step and the learning rate."""
    run = new_run(data, tokenizer)
    with torch.no_grad():
        run.model.unembed.head.weight[5, 0] = torch.nan
    with pytest.raises(TrainingError, match=r"the loss is nan at step 0; lower the learning rate 0.01"):
        run.fit()
    assert run.model.W_E.isfinite().all()


def test_too_little_text_for_a_batch(data: tuple, tokenizer: Any) -> None:
    """Less than one batch of rows is refused with the sizes."""
    with pytest.raises(TrainingError, match="less than one batch of 500 rows of 32 tokens"):
        new_run(data, tokenizer, replace(TINY, batch_size=500))


# --- train_lm, from a file to a folder --------------------------------------------------------------------------------


def write_texts(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture
def train_small(tmp_path: Path, texts: list[str], tokenizer: Any) -> Callable[..., TrainingResult]:
    """`train_lm` of one epoch, on `texts` and the shared tokenizer, into a folder of that name."""
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    source = write_texts(tmp_path / "train.jsonl", texts)

    def train(name: str, **kwargs: Any) -> TrainingResult:
        kwargs = {"config": replace(TINY, epochs=1), "tokenizer": tmp_path / "tokenizer", "device": "cpu"} | kwargs
        return train_lm(source, tmp_path / name, **kwargs)

    return train


def test_a_trained_folder_is_a_published_model(train_small: Callable, tmp_path: Path, texts: list[str]) -> None:
    """The folder loads, tokenizer included, to the same logits; its config and history are the run's; no checkpoint."""
    config = replace(TINY, epochs=1, bias=True, gate="silu")
    result = train_small("out", config=config)
    folder = tmp_path / "out"
    again = load_model(folder, device="cpu")
    for text in texts[::100]:
        assert torch.equal(again(text), result.model(text))
    assert not result.model.training
    published = json.loads((folder / "config.json").read_text())
    expected = {"n_layer": 1, "n_head": 2, "n_ctx": 32, "d_model": 16, "d_hidden": 32}
    expected |= {"bias": True, "gate": "silu", "bilinear": True, "normalization": True, "repo": "out"}
    assert {key: published[key] for key in expected} == expected
    record = json.loads((folder / "training.json").read_text())
    assert record["config"] == json.loads(json.dumps(asdict(config)))
    assert record["validations"] == [asdict(v) for v in result.validations]
    names = {path.name for path in folder.iterdir()}
    assert names == {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "training.json"}


@pytest.mark.parametrize("variant", [{}, {"bilinear": False, "bias": True}, {"normalization": False, "gate": "relu"}])
def test_the_published_config_of_a_run(variant: dict) -> None:
    """A TrainConfig gives a published config that describes the same model, and keeps the tokenizer's name."""
    published = replace(TINY, **variant).published("ts-4096")
    cfg = config_from_published(published, d_vocab=50)
    described = {"bilinear": cfg.bilinear, "bias": cfg.bias, "gate": cfg.gate}
    described |= {"normalization": cfg.normalization_type is not None}
    assert described == {"bilinear": True, "bias": False, "gate": None, "normalization": True} | variant
    assert (cfg.d_model, cfg.n_layers, cfg.n_heads, cfg.d_mlp, cfg.n_ctx) == (16, 1, 2, 32, 32)
    assert cfg.tokenizer_name == "ts-4096"


def test_train_lm_resumes_bit_for_bit(train_small: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same call again after a kill ends in the folder of a run that was not killed, byte for byte."""
    whole = train_small("whole")
    with monkeypatch.context() as patch:
        take, calls = TrainingRun._take_step, []

        def take_or_die(run: TrainingRun, batch: Tensor) -> Tensor:
            calls.append(1)
            if len(calls) > 14:
                raise Killed
            return take(run, batch)

        patch.setattr(TrainingRun, "_take_step", take_or_die)
        with pytest.raises(Killed):
            train_small("killed")
    assert not (tmp_path / "killed" / "model.safetensors").exists()
    resumed = train_small("killed")
    assert resumed.validations == whole.validations
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "killed"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def same_files(folder: Path, before: dict[str, bytes]) -> bool:
    return {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_finished_run_is_returned_at_once(
    train_small: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same call again takes no step and writes nothing; so it does with `overwrite`."""
    first = train_small("out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    monkeypatch.setattr(TrainingRun, "_take_step", lambda *args: pytest.fail("took a step"))
    for options in ({}, {"overwrite": True}):
        again = train_small("out", **options)
        assert again.validations == first.validations
        assert_same_weights(again.model, first.model)
    assert same_files(tmp_path / "out", before)


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({"config": replace(TINY, epochs=1, lr=0.5)}, r"lr \(0.01 there, 0.5 here\)"),
        ({"dtype": "float16"}, "dtype"),
        ({"valid": ["Mira painted a red kite."]}, "validation_texts"),
        ({"tokenizer": None}, "vocab_size"),
    ],
)
def test_other_work_is_not_replaced(train_small: Callable, tmp_path: Path, other: dict, says: str) -> None:
    """Another configuration, texts, tokenizer or dtype is refused by what differs, and trained with `overwrite`."""
    train_small("out", config=replace(TINY, epochs=1))
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    with pytest.raises(OverwriteError, match=rf"holds other work: .*{says}.*--overwrite"):
        train_small("out", **{"config": replace(TINY, epochs=1)} | other)
    assert same_files(tmp_path / "out", before)


def test_an_unrelated_model_is_not_replaced(train_small: Callable, tmp_path: Path, tokenizer: Any) -> None:
    """A model that was saved there, one that was edited since, both stay until `overwrite`."""
    make_model(tokenizer=tokenizer).save_pretrained(tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    with pytest.raises(OverwriteError, match=r"config.json, model.safetensors.*training.json says nothing of"):
        train_small("out", config=replace(TINY, epochs=0.2))
    assert same_files(tmp_path / "out", before)
    trained = train_small("out", config=replace(TINY, epochs=0.2), overwrite=True).model
    assert load_model(tmp_path / "out").cfg.d_mlp == trained.cfg.d_mlp == TINY.d_hidden
    with torch.no_grad():
        trained.W_E.add_(1)
    trained.save_pretrained(tmp_path / "edited")
    os.replace(tmp_path / "edited" / "model.safetensors", tmp_path / "out" / "model.safetensors")
    with pytest.raises(OverwriteError, match=r"model.safetensors changed since"):
        train_small("out", config=replace(TINY, epochs=0.2))


def test_a_full_disk_in_the_tokenizer_blocks_no_later_run(
    train_small: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half a tokenizer.json is not left behind; it was an empty one that the next run could not read."""
    config = replace(TINY, epochs=0.1)
    with monkeypatch.context() as patch:

        def full(self: Any, folder: str, **kwargs: Any) -> None:
            (Path(folder) / "tokenizer.json").touch()
            raise OSError(28, "No space left on device")

        patch.setattr("transformers.PreTrainedTokenizerFast.save_pretrained", full)
        with pytest.raises(WriteError, match="No space left on device"):
            train_small("out", tokenizer=None, vocab_size=100, config=config)
    assert not (tmp_path / "out" / "tokenizer.json").exists()
    assert train_small("out", tokenizer=None, vocab_size=100, config=config).model.cfg.d_vocab == 100


def test_two_runs_in_one_folder(train_small: Callable, tmp_path: Path) -> None:
    """The second is told that the first is at work."""
    with alone_in(tmp_path / "out"), pytest.raises(WriteError, match="another process is writing to"):
        train_small("out")


def test_train_lm_trains_a_tokenizer_once(
    train_small: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a tokenizer one is trained on the texts, and a resumed run uses that one again."""
    with monkeypatch.context() as patch:
        patch.setattr(TrainingRun, "fit", lambda run: (_ for _ in ()).throw(Killed()))
        with pytest.raises(Killed):
            train_small("out", tokenizer=None, vocab_size=100)
    tokenizer = tmp_path / "out" / "tokenizer.json"
    before = json.loads(tokenizer.read_text())["model"]
    monkeypatch.setattr(training, "train_tokenizer", lambda *args: pytest.fail("trained a second tokenizer"))
    result = train_small("out", tokenizer=None, vocab_size=100)
    assert json.loads(tokenizer.read_text())["model"] == before  # the decoder is Hugging Face's in a finished model
    assert result.model.cfg.d_vocab == 100
    assert load_model(tmp_path / "out").tokenizer.get_vocab() == result.model.tokenizer.get_vocab()


def test_validation_texts(train_small: Callable, tmp_path: Path, texts: list[str]) -> None:
    """Validation texts come from their own file, or are the first 1 % of the training texts, then not trained on."""
    valid = write_texts(tmp_path / "valid.jsonl", texts[7:12])
    config = replace(TINY, epochs=0.1)
    for name, given_file, expected in (("own", valid, texts[7:12]), ("held", None, texts[:4])):
        result = train_small(name, valid=given_file, config=config)
        tokenized = TokenizedTexts.from_texts(expected, result.model.tokenizer)
        assert validate(result.model, tokenized, step=result.validations[-1].step) == result.validations[-1]


def test_one_text_is_not_enough(tmp_path: Path) -> None:
    """With no validation file one text cannot be both."""
    source = write_texts(tmp_path / "one.jsonl", ["just one story."])
    with pytest.raises(TrainingError, match="at least two are needed"):
        train_lm(source, tmp_path / "out", TINY)


def test_a_tokenizer_that_is_not_there(train_small: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tokenizer that is neither a folder nor on the hub is refused by name."""

    def offline(*args: Any) -> None:
        raise OSError("no connection")

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", offline)
    with pytest.raises(TrainingError, match="no tokenizer at ts-4069"):
        train_small("out", tokenizer="ts-4069")


@pytest.mark.parametrize("wrong", [{"dtype": "flaot32"}, {"device": "gpu"}])
def test_a_dtype_or_device_is_refused_before_training(wrong: dict, texts: list[str], tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"'flaot32' is not one of|'gpu' cannot be used here"):
        train_lm(texts, tmp_path / "out", TINY, **wrong)
    assert not (tmp_path / "out").exists()


WRONG: list[dict[str, Any]] = [
    *({"batch_size": value} for value in (0, -1, 2.5, True, "8", None)),
    *({"epochs": value} for value in (-1.0, math.nan, math.inf, 10**400, "1", True)),
    *({"lr": value} for value in (0, -1, math.nan, math.inf)),
    *({"weight_decay": value} for value in (-1, math.nan)),
    *({"seed": value} for value in (-1, 2**32, 1.5, None)),
    *({"warmup": value} for value in (-0.1, 1.1, math.nan)),
    *({"betas": value} for value in ((0.9, 1.0), (0.9,), 0.9, (math.nan, 0.9))),
    *(
        {name: 0}
        for name in ("eval_every", "checkpoint_every", "d_model", "n_layer", "n_head", "d_hidden", "grad_clip")
    ),
    *({"n_ctx": value} for value in (0, 1, -5)),
    *({"bias": value} for value in ("false", 0, None)),
    *({"bf16": "no"}, {"normalization": "false"}, {"bilinear": 1}),
]


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_a_config_that_trains_nothing_is_refused(wrong: dict) -> None:
    with pytest.raises(ArgumentError, match=f"{next(iter(wrong))} is "):
        TrainConfig(**wrong)


def test_an_architecture_that_there_is_none_of() -> None:
    with pytest.raises(ArgumentError, match="d_model 256 is not divisible by n_head 3"):
        TrainConfig(n_head=3)
    with pytest.raises(ArgumentError, match="gate"):
        TrainConfig(gate="swish")


@pytest.mark.parametrize("vocab_size", [-1, 3, 1.5, True])
def test_a_vocabulary_that_is_none(vocab_size: Any, texts: list[str], tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="vocab_size is "):
        train_lm(texts, tmp_path / "out", TINY, vocab_size=vocab_size)
    assert not (tmp_path / "out").exists()


def test_a_model_that_no_machine_holds(train_small: Callable, tmp_path: Path) -> None:
    """It is refused before any of it is allocated."""
    with pytest.raises(ArgumentError, match=r"training this model needs .* GB of memory; this machine has"):
        train_small("out", config=replace(TINY, n_layer=10**9))


def test_results_read_well() -> None:
    """A result prints one line per validation, and is a table with one row each."""
    validations = [Validation(10, 2.5, 0.75), Validation(20, 1.25, 0.5)]
    result = TrainingResult(make_model(), validations)
    assert str(result) == (
        "step 10: 2.5000 nats/token, 0.7500 nats/character\nstep 20: 1.2500 nats/token, 0.5000 nats/character"
    )
    frame = result.to_frame()
    assert list(frame.columns) == ["step", "nats_per_token", "nats_per_character"]
    assert frame["nats_per_character"].tolist() == [0.75, 0.5]
    assert str(TrainingResult(make_model())) == "no validation"
