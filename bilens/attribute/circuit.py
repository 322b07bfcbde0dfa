"""Attribution graphs whose edges add up: `Circuit.trace`.

1. the forward pass is frozen and swept from the target down (`bilens.attribute.tracing`): every node that matters, and
   the exact contribution of everything to it
2. nodes are kept by cumulative influence, edges likewise; what is pruned is summed, by kind, into `other features`,
   `other errors`, ..., so that whatever goes into a node still adds up to its value
3. an edge is linear: written into the stream and read further up, through all attention; or, inside an MLP, what a
   source of its input gives to an eigencircuit of an output feature, and the eigencircuit, its square, to the feature.
   With `mlps="pairs"` there are hyper-edges `(i, j) -> o` instead: what two sources made of the feature together

A feature's value is its activation; what goes into it adds up to its pre-activation, which for an active feature is the
same number. Features of an SAE without linear reads (a bilinear encoder, matching pursuit), output features of a layer
without an SAE on its MLP's input, and MLPs without one on their output, are where the graph ends.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Float, Int
from torch import Tensor

from bilens._core.checks import check_sizes
from bilens._core.completeness import is_rounding
from bilens._core.display import Paged, Tabular
from bilens._core.typing import typed
from bilens.attribute.attribution_graphs import to_attribution_graph
from bilens.attribute.circuit_tables import (
    EDGE_COLUMNS,
    HEAD_COLUMNS,
    HYPEREDGE_COLUMNS,
    NODE_COLUMNS,
    CircuitTables,
)
from bilens.attribute.edits import read_edits
from bilens.attribute.frozen import TEXT_MEMORY, FrozenPass, Names, SAEs, freeze, names_by_hook
from bilens.attribute.paths import Paths, narrow
from bilens.attribute.squares import Squares
from bilens.attribute.targets import (
    Reads,
    Target,
    as_targets,
    likeliest,
    logit_token,
    predicted,
    probability,
    read_targets,
)
from bilens.attribute.tracing import KINDS, MLPs, Numbering, Propagation, head_sums, linear_rows, propagate
from bilens.draw import plots
from bilens.errors import ArgumentError, MissingSAEError
from bilens.model.hook_points import hook_of
from bilens.model.transformer import HookedBilinearTransformer

BIAS = KINDS.index("bias")
ALIKE = 0.7  # cosine of two features' directions from which on they are siblings


@dataclass(frozen=True)
class Circuit(CircuitTables, Paged, Tabular):
    """An attribution graph of one target on one text; made by `Circuit.trace`.

    The fields are those of `CircuitTables`.
    """

    @classmethod
    @typed
    def trace(
        cls,
        model: HookedBilinearTransformer,
        saes: SAEs,
        text_or_tokens: "str | Sequence[int] | Int[Tensor, 'p'] | Int[Tensor, '1 p']",  # `freeze` and
        target: "Target | Sequence[Target] | None" = None,  # `as_targets` say better what is wrong with these
        *,
        max_n_logits: int = 1,
        desired_logit_prob: float = 0.95,
        max_nodes: int = 200,
        node_threshold: float = 0.8,
        edge_threshold: float = 0.98,
        mlps: MLPs = "eigencircuits",
        eigen_share: float = 0.8,
        names: Names | None = None,
        dtype: torch.dtype = torch.float64,
        memory: int = TEXT_MEMORY,
    ) -> "Circuit":
        """Trace a target, or several in one graph, on a text back to the tokens.

        Several logits start with influences in the proportion of their probabilities, other targets with equal ones.

        Args:
            model: a bilinear model.
            saes: best one on every MLP's input and output; see `freeze`.
            text_or_tokens: one text, or its tokens.
            target: the target to explain; `None` takes the logits of the likeliest next tokens.
            max_n_logits, desired_logit_prob: the largest number of those, and the probability that is enough of them.
            max_nodes: the largest number of nodes to keep, and to expand per stage (the features of one SAE).
            node_threshold: nodes are kept, the most influential first and each with its strongest path to the target,
                until their influences are this part of all.
            edge_threshold: the same share for the edges between them.
            mlps: `"eigencircuits"` makes an MLP's output features of their eigencircuits, which are squares of linear
                reads of its input; `"pairs"` of pairs of its input's features.
            eigen_share: the fewest eigencircuits are nodes that give this share of a feature's squares at its token (at
                most eight); all others are one node.
            names: labels of features, by hook or SAE name (`2-mlp-in`, or its folder's name), or a `FeatureStore`.
            dtype: the type of the algebra.
            memory: bytes to work in, and at most as many for the result; 4 GiB by default.

        Raises:
            ArgumentError: thresholds outside (0, 1], no room for a node, names that do not fit, a target given twice,
                or logits together with other targets.
            MissingSAEError: no SAE on any MLP's input or output.
            NotBilinearError: a gated or one-branch model.
            others: the same as for `freeze` and `read_targets`.
        """
        _check_limits(max_nodes, node_threshold, edge_threshold, mlps, eigen_share)
        if target is not None:
            as_targets(target)
        frozen = freeze(model, text_or_tokens, saes, dtype=dtype, memory=memory)
        if target is None:
            target = likeliest(frozen, max_n_logits, desired_logit_prob)
        return trace_circuit(
            frozen,
            target,
            max_nodes=max_nodes,
            node_threshold=node_threshold,
            edge_threshold=edge_threshold,
            mlps=mlps,
            eigen_share=eigen_share,
            names=names,
        )

    @property
    def completeness(self) -> pd.DataFrame:
        """Of every expanded node: its value, the sum of what goes into it (as pruned), and the `relative_error` of all
        its parts, none left out."""
        into = (
            self.edges.groupby("target")
            .weight.sum()
            .add(self.hyperedges.groupby("target").weight.sum(), fill_value=0.0)
        )
        frame = self.nodes[self.nodes.expanded][["id", "value", "relative_error"]].copy()
        frame["sum"] = frame.id.map(into)
        return frame[["id", "value", "sum", "relative_error"]].reset_index(drop=True)

    @property
    def largest_completeness_error(self) -> float:
        """The largest gap between any expanded node's value and the sum of what goes into it, what was pruned (the
        `other` nodes) included; see `is_rounding`."""
        frame = self.completeness
        return float((frame["sum"].fillna(0.0) - frame.value).abs().max()) if len(frame) else 0.0

    @property
    def largest_relative_error(self) -> float:
        """The largest relative error of any node's completeness."""
        return float(self.nodes.relative_error.max())

    @property
    def completeness_said(self) -> str:
        """The completeness in words."""
        if not self.nodes.expanded.any():
            return "completeness not checked: no node of this graph was taken apart here"
        said = f"completeness of every node within {self.largest_relative_error:.1e} of its absolute parts"
        return said if self.is_rounding else f"{said}, MORE than rounding explains: something else is missing"

    @property
    def is_rounding(self) -> bool:
        """Whether the gaps are no larger than rounding of the model's activations makes them."""
        return is_rounding(self.largest_relative_error, getattr(torch, self.dtype or "float32"))

    def merged(self) -> "Circuit":
        """The same graph with a feature's (error's, token's) nodes at all positions as one; weights and values add."""
        merged = {row.id: row.id.split("@")[0] for row in self.nodes.itertuples()}
        for row in self.nodes[self.nodes.kind == "embedding"].itertuples():
            merged[row.id] = f"embed {row.feature}"  # the same token at several positions
        nodes = self.nodes.assign(id=self.nodes.id.map(merged), position=-1)
        nodes["token"] = nodes.token.where(nodes.kind.isin(["embedding"]), "")
        sums = {"value": "sum", "influence": "sum", "expanded": "any", "relative_error": "max"}
        rest = {column: "first" for column in NODE_COLUMNS if column not in ("id", *sums)}
        edges = self.edges.assign(source=self.edges.source.map(merged), target=self.edges.target.map(merged))
        heads = self.heads.assign(source=self.heads.source.map(merged), target=self.heads.target.map(merged))
        heads = heads.groupby(["source", "target", "layer", "head"], as_index=False, sort=False).weight.sum()
        edges = edges.groupby(["source", "target"], as_index=False, sort=False)[["weight", "influence"]].sum()
        hyperedges = self.hyperedges.assign(**{c: self.hyperedges[c].map(merged) for c in ("i", "j", "target")})
        swap = hyperedges.i > hyperedges.j
        hyperedges.loc[swap, ["i", "j"]] = hyperedges.loc[swap, ["j", "i"]].to_numpy()
        return replace(
            self,
            nodes=nodes.groupby("id", as_index=False, sort=False).agg(rest | sums)[list(NODE_COLUMNS)],
            edges=_with_via(edges, heads),
            hyperedges=hyperedges.groupby(["i", "j", "target"], as_index=False, sort=False)[
                ["weight", "influence"]
            ].sum(),
            heads=heads,
            pinned=list(dict.fromkeys(merged.get(name, name) for name in self.pinned)),
            supernodes=[
                [label, *dict.fromkeys(merged.get(name, name) for name in names)] for label, *names in self.supernodes
            ],
        )

    def strongest(self, n: int = 20) -> "Circuit":
        """The part of the graph to look at first: paths, best first, from the target down to the tokens; what all other
        nodes gave is pruned, too, so that whatever goes into a node still adds up to its value.

        Args:
            n: the number of nodes, targets, biases and pruned parts not counted.

        Raises:
            ArgumentError: no room for a node.
        """
        check_sizes(n=n)
        chosen = self.nodes.id.iloc[Paths.of(self).choose(n)]
        inner = self.nodes[~self.nodes.kind.isin(["target", "bias", "other"])]
        part = inner[inner.id.isin(chosen)].influence.sum() / max(inner.influence.sum(), 1e-300)
        groups = [[label, *(name for name in group if name in set(chosen))] for label, *group in self.supernodes]
        found = replace(
            self,
            **narrow(self, set(chosen)),
            kept_share=float(self.kept_share * part),
            pinned=[name for name in self.pinned if name in set(chosen)],
            supernodes=[group for group in groups if len(group) > 2],
        )
        return replace(found, shares=_ends(found))

    def edited(self, address: str) -> "Circuit":
        """The circuit with what a reader pinned, renamed and grouped on its page, for `to_attribution_graph` too.

        Args:
            address: the page's address, or the part of it from `#graph?` on.

        Raises:
            ArgumentError: no such address, or one of another circuit.
        """
        edits = read_edits(address, self)
        nodes = self.nodes.assign(name=self.nodes.id.map(edits.names).fillna(self.nodes.name))
        groups = self.supernodes if edits.supernodes is None else edits.supernodes
        return replace(self, nodes=nodes, pinned=edits.pinned, supernodes=groups)

    def to_frame(self) -> pd.DataFrame:
        """The nodes, most influential first."""
        return self.nodes.sort_values("influence", ascending=False, ignore_index=True)

    def plot(self, top: int = 25) -> go.Figure:
        """The most influential nodes as bars."""
        frame = self.to_frame()
        frame = frame[frame.kind != "target"].head(top)
        return plots.bars(frame.name.tolist(), frame.influence.tolist(), f"influence on {self.target}")

    def to_attribution_graph(self, slug: str = "bilens") -> dict[str, Any]:
        """The attribution-graph JSON of circuit-tracer and Neuronpedia; see `attribution_graphs`.

        Args:
            slug: the graph's name there, of letters, digits, `.`, `-` and `_`.

        Raises:
            ArgumentError: another `slug`, or a merged circuit, which has no positions.
        """
        return to_attribution_graph(self, slug)

    def __str__(self) -> str:
        kinds = self.nodes.kind.value_counts()
        counts = ", ".join(f"{n} {kind}" for kind, n in kinds.items() if kind not in ("target", "other"))
        ends = ", ".join(f"{kind} {share:.1%}" for kind, share in self.shares.items() if share)
        return (
            f"circuit of {self.target} at position {self.position} ({self.tokens[self.position]!r})\n"
            f"  {counts}; {len(self.edges)} edges, {len(self.hyperedges)} hyper-edges\n"
            f"  kept {self.kept_share:.1%} of the influence of {self.n_found} nodes; it ends in {ends}\n"
            f"  {self.completeness_said}\n"
            f"{self.to_frame()[['id', 'name', 'value', 'influence']].head(15).to_string(index=False)}"
        )


