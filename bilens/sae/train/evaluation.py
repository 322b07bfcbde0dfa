"""How good SAEs are, on whole texts: sparsity, fidelity, and what the model loses when they are spliced in.

Texts run each from its `[BOS]` to the end of the context, as in `bilens.train.language_model.validate`. Sparsity and
explained variance leave the `[BOS]` position out: its activation is one constant vector, easy to reconstruct and often
large.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from sae_lens import SAE
from torch import Tensor
from tqdm.auto import tqdm

from bilens._core import parallel
from bilens._core.bare import require_bare
from bilens._core.checks import check_sizes
from bilens._core.display import Tabular
from bilens.errors import ArgumentError
from bilens.model.attached import encode, reconstruct, splice_hooks
from bilens.model.transformer import HookedBilinearTransformer
from bilens.sae.texts import text_starts

DENSE = 0.1  # a feature that fires on a larger share of the tokens is dense


@dataclass(frozen=True)
class SAEScore:
    """One SAE on a set of texts.

    Attributes:
        hook_name: the hook it reads.
        l0: mean number of active features per token.
        explained_variance: pooled R^2 around the mean activation: 1 - sum |x - x^|^2 / sum |x - mean|^2.
        loss_recovered: (zero-ablated - spliced) / (zero-ablated - clean), of the losses below.
        dead: features never active on these texts.
        dense: share of the features that are active on more than a tenth of the tokens.
        loss_clean, loss_spliced, loss_ablated: next-token loss (nats per token) of the model as it is, with the
            reconstruction in place of the activation at every position, and with zeros there.
    """

    name: str
    hook_name: str
    d_sae: int
    l0: float
    explained_variance: float
    loss_recovered: float
    dead: int
    dense: float
    loss_clean: float
    loss_spliced: float
    loss_ablated: float


@dataclass(frozen=True)
class SAEScores(Tabular):
    """Scores of several SAEs on the same texts."""

    scores: tuple[SAEScore, ...]
    n_tokens: int

    def to_frame(self) -> pd.DataFrame:
        """One row per SAE."""
        return pd.DataFrame([asdict(score) for score in self.scores])

    def __str__(self) -> str:
        return f"{self.to_frame().round(4).to_string(index=False)}\non {self.n_tokens} tokens"


@parallel.processes()
@torch.no_grad()
def evaluate_saes(
    model: HookedBilinearTransformer, saes: Mapping[str, SAE[Any]], texts: Sequence[str], *, batch_size: int = 16
) -> SAEScores:
    """Score SAEs and transcoders by what they reconstruct and by what the model loses.

    A transcoder is scored where it writes: against the activation at `metadata.hook_name_out`. Under `torchrun` the
    processes share the batches; all of them get the scores of one process, to float64 rounding.

    Args:
        model: the model they were trained on.
        saes: the SAEs by name; each knows its hook.
        texts: not seen in training.
        batch_size: texts at a time.

    Raises:
        AlteredModelError: SAEs are attached to the model, or there are hooks on it or on an SAE.
        ArgumentError: the SAEs have no names, or the batch size is no positive whole number.
        HookNameError, SAEMismatchError: an SAE that does not belong to this model (see `bilens.model.attached`).
        EmptyTextError: no texts, or one with nothing in it.
    """
    if not isinstance(saes, Mapping):
        raise ArgumentError(f'saes is a {type(saes).__name__}; expected SAEs by name: {{"mine": sae}}.')
    check_sizes(batch_size=batch_size)
    tallies = {name: _Tally(sae, *splice_hooks(model, sae, f"the SAE {name!r}")) for name, sae in saes.items()}
    require_bare(model, *saes.values())
    hooks = sorted({hook for tally in tallies.values() for hook in (tally.reads, tally.writes)})
    tokens, mask = text_starts(model, texts)
    clean, ablated = 0.0, dict.fromkeys((tally.writes for tally in tallies.values()), 0.0)
    starts = list(parallel.share(range(0, len(tokens), batch_size)))
    for at in tqdm(starts, desc="evaluating SAEs", unit="batch", disable=not parallel.is_main()):
        rows = tokens[at : at + batch_size].to(model.cfg.device)
        row_mask = mask[at : at + batch_size].to(model.cfg.device)
        counted = row_mask.bool()
        counted[:, : model.n_bos] = False
        loss, cache = model.run_with_cache(rows, return_type="loss", loss_per_token=True, names_filter=hooks)
        clean += _summed(loss, row_mask)
        for hook in ablated:
            ablated[hook] += _spliced_loss(model, rows, row_mask, hook, torch.zeros_like(cache[hook]))
        for tally in tallies.values():
            reconstruction = tally.add(counted, cache[tally.reads], cache[tally.writes])
            tally.loss += _spliced_loss(model, rows, row_mask, tally.writes, reconstruction)
    losses = torch.tensor([clean, *ablated.values()], dtype=torch.float64)
    clean, *rest = parallel.sum_over_processes(losses).tolist()
    ablated = dict(zip(ablated, rest, strict=True))
    for tally in tallies.values():
        tally.join_processes()
    predicted = int(mask[:, 1:].sum())
    scores = (t.score(name, clean, ablated[t.writes], predicted) for name, t in tallies.items())
    return SAEScores(tuple(scores), predicted)


class _Tally:
    """Running sums of one SAE."""

    def __init__(self, sae: SAE[Any], reads: str, writes: str):
        self.sae, self.reads, self.writes = sae, reads, writes
        self.n, self.error, self.square, self.loss = 0, 0.0, 0.0, 0.0
        self.sum = torch.zeros(sae.W_dec.shape[-1], dtype=torch.float64)
        self.fired = torch.zeros(sae.cfg.d_sae, dtype=torch.long)

    def add(self, kept: Tensor, x: Float[Tensor, "b p *width"], y: Float[Tensor, "b p *width_out"]) -> Tensor:
        """Count the tokens `kept` of a batch, `x` read and `y` to be written; its reconstruction."""
        acts = encode(self.sae, x)
        reconstruction = reconstruct(self.sae, acts, x, y)
        target, found = (t[kept].flatten(1).double() for t in (y, reconstruction))
        self.n += len(target)
        self.fired += (acts[kept.to(acts.device)] != 0).sum(0).cpu()
        self.error += (target - found).pow(2).sum().item()
        self.square += target.pow(2).sum().item()
        self.sum += target.sum(0).cpu()
        return reconstruction

    def join_processes(self) -> None:
        """Add up what the processes counted."""
        numbers = torch.tensor([self.n, self.error, self.square, self.loss], dtype=torch.float64)
        n, self.error, self.square, self.loss = parallel.sum_over_processes(numbers).tolist()
        self.n = int(n)
        self.sum, self.fired = parallel.sum_over_processes(self.sum), parallel.sum_over_processes(self.fired)

    def score(self, name: str, clean: float, ablated: float, predicted: int) -> SAEScore:
        return SAEScore(
            name=name,
            hook_name=self.reads,
            d_sae=self.sae.cfg.d_sae,
            l0=self.fired.sum().item() / self.n,
            explained_variance=1 - _ratio(self.error, self.square - self.sum.pow(2).sum().item() / self.n),
            loss_recovered=_ratio(ablated - self.loss, ablated - clean),
            dead=int((self.fired == 0).sum()),
            dense=(self.fired > DENSE * self.n).double().mean().item(),
            loss_clean=clean / predicted,
            loss_spliced=self.loss / predicted,
            loss_ablated=ablated / predicted,
        )


def _spliced_loss(model: HookedBilinearTransformer, rows: Tensor, mask: Tensor, hook_name: str, value: Tensor) -> float:
    """The summed loss with `value` in place of an activation."""
    hooks = [(hook_name, lambda activation, hook: value)]
    loss = model.run_with_hooks(rows, return_type="loss", loss_per_token=True, fwd_hooks=hooks)
    return _summed(loss, mask)


def _summed(loss: Float[Tensor, "b p_less_1"], mask: Tensor) -> float:
    """Over the predicted tokens, in float64."""
    return (loss * mask[:, 1:]).cpu().double().sum().item()


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.nan
