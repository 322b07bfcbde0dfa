"""SAEs in: published repositories (`<model>-scope`), folders of SAELens and sparsify, and those bundled with bilens.

A source holds one folder per SAE, named `{layer}-{point}-x{expansion}-k{k}[-{tag}]` (without `-k{k}` where the SAE has
none; the point of a hook that has no published name is the rest of the hook's), in one of three formats:

    published    config.json + model.safetensors        read as a `ScopeSAE`
    saelens      cfg.json + sae_weights.safetensors     read by `SAE.load_from_disk`
    sparsify     cfg.json + sae.safetensors             a top-k SAE of EleutherAI's library, read as SAELens' `TopKSAE`

A SAELens folder may have any name if its `cfg.json` says which hook it was trained on, a sparsify folder may be named
by the module (`layers.3.mlp`). The source may also be one such folder itself.

Every SAE loaded here reads and writes the TransformerLens hook of its point. A published attn-out SAE was trained
before the residual scale `s` and the hook comes after it, so `s` is folded into its weights.
"""

import os
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from math import isfinite
from numbers import Integral
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from sae_lens import SAE, TopKSAE, TopKSAEConfig
from sae_lens.constants import (
    ACTIVATION_SCALER_CFG_FILENAME,
    ACTIVATION_WHITENING_FILENAME,
    SAE_CFG_FILENAME,
    SAE_WEIGHTS_FILENAME,
    SPARSIFY_WEIGHTS_FILENAME,
)
from sae_lens.loading.pretrained_sae_loaders import handle_config_defaulting
from sae_lens.registry import SAE_CLASS_REGISTRY
from sae_lens.saes.sae import SAEMetadata
from sae_lens.util import dtype_to_str
from torch import Tensor

from bilens._core.checks import check_finite
from bilens._core.display import Tabular
from bilens._core.files import read_json, to_path
from bilens.errors import ArgumentError, BilensError, CheckpointError, ModelNotFoundError, SAEMismatchError, nearest
from bilens.model.config import check_positive_integers, check_switches
from bilens.model.files import (
    CONFIG_FILE,
    FLOATS,
    HUB_ID,
    PRETRAINED,
    WEIGHTS_FILE,
    TensorInfo,
    check_shapes,
    holds,
    list_models,
    read_header,
    read_tensors,
    resolve_device,
    resolve_dtype,
)
from bilens.model.hook_points import HOOK_TO_POINT, OTHER_POINT, POINT_TO_HOOK, hook_of
from bilens.model.hub import HubOptions, fetch_from_hub
from bilens.sae.origin import EXAMPLES_FILE, NAMES_FILE, remember_origin
from bilens.sae.scope import ScopeSAE, ScopeSAEConfig

FORMATS = {
    "published": (CONFIG_FILE, WEIGHTS_FILE),
    "saelens": (SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME),
    "sparsify": (SAE_CFG_FILENAME, SPARSIFY_WEIGHTS_FILENAME),
}
# What SAELens keeps beside an SAE whose inputs are normalised by numbers that are not in its weights.
NORMALISATION_FILES = (ACTIVATION_SCALER_CFG_FILENAME, ACTIVATION_WHITENING_FILENAME)
WHITENING = ("matrix", "inverse_matrix")
# sparsify hooks modules by Hugging Face's names, and names the folder by the module.
MODULE_NAME = re.compile(r"(?:\w+\.)*(?:h|layers)\.(\d+)(?:\.(mlp|attn|self_attn))?")
MODULE_POINTS = {None: "resid-post", "mlp": "mlp-out", "attn": "attn-out", "self_attn": "attn-out"}
# What a sparsify configuration may ask for beside a plain top-k SAE, with the value under which it does not.
SPARSIFY_PLAIN = {"activation": "topk", "transcode": False, "skip_connection": False, "embed_skip": False}
SPARSIFY_PLAIN |= {"gram_lookup": False}
FOLDER_NAME = re.compile(rf"(\d+)-({'|'.join(POINT_TO_HOOK)}|{OTHER_POINT})-x(\d+)(?:-k(\d+))?(?:-([\w.+-]+))?")
EXPECTED = (
    "expected the name {layer}-{point}-x{expansion}-k{k}[-{tag}], or a cfg.json that names its hook; and in it "
    + " or ".join(f"{config} + {weights}" for config, weights in FORMATS.values())
)
HUB_OPTIONS = ("revision", "token", "cache_dir", "local_files_only")


