"""From the hub and onto it, against a fake hub on loopback: huggingface_hub itself is not replaced anywhere here."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants, save_torch_state_dict
from sae_lens import SAE, TopKSAE, TopKTrainingSAE, TopKTrainingSAEConfig
from safetensors.torch import load_file, save_file

from bilens.errors import ArgumentError, CheckpointError, ModelNotFoundError, SAEMismatchError, UploadError
from bilens.model.loading import load_model
from bilens.model.transformer import HookedBilinearTransformer
from bilens.sae import list_saes, load_sae, push_saes, scope_loader
from tests.conftest import make_model
from tests.fake_hub import READER, WRITER, FakeHub, sha256
from tests.random_saes import make_sae
from tests.sae.test_loading import published, saelens

MODEL, SCOPE, TOKENIZER = "me/micro", "me/micro-scope", "tdooms/ts-tokenizer-4096"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """An empty hub, an empty cache, nobody logged in.

    huggingface_hub reads the environment once, into `constants`, and looks there at every call; one test below sets
    the environment of another process instead.
    """
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    with FakeHub() as hub:
        for name, value in {
            "ENDPOINT": hub.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(tmp_path / "cache"),
            "HF_TOKEN_PATH": str(tmp_path / "token"),
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_OFFLINE": False,
        }.items():
            monkeypatch.setattr(constants, name, value)
        # transformers keeps a client, with the hub that was there when it was made.
        monkeypatch.setattr("transformers.utils.hub._hf_api", None, raising=False)
        yield hub


@pytest.fixture
def model(tokenizer: Any) -> HookedBilinearTransformer:
    return make_model(bias=True, tokenizer=tokenizer)


@pytest.fixture
def folder(model: HookedBilinearTransformer, tmp_path: Path) -> Path:
    """A checkpoint, and beside it what should not be downloaded."""
    folder = tmp_path / "checkpoint"
    model.save_pretrained(folder)
    (folder / "pytorch_model.bin").write_bytes(b"never opened")
    (folder / "notes").mkdir()
    (folder / "notes" / "config.json").write_text("{}")
    return folder


def assert_same(one: HookedBilinearTransformer, other: HookedBilinearTransformer) -> None:
    """The same weights, bit for bit, and the same tokens."""
    weights, others = one.published_tensors(), other.published_tensors()
    assert weights.keys() == others.keys()
    for name, weight in weights.items():
        assert weight.dtype == others[name].dtype, name
        assert torch.equal(weight, others[name]), name
    if one.tokenizer is not None:
        assert torch.equal(one.to_tokens("Mira lost a red kite."), other.to_tokens("Mira lost a red kite."))


def asked(hub: FakeHub) -> list[str]:
    """What was asked of the hub; huggingface_hub once a day asks for a list that has nothing to do with models."""
    return [request for request in hub.requests if "agent-harnesses" not in request]


def cached_file(cache: Path, repo: str, file: str) -> Path:
    """The one file of that name in the cache."""
    (path,) = (cache / f"models--{repo.replace('/', '--')}" / "snapshots").glob(f"*/{file}")
    return path


# --- models -----------------------------------------------------------------------------------------------------------


def test_a_model_comes_whole_and_alone(hub: FakeHub, folder: Path, model: HookedBilinearTransformer) -> None:
    """Config, weights and tokenizer are downloaded and nothing else, once; the cache is laid out as everybody's."""
    commit = hub.add(MODEL, folder)
    loaded = load_model(MODEL)
    assert_same(loaded, model)
    assert loaded.cfg.model_name == MODEL
    files = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    assert sorted(hub.downloaded) == files
    cache = Path(constants.HF_HUB_CACHE) / "models--me--micro"
    assert (cache / "refs" / "main").read_text() == commit
    assert sorted(path.name for path in (cache / "snapshots" / commit).iterdir()) == files
    weights = (folder / "model.safetensors").read_bytes()
    assert (cache / "blobs" / sha256(weights)).read_bytes() == weights
    assert_same(HookedBilinearTransformer.from_pretrained(MODEL), model)
    assert len(hub.downloaded) == len(files)


def test_revisions(hub: FakeHub, folder: Path, model: HookedBilinearTransformer, tokenizer: Any) -> None:
    """A branch, a tag and a commit hash each load their own weights, side by side in one cache."""
    first = hub.add(MODEL, folder)
    other = make_model(bias=True, tokenizer=tokenizer, seed=1)
    other.save_pretrained(folder, overwrite=True)
    hub.add(MODEL, folder, "other")
    hub.repositories[MODEL].tags["v1"] = first
    for revision, expected in [(None, model), ("other", other), ("v1", model), (first, model), ("main", model)]:
        assert_same(load_model(MODEL, revision=revision), expected)
        assert_same(load_model(MODEL, revision=revision, local_files_only=True), expected)
    hub.add(MODEL, folder)  # main moves on; the hash does not
    assert_same(load_model(MODEL), other)
    assert_same(load_model(MODEL, revision=first), model)


