"""How results show themselves in a notebook."""

from typing import Any


class Tabular:
    """Anything with `to_frame()`: displayed as its table, text escaped."""

    def _repr_html_(self) -> str:
        frame: Any = self.to_frame()  # type: ignore[attr-defined]
        return frame.to_html(index=False, max_rows=30, float_format=lambda number: f"{number:.4g}")

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """IPython's terminal shows what `print` does; the repr would list every tensor."""
        printer.text(str(self))