@torch.no_grad()
def trace_circuit(
    frozen: FrozenPass,
    target: Target | Sequence[Target],
    *,
    max_nodes: int = 200,
    node_threshold: float = 0.8,
    edge_threshold: float = 0.98,
    mlps: MLPs = "eigencircuits",
    eigen_share: float = 0.8,
    names: Names | None = None,
) -> Circuit:
    """`Circuit.trace` on a forward pass that is there already; the arguments are the same."""
    _check_limits(max_nodes, node_threshold, edge_threshold, mlps, eigen_share)
    targets = as_targets(target)
    points = {sae.point for sae in frozen.saes.values()}
    if not points & {"mlp-in", "resid-mid", "mlp-out"}:
        raise MissingSAEError(
            "a circuit is made of the features of SAEs on MLPs' inputs (ln2.hook_normalized) and outputs "
            f"(hook_mlp_out); given are {', '.join(frozen.saes) or 'none'}."
        )
    labels = names_by_hook(frozen.model, frozen.saes, names)
    reads = read_targets(frozen, targets)
    probabilities = [probability(frozen, each) for each in targets]
    found = propagate(frozen, reads, _weights(reads, probabilities), max_nodes, mlps, eigen_share)
    kept, kept_share, n_found = _prune(found, max_nodes, node_threshold)
    kept = _gather(found, kept)
    edges, hyperedges = _edges(frozen, found, kept, edge_threshold)
    nodes = _node_frame(frozen, found, kept, labels, reads.names)
    nodes.loc[nodes.kind == "target", "feature"] = [logit_token(frozen, each) for each in targets]
    ids = dict(zip(nodes.number, nodes.id, strict=True))
    heads = _head_frame(frozen, found, edges, ids)
    edges = edges.assign(source=edges.source.map(ids), target=edges.target.map(ids))
    hyperedges = hyperedges.assign(**{column: hyperedges[column].map(ids) for column in ("i", "j", "target")})
    used = {*edges.source, *hyperedges.i, *hyperedges.j}
    nodes = nodes[nodes.id.isin(used) | (nodes.number < len(found.nodes)) & (nodes.kind != "bias")]
    circuit = Circuit(
        model_name=frozen.model.cfg.model_name,
        target=", ".join(reads.names),
        position=int(reads.positions[0]),
        tokens=frozen.strings,
        nodes=nodes[list(NODE_COLUMNS)].reset_index(drop=True),
        edges=_with_via(edges, heads),
        hyperedges=hyperedges.reset_index(drop=True)[list(HYPEREDGE_COLUMNS)],
        heads=heads,
        shares={},
        kept_share=kept_share,
        n_found=n_found,
        dtype=str(frozen.logits.dtype).removeprefix("torch."),
        fingerprints=frozen.fingerprints,
        probabilities={
            ids[number]: p for number, p in zip(found.nodes.targets, probabilities, strict=True) if p is not None
        },
        predicted=predicted(frozen, targets[0]),
    )
    return replace(circuit, shares=_ends(circuit), supernodes=_siblings(frozen, circuit))