def offline(hub: FakeHub, monkeypatch: pytest.MonkeyPatch, how: str) -> dict[str, Any]:
    """Take the hub away; keywords for the next call."""
    if how == "HF_HUB_OFFLINE":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    elif how == "no connection":
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # the port of RFC 863: nothing listens
    elif how == "down":
        hub.down = True
    return {"local_files_only": True} if how == "local_files_only" else {}


WITHOUT_THE_HUB = {
    "HF_HUB_OFFLINE": "HF_HUB_OFFLINE is set",
    "local_files_only": "local_files_only is set",
    "no connection": "the hub cannot be reached",
    "down": "the hub refused it .*down for maintenance",
}


@pytest.mark.parametrize("how", WITHOUT_THE_HUB)
def test_without_the_hub(
    hub: FakeHub, folder: Path, model: HookedBilinearTransformer, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """What was loaded once loads again, of the revision asked for; what was not is an error that says why."""
    hub.add(MODEL, folder)
    hub.add("me/other", folder)
    load_model(MODEL)
    hub.requests.clear()
    options = offline(hub, monkeypatch, how)
    assert_same(load_model(MODEL, **options), model)
    if how != "down":
        assert not asked(hub)
    message = f"is not wholly in the Hugging Face cache, and {WITHOUT_THE_HUB[how]}.*list_models"
    with pytest.raises(ModelNotFoundError, match=f"'me/other' {message}"):
        load_model("me/other", **options)
    with pytest.raises(ModelNotFoundError, match=f"'me/micro@v2' {message}"):
        load_model(MODEL, revision="v2", **options)


def test_a_cache_of_ones_own(hub: FakeHub, folder: Path, model: HookedBilinearTransformer, tmp_path: Path) -> None:
    """cache_dir= is used for everything, and the common cache for nothing."""
    (folder / "tokenizer.json").rename(folder / "tokenizer.saved")
    edit_config(folder, tokenizer="ts-4096")
    hub.add(MODEL, folder)
    (folder / "tokenizer.saved").rename(folder / "tokenizer.json")
    hub.add(TOKENIZER, folder)
    own = tmp_path / "own"
    assert_same(load_model(MODEL, cache_dir=own), model)
    assert {path.name for path in own.glob("models--*")} == {"models--me--micro", "models--tdooms--ts-tokenizer-4096"}
    assert not Path(constants.HF_HUB_CACHE).exists()
    assert_same(load_model(MODEL, cache_dir=own, local_files_only=True), model)


def test_the_environment(hub: FakeHub, folder: Path, model: HookedBilinearTransformer, tmp_path: Path) -> None:
    """HF_ENDPOINT, HF_HUB_CACHE and HF_TOKEN of a process hold; what it downloads, another process finds."""
    hub.add(MODEL, folder, private=True)
    environment = {
        "HF_ENDPOINT": hub.url,
        "HF_HUB_CACHE": str(tmp_path / "theirs"),
        "HF_HOME": str(tmp_path / "home"),
        "HF_TOKEN": READER,
        "HF_HUB_DISABLE_XET": "1",
    }
    code = f"import bilens; print(bilens.load_model({MODEL!r}).cfg.model_name)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[2],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == f"{MODEL}\n", done.stderr
    hub.requests.clear()
    assert_same(load_model(MODEL, cache_dir=tmp_path / "theirs", local_files_only=True), model)
    assert not asked(hub)


def test_private_models(hub: FakeHub, folder: Path, model: HookedBilinearTransformer) -> None:
    """Without a token a private repository looks as if it were missing, and the message says both."""
    hub.add(MODEL, folder, private=True)
    for options in ({}, {"token": False}):
        with pytest.raises(ModelNotFoundError, match=r"shows no repository 'me/micro'; for a private one, pass token="):
            load_model(MODEL, **options)
    with pytest.raises(ModelNotFoundError, match=r"refused 'me/micro': .*Invalid credentials.*A token is needed"):
        load_model(MODEL, token="hf_expired")
    with pytest.raises(ModelNotFoundError, match=r"token=True, but there is no token .*hf auth login"):
        load_model(MODEL, token=True)
    assert_same(load_model(MODEL, token=READER), model)
    Path(constants.HF_TOKEN_PATH).write_text(READER)  # as `hf auth login` does
    assert_same(load_model(MODEL), model)
    assert_same(load_model(MODEL, token=True), model)


def test_gated_models(hub: FakeHub, folder: Path, model: HookedBilinearTransformer) -> None:
    """Everybody sees a gated repository, and its files those who were let in."""
    hub.add(MODEL, folder, gated=True)
    for token in (None, WRITER):
        with pytest.raises(ModelNotFoundError, match="'me/micro' is gated: ask for access at its page"):
            load_model(MODEL, token=token)
    assert_same(load_model(MODEL, token=READER), model)


def test_what_is_not_on_the_hub(hub: FakeHub, folder: Path) -> None:
    """A missing repository, a misspelt revision, a name that can be none: each says what to do."""
    hub.repositories.clear()
    commit = hub.add(MODEL, folder)
    hub.add(MODEL, folder, "half-trained")
    hub.repositories[MODEL].tags["v1"] = commit
    with pytest.raises(ModelNotFoundError, match="no repository 'me/mikro'"):
        load_model("me/mikro")
    expected = "no revision 'half-traned'; .*it has main, half-trained, v1. Did you mean 'half-trained'"
    with pytest.raises(ModelNotFoundError, match=expected):
        load_model(MODEL, revision="half-traned")
    with pytest.raises(
        ModelNotFoundError, match=r"no revision '0{40}'; a revision is a branch, a tag or a full commit"
    ):
        load_model(MODEL, revision="0" * 40)
    with pytest.raises(ModelNotFoundError, match=r"'me/a--b' is not the name of a hub repository: .*--"):
        load_model("me/a--b")


@pytest.mark.parametrize("source", ["ts-tiny", "a folder"])
def test_what_is_on_this_machine_has_no_revision(folder: Path, source: str) -> None:
    """A revision is refused rather than left out: the weights would be others than those asked for."""
    place = folder if source == "a folder" else source
    for load in (load_model, list_saes):
        with pytest.raises(ModelNotFoundError, match="is not on the hub, so it has no revision 'v1'"):
            load(place, revision="v1")
    with pytest.raises(ModelNotFoundError, match="has no revision 'v1'"):
        load_sae(place, "mlp-in", 0, revision="v1")


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_a_repository_without_a_model(hub: FakeHub, folder: Path, file: str) -> None:
    (folder / file).unlink()
    hub.add(MODEL, folder)
    with pytest.raises(ModelNotFoundError, match=f"'me/micro' has no {file}"):
        load_model(MODEL)


# --- broken downloads -------------------------------------------------------------------------------------------------


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """huggingface_hub waits a second before it tries again."""
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)