def folder_name(point: str, layer: int, expansion: int, k: int | None, tag: str | None = None) -> str:
    """What the folder of an SAE is called: `3-mlp-in-x4-k30`, or `3-mlp-in-x4-k30-tag`; without a k, `3-mlp-in-x4`."""
    parts = (f"{layer}-{point}-x{expansion}", None if k is None else f"k{k}", tag)
    return "-".join(part for part in parts if part)


@dataclass(frozen=True)
class SAEEntry:
    """One SAE of a source; `k` is `None` where it has none, `format` is `published`, `saelens` or `sparsify`.

    The tag of a folder whose name does not say what is in it is the name.
    """

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
        revision, token, cache_dir, local_files_only: the options for a hub repository, as in `bilens.load_model`.

    Raises:
        ArgumentError: the source is neither text nor a path.
        ModelNotFoundError: there is nothing of that name, or the hub does not give it.

    Warns:
        if there are no SAEs, with what was expected.
    """
    found = _entries(source, "*", HubOptions(revision, token, cache_dir, local_files_only))
    if not found:
        warnings.warn(f"{str(source)!r} holds no SAE folder: {EXPECTED}.{_why_empty(source)}", stacklevel=2)
    return SAEList(found)


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
    scale_attn: bool = True,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> SAE[Any]:
    """Load one SAE; from the hub, only its folder is downloaded, and the configs at that point and layer.

    Args:
        source: a bundled model's name, a folder of SAE folders, or a hub id such as `tdooms/ts-medium-scope`.
        point: `resid-pre`, `resid-mid`, `resid-post`, `mlp-in`, `mlp-out` or `attn-out`.
        layer: the model's layer, from 0.
        expansion: `d_sae / d_in`; `None` if the other arguments say which SAE is meant.
        k: the number of active features per token; `None` if the other arguments say which SAE is meant.
        tag: the SAE's tag, if that is needed too; `""` is the SAE without a tag.
        device: `None` takes CUDA where there is one.
        dtype: the type of the weights in memory (`torch.float32`, `"bfloat16"`, ...); `"auto"` keeps the file's.
        n_layers: the number of layers of the model. Only published attn-out SAEs need it: they read before the factor
            `s = 1/sqrt(2 n_layers)` while `hook_attn_out` includes it.
        scale_attn: false if the model's config says so; that factor is then 1.
        revision, token, cache_dir, local_files_only: the options for a hub repository, as in `bilens.load_model`.

    Returns:
        a `ScopeSAE` for the published format and for a signed SAE of sparsify, else the SAELens class of the SAE. It
        reads and reconstructs the hook `sae.cfg.metadata.hook_name`.

    Raises:
        ArgumentError: an argument has the wrong type, for example a point that is no text.
        ModelNotFoundError: there is no such source, the hub does not give it, or it holds no such SAE (with what
            it has and the nearest).
        SAEMismatchError: an unknown point, several SAEs that fit, a folder that holds another SAE than its name says, a
            transcoder, an attn-out SAE without `n_layers`, or one whose inputs are normalised by numbers that are
            nowhere.
        CheckpointError: the files are truncated, incomplete, of the wrong shapes, or hold NaN.
    """
    hub = HubOptions(revision, token, cache_dir, local_files_only)
    entry = _select(source, point, layer, expansion, k, tag, hub)
    files = [f"{entry.folder}/{file}" for file in FORMATS[entry.format]]
    more = [f"{entry.folder}/{file}" for file in (*NORMALISATION_FILES, NAMES_FILE, EXAMPLES_FILE)]
    root = _root(source, files + more, hub, needed=files)
    return load_sae_folder(root / entry.folder, device=device, dtype=dtype, n_layers=n_layers, scale_attn=scale_attn)


def load_saes(
    source: str | os.PathLike[str],
    points: Sequence[str] = ("mlp-in", "mlp-out"),
    layers: Sequence[int] | None = None,
    expansion: int | None = None,
    k: int | None = None,
    tag: str | None = None,
    **options: Any,
) -> list[SAE[Any]]:
    """Load the SAEs of several layers, by layer, one at each point: what `Circuit.trace` and `freeze` take.

    Args:
        source: a bundled model's name, a folder of SAE folders, or a hub id such as `tdooms/ts-medium-scope`.
        points: the points in each layer, as for `load_sae`.
        layers: `None` is every layer that has SAEs at these points.
        expansion, k, tag: the SAEs to take, if there are several for a point and layer.
        options: the keyword arguments of `load_sae`.

    Raises:
        ArgumentError: one point instead of a list, and as for `load_sae`.
        ModelNotFoundError: a layer without an SAE at one of the points.
        others: the same as for `load_sae`.
    """
    if isinstance(points, str):
        raise ArgumentError(f"points is the one point {points!r}; expected a list of them: [{points!r}].")
    if layers is None:
        hub = HubOptions(**{name: options[name] for name in HUB_OPTIONS if name in options})
        layers = sorted({entry.layer for entry in _entries(source, "*", hub) if entry.point in points}) or [0]
    return [load_sae(source, point, layer, expansion, k, tag, **options) for layer in layers for point in points]


def saes_on_layer(
    given: Sequence[SAE[Any] | str | os.PathLike[str]], layer: int, **options: Any
) -> tuple[SAE[Any], SAE[Any]]:
    """Of some SAEs, the one on the input of a layer's MLP and the one on its output.

    Args:
        given: SAEs, or folders of one SAE each.
        layer: the layer.
        options: the keyword arguments of `load_sae_folder`.

    Raises:
        ArgumentError: no list of SAEs or folders.
        SAEMismatchError: an SAE that names no hook, none on the layer's input or output, or several.
        others: the same as for `load_sae_folder`.
    """
    there = _by_hook(given, **options)
    points = (("mlp-in", "resid-mid"), ("mlp-out",))
    found = []
    for which, names in zip(("input", "output"), points, strict=True):
        fitting = [(hook, sae) for hook, sae in there if hook in [hook_of(name, layer) for name in names]]
        if len(fitting) != 1:
            has = "no SAE" if not fitting else f"{len(fitting)} SAEs"
            raise SAEMismatchError(
                f"saes holds {has} on the {which} of layer {layer}'s MLP ({hook_of(names[0], layer)}), expected one; "
                f"the SAEs are on {', '.join(hook for hook, _ in there) or 'nothing'}."
            )
        found.append(fitting[0][1])
    return found[0], found[1]


def layers_of(given: Sequence[SAE[Any] | str | os.PathLike[str]], **options: Any) -> list[int]:
    """The layers that have SAEs on both sides of their MLP; arguments and errors are those of `saes_on_layer`."""
    hooks = {hook for hook, _ in _by_hook(given, **options)}
    layers = {int(match[1]) for hook in hooks if (match := re.match(r"blocks\.(\d+)\.", hook))}
    inputs = ("mlp-in", "resid-mid")
    return [
        layer
        for layer in sorted(layers)
        if hook_of("mlp-out", layer) in hooks and any(hook_of(point, layer) in hooks for point in inputs)
    ]


def sae_source(model_name: str) -> str:
    """Where a model's SAEs are by convention: with a bundled model, or in `<model>-scope` on the hub or beside it.

    Raises:
        ModelNotFoundError: no such place.
    """
    if model_name in list_models():
        return model_name
    scope = f"{model_name}-scope"
    if Path(scope).is_dir() or "/" in model_name:
        return scope
    raise ModelNotFoundError(f"no SAEs are known for {model_name!r}: say where they are (saes=, --saes).")


def load_sae_folder(
    folder: str | os.PathLike[str],
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str = torch.float32,
    n_layers: int | None = None,
    scale_attn: bool = True,
) -> SAE[Any]:
    """Load the SAE in a folder; arguments, result and errors are those of `load_sae`.

    Args:
        folder: a folder in any of the formats (see `bilens.sae.loading`).
    """
    folder = to_path(folder, "folder")
    entry = _read_entry(folder)
    if entry is None:
        raise ModelNotFoundError(f"{folder} is no SAE folder: {EXPECTED}.{_without_hook(folder)}")
    config, weights = FORMATS[entry.format]
    if not (folder / weights).exists():
        raise CheckpointError(f"{folder} has {config} but no {weights}; it holds {holds(folder)}.")
    device = resolve_device(device)
    if entry.format == "published":
        sae = _load_published(folder, entry, device, dtype, n_layers, scale_attn)
    else:
        sae = (_load_saelens if entry.format == "saelens" else _load_sparsify)(folder, entry, device, dtype)
    for name, weight in sae.named_parameters():
        check_finite(name, weight, f"{folder} in {weight.dtype}")
    remember_origin(sae.eval(), folder, weights)
    return sae


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
        folder_name: the name of the SAE's folder in it.
        device: the device of the weights.
        force_download: not needed: what is in the cache is checked against the hub's.
        cfg_overrides: SAELens' own, put over the configuration.
        n_layers: the same as for `load_sae`; for a published attn-out SAE, pass `partial(scope_loader, n_layers=...)`.

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
        return path.resolve().parent if _read_entry(path) else path
    if isinstance(source, str) and HUB_ID.fullmatch(source):
        return fetch_from_hub(source, files, needed, hub)
    raise ModelNotFoundError(
        f"no SAEs {str(source)!r}: not a bundled model ({', '.join(list_models()) or 'none here'}), not a folder, and "
        "not a hub id of the form owner/name." + nearest(str(source), list_models())
    )


def _entries(source: str | os.PathLike[str], pattern: str, hub: HubOptions) -> list[SAEEntry]:
    """The SAEs whose folders' names match a glob pattern, or the one whose folder the source is."""
    root = _root(source, [f"{pattern}/{config}" for config in {config for config, _ in FORMATS.values()}], hub)
    alone = to_path(source, "source").resolve()
    folders = [alone] if alone.parent == root and _read_entry(alone) else root.glob(pattern)
    entries = [entry for folder in folders if (entry := _read_entry(folder))]
    points = [*POINT_TO_HOOK, *sorted({e.point for e in entries} - set(POINT_TO_HOOK))]
    return sorted(entries, key=lambda e: (e.layer, points.index(e.point), e.expansion, e.k or 0, e.folder))


