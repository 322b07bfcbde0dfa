"""Training SAEs and transcoders: many hooks from one pass over the model, resumable at every step.

    1. texts -> packed rows -> batches of activations at all hooks (`bilens.sae.train.activations`)
    2. activations are scaled to the norm `sqrt(d)` on average, so that one learning rate fits every hook
    3. one SAELens `SAETrainer` per SAE takes a step on each batch
    4. scales and decoder norms are folded, the SAEs are stored in SAELens' format, in half precision

Under `torchrun` each process trains its share of the SAEs, on the batches that one process would train them on.

SAELens owns the architectures, their losses, and the step. Each SAE has a checkpoint of its own with everything that
decides its next step (weights, Adam's state, schedules, what fired when, the place in the data), and its batches depend
on the seed and the step alone: a run that was killed and is called again ends in the same SAEs to the bit.
"""

import json
import os
import re
import zlib
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE, TrainingSAE
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.constants import SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME
from sae_lens.registry import get_sae_training_class
from sae_lens.saes.sae import SAEMetadata, TrainStepOutput
from sae_lens.training.sae_trainer import SAETrainer
from safetensors.torch import save_file
from torch import Tensor

from bilens._core.bare import require_bare
from bilens._core.checkpoint import load_checkpoint, read_facts, resumable, save_checkpoint
from bilens._core.checks import (
    check_amounts,
    check_choice,
    check_flags,
    check_rates,
    check_seeds,
    check_shares,
    check_sizes,
)
from bilens._core.files import destination_folder, read_json, write_atomically
from bilens._core.fingerprint import model_fingerprint
from bilens._core.folders import alone_in, differing, make_room
from bilens._core.parallel import barrier, is_main, processes, share
from bilens.errors import ArgumentError, SAEMismatchError, TrainingError
from bilens.model.hook_points import HOOK_TO_POINT, hook_of
from bilens.model.transformer import HookedBilinearTransformer
from bilens.sae.loading import FORMATS, folder_name, load_sae_folder
from bilens.sae.scope import ARCHITECTURE as SCOPE
from bilens.sae.train.activations import ActivationStream, PackedRows, Rows, StreamedRows, hook_widths
from bilens.sae.transcoder import (
    BatchTopKTranscoderTrainingConfig,
    JumpReLUTranscoderTrainingConfig,
    TopKTranscoderTrainingConfig,
)
from bilens.train.data import TokenizedTexts, load_texts, open_dataset

CHECKPOINT_FILE = "training.safetensors"
SCALE_BATCHES = 8  # what the scales are measured on
MATRYOSHKA_SHARES = (16, 8, 4, 2, 1)  # the nested SAEs have d_sae over these features
Hook = str | tuple[str, str]


@dataclass(frozen=True)
class SAETrainConfig:
    """Everything that decides a run, the model and data apart.

    Args:
        architecture: a key of `ARCHITECTURES`: SAELens' `topk`, `batchtopk`, `matryoshka_batchtopk`, `jumprelu`,
            `standard`, `gated`, or `scope`, the published kind. Transcoders: `topk`, `batchtopk`, `jumprelu`.
        expansion: features per dimension: `d_sae = expansion * d_in`.
        k: active features per token; for `jumprelu` the number that training aims at. Not of `standard` and `gated`.
        l1: the sparsity coefficient of `standard` and `gated`.
        bilinear_encoder, encoder_bias: what an SAE of architecture `scope` may have besides.
        tokens: training tokens, the same for every hook.
        batch_size: tokens per step.
        lr: peak learning rate of Adam, warmed up over the first 2 % and decayed linearly over the last `decay`.
        decay: share of the steps.
        bf16: autocast to bfloat16.
        seed: the seed of the initial weights and of the order of tokens.
        checkpoint_every: steps.

    Raises:
        ArgumentError: a value outside its range.
    """

    architecture: str = "topk"
    expansion: int = 8
    k: int = 32
    l1: float = 5.0
    bilinear_encoder: bool = False
    encoder_bias: bool = False
    tokens: int = 1_000_000
    batch_size: int = 1024
    lr: float = 1e-3
    decay: float = 0.5
    bf16: bool = True
    seed: int = 0
    checkpoint_every: int = 200

    def __post_init__(self) -> None:
        check_choice(ARCHITECTURES, architecture=self.architecture)
        sizes = ("expansion", "k", "tokens", "batch_size", "checkpoint_every")
        check_sizes(**{name: getattr(self, name) for name in sizes})
        flags = ("bilinear_encoder", "encoder_bias", "bf16")
        check_flags(**{name: getattr(self, name) for name in flags})
        if self.tokens < self.batch_size:
            raise ArgumentError(f"tokens is {self.tokens}, fewer than one batch of {self.batch_size}.")
        check_rates(lr=self.lr)
        check_amounts(l1=self.l1)
        check_seeds(seed=self.seed)
        check_shares(decay=self.decay)
        if self.decay > 0.98:
            raise ArgumentError(f"decay is {self.decay}, expected a share from 0 to 0.98 (the first 2 % warm up).")
        if self.architecture != "scope" and (self.bilinear_encoder or self.encoder_bias):
            raise ArgumentError(
                f"bilinear_encoder and encoder_bias are of architecture 'scope', not {self.architecture!r}."
            )

    @property
    def n_steps(self) -> int:
        return self.tokens // self.batch_size


