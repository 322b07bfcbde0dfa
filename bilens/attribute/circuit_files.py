"""Circuits in files: our own, networkx and GraphML, and the attribution-graph JSON of circuit-tracer and Neuronpedia.

    safetensors     numeric columns as tensors, the rest as JSON in the header: what `Circuit.load` reads back, exactly
    networkx        a hyper-edge is a node of kind `pair`: its members point to it with half of the weight each, and it
                    points to its output with the whole; `from_networkx` takes it back, nodes removed meanwhile or not
    GraphML         of the same, `load_graphml` reads it; characters that XML cannot hold stand as escapes such as \x00
    JSON            `metadata`, `qParams`, `nodes`, `links` as circuit-tracer's viewer and Neuronpedia read them. That
                    format has one feature per (layer, index) and edges between two nodes, so the MLP input of layer `l`
                    is its layer `2l`, the output `2l + 1`, and hyper-edges are folded half to each member. What it has
                    no place for stands in an object `bilens` beside, from which `from_attribution_graph` restores the
                    circuit

What the two viewers take for granted, and the format's classes and schema do not say:

    ids             `node_id` is `layer_index_position`, the embeddings' layer being `E`; the index is negative for what
                    has none. Names, links of a clicked node and groups go by (layer, feature, position), so no two
                    nodes may share one
    logits          the label is `Output "token" (p=0.123)`: the token is what stands between the double quotes, the
                    probability what stands after `(p=`; without it the file does not open
    names           of embeddings and errors (`mlp reconstruction error`) are made from the token, whatever the label
                    says; a `bias` and an `unknown` node keep theirs
    pruning         a node is shown if its cumulative influence is at most the threshold, at most 1
    file names      `slug` and `scan` are of letters, digits, dots, hyphens and underscores
    edits           are saved into `qParams`, as lists by the one and as texts by the other: new labels (`clerps`) by
                    the paired number or by (layer, feature, position), pins, and groups with their label first

Sources of the format: circuit_tracer/frontend of decoderesearch/circuit-tracer, and apps/webapp (the graph page's
utils.ts, and app/api/graph/graph-schema.json) of hijohnnylin/neuronpedia.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import fields, replace
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors.torch import save_file

from bilens._core.files import open_tensors, parse_json, regular_file, to_path, write_atomically
from bilens.attribute.circuit import EDGE_COLUMNS, HEAD_COLUMNS, HYPEREDGE_COLUMNS, NODE_COLUMNS, Circuit
from bilens.errors import ArgumentError, CheckpointError

COLUMNS = {"nodes": NODE_COLUMNS, "edges": EDGE_COLUMNS, "hyperedges": HYPEREDGE_COLUMNS, "heads": HEAD_COLUMNS}
FRAMES = tuple(COLUMNS)
FORMAT = "bilens circuit 1"
# Fields that GraphML has no type for.
AS_JSON = {"tokens": list, "shares": dict, "probabilities": dict, "fingerprints": dict}
AS_JSON |= {"pinned": list, "supernodes": list}


# --- our own ----------------------------------------------------------------------------------------------------------


def save_circuit(circuit: Circuit, path: str | PathLike[str]) -> None:
    """Write a circuit as one safetensors file."""
    tensors, strings = {}, {}
    for name in FRAMES:
        for column, values in getattr(circuit, name).items():
            if pd.api.types.is_numeric_dtype(values.dtype):
                tensors[f"{name}.{column}"] = torch.from_numpy(values.to_numpy().copy())
            else:
                strings[f"{name}.{column}"] = values.tolist()
    header = {
        "format": FORMAT,
        "fields": json.dumps(_scalars(circuit)),
        "columns": json.dumps({name: list(getattr(circuit, name).columns) for name in FRAMES}),
        "strings": json.dumps(strings),
    }
    write_atomically(to_path(path), lambda beside: save_file(tensors, beside, header))


def load_circuit(path: str | PathLike[str]) -> Circuit:
    """Read what `save_circuit` wrote.

    Raises:
        ModelNotFoundError: there is no file.
        CheckpointError: not such a file, or a truncated one.
    """
    try:
        with open_tensors(to_path(path), remedy="It is no circuit that Circuit.save wrote whole.") as file:
            header = file.metadata() or {}
            if header.get("format") != FORMAT:
                raise CheckpointError(f"{path} is no circuit: its format is {header.get('format')!r}, not {FORMAT!r}.")
            tensors = {key: file.get_tensor(key).numpy() for key in file.keys()}  # noqa: SIM118
        columns = parse_json(header["columns"], f"'columns' of {path}")
        values = parse_json(header["strings"], f"'strings' of {path}") | tensors
        frames = {
            name: pd.DataFrame({column: values[f"{name}.{column}"] for column in columns[name]}) for name in FRAMES
        }
        return Circuit(**parse_json(header["fields"], f"'fields' of {path}"), **frames)
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} is no circuit that Circuit.save wrote: {error}") from error


def _scalars(circuit: Circuit) -> dict[str, Any]:
    return {f.name: getattr(circuit, f.name) for f in fields(Circuit) if f.name not in FRAMES}


# --- networkx ---------------------------------------------------------------------------------------------------------


def to_networkx(circuit: Circuit) -> Any:
    """A `networkx.DiGraph`: node and edge attributes are the frames' columns, what is no number or text as JSON; see
    the module for hyper-edges."""
    import networkx as nx

    graph = nx.DiGraph(model=circuit.model_name, target=circuit.target, position=circuit.position)
    graph.graph["dtype"] = circuit.dtype
    graph.graph |= {"text": " ".join(circuit.tokens), "kept_share": circuit.kept_share, "n_found": circuit.n_found}
    graph.graph |= {name: json.dumps(getattr(circuit, name)) for name in AS_JSON}
    for row in circuit.nodes.to_dict("records"):
        graph.add_node(row.pop("id"), **row)
    heads: dict[tuple[str, str], list[Any]] = {}
    for row in circuit.heads.to_dict("records"):
        heads.setdefault((row["source"], row["target"]), []).append([row[column] for column in HEAD_COLUMNS[2:]])
    for row in circuit.edges.to_dict("records"):
        ends = row.pop("source"), row.pop("target")
        graph.add_edge(*ends, **row, heads=json.dumps(heads.get(ends, [])))
    for row in circuit.hyperedges.to_dict("records"):
        pair = f"{row['i']} x {row['j']} -> {row['target']}"
        graph.add_node(
            pair, kind="pair", name=pair, i=row["i"], j=row["j"], value=row["weight"], influence=row["influence"]
        )
        graph.add_edge(pair, row["target"], weight=row["weight"], influence=row["influence"])
        for member in {row["i"], row["j"]}:
            share = 1.0 if row["i"] == row["j"] else 0.5
            graph.add_edge(member, pair, weight=share * row["weight"], influence=share * row["influence"])
    return graph


def save_graphml(circuit: Circuit, path: str | PathLike[str]) -> None:
    """Write `to_networkx` as GraphML."""
    import networkx as nx

    graph = to_networkx(circuit)
    for data in (graph.graph, *(data for _, data in graph.nodes(data=True)), *(d for *_, d in graph.edges(data=True))):
        data.update({name: _for_xml(value) for name, value in data.items() if isinstance(value, str)})
    write_atomically(to_path(path), lambda beside: nx.write_graphml(graph, beside))


def from_networkx(graph: Any) -> Circuit:
    """The circuit of a graph that `to_networkx` made, or what was left of it; rows may come in another order.

    Raises:
        CheckpointError: a graph without the attributes that `to_networkx` writes.
    """
    try:
        rows: dict[str, list[Any]] = {name: [] for name in FRAMES}
        for name, data in graph.nodes(data=True):
            if data["kind"] != "pair":
                # GraphML has no empty texts.
                rows["nodes"].append([name, *(data.get(column, "") for column in NODE_COLUMNS[1:])])
            elif graph.has_node(data["i"]) and graph.has_node(data["j"]):
                hyperedge = [data["i"], data["j"], None, data["value"], data["influence"]]
                rows["hyperedges"] += [[*hyperedge[:2], output, *hyperedge[3:]] for output in graph.successors(name)]
        for source, target, data in graph.edges(data=True):
            if "pair" not in (graph.nodes[source]["kind"], graph.nodes[target]["kind"]):
                rows["edges"].append([source, target, *(data.get(column, "") for column in EDGE_COLUMNS[2:])])
                rows["heads"] += [[source, target, *way] for way in parse_json(data["heads"], "heads", list)]
        about = graph.graph
        return Circuit(
            model_name=about.get("model", ""),
            target=about["target"],
            position=about["position"],
            **{name: parse_json(about[name], name, kind) for name, kind in AS_JSON.items()},
            dtype=about.get("dtype", ""),
            kept_share=about["kept_share"],
            n_found=about["n_found"],
            **{name: pd.DataFrame(rows[name], columns=list(COLUMNS[name])) for name in FRAMES},
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"this graph is none that Circuit.to_networkx made: {error!r}") from error


def load_graphml(path: str | PathLike[str]) -> Circuit:
    """Read what `save_graphml` wrote.

    Raises:
        CheckpointError: another GraphML file, or none.
    """
    from xml.etree.ElementTree import ParseError

    import networkx as nx

    try:
        graph = nx.read_graphml(regular_file(to_path(path)))
    except CheckpointError:
        raise
    except (nx.NetworkXError, ParseError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path} is no GraphML: {error}") from error
    return from_networkx(graph)


def _for_xml(text: str) -> str:
    """Control characters and lone surrogates, which XML has no place for, as escapes."""
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)


# --- circuit-tracer and Neuronpedia -----------------------------------------------------------------------------------

FEATURE, ERROR = "cross layer transcoder", "mlp reconstruction error"
KINDS = {"embedding": "embedding", "logit": "target", ERROR: "error", "lorsa error": "error", "bias": "bias"}
KINDS |= {"unknown": "other"}  # everything else is a feature
NAMELESS = {"error": -1, "mlp": -1, "bias": -2}  # the indices of nodes that have none
NAMELESS |= {f"other {kind}": -3 - place for place, kind in enumerate(("tokens", "features", "errors", "mlps"))}


def to_attribution_graph(circuit: Circuit, slug: str = "bilens") -> dict[str, Any]:
    """The circuit as circuit-tracer's and Neuronpedia's attribution graph, ready for `json.dump`.

    Args:
        circuit: not merged.
        slug: the graph's name there, of letters, digits, `.`, `-` and `_`.

    Raises:
        ArgumentError: another `slug`, or a merged circuit, which has no positions.
    """
    if not isinstance(slug, str) or _plain(slug) != slug:
        raise ArgumentError(
            f"slug is {slug!r}, expected letters, digits, '.', '-' and '_', as in {_plain(str(slug))!r}: it becomes "
            "the name of a file."
        )
    if (circuit.nodes[circuit.nodes.kind.isin(["feature", "error", "embedding"])].position < 0).any():
        raise ArgumentError(
            "this circuit was merged over positions, and the format has a position for every node; export the one "
            "that it was merged from."
        )
    foreign = _foreign(circuit)
    links = [
        {"source": foreign[row.source]["node_id"], "target": foreign[row.target]["node_id"], "weight": row.weight}
        for row in circuit.folded_edges().astype({"weight": float}).itertuples()
    ]
    return {
        "metadata": {
            "slug": slug,
            "scan": _plain(Path(circuit.model_name).name),
            "transcoder_list": [],
            "prompt_tokens": circuit.tokens,
            "prompt": _prompt(circuit.tokens),
            "node_threshold": 1.0,  # it is pruned already
            "schema_version": 1,
            "info": {
                "description": (
                    f"{circuit.target}: exact attribution of a bilinear transformer. Layer 2l is the MLP input of "
                    "layer l, 2l+1 its output; pairs are folded half to each member. The p of a difference of logits "
                    "is its first token's; the p of a target that is no logit is its weight, 1."
                ),
                "generator": {"name": "bilens"},
            },
        },
        "qParams": {
            "pinnedIds": [foreign[name]["node_id"] for name in circuit.pinned if name in foreign],
            "supernodes": [
                [label, *(foreign[name]["node_id"] for name in names if name in foreign)]
                for label, *names in circuit.supernodes
            ],
            "linkType": "both",
            "clickedId": "",
            "sg_pos": "",
        },
        "nodes": list(foreign.values()),
        "links": links,
        "bilens": _scalars(circuit) | {name: getattr(circuit, name).to_dict("list") for name in FRAMES},
    }


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
            foreign = _foreign(circuit)
        else:
            circuit, foreign = _foreign_circuit(graph)
        return _edited(circuit, foreign, graph)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"this attribution graph cannot be read: {error!r}") from error


def _plain(text: str) -> str:
    """A text as part of a file's name."""
    return re.sub(r"[^a-zA-Z0-9_.-]+", "-", text).lstrip(".-") or "bilens"


