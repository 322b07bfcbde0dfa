"""Training learns, is decided by its seed, writes what it trained, and says what it cannot do."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from bilens.cli import app
from bilens.errors import ArgumentError, ImageDataError, OverwriteError, TrainingError
from bilens.vision import (
    BilinearClassifier,
    ImageDataset,
    ImageTrainConfig,
    TrainedClassifier,
    class_matrices,
    load_images,
    train_classifier,
    with_one,
)
from bilens.vision.augmentation import augmentation
from bilens.vision.training import normed_noise

QUICK = ImageTrainConfig(d_hidden=32, epochs=3, batch_size=128)


@pytest.fixture(scope="module")
def digits() -> ImageDataset:
    return load_images("digits")


@pytest.fixture(scope="module")
def trained(digits: ImageDataset) -> TrainedClassifier:
    """The defaults, with biases and a residual addition, on digits: about two seconds."""
    return train_classifier(digits, ImageTrainConfig(bias=True, residual=True), progress=False)


def weights(trained: TrainedClassifier) -> Tensor:
    return torch.cat([weight.detach().flatten() for weight in trained.model.parameters()])


def test_it_learns_digits(trained: TrainedClassifier, digits: ImageDataset) -> None:
    """Measured here: about 99 % of the 359 test images over seeds; a linear classifier has 96 %."""
    assert trained.test_accuracy >= 0.965
    assert trained.test_accuracy == trained.model.accuracy(digits.test_images, digits.test_labels)
    assert trained.epochs[0].loss > 2 * trained.epochs[-1].loss


def test_trained_weights_are_their_homogeneous_matrices(trained: TrainedClassifier, digits: ImageDataset) -> None:
    """In float64, where only summation order separates the two; logits are of size ten."""
    model = BilinearClassifier(trained.model.cfg)
    model.load_state_dict(trained.model.state_dict())
    model.double()
    x = with_one(digits.test_images.flatten(1).double())
    logits = torch.einsum("bi,cij,bj->bc", x, class_matrices(model, homogeneous=True), x)
    torch.testing.assert_close(logits, model(digits.test_images).detach(), rtol=1e-10, atol=1e-10)


def test_a_seed_decides_every_bit(digits: ImageDataset) -> None:
    """With everything random switched on; and the caller's generator is left as it was."""
    config = {"d_hidden": 16, "epochs": 2, "rotation": 10, "translation": 1, "blur": 0.5, "latent_noise": 0.3}
    before = torch.get_rng_state()
    first = train_classifier(digits, ImageTrainConfig(**config), progress=False)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(7)
    second = train_classifier(digits, ImageTrainConfig(**config), progress=False)
    assert torch.equal(weights(first), weights(second))
    assert first.epochs == second.epochs
    assert not torch.equal(
        weights(first), weights(train_classifier(digits, ImageTrainConfig(**config, seed=1), progress=False))
    )


def test_what_is_written_is_what_was_trained(tmp_path: Path, digits: ImageDataset) -> None:
    result = train_classifier(digits, QUICK, tmp_path / "a" / "b", progress=False)
    loaded = BilinearClassifier.from_pretrained(tmp_path / "a" / "b", device="cpu")
    assert torch.equal(loaded(digits.test_images), result.model(digits.test_images))
    assert loaded.cfg.image_shape == (8, 8)
    assert loaded.cfg.class_names == digits.class_names
    facts = json.loads((tmp_path / "a" / "b" / "training.json").read_text())
    assert ImageTrainConfig(**facts["config"]) == QUICK
    assert facts["epochs"][-1]["test_accuracy"] == result.test_accuracy
    assert sorted(p.name for p in (tmp_path / "a" / "b").iterdir()) == [
        "config.json",
        "model.safetensors",
        "training.json",
    ]


