"""The report: `FeatureCircuit`s laid out on one page, one feature a screen. Reads results, computes nothing.

All of it is plain markup, so that a page of many features is small and needs no script.
"""

import re
from collections.abc import Sequence

from bilens.decompose.explanation import ENOUGH, Explanation
from bilens.decompose.feature import N_CIRCUITS, FeatureCircuit
from bilens.decompose.sentences import READ, percent
from bilens.draw.markup import escape, spaced
from bilens.draw.page import Content, Html, Page, captioned, columns, details, table
from bilens.draw.signed_bars import ColoredMatrix, SignedBars
from bilens.draw.tokens import TokenStrip
from bilens.sae.features.examples import Example, FeatureSummary

PARTS_SHOWN = (7, 4)  # input features of the first and the second eigencircuit
SMALL = 0.05  # a second eigencircuit with a smaller share is folded away
PAIRS_SHOWN, EXAMPLES_SHOWN = 12, 4
BEFORE, AFTER = 44, 20  # characters of an example beside a bar


def feature_page(circuit: FeatureCircuit) -> Page:
    """The page of one feature."""
    return circuit_page([circuit])


def circuit_page(circuits: Sequence[FeatureCircuit], title: str = "bilens", subtitle: str = "", how: str = "") -> Page:
    """One page: for each feature why it fires, in a sentence and in pictures of its eigencircuits; the rest is folded.

    Args:
        circuits: the circuits to show, at least one.
        title, subtitle: the page's title and the line below it.
        how: how the features were chosen.
    """
    page = Page(title, subtitle)
    if how:
        page.add(how)
    for circuit in circuits:
        page.section(circuit.output_label, *_screen(circuit))
    page.add(details("How to read this page", HOW_TO_READ), _footer(circuits))
    return page


HOW_TO_READ = (
    "A bilinear MLP's output along a direction is an exact quadratic form of its input, and every quadratic form is a "
    "sum of squares: directions of the input, each with a weight. A feature fires because a few of these directions, "
    "its eigencircuits, are strong at this token. The projection on a direction is linear in the input, so it is a "
    "plain sum: a bar for each input feature, and what the SAE's b_dec and its error add. Two features that make one "
    "projection together meet in its square.\n\n"
    "Percentages are of what the layer writes along the feature: its pre-activation without the output SAE's own bias. "
    "They can pass 100 % where other directions take off. Each direction also splits over the positions of the text "
    "that it is read from, exactly, with attention patterns and the norm's scale as they are on this text. "
    "On a report the directions are those found where the feature fires in example texts: an exact sum of squares too, "
    "of which fewer are needed than of the eigenvectors of the weights alone.\n\n"
    "Features are named by their index and what they fire on. In examples, colour is how strongly the feature fires."
)


def _screen(circuit: FeatureCircuit) -> list[Content]:
    """What one screen shows of a feature, and the folds under it."""
    a, told, wordpiece = circuit.attribution, circuit.explanation, circuit.wordpiece
    note = f'<p class="note">{escape(circuit.note)}</p>' if circuit.note else ""
    text = TokenStrip(circuit.tokens, circuit.output_activations, a.position, wordpiece=wordpiece)
    state = "fires" if a.active else "does not fire"
    caption = (
        f"The feature of layer {a.layer} {state} at the outlined token, with a pre-activation of {a.actual:.2f}. "
        f"It promotes {', '.join(f'“{token}”' for token, _ in circuit.promoted[:4])}."
    )
    left = captioned(text, caption)
    contents: list[Content] = [Html(f'{note}<p class="sentence">{emphasised(told.sentence)}</p>')]
    if circuit.output_summary is None:
        contents.append(left)
    else:
        contents.append(columns(left, captioned(_strips(circuit.output_summary, wordpiece, 3), "Where else it fires.")))
    folds = "".join(fold.html() for fold in _folds(circuit))
    return [*contents, *eigencircuits(circuit, wordpiece), Html(f'<div class="folds">{folds}</div>')]


def eigencircuits(circuit: FeatureCircuit, wordpiece: bool) -> list[Content]:
    """The first eigencircuits, each as the input features that make it, with an example of every one."""
    contents: list[Content] = []
    for rank in range(min(N_CIRCUITS, len(circuit.explanation.values))):
        drawn = _eigencircuit(circuit, rank, wordpiece)
        heading = _heading(circuit.explanation, rank)
        if rank and abs(circuit.explanation.shares[rank].item()) < SMALL:
            contents.append(Html(f'<div class="folds">{details(heading, drawn).html()}</div>'))
        else:
            contents.append(Html(f'<section class="eigencircuit"><h3>{escape(heading)}</h3>{drawn.html()}</section>'))
    return contents


def _heading(told: Explanation, rank: int) -> str:
    share, value = told.shares[rank].item(), told.contributions[rank].item()
    does = "gives" if value >= 0 else "takes off"
    return f"Direction {rank + 1} {does} {percent(abs(share))} ({value:+.2f})"


