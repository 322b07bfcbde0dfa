"""The numbers of a circuit: one pass from the target down, every node's contributions exact.

1. nodes are numbered: per position the embedding and, per layer, the active features and the error of the SAE on the
   MLP's output and of the one on its input; per SAE one node for its `b_dec`; one for all constants (biases of
   encoders, of attention and of MLPs)
2. the target has influence 1, or several have it together. Stage by stage downwards (MLP-out features of a layer, then
   its MLP-in features) the nodes of largest influence are expanded: an MLP-out feature over its eigencircuits, and
   these over the MLP-in nodes that they read (`bilens.attribute.squares`), or over pairs of MLP-in nodes; an MLP-in
   feature (and any other read of the stream) over everything written below it, through all attention
3. a node hands its influence on in the proportion of the absolute contributions to it, a pair's half to each member.
   All of a stage's influence comes from above it, so one pass gives the influence of every node, and its strongest path
   to the target: the one whose shares have the largest product

Influence is thus a share of the target: the absolute weight of all paths from the node, every node's inputs normalised.
Circuit-tracer's score is the same idea (there by a matrix inverse, over linear edges alone).
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bilens.attribute.algebra import attention_forward, head_values
from bilens.attribute.frozen import FrozenPass
from bilens.attribute.splitting import backward_fields
from bilens.attribute.squares import Squares, find_squares
from bilens.attribute.targets import MLP, STREAM, Reads, feature_reads
from bilens.layer.bilinear import branches, pair_products
from bilens.sae.passes import SAEPass

KINDS = ("target", "embedding", "feature", "error", "mlp", "bias", "eigencircuit")
MLPs = Literal["eigencircuits", "pairs"]
SOLVED_INFLUENCE = 1e-3  # of features with less, no eigencircuits are found: they read their inputs all together
FIELD_BYTES = 2**28  # of the fields held at a time
PAIRS_AT_ONCE = 64


@dataclass(frozen=True)
class Numbering:
    """Which number each node has. `kind` (of `KINDS`), `layer`, `is_input`, `position` and `feature` of each; -1: none.

    Attributes:
        linear: the nodes that write into the residual stream, in the order of a linear row's columns.
        out_features, in_features: number of the first feature slot of each layer's SAEs, slots in the order
            (position, slot); `None` where there is no SAE.
        in_error, in_b_dec: numbers of the first error node of each layer's MLP input, and of its `b_dec`.
        constant: its number.
        targets: their numbers.
    """

    kind: Int[Tensor, "node"]
    layer: Int[Tensor, "node"]
    is_input: Int[Tensor, "node"]
    position: Int[Tensor, "node"]
    feature: Int[Tensor, "node"]
    value: Float[Tensor, "node"]
    linear: Int[Tensor, "column"]
    out_features: list[int | None]
    in_features: list[int | None]
    in_error: list[int]
    in_b_dec: list[int]
    constant: int
    targets: list[int]

    def __len__(self) -> int:
        return len(self.kind)


@dataclass
class Propagation:
    """What the pass found: influences, and the contributions to every expanded node.

    Attributes:
        nodes: the numbering; eigencircuits come last, as they are found.
        influence: the influence of every node.
        strength: the product of the shares along every node's strongest path to a target.
        up: the next node on that path; -1 for targets and for what has no influence.
        actual: the value of each expanded node as the model and its SAE computed it.
        reads: the reads of the expanded nodes.
        sources: for nodes expanded inside an MLP, the numbers of the sources; the last is the constant. The others are
            expanded over everything that writes into the stream. The contributions themselves are made anew by
            `products` (half of each pair) and `linear_rows` when they are asked for: of a thousand nodes with a
            thousand active sources each they would fill gigabytes.
        squares: the parts of nodes expanded over eigencircuits, and the numbers of these.
        constants: of nodes expanded over pairs, the rest that the constant node gives each.
        sums: the sums of every expanded node's parts, in float32, and of their absolute values.
    """

    nodes: Numbering
    influence: Float[Tensor, "node"]
    strength: Float[Tensor, "node"]
    up: Int[Tensor, "node"]
    actual: dict[int, float] = field(default_factory=dict)
    reads: dict[int, Reads] = field(default_factory=dict)
    sources: dict[int, Int[Tensor, "source"]] = field(default_factory=dict)
    squares: dict[int, tuple[Squares, Int[Tensor, "circuit"]]] = field(default_factory=dict)
    constants: dict[int, float] = field(default_factory=dict)
    sums: dict[int, tuple[float, float]] = field(default_factory=dict)

    def hand_on(
        self, numbers: Int[Tensor, "t"], sources: Int[Tensor, "source"], sizes: Float[Tensor, "t source"]
    ) -> None:
        """Hand the influence of some nodes on to their sources, in the proportion of sizes."""
        shares = sizes / sizes.sum(1, keepdim=True).clamp_min(torch.finfo(sizes.dtype).tiny)
        self.influence.index_add_(0, sources, self.influence[numbers] @ shares)
        strength, row = (self.strength[numbers, None] * shares).max(0)
        better = strength > self.strength[sources]
        self.strength[sources[better]], self.up[sources[better]] = strength[better], numbers[row[better]]

    def add_eigencircuits(self, owner: int, values: Float[Tensor, "circuit"]) -> Int[Tensor, "circuit"]:
        """Number the eigencircuits of a node."""
        nodes, n = self.nodes, len(values)
        columns: dict[str, Any] = {name: getattr(nodes, name)[owner].expand(n) for name in ("position", "feature")}
        kind, layer = torch.full((n,), KINDS.index("eigencircuit")), int(self.reads[owner].levels[0]) // 2 - 1
        columns |= {"kind": kind, "layer": kind * 0 + layer, "is_input": kind * 0, "value": values}
        columns = {name: torch.cat([getattr(nodes, name), column]) for name, column in columns.items()}
        self.nodes = replace(nodes, **columns)
        zeros = values.new_zeros(n)
        self.influence, self.strength = torch.cat([self.influence, zeros]), torch.cat([self.strength, zeros])
        self.up = torch.cat([self.up, kind * 0 - 1])
        return len(nodes) + torch.arange(n)

    def products(self, frozen: FrozenPass, number: int) -> Float[Tensor, "source source"]:
        """`C[s, t]` of a node expanded over pairs."""
        read = self.reads[number]
        return pairs_at(frozen, int(read.levels[0]) // 2 - 1, int(read.positions[0]), read.vectors)[0]


def number_nodes(frozen: FrozenPass, targets: Reads) -> Numbering:
    n = frozen.n_positions
    columns: dict[str, list[Tensor]] = {name: [] for name in ("kind", "layer", "is_input", "position", "feature")}
    values: list[Tensor] = []
    everywhere, nowhere = torch.arange(n), torch.tensor([-1])
    count = 0

    def add(kind: str, layer: int, is_input: int, position: Tensor, feature: Tensor, value: Tensor) -> int:
        nonlocal count
        first, size = count, len(position)
        given: list[int | Tensor] = [KINDS.index(kind), layer, is_input, position, feature]
        for name, column in zip(columns, given, strict=True):
            columns[name].append(column.cpu() if isinstance(column, Tensor) else torch.full((size,), column))
        values.append(value.double().cpu())
        count += size
        return first

    def add_sae(sae: SAEPass, is_input: int) -> tuple[int, int, int]:
        slots = sae.features.shape[1]
        features = add(
            "feature",
            sae.layer,
            is_input,
            everywhere.repeat_interleave(slots),
            torch.where(sae.real, sae.features, -1).flatten(),
            sae.values.flatten(),
        )
        error = add("error", sae.layer, is_input, everywhere, everywhere * 0 - 1, sae.error.norm(dim=-1))
        b_dec = add("bias", sae.layer, is_input, nowhere, nowhere, torch.ones(1))
        return features, error, b_dec

    add("embedding", -1, 0, everywhere, frozen.tokens, frozen.embed.norm(dim=-1))
    linear = [torch.arange(n)]
    out_features: list[int | None] = []
    in_features: list[int | None] = []
    in_error, in_b_dec = [], []
    for layer in range(frozen.n_layers):
        sae_in, sae_out = frozen.input_sae(layer), frozen.output_sae(layer)
        first, error, b_dec = add_sae(sae_in, 1) if sae_in is not None else (None, -1, -1)
        in_features.append(first)
        in_error.append(error)
        in_b_dec.append(b_dec)
        start = count
        if sae_out is None:
            add("mlp", layer, 0, everywhere, everywhere * 0 - 1, frozen.mlp_out[layer].norm(dim=-1))
            out_features.append(None)
        else:
            out_features.append(add_sae(sae_out, 0)[0])
        linear.append(torch.arange(start, count))
    constant = add("bias", -1, 0, nowhere, nowhere, torch.ones(1))
    linear.append(torch.tensor([constant]))
    first = add("target", -1, 0, targets.positions, torch.full((len(targets),), -1), targets.actual)
    return Numbering(
        **{name: torch.cat(column) for name, column in columns.items()},
        value=torch.cat(values),
        linear=torch.cat(linear),
        out_features=out_features,
        in_features=in_features,
        in_error=in_error,
        in_b_dec=in_b_dec,
        constant=constant,
        targets=list(range(first, first + len(targets))),
    )


def linear_rows(frozen: FrozenPass, reads: Reads) -> Float[Tensor, "t column"]:
    """What everything that writes into the stream contributes to each read; a row adds up to the read's value."""
    return torch.cat([rows for _, rows in rows_in_chunks(frozen, reads)])