def test_a_connection_that_breaks_goes_on(
    hub: FakeHub, folder: Path, model: HookedBilinearTransformer, no_waiting: None
) -> None:
    """A download that breaks off is taken up where it stopped."""
    hub.add(MODEL, folder)
    hub.breaks["model.safetensors"] = [1000, 500]
    assert_same(load_model(MODEL), model)
    assert hub.downloaded.count("model.safetensors") == 3


def test_a_connection_that_stays_broken(
    hub: FakeHub, folder: Path, model: HookedBilinearTransformer, no_waiting: None
) -> None:
    """When trying again does not help either, half a file is never taken for a whole one; later it goes on."""
    hub.add(MODEL, folder)
    hub.breaks["model.safetensors"] = [1000] + 20 * [0]
    with pytest.raises(ModelNotFoundError, match=r"fetching 'me/micro' broke off \(.*\)\. Run it again"):
        load_model(MODEL)
    with pytest.raises(ModelNotFoundError, match="not wholly in the Hugging Face cache"):
        load_model(MODEL, local_files_only=True)
    hub.breaks.clear()
    assert_same(load_model(MODEL), model)


def test_a_truncated_file_in_the_cache(hub: FakeHub, folder: Path, model: HookedBilinearTransformer) -> None:
    """A damaged cache is a CheckpointError that names the file to delete; deleting it is enough."""
    hub.add(MODEL, folder)
    load_model(MODEL)
    path = cached_file(Path(constants.HF_HUB_CACHE), MODEL, "model.safetensors").resolve()
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(CheckpointError, match=rf"\(3000 bytes\) cannot be read.*Delete {path} and fetch it again"):
        load_model(MODEL)
    path.unlink()
    assert_same(load_model(MODEL), model)


# --- tokenizers -------------------------------------------------------------------------------------------------------


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


@pytest.fixture
def without_tokenizer(hub: FakeHub, folder: Path, tmp_path: Path) -> Path:
    """A model repository, branch `v2`, that names the published tokenizer ts-4096; the tokenizer's files."""
    files = tmp_path / "tokenizer"
    files.mkdir()
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / file).rename(files / file)
    edit_config(folder, tokenizer="ts-4096")
    hub.add(MODEL, folder, private=True)
    hub.add(MODEL, folder, "v2")
    return files


