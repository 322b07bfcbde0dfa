"""From a gated or normalised model to a bilinear one, by annealing while it is trained on.

1. one pass over a few batches fits, by least squares, what takes the place of each nonlinearity, each foldable:
   a gate by a multiple of its input for every hidden unit, `act(z_m) ~ s_m z_m / 2` with `s_m = 2 <z act(z)> / <z z>`;
   a norm by one number, `x / rms(x) ~ c x` with `c = <rms> / <rms rms>`
2. training goes on (`bilens.train.language_model`: same loop, data and checkpoints) while `t` goes from 0 to 1 in the
   first part of the steps, and stays there:
       silu, gelu   act_t(z) = (1 - t + t s) z g(beta z)     beta = 1 - t, g the logistic function or Gauss'; g(0) = 1/2
       relu         act_t(z) = (1 - t + t s) z ((1 - t) [z > 0] + t / 2)
       norm         norm_t(x) = x ((1 - t) / rms(x) + t c)
   At t = 0 that is the model as it was; at t = 1 all of it is linear. The `s` are trained along with the weights.
3. `s / 2` is folded into the left branch, `c` into what reads the norm (qkv, both branches, unembedding): the result is
   an ordinary checkpoint with `gate: null`, and `normalization: false` where norms were annealed

Source: fine-tuning a gated model into a bilinear one is in Pearce, Dooms, Rigg 2024, arXiv 2406.03947; fine-tuning
norms away, each with a fixed number in place of its divisor, is Heimersheim 2024, arXiv 2409.13710.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Float
from torch import Tensor, nn

from bilens._core.bare import require_bare
from bilens._core.checks import check_amounts, check_flags, check_rates, check_seeds, check_shares, check_sizes
from bilens._core.display import Tabular
from bilens._core.files import destination_folder, to_path
from bilens._core.fingerprint import model_fingerprint
from bilens._core.folders import alone_in, claim, digest_of, finish
from bilens.draw import plots
from bilens.errors import ArgumentError, NotBilinearError, TrainingError
from bilens.model.config import config_from_published, config_to_published
from bilens.model.files import CONFIG_FILE, TOKENIZER_FILES, WEIGHTS_FILE
from bilens.model.loading import load_model
from bilens.model.transformer import ACTIVATIONS, MLP, HookedBilinearTransformer, RMSNorm
from bilens.train.data import Texts, TokenizedTexts, pack, training_and_validation
from bilens.train.language_model import CHECKPOINT_FILE, WORK_FILES, TrainConfig, TrainingRun, Validation, validate

RECORD_FILE = "annealing.json"
N_FIT_BATCHES = 4


@dataclass(frozen=True)
class AnnealConfig:
    """Everything that decides a run, its model and data apart.

    Args:
        normalization: anneal the norms too (all of them: a checkpoint has norms or has none).
        ramp: the share of the steps in which `t` goes from 0 to 1.
        epochs: passes over the training texts.
        batch_size: packed rows of the model's context per step.
        lr: peak learning rate; reached after `warmup` of the steps, then decayed linearly to zero.
        weight_decay, grad_clip: AdamW's weight decay and the gradient's largest norm, for the gates' scales too.
        bf16: autocast to bfloat16 in training (validation is in float32).
        seed: the seed of the order of texts.
        eval_every, checkpoint_every: steps.

    Raises:
        ArgumentError: a value outside its range.
    """

    normalization: bool = False
    ramp: float = 0.5
    epochs: float = 1.0
    batch_size: int = 16
    lr: float = 1e-3
    warmup: float = 0.1
    weight_decay: float = 0.1
    grad_clip: float = 1.0
    bf16: bool = True
    seed: int = 1
    eval_every: int = 50
    checkpoint_every: int = 100

    def __post_init__(self) -> None:
        check_flags(normalization=self.normalization, bf16=self.bf16)
        check_shares(ramp=self.ramp, warmup=self.warmup)
        if self.ramp == 0:
            raise ArgumentError(f"ramp is {self.ramp!r}, expected a share of the steps: above 0, at most 1.")
        if self.warmup == 1:
            raise ArgumentError(f"warmup is {self.warmup!r}, expected a share of the steps: 0 or more, below 1.")
        check_sizes(batch_size=self.batch_size, eval_every=self.eval_every, checkpoint_every=self.checkpoint_every)
        check_rates(epochs=self.epochs, lr=self.lr, grad_clip=self.grad_clip)
        check_amounts(weight_decay=self.weight_decay)
        check_seeds(seed=self.seed)

    def training(self, model: HookedBilinearTransformer) -> TrainConfig:
        """The configuration of the run that trains `model` on."""
        cfg = model.cfg
        assert cfg.d_mlp is not None
        same = ("epochs", "batch_size", "lr", "warmup", "weight_decay", "grad_clip", "bf16", "seed")
        return TrainConfig(
            d_model=cfg.d_model,
            n_layer=cfg.n_layers,
            n_head=cfg.n_heads,
            d_hidden=cfg.d_mlp,
            n_ctx=cfg.n_ctx,
            bias=cfg.bias,
            gate=cfg.gate,
            bilinear=cfg.bilinear,
            normalization=cfg.normalization_type is not None,
            eval_every=self.eval_every,
            checkpoint_every=self.checkpoint_every,
            **{name: getattr(self, name) for name in same},
        )


@dataclass(frozen=True)
class AnnealingResult(Tabular):
    """A finished run: the bilinear model, and what it cost.

    Attributes:
        model: the model with `gate: null`, and without norms where those were annealed.
        config: the settings of the run.
        before: the model as it was.
        at_once: every nonlinearity replaced by its fit, nothing trained.
        validations: while annealing, and after its last step.
        after: the model as folded.
        scratch: another model on the same texts, where one was given: a bilinear one trained from scratch. With another
            tokenizer, its `nats_per_character` alone compares.
    """

    model: HookedBilinearTransformer = field(repr=False)
    config: AnnealConfig
    before: Validation
    at_once: Validation
    validations: list[Validation] = field(repr=False)
    after: Validation
    scratch: Validation | None = None

    @property
    def stages(self) -> dict[str, Validation]:
        """The losses to compare, by name."""
        found = {"before": self.before, "replaced at once": self.at_once, "annealed": self.after}
        return found | ({} if self.scratch is None else {"from scratch": self.scratch})

    def to_frame(self) -> pd.DataFrame:
        """One row per loss to compare: `stage, step, nats_per_token, nats_per_character`."""
        return pd.DataFrame([{"stage": name} | asdict(validation) for name, validation in self.stages.items()])

    def plot(self) -> go.Figure:
        """The loss while annealing, between those before and after."""
        steps = [self.before.step, *(v.step for v in self.validations)]
        losses = [self.before.nats_per_token, *(v.nats_per_token for v in self.validations)]
        curves = {"annealing": losses, "before": [losses[0]] * len(steps)}
        if self.scratch is not None:
            curves["from scratch"] = [self.scratch.nats_per_token] * len(steps)
        return plots.line(steps, curves, "annealing", x_title="step", y_title="nats per token")

    def __str__(self) -> str:
        width = max(map(len, self.stages))
        return "\n".join(
            f"{name:{width}}  {v.nats_per_token:.4f} nats/token, {v.nats_per_character:.4f} nats/character"
            for name, v in self.stages.items()
        )


def anneal(
    model: HookedBilinearTransformer | str | os.PathLike[str],
    data: Texts,
    out: str | os.PathLike[str],
    config: AnnealConfig | None = None,
    *,
    valid: Texts | None = None,
    scratch: HookedBilinearTransformer | str | os.PathLike[str] | None = None,
    column: str = "text",
    overwrite: bool = False,
) -> AnnealingResult:
    """Turn a gated or normalised model into a bilinear one, and write that in the published format.

    A run that stopped early is continued by calling it again with the same arguments and `out`; one that is finished is
    returned as it is on disk.

    Args:
        model: a model, or where to load it from; it is left as it is.
        data: training texts, or where to load them (see `bilens.train.data.load_texts`).
        out: the folder of the new model; also of the checkpoint while the run lasts.
        config: `None` takes the defaults.
        valid: validation texts; `None` sets 1 % of the training texts aside.
        scratch: a model to compare with, such as a bilinear one that has seen as many tokens from scratch.
        column: the field that holds the text.
        overwrite: remove another model that is in `out`, instead of refusing.

    Raises:
        ArgumentError: nothing to anneal: no gate, and norms that are not there or not asked for; or `out` is the
            model's own folder.
        NotBilinearError: a one-branch MLP.
        TrainingError: no data, a model (or `scratch`) without a tokenizer, or a loss that is not finite.
        OverwriteError: `out` holds another model, or another run's checkpoint.
        WriteError: another process is at work in `out`, or the disk is full.
    """
    config, out = config or AnnealConfig(), to_path(out, "out")
    model = load_model(model) if isinstance(model, str | os.PathLike) else model
    scratch = load_model(scratch) if isinstance(scratch, str | os.PathLike) else scratch
    check_annealable(model, config)
    require_bare(model, *([] if scratch is None else [scratch]))
    if Path(model.cfg.model_name).resolve() == out.resolve():
        raise ArgumentError(f"out is {str(out)!r}, the folder of the model to anneal; expected another one.")
    for one in (model, scratch):
        if one is not None and one.tokenizer is None:
            raise TrainingError(f"the model {one.cfg.model_name!r} has no tokenizer to read the texts with.")
    destination_folder(out)  # what cannot be written is to fail now
    texts = training_and_validation(data, valid, column=column)
    identity = {
        "config": asdict(config),
        "from": model_fingerprint(model),
        "scratch": None if scratch is None else model_fingerprint(scratch),
        "texts": digest_of(texts[0]),
        "validation_texts": digest_of(texts[1]),
    }
    with alone_in(out):
        finished = claim(out / RECORD_FILE, identity, WORK_FILES, others=TOKENIZER_FILES, overwrite=overwrite)
        if finished is not None:
            stages = {name: Validation(**stage) for name, stage in finished["stages"].items()}
            return AnnealingResult(
                load_model(out),
                config,
                stages["before"],
                stages["replaced at once"],
                [Validation(**validation) for validation in finished["validations"]],
                stages["annealed"],
                stages.get("from scratch"),
            )
        train, held_out = (TokenizedTexts.from_texts(part, model.tokenizer, bool(model.n_bos)) for part in texts)
        run = AnnealingRun(model, train, held_out, config, out / CHECKPOINT_FILE)
        before = validate(model, held_out)
        at_once = validate(folded(run.model), held_out)
        compared = (
            None
            if scratch is None
            else validate(scratch, TokenizedTexts.from_texts(texts[1], scratch.tokenizer, bool(scratch.n_bos)))
        )
        validations = run.fit()
        annealed = folded(run.model)
        after = validate(annealed, held_out, step=run.n_steps)
        result = AnnealingResult(annealed.eval(), config, before, at_once, validations, after, compared)
        annealed.save_pretrained(out, overwrite=True)  # it is the run's own by now
        facts = {
            "config": asdict(config),
            "from": model.cfg.model_name,
            "stages": {name: asdict(validation) for name, validation in result.stages.items()},
            "validations": [asdict(validation) for validation in validations],
        }
        finish(out / RECORD_FILE, identity, (CONFIG_FILE, WEIGHTS_FILE), facts)
        (out / CHECKPOINT_FILE).unlink(missing_ok=True)
    return result


def check_annealable(model: HookedBilinearTransformer, config: AnnealConfig) -> None:
    """Refuse a model that has nothing to anneal, or that would not be bilinear afterwards.

    Raises:
        ArgumentError, NotBilinearError: the same cases as for `anneal`.
    """
    cfg = model.cfg
    if not cfg.bilinear:
        raise NotBilinearError(
            f"the model {cfg.model_name!r} has one-branch MLPs: without its activation such a layer is linear, not "
            "bilinear. Only two branches (config: bilinear true) with a gate can be annealed."
        )
    normalized = cfg.normalization_type is not None
    if config.normalization and not normalized:
        raise ArgumentError(f"normalization is true, and the model {cfg.model_name!r} has no norms to anneal.")
    if cfg.gate is None and not config.normalization:
        hint = "; AnnealConfig(normalization=True) takes its norms away" if normalized else ""
        raise ArgumentError(f"the model {cfg.model_name!r} has no gate: it is bilinear already{hint}.")


class AnnealingRun(TrainingRun):
    """The loop of `anneal`, on tokens: `TrainingRun` on a copy of the model whose nonlinearities are being annealed.

    Their parameters are parameters of that copy, so the optimiser and the checkpoints of `TrainingRun` include them.
    """

    def __init__(
        self,
        model: HookedBilinearTransformer,
        train: TokenizedTexts,
        valid: TokenizedTexts,
        config: AnnealConfig,
        checkpoint: Path | None = None,
    ):
        check_annealable(model, config)
        self.annealing, self.source = config, model_fingerprint(model)
        rows = pack(train.pieces(model.cfg.n_ctx), model.cfg.n_ctx, config.seed)[: N_FIT_BATCHES * config.batch_size]
        annealed = annealable(model, rows.split(config.batch_size), normalization=config.normalization)
        super().__init__(annealed, train, valid, config.training(model), checkpoint)

    def progress(self, step: int) -> float:
        """`t` at a step: 1 from the end of the ramp on."""
        return min(1.0, step / (self.annealing.ramp * self.n_steps))

    def _take_step(self, batch: Tensor) -> Tensor:
        # The step leads to `step + 1`: what validates then, or is saved, has that `t`.
        set_progress(self.model, self.progress(self.step + 1))
        return super()._take_step(batch)

    def load_checkpoint(self) -> None:
        super().load_checkpoint()
        set_progress(self.model, self.progress(self.step))

    @property
    def _identity(self) -> dict[str, Any]:
        facts = {"ramp": self.annealing.ramp, "anneal_normalization": self.annealing.normalization}
        return super()._identity | {"annealing": facts | {"source": self.source}}


# --- what is annealed -------------------------------------------------------------------------------------------------

# z times this is the gate, at beta = 1; at beta = 0 each is 1/2.
SHARES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "silu": lambda z, beta: torch.sigmoid(beta * z),
    "gelu": lambda z, beta: torch.special.ndtr(beta * z),
    "relu": lambda z, beta: beta * (z > 0).to(z.dtype) + (1 - beta) / 2,
}


class AnnealedGate(nn.Module):
    """`(1 - t + t s) z g(beta z)`, `beta = 1 - t`: the gate at t = 0, `s z / 2` at t = 1."""

    def __init__(self, gate: str, scale: Float[Tensor, "d_mlp"]):
        super().__init__()
        self.gate, self.scale, self.t = gate, nn.Parameter(scale), 0.0

    def forward(self, z: Float[Tensor, "*batch d_mlp"]) -> Float[Tensor, "*batch d_mlp"]:
        factor = 1 - self.t + self.t * self.scale.to(z.dtype)
        return factor * z * SHARES[self.gate](z, 1 - self.t)


class AnnealedNorm(RMSNorm):
    """`x ((1 - t) / rms(x) + t c)`: the norm at t = 0, a multiple of its input at t = 1."""

    def __init__(self, norm: RMSNorm, fit: float):
        super().__init__(norm.cfg)
        self.fit, self.t = fit, 0.0
        self.hook_scale, self.hook_normalized = norm.hook_scale, norm.hook_normalized

    def forward(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        wide = x.float()
        rms = (wide.pow(2).mean(-1, keepdim=True) + self.cfg.eps).sqrt()
        scale = self.hook_scale(1 / ((1 - self.t) / rms + self.t * self.fit))
        return self.hook_normalized((wide / scale).to(x.dtype))


def annealable(
    model: HookedBilinearTransformer, batches: Sequence[Tensor], *, normalization: bool
) -> HookedBilinearTransformer:
    """A copy of the model in float32 with annealed gates (and norms) at t = 0, fitted on `batches` of tokens."""
    gate, fits = model.cfg.gate, fit_linear(model, batches)
    copy = _copy(model, config_to_published(model.cfg))
    for layer, block in enumerate(copy.blocks):
        if gate is not None:
            block.mlp.act = AnnealedGate(gate, fits.gates[layer])
        if normalization:
            block.ln1 = AnnealedNorm(block.ln1, fits.norms[f"blocks.{layer}.ln1"])
            block.ln2 = AnnealedNorm(block.ln2, fits.norms[f"blocks.{layer}.ln2"])
    if normalization:
        copy.ln_final = AnnealedNorm(copy.ln_final, fits.norms["ln_final"])
    return copy


def set_progress(model: HookedBilinearTransformer, t: float) -> None:
    """Put every annealed module of the model at `t`."""
    for module in model.modules():
        if isinstance(module, AnnealedGate | AnnealedNorm):
            module.t = t


@dataclass(frozen=True)
class LinearFits:
    """What stands for each nonlinearity: for a gate the `s` of each hidden unit, by layer; for a norm `c`, by name."""

    gates: list[Float[Tensor, "d_mlp"]]
    norms: dict[str, float]


@torch.no_grad()
def fit_linear(model: HookedBilinearTransformer, batches: Sequence[Tensor]) -> LinearFits:
    """Least-squares fits over all positions of `batches`, in float64.

    `s` minimises `<(act(z) - s z / 2)^2>` for every hidden unit; `c` minimises `<|x / rms(x) - c x|^2>`, where
    `|x|^2 = d_model rms^2`.
    """
    require_bare(model)
    act, cfg = ACTIVATIONS[model.cfg.gate], model.cfg
    sums: dict[str, Tensor] = {}

    def add(name: str, *products: Tensor) -> None:
        sums[name] = sums.get(name, 0) + torch.stack(products)

    pres = [f"blocks.{layer}.mlp.hook_pre" for layer in range(cfg.n_layers)]
    norms = [f"blocks.{layer}.{norm}" for layer in range(cfg.n_layers) for norm in ("ln1", "ln2")] + ["ln_final"]
    for batch in batches:
        wanted = {*pres, *(f"{norm}.hook_scale" for norm in norms)}
        _, cache = model.run_with_cache(batch.to(cfg.device), names_filter=wanted.__contains__, return_type=None)
        for name in pres:
            z = cache[name].double().flatten(0, 1)
            add(name, (z * act(z)).sum(0), (z * z).sum(0))
        for norm in norms:
            rms = cache[f"{norm}.hook_scale"].double()
            add(norm, rms.sum(), (rms * rms).sum())
    gates = [2 * sums[name][0] / sums[name][1].clamp_min(torch.finfo(torch.float64).tiny) for name in pres]
    return LinearFits([scale.float() for scale in gates], {n: (sums[n][0] / sums[n][1]).item() for n in norms})


@torch.no_grad()
def folded(model: HookedBilinearTransformer) -> HookedBilinearTransformer:
    """The ordinary model that an annealed one is at t = 1, whatever its `t` is now: `s / 2` and `c` in the weights."""
    removed: dict[str, Any] = {}
    if any(isinstance(module, AnnealedGate) for module in model.modules()):
        removed["gate"] = None
    if isinstance(model.ln_final, AnnealedNorm):
        removed["normalization"] = False
    plain = _copy(model, config_to_published(model.cfg) | removed)
    for block, source in zip(plain.blocks, model.blocks, strict=True):
        _fold_gate(block.mlp, source.mlp.act)
        block.attn.qkv.weight *= _norm_factor(source.ln1)
        block.mlp.w.weight *= _norm_factor(source.ln2)  # the biases are added behind it
    plain.unembed.head.weight *= _norm_factor(model.ln_final)
    return plain


def _fold_gate(mlp: MLP, act: Any) -> None:
    if isinstance(act, AnnealedGate):
        mlp.W_gate.mul_(act.scale / 2)
        if mlp.w.bias is not None:
            mlp.b_gate.mul_(act.scale / 2)


def _norm_factor(norm: nn.Module) -> float:
    return norm.fit if isinstance(norm, AnnealedNorm) else 1.0


def _copy(model: HookedBilinearTransformer, published: dict[str, Any]) -> HookedBilinearTransformer:
    """A model of the given config, in float32, with this one's weights."""
    cfg = config_from_published(
        published, model.cfg.d_vocab, device=str(model.cfg.device), model_name=model.cfg.model_name
    )
    copy = HookedBilinearTransformer(cfg, model.tokenizer, init_weights=False)
    for name, weight in copy.named_parameters():
        weight.data.copy_(model.get_parameter(name))
    return copy
