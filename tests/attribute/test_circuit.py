"""Circuits add up at every node, whatever was pruned, and interventions find what the edges say.

Tolerances: 1e-5 of the sum of a node's absolute parts, as for every attribution of the float32 model.
"""

import itertools
from dataclasses import replace

import networkx as nx
import numpy as np
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
    trace_circuit,
    tracing,
)
from bilens.attribute.targets import read_targets
from bilens.attribute.tracing import linear_rows, propagate
from bilens.errors import ArgumentError, CheckpointError, EmptyTextError, MissingSAEError, NotBilinearError, StaleError
from bilens.sae.features.store import build_feature_store
from tests.attribute.conftest import MODEL_KINDS, N_LAYERS, TOKENS, model_of, saes_of, same
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


@pytest.fixture(scope="module")
def paired(frozen_small):
    return trace_circuit(frozen_small, TARGETS[0], max_nodes=25, mlps="pairs")


def into(circuit: Circuit) -> pd.Series:
    return circuit.folded_edges().groupby("target").weight.sum()


def absolute(circuit: Circuit) -> pd.Series:
    linear, pairs = (frame.groupby("target").weight.apply(lambda w: w.abs().sum()) for frame in
                     (circuit.edges, circuit.hyperedges))  # fmt: skip
    return linear.add(pairs, fill_value=0.0)


# --- adding up --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mlps", ["eigencircuits", "pairs"])
@pytest.mark.parametrize("target", TARGETS, ids=lambda t: t.hook)
@pytest.mark.parametrize("kind", MODEL_KINDS, ids=str)
def test_edges_add_up(frozen_kinds, kind, target, mlps):
    """On every kind of model and every class of SAE, pruned hard, little or not at all, before and after merging."""
    for options in ({"max_nodes": 5}, {"max_nodes": 40, "edge_threshold": 0.5}):
        circuit = trace_circuit(frozen_kinds[kind], target, mlps=mlps, **options)
        assert circuit.largest_relative_error <= COMPLETE
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


@pytest.mark.parametrize("max_nodes", [5, 40])
def test_what_arrives_at_a_node_is_its_influence(frozen_kinds, max_nodes):
    """Edges hand on by absolute parts; where pruned sources of both signs are one edge, by the sum of theirs."""
    circuit = trace_circuit(frozen_kinds[True, True], TARGETS[0], max_nodes=max_nodes, edge_threshold=0.5)
    linear, pairs = (frame.groupby("target").influence.sum() for frame in (circuit.edges, circuit.hyperedges))
    own = circuit.nodes.set_index("id").influence
    for name, arrived in linear.add(pairs, fill_value=0.0).items():
        assert arrived == pytest.approx(own[name])


def test_nothing_pruned(frozen_small):
    circuit = trace_circuit(frozen_small, TARGETS[0], max_nodes=10_000, node_threshold=1.0, edge_threshold=1.0)
    assert circuit.kept_share == pytest.approx(1.0)
    assert not circuit.nodes.kind.eq("other").any()
    assert set(circuit.shares) <= {"embedding", "error", "bias"}
    assert "np." not in repr(circuit)
    assert len(circuit.nodes[~circuit.nodes.kind.isin(["target", "bias"])]) == circuit.n_found


@pytest.mark.parametrize("kind", MODEL_KINDS, ids=str)
def test_heads_add_up_to_edges(frozen_kinds, kind):
    """Of every edge through the residual stream; inside an MLP there are no heads."""
    circuit = trace_circuit(frozen_kinds[kind], TARGETS[0], max_nodes=40)
    nodes = circuit.nodes.set_index("id")
    positions, kinds = nodes.position, nodes.kind
    inside = (circuit.edges.source.map(nodes.point) == "mlp-in") | (circuit.edges.source.map(kinds) == "eigencircuit")
    inside |= circuit.edges.target.map(kinds) == "eigencircuit"
    between = circuit.edges[(circuit.edges.source.map(positions) >= 0) & ~inside].set_index(["source", "target"])
    assert inside.any()
    sums = circuit.heads.groupby(["source", "target"]).weight.sum()
    assert (sums - between.weight).abs().max() <= 1e-9 * between.weight.abs().max()
    assert sums.index.sort_values().equals(between.index.sort_values())
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


