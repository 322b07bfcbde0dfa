"""SAEs in: published repositories (`<model>-scope`), SAELens folders, and those bundled with bilens.

A source holds one folder per SAE, named `{layer}-{point}-x{expansion}-k{k}[-{tag}]` (without `-k{k}` where the SAE has
none; the point of a hook that has no published name is the rest of the hook's), in one of two formats:

    published    config.json + model.safetensors        read as a `ScopeSAE`
    saelens      cfg.json + sae_weights.safetensors     read by `SAE.load_from_disk`

Every SAE loaded here reads and writes the TransformerLens hook of its point. A published attn-out SAE was trained
before the residual scale `s` and the hook comes after it, so `s` is folded into its weights.
"""

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from sae_lens import SAE
from sae_lens.constants import SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME
from sae_lens.saes.sae import SAEMetadata
from sae_lens.util import dtype_to_str
from torch import Tensor

from bilens._core.display import Tabular
from bilens._core.files import read_json, to_path
from bilens.errors import CheckpointError, ModelNotFoundError, SAEMismatchError, nearest
from bilens.model.config import check_positive_integers
from bilens.model.hub import HubOptions, fetch_from_hub
from bilens.model.loading import (
    CONFIG_FILE,
    HUB_ID,
    PRETRAINED,
    WEIGHTS_FILE,
    check_shapes,
    list_models,
    read_tensors,
    resolve_device,
    resolve_dtype,
)
from bilens.sae.scope import ScopeSAE, ScopeSAEConfig

POINT_TO_HOOK = {
    "resid-pre": "hook_resid_pre",
    "resid-mid": "hook_resid_mid",
    "resid-post": "hook_resid_post",
    "mlp-in": "ln2.hook_normalized",
    "mlp-out": "hook_mlp_out",
    "attn-out": "hook_attn_out",
}
HOOK_TO_POINT = {hook: point for point, hook in POINT_TO_HOOK.items()}
FORMATS = {
    "published": (CONFIG_FILE, WEIGHTS_FILE),
    "saelens": (SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME),
}
OTHER_POINT = r"(?:\w+\.)*hook_\w+"
FOLDER_NAME = re.compile(rf"(\d+)-({'|'.join(POINT_TO_HOOK)}|{OTHER_POINT})-x(\d+)(?:-k(\d+))?(?:-([\w.+-]+))?")
EXPECTED = "expected the name {layer}-{point}-x{expansion}-k{k}[-{tag}], and in it " + " or ".join(
    f"{config} + {weights}" for config, weights in FORMATS.values()
)


def hook_of(point: str, layer: int) -> str:
    """The TransformerLens hook of a published point: `("mlp-in", 3)` is `blocks.3.ln2.hook_normalized`.

    Any other hook of a block is its own point: `("mlp.hook_post", 3)` is `blocks.3.mlp.hook_post`.

    Raises:
        SAEMismatchError: no such point (with the nearest).
    """
    if re.fullmatch(OTHER_POINT, point):
        return f"blocks.{layer}.{point}"
    if point not in POINT_TO_HOOK:
        raise SAEMismatchError(
            f"point {point!r} is not one of {', '.join(POINT_TO_HOOK)}." + nearest(point, POINT_TO_HOOK)
        )
    return f"blocks.{layer}.{POINT_TO_HOOK[point]}"


def point_of(hook_name: str) -> tuple[str, int]:
    """The published point and layer of a hook: the inverse of `hook_of`.

    Raises:
        SAEMismatchError: a hook that has no published point.
    """
    match = re.fullmatch(r"blocks\.(\d+)\.(.+)", hook_name)
    if match is None or match[2] not in HOOK_TO_POINT:
        hooks = [f"blocks.{match[1] if match else 0}.{hook}" for hook in HOOK_TO_POINT]
        raise SAEMismatchError(
            f"hook {hook_name!r} has no published point; those that have are {', '.join(hooks)}."
            + nearest(hook_name, hooks)
        )
    return HOOK_TO_POINT[match[2]], int(match[1])


def folder_name(point: str, layer: int, expansion: int, k: int | None, tag: str | None = None) -> str:
    """What the folder of an SAE is called: `3-mlp-in-x4-k30`, or `3-mlp-in-x4-k30-tag`; without a k, `3-mlp-in-x4`."""
    parts = (f"{layer}-{point}-x{expansion}", None if k is None else f"k{k}", tag)
    return "-".join(part for part in parts if part)


