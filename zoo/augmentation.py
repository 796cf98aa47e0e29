"""Random changes of training images, batch by batch and on the device where they lie."""

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Generator, Tensor
from torchvision.transforms.v2 import RandomResizedCrop

Augment = Literal["none", "crop", "crop_flip", "crop_flip_cutout", "resized_crop_flip"]
AUGMENTS = get_args(Augment)

# Of an image's area, what a random resized crop may have. Fine-tuning has fewer images than training on ImageNet, whose
# recipes begin at 0.08, and a crop must still show what the class is known by.
CROP_SCALE = (0.35, 1.0)


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


def random_resized_crop(images: Tensor, size: int) -> Tensor:
    """Cut its own random rectangle out of each image and resize it, antialiased, to a square.

    A rectangle has 0.35 to 1 of the image's area and sides in a ratio of 3:4 to 4:3. Its place and shape come from
    torch's own generator of the CPU, so that no device has to be waited for.

    Args:
        images: (N, C, H, W), any dtype.
        size: height and width of the result, in pixels.
    """
    crop = RandomResizedCrop(size, CROP_SCALE)
    # Given the whole batch, it would cut the same rectangle out of all.
    return torch.stack([crop(image) for image in images])


def augment_batch(images: Tensor, augment: Augment, size: int) -> Tensor:
    """Change training images at random, each in its own way.

    "none" leaves them as they are, "crop" shifts them by up to an eighth of their height, "crop_flip" mirrors them,
    too, "crop_flip_cutout" also blackens a square of half their height, and "resized_crop_flip" cuts out a rectangle,
    resizes it and mirrors it.

    Args:
        images: (N, C, size, size), any dtype; for "resized_crop_flip" they may be larger.
        augment: one of ``AUGMENTS``.
        size: height and width of the result, in pixels.
    """
    if augment == "none":
        return images
    if augment == "resized_crop_flip":
        return random_flip(random_resized_crop(images, size))
    images = random_shift(images, size // 8)
    if augment != "crop":
        images = random_flip(images)
    return random_cutout(images, size // 2) if augment == "crop_flip_cutout" else images
