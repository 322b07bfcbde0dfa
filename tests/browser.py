"""Tokens that break pages, a reader of pages as a browser reads them, and a browser."""

import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

TOKENS = [
    "</script><script>alert(1)</script>",
    "<img src=x onerror=\"document.title='PWNED'\">",
    "<script>document.title='PWNED'</script>",
    "<!--",
    "-->",
    "]]>",
    '"',
    "'",
    "&",
    "&lt;b&gt;",
    "&#60;b&#62;",
    "<b>bold</b>",
    "\u2028",
    "\u2029",
    "🙂",
    "\\",
    "\\n\\u0041",
    "','+alert(1)+'",
    "`${alert(1)}`",
    "$x^2$",
    "%{x}",
    "{{x}}",
    "a\nb",
    "\t",
    "   ",
    "",
    "\x00",
    "\u202eabc",
    "\ud800",
]


@pytest.fixture
def hostile() -> list[str]:
    return TOKENS


class Reader(HTMLParser):
    """A page's elements and its text, scripts apart."""

    def __init__(self, markup: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.text = ""
        self._open: str | None = None
        self.feed(markup)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self._open = tag
            if tag == "script":
                self.scripts.append((dict(attrs), ""))

    def handle_endtag(self, tag: str) -> None:
        self._open = None if tag == self._open else self._open

    def handle_data(self, data: str) -> None:
        if self._open == "script":
            attributes, before = self.scripts[-1]
            self.scripts[-1] = (attributes, before + data)
        elif self._open is None:
            self.text += data

    def tags(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.elements if tag == name]

    @property
    def code(self) -> list[str]:
        """The scripts that run."""
        return [source for attributes, source in self.scripts if "type" not in attributes]

    @property
    def data(self) -> list[str]:
        """The scripts that hold JSON."""
        return [source for attributes, source in self.scripts if attributes.get("type") == "application/json"]


@pytest.fixture
def read() -> type[Reader]:
    return Reader


@pytest.fixture(scope="session")
def dump(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """The page's elements after its scripts have run, `sign` among them; without a browser the test is skipped.

    The browser's clock may run ahead of its scripts on a busy machine: then it is given more time.
    """
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    options += ["--disable-component-update", f"--user-data-dir={tmp_path_factory.mktemp('profile')}"]

    def run(path: Path, sign: str, size: str = "1400,1000") -> str:
        for budget in (8_000, 60_000, 400_000):
            timed = [f"--window-size={size}", f"--virtual-time-budget={budget}", "--dump-dom", path.as_uri()]
            done = subprocess.run([CHROMIUM, *options, *timed], capture_output=True, text=True, timeout=180, check=True)
            if sign in done.stdout:
                return done.stdout
        raise AssertionError(f"{path} never shows {sign}")

    return run
