"""The graph page: its numbers are the circuit's, nothing in it escapes or is fetched, and clicking through it works."""

import html
import itertools
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from bilens.attribute import Circuit, Target, attribute_tokens, check_circuit, check_edges, freeze
from bilens.attribute.circuit import trace_circuit
from bilens.attribute.paths import Paths
from bilens.draw.markup import ViewError, visible
from bilens.draw.page import details
from bilens.errors import OutOfRangeError
from bilens.pages.graph import GraphView, graph_page
from bilens.sae.features.examples import FeatureActivations
from bilens.sae.features.store import Context, FeatureRecord, FiringToken
from tests.conftest import make_model
from tests.random_saes import make_sae

TOKENS = torch.tensor([1, 17, 42, 8, 42, 3])
ATTACK = "</script><img src=x onerror=\"document.title='PWNED'\">"


@pytest.fixture(scope="module")
def traced():
    """The forward pass, target and circuit of a logit of a random model."""
    model = make_model(n_layer=2, seed=3)
    points = itertools.product(range(2), ("ln2.hook_normalized", "hook_mlp_out"))
    saes = [make_sae(hook=f"blocks.{layer}.{point}", seed=n) for n, (layer, point) in enumerate(points)]
    frozen = freeze(model, TOKENS, saes)
    target = Target.logit(7)
    return frozen, target, trace_circuit(frozen, target, max_nodes=40, node_threshold=0.9, mlps="pairs")


@pytest.fixture(scope="module")
def circuit(traced) -> Circuit:
    """The same with hostile tokens and names."""
    found = traced[2]
    tokens = [ATTACK, "&lt;", "\u2028", "a\nb", "{{x}}", "\u202eabc"]
    nodes = found.nodes.copy()
    nodes["token"] = [tokens[position] if position >= 0 else "" for position in nodes.position]
    nodes["name"] = [f"{ATTACK} {name}" for name in nodes.name]
    return replace(found, tokens=tokens, nodes=nodes, target=ATTACK, predicted={ATTACK: 0.5, "b": 0.06}, supernodes=[])


def activations(d_sae: int) -> FeatureActivations:
    """Every feature fires once, on the hostile token."""
    n = torch.arange(d_sae)
    tokens = torch.tensor([[1, 0, 2]])
    return FeatureActivations(
        tokens, torch.ones_like(tokens), [ATTACK, "b", "c"], n * 0, n * 0 + 1, n + 1.0, torch.arange(d_sae + 1)
    )


@pytest.fixture(scope="module")
def features(traced):
    return {f"{sae.layer}-{sae.point}-x2-k4": activations(sae.view.d_sae) for sae in traced[0].saes.values()}


def test_the_numbers_on_the_page_are_the_circuits(circuit, read):
    (data,) = read(GraphView(circuit).html()).data
    shown = json.loads(data)
    ids = [node["id"] for node in shown["nodes"]]
    assert ids == circuit.nodes.id.tolist()
    assert [node["value"] for node in shown["nodes"]] == circuit.nodes.value.tolist()
    # Weights are written to ten digits.
    edges = {(ids[s], ids[t]): w for s, t, w, *_ in shown["edges"]}
    assert edges == pytest.approx(circuit.edges.set_index(["source", "target"]).weight.to_dict(), rel=1e-9)
    pairs = {(ids[i], ids[j], ids[t]): w for i, j, t, w, _ in shown["pairs"]}
    assert pairs == pytest.approx(circuit.hyperedges.set_index(["i", "j", "target"]).weight.to_dict(), rel=1e-9)
    heads = {(ids[int(t)], head): w for t, found in shown["heads"].items() for head, w in found}
    through = circuit.heads[circuit.heads.layer >= 0]
    sums = through.groupby(["target", "layer", "head"]).weight.sum().items()
    assert heads == pytest.approx({(t, f"L{layer}H{head}"): w for (t, layer, head), w in sums})


def test_what_goes_into_a_node_still_adds_up(circuit, read):
    shown = GraphView(circuit).data()
    for index, node in enumerate(shown["nodes"]):
        if node["expanded"]:
            parts = [e[2] for e in shown["edges"] if e[1] == index] + [p[3] for p in shown["pairs"] if p[2] == index]
            # float32 rounding of the model's forward pass, relative to the absolute parts
            assert abs(sum(parts) - node["value"]) <= 1e-5 * sum(map(abs, parts))


