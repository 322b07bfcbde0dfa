"""What the image recipes share: the data, the trained classifiers, and the sentence that says what was run."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from bilens.reproduce.reproduction import Settings
from bilens.vision import BilinearClassifier, ImageDataset, ImageTrainConfig, load_images, train_classifier


def data_and_config(settings: Settings, **changes: Any) -> tuple[ImageDataset, ImageTrainConfig]:
    """The images, and how to train on them: the defaults, small ones where `reduced`, then `changes`."""
    config = ImageTrainConfig(seed=settings.seed)
    if settings.reduced:
        config = replace(config, d_hidden=32, epochs=5)
    return load_images(settings.images), replace(config, **changes)


def trained(settings: Settings, **changes: Any) -> tuple[ImageDataset, BilinearClassifier, ImageTrainConfig]:
    """One classifier."""
    data, config = data_and_config(settings, **changes)
    return data, train_classifier(data, config, progress=False).model, config


def trained_by_size(
    data: ImageDataset, config: ImageTrainConfig, sizes: Sequence[int], seeds: int
) -> dict[str, list[BilinearClassifier]]:
    """Classifiers by their number of hidden units, one for each of so many seeds."""
    return {
        str(size): [
            train_classifier(data, replace(config, d_hidden=size, seed=config.seed + seed), progress=False).model
            for seed in range(seeds)
        ]
        for size in sizes
    }


def ran_on(data: ImageDataset, config: ImageTrainConfig, **varied: str) -> str:
    """The data, the sizes and the training, each beside the paper's (figure 3, appendix G.1 and table 1).

    Args:
        data: The images.
        config: The training, or its base where something is varied.
        varied: What is varied, by its name in `ImageTrainConfig`: its values, in words.
    """
    values = {name: f"{getattr(config, name):g}" for name in ("d_hidden", "noise", "weight_decay", "epochs")} | varied
    return (
        f"{data.source}: {len(data.train_images):,} training and {len(data.test_images):,} test images of "
        f"{data.height} x {data.width} pixels (the paper: MNIST, 60,000 and 10,000 of 28 x 28); "
        f"{values['d_hidden']} hidden units (512), Gaussian noise of standard deviation {values['noise']} on the "
        f"pixels (0.5), weight decay {values['weight_decay']} (1.0), {values['epochs']} epochs in batches of "
        f"{config.batch_size} (20 to 100 in batches of 2048)"
    )
