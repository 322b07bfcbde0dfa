"""One feature of a store, or several of them, to look at: in a notebook, or as one HTML file. Computes nothing.

Everything is plain markup (the histogram too), so a page of many features is small and needs no script.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import numpy as np

from bilens.draw.markup import ViewError, escape, numbers, visible
from bilens.draw.page import Html, Page, View
from bilens.draw.tokens import STRONGEST, TokenStrip
from bilens.sae.features.store import Context, FeatureRecord

WIDTH, HEIGHT = 360, 120  # of the histogram, in its own units
TOKENS_SHOWN = 10
LEAST_SHARE = 0.005  # a token that carries less is shown only where there are next to no others


@dataclass(frozen=True, eq=False)
class FeatureDashboard(View):
    """What a feature fires on, what it promotes, how strongly and how often it fires.

        FeatureDashboard(store["1-mlp-out"].feature(12)).save("feature.html")

    Args:
        records: one feature, or several.
        title: the page's title; by default it names the SAE.
    """

    records: FeatureRecord | Iterable[FeatureRecord]
    title: str = ""

    def __post_init__(self) -> None:
        if isinstance(self.records, Iterable):  # read once: a generator has nothing to give a second time
            object.__setattr__(self, "records", list(self.records))
        if not self._records:
            raise ViewError("there is no feature to show: give a FeatureRecord, or several.")

    @property
    def _records(self) -> list[FeatureRecord]:
        return self.records if isinstance(self.records, list) else [self.records]  # type: ignore[list-item]

    def html(self) -> str:
        return "".join(f"{_heading(record)}{_body(record)}" for record in self._records)

    def to_page(self, title: str = "") -> Page:
        """A page with a section for each feature."""
        records = self._records
        saes = ", ".join(dict.fromkeys(f"{r.sae} ({r.hook_name})" for r in records))
        what = f"Feature {records[0].label}" if len(records) == 1 else f"{len(records)} features"
        page = Page(title or self.title or what, f"{saes}, on {records[0].n_tokens:,} tokens")
        if len(records) == 1:
            return page.add(Html(_body(records[0])))
        for record in records:
            page.section(f"{record.sae} · {record.label}", Html(_body(record)))
        return page

    def save(self, path: str | PathLike[str]) -> Path:
        """Write the page, whole or not at all, and return where."""
        return self.to_page().save(path)


def _heading(record: FeatureRecord) -> str:
    return f'<h3 class="bilens-feature-name">{escape(record.sae)} · {escape(record.label)}</h3>'


def _body(record: FeatureRecord) -> str:
    if not record.fired:
        fires = f"<p>It fires on none of the {record.n_tokens:,} tokens.</p>"
        return f'<div class="bilens-feature">{fires}{_effects(record)}</div>'
    return (
        f'<div class="bilens-feature">{_facts(record)}'
        f'<div class="grid">{_histogram(record)}{_firing_tokens(record)}</div>{_effects(record)}'
        f"<h4>Strongest contexts</h4>{_contexts(record, record.top)}{_bands(record)}</div>"
    )


def _facts(record: FeatureRecord) -> str:
    facts = [
        ("fires on", f"{record.frequency:.3%}", f"{record.fired:,} of {record.n_tokens:,} tokens"),
        ("mean", f"{record.mean_active:.3g}", f"where it fires; {record.mean:.3g} over all tokens"),
        ("maximum", f"{record.maximum:.3g}", "over all tokens"),
    ]
    cells = (f"<div><dt>{name}</dt><dd>{value}<small>{note}</small></dd></div>" for name, value, note in facts)
    return f"<dl>{''.join(cells)}</dl>"


def _histogram(record: FeatureRecord) -> str:
    """Bars over a logarithmic axis: the bins are a quarter of an octave wide."""
    counts = numbers(record.histogram, "histogram", None)
    used = np.flatnonzero(counts)
    first, last = int(used[0]), int(used[-1]) + 1
    step, most = WIDTH / (last - first), counts.max()
    bars = "".join(
        f'<rect x="{(i - first) * step + step * 0.06:.1f}" y="{HEIGHT * (1 - counts[i] / most):.1f}" '
        f'width="{step * 0.88:.1f}" height="{HEIGHT * counts[i] / most:.1f}">'
        f"<title>{record.edges[i]:.3g} to {record.edges[i + 1]:.3g}: {int(counts[i]):,} firings</title></rect>"
        for i in used.tolist()
    )
    ticks = sorted({first, (first + last) // 2, last})
    anchors = {first: "start", last: "end"}
    labels = "".join(
        f'<text x="{(i - first) * step:.1f}" y="{HEIGHT + 15}" text-anchor="{anchors.get(i, "middle")}">'
        f"{record.edges[i]:.2g}</text>"
        for i in ticks
    )
    return (
        f'<figure><svg viewBox="0 0 {WIDTH} {HEIGHT + 20}" role="img" '
        f'aria-label="Histogram of the activations">{bars}<path d="M0 {HEIGHT}H{WIDTH}"/>{labels}</svg>'
        f"<figcaption>How strongly it fires, on a logarithmic axis; the highest bar is {int(most):,} firings."
        "</figcaption></figure>"
    )


def _firing_tokens(record: FeatureRecord) -> str:
    about = "" if record.tokens_exact else "≈ "
    rows = "".join(
        f"<tr><th>{_token(t.token)}</th><td>{about}{t.count:,}</td>"
        f'<td><i style="width:{100 * min(max(t.share, 0), 1):.0f}%"></i>{t.share:.0%}</td><td>{t.pmi:+.2f}</td></tr>'
        for place, t in enumerate(record.tokens[:TOKENS_SHOWN])
        if place < 3 or t.share >= LEAST_SHARE
    )
    estimated = "" if record.tokens_exact else " Counts are estimated from a sample of its firings."
    return (
        "<figure><table><thead><tr><th>fires on</th><td>times</td><td>of its activation</td><td>PMI</td></tr></thead>"
        f"<tbody>{rows}</tbody></table><figcaption>PMI: how much likelier the token is where the feature fires "
        f"(natural logarithm).{estimated}</figcaption></figure>"
    )


def _effects(record: FeatureRecord) -> str:
    if record.promoted is None or record.suppressed is None:
        return "<p>Its SAE does not write to the residual stream: it has no direct effect on the logits.</p>"
    largest = max((abs(value) for _, value in (*record.promoted, *record.suppressed)), default=0) or 1.0
    lists = []
    for title, kind, effects in (("promotes", "p", record.promoted), ("suppresses", "n", record.suppressed)):
        chips = "".join(
            f'<li class="{kind}" style="--a:{STRONGEST * abs(value) / largest:.2f}">{_token(token)}'
            f"<small>{value:+.2f}</small></li>"
            for token, value in effects[:TOKENS_SHOWN]
        )
        lists.append(f"<dt>{title}</dt><dd><ul>{chips}</ul></dd>")
    return f'<dl class="effects" title="effect of one unit of activation on the logits">{"".join(lists)}</dl>'


def _bands(record: FeatureRecord) -> str:
    n = len(record.random)
    parts = [
        f"<h5>{band / n:.0%} to {(band + 1) / n:.0%}</h5>{_contexts(record, contexts)}"
        for band, contexts in reversed(list(enumerate(record.random)))
        if contexts
    ]
    if not parts:
        return ""
    return f"<h4>Random contexts, by the quantile of the activation</h4>{''.join(parts)}"


def _contexts(record: FeatureRecord, contexts: Sequence[Context]) -> str:
    strongest = max((abs(c.activation) for c in record.top), default=0) or 1.0
    rows = (
        f'<li title="text {c.text}, position {c.position}"><span>{c.activation:.2f}</span>'
        f"{TokenStrip(c.tokens, c.values, c.focus, strongest, record.wordpiece).html()}</li>"
        for c in contexts
    )
    return f"<ol>{''.join(rows)}</ol>"


def _token(token: str) -> str:
    return f"<code>{escape(visible(token))}</code>"