def test_the_named_tokenizer_is_fetched(
    hub: FakeHub, without_tokenizer: Path, model: HookedBilinearTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From its own repository: with the same token, not of the model's revision, and offline from the cache."""
    hub.add(TOKENIZER, without_tokenizer, private=True)
    loaded = load_model(MODEL, revision="v2", token=READER)
    assert_same(loaded, model)
    assert (loaded.tokenizer.pad_token, loaded.tokenizer.model_max_length) == ("[EOS]", 32)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.requests.clear()
    assert_same(load_model(MODEL, revision="v2"), model)
    assert not asked(hub)


def test_a_tokenizer_that_is_not_to_be_had(hub: FakeHub, without_tokenizer: Path) -> None:
    """The model loads for tokens, with a warning that names the tokenizer."""
    with pytest.warns(UserWarning, match=f"the tokenizer {TOKENIZER} cannot be loaded, only tokens can be used"):
        loaded = load_model(MODEL, token=READER)
    assert loaded.tokenizer is None
    assert loaded(torch.tensor([[1, 2, 3]])).isfinite().all()


# --- shards -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def sharded(folder: Path) -> Path:
    """The checkpoint in shards, split by huggingface_hub."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    save_torch_state_dict(tensors, folder, max_shard_size=6000)
    assert len(list(folder.glob("model-0*.safetensors"))) > 2
    return folder


def test_shards_load_as_one(hub: FakeHub, sharded: Path, model: HookedBilinearTransformer) -> None:
    """From a folder, from the hub and from the cache; saved again, in one file."""
    assert_same(load_model(sharded), model)
    hub.add(MODEL, sharded)
    assert_same(load_model(MODEL), model)
    shards = sorted(path.name for path in sharded.glob("model-0*"))
    assert sorted(name for name in hub.downloaded if name.startswith("model-0")) == shards
    assert_same(load_model(MODEL, local_files_only=True), model)
    load_model(sharded).save_pretrained(sharded.parent / "again")
    assert_same(load_model(sharded.parent / "again"), model)


def test_one_file_wins_over_shards(hub: FakeHub, sharded: Path, model: HookedBilinearTransformer) -> None:
    """As in transformers; the shards are then not even downloaded."""
    other = make_model(bias=True, tokenizer=model.tokenizer, seed=1)
    other.save_pretrained(sharded, overwrite=True)
    assert_same(load_model(sharded), other)
    hub.add(MODEL, sharded)
    assert_same(load_model(MODEL), other)
    assert not [name for name in hub.downloaded if name.startswith("model-0")]


def test_shards_come_from_the_commit_of_their_index(
    hub: FakeHub, sharded: Path, model: HookedBilinearTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A push between the index and the shards mixes nothing."""
    from bilens.model import files

    hub.add(MODEL, sharded)
    read = files.read_index

    def and_then_a_push(path: Path) -> dict[str, set[str]]:
        hub.add(MODEL, {"config.json": b"{}"})
        return read(path)

    monkeypatch.setattr(files, "read_index", and_then_a_push)
    assert_same(load_model(MODEL), model)


def edit_index(folder: Path, edit: Callable[[dict[str, str]], Any]) -> None:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    edit(index["weight_map"])
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def first_shard(folder: Path) -> Path:
    return min(folder.glob("model-0*"))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def drop_one(path: Path) -> None:
    tensors = load_file(path)
    tensors.pop(min(tensors))
    save_file(tensors, path)


BAD_SHARDS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (lambda f: first_shard(f).unlink(), r"has no model-00001-of-\d+\.safetensors, which model.safetensors"),
    "truncated": (lambda f: truncate(first_shard(f)), r"model-00001-of-\d+\.safetensors .* cannot be read"),
    "incomplete": (lambda f: drop_one(first_shard(f)), r"model-00001-of-\d+\.safetensors: .* disagree about \['"),
    "index without": (
        lambda f: edit_index(f, lambda w: w.pop("transformer.h.0.mlp.w.bias")),
        r"disagree about \['transformer.h.0.mlp.w.bias'\]",
    ),
    "empty index": (lambda f: edit_index(f, dict.clear), "index.json: weight_map is {}"),
    "no index": (lambda f: (f / "model.safetensors.index.json").write_text("[]"), "index.json holds a list"),
}


@pytest.mark.parametrize(("damage", "message"), BAD_SHARDS.values(), ids=BAD_SHARDS.keys())
def test_bad_shards_are_named(hub: FakeHub, sharded: Path, damage: Callable, message: str) -> None:
    """In a folder and from the hub alike."""
    damage(sharded)
    hub.add(MODEL, sharded)
    for source in (sharded, MODEL):
        with pytest.raises(CheckpointError, match=message):
            load_model(source)


@pytest.mark.parametrize(
    "place", ["../{}", "/{}", "sub/{}", "..\\{}", "{}\n", ".safetensors/../{}", 3, "*.safetensors"]
)
def test_a_shard_outside_the_folder_is_never_opened(hub: FakeHub, sharded: Path, place: Any) -> None:
    """An index names files of its own folder and nothing else."""
    outside = str(shutil.copy(first_shard(sharded), sharded.parent))
    name = place.format(Path(outside).name) if isinstance(place, str) else place
    edit_index(sharded, lambda w: w.update(dict.fromkeys(w, name)))
    hub.add(MODEL, sharded)
    for source in (sharded, MODEL):
        with pytest.raises(
            CheckpointError, match=r"is said to be in .*, expected a .safetensors file in the same folder"
        ):
            load_model(source)


