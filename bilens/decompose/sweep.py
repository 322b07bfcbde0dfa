"""A whole model's spectra, written to a folder: what `bilens sweep` does.

    1. a sweep is known by a fingerprint of the model, its SAEs and the settings; a folder of another one is refused
    2. every layer's output features in blocks of 512, shared among the processes of `torchrun` (block b is process
       b mod N's); each block is a file, so that a run that was stopped goes on with the blocks that are missing
    3. process 0 puts a layer's blocks together into one file and deletes them

The same blocks are computed the same way by however many processes, so N of them write the file that one writes.
"""

import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import pandas as pd
import plotly.graph_objects as go
import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from bilens._core import parallel
from bilens._core.checks import MEMORY, check_choice, check_flags, check_sizes
from bilens._core.display import Tabular
from bilens._core.files import destination_folder, read_json, to_path, write_atomically
from bilens._core.fingerprint import fingerprint, model_fingerprint, sae_fingerprint
from bilens._core.folders import alone_in, differing, make_room, write_json
from bilens._core.typing import typed
from bilens.decompose.decomposer import Decomposer, Side
from bilens.decompose.spectra import Spectra
from bilens.draw import plots
from bilens.errors import ArgumentError, CheckpointError, MissingSAEError, OutOfRangeError
from bilens.layer.eigen.solve import LeadingEigenpairs, Method
from bilens.model.files import read_tensors

MANIFEST = "sweep.json"
BLOCK = 2048  # output features
TENSORS = ("values", "vectors", "errors", "residuals", "norms", "traces", "status", "steps")
OPTIONAL = ("cross_share", "effective_rank")


@dataclass(frozen=True)
class Sweep(Tabular):
    """The spectra of every layer that was swept, read from the folder as they are asked for.

    Attributes:
        folder: the folder they are in.
        facts: the manifest: fingerprint and settings.
        names: labels of each layer's output features, for tables.
    """

    folder: Path
    facts: Mapping[str, Any]
    names: Mapping[int, Sequence[str]] | None = None

    @classmethod
    def load(cls, folder: str | os.PathLike[str], names: Mapping[int, Sequence[str]] | None = None) -> "Sweep":
        """Open a folder that `sweep` wrote.

        Raises:
            CheckpointError: no sweep there, or a damaged one.
        """
        path = to_path(folder, "folder") / MANIFEST
        if not path.is_file():
            raise CheckpointError(f"{folder} holds no sweep: there is no {MANIFEST}. `bilens sweep` writes one.")
        return cls(path.parent, _read_manifest(path), names)

    @property
    def layers(self) -> list[int]:
        """The layers that are finished."""
        return sorted(int(layer) for layer in self.facts["layers"] if _layer_file(self.folder, int(layer)).is_file())

    def __getitem__(self, layer: int) -> Spectra:
        """One layer's spectra."""
        if layer not in self.layers:
            raise OutOfRangeError(f"layer {layer} is not in {self.folder}; there are {self.layers}.")
        path = _layer_file(self.folder, layer)
        tensors = read_tensors(path)
        if missing := set(TENSORS) - tensors.keys():
            raise CheckpointError(f"{path} has no {min(missing)!r}. Delete it and run the sweep again.")
        eigen = LeadingEigenpairs(**{name: tensors[name] for name in TENSORS}, method=self.facts["solver"])
        return Spectra(
            outputs=torch.arange(len(eigen.values)),
            eigen=eigen,
            **{name: tensors.get(name) for name in OPTIONAL},
            names=None if self.names is None else self.names.get(layer),
        )

    def of(self, decomposer: Decomposer) -> Spectra:
        """The spectra of a decomposer's layer, if it is the one that was swept.

        Raises:
            CheckpointError: the sweep is of another model or other SAEs.
            OutOfRangeError: the layer is not in it.
        """
        found = self[decomposer.layer]
        if self.facts["fingerprints"].get(str(decomposer.layer)) != _fingerprint(decomposer):
            raise CheckpointError(
                f"{self.folder} is the sweep of another model than {decomposer.model.cfg.model_name!r}, or of other "
                f"SAEs on layer {decomposer.layer}."
            )
        return found

    def to_frame(self) -> pd.DataFrame:
        """One row per layer and output feature: `layer`, then the columns of `Spectra`."""
        frames = []
        for layer in self.layers:
            frame = self[layer].to_frame()
            frame.insert(0, "layer", layer)
            frames.append(frame)
        return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()

    def plot(self) -> go.Figure:
        """How low-rank the layers are: the share of the leading eigenpairs, its median and quartiles."""
        quantiles = {"upper quartile": 0.75, "median": 0.5, "lower quartile": 0.25}
        shares = {layer: self[layer].eigen.shares for layer in self.layers}
        curves = {name: [share.quantile(q).item() for share in shares.values()] for name, q in quantiles.items()}
        return plots.line(list(shares), curves, x_title="layer", y_title="share of the leading eigenpairs")

    def __str__(self) -> str:
        frame = self.to_frame()
        if frame.empty:
            return f"{self.folder}: no layer is finished."
        columns = [name for name in ("share", "norm", "cross_share", "effective_rank") if name in frame]
        return f"{self.folder}: medians over output features\n{frame.groupby('layer')[columns].median().round(4)}"