def _check_limits(max_nodes: int, node_threshold: float, edge_threshold: float, mlps: str, eigen_share: float) -> None:
    shares = {"node_threshold": node_threshold, "edge_threshold": edge_threshold, "eigen_share": eigen_share}
    for name, value in shares.items():
        if not 0 < value <= 1:
            raise ArgumentError(f"{name} is {value}, expected more than 0 and at most 1.")
    if mlps not in get_args(MLPs):
        raise ArgumentError(f"mlps is {mlps!r}, expected {' or '.join(map(repr, get_args(MLPs)))}.")
    check_sizes(max_nodes=max_nodes)


def _weights(reads: Reads, probabilities: Sequence[float | None]) -> Float[Tensor, "t"]:
    """The influence that each target starts with; together 1.

    Raises:
        ArgumentError: a target given twice, or logits among other targets.
    """
    seen = list(zip(reads.names, reads.positions.tolist(), strict=True))
    for name, position in seen:
        if seen.count((name, position)) > 1:
            raise ArgumentError(f"two targets are called {name!r} at position {position}; give each a name of its own.")
    known = [p for p in probabilities if p is not None]
    if known and len(known) < len(seen):
        raise ArgumentError(
            f"the targets {', '.join(reads.names)} are logits and others: those have probabilities to be weighted by, "
            "these have none; trace them apart."
        )
    weights = torch.tensor(known or [1.0] * len(seen), dtype=torch.float64)
    return weights / weights.sum().clamp_min(torch.finfo(torch.float64).tiny)


