"""Circuits add up at every node, whatever was pruned, and interventions find what the edges say.

Tolerances: 1e-5 of the sum of a node's absolute parts, as for every attribution of the float32 model.
"""

import json
from dataclasses import replace
from typing import Any

import networkx as nx
import pandas as pd
import pytest
import torch

import bilens
from bilens.attribute import (
    Circuit,
    Target,
    check_circuit,
    check_circuits,
    check_edges,
    feature_means,
    freeze,
    from_attribution_graph,
    trace_circuit,
)
from bilens.attribute.sweep import linear_rows, sweep
from bilens.attribute.targets import read_targets
from bilens.errors import ArgumentError, CheckpointError, MissingSAEError, NotBilinearError
from bilens.sae.store import build_feature_store
from tests.attribute.conftest import MODEL_KINDS, N_LAYERS, TOKENS, model_of, saes_of
from tests.conftest import make_model
from tests.random_saes import make_sae

COMPLETE = 1e-5
FRAMES = ("nodes", "edges", "hyperedges", "heads")
TARGETS = [Target.logit(7, 5, minus=9), Target.feature("2-mlp-in", 5, 4), Target.feature("1-mlp-out", 6, 4)]
SMALL = {"kind": "topk", "k": 5}


@pytest.fixture(scope="module")
def frozen_small():
    """A pass with few active features, so that whole graphs stay small."""
    return freeze(model_of(True, True), TOKENS, saes_of(**SMALL))


@pytest.fixture(scope="module")
def circuit(frozen_small):
    return trace_circuit(frozen_small, TARGETS[0], max_nodes=25)


def same(one: Circuit, other: Circuit) -> None:
    for name in FRAMES:
        pd.testing.assert_frame_equal(getattr(one, name), getattr(other, name), check_dtype=False)
    for name in ("model_name", "target", "position", "tokens", "shares", "kept_share", "n_found"):
        assert getattr(one, name) == getattr(other, name)


def in_order(circuit: Circuit) -> Circuit:
    """Rows sorted: a graph keeps none."""
    return replace(
        circuit,
        **{
            name: (frame := getattr(circuit, name)).sort_values(list(frame.columns[:4]), ignore_index=True)
            for name in FRAMES
        },
    )


def into(circuit: Circuit) -> pd.Series:
    return circuit.folded_edges().groupby("target").weight.sum()


def absolute(circuit: Circuit) -> pd.Series:
    linear, pairs = (frame.groupby("target").weight.apply(lambda w: w.abs().sum()) for frame in
                     (circuit.edges, circuit.hyperedges))  # fmt: skip
    return linear.add(pairs, fill_value=0.0)


# --- adding up --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", TARGETS, ids=lambda t: t.hook)
@pytest.mark.parametrize("kind", MODEL_KINDS, ids=str)
def test_edges_add_up(frozen_kinds, kind, target):
    """On every kind of model and every class of SAE, pruned hard, little or not at all, before and after merging."""
    for options in ({"max_nodes": 5}, {"max_nodes": 40, "edge_threshold": 0.5}):
        circuit = trace_circuit(frozen_kinds[kind], target, **options)
        assert circuit.relative_error <= COMPLETE
        values = circuit.nodes.set_index("id").value
        sums, parts = into(circuit), absolute(circuit)
        expanded = circuit.nodes[circuit.nodes.expanded].id
        assert set(sums.index) == set(expanded)
        # What was pruned is in `other ...`: large parts of both signs may cancel there, hence the room for rounding.
        for name in expanded:
            assert sums[name] == pytest.approx(values[name], abs=10 * COMPLETE * max(parts[name], abs(values[name])))
        merged = circuit.merged()
        assert merged.nodes.id.is_unique
        for name, total in into(merged).items():
            own = merged.nodes.set_index("id").value[name]
            assert total == pytest.approx(own, abs=10 * COMPLETE * max(absolute(merged)[name], abs(own)))
        assert sum(circuit.shares.values()) == pytest.approx(1.0)


def test_nothing_pruned(frozen_small):
    circuit = trace_circuit(frozen_small, TARGETS[0], max_nodes=10_000, node_threshold=1.0, edge_threshold=1.0)
    assert circuit.kept_share == pytest.approx(1.0)
    assert not circuit.nodes.kind.eq("other").any()
    assert set(circuit.shares) <= {"embedding", "error", "bias"}
    assert "np." not in repr(circuit)
    assert len(circuit.nodes[~circuit.nodes.kind.isin(["target", "bias"])]) == circuit.n_found


