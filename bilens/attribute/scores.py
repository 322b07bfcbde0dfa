"""Why a head looks where it does: a score as an exact sum over what stands in the stream where it asks, and where it is
asked of.

    score = q . k = sum over i, j of (part_i W_Q) . (part_j W_K)      both turned by their positions, norms frozen

so a score is exactly bilinear in the parts of two residual streams. A head with polynomial attention multiplies two
such scores, each of which is frozen while the other is taken apart, half to each. It has no sign of its own (`A -> -A,
OV -> -OV` leaves the model as it is), so what is split there is what it moves to a target.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Float
from torch import Tensor

from bilens._core.bare import require_bare
from bilens._core.checks import check_index, check_sizes
from bilens._core.completeness import Complete
from bilens._core.display import Tabular
from bilens.attribute.frozen import FrozenPass, Names, names_by_hook
from bilens.attribute.targets import STREAM, Target, read_targets
from bilens.draw import plots
from bilens.errors import ArgumentError
from bilens.model.hook_points import hook_of


@dataclass(frozen=True, repr=False)
class ScoreSplit(Complete, Tabular):
    """A head's score between two positions, by what is read at each; made by `split_score`.

    Attributes:
        layer, head, query, key: the head, and the positions that ask and are asked of.
        of: what the parts add up to: the score, or what the head moves from there to a target.
        tokens: the tokens of the text.
        query_parts, key_parts: what the stream is made of at each.
        values: the value of each pair of parts.
        actual: what the model computed.
        dtype: the type of the model's forward pass.
    """

    layer: int
    head: int
    query: int
    key: int
    of: str
    tokens: Sequence[str]
    query_parts: list[str]
    key_parts: list[str]
    values: Float[Tensor, "query_part key_part"]
    actual: float
    dtype: torch.dtype = field(default=torch.float32)

    @property
    def total(self) -> float:
        """The sum of every pair."""
        return self.values.sum().item()

    @property
    def absolute_sum(self) -> float:
        """Sum of the pairs' absolute values."""
        return self.values.abs().sum().item()

    def top(self, n: int = 20) -> pd.DataFrame:
        """The `n` largest pairs by absolute value."""
        check_sizes(n=n)
        return self.to_frame().head(n)

    def to_frame(self) -> pd.DataFrame:
        """One row per pair, the largest first: `query_part, key_part, value`."""
        order = self.values.abs().flatten().argsort(descending=True)
        rows, columns = order // self.values.shape[1], order % self.values.shape[1]
        return pd.DataFrame(
            {
                "query_part": [self.query_parts[i] for i in rows.tolist()],
                "key_part": [self.key_parts[i] for i in columns.tolist()],
                "value": self.values.flatten()[order].tolist(),
            }
        )

    def plot(self, top: int = 20) -> go.Figure:
        """The largest pairs as signed bars."""
        frame = self.top(top)
        labels = [f"{q} × {k}" for q, k in zip(frame.query_part, frame.key_part, strict=True)]
        return plots.bars(labels, frame.value.tolist(), f"L{self.layer}H{self.head}: {self.of}")

    def __str__(self) -> str:
        places = (f"{self.query} {self.tokens[self.query]!r}", f"{self.key} {self.tokens[self.key]!r}")
        head = (
            f"L{self.layer}H{self.head} at {places[0]} asking of {places[1]}: {self.of} {self.actual:+.5g}, {self._gap}"
        )
        rows = self.top(10).itertuples()
        return "\n".join([head, *(f"  {row.value:+10.4g}  {row.query_part} × {row.key_part}" for row in rows)])