def test_hostile_names_stay_text_and_nothing_is_fetched(circuit, features, read):
    page = read(graph_page(circuit, features=features).to_html())
    assert not page.tags("img")
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    for _, attributes in page.elements:
        assert "src" not in attributes
        assert (attributes.get("href") or "#").startswith(("#", "data:"))
    assert len(page.code) == 2  # graph.js and mount.js
    addresses = {url for code in page.code for url in re.findall(r"https?://[^\s\"']+", code)}
    assert addresses == {"http://www.w3.org/2000/svg"}  # a namespace
    assert page.text.count(ATTACK) >= 2


def test_the_page_stays_small_and_is_the_same_each_time(traced, features):
    frozen, target, circuit = traced

    def whole() -> str:
        return circuit.to_page(
            features=features,
            tokens=attribute_tokens(frozen, target),
            faithfulness=check_circuit(frozen, circuit, target),
            edges=[check_edges(frozen, circuit, target)],
        ).to_html()

    text = whole()
    assert len(text.encode()) < 4e6
    assert text == whole()
    for heading in ("Tokens behind the target", "Does it add up?", "Checked by intervention"):
        assert f">{heading}</a>" in text
    # In a notebook: the graph alone, without the plots' and tokens' scripts.
    assert circuit._repr_html_().startswith("<iframe srcdoc=")
    assert len(circuit._repr_html_()) < 1e6


def test_rows_are_the_layers_from_the_tokens_up(circuit):
    data = GraphView(circuit).data()
    assert data["rows"] == ["tokens", "L0 MLP in", "L0 MLP out", "L1 MLP in", "L1 MLP out", "target"]
    for node, row in zip(data["nodes"], circuit.nodes.itertuples(), strict=True):
        if row.kind == "feature":
            assert data["rows"][node["row"]] == f"L{row.layer} {'MLP in' if row.point == 'mlp-in' else 'MLP out'}"


def test_eigencircuits_stand_between_an_mlps_input_and_output(traced):
    frozen, target, _ = traced
    data = GraphView(trace_circuit(frozen, target, max_nodes=40)).data()
    rows = {node["id"]: node["row"] for node in data["nodes"]}
    found = [node for node in data["nodes"] if node["kind"] == "eigencircuit"]
    assert found
    assert {data["rows"][node["row"]] for node in found} <= {"L0 eigencircuits", "L1 eigencircuits"}
    for node in found:
        rank, owner = re.fullmatch(
            r"(?:eigencircuit (\d+)|other eigencircuits) of (.*)", node["where"].split(",")[0]
        ).groups()
        at = node["id"].split("@")[1]
        assert node["id"] == f"{owner}.{rank or 'rest'}@{at}"
        assert rows[f"{owner}@{at}"] > node["row"]
    assert not data["pairs"]


def test_merged_circuits_have_one_column(traced):
    data = GraphView(traced[2].merged()).data()
    assert {node["position"] for node in data["nodes"]} == {-1}


def test_dashboards_come_from_whatever_is_known(circuit, features, traced):
    data = GraphView(circuit, features).data()
    keys = {node["key"] for node in data["nodes"] if node["kind"] == "feature"}
    assert data["features"].keys() == keys
    assert all(f["examples"][0]["tokens"][f["examples"][0]["focus"]] == ATTACK for f in data["features"].values())
    hook = next(iter(traced[0].saes))
    only = GraphView(circuit, {hook: next(iter(features.values()))}).data()["features"]
    assert only.keys() == {key for key in keys if key.startswith(f"{hook}/")}


def test_a_stores_records_bring_promoted_tokens(circuit):
    context = Context(["a", ATTACK], [0.0, 1.0], 1, 3, 7, math.nan)
    record = FeatureRecord(
        sae="0-mlp-out",
        hook_name="blocks.0.hook_mlp_out",
        feature=12,
        label="12",
        n_tokens=1000,
        fired=5,
        mean=0.01,
        mean_active=1.5,
        maximum=3.25,
        histogram=np.array([5]),
        edges=np.array([1.0, 2.0]),
        top=(context,) * 20,
        random=(),
        tokens=(FiringToken(ATTACK, 5, 1.0, 0.5),),
        tokens_exact=True,
        promoted=((ATTACK, 0.5),) * 20,
        suppressed=(("b", -0.25),),
        wordpiece=False,
    )
    store = {"0-mlp-out": SimpleNamespace(feature=lambda index: record)}
    shown = next(iter(GraphView(circuit, store).data()["features"].values()))
    assert shown["effects"] == [["Promotes", [[ATTACK, 0.5]] * 8], ["Suppresses", [["b", -0.25]]]]
    assert shown["summary"] == "0.50% of tokens"
    assert shown["examples"] == [{"tokens": ["a", ATTACK], "values": [0.0, 1.0], "focus": 1}] * 6


