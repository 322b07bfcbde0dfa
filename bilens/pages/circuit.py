"""The report: `FeatureCircuit`s laid out on one page. Reads results, computes nothing."""

from collections.abc import Iterable, Sequence
from typing import Literal

from bilens.decompose.feature import FeatureCircuit
from bilens.draw.circuits import AttentionPatterns, ColoredTokens, ColoredTokensMulti
from bilens.draw.page import Content, Html, Page, captioned, columns, details, table
from bilens.draw.plots import bars, heatmap, spectrum
from bilens.draw.tokens import TokenStrip
from bilens.sae.features.examples import FeatureSummary

LONGEST_ATTENTION = 96  # tokens; the maps of longer texts are unreadable and large
PAIRS_SHOWN = 12


def feature_page(circuit: FeatureCircuit) -> Page:
    """The page of one feature."""
    return circuit_page([circuit])


def circuit_page(circuits: Sequence[FeatureCircuit], title: str = "bilens", subtitle: str = "") -> Page:
    """One page: an overview, then each circuit with its text, pairs, matrix, spectrum, eigencircuits and examples.

    Args:
        circuits: the circuits to show, at least one.
        title, subtitle: the page's title and the line below it.
    """
    page = Page(title, subtitle)
    page.section("Overview", HOW_TO_READ, _overview(circuits))
    for circuit in circuits:
        for level, heading, contents in _sections(circuit):
            page.section(heading, *contents, level=level)
    return page


HOW_TO_READ = (
    "Each section takes one output feature of a bilinear MLP and says which pairs of input features make it fire. "
    "The layer's output along a direction is an exact quadratic form of its input, so every number here is read from "
    "the weights and one forward pass; nothing is approximated. A pair (i, j) contributes its interaction strength "
    "times the two activations, and all pairs, biases and the SAE's error add up to the feature's pre-activation: the "
    "completeness error says how exactly. Features are named by their index and the tokens they fire on most."
)


def _overview(circuits: Iterable[FeatureCircuit]) -> Html:
    rows = []
    for circuit in circuits:
        a = circuit.attribution
        pairs = circuit.to_frame()
        top = pairs.iloc[0] if len(pairs) else None
        rows.append(
            [
                circuit.output_label,
                a.layer,
                a.tokens[a.position],
                a.actual,
                "" if top is None else _pair(top.i_name, top.j_name),
                None if top is None else float(top.contribution),
                f"{a.completeness_error:+.1e} ({a.relative_error:.0e})",
            ]
        )
    header = ["output feature", "layer", "at token", "pre-activation", "largest pair", "its part", "completeness error"]
    return table(rows, header)


