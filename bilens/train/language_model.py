"""Training a bilinear language model.

    1. texts -> tokenizer (trained, or taken) -> token pieces
    2. every epoch packs the pieces anew, in an order that only (seed, epoch) decides
    3. every step: AdamW on one batch of packed rows, learning rate warmed up, then decayed linearly to zero
    4. at intervals: the loss on the validation texts, and a checkpoint (weights, optimiser state, the history) as one
       safetensors file that is written beside and renamed

Because 2 and 3 depend on nothing but the seed and the step number, a run that is killed and resumed takes the same
steps as one that is not.
"""

import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from bilens._core.bare import require_bare
from bilens._core.checkpoint import load_checkpoint, resumable, save_checkpoint
from bilens._core.checks import (
    check_amounts,
    check_flags,
    check_memory,
    check_rates,
    check_seeds,
    check_shares,
    check_sizes,
)
from bilens._core.display import Tabular
from bilens._core.files import destination_folder, write_files
from bilens._core.folders import alone_in, claim, digest_of, finish
from bilens.errors import ArgumentError, CheckpointError, TrainingError
from bilens.model.config import config_from_published
from bilens.model.files import (
    CONFIG_FILE,
    INDEX_FILE,
    TOKENIZER_FILES,
    WEIGHTS_FILE,
    load_tokenizer,
    resolve_device,
    resolve_dtype,
)
from bilens.model.loading import load_model
from bilens.model.transformer import HookedBilinearTransformer
from bilens.train.data import (
    SPECIAL_TOKENS,
    Texts,
    TokenizedTexts,
    pack,
    pieces_identity,
    train_tokenizer,
    training_and_validation,
)

