"""Dashboards: what is in the record is on the page, as text; nothing runs, nothing is fetched."""

import math
from dataclasses import replace

import numpy as np
import pytest

from bilens.draw.markup import ViewError, visible
from bilens.pages.dashboard import FeatureDashboard
from bilens.sae.features.store import Context, FeatureRecord, FiringToken


def record(tokens: list[str]) -> FeatureRecord:
    """A feature that fires on each token once."""
    n = len(tokens)
    histogram = np.array([0, 3, 0, n, 1])
    context = Context(tokens, [i / n for i in range(n)], n - 1, 3, 7, math.nan)
    return FeatureRecord(
        sae="<b>sae</b>",
        hook_name="blocks.1.hook_mlp_out",
        feature=12,
        label=f"12 {tokens[0]}",
        n_tokens=1000,
        fired=n + 4,
        mean=0.01,
        mean_active=1.5,
        maximum=3.25,
        histogram=histogram,
        edges=2.0 ** np.arange(6),
        top=(context,),
        random=((), (context,)),
        tokens=tuple(FiringToken(token, 2, 1 / n, -0.5) for token in tokens),
        tokens_exact=True,
        promoted=tuple((token, 0.5) for token in tokens),
        suppressed=tuple((token, -0.25) for token in tokens),
        wordpiece=False,
    )


def test_everything_is_shown(read):
    page = read(FeatureDashboard(record(["cat", "dog", "sat"])).to_page().to_html())
    for text in (
        "0.700%",
        "7 of 1,000 tokens",
        "1.5",
        "3.25",
        "cat",
        "dog",
        "sat",
        "-0.50",
        "+0.50",
        "-0.25",
        "50% to 100%",
    ):
        assert text in page.text, text
    assert "0% to 50%" not in page.text  # a band without a context
    assert [t["title"] for t in page.tags("li") if "title" in t] == ["text 3, position 7"] * 2
    bars = page.tags("rect")
    assert len(bars) == 3
    heights = [float(bar["height"]) for bar in bars]
    assert heights[0] == max(heights) == heights[1]
    assert heights[2] == pytest.approx(heights[0] / 3, abs=0.1)


def test_hostile_tokens_stay_text(read, hostile, tmp_path):
    """In a file and in a notebook; the strips hold every token, visibly."""
    view = FeatureDashboard(record(hostile))
    page = read(view.save(tmp_path / "page.html").read_text(encoding="utf-8"))
    for found in (page, read(view._repr_html_())):
        assert not found.code
        assert not found.tags("img")
        assert not found.tags("b")
        assert not any(name.startswith("on") for _, attributes in found.elements for name in attributes)
        assert "".join(map(visible, hostile)) in found.text


def test_a_page_of_features(read):
    """A section each; the contents list them."""
    records = [replace(record(["a", "b", "c"]), feature=i, label=f"{i} a") for i in range(3)]
    page = read(FeatureDashboard(records, title="Some").to_page().to_html())
    assert "Some" in page.text
    assert len(page.tags("h2")) == 3
    assert len(page.tags("nav")) == 1
    assert len(read(FeatureDashboard(records)._repr_html_()).tags("h3")) == 3


def test_a_silent_feature_and_one_that_writes_nowhere(read):
    silent = replace(
        record(["a"]),
        fired=0,
        tokens=(),
        top=(),
        random=((), ()),
        histogram=np.zeros(5, int),
        promoted=None,
        suppressed=None,
    )
    text = read(FeatureDashboard(silent).to_page().to_html()).text
    assert "It fires on none of the 1,000 tokens." in text
    assert "it has no direct effect on the logits" in text


def test_estimated_counts_are_said_to_be(read):
    text = read(FeatureDashboard(replace(record(["a"]), tokens_exact=False)).to_page().to_html()).text
    assert "≈ 2" in text
    assert "estimated from a sample" in text


def test_nothing_to_show():
    with pytest.raises(ViewError, match="no feature to show"):
        FeatureDashboard([])


def test_features_may_come_from_a_generator(read):
    """They are read once and shown as often as asked."""
    view = FeatureDashboard(record([token]) for token in ("cat", "dog"))
    for _ in range(2):
        assert len(read(view._repr_html_()).tags("h3")) == 2
    with pytest.raises(ViewError, match="no feature to show"):
        FeatureDashboard(record([token]) for token in ())
