"""What the trace propagates and what is kept of it, number by number."""

import pytest
import torch

from bilens.attribute import Circuit, Target, attribute_tokens, freeze, trace_circuit, tracing
from bilens.attribute.targets import ATTN, read_targets
from bilens.attribute.tracing import KINDS, head_sums, linear_rows, number_nodes, propagate
from bilens.sae import passes
from tests.attribute.conftest import N_LAYERS, TOKENS, model_of, saes_of
from tests.conftest import make_model
from tests.memory import peak_of
from tests.random_saes import make_sae

DIRECTION = torch.linspace(-1, 1, 16)


@pytest.fixture(scope="module")
def frozen():
    return freeze(model_of(True, True), TOKENS, saes_of(kind="topk", k=5))


def test_ways_add_up_for_every_source_and_every_kind_of_read(frozen):
    parts = ("resid_pre", "attn_out", "mlp_out")
    hooks = [f"blocks.{layer}.hook_{part}" for layer in range(N_LAYERS) for part in parts]
    reads = read_targets(frozen, [Target.direction(DIRECTION, hook, 4) for hook in hooks])
    nodes = number_nodes(frozen, reads)
    columns = ((nodes.position[nodes.linear] >= 0) & (nodes.position[nodes.linear] <= 4)).nonzero().flatten()
    sources = nodes.linear[columns]
    assert {KINDS[kind] for kind in nodes.kind[sources].tolist()} == {"embedding", "feature", "error"}
    ways = head_sums(frozen, nodes, sources, reads)
    torch.testing.assert_close(ways.sum(-1).T, linear_rows(frozen, reads)[:, columns])


def test_what_has_no_influence_is_not_expanded(frozen):
    found = propagate(
        frozen,
        read_targets(frozen, Target.feature("0-mlp-out", 3, 2)),
        torch.ones(1, dtype=torch.float64),
        max_nodes=10_000,
    )
    assert (found.influence[list(found.actual)] > 0).all()
    assert found.actual.keys() == found.sums.keys() == found.reads.keys()


def test_sums_are_those_of_all_parts(frozen):
    """Of a node's contributions and of their absolute values, the constants of the encoder and the MLP counted."""
    found = propagate(frozen, read_targets(frozen, Target.logit(7)), torch.ones(1, dtype=torch.float64), max_nodes=20)
    assert any(found.constants.values())
    for number, (total, size) in found.sums.items():
        if number in found.sources:
            parts = found.products(frozen, number).flatten()
            parts = torch.cat([parts, torch.tensor([found.constants[number]])])
        else:
            parts = linear_rows(frozen, found.reads[number])[0]
        assert size == pytest.approx(parts.abs().sum().item())
        assert total == pytest.approx(parts.sum().item(), abs=1e-5 * size)


@pytest.mark.parametrize("threshold", [0.3, 0.8])
def test_the_fewest_nodes_that_reach_the_threshold_are_kept(frozen, threshold):
    target = Target.logit(7)
    every = trace_circuit(frozen, target, max_nodes=10_000, node_threshold=1.0).nodes
    kept = trace_circuit(frozen, target, max_nodes=10_000, node_threshold=threshold)
    influence = every[~every.kind.isin(["target", "bias", "other"])].set_index("id").influence
    influence = influence.sort_values(ascending=False)
    nodes = kept.nodes[~kept.nodes.kind.isin(["target", "bias", "other"])]
    assert set(nodes.id) == set(influence.index[: len(nodes)])
    shares = influence.cumsum() / influence.sum()
    assert shares.iloc[len(nodes) - 1] >= threshold > shares.iloc[len(nodes) - 2]
    assert kept.kept_share == pytest.approx(shares.iloc[len(nodes) - 1])


