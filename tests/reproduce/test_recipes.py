"""Every recipe runs on reduced settings and says what is in its table; the command writes a page and a table."""

import pandas as pd
import pytest
from typer.testing import CliRunner

from bilens.cli import app
from bilens.errors import ArgumentError
from bilens.reproduce.registry import RECIPES, recipe
from bilens.reproduce.reproduction import Settings


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_gives_rows_and_figures(name, tmp_path):
    made = recipe(name).run(Settings(reduced=True))
    frame = made.to_frame()
    assert list(frame.columns) == ["what", "paper", "here"]
    assert (frame["here"].str.len() > 0).all()
    assert made.figures
    page = made.save(tmp_path)
    assert page.stat().st_size < 10e6
    assert made.scaled_down in page.read_text().replace("&#x27;", "'")
    assert pd.read_csv(tmp_path / f"{name}.csv", keep_default_na=False).equals(frame)
    assert made.scaled_down in str(made)


def test_the_command_lists_and_refuses():
    listed = CliRunner().invoke(app, ["reproduce"])
    assert listed.exit_code == 0
    assert all(name in listed.output for name in RECIPES)
    with pytest.raises(ArgumentError, match="Did you mean 'low-rank'"):
        recipe("lowrank")
