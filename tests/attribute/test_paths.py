"""What is shown of a circuit hangs together and adds up, on random and trained models, whatever the size.

Tolerances: 1e-12 for shares in float64; for what goes into a node, those of `test_circuit`.
"""

import networkx as nx
import pytest

import bilens
from bilens.attribute import Circuit, Target, freeze, trace_circuit
from bilens.attribute.paths import Paths
from bilens.errors import ArgumentError
from tests.attribute.conftest import MODEL_KINDS, TOKENS, model_of, saes_of

TARGETS = [Target.logit(7, 5, minus=9), [Target.logit(7), Target.logit(9, 3)], Target.feature("1-mlp-out", 6, 4)]
HELD_OUT = ["Tom was not happy. He", "One day, a little girl named Mia found a shiny"]


def check(circuit: Circuit) -> None:
    inner = circuit.nodes[~circuit.nodes.kind.isin(["target", "bias", "other"])]
    paths = Paths.of(circuit)
    order = paths.choose(len(circuit.nodes))
    assert set(circuit.nodes.id.iloc[order]) == set(inner.id)  # every node of a circuit is reached
    values = circuit.nodes.set_index("id").value
    sizes = circuit.folded_edges().groupby("target").weight.apply(lambda weights: weights.abs().sum())
    for n in (1, 5, 20, len(inner)):
        shown = circuit.strongest(n)
        nodes = shown.nodes[~shown.nodes.kind.isin(["target", "bias", "other"])]
        assert set(nodes.id) == set(circuit.nodes.id.iloc[order[:n]])
        graph = nx.DiGraph(list(shown.folded_edges()[["source", "target"]].itertuples(index=False)))
        targets = set(shown.nodes[shown.nodes.kind == "target"].id)
        assert set(nodes.id) <= targets.union(*(nx.ancestors(graph, target) for target in targets))
        assert sum(shown.shares.values()) == pytest.approx(1.0, abs=1e-12)
        keep = circuit.nodes.id.isin({*nodes.id, *targets}).to_numpy()
        assert paths.ends(keep).sum() == pytest.approx(1.0, abs=1e-12)
        # The page hands influence on through the shown nodes of the whole graph: where it ends there is the same.
        assert shown.shares.get("embedding", 0.0) == pytest.approx(paths.ends(keep)[keep & paths.tokens].sum())
        for name, total in shown.folded_edges().groupby("target").weight.sum().items():
            assert total == pytest.approx(values[name], abs=1e-4 * max(sizes[name], abs(values[name])))
    whole = circuit.strongest(len(inner))
    assert whole.shares == pytest.approx(circuit.shares)
    assert whole.kept_share == pytest.approx(circuit.kept_share)


@pytest.mark.parametrize("mlps", ["eigencircuits", "pairs"])
@pytest.mark.parametrize("kind", MODEL_KINDS, ids=str)
def test_every_shown_node_has_a_shown_path_to_the_target(frozen_kinds, kind, mlps):
    for target in TARGETS:
        for options in ({"max_nodes": 40, "edge_threshold": 0.5}, {"max_nodes": 5}):
            check(trace_circuit(frozen_kinds[kind], target, mlps=mlps, **options))


@pytest.mark.parametrize("text", HELD_OUT)
def test_on_a_trained_model(text):
    model, saes = bilens.load_model("ts-tiny", device="cpu"), bilens.load_saes("ts-tiny", device="cpu")
    check(trace_circuit(freeze(model, text, saes), Target.logit(9, -1)))


def test_paths_lead_to_tokens():
    """Among the first nodes there is one whole path from the target to a token at least."""
    circuit = trace_circuit(freeze(model_of(True, True), TOKENS, saes_of(kind="topk", k=5)), Target.logit(7))
    shown = circuit.strongest(8)
    graph = nx.DiGraph(list(shown.edges[["source", "target"]].itertuples(index=False)))
    tokens = shown.nodes[shown.nodes.kind == "embedding"].id
    assert any(nx.has_path(graph, token, "target") for token in tokens)


def test_merged_circuits_and_bad_sizes():
    circuit = trace_circuit(freeze(model_of(True, True), TOKENS, saes_of(kind="topk", k=5)), Target.logit(7))
    merged = circuit.merged().strongest(10)
    assert (~merged.nodes.kind.isin(["target", "bias", "other"])).sum() == 10
    assert sum(merged.shares.values()) == pytest.approx(1.0, abs=1e-9)
    with pytest.raises(ArgumentError, match="n is 0"):
        circuit.strongest(0)
