"""The tables of a circuit, in memory and in files: what `bilens.attribute.circuit.Circuit` is made of.

safetensors     numeric columns as tensors, the rest as JSON in the header: what `load` reads back, exactly
networkx        a hyper-edge is a node of kind `pair`: its members point to it with half of the weight each, and it
                points to its output with the whole
"""

import json
from dataclasses import dataclass, field, fields
from os import PathLike
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from safetensors.torch import save_file
from typing_extensions import Self

from bilens._core.files import open_tensors, parse_json, to_path, write_atomically
from bilens.errors import CheckpointError

if TYPE_CHECKING:
    import networkx as nx

NODE_COLUMNS = (
    *("id", "kind", "layer", "point", "hook", "position", "token", "feature", "name"),
    *("value", "influence", "expanded", "relative_error"),
)
EDGE_COLUMNS = ("source", "target", "weight", "influence", "via", "via_weight")
HYPEREDGE_COLUMNS = ("i", "j", "target", "weight", "influence")
HEAD_COLUMNS = ("source", "target", "layer", "head", "weight")
COLUMNS = {"nodes": NODE_COLUMNS, "edges": EDGE_COLUMNS, "hyperedges": HYPEREDGE_COLUMNS, "heads": HEAD_COLUMNS}
FRAMES = tuple(COLUMNS)
FORMAT = "bilens circuit 1"


@dataclass(frozen=True)
class CircuitTables:
    """The numbers and names of an attribution graph.

    Attributes:
        model_name: the model's name.
        target: its name; the names of several.
        position: the position of the (first) target.
        tokens: the tokens of the text.
        nodes: one row per node: `id, kind` (target, embedding, feature, error, mlp, bias, other), `layer, point, hook,
            position, token, feature, name, value` (an activation; the norm of an embedding or error), `influence` on
            the targets, whether it is `expanded`, and the `relative_error` of its completeness. The feature of an
            embedding and of a logit is the token's number. -1 where there is none.
        edges: linear: `source, target, weight, influence, via` (the last head on the way with the largest part, or
            `direct`) and `via_weight`, that part.
        hyperedges: pairs: `i, j, target, weight, influence`; a pair stands once with its whole contribution.
        heads: every linear edge's parts by the last head on the way: `source, target, layer, head, weight`, -1 direct.
        shares: the share of the target's influence that ends in each kind of node where the graph ends; the share
            in `other ...` was pruned.
        kept_share: the kept nodes' part of the influence of all nodes.
        n_found: the number of nodes that had any influence.
        probabilities: the token's probability by the id of each target that is a logit (`target`, `target 1`, ...); for
            a difference of logits, that of the first token.
        dtype: the type of the model's activations; empty if that is not known.
        fingerprints: the fingerprints of the model (`model`) and of the SAEs by hook that it was made from.
        predicted: the probabilities of next tokens at the (first) target's position: of its own tokens, then of the
            likeliest others.
        pinned, supernodes: the ids of the nodes that a reader pinned in a viewer, and those put together there, each
            group with its label first (see `attribution_graphs`). A traced circuit has its near-identical siblings
            together: features at one position, of the same name or nearly the same direction, that lead to the same
            node.
    """

    model_name: str
    target: str
    position: int
    tokens: list[str] = field(repr=False)
    nodes: pd.DataFrame = field(repr=False)
    edges: pd.DataFrame = field(repr=False)
    hyperedges: pd.DataFrame = field(repr=False)
    heads: pd.DataFrame = field(repr=False)
    shares: dict[str, float]
    kept_share: float
    n_found: int
    probabilities: dict[str, float] = field(default_factory=dict)
    dtype: str = ""
    fingerprints: dict[str, str] = field(default_factory=dict, repr=False)
    predicted: dict[str, float] = field(default_factory=dict)
    pinned: list[str] = field(default_factory=list)
    supernodes: list[list[str]] = field(default_factory=list)

    def folded_edges(self) -> pd.DataFrame:
        """All edges between two nodes, hyper-edges folded half to each member (their Shapley value):
        `source, target, weight, influence`."""
        halves = []
        for side in ("i", "j"):
            half = self.hyperedges.rename(columns={side: "source"})[["source", "target", "weight", "influence"]].copy()
            half[["weight", "influence"]] *= 0.5
            halves.append(half)
        both = pd.concat([self.edges[["source", "target", "weight", "influence"]], *halves])
        return both.groupby(["source", "target"], as_index=False, sort=False)[["weight", "influence"]].sum()

    def save(self, path: str | PathLike[str]) -> None:
        """Write everything into one safetensors file; `load` reads it back."""
        tensors, strings = {}, {}
        for name in FRAMES:
            for column, values in getattr(self, name).items():
                if pd.api.types.is_numeric_dtype(values.dtype):
                    tensors[f"{name}.{column}"] = torch.from_numpy(values.to_numpy().copy())
                else:
                    strings[f"{name}.{column}"] = values.tolist()
        header = {
            "format": FORMAT,
            "fields": json.dumps(scalars(self)),
            "columns": json.dumps({name: list(getattr(self, name).columns) for name in FRAMES}),
            "strings": json.dumps(strings),
        }
        write_atomically(to_path(path), lambda beside: save_file(tensors, beside, header))

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Self:
        """Read what `save` wrote.

        Raises:
            ModelNotFoundError: there is no file.
            CheckpointError: not such a file, or a truncated one.
        """
        try:
            with open_tensors(to_path(path), remedy="It is no circuit that Circuit.save wrote whole.") as file:
                header = file.metadata() or {}
                if header.get("format") != FORMAT:
                    raise CheckpointError(
                        f"{path} is no circuit: its format is {header.get('format')!r}, not {FORMAT!r}."
                    )
                tensors = {key: file.get_tensor(key).numpy() for key in file.keys()}  # noqa: SIM118
            columns = parse_json(header["columns"], f"'columns' of {path}")
            values = parse_json(header["strings"], f"'strings' of {path}") | tensors
            frames = {
                name: pd.DataFrame({column: values[f"{name}.{column}"] for column in columns[name]}) for name in FRAMES
            }
            return cls(**parse_json(header["fields"], f"'fields' of {path}"), **frames)
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"{path} is no circuit that Circuit.save wrote: {error}") from error

    def to_networkx(self) -> "nx.DiGraph":
        """A directed graph, for networkx's algorithms and writers: node and edge attributes are the tables' columns,
        and a hyper-edge is a node of kind `pair` that its members point to."""
        import networkx as nx

        graph = nx.DiGraph(**scalars(self))
        for row in self.nodes.to_dict("records"):
            graph.add_node(row.pop("id"), **row)
        for row in self.edges.to_dict("records"):
            graph.add_edge(row.pop("source"), row.pop("target"), **row)
        for row in self.hyperedges.to_dict("records"):
            pair = f"{row['i']} x {row['j']} -> {row['target']}"
            graph.add_node(pair, kind="pair", name=pair, value=row["weight"], influence=row["influence"])
            graph.add_edge(pair, row["target"], weight=row["weight"], influence=row["influence"])
            for member in {row["i"], row["j"]}:
                share = 1.0 if row["i"] == row["j"] else 0.5
                graph.add_edge(member, pair, weight=share * row["weight"], influence=share * row["influence"])
        return graph


def scalars(circuit: CircuitTables) -> dict[str, Any]:
    """The fields of a circuit that are no tables."""
    return {f.name: getattr(circuit, f.name) for f in fields(circuit) if f.name not in FRAMES}
