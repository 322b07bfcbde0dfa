"""The gallery of motifs as a page: how many there are, then each with its truth table, its plane and its texts.

Planes are plain SVG, so that a page of dozens of them stays small, opens at once and prints.
"""

from dataclasses import dataclass

import numpy as np

from bilens.decompose.gallery import CASES, FLOOR, GalleryEntry, MotifGallery, formula
from bilens.decompose.motifs import MOTIFS
from bilens.draw.markup import NEGATIVE, POSITIVE, escape, full_scale, numbers
from bilens.draw.page import Html, Page, View, columns, details, table
from bilens.draw.tokens import TokenStrip

HOW_TO_READ = (
    "A bilinear layer multiplies, so its weights say whether two input features together do something to an output "
    "feature that neither does alone. Each entry is such a pair. Its truth table is given twice. The first is read "
    "from the weights, for the pair alone at the features' typical activations. The second is measured on texts: "
    "the output's mean pre-activation with neither, one or both of them active. An entry is here if the pair fires "
    "together, and if both tables and the share of tokens on which the output fires show the motif. Its strength is "
    "the least of the two gaps and of what the pair itself adds or takes away, in units of the output's typical "
    "activation.\n\n"
    "The measured table includes everything that comes along when the pair is active. What the pair itself adds is "
    "its cross term, which is exact on every token. It is the first number beside each text and the colour of the "
    "tokens (blue adds, red takes away); the second number is the whole pre-activation there. Each plane shows a "
    "sample of tokens by the layer's input along the two features' directions. A point is blue if the output's "
    "pre-activation is above zero and red if it is below, and it is outlined if both features are active.\n\n"
    "Features that fire on more than a tenth of all tokens are left out: they go with everything."
)
HEADINGS = {
    "and": ("AND", "Two features together drive the output, and neither does alone."),
    "xor": ("XOR", "Either feature drives the output, but both together do not."),
    "negation": ("AND NOT", "The first feature drives the output unless the second is there."),
    "inhibition": ("Inhibition", "Two features that do little alone hold the output down together."),
}
WIDTH, HEIGHT, MARGIN, EDGE, RADIUS = 330, 250, 24, 6, 3  # of a plane; margins left and below, edges right and above
MOST_ALIKE = 8


def gallery_page(gallery: MotifGallery, title: str = "Motifs read from the weights", subtitle: str = "") -> Page:
    """The page.

    Args:
        gallery: the motifs that were found.
        title, subtitle: the page's title and the line below it.
    """
    page = Page(title, subtitle)
    page.section("How many", HOW_TO_READ, *_overview(gallery))
    for kind in MOTIFS:
        heading, meaning = HEADINGS[kind]
        entries = [entry for entry in gallery.entries if entry.kind == kind]
        page.section(heading, meaning if entries else f"{meaning} None holds on these texts.")
        for entry in entries:
            line = formula(kind, *map(_short, (entry.output_name, entry.i_name, entry.j_name)))
            page.section(f"{line} (layer {entry.layer})", *_entry(entry, gallery.wordpiece), level=3)
    return page


def _short(name: str) -> str:
    """The index and the tokens, apart: `1333 “happy”`."""
    index, _, tokens = name.partition(" ")
    return f"{index} “{tokens}”" if tokens else index


def _overview(gallery: MotifGallery) -> list[Html]:
    counts = gallery.counts
    layers = sorted(set(counts.layer))
    families = counts.set_index(["layer", "kind"]).families
    rows = [[layer, *(int(families[layer, kind]) for kind in MOTIFS)] for layer in layers]
    rows.append(["all", *(sum(row[place] for row in rows) for place in range(1, 1 + len(MOTIFS)))])
    header = ["layer", *(HEADINGS[kind][0] for kind in MOTIFS)]
    caption = f"Motifs that hold in the weights and on {gallery.n_tokens} tokens, near-duplicates counted once"
    long = table(
        [[r.layer, HEADINGS[r.kind][0], r.in_weights, r.measured, r.held, r.families] for r in counts.itertuples()],
        ["layer", "motif", "in the weights", "measured", "hold on texts", "counted once"],
        f"The weights are searched for pairs that fire together, with a strength of at least {FLOOR:g}. The strongest "
        "are measured.",
    )
    return [table(rows, header, caption), details("From the weights to what holds", long)]