@pytest.mark.parametrize("kind", MODEL_KINDS, ids=str)
def test_heads_add_up_to_edges(frozen_kinds, kind):
    circuit = trace_circuit(frozen_kinds[kind], TARGETS[0], max_nodes=40)
    between = circuit.edges[circuit.edges.via != ""].set_index(["source", "target"])
    sums = circuit.heads.groupby(["source", "target"]).weight.sum()
    assert (sums - between.weight.reindex(sums.index)).abs().max() <= 1e-9 * between.weight.abs().max()
    positions = circuit.nodes.set_index("id").position
    direct = circuit.heads[circuit.heads.layer < 0]
    assert (direct.source.map(positions) == direct.target.map(positions)).all()


def test_linear_rows_add_up_for_many_targets_at_once(frozen_kinds):
    frozen = frozen_kinds[True, True]
    targets = [Target.feature(f"{layer}-mlp-in", f, p) for layer in range(N_LAYERS) for f in (0, 7) for p in (1, 5)]
    reads = read_targets(frozen, [*targets, Target.logit(3)])
    rows = linear_rows(frozen, reads)
    error = (rows.sum(1) - reads.actual).abs() / rows.abs().sum(1)
    assert error.max() <= COMPLETE
    for row in range(0, len(reads), 5):
        torch.testing.assert_close(linear_rows(frozen, reads[row : row + 1])[0], rows[row])


def test_influence_by_brute_force():
    """The sweep's influences against a plain recursion over all paths, on one layer."""
    frozen = freeze(make_model(n_layer=1), TOKENS[:3], saes_of(1, kind="topk", k=2))
    found = sweep(frozen, read_targets(frozen, Target.logit(7)), max_nodes=1000)
    nodes = found.nodes
    influence = torch.zeros(len(nodes), dtype=torch.float64)

    def hand_on(number: int, share: float) -> None:
        influence[number] += share
        if number in found.rows:
            row = found.rows[number].abs()
            for source, part in zip(nodes.linear.tolist(), (row / row.sum()).tolist(), strict=True):
                if part:
                    hand_on(source, share * part)
        elif number in found.products:
            parts = found.products[number].abs().clone()
            parts[-1, -1] += abs(found.constants[number])
            for place, source in enumerate(found.sources[number].tolist()):
                if part := (parts[place].sum() / parts.sum()).item():
                    hand_on(source, share * part)

    hand_on(nodes.target, 1.0)
    torch.testing.assert_close(influence, found.influence)


def test_no_sae_on_an_output_or_an_input():
    """MLPs without an SAE on their output are nodes of their own; output features without an input SAE are leaves."""
    model = model_of(True, True)
    only_in = Circuit.trace(model, saes_of(points=("mlp-in",)), TOKENS, TARGETS[1], max_nodes=30)
    assert only_in.relative_error <= COMPLETE
    assert "mlp" in set(only_in.nodes.kind)
    only_out = Circuit.trace(model, saes_of(points=("mlp-out",)), TOKENS, Target.logit(7), max_nodes=30)
    assert only_out.nodes[only_out.nodes.expanded].id.tolist() == ["target"]
    bilinear = Circuit.trace(model, saes_of(kind="scope-bilinear"), TOKENS, Target.logit(7), max_nodes=30)
    assert bilinear.nodes[bilinear.nodes.expanded].id.tolist() == ["target"]
    on_mid = Circuit.trace(model, saes_of(points=("resid-mid", "mlp-out"), **SMALL), TOKENS, TARGETS[2], max_nodes=30)
    assert on_mid.relative_error <= COMPLETE
    assert on_mid.nodes.id.str.startswith("1-resid-mid/").any()


# --- names, files -----------------------------------------------------------------------------------------------------


def test_names_and_display(frozen_small, circuit):
    names = {"1-mlp-out-x8-k32": [f"label {i}" for i in range(40)]}
    named = trace_circuit(frozen_small, TARGETS[0], max_nodes=25, names=names)
    labelled = named.nodes[(named.nodes.hook == "blocks.1.hook_mlp_out") & (named.nodes.kind == "feature")]
    assert (labelled.name == [f"label {f}" for f in labelled.feature]).all()
    assert "completeness of every node within" in str(circuit)
    assert "<iframe" in circuit._repr_html_()
    assert circuit.plot().data
    assert bilens.Circuit is Circuit
    completeness = circuit.completeness
    assert (completeness.relative_error <= COMPLETE).all()
    assert circuit.completeness_error == (completeness["sum"] - completeness.value).abs().max()


def test_names_from_a_feature_store(text_model, texts, tmp_path):
    """The store may know SAEs that are not traced."""
    hooks = {"0-mlp-out": "blocks.0.hook_mlp_out", "1-mlp-out": "blocks.1.hook_mlp_out"}
    saes = {name: make_sae("topk", hook, seed=layer) for layer, (name, hook) in enumerate(hooks.items())}
    store = build_feature_store(text_model, saes, texts[:8], tmp_path)
    traced = Circuit.trace(text_model, saes["1-mlp-out"], texts[0], max_nodes=20, names=store)
    features = traced.nodes[traced.nodes.kind == "feature"]
    labels = store.labels("1-mlp-out")
    assert len(features)
    assert features.name.tolist() == [labels[feature] for feature in features.feature]


