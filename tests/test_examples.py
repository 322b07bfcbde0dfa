"""The Python of README and of the documentation's pages runs as it stands, on the bundled model, offline.

It and the tutorials take every name from `bilens` or `bilens.<package>`, and so can the reader of the API pages.
"""

import ast
import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import pytest

from docs.execute import NOTEBOOKS, cells

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


def exported(name: str) -> set[str]:
    """What `bilens`, or a package below it, gives to its users."""
    module = importlib.import_module(name)
    packages = {path.parent.name for path in (ROOT / "bilens").glob("*/__init__.py")} - {"_core"}
    return {*getattr(module, "__all__", vars(module)), *(packages | {"errors"} if name == "bilens" else ())}


def too_deep(name: str) -> bool:
    """Whether a dotted name reaches past what `bilens` or one of its packages exports."""
    first, *parts = name.split(".")
    if first != "bilens" or not parts:
        return False
    if parts[0] not in exported("bilens"):
        return True
    is_package = inspect.ismodule(getattr(importlib.import_module("bilens"), parts[0], None))
    return is_package and len(parts) > 1 and parts[1] not in exported(f"bilens.{parts[0]}")


@pytest.mark.parametrize("path", [*WITH_CODE, *NOTEBOOKS], ids=lambda p: p.stem)
def test_examples_take_names_from_packages(path: Path) -> None:
    sources = ["".join(cell["source"]) for cell in cells(path, "code")] if path in NOTEBOOKS else blocks(path)
    used: set[str] = set()
    for node in (node for source in sources for node in ast.walk(ast.parse(source))):
        if isinstance(node, ast.ImportFrom):
            used |= {f"{node.module}.{name.name}" for name in node.names}
        elif isinstance(node, ast.Import):
            used |= {name.name for name in node.names}
        elif isinstance(node, ast.Attribute) and re.fullmatch(r"bilens(\.\w+)+", ast.unparse(node)):
            used.add(ast.unparse(node))
    assert used
    assert not sorted(filter(too_deep, used))


@pytest.mark.parametrize("path", sorted((ROOT / "docs/api").glob("*.md")), ids=lambda path: path.stem)
def test_documented_names_can_be_imported_from_packages(path: Path) -> None:
    """Where an entry is a module's, its members are meant. Mixins stand for the classes that have their methods, and
    TransformerLens finds the adapter by its entry point.
    """
    for name, options in re.findall(r"^::: (\S+)((?:\n    .*)*)", path.read_text(encoding="utf-8"), re.MULTILINE):
        if name.endswith(("Mixin", "BilinearArchitectureAdapter")) or name == "bilens.errors":
            continue
        home = ".".join(name.split(".")[:2])
        members = re.search(r"members: \[(.*)\]", options)
        assert not too_deep(name) or members, f"{name} is in no package, and an entry of a module lists its members"
        if members:
            missing = set(filter(None, members[1].split(", "))) - exported(home)
            assert not missing, f"{home} does not export {missing}"


def test_there_are_many() -> None:
    assert len(WITH_CODE) >= 8


def test_readme_is_short() -> None:
    """Three minutes of reading."""
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 700
