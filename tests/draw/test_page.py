import base64
import hashlib
import json
import re

import numpy as np
import pandas as pd
import pytest

from bilens.draw import plots
from bilens.draw.circuits import AttentionPatterns, ColoredTokens, ColoredTokensMulti
from bilens.draw.markup import ViewError
from bilens.draw.page import Html, Page, captioned, columns, details, fragment, table
from bilens.draw.tokens import TokenStrip


@pytest.fixture
def full(hostile) -> Page:
    n = len(hostile)
    values = np.linspace(-1, 1, n)
    page = Page(hostile[0], hostile[1]).add(*hostile)
    page.section(
        hostile[1], ColoredTokens(hostile, values), ColoredTokensMulti(hostile, np.ones((n, 2))), TokenStrip(["a"], [1])
    )
    page.section(hostile[2], table([[token, 1] for token in hostile], [hostile[0], "n"], caption=hostile[1]), level=3)
    page.section("Plots", plots.bars(hostile, values), captioned(plots.spectrum(values), hostile[0]))
    folded = details(hostile[0], AttentionPatterns(hostile, np.ones((1, n, n))), plots.heatmap(np.eye(n), hostile))
    return page.add(folded, columns(hostile[0], pd.DataFrame({hostile[0]: hostile}, dtype=object)))


def test_hostile_text_is_shown_literally_everywhere(full, hostile, read):
    page = read(full.to_html())
    used = {
        "a",
        "body",
        "caption",
        "details",
        "div",
        "figcaption",
        "figure",
        "h1",
        "h2",
        "h3",
        "head",
        "header",
        "html",
    }
    used |= {"li", "link", "main", "meta", "nav", "noscript", "p", "script", "span", "style", "summary", "table"}
    used |= {"tbody", "td", "th", "thead", "title", "tr", "ul"}
    assert {tag for tag, _ in page.elements} == used
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    for token in hostile[:3]:
        assert page.text.count(token) >= 4


def test_nothing_is_fetched(full, read):
    for _, attributes in read(full.to_html()).elements:
        assert "src" not in attributes
        assert (attributes.get("href") or "#").startswith(("#", "data:"))


def test_every_script_is_embedded_once_and_allowed_by_its_hash(full, read):
    page = read(full.to_html())
    policy = next(meta["content"] for meta in page.tags("meta") if "http-equiv" in meta)
    hashes = [base64.b64encode(hashlib.sha256(code.encode()).digest()).decode() for code in page.code]
    assert policy.startswith("default-src 'none'; script-src " + " ".join(f"'sha256-{h}'" for h in hashes) + ";")
    assert "unsafe-inline" not in policy.split(";")[1]
    assert [len(code) > 1e6 for code in page.code] == [True, True, False]
    assert "CircuitsVis=" in page.code[1]
    for data in page.data:
        json.loads(data)


def test_scripts_are_embedded_only_where_they_are_used(read):
    assert read(Page("prose").add("words", TokenStrip(["a"], [1])).to_html()).code == []
    assert "script-src 'none'" in Page("prose").to_html()
    assert len(read(Page("tokens").add(ColoredTokens(["a"], [1])).to_html()).code) == 2
    assert len(read(Page("plot").add(plots.spectrum([1])).to_html()).code) == 2
    assert len(read(ColoredTokens(["a"], [1]).to_page("alone").to_html()).code) == 2


def test_the_head(read):
    page = read(Page("A <title>").to_html())
    assert page.elements[0] == ("html", {"lang": "en"})
    assert page.tags("meta")[0] == {"charset": "utf-8"}
    assert "A <title>" in page.text


def test_contents_lead_to_their_sections(read):
    page = Page("t").section("Same").section("Same", level=3).section("<b>", "text").section("Main").section("Été")
    parsed = read(page.to_html())
    anchors = [heading["id"] for level in ("h2", "h3") for heading in parsed.tags(level)]
    assert sorted(anchors) == sorted(["same", "same-2", "b", "main-2", "été"])
    links = [link["href"] for link in parsed.tags("a")]
    assert {f"#{anchor}" for anchor in anchors} <= set(links)
    ids = [attributes["id"] for _, attributes in parsed.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert "<nav" not in Page("t").section("Only one").to_html()


def test_prose_has_paragraphs():
    assert fragment("one\ntwo\n\nthree & four") == "<p>one\ntwo</p><p>three &amp; four</p>"


def test_html_is_the_only_markup_that_passes():
    assert fragment(Html("<em>x</em>")) == "<em>x</em>"
    assert fragment("<em>x</em>") == "<p>&lt;em&gt;x&lt;/em&gt;</p>"


@pytest.mark.parametrize("content", [object(), 3, None, [1, 2], Page("nested")])
def test_what_is_no_content_is_refused(content):
    with pytest.raises(ViewError, match="cannot be put on a page"):
        fragment(content)


def cells(markup: Html, read) -> list[str]:
    return re.findall(r"<td[^>]*>(.*?)</td>", markup.html())


def test_table_cells(read):
    strip = TokenStrip(["a"], [1])
    markup = table([["<b>", strip, None], ["x", Html("<i>y</i>"), True]], ["a", "b", "<c>"])
    assert cells(markup, read) == ["&lt;b&gt;", strip.html(), "", "x", "<i>y</i>", "True"]
    assert "&lt;c&gt;" in markup.html()


@pytest.mark.parametrize(
    ("column", "shown"),
    [
        ([9.3, 8.934, 5.0], ["9.300", "8.934", "5.000"]),
        ([4096, 12], ["4096", "12"]),
        ([np.int64(3), None, 2.5], ["3", "", "2.5"]),
        ([1.23456e-7, 1.0], ["1.235e-07", "1"]),
        ([float("nan"), 1.5], ["nan", "1.5"]),
        ([np.float32(0.1), 100.0], ["0.1", "100.0"]),
    ],
)
def test_numbers_in_a_table_line_up(column, shown, read):
    markup = table([[number] for number in column], ["n"])
    assert cells(markup, read) == shown
    assert markup.html().count('class="number"') == len(column) + 1


def test_a_column_of_words_and_numbers_is_text():
    assert "number" not in table([[1], ["x"]]).html()


def test_table_of_a_frame(read):
    frame = pd.DataFrame({"token": ["<b>"], "logit": [1.5]})
    assert cells(table(frame), read) == ["&lt;b&gt;", "1.5"]
    assert cells(table(frame.set_index("token")), read) == ["&lt;b&gt;", "1.5"]
    assert "<th" not in table([[1]]).html()
    assert cells(table([], ["a"]), read) == []


def test_a_ragged_table_is_refused():
    with pytest.raises(ViewError, match="a row of 1 cells in a table of 2 columns"):
        table([[1, 2], [3]])
    with pytest.raises(ViewError, match="a row of 1 cells in a table of 2 columns"):
        table([[1]], ["a", "b"])


def test_save_writes_utf8_whole(tmp_path, hostile):
    path = tmp_path / "page.html"
    page = Page("été").add("".join(hostile))
    assert page.save(path) == path
    assert path.read_text(encoding="utf-8") == page.to_html().replace("\ud800", "\\ud800")
    assert list(tmp_path.iterdir()) == [path]


def test_a_page_is_the_same_each_time(full):
    assert full.to_html() == full.to_html()
