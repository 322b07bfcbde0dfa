"""Random changes of a batch of training images, drawn for every image by itself, through kornia.

(torchvision's batch transforms draw once for the whole batch.) In this order: rotation and translation in one
resampling, blur, noise. Everything is drawn from torch's global generator.
"""

from collections.abc import Callable
from math import ceil
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from bilens._core.extras import need

Augmentation = Callable[[Float[Tensor, "batch height width"]], Float[Tensor, "batch height width"]]


def augmentation(
    height: int, width: int, *, rotation: float = 0.0, translation: float = 0.0, blur: float = 0.0, noise: float = 0.0
) -> Augmentation:
    """A function from clean images to changed ones; the identity where every argument is zero.

    Args:
        height, width: the size of the images.
        rotation: degrees either way, uniformly; what comes into view is black.
        translation: pixels either way, in both directions, uniformly.
        blur: standard deviation of a Gaussian in pixels, uniformly from nearly zero to this.
        noise: standard deviation of Gaussian noise on every pixel; images may leave 0..1 by it.

    Raises:
        MissingPackageError: a change other than noise, without kornia.
    """
    steps: list[Callable[[Tensor], Tensor]] = []
    if rotation or translation:
        share = (min(translation / width, 1.0), min(translation / height, 1.0))
        # kornia before 0.9 scales by n / (n - 1) unless corners are aligned.
        steps.append(_kornia().RandomAffine(degrees=rotation, translate=share, align_corners=True, p=1.0))
    if blur:
        # Three standard deviations each way; reflection at the border reaches at most across the image.
        reach = min(ceil(3 * blur), min(height, width) - 1)
        size = (2 * reach + 1, 2 * reach + 1)
        steps.append(_kornia().RandomGaussianBlur(size, (0.01 * blur, blur), p=1.0))

    def change(images: Float[Tensor, "batch height width"]) -> Float[Tensor, "batch height width"]:
        if steps:
            images = images[:, None]
            for step in steps:
                images = step(images)
            images = images[:, 0]
        return images + noise * torch.randn_like(images) if noise else images

    return change


def _kornia() -> Any:
    return need("kornia.augmentation", "vision", "Rotating, moving or blurring training images")