def _read_entry(folder: Path) -> SAEEntry | None:
    """What a folder's name and config say; `None` where it is no SAE folder."""
    match = FOLDER_NAME.fullmatch(folder.name)
    if (folder / SAE_CFG_FILENAME).is_file():
        try:
            config = read_json(folder / SAE_CFG_FILENAME)
        except CheckpointError:  # what loads it will say so
            config = {}
        of_sparsify = "architecture" not in config and ("expansion_factor" in config or "num_latents" in config)
        kind = "sparsify" if of_sparsify else "saelens"
    elif (folder / CONFIG_FILE).is_file():
        config, kind = {}, "published"
    else:
        return None
    if match is not None:
        layer, point, expansion, k, tag = match.groups()
        hook = hook_of(point, int(layer))
        return SAEEntry(folder.name, point, int(layer), int(expansion), int(k) if k else None, tag, hook, kind)
    found = re.fullmatch(r"blocks\.(\d+)\.(.+)", str(_hook_in(config, folder)))
    d_in, d_sae, k = config.get("d_in"), config.get("d_sae") or config.get("num_latents") or None, config.get("k")
    if found is None or not isinstance(d_in, int) or d_in < 1:
        return None
    expansion = d_sae // d_in if isinstance(d_sae, int) else config.get("expansion_factor")
    if not isinstance(expansion, int):
        return None
    point, layer = HOOK_TO_POINT.get(found[2], found[2]), int(found[1])
    k = k if isinstance(k, int) else None
    return SAEEntry(folder.name, point, layer, expansion, k, folder.name, found[0], kind)


