"""The documentation site builds strictly and offline, loads nothing from another host, and misses no public name."""

import importlib
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

pytest.importorskip("mkdocs", reason="the documentation site is built with what the extra `docs` installs")

ROOT = Path(__file__).parents[1]
PACKAGES = ["bilens", *(f"bilens.{path.parent.name}" for path in sorted((ROOT / "bilens").glob("*/__init__.py")))]
LOADS = {"script", "link", "img", "iframe", "source", "video", "audio", "object", "embed", "use", "image"}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as a user builds it; whatever asks for the network meets a closed port."""
    folder = tmp_path_factory.mktemp("site")
    closed = {f"{scheme}_proxy": "http://127.0.0.1:9" for scheme in ("http", "https")}
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)],
        cwd=ROOT,
        env=os.environ | closed | {"NO_MKDOCS_2_WARNING": "1"},  # Material's own notice about its future
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout + done.stderr == "", "warnings"
    return folder


class Page(HTMLParser):
    """The addresses a page loads, and the ids on it."""

    def __init__(self, path: Path):
        super().__init__()
        self.loaded: list[str] = []
        self.ids: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.ids.add(found.get("id") or "")
        if tag in LOADS and found.get("rel") != "canonical":
            self.loaded += [found.get(name) or "" for name in ("src", "href", "data", "srcset", "xlink:href")]


def test_nothing_comes_from_another_host(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 15
    for path in pages:
        away = [address for address in Page(path).loaded if re.match(r"(\w+:)?//", address)]
        assert not away, f"{path.name} loads {away}"
        # Material's script fetches what draws diagrams, and the counts of a repository, only on pages that have them.
        text = path.read_text(encoding="utf-8")
        assert 'class="mermaid"' not in text
        assert 'data-md-component="source"' not in text
    for path in site.rglob("*.css"):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"(url\(\s*[\"']?|@import\s*[\"'])(https?:)?//", text), path.name


def test_every_public_name_has_an_entry(site: Path) -> None:
    """Under the name it is exported as, from whichever package exports it, or where it is defined."""
    ids = set().union(*(Page(path).ids for path in (site / "api").glob("*.html")))
    places: dict[int, set[str]] = {}
    for package in PACKAGES:
        module = importlib.import_module(package)
        for name in getattr(module, "__all__", []):
            if not name.startswith("__"):
                value = getattr(module, name)
                home = {f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', '')}"}
                places.setdefault(id(value), home).add(f"{package}.{name}")
    assert len(places) > 60
    missing = sorted(min(names) for names in places.values() if not names & ids)
    assert not missing, f"no API page has an entry for {', '.join(missing)}"


def test_every_tutorial_has_a_page_and_every_link_leads_somewhere(site: Path) -> None:
    """Notebooks link to one another as notebooks; on the site those are links to pages."""
    notebooks = sorted(path.stem for path in (ROOT / "tutorials").glob("*.ipynb"))
    assert [path.stem for path in sorted((site / "tutorials").glob("[0-9]*.html"))] == notebooks
    for path in (site / "tutorials").glob("*.html"):
        links = re.findall(r'<a href="([^"#:]+)', path.read_text(encoding="utf-8"))
        broken = [link for link in links if not (path.parent / link).exists()]
        assert not broken, f"{path.name}: {broken}"
