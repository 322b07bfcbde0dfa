"""What a reproduction is: a figure of a paper, made again here, and a table of what the paper says and what came out.

A recipe says beforehand what it makes and what is smaller than in the paper; running it gives a `Reproduction`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from bilens._core.display import Tabular
from bilens._core.files import destination_folder, write_atomically

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from bilens.draw.page import Page

Rows: TypeAlias = Sequence[tuple[str, str, str]]
Figures: TypeAlias = "Mapping[str, go.Figure]"

PEARCE_2025 = "Pearce et al. 2025 (arXiv 2410.08417)"


@dataclass(frozen=True)
class Settings:
    """What the recipes may be given.

    Attributes:
        model: what `load_model` takes; `None` is the bundled model, with its SAEs.
        texts: to measure on; `None` are the example stories that come with the model.
        images: what `bilens.vision.load_images` takes.
        reduced: everything small, to see that it runs.
        seed: of all that is trained.
    """

    model: str | None = None
    texts: Sequence[str] | None = None
    images: str = "digits"
    reduced: bool = False
    seed: int = 0


@dataclass(frozen=True)
class Reproduction(Tabular):
    """One figure made again.

    Attributes:
        name: of the recipe.
        source: the paper and its figure.
        scaled_down: what is smaller here than there.
        rows: what was measured, what the paper says of it, what came out here.
        figures: by caption.
        words: what it comes to, sentence by sentence, where figures alone do not say it.
    """

    name: str
    source: str
    scaled_down: str
    rows: Rows
    figures: Figures = field(repr=False)
    words: Sequence[str] = ()

    def to_frame(self) -> "pd.DataFrame":
        """One row per quantity: `what, paper, here`."""
        import pandas as pd

        return pd.DataFrame(self.rows, columns=["what", "paper", "here"])

    def plot(self) -> "go.Figure":
        """The first figure."""
        return next(iter(self.figures.values()))

    def to_page(self) -> "Page":
        """The table and all figures on one page."""
        from bilens.draw.page import Page, captioned

        page = Page(self.name, self.source)
        page.add(f"Smaller here: {self.scaled_down}", *self.words, self.to_frame())
        return page.add(*(captioned(figure, caption) for caption, figure in self.figures.items()))

    def save(self, folder: str | PathLike[str]) -> Path:
        """Write `<name>.html` and `<name>.csv` into a folder, and return the page's path."""
        folder = destination_folder(folder)
        write_atomically(folder / f"{self.name}.csv", lambda beside: self.to_frame().to_csv(beside, index=False))
        return self.to_page().save(folder / f"{self.name}.html")

    def __str__(self) -> str:
        head = f"{self.name}: {self.source}; smaller here: {self.scaled_down}"
        return "\n".join([head, *(f"- {line}" for line in self.words), self.to_frame().to_string(index=False)])


class Made(NamedTuple):
    """What a recipe gives; see `Reproduction`."""

    rows: Rows
    figures: Figures
    words: Sequence[str] = ()


Make: TypeAlias = Callable[[Settings], Made]


@dataclass(frozen=True)
class Recipe:
    """How to make one.

    Attributes:
        name: on the command line.
        source: the paper and its figure.
        about: what is seen, in a line.
        scaled_down: what is smaller here than there.
        make: gives the rows, the figures and the words.
    """

    name: str
    source: str
    about: str
    scaled_down: str
    make: Make = field(repr=False)

    def run(self, settings: Settings | None = None) -> Reproduction:
        """Make it; `None` takes the settings' defaults."""
        return Reproduction(self.name, self.source, self.scaled_down, *self.make(settings or Settings()))