def _hook_in(config: dict[str, Any], folder: Path) -> Any:
    """The hook that a configuration names, or the name of a folder of sparsify."""
    metadata = config.get("metadata")
    module = MODULE_NAME.fullmatch(folder.name)
    if isinstance(metadata, dict) and metadata.get("hook_name"):
        return metadata["hook_name"]
    if module is not None and "architecture" not in config:
        return hook_of(MODULE_POINTS[module[2]], int(module[1]))
    return config.get("hook_name") or folder.name


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
    if not isinstance(point, str) or not isinstance(layer, Integral) or isinstance(layer, bool) or layer < 0:
        swapped = " Are point and layer swapped?" if isinstance(layer, str) and isinstance(point, Integral) else ""
        raise ArgumentError(
            f"point is {point!r} and layer is {layer!r}, expected a name such as 'mlp-in' and a whole number from 0."
            + swapped
        )
    for name, number in {"expansion": expansion, "k": k}.items():
        if number is not None and (not isinstance(number, Integral) or isinstance(number, bool) or number < 1):
            raise ArgumentError(f"{name} is {number!r}, expected a positive whole number or None.")
    if not isinstance(tag, str | None):
        raise ArgumentError(f"tag is {tag!r}, expected text or None.")
    hook_of(point, layer)  # a misspelt point is an error of its own

    def fits(entry: SAEEntry) -> bool:
        asked = {"point": point, "layer": layer, "expansion": expansion, "k": k}
        same = all(value is None or value == getattr(entry, name) for name, value in asked.items())
        return same and tag in (None, entry.tag or "")

    # From the hub, the configs at that point and layer come first: they are usually all that is needed.
    there = here = _entries(source, f"{layer}-{point}-*", hub)
    fitting = [entry for entry in here if fits(entry)]
    if not fitting or to_path(source, "source").is_dir():
        there = _entries(source, "*", hub)
        here = [entry for entry in there if (entry.point, entry.layer) == (point, layer)]
        fitting = [entry for entry in there if fits(entry)]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise SAEMismatchError(
            f"{len(fitting)} SAEs of {str(source)!r} fit: {_names(fitting)}. Say which by expansion=, k= or tag= "
            "(tag='' is the one without a tag)."
        )
    asked = f"{layer}-{point}-x{expansion or '*'}-k{k or '*'}" + (f"-{tag}" if tag else "")
    if not there:
        raise ModelNotFoundError(
            f"{str(source)!r} holds no SAE folder: {EXPECTED}. The authors' SAEs of a model are in <model>-scope."
            + _why_empty(source)
        )
    raise ModelNotFoundError(
        f"{str(source)!r} holds no SAE {asked!r}; {'of that point and layer ' if here else ''}it holds "
        f"{_names(here or there)}." + nearest(asked, [entry.folder for entry in there])
    )