def test_what_cannot_be_drawn_is_refused(circuit, traced):
    edges = circuit.edges.copy()
    edges.loc[0, "weight"] = np.nan
    with pytest.raises(ViewError, match=r"edges \{.*'weight': nan.*only finite numbers can be drawn"):
        GraphView(replace(circuit, edges=edges))
    hook = circuit.nodes[circuit.nodes.kind == "feature"].hook.iloc[0]
    with pytest.raises(OutOfRangeError, match="is outside the SAE's 1"):
        GraphView(circuit, {hook: activations(1)}).html()


# --- in a browser -----------------------------------------------------------------------------------------------------

CLICK_THROUGH = Path(__file__).with_name("click_through.js")


@pytest.fixture(scope="module")
def opened(circuit) -> list[str]:
    """A feature made of pairs, last; and one that is not."""
    features = circuit.nodes[circuit.nodes.expanded & (circuit.nodes.kind == "feature")]
    return [features[features.point == point].id.iloc[0] for point in ("mlp-in", "mlp-out")]


@pytest.fixture(scope="module")
def seen(circuit, features, opened, tmp_path_factory, dump):
    folder = tmp_path_factory.mktemp("graph")
    page = graph_page(circuit, features=features, title="untouched")
    page.add(details("folded", "text"), details("examples", "many", printed=False))
    path = page.save(folder / "page.html")
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", path.read_text(encoding="utf-8"))
    facts = f"const OPENED = {json.dumps(opened)}, SEARCHED = 'FEATURE {opened[0].split('/')[1].split('@')[0]},';"
    path.write_text(
        text.replace("</body>", f"<script>{facts}{CLICK_THROUGH.read_text()}</script></body>"), encoding="utf-8"
    )
    after = dump(path, '<pre id="seen">')
    found = json.loads(html.unescape(re.search(r'<pre id="seen">(.*?)</pre>', after, re.DOTALL)[1]))
    assert "error" not in found, found["error"]
    return found | {"after": after}


def test_clicking_a_node_opens_what_it_is_made_of(seen, circuit, opened):
    assert seen["start"] == ATTACK
    nodes = circuit.nodes.set_index("id")
    for name in opened:
        panel = seen["panels"][name]
        assert panel["heading"] == nodes.name[name]
        assert panel["open"] == [name]
        assert panel["strips"] == 1
        into = [*circuit.edges[circuit.edges.target == name].weight]
        into += [*circuit.hyperedges[circuit.hyperedges.target == name].weight]
        assert panel["weights"] == pytest.approx(sorted(into, key=abs, reverse=True), rel=1e-9)


def test_pairs_light_both_partners_and_fold_evenly(seen, circuit, opened):
    partners, near = seen["partners"]
    assert set(partners) <= set(near)
    folded = circuit.folded_edges()
    expected = sorted(folded[folded.target == opened[-1]].weight, key=abs, reverse=True)
    assert seen["folded"] == pytest.approx(expected, rel=1e-8)


def test_the_first_lines_say_what_matters(seen, circuit):
    assert f"{ATTACK} " in seen["headline"]
    assert re.search(r"For it: .*Against it: .*SAE errors [+−]?\d.*, pruned parts [+−]?\d", seen["headline"])
    for token, chance in circuit.predicted.items():
        assert f"{token} {100 * chance:.{1 if chance < 0.1 else 0}f} %" in seen["headline"]


def test_nodes_are_pinned_renamed_and_grouped_in_the_address(seen, circuit, opened):
    (first, pinned), (_, both) = seen["edits"]
    assert (first, pinned, set(both)) == ("unpin", opened[:1], set(opened))
    assert seen["renamed"][0] == "<b>mine"
    assert seen["renamed"][1].startswith("<b>mine (")
    heading, members, alone, weights = seen["grouped"]
    assert (set(members), alone) == (set(opened), [])
    edited = circuit.edited(f"file:///page.html{seen['hash']}")
    assert edited.supernodes == [[heading, *opened]]
    assert edited.nodes.set_index("id").name[opened[1]] == "<b>mine"
    # What goes into the group is what goes into its members, but for what they give each other.
    into = circuit.hyperedges[circuit.hyperedges.target.isin(opened) & ~circuit.hyperedges.i.isin(opened)]
    into = pd.concat([into[~into.j.isin(opened)], circuit.edges[circuit.edges.target.isin(opened)]])
    assert sum(weights) == pytest.approx(into.weight.sum())
    assert set(seen["ungrouped"]) == set(opened)
    assert "pins" not in seen["undone"][0]
    assert not seen["undone"][1].startswith("<b>mine")
    assert seen["svg"] == "<x>"


