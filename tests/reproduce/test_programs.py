"""The scoreboard: its measures are what they are called, and the given program reaches what is known of it."""

from pathlib import Path

import pytest
import torch

from bilens.reproduce import Settings, recipe
from bilens.reproduce.programs import auroc, average_precision


def test_measures() -> None:
    """By counting: of 2 right and 3 wrong, pairs in order; precision where each right one is told; ties count half."""
    scores, right = torch.tensor([0.9, 0.8, 0.7, 0.6, 0.5]), torch.tensor([True, False, True, False, False])
    assert auroc(scores, right) == pytest.approx(5 / 6)
    assert average_precision(scores, right) == pytest.approx((1 + 2 / 3) / 2)
    assert auroc(torch.ones(5), right) == 0.5
    assert average_precision(torch.ones(5), right) == pytest.approx(2 / 5)


def test_the_given_program(shared: Path) -> None:
    folder = shared / "truth"
    if not folder.exists():
        pytest.skip(f"the known program is not here: no folder {folder}")
    rows = {what: here for what, _, here in recipe("programs").run(Settings(model=str(folder), reduced=True)).rows}
    assert rows["bigram rules"].startswith("24 of 24, 0 false")
    assert rows["skip rules, next to each other"].startswith("24 of 24, 0 false")
    assert rows["the window of skip rules"].startswith("12 tokens")
    assert rows["of two places that disagree the later wins"] == "52 of 52"
    assert rows["induction at distance 2"].startswith("AUROC of the match 1.000")
    assert "precision 1.000, recall 0.9" in rows["induction at distance 2"]
