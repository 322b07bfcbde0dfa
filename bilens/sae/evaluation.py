"""How good SAEs are, on whole texts: sparsity, fidelity, and what the model loses when they are spliced in.

Texts run each from its `[BOS]` to the end of the context, as in `bilens.training.validate`. Sparsity and explained
variance leave the `[BOS]` position out: its activation is one constant vector, easy to reconstruct and often large.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from sae_lens import SAE
from torch import Tensor
from tqdm.auto import tqdm

from bilens.data import TokenizedTexts
from bilens.display import Tabular
from bilens.errors import SAEMismatchError
from bilens.model import HookedBilinearTransformer

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class SAEScore:
    """One SAE on a set of texts.

    Attributes:
        l0: mean number of active features per token.
        explained_variance: pooled R^2 around the mean activation: 1 - sum |x - x^|^2 / sum |x - mean|^2.
        loss_recovered: (zero-ablated - spliced) / (zero-ablated - clean), of the losses below.
        dead: features never active on these texts.
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
    loss_clean: float
    loss_spliced: float
    loss_ablated: float


@dataclass(frozen=True)
class SAEScores(Tabular):
    """Scores of several SAEs on the same texts."""

    scores: tuple[SAEScore, ...]
    n_tokens: int

    def to_frame(self) -> "pd.DataFrame":
        """One row per SAE."""
        import pandas as pd

        return pd.DataFrame([asdict(score) for score in self.scores])

    def __str__(self) -> str:
        return f"{self.to_frame().round(4).to_string(index=False)}\non {self.n_tokens} tokens"


@torch.no_grad()
def evaluate_saes(
    model: HookedBilinearTransformer, saes: Mapping[str, SAE[Any]], texts: list[str], *, batch_size: int = 16
) -> SAEScores:
    """Score SAEs by what they reconstruct and by what the model loses.

    Args:
        model: the model they were trained on.
        saes: by name; each knows its hook.
        texts: not seen in training.
        batch_size: texts at a time.

    Raises:
        SAEMismatchError: an SAE that does not say which hook it is on.
    """
    for name, sae in saes.items():
        if sae.cfg.metadata.hook_name is None:
            raise SAEMismatchError(f"the SAE {name!r} has no metadata.hook_name; set it to the hook it was trained on.")
        model.check_hook_name(sae.cfg.metadata.hook_name)
    tokens, mask = TokenizedTexts.from_texts(texts, model.tokenizer).starts(model.cfg.n_ctx)
    tallies = {name: _Tally(sae) for name, sae in saes.items()}
    clean = 0.0
    for at in tqdm(range(0, len(tokens), batch_size), desc="evaluating SAEs", unit="batch"):
        rows = tokens[at : at + batch_size].to(model.cfg.device)
        row_mask = mask[at : at + batch_size].to(model.cfg.device)
        loss, cache = model.run_with_cache(
            rows, return_type="loss", loss_per_token=True, names_filter=list({t.hook for t in tallies.values()})
        )
        clean += (loss * row_mask[:, 1:]).sum().item()
        for tally in tallies.values():
            tally.add(model, rows, row_mask, cache[tally.hook])
    predicted = int(mask[:, 1:].sum())
    return SAEScores(tuple(t.score(name, clean, predicted) for name, t in tallies.items()), predicted)


class _Tally:
    """Running sums of one SAE."""

    def __init__(self, sae: SAE[Any]):
        self.sae, self.hook = sae, sae.cfg.metadata.hook_name
        self.n, self.active, self.error, self.square = 0, 0.0, 0.0, 0.0
        self.sum = torch.zeros(sae.cfg.d_in, dtype=torch.float64, device=sae.device)
        self.fired = torch.zeros(sae.cfg.d_sae, dtype=torch.bool, device=sae.device)
        self.spliced, self.ablated = 0.0, 0.0

    def add(self, model: HookedBilinearTransformer, rows: Tensor, mask: Tensor, x: Float[Tensor, "b p d"]) -> None:
        acts = self.sae.encode(x)
        reconstruction = self.sae.decode(acts).to(x.dtype)  # a half-precision SAE in a float32 model
        kept = mask.bool()
        kept[:, 0] = False
        x_kept, acts_kept = x[kept].double(), acts[kept]
        self.n += len(x_kept)
        self.active += (acts_kept != 0).sum().item()
        self.fired |= (acts_kept != 0).any(0)
        self.error += (x_kept - reconstruction[kept].double()).pow(2).sum().item()
        self.square += x_kept.pow(2).sum().item()
        self.sum += x_kept.sum(0)
        self.spliced += self._loss(model, rows, mask, reconstruction)
        self.ablated += self._loss(model, rows, mask, torch.zeros_like(x))

    def _loss(self, model: HookedBilinearTransformer, rows: Tensor, mask: Tensor, value: Tensor) -> float:
        hooks = [(self.hook, lambda activation, hook: value)]
        loss = model.run_with_hooks(rows, return_type="loss", loss_per_token=True, fwd_hooks=hooks)
        return (loss * mask[:, 1:]).sum().item()

    def score(self, name: str, clean: float, predicted: int) -> SAEScore:
        variance = self.square - (self.sum**2).sum().item() / self.n
        return SAEScore(
            name=name,
            hook_name=self.hook,
            d_sae=self.sae.cfg.d_sae,
            l0=self.active / self.n,
            explained_variance=1 - self.error / variance,
            loss_recovered=(self.ablated - self.spliced) / (self.ablated - clean),
            dead=int((~self.fired).sum()),
            loss_clean=clean / predicted,
            loss_spliced=self.spliced / predicted,
            loss_ablated=self.ablated / predicted,
        )