def _by_hook(given: Sequence[Any], **options: Any) -> list[tuple[str, SAE[Any]]]:
    """SAEs, or folders of SAEs, with the hooks that they read."""
    if not isinstance(given, Sequence):
        raise ArgumentError(f"saes is {given!r:.80}, expected a source of SAEs, or a list of SAEs or of their folders.")
    found = []
    for place, one in enumerate(given):
        if not isinstance(one, SAE | str | os.PathLike):
            raise ArgumentError(f"saes[{place}] is {one!r:.80}, expected an SAE or the folder of one.")
        sae = one if isinstance(one, SAE) else load_sae_folder(one, **options)
        hook = sae.cfg.metadata.hook_name
        if hook is None:
            raise SAEMismatchError(
                f"saes[{place}] does not say which hook it reads: set its cfg.metadata.hook_name, such as "
                f"{hook_of('mlp-out', 1)!r}."
            )
        found.append((hook, sae))
    return found


def _without_hook(folder: Path) -> str:
    """Why a folder with the files of an SAE is none that could be used; "" where it has no such files."""
    if not (folder / SAE_CFG_FILENAME).is_file() or _read_entry(folder) is not None:
        return ""
    try:
        read_json(folder / SAE_CFG_FILENAME)
    except CheckpointError as error:
        return f" {error}"
    return (
        f" {folder / SAE_CFG_FILENAME} does not say which hook of a block the SAE was trained on: add "
        f"'hook_name' to its 'metadata', such as {hook_of('mlp-out', 1)!r}."
    )


def _why_empty(source: str | os.PathLike[str]) -> str:
    """What is wrong with the folders of a source that look like SAEs."""
    path = to_path(source, "source")
    return next(filter(None, map(_without_hook, [path, *sorted(path.glob("*"))])), "") if path.is_dir() else ""


def _names(entries: Iterable[SAEEntry], at_most: int = 12) -> str:
    names = [e.folder + (f" ({e.hook_name})" if e.tag == e.folder else "") for e in entries]
    return ", ".join(names[:at_most]) + (f", ... ({len(names)} in all)" if len(names) > at_most else "")


# --- reading ----------------------------------------------------------------------------------------------------------


