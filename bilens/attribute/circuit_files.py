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

Sources of the format: circuit_tracer/frontend/graph_models.py of safety-research/circuit-tracer, and the JSON schema of
hijohnnylin/neuronpedia (apps/webapp/app/api/graph/graph-schema.json).
"""

import json
from dataclasses import fields
from os import PathLike
from typing import Any

import pandas as pd
import torch
from safetensors.torch import save_file

from bilens.attribute.circuit_graph import EDGE_COLUMNS, HEAD_COLUMNS, HYPEREDGE_COLUMNS, NODE_COLUMNS, Circuit
from bilens.errors import CheckpointError
from bilens.files import open_tensors, parse_json, regular_file, to_path, write_atomically

COLUMNS = {"nodes": NODE_COLUMNS, "edges": EDGE_COLUMNS, "hyperedges": HYPEREDGE_COLUMNS, "heads": HEAD_COLUMNS}
FRAMES = tuple(COLUMNS)
FORMAT = "bilens circuit 1"


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
    graph.graph |= {"text": " ".join(circuit.tokens), "kept_share": circuit.kept_share, "n_found": circuit.n_found}
    graph.graph |= {"tokens": json.dumps(circuit.tokens), "shares": json.dumps(circuit.shares)}
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
            tokens=parse_json(about["tokens"], "tokens", list),
            shares=parse_json(about["shares"], "shares"),
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


def to_attribution_graph(circuit: Circuit, slug: str = "bilens") -> dict[str, Any]:
    """The circuit as circuit-tracer's and Neuronpedia's attribution graph, ready for `json.dump`.

    Args:
        circuit: not merged.
        slug: the graph's name there.
    """
    logit_layer = str(2 * _n_layers(circuit) + 1)
    keys = {row.id: _foreign(row, logit_layer) for row in circuit.nodes.itertuples()}
    ranked = circuit.nodes[circuit.nodes.kind != "target"].sort_values("influence", ascending=False)
    # The viewer prunes by cumulative influence: the share of all that a node and the more influential ones have.
    cumulative = dict(zip(ranked.id, (ranked.influence.cumsum() / ranked.influence.sum()).tolist(), strict=True))
    nodes = []
    for row in circuit.nodes.itertuples():
        layer, feature, context, kind, node_id, js_id = keys[row.id]
        nodes.append(
            {
                "node_id": node_id,
                "feature": feature,
                "layer": layer,
                "ctx_idx": context,
                "feature_type": kind,
                "token_prob": 0.0,
                "is_target_logit": row.kind == "target",
                "run_idx": 0,
                "reverse_ctx_idx": 0,
                "jsNodeId": js_id,
                "clerp": row.name if row.kind in ("target", "embedding") else f"{row.id.split('@')[0]}: {row.name}",
                "influence": cumulative.get(row.id),
                "activation": float(row.value),
            }
        )
    links = [
        {"source": keys[row.source][4], "target": keys[row.target][4], "weight": float(row.weight)}
        for row in circuit.folded_edges().itertuples()
    ]
    return {
        "metadata": {
            "slug": slug,
            "scan": circuit.model_name,
            "transcoder_list": [],
            "prompt_tokens": circuit.tokens,
            "prompt": " ".join(circuit.tokens),
            "node_threshold": 1.0,  # it is pruned already
            "schema_version": 1,
            "info": {
                "description": (
                    f"{circuit.target}: exact attribution of a bilinear transformer. Layer 2l is the MLP input of "
                    "layer l, 2l+1 its output; pairs are folded half to each member."
                ),
                "generator": {"name": "bilens"},
            },
        },
        "qParams": {"pinnedIds": [], "supernodes": [], "linkType": "both", "clickedId": "", "sg_pos": ""},
        "nodes": nodes,
        "links": links,
        "bilens": _scalars(circuit) | {name: getattr(circuit, name).to_dict("list") for name in FRAMES},
    }


def from_attribution_graph(graph: dict[str, Any]) -> Circuit:
    """Read the JSON back: ours whole, another program's as nodes and linear edges.

    Raises:
        CheckpointError: an object without `metadata`, `nodes` and `links`.
    """
    missing = [key for key in ("metadata", "nodes", "links") if key not in graph]
    if missing:
        raise CheckpointError(f"this is no attribution graph: it has no {', '.join(missing)}.")
    if "bilens" in graph:
        own = dict(graph["bilens"])
        return Circuit(**(own | {name: pd.DataFrame(own[name]) for name in FRAMES}))
    return _foreign_circuit(graph)


def _foreign(row: Any, logit_layer: str) -> tuple[str, int, int, str, str, str]:
    """`layer, feature, ctx_idx, feature_type, node_id, jsNodeId` of a node in the foreign format."""
    position = max(int(row.position), 0)
    if row.kind == "target":
        return logit_layer, -1, position, "logit", f"{logit_layer}_0_{position}", f"L_0-{position}"
    if row.kind == "embedding":
        return "E", position, position, "embedding", f"E_{row.feature}_{position}", f"E_{row.feature}-{position}"
    layer = str(2 * row.layer + (row.point == "mlp-out")) if row.layer >= 0 else "E"
    if row.kind == "feature":
        # Readers take the index back out of the pair by Cantor's function.
        place, index = int(layer), int(row.feature)
        paired = (place + index) * (place + index + 1) // 2 + index
        kind, node_id = "cross layer transcoder", f"{layer}_{index}_{position}"
        return layer, paired, position, kind, node_id, f"{layer}_{index}-0"
    if row.kind in ("error", "mlp"):
        return layer, -1, position, "mlp reconstruction error", f"{layer}_-1_{position}", f"{layer}_-1-{position}"
    # Biases, and what was pruned: the format has no such nodes. Errors are drawn, and taken for nothing else.
    node_id = row.id.replace(" ", "-")
    return layer, -1, position, "mlp reconstruction error", node_id, node_id


def _n_layers(circuit: Circuit) -> int:
    return int(circuit.nodes.layer.max()) + 1


def _foreign_circuit(graph: dict[str, Any]) -> Circuit:
    kinds = {"embedding": "embedding", "logit": "target", "mlp reconstruction error": "error"}
    tokens = list(graph["metadata"].get("prompt_tokens", []))
    nodes = pd.DataFrame(
        [
            {
                "id": node["node_id"],
                "kind": kinds.get(node["feature_type"], "feature"),
                "layer": int(node["layer"]) if str(node["layer"]).isdigit() else -1,
                "point": "",
                "hook": "",
                "position": int(node["ctx_idx"]),
                "token": tokens[node["ctx_idx"]] if node["ctx_idx"] < len(tokens) else "",
                "feature": -1 if node["feature"] is None else int(node["feature"]),
                "name": node.get("clerp", ""),
                "value": float(node.get("activation") or 0.0),
                "influence": float(node.get("influence") or 0.0),
                "expanded": False,
                "relative_error": 0.0,
            }
            for node in graph["nodes"]
        ]
    )
    edges = pd.DataFrame(graph["links"], columns=["source", "target", "weight"]).astype({"weight": float})
    logits = nodes[nodes.kind == "target"]
    return Circuit(
        model_name=str(graph["metadata"].get("scan", "")),
        target=logits.name.iloc[0] if len(logits) else "",
        position=int(logits.position.iloc[0]) if len(logits) else len(tokens) - 1,
        tokens=tokens,
        nodes=nodes,
        edges=edges.assign(influence=0.0, via="", via_weight=0.0),
        hyperedges=pd.DataFrame(columns=["i", "j", "target", "weight", "influence"]),
        heads=pd.DataFrame(columns=["source", "target", "layer", "head", "weight"]),
        shares={},
        kept_share=1.0,
        n_found=len(nodes),
    )
