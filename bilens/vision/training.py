"""Training a bilinear image classifier.

1. every epoch takes the training images in a new order, in batches of nearly equal size
2. every step: augment (`bilens.vision.augmentation`), cross-entropy, clipped gradients, AdamW; the learning rate
   falls as a cosine to zero
3. after every epoch: the accuracy on the test images, unchanged
4. at the end: the model in the authors' format and `training.json`, each file whole or not at all

Source: Pearce et al. 2025, appendices B and G.1 (AdamW, cosine schedule, strong weight decay, Gaussian input
noise, normed latent noise). Everything random is drawn after `torch.manual_seed(seed)` in a fork of the global
generator, so that a seed decides every bit on one machine, and the caller's generator is left alone.
"""

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from math import isfinite
from typing import Any

import pandas as pd
import plotly.graph_objects as go
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from bilens._core.checks import check_amounts, check_flags, check_memory, check_rates, check_seeds, check_sizes
from bilens._core.display import Tabular
from bilens._core.files import destination_folder
from bilens._core.fingerprint import fingerprint
from bilens._core.folders import alone_in, claim, finish
from bilens.draw import plots
from bilens.errors import ArgumentError, TrainingError
from bilens.model.files import CONFIG_FILE, WEIGHTS_FILE, resolve_device
from bilens.vision.augmentation import augmentation
from bilens.vision.config import ClassifierConfig
from bilens.vision.data import ImageDataset, load_images
from bilens.vision.model import BilinearClassifier

RECORD_FILE = "training.json"


@dataclass(frozen=True)
class ImageTrainConfig:
    """Everything that decides a run, its images apart.

    Args:
        d_hidden, n_layer, bias, residual: the architecture (published names).
        epochs: passes over the training images.
        batch_size: images per step.
        lr: learning rate at the start; falls as a cosine to zero.
        weight_decay: the weight decay of AdamW; a strong one makes eigenfeatures clean.
        grad_clip: largest norm of a gradient; deep models without residual additions need it.
        noise: standard deviation of Gaussian noise on the pixels (which are from 0 to 1).
        latent_noise: the size of Gaussian noise on every layer's input, in the batch's standard deviations there.
        rotation: degrees either way.
        translation: pixels either way.
        blur: largest standard deviation, in pixels.
        seed: the seed of the initial weights, the order, the augmentation and the noise.

    Raises:
        ArgumentError: a value outside its range.
    """

    d_hidden: int = 256
    n_layer: int = 1
    bias: bool = False
    residual: bool = False
    epochs: int = 40
    batch_size: int = 128
    lr: float = 3e-3
    weight_decay: float = 0.5
    grad_clip: float = 1.0
    noise: float = 0.3
    latent_noise: float = 0.0
    rotation: float = 0.0
    translation: float = 0.0
    blur: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_sizes(d_hidden=self.d_hidden, n_layer=self.n_layer, epochs=self.epochs, batch_size=self.batch_size)
        check_flags(bias=self.bias, residual=self.residual)
        check_rates(lr=self.lr, grad_clip=self.grad_clip)
        amounts = ("weight_decay", "noise", "latent_noise", "rotation", "translation", "blur")
        check_amounts(**{name: getattr(self, name) for name in amounts})
        if self.rotation > 180:
            raise ArgumentError(f"rotation is {self.rotation!r}, expected degrees either way: 180 at most.")
        check_seeds(seed=self.seed)


@dataclass(frozen=True)
class Epoch:
    """One pass over the training images: mean loss and accuracy on them as augmented, accuracy on the test images."""

    epoch: int
    loss: float
    train_accuracy: float
    test_accuracy: float

    def __str__(self) -> str:
        return (
            f"epoch {self.epoch}: loss {self.loss:.4f}, {self.train_accuracy:.2%} of training images as augmented, "
            f"{self.test_accuracy:.2%} of test images"
        )


@dataclass(frozen=True)
class TrainedClassifier(Tabular):
    """A finished run: the model, and what it could do after every epoch."""

    model: BilinearClassifier = field(repr=False)
    config: ImageTrainConfig
    epochs: list[Epoch] = field(repr=False)

    @property
    def test_accuracy(self) -> float:
        """After the last epoch."""
        return self.epochs[-1].test_accuracy

    def to_frame(self) -> pd.DataFrame:
        """One row per epoch: `epoch, loss, train_accuracy, test_accuracy`."""
        return pd.DataFrame([asdict(epoch) for epoch in self.epochs])

    def plot(self) -> go.Figure:
        """Accuracy against epochs."""
        frame = self.to_frame()
        curves = {"test": frame["test_accuracy"], "training, augmented": frame["train_accuracy"]}
        return plots.line(frame["epoch"], curves, "training", x_title="epoch", y_title="accuracy")

    def __str__(self) -> str:
        cfg = self.model.cfg
        shape = f"{cfg.d_input} -> {cfg.d_hidden} -> {cfg.d_output}, {cfg.n_layer} bilinear layer"
        return f"{shape}{'s' if cfg.n_layer > 1 else ''}; {self.epochs[-1]}"