@pytest.mark.parametrize("mlps", ["eigencircuits", "pairs"])
def test_influence_by_brute_force(mlps):
    """The pass's influences against a plain recursion over all paths, on one layer."""
    frozen = freeze(make_model(n_layer=1), TOKENS[:3], saes_of(1, kind="topk", k=2))
    reads, one = read_targets(frozen, Target.logit(7)), torch.ones(1, dtype=torch.float64)
    found = propagate(frozen, reads, one, max_nodes=1000, mlps=mlps)
    nodes = found.nodes
    influence = torch.zeros(len(nodes), dtype=torch.float64)
    given: dict[int, list[tuple[int, float]]] = {}
    for owner, (squares, circuits) in found.squares.items():
        ids = found.sources[owner].tolist()
        parts = zip(
            [*circuits.tolist(), *ids], [*squares.weights.sum(1).tolist(), *squares.direct.tolist()], strict=True
        )
        given[owner] = list(parts)
        for row, circuit in enumerate(circuits.tolist()):
            given[circuit] = list(zip(ids, squares.weights[row].tolist(), strict=True))

    def hand_on(number: int, share: float) -> None:
        influence[number] += share
        if number in given:
            total = sum(abs(part) for _, part in given[number])
            for source, part in given[number]:
                if part:
                    hand_on(source, share * abs(part) / total)
        elif number in found.reads and number not in found.sources:
            row = linear_rows(frozen, found.reads[number])[0].abs()
            for source, part in zip(nodes.linear.tolist(), (row / row.sum()).tolist(), strict=True):
                if part:
                    hand_on(source, share * part)
        elif number in found.sources:
            parts = found.products(frozen, number).abs()
            parts[-1, -1] += abs(found.constants[number])
            for place, source in enumerate(found.sources[number].tolist()):
                if part := (parts[place].sum() / parts.sum()).item():
                    hand_on(source, share * part)

    hand_on(nodes.targets[0], 1.0)
    torch.testing.assert_close(influence, found.influence)


def test_no_sae_on_an_output_or_an_input():
    """MLPs without an SAE on their output are nodes of their own; output features without an input SAE are leaves."""
    model = model_of(True, True)
    only_in = Circuit.trace(model, saes_of(points=("mlp-in",)), TOKENS, TARGETS[1], max_nodes=30)
    assert only_in.largest_relative_error <= COMPLETE
    assert "mlp" in set(only_in.nodes.kind)
    only_out = Circuit.trace(model, saes_of(points=("mlp-out",)), TOKENS, Target.logit(7), max_nodes=30)
    assert only_out.nodes[only_out.nodes.expanded].id.tolist() == ["target"]
    bilinear = Circuit.trace(model, saes_of(kind="scope-bilinear"), TOKENS, Target.logit(7), max_nodes=30)
    assert bilinear.nodes[bilinear.nodes.expanded].id.tolist() == ["target"]
    on_mid = Circuit.trace(model, saes_of(points=("resid-mid", "mlp-out"), **SMALL), TOKENS, TARGETS[2], max_nodes=30)
    assert on_mid.largest_relative_error <= COMPLETE
    assert on_mid.nodes.id.str.startswith("1-resid-mid/").any()


# --- several targets --------------------------------------------------------------------------------------------------


def test_circuits_of_another_model_or_sae_are_refused(frozen_small, circuit):
    """Told apart by fingerprints: names, tokens and widths are the same."""
    for model, saes, what in (
        (make_model(bias=True, normalization=True, n_layer=N_LAYERS, seed=4), saes_of(**SMALL), "model"),
        (model_of(True, True), saes_of(kind="topk", k=4), "SAE on"),
    ):
        other = freeze(model, TOKENS, saes)
        for check in (check_circuit, check_edges):
            with pytest.raises(StaleError, match=f"this circuit was made from another {what}"):
                check(other, circuit, TARGETS[0])
    assert circuit.fingerprints.keys() == {"model", *frozen_small.saes}


def test_a_gap_that_rounding_does_not_explain_is_not_called_rounding(circuit):
    assert circuit.dtype == "float32"
    assert circuit.is_rounding
    assert "MORE than rounding" not in str(circuit)
    for gap, dtype, is_rounding in ((0.05, "float32", False), (0.05, "bfloat16", True), (0.2, "bfloat16", False)):
        nodes = circuit.nodes.assign(
            relative_error=circuit.nodes.relative_error.where(circuit.nodes.id != "target", gap)
        )
        found = replace(circuit, nodes=nodes, dtype=dtype)
        assert found.is_rounding == is_rounding
        assert ("MORE than rounding" in str(found)) != is_rounding
        page = found.to_page().to_html()
        assert ("more than rounding" in page) != is_rounding
        assert ("): MORE than rounding of the model" in page) != is_rounding