CHECKPOINT_FILE, RECORD_FILE = "checkpoint.safetensors", "training.json"
WORK_FILES = (CHECKPOINT_FILE, CONFIG_FILE, WEIGHTS_FILE, INDEX_FILE)


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a run, its data and tokenizer apart.

    Args:
        d_model, n_layer, n_head, d_hidden, n_ctx: the architecture (published names).
        bias, gate, bilinear, normalization: its variants.
        attention: what makes a head's mixing matrix: `"softmax"`, or a polynomial, `"bilinear"` or `"quadratic"`. With
            one of these and without normalisation the whole model is a polynomial.
        d_head: the width of a head; `None` divides `d_model` among the heads.
        epochs: passes over the training texts.
        batch_size: packed rows of `n_ctx` tokens per step.
        lr: peak learning rate; reached after `warmup` of the steps, then decayed linearly to zero.
        weight_decay, betas, grad_clip: AdamW's settings, and the gradient's largest norm.
        bf16: autocast to bfloat16 in training (validation is in float32).
        seed: the seed of the initial weights and of the order of texts.
        eval_every, checkpoint_every: steps.

    Raises:
        ArgumentError: a value outside its range, or an architecture that does not exist.
    """

    d_model: int = 256
    n_layer: int = 4
    n_head: int = 4
    d_hidden: int = 1024
    n_ctx: int = 256
    bias: bool = False
    gate: str | None = None
    bilinear: bool = True
    normalization: bool = True
    attention: str = "softmax"
    d_head: int | None = None
    epochs: float = 10.0
    batch_size: int = 16
    lr: float = 2e-3
    warmup: float = 0.03
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    grad_clip: float = 1.0
    bf16: bool = True
    seed: int = 0
    eval_every: int = 500
    checkpoint_every: int = 250

    def __post_init__(self) -> None:
        sizes = ("d_model", "n_layer", "n_head", "d_hidden", "n_ctx", "batch_size", "eval_every", "checkpoint_every")
        check_sizes(**{name: getattr(self, name) for name in sizes})
        if self.n_ctx < 2:
            raise ArgumentError(f"n_ctx is {self.n_ctx}, expected at least 2: [BOS] and a token to predict.")
        check_flags(bias=self.bias, bilinear=self.bilinear, normalization=self.normalization, bf16=self.bf16)
        check_rates(epochs=self.epochs, lr=self.lr, grad_clip=self.grad_clip)
        check_amounts(weight_decay=self.weight_decay)
        check_shares(warmup=self.warmup)
        if not isinstance(self.betas, tuple | list) or len(self.betas) != 2:
            raise ArgumentError(f"betas is {self.betas!r}, expected two numbers.")
        for beta in self.betas:
            check_shares(betas=beta)
            if beta == 1:
                raise ArgumentError(f"betas is {self.betas!r}, expected numbers below 1.")
        check_seeds(seed=self.seed)
        try:
            config_from_published(self.published(None), d_vocab=1)
        except CheckpointError as error:  # an unknown gate, heads that do not divide d_model
            raise ArgumentError(str(error).removeprefix("config.json: ")) from error

    def published(self, tokenizer_name: str | None) -> dict[str, Any]:
        """The published `config.json` of the model to train."""
        keys = ["d_model", "n_layer", "n_head", "d_hidden", "n_ctx", "bias", "gate", "bilinear", "normalization"]
        keys += ["attention"] if self.attention != "softmax" else []
        keys += ["d_head"] if self.d_head is not None else []
        return {key: getattr(self, key) for key in keys} | {"tokenizer": tokenizer_name}


@dataclass(frozen=True)
class Validation:
    """Loss on the validation texts, each from its `[BOS]` (given, not predicted) to the end of the context.

    Per character: the summed loss over `len(text)` times the share of the text's tokens that fit the context.
    """

    step: int
    nats_per_token: float
    nats_per_character: float

    def __str__(self) -> str:
        return f"step {self.step}: {self.nats_per_token:.4f} nats/token, {self.nats_per_character:.4f} nats/character"


@dataclass(frozen=True)
class TrainingResult(Tabular):
    """A finished run: the model, and its validation losses in the order of training."""

    model: HookedBilinearTransformer
    validations: list[Validation] = field(default_factory=list)

    def to_frame(self) -> Any:
        """One row per validation."""
        return pd.DataFrame([asdict(v) for v in self.validations])

    def __str__(self) -> str:
        return "\n".join(map(str, self.validations)) or "no validation"


@torch.no_grad()
def validate(
    model: HookedBilinearTransformer, texts: TokenizedTexts, *, step: int = 0, batch_size: int = 32
) -> Validation:
    """Loss per token and per character on whole texts; see `Validation`."""
    require_bare(model)
    tokens, mask = texts.starts(model.cfg.n_ctx)
    total = 0.0
    for at in range(0, len(tokens), batch_size):
        rows, row_mask = tokens[at : at + batch_size].to(model.cfg.device), mask[at : at + batch_size]
        # Padding is on the right, where causal attention cannot see it: only the loss needs the mask.
        loss = model(rows, return_type="loss", loss_per_token=True)
        total += (loss * row_mask[:, 1:].to(loss)).cpu().double().sum().item()
    kept = mask[:, 1:].sum(1)
    characters = sum(
        n * kept_n / len(row) for n, kept_n, row in zip(texts.n_characters, kept.tolist(), texts.rows, strict=True)
    )
    return Validation(step, total / int(kept.sum()), total / characters)


def train_lm(
    data: Texts,
    out: str | os.PathLike[str],
    config: TrainConfig | None = None,
    *,
    valid: Texts | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    vocab_size: int = 4096,
    column: str = "text",
    dtype: torch.dtype | str = torch.float32,
    device: str | None = None,
    overwrite: bool = False,
) -> TrainingResult:
    """Train a model and write it, in the published format, to a folder.

    A run that stopped early is continued by calling it again with the same arguments and `out`; one that is finished is
    returned as it is on disk.

    Args:
        data: training texts, or where to load them (see `bilens.train.data.load_texts`).
        out: the folder of the model; also of the checkpoint while the run lasts.
        config: the architecture and the optimisation; `None` takes the defaults.
        valid: validation texts; `None` sets 1 % of the training texts aside.
        tokenizer: a folder with a `tokenizer.json`, a published name, or a hub id; `None` trains one on the texts.
        vocab_size: the vocabulary's size if a tokenizer is trained.
        column: the field that holds the text.
        dtype: the type of the weights on disk (training keeps them in float32).
        device: `None` takes CUDA where there is one.
        overwrite: remove another model that is in `out`, instead of refusing.

    Raises:
        ArgumentError: an unknown dtype or device, a `vocab_size` too small, or a model too large for this machine.
        TrainingError: no data.
        OverwriteError: `out` holds another model, or another run's checkpoint.
        WriteError: another process is at work in `out`, or the disk is full.
    """
    config, out = config or TrainConfig(), destination_folder(out)
    device, on_disk = resolve_device(device), resolve_dtype(dtype, torch.float32)
    if not isinstance(vocab_size, int) or isinstance(vocab_size, bool) or vocab_size <= len(SPECIAL_TOKENS):
        raise ArgumentError(
            f"vocab_size is {vocab_size!r}, expected a whole number above {len(SPECIAL_TOKENS)}: "
            "[UNK], [BOS] and [EOS] are in it."
        )
    train_texts, valid_texts = training_and_validation(data, valid, column=column)
    given = None if tokenizer is None else _given_tokenizer(tokenizer)
    identity = {
        "config": asdict(config),
        "dtype": str(on_disk).removeprefix("torch."),
        "tokenizer": {"vocab_size": vocab_size} if given is None else _tokenizer_facts(given),
        "texts": digest_of(train_texts),
        "validation_texts": digest_of(valid_texts),
    }
    with alone_in(out):
        finished = claim(out / RECORD_FILE, identity, WORK_FILES, others=TOKENIZER_FILES, overwrite=overwrite)
        if finished is not None:
            validations = [Validation(**validation) for validation in finished["validations"]]
            return TrainingResult(load_model(out, device=device), validations)
        hf_tokenizer = given or _trained_tokenizer(out, train_texts, vocab_size, config.n_ctx)
        named = tokenizer is not None and not Path(tokenizer).is_dir()
        published = config.published(str(tokenizer) if named else None)
        cfg = config_from_published(published, len(hf_tokenizer), device=device, model_name=out.name)
        heads = (len(cfg.attention_parts) + 1) * cfg.n_heads * cfg.d_head
        n_weights = cfg.d_model * (2 * cfg.d_vocab + cfg.n_layers * (heads + 3 * config.d_hidden))
        check_memory("training this model", 16 * n_weights)  # float32: weights, gradients, and two of Adam's each
        model = HookedBilinearTransformer(cfg, hf_tokenizer, seed=config.seed)
        run = TrainingRun(
            model,
            TokenizedTexts.from_texts(train_texts, hf_tokenizer),
            TokenizedTexts.from_texts(valid_texts, hf_tokenizer),
            config,
            checkpoint=out / CHECKPOINT_FILE,
        )
        validations = run.fit()
        model.eval().save_pretrained(out, dtype=on_disk, overwrite=True)  # it is the run's own by now
        facts = {"config": asdict(config), "validations": [asdict(v) for v in validations]}
        finish(out / RECORD_FILE, identity, (CONFIG_FILE, WEIGHTS_FILE), facts)
        (out / CHECKPOINT_FILE).unlink(missing_ok=True)
    return TrainingResult(model, validations)


def _given_tokenizer(source: str | os.PathLike[str]) -> Any:
    found = load_tokenizer(Path(source), str(source))
    if found is None:
        raise TrainingError(f"no tokenizer at {source}: neither a folder with tokenizer.json nor on the hub.")
    return found


def _tokenizer_facts(tokenizer: Any) -> dict[str, Any]:
    """What tells a tokenizer from others: everything that it does, where it says so, or else its vocabulary."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    does = json.dumps(tokenizer.get_vocab(), sort_keys=True) if backend is None else backend.to_str()
    return {"vocab_size": len(tokenizer), "sha256": digest_of([does])}