def train_classifier(
    data: str | os.PathLike[str] | ImageDataset,
    config: ImageTrainConfig | None = None,
    out: str | os.PathLike[str] | None = None,
    *,
    progress: bool = True,
    device: str | None = None,
    overwrite: bool = False,
) -> TrainedClassifier:
    """Train a classifier; an interrupt (ctrl-C) leaves `out` without a model.

    With an `out` that holds what this very call made, that is returned.

    Args:
        data: a dataset, or where to load it from (see `load_images`): `"digits"`, `"mnist"`, a folder, ...
        config: architecture, optimisation and augmentation; `None` takes the defaults.
        out: folder for the model in the authors' format, and `training.json`; `None` writes nothing.
        progress: show a bar.
        device: `None` takes CUDA where there is one.
        overwrite: remove another model that is in `out`, instead of refusing.

    Raises:
        ImageDataError: the data cannot be read.
        ArgumentError: `out` is a file or cannot be written to, or torch has no such device.
        OverwriteError: `out` holds another model.
        WriteError: another process is at work in `out`, or the disk is full.
        TrainingError: the loss is no number any more.
    """
    config, device = config or ImageTrainConfig(), resolve_device(device)
    if out is None:
        return _train(load_images(data), config, progress, device)
    folder = destination_folder(out)  # what cannot be written is to fail now
    data = load_images(data)
    parts = {name: getattr(data, name) for name in ("train_images", "train_labels", "test_images", "test_labels")}
    facts = {"height": data.height, "width": data.width, "class_names": data.class_names}
    identity = {"config": asdict(config), "images": fingerprint(parts, facts)}
    with alone_in(folder):
        finished = claim(folder / RECORD_FILE, identity, (CONFIG_FILE, WEIGHTS_FILE), overwrite=overwrite)
        if finished is not None:
            epochs = [Epoch(**epoch) for epoch in finished["epochs"]]
            return TrainedClassifier(BilinearClassifier.from_pretrained(folder, device=device), config, epochs)
        trained = _train(data, config, progress, device)
        trained.model.save_pretrained(folder, overwrite=True)  # it is the run's own by now
        record = {"config": asdict(config), "epochs": [asdict(epoch) for epoch in trained.epochs]}
        finish(folder / RECORD_FILE, identity, (CONFIG_FILE, WEIGHTS_FILE), record)
    return trained


def _train(data: ImageDataset, config: ImageTrainConfig, progress: bool, device: str) -> TrainedClassifier:
    cfg = ClassifierConfig(
        data.d_input,
        config.d_hidden,
        data.n_classes,
        config.n_layer,
        config.bias,
        config.residual,
        height=data.height,
        width=data.width,
        class_names=data.class_names,
    )
    n_weights = cfg.d_hidden * (cfg.d_input + cfg.d_output + 2 * cfg.n_layer * cfg.d_hidden)
    check_memory("training this classifier", 16 * n_weights)  # float32: weights, gradients, and two of Adam's each
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        model = BilinearClassifier(cfg).to(device)
        epochs = _fit(model, data, config, progress)
    return TrainedClassifier(model.eval(), config, epochs)


def _fit(model: BilinearClassifier, data: ImageDataset, config: ImageTrainConfig, progress: bool) -> list[Epoch]:
    images, labels, test_images, test_labels = (
        part.to(model.W_E.device) for part in (data.train_images, data.train_labels, data.test_images, data.test_labels)
    )
    n_batches = max(1, round(len(images) / config.batch_size))
    augment = augmentation(
        data.height,
        data.width,
        rotation=config.rotation,
        translation=config.translation,
        blur=config.blur,
        noise=config.noise,
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.epochs * n_batches)
    noisy = [(f"blocks.{layer}.hook_resid_pre", normed_noise(config.latent_noise)) for layer in range(config.n_layer)]
    epochs: list[Epoch] = []
    with tqdm(
        total=config.epochs * len(images), unit="image", unit_scale=True, desc="training", disable=not progress
    ) as bar:
        for epoch in range(1, config.epochs + 1):
            losses, n_right = [], torch.zeros((), device=images.device)
            with model.hooks(fwd_hooks=noisy if config.latent_noise else []):
                for batch in torch.randperm(len(images), device=images.device).tensor_split(n_batches):
                    logits = model(augment(images[batch]))
                    loss = F.cross_entropy(logits.float(), labels[batch])
                    loss.backward()
                    torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
                    optimizer.step()
                    optimizer.zero_grad()
                    schedule.step()
                    losses.append(loss.detach() * len(batch))
                    n_right += (logits.argmax(-1) == labels[batch]).sum()
                    bar.update(len(batch))
            mean = torch.stack(losses).cpu().double().sum().item() / len(images)
            if not isfinite(mean):
                raise TrainingError(f"the loss is {mean} in epoch {epoch}; lower the learning rate {config.lr}.")
            accuracy = model.accuracy(test_images, test_labels)
            epochs.append(Epoch(epoch, mean, (n_right / len(images)).item(), accuracy))
            bar.set_postfix(loss=f"{mean:.3f}", test=f"{accuracy:.2%}")
    return epochs


def normed_noise(scale: float) -> Callable[..., Tensor]:
    """A hook that adds Gaussian noise of `scale` times the activation's own standard deviation."""

    def add(x: Tensor, hook: Any) -> Tensor:
        return x + scale * x.detach().std() * torch.randn_like(x)

    return add
