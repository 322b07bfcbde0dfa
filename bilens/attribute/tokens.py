"""How much each token of the text contributed to a feature, a logit or any direction: exactly, through every layer.

1. the residual stream starts as one part per token (its embedding) and one for biases
2. attention, frozen, moves the parts linearly
3. an MLP's output is a quadratic form of the parts: every product of two goes half to each, which within the MLP is
   their Shapley value (`algebra.mlp_shares`)
4. what a target reads of each part at its position is that token's contribution; together they are its value

Through several MLPs the halves multiply: of a product `(a b) c`, formed where one MLP multiplies `a b` of an earlier
one with `c`, `c` gets a half and `a`, `b` a quarter each. That is the value of the game in which products are made in
the order the network makes them (nested, as Owen's value is), not the Shapley value of all tokens at once (a third
each).

The pair matrix is what products in the last MLP on the way contributed: entry `(s, t)` is half of what token `s` and
token `t` made together there (an MLP further down makes parts of them), its diagonal also holds what came without one.
Its rows add up to the contributions.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Float
from torch import Tensor

from bilens._core.checks import check_budget
from bilens._core.completeness import Complete
from bilens._core.display import Tabular
from bilens._core.typing import typed
from bilens.attribute.algebra import attention_back, attention_forward, head_parts, mlp_back, mlp_shares
from bilens.attribute.frozen import FrozenPass
from bilens.attribute.splitting import Fields, backward_fields
from bilens.attribute.targets import ATTN, MLP, STREAM, Reads, Target, read_targets
from bilens.draw import plots
from bilens.draw.circuits import AttentionPatterns, ColoredTokens
from bilens.errors import ArgumentError
from bilens.layer.bilinear import branches, hidden_coefficients

BYTES_AT_ONCE = 2**28  # of what is made of several reads, or at several positions, together


@dataclass(frozen=True)
class TokenAttribution(Complete, Tabular):
    """What each token contributed to one target.

    Attributes:
        target, position: the target's name and position.
        tokens: the tokens of the text.
        values: the contribution of each token; those after the target contribute zero.
        bias: the contribution of biases (of attention and MLPs, and the target's constant).
        actual: the value that the model (and the target's SAE) computed.
        heads: the part that each head moved from each position to the target's own (whatever it is made of), seen by
            the target: one step, weighted by attention.
        pairs: the pairs of tokens, biases (and the target's constant) last; half of each pair on either side.
    """

    target: str
    position: int
    tokens: list[str] = field(repr=False)
    values: Float[Tensor, "p"]
    bias: float
    actual: float
    heads: Float[Tensor, "layer head p"] = field(repr=False)
    pairs: Float[Tensor, "p_plus_one p_plus_one"] | None = field(default=None, repr=False)
    wordpiece: bool = field(default=False, repr=False)
    dtype: torch.dtype = field(default=torch.float32, repr=False)

    @property
    def total(self) -> float:
        """The float32 sum of every part."""
        return (self.values.float().sum() + self.bias).item()

    @property
    def absolute_sum(self) -> float:
        return self.values.abs().sum().item() + abs(self.bias)

    def to_frame(self) -> pd.DataFrame:
        """One row per token, and one for biases: `position, token, value`."""
        rows = list(zip(range(len(self.tokens)), self.tokens, self.values.tolist(), strict=True))
        return pd.DataFrame([*rows, (-1, "(biases)", self.bias)], columns=["position", "token", "value"])

    def head_frame(self, top: int = 50) -> pd.DataFrame:
        """What heads moved, largest first: `layer, head, position, token, value`."""
        flat = self.heads.flatten()
        order = flat.abs().argsort(descending=True)[:top]
        where = torch.stack(torch.unravel_index(order, self.heads.shape), 1).tolist()
        rows = [
            (layer, head, at, self.tokens[at], value)
            for (layer, head, at), value in zip(where, flat[order].tolist(), strict=True)
        ]
        return pd.DataFrame(rows, columns=["layer", "head", "position", "token", "value"])

    def to_view(self) -> "ColoredTokens":
        """The text, each token coloured by its contribution."""
        return ColoredTokens(self.tokens, self.values, wordpiece=self.wordpiece)

    def heads_view(self) -> "AttentionPatterns":
        """What every head moved to the target's position, one map per head, in that position's row."""
        n_layers, n_heads, n = self.heads.shape
        maps = self.heads.new_zeros(n_layers * n_heads, n, n)
        maps[:, self.position] = self.heads.flatten(0, 1)
        names = [f"L{layer}H{head}" for layer in range(n_layers) for head in range(n_heads)]
        return AttentionPatterns(self.tokens, maps, names, wordpiece=self.wordpiece)

    def plot(self) -> go.Figure:
        """Contributions as signed bars, in the order of the text."""
        labels = [f"{place} {token}" for place, token in enumerate(self.tokens)]
        return plots.bars([*labels, "biases"], [*self.values.tolist(), self.bias], f"{self.target} at {self.position}")

    def plot_pairs(self) -> go.Figure:
        """The pair matrix as a heat map."""
        if self.pairs is None:
            raise ArgumentError("this was made without the pair matrix; ask for it with attribute_tokens(pairs=True).")
        labels = [*(f"{place} {token}" for place, token in enumerate(self.tokens)), "biases"]
        return plots.heatmap(self.pairs, labels, labels, f"{self.target} at {self.position}: pairs of tokens")

    def _repr_html_(self) -> str:
        return self.to_view()._repr_html_()

    def __str__(self) -> str:
        frame = self.to_frame()
        head = (
            f"{self.target} at position {self.position} ({self.tokens[self.position]!r}): value {self.actual:+.5f}, "
            f"tokens and biases {self.total:+.5f}, {self._gap}"
        )
        return f"{head}\n{frame.sort_values('value', key=abs, ascending=False).head(12).to_string(index=False)}"


@typed
@torch.no_grad()
def attribute_tokens(
    frozen: FrozenPass, targets: Target | Sequence[Target], *, pairs: bool = False
) -> TokenAttribution | list[TokenAttribution]:
    """How much each token contributed to each target.

    Args:
        frozen: the forward pass; SAEs are needed only for targets that are their features.
        targets: one, or several for little more than the cost of one.
        pairs: also the matrix over pairs of tokens.

    Returns:
        One result per target, in a list where several were given.

    Raises:
        ArgumentError: less memory in the pass than a target, or the pairs of tokens, take.
        NotBilinearError: a gated or one-branch model.
        others: the same as for `read_targets`.
    """
    single = isinstance(targets, Target)
    reads = read_targets(frozen, targets)
    shares = token_shares(frozen, reads)
    if pairs:  # the streams of all tokens' parts, what a module adds to them, and what it is made of
        n_bytes = 6 * (frozen.n_positions + 1) * frozen.embed.numel() * frozen.embed.element_size()
        instead = "give a shorter text, or freeze(dtype=torch.float32)"
        check_budget(f"the pairs of {frozen.n_positions:,} tokens", n_bytes, frozen.memory, instead)
    matrices = token_pairs(frozen, reads, backward_fields(frozen, reads)) if pairs else None
    found = []
    for row, name in enumerate(reads.names):
        heads = _heads(frozen, reads[row : row + 1])
        found.append(
            TokenAttribution(
                target=name,
                position=int(reads.positions[row]),
                tokens=frozen.strings,
                values=shares[row, :-1],
                bias=(shares[row, -1] + reads.constants[row]).item(),
                actual=reads.actual[row].item(),
                heads=heads,
                pairs=None if matrices is None else matrices[row],
                wordpiece=frozen.model.tokenizer is not None and frozen.model.is_wordpiece,
                dtype=frozen.model.cfg.dtype,
            )
        )
    return found[0] if single else found


def token_shares(frozen: FrozenPass, reads: Reads) -> Float[Tensor, "t p_plus_one"]:
    """Each token's contribution to each read, biases last; without the reads' constants."""
    wholes = _mlp_inputs(frozen, int(reads.levels.max()))
    row = frozen.n_positions * (4 * frozen.mlp(0).W_out.shape[0] + 8 * frozen.embed.shape[1])
    size = frozen.at_once("attribute_tokens", row * frozen.embed.element_size(), BYTES_AT_ONCE)
    chunks = (reads[at : at + size] for at in range(0, len(reads), size))
    return torch.cat([_token_shares(frozen, chunk, wholes) for chunk in chunks])


def _token_shares(frozen: FrozenPass, reads: Reads, wholes: list[Tensor]) -> Float[Tensor, "t p_plus_one"]:
    """The reads followed down through everything: of a token's embedding, its contribution is what is then read."""
    fields = reads.vectors.new_zeros(len(reads), frozen.n_positions, reads.vectors.shape[1])
    rows, constants = torch.arange(len(reads), device=fields.device), reads.vectors.new_zeros(len(reads))

    def enter(level: int) -> Tensor:
        """Add the targets that read at this level; give back which they are."""
        here = rows[reads.levels == level]
        fields[here, reads.positions[here]] += reads.vectors[here]
        return here

    for layer in reversed(range(len(wholes))):
        here = enter(2 * layer + 2)
        made = branches(frozen.mlp(layer), wholes[layer], wholes[layer].new_ones(frozen.n_positions))
        moved, biases = mlp_back(frozen.mlp(layer), fields, made)
        fields[here[reads.sees[here] == MLP]] = 0.0
        fields += moved / frozen.scale2[layer][:, None]
        here = enter(2 * layer + 1)
        constants += biases + (fields * frozen.attention_bias(layer)).sum((1, 2))
        moved = attention_back(
            fields, frozen.pattern[layer], frozen.scale1[layer], frozen.W_V[layer], frozen.W_O[layer]
        )
        fields[here[reads.sees[here] == ATTN]] = 0.0
        fields += moved
    enter(0)
    return torch.cat([(fields * frozen.embed).sum(-1), constants[:, None]], 1)


def _mlp_inputs(frozen: FrozenPass, last: int) -> list[Float[Tensor, "p d_model"]]:
    """What every MLP up to level `last` reads, computed from the embeddings on."""
    found, stream = [], frozen.embed
    for layer in range((last + 1) // 2):
        attention = frozen.pattern[layer], frozen.scale1[layer], frozen.W_V[layer], frozen.W_O[layer]
        stream = stream + attention_forward(stream[None], *attention)[0] + frozen.attention_bias(layer)
        found.append(stream / frozen.scale2[layer][:, None])
        stream = stream + frozen.mlp(layer)(found[-1])
    return found


def token_pairs(frozen: FrozenPass, reads: Reads, fields: Fields) -> Float[Tensor, "t p_plus_one p_plus_one"]:
    """The pair matrix of each read (see the module)."""
    matrices = reads.vectors.new_zeros(len(reads), frozen.n_positions + 1, frozen.n_positions + 1)
    tokens = torch.arange(frozen.n_positions, device=matrices.device)
    matrices[:, tokens, tokens] = (fields.embed * frozen.embed).sum(-1)
    matrices[:, -1, -1] = fields.constants
    last = int(reads.levels.max())
    ones = _bias_ones(frozen)
    for level, streams, _ in _token_streams(frozen, last):
        layer = level // 2
        if not level % 2 or layer not in fields.mlp:
            continue
        mlp, parts = frozen.mlp(layer), streams / frozen.scale2[layer][:, None]
        for at in tokens.split(_positions_at_once(frozen)):
            made = branches(mlp, parts[:, at], ones[:, None])
            for row, field_ in enumerate(fields.mlp[layer]):
                raw = (made.left * hidden_coefficients(mlp, field_[at])).flatten(1) @ made.right.flatten(1).T
                matrices[row] += 0.5 * (raw + raw.T)
                matrices[row, -1, -1] += (field_[at] @ mlp.b_out).sum()
    return matrices


def _token_streams(frozen: FrozenPass, last: int) -> Iterator[tuple[int, Tensor, Tensor | None]]:
    """`(level, the stream by tokens, what the module below added)` of every level up to `last`."""
    n = frozen.n_positions
    ones = _bias_ones(frozen)
    streams = torch.cat([torch.diag_embed(frozen.embed.T).permute(1, 2, 0), torch.zeros_like(frozen.embed)[None]])
    assert streams.shape[:2] == (n + 1, n)
    yield 0, streams, None
    for level in range(1, last + 1):
        layer = (level - 1) // 2
        if level % 2:
            added = attention_forward(
                streams, frozen.pattern[layer], frozen.scale1[layer], frozen.W_V[layer], frozen.W_O[layer]
            )
            added[-1] += frozen.attention_bias(layer)
        else:
            parts = streams / frozen.scale2[layer][:, None]
            blocks = parts.split(_positions_at_once(frozen), 1)
            added = torch.cat([mlp_shares(frozen.mlp(layer), block, ones) for block in blocks], 1)
        streams = streams + added
        yield level, streams, added


def _positions_at_once(frozen: FrozenPass) -> int:
    """Positions at which an MLP's branches of all tokens' parts are made together."""
    each = (frozen.n_positions + 1) * 4 * frozen.mlp(0).W_out.shape[0] * frozen.embed.element_size()
    return frozen.at_once("the pairs of tokens", each, BYTES_AT_ONCE)


def _bias_ones(frozen: FrozenPass) -> Float[Tensor, "p_plus_one"]:
    ones = frozen.embed.new_zeros(frozen.n_positions + 1)
    ones[-1] = 1.0
    return ones


def _heads(frozen: FrozenPass, read: Reads) -> Float[Tensor, "layer head p"]:
    """What each head moved to the read's position, as it sees it (zeros above it)."""
    moved = frozen.pattern.new_zeros((*frozen.pattern.shape[:2], frozen.n_positions))
    level, sees = int(read.levels[0]), int(read.sees[0])
    for layer in range(frozen.n_layers):
        seen = level >= 2 * layer + 1 if sees == STREAM else sees == ATTN and level == 2 * layer + 1
        if seen:
            rows = frozen.pattern[layer][:, read.positions]
            moved[layer] = head_parts(read.vectors, rows, frozen.values(layer), frozen.W_O[layer])[0]
    return moved
