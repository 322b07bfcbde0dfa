"""The gallery's page holds every entry, and nothing that runs."""

import json

from typer.testing import CliRunner

from bilens import cli
from bilens.pages.gallery import Plane


def test_a_page_of_hostile_labels(gallery, read):
    page = read(gallery.to_page(subtitle="<b>x</b>").to_html())
    assert page.code == []  # nothing runs
    assert not page.tags("img")
    assert not page.tags("b")
    assert len(page.tags("svg")) == 3
    assert len(page.tags("circle")) == 3 * 4
    assert "<script>alert(1)</script>" in page.text  # shown, not obeyed
    assert "None holds on these texts." in page.text  # of the kind without entries
    assert "and 4 more" in page.text
    assert "the pair's cross term gives +1.50 and all else +1.50" in page.text


def test_points_stay_in_their_plane(gallery, read):
    plane = read(Plane(gallery.entries[0]).html())
    (box,) = plane.tags("svg")
    _, _, width, height = map(float, box["viewbox"].split())
    for circle in plane.tags("circle"):
        assert 0 <= float(circle["cx"]) <= width
        assert 0 <= float(circle["cy"]) <= height
    assert sum("stroke" in circle for circle in plane.tags("circle")) == 1  # the one with both
    fills = [circle["fill"] for circle in plane.tags("circle")]
    assert len(set(fills)) == 2


def test_the_command_writes_the_page(tmp_path):
    texts, out = tmp_path / "texts.jsonl", tmp_path / "gallery.html"
    texts.write_text("\n".join(json.dumps({"text": f"Lily was {word}."}) for word in ("sad", "happy")))
    arguments = ["gallery", "--layer", "0", "--n", "1", "--examples", str(texts), "--out", str(out)]
    done = CliRunner().invoke(cli.app, arguments)
    assert done.exit_code == 0, done.output
    assert "no entries" in done.output  # nothing fires together as often on two sentences
    assert out.stat().st_size < 10e6
    assert "None holds on these texts" in out.read_text(encoding="utf-8")