def _prune(found: Propagation, max_nodes: int, threshold: float) -> tuple[Int[Tensor, "n"], float, int]:
    """The nodes to keep (without the target and biases), their part of all influence, and how many have any.

    The most influential ones, each with its strongest path to a target, as long as there is room for the whole path.
    """
    influence = found.influence.clone()
    influence[found.nodes.targets] = 0.0
    influence[found.nodes.kind == BIAS] = 0.0
    total = influence.sum().clamp_min(torch.finfo(torch.float64).tiny).item()
    n_found = int((influence > 0).sum())
    up, reached = found.up.tolist(), 0.0
    kept = set(found.nodes.targets)
    for number in influence.argsort(descending=True)[:n_found].tolist():
        if len(kept) - len(found.nodes.targets) >= max_nodes or (threshold < 1 and reached >= threshold * total):
            break
        path = []
        while number not in kept and number >= 0:
            path.append(number)
            number = up[number]
        if number >= 0 and len(kept) + len(path) - len(found.nodes.targets) <= max_nodes:
            kept.update(path)
            reached += influence[path].sum().item()
    return torch.tensor(sorted(kept - set(found.nodes.targets)), dtype=torch.long), reached / total, n_found


def _gather(found: Propagation, kept: Int[Tensor, "n"]) -> Int[Tensor, "m"]:
    """The nodes to keep, with the rest of each one's eigencircuits, to which those that are not kept now belong.

    Where none but the rest would be there, a node has its input's sources directly.
    """
    inside = set(kept.tolist()) | set(found.nodes.targets)
    for owner, (squares, circuits) in found.squares.items():
        if owner not in inside or not len(circuits):
            continue
        gone = torch.tensor([number not in inside for number in circuits.tolist()])
        gone[-1] = False
        if gone[:-1].all():
            found.influence[circuits] = 0.0
            direct = squares.direct + squares.weights.sum(0)
            found.squares[owner] = Squares(squares.index[:0], squares.weights[:0], direct), circuits[:0]
            found.up[torch.isin(found.up, circuits)] = owner
            inside -= set(circuits.tolist())
            continue
        for column in (found.nodes.value, found.influence):
            column[circuits[-1]] += column[circuits[gone]].sum()
            column[circuits[gone]] = 0.0
        inside.add(int(circuits[-1]))
    return torch.tensor(sorted(inside - set(found.nodes.targets)), dtype=torch.long)


