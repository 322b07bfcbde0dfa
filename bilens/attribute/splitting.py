"""The exact split of one target over what the frozen forward pass made it of.

1. a target is a linear read of the residual stream at one level and position (`bilens.attribute.targets`)
2. the stream is a sum: the token's own embedding, what every head moved from every source position, what every MLP
   added. `attention="heads"` stops there. `attention="paths"` follows the heads down as well, to the embeddings and
   MLPs of all source positions: one field per target goes back through every layer (`attention_back`)
3. what an MLP added is one part, or the features, `b_dec` and error of the SAE on its output, or pairs of the features
   (and `b_dec`, error, bias) of the SAE on its input
4. the parts and the target's constant add up to the value that the model computed

The stream is `embed + sum of attn_out + sum of mlp_out` of the layers below, so any linear read of it splits likewise.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Float, Int
from torch import Tensor

from bilens._core.checks import check_budget
from bilens._core.completeness import Complete
from bilens._core.display import Tabular
from bilens._core.typing import typed
from bilens.attribute.algebra import attention_back, head_parts
from bilens.attribute.frozen import FrozenPass, Names, names_by_hook
from bilens.attribute.targets import ATTN, MLP, STREAM, Reads, Target, read_targets
from bilens.decompose.results import BIAS_SOURCES
from bilens.draw import plots
from bilens.errors import ArgumentError, MissingSAEError
from bilens.layer.bilinear import branches, pair_products
from bilens.model.hook_points import hook_of

Attention = Literal["heads", "paths"]
MLPs = Literal["whole", "features", "pairs"]
# Of the pairs of an MLP's input: two features, a feature with a bias source, two bias sources.
BIAS_PAIRS = [f"{a} x {b}" for s, b in enumerate(BIAS_SOURCES) for a in BIAS_SOURCES[: s + 1]]
KINDS = (
    *("embedding", "head", "mlp", "feature", "b_dec", "error", "pair"),
    *(f"feature x {name}" for name in BIAS_SOURCES),
    *BIAS_PAIRS,
    *("input feature", "input b_dec", "input error", "input mlp bias"),  # what pairs are folded onto
    "constant",
)
COLUMNS = ("kind", "layer", "head", "position", "i", "j")
PAIRS_AT_ONCE = 32  # positions whose pairs are formed together, at most
PART_BYTES = 56  # of a part in the table
PAIR_BYTES = 128  # of a pair, while it is formed and put into the table


@dataclass(frozen=True)
class Split(Complete, Tabular):
    """The parts of one target; together they are its value.

    Attributes:
        target: its name.
        position: the target's position.
        tokens: the tokens of the text.
        index: one row per part: `kind` (a place in `KINDS`), `layer`, `head`, source `position`, and features `i`, `j`;
            -1 where it has none. A pair of two different features stands once.
        values: the value of each part.
        actual: the value that the model (and the target's SAE) computed.
        input_points: the point of the SAE on each MLP's input, `mlp-in` or `resid-mid`, by layer.
        names: labels of features by hook.
        dtype: the type of the model's forward pass.
    """

    target: str
    position: int
    tokens: list[str] = field(repr=False)
    index: Int[Tensor, "part 6"] = field(repr=False)
    values: Float[Tensor, "part"] = field(repr=False)
    actual: float
    input_points: dict[int, str] = field(default_factory=dict, repr=False)
    names: dict[str, Sequence[str]] = field(default_factory=dict, repr=False)
    dtype: torch.dtype = field(default=torch.float32, repr=False)

    @property
    def total(self) -> float:
        """The float32 sum of every part."""
        return self.values.float().sum().item()

    @property
    def absolute_sum(self) -> float:
        """Sum of the parts' absolute values: what `completeness_error` is measured against."""
        return self.values.abs().sum().item()

    @property
    def groups(self) -> dict[str, float]:
        """The sum of each kind of part."""
        sums = self.values.new_zeros(len(KINDS)).index_add(0, self.index[:, 0], self.values)
        present = torch.bincount(self.index[:, 0], minlength=len(KINDS))
        return {kind: sums[k].item() for k, kind in enumerate(KINDS) if present[k]}

    def by_position(self) -> Float[Tensor, "p"]:
        """The sum of the parts of every source position; what has none (biases, the constant) is left out."""
        return self._sums(3, len(self.tokens))

    def heads(self) -> Float[Tensor, "layer head p"]:
        """What each head moved from each source position (`attention="heads"`), in the layers below the target."""
        rows = self.index[:, 0] == KINDS.index("head")
        if not rows.any():
            raise ArgumentError(
                'this split has no heads as parts: they come with attention="heads", and not for a target that reads '
                "what an MLP or the embedding adds alone."
            )
        index = self.index[rows]
        shape = (int(index[:, 1].max()) + 1, int(index[:, 2].max()) + 1, len(self.tokens))
        flat = (index[:, 1] * shape[1] + index[:, 2]) * shape[2] + index[:, 3]
        return self.values.new_zeros(shape).flatten().index_add(0, flat, self.values[rows]).view(shape)

    def folded(self) -> "Split":
        """Pairs folded onto their members, half to each: the Shapley value, which for a quadratic is the even split.

        A pair of features `(i, j)` is a game worth its contribution once both are there. Either of two players comes
        second in half of the orders, so each gets half; a self interaction is its player's alone. The Shapley value is
        additive over the pairs, so folding all of them is the Shapley value of the whole quadratic. A part that pairs a
        feature with `b_dec`, the error or the MLP's bias is folded onto both alike.
        """
        index, values = [], []
        for kind, name in enumerate(KINDS):
            rows = self.index[:, 0] == kind
            if " x " not in name and name != "pair":
                index.append(self.index[rows])
                values.append(self.values[rows])
                continue
            for side, member in enumerate(("feature", "feature") if name == "pair" else name.split(" x ")):
                part = self.index[rows].clone()
                part[:, 0] = KINDS.index(f"input {member}")
                if name == "pair" and side == 1:
                    part[:, 4] = part[:, 5]
                part[:, 5] = -1
                if member != "feature":
                    part[:, 4] = -1
                index.append(part)
                values.append(0.5 * self.values[rows])
        keys, at = torch.cat(index).unique(dim=0, return_inverse=True)
        sums = self.values.new_zeros(len(keys)).index_add(0, at, torch.cat(values))
        return replace(self, index=keys, values=sums)

    def top(self, n: int) -> "Split":
        """The `n` largest parts by absolute value (their sum is no longer the target)."""
        order = self.values.abs().argsort(descending=True)[:n]
        return replace(self, index=self.index[order], values=self.values[order])

    def labels(self) -> list[str]:
        """Each part as a reader would call it."""
        return [self._label(*row) for row in self.index.tolist()]

    def to_frame(self) -> pd.DataFrame:
        """One row per part, largest first: `kind, layer, head, position, token, i, j, label, value`; -1 for none."""
        ordered = self.top(len(self.values))
        frame = pd.DataFrame(ordered.index.tolist(), columns=list(COLUMNS))
        frame["kind"] = [KINDS[kind] for kind in frame.kind]
        frame.insert(4, "token", [self.tokens[p] if p >= 0 else "" for p in frame.position])
        frame["label"] = ordered.labels()
        frame["value"] = ordered.values.tolist()
        return frame

    def plot(self, top: int = 20) -> go.Figure:
        """The largest parts and the sum of the others, as signed bars."""
        shown = self.top(top)
        labels, values = shown.labels(), shown.values.tolist()
        if len(self.values) > top:
            labels.append(f"{len(self.values) - top} others")
            values.append((self.values.sum() - shown.values.sum()).item())
        return plots.bars(labels, values, f"{self.target} at {self.position}")

    def __str__(self) -> str:
        lines = [
            f"{self.target} at position {self.position} ({self.tokens[self.position]!r})",
            f"  value {self.actual:+.5f}, {len(self.values)} parts {self.total:+.5f}, {self._gap}",
            *(f"  {value:+10.4f}  {kind}" for kind, value in self.groups.items()),
        ]
        return "\n".join(lines)

    def _sums(self, column: int, n: int) -> Tensor:
        rows = self.index[:, column] >= 0
        return self.values.new_zeros(n).index_add(0, self.index[rows, column], self.values[rows])

    def _label(self, kind: int, layer: int, head: int, position: int, i: int, j: int) -> str:
        name = KINDS[kind]
        at = "" if position < 0 else f" @{position} {self.tokens[position]!r}"
        if name == "head":
            return f"L{layer}H{head} from{at}"
        if name == "mlp":
            return f"mlp {layer}{at}"
        if name == "pair":
            return f"{self._feature(True, layer, i)} x {self._feature(True, layer, j)}{at}"
        if name.startswith("feature x "):
            return f"{self._feature(True, layer, i)}{name.removeprefix('feature')}{at}"
        if name in ("feature", "input feature"):
            return f"{self._feature(name == 'input feature', layer, i)}{at}"
        return f"{layer} {name}{at}" if layer >= 0 else f"{name}{at}"

    def _feature(self, is_input: bool, layer: int, i: int) -> str:
        point = self.input_points.get(layer, "mlp-in") if is_input else "mlp-out"
        labels = self.names.get(hook_of(point, layer))
        return f"{layer}-{point}/{i if labels is None else labels[i]}"


@typed
@torch.no_grad()
def split(
    frozen: FrozenPass,
    target: Target,
    *,
    attention: Attention = "heads",
    mlps: MLPs = "features",
    names: Names | None = None,
) -> Split:
    """Split a target exactly over what it was made of.

    Args:
        frozen: the forward pass, with SAEs where features are wanted.
        target: the target to explain.
        attention: `"heads"`, every (layer, head, source position) as one part; or `"paths"`, through all attention down
            to the embeddings and MLPs of every source position.
        mlps: what each MLP is split into: nothing (`"whole"`), the features that the SAE on its output writes
            (`"features"`), or pairs of features of the SAE on its input (`"pairs"`). Whole where no such SAE was given.
        names: labels of features by hook or SAE name, or a `FeatureStore`.

    Raises:
        ArgumentError: more parts than fit the memory of the pass.
        MissingSAEError: pairs without any SAE on an MLP's input.
        NotBilinearError: pairs of a gated or one-branch model.
        others: the same as for `read_targets`.
    """
    n_layers = frozen.n_layers
    if mlps == "pairs" and all(frozen.input_sae(layer) is None for layer in range(n_layers)):
        raise MissingSAEError('mlps="pairs" needs an SAE on an MLP\'s input (ln2.hook_normalized); none was given.')
    reads = read_targets(frozen, target)
    parts, u = _Parts(), reads.vectors
    (level,), (position,), (sees,) = reads.levels.tolist(), reads.positions.tolist(), reads.sees.tolist()
    if mlps == "pairs":
        shown = slice(position, position + 1) if attention == "heads" else slice(position + 1)
        inputs = [frozen.input_sae(layer) for layer in range(min(n_layers, (level + 1) // 2))]
        counts = [sae.real[shown].sum(1) + len(BIAS_SOURCES) for sae in inputs if sae is not None]
        n_parts = sum(int((count * (count + 1) // 2).sum()) for count in counts)
        instead = "explain another target, or give SAEs of which fewer features are active"
        check_budget(f"a split into {n_parts:,} parts", 2 * PART_BYTES * n_parts, frozen.memory, instead)
    if attention == "heads":
        here, constants = reads.positions, reads.constants
        for layer in range(n_layers):
            if _in_sight(ATTN, 2 * layer + 1, level, sees):
                rows = frozen.pattern[layer, :, here]
                moved = head_parts(u, rows, frozen.values(layer), frozen.W_O[layer])[0, :, : position + 1]
                heads, sources = torch.ones_like(moved).nonzero().unbind(1)
                parts.add("head", moved.flatten(), layer=layer, head=heads, position=sources)
            if _in_sight(MLP, 2 * layer + 2, level, sees):
                _add_mlp(parts, frozen, layer, here, u, mlps)
        if sees == STREAM:
            parts.add("embedding", (u * frozen.embed[here]).sum(-1), position=here)
    else:
        here = torch.arange(position + 1, device=u.device)
        fields = backward_fields(frozen, reads)
        for layer, field_ in fields.mlp.items():
            _add_mlp(parts, frozen, layer, here, field_[0, : position + 1], mlps)
        parts.add("embedding", (fields.embed[0] * frozen.embed).sum(-1)[: position + 1], position=here)
        constants = fields.constants
    parts.add("constant", constants)
    index, values = parts.collect()
    return Split(
        target=reads.names[0],
        position=position,
        tokens=frozen.strings,
        index=index,
        values=values,
        actual=reads.actual.item(),
        input_points={layer: sae.point for layer in range(n_layers) if (sae := frozen.input_sae(layer)) is not None},
        names=dict(names_by_hook(frozen.model, frozen.saes, names)),
        dtype=frozen.model.cfg.dtype,
    )


def _in_sight(module: int, level: int, read_level: int, sees: int) -> bool:
    """Whether a read sees the module whose output reaches the stream at `level`."""
    return level <= read_level if sees == STREAM else sees == module and level == read_level


@dataclass(frozen=True)
class Fields:
    """What a batch of targets reads of the embeddings and of every MLP's output, all attention followed down.

    Attributes:
        embed, mlp: these reads.
        constants: of the targets, and what attention's own biases give each.
    """

    embed: Float[Tensor, "t p d_model"]
    mlp: dict[int, Float[Tensor, "t p d_model"]]
    constants: Float[Tensor, "t"]


def backward_fields(frozen: FrozenPass, reads: Reads) -> Fields:
    """Follow targets down through attention; MLPs are where they end."""
    fields = reads.vectors.new_zeros(len(reads), frozen.n_positions, reads.vectors.shape[1])
    rows = torch.arange(len(reads), device=fields.device)
    mlp, constants = {}, reads.constants

    def enter(level: int) -> Tensor:
        """Add the targets that read at this level; give back which of them see one module alone."""
        here = rows[reads.levels == level]
        fields[here, reads.positions[here]] += reads.vectors[here]
        return here

    for layer in reversed(range(frozen.n_layers)):
        here = enter(2 * layer + 2)
        only = here[reads.sees[here] == MLP]
        if (reads.levels >= 2 * layer + 2).any():
            mlp[layer] = fields.clone()
        fields[only] = 0.0
        here = enter(2 * layer + 1)
        if not (reads.levels >= 2 * layer + 1).any():
            continue
        constants = constants + (fields * frozen.attention_bias(layer)).sum((1, 2))
        moved = attention_back(
            fields, frozen.pattern[layer], frozen.scale1[layer], frozen.W_V[layer], frozen.W_O[layer]
        )
        fields[here[reads.sees[here] == ATTN]] = 0.0
        fields = fields + moved
    enter(0)
    return Fields(fields, dict(sorted(mlp.items())), constants)


class _Parts:
    """Parts as they come, for one table."""

    def __init__(self) -> None:
        self.index: list[Tensor] = []
        self.values: list[Tensor] = []

    def add(self, kind: str, values: Float[Tensor, "n"], **columns: int | Tensor) -> None:
        index = torch.full((len(values), len(COLUMNS)), -1, dtype=torch.long, device=values.device)
        index[:, 0] = KINDS.index(kind)
        for name, column in columns.items():
            index[:, COLUMNS.index(name)] = column
        self.index.append(index)
        self.values.append(values)

    def collect(self) -> tuple[Tensor, Tensor]:
        return torch.cat(self.index), torch.cat(self.values)


def _add_mlp(
    parts: _Parts,
    frozen: FrozenPass,
    layer: int,
    positions: Int[Tensor, "n"],
    u: Float[Tensor, "n d_model"],
    mlps: MLPs,
) -> None:
    """What one MLP added at some positions, as reads `u` of it (one per position) see it."""
    sae_out, sae_in = frozen.output_sae(layer), frozen.input_sae(layer)
    if mlps == "features" and sae_out is not None:
        blocks = sae_out.blocks(len(positions))
        seen = torch.cat([(sae_out.writes(positions[n]) @ u[n, :, None])[..., 0] for n in blocks])
        rows, slots = sae_out.real[positions].nonzero(as_tuple=True)
        features = sae_out.features[positions][rows, slots]
        parts.add("feature", seen[rows, slots], layer=layer, position=positions[rows], i=features)
        parts.add("b_dec", (sae_out.b_dec[positions] * u).sum(-1), layer=layer, position=positions)
        parts.add("error", (sae_out.error[positions] * u).sum(-1), layer=layer, position=positions)
    elif mlps == "pairs" and sae_in is not None:
        mlp, width = frozen.mlp(layer), sae_in.features.shape[1] + len(BIAS_SOURCES)
        each = PAIR_BYTES * width**2 + 24 * width * len(mlp.W_out)
        at_once = frozen.at_once("a split into pairs", each, PAIRS_AT_ONCE * each)
        for n in torch.arange(len(positions)).split(at_once):
            at = positions[n]
            sources, ones = frozen.input_sources(layer, at)
            products = pair_products(mlp, u[n], branches(mlp, sources, ones), ones)
            _add_pairs(parts, layer, at, sae_in.features[at], sae_in.real[at], products)
    else:
        parts.add("mlp", (frozen.mlp_out[layer][positions] * u).sum(-1), layer=layer, position=positions)


def _add_pairs(
    parts: _Parts,
    layer: int,
    positions: Int[Tensor, "n"],
    features: Int[Tensor, "n s"],
    real: Tensor,
    products: Float[Tensor, "n source source"],
) -> None:
    width = features.shape[1]
    once = products * (2.0 - torch.eye(products.shape[-1], device=products.device, dtype=products.dtype))
    pairs = (real[:, :, None] & real[:, None, :]).tril()
    n, s, t = pairs.nonzero(as_tuple=True)
    # Features ascend, so slot t <= s has the smaller index.
    parts.add("pair", once[n, s, t], layer=layer, position=positions[n], i=features[n, t], j=features[n, s])
    n, s = real.nonzero(as_tuple=True)
    for b, name in enumerate(BIAS_SOURCES):
        parts.add(f"feature x {name}", once[n, s, width + b], layer=layer, position=positions[n], i=features[n, s])
    for b, second in enumerate(BIAS_SOURCES):
        for a, first in enumerate(BIAS_SOURCES[: b + 1]):
            parts.add(f"{first} x {second}", once[:, width + a, width + b], layer=layer, position=positions)