def rows_in_chunks(frozen: FrozenPass, reads: Reads) -> Iterator[tuple[slice, Float[Tensor, "t column"]]]:
    """`linear_rows` of a few reads at a time, with their places: of dense SAEs one row alone has megabytes."""
    saes = [sae for layer in range(frozen.n_layers) if (sae := frozen.output_sae(layer)) is not None]
    slots = sum(sae.features.shape[1] for sae in saes)
    numbers = frozen.embed.shape[1] * (frozen.n_layers + 2) + 4 * slots  # of the fields, of a row as it is put together
    size = frozen.at_once("a trace", frozen.n_positions * frozen.embed.element_size() * numbers, FIELD_BYTES)
    for at in range(0, len(reads), size):
        chunk = slice(at, at + size)
        yield chunk, _linear_rows(frozen, reads[chunk])


def _linear_rows(frozen: FrozenPass, reads: Reads) -> Float[Tensor, "t column"]:
    fields = backward_fields(frozen, reads)
    columns = [(fields.embed * frozen.embed).sum(-1)]
    for layer in range(frozen.n_layers):
        sae, seen = frozen.output_sae(layer), fields.mlp.get(layer)
        if sae is None:
            columns.append((frozen.mlp_out[layer] * seen).sum(-1) if seen is not None else columns[0] * 0)
            continue
        if seen is None:
            width = frozen.n_positions * (sae.features.shape[1] + 1) + 1
            columns.append(fields.embed.new_zeros(len(reads), width))
            continue
        features = seen.new_empty(*seen.shape[:2], sae.features.shape[1])
        for at in sae.blocks(frozen.n_positions):
            features[:, at] = torch.bmm(seen[:, at].transpose(0, 1), sae.writes(at).mT).transpose(0, 1)
        columns += [features.flatten(1), (seen * sae.error).sum(-1), (seen * sae.b_dec).sum((-1, -2))[:, None]]
    return torch.cat([*columns, fields.constants[:, None]], 1)


