"""Exported graphs open in circuit-tracer's and Neuronpedia's front ends, and what was edited there comes back.

The rules are those of their own code (`formatData` of circuit-tracer's util-cg.js, `formatCLTGraphData` of
Neuronpedia's utils.ts), restated here: they ask for more than the format's classes and schema say.
"""

import json
import math
import re
from collections import Counter
from dataclasses import replace
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest

from bilens.attribute import Circuit, Target, freeze, from_attribution_graph, trace_circuit
from bilens.errors import ArgumentError, CheckpointError
from tests.attribute.conftest import TOKENS, model_of, saes_of, same

SMALL = {"kind": "topk", "k": 5}
TARGETS = {
    "difference": Target.logit(7, 5, minus=9),
    "several": [Target.logit(token) for token in (7, 9, 11)],
    "feature": Target.feature("2-mlp-in", 5, 4),
}


@pytest.fixture(scope="module")
def frozen():
    return freeze(model_of(True, True), TOKENS, saes_of(**SMALL))


@pytest.fixture(scope="module", params=["eigencircuits", "pairs"])
def circuit(frozen, request):
    return trace_circuit(frozen, TARGETS["difference"], max_nodes=25, mlps=request.param)


def exported(circuit: Circuit) -> dict[str, Any]:
    return json.loads(json.dumps(circuit.to_attribution_graph("my-graph"), allow_nan=False))


# --- the format ------------------------------------------------------------------------------------------------------


# What circuit-tracer's models and Neuronpedia's schema ask for: name -> types, and which of them must be there.
TEXT, WHOLE, NUMBER, LIST, MAYBE = (str,), (int,), (int, float), (list,), (int, float, type(None))
SCHEMA: dict[str, tuple[dict[str, tuple[type, ...]], set[str]]] = {
    "metadata": (
        {"slug": TEXT, "scan": TEXT, "prompt": TEXT, "prompt_tokens": LIST, "transcoder_list": LIST,
         "node_threshold": NUMBER, "schema_version": WHOLE, "info": (dict,)},
        {"slug", "scan", "prompt", "prompt_tokens", "transcoder_list"},
    ),
    "qParams": (
        {"pinnedIds": LIST, "supernodes": LIST, "linkType": TEXT, "clickedId": TEXT, "sg_pos": TEXT},
        {"pinnedIds", "supernodes", "linkType", "clickedId", "sg_pos"},
    ),
    "nodes": (
        {"node_id": TEXT, "feature": WHOLE, "layer": TEXT, "ctx_idx": WHOLE, "feature_type": TEXT, "jsNodeId": TEXT,
         "clerp": TEXT, "influence": MAYBE, "activation": MAYBE, "token_prob": NUMBER, "is_target_logit": (bool,),
         "run_idx": WHOLE, "reverse_ctx_idx": WHOLE},
        {"node_id", "feature", "layer", "ctx_idx", "feature_type", "jsNodeId", "clerp"},
    ),
    "links": ({"source": TEXT, "target": TEXT, "weight": NUMBER}, {"source", "target", "weight"}),
}  # fmt: skip
FEATURE_TYPES = {"cross layer transcoder", "embedding", "logit", "mlp reconstruction error", "bias", "unknown"}


def validate(graph: dict[str, Any]) -> None:
    for part, (types, needed) in SCHEMA.items():
        for item in graph[part] if isinstance(graph[part], list) else [graph[part]]:
            assert needed <= set(item) <= set(types), part
            for name, value in item.items():
                assert isinstance(value, types[name]), (part, name, value)
    assert all(isinstance(token, str) for token in graph["metadata"]["prompt_tokens"])