def _trained_tokenizer(out: Path, texts: list[str], vocab_size: int, n_ctx: int) -> Any:
    """From an earlier start in `out`, or trained now."""
    if (out / "tokenizer.json").exists():
        return load_tokenizer(out, None)
    trained = train_tokenizer(texts, vocab_size, n_ctx)
    write_files(out, trained.save_pretrained)
    return trained


class TrainingRun:
    """The loop of `train_lm`, on tokens: for those who bring their own model and data."""

    def __init__(
        self,
        model: HookedBilinearTransformer,
        train: TokenizedTexts,
        valid: TokenizedTexts,
        config: TrainConfig,
        checkpoint: Path | None = None,
    ):
        self.model, self.valid, self.config, self.checkpoint = model, valid, config, checkpoint
        self.pieces = train.pieces(config.n_ctx)
        self.rows_per_epoch = [len(pack(self.pieces, config.n_ctx, self._epoch_seed(0))) // config.batch_size]
        if self.rows_per_epoch[0] < 1:
            raise TrainingError(
                f"the training texts fill less than one batch of {config.batch_size} rows of {config.n_ctx} tokens; "
                "give more text or a smaller batch_size."
            )
        self.steps_per_epoch = self.rows_per_epoch[0]
        self.n_steps = max(1, round(config.epochs * self.steps_per_epoch))
        self.step = 0
        self.validations: list[Validation] = []
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=config.lr, betas=config.betas, weight_decay=config.weight_decay, fused=True
        )

    def fit(self) -> list[Validation]:
        """Take every step that is left; the validation losses of the whole run."""
        require_bare(self.model)
        config = self.config
        if self.checkpoint is not None and self.checkpoint.exists():
            self.load_checkpoint()
        tokens_per_step = config.batch_size * config.n_ctx
        total, done = self.n_steps * tokens_per_step, self.step * tokens_per_step
        self.model.train()
        with resumable("training", total, done, self.save_checkpoint if self.checkpoint else None) as bar:
            self._validate_if_due(bar)  # Ctrl-C may have come in the middle of one
            for batch in self._batches():
                loss = self._take_step(batch)
                self.step += 1
                bar.update(tokens_per_step)
                self._validate_if_due(bar)
                if self.checkpoint is not None and self._is_due(config.checkpoint_every):
                    self.save_checkpoint()
                if self.step % 20 == 0:
                    bar.set_postfix(loss=f"{loss.item():.3f}")
        return self.validations

    def _is_due(self, every: int) -> bool:
        return self.step > 0 and (self.step % every == 0 or self.step == self.n_steps)

    def _validate_if_due(self, bar: Any) -> None:
        done = self.validations[-1].step if self.validations else 0
        if self._is_due(self.config.eval_every) and done < self.step:
            self.validations.append(validate(self.model, self.valid, step=self.step))
            bar.write(f"{self.validations[-1]} ({time.strftime('%H:%M:%S')})")

    def _epoch_seed(self, epoch: int) -> int:
        return self.config.seed * 1_000_003 + epoch

    def _batches(self) -> Iterator[Tensor]:
        """The batches of the steps that are left."""
        while self.step < self.n_steps:
            epoch, at = divmod(self.step, self.steps_per_epoch)
            rows = pack(self.pieces, self.config.n_ctx, self._epoch_seed(epoch))
            # Packings of different orders differ by a row or two; a short last batch is filled from the start.
            for index in range(at, min(self.steps_per_epoch, at + self.n_steps - self.step)):
                wanted = torch.arange(index * self.config.batch_size, (index + 1) * self.config.batch_size)
                yield rows[wanted % len(rows)].to(self.model.cfg.device)

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, then linear decay to zero."""
        warm = max(1, round(self.config.warmup * self.n_steps))
        return self.config.lr * min((step + 1) / warm, (self.n_steps - step) / max(1, self.n_steps - warm))

    def _take_step(self, batch: Tensor) -> Tensor:
        config, model = self.config, self.model
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(self.step)
        with torch.autocast(batch.device.type, torch.bfloat16, enabled=config.bf16):
            loss = model(batch, return_type="loss", attention_mask=torch.ones_like(batch))  # a last [EOS] is no padding
        if not loss.isfinite():
            raise TrainingError(f"the loss is {loss.item()} at step {self.step}; lower the learning rate {config.lr}.")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    # --- checkpoints --------------------------------------------------------------------------------------------------

    def save_checkpoint(self) -> int:
        """Weights, optimiser state and history, whole or not at all; the step."""
        assert self.checkpoint is not None
        history = {"step": self.step, "validations": [asdict(v) for v in self.validations]}
        save_checkpoint(self.checkpoint, dict(self.model.named_parameters()), self.optimizer, self._identity | history)
        return self.step

    def load_checkpoint(self) -> None:
        """Go back to where `save_checkpoint` was called.

        Raises:
            TrainingError: the checkpoint is of another configuration, or of other data.
        """
        assert self.checkpoint is not None
        facts = load_checkpoint(self.checkpoint, dict(self.model.named_parameters()), self.optimizer, self._identity)
        self.step = facts["step"]
        self.validations = [Validation(**v) for v in facts["validations"]]

    @property
    def _identity(self) -> dict[str, Any]:
        """What a checkpoint has to agree on to be of this run."""
        return {"config": asdict(self.config), "data": pieces_identity(self.pieces)}