def propagate(
    frozen: FrozenPass,
    targets: Reads,
    weights: Float[Tensor, "t"],
    max_nodes: int,
    mlps: MLPs = "eigencircuits",
    eigen_share: float = 0.8,
) -> Propagation:
    """Influences and contributions from the targets down, `max_nodes` nodes expanded per stage.

    Args:
        frozen: the forward pass.
        targets: the targets at which it starts.
        weights: the influence that each target starts with.
        max_nodes: the most influential ones of each stage.
        mlps: what the features of an MLP's output are made of: its eigencircuits, or pairs of its input's features.
        eigen_share: the share of a feature's squares that its eigencircuits have together; see `split_squares`.
    """
    nodes = number_nodes(frozen, targets)
    zeros = torch.zeros(len(nodes), dtype=torch.float64)
    found = Propagation(nodes, zeros, zeros.clone(), torch.full((len(nodes),), -1))
    found.influence[nodes.targets] = weights
    found.strength[nodes.targets] = weights

    def expand_mlp(layer: int, numbers: Int[Tensor, "t"], reads: Reads) -> None:
        if mlps == "pairs":
            _expand_pairs(frozen, found, layer, numbers, reads)
        else:
            _expand_squares(frozen, found, layer, numbers, reads, eigen_share)

    for row, number in enumerate(nodes.targets):
        target, layer = targets[row : row + 1], int(targets.levels[row]) // 2 - 1
        if target.sees[0] == MLP and nodes.in_features[layer] is not None:
            expand_mlp(layer, torch.tensor([number]), target)
        else:
            _expand_linear(frozen, found, torch.tensor([number]), target)
    for layer in reversed(range(frozen.n_layers)):
        sae_in, sae_out = frozen.input_sae(layer), frozen.output_sae(layer)
        if sae_in is None:
            continue
        first = nodes.out_features[layer]
        if sae_out is not None and first is not None and sae_out.has_reads:
            chosen = _choose(found.influence, first, sae_out, max_nodes)
            if len(chosen):
                reads = feature_reads(frozen, sae_out.hook, nodes.position[chosen], nodes.feature[chosen])
                expand_mlp(layer, chosen, reads)
        first = nodes.in_features[layer]
        if sae_in.has_reads and first is not None:
            chosen = _choose(found.influence, first, sae_in, max_nodes)
            if len(chosen):
                reads = feature_reads(frozen, sae_in.hook, nodes.position[chosen], nodes.feature[chosen])
                _expand_linear(frozen, found, chosen, reads)
    return found


