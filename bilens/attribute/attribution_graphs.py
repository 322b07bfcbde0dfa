"""Circuits as the attribution-graph JSON of circuit-tracer and Neuronpedia.

`metadata`, `qParams`, `nodes`, `links` as circuit-tracer's viewer and Neuronpedia read them. That format has one
feature per (layer, index) and edges between two nodes, so the MLP input of layer `l` is its layer `3l`, the
eigencircuits `3l + 1`, the output `3l + 2`, and hyper-edges are folded half to each member. What it has no place for
stands in an object `bilens` beside, from which `bilens.attribute.imported_graphs` restores the circuit.

What the two viewers take for granted, and the format's classes and schema do not say:

    ids             `node_id` is `layer_index_position`, the embeddings' layer being `E`; the index is negative for what
                    has none. Names, links of a clicked node and groups go by (layer, feature, position), so no two
                    nodes may share one
    logits          the label is `Output "token" (p=0.123)`: the token is what stands between the double quotes, the
                    probability what stands after `(p=`; without it the file does not open
    names           of embeddings and errors (`mlp reconstruction error`) are made from the token, whatever the label
                    says; a `bias` and an `unknown` node keep theirs
    subgraph        shows the pinned nodes alone, a group as one node; circuit-tracer takes groups from its page's
                    address (`supernodes=` and the list as JSON) and passes over those of the file
    pruning         a node is shown if its cumulative influence is at most the threshold, at most 1
    file names      `slug` and `scan` are of letters, digits, dots, hyphens and underscores
    edits           are saved into `qParams`, as lists by the one and as texts by the other: new labels (`clerps`) by
                    the paired number or by (layer, feature, position), pins, and groups with their label first

Sources of the format: circuit_tracer/frontend of decoderesearch/circuit-tracer, and apps/webapp (the graph page's
utils.ts, and app/api/graph/graph-schema.json) of hijohnnylin/neuronpedia.
"""

import re
from pathlib import Path
from typing import Any

from bilens.attribute.circuit_tables import FRAMES, CircuitTables, scalars
from bilens.attribute.paths import Paths
from bilens.errors import ArgumentError

FEATURE, ERROR = "cross layer transcoder", "mlp reconstruction error"
PINNED = 20
RANKS = 2**14  # more than there are eigencircuits of one feature
NAMELESS = {"error": -1, "mlp": -1, "bias": -2}  # the indices of nodes that have none
NAMELESS |= {
    f"other {kind}": -3 - place for place, kind in enumerate(("tokens", "features", "errors", "mlps", "eigencircuits"))
}


def to_attribution_graph(circuit: CircuitTables, slug: str = "bilens") -> dict[str, Any]:
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
    foreign = exported_nodes(circuit)
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
                    f"{circuit.target}: exact attribution of a bilinear transformer. Layer 3l is the MLP input of "
                    "layer l, 3l+1 its eigencircuits, 3l+2 its output; pairs are folded half to each member. The p of "
                    "a difference of logits is its first token's; the p of a target that is no logit is its weight, 1."
                ),
                "generator": {"name": "bilens"},
            },
        },
        "qParams": {
            "pinnedIds": [foreign[name]["node_id"] for name in exported_pins(circuit)],
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
        "bilens": scalars(circuit) | {name: getattr(circuit, name).to_dict("list") for name in FRAMES},
    }


def _plain(text: str) -> str:
    """A text as part of a file's name."""
    return re.sub(r"[^a-zA-Z0-9_.-]+", "-", text).lstrip(".-") or "bilens"


def _prompt(tokens: list[str]) -> str:
    """The text that tokens spell: by the spaces they bring, or by WordPiece's marks."""
    return "".join(tokens) if any(token[:1] == " " for token in tokens) else " ".join(tokens).replace(" ##", "")


def exported_pins(circuit: CircuitTables) -> list[str]:
    """What is pinned; where nothing is, the nodes to look at first, and groups whole: viewers draw what is pinned as a
    graph of its own, and nothing else."""
    if circuit.pinned:
        return [name for name in circuit.pinned if name in set(circuit.nodes.id)]
    chosen = set(circuit.nodes.id.iloc[Paths.of(circuit).choose(PINNED)])
    chosen |= {name for _, *group in circuit.supernodes if chosen & set(group) for name in group}
    return circuit.nodes.id[circuit.nodes.id.isin(chosen) | (circuit.nodes.kind == "target")].tolist()


def exported_nodes(circuit: CircuitTables) -> dict[str, dict[str, Any]]:
    """The circuit's nodes in the foreign format, by their ids."""
    layers = [_place(row.kind, row.layer, row.point) for row in circuit.nodes.itertuples()]
    logit_layer = str(3 * (max(layers) // 3) + 4)  # two past the last, which are outputs
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
        elif row.kind in ("feature", "eigencircuit"):
            identity = row.id.split("@")[0]
            if row.kind == "eigencircuit":
                rank = identity.rsplit(".", 1)[1]
                index = (feature + 1) * RANKS + (RANKS - 1 if rank == "rest" else int(rank))
            # Readers take the index back out of the pair by Cantor's function.
            kind, feature, js_id = FEATURE, (place + index) * (place + index + 1) // 2 + index, f"{layer}_{index}-0"
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


def _place(kind: str, layer: int, point: str) -> int:
    """The foreign layer of a node: three for each of ours, of the input, the eigencircuits, the output; -1 for none."""
    return 3 * int(layer) + (1 if kind == "eigencircuit" else 2 if point == "mlp-out" else 0) if layer >= 0 else -1


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
