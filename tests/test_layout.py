"""The layout holds: imports go down only, between the rooms and inside them, wherever in a file they stand."""

import ast
import importlib
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Lowest first. A module may import from its own room and from those before it; nothing imports a circle.
ROOMS = (
    "errors",
    "_core",
    "draw",
    "expand",
    "model",
    "train",
    "sae",
    "layer",
    "decompose",
    "attribute",
    "vision",
    "toy",
    "pages",
    "reproduce",
    "cli",
    "__main__",
)
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in (ROOT / "bilens").rglob("*.py")
}


def imports() -> dict[str, set[str]]:
    """The modules of bilens that each one imports: at the top, in functions and for type checkers alike."""
    found: dict[str, set[str]] = defaultdict(set)
    for module, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level == 0 and (node.module or "").startswith("bilens"):
                for name in node.names:
                    whole = f"{node.module}.{name.name}"
                    found[module].add(whole if whole in MODULES else str(node.module))
            elif isinstance(node, ast.Import):
                found[module] |= {name.name for name in node.names if name.name in MODULES}
    return found


def room(module: str) -> int:
    """The package itself, which gathers names from everywhere, stands over all rooms but the command line."""
    return ROOMS.index("cli" if module == "bilens" else module.split(".")[1])


def test_every_module_stands_in_a_room() -> None:
    assert {module.split(".")[1] for module in MODULES if module != "bilens"} == set(ROOMS)


def test_imports_between_rooms_go_down_only() -> None:
    up = [
        f"{module} imports {other}"
        for module, others in imports().items()
        for other in others
        if module != "bilens" and room(other) > room(module)
    ]
    assert not up


def test_there_is_no_circle() -> None:
    """What imports nothing, or is imported by nothing, is taken away until nothing changes; circles are left."""
    graph = imports()
    left = set(MODULES) - {"bilens"}
    while ends := {module for module in left if not graph[module] & left}:
        left -= ends
    while ends := {module for module in left if not any(module in graph[other] for other in left)}:
        left -= ends
    assert not left


def test_tests_mirror_the_modules() -> None:
    """Every folder of tests is that of a room, and is named after it."""
    folders = {path.relative_to(ROOT / "tests") for path in (ROOT / "tests").rglob("test_*.py")}
    rooms = {str(path.parent) for path in folders if str(path.parent) != "."}
    packages = {name.removeprefix("bilens.").replace(".", "/").replace("_core", "core") for name in MODULES}
    assert rooms <= packages, sorted(rooms - packages)


def test_no_package_exports_the_name_of_a_module_of_it() -> None:
    """Or the name would mean the one before the module is imported and the other after."""
    clashes = []
    for package, path in MODULES.items():
        if path.name == "__init__.py":
            inside = {name.removeprefix(f"{package}.") for name in MODULES if name.startswith(f"{package}.")}
            exported = getattr(importlib.import_module(package), "__all__", [])
            clashes += [f"{package}.{name}" for name in exported if name in inside]
    assert not clashes