def _prompt(tokens: list[str]) -> str:
    """The text that tokens spell: by the spaces they bring, or by WordPiece's marks."""
    return "".join(tokens) if any(token[:1] == " " for token in tokens) else " ".join(tokens).replace(" ##", "")


def _foreign(circuit: Circuit) -> dict[str, dict[str, Any]]:
    """The circuit's nodes in the foreign format, by their ids."""
    layers = [_place(row.layer, row.point) for row in circuit.nodes.itertuples()]
    logit_layer = str((max(layers) | 1) + 2)  # two past the last, whose outputs have an odd number
    ranked = circuit.nodes[circuit.nodes.kind != "target"].sort_values("influence", ascending=False)
    # Cumulative: the share of all that a node and the more influential ones have, which rounding may not take past 1.
    shares = ranked.influence.cumsum() / max(ranked.influence.sum(), 1e-300)
    cumulative = dict(zip(ranked.id, shares.clip(upper=1.0).tolist(), strict=True))
    nodes = {}
    n_targets = 0
    for row, place in zip(circuit.nodes.itertuples(), layers, strict=True):
        position, feature = max(int(row.position), 0), int(row.feature)
        layer = str(place) if place >= 0 else "E"
        kind, index, js_id = "unknown", NAMELESS.get(row.id if row.kind == "other" else row.kind, feature), None
        label, p = row.name, 0.0
        if row.kind == "target":
            n_targets += 1
            p = circuit.probabilities.get(row.id, 1.0)
            layer, kind, feature = logit_layer, "logit", feature if feature >= 0 else -n_targets
            index, js_id, label = feature, f"L_{feature}-{position}", _logit_label(row.name, p)
        elif row.kind == "embedding":
            # The format's `feature` of an embedding is its position, the index in its id the token.
            kind, feature, js_id = "embedding", position, f"E_{feature}-{position}"
        elif row.kind == "feature":
            # Readers take the index back out of the pair by Cantor's function.
            kind, feature, js_id = FEATURE, (place + index) * (place + index + 1) // 2 + index, f"{layer}_{index}-0"
            identity = row.id.split("@")[0]
            label = row.name if row.name == identity else f"{identity}: {row.name}"
        else:
            kind = {"bias": "bias", "other": "unknown"}.get(row.kind, ERROR)
            feature = index
        nodes[row.id] = {
            "node_id": f"{layer}_{index}_{position}",
            "feature": feature,
            "layer": layer,
            "ctx_idx": position,
            "feature_type": kind,
            "token_prob": p,
            "is_target_logit": row.kind == "target",
            "run_idx": 0,
            "reverse_ctx_idx": 0,
            "jsNodeId": js_id or f"{layer}_{index}-{position}",
            "clerp": label,
            "influence": cumulative.get(row.id),
            "activation": float(row.value),
        }
    return nodes


