"""The Hugging Face hub: snapshots in, folders out, and one sentence for everything that can go wrong there.

1. `fetch_from_hub` downloads what a caller names (`huggingface_hub.snapshot_download`: its cache, `HF_ENDPOINT`,
   `HF_HUB_OFFLINE` and resumption hold), and nothing else
2. `push_to_hub` writes a folder, adds the model card where the repository has none, and uploads it in one commit
3. both turn `huggingface_hub`'s exceptions into bilens' own
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from bilens.errors import ModelNotFoundError, UploadError, nearest
from bilens.model.config import BilinearTransformerConfig, config_to_published

CARD_FILE = "README.md"
LOG_IN = "pass token=, set HF_TOKEN or log in with `hf auth login`"


@dataclass(frozen=True)
class HubOptions:
    """How to ask the hub, in `huggingface_hub`'s words; `None` and false everywhere is how it asks by itself."""

    revision: str | None = None
    token: str | bool | None = field(default=None, repr=False)
    cache_dir: str | Path | None = None
    local_files_only: bool = False

    def refuse_revision(self, source: str) -> None:
        """Raise `ModelNotFoundError` where a revision was asked of `source`, which is on this machine and has none."""
        if self.revision is not None:
            raise ModelNotFoundError(f"{source!r} is not on the hub, so it has no revision {self.revision!r}.")


def fetch_from_hub(
    repo: str, files: Sequence[str], needed: Sequence[str] = (), options: HubOptions | None = None
) -> Path:
    """Download what a hub repository has of `files` into the Hugging Face cache; the snapshot's folder.

    Args:
        repo: a hub id.
        files: names or glob patterns; nothing else is downloaded.
        needed: names that have to be there afterwards.
        options: revision, token and cache.

    Raises:
        ModelNotFoundError: no such repository or revision, a private or gated one, a needed file missing, no connection
            and not all in the cache, or a download that broke off.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        HTTPError,  # of whichever HTTP client this version of the hub's library uses
        LocalEntryNotFoundError,
        LocalTokenNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    options = options or HubOptions()
    named = repo if options.revision is None else f"{repo}@{options.revision}"
    try:
        folder = Path(
            snapshot_download(
                repo,
                allow_patterns=list(files),
                revision=options.revision,
                token=options.token,
                cache_dir=options.cache_dir,
                local_files_only=options.local_files_only,
                library_name="bilens",
            )
        )
    except GatedRepoError as error:
        raise ModelNotFoundError(f"{repo!r} is gated: ask for access at its page on the hub, then {LOG_IN}.") from error
    except RepositoryNotFoundError as error:
        raise ModelNotFoundError(f"the hub shows no repository {repo!r}; for a private one, {LOG_IN}.") from error
    except RevisionNotFoundError as error:
        there = _revisions(repo, options)
        raise ModelNotFoundError(
            f"{repo!r} has no revision {options.revision!r}; a revision is a branch, a tag or a full commit hash"
            + (f", and it has {', '.join(there)}." if there else ".")
            + nearest(str(options.revision), there)
        ) from error
    except LocalEntryNotFoundError as error:
        raise ModelNotFoundError(
            f"{named!r} is not wholly in the Hugging Face cache, and {_why_not_fetched(error, options)}. What comes "
            "with bilens works offline: `bilens.list_models()`."
        ) from error
    except HfHubHTTPError as error:
        raise ModelNotFoundError(f"the hub refused {named!r}: {_one_line(error)}.{_hint(error)}") from error
    except HFValidationError as error:
        raise ModelNotFoundError(f"{repo!r} is not the name of a hub repository: {_one_line(error)}") from error
    except LocalTokenNotFoundError as error:
        raise ModelNotFoundError(f"token=True, but there is no token for {named!r}: {LOG_IN}.") from error
    except (OSError, HTTPError) as error:
        raise ModelNotFoundError(
            f"fetching {named!r} broke off ({type(error).__name__}: {_one_line(error)}). Run it again: it goes on from "
            "what has come."
        ) from error
    for file in needed:
        if not (folder / file).exists():
            raise ModelNotFoundError(f"the hub repository {named!r} has no {file}.")
    return folder


def push_to_hub(
    write: Callable[[Path], Any],
    repo_id: str,
    card: Callable[[Path, str], str],
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str,
    delete_patterns: Sequence[str] = (),
    renewed: Callable[[str, Path], str] | None = None,
) -> Any:
    """Upload what `write` writes into a folder, in one commit; the repository and the branch are made where need be.

    Args:
        write: fills an empty folder; called before the hub hears of anything.
        repo_id: a hub id, `owner/name`.
        card: from the filled folder and the repository's id to the text of a model card, used where the repository has
            none yet.
        private: true makes a new repository private; `None` takes the owner's default. With true, an existing one that
            is public is refused.
        token: a token with permission to write; `None` takes the one of `hf auth login`.
        revision: the branch; `None` is `main`.
        commit_message: one line.
        delete_patterns: what in the repository, other than the files uploaded, is deleted by the same commit.
        renewed: from the card that the repository has, and the filled folder, to what it is to be; `None` leaves it.

    Returns:
        `huggingface_hub.CommitInfo`: `.oid`, `.commit_url`.

    Raises:
        UploadError: no permission, no such owner, no connection, a public repository where a private one was asked
            for, or the hub refused it.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError

    api = HfApi(token=token, library_name="bilens")
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write(folder)
        try:
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            if private and not api.model_info(repo_id).private:
                raise UploadError(f"{repo_id!r} exists and is public: private=True would not make it private.")
            if revision is not None and not revision.startswith("refs/"):
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            if not api.file_exists(repo_id, CARD_FILE, revision=revision):
                (folder / CARD_FILE).write_text(card(folder, repo_id), encoding="utf-8")
            elif renewed is not None:
                with TemporaryDirectory() as beside:  # in the cache it would pass for a snapshot
                    path = api.hf_hub_download(repo_id, CARD_FILE, revision=revision, local_dir=beside)
                    there = Path(path).read_text(encoding="utf-8")
                if (now := renewed(there, folder)) != there:
                    (folder / CARD_FILE).write_text(now, encoding="utf-8")
            return api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                revision=revision,
                commit_message=commit_message,
                delete_patterns=list(delete_patterns) or None,
            )
        # The hub's library wraps what breaks during an upload in RuntimeErrors, and refuses names with ValueErrors.
        except UploadError:
            raise
        except (OSError, HTTPError, RuntimeError, ValueError) as error:
            hint = _hint(error, " with permission to write")
            raise UploadError(f"the hub did not take {repo_id!r}: {_one_line(error)}.{hint}") from error