def test_the_slider_says_what_it_shows(seen, circuit):
    """Where the influence ends is what `Paths` says of the same nodes, and adds up to all of it."""
    paths = Paths.of(circuit)
    order = paths.choose(200)
    inner = (~circuit.nodes.kind.isin(["target", "bias", "other"])).sum()
    for (told, drawn, status, parts), n in zip(seen["shares"], (1, 5, len(order)), strict=True):
        assert told == ("1 node" if n == 1 else f"{n} nodes")
        assert drawn == n + 1
        assert f"{n} of {inner} nodes are shown, paths best first" in status
        shown = circuit.nodes.id.isin({"target", *circuit.nodes.id.iloc[order[:n]]}).to_numpy()
        ends = paths.ends(shown)
        values = {name: float(share) for name, share, _ in (part.rsplit(" ", 2) for part in parts)}
        tokens = circuit.nodes.kind.eq("embedding") | circuit.nodes.id.eq("other tokens")
        assert values.get("tokens", 0.0) == pytest.approx(100 * ends[tokens].sum(), abs=0.1)
        assert sum(values.values()) == pytest.approx(100, abs=0.3)
        hidden = next(part for part in parts if part.startswith("not shown ")).removeprefix("not shown ")
        assert f"{hidden} leads to nodes that are not shown" in status


def test_the_target_stays_in_view_where_the_graph_gets_wider(seen):
    beyond, place, room = seen["narrow"]
    assert beyond > 0
    assert 0 <= place <= room


def test_printed_graphs_name_their_tokens(seen, circuit):
    """Over the canvas, which is opaque on paper; what is folded is unfolded, but not what a paper has no room for."""
    names, scrolled, unfolded, folded = seen["printed"]
    assert len(names) == len(circuit.tokens)
    for token, name in zip(circuit.tokens, names, strict=True):
        assert visible(token).startswith(name.removesuffix("…"))
    assert scrolled == 0
    assert (unfolded, folded) == (2, 1)


def test_the_keyboard_reaches_everything(seen, circuit):
    (first, _), (second, _), (third, heading) = seen["walk"]
    nodes = circuit.nodes.set_index("id")
    assert len({"target", first, second}) == 3
    assert third == second
    assert heading == nodes.name[second]
    assert seen["escaped"] == [second, ATTACK, 0]
    assert seen["stops"] == 1  # Tab enters the graph once and leaves it again
    assert seen["slash"]


def test_search_marks_the_nodes_and_opens_them(seen, circuit, opened):
    feature = int(opened[0].split("/")[1].split("@")[0])
    expected = circuit.nodes[circuit.nodes.feature.eq(feature) & circuit.nodes.kind.eq("feature")].id.tolist()
    found, status = seen["found"]
    assert set(found) == set(expected)
    assert re.search(rf"{len(expected)} nodes? match(es)? “", status)
    assert f"feature {feature}," in seen["searched"]
    assert seen["cleared"] == ["", 0]


def test_hovering_an_edge_tells_its_number(seen, circuit):
    weights = [*circuit.edges.weight, *circuit.hyperedges.weight]
    told = float(re.match(r"[+−]?[\d.]+(?:e[+-]?\d+)?", seen["edge"].replace("e−", "e-"))[0].replace("−", "-"))
    assert min(abs(weight - told) for weight in weights) <= 1e-3 * abs(told)  # four digits are shown
    assert "influence on the target" in seen["edge"]


def test_the_theme_can_be_changed_and_biases_shown(seen, circuit):
    before, dark, color, light = seen["theme"]
    assert (dark, light) == ("dark", "light")
    assert color != before
    assert set(circuit.nodes[circuit.nodes.kind == "bias"].id) & set(seen["rest"])


def test_hostile_names_run_nothing(seen, circuit, read):
    page = read(seen["after"])
    assert "<title>untouched</title>" in seen["after"]
    assert not page.tags("img")
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    for label, name in zip(seen["names"], circuit.nodes.name, strict=True):
        assert name.startswith(ATTACK)
        assert label.startswith(visible(name))


def test_the_graph_is_drawn_under_its_own_security_policy(circuit, tmp_path, dump):
    after = dump(GraphView(circuit).to_page().save(tmp_path / "page.html"), 'role="button"')
    assert after.count('role="button"') >= len(circuit.nodes)
