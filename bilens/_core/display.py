"""How results show themselves in a notebook and on pages."""

import importlib
from collections.abc import Mapping
from typing import Any

_MAKERS: dict[str, str] = {}


def register_pages(makers: Mapping[str, str]) -> None:
    """Say who makes the page of a result: class names, and `module:function` of what takes one and gives its page.

    Pages are made above the results that they show, so a result cannot import its own: `bilens/__init__.py`, which
    stands above both, says it here.
    """
    _MAKERS.update(makers)


class Paged:
    """A result with a page of its own."""

    def to_page(self, **options: Any) -> Any:
        """A `bilens.draw.Page` of this result alone; `.save(path)` writes it as one HTML file.

        Args:
            options: the options of the function that `register_pages` was given, for what else is shown.
        """
        module, name = _MAKERS[type(self).__name__].split(":")
        return getattr(importlib.import_module(module), name)(self, **options)

    def _repr_html_(self) -> str:
        return self.to_page()._repr_html_()


class Tabular:
    """Anything with `to_frame()`: displayed as its table, text escaped."""

    def _repr_html_(self) -> str:
        frame: Any = self.to_frame()  # type: ignore[attr-defined]
        return frame.to_html(index=False, max_rows=30, float_format=lambda number: f"{number:.4g}")

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """IPython's terminal shows what `print` does; the repr would list every tensor."""
        printer.text(str(self))
