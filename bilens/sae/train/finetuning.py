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
from torch import Tensor
from tqdm.auto import tqdm

from bilens._core.bare import require_bare
from bilens._core.checkpoint import load_checkpoint, save_checkpoint
from bilens._core.files import to_path
from bilens.errors import SAEMismatchError, TrainingError
from bilens.model.transformer import HookedBilinearTransformer
from bilens.sae.train.training import save_half
from bilens.train.data import Texts, TokenizedTexts, load_texts, pack


@dataclass(frozen=True)
class FinetuneConfig:
    """Everything that decides a run, the model, SAE and data apart.

    Args:
        tokens: training tokens.
        batch_size: contexts per step.
        lr: peak learning rate of Adam, warmed up over 20 steps and decayed linearly to zero over the last half.
        bf16: autocast to bfloat16.
        seed: of the order.
        checkpoint_every: steps.
    """

    tokens: int = 4_000_000
    batch_size: int = 8
    lr: float = 1e-3
    bf16: bool = True
    seed: int = 1
    checkpoint_every: int = 100


def finetune_saes(
    model: HookedBilinearTransformer,
    saes: Mapping[str, SAE[Any]],
    data: Texts,
    out: str | os.PathLike[str],
    config: FinetuneConfig | None = None,
    *,
    column: str = "text",
) -> dict[str, SAE[Any]]:
    """Fine-tune SAEs, one after the other, and write each to `out/{name}` in SAELens' format, half precision.

    The configuration goes into each SAE's `cfg.metadata.finetuning`. Called again after an interruption, it goes on
    where it was.

    Args:
        model: that they were trained on; its own weights are left alone.
        saes: by folder name, as `load_sae` gives them; changed in place.
        data: texts, or where to load them (see `bilens.train.data.load_texts`).
        out: the folder of the SAE folders.
        config: `None` takes the defaults.
        column: the field that holds the text.

    Returns:
        The SAEs, changed.

    Raises:
        HookNameError, SAEMismatchError: an SAE that is on no hook of a block of this model.
        TrainingError: a checkpoint of another run, or a loss that is not finite.
    """
    config, out = config or FinetuneConfig(), to_path(out, "out")
    texts = load_texts(data, column=column)
    pieces = TokenizedTexts.from_texts(texts, model._require_tokenizer(), bool(model.n_bos)).pieces(model.cfg.n_ctx)
    for name, sae in saes.items():
        folder = out / name
        folder.mkdir(parents=True, exist_ok=True)
        run = FinetuneRun(model, sae, pieces, config, folder / "finetuning.safetensors", name)
        run.fit()
        sae.cfg.metadata.finetuning = asdict(config)
        save_half(sae, folder)
        run.checkpoint.unlink(missing_ok=True)
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
        self.norms = sae.W_dec.detach().norm(dim=-1, keepdim=True)
        self.n_steps = max(1, config.tokens // (config.batch_size * model.cfg.n_ctx))
        self.step = 0
        self.weights = dict(sae.named_parameters())
        self.optimizer = torch.optim.Adam(self.weights.values(), lr=config.lr)

    def fit(self) -> None:
        """Take every step that is left."""
        if self.checkpoint.exists():
            self.step = load_checkpoint(self.checkpoint, self.weights, self.optimizer, self._identity)["step"]
        tokens_per_step = self.config.batch_size * self.model.cfg.n_ctx
        done, total = self.step * tokens_per_step, self.n_steps * tokens_per_step
        frozen = [weight for weight in self.model.parameters() if weight.requires_grad]
        for weight in frozen:
            weight.requires_grad_(False)
        bar = tqdm(total=total, initial=done, unit="tok", unit_scale=True, desc=f"fine-tuning {self.name}")
        try:
            for batch in self._batches():
                divergence = self._take_step(batch)
                bar.update(tokens_per_step)
                if self.step % 20 == 0:
                    bar.set_postfix(KL=f"{divergence:.4f}")
                if self.step % self.config.checkpoint_every == 0 and self.step < self.n_steps:
                    self._save()
        except KeyboardInterrupt:
            self._save()
            bar.write(f"interrupted at step {self.step}; run the same command to go on.")
            raise
        finally:
            bar.close()
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

    def _save(self) -> None:
        save_checkpoint(self.checkpoint, self.weights, self.optimizer, self._identity | {"step": self.step})

    @property
    def _identity(self) -> dict[str, Any]:
        return {"config": asdict(self.config), "hook": self.hook, "n_tokens": sum(map(len, self.pieces))}