def _choose(influence: Tensor, first: int, sae: SAEPass, at_most: int) -> Int[Tensor, "n"]:
    here = influence[first : first + sae.real.numel()]
    top = here.topk(min(at_most, len(here))).indices
    return first + top[here[top] > 0]


def _expand_linear(frozen: FrozenPass, found: Propagation, numbers: Int[Tensor, "t"], reads: Reads) -> None:
    for chunk, rows in rows_in_chunks(frozen, reads):
        sizes = rows.abs().double().cpu()
        found.hand_on(numbers[chunk], found.nodes.linear, sizes)
        sums = zip(rows.float().sum(1).tolist(), sizes.sum(1).tolist(), strict=True)
        found.sums |= dict(zip(numbers[chunk].tolist(), sums, strict=True))
    for row, number in enumerate(numbers.tolist()):
        found.actual[number] = reads.actual[row].item()
        found.reads[number] = reads[row : row + 1]


def _expand_pairs(frozen: FrozenPass, found: Propagation, layer: int, numbers: Int[Tensor, "t"], reads: Reads) -> None:
    for rows, ids in _by_position(frozen, found.nodes, layer, reads):
        at_once = frozen.at_once(f"a trace over the pairs of {len(ids):,} sources", 32 * len(ids) ** 2, FIELD_BYTES)
        for chunk in rows.split(min(PAIRS_AT_ONCE, at_once)):
            products = pairs_at(frozen, layer, int(reads.positions[chunk[0]]), reads.vectors[chunk])
            constants = reads.constants[chunk].double().cpu()
            sizes = products.abs().sum(2)
            sizes[:, -1] += constants.abs()
            found.hand_on(numbers[chunk], ids, sizes)
            sums = (products.flatten(1).float().sum(1) + constants).tolist()
            for row, t in enumerate(chunk.tolist()):
                number = int(numbers[t])
                found.actual[number] = reads.actual[t].item()
                found.reads[number], found.sources[number] = reads[t : t + 1], ids
                found.sums[number] = sums[row], sizes[row].sum().item()
                found.constants[number] = constants[row].item()


def _expand_squares(
    frozen: FrozenPass, found: Propagation, layer: int, numbers: Int[Tensor, "t"], reads: Reads, share: float
) -> None:
    solved = (found.influence[numbers] >= SOLVED_INFLUENCE).to(reads.vectors.device)
    for rows, ids in _by_position(frozen, found.nodes, layer, reads):
        sources, ones = frozen.input_sources(layer, int(reads.positions[rows[0]]))
        squares = find_squares(frozen.mlp(layer), reads.vectors[rows], sources, ones, solved[rows], share)
        for t, each in zip(rows.tolist(), squares, strict=True):
            number, direct, weights = numbers[t : t + 1], each.direct.double().cpu(), each.weights.double().cpu()
            owner = int(number)
            direct[-1] += reads.constants[t].item()
            found.actual[owner] = reads.actual[t].item()
            found.reads[owner], found.sources[owner] = reads[t : t + 1], ids
            total = (weights.float().sum() + direct.float().sum()).item()
            found.sums[owner] = total, (weights.abs().sum() + direct.abs().sum()).item()
            values = weights.sum(1)
            circuits = found.add_eigencircuits(owner, values)
            found.squares[owner] = Squares(each.index, weights, direct), circuits
            found.hand_on(number, torch.cat([circuits, ids]), torch.cat([values, direct]).abs()[None])
            if len(circuits):
                found.hand_on(circuits, ids, weights.abs())


def _by_position(
    frozen: FrozenPass, nodes: Numbering, layer: int, reads: Reads
) -> Iterator[tuple[Int[Tensor, "n"], Int[Tensor, "source"]]]:
    """The reads of an MLP's output at each position, and the numbers of what its input is made of there."""
    sae, first = frozen.input_sae(layer), nodes.in_features[layer]
    assert sae is not None
    assert first is not None
    for position in reads.positions.unique().tolist():
        n_active = int(sae.real[position].sum())  # the other slots of the widest position are empty here
        own = torch.arange(n_active) + first + position * sae.features.shape[1]
        ids = torch.cat([own, torch.tensor([nodes.in_b_dec[layer], nodes.in_error[layer] + position, nodes.constant])])
        yield (reads.positions == position).nonzero().flatten(), ids


