"""A package that an extra brings, and that is missing, is named with the command that installs it."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from bilens._core.extras import need
from bilens.errors import MissingPackageError
from bilens.vision import load_images
from bilens.vision.augmentation import augmentation


def test_what_is_installed_is_imported() -> None:
    assert need("json.decoder", "vision", "This") is sys.modules["json.decoder"]


@pytest.mark.parametrize(
    ("package", "wants_it"),
    [
        ("kornia", lambda: augmentation(8, 8, blur=1.0)),
        ("sklearn", lambda: load_images("digits")),
        ("PIL", lambda: load_images("mnist")),
    ],
)
def test_a_missing_package_is_named_with_its_extra(
    package: str, wants_it: Callable[[], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Missing(package), *sys.meta_path])
    with pytest.raises(MissingPackageError, match=rf"needs the package {package}.*pip install 'bilens\[vision\]'"):
        wants_it()


class Missing:
    """An importer that has not got one package."""

    def __init__(self, package: str) -> None:
        self.package = package

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name.split(".")[0] == self.package:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def test_what_else_is_missing_is_not_blamed_on_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wants_another.py").write_text("import a_package_that_nobody_has")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="a_package_that_nobody_has"):
        need("wants_another", "vision", "This")