def test_attribution_graph(circuit):
    graph = exported(circuit)
    validate(graph)
    ids = [node["node_id"] for node in graph["nodes"]]
    assert len(set(ids)) == len(ids)
    assert len({node["jsNodeId"] + str(node["ctx_idx"]) for node in graph["nodes"]}) == len(ids)
    assert {node["feature_type"] for node in graph["nodes"]} == FEATURE_TYPES
    assert {end for link in graph["links"] for end in (link["source"], link["target"])} <= set(ids)
    assert sum(node["is_target_logit"] for node in graph["nodes"]) == 1
    n = len(TOKENS)
    assert all(0 <= node["ctx_idx"] < n for node in graph["nodes"])
    # Layer and index come back out of the paired number as readers take them.
    for node in graph["nodes"]:
        if node["feature_type"] == "cross layer transcoder":
            layer, index, position = map(int, node["node_id"].split("_"))
            assert (layer + index) * (layer + index + 1) // 2 + index == node["feature"]
            assert (str(layer), position) == (node["layer"], node["ctx_idx"])
    by_target: dict[str, float] = {}
    for link in graph["links"]:
        by_target[link["target"]] = by_target.get(link["target"], 0.0) + link["weight"]
    values = {node["node_id"]: node["activation"] for node in graph["nodes"]}
    for name, total in by_target.items():
        assert total == pytest.approx(values[name], abs=1e-3)
    same(from_attribution_graph(graph), circuit)


def test_attribution_graphs_of_others(circuit):
    graph = circuit.to_attribution_graph()
    del graph["bilens"]
    read = from_attribution_graph(graph)
    assert len(read.edges) == len(circuit.folded_edges())
    assert read.edges.weight.sum() == pytest.approx(circuit.folded_edges().weight.sum())
    assert read.tokens == circuit.tokens
    assert {*read.nodes.kind, "error"} == {"target", "embedding", "feature", "error", "bias", "other"}
    with pytest.raises(CheckpointError, match="it has no metadata, links"):
        from_attribution_graph({"nodes": []})


# --- what the viewers make of a file ----------------------------------------------------------------------------------


def unpaired(number: int) -> tuple[int, int]:
    """Layer and index of a feature, by Cantor's pairing."""
    diagonal = (math.isqrt(8 * number + 1) - 1) // 2
    index = number - diagonal * (diagonal + 1) // 2
    return diagonal - index, index


