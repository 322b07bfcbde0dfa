"""SAEs out: onto the Hugging Face hub, as folders that `load_sae` (and `SAE.from_pretrained` of SAELens) finds there.

1. SAEs are written in SAELens' format; folders of either format go as they are: config, weights,
   and the names and examples beside them
2. what is in the repository in the other format under the same name goes, for it would be found first
3. all in one commit, with a model card where the repository has none
"""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sae_lens import SAE, TrainingSAE

from bilens._core.files import to_path
from bilens.errors import ArgumentError, ModelNotFoundError, SAEMismatchError
from bilens.model.hook_points import hook_of
from bilens.model.hub import card_header, push_to_hub
from bilens.sae.loading import EXPECTED, FOLDER_NAME, FORMATS, SAEEntry, SAEList, list_saes
from bilens.sae.origin import EXAMPLES_FILE, NAMES_FILE

TABLE = """| folder | layer | point | hook | expansion | k | format |
|---|---|---|---|---|---|---|"""


def push_saes(
    saes: Mapping[str, SAE[Any]] | str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload SAEs",
) -> Any:
    """Upload SAEs into a Hugging Face hub repository, one folder each; other SAEs in the repository stay.

    Args:
        saes: SAEs by folder name `{layer}-{point}-x{expansion}-k{k}[-{tag}]`, as `train_saes` returns them, or a folder
            of such folders.
        repo_id: `owner/name`; made where it does not exist.
        private: true makes a new repository private; `None` takes the owner's default.
        token: a token with permission to write; `None` takes the one of `hf auth login`.
        revision: the branch, made where it does not exist; `None` is `main`.
        commit_message: one line.

    Returns:
        `huggingface_hub.CommitInfo`: `.oid`, `.commit_url`.

    Raises:
        ArgumentError: SAEs without their names.
        ModelNotFoundError: no such folder, or nothing in it.
        SAEMismatchError: a name of another form, or of another hook than its SAE was trained on.
        UploadError: no permission, no connection, or the hub refused it.
    """
    if isinstance(saes, list | tuple | SAE):
        raise ArgumentError("saes is a list of SAEs, or one; expected them by folder name: {'1-mlp-out-x8-k32': sae}.")
    if isinstance(saes, Mapping):
        formats = dict.fromkeys(saes, "saelens")
        for name, sae in saes.items():
            _check_name(name, sae)
    elif (source := to_path(saes, "saes")).is_dir():
        formats = {entry.folder: entry.format for entry in list_saes(source)}
    else:
        raise ModelNotFoundError(f"no folder {str(saes)!r}: SAEs are pushed from this machine.")
    if not formats:
        raise ModelNotFoundError(f"no SAEs to push: {EXPECTED}.")

    def write(folder: Path) -> None:
        for name, its_format in formats.items():
            if isinstance(saes, Mapping):
                sae = saes[name]
                save = sae.save_inference_model if isinstance(sae, TrainingSAE) else sae.save_model
                save(folder / name)
            else:
                (folder / name).mkdir()
                beside = [file for file in (NAMES_FILE, EXAMPLES_FILE) if (source / name / file).exists()]
                for file in (*FORMATS[its_format], *beside):
                    shutil.copyfile(source / name / file, folder / name / file)

    return push_to_hub(
        write,
        repo_id,
        lambda folder, repo: saes_card(list_saes(folder), repo),
        private=private,
        token=token,
        revision=revision,
        commit_message=commit_message,
        delete_patterns=[
            f"{name}/{file}"
            for name, its_format in formats.items()
            for other, files in FORMATS.items()
            if other != its_format
            for file in files
        ],
        renewed=lambda card, folder: with_rows(card, list_saes(folder)),
    )


def saes_card(saes: SAEList, repo_id: str) -> str:
    """The model card of a repository of SAEs: which there are, and how to load one."""
    rows = "\n".join(_row(sae) for sae in saes)
    one = saes[0]
    return f"""{card_header(tags=["sparse-autoencoder", "bilinear", "interpretability"])}
# {repo_id.split("/")[-1]}

Sparse autoencoders of a bilinear transformer, written by bilens: one folder each, called
`{{layer}}-{{point}}-x{{expansion}}-k{{k}}` with an optional `-{{tag}}`. Format `saelens` is
`{" + ".join(FORMATS["saelens"])}`, which SAELens reads; `published` is `{" + ".join(FORMATS["published"])}`.

{TABLE}
{rows}

```python
import bilens

print(bilens.list_saes("{repo_id}"))
sae = bilens.load_sae("{repo_id}", "{one.point}", {one.layer}, expansion={one.expansion}, k={one.k})
```
"""


def with_rows(card: str, saes: SAEList) -> str:
    """A card that `saes_card` wrote, its table made true for SAEs that came or changed; another card as it is."""
    before, found, after = card.partition(TABLE + "\n")
    if not found:
        return card
    lines = after.splitlines(keepends=True)
    n_rows = next((place for place, line in enumerate(lines) if not line.startswith("| `")), len(lines))
    rows = {line.split("`")[1]: line.rstrip("\n") for line in lines[:n_rows]} | {sae.folder: _row(sae) for sae in saes}
    return before + found + "".join(f"{row}\n" for row in rows.values()) + "".join(lines[n_rows:])


def _row(sae: SAEEntry) -> str:
    return (
        f"| `{sae.folder}` | {sae.layer} | {sae.point} | `{sae.hook_name}` | {sae.expansion} | {sae.k} | {sae.format} |"
    )


def _check_name(name: str, sae: SAE[Any]) -> None:
    match = FOLDER_NAME.fullmatch(name)
    if match is None:
        raise SAEMismatchError(f"{name!r} is not the name of an SAE folder: {EXPECTED}.")
    trained_on, named = sae.cfg.metadata.hook_name, hook_of(match[2], int(match[1]))
    if trained_on not in (None, named):
        raise SAEMismatchError(f"{name!r} is an SAE of {named} by its name, but it was trained on {trained_on}.")