# --- precision and device ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(hub: FakeHub, model: HookedBilinearTransformer, dtype: torch.dtype, tmp_path: Path) -> None:
    """Pushed in half precision: "auto" gives the bits on the hub, the default the same numbers in float32."""
    model.push_to_hub(MODEL, token=WRITER, dtype=dtype)
    assert json.loads(hub.files(MODEL)["config.json"])["dtype"] == str(dtype).removeprefix("torch.")
    auto, wide = load_model(MODEL, dtype="auto", device="cpu"), load_model(MODEL, device=torch.device("cpu"))
    assert (auto.cfg.dtype, auto.W_E.dtype, auto.cfg.device) == (dtype, dtype, "cpu")
    assert (wide.cfg.dtype, wide.W_E.dtype) == (torch.float32, torch.float32)
    auto.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == hub.files(MODEL)["model.safetensors"]
    assert_same(wide, auto.float())
    tokens = torch.tensor([[1, 5, 7, 20, 9]])
    # Rounding to p bits moves a weight by at most 2^-p of itself (11 bits of float16, 8 of bfloat16); with some ten
    # products in a row the logits, of size 1 to 10, stay within a few dozen times that.
    bits = {torch.float16: 11, torch.bfloat16: 8}[dtype]
    torch.testing.assert_close(wide(tokens), model(tokens), atol=40 * 2.0**-bits, rtol=0)
    assert load_model(MODEL, dtype="float64").W_E.dtype == torch.float64


# --- SAEs -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def scope(hub: FakeHub, tmp_path: Path) -> Path:
    """SAEs of both formats on the hub; the folder they came from."""
    folder = tmp_path / "scope"
    published(folder, "mlp-in", 1)
    published(folder, "mlp-in", 1, k=5)
    published(folder, "mlp-out", 1)
    published(folder, "attn-out", 0)
    saelens(folder, "resid-mid", 1)
    (folder / "3-mlp-in-x2-k3").mkdir()
    (folder / "3-mlp-in-x2-k3" / "pytorch_model.bin").write_bytes(b"never opened")
    (folder / "1-mlp-in-x2-k3" / "optimizer.safetensors").write_bytes(b"never opened")
    hub.add(SCOPE, folder)
    return folder


def assert_same_sae(one: Any, other: Any) -> None:
    """The same class, configuration and bits."""
    assert type(one) is type(other)
    assert one.cfg.to_dict() == other.cfg.to_dict()
    weights = other.state_dict()
    assert one.state_dict().keys() == weights.keys()
    for name, weight in one.state_dict().items():
        assert torch.equal(weight, weights[name]), name