def test_default_target_is_the_likeliest_token(text_model):
    logits = text_model("Mira lost a red kite")[0, -1]
    circuit = Circuit.trace(text_model, saes_of(2, **SMALL), "Mira lost a red kite", max_nodes=10)
    assert circuit.target == f"logit {text_model.tokenizer.decode([int(logits.argmax())])!r}"
    assert circuit.nodes[circuit.nodes.kind == "embedding"].name.isin(circuit.tokens).all()
    with pytest.raises(ArgumentError, match="2 texts were given"):
        Circuit.trace(text_model, saes_of(2, **SMALL), ["Mira lost a red kite", "a green frog"])


def test_round_trip(circuit, tmp_path):
    for number, one in enumerate((circuit, circuit.merged())):
        one.save(tmp_path / f"{number}.safetensors")
        same(Circuit.load(tmp_path / f"{number}.safetensors"), one)
    truncated = tmp_path / "truncated.safetensors"
    truncated.write_bytes((tmp_path / "0.safetensors").read_bytes()[:500])
    with pytest.raises(CheckpointError, match="no circuit"):
        Circuit.load(truncated)
    with pytest.raises(FileNotFoundError):
        Circuit.load(tmp_path / "nowhere.safetensors")


def test_networkx_and_graphml(circuit, tmp_path):
    graph = circuit.to_networkx()
    assert nx.is_directed_acyclic_graph(graph)
    pairs = [name for name, data in graph.nodes(data=True) if data["kind"] == "pair"]
    assert len(pairs) == len(circuit.hyperedges)
    for name in pairs:
        (output,) = graph.out_edges(name, data="weight")
        assert sum(w for *_, w in graph.in_edges(name, data="weight")) == pytest.approx(output[2])
    for name in circuit.nodes[circuit.nodes.expanded].id:
        total = sum(weight for *_, weight in graph.in_edges(name, data="weight"))
        assert total == pytest.approx(into(circuit)[name])
    circuit.save_graphml(tmp_path / "circuit.graphml")
    read = nx.read_graphml(tmp_path / "circuit.graphml")
    assert set(read.nodes) == set(graph.nodes)
    assert dict(read.nodes["target"]) == dict(graph.nodes["target"])
    for one, other, weight in graph.edges(data="weight"):
        assert read[one][other]["weight"] == pytest.approx(weight)


def test_networkx_and_graphml_are_read_back(circuit, tmp_path):
    control = replace(circuit, tokens=["a\x00b", *circuit.tokens[1:]], nodes=circuit.nodes.assign(token="\x1f </data>"))
    for one in (circuit, circuit.merged(), control):
        one.save_graphml(tmp_path / "circuit.graphml")
        for read in (Circuit.from_networkx(one.to_networkx()), Circuit.load_graphml(tmp_path / "circuit.graphml")):
            same(in_order(replace(read, nodes=read.nodes.assign(token=one.nodes.token))), in_order(one))
    assert set(read.nodes.token) == {"\\x1f </data>"}
    graph = circuit.to_networkx()
    graph.remove_node(circuit.hyperedges.i[0])
    smaller = Circuit.from_networkx(graph)
    assert len(smaller.nodes) == len(circuit.nodes) - 1
    named = circuit.hyperedges[["i", "j", "target"]] == circuit.hyperedges.i[0]
    assert len(smaller.hyperedges) == len(circuit.hyperedges) - named.any(axis=1).sum()
    with pytest.raises(CheckpointError, match=r"none that Circuit\.to_networkx made"):
        Circuit.from_networkx(nx.path_graph(3, nx.DiGraph))
    (tmp_path / "other.graphml").write_text("no XML")
    with pytest.raises(CheckpointError, match="no GraphML"):
        Circuit.load_graphml(tmp_path / "other.graphml")


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
FEATURE_TYPES = {"cross layer transcoder", "embedding", "logit", "mlp reconstruction error"}


def validate(graph: dict[str, Any]) -> None:
    for part, (types, needed) in SCHEMA.items():
        for item in graph[part] if isinstance(graph[part], list) else [graph[part]]:
            assert needed <= set(item) <= set(types), part
            for name, value in item.items():
                assert isinstance(value, types[name]), (part, name, value)
    assert all(isinstance(token, str) for token in graph["metadata"]["prompt_tokens"])


def test_attribution_graph(circuit):
    graph = json.loads(json.dumps(circuit.to_attribution_graph("my-graph")))
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
    assert set(read.nodes.kind) == {"target", "embedding", "feature", "error"}
    with pytest.raises(CheckpointError, match="it has no metadata, links"):
        from_attribution_graph({"nodes": []})