def pairs_at(
    frozen: FrozenPass, layer: int, position: int, u: Float[Tensor, "n d_model"]
) -> Float[Tensor, "n source source"]:
    """`C[s, t]` of the active sources of an MLP's input at one position, for several reads of its output."""
    sae, mlp = frozen.input_sae(layer), frozen.mlp(layer)
    assert sae is not None
    sources, ones = frozen.input_sources(layer, position)
    return pair_products(mlp, u, branches(mlp, sources, ones), ones).double().cpu()


def head_sums(
    frozen: FrozenPass, nodes: Numbering, sources: Int[Tensor, "n"], reads: Reads
) -> Float[Tensor, "n t way"]:
    """Linear edges by the last head they come through.

    Args:
        frozen: the forward pass.
        nodes: the numbering.
        sources: nodes at one position each that write into the stream.
        reads: the edges' other ends.

    Returns:
        The ways: first none (source and target share a position), then `layer * n_heads + head`; an edge's ways add up
        to its weight.
    """
    per_source = frozen.pattern.shape[1] * max(len(reads), frozen.n_positions) * frozen.embed.shape[1]
    size = frozen.at_once("the heads of a trace", per_source * frozen.embed.element_size(), FIELD_BYTES)
    return torch.cat([_head_sums(frozen, nodes, chunk, reads) for chunk in sources.split(size)])


def _head_sums(
    frozen: FrozenPass, nodes: Numbering, sources: Int[Tensor, "n"], reads: Reads
) -> Float[Tensor, "n t way"]:
    n_heads = frozen.pattern.shape[1]
    streams = frozen.embed.new_zeros(len(sources), frozen.n_positions, frozen.embed.shape[1])
    ways = streams.new_zeros(len(sources), len(reads), 1 + frozen.n_layers * n_heads)
    is_token = (nodes.kind[sources] == KINDS.index("embedding")).to(ways.device)
    own, at = is_token.nonzero().flatten(), nodes.position[sources].to(ways.device)
    starts = torch.where(is_token, 0, 2 * nodes.layer[sources].to(ways.device) + 2)
    writes = _writes(frozen, nodes, sources)
    streams[own, at[own]] = writes[own]
    levels, stream = reads.levels, reads.sees == STREAM
    # A source's own write reaches the reads of its position directly, if it is written by then.
    same = (at[:, None] == reads.positions) & (starts[:, None] <= levels) & stream
    same |= (at[:, None] == reads.positions) & (reads.sees == MLP) & (starts[:, None] == levels)
    ways[..., 0] = torch.where(same, writes @ reads.vectors.T, 0.0)
    for layer in range(frozen.n_layers):
        sees = (stream & (levels >= 2 * layer + 1)) | ((reads.sees == 1) & (levels == 2 * layer + 1))
        rows = sees.nonzero().flatten()
        if len(rows):
            mixed = frozen.pattern[layer][:, reads.positions[rows]] @ head_values(
                streams, frozen.scale1[layer], frozen.W_V[layer]
            )
            seen = torch.einsum("td,hed->hte", reads.vectors[rows], frozen.W_O[layer])
            first = 1 + layer * n_heads
            ways[:, rows, first : first + n_heads] = torch.einsum("nhte,hte->nth", mixed, seen)
        streams = streams + attention_forward(
            streams, frozen.pattern[layer], frozen.scale1[layer], frozen.W_V[layer], frozen.W_O[layer]
        )
        here = (starts == 2 * layer + 2).nonzero().flatten()
        streams[here, at[here]] += writes[here]
    return ways


def _writes(frozen: FrozenPass, nodes: Numbering, sources: Int[Tensor, "n"]) -> Float[Tensor, "n d_model"]:
    """What each source adds to the stream at its position."""
    rows = []
    for number in sources.tolist():
        kind, layer, position = KINDS[nodes.kind[number]], int(nodes.layer[number]), int(nodes.position[number])
        if kind == "embedding":
            rows.append(frozen.embed[position])
        elif kind == "mlp":
            rows.append(frozen.mlp_out[layer, position])
        else:
            sae = frozen.output_sae(layer)
            assert sae is not None
            first = nodes.out_features[layer]
            assert first is not None
            slot = number - first - position * sae.features.shape[1]
            rows.append(sae.error[position] if kind == "error" else sae.writes(position, slot))
    return torch.stack(rows)
