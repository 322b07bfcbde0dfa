"""Every recipe runs on reduced settings and says what it ran on; the list needs no heavy import; the command."""

import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pandas as pd
import pytest
from typer.testing import CliRunner

from bilens.cli import app
from bilens.errors import ArgumentError, OutOfRangeError
from bilens.reproduce import RECIPES, Settings, check_settings, recipe
from tests.conftest import make_model
from tests.random_saes import make_sae

HOOKS = {"mlp-in": "ln2.hook_normalized", "mlp-out": "hook_mlp_out"}


@pytest.fixture(scope="module")
def small(tmp_path_factory, tokenizer, texts):
    """Settings for a model of 16 dimensions with biases in its MLPs, saved with random SAEs: a user's own folders."""
    folder = tmp_path_factory.mktemp("reproduce")
    make_model(tokenizer=tokenizer, bias=True).save_pretrained(folder / "model")
    for layer in range(2):
        for seed, (point, hook) in enumerate(HOOKS.items()):
            sae = make_sae(hook=f"blocks.{layer}.{hook}", d_sae=32, seed=2 * layer + seed)
            sae.save_model(folder / "saes" / f"{layer}-{point}-x2-k7")
    return Settings(model=str(folder / "model"), saes=str(folder / "saes"), texts=texts, reduced=True)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_gives_rows_and_figures(name, small, tmp_path):
    one = recipe(name)
    made = one.run(Settings(reduced=True) if "images" in one.reads else small)
    frame = made.to_frame()
    assert list(frame.columns) == ["what", "paper", "here"]
    assert (frame["here"].str.len() > 0).all()
    assert not frame["what"].duplicated().any()  # a row says by itself what it is
    assert not frame["here"].str.contains("nan").any()
    assert made.figures
    page = made.save(tmp_path)
    assert page.stat().st_size < 10e6
    text = page.read_text().replace("&#x27;", "'")
    assert made.facts in text
    assert one.where in text
    if "images" in one.reads:
        assert "256" not in made.facts  # hidden units of the whole run
        assert "5 epochs" in made.facts
    assert pd.read_csv(tmp_path / f"{name}.csv", keep_default_na=False).equals(frame)
    assert made.facts in str(made)


def test_a_layer_is_measured_alone(small):
    one = Settings(**{**vars(small), "layer": 1})
    assert all("layer 1" in what for what, _, _ in recipe("low-rank").run(one).rows)
    with pytest.raises(OutOfRangeError, match="layer 7"):
        recipe("low-rank").run(Settings(**{**vars(small), "layer": 7}))


def test_names_are_listed_without_heavy_imports():
    code = (
        "import sys; from typer.testing import CliRunner; from bilens.cli import app\n"
        "out = CliRunner().invoke(app, ['reproduce']).output\n"
        "heavy = {'torch', 'pandas', 'plotly', 'transformers', 'sklearn'} & set(sys.modules)\n"
        "print(out, heavy or 'light')"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path.cwd())
    assert run.stdout.strip().endswith("light")
    for one in RECIPES.values():
        assert f"{one.name} " in run.stdout
        assert one.about in run.stdout


def test_every_recipe_is_where_the_list_says():
    for one in RECIPES.values():
        module, function = one.make.split(":")
        assert callable(getattr(import_module(f"bilens.reproduce.{module}"), function))


@pytest.mark.parametrize(
    ("names", "given", "message"),
    [
        (["masks"], {"layer": 1}, "layer is 1, but masks would not read it; expected images."),
        (["masks", "sizes"], {"texts": ["a"]}, r"texts is \['a'\], but masks, sizes would not read it"),
        (["low-rank"], {"images": "mnist"}, "images is 'mnist', but low-rank would not read it; expected model, saes,"),
        (["training-time"], {"saes": "mine"}, "saes is 'mine', .* expected model, layer, texts."),
    ],
)
def test_settings_that_no_recipe_reads_are_refused(names, given, message):
    with pytest.raises(ArgumentError, match=message):
        check_settings([recipe(name) for name in names], Settings(**given))
    check_settings([recipe(name) for name in (*names, "low-rank", "masks")], Settings(**given))


def test_the_command_writes_a_users_own_model_and_refuses(small, tmp_path):
    arguments = ["reproduce", "sae-loss", "--model", small.model, "--saes", small.saes, "--layer", "1"]
    data = tmp_path / "texts.txt"
    data.write_text("\n\n".join(small.texts[:30]))
    done = CliRunner().invoke(app, [*arguments, "--texts", str(data), "--reduced", "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert "layer 1" in (tmp_path / "sae-loss.csv").read_text()
    wrong = CliRunner().invoke(app, ["reproduce", "masks", "--layer", "1"])
    assert isinstance(wrong.exception, ArgumentError)
    with pytest.raises(ArgumentError, match="Did you mean 'low-rank'"):
        recipe("lowrank")