def _batchtopk(config: SAETrainConfig) -> dict[str, Any]:
    # SAELens' average of the threshold starts at zero and forgets 1 % a step: not fast enough for a short run.
    return {"k": float(config.k), "topk_threshold_lr": min(1.0, max(0.01, 20 / config.n_steps))}


def _matryoshka(config: SAETrainConfig, d_sae: int) -> dict[str, Any]:
    widths = sorted({max(1, d_sae // share) for share in MATRYOSHKA_SHARES})
    return _batchtopk(config) | {"matryoshka_widths": widths}


def _jumprelu(config: SAETrainConfig, d_sae: int) -> dict[str, Any]:
    # Encoder rows start with norm 0.1 and inputs have the norm sqrt(d), so pre-activations spread by 0.1, and k exceed
    # this threshold. It moves no faster than the learning rate, encoder rows do: so that sparsity holds from the start,
    # its penalty must reach the encoder too (as Anthropic has it), from pre-activations as far off as they get.
    quantile = torch.special.ndtri(torch.tensor(1 - config.k / d_sae, dtype=torch.float64)).item()
    return {
        "jumprelu_init_threshold": max(0.01, 0.1 * quantile),
        "jumprelu_ste_to_input": True,
        "jumprelu_bandwidth": 1.0,
        # Gemma Scope 2's penalty: it aims at a number of features, so that k means what it means elsewhere.
        "jumprelu_sparsity_loss_mode": "quadratic",
        "target_l0": float(config.k),
    }


def _l1(config: SAETrainConfig) -> dict[str, Any]:
    return {"l1_coefficient": config.l1, "l1_warm_up_steps": config.n_steps // 20}


# What SAELens' training configuration of each architecture is given; a transcoder's is given `d_out` besides.
ARCHITECTURES: dict[str, Callable[[SAETrainConfig, int], dict[str, Any]]] = {
    "topk": lambda config, d_sae: {"k": config.k},
    "batchtopk": lambda config, d_sae: _batchtopk(config),
    "matryoshka_batchtopk": _matryoshka,
    "jumprelu": _jumprelu,
    "standard": lambda config, d_sae: _l1(config),
    "gated": lambda config, d_sae: _l1(config),
    "scope": lambda config, d_sae: {
        "k": config.k,
        "bilinear_encoder": config.bilinear_encoder,
        "encoder_bias": config.encoder_bias,
    },
}
WITHOUT_K = ("standard", "gated")
TRANSCODERS: dict[str, Any] = {
    "topk": TopKTranscoderTrainingConfig,
    "batchtopk": BatchTopKTranscoderTrainingConfig,
    "jumprelu": JumpReLUTranscoderTrainingConfig,
}


@dataclass(frozen=True)
class Target:
    """One SAE to be trained: its folder's name, the hook it reads, and the one a transcoder writes."""

    name: str
    hook: str
    hook_out: str | None

    @classmethod
    def of(cls, hook: Hook, config: SAETrainConfig) -> "Target":
        """What a hook, or the two of a transcoder, ask for.

        Raises:
            SAEMismatchError: a hook outside the blocks, or an architecture that there is no transcoder of.
        """
        reads, writes = (hook, None) if isinstance(hook, str) else hook
        point, layer = _place(reads)
        tags = [] if config.architecture == "topk" else [config.architecture]
        tags += ["bilinear"] if config.bilinear_encoder else []
        if writes is not None:
            if config.architecture not in TRANSCODERS:
                raise SAEMismatchError(
                    f"there is no transcoder of architecture {config.architecture!r}, only of {', '.join(TRANSCODERS)}."
                )
            point_out, layer_out = _place(writes)
            tags += ["transcoder"]
            if (point, point_out, layer_out) != ("mlp-in", "mlp-out", layer):
                tags += [str(layer_out), point_out]
        k = None if config.architecture in WITHOUT_K else config.k
        return cls(folder_name(point, layer, config.expansion, k, "-".join(tags)), reads, writes)

    @property
    def hooks(self) -> list[str]:
        return [self.hook] if self.hook_out is None else [self.hook, self.hook_out]


def train_saes(
    model: HookedBilinearTransformer,
    data: Any,
    out: str | os.PathLike[str],
    config: SAETrainConfig | None = None,
    *,
    hooks: Sequence[Hook] | None = None,
    column: str = "text",
    split: str = "train",
    streaming: bool = False,
    overwrite: bool = False,
) -> dict[str, SAE[Any]]:
    """Train SAEs and write each to `out/{layer}-{point}-x{expansion}-k{k}[-{tag}]` in SAELens' format, half precision.

    The tag is the architecture, where it is not top-k, and `transcoder`. The configuration goes into each SAE's
    `cfg.metadata.training`. Called again after an interruption, it goes on where it was; SAEs that are finished are
    not trained again, and returned as they are on disk.

    Args:
        model: whose activations.
        data: texts, a `datasets.Dataset` or `IterableDataset`, or where to load them (see `bilens.train.data`).
        out: the folder of the SAE folders.
        config: `None` takes the defaults.
        hooks: names such as `blocks.1.ln2.hook_normalized`, any of a block with one vector per token; a pair of names
            is a transcoder from the first to the second. `None` takes the input and output of every MLP.
        column: the field that holds the text.
        split: the split of a hub dataset.
        streaming: read texts as they are needed, in their order; for data that does not fit the memory. A
            `datasets` object is always read so.
        overwrite: remove other SAEs that are in the folders to be written, instead of refusing.

    Returns:
        The SAEs by folder name, as `load_sae` gives them.

    Raises:
        HookNameError: the model has no such hook.
        SAEMismatchError: a hook without one vector per token or outside the blocks, a `k` of more than the SAE has
            features, or two of one name.
        OverwriteError: a folder with an SAE of another run, one that was fine-tuned since, or another run's checkpoint.
        WriteError: another process is at work in `out`, or the disk is full.
        TrainingError: too little text, or a loss that is not finite.
    """
    check_flags(overwrite=overwrite)
    config, out = config or SAETrainConfig(), destination_folder(out)
    if hooks is None:
        layers = range(model.cfg.n_layers)
        hooks = [hook_of(point, layer) for layer in layers for point in ("mlp-in", "mlp-out")]
    if isinstance(hooks, str) or not hooks:
        raise ArgumentError(f"hooks is {hooks!r}, expected a list of hook names.")
    for hook in hooks:
        for name in (hook,) if isinstance(hook, str) else hook:
            model.check_hook_name(name)
    targets = [Target.of(hook, config) for hook in hooks]
    twice = {target.name for target in targets if [t.name for t in targets].count(target.name) > 1}
    if twice:
        raise SAEMismatchError(f"hooks asks twice for {', '.join(sorted(twice))}.")
    require_bare(model)
    widths = hook_widths(model, [hook for target in targets for hook in target.hooks])
    for target in targets:
        if config.k > config.expansion * widths[target.hook]:
            raise SAEMismatchError(
                f"k is {config.k}, but {target.name} has {config.expansion * widths[target.hook]} features: "
                f"{config.expansion} times the {widths[target.hook]} of {target.hook}."
            )
    rows = _rows(model, data, config, column, split, streaming)
    with processes(), alone_in(out) if is_main() else nullcontext():
        SAERun(model, targets, rows, config, out, overwrite=overwrite).fit()
        barrier()
    return {target.name: load_sae_folder(out / target.name) for target in targets}


class SAERun:
    """The loop of `train_saes`, on packed rows.

    Args:
        model: whose activations.
        targets: what to train, shared among the processes; finished ones are left as they are.
        rows: the token rows to train on.
        config: the settings of the run.
        out: the folder of the SAE folders.
        overwrite: remove other work in them.
    """

    def __init__(
        self,
        model: HookedBilinearTransformer,
        targets: Sequence[Target],
        rows: Rows,
        config: SAETrainConfig,
        out: Path,
        *,
        overwrite: bool = False,
    ):
        self.model, self.rows, self.config, self.out = model, rows, config, out
        self.source = {"model": model_fingerprint(model), **rows.identity()}
        others = {target.name: reason for target in targets if (reason := self._other_work(target))}
        files = [file for files in FORMATS.values() for file in files] + [CHECKPOINT_FILE]

        def remove() -> None:
            for name in others:
                for file in files:
                    (out / name / file).unlink(missing_ok=True)

        make_room(out, "; ".join(others.values()), remove, overwrite=overwrite)
        self.targets = [target for target in share(targets) if not self._is_finished(target)]
        self.trainers: dict[str, SAETrainer[Any, Any]] = {}
        self.scales: dict[str, list[float]] = {}
        if self.targets:
            hooks = [hook for target in self.targets for hook in target.hooks]
            self.stream = ActivationStream(model, rows, hooks, config.batch_size, seed=config.seed, bf16=config.bf16)

    def fit(self) -> None:
        """Take every step that is left, of every SAE, and write them."""
        if not self.targets:
            return
        positions = [self._start(target) for target in self.targets]
        self._measure_scales()
        self.stream.step = min(trainer.n_training_steps for trainer in self.trainers.values())
        earliest = min(positions, key=lambda position: position.get("row", 0))
        if earliest:
            self.rows.seek(earliest)
        batch_size = self.config.batch_size
        title = f"training {len(self.targets)} SAE{'s' if len(self.targets) > 1 else ''}"
        total, done = self.config.n_steps * batch_size, self.stream.step * batch_size
        with resumable(title, total, done, self._save, hidden=not is_main()) as bar:
            while self.stream.step < self.config.n_steps:
                losses = self._take_step()
                bar.update(batch_size)
                if self.stream.step % 20 == 0:
                    bar.set_postfix(loss=f"{sum(losses) / len(losses):.4f}")
                if self.stream.step % self.config.checkpoint_every == 0:
                    self._save()
        for target in self.targets:
            self._finish(target)

    def _take_step(self) -> list[float]:
        """One step of every SAE that has not taken it; the losses, as shares of the squared norm."""
        step = self.stream.step
        batch = next(self.stream)
        losses = []
        for target in self.targets:
            trainer = self.trainers[target.name]
            if trainer.n_training_steps != step:  # it was ahead of others when the run was killed
                continue
            trainer.maybe_reset_sparsity()
            parts = [batch[hook] * scale for hook, scale in zip(target.hooks, self.scales[target.name], strict=True)]
            output: TrainStepOutput = trainer.step(torch.cat(parts, dim=-1))
            trainer.n_training_steps += 1
            if not output.loss.isfinite():
                raise TrainingError(
                    f"{target.name}: the loss is {output.loss.item()} at step {step}; lower the learning rate "
                    f"{self.config.lr}."
                )
            losses.append(output.losses["mse_loss"].item() / parts[-1].shape[-1])
        return losses

    # --- one SAE's beginning and end ----------------------------------------------------------------------------------

    def _start(self, target: Target) -> dict[str, int]:
        """Make the trainer of an SAE and put it where its checkpoint is; its place in the data."""
        sae_class, sae_config = self._architecture(target)
        with torch.random.fork_rng(devices=[]):
            # By name: an SAE starts the same whatever others there are, and unlike them.
            torch.manual_seed(self.config.seed * 1_000_003 + zlib.crc32(target.name.encode()))
            sae = sae_class(sae_config)
        trainer = SAETrainer(self._trainer_config(), sae, iter(()))
        self.trainers[target.name] = trainer
        checkpoint = self._checkpoint(target)
        if not checkpoint.exists():
            return {}
        facts = load_checkpoint(checkpoint, _tensors(trainer), trainer.optimizer, self._identity(target))
        for name, value in facts["counters"].items():
            setattr(trainer, name, value)
        trainer.optimizer.param_groups[0]["lr"] = facts["lr"]
        trainer.lr_scheduler.load_state_dict(facts["lr_scheduler"])
        for name, state in facts["coefficients"].items():
            trainer.coefficient_schedulers[name].load_state_dict(state)
        self.scales[target.name] = facts["scales"]
        return facts["position"]

    def _architecture(self, target: Target) -> tuple[type[TrainingSAE[Any]], Any]:
        """SAELens' class and configuration of what is to be trained."""
        config, d_in = self.config, self.stream.widths[target.hook]
        d_sae = config.expansion * d_in
        options = ARCHITECTURES[config.architecture](config, d_sae) | {
            "d_in": d_in,
            "d_sae": d_sae,
            "device": self.model.cfg.device or "cpu",
            "metadata": SAEMetadata(
                model_name=self.model.cfg.model_name,
                hook_name=target.hook,
                context_size=self.model.cfg.n_ctx,
                prepend_bos=bool(self.model.n_bos),
            ),
        }
        if target.hook.endswith("hook_z"):
            options["reshape_activations"] = "hook_z"
        if target.hook_out is not None:
            options["d_out"] = self.stream.widths[target.hook_out]
            options["metadata"].hook_name_out = target.hook_out
            sae_config = TRANSCODERS[config.architecture](**options)
            return get_sae_training_class(sae_config.architecture())[0], sae_config
        sae_class, config_class = get_sae_training_class(
            SCOPE if config.architecture == "scope" else config.architecture
        )
        return sae_class, config_class(**options)

    def _trainer_config(self) -> SAETrainerConfig:
        config, steps = self.config, self.config.n_steps
        warm_up = max(1, steps // 50)
        return SAETrainerConfig(
            total_training_samples=steps * config.batch_size,
            train_batch_size_samples=config.batch_size,
            device=self.model.cfg.device or "cpu",
            autocast=config.bf16,
            lr=config.lr,
            lr_end=config.lr,
            lr_warm_up_steps=warm_up,
            lr_decay_steps=min(round(config.decay * steps), steps - warm_up),
            dead_feature_window=max(10, min(500, steps // 10)),
            feature_sampling_window=max(10, min(1000, steps // 2)),
            logger=LoggingConfig(log_to_wandb=False),
        )

    def _measure_scales(self) -> None:
        """What brings the activations at each hook to the norm `sqrt(d)`, on the mean of the first batches."""
        new = [target for target in self.targets if target.name not in self.scales]
        if not new:
            return
        self.stream.step = 0
        norms: dict[str, list[float]] = {hook: [] for target in new for hook in target.hooks}
        for _ in range(SCALE_BATCHES):
            batch = next(self.stream)
            for hook, values in norms.items():
                values.append(batch[hook].norm(dim=-1).mean().item())
        for target in new:
            means = {hook: sum(norms[hook]) / SCALE_BATCHES for hook in target.hooks}
            silent = [hook for hook, mean in means.items() if mean == 0]
            if silent:
                raise TrainingError(f"{silent[0]!r} is zero on every token: there is nothing to train on.")
            self.scales[target.name] = [self.stream.widths[hook] ** 0.5 / mean for hook, mean in means.items()]

    def _finish(self, target: Target) -> None:
        """Fold, save, and give the checkpoint up."""
        trainer, scales = self.trainers[target.name], self.scales[target.name]
        sae, folder = trainer.sae, self.out / target.name
        if target.hook_out is None:
            sae.fold_activation_norm_scaling_factor(scales[0])
        else:
            sae.fold_scales(*scales)
        if self.config.architecture in ("standard", "gated", "jumprelu"):
            sae.fold_W_dec_norm()  # SAELens does so by itself on saving those of the top-k kind
        trainer.set_final_sae_metadata()
        sae.cfg.metadata.training = asdict(self.config)
        sae.cfg.metadata.training_source = self.source
        save_half(sae, folder)
        for leftover in (self._checkpoint(target), *folder.glob(".*.part")):  # the latter of writes that were killed
            leftover.unlink(missing_ok=True)

    def _is_finished(self, target: Target) -> bool:
        """Whether the folder holds what this run would put there; `_other_work` has seen that it is no other."""
        return all((self.out / target.name / file).is_file() for file in FORMATS["saelens"])

    def _other_work(self, target: Target) -> str:
        """What there is to lose in the folder, in words; empty where it is this run's own, or nothing."""
        folder = self.out / target.name
        config, _ = FORMATS["saelens"]
        there = [file for files in FORMATS.values() for file in files if (folder / file).exists()]
        if (folder / config).is_file():
            metadata = read_json(folder / config).get("metadata") or {}
            if metadata.get("finetuning") is not None:
                return f"{target.name} was fine-tuned since it was trained"
            facts = {
                "config": metadata.get("training"),
                "hooks": [metadata[key] for key in ("hook_name", "hook_name_out") if metadata.get(key)],
                "source": metadata.get("training_source"),
            }
            found = differing(facts, self._identity(target))
            return f"{target.name} differs in {found}" if found else ""
        if (folder / CHECKPOINT_FILE).exists():
            found = differing(read_facts(folder / CHECKPOINT_FILE), self._identity(target))
            return f"the checkpoint of {target.name} differs in {found}" if found else ""
        return f"{target.name} has {', '.join(there)}, which is not of a training here" if there else ""

    # --- checkpoints --------------------------------------------------------------------------------------------------

    def _checkpoint(self, target: Target) -> Path:
        return self.out / target.name / CHECKPOINT_FILE

    def _save(self) -> int:
        """A checkpoint of every SAE, each whole or not at all; the step."""
        for target in self.targets:
            trainer, path = self.trainers[target.name], self._checkpoint(target)
            if trainer.n_training_steps > self.stream.step:  # its own checkpoint is newer than this run has come
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            facts = self._identity(target) | {
                "counters": {
                    name: getattr(trainer, name)
                    for name in ("n_training_steps", "n_training_samples", "n_frac_active_samples")
                },
                "lr": trainer.optimizer.param_groups[0]["lr"],
                "lr_scheduler": trainer.lr_scheduler.state_dict(),
                "coefficients": {name: s.state_dict() for name, s in trainer.coefficient_schedulers.items()},
                "scales": self.scales[target.name],
                "position": self.rows.position(),
            }
            save_checkpoint(path, _tensors(trainer), trainer.optimizer, facts)
        return self.stream.step

    def _identity(self, target: Target) -> dict[str, Any]:
        """What a checkpoint has to agree on to be of this run."""
        return {"config": asdict(self.config), "hooks": target.hooks, "source": self.source}


def save_half(sae: Any, folder: Path) -> None:
    """An SAE as an inference SAE in SAELens' format, in float16; the decoder norms of a trained one are folded."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.detach().float().clone() for name, tensor in sae.state_dict().items()}
    if isinstance(sae, TrainingSAE):
        sae.process_state_dict_for_saving_inference(state)
        cfg = sae.cfg.get_inference_sae_cfg_dict()
        if "rescale_acts_by_decoder_norm" in cfg:
            cfg["rescale_acts_by_decoder_norm"] = False
    else:
        sae.process_state_dict_for_saving(state)
        cfg = sae.cfg.to_dict()
    cfg |= {"dtype": "float16", "device": "cpu"}
    tensors = {name: tensor.half().contiguous() for name, tensor in state.items()}
    write_atomically(folder / SAE_WEIGHTS_FILENAME, lambda path: save_file(tensors, path))
    # SAELens takes the keys from a set: sorted, the same SAE makes the same file.
    text = json.dumps(cfg, indent=1, default=str, sort_keys=True)
    write_atomically(folder / SAE_CFG_FILENAME, lambda path: path.write_text(text))


def _tensors(trainer: SAETrainer[Any, Any]) -> dict[str, Tensor]:
    """What changes in training, Adam's state apart."""
    return {
        **dict(trainer.sae.named_parameters()),
        **dict(trainer.sae.named_buffers()),
        "act_freq_scores": trainer.act_freq_scores,
        "n_forward_passes_since_fired": trainer.n_forward_passes_since_fired,
    }


def _rows(
    model: HookedBilinearTransformer, data: Any, config: SAETrainConfig, column: str, split: str, streaming: bool
) -> Rows:
    """The packed rows of what `train_saes` was given."""
    from datasets import Dataset, IterableDataset

    n_ctx = model.cfg.n_ctx
    if streaming and isinstance(data, str | os.PathLike):
        data = open_dataset(data, split, streaming=True)
    if isinstance(data, Dataset | IterableDataset):
        return StreamedRows(data, column, model._require_tokenizer(), n_ctx, bool(model.n_bos))
    texts = load_texts(data, split, column)
    pieces = TokenizedTexts.from_texts(texts, model._require_tokenizer(), bool(model.n_bos)).pieces(n_ctx)
    n_tokens = sum(map(len, pieces))
    if n_tokens < config.batch_size:
        raise TrainingError(
            f"the data has {n_tokens} tokens in {len(texts)} texts, fewer than one batch of {config.batch_size}."
        )
    return PackedRows(pieces, n_ctx, config.seed)


def _place(hook: str) -> tuple[str, int]:
    """The point and layer of any hook of a block; the point is the published one where there is one."""
    match = re.fullmatch(r"blocks\.(\d+)\.(.+)", hook)
    if match is None:
        raise SAEMismatchError(
            f"hook {hook!r} is in no block, so there is no layer to call its SAE's folder by; the residual stream of "
            "every layer is at blocks.{layer}.hook_resid_pre and blocks.{layer}.hook_resid_post."
        )
    return HOOK_TO_POINT.get(match[2], match[2]), int(match[1])
