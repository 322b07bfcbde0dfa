"""Table 6: bilinear, ReGLU and SwiGLU language models of equal size, for equal data and for equal time."""

import time
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from bilens.draw import plots
from bilens.model.config import config_from_published
from bilens.model.transformer import HookedBilinearTransformer
from bilens.reproduce.language_runs import model_and_texts
from bilens.reproduce.reproduction import Made, Settings
from bilens.train.data import TokenizedTexts
from bilens.train.language_model import TrainConfig, TrainingRun

FULL = TrainConfig(
    d_model=128, n_layer=2, n_head=4, d_hidden=512, n_ctx=128, epochs=4, batch_size=8, bf16=False, eval_every=25
)
REDUCED = replace(FULL, d_model=16, n_layer=1, d_hidden=32, n_ctx=32, epochs=1, batch_size=2)
GATES: dict[str, str | None] = {"Bilinear": None, "ReGLU": "relu", "SwiGLU": "silu"}
PAPER = {
    "equal data": {"Bilinear": 1.337, "ReGLU": 1.332, "SwiGLU": 1.321},
    "equal time": {"Bilinear": 1.337, "ReGLU": 1.337, "SwiGLU": 1.336},
}


class Run(NamedTuple):
    """One model trained: its losses on held-out texts in the order of training, seconds of training, parameters."""

    losses: dict[int, float]
    seconds: float
    n_params: int


def trained(train: TokenizedTexts, valid: TokenizedTexts, tokenizer: Any, config: TrainConfig, device: str) -> Run:
    """Train one model. On a CPU its seconds are those of the processor, which other programs do not lengthen."""
    cfg = config_from_published(config.published(None), len(tokenizer), device=device)
    run = TrainingRun(HookedBilinearTransformer(cfg, tokenizer, seed=config.seed), train, valid, config)
    clock = time.process_time if torch.device(device).type == "cpu" else time.perf_counter
    start = clock()
    validations = run.fit()
    seconds = clock() - start
    n_params = sum(weight.numel() for weight in run.model.parameters())
    return Run({each.step: each.nats_per_token for each in validations}, seconds, n_params)


def activation_functions(settings: Settings) -> Made:
    """Table 6."""
    model, texts = model_and_texts(settings)
    held = max(1, len(texts) // 10)
    valid, train = (TokenizedTexts.from_texts(part, model.tokenizer) for part in (texts[:held], texts[held:]))
    config = replace(REDUCED if settings.reduced else FULL, seed=settings.seed)

    def run(name: str, epochs: float) -> Run:
        given = replace(config, gate=GATES[name], epochs=epochs)
        return trained(train, valid, model.tokenizer, given, str(model.cfg.device))

    equal_data = {name: run(name, config.epochs) for name in GATES}
    budget = equal_data["Bilinear"].seconds
    equal_time = {
        name: found if name == "Bilinear" else run(name, config.epochs * budget / found.seconds)
        for name, found in equal_data.items()
    }
    rows = [
        (f"loss of {name} for {kind}", f"{PAPER[kind][name]:.3f}", f"{list(found.losses.values())[-1]:.3f}")
        for kind, runs in (("equal data", equal_data), ("equal time", equal_time))
        for name, found in runs.items()
    ]
    rows += [
        (f"parameters, and seconds of training, {name}", "about 30 million", f"{found.n_params:,}, {found.seconds:.0f}")
        for name, found in equal_data.items()
    ]
    steps = list(equal_data["Bilinear"].losses)
    curves = {name: list(found.losses.values()) for name, found in equal_data.items()}
    figure = plots.line(steps, curves, x_title="step", y_title="nats per token, held-out texts")
    ran = (
        f"{len(train.rows)} texts of {train.n_tokens:,} tokens, read {config.epochs:g} times, {len(valid.rows)} held "
        f"out (the paper: TinyStories, read 5 times, about 2 B tokens); layers: {config.n_layer} (6), d_model: "
        f"{config.d_model} (512), d_hidden: {config.d_hidden} (2048)"
    )
    last = {name: values[-1] for name, values in curves.items()}
    words = [
        f"For equal data the bilinear model's loss is {last['Bilinear'] - last['ReGLU']:+.3f} from ReGLU's and "
        f"{last['Bilinear'] - last['SwiGLU']:+.3f} from SwiGLU's (the paper: +0.005, +0.016). One seed each, of models "
        "so small and so briefly trained that the loss is far from the paper's; more texts (--texts) bring it nearer.",
        "The three have the same sizes, and so the same number of parameters. For equal time, ReGLU and SwiGLU are "
        "trained again for as many epochs as fit the bilinear model's seconds of the processor.",
    ]
    return Made(ran, rows, {"Table 6: loss against training, equal data": figure}, words)