def _eigencircuit(circuit: FeatureCircuit, rank: int, wordpiece: bool) -> Html:
    told, shown = circuit.explanation, PARTS_SHOWN[min(rank, len(PARTS_SHOWN) - 1)]
    frame = told.part_frame(rank)
    features = frame[frame.part == "feature"]
    rows = [
        (row.name_, row.value, row.i) for row in features.head(shown).rename(columns={"name": "name_"}).itertuples()
    ]
    beside = [_example(circuit.input_summaries.get(i), wordpiece) for _, _, i in rows]
    rest = features[shown:]
    sums = [(f"{len(rest)} other features", float(rest.value.sum()))] if len(rest) else []
    sums.append(("b_dec and SAE error", float(frame.value[frame.part != "feature"].sum())))
    bars = SignedBars(
        [*(name for name, _, _ in rows), *(name for name, _ in sums)],
        [*(value for _, value, _ in rows), *(value for _, value in sums)],
        [*beside, *(None for _ in sums)],
        muted=len(sums),
    )
    strip = ""
    if told.reads is not None and rank < len(told.reads):
        reads = told.reads[rank]
        where = _largest(circuit.tokens, (reads / told.projections[rank]).tolist())
        view = TokenStrip(circuit.tokens[: len(reads)], reads, wordpiece=wordpiece)
        strip = captioned(view, f"Where this direction reads the text: {where}.").html()
    return Html(f"{strip}{bars.html()}")


def _largest(tokens: Sequence[str], shares: Sequence[float]) -> str:
    """The positions that make most of a projection."""
    order = sorted(range(len(shares)), key=lambda place: -shares[place])[:4]
    return ", ".join(f"“{tokens[place]}” {percent(shares[place])}" for place in order if shares[place] > READ / 2)


def _example(summary: FeatureSummary | None, wordpiece: bool) -> TokenStrip | None:
    """The strongest example of a feature, as much of it as fits beside a bar."""
    if summary is None or not summary.examples:
        return None
    example = summary.examples[0]
    lengths = [len(gap) + len(text) for gap, text in spaced(example.tokens, wordpiece)]
    first, last = example.focus, example.focus
    while first > 0 and sum(lengths[first - 1 : example.focus + 1]) <= BEFORE:
        first -= 1
    while last + 1 < len(lengths) and sum(lengths[example.focus + 1 : last + 2]) <= AFTER:
        last += 1
    here = slice(first, last + 1)
    return TokenStrip(example.tokens[here], example.values[here], example.focus - first, wordpiece=wordpiece)


def _folds(circuit: FeatureCircuit) -> list[Html]:
    a, told, wordpiece = circuit.attribution, circuit.explanation, circuit.wordpiece
    names = [circuit.input_label(i) for i in circuit.shown]
    labels, values = told.bars(8)
    frame = told.to_frame().drop(columns="eigenvalue").head(12)
    folds = [
        details(
            f"All directions: {told.needed()} of {len(told.values)} give {percent(ENOUGH)}",
            captioned(SignedBars(labels, values), "All of these add up to the pre-activation."),
            table(frame),
        )
    ]
    labels, values = a.pair_bars(PAIRS_SHOWN)
    folds.append(
        details(
            f"By pairs of input features: {a.pairs_needed()} give {percent(ENOUGH)}",
            captioned(
                SignedBars(labels, values),
                "The same pre-activation, multiplied out: pairs of input features, the output SAE's bias with those of "
                "b_dec, and what the input SAE misses.",
            ),
            table([[group, value] for group, value in a.groups.items() if value], ["group", "sum"]),
            captioned(
                ColoredMatrix(circuit.interactions, names),
                "The interaction matrix between the features shown, from the weights alone. Off the diagonal each "
                "number counts twice.",
            ),
        )
    )
    if circuit.output_summary is not None:
        folds.append(
            details(
                f"More on what {a.feature} fires on, and what it promotes",
                _strips(circuit.output_summary, wordpiece, len(circuit.output_summary.examples)),
                columns(_effects("promotes", circuit.promoted), _effects("suppresses", circuit.suppressed)),
            )
        )
    if circuit.input_summaries:
        examples = [
            Html(f"<h4>{escape(s.label)}</h4>{_strips(s, wordpiece, EXAMPLES_SHOWN).html()}")
            for s in circuit.input_summaries.values()
        ]
        folds.append(details("More examples of the input features", *examples, printed=False))
    return folds


def _footer(circuits: Sequence[FeatureCircuit]) -> Html:
    """How exactly the parts add up."""
    lines = []
    for circuit in circuits:
        a, told = circuit.attribution, circuit.explanation
        words = "rounding" if told.is_rounding and a.is_rounding else "more than rounding explains"
        lines.append(
            f"<li>{a.feature}: pre-activation {a.actual:.5f}; circuits {told.total:.5f} ({told.relative_error:.0e} of "
            f"the absolute parts), pairs {a.total:.5f} ({a.relative_error:.0e}): {words}.</li>"
        )
    return Html(
        '<footer class="completeness"><p>Nothing is approximated and nothing left out: the parts of every feature add '
        f"up to the pre-activation that the model computes.</p><ul>{''.join(lines)}</ul></footer>"
    )


def emphasised(sentence: str) -> str:
    """A sentence's markup: names stand between asterisks."""
    return re.sub(r"\*([^*]+)\*", r"<em>\1</em>", escape(sentence))


def _strips(summary: FeatureSummary, wordpiece: bool, n: int) -> Html:
    examples: Sequence[Example] = summary.examples[:n]
    if not examples:
        return Html("<p>It fires nowhere in the example texts.</p>")
    strongest = max(abs(value) for example in examples for value in example.values)
    return Html("".join(TokenStrip(e.tokens, e.values, e.focus, strongest, wordpiece).html() for e in examples))


def _effects(title: str, effects: list[tuple[str, float]]) -> Html:
    return table([[token, value] for token, value in effects], [title, "effect on its logit"])
