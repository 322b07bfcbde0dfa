"""The usual attributions of the same targets, to compare with the exact ones.

Gradient x input is the first-order term: of a product it gives each factor all of it, so that for a polynomial of
degree `n` its parts add up to as much as `n` times the value. Integrated gradients (Sundararajan et al. 2017, from the
zero embedding) are complete, and with attention and norms frozen the integrand is a polynomial of degree at most
`2^n_layers - 1` in the step, which Gauss-Legendre integrates exactly with `2^(n_layers - 1)` nodes. With real attention
any number of nodes is an approximation: norms make the value jump at the baseline, where all directions are undefined.
"""

from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Float
from torch import Tensor

from bilens._core.display import Tabular
from bilens._core.typing import typed
from bilens.attribute.frozen import FrozenPass
from bilens.attribute.interventions import Hook, frozen_hooks, read_values, rerun
from bilens.attribute.targets import Target, read_targets
from bilens.attribute.tokens import attribute_tokens
from bilens.draw import plots
from bilens.draw.circuits import ColoredTokens
from bilens.errors import ArgumentError

AttentionMode = Literal["frozen", "real"]
MOST_STEPS = 64  # nodes by default, however many layers there are


@dataclass(frozen=True)
class GradientAttribution(Tabular):
    """Gradient x input, or integrated gradients, of the token embeddings.

    Attributes:
        method: `gradient x input` or `integrated gradients`.
        attention: `"frozen"` if patterns and norm scales were frozen, else `"real"`.
        target, position, tokens: the target's name and position, and the tokens of the text.
        values: the attribution of each token.
        actual: the target's value.
        baseline: its value at the zero embedding, as far as `values` claim to explain the difference.
    """

    method: str
    attention: str
    target: str
    position: int
    tokens: list[str] = field(repr=False)
    values: Float[Tensor, "p"]
    actual: float
    baseline: float
    wordpiece: bool = field(default=False, repr=False)

    @property
    def completeness_error(self) -> float:
        """By how much the parts and the baseline miss the value."""
        return self.values.sum().item() + self.baseline - self.actual

    @property
    def relative_error(self) -> float:
        """`|completeness_error|` over the sum of absolute parts."""
        return abs(self.completeness_error) / max(self.values.abs().sum().item() + abs(self.baseline), 1e-30)

    def to_frame(self) -> pd.DataFrame:
        """One row per token: `position, token, value`."""
        return pd.DataFrame({"position": range(len(self.tokens)), "token": self.tokens, "value": self.values.tolist()})

    def to_view(self) -> "ColoredTokens":
        """The text, each token coloured by its part."""
        return ColoredTokens(self.tokens, self.values, wordpiece=self.wordpiece)

    def plot(self) -> go.Figure:
        labels = [f"{place} {token}" for place, token in enumerate(self.tokens)]
        return plots.bars(
            labels, self.values, f"{self.target} at {self.position}: {self.method}, {self.attention} attention"
        )

    def __str__(self) -> str:
        frame = self.to_frame().sort_values("value", key=abs, ascending=False).head(12)
        return (
            f"{self.method} ({self.attention} attention) of {self.target}: value {self.actual:+.5f}, parts"
            f" {self.values.sum().item():+.5f}, baseline {self.baseline:+.5f}, completeness error"
            f" {self.completeness_error:+.1e}\n{frame.to_string(index=False)}"
        )


@typed
def gradient_times_input(
    frozen: FrozenPass, target: Target, *, attention: AttentionMode = "frozen"
) -> GradientAttribution:
    """The gradient of a target by each token's embedding, times the embedding.

    Args:
        frozen: the forward pass.
        target: the target to attribute.
        attention: patterns and norm scales frozen, or part of what is differentiated.
    """
    gradients, _ = _gradients(frozen, target, [1.0], attention)
    return _result(frozen, target, "gradient x input", attention, gradients[0] * frozen.embed, 0.0)


