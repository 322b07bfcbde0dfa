"""Sweeps on disk: what was computed comes back, a stopped one goes on, another one is refused, two processes agree."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bilens._core.folders import alone_in
from bilens.decompose import Decomposer
from bilens.decompose import sweep as module
from bilens.decompose.sweep import Sweep, sweep_layers
from bilens.errors import (
    ArgumentError,
    CheckpointError,
    MissingSAEError,
    OutOfRangeError,
    OverwriteError,
    WriteError,
)
from tests.conftest import make_model
from tests.random_saes import D_SAE, make_sae


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 16)


def make(model, seed=0):
    return [
        Decomposer(
            model,
            layer,
            make_sae("topk", f"blocks.{layer}.ln2.hook_normalized", seed=seed + layer),
            make_sae("topk", f"blocks.{layer}.hook_mlp_out", seed=seed + 10 + layer),
        )
        for layer in range(2)
    ]


def same_files(one: Path, other: Path) -> bool:
    names = sorted(path.name for path in one.iterdir())
    return names == sorted(path.name for path in other.iterdir()) and all(
        (one / name).read_bytes() == (other / name).read_bytes() for name in names if name.endswith(".safetensors")
    )


@pytest.mark.parametrize("full", [False, True])
def test_what_was_computed_comes_back(models, tmp_path, full):
    decomposers = make(models(False, True))
    found = sweep_layers(decomposers, tmp_path, k=3, full=full)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "layer-0.safetensors",
        "layer-1.safetensors",
        "sweep.json",
    ]
    for again in (found, Sweep.load(tmp_path)):
        assert again.layers == [0, 1]
        for layer, decomposer in enumerate(decomposers):
            expected = decomposer.spectra(k=3, full=full, progress=False).to_frame()
            frame = again[layer].to_frame()
            assert list(frame.columns) == list(expected.columns)
            # Other blocks, so other orders of summation: float32 rounding.
            for column in ("eigenvalue_1", "eigenvalue_3", "norm", "trace", "cross_share"):
                assert frame[column].tolist() == pytest.approx(expected[column].tolist(), rel=1e-4, abs=1e-5)
    assert len(found.to_frame()) == 2 * D_SAE
    assert "medians" in str(found)
    assert list(found.plot().data[1].y) == [found[layer].eigen.shares.quantile(0.5).item() for layer in found.layers]


def test_a_stopped_sweep_goes_on(models, tmp_path, monkeypatch):
    decomposers = make(models(False, True))
    sweep_layers(decomposers, tmp_path / "whole")
    write, written = module._write, []

    def stops(path, found):
        if len(written) == 4:
            raise KeyboardInterrupt
        written.append(path.name)
        write(path, found)

    with monkeypatch.context() as patch:
        patch.setattr(module, "_write", stops)
        with pytest.raises(KeyboardInterrupt):
            sweep_layers(decomposers, tmp_path / "stopped")
    assert Sweep.load(tmp_path / "stopped").layers == []
    monkeypatch.setattr(module, "_write", lambda path, found: (written.append(path.name), write(path, found)))
    sweep_layers(decomposers, tmp_path / "stopped")
    assert len(written) == len(set(written)) == 6  # three blocks of each layer, none twice
    assert same_files(tmp_path / "whole", tmp_path / "stopped")
    sweep_layers(decomposers, tmp_path / "stopped")  # finished: nothing to do
    assert len(written) == 6


def test_another_sweep_is_refused(models, tmp_path):
    decomposers = make(models(False, True))
    sweep_layers(decomposers, tmp_path)
    with pytest.raises(OverwriteError, match=r"another sweep, k \(2 there, 3 here\)"):
        sweep_layers(decomposers, tmp_path, k=3)
    with pytest.raises(OverwriteError, match="another sweep, "):
        sweep_layers(make(models(False, True), seed=5), tmp_path)
    with pytest.raises(OverwriteError, match="another sweep, "):
        sweep_layers(make(make_model(seed=9)), tmp_path)
    found = Sweep.load(tmp_path)
    assert len(found.of(decomposers[1]).outputs) == D_SAE
    with pytest.raises(CheckpointError, match=r"another model than .* or of other SAEs on layer 1"):
        found.of(make(models(False, True), seed=5)[1])


def test_another_sweep_is_overwritten_by_the_word(models, tmp_path):
    """Then, and where nothing was found yet; files that no manifest speaks of are refused too."""
    here = tmp_path / "here"
    decomposers = make(models(False, True))
    sweep_layers(decomposers, tmp_path / "other", k=3)
    sweep_layers(decomposers, here)
    sweep_layers(decomposers, here, k=3, overwrite=True)
    assert same_files(tmp_path / "other", here)
    (here / "sweep.json").unlink()
    with pytest.raises(OverwriteError, match=r"layer-.*safetensors, and no sweep.json"):
        sweep_layers(decomposers, here, k=3)
    for path in here.glob("layer-*"):
        path.unlink()
    (here / "sweep.json").write_text((tmp_path / "other" / "sweep.json").read_text())
    assert sweep_layers(decomposers, here, k=2).facts["k"] == 2
    with alone_in(here), pytest.raises(WriteError, match="another process is writing to"):
        sweep_layers(decomposers, here)


@pytest.mark.parametrize(
    "wrong",
    [*({"k": k} for k in (0, -1, 1.5, True)), {"memory": 0}, {"memory": 1.5}, {"side": "in"}, {"method": "best"}],
    ids=str,
)
def test_settings_that_are_none(models, tmp_path, wrong):
    """Nothing is written that would refuse the corrected call."""
    with pytest.raises(ArgumentError, match=rf"^(sweep_layers: )?{next(iter(wrong))} "):
        sweep_layers(make(models(False, True)), tmp_path / "out", **wrong)
    assert not (tmp_path / "out").exists()


def test_what_is_refused(models, tmp_path):
    with pytest.raises(CheckpointError, match="holds no sweep"):
        Sweep.load(tmp_path)
    with pytest.raises(MissingSAEError):
        sweep_layers([Decomposer(models(False, True), 0)], tmp_path)
    with pytest.raises(MissingSAEError, match="no layers"):
        sweep_layers([], tmp_path)
    found = sweep_layers(make(models(False, True))[:1], tmp_path)
    with pytest.raises(OutOfRangeError, match=r"layer 1 is not in .*there are \[0\]"):
        found[1]
    damaged = tmp_path / "layer-0.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-50])
    with pytest.raises(CheckpointError, match="cannot be read"):
        found[0]


SCRIPT = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from bilens.decompose import sweep as module
from tests.conftest import make_model
from tests.decompose.test_sweep import make
module.BLOCK = 16
module.sweep_layers(make(make_model(seed=3)), Path(sys.argv[1]))
"""


def test_two_processes_write_what_one_writes(tmp_path):
    """Under torchrun, block by block: the same bits, and the same choice of method in both processes."""
    (tmp_path / "run.py").write_text(SCRIPT)
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    for n in (1, 2):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n}"]
        subprocess.run(
            [*command, str(tmp_path / "run.py"), str(tmp_path / f"by-{n}")], check=True, env=environment, timeout=240
        )
    one, two = (load_file(tmp_path / f"by-{n}" / "layer-1.safetensors") for n in (1, 2))
    for name, tensor in one.items():
        assert torch.equal(tensor, two[name]), name
