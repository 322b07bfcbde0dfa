"""What a browser makes of a page with hostile tokens, with its content security policy taken away."""

import html
import re

import numpy as np
import pytest

from bilens.draw import plots
from bilens.draw.circuits import AttentionPatterns, ColoredTokens, ColoredTokensMulti
from bilens.draw.markup import visible
from bilens.draw.page import Page
from bilens.draw.tokens import TokenStrip


@pytest.fixture
def drawn(tmp_path, hostile, dump) -> str:
    """The page's elements after its scripts have run."""
    n = len(hostile)
    values = np.linspace(-1, 1, n)
    page = Page("untouched").add(
        ColoredTokens(hostile, values),
        ColoredTokensMulti(hostile, np.stack([values, values[::-1]], 1), hostile[:2]),
        AttentionPatterns(hostile, np.ones((2, n, n)) / n, hostile[:2]),
        TokenStrip(hostile, values),
        plots.bars(hostile, values),
    )
    path = page.save(tmp_path / "page.html")
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", path.read_text(encoding="utf-8"))
    path.write_text(text, encoding="utf-8")
    return dump(path, '<span style="display: inline-block', "1200,4000")


def test_hostile_tokens_are_drawn_and_run_nothing(drawn, hostile, read):
    page = read(drawn)
    assert "<title>untouched</title>" in drawn
    assert not page.tags("img")
    assert not page.tags("b")
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    boxes = re.findall(r'<span style="display: inline-block;[^>]*>(.*?)</span>', drawn)
    shown = [html.unescape(box).replace("\u2060", "").replace("\xa0", " ") for box in boxes]
    assert shown == [visible(token).replace("↵", "↵ ") for token in hostile] * 2
    assert len(page.tags("canvas")) == 3  # two heads, one of them at full size too
    assert any(svg.get("class") == "main-svg" for svg in page.tags("svg"))
