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
    assert found.squares.keys() == found.sources.keys()


@pytest.mark.parametrize("mlps", ["eigencircuits", "pairs"])
def test_sums_are_those_of_all_parts(frozen, mlps):
    """Of a node's contributions and of their absolute values, the constants of the encoder and the MLP counted."""
    reads, one = read_targets(frozen, Target.logit(7)), torch.ones(1, dtype=torch.float64)
    found = propagate(frozen, reads, one, max_nodes=20, mlps=mlps)
    assert any(found.constants.values()) or mlps == "eigencircuits"
    for number, (total, size) in found.sums.items():
        if number in found.squares:
            squares, _ = found.squares[number]
            parts = torch.cat([squares.weights.flatten(), squares.direct])
        elif number in found.sources:
            parts = found.products(frozen, number).flatten()
            parts = torch.cat([parts, torch.tensor([found.constants[number]])])
        else:
            parts = linear_rows(frozen, found.reads[number])[0]
        assert size == pytest.approx(parts.abs().sum().item())
        assert total == pytest.approx(parts.sum().item(), abs=1e-5 * size)


@pytest.mark.parametrize("threshold", [0.3, 0.8])
def test_the_most_influential_nodes_with_their_paths_are_kept(frozen, threshold):
    """Up to the first with which the threshold is reached; every other one is on the path of one of these."""
    target, options = Target.logit(7), {"max_nodes": 10_000, "mlps": "pairs"}
    every = trace_circuit(frozen, target, node_threshold=1.0, **options).nodes
    kept = trace_circuit(frozen, target, node_threshold=threshold, **options)
    influence = every[~every.kind.isin(["target", "bias", "other"])].set_index("id").influence
    influence = influence.sort_values(ascending=False)
    nodes = set(kept.nodes[~kept.nodes.kind.isin(["target", "bias", "other"])].id)
    share = influence[list(nodes)].sum() / influence.sum()
    assert share >= threshold
    assert kept.kept_share == pytest.approx(share)
    needed = next(n for n in range(len(influence)) if not set(influence.index[: n + 1]) <= nodes)
    ranked = set(influence.index[:needed])
    folded = kept.folded_edges()
    leads_on = set(folded.source) & nodes
    assert nodes - ranked <= leads_on
    last = influence.index[needed - 1]
    assert influence[list(nodes - {last})].sum() / influence.sum() < threshold or last in leads_on


@pytest.mark.parametrize("mlps", ["eigencircuits", "pairs"])
def test_the_strongest_edges_are_kept(frozen, mlps):
    """The fewest that reach the threshold between kept nodes, and each node's way up; what has a bias at one end stays,
    what is weaker goes to the rest."""
    options = {"max_nodes": 30, "node_threshold": 1.0, "mlps": mlps}
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
    needed = {ends for ends in needed if not any(kind[end] == "bias" for end in ends)}
    assert needed <= found
    assert len(found - needed) <= 30
    assert len(found) < len(among(every)) / 2 + 30


def test_a_merged_pair_stands_once(frozen):
    merged = trace_circuit(frozen, Target.logit(7), max_nodes=60, mlps="pairs").merged()
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
