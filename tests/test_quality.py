"""The package is quick to import, and every public name is there. `.ci/run` lints, formats and types the code."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_import_and_help_load_nothing_heavy():
    """`import bilens` and `bilens --help` stay quick because no heavy package is imported by them."""
    code = (
        "import sys, bilens, bilens.cli\n"
        "from typer.testing import CliRunner\n"
        "assert CliRunner().invoke(bilens.cli.app, ['--help']).exit_code == 0\n"
        "heavy = {'torch', 'transformer_lens', 'sae_lens', 'transformers', 'datasets', 'pandas', 'plotly', 'numpy'}\n"
        "print(sorted(heavy & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_public_name_resolves():
    import bilens

    for name in bilens.__all__:
        assert getattr(bilens, name) is not None
        assert name in dir(bilens)
    for package in (
        "attribute",
        "decompose",
        "draw",
        "layer",
        "model",
        "pages",
        "reproduce",
        "sae",
        "toy",
        "train",
        "vision",
    ):
        assert getattr(bilens, package).__name__ == f"bilens.{package}"
    with pytest.raises(AttributeError, match="no attribute 'loadmodel'"):
        _ = bilens.loadmodel