def _edges(
    frozen: FrozenPass, found: Propagation, kept: Int[Tensor, "n"], threshold: float
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Edges and hyper-edges by the numbers of nodes; what is pruned goes to `len(nodes) + kind`."""
    nodes = found.nodes
    n = len(nodes)
    inside = nodes.kind == BIAS
    inside[kept] = True
    inside[nodes.targets] = True
    rest = n + nodes.kind  # what stands for a node that was pruned
    for owner, (_, circuits) in found.squares.items():
        if inside[owner] and len(circuits):
            rest[circuits] = circuits[-1]
    linear, pairs = [], []
    # Pruned sources are summed here already: of dense SAEs there are millions of edges and pairs.
    stand_in = torch.where(inside, torch.arange(n), rest)

    def add(sources: Int[Tensor, "source"], targets: Int[Tensor, "t"], weights: Tensor, influences: Tensor) -> None:
        """Edges from all sources to all targets, where there are any; `[t, source]`."""
        (sources, at), (targets, to) = (stand_in[these].unique(return_inverse=True) for these in (sources, targets))
        summed, strengths = (
            torch.zeros(len(targets), len(sources), dtype=torch.float64).index_put_(
                (to[:, None], at[None]), part, accumulate=True
            )
            for part in (weights, influences)
        )
        t, s = (strengths > 0).nonzero(as_tuple=True)
        linear.append(_table(source=sources[s], target=targets[t], weight=summed[t, s], influence=strengths[t, s]))

    for number, read in found.reads.items():
        if not inside[number] or number in found.sources:
            continue
        row = linear_rows(frozen, read)[0].double().cpu()
        share = found.influence[number] / max(found.sums[number][1], 1e-300)
        add(nodes.linear, torch.tensor([number]), row[None], share * row.abs()[None])
    for number, (squares, circuits) in found.squares.items():
        if not inside[number]:
            continue
        ids, values = found.sources[number], squares.weights.sum(1)
        parts = torch.cat([values, squares.direct])
        shares = found.influence[number] * parts.abs() / parts.abs().sum().clamp_min(1e-300)
        add(torch.cat([circuits, ids]), torch.tensor([number]), parts[None], shares[None])
        if len(circuits):
            sizes = squares.weights.abs()
            handed = shares[: len(circuits), None] * sizes / sizes.sum(1, keepdim=True).clamp_min(1e-300)
            add(ids, circuits, squares.weights, handed)
    for number, ids in found.sources.items():
        if not inside[number] or number in found.squares:
            continue
        ids, at = stand_in[ids].unique(return_inverse=True)
        member = torch.nn.functional.one_hot(at).double()
        products = found.products(frozen, number)
        once = 2.0 - torch.eye(len(ids))
        summed, sizes = ((member.T @ matrix @ member) * once for matrix in (products, products.abs()))
        s, t = sizes.tril().nonzero(as_tuple=True)
        total = found.sums[number][1]
        shares = found.influence[number] * sizes[s, t] / max(total, 1e-300)
        pairs.append(_table(i=ids[t], j=ids[s], target=number, weight=summed[s, t], influence=shares))
        if found.constants[number]:
            share = found.influence[number] * abs(found.constants[number]) / max(total, 1e-300)
            constant = torch.tensor([nodes.constant])
            linear.append(
                _table(source=constant, target=number, weight=torch.tensor([found.constants[number]]), influence=share)
            )
    edges = pd.concat([_table(source=kept[:0], target=0, weight=kept[:0] * 0.0, influence=0.0), *linear])
    hyper = pd.concat([_table(i=kept[:0], j=kept[:0], target=0, weight=kept[:0] * 0.0, influence=0.0), *pairs])
    # An edge is kept if its ends are and it is among the strongest, or the strongest way of its source to the target;
    # edges of biases always are.
    pruned = torch.arange(n, n + len(KINDS))
    inner = torch.cat([inside, pruned < 0]).numpy()
    biases, rest_of = torch.cat([nodes.kind == BIAS, pruned < 0]).numpy(), torch.cat([rest, pruned]).numpy()
    ends_in = torch.from_numpy(np.concatenate([inner[edges.source], inner[hyper.i] & inner[hyper.j]]))
    strength = torch.tensor([*edges.influence, *hyper.influence])
    order = torch.where(ends_in, strength, 0.0).argsort(descending=True)
    cumulative = strength[order].mul(ends_in[order]).cumsum(0)
    strong = torch.zeros_like(ends_in)
    strong[order[: _needed(cumulative, threshold)]] = True
    strong[torch.from_numpy(_ways_up(found.up.numpy(), edges, hyper))] = True
    stay = (ends_in & strong).numpy()
    edges["source"] = edges.source.where(stay[: len(edges)] | biases[edges.source], rest_of[edges.source])
    for side, other in (("i", "j"), ("j", "i")):
        # The member that is in the graph stays, where the other one is what was pruned.
        alone = inner[hyper[side]] & ~inner[hyper[other]]
        hyper[f"{side}_"] = hyper[side].where(stay[len(edges) :] | biases[hyper[side]] | alone, rest_of[hyper[side]])
    hyper["i"], hyper["j"] = hyper[["i_", "j_"]].min(axis=1), hyper[["i_", "j_"]].max(axis=1)
    sums = {"weight": "sum", "influence": "sum"}
    return (
        edges.groupby(["source", "target"], as_index=False, sort=False).agg(sums),
        hyper.groupby(["i", "j", "target"], as_index=False, sort=False).agg(sums),
    )


def _ways_up(up: np.ndarray, edges: pd.DataFrame, hyper: pd.DataFrame) -> np.ndarray:
    """Of all edges and hyper-edges, the place of each node's strongest one to the next node on its path."""
    ends = [edges[["source", "target", "influence"]]]
    ends += [hyper.rename(columns={side: "source"})[["source", "target", "influence"]] for side in ("i", "j")]
    places = np.arange(len(edges) + len(hyper))
    frame = pd.concat(ends).assign(place=np.concatenate([places, places[len(edges) :]]))
    known = frame[frame.source < len(up)]
    known = known[up[known.source] == known.target]
    return known.sort_values("influence", ascending=False).drop_duplicates("source").place.to_numpy(copy=True)


def _siblings(frozen: FrozenPass, circuit: Circuit) -> list[list[str]]:
    """Groups of near-identical features, each with its label first."""
    paths = Paths.of(circuit)
    up = paths.strongest(paths.start, down=False)
    groups = []
    nodes = circuit.nodes.assign(up=up)
    for (hook, *_), family in nodes[nodes.kind == "feature"].groupby(["hook", "position", "up"]):
        family = family.sort_values("influence", ascending=False)
        # A label may begin with the feature's number, and is the id where there is no name; "(silent)" is none.
        names = [
            "" if row.name == row.id.split("@")[0] else re.sub(r"^\d+ (\(silent\)$)?", "", row.name)
            for row in family.itertuples()
        ]
        directions = torch.nn.functional.normalize(frozen.saes[str(hook)].view.decoder[family.feature.tolist()], dim=1)
        same = (directions @ directions.T).cpu() >= ALIKE
        left = list(range(len(family)))
        while left:
            first = left[0]
            group = [n for n in left if n == first or same[first, n] or (names[n] and names[n] == names[first])]
            left = [n for n in left if n not in group]
            if len(group) > 1:
                groups.append([f"{family.name.iloc[first]} ({len(group)} alike)", *family.id.iloc[group]])
    return groups


def _needed(cumulative: Float[Tensor, "n"], threshold: float) -> int:
    """How many of the largest it takes to reach a part of the last sum; all of them for the whole, rounding aside."""
    if threshold == 1 or not len(cumulative):
        return len(cumulative)
    return int((cumulative < threshold * cumulative[-1]).sum()) + 1


def _table(**columns: Tensor | int | float) -> pd.DataFrame:
    return pd.DataFrame({name: c.numpy() if isinstance(c, Tensor) else c for name, c in columns.items()})


def _node_frame(
    frozen: FrozenPass, found: Propagation, kept: Int[Tensor, "n"], labels: dict[str, Sequence[str]], targets: list[str]
) -> pd.DataFrame:
    nodes = found.nodes
    biases = (nodes.kind == BIAS).nonzero().flatten()
    rows: list[dict[str, Any]] = []
    owners = {
        number: (owner, row)
        for owner, (_, circuits) in found.squares.items()
        for row, number in enumerate(circuits.tolist())
    }
    for number in [*nodes.targets, *kept.tolist(), *biases.tolist()]:
        expanded = number in found.actual or number in owners
        error = _relative_error(found, number) if number in found.actual else 0.0
        row = _describe(frozen, nodes, number if number not in owners else owners[number][0], labels, targets)
        if number in owners:
            row |= _describe_circuit(frozen, found, *owners[number], labels, targets)
        influence = found.influence[number].item()
        rows.append(row | {"number": number, "influence": influence, "expanded": expanded, "relative_error": error})
    gone = found.influence.clone()
    gone[kept] = 0.0
    for k, kind in enumerate(KINDS):
        if kind in ("target", "bias"):
            continue
        name = f"other {'tokens' if kind == 'embedding' else kind + 's'}"
        influence = gone[nodes.kind == k].sum().item()
        empty = {"layer": -1, "point": "", "hook": "", "position": -1, "token": "", "feature": -1, "value": 0.0}
        rows.append(
            {"id": name, "kind": "other", "name": name, **empty, "number": len(nodes) + k, "influence": influence}
            | {"expanded": False, "relative_error": 0.0}
        )
    return pd.DataFrame(rows)


def _describe(
    frozen: FrozenPass, nodes: Numbering, number: int, labels: dict[str, Sequence[str]], targets: list[str]
) -> dict[str, Any]:
    kind, layer = KINDS[nodes.kind[number]], int(nodes.layer[number])
    position, feature = int(nodes.position[number]), int(nodes.feature[number])
    point = hook = sae_label = ""
    if layer >= 0 and kind != "mlp":
        sae = frozen.input_sae(layer) if nodes.is_input[number] else frozen.output_sae(layer)
        assert sae is not None
        point, hook, sae_label = sae.point, sae.hook, sae.label
    elif kind == "mlp":
        point, hook = "mlp-out", hook_of("mlp-out", layer)
    token = frozen.strings[position] if position >= 0 else ""
    place = number - nodes.targets[0]
    identity = {
        "target": "target" if len(targets) == 1 else f"target {place + 1}",
        "embedding": f"embed@{position}",
        "feature": f"{sae_label}/{feature}@{position}",
        "error": f"error {sae_label}@{position}",
        "mlp": f"mlp {layer}@{position}",
        "bias": f"b_dec {sae_label}" if sae_label else "bias",
    }[kind]
    name = identity.split("@")[0]
    if kind == "target":
        name = targets[place]
    elif kind == "embedding":
        name = token
    elif kind == "feature" and hook in labels:
        name = labels[hook][feature]
    return {
        "id": identity,
        "kind": kind,
        "layer": layer,
        "point": point,
        "hook": hook,
        "position": position,
        "token": token,
        "feature": feature,
        "name": name,
        "value": nodes.value[number].item(),
    }


def _describe_circuit(
    frozen: FrozenPass, found: Propagation, owner: int, row: int, labels: dict[str, Sequence[str]], targets: list[str]
) -> dict[str, Any]:
    """An eigencircuit, named by the two features that it reads most, and what distinguishes it from its owner."""
    nodes, (squares, circuits) = found.nodes, found.squares[owner]
    of = _describe(frozen, nodes, owner, labels, targets)
    index, weights, value = int(squares.index[row]), squares.weights[row], nodes.value[circuits[row]].item()
    if index < 0:
        name = f"other eigencircuits of {of['name']}"
    else:
        shares = weights * (1 if value >= 0 else -1)
        shares[nodes.kind[found.sources[owner]] != KINDS.index("feature")] = 0.0
        largest = shares.abs().argsort(descending=True)[:2].tolist()
        largest = [place for place in largest if shares[place].abs() > 0.25 * shares.abs().max()]
        sources = found.sources[owner].tolist()
        parts = [
            (shares[place].item(), _describe(frozen, nodes, sources[place], labels, targets)["name"])
            for place in sorted(largest, key=lambda place: -shares[place].item())
        ]
        name = "".join(f"{' + ' if share > 0 else ' − '}{part}" for share, part in parts).removeprefix(" + ").strip()
        name = name or "SAE error and biases"
    at = f"@{of['position']}"
    identity = f"{of['id'].removesuffix(at)}.{index if index >= 0 else 'rest'}{at}"
    return {"id": identity, "kind": "eigencircuit", "point": "", "hook": "", "name": name, "value": value,
            "layer": int(nodes.layer[circuits[row]])}  # fmt: skip


def _relative_error(found: Propagation, number: int) -> float:
    """Of a node's parts, all of them, summed in float32."""
    total, absolute = found.sums[number]
    return abs(total - found.actual[number]) / max(absolute, 1e-30)


def _head_frame(frozen: FrozenPass, found: Propagation, edges: pd.DataFrame, ids: dict[int, str]) -> pd.DataFrame:
    """Of every edge between two kept nodes, its parts by the last head."""
    nodes = found.nodes
    # Those that come through the residual stream: not what an MLP's input gives its output.
    inside_mlp = [number for number in edges.target if number in found.sources or number not in found.reads]
    linear = edges[(edges.source < len(nodes)) & ~edges.target.isin(inside_mlp)]
    linear = linear[nodes.position.numpy()[linear.source] >= 0]
    if linear.empty:
        return pd.DataFrame(columns=list(HEAD_COLUMNS))
    sources, targets = linear.source.unique(), linear.target.unique()
    reads = Reads.concatenate([found.reads[number] for number in targets])
    ways = head_sums(frozen, nodes, torch.tensor(sources), reads).double().cpu()
    row = linear.source.map({number: place for place, number in enumerate(sources)}).tolist()
    column = linear.target.map({number: place for place, number in enumerate(targets)}).tolist()
    parts = ways[row, column]
    edge, way = parts.nonzero(as_tuple=True)
    n_heads = frozen.pattern.shape[1]
    direct = way == 0
    return pd.DataFrame(
        {
            "source": linear.source.map(ids).to_numpy()[edge],
            "target": linear.target.map(ids).to_numpy()[edge],
            "layer": torch.where(direct, -1, (way - 1) // n_heads).numpy(),
            "head": torch.where(direct, -1, (way - 1) % n_heads).numpy(),
            "weight": parts[edge, way].numpy(),
        }
    )


def _with_via(edges: pd.DataFrame, heads: pd.DataFrame) -> pd.DataFrame:
    """Each edge with the way that has the largest part in it."""
    if heads.empty:
        return edges.assign(via="", via_weight=0.0).reset_index(drop=True)[list(EDGE_COLUMNS)]
    strongest = heads.loc[heads.weight.abs().groupby([heads.source, heads.target], sort=False).idxmax()]
    via = strongest.assign(
        via=[
            "direct" if layer < 0 else f"L{layer}H{head}"
            for layer, head in zip(strongest.layer, strongest["head"], strict=True)
        ],
        via_weight=strongest.weight,
    )[["source", "target", "via", "via_weight"]]
    edges = edges.drop(columns=["via", "via_weight"], errors="ignore").merge(via, on=["source", "target"], how="left")
    return edges.fillna({"via": "", "via_weight": 0.0})[list(EDGE_COLUMNS)]


def _ends(circuit: Circuit) -> dict[str, float]:
    """Where the target's influence ends: hand it down the graph, everything that is not expanded keeps it."""
    paths = Paths.of(circuit)
    ends: dict[str, float] = {}
    for name, kind, share in zip(circuit.nodes.id, circuit.nodes.kind, paths.ends(paths.start >= 0), strict=True):
        key = name if kind == "other" else kind
        ends[key] = ends.get(key, 0.0) + float(share)
    return {key: share for key, share in ends.items() if share}