@dataclass(frozen=True)
class SAEEntry:
    """One SAE of a source, by its folder's name; `k` is `None` where it has none, `format` `published` or `saelens`."""

    folder: str
    point: str
    layer: int
    expansion: int
    k: int | None
    tag: str | None
    hook_name: str
    format: str


class SAEList(Tabular, tuple[SAEEntry, ...]):
    """The SAEs of a source by layer, then by the point's place in the block."""

    def to_frame(self) -> pd.DataFrame:
        """One row per SAE, one column per field of `SAEEntry`."""
        return pd.DataFrame([asdict(entry) for entry in self], columns=[field.name for field in fields(SAEEntry)])


def list_saes(
    source: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> SAEList:
    """What SAEs there are; from the hub, only their configs are downloaded.

    Args:
        source: a bundled model's name, a folder of SAE folders, or a hub id such as `tdooms/ts-medium-scope`.
        revision, token, cache_dir, local_files_only: of a hub repository, as in `bilens.load_model`.

    Raises:
        ModelNotFoundError: nothing of that name, or not to be had from the hub.
    """
    return _entries(source, "*", HubOptions(revision, token, cache_dir, local_files_only))


def load_sae(
    source: str | os.PathLike[str],
    point: str,
    layer: int,
    expansion: int | None = None,
    k: int | None = None,
    tag: str | None = None,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str = torch.float32,
    n_layers: int | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> SAE[Any]:
    """Load one SAE; from the hub, only its folder is downloaded, and the configs at that point and layer.

    Args:
        source: a bundled model's name, a folder of SAE folders, or a hub id such as `tdooms/ts-medium-scope`.
        point: `resid-pre`, `resid-mid`, `resid-post`, `mlp-in`, `mlp-out` or `attn-out`.
        layer: of the model, from 0.
        expansion: `d_sae / d_in`; `None` where the rest says which SAE is meant.
        k: features kept per token; likewise.
        tag: likewise; `""` is the SAE without a tag.
        device: `None` takes CUDA where there is one.
        dtype: of the weights in memory (`torch.float32`, `"bfloat16"`, ...); `"auto"` keeps the file's.
        n_layers: of the model; needed for a published attn-out SAE alone, which reads attention before the factor
            `s = 1/sqrt(2 n_layers)` while `hook_attn_out` includes it.
        revision, token, cache_dir, local_files_only: of a hub repository, as in `bilens.load_model`.

    Returns:
        a `ScopeSAE` for the published format, else the SAELens class that the folder names. It reads and reconstructs
        the hook `sae.cfg.metadata.hook_name`.

    Raises:
        ModelNotFoundError: no such source, not to be had from the hub, or no such SAE in it (with what there is, and
            the nearest).
        SAEMismatchError: an unknown point, several SAEs that fit, a folder that holds another SAE than its name says, a
            transcoder, or an attn-out SAE without `n_layers`.
        CheckpointError: the files are truncated, incomplete, of the wrong shapes, or hold NaN.
    """
    hub = HubOptions(revision, token, cache_dir, local_files_only)
    entry = _select(source, point, layer, expansion, k, tag, hub)
    files = [f"{entry.folder}/{file}" for file in FORMATS[entry.format]]
    root = _root(source, files, hub, needed=files)
    return load_sae_folder(root / entry.folder, device=device, dtype=dtype, n_layers=n_layers)


def load_sae_folder(
    folder: str | os.PathLike[str],
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str = torch.float32,
    n_layers: int | None = None,
) -> SAE[Any]:
    """Load the SAE in a folder; arguments, result and errors are those of `load_sae`.

    Args:
        folder: of either format, named `{layer}-{point}-x{expansion}-k{k}[-{tag}]`.
    """
    folder = to_path(folder, "folder")
    entry = _read_entry(folder)
    if entry is None:
        raise ModelNotFoundError(f"{folder} is no SAE folder: {EXPECTED}.")
    device = resolve_device(device)
    if entry.format == "saelens":
        return _load_saelens(folder, entry, device, dtype)
    return _load_published(folder, entry, device, dtype, n_layers)


def scope_loader(
    repo_id: str,
    folder_name: str,
    device: str = "cpu",
    force_download: bool = False,
    cfg_overrides: dict[str, Any] | None = None,
    *,
    n_layers: int | None = None,
) -> tuple[dict[str, Any], dict[str, Tensor], None]:
    """SAELens' way to a published repository: `SAE.from_pretrained(repo_id, folder_name, converter=scope_loader)`.

    Args:
        repo_id: a hub id such as `tdooms/ts-medium-scope`.
        folder_name: of the SAE in it.
        device: of the weights.
        force_download: not needed: what is in the cache is checked against the hub's.
        cfg_overrides: SAELens' own, put over the configuration.
        n_layers: as for `load_sae`: for a published attn-out SAE, `converter=partial(scope_loader, n_layers=...)`.

    Returns:
        The configuration, the weights, and no sparsity, which published repositories do not hold.
    """
    files = [f"{folder_name}/{file}" for names in FORMATS.values() for file in names]
    root = _root(repo_id, files, HubOptions())
    sae = load_sae_folder(root / folder_name, device=device, dtype="auto", n_layers=n_layers)
    return sae.cfg.to_dict() | (cfg_overrides or {}), sae.state_dict(), None


# --- finding ----------------------------------------------------------------------------------------------------------


def _root(source: str | os.PathLike[str], files: list[str], hub: HubOptions, needed: Sequence[str] = ()) -> Path:
    """The folder that holds a source's SAE folders; from the hub, with those of `files` that it has."""
    if str(source) in list_models():
        hub.refuse_revision(str(source))
        return PRETRAINED / str(source) / "saes"
    path = to_path(source, "source")
    if path.is_dir():
        hub.refuse_revision(str(source))
        return path
    if isinstance(source, str) and HUB_ID.fullmatch(source):
        return fetch_from_hub(source, files, needed, hub)
    raise ModelNotFoundError(
        f"no SAEs {str(source)!r}: not a bundled model ({', '.join(list_models()) or 'none here'}), not a folder, and "
        "not a hub id of the form owner/name." + nearest(str(source), list_models())
    )


def _entries(source: str | os.PathLike[str], pattern: str, hub: HubOptions) -> SAEList:
    """The SAEs whose folders' names match a glob pattern."""
    root = _root(source, [f"{pattern}/{config}" for config, _ in FORMATS.values()], hub)
    entries = [entry for folder in root.glob(pattern) if (entry := _read_entry(folder))]
    points = [*POINT_TO_HOOK, *sorted({e.point for e in entries} - set(POINT_TO_HOOK))]
    return SAEList(sorted(entries, key=lambda e: (e.layer, points.index(e.point), e.expansion, e.k or 0, e.folder)))


def _read_entry(folder: Path) -> SAEEntry | None:
    """What a folder's name and files say; `None` where it is no SAE folder."""
    match = FOLDER_NAME.fullmatch(folder.name)
    formats = [name for name, (config, _) in FORMATS.items() if (folder / config).is_file()]
    if match is None or not formats:
        return None
    layer, point, expansion, k, tag = match.groups()
    hook = hook_of(point, int(layer))
    return SAEEntry(folder.name, point, int(layer), int(expansion), int(k) if k else None, tag, hook, formats[0])


def _select(
    source: str | os.PathLike[str],
    point: str,
    layer: int,
    expansion: int | None,
    k: int | None,
    tag: str | None,
    hub: HubOptions,
) -> SAEEntry:
    """The one SAE that fits what was asked for."""
    hook_of(point, layer)  # a misspelt point is an error of its own
    here = _entries(source, f"{layer}-{point}-*", hub)
    fits = [
        entry
        for entry in here
        if expansion in (None, entry.expansion) and k in (None, entry.k) and tag in (None, entry.tag or "")
    ]
    if len(fits) == 1:
        return fits[0]
    if fits:
        raise SAEMismatchError(
            f"{len(fits)} SAEs of {str(source)!r} fit: {_names(fits)}. Say which by expansion=, k= or tag= (tag='' is "
            "the one without a tag)."
        )
    asked = f"{layer}-{point}-x{expansion or '*'}-k{k or '*'}" + (f"-{tag}" if tag else "")
    there = here or _entries(source, "*", hub)
    if not there:
        raise ModelNotFoundError(
            f"{str(source)!r} holds no SAE folder: {EXPECTED}. The authors' SAEs of a model are in <model>-scope."
        )
    raise ModelNotFoundError(
        f"{str(source)!r} holds no SAE {asked!r}; {'of that point and layer ' if here else ''}it holds {_names(there)}."
        + nearest(asked, [entry.folder for entry in there])
    )


def _names(entries: Iterable[SAEEntry], at_most: int = 12) -> str:
    names = [entry.folder for entry in entries]
    return ", ".join(names[:at_most]) + (f", ... ({len(names)} in all)" if len(names) > at_most else "")


# --- reading ----------------------------------------------------------------------------------------------------------


def _load_published(
    folder: Path, entry: SAEEntry, device: str | torch.device, dtype: torch.dtype | str, n_layers: int | None
) -> ScopeSAE:
    config = read_json(folder / CONFIG_FILE)
    _check_published(config, folder, entry)
    cfg = ScopeSAEConfig(
        d_in=config["d_model"],
        d_sae=config["expansion"] * config["d_model"],
        k=config["k"],
        bilinear_encoder=bool(config.get("bilinear_encoder", False)),
        device="meta",  # the weights are about to be put in, so drawing them would be wasted
        metadata=SAEMetadata(hook_name=entry.hook_name, context_size=config.get("n_ctx")),
    )
    shapes: dict[str, tuple[int, ...]] = {
        "w_enc.weight": (cfg.d_enc, cfg.d_in),
        "w_dec.weight": (cfg.d_in, cfg.d_sae),
        "b_dec": (cfg.d_in,),
    }
    if config.get("encoder_bias", False):
        shapes["w_enc.bias"] = (cfg.d_enc,)
    tensors = read_tensors(folder / WEIGHTS_FILE)
    check_shapes(tensors, shapes, folder / WEIGHTS_FILE)
    w_enc = tensors["w_enc.weight"]
    weights = {
        "W_enc": w_enc.T.contiguous(),
        "b_enc": tensors.get("w_enc.bias", w_enc.new_zeros(cfg.d_enc)),
        "W_dec": tensors["w_dec.weight"].T.contiguous(),
        "b_dec": tensors["b_dec"],
    }
    sae = ScopeSAE(cfg)
    sae.load_state_dict(weights, assign=True)
    sae.to(device=device, dtype=resolve_dtype(dtype, w_enc.dtype))
    if entry.point == "attn-out":
        sae.fold_activation_norm_scaling_factor(_before_residual_scale(folder, n_layers))
    return sae.eval()


def _check_published(config: dict[str, Any], folder: Path, entry: SAEEntry) -> None:
    """Refuse a config that is incomplete, that is not what its folder's name says, or that is not of an autoencoder."""
    check_positive_integers(config, ("d_model", "expansion", "k"))
    point, layer = _read_point(config.get("point"), folder)
    named = folder_name(point, layer, config["expansion"], config["k"], entry.tag)
    if named != entry.folder:
        raise SAEMismatchError(
            f"{folder / CONFIG_FILE} describes the SAE {named!r}, its folder is called {entry.folder!r}."
        )
    if config.get("target") is not None and _read_point(config["target"], folder) != (point, layer):
        raise SAEMismatchError(
            f"{folder} is a transcoder: it reads {point} of layer {layer} and writes {config['target']}. bilens takes "
            "SAEs that reconstruct what they read."
        )
    if config["k"] > config["expansion"] * config["d_model"]:
        raise CheckpointError(f"{folder / CONFIG_FILE}: k {config['k']} is more than the SAE has features.")


def _read_point(point: Any, folder: Path) -> tuple[str, int]:
    if not (isinstance(point, list) and len(point) == 2 and isinstance(point[0], str) and isinstance(point[1], int)):
        raise CheckpointError(f"{folder / CONFIG_FILE}: point is {point!r}, expected [name, layer].")
    return point[0].replace("_", "-"), point[1]  # as the authors' code does for the folder's name


def _before_residual_scale(folder: Path, n_layers: int | None) -> float:
    """`1/s = sqrt(2 n_layers)`: what takes `hook_attn_out` back to the point that a published SAE was trained on."""
    if n_layers is None or n_layers < 1:
        raise SAEMismatchError(
            f"{folder.name} reads attention before the factor s = 1/sqrt(2 n_layers), hook_attn_out includes it. "
            f"Folding s into the SAE needs n_layers= of the model (model.cfg.n_layers), got {n_layers}."
        )
    return (2 * n_layers) ** 0.5


def _load_saelens(folder: Path, entry: SAEEntry, device: str | torch.device, dtype: torch.dtype | str) -> SAE[Any]:
    read_json(folder / SAE_CFG_FILENAME)  # SAELens does not look for truncation and NaN; these two do
    tensors = read_tensors(folder / SAE_WEIGHTS_FILENAME)
    stored = next((tensor.dtype for tensor in tensors.values()), torch.float32)
    wanted = dtype_to_str(resolve_dtype(dtype, stored))
    try:
        sae = SAE.load_from_disk(folder, device=str(device), dtype=wanted)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{folder}: SAELens cannot load it: {type(error).__name__}: {error}") from error
    metadata = sae.cfg.metadata
    if metadata.hook_name not in (None, entry.hook_name):
        raise SAEMismatchError(f"{folder} was trained on {metadata.hook_name}, its name puts it on {entry.hook_name}.")
    metadata.hook_name = entry.hook_name
    return sae.eval()
