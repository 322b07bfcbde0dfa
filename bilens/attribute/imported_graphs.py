"""Attribution graphs of circuit-tracer and Neuronpedia read back, our own and other programs'."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from bilens._core.files import parse_json
from bilens.attribute.attribution_graphs import ERROR, FEATURE, exported_nodes, exported_pins
from bilens.attribute.circuit import Circuit
from bilens.attribute.circuit_tables import COLUMNS, FRAMES
from bilens.errors import CheckpointError

KINDS = {"embedding": "embedding", "logit": "target", ERROR: "error", "lorsa error": "error", "bias": "bias"}
KINDS |= {"unknown": "other"}  # everything else is a feature


def from_attribution_graph(graph: Mapping[str, Any]) -> Circuit:
    """Read the JSON back, with the labels that were edited in a viewer and what was pinned and grouped there: ours
    whole, another program's as nodes and linear edges, whose influence is worked out anew from the links.

    Raises:
        CheckpointError: an object without `metadata`, `nodes` and `links`, or with others than the format has.
    """
    if not isinstance(graph, Mapping):
        raise CheckpointError(f"this is no attribution graph: it is a {type(graph).__name__}, not a JSON object.")
    missing = [key for key in ("metadata", "nodes", "links") if key not in graph]
    if missing:
        raise CheckpointError(f"this is no attribution graph: it has no {', '.join(missing)}.")
    try:
        if "bilens" in graph:
            own = dict(graph["bilens"])
            circuit = Circuit(**(own | {name: pd.DataFrame(own[name], columns=list(COLUMNS[name])) for name in FRAMES}))
            foreign = exported_nodes(circuit)
        else:
            circuit, foreign = _foreign_circuit(graph)
        return _edited(circuit, foreign, graph)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"this attribution graph cannot be read: {error!r}") from error


def _edited(circuit: Circuit, foreign: Mapping[str, Mapping[str, Any]], graph: Mapping[str, Any]) -> Circuit:
    """The circuit with what a reader changed in the viewer. `foreign` are its nodes as they were exported, by id."""
    ids = {node["node_id"]: name for name, node in foreign.items()}
    labels = {}
    for node in graph["nodes"]:
        name = ids.get(node["node_id"])
        if name is not None and node.get("clerp") and node["clerp"] != foreign[name]["clerp"]:
            labels[name] = node["clerp"]
    asked = graph.get("qParams") or {}
    edits = dict(_listed(asked.get("clerps")))
    for name, node in foreign.items():
        for key in (str(node["feature"]), f"{node['layer']}_{node['feature']}_{node['ctx_idx']}"):
            if key in edits and node["feature_type"] == FEATURE:
                labels[name] = edits[key]
    nodes = circuit.nodes.copy()
    changeable = ~nodes.kind.isin(["target", "embedding"])
    renamed = nodes.id.map(labels).where(changeable)
    bare = [
        str(label).removeprefix(f"{name.split('@')[0]}: ") if isinstance(label, str) else old
        for name, label, old in zip(nodes.id, renamed, nodes.name, strict=True)
    ]
    pinned = asked.get("pinnedIds") or []
    pinned = pinned.split(",") if isinstance(pinned, str) else pinned
    pinned = [ids[name] for name in pinned if name in ids]
    if pinned == exported_pins(circuit):
        pinned = circuit.pinned  # not a reader's
    return replace(
        circuit,
        nodes=nodes.assign(name=bare),
        pinned=pinned,
        supernodes=[
            [str(label), *(ids[name] for name in names if name in ids)]
            for label, *names in _listed(asked.get("supernodes"))
        ],
    )


def _listed(value: Any) -> list[Any]:
    """A list, or the JSON text of one."""
    return (
        parse_json(value, "qParams of this attribution graph", list) if isinstance(value, str) and value else value
    ) or []


def _foreign_circuit(graph: Mapping[str, Any]) -> tuple[Circuit, dict[str, dict[str, Any]]]:
    metadata = graph["metadata"]
    tokens = list(metadata.get("prompt_tokens", []))
    rows: list[dict[str, Any]] = []
    named: dict[str, dict[str, Any]] = {}
    for node in graph["nodes"]:
        kind, position, name = KINDS.get(node["feature_type"], "feature"), int(node["ctx_idx"]), node["node_id"]
        copies = 1
        while name in named:
            # Circuit-tracer's errors have the ids of layer 0's features.
            copies += 1
            name = f"{node['node_id']} ({copies})"
        named[name] = {"clerp": "", **node}
        rows.append(
            {
                "id": name,
                "kind": kind,
                "layer": int(node["layer"]) if str(node["layer"]).isdigit() and kind != "target" else -1,
                "point": "",
                "hook": "",
                "position": position,
                "token": tokens[position] if position < len(tokens) else "",
                "feature": _index(node, kind, metadata.get("schema_version") or 0),
                "name": node.get("clerp") or name,
                "value": float(node.get("activation") or 0.0),
                "expanded": False,
                "relative_error": 0.0,
            }
        )
    nodes = pd.DataFrame(rows)
    edges = _foreign_edges(graph["links"], nodes)
    targets = nodes[nodes.kind == "target"]
    probabilities = {name: float(named[name].get("token_prob") or 0.0) for name in targets.id}
    total = sum(probabilities.values())
    starts = {name: p / total if total else 1 / len(probabilities) for name, p in probabilities.items()}
    influence, shares = _handed_down(nodes, edges, starts)
    cumulative = [float(node["influence"]) for node in graph["nodes"] if node.get("influence") is not None
                  and node["feature_type"] not in ("embedding", "logit")]  # fmt: skip
    circuit = Circuit(
        model_name=str(metadata.get("scan", "")),
        target=", ".join(targets.name),
        position=int(targets.position.iloc[0]) if len(targets) else len(tokens) - 1,
        tokens=tokens,
        nodes=nodes.assign(influence=influence)[list(COLUMNS["nodes"])],
        edges=edges.assign(influence=shares, via="", via_weight=0.0)[list(COLUMNS["edges"])],
        hyperedges=pd.DataFrame(columns=list(COLUMNS["hyperedges"])).astype({"weight": float, "influence": float}),
        heads=pd.DataFrame(columns=list(COLUMNS["heads"])).astype({"weight": float}),
        shares={},
        kept_share=max(cumulative, default=1.0),
        n_found=len(nodes),
        probabilities=probabilities,
    )
    return circuit, named


def _index(node: Mapping[str, Any], kind: str, schema: int) -> int:
    """A node's own index: its id's, where that has the form; else the paired number taken apart, as readers do."""
    if kind in ("error", "bias", "other") or node["feature"] is None:
        return -1
    parts = str(node["node_id"]).split("_")
    if len(parts) == 3 and parts[1].isdigit() and parts[0] == str(node["layer"]) and parts[2] == str(node["ctx_idx"]):
        return int(parts[1])
    feature = int(node["feature"])
    if kind != "feature" or schema < 1:
        return feature
    diagonal = (math.isqrt(8 * feature + 1) - 1) // 2
    return feature - diagonal * (diagonal + 1) // 2


def _foreign_edges(links: list[Mapping[str, Any]], nodes: pd.DataFrame) -> pd.DataFrame:
    """Links between the nodes that are there. Where an id stands for several, readers take the last; what a link ends
    in is no error, though."""
    frame = pd.DataFrame(links, columns=["source", "target", "weight"]).astype({"weight": float})
    own = nodes.id.str.replace(r" \(\d+\)$", "", regex=True)
    sources = dict(zip(own, nodes.id, strict=True))
    ends = nodes.kind != "error"
    targets = dict(zip(own[ends], nodes.id[ends], strict=True))
    frame = frame.assign(source=frame.source.map(sources), target=frame.target.map(targets))
    return frame.dropna().reset_index(drop=True)


def _handed_down(
    nodes: pd.DataFrame, edges: pd.DataFrame, starts: Mapping[str, float]
) -> tuple[np.ndarray, np.ndarray]:
    """The influence of nodes and edges: each node hands its own to its sources, in the proportion of its links."""
    number = {name: place for place, name in enumerate(nodes.id)}
    source, target = edges.source.map(number).to_numpy(int), edges.target.map(number).to_numpy(int)
    sums = np.bincount(target, edges.weight.abs(), len(nodes))
    part = edges.weight.abs().to_numpy() / np.maximum(sums[target], 1e-300)
    arrived = nodes.id.map(starts).fillna(0.0).to_numpy(float)
    influence = arrived.copy()
    for _ in range(len(nodes)):  # longer than any path, should links go round
        arrived = np.bincount(source, part * arrived[target], len(nodes))
        if not arrived.any():
            break
        influence += arrived
    return influence, part * influence[target]
