"""The Python of README and of the documentation's pages runs as it stands, on the bundled model, offline."""

import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "docs/tasks").glob("*.md"))]


def blocks(path: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


WITH_CODE = [path for path in PAGES if blocks(path)]


@pytest.mark.parametrize("path", WITH_CODE, ids=lambda path: path.stem)
def test_page_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, datasets_cache: None) -> None:
    """The blocks of a page run one after another, as somebody who pastes them would run them."""
    if path.stem == "index":
        assert blocks(path) == blocks(ROOT / "README.md"), "the first page shows what README shows"
        return
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for number, block in enumerate(blocks(path)):
        exec(compile(block, f"{path.name}[{number}]", "exec"), namespace)


def test_there_are_many() -> None:
    assert len(WITH_CODE) >= 8


def test_readme_is_short() -> None:
    """Three minutes of reading."""
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 700
