"""Pages that mkdocs makes while it builds: every notebook of tutorials/ as Markdown, and the command line's help.

Text is text as it is, code is code, and the outputs that `docs/execute.py` stored follow their cells.
"""

import json
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

NOTEBOOKS = sorted((Path(__file__).parents[1] / "tutorials").glob("[0-9]*.ipynb"))
CLI_PAGE = "api/cli.md"


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """The notebooks go into the navigation, in their order."""
    config.watch += [str(path.parent) for path in NOTEBOOKS[:1]]
    for item in config.nav:
        if "Tutorials" in item:
            item["Tutorials"] = [item["Tutorials"], *(page_of(path) for path in NOTEBOOKS)]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """The pages themselves."""
    for path in NOTEBOOKS:
        files.append(File.generated(config, page_of(path), content=notebook_page(path)))
    files.append(File.generated(config, CLI_PAGE, content=cli_page()))
    return files


def page_of(path: Path) -> str:
    return f"tutorials/{path.stem}.md"


def notebook_page(path: Path) -> str:
    """A notebook's cells in Markdown; links to other notebooks become links to their pages."""
    cells = [cell_text(cell) for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]]
    where = f"The notebook is `tutorials/{path.name}` in the repository."
    first, *rest = re.sub(r"\((\d\w+)\.ipynb\)", r"(\1.md)", "\n\n".join([cells[0], where, *cells[1:]])).split("\n", 1)
    return "\n".join([first, *rest]) + "\n"


def cell_text(cell: dict[str, Any]) -> str:
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        return source
    return "\n\n".join([f"```python\n{source}\n```", *map(output_text, cell["outputs"])])


def output_text(output: dict[str, Any]) -> str:
    """An output's richest form: a picture, a table or text."""
    data = output.get("data", {"text/plain": output.get("text", [])})
    if "image/png" in data:
        return f"![What the cell shows.](data:image/png;base64,{data['image/png']}){{ .output }}"
    if "text/html" in data:  # blank lines would end the block that Markdown leaves alone
        html = re.sub(r"<style.*?</style>", "", "".join(data["text/html"]), flags=re.DOTALL)
        return f'<div class="output">\n{re.sub(chr(10) + "{2,}", chr(10), html).strip()}\n</div>'
    return f"``` {{ .text .output }}\n{''.join(data['text/plain']).rstrip()}\n```"


def cli_page() -> str:
    """What `bilens --help`, and the help of every command, say."""
    from typer.cli import get_docs_for_click
    from typer.main import get_command

    from bilens.cli import app

    command = get_command(app)
    context = command.context_class(command, info_name="bilens")
    return get_docs_for_click(obj=command, ctx=context, name="bilens", title="Command line")
