"""Random changes of training images, of a whole batch at once and on the device where it lies."""

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

Augment = Literal["none", "crop", "crop_flip", "crop_flip_cutout"]
AUGMENTS = get_args(Augment)


def to_float(images: Tensor) -> Tensor:
    """Return uint8 images in 0..255 as float32 in [0, 1], in the same shape, channels last."""
    return images.to(torch.float32, memory_format=torch.channels_last) / 255


def random_shift(images: Tensor, padding: int, generator: Generator | None = None) -> Tensor:
    """Move each image by its own random number of rows and columns in -padding..padding, filling with black.

    Args:
        images: (N, C, H, W), any dtype.
        padding: the furthest move, in pixels.
        generator: the source of randomness, on the images' device; torch's own by default.
    """
    count, _, height, width = images.shape
    windows = F.pad(images, [padding] * 4).unfold(2, height, 1).unfold(3, width, 1)
    top, left = torch.randint(2 * padding + 1, (2, count), generator=generator, device=images.device)
    return windows[torch.arange(count, device=images.device), :, top, left]


def random_flip(images: Tensor, generator: Generator | None = None) -> Tensor:
    """Mirror each image (N, C, H, W) left to right with probability 1/2."""
    flipped = torch.rand(len(images), 1, 1, 1, generator=generator, device=images.device) < 0.5
    return torch.where(flipped, images.flip(3), images)


def random_cutout(images: Tensor, size: int, generator: Generator | None = None) -> Tensor:
    """Blacken a square of each image (N, C, H, W), its centre anywhere in the image: near an edge it is cut off.

    Args:
        images: (N, C, H, W), any dtype.
        size: the square's height and width, in pixels.
        generator: the source of randomness, on the images' device; torch's own by default.

    Source: DeVries and Taylor, Improved Regularization of Convolutional Neural Networks with Cutout, 2017.
    """
    inside = []
    for length in images.shape[2:]:
        start = torch.randint(length, (len(images), 1), generator=generator, device=images.device) - size // 2
        places = torch.arange(length, device=images.device)
        inside.append((places >= start) & (places < start + size))
    rows, columns = inside
    return images.masked_fill((rows.unsqueeze(2) & columns.unsqueeze(1)).unsqueeze(1), 0)


def augment_batch(images: Tensor, augment: Augment, generator: Generator | None = None) -> Tensor:
    """Shift images (N, C, H, W) by up to an eighth of their height ("crop"), mirror them too ("crop_flip"), and blacken
    a square of half their height ("crop_flip_cutout")."""
    if augment == "none":
        return images
    height = images.shape[2]
    images = random_shift(images, height // 8, generator)
    if augment != "crop":
        images = random_flip(images, generator)
    return random_cutout(images, height // 2, generator) if augment == "crop_flip_cutout" else images