def test_listing_downloads_configs_alone(hub: FakeHub, scope: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the second time nothing; a list that was read online is read again offline."""
    assert list_saes(SCOPE) == list_saes(scope)
    assert {name.split("/")[-1] for name in hub.downloaded} == {"config.json", "cfg.json"}
    hub.downloaded.clear()
    list_saes(SCOPE)
    assert not hub.downloaded
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.requests.clear()
    assert list_saes(SCOPE) == list_saes(scope)
    assert not asked(hub)


def test_loading_downloads_one_folder(hub: FakeHub, scope: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The configs at that point and layer, to choose from, and the weights of the one chosen."""
    assert_same_sae(load_sae(SCOPE, "mlp-in", 1, k=5), load_sae(scope, "mlp-in", 1, k=5))
    assert sorted(hub.downloaded) == [
        "1-mlp-in-x2-k3/config.json",
        "1-mlp-in-x2-k5/config.json",
        "1-mlp-in-x2-k5/model.safetensors",
    ]
    assert_same_sae(load_sae(SCOPE, "resid-mid", 1, dtype="auto"), load_sae(scope, "resid-mid", 1, dtype="auto"))
    assert_same_sae(load_sae(SCOPE, "attn-out", 0, n_layers=2), load_sae(scope, "attn-out", 0, n_layers=2))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert_same_sae(load_sae(SCOPE, "mlp-in", 1, k=5), load_sae(scope, "mlp-in", 1, k=5))
    with pytest.raises(ModelNotFoundError, match="not wholly in the Hugging Face cache, and HF_HUB_OFFLINE"):
        load_sae(SCOPE, "mlp-in", 1, k=3)
    with pytest.raises(ModelNotFoundError, match="not wholly in the Hugging Face cache"):
        list_saes(SCOPE)


def test_saelens_loads_published_saes(hub: FakeHub, scope: Path) -> None:
    """`SAE.from_pretrained` with our converter gives what `load_sae` gives, class and bits."""
    theirs = SAE.from_pretrained(SCOPE, "1-mlp-in-x2-k5", converter=scope_loader)
    assert_same_sae(theirs, load_sae(scope, "mlp-in", 1, k=5, device="cpu"))
    scaled = SAE.from_pretrained(SCOPE, "0-attn-out-x2-k3", converter=partial(scope_loader, n_layers=2))
    assert_same_sae(scaled, load_sae(scope, "attn-out", 0, n_layers=2, device="cpu"))
    with pytest.raises(ModelNotFoundError, match="is no SAE folder"):
        SAE.from_pretrained(SCOPE, "7-mlp-in-x2-k5", converter=scope_loader)


def test_revisions_and_tokens_of_saes(hub: FakeHub, scope: Path) -> None:
    """As for models."""
    first = load_sae(scope, "mlp-out", 1)
    hub.repositories[SCOPE].private = True
    shutil.rmtree(scope / "1-mlp-out-x2-k3")
    published(scope, "mlp-out", 1, seed=7)
    hub.add(SCOPE, scope, "v2")
    options = {"token": READER, "cache_dir": scope.parent / "own"}
    assert_same_sae(load_sae(SCOPE, "mlp-out", 1, **options), first)
    second = load_sae(SCOPE, "mlp-out", 1, revision="v2", **options)
    assert_same_sae(second, load_sae(scope, "mlp-out", 1))
    assert not torch.equal(second.W_enc, first.W_enc)
    assert not Path(constants.HF_HUB_CACHE).exists()
    for call in (list_saes, lambda source, **hub: load_sae(source, "mlp-out", 1, **hub)):
        with pytest.raises(ModelNotFoundError, match="shows no repository 'me/micro-scope'; for a private one"):
            call(SCOPE)
        with pytest.raises(ModelNotFoundError, match=r"no revision 'v3'; .* it has main, v2"):
            call(SCOPE, revision="v3", token=READER)
        with pytest.raises(ModelNotFoundError, match="local_files_only is set"):
            call(SCOPE, token=READER, local_files_only=True)


def test_saes_that_the_hub_does_not_have(hub: FakeHub, scope: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="Did you mean '1-mlp-out-x2-k3'"):
        load_sae(SCOPE, "mlp-out", 2, 2, 3)
    (scope / "1-mlp-out-x2-k3" / "model.safetensors").unlink()
    hub.add(SCOPE, scope)
    with pytest.raises(ModelNotFoundError, match=r"'me/micro-scope' has no 1-mlp-out-x2-k3/model\.safetensors"):
        load_sae(SCOPE, "mlp-out", 1)
    hub.add("me/empty", {"README.md": b"nothing yet"})
    assert list_saes("me/empty") == ()


# --- pushing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_pushed_model_comes_back(hub: FakeHub, model: HookedBilinearTransformer, dtype: torch.dtype) -> None:
    """The same bits, config and tokenizer; one commit with the message given; a model card."""
    commit = model.to(dtype).push_to_hub(MODEL, token=WRITER, commit_message="First weights")
    assert_same(load_model(MODEL, dtype="auto"), model)
    assert set(hub.files(MODEL)) - {".gitattributes"} == {
        "README.md",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    repository = hub.repositories[MODEL]
    assert not repository.private
    assert repository.branches["main"] == commit.oid
    assert repository.messages == ["", "First weights"]
    card = hub.files(MODEL)["README.md"].decode()
    assert card.startswith("---\nlibrary_name: bilens\n")
    assert "| `d_hidden` | 24 |" in card
    assert "mlp(n) = W_out ((W_gate n + b_gate) * (W_in n + b_in)) + b_out" in card
    assert f'bilens.load_model("{MODEL}")' in card


@pytest.mark.parametrize(
    ("config", "formula"),
    [
        ({}, "A bilinear transformer.*W_out ((W_gate n) * (W_in n))"),
        ({"gate": "silu"}, "A gated transformer.*W_out (silu(W_gate n) * (W_in n))"),
        ({"bilinear": False, "gate": "relu"}, "A one-branch transformer.*W_out relu(W_in n)"),
        ({"bilinear": False, "bias": True}, "A one-branch transformer.*W_out (W_in n + b_in) + b_out"),
    ],
)
def test_the_model_card_says_what_the_mlp_is(config: dict[str, Any], formula: str) -> None:
    from bilens.model.hub import model_card

    card = model_card(make_model(**config).cfg, MODEL)
    kind, mlp = formula.split(".*")
    assert kind in card
    assert f"    mlp(n) = {mlp}\n" in card


def test_pushing_again(hub: FakeHub, sharded: Path, model: HookedBilinearTransformer) -> None:
    """Onto a repository with shards and a card: the card stays as its owner wrote it, the old shards go."""
    (sharded / "README.md").write_text("mine")
    hub.add(MODEL, sharded)
    other = make_model(bias=True, tokenizer=model.tokenizer, seed=1)
    other.push_to_hub(MODEL, token=WRITER)
    assert_same(load_model(MODEL), other)
    assert hub.files(MODEL)["README.md"] == b"mine"
    assert hub.files(MODEL)["pytorch_model.bin"] == b"never opened"
    assert not [name for name in hub.files(MODEL) if name.startswith(("model-", "model.safetensors.index"))]


def test_pushing_to_a_branch(hub: FakeHub, model: HookedBilinearTransformer) -> None:
    """A branch is made where there is none; main stays."""
    model.push_to_hub(MODEL, token=WRITER)
    other = make_model(bias=True, tokenizer=model.tokenizer, seed=1)
    for _ in range(2):
        other.push_to_hub(MODEL, token=WRITER, revision="v2")
    assert_same(load_model(MODEL), model)
    assert_same(load_model(MODEL, revision="v2"), other)


def test_pushing_in_private(hub: FakeHub, model: HookedBilinearTransformer) -> None:
    """private=True makes a private repository, and never writes into a public one."""
    for _ in range(2):
        model.push_to_hub(MODEL, token=WRITER, private=True)
    assert hub.repositories[MODEL].private
    with pytest.raises(ModelNotFoundError, match="for a private one"):
        load_model(MODEL)
    assert_same(load_model(MODEL, token=READER), model)
    model.push_to_hub("me/public", token=WRITER)
    commits = len(hub.repositories["me/public"].commits)
    with pytest.raises(UploadError, match="'me/public' exists and is public"):
        model.push_to_hub("me/public", token=WRITER, private=True)
    assert len(hub.repositories["me/public"].commits) == commits


@pytest.mark.parametrize("how", ["HF_HUB_OFFLINE", "no connection", "down"])
def test_pushing_without_the_hub(
    hub: FakeHub, model: HookedBilinearTransformer, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    offline(hub, monkeypatch, how)
    with pytest.raises(UploadError, match=r"the hub did not take 'me/micro': ."):
        model.push_to_hub(MODEL, token=WRITER)


@pytest.mark.parametrize("token", [None, READER])
def test_pushing_without_permission(hub: FakeHub, model: HookedBilinearTransformer, folder: Path, token: Any) -> None:
    hub.add("me/there", folder)
    for repo in (MODEL, "me/there"):
        with pytest.raises(UploadError, match=rf"take '{repo}': .*\. A token with permission to write is needed: pass"):
            model.push_to_hub(repo, token=token)
    assert len(hub.repositories["me/there"].commits) == 1


def test_pushing_to_what_is_no_repository(hub: FakeHub, model: HookedBilinearTransformer) -> None:
    with pytest.raises(UploadError, match=r"take 'me/a--b': .*--"):
        model.push_to_hub("me/a--b", token=WRITER)


def test_an_upload_that_breaks(hub: FakeHub, model: HookedBilinearTransformer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is committed; the next push is whole."""
    with monkeypatch.context() as patch:
        patch.setattr("tests.fake_hub.Handler.lfs_upload", lambda handler, oid: handler.send(400, b""))
        with pytest.raises(UploadError, match=r"the hub did not take 'me/micro': .*while uploading"):
            model.push_to_hub(MODEL, token=WRITER)
    assert set(hub.files(MODEL)) == {".gitattributes"}
    model.push_to_hub(MODEL, token=WRITER)
    assert_same(load_model(MODEL), model)


def named_saes() -> dict[str, Any]:
    saes = {
        "0-mlp-in-x2-k7": make_sae("topk", "blocks.0.ln2.hook_normalized", d_sae=32),
        "1-mlp-out-x2-k7-tag": make_sae("scope-bilinear", "blocks.1.hook_mlp_out", d_sae=32),
        "1-resid-mid-x2-k32": make_sae("jumprelu", None, d_sae=32),
    }
    return {name: sae.eval() for name, sae in saes.items()}


def test_pushed_saes_come_back(hub: FakeHub) -> None:
    """By load_sae and by SAELens' own loader, bit for bit."""
    saes = named_saes()
    commit = push_saes(saes, SCOPE, token=WRITER, commit_message="SAEs", private=True)
    assert hub.repositories[SCOPE].branches["main"] == commit.oid
    assert hub.repositories[SCOPE].private
    entries = list_saes(SCOPE, token=READER)
    assert {entry.folder for entry in entries} == set(saes)
    for entry in entries:
        sae = load_sae(SCOPE, entry.point, entry.layer, tag=entry.tag, token=READER, device="cpu")
        saes[entry.folder].cfg.metadata.hook_name = entry.hook_name
        assert_same_sae(sae, saes[entry.folder])
    hub.repositories[SCOPE].private = False
    theirs = SAE.from_pretrained(SCOPE, "0-mlp-in-x2-k7", device="cpu")
    assert isinstance(theirs, TopKSAE)
    assert torch.equal(theirs.W_dec, saes["0-mlp-in-x2-k7"].W_dec)
    card = hub.files(SCOPE)["README.md"].decode()
    assert card.startswith("---\nlibrary_name: bilens\n")
    row = "| `1-mlp-out-x2-k7-tag` | 1 | mlp-out | `blocks.1.hook_mlp_out` | 2 | 7 | saelens |"
    assert row in card
    # Another one pushed later comes into the table, and what was written around it stays.
    hub.add(SCOPE, hub.files(SCOPE) | {"README.md": (card + "\nMy own words.\n").encode()})
    later = make_sae("topk", "blocks.1.hook_mlp_out", d_in=8, d_sae=16, k=3)
    push_saes({"1-mlp-out-x2-k3": later}, SCOPE, token=WRITER)
    last = [line for line in card.splitlines() if line.startswith("| `")][-1]
    new = "| `1-mlp-out-x2-k3` | 1 | mlp-out | `blocks.1.hook_mlp_out` | 2 | 3 | saelens |"
    assert hub.files(SCOPE)["README.md"].decode() == card.replace(f"{last}\n", f"{last}\n{new}\n") + "\nMy own words.\n"


def test_a_pushed_folder_comes_back(hub: FakeHub, scope: Path) -> None:
    """A folder of SAE folders goes as it is, without what does not belong to an SAE."""
    push_saes(scope, "me/copy", token=WRITER)
    copied = {name: data for name, data in hub.files("me/copy").items() if "/" in name}
    names = {
        path.relative_to(scope).as_posix() for path in scope.rglob("*.*") if path.suffix in (".json", ".safetensors")
    }
    assert copied == {name: (scope / name).read_bytes() for name in names - {"1-mlp-in-x2-k3/optimizer.safetensors"}}
    assert list_saes("me/copy") == list_saes(scope)


def test_pushed_saes_replace_those_of_their_names(hub: FakeHub, scope: Path) -> None:
    """Also those in the other format, which would be found first; other SAEs and the card stay."""
    hub.add(SCOPE, hub.files(SCOPE) | {"README.md": b"mine"})
    before = hub.files(SCOPE)
    sae = make_sae("topk", "blocks.1.hook_mlp_out", d_in=8, d_sae=16, k=3).eval()
    push_saes({"1-mlp-out-x2-k3": sae}, SCOPE, token=WRITER)
    loaded = load_sae(SCOPE, "mlp-out", 1, device="cpu")
    assert_same_sae(loaded, sae)
    after = hub.files(SCOPE)
    changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    assert {name.split("/")[0] for name in changed} == {"1-mlp-out-x2-k3"}


def test_saes_in_training_are_pushed_for_use(hub: FakeHub) -> None:
    """What training alone needs stays behind."""
    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=8, d_sae=16, k=3))
    push_saes({"0-mlp-in-x2-k3": sae}, SCOPE, token=WRITER)
    loaded = load_sae(SCOPE, "mlp-in", 0)
    assert type(loaded) is TopKSAE
    x = torch.randn(5, 8)
    # Decoder norms may have been folded on the way: the same function in other weights, equal to float rounding.
    torch.testing.assert_close(loaded(x), sae(x), atol=1e-5, rtol=1e-5)


def test_saes_that_cannot_be_pushed(hub: FakeHub, tmp_path: Path) -> None:
    """Refused by name, before the hub hears of it."""
    sae = make_sae("topk", "blocks.0.hook_mlp_out")
    for unnamed in ([sae], sae):
        with pytest.raises(ArgumentError, match="saes is a list of SAEs, or one; expected them by folder name"):
            push_saes(unnamed, SCOPE, token=WRITER)  # type: ignore[arg-type]
    refused: list[tuple[Any, type[Exception], str]] = [
        ({"layer0": sae}, SAEMismatchError, "'layer0' is not the name of an SAE folder: expected the name {layer}"),
        ({"../0-mlp-out-x2-k7": sae}, SAEMismatchError, "is not the name of an SAE folder"),
        (
            {"0-mlp-in-x2-k7": sae},
            SAEMismatchError,
            r"of blocks\.0\.ln2.*, but it was trained on blocks\.0\.hook_mlp_out",
        ),
        ({}, ModelNotFoundError, "no SAEs to push"),
        (tmp_path, ModelNotFoundError, "no SAEs to push"),
        (tmp_path / "nowhere", ModelNotFoundError, "no folder '.*nowhere'"),
        ("me/micro-scope", ModelNotFoundError, "no folder 'me/micro-scope': SAEs are pushed from this machine"),
    ]
    for saes, error, message in refused:
        with pytest.raises(error, match=message):
            push_saes(saes, SCOPE, token=WRITER)
    assert not asked(hub)
