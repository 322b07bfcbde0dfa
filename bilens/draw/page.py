"""One self-contained HTML file from prose, tables, figures and views.

Nothing in the file is fetched: plotly.js and the circuitsvis bundle are embedded, each once and only if needed, and a
content security policy forbids the network and any script but those.
"""

import re
from base64 import b64encode
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from numbers import Integral, Real
from os import PathLike
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias, runtime_checkable

import pandas as pd
import plotly.graph_objects as go

from bilens._core.files import PAGE, destination, to_path, write_atomically
from bilens.draw.markup import ViewError, asset, escape, island, scripts_for


@runtime_checkable
class Drawable(Protocol):
    """Anything with a fragment of its own: the views, `Html`."""

    def html(self) -> str: ...


class View:
    """Draws itself: on a page by `html()`, in a notebook by itself, into a file by `to_page().save(path)`."""

    def html(self) -> str:
        """A fragment for a page that embeds the scripts (`Page` does)."""
        raise NotImplementedError

    def _repr_html_(self) -> str:
        fragment = self.html()
        scripts = "".join(f"<script>{script}</script>" for script in scripts_for(fragment))
        return f"<style>{asset('views.css')}</style>{fragment}{scripts}"

    def to_page(self, title: str = "bilens") -> "Page":
        """A page of this view alone."""
        return Page(title).add(self)


@dataclass(frozen=True)
class Html(View):
    """Markup put on a page as it is. Everything else is escaped."""

    markup: str

    def html(self) -> str:
        return self.markup


Content: TypeAlias = str | pd.DataFrame | Drawable | go.Figure
NONE = "'none'"
DEFAULT_PLOT_HEIGHT = 450


def fragment(content: Content) -> str:
    """The markup of one piece of content.

    Text becomes escaped paragraphs (a blank line parts them), a frame a table, a plotly figure its plot; what has
    `.html()` is taken at its word.

    Raises:
        ViewError: nothing of the kind.
    """
    if isinstance(content, str):
        return "".join(f"<p>{escape(paragraph)}</p>" for paragraph in re.split(r"\n\s*\n", content.strip()))
    if isinstance(content, pd.DataFrame):
        return table(content).html()
    if isinstance(content, Drawable):
        return content.html()
    if hasattr(content, "to_plotly_json"):
        return island("plotly", content.to_json(), int(content.layout.height or DEFAULT_PLOT_HEIGHT))
    raise ViewError(f"a {type(content).__name__} cannot be put on a page: give text, a frame, a figure or a view.")


def table(
    rows: pd.DataFrame | Iterable[Sequence[Any]], columns: Sequence[str] | None = None, caption: str = ""
) -> Html:
    """A table. Cells may be text, numbers (to four significant digits, aligned right) or views.

    Args:
        rows: a frame (its index is shown if it has a name), or rows of cells.
        columns: the header; a frame has its own.
        caption: over the table.

    Raises:
        ViewError: a row that is not as long as the header.
    """
    if isinstance(rows, pd.DataFrame):
        frame = rows if rows.index.name is None else rows.reset_index()
        columns = list(map(str, frame.columns)) if columns is None else columns
        rows = frame.itertuples(index=False, name=None)
    cells = [list(row) for row in rows]
    header = [] if columns is None else list(columns)
    width = len(header or next(iter(cells), []))
    for row in cells:
        if len(row) != width:
            raise ViewError(f"a row of {len(row)} cells in a table of {width} columns: {row}.")
    drawn = [_column([row[place] for row in cells]) for place in range(width)]
    head = "".join(f'<th scope="col"{kind}>{escape(name)}</th>' for name, (kind, _) in zip(header, drawn, strict=False))
    body = "".join(
        f"<tr>{''.join(f'<td{kind}>{markup[place]}</td>' for kind, markup in drawn)}</tr>"
        for place in range(len(cells))
    )
    return Html(
        f'<div class="table" role="region" aria-label="{escape(caption or "table")}" tabindex="0"><table>'
        + (f"<caption>{escape(caption)}</caption>" if caption else "")
        + (f"<thead><tr>{head}</tr></thead>" if head else "")
        + f"<tbody>{body}</tbody></table></div>"
    )


def details(summary: str, *contents: Content, open: bool = False, printed: bool = True) -> Html:
    """Contents folded away under a summary; on paper they are unfolded, or left out if they are not to be `printed`."""
    inside = "".join(map(fragment, contents))
    state = ("" if printed else ' class="unprinted"') + (" open" if open else "")
    return Html(f"<details{state}><summary>{escape(summary)}</summary><div>{inside}</div></details>")


def columns(*contents: Content) -> Html:
    """Contents side by side where there is room, one under another where there is not."""
    return Html(f'<div class="columns">{"".join(f"<div>{fragment(content)}</div>" for content in contents)}</div>')


def captioned(content: Content, caption: str) -> Html:
    """Content with a caption under it."""
    return Html(f"<figure>{fragment(content)}<figcaption>{escape(caption)}</figcaption></figure>")