def viewed(graph: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Nodes by id as both viewers show them: `token` and `p` of logits, `name`, whether one is `shown`."""
    tokens = graph["metadata"]["prompt_tokens"]
    by_feature = Counter((n["layer"], n["feature"], n["ctx_idx"]) for n in graph["nodes"])
    names = {(n["layer"], n["feature"], n["ctx_idx"]): n["clerp"] for n in reversed(graph["nodes"])}
    last = max(float(n["layer"]) for n in graph["nodes"] if n["feature_type"] != "logit" and n["layer"] != "E")
    assert last  # Neuronpedia finds no layer otherwise
    seen = {}
    for node in graph["nodes"]:
        key = node["layer"], node["feature"], node["ctx_idx"]
        kind, name = node["feature_type"], names[key]
        if kind == "logit":
            token, p = name.split('"')[1], float(name.split("(p=")[1].split(")")[0])
        else:
            token, p = "", None
        if kind == "mlp reconstruction error":
            name = f"Err: mlp {tokens[node['ctx_idx']]}"
        elif kind == "embedding":
            name = f"Emb: {tokens[node['ctx_idx']]}"
        hidden = by_feature[key] > len(tokens) * 2 / 3  # taken for a feature that is on everywhere
        kept = kind in ("embedding", "logit") or node["influence"] <= graph["metadata"]["node_threshold"]
        seen[node["node_id"]] = {"name": name, "token": token, "p": p, "shown": kept and not hidden}
    return seen


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_graphs_open_in_the_viewers(frozen, target):
    circuit = trace_circuit(frozen, target, max_nodes=25)
    graph = exported(circuit)
    seen = viewed(graph)
    assert len(seen) == len(circuit.nodes)  # no id twice
    assert all(node["shown"] for node in seen.values())
    assert {end for link in graph["links"] for end in (link["source"], link["target"])} <= set(seen)
    places = Counter((n["layer"], n["feature"], n["ctx_idx"]) for n in graph["nodes"])
    assert set(places.values()) == {1}
    for row, node in zip(circuit.nodes.itertuples(), graph["nodes"], strict=True):
        layer, index, position = node["node_id"].split("_")
        assert (layer, int(position)) == (node["layer"], node["ctx_idx"]) == (layer, max(row.position, 0))
        shown = seen[node["node_id"]]
        if row.kind == "eigencircuit":
            assert int(layer) == unpaired(node["feature"])[0] == 3 * row.layer + 1
        elif row.kind == "feature":
            assert (
                (int(layer), int(index))
                == unpaired(node["feature"])
                == (3 * row.layer + 2 * (row.point == "mlp-out"), row.feature)
            )
        elif row.kind in ("bias", "other"):
            assert shown["name"] == row.name
        elif row.kind == "embedding":
            assert int(index) == TOKENS[row.position]
        elif row.kind == "target":
            p = circuit.probabilities.get(row.id, 1.0)
            assert shown["p"] == pytest.approx(node["token_prob"], abs=5e-4)
            assert node["token_prob"] == p > 0
            assert node["is_target_logit"]
            assert shown["token"] == row.name.removeprefix("logit ").replace("'", "")


def test_probabilities_are_the_models(frozen):
    chances = frozen.logits[-1].softmax(-1)
    found = trace_circuit(frozen, TARGETS["several"], max_nodes=5).probabilities
    assert list(found.values()) == pytest.approx(chances[[7, 9, 11]].tolist())
    assert trace_circuit(frozen, TARGETS["difference"]).probabilities == {"target": pytest.approx(chances[7].item())}
    assert trace_circuit(frozen, TARGETS["feature"]).probabilities == {}


@pytest.mark.parametrize("token", ['"', "(p=0.9)", "a\nb", "\ud800", "'", "' - '"])
def test_labels_of_awkward_tokens(circuit, token):
    nodes = circuit.nodes.assign(name=circuit.nodes.name.where(circuit.nodes.kind != "target", f"logit {token!r}"))
    (target,) = [node for node in viewed(exported(replace(circuit, nodes=nodes))).values() if node["p"] is not None]
    assert target["p"] == pytest.approx(circuit.probabilities["target"], abs=5e-4)
    assert target["token"]


def test_names_of_files(circuit):
    for slug in ("../x", "", "..", ".hidden", "a b", "a/b", 5):
        with pytest.raises(ArgumentError, match=f"slug is {re.escape(repr(slug))}"):
            circuit.to_attribution_graph(slug)
    for name, scan in (("/home/me/my model", "my-model"), ("owner/ts-tiny", "ts-tiny"), ("", "bilens")):
        assert replace(circuit, model_name=name).to_attribution_graph()["metadata"]["scan"] == scan
    words = replace(circuit, tokens=["play", "##ing", "ball"]).to_attribution_graph()["metadata"]
    assert (words["prompt"], words["prompt_tokens"]) == ("playing ball", ["play", "##ing", "ball"])
    assert replace(circuit, tokens=["The", " cat"]).to_attribution_graph()["metadata"]["prompt"] == "The cat"


def test_a_merged_circuit_has_no_places(circuit):
    with pytest.raises(ArgumentError, match="merged over positions"):
        circuit.merged().to_attribution_graph()


# --- back again -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("as_text", [False, True], ids=["Neuronpedia's lists", "circuit-tracer's texts"])
@pytest.mark.parametrize("own", [True, False], ids=["ours", "another program's"])
def test_edits_come_back(circuit, own, as_text):
    """Labels by paired number or by place, pins and groups, as the viewers save them."""
    graph = exported(circuit)
    if not own:
        del graph["bilens"]
    features = [node for node in graph["nodes"] if node["feature_type"] == "cross layer transcoder"]
    first, second = features[0], features[-1]
    ids = [first["node_id"], second["node_id"]]
    clerps = [[str(first["feature"]), "new"], [f"{second['layer']}_{second['feature']}_{second['ctx_idx']}", "other"]]
    asked = {"clerps": clerps, "supernodes": [["both", *ids]], "pinnedIds": ids}
    texts = {"clerps": json.dumps(clerps), "supernodes": json.dumps([["both", *ids]]), "pinnedIds": ",".join(ids)}
    graph["qParams"] |= texts if as_text else asked
    read = from_attribution_graph(graph)
    names = read.nodes.set_index("id").name
    (label, *group) = read.supernodes[0]
    assert label == "both"
    assert group == read.pinned
    assert list(names[read.pinned]) == ["new", "other"]
    if own:
        assert read.to_attribution_graph()["qParams"]["supernodes"] == [["both", *ids]]
        assert read.to_attribution_graph()["qParams"]["pinnedIds"] == ids
        assert read.merged().pinned == [name.split("@")[0] for name in read.pinned]
        again = from_attribution_graph(exported(read))
        same(again, read)
        features[0]["clerp"] = "written over"
        assert "written over" not in set(read.nodes.name)
        graph["qParams"] = {}
        assert from_attribution_graph(graph).nodes.set_index("id").name[read.pinned[0]] == "written over"


def test_what_is_not_pinned_opens_with_the_nodes_to_look_at_first(circuit):
    """Groups whole; and they are not taken for a reader's pins when the file comes back."""
    group = circuit.nodes.id[circuit.nodes.kind == "feature"].tolist()[-2:]
    grouped = replace(circuit, supernodes=[["both", *group]])
    graph = exported(grouped)
    pinned = set(graph["qParams"]["pinnedIds"])
    kinds = {node["feature_type"] for node in graph["nodes"] if node["node_id"] in pinned}
    assert "logit" in kinds
    assert len(pinned) >= 20
    members = graph["qParams"]["supernodes"][0][1:]
    assert not set(members) & pinned or set(members) <= pinned
    same(from_attribution_graph(graph), grouped)


def test_edits_of_a_page(circuit):
    first, second = circuit.nodes.id[circuit.nodes.kind == "feature"].tolist()[:2]
    values = {"pins": [first], "names": {second: "mine & “yours”"}, "groups": [["both", first, second]]}
    address = "file:///graph.html#graph?n=12&" + "&".join(f"{k}={quote(json.dumps(v))}" for k, v in values.items())
    edited = circuit.edited(address)
    assert edited.pinned == [first]
    assert edited.supernodes == [["both", first, second]]
    changed = edited.nodes.set_index("id").name != circuit.nodes.set_index("id").name
    assert changed[changed].index.tolist() == [second]
    assert edited.nodes.set_index("id").name[second] == "mine & “yours”"
    same(from_attribution_graph(exported(edited)), edited)
    assert circuit.edited("#graph?n=3").supernodes == []
    for wrong in ("", 7, "#graph", "#how-to-read-it"):
        with pytest.raises(ArgumentError, match="holds no edits of a graph"):
            circuit.edited(wrong)
    with pytest.raises(ArgumentError, match="names the node 'nowhere', which is not in this circuit"):
        circuit.edited('#graph?pins=["nowhere"]')
    with pytest.raises(ArgumentError, match=r"names the node \[1\]"):
        circuit.edited("#graph?pins=[[1]]")
    for broken in ("pins=[", "pins={}", "names=[]", "groups=3", "groups=[3]", "groups=[[]]"):
        with pytest.raises(ArgumentError, match="of this address"):
            circuit.edited(f"#graph?{broken}")


def test_edits_are_saved(circuit, tmp_path):
    name = circuit.nodes.id[3]
    edited = replace(circuit, pinned=[name], supernodes=[["group", name]])
    edited.save(tmp_path / "circuit.safetensors")
    same(Circuit.load(tmp_path / "circuit.safetensors"), edited)


def test_graphs_of_other_programs(circuit):
    """Indices come back out of the paired number, ids are unique, and nothing is claimed that was not checked."""
    nodes = [
        {"node_id": "5_9_1", "feature": 9, "layer": "5", "ctx_idx": 1, "feature_type": "logit", "token_prob": 0.75,
         "clerp": 'Output "b" (p=0.750)'},
        {"node_id": "5_8_1", "feature": 8, "layer": "5", "ctx_idx": 1, "feature_type": "logit", "token_prob": 0.25,
         "clerp": 'Output "c" (p=0.250)'},
        {"node_id": "1_9_1", "feature": 64, "layer": "1", "ctx_idx": 1, "feature_type": "cross layer transcoder",
         "clerp": "", "influence": 0.5, "activation": 2.0},
        {"node_id": "odd", "feature": 64, "layer": "1", "ctx_idx": 1, "feature_type": "cross layer transcoder",
         "clerp": "named", "influence": 0.7},
        {"node_id": "0_1_1", "feature": 3, "layer": "0", "ctx_idx": 1, "feature_type": "cross layer transcoder",
         "clerp": "", "influence": 0.6},
        {"node_id": "0_1_1", "feature": -1, "layer": "1", "ctx_idx": 1, "feature_type": "mlp reconstruction error",
         "clerp": "", "influence": 0.8},
        {"node_id": "E_4_0", "feature": 0, "layer": "E", "ctx_idx": 0, "feature_type": "embedding", "clerp": "a"},
    ]  # fmt: skip
    links = [
        {"source": "1_9_1", "target": "5_9_1", "weight": 3.0},
        {"source": "0_1_1", "target": "5_9_1", "weight": -1.0},
        {"source": "E_4_0", "target": "5_8_1", "weight": 1.0},
        {"source": "E_4_0", "target": "0_1_1", "weight": 1.0},
        {"source": "E_4_0", "target": "1_9_1", "weight": 1.0},
    ]
    graph = {
        "metadata": {"scan": "s", "prompt_tokens": ["a", "b"], "schema_version": 1},
        "nodes": nodes,
        "links": links,
    }
    read = from_attribution_graph(graph)
    frame = read.nodes.set_index("id")
    assert frame.index.is_unique
    assert frame.feature.to_dict() == {
        "5_9_1": 9, "5_8_1": 8, "1_9_1": 9, "odd": 9, "0_1_1": 1, "0_1_1 (2)": -1, "E_4_0": 4,
    }  # fmt: skip
    assert read.edges[read.edges.source == "0_1_1 (2)"].target.tolist() == ["5_9_1"]
    assert read.edges[read.edges.target == "0_1_1"].source.tolist() == ["E_4_0"]
    # Three quarters of the first logit's influence come by way of the feature; the token has all that is no error's.
    assert frame.influence["1_9_1"] == pytest.approx(0.75 * 0.75)
    assert frame.influence["0_1_1 (2)"] == pytest.approx(0.75 * 0.25)
    assert frame.influence["E_4_0"] == pytest.approx(0.75 * 0.75 + 0.25)
    assert read.kept_share == 0.8
    assert "completeness not checked" in str(read)
    assert "within 0.0" not in str(read)
    assert read.probabilities == {"5_9_1": 0.75, "5_8_1": 0.25}


@pytest.mark.parametrize(
    "graph",
    [
        [],
        {"metadata": {}, "nodes": [{}], "links": []},
        {"metadata": {}, "nodes": 5, "links": []},
        {"metadata": {}, "nodes": [], "links": [], "bilens": {}},
        {"metadata": {}, "nodes": [], "links": [], "bilens": {"nodes": 3}},
        {"metadata": {"prompt_tokens": 5}, "nodes": [], "links": []},
    ],
)
def test_damaged_graphs(graph):
    with pytest.raises(CheckpointError, match="attribution graph"):
        from_attribution_graph(graph)


def test_rounding_takes_no_cumulative_influence_past_one(circuit):
    generator = np.random.default_rng(2)
    for _ in range(200):
        nodes = circuit.nodes.assign(influence=generator.random(len(circuit.nodes)))
        ranked = nodes[nodes.kind != "target"].influence.sort_values(ascending=False)
        if (ranked.cumsum() / ranked.sum()).max() > 1:
            break
    shown = [node.get("influence") for node in replace(circuit, nodes=nodes).to_attribution_graph()["nodes"]]
    assert (ranked.cumsum() / ranked.sum()).max() > 1
    assert max(share for share in shown if share is not None) == 1


def test_targets_of_a_graph_of_others_start_with_influence_one_together(frozen):
    graph = trace_circuit(frozen, [Target.logit(7), Target.logit(9)], max_nodes=20).to_attribution_graph()
    del graph["bilens"]
    nodes = from_attribution_graph(graph).nodes
    assert nodes[nodes.kind == "target"].influence.sum() == pytest.approx(1)