@typed
def integrated_gradients(
    frozen: FrozenPass, target: Target, *, attention: AttentionMode = "frozen", steps: int | None = None
) -> GradientAttribution:
    """Integrated gradients from the zero embedding, by Gauss-Legendre.

    Args:
        frozen: the forward pass.
        target: the target to attribute.
        attention: the same as for `gradient_times_input`.
        steps: nodes; `None` takes as many as are exact with frozen attention, at most 64.
    """
    if steps is None:
        steps = min(2 ** (frozen.n_layers - 1), MOST_STEPS) if attention == "frozen" else MOST_STEPS
    if steps < 1:
        raise ArgumentError(f"steps is {steps}, expected at least 1.")
    nodes, weights = np.polynomial.legendre.leggauss(steps)
    gradients, _ = _gradients(frozen, target, (0.5 * (nodes + 1)).tolist(), attention)
    mean = torch.einsum("n,npd->pd", torch.tensor(0.5 * weights).to(gradients), gradients)
    _, values = _gradients(frozen, target, [0.0], attention)
    return _result(frozen, target, "integrated gradients", attention, mean * frozen.embed, values[0].item())


def compare_tokens(frozen: FrozenPass, target: Target) -> pd.DataFrame:
    """The exact contribution of each token beside the usual attributions, one column each."""
    exact = attribute_tokens(frozen, target)
    assert not isinstance(exact, list)
    frame = exact.to_frame().iloc[:-1].rename(columns={"value": "exact"})
    for attention in ("frozen", "real"):
        frame[f"gradient x input, {attention}"] = gradient_times_input(
            frozen, target, attention=attention
        ).values.tolist()
        frame[f"integrated gradients, {attention}"] = integrated_gradients(
            frozen, target, attention=attention
        ).values.tolist()
    return frame


def _gradients(
    frozen: FrozenPass, target: Target, factors: list[float], attention: AttentionMode
) -> tuple[Float[Tensor, "n p d_model"], Float[Tensor, "n"]]:
    """The target's gradient by the embeddings, and its value, with the embeddings multiplied by each factor."""
    reads = read_targets(frozen, target)
    hooks = frozen_hooks(frozen) if attention == "frozen" else []
    with torch.inference_mode(False), torch.enable_grad():
        reads = replace(reads, directions=reads.directions.clone())  # those of inference mode have no gradients
        found = []
        for some in torch.tensor(factors).split(_rows_at_once(frozen)):
            embeds = torch.stack([frozen.cache["hook_embed"] * factor for factor in some.tolist()])
            embeds.requires_grad_()
            held: list[Hook] = [("hook_embed", lambda value, hook, embeds=embeds: embeds), *hooks]
            values = read_values(reads, rerun(frozen, len(some), held, reads.hooks))[:, 0]
            found.append((torch.autograd.grad(values.sum(), embeds)[0].to(frozen.dtype), values.detach()))
    gradients, values = (torch.cat(parts) for parts in zip(*found, strict=True))
    return gradients, values


def _rows_at_once(frozen: FrozenPass) -> int:
    """Runs of the model at once, each with all that its gradient needs."""
    cfg, n = frozen.model.cfg, frozen.n_positions
    layer = 12 * cfg.d_model + 3 * frozen.model.blocks[0].mlp.w.weight.shape[0] + 4 * cfg.n_heads * n
    each = 4 * n * cfg.n_layers * layer
    return frozen.at_once("the gradient of a run of the model", each, MOST_STEPS * each)


def _result(
    frozen: FrozenPass, target: Target, method: str, attention: str, parts: Float[Tensor, "p d_model"], baseline: float
) -> GradientAttribution:
    reads = read_targets(frozen, target)
    return GradientAttribution(
        method=method,
        attention=attention,
        target=reads.names[0],
        position=int(reads.positions[0]),
        tokens=frozen.strings,
        values=parts.sum(-1).detach(),
        actual=reads.actual.item(),
        baseline=baseline,
        wordpiece=frozen.model.tokenizer is not None and frozen.model.is_wordpiece,
    )