@typed
def sweep_layers(
    decomposers: Sequence[Decomposer],
    out: str | os.PathLike[str],
    *,
    k: int = 2,
    side: Side = "encoder",
    full: bool = False,
    method: Method = "auto",
    memory: int = MEMORY,
    overwrite: bool = False,
) -> Sweep:
    """Spectra of all output features of several layers, into a folder; run again, it goes on where it stopped.

    Args:
        decomposers: one per layer, of one model.
        out: the folder.
        k: leading eigenpairs of every feature.
        side: the encoder or decoder direction.
        full: also effective ranks; see `Decomposer.spectra`.
        method: see `top_eigenpairs`.
        memory: bytes to work in, and at most as many for the result; 1 GiB by default.
        overwrite: remove another sweep that is in the folder, instead of refusing.

    Raises:
        ArgumentError: `k`, side, method or memory is not one of those that there are.
        MissingSAEError: a layer without an output SAE.
        OverwriteError: the folder holds the sweep of another model, other SAEs or settings.
        WriteError: another process is at work in the folder, or the disk is full.
    """
    if not decomposers:
        raise MissingSAEError("there are no layers to sweep; give the Decomposer of at least one.")
    check_sizes(k=k, memory=memory)
    if k > (d_model := decomposers[0].model.cfg.d_model):
        raise ArgumentError(f"k is {k}, expected at most d_model, {d_model}.")
    check_flags(full=full)
    check_choice(get_args(Side), side=side)
    check_choice(get_args(Method), method=method)
    folder = destination_folder(out)
    blocks = {d.layer: torch.arange(d.output_view.d_sae).split(BLOCK) for d in decomposers}
    with parallel.processes(), alone_in(folder) if parallel.is_main() else nullcontext():
        facts = _agree(decomposers, folder, {"k": k, "side": side, "full": full}, method, overwrite)
        todo = [
            (decomposer, number, block)
            for decomposer in decomposers
            if not _layer_file(folder, decomposer.layer).is_file()
            for number, block in enumerate(blocks[decomposer.layer])
            if not _block_file(folder, decomposer.layer, number).is_file()
        ]
        parallel.barrier()  # nobody writes before all have seen the same list
        bar = tqdm(
            total=sum(len(block) for *_, block in todo), unit="output", desc="sweep", disable=not parallel.is_main()
        )
        for place, (decomposer, number, block) in enumerate(todo):
            if place % parallel.world_size() == parallel.rank():
                found = decomposer.spectra(
                    block, k, side, full=full, memory=memory, method=facts["solver"], progress=False
                )
                _write(_block_file(folder, decomposer.layer, number), found)
            bar.update(len(block))
        bar.close()
        parallel.barrier()
        if parallel.is_main():
            for layer, parts in blocks.items():
                _put_together(folder, layer, len(parts))
        parallel.barrier()
    return Sweep(folder, facts)


def _fingerprint(decomposer: Decomposer) -> str:
    return fingerprint(
        {},
        {
            "model": model_fingerprint(decomposer.model),
            "output": sae_fingerprint(decomposer.output_sae) if decomposer.output_sae else None,
            "input": sae_fingerprint(decomposer.input_sae) if decomposer.input_sae else None,
        },
    )


def _agree(
    decomposers: Sequence[Decomposer], folder: Path, settings: dict[str, Any], method: Method, overwrite: bool
) -> dict[str, Any]:
    """The manifest: written by process 0, or found there and compared."""
    identity = {
        "fingerprints": {str(d.layer): _fingerprint(d) for d in decomposers},
        "model": decomposers[0].model.cfg.model_name,
        "layers": [d.layer for d in decomposers],
    } | settings
    identity |= {} if method == "auto" else {"solver": method}
    path = folder / MANIFEST
    found = _read_manifest(path) if path.is_file() else None
    results = [*folder.glob("layer-*.safetensors"), *folder.glob(".layer-*.safetensors")]
    if found is None:
        differ = f"it has {results[0].name}, and no {MANIFEST}" if results else ""
    else:
        differ = differing(found, identity)

    def remove() -> None:
        for file in [path, *results]:
            file.unlink(missing_ok=True)

    make_room(folder, differ and f"another sweep, {differ}", remove, overwrite=overwrite or not results)
    if parallel.is_main() and not path.is_file():
        facts = identity | {"solver": method}
        write_json(path, facts)
    parallel.barrier()
    return _read_manifest(path)


def _read_manifest(path: Path) -> dict[str, Any]:
    facts = read_json(path, remedy="Delete the folder and run the sweep again.")
    layers = facts.get("layers")
    whole = isinstance(layers, list) and all(type(layer) is int for layer in layers)
    if not (whole and isinstance(facts.get("fingerprints"), dict) and isinstance(facts.get("solver"), str)):
        raise CheckpointError(f"{path} is no sweep that bilens wrote. Delete the folder and run the sweep again.")
    return facts


def _write(path: Path, found: Spectra) -> None:
    tensors = {name: getattr(found.eigen, name) for name in TENSORS}
    tensors |= {name: value for name in OPTIONAL if (value := getattr(found, name)) is not None}
    stored: dict[str, Tensor] = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    write_atomically(path, lambda beside: save_file(stored, beside))


def _put_together(folder: Path, layer: int, n_blocks: int) -> None:
    path = _layer_file(folder, layer)
    files = [_block_file(folder, layer, number) for number in range(n_blocks)]
    if not path.is_file():
        parts = [read_tensors(file) for file in files]
        whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        write_atomically(path, lambda beside: save_file(whole, beside))
    for file in files:
        file.unlink(missing_ok=True)


def _layer_file(folder: Path, layer: int) -> Path:
    return folder / f"layer-{layer}.safetensors"


def _block_file(folder: Path, layer: int, number: int) -> Path:
    return folder / f".layer-{layer}-{number}.safetensors"
