"""The page of an attribution graph: `assets/graph.js` draws it; around it what checks and explains it.

1. `GraphView` is the graph alone: every node and every number of a `Circuit`, as data for the script
2. `graph_page` adds the tokens behind the target, the checks by intervention, and the eigencircuits of its features
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import pandas as pd

from bilens.attribute.circuit import Circuit
from bilens.attribute.faithfulness import EdgeCheck, Faithfulness
from bilens.attribute.paths import Paths
from bilens.attribute.tokens import TokenAttribution
from bilens.decompose.feature import FeatureCircuit
from bilens.draw.charts import Chart
from bilens.draw.markup import ViewError, island, spaced, to_json, visible
from bilens.draw.page import Content, Html, Page, View, anchor, captioned, columns, details, table
from bilens.draw.signed_bars import SignedBars
from bilens.model.hook_points import hook_of
from bilens.pages.circuit import eigencircuits, emphasised
from bilens.sae.features.examples import DescribedFeatures
from bilens.sae.features.store import FeatureRecord, FeatureStore

Features: TypeAlias = Mapping[str, DescribedFeatures] | FeatureStore

EXAMPLES_SHOWN = 6  # of a feature: with 400 features, a page of them stays under two megabytes
EFFECTS_SHOWN = 8
MOST_SHOWN = 200  # nodes of the graph at a time
POINTS_SHOWN = 2000  # of predicted against measured edges
GRAPH_HEIGHT = 900
INPUTS = ("mlp-in", "resid-mid")
KIND_ENDS = {
    "embedding": "A token's embedding: the graph ends here.",
    "error": "What the SAE misses at this position: the graph ends here.",
    "bias": "A constant of the model or an SAE: the graph ends here.",
    "other": "What was pruned, summed, so that the parts of every node still add up.",
    "mlp": "The output of an MLP without an SAE: the graph ends here.",
    "eigencircuit": "",
    "feature": "Not expanded: its influence is too small, or its SAE has no linear reads.",
    "target": "",
}


@dataclass(frozen=True, eq=False)
class GraphView(View):
    """A circuit as an interactive graph.

    Args:
        circuit: merged over positions or not.
        features: what its features fire on: a feature store, or what `describe_features` gives, by hook or SAE name
            (`2-mlp-in`, or its folder's name).
        wordpiece: true joins the tokens of examples as word pieces.
        verdict: what interventions say of the circuit, in a word, a number and a sentence (`Faithfulness.verdict`).
        dashboards: where to read more about features, by hook and feature (`blocks.2.ln2.hook_normalized/137`).

    Raises:
        ViewError: a number that is not finite.
    """

    circuit: Circuit
    features: Features | None = None
    wordpiece: bool = False
    verdict: tuple[str, str, str] | None = None
    dashboards: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        frames = {"nodes": self.circuit.nodes, "edges": self.circuit.edges, "hyper-edges": self.circuit.hyperedges}
        for name, frame in frames.items():
            bad = frame[~np.isfinite(frame.select_dtypes("number")).all(axis=1)]
            if len(bad):
                raise ViewError(f"{name} {bad.iloc[0].to_dict()}: only finite numbers can be drawn.")

    def data(self) -> dict[str, Any]:
        """What the script is given, in JSON's types: edges by the index of their nodes."""
        circuit = self.circuit
        nodes = circuit.nodes
        index = {name: place for place, name in enumerate(nodes.id)}
        paths = Paths.of(circuit)
        depths = [_depth(node) for node in nodes.itertuples()]
        used = sorted(set(depths))
        edges = [
            [index[e.source], index[e.target], _short(e.weight), _short(e.influence, 4), e.via, _short(e.via_weight, 5)]
            for e in circuit.edges.itertuples()
        ]
        pairs = [
            [index[p.i], index[p.j], index[p.target], _short(p.weight), _short(p.influence, 4)]
            for p in circuit.hyperedges.itertuples()
        ]
        return {
            "target": visible(circuit.target),
            "tokens": [visible(token) for token in circuit.tokens],
            "rows": [_row_name(depth) for depth in used],
            "nodes": [
                _node(node, used.index(depth), len(circuit.tokens))
                for node, depth in zip(nodes.itertuples(), depths, strict=True)
            ],
            "edges": edges,
            "pairs": pairs,
            "heads": _heads(circuit, index),
            "features": self._dashboards(),
            "dashboards": dict(self.dashboards),
            "facts": _facts(circuit),
            "order": paths.choose(MOST_SHOWN),
            "up": paths.strongest(paths.start, down=False).tolist(),
            "predicted": [[visible(token), p] for token, p in circuit.predicted.items()],
            "verdict": self.verdict,
            "pinned": [index[name] for name in circuit.pinned if name in index],
            "groups": [
                [visible(label), *(index[name] for name in ids if name in index)] for label, *ids in circuit.supernodes
            ],
        }

    def html(self) -> str:
        return island("graph", to_json(self.data()), GRAPH_HEIGHT)

    def to_page(self, title: str = "") -> Page:
        return Page(title or _title(self.circuit), _subtitle(self.circuit)).add(self)

    def _repr_html_(self) -> str:
        return self.to_page()._repr_html_()

    def _dashboards(self) -> dict[str, Any]:
        found = {}
        for node in self.circuit.nodes[self.circuit.nodes.kind == "feature"].itertuples():
            features = _features_of(self.features, node)
            if features is not None and (key := _key(node)) not in found:
                found[key] = _dashboard(features, int(node.feature), self.wordpiece)
        return found


def graph_page(
    circuit: Circuit,
    *,
    features: Features | None = None,
    tokens: TokenAttribution | None = None,
    faithfulness: Faithfulness | None = None,
    edges: Sequence[EdgeCheck] = (),
    feature_circuits: Sequence[FeatureCircuit] = (),
    wordpiece: bool = False,
    dashboards: str = "",
    title: str = "",
) -> Page:
    """A circuit's page: the graph, and under it whatever else is known of it.

    Args:
        circuit, features, wordpiece: the same as for `GraphView`.
        tokens: the contribution of each token to the same target.
        faithfulness, edges: the circuit's checks by intervention.
        feature_circuits: circuits of features in the graph, whose eigencircuits are shown.
        dashboards: where there is a dashboard for every feature, an address with `{sae}` (`2-mlp-in`) and `{feature}`
            in it, such as `dashboards/{sae}/{feature}.html`.
        title: the page's title.
    """
    verdict = None if faithfulness is None else faithfulness.verdict
    addresses = _addresses(circuit, dashboards)
    for found in feature_circuits:
        key = f"{hook_of('mlp-out', found.attribution.layer)}/{found.attribution.feature}"
        addresses[key] = f"#{anchor(_feature_title(found))}"
    page = GraphView(circuit, features, wordpiece, verdict, addresses).to_page(title)
    page.section("How to read it", HOW_TO_READ)
    if tokens is not None:
        page.section("Tokens behind the target", *_token_views(tokens))
    page.section("Does it add up?", *_completeness(circuit))
    if faithfulness is not None or edges:
        page.section("Checked by intervention", *_checks(circuit, faithfulness, edges))
    if feature_circuits:
        page.section("Eigencircuits of its features", EIGENCIRCUITS)
    for found in feature_circuits:
        page.section(
            _feature_title(found),
            Html(f'<p class="sentence">{emphasised(found.explanation.sentence)}</p>'),
            *eigencircuits(found, found.wordpiece),
            level=3,
        )
    return page


HOW_TO_READ = (
    "Columns are the tokens of the text. Rows go up through the layers: token embeddings are at the bottom, then "
    "come the features of the SAEs on every MLP's input and output, and the target is on top. Attention moves "
    "things between columns; an edge says how much, and which head moves most of it. An MLP is bilinear: what it "
    "adds along a feature's direction is a sum of squares. Each square is an eigencircuit, a node between the MLP's "
    "input and output: features of the input are read into it linearly, and its square goes into the feature. It is "
    "named by the features that it reads most. (A graph that was traced with pairs has dots in their place, in which "
    "two features meet; with “halved”, each of the two gets one half.)\n\n"
    "A node's size is its influence: the share of the target that passes through it, by absolute contributions. An "
    "edge's width is its influence too, and its colour is the sign of its number. A feature's number is its "
    "activation. The parts that are listed when you open it add up to it, and what was pruned is summed as “other "
    "…”. Attention patterns, norm scales and the set of active features are those of this forward pass.\n\n"
    "The slider says how many nodes are shown. They are chosen as paths: next comes the node at which most influence "
    "arrives through those that are shown, with its strongest path down to a token. The bar on top says where the "
    "target's influence ends if it is handed down through the shown nodes alone: in tokens, in biases, in what the "
    "SAEs miss, or in a node that is not shown. A node with a number in it is a group: features that are nearly the "
    "same and lead to the same node are put together from the start, and you can pin nodes and group them yourself."
)
EIGENCIRCUITS = (
    "The leading eigenvectors of a feature's interaction matrix, read from the weights, say what makes it fire on "
    "any text. Beside them stands what each of them does on this text."
)


def _feature_title(found: FeatureCircuit) -> str:
    return f"Feature {found.output_label}, layer {found.attribution.layer}"


def _addresses(circuit: Circuit, template: str) -> dict[str, str]:
    """The address of each feature's dashboard."""
    features = circuit.nodes[circuit.nodes.kind == "feature"] if template else circuit.nodes[:0]
    return {
        _key(node): template.format(sae=f"{node.layer}-{node.point}", feature=node.feature)
        for node in features.itertuples()
    }


def _title(circuit: Circuit) -> str:
    of = re.fullmatch(r"logit '(.*)' - '(.*)'", circuit.target, re.DOTALL)
    return f"Why “{of[1]}” rather than “{of[2]}”?" if of else f"Why {circuit.target}?"


def _subtitle(circuit: Circuit) -> str:
    text = " ".join(visible(token) for token in circuit.tokens).replace(" ##", "")
    return (
        f"{circuit.model_name} on “{text}”, at token {circuit.position} “{visible(circuit.tokens[circuit.position])}”"
    )


# --- the graph's data -------------------------------------------------------------------------------------------------


def _depth(node: Any) -> float:
    """The row a node belongs to, counted from the bottom."""
    if node.kind == "target":
        return math.inf
    if node.layer < 0:
        return -1
    return 3 * node.layer + (1 if node.kind == "eigencircuit" else 0 if node.point in INPUTS else 2)


def _row_name(depth: float) -> str:
    if depth == math.inf:
        return "target"
    return "tokens" if depth < 0 else f"L{depth // 3} {('MLP in', 'eigencircuits', 'MLP out')[int(depth) % 3]}"


def _node(node: Any, row: int, n_tokens: int) -> dict[str, Any]:
    token = visible(node.token)
    at = f"@{node.position} {token}" if 0 <= node.position < n_tokens else ""
    place = {"error": "SAE error", "mlp": "whole output"}.get(node.kind, f"feature {node.feature}")
    where = f"layer {node.layer}, {node.point}, {place}" if node.layer >= 0 and node.kind != "bias" else ""
    where = {"target": "target", "embedding": "embedding", "eigencircuit": _circuit_place(node)}.get(node.kind, where)
    if at:
        where += f", at token {node.position} “{token}”"
    return {
        "id": node.id,
        "kind": node.kind,
        "row": row,
        "position": int(node.position),
        "name": visible(node.name),
        "where": where,
        "at": at,
        "measure": {"feature": "activation", "target": "value", "bias": "", "other": ""}.get(node.kind, "norm"),
        "value": float(node.value),
        "influence": float(node.influence),
        "expanded": bool(node.expanded),
        "relative_error": float(node.relative_error),
        "key": _key(node),
        "end": KIND_ENDS[node.kind],
    }


def _circuit_place(node: Any) -> str:
    owner, rank = node.id.split("@")[0].rsplit(".", 1) if node.kind == "eigencircuit" else ("", "")
    return f"{'other eigencircuits' if rank == 'rest' else f'eigencircuit {rank}'} of {owner}"


def _short(value: float, digits: int = 10) -> float:
    """Weights to ten digits, more than the model's float32 has: thousands of them make up most of a page."""
    return float(f"{value:.{digits}g}")


def _key(node: Any) -> str:
    return f"{node.hook}/{node.feature}" if node.kind == "feature" else ""


def _heads(circuit: Circuit, index: Mapping[str, int]) -> dict[str, list[tuple[str, float]]]:
    """What every head brought each node as the last one on the way, the largest first."""
    through = circuit.heads[circuit.heads.layer >= 0]
    sums = through.groupby(["target", "layer", "head"], as_index=False).weight.sum()
    sums = sums.sort_values("weight", key=abs, ascending=False)
    found: dict[str, list[tuple[str, float]]] = {}
    for row in sums.to_dict("records"):
        found.setdefault(str(index[row["target"]]), []).append((f"L{row['layer']}H{row['head']}", row["weight"]))
    return found


def _facts(circuit: Circuit) -> list[tuple[str, str]]:
    gap = f"{circuit.largest_relative_error:.1e}" + ("" if circuit.is_rounding else ", more than rounding")
    return [
        ("largest completeness error", gap if circuit.nodes.expanded.any() else "not checked"),
        ("nodes with any influence", f"{circuit.n_found:,}"),
        ("influence kept", f"{circuit.kept_share:.1%}"),
    ]


def _features_of(features: Features | None, node: Any) -> Any:
    """What is known of the SAE a node belongs to, given under its hook, its name, or a name that begins with that."""
    if features is None:
        return None
    label = f"{node.layer}-{node.point}"
    names = features.names if hasattr(features, "names") else list(features)
    fits = [name for name in names if name in (node.hook, label) or name.startswith(f"{label}-")]
    return features[fits[0]] if fits else None


def _dashboard(features: Any, feature: int, wordpiece: bool) -> dict[str, Any]:
    record: FeatureRecord | None = features.feature(feature) if hasattr(features, "feature") else None
    summary = record.summary if record is not None else features.summary(feature)
    effects = []
    if record is not None and record.promoted is not None and record.suppressed is not None:
        for title, found in (("Promotes", record.promoted), ("Suppresses", record.suppressed)):
            effects.append([title, [[visible(token), value] for token, value in found[:EFFECTS_SHOWN]]])
    return {
        "summary": f"{summary.density:.2%} of tokens",
        "examples": [
            {
                "tokens": [gap + text for gap, text in spaced(example.tokens, wordpiece)],
                "values": [float(f"{value:.4g}") for value in example.values],
                "focus": example.focus,
            }
            for example in summary.examples[:EXAMPLES_SHOWN]
        ],
        "effects": effects,
    }


# --- the sections -----------------------------------------------------------------------------------------------------


def _token_views(tokens: TokenAttribution) -> list[Content]:
    heads = tokens.head_frame(top=12)
    named = heads.assign(head=[f"L{row.layer}H{row.head}" for row in heads.itertuples()])
    labels = [*(f"{place} {visible(token)}" for place, token in enumerate(tokens.tokens)), "biases"]
    return [
        captioned(
            tokens.to_view(),
            f"The contribution of each token to {tokens.target} ({tokens.actual:+.4f}) through all layers; each of two "
            f"tokens gets half of their product. Biases contributed {tokens.bias:+.4f}. The completeness error is "
            f"{tokens.completeness_error:+.1e}, which is {tokens.relative_error:.1e} of the absolute parts.",
        ),
        details("As bars", SignedBars(labels, [*tokens.values.tolist(), tokens.bias], muted=1)),
        details(
            "What heads moved to the target's position",
            table(named[["head", "position", "token", "value"]], ["head", "from position", "token", "moved"]),
        ),
    ]


def _completeness(circuit: Circuit) -> list[Content]:
    frame = circuit.completeness.sort_values("relative_error", ascending=False)
    if frame.empty:
        return ["This was not checked: the graph comes from another tool, and bilens took none of its nodes apart."]
    kept = int((~circuit.nodes.kind.isin(["target", "bias", "other"])).sum())
    cause = f"rounding of the model's forward pass in {circuit.dtype or 'float32'}"
    verdict = cause if circuit.is_rounding else f"MORE than {cause} explains, so something is missing from this graph"
    return [
        f"{len(frame)} nodes were taken apart. The parts of each, what was pruned included, add up to its value; the "
        f"largest gap is {circuit.largest_relative_error:.1e} of the node's absolute parts (the median "
        f"{frame.relative_error.median():.1e}): {verdict}. Of the influence of all "
        f"{circuit.n_found:,} nodes with any, the {kept} kept ones have {circuit.kept_share:.1%}.",
        details(
            "The nodes with the largest gaps",
            table(frame.head(12), ["node", "value", "sum of parts", "relative completeness error"]),
        ),
    ]


def _checks(circuit: Circuit, faithfulness: Faithfulness | None, edges: Sequence[EdgeCheck]) -> list[Content]:
    contents: list[Content] = []
    if faithfulness is not None:
        shown = faithfulness.frame[~faithfulness.frame.kept.str.startswith("top")].drop(columns="nodes")
        contents += [
            "The model was run again with only parts of the circuit kept (the other features and errors set to zero or "
            "to their means), and with the circuit removed. With frozen attention this tests what was pruned; with "
            "real attention, whether the frozen picture holds for the model. The share recovered counts from nothing "
            "kept to everything kept; where those two are close, the values say more.",
            captioned(
                _curve(faithfulness), f"The value of {faithfulness.target} with the most influential nodes kept."
            ),
            table(shown, ["attention", "kept", "value", "share recovered"]),
        ]
    plots = []
    for check in edges:
        shown = check.frame
        if len(shown) > POINTS_SHOWN:
            largest = shown[["predicted", "measured"]].abs().max(axis=1).nlargest(POINTS_SHOWN).index
            shown = shown.loc[largest]
        correlation = ", ".join(f"{kind} {value:.4f}" for kind, value in check.correlation.items())
        caption = (
            f"Each edge's source is removed alone: this is the change that the edge's number predicts, and the change "
            f"that is measured with {check.attention} attention. Correlation: {correlation}."
        )
        if len(shown) < len(check.frame):
            caption += f" The largest {len(shown):,} of {len(check.frame):,} are shown."
        names = dict(zip(circuit.nodes.id, circuit.nodes.name, strict=True))
        plots.append(captioned(_edge_scatter(check.attention, shown, names), caption))
    return [*contents, columns(*plots)] if plots else contents


def _curve(faithfulness: Faithfulness) -> Chart:
    frame = faithfulness.frame
    curve = frame[frame.kept.str.startswith("top") | (frame.kept == "nothing")].sort_values("nodes")
    curves: dict[str, Any] = {
        f"{mode} attention": (rows.nodes.tolist(), rows.value.tolist())
        for mode, rows in curve.groupby("attention", sort=False)
    }
    ends = [curve.nodes.min(), curve.nodes.max()]
    curves["the whole model"] = (ends, [float(frame[frame.kept == "everything"].value.iloc[0])] * 2)
    return Chart("nodes kept", faithfulness.target, curves)


def _edge_scatter(attention: str, frame: pd.DataFrame, names: Mapping[str, str]) -> Chart:
    labels = [
        f"{names.get(row.source, row.source)} → {names.get(row.target, row.target)} ({row.kind})"
        for row in frame.itertuples()
    ]
    return Chart(
        "predicted change",
        f"measured change, {attention} attention",
        points=(frame.predicted.to_numpy(float), frame.measured.to_numpy(float)),
        labels=labels,
        diagonal=True,
    )