def test_a_finished_model_stays_until_it_is_overwritten(
    tmp_path: Path, digits: ImageDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same call returns it, another is refused; an interrupt while overwriting leaves no half of either."""
    first = train_classifier(digits, QUICK, tmp_path, progress=False)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    other = ImageTrainConfig(d_hidden=8, epochs=1)

    def ctrl_c(*_: Any) -> float:
        raise KeyboardInterrupt

    monkeypatch.setattr(BilinearClassifier, "accuracy", ctrl_c)
    again = train_classifier(digits, QUICK, tmp_path, progress=False)
    assert again.epochs == first.epochs
    assert torch.equal(again.model.W_E, first.model.W_E)
    with pytest.raises(OverwriteError, match=r"d_hidden \(32 there, 8 here\)"):
        train_classifier(digits, other, tmp_path, progress=False)
    fewer = replace(digits, train_images=digits.train_images[1:], train_labels=digits.train_labels[1:])
    with pytest.raises(OverwriteError, match=r"images \("):
        train_classifier(fewer, QUICK, tmp_path, progress=False)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    with pytest.raises(KeyboardInterrupt):
        train_classifier(digits, other, tmp_path, progress=False, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["training.json"]
    monkeypatch.undo()
    assert train_classifier(digits, other, tmp_path, progress=False).model.cfg.d_hidden == 8


def test_latent_noise_is_in_units_of_the_activation() -> None:
    """Scaling what a layer reads scales its noise: a model cannot escape the noise by growing."""
    x = 7 * torch.randn(400, 100, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    added = normed_noise(0.3)(x, hook=None) - x
    torch.testing.assert_close(added.std(), torch.tensor(2.1), rtol=0.03, atol=0)  # 40,000 draws of each


def test_results_show_themselves(trained: TrainedClassifier) -> None:
    frame = trained.to_frame()
    assert list(frame.columns) == ["epoch", "loss", "train_accuracy", "test_accuracy"]
    assert list(frame["epoch"]) == list(range(1, 41))
    assert "64 -> 256 -> 10, 1 bilinear layer; epoch 40" in str(trained)
    assert list(trained.plot().data[0].y) == list(frame["test_accuracy"])
    assert "<table" in trained._repr_html_()


def test_the_command(tmp_path: Path, digits: ImageDataset) -> None:
    result = CliRunner().invoke(app, ["train-image", "digits", str(tmp_path), "--d-hidden", "16", "--epochs", "2"])
    assert result.exit_code == 0, result.output
    accuracy = BilinearClassifier.from_pretrained(tmp_path).accuracy(digits.test_images, digits.test_labels)
    assert f"{accuracy:.2%} of test images" in result.output


def test_the_command_and_the_library_have_the_same_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr("bilens.vision.training.train_classifier", lambda *args, **kwargs: seen.append(args))
    CliRunner().invoke(app, ["train-image", "digits", str(tmp_path)])
    assert seen[0][1] == ImageTrainConfig()


# --- augmentation -----------------------------------------------------------------------------------------------------


def moments(images: Tensor) -> tuple[Tensor, Tensor]:
    """Every image's centre of mass (row, column), and its variance around it."""
    rows, columns = torch.meshgrid(*(torch.arange(n).float() for n in images.shape[1:]), indexing="ij")
    mass = images.sum((1, 2))
    centre = torch.stack([(images * grid).sum((1, 2)) / mass for grid in (rows, columns)], 1)
    spread = (images * (rows**2 + columns**2)).sum((1, 2)) / mass - (centre**2).sum(1)
    return centre, spread


@pytest.fixture
def blob() -> Tensor:
    """500 copies of a small bright square right of the middle, far from the borders."""
    images = torch.zeros(500, 25, 31)
    images[:, 11:14, 19:22] = 1
    torch.manual_seed(0)
    return images


def test_nothing_is_done_where_nothing_is_asked(blob: Tensor) -> None:
    assert augmentation(25, 31)(blob) is blob


def test_translation_moves_each_image_by_pixels(blob: Tensor) -> None:
    """Bilinear resampling keeps the centre of mass: uniform in +-3 pixels, both ways, each image by itself."""
    shift = moments(augmentation(25, 31, translation=3)(blob))[0] - moments(blob)[0]
    assert shift.abs().max() <= 3 + 1e-3
    # A uniform's standard deviation is 3 / sqrt(3); of 500 draws it is off by 2 % at one sigma.
    torch.testing.assert_close(shift.std(0), torch.full((2,), 3**0.5), rtol=0.1, atol=0)


def test_rotation_turns_about_the_middle(blob: Tensor) -> None:
    """The square is 5 columns right of the middle (12, 15): its centre moves on that circle, by up to 30 degrees."""
    offset = moments(augmentation(25, 31, rotation=30)(blob))[0] - torch.tensor([12.0, 15.0])
    torch.testing.assert_close(offset.norm(dim=1), torch.full((500,), 5.0), rtol=0.02, atol=0)  # resampling
    angles = torch.rad2deg(torch.atan2(offset[:, 0], offset[:, 1]))
    assert angles.abs().max() <= 30.5
    torch.testing.assert_close(angles.std(), torch.tensor(30 / 3**0.5), rtol=0.1, atol=0)


def test_blur_spreads_and_keeps_the_light(blob: Tensor) -> None:
    """A Gaussian of standard deviation s adds 2 s^2 to the variance; s is uniform up to 1.5."""
    blurred = augmentation(25, 31, blur=1.5)(blob)
    torch.testing.assert_close(blurred.sum((1, 2)), blob.sum((1, 2)), rtol=1e-4, atol=0)
    added = moments(blurred)[1] - moments(blob)[1]
    assert added.max() <= 2 * 1.5**2
    assert added.max() > 3.5
    # The mean of s^2 over a uniform is a third of its largest value; the kernel is cut at three standard deviations.
    torch.testing.assert_close(added.mean(), torch.tensor(2 * 1.5**2 / 3), rtol=0.12, atol=0)


def test_noise_has_its_standard_deviation(blob: Tensor) -> None:
    added = augmentation(25, 31, noise=0.4)(blob) - blob
    torch.testing.assert_close(added.std(), torch.tensor(0.4), rtol=0.01, atol=0)  # 387,500 draws


# --- what it refuses --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"epochs": 0}, "epochs is 0, expected a positive whole number"),
        ({"d_hidden": 2.5}, "d_hidden is 2.5, expected a positive whole number"),
        ({"lr": 0.0}, "lr is 0.0, expected a number above 0"),
        ({"noise": -0.1}, "noise is -0.1, expected 0 or more"),
        ({"blur": float("nan")}, "blur is nan, expected 0 or more"),
        ({"rotation": 1e30}, r"rotation is 1e\+30, expected degrees either way"),
        ({"seed": -1}, "seed is -1, expected a whole number from 0"),
        ({"bias": "false"}, "bias is 'false', expected True or False"),
    ],
)
def test_wrong_settings(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        ImageTrainConfig(**wrong)


def test_a_loss_that_is_no_number(digits: ImageDataset) -> None:
    with pytest.raises(TrainingError, match=r"the loss is (nan|inf) in epoch 1; lower the learning rate 1e\+30"):
        train_classifier(digits, ImageTrainConfig(d_hidden=8, lr=1e30), progress=False)


def test_a_file_for_a_folder(tmp_path: Path, digits: ImageDataset) -> None:
    (tmp_path / "a").touch()
    with pytest.raises(ArgumentError, match="cannot be a folder to write into"):
        train_classifier(digits, QUICK, tmp_path / "a")


def test_a_device_or_size_that_is_none(digits: ImageDataset) -> None:
    with pytest.raises(ArgumentError, match="device 'foo' cannot be used here"):
        train_classifier(digits, QUICK, device="foo")
    with pytest.raises(ArgumentError, match="training this classifier needs"):
        train_classifier(digits, replace(QUICK, d_hidden=10**7))


def test_data_that_is_not_there() -> None:
    with pytest.raises(ImageDataError, match="Did you mean 'digits'"):
        train_classifier("digit")
