"""What a reproduction is: a figure of a paper, made again here, and a table of what the paper says and what came out.

A recipe is known by its name and a line about it, without importing anything; running it imports what it needs and
gives a `Reproduction`, which says what it ran on and how long that took.

Every number and definition quoted from Pearce et al. 2025 was checked against the text of the ICLR version. Where the
paper shows a curve and gives no number, the table says `PICTURE`.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from bilens._core.display import Tabular
from bilens._core.files import destination_folder, write_atomically
from bilens.errors import ArgumentError

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from bilens.draw.page import Page

Rows: TypeAlias = Sequence[tuple[str, str, str]]
Figures: TypeAlias = "Mapping[str, go.Figure]"

PEARCE_2025 = "Pearce et al. 2025 (arXiv 2410.08417)"
PICTURE = "shown as a picture, no number given"
NOT_IN_PAPER = "not in the paper"


@dataclass(frozen=True)
class Settings:
    """What the recipes may be given.

    Attributes:
        model: What `load_model` takes. `None` is the bundled model, with its SAEs.
        saes: Where `load_sae` finds the model's SAEs. `None` is the model's own, or `<model>-scope`.
        layer: The one layer to measure. `None` leaves the choice to the recipe, which may take all of them.
        expansion, k: Features per dimension and active features per token of the SAEs, if there are several of a kind.
        texts: The texts to measure and to train on. `None` takes the example stories that come with the model.
        images: What `bilens.vision.load_images` takes.
        reduced: Everything small, to see that it runs.
        seed: The seed of everything that is trained.
    """

    model: str | None = None
    saes: str | None = None
    layer: int | None = None
    expansion: int | None = None
    k: int | None = None
    texts: Sequence[str] | None = None
    images: str = "digits"
    reduced: bool = False
    seed: int = 0


@dataclass(frozen=True)
class Reproduction(Tabular):
    """One figure made again.

    Attributes:
        name: The recipe's name.
        source: The paper and its figure.
        ran_on: The data, the sizes and the training that were used, beside the paper's.
        rows: What was measured, what the paper says of it, what came out here.
        figures: The figures by caption.
        words: What it comes to, sentence by sentence, where figures alone do not say it.
        seconds: How long it took.
    """

    name: str
    source: str
    ran_on: str
    rows: Rows
    figures: Figures = field(repr=False)
    words: Sequence[str] = ()
    seconds: float = 0.0

    def to_frame(self) -> "pd.DataFrame":
        """One row per quantity: `what, paper, here`."""
        import pandas as pd

        return pd.DataFrame(self.rows, columns=["what", "paper", "here"])

    def plot(self) -> "go.Figure":
        """The first figure."""
        return next(iter(self.figures.values()))

    @property
    def facts(self) -> str:
        """What was run, and how long it took, in a sentence each."""
        return f"Run on {self.ran_on}. It took {self.seconds:.0f} seconds."

    def to_page(self) -> "Page":
        """The table and all figures on one page."""
        from bilens.draw.page import Page, captioned

        page = Page(self.name, self.source)
        page.add(self.facts, *self.words, self.to_frame())
        return page.add(*(captioned(figure, caption) for caption, figure in self.figures.items()))

    def save(self, folder: str | PathLike[str]) -> Path:
        """Write `<name>.html` and `<name>.csv` into a folder, and return the page's path."""
        folder = destination_folder(folder)
        write_atomically(folder / f"{self.name}.csv", lambda beside: self.to_frame().to_csv(beside, index=False))
        return self.to_page().save(folder / f"{self.name}.html")

    def __str__(self) -> str:
        lines = [f"{self.name}: {self.source}", self.facts, *(f"- {line}" for line in self.words)]
        return "\n".join([*lines, self.to_frame().to_string(index=False)])


class Made(NamedTuple):
    """What a recipe gives; see `Reproduction`."""

    ran_on: str
    rows: Rows
    figures: Figures
    words: Sequence[str] = ()


Make: TypeAlias = Callable[[Settings], Made]


@dataclass(frozen=True)
class Recipe:
    """How to make one.

    Attributes:
        name: Its name on the command line.
        where: The figure, table or section of the paper.
        about: What is seen, in a line.
        reads: The settings it takes notice of, besides `reduced` and `seed`.
        make: The module and the function that makes it, imported when it is run.
        paper: The paper.
    """

    name: str
    where: str
    about: str
    reads: tuple[str, ...]
    make: str = field(repr=False)
    paper: str = PEARCE_2025

    @property
    def source(self) -> str:
        """The paper and the place in it."""
        return f"{self.paper}, {self.where}"

    def run(self, settings: Settings | None = None) -> Reproduction:
        """Make it; `None` takes the settings' defaults."""
        module, function = self.make.split(":")
        make: Make = getattr(import_module(f"bilens.reproduce.{module}"), function)
        start = time.monotonic()
        made = make(settings or Settings())
        return Reproduction(self.name, self.source, *made, seconds=time.monotonic() - start)


def check_settings(recipes: Sequence[Recipe], settings: Settings) -> None:
    """Refuse a setting that none of the recipes takes notice of.

    Raises:
        ArgumentError: there is such a setting; the message names those that the recipes do read.
    """
    read = [name for name in vars(settings) if any(name in one.reads for one in recipes)]
    default = vars(Settings())
    for name, value in vars(settings).items():
        if value != default[name] and name not in (*read, "reduced", "seed"):
            names = ", ".join(one.name for one in recipes)
            raise ArgumentError(f"{name} is {value!r:.60}, but {names} would not read it; expected {', '.join(read)}.")
