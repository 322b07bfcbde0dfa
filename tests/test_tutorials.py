"""Every tutorial runs from top to bottom on reduced sizes, shows what it displays, and is committed without outputs.

Cells run in this process, so that TransformerLens and torch are imported once for all of them; the last expression of a
cell is shown as a notebook would show it.
"""

import ast
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "tutorials").glob("*.ipynb"))
every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def cells(path: Path, kind: str) -> list[dict[str, Any]]:
    return [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == kind]


def run(source: str, name: str, namespace: dict[str, Any]) -> None:
    """Run a cell; what its last line is the value of is shown."""
    tree = ast.parse(source, name)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, name, "exec"), namespace)
    if isinstance(last, ast.Expr):
        show(eval(compile(ast.Expression(last.value), name, "eval"), namespace))


def show(value: Any) -> None:
    """As IPython does: text always, HTML and rich output where there are any."""
    assert value is None or repr(value)
    if hasattr(value, "to_plotly_json"):  # plotly asks for nbformat before it makes its own
        assert value.to_json()
    elif hasattr(value, "_repr_html_"):
        assert value._repr_html_()


@every_notebook
def test_tutorial_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, datasets_cache: None) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("BILENS_TUTORIAL", "reduced")
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for number, cell in enumerate(cells(path, "code")):
        run("".join(cell["source"]), f"{path.name}[{number}]", namespace)


@every_notebook
def test_tutorial_is_stripped_and_can_be_reduced(path: Path) -> None:
    code = cells(path, "code")
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in code)
    assert 'REDUCED = os.environ.get("BILENS_TUTORIAL") == "reduced"' in "".join(code[0]["source"])


@every_notebook
def test_tutorial_says_what_it_is_for(path: Path) -> None:
    first = json.loads(path.read_text(encoding="utf-8"))["cells"][0]
    assert first["cell_type"] == "markdown"
    assert "you will be able to" in " ".join("".join(first["source"]).split())