def test_several_targets_share_one_graph(frozen_small, monkeypatch):
    """Influences are those of each alone, by the logits' probabilities; edges into a node are the same in any graph."""
    monkeypatch.setattr(tracing, "SOLVED_INFLUENCE", 0.0)  # or else it depends on all targets which are solved
    targets = [Target.logit(7), Target.logit(9, 3, minus=2), Target.logit(11)]
    options = {"max_nodes": 10_000, "node_threshold": 1.0, "edge_threshold": 1.0}
    together = trace_circuit(frozen_small, targets, **options)
    assert together.largest_relative_error <= COMPLETE
    assert together.target == "logit '7', logit '9' - '2', logit '11'"
    roots = together.nodes[together.nodes.kind == "target"].set_index("id")
    assert list(roots.index) == list(together.probabilities) == ["target 1", "target 2", "target 3"]
    assert roots.feature.tolist() == [7, -1, 11]
    assert roots.position.tolist() == [5, 3, 5]
    chances = [frozen_small.logits[at].softmax(-1)[token].item() for at, token in ((5, 7), (3, 9), (5, 11))]
    assert list(together.probabilities.values()) == pytest.approx(chances)
    weights = torch.tensor(chances) / sum(chances)
    assert roots.influence.tolist() == pytest.approx(weights.tolist())
    alone = [trace_circuit(frozen_small, target, **options) for target in targets]
    influence = sum(
        weight * one.nodes.set_index("id").influence.reindex(together.nodes.id, fill_value=0.0)
        for weight, one in zip(weights.tolist(), alone, strict=True)
    )
    inner = ~together.nodes.kind.isin(["target"]).to_numpy()
    assert together.nodes.influence[inner].tolist() == pytest.approx(influence[inner].tolist(), abs=1e-6)
    for name, one in zip(roots.index, alone, strict=True):
        assert into(together)[name] == pytest.approx(into(one)["target"])
    assert sum(together.shares.values()) == pytest.approx(1.0)
    assert together.merged().nodes.id.is_unique
    exact = check_edges(frozen_small, together, targets)
    scale = exact.frame.groupby("target").predicted.transform(lambda w: w.abs().sum())
    assert ((exact.frame.predicted - exact.frame.measured).abs() <= COMPLETE * scale + 1e-5).all()
    assert {"target 1", "target 2", "target 3"} <= set(exact.frame.target)
    for target in targets:
        assert check_circuit(frozen_small, together, target).recovered() == pytest.approx(1.0, abs=1e-2)
    assert together.to_page().to_html()


def test_targets_at_several_heights(frozen_small):
    """Features weigh the same; one that a higher one is made of is a node of its own as well."""
    targets = [TARGETS[1], TARGETS[2], Target.feature("0-mlp-out", 1, 4)]
    circuit = trace_circuit(frozen_small, targets, max_nodes=40)
    assert circuit.largest_relative_error <= COMPLETE
    assert circuit.nodes[circuit.nodes.kind == "target"].influence.tolist() == pytest.approx([1 / 3] * 3)
    assert circuit.probabilities == {}
    assert sum(circuit.shares.values()) == pytest.approx(1.0)


def test_the_likeliest_logits(text_model):
    text, saes = "Mira lost a red kite", saes_of(2, **SMALL)
    chances, tokens = text_model(text)[0, -1].softmax(-1).sort(descending=True)
    for most, enough in ((3, 1.0), (10, chances[:2].sum().item() - 1e-6)):
        circuit = Circuit.trace(text_model, saes, text, max_nodes=5, max_n_logits=most, desired_logit_prob=enough)
        n = most if enough == 1.0 else 2
        roots = circuit.nodes[circuit.nodes.kind == "target"]
        assert roots.feature.tolist() == tokens[:n].tolist()
        assert list(circuit.probabilities.values()) == pytest.approx(chances[:n].tolist())


