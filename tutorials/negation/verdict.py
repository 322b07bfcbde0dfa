"""What the figures of the negation study say, sentence by sentence."""

from typing import TYPE_CHECKING

from tutorials.negation.auc import TARGETS
from tutorials.negation.gates import Gate
from tutorials.negation.probes import POSITIONS

if TYPE_CHECKING:
    import pandas as pd

    from tutorials.negation.study import NegationStudy

SENTIMENT_BY_NEGATION = ("not positive", "not negative", "positive clause", "negative clause")
SIGNIFICANT = 0.05 / len(TARGETS)  # of several targets one would pass 0.05 by chance
# What a layer does to the word's valence, from a fade on.
FADES = ((1.5, "turns round"), (0.75, "takes away"), (0.25, "dims"), (float("-inf"), "keeps"))


def verdict(study: "NegationStudy") -> list[str]:
    """All of them, what matters most first."""
    held = _held(study.screen)
    return [
        _headline(study),
        *_on_screen(study),
        *_on_readout(study),
        *_on_algebra(study.algebra),
        *(_on_gate(gate) for gate in study.gates if gate.target in held),
    ]


def _held(screen: "pd.DataFrame") -> dict[str, "pd.Series"]:
    """The targets whose best feature passes on the words it was not picked on."""
    return {row.target: row for _, row in screen.iterrows() if row.p < SIGNIFICANT}


def _next_token(study: "NegationStudy") -> "pd.Series":
    return study.readout[(study.readout.site == "next token") & (study.readout.position == POSITIONS[1])].iloc[0]


def _headline(study: "NegationStudy") -> str:
    held, turned = _held(study.screen), study.readout[study.readout.negated_high < 0.5]
    crossed = [target for target in SENTIMENT_BY_NEGATION if target in held]
    fade = study.algebra.fade.max()
    if not crossed and not len(turned) and fade < 1:
        return (
            f"{study.model} has no circuit that turns sentiment round under negation: none of the {study.screened} "
            "features that fire here passes as one that reads both, no readout of valence is turned round, and no "
            f"layer's output loses more than {fade:.0%} of the word's valence."
        )
    found = [f"a feature for “{target}” (AUC {held[target].tested:.2f})" for target in crossed]
    found += [f"a readout turned round in {len(turned)} places"] * bool(len(turned))
    found += [f"a layer that takes away {fade:.0%} of the word's valence"] * bool(fade >= 1)
    return f"{study.model} combines negation and sentiment: {'; '.join(found)}."


def _on_screen(study: "NegationStudy") -> list[str]:
    held = _held(study.screen)
    return [
        f"“{row.target}”: {'found' if row.target in held else 'not found'}. The best feature, {row.feature} of layer "
        f"{row.layer} at the {row.position}, has a least AUC of {row.picked:.2f} on the words it was picked on and "
        f"{row.tested:.2f} on the others (95 % of chance: {row.chance_tested:.2f}, p = {row.p:.3f})."
        for row in study.screen.itertuples()
    ]


def _on_readout(study: "NegationStudy") -> list[str]:
    last = _next_token(study)
    if last.negated_high < 0.5:
        what = "the clause: negation turns it round"
    elif last.negated_low > 0.5:
        what = "the word: negation does not turn it round"
    else:
        what = "neither the word nor the clause"
    flipped = study.readout[study.readout.negated_high < 0.5]
    where = ", ".join(f"layer {row.layer} {row.site} at the {row.position}" for row in flipped.itertuples())
    return [
        f"What the model says next follows {what} (the plain sentences' readout has AUC {last.plain:.2f} on plain and "
        f"{last.negated:.2f} [{last.negated_low:.2f}, {last.negated_high:.2f}] on negated ones).",
        f"The readout is turned round in {where}." if where else "The readout is turned round nowhere.",
    ]


def _on_algebra(algebra: "pd.DataFrame") -> list[str]:
    lines = []
    for row in algebra.itertuples():
        does = next(word for least, word in FADES if row.fade > least)
        special = "more than" if row.p < 0.05 / len(algebra) else "no more than"
        lines.append(
            f"Layer {row.layer}: under negation its output {does} the word's valence (fade {row.fade:.2f}). Its own "
            f"product of negation and valence makes {row.fade_cross:.2f} of this, {special} for other halvings of the "
            f"same words (mean {row.fade_chance:.2f}, p = {row.p:.3f})."
        )
    return lines


def _on_gate(gate: Gate) -> str:
    words = ("positive words", "negative words")
    alone = gate.share(("negation", "negation"))
    crossed = gate.share(*(("negation", word) for word in words))
    kind = "an AND of negation and sentiment" if crossed > alone else "no AND of negation and sentiment"
    return (
        f"Feature {gate.feature} of layer {gate.layer} (“{gate.target}”) is {kind}: of the absolute parts that make it "
        f"fire {alone:.0%} are negation features with each other, {crossed:.0%} negation features with features of "
        f"sentiment words; its two leading eigenvectors follow it with correlation {gate.correlation:.2f}."
    )
