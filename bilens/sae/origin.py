"""Where an SAE was loaded from, for as long as it is what was loaded: what is kept there is of those weights."""

from pathlib import Path
from typing import Any

from bilens._core.fingerprint import Snapshot

# What may be kept beside the weights: names (`names_file`) and examples (`kept`).
NAMES_FILE, EXAMPLES_FILE = "names.json", "examples.safetensors.gz"
_ORIGIN = "_bilens_origin"


def remember_origin(sae: Any, folder: Path, weights: str) -> None:
    """Note that an SAE is the one in a folder, whose weights are in that file."""
    setattr(sae, _ORIGIN, (folder / weights, Snapshot(saes={"the SAE": sae})))


def weights_of(sae: Any) -> Path | None:
    """The file that an SAE's weights are in; `None` where they were changed since, moved, or come from elsewhere."""
    path, snapshot = getattr(sae, _ORIGIN, (None, None))
    return None if snapshot is None or snapshot.changed() else path


def forget_origin(sae: Any) -> None:
    """Take an SAE for one from nowhere."""
    delattr(sae, _ORIGIN)