@torch.no_grad()
def split_score(
    frozen: FrozenPass,
    layer: int,
    head: int,
    key: int,
    query: int = -1,
    *,
    target: Target | None = None,
    names: Names | None = None,
) -> ScoreSplit:
    """Split a head's score exactly over pairs of parts of the stream: at the position that asks, and the one asked of.

    The parts are the token's embedding, attention and MLPs of the layers below (these by the features that an SAE on
    their output writes), or the features of an SAE on this layer's `resid-pre`; and the head's own biases.

    Args:
        frozen: the forward pass, with SAEs where features are wanted.
        layer, head: the head.
        key, query: the position that is asked of, and the one that asks; negative ones count from the end.
        target: for polynomial attention: a target at the position that asks; what is split is what the head moves there
            from `key`, as the target reads it. A softmax is not split: what is, is the score before it.
        names: labels of features by hook or SAE name, or a `FeatureStore`.

    Raises:
        ArgumentError: polynomial attention without a target, softmax attention with one, a target that does not read
            what the head adds at this position, or a key behind the query.
        OutOfRangeError: a layer, head or position that is not there.
        StaleError, AlteredModelError: the model is not what it was.
    """
    frozen.check_current()
    model, cfg = frozen.model, frozen.model.cfg
    layer = check_index(layer, cfg.n_layers, "layer {} is outside the model's {} layers")
    head = check_index(head, cfg.n_heads, "head {} is outside the layer's {} heads")
    outside = "position {} is outside the text's {} tokens"
    query, key = (check_index(at, frozen.n_positions, outside, negative=True) for at in (query, key))
    if key > query:
        raise ArgumentError(f"key {key} comes after query {query}: attention is causal and never looks there.")
    attn, softmax = model.blocks[layer].attn, cfg.attention == "softmax"
    labels = dict(names_by_hook(model, frozen.saes, names))
    (query_parts, asks), (key_parts, asked) = (_stream_parts(frozen, layer, p, labels) for p in (query, key))
    factors = []
    for q, k in zip(cfg.attention_parts[:-1:2], cfg.attention_parts[1:-1:2], strict=True):
        left, right = (_turned(attn, part, head, x, p) for part, x, p in ((q, asks, query), (k, asked, key)))
        factors.append(left @ right.T * cfg.score_scale)
    if softmax:
        if target is not None:
            raise ArgumentError("target goes with polynomial attention; of a softmax the score before it is split.")
        require_bare(model)
        name = f"blocks.{layer}.attn.hook_attn_scores"
        scores = model.run_with_cache(frozen.tokens[None], names_filter=name, return_cache_object=False)[1][name]
        values, actual, of = factors[0], scores[0, head, query, key].item(), "score before the softmax"
    else:
        moved, of = _moved(frozen, layer, head, key, query, target)
        first, second = factors[0], factors[-1]
        values = moved * 0.5 * (first * second.sum() + second * first.sum())
        actual = (moved * frozen.pattern[layer, head, query, key]).item()
    return ScoreSplit(
        layer, head, query, key, of, frozen.strings, query_parts, key_parts, values, actual, dtype=cfg.dtype
    )


def _moved(
    frozen: FrozenPass, layer: int, head: int, key: int, query: int, target: Target | None
) -> tuple[Tensor, str]:
    """What a target reads of the head's value of `key`."""
    kind = frozen.model.cfg.attention
    if target is None:
        raise ArgumentError(
            f"a {kind} score has no sign of its own: pass target=, and what the head moves to it is split, score and "
            "value together."
        )
    reads = read_targets(frozen, target)
    position, level, sees = int(reads.positions[0]), int(reads.levels[0]), int(reads.sees[0])
    if position != query or level < 2 * layer + 1 or (sees != STREAM and level != 2 * layer + 1):
        raise ArgumentError(
            f"{reads.names[0]} at position {position} does not read what layer {layer} adds at position {query} to the "
            "stream."
        )
    return reads.vectors[0] @ (frozen.values(layer)[head, key] @ frozen.W_O[layer, head]), f"to {reads.names[0]}"


def _turned(attn: Any, part: str, head: int, x: Float[Tensor, "part d_model"], position: int) -> Tensor:
    """One part of the fused `qkv` of each part of the stream, turned by its position; the bias comes last."""
    weight, bias = (getattr(attn, f"{letter}_{part.upper()}")[head].to(x) for letter in "Wb")
    read = torch.cat([x @ weight, bias[None]])
    if not attn.cfg.rotary:
        return read
    return attn.rotary(read[:, None, None], torch.tensor([[position]], device=x.device))[:, 0, 0]


def _stream_parts(
    frozen: FrozenPass, layer: int, position: int, labels: dict[str, Any]
) -> tuple[list[str], Float[Tensor, "part d_model"]]:
    """What the stream that enters a layer is made of at a position, over the norm; the names end with the bias's."""
    names: list[str] = []
    parts: list[Tensor] = []

    def add(name: str, part: Tensor) -> None:
        names.append(name)
        parts.append(part)

    def add_features(sae: Any) -> None:
        real = sae.real[position]
        known = labels.get(sae.hook)
        for i, write in zip(sae.features[position][real].tolist(), sae.writes(position, real), strict=True):
            add(f"{sae.label}/{i if known is None else known[i]}", write)
        add(f"{sae.label} b_dec", sae.b_dec[position])
        add(f"{sae.label} error", sae.error[position])

    whole = frozen.saes.get(hook_of("resid-pre", layer))
    if whole is not None:
        add_features(whole)
    else:
        add("embedding", frozen.embed[position])
        for below in range(layer):
            add(f"attention {below}", frozen.attn_out[below, position])
            sae = frozen.output_sae(below)
            add(f"mlp {below}", frozen.mlp_out[below, position]) if sae is None else add_features(sae)
    return [*names, "bias"], torch.stack(parts) / frozen.scale1[layer, position]