def _load_published(
    folder: Path,
    entry: SAEEntry,
    device: str | torch.device,
    dtype: torch.dtype | str,
    n_layers: int | None,
    scale_attn: bool,
) -> ScopeSAE:
    config = read_json(folder / CONFIG_FILE)
    _check_published(config, folder, entry)
    cfg = ScopeSAEConfig(
        d_in=config["d_model"],
        d_sae=config["expansion"] * config["d_model"],
        k=config["k"],
        bilinear_encoder=config.get("bilinear_encoder", False),
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
    check_shapes(read_header(folder / WEIGHTS_FILE), shapes, folder / WEIGHTS_FILE)
    tensors = read_tensors(folder / WEIGHTS_FILE)
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
        before = _before_residual_scale(folder, n_layers) if scale_attn else 1.0
        sae.fold_activation_norm_scaling_factor(before)
        sae.cfg.metadata.attention_scale = 1 / before  # a model of another scale refuses the SAE
    return sae


def _check_published(config: dict[str, Any], folder: Path, entry: SAEEntry) -> None:
    """Refuse a config that is incomplete, that is not what its folder's name says, or that is not of an autoencoder."""
    check_positive_integers(config, ("d_model", "expansion", "k"))
    check_switches(config, ("bilinear_encoder", "encoder_bias", "token_lookup"))
    if config.get("token_lookup"):
        raise CheckpointError(f"{folder / CONFIG_FILE}: token_lookup is true, which bilens does not implement.")
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
    if not (isinstance(point, list) and len(point) == 2 and isinstance(point[0], str) and type(point[1]) is int):
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
    header = read_header(folder / SAE_WEIGHTS_FILENAME)  # SAELens does not look for truncation, sizes and NaN
    try:
        config = handle_config_defaulting(read_json(folder / SAE_CFG_FILENAME))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{folder / SAE_CFG_FILENAME} is no SAELens configuration: {error!r}.") from error
    _check_saelens(config, header, folder, entry)
    read_tensors(folder / SAE_WEIGHTS_FILENAME)
    stored = next((FLOATS[info.dtype] for info in header.values()), torch.float32)
    wanted = dtype_to_str(resolve_dtype(dtype, stored))
    try:
        sae = SAE.load_from_disk(folder, device=str(device), dtype=wanted)
        _fold_normalisation(sae, folder)
    except (AssertionError, AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        if isinstance(error, BilensError):
            raise
        raise CheckpointError(f"{folder}: SAELens cannot load it: {type(error).__name__}: {error}") from error
    metadata = sae.cfg.metadata
    if metadata.hook_name not in (None, entry.hook_name):
        raise SAEMismatchError(f"{folder} was trained on {metadata.hook_name}, its name puts it on {entry.hook_name}.")
    metadata.hook_name = entry.hook_name
    return sae


def _check_saelens(config: dict[str, Any], header: Mapping[str, TensorInfo], folder: Path, entry: SAEEntry) -> None:
    """Refuse a configuration that is incomplete, that is not what the folder's name says, or not what the weights are.

    Raises:
        CheckpointError: a missing or impossible value.
        SAEMismatchError: another k or expansion than in the folder's name.
    """
    path = folder / SAE_CFG_FILENAME
    if not isinstance(config.get("architecture"), str):
        raise CheckpointError(f"{path} has no 'architecture': {config.get('architecture')!r}, expected a name.")
    if not isinstance(config.get("metadata", {}), dict):
        raise CheckpointError(f"{path}: metadata is {config['metadata']!r:.100}, expected an object.")
    check_switches(config, ("apply_b_dec_to_input", "rescale_acts_by_decoder_norm"), str(path))
    needs_k = config["architecture"] in SAE_CLASS_REGISTRY and any(
        field.name == "k" for field in fields(SAE_CLASS_REGISTRY[config["architecture"]][1])
    )
    check_positive_integers(config, ("d_in", "d_sae", "k") if needs_k else ("d_in", "d_sae"), str(path))
    if needs_k and config["k"] > config["d_sae"]:
        raise CheckpointError(f"{path}: k {config['k']} is more than the SAE has features.")
    shape = header["W_dec"].shape if "W_dec" in header else (config["d_sae"],)
    if shape[0] != config["d_sae"]:
        raise CheckpointError(f"{folder}: W_dec has shape {shape}, the config's d_sae is {config['d_sae']}.")
    _check_name(folder, entry, config["d_in"], config["d_sae"], config["k"] if needs_k else None)


def _check_name(folder: Path, entry: SAEEntry, d_in: int, d_sae: int, k: int | None) -> None:
    """Refuse a folder named after another SAE than it holds (`SAEMismatchError`)."""
    if entry.tag == folder.name:  # its name says nothing
        return
    if d_sae != entry.expansion * d_in or (k is not None and entry.k is not None and k != entry.k):
        held = f"{d_sae} features of {d_in} inputs" + (f", k {k}" if k is not None else "")
        raise SAEMismatchError(f"{folder} holds an SAE of {held}, which is not what its name says.")


def _fold_normalisation(sae: SAE[Any], folder: Path) -> None:
    """Put a normalisation of the inputs that SAELens does not apply by itself into the weights.

    Raises:
        SAEMismatchError: its numbers are not in the folder.
    """
    kind = sae.cfg.normalize_activations
    scaler, whitening = (folder / file for file in NORMALISATION_FILES)
    if kind == "expected_average_only_in" and scaler.is_file():
        factor = read_json(scaler).get("scaling_factor")
        if not isinstance(factor, int | float) or not isfinite(factor) or factor <= 0:
            raise CheckpointError(f"{scaler}: scaling_factor is {factor!r:.100}, expected a number above 0.")
        sae.fold_activation_norm_scaling_factor(factor)
    elif kind == "covariance_whitening" and whitening.is_file():
        held = read_tensors(whitening)
        check_shapes(held, {"mean": (sae.cfg.d_in,)} | dict.fromkeys(WHITENING, (sae.cfg.d_in,) * 2), whitening)
        sae.fold_activation_whitening(held["mean"], *(held[name] for name in WHITENING))
    elif kind in ("expected_average_only_in", "covariance_whitening"):
        file = (scaler if kind == "expected_average_only_in" else whitening).name
        raise SAEMismatchError(
            f"{folder}: normalize_activations is {kind!r}, whose numbers were never folded into the weights and are "
            f"not beside them (no {file}): its features would be those of other inputs. Fold them with SAELens and "
            "save again."
        )


def _load_sparsify(folder: Path, entry: SAEEntry, device: str | torch.device, dtype: torch.dtype | str) -> SAE[Any]:
    """`top_k(relu(W (x - b_dec) + b))`, without the ReLU where `signed`; the decoder adds `b_dec`."""
    path, weights = folder / SAE_CFG_FILENAME, folder / SPARSIFY_WEIGHTS_FILENAME
    config = read_json(path)
    for key, plain in SPARSIFY_PLAIN.items():
        if config.get(key, plain) != plain:
            raise SAEMismatchError(f"{path}: {key} is {config[key]!r:.100}; bilens reads SAEs where it is {plain!r}.")
    check_switches(config, ("signed",), str(path))
    check_positive_integers(config, ("d_in", "k"), str(path))
    d_in, k = config["d_in"], config["k"]
    if config.get("num_latents"):
        check_positive_integers(config, ("num_latents",), str(path))
        d_sae = config["num_latents"]
    else:
        check_positive_integers(config, ("expansion_factor",), str(path))
        d_sae = config["expansion_factor"] * d_in
    if k > d_sae:
        raise CheckpointError(f"{path}: k {k} is more than the SAE has features.")
    _check_name(folder, entry, d_in, d_sae, k)
    shapes = {"encoder.weight": (d_sae, d_in), "encoder.bias": (d_sae,), "W_dec": (d_sae, d_in), "b_dec": (d_in,)}
    check_shapes(read_header(weights), shapes, weights)
    tensors = read_tensors(weights)
    common: dict[str, Any] = {"d_in": d_in, "d_sae": d_sae, "k": k, "device": "meta"}
    common["metadata"] = SAEMetadata(hook_name=entry.hook_name)
    # SAELens' top-k has its ReLU after the choice: the same features, as zeros change nothing.
    sae = ScopeSAE(ScopeSAEConfig(**common)) if config.get("signed") else TopKSAE(TopKSAEConfig(**common))
    names = {"W_enc": "encoder.weight", "b_enc": "encoder.bias", "W_dec": "W_dec", "b_dec": "b_dec"}
    held = {name: tensors[theirs] for name, theirs in names.items()}
    sae.load_state_dict(held | {"W_enc": held["W_enc"].T.contiguous()}, assign=True)
    return sae.to(device=device, dtype=resolve_dtype(dtype, held["W_dec"].dtype))