def test_the_fewest_edges_that_reach_the_threshold_are_kept(frozen):
    """Of the edges and pairs between kept nodes; what has a bias at one end stays, what is weaker goes to the rest."""
    options = {"max_nodes": 30, "node_threshold": 1.0}
    every = trace_circuit(frozen, Target.logit(7), edge_threshold=1.0, **options)
    some = trace_circuit(frozen, Target.logit(7), edge_threshold=0.5, **options)
    kind = every.nodes.set_index("id").kind

    def among(circuit: Circuit) -> dict[tuple[str, ...], float]:
        rows = [((r.source, r.target), r.influence) for r in circuit.edges.itertuples() if kind[r.source] != "other"]
        rows += [
            ((r.i, r.j, r.target), r.influence)
            for r in circuit.hyperedges.itertuples()
            if kind[r.i] != "other" and kind[r.j] != "other"
        ]
        return dict(rows)

    strengths = sorted(among(every).items(), key=lambda item: -item[1])
    total, left = sum(strength for _, strength in strengths), 0.5
    needed = set()
    for ends, strength in strengths:
        if left <= 0:
            break
        needed.add(ends)
        left -= strength / total
    found = {ends for ends in among(some) if not any(kind[end] == "bias" for end in ends)}
    assert found == {ends for ends in needed if not any(kind[end] == "bias" for end in ends)}
    assert len(found) < len(among(every)) / 2


def test_a_merged_pair_stands_once(frozen):
    merged = trace_circuit(frozen, Target.logit(7), max_nodes=60).merged()
    assert len(merged.hyperedges) > 10
    assert (merged.hyperedges.i <= merged.hyperedges.j).all()
    assert not merged.hyperedges.duplicated(["i", "j", "target"]).any()


def test_heads_of_a_target_on_attentions_output(frozen):
    """Everything there was moved by that layer's heads."""
    target = Target.direction(DIRECTION, "blocks.1.hook_attn_out", 4)
    assert frozen.cache[target.hook].abs().max() > 0
    found = attribute_tokens(frozen, target)
    assert found.heads[1].sum().item() == pytest.approx(found.actual, rel=1e-4)
    assert not found.heads[[0, 2]].any()
    assert read_targets(frozen, target).sees.tolist() == [ATTN]


def test_a_trace_through_dense_saes_stays_in_bounds(monkeypatch):
    """Memory: a fixed amount and what grows with the pairs of one position; not with positions x features x d_model,
    and not with the expanded nodes."""
    model = make_model(n_layer=2, n_ctx=64, d_model=256, d_hidden=32, n_head=2)
    saes = [
        make_sae("topk", f"blocks.{layer}.{point}", d_in=256, d_sae=1200, k=1200)
        for layer in range(2)
        for point in ("ln2.hook_normalized", "hook_mlp_out")
    ]
    for sae in saes:
        sae.b_enc.data += 20.0  # all features fire
    tokens = torch.arange(60) % 50
    writes = len(saes) * len(tokens) * 1200 * 256 * 8  # of all positions
    monkeypatch.setattr(tracing, "FIELD_BYTES", 2**25)
    monkeypatch.setattr(passes, "WRITES_BYTES", 2**23)

    def trace() -> None:
        found = Circuit.trace(model, saes, tokens, Target.logit(7), max_nodes=2)
        assert found.largest_relative_error < 1e-5
        assert found.n_found > 50_000

    assert peak_of(trace) < writes / 2


def test_a_few_reads_at_a_time_give_the_same(frozen, monkeypatch):
    reads, one = read_targets(frozen, Target.logit(7)), torch.ones(1, dtype=torch.float64)
    whole = propagate(frozen, reads, one, max_nodes=20)
    monkeypatch.setattr(tracing, "FIELD_BYTES", 2**14)
    monkeypatch.setattr(passes, "WRITES_BYTES", 2**10)
    found = propagate(freeze(frozen.model, TOKENS, saes_of(kind="topk", k=5)), reads, one, max_nodes=20)
    torch.testing.assert_close(found.influence, whole.influence)