# --- interventions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MODEL_KINDS, ids=str)
def test_edges_are_what_removing_their_source_changes(kind):
    """Exactly where attention and norms are frozen; with real attention the pairs, which have none between them."""
    frozen = freeze(model_of(*kind), TOKENS, saes_of(**SMALL))
    for target in TARGETS:
        circuit = trace_circuit(frozen, target, max_nodes=25)
        exact, real = (check_edges(frozen, circuit, target, attention=mode) for mode in ("frozen", "real"))
        assert len(exact.frame) == len(real.frame) > 10
        scale = exact.frame.groupby("target").predicted.transform(lambda w: w.abs().sum())
        assert ((exact.frame.predicted - exact.frame.measured).abs() <= COMPLETE * scale + 1e-5).all()
        pairs = real.frame[real.frame.kind == "pair"]
        assert ((pairs.predicted - pairs.measured).abs() <= COMPLETE * scale[pairs.index] + 1e-5).all()
        assert exact.correlation["pair"] == pytest.approx(1.0)
        assert exact.plot().data
        assert "correlation" in str(exact)


@pytest.mark.parametrize("target", TARGETS, ids=lambda t: t.hook)
def test_everything_and_the_whole_circuit(frozen_kinds, target):
    """Keeping everything changes nothing; keeping all that has any influence neither, with everything else frozen."""
    frozen = frozen_kinds[True, True]
    circuit = trace_circuit(frozen, target, max_nodes=10_000, node_threshold=1.0)
    found = check_circuit(frozen, circuit, target, counts=[1, 10])
    rows = found.frame.set_index(["attention", "kept"])
    actual = circuit.nodes.set_index("id").value["target"]
    scale = 1 + abs(actual)
    for mode in ("frozen", "real"):
        assert rows.value[mode, "everything"] == pytest.approx(actual, abs=1e-4 * scale)
    assert rows.value["frozen", "circuit"] == pytest.approx(actual, abs=1e-4 * scale)
    assert found.recovered() == pytest.approx(1.0, abs=1e-2)
    assert rows.value["frozen", "all but circuit"] == pytest.approx(rows.value["frozen", "nothing"], abs=1e-4 * scale)
    assert set(rows.nodes["real"]) == {-1, 0, 1, 10, found.frame.nodes.max(), found.frame.nodes.min()}
    assert found.plot().data


def test_many_prompts_and_means(text_model):
    saes = saes_of(2, **SMALL)
    texts = ["Mira lost a red kite", "a tired owl painted three stones", "the little fox found the silver key"]
    means = feature_means(text_model, saes, texts)
    view = saes[0]
    acts = [view.encode(text_model.run_with_cache(text)[1]["blocks.0.ln2.hook_normalized"][0, 1:]) for text in texts]
    torch.testing.assert_close(means["blocks.0.ln2.hook_normalized"], torch.cat(acts).mean(0), atol=1e-6, rtol=1e-4)
    found = check_circuits(text_model, saes, texts, max_nodes=15, counts=(5, 10), means=means, errors="all")
    assert set(found.curves.prompt) == set(found.edges.prompt) == {0, 1, 2}
    assert found.correlations["linear", "frozen"] == pytest.approx(1.0)
    assert found.plot().data
    assert "correlation of edges" in str(found)


# --- bad input --------------------------------------------------------------------------------------------------------


def test_bad_input(frozen_small, circuit):
    model = model_of(True, True)
    for name, value in (("node_threshold", 0.0), ("node_threshold", 1.5), ("edge_threshold", -1.0)):
        with pytest.raises(ArgumentError, match=f"{name} is {value}"):
            trace_circuit(frozen_small, TARGETS[0], **{name: value})
    with pytest.raises(ArgumentError, match="max_nodes is 0"):
        trace_circuit(frozen_small, TARGETS[0], max_nodes=0)
    with pytest.raises(MissingSAEError, match="given are none"):
        Circuit.trace(model, [], TOKENS)
    with pytest.raises(MissingSAEError, match=r"given are blocks\.0\.hook_resid_post"):
        Circuit.trace(model, make_sae(hook="blocks.0.hook_resid_post"), TOKENS)
    with pytest.raises(NotBilinearError):
        Circuit.trace(model_of(True, True, gate="relu"), saes_of(), TOKENS)
    with pytest.raises(ArgumentError, match="merged over positions"):
        check_circuit(frozen_small, circuit.merged(), TARGETS[0])
    with pytest.raises(ArgumentError, match="of another text"):
        check_edges(freeze(model, TOKENS[:4], saes_of(**SMALL)), circuit, TARGETS[0])
    with pytest.raises(ArgumentError, match="has no SAE here"):
        trace_circuit(frozen_small, TARGETS[0], names={"9-mlp-in": []})
