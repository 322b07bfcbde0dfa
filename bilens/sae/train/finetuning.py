"""Fine-tuning trained SAEs on what the model does with their reconstructions.

An SAE trained on squared error spends its features on what is large, not on what the model uses. A short fine-tuning on
the output of the spliced model mends that:

    1. tokens -> the residual stream entering the SAE's layer, the activation x at its hook, the model's own logits
    2. the reconstruction x^ takes the activation's place and the rest of the model runs on
    3. loss = KL(own logits || spliced logits) + a |x^ - x|^2, with `a` set at every step to make the two terms equal
    4. decoder directions are brought back to their norms: only directions, encoder and biases are tuned

Every step depends on (seed, step) alone, so a run that was killed goes on from its checkpoint as if it had not been.

Source: Karvonen 2025, "Revisiting end-to-end sparse autoencoder training: a short finetune is all you need"
(arXiv 2503.17272).
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from sae_lens import SAE
from sae_lens.constants import SAE_CFG_FILENAME
from safetensors import safe_open
from torch import Tensor

from bilens._core.bare import require_bare
from bilens._core.checkpoint import WEIGHT, load_checkpoint, read_facts, resumable, save_checkpoint
from bilens._core.checks import check_file_name, check_flags, check_rates, check_seeds, check_sizes
from bilens._core.files import destination_folder, read_json
from bilens._core.fingerprint import model_fingerprint, sae_fingerprint
from bilens._core.folders import alone_in, differing, make_room
from bilens.errors import ArgumentError, SAEMismatchError, TrainingError
from bilens.model.transformer import HookedBilinearTransformer
from bilens.sae.loading import FORMATS, load_sae_folder
from bilens.sae.train.training import save_half
from bilens.train.data import Texts, TokenizedTexts, load_texts, pack, pieces_identity

CHECKPOINT_FILE = "finetuning.safetensors"


@dataclass(frozen=True)
class FinetuneConfig:
    """Everything that decides a run, the model, SAE and data apart.

    Args:
        tokens: training tokens.
        batch_size: contexts per step.
        lr: peak learning rate of Adam, warmed up over 20 steps and decayed linearly to zero over the last half.
        bf16: autocast to bfloat16.
        seed: the seed of the order of texts.
        checkpoint_every: steps.

    Raises:
        ArgumentError: a value outside its range.
    """

    tokens: int = 4_000_000
    batch_size: int = 8
    lr: float = 1e-3
    bf16: bool = True
    seed: int = 1
    checkpoint_every: int = 100

    def __post_init__(self) -> None:
        check_sizes(tokens=self.tokens, batch_size=self.batch_size, checkpoint_every=self.checkpoint_every)
        check_rates(lr=self.lr)
        check_flags(bf16=self.bf16)
        check_seeds(seed=self.seed)


def finetune_saes(
    model: HookedBilinearTransformer,
    saes: Mapping[str, SAE[Any]],
    data: Texts,
    out: str | os.PathLike[str],
    config: FinetuneConfig | None = None,
    *,
    column: str = "text",
    overwrite: bool = False,
) -> dict[str, SAE[Any]]:
    """Fine-tune SAEs, one after the other, and write each to `out/{name}` in SAELens' format, half precision.

    The configuration goes into each SAE's `cfg.metadata.finetuning`. In the folder that it was loaded from, an SAE is
    replaced by the one it becomes. Called again after an interruption, it goes on where it was; what is finished is not
    tuned again, and given as it is on disk.

    Args:
        model: that they were trained on; its own weights are left alone.
        saes: the SAEs by folder name, as `load_sae` gives them; they are changed in place.
        data: texts, or where to load them (see `bilens.train.data.load_texts`).
        out: the folder of the SAE folders.
        config: `None` takes the defaults.
        column: the field that holds the text.
        overwrite: replace other SAEs that are in the folders to be written, and tune once more what was tuned already,
            instead of refusing.

    Returns:
        The SAEs, changed.

    Raises:
        ArgumentError: a name cannot be that of a folder, or there are fewer tokens than a step takes.
        OverwriteError: a folder with another SAE, one that was fine-tuned already, or another run's checkpoint.
        WriteError: another process is at work in `out`, or the disk is full.
        HookNameError, SAEMismatchError: an SAE that is on no hook of a block of this model.
        TrainingError: a loss that is not finite.
    """
    check_flags(overwrite=overwrite)
    config, out = config or FinetuneConfig(), destination_folder(out)
    if not isinstance(saes, Mapping) or not saes:
        raise ArgumentError(f"saes is {saes!r:.80}, expected SAEs by the names of their folders.")
    for name in saes:
        check_file_name(name)
    texts = load_texts(data, column=column)
    pieces = TokenizedTexts.from_texts(texts, model._require_tokenizer(), bool(model.n_bos)).pieces(model.cfg.n_ctx)
    with alone_in(out):
        runs = [
            FinetuneRun(model, sae, pieces, config, out / name / CHECKPOINT_FILE, name) for name, sae in saes.items()
        ]
        finished = [run.is_finished() for run in runs]
        others = {run: reason for run in runs if (reason := run.other_work())}

        def start_over() -> None:
            for run in others:
                run.start_over()

        make_room(out, "; ".join(others.values()), start_over, overwrite=overwrite)
        for run, is_finished in zip(runs, finished, strict=True):
            if is_finished:
                run.take_over()
                continue
            folder = run.checkpoint.parent
            folder.mkdir(exist_ok=True)
            run.fit()
            run.sae.cfg.metadata.finetuning = asdict(config)
            run.sae.cfg.metadata.finetuning_source = run.source
            save_half(run.sae, folder)
            for file in FORMATS["published"]:  # it would be found first
                (folder / file).unlink(missing_ok=True)
            for leftover in (run.checkpoint, *folder.glob(".*.part")):  # the latter of writes that were killed
                leftover.unlink(missing_ok=True)
    return dict(saes)


class FinetuneRun:
    """The loop of `finetune_saes` for one SAE, on token pieces (`TokenizedTexts.pieces`)."""

    def __init__(
        self,
        model: HookedBilinearTransformer,
        sae: SAE[Any],
        pieces: Sequence[list[int]],
        config: FinetuneConfig,
        checkpoint: Path,
        name: str = "SAE",
    ):
        hook = sae.cfg.metadata.hook_name
        match = re.match(r"blocks\.(\d+)\.", hook or "")
        if match is None:
            raise SAEMismatchError(
                f"{name} is on {hook!r}; to be fine-tuned it needs as metadata.hook_name a hook of one of the model's "
                "blocks, such as 'blocks.1.hook_mlp_out'."
            )
        model.check_hook_name(hook)
        require_bare(model, sae)
        self.model, self.sae, self.pieces, self.config = model, sae.to(torch.float32), pieces, config
        self.checkpoint, self.name, self.hook, self.layer = checkpoint, name, hook, int(match[1])
        self.n_steps = config.tokens // (config.batch_size * model.cfg.n_ctx)
        if self.n_steps < 1:
            raise ArgumentError(
                f"tokens is {config.tokens}, fewer than the {config.batch_size * model.cfg.n_ctx} of one step: "
                f"{config.batch_size} contexts of {model.cfg.n_ctx}."
            )
        self.step = 0
        tuned = dict(sae.named_parameters())
        self.optimizer = torch.optim.Adam(tuned.values(), lr=config.lr)
        self.norms = sae.W_dec.detach().norm(dim=-1, keepdim=True)
        self.weights = tuned | {"norms": self.norms}
        self.before = sae_fingerprint(sae)
        self.source = {"model": model_fingerprint(model), **pieces_identity(pieces), "sae": self._started_from()}

    def _started_from(self) -> str:
        """The fingerprint of the SAE as it was before the first step."""
        if not self.checkpoint.exists():
            return self.before
        facts = read_facts(self.checkpoint)
        # It is what an interrupted run left in memory, or what a finished one was writing when it was killed.
        with safe_open(self.checkpoint, framework="pt") as file:
            stored = set(file.keys())
            left = all(
                f"{WEIGHT}:{name}" in stored and torch.equal(file.get_tensor(f"{WEIGHT}:{name}"), weight.detach().cpu())
                for name, weight in self.sae.named_parameters()
            )
        ours = left or facts.get("step") == self.n_steps
        return (facts.get("source") or {}).get("sae", self.before) if ours else self.before

    def is_finished(self) -> bool:
        """Whether the folder holds what this run would put there."""
        path = self.checkpoint.with_name(SAE_CFG_FILENAME)
        if not path.is_file() or self.checkpoint.exists():
            return False
        metadata = read_json(path).get("metadata") or {}
        source = metadata.get("finetuning_source") or {}
        return (
            metadata.get("finetuning") == asdict(self.config)
            and source | {"sae": None} == self.source | {"sae": None}
            and self.before in (source.get("sae"), sae_fingerprint(self._on_disk()))
        )

    def other_work(self) -> str:
        """What there is to lose in the folder, in words; empty where it is this run's own, or nothing."""
        folder = self.checkpoint.parent
        if self.checkpoint.exists():
            found = differing(read_facts(self.checkpoint), self._identity)
            return f"the checkpoint of {self.name} differs in {found}" if found else ""
        if self.is_finished() or not any((folder / config).exists() for config, _ in FORMATS.values()):
            return ""
        there = self._on_disk()
        tuned = there.cfg.metadata.finetuning
        if tuned is not None:
            found = differing(tuned, asdict(self.config)) or "the model, the texts or the SAE"
            return f"{self.name} was fine-tuned already, by a run that differs in {found}"
        return "" if sae_fingerprint(there) == self.before else f"{self.name} is another SAE than the one given"

    def start_over(self) -> None:
        """Give up the checkpoint that is there."""
        self.checkpoint.unlink(missing_ok=True)
        self.source["sae"] = self.before

    def take_over(self) -> None:
        """Make the SAE what it is on disk."""
        there = self._on_disk()
        self.sae.load_state_dict(there.state_dict())
        self.sae.cfg.metadata.finetuning = there.cfg.metadata.finetuning
        self.sae.cfg.metadata.finetuning_source = there.cfg.metadata.finetuning_source

    def _on_disk(self) -> SAE[Any]:
        cfg = self.model.cfg
        return load_sae_folder(self.checkpoint.parent, device="cpu", n_layers=cfg.n_layers, scale_attn=cfg.scale_attn)

    def fit(self) -> None:
        """Take every step that is left."""
        if self.checkpoint.exists():
            self.step = load_checkpoint(self.checkpoint, self.weights, self.optimizer, self._identity)["step"]
        tokens_per_step = self.config.batch_size * self.model.cfg.n_ctx
        done, total = self.step * tokens_per_step, self.n_steps * tokens_per_step
        frozen = [weight for weight in self.model.parameters() if weight.requires_grad]
        for weight in frozen:
            weight.requires_grad_(False)
        try:
            with resumable(f"fine-tuning {self.name}", total, done, self._save) as bar:
                for batch in self._batches():
                    divergence = self._take_step(batch)
                    bar.update(tokens_per_step)
                    if self.step % 20 == 0:
                        bar.set_postfix(KL=f"{divergence:.4f}")
                    if self.step % self.config.checkpoint_every == 0 or self.step == self.n_steps:
                        self._save()
        finally:
            for weight in frozen:
                weight.requires_grad_(True)

    def _batches(self) -> Iterator[Tensor]:
        """The batches of the steps that are left."""
        first, epoch = 0, 0  # the step that the epoch starts with
        while self.step < self.n_steps:
            rows = pack(self.pieces, self.model.cfg.n_ctx, self.config.seed * 1_000_003 + epoch)
            batches = rows.split(self.config.batch_size)
            first, epoch = first + len(batches), epoch + 1
            left = max(0, first - self.step)
            for batch in batches[len(batches) - left :][: self.n_steps - self.step]:
                yield batch.to(self.model.cfg.device)

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, a plateau, and a linear decay to zero over the second half."""
        return self.config.lr * min(1.0, (step + 1) / 20, (self.n_steps - step) / (self.n_steps / 2))

    def _take_step(self, tokens: Tensor) -> float:
        """One step of Adam; the divergence (nats per token) before it."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(self.step)
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=self.config.bf16):
            with torch.no_grad():
                resid = self.model(tokens, stop_at_layer=self.layer)
                own, cache = self.model.run_with_cache(
                    resid, start_at_layer=self.layer, names_filter=self.hook, return_cache_object=False
                )
                x = cache[self.hook].float()
            reconstruction = self.sae.decode(self.sae.encode(x))
            splice = [(self.hook, lambda activation, hook: reconstruction.to(activation.dtype))]
            spliced = self.model.run_with_hooks(resid, start_at_layer=self.layer, fwd_hooks=splice)
        divergence = F.kl_div(
            spliced.float().log_softmax(-1), own.float().log_softmax(-1), log_target=True, reduction="none"
        )
        divergence = divergence.sum(-1).mean()
        error = (reconstruction.float() - x).pow(2).sum(-1).mean()
        loss = divergence + error * (divergence / error).detach()
        if not loss.isfinite():
            raise TrainingError(
                f"{self.name}: the loss is {loss.item()} at step {self.step}; lower the learning rate {self.config.lr}."
            )
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            self.sae.W_dec *= self.norms / self.sae.W_dec.norm(dim=-1, keepdim=True)
        self.step += 1
        return divergence.item()

    def _save(self) -> int:
        save_checkpoint(self.checkpoint, self.weights, self.optimizer, self._identity | {"step": self.step})
        return self.step

    @property
    def _identity(self) -> dict[str, Any]:
        return {"config": asdict(self.config), "hook": self.hook, "source": self.source}