def card_header(**data: Any) -> str:
    """The metadata block that starts a model card."""
    from huggingface_hub import ModelCardData

    return f"---\n{ModelCardData(library_name='bilens', **data).to_yaml()}\n---\n"


def model_card(cfg: BilinearTransformerConfig, repo_id: str) -> str:
    """The model card of a language model: what its config says, the formulas, and how to load it."""
    published = config_to_published(cfg)
    kind = "bilinear" if cfg.is_bilinear else "gated" if cfg.bilinear else "one-branch"
    b_gate, b_in, b_out = (" + b_gate", " + b_in", " + b_out") if cfg.bias else ("", "", "")
    first = f"{cfg.gate or ''}(W_gate n{b_gate})" if cfg.bilinear else f"{cfg.gate or ''}(W_in n{b_in})"
    scale = f"Attention's output is scaled by {cfg.residual_scale:.6g}, which is not in `attn.o`."
    if cfg.residual_scale == 1:
        scale = "Attention's output is not scaled."
    parts, positions = ", ".join(cfg.attention_parts), "rotary positions" if cfg.rotary else "no positions"
    mlp = f"W_out ({first} * (W_in n{b_in})){b_out}" if cfg.bilinear else f"W_out {first}{b_out}"
    keys = ["n_layer", "n_head", "d_head", "d_model", "d_hidden", "n_ctx", "bilinear", "gate", "bias", "normalization"]
    keys += ["attention", "attention_scale", "tokenizer"]
    facts = "\n".join(f"| `{key}` | {json.dumps(published[key])} |" for key in keys if key in published)
    return f"""{card_header(pipeline_tag="text-generation", tags=["bilinear", "interpretability"])}
# {repo_id.split("/")[-1]}

A {kind} transformer language model, written by bilens: pre-norm, {cfg.attention} attention, {positions},
untied embeddings. Its MLPs compute

    mlp(n) = {mlp}

| `config.json` | |
|---|---|
{facts}
| vocabulary | {cfg.d_vocab} |

`model.safetensors` holds `transformer.wte`, `transformer.h.L.attn.qkv` ({parts}), `.attn.o`, `.mlp.w` (left rows, then
right rows), `.mlp.p` and `lm_head`. {scale}

```python
import bilens

model = bilens.load_model("{repo_id}")
```
"""


def _revisions(repo: str, options: HubOptions) -> list[str]:
    """The branches and tags of a repository; none where the hub does not say."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError

    try:
        refs = HfApi(token=options.token).list_repo_refs(repo)
    except (OSError, HTTPError):
        return []
    return [ref.name for ref in (*refs.branches, *refs.tags)]


def _why_not_fetched(error: Exception, options: HubOptions) -> str:
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    if options.local_files_only:
        return "local_files_only is set"
    if isinstance(error.__cause__, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set"
    if isinstance(error.__cause__, HfHubHTTPError):
        return f"the hub refused it ({_one_line(error.__cause__)})"
    return "the hub cannot be reached"


def _hint(error: Exception, permission: str = "") -> str:
    """What to do about a token that does not do."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return f" A token{permission} is needed: {LOG_IN}." if status in (401, 403) else ""


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()).rstrip(".")