def _place(layer: int, point: str) -> int:
    """The foreign layer of a node: two for each of ours, the input's and the output's; -1 for none."""
    return int(2 * layer + (point == "mlp-out")) if layer >= 0 and point else int(layer)


def _logit_label(name: str, p: float) -> str:
    """A target's label, its name without what readers find the token and the probability by."""
    tokens = re.fullmatch(r"logit '(.*)'", name, re.DOTALL)
    shown = (
        (tokens[1].replace("' - '", " - ") if tokens else name)
        .replace('"', "”")
        .replace("(p=", "(p =")
        .replace("\n", "⏎")
    )
    return f'Output "{shown}" (p={p:.3f})'


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
    changeable = nodes.kind.isin(["feature", "error", "mlp", "bias", "other"])
    renamed = nodes.id.map(labels).where(changeable)
    bare = [
        str(label).removeprefix(f"{name.split('@')[0]}: ") if isinstance(label, str) else old
        for name, label, old in zip(nodes.id, renamed, nodes.name, strict=True)
    ]
    pinned = asked.get("pinnedIds") or []
    pinned = pinned.split(",") if isinstance(pinned, str) else pinned
    return replace(
        circuit,
        nodes=nodes.assign(name=bare),
        pinned=[ids[name] for name in pinned if name in ids],
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