def test_targets_that_are_none(frozen_small, circuit):
    model, saes = model_of(True, True), saes_of(**SMALL)
    for wrong in (7, "what", np.ones(3), torch.ones(3), [7], None, []):
        with pytest.raises(ArgumentError, match=r"no Target; make one|no target was given"):
            trace_circuit(frozen_small, wrong)
        if wrong is not None:
            with pytest.raises(ArgumentError, match=r"no Target; make one|no target was given"):
                Circuit.trace(model, saes, TOKENS, wrong)
    with pytest.raises(ArgumentError, match=r"logit of 'what' minus itself"):
        Target.logit("what", minus="what")
    with pytest.raises(ArgumentError, match="two targets are called \"logit '7'\" at position 5"):
        trace_circuit(frozen_small, [Target.logit(7), Target.logit(7, 5)])
    with pytest.raises(ArgumentError, match="trace them apart"):
        trace_circuit(frozen_small, [Target.logit(7), TARGETS[1]])
    with pytest.raises(ArgumentError, match=r"desired_logit_prob is 0\.0"):
        Circuit.trace(model, saes, TOKENS, desired_logit_prob=0.0)
    with pytest.raises(ArgumentError, match="max_n_logits is 0"):
        Circuit.trace(model, saes, TOKENS, max_n_logits=0)
    for check in (check_circuit, check_edges):
        with pytest.raises(ArgumentError, match="traced for logit '7' - '9' at position 5; given is logit '3'"):
            check(frozen_small, circuit, Target.logit(3))
    two = trace_circuit(frozen_small, [Target.logit(7), Target.logit(9)], max_nodes=5)
    with pytest.raises(ArgumentError, match="traced for logit '9' too"):
        check_edges(frozen_small, two, Target.logit(7))
    with pytest.raises(ArgumentError, match="attention is 'none', expected 'frozen' or 'real'"):
        check_edges(frozen_small, circuit, TARGETS[0], attention="none")
    with pytest.raises(ArgumentError, match="names are given for 0"):
        trace_circuit(frozen_small, TARGETS[0], names={0: ["a"]})
    with pytest.raises(ArgumentError, match="names is 'abc'"):
        trace_circuit(frozen_small, TARGETS[0], names="abc")
    direction = np.linspace(-1, 1, model.cfg.d_model).astype("float32")
    found = [
        read_targets(frozen_small, Target.direction(v, "hook_embed")).actual
        for v in (direction, torch.tensor(direction))
    ]
    assert found[0] == found[1]
    with pytest.raises(ArgumentError, match="a direction is a tensor or an array"):
        Target.direction([1.0], "hook_embed")
    for empty in ([], torch.tensor([], dtype=torch.long)):
        with pytest.raises(EmptyTextError):
            freeze(model, empty)


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
    assert circuit.largest_completeness_error == (completeness["sum"] - completeness.value).abs().max()


def test_siblings_are_put_together(frozen_small):
    """Features of one name at one position that lead to the same node; numbers before the names do not part them."""
    one = [f"{feature} the same" for feature in range(40)]
    names = {f"{layer}-{point}": one for layer in range(N_LAYERS) for point in ("mlp-in", "mlp-out")}
    found = trace_circuit(frozen_small, TARGETS[0], max_nodes=40, names=names)
    nodes = found.nodes.set_index("id")
    assert len(found.supernodes) > 3
    members = [name for _, *group in found.supernodes for name in group]
    assert len(members) == len(set(members))
    for label, *group in found.supernodes:
        assert label == f"{nodes.name[group[0]]} ({len(group)} alike)"
        assert len({(nodes.hook[name], nodes.position[name]) for name in group}) == 1
    assert not trace_circuit(frozen_small, TARGETS[0], max_nodes=40).supernodes  # neither named nor alike
    shown = found.strongest(10)
    assert all(len(group) > 2 and set(group[1:]) <= set(shown.nodes.id) for group in shown.supernodes)


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


def test_networkx(paired):
    circuit = paired
    graph = circuit.to_networkx()
    assert nx.is_directed_acyclic_graph(graph)
    assert graph.graph["tokens"] == circuit.tokens
    pairs = [name for name, data in graph.nodes(data=True) if data["kind"] == "pair"]
    assert len(pairs) == len(circuit.hyperedges)
    assert set(graph.nodes) == {*circuit.nodes.id, *pairs}
    for name in pairs:
        (output,) = graph.out_edges(name, data="weight")
        assert sum(w for *_, w in graph.in_edges(name, data="weight")) == pytest.approx(output[2])
    for name in circuit.nodes[circuit.nodes.expanded].id:
        total = sum(weight for *_, weight in graph.in_edges(name, data="weight"))
        assert total == pytest.approx(into(circuit)[name])


# --- interventions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MODEL_KINDS, ids=str)
def test_edges_are_what_removing_their_source_changes(kind):
    """Exactly where attention and norms are frozen; with real attention what an MLP has none between."""
    frozen = freeze(model_of(*kind), TOKENS, saes_of(**SMALL))
    for target, mlps in itertools.product(TARGETS, ("eigencircuits", "pairs")):
        circuit = trace_circuit(frozen, target, max_nodes=25, mlps=mlps)
        exact, real = (check_edges(frozen, circuit, target, attention=mode) for mode in ("frozen", "real"))
        assert len(exact.frame) == len(real.frame) > 10
        scale = exact.frame.groupby("target").predicted.transform(lambda w: w.abs().sum())
        assert ((exact.frame.predicted - exact.frame.measured).abs() <= COMPLETE * scale + 1e-5).all()
        pairs = real.frame[real.frame.kind == "mlp"]
        assert ((pairs.predicted - pairs.measured).abs() <= COMPLETE * scale[pairs.index] + 1e-5).all()
        assert exact.correlation["mlp"] == pytest.approx(1.0)
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
