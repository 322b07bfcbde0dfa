"""Every tutorial runs from top to bottom on reduced sizes, and is committed with small outputs of the full sizes.

Cells run in this process, so that TransformerLens and torch are imported once for all of them; what they show is taken
from them as `docs/execute.py` takes it for the outputs that are committed.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest

from docs.execute import NOTEBOOKS, cells, run, shown

MOST = 300_000  # bytes of a notebook with its outputs
every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


@every_notebook
def test_tutorial_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, datasets_cache: None) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("BILENS_TUTORIAL", "reduced")
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for number, cell in enumerate(cells(path, "code")):
        _, value = run("".join(cell["source"]), f"{path.name}[{number}]", namespace)
        assert value is None or all(shown(value).values())


@every_notebook
def test_tutorial_shows_what_it_made_and_can_be_reduced(path: Path) -> None:
    """`python docs/execute.py` stores the outputs of one whole run; figures are pictures, and no script comes along."""
    code = cells(path, "code")
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert any("image/png" in output.get("data", {}) for cell in code for output in cell["outputs"])
    assert path.stat().st_size < MOST
    text = path.read_text(encoding="utf-8")
    assert "<script" not in text
    assert str(Path.home()) not in text
    assert 'REDUCED = os.environ.get("BILENS_TUTORIAL") == "reduced"' in "".join(code[0]["source"])


@every_notebook
def test_tutorial_says_what_it_is_for(path: Path) -> None:
    first = json.loads(path.read_text(encoding="utf-8"))["cells"][0]
    assert first["cell_type"] == "markdown"
    assert "you will be able to" in " ".join("".join(first["source"]).split())
