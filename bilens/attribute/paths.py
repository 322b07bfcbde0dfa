"""Which nodes of a circuit to look at first: paths, best first, from the target down to the tokens.

1. an edge's share is its part of the influence that its target hands on; a target starts with its own influence
2. influence arrives at a node through the nodes that are shown, and at first only targets are. Next comes the node at
   which most arrives, with its strongest path down to a token: the one whose shares have the largest product
3. what arrives at a shown node that the graph does not take apart ends there, what arrives at any other node is not
   shown; both together are all that the targets started with

So each node in this order has a path to a target through those before it.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int, Shaped

from bilens.attribute.circuit_tables import CircuitTables

SETTLED = 1e-15


@dataclass(frozen=True)
class Paths:
    """The edges of a circuit between its nodes, pairs folded half to each member, by the places of their ends.

    Attributes:
        sources, targets, shares: of the edges; the shares of all that go into a node add up to 1.
        start: the influence that each node starts with: targets', 0 elsewhere.
        tokens: which nodes are tokens.
        rest: which nodes stand for biases and pruned parts, and are not chosen.
    """

    sources: Int[np.ndarray, "edge"]
    targets: Int[np.ndarray, "edge"]
    shares: Float[np.ndarray, "edge"]
    start: Float[np.ndarray, "node"]
    tokens: Bool[np.ndarray, "node"]
    rest: Bool[np.ndarray, "node"]

    @classmethod
    def of(cls, circuit: CircuitTables) -> "Paths":
        nodes, edges = circuit.nodes, circuit.folded_edges()
        place = {name: row for row, name in enumerate(nodes.id)}
        targets = edges.target.map(place).to_numpy(int)
        total = np.bincount(targets, edges.influence, len(nodes))
        return cls(
            sources=edges.source.map(place).to_numpy(int),
            targets=targets,
            shares=edges.influence.to_numpy(float) / np.maximum(total[targets], 1e-300),
            start=np.where(nodes.kind == "target", nodes.influence, 0.0),
            tokens=(nodes.kind == "embedding").to_numpy(),
            rest=nodes.kind.isin(["bias", "other"]).to_numpy(),
        )

    def arriving(self, shown: Bool[np.ndarray, "node"]) -> Float[np.ndarray, "node"]:
        """The influence that arrives at every node through those that are shown."""
        handed = self.shares * shown[self.targets]
        arrived, last = self.start.copy(), self.start
        for _ in range(len(self.start)):  # longer than any path, should edges of a merged circuit go round
            last = np.bincount(self.sources, handed * last[self.targets], len(self.start))
            if last.max(initial=0.0) <= SETTLED:
                break
            arrived += last
        return arrived

    def ends(self, shown: Bool[np.ndarray, "node"]) -> Float[np.ndarray, "node"]:
        """The influence that ends at every node: where it is not shown, or not taken apart. Adds up to that of all
        targets."""
        goes_on = shown & (np.bincount(self.targets, minlength=len(self.start)) > 0)
        return np.where(goes_on, 0.0, self.arriving(shown))

    def strongest(self, start: Shaped[np.ndarray, "node"], down: bool) -> Int[np.ndarray, "node"]:
        """The next node on each node's strongest path to where `start` is positive, down or up the edges; -1: none."""
        here, there = (self.targets, self.sources) if down else (self.sources, self.targets)
        usable = ~self.rest[self.sources]
        here, there, shares = here[usable], there[usable], self.shares[usable]
        best, step = start.astype(float), np.full(len(start), -1)
        for _ in range(len(start)):
            through = shares * best[there]
            better = through > best[here]
            if not better.any():
                break
            order = np.argsort(through[better])  # the last of several is the strongest
            best[here[better][order]], step[here[better][order]] = through[better][order], there[better][order]
        return step

    def choose(self, n: int) -> list[int]:
        """The first nodes in order (targets not counted); fewer if fewer have any influence."""
        down = self.strongest(self.tokens, down=True)
        shown = self.start > 0
        chosen: list[int] = []
        while len(chosen) < n:
            arriving = np.where(shown | self.rest, 0.0, self.arriving(shown))
            at = int(arriving.argmax())
            if arriving[at] <= 0:
                break
            while at >= 0 and not shown[at] and len(chosen) < n:
                chosen.append(at)
                shown[at] = True
                at = int(down[at])
        return chosen


def narrow(circuit: CircuitTables, keep: set[str]) -> Mapping[str, pd.DataFrame]:
    """The tables with only these nodes, biases and what was pruned; what the others gave is pruned as well."""
    nodes = circuit.nodes
    stays = nodes.id.isin(keep) | nodes.kind.isin(["target", "bias", "other"])
    gone = nodes[~stays]
    other = gone.kind.map({kind: f"other {'tokens' if kind == 'embedding' else kind + 's'}" for kind in set(gone.kind)})
    to = dict(zip(gone.id, other, strict=True))
    sums = {"weight": "sum", "influence": "sum"}
    edges = circuit.edges[~circuit.edges.target.isin(to)]
    edges = edges.assign(source=edges.source.map(lambda name: to.get(name, name)))
    via = ~edges.source.isin(set(to.values()))
    edges = edges.assign(via=edges["via"].where(via, ""), via_weight=edges.via_weight.where(via, 0.0))
    edges = edges.groupby(["source", "target"], as_index=False, sort=False).agg(
        sums | {"via": "first", "via_weight": "first"}
    )
    pairs = circuit.hyperedges[~circuit.hyperedges.target.isin(to)]
    i, j = (pairs[side].map(lambda name: to.get(name, name)) for side in ("i", "j"))
    swap = (i > j) & (i.isin(set(to.values())) | j.isin(set(to.values())))
    pairs = pairs.assign(i=i.where(~swap, j), j=j.where(~swap, i))
    pairs = pairs.groupby(["i", "j", "target"], as_index=False, sort=False).agg(sums)
    heads = circuit.heads[~circuit.heads.source.isin(to) & ~circuit.heads.target.isin(to)]
    kept = nodes[stays]
    influence = gone.groupby(other).influence.sum()
    known = kept.influence + kept.id.map(influence).fillna(0.0)
    rows = [
        {
            "id": name, "kind": "other", "layer": -1, "point": "", "hook": "", "position": -1, "token": "",
            "feature": -1, "name": name, "value": 0.0, "influence": float(influence[name]), "expanded": False,
            "relative_error": 0.0,
        }
        for name in influence.index if name not in set(kept.id)
    ]  # fmt: skip
    nodes = pd.concat(
        [kept.assign(influence=known), pd.DataFrame(rows, columns=nodes.columns)]
        if rows
        else [kept.assign(influence=known)]
    )
    return {
        "nodes": nodes.astype(circuit.nodes.dtypes.to_dict()).reset_index(drop=True),
        "edges": edges[list(circuit.edges.columns)],
        "hyperedges": pairs[list(circuit.hyperedges.columns)],
        "heads": heads.reset_index(drop=True),
    }
