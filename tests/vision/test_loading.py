"""The authors' format: in and out without a changed bit, and refused by name where it is broken."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from torch import Tensor

from bilens.errors import CheckpointError, ModelNotFoundError, OverwriteError
from bilens.vision import BilinearClassifier
from tests.fake_hub import FakeHub
from tests.vision.conftest import make_classifier

CONFIG = {"d_input": 12, "d_hidden": 7, "d_output": 4, "n_layer": 2, "bias": True, "residual": True}


def published(folder: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> dict[str, Tensor]:
    """Write a checkpoint as the authors' code would, without the classes under test; its tensors."""
    config = CONFIG | {"lr": 0.001, "wd": 0.5, "seed": 42} | changes
    generator = torch.Generator().manual_seed(5)
    shapes = {"embed.weight": (7, 12), "head.weight": (4, 7)}
    shapes |= {f"blocks.{layer}.weight": (14, 7) for layer in range(2)}
    shapes |= {f"blocks.{layer}.bias": (14,) for layer in range(2)}
    tensors = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return tensors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_loading_and_saving_give_the_same_bits(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = published(tmp_path / "theirs", dtype)
    model = BilinearClassifier.from_pretrained(tmp_path / "theirs", device="cpu")
    model.save_pretrained(tmp_path / "ours")
    again = load_file(tmp_path / "ours" / "model.safetensors")
    assert again.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert again[name].dtype == dtype
        assert torch.equal(again[name], tensor)
    # The keys that bilens does not use as well.
    configs = [json.loads((tmp_path / who / "config.json").read_text()) for who in ("theirs", "ours")]
    assert configs[0] == configs[1]


def test_loaded_weights_compute_what_the_tensors_say(tmp_path: Path) -> None:
    t = {name: tensor.double() for name, tensor in published(tmp_path).items()}
    images = torch.rand(3, 12, dtype=torch.float64)
    x = images @ t["embed.weight"].T
    for at in range(2):
        left, right = (x @ t[f"blocks.{at}.weight"].T + t[f"blocks.{at}.bias"]).split(7, dim=1)
        x = x + left * right
    model = BilinearClassifier.from_pretrained(tmp_path, dtype="float64", device="cpu")
    torch.testing.assert_close(model(images).detach(), x @ t["head.weight"].T, rtol=1e-12, atol=1e-10)


def test_loading_leaves_the_random_generator_alone(tmp_path: Path) -> None:
    published(tmp_path)
    before = torch.get_rng_state()
    BilinearClassifier.from_pretrained(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


def test_shape_and_class_names_come_back(tmp_path: Path) -> None:
    make_classifier().save_pretrained(tmp_path)
    assert BilinearClassifier.from_pretrained(tmp_path).cfg.image_shape == (3, 4)
    published(tmp_path, class_names=["a", "b", "c", "d"])
    cfg = BilinearClassifier.from_pretrained(tmp_path).cfg
    assert cfg.labels == ("a", "b", "c", "d")
    assert cfg.image_shape is None  # 12 pixels are no square
    published(tmp_path)
    assert BilinearClassifier.from_pretrained(tmp_path).cfg.labels == ("0", "1", "2", "3")


def test_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = published(tmp_path / "theirs")
    (tmp_path / "theirs" / "unneeded.bin").write_bytes(b"0")
    with FakeHub() as hub:
        hub.add("someone/digits", tmp_path / "theirs")
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        for name, value in {
            "ENDPOINT": hub.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": template,
            "HF_HUB_OFFLINE": False,
        }.items():
            monkeypatch.setattr(constants, name, value)
        model = BilinearClassifier.from_pretrained("someone/digits", cache_dir=tmp_path / "cache", device="cpu")
        assert torch.equal(model.head.weight, tensors["head.weight"])
        assert sorted(hub.downloaded) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("key", ["d_input", "d_hidden", "d_output", "n_layer"])
def test_missing_keys(tmp_path: Path, key: str) -> None:
    published(tmp_path)
    config = {k: v for k, v in CONFIG.items() if k != key}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=f"config.json has no '{key}'; needed are d_input, d_hidden"):
        BilinearClassifier.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d_hidden": 8}, r"embed.weight has shape \(7, 12\), the config asks for \(8, 12\)"),
        ({"d_output": 5}, r"head.weight has shape \(4, 7\), the config asks for \(5, 7\)"),
        ({"n_layer": 3}, "no tensor 'blocks.2.weight'"),
        ({"n_layer": 1}, "'blocks.1.bias', 'blocks.1.weight'.* have no place"),
        ({"bias": False}, "'blocks.0.bias', 'blocks.1.bias'.* have no place"),
        ({"residual": "yes"}, "residual is 'yes', expected true or false"),
        ({"n_layer": "2"}, "n_layer is '2', expected a positive integer"),
    ],
)
def test_configs_that_contradict_the_weights(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    published(tmp_path, **changes)
    with pytest.raises(CheckpointError, match=message):
        BilinearClassifier.from_pretrained(tmp_path)


def test_damaged_weights(tmp_path: Path) -> None:
    tensors = published(tmp_path)
    path = tmp_path / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-40])
    with pytest.raises(CheckpointError, match=r"cannot be read.*A truncated download"):
        BilinearClassifier.from_pretrained(tmp_path)
    tensors["blocks.1.weight"][3, 2] = torch.nan
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=r"blocks.1.weight holds 1 values that are NaN or infinite, of 98"):
        BilinearClassifier.from_pretrained(tmp_path)
    save_file(published(tmp_path) | {"head.weight": torch.ones(4, 7, dtype=torch.int64)}, path)
    with pytest.raises(CheckpointError, match=r"head\.weight is of dtype I64, expected one of F64, F32, F16, BF16"):
        BilinearClassifier.from_pretrained(tmp_path)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"has no config.json; it holds nothing"):
        BilinearClassifier.from_pretrained(tmp_path)
    published(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ModelNotFoundError, match=r"has no model.safetensors; it holds config.json"):
        BilinearClassifier.from_pretrained(tmp_path)
    with pytest.raises(ModelNotFoundError, match="not a folder, and not a hub id"):
        BilinearClassifier.from_pretrained(tmp_path / "elsewhere")


def test_another_classifier_is_not_written_over(tmp_path: Path) -> None:
    """The same one may be written again; other weights, another shape and another kind of model stay."""
    model = make_classifier()
    model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        model.W_E.add_(1)
    with pytest.raises(OverwriteError, match="a model with other weights"):
        model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path, overwrite=True)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(OverwriteError, match=r"another model, in config.json"):
        model.save_pretrained(tmp_path)