def anchor(title: str) -> str:
    """The id of the first section of that title."""
    return re.sub(r"\W+", "-", title.lower()).strip("-") or "section"


class Page:
    """A page, built from top to bottom.

        Page("Report").section("Circuits", "In words.", figure, table(rows, ["token", "value"])).save("report.html")

    Args:
        title: the page's heading, and the browser's.
        subtitle: a line under it.
    """

    def __init__(self, title: str, subtitle: str = ""):
        self.title = title
        self.subtitle = subtitle
        self._body: list[str] = []
        self._contents: list[tuple[int, str, str]] = []

    def section(self, title: str, *contents: Content, level: Literal[2, 3] = 2) -> "Page":
        """A heading that the table of contents lists, and what stands under it."""
        slug, taken = anchor(title), {"main", *(known for _, known, _ in self._contents)}
        slug = next(name for n in range(1, len(taken) + 2) if (name := f"{slug}-{n}" if n > 1 else slug) not in taken)
        self._contents.append((level, slug, title))
        self._body.append(f'<h{level} id="{slug}"><a href="#{slug}">{escape(title)}</a></h{level}>')
        return self.add(*contents)

    def add(self, *contents: Content) -> "Page":
        """More of the current section (or, before any, of the introduction)."""
        self._body.extend(map(fragment, contents))
        return self

    def to_html(self) -> str:
        """The whole document."""
        body = "\n".join(self._body)
        scripts = scripts_for(body)
        hashes = [f"'sha256-{b64encode(sha256(script.encode()).digest()).decode()}'" for script in scripts]
        policy = (
            f"default-src 'none'; script-src {' '.join(hashes) or NONE}; style-src 'unsafe-inline'; "
            "img-src data: blob:; font-src data:; base-uri 'none'; form-action 'none'"
        )
        subtitle = f'<p class="subtitle">{escape(self.subtitle)}</p>' if self.subtitle else ""
        graph_style = asset("graph.css") if 'data-draw="graph"' in body else ""
        embedded = "".join(f"<script>{script}</script>\n" for script in scripts)
        needs_scripts = "<noscript><p>The interactive views need JavaScript.</p></noscript>" if scripts else ""
        return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(self.title)}</title>
<link rel="icon" href="data:,">
<style>
{asset("page.css")}{asset("views.css")}{graph_style}</style>
</head>
<body>
<a class="skip" href="#main">Skip to the content</a>
<header><h1>{escape(self.title)}</h1>{subtitle}{needs_scripts}</header>
{self._nav()}
<main id="main">
{body}
</main>
{embedded}</body>
</html>
"""

    def save(self, path: str | PathLike[str]) -> Path:
        """Write the page, whole or not at all, over nothing but a page, and return where.

        Raises:
            ArgumentError: nothing can be written there.
            OverwriteError: there is a file that is no page.
            WriteError: the disk is full.
        """
        text = self.to_html().encode("utf-8", "backslashreplace")  # a broken token may hold a lone surrogate
        write_atomically(destination(path, PAGE), lambda beside: beside.write_bytes(text))
        return to_path(path)

    def _repr_html_(self) -> str:
        """The page in a frame of its own, so that a notebook's styles and the page's leave each other alone."""
        return (
            f'<iframe srcdoc="{escape(self.to_html())}" sandbox="allow-scripts" loading="lazy" '
            f'title="{escape(self.title)}" style="width:100%;height:40rem;border:0"></iframe>'
        )

    def _nav(self) -> str:
        if len(self._contents) < 2:
            return ""
        entries = "".join(
            f'<li class="level-{level}"><a href="#{anchor}">{escape(title)}</a></li>'
            for level, anchor, title in self._contents
        )
        return f'<nav aria-label="Contents"><ul>{entries}</ul></nav>'


def _column(cells: list[Any]) -> tuple[str, list[str]]:
    """The class of a column's cells, and their markup; numbers get the decimals of the one that needs most."""
    numeric = [isinstance(cell, Real) and not isinstance(cell, bool) for cell in cells]
    texts = [_number(cell) if number else _cell(cell) for cell, number in zip(cells, numeric, strict=True)]
    if not all(number or cell is None for cell, number in zip(cells, numeric, strict=True)):
        return "", texts
    decimals = max((len(text.partition(".")[2]) for text in texts), default=0)
    if decimals <= 4 and not any("e" in text for text in texts):
        texts = [
            text if cell is None or isinstance(cell, Integral) else f"{float(cell):.{decimals}f}"
            for cell, text in zip(cells, texts, strict=True)
        ]
    return ' class="number"', texts


def _number(value: Any) -> str:
    return str(value) if isinstance(value, Integral) else f"{float(value):.4g}"


def _cell(cell: Any) -> str:
    return cell.html() if isinstance(cell, Drawable) else escape("" if cell is None else cell)