def _entry(entry: GalleryEntry, wordpiece: bool) -> list[Html | str]:
    names = {"first alone": entry.i_name, "second alone": entry.j_name, "neither": "neither", "both": "both"}
    weights = dict(zip(CASES, (0.0, *entry.table), strict=True))
    truth = table(
        [
            [names[case], f"{weights[case]:+.2f}", f"{mean:+.2f}", f"{share:.0%}", count]
            for case, mean, share, count in zip(CASES, entry.measured, entry.fires, entry.counts, strict=True)
        ],
        ["active", "weights", "measured", "fires", "tokens"],
        f"The pre-activation of {entry.output_name}. Where it fires, its mean is {entry.typical:.3g}.",
    )
    prose = (
        f"Strength {entry.strength:.2f}. Where both are active, the mean pre-activation is {entry.whole:+.2f}: "
        f"the pair's cross term gives {entry.part:+.2f} and all else {entry.whole - entry.part:+.2f}. "
        "The output feature promotes "
        f"{', '.join(f'“{token}”' for token in entry.promoted)}."
    )
    scale = max((abs(value) for example in entry.examples for value in example.values), default=1.0) or 1.0
    rows = [
        [
            f"{example.activation:+.2f}",
            f"{whole:+.2f}",
            TokenStrip(example.tokens, example.values, example.focus, scale, wordpiece),
        ]
        for example, whole in zip(entry.examples, entry.wholes, strict=True)
    ]
    contents: list[Html | str] = [
        entry.meaning,
        prose,
        columns(truth, Plane(entry)),
        table(rows, ["pair", "whole", "where both are active"]),
    ]
    if entry.alike:
        lines = [formula(entry.kind, *map(_short, triple)) for triple in entry.alike]
        more = f"<li>and {len(lines) - MOST_ALIKE} more</li>" if len(lines) > MOST_ALIKE else ""
        items = "".join(f"<li>{escape(line)}</li>" for line in lines[:MOST_ALIKE])
        contents.append(details(f"{len(lines)} more for outputs like it", Html(f"<ul>{items}{more}</ul>")))
    return contents


@dataclass(frozen=True)
class Plane(View):
    """An entry's tokens in the plane of its two features."""

    entry: GalleryEntry

    def html(self) -> str:
        entry = self.entry
        x, y, z = (numbers(values, "coordinates", None) for values in (entry.x, entry.y, entry.z))
        across, up = _Axis(x, MARGIN, WIDTH - EDGE), _Axis(y, HEIGHT - MARGIN, EDGE)
        limit = full_scale(z)
        both = CASES.index("both")
        # Those with both on top.
        order = sorted(range(len(x)), key=lambda place: int(entry.case[place]) == both)
        marks = []
        for place in order:
            fill, opacity = (NEGATIVE if z[place] < 0 else POSITIVE), 0.15 + 0.85 * abs(z[place]) / limit
            line = ' stroke="currentColor" stroke-width="0.8"' if int(entry.case[place]) == both else ""
            marks.append(
                f'<circle cx="{across(x[place]):.1f}" cy="{up(y[place]):.1f}" r="{RADIUS}" fill="{fill}" '
                f'fill-opacity="{opacity:.2f}"{line}><title>{z[place]:.3g}, {CASES[int(entry.case[place])]}</title>'
                "</circle>"
            )
        zero = (
            f'<path d="M{across(0):.1f} {EDGE}V{HEIGHT - MARGIN}M{MARGIN} {up(0):.1f}H{WIDTH - EDGE}" '
            'stroke="currentColor" stroke-opacity="0.35"/>'
        )
        text = 'fill="currentColor" fill-opacity="0.7" font-size="11" text-anchor="middle"'
        middle = HEIGHT / 2
        labels = (
            f'<text x="{WIDTH / 2}" y="{HEIGHT - EDGE}" {text}>{escape(entry.i_name)} →</text>'
            f'<text x="12" y="{middle}" {text} transform="rotate(-90 12 {middle})">{escape(entry.j_name)} →</text>'
        )
        name = escape(f"tokens along {entry.i_name} and {entry.j_name}, coloured by {entry.output_name}")
        return (
            f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{name}" '
            f'style="width:100%;max-width:{WIDTH}px;height:auto">{zero}{"".join(marks)}{labels}</svg>'
        )


class _Axis:
    """Numbers to pixels, zero among them."""

    def __init__(self, values: "np.ndarray", low: float, high: float):
        self.start, stop = float(min(values.min(initial=0), 0)), float(max(values.max(initial=0), 0))
        self.low, self.step = low, (high - low) / ((stop - self.start) or 1)

    def __call__(self, value: float) -> float:
        return self.low + (value - self.start) * self.step