def _sections(circuit: FeatureCircuit) -> list[tuple[Literal[2, 3], str, list[Content]]]:
    a = circuit.attribution
    wordpiece = circuit.wordpiece
    labels = [circuit.input_label(i) for i in circuit.shown]
    where = f"token {a.position}, “{a.tokens[a.position]}”"
    state = "fires" if a.active else "does not fire (it is below the top k)"
    intro = (
        f"On this text the feature {state} at {where}: its pre-activation there is {a.actual:.4f}. Its parts add up to "
        f"{a.total:.4f}; the completeness error is {a.completeness_error:+.2e}, {a.relative_error:.1e} of the absolute "
        f"parts."
    )
    first: list[Content] = [
        intro,
        captioned(
            ColoredTokens(circuit.tokens, circuit.output_activations, wordpiece=wordpiece),
            f"The activation of output feature {circuit.output_label} on the text.",
        ),
    ]
    if circuit.output_summary is not None:
        first.append(
            details(
                "Top-activating examples of the output feature", _examples(circuit.output_summary, wordpiece), open=True
            )
        )
    first.append(
        columns(
            _effects("Tokens it promotes", circuit.promoted),
            _effects("Tokens it suppresses", circuit.suppressed),
        )
    )
    pairs: list[Content] = [
        captioned(
            _pair_bars(circuit),
            f"These parts add up to the pre-activation at {where}: the largest pairs come first, then everything else.",
        ),
        captioned(
            ColoredTokensMulti(circuit.tokens, circuit.input_activations, labels, wordpiece=wordpiece),
            "The activation of the input features on the text. Choose one.",
        ),
        details("All groups of parts", table([[k, v] for k, v in a.groups.items()], ["group", "sum"])),
        details("The largest pairs as numbers", circuit.to_frame().head(25)),
    ]
    matrix: list[Content] = [
        captioned(
            heatmap(circuit.interactions, labels, labels, row_title="input feature", col_title="input feature"),
            "Interaction matrix between these input features, from the weights alone. Off the diagonal each number "
            "counts twice, once for either order.",
        )
    ]
    if circuit.input_summaries:
        shown = [circuit.input_summaries[i] for i in circuit.shown if i in circuit.input_summaries]
        matrix.append("What the input features fire on:")
        matrix += [details(f"Input feature {s.label}", _examples(s, wordpiece), printed=False) for s in shown]
    eigen: list[Content] = [
        captioned(
            spectrum(circuit.spectrum),
            "The eigenvalues of the interaction matrix by absolute value. Few large ones mean a simple circuit.",
        ),
        *eigencircuits(circuit, wordpiece),
    ]
    sections: list[tuple[Literal[2, 3], str, list[Content]]] = [
        (2, f"Output feature {circuit.output_label}", first),
        (3, f"Pairs that build {a.feature}", pairs),
        (3, f"Interactions of {a.feature}", matrix),
        (3, f"Eigencircuits of {a.feature}", eigen),
    ]
    if len(circuit.tokens) <= LONGEST_ATTENTION:
        names = [f"L{a.layer}H{head}" for head in range(len(circuit.attention))]
        view = AttentionPatterns(circuit.tokens, circuit.attention, names, wordpiece=wordpiece)
        sections[-1][2].append(details(f"Attention of layer {a.layer}: where its heads look on this text", view))
    return sections


def _pair_bars(circuit: FeatureCircuit) -> Content:
    pairs = circuit.to_frame()
    head, rest = pairs.head(PAIRS_SHOWN), pairs.iloc[PAIRS_SHOWN:]
    parts = [(_pair(row.i_name, row.j_name), float(row.contribution)) for row in head.itertuples()]
    if len(rest):
        parts.append((f"{len(rest)} other pairs", float(rest.contribution.sum())))
    parts += [(k, v) for k, v in circuit.attribution.groups.items() if "interactions" not in k and v != 0.0]
    return bars([label for label, _ in parts], [value for _, value in parts], value_title="part of the pre-activation")


def _pair(i: str, j: str) -> str:
    return f"{i} ²" if i == j else f"{i} × {j}"


def eigencircuits(circuit: FeatureCircuit, wordpiece: bool) -> list[Content]:
    """Its leading eigencircuits, each on the text and in input features, folded away."""
    frame = circuit.eigen.in_features(top=6)
    contents: list[Content] = []
    for rank, value in enumerate(circuit.eigen.values.tolist()):
        read = frame[frame["rank"] == rank]
        rows = [[name, cosine] for name, cosine in zip(read["name"], read["cosine"], strict=True)]
        text = captioned(
            ColoredTokens(circuit.tokens, circuit.eigen_activations[:, rank], wordpiece=wordpiece),
            f"Eigencircuit {rank + 1}, eigenvalue {value:+.4f}: its activation λ (v·x)² on the text.",
        )
        seen: list[Content] = [text, table(rows, ["input feature", "cosine with the eigenvector"])]
        summaries = [circuit.input_summaries[i] for i in read["i"] if i in circuit.input_summaries]
        seen += [details(f"Input feature {s.label}", _examples(s, wordpiece), printed=False) for s in summaries]
        contents.append(details(f"Eigencircuit {rank + 1} (λ = {value:+.4f})", *seen, open=rank < 2))
    return contents


def _examples(summary: FeatureSummary, wordpiece: bool) -> Html:
    if not summary.examples:
        return Html("<p>It fires nowhere in the example texts.</p>")
    strongest = max(abs(value) for example in summary.examples for value in example.values)
    strips = (TokenStrip(e.tokens, e.values, e.focus, strongest, wordpiece).html() for e in summary.examples)
    return Html(f"<p>Fires on {summary.density:.2%} of tokens.</p>{''.join(strips)}")


def _effects(title: str, effects: list[tuple[str, float]]) -> Html:
    return table([[token, value] for token, value in effects], [title, "effect on its logit"])
