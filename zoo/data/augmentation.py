"""Random changes of training images, batch by batch and on the device where they lie.

What is drawn for an image follows from its key (see ``zoo.randomness``), so that all devices change it alike.
"""

import math
from typing import Literal, get_args

import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as TF
from torch import Tensor

from zoo.randomness import uniform

Augment = Literal["none", "crop", "crop_flip", "crop_flip_cutout", "crop_flip_light", "resized_crop_flip"]
AUGMENTS = get_args(Augment)

# The share of an image's area that a random resized crop may have. Fine-tuning has fewer images than training on
# ImageNet, whose recipes begin at 0.08, and a crop must still show what the class is known by.
CROP_SCALE = (0.35, 1.0)
CROP_RATIO = (3 / 4, 4 / 3)
# Of brightness and of contrast; few photographs are darker or paler.
LIGHT_FACTORS = (0.1, 1.9)
# So often a rectangle is drawn, until one lies within the image.
CROP_TRIES = 10
# Numbers that an image needs, of all the changes.
DRAWS = 2 * CROP_TRIES + 3


def to_float(images: Tensor) -> Tensor:
    """Return uint8 images in 0..255 as float32 in [0, 1], in the same shape, channels last."""
    return images.to(torch.float32, memory_format=torch.channels_last) / 255


def random_shift(images: Tensor, padding: int, draws: Tensor) -> Tensor:
    """Move each image by its own random number of rows and columns in -padding..padding, filling with black.

    Args:
        images: (N, C, H, W), any dtype.
        padding: the furthest move, in pixels.
        draws: for each image two numbers in [0, 1), (N, 2), on its device.
    """
    count, _, height, width = images.shape
    windows = F.pad(images, [padding] * 4).unfold(2, height, 1).unfold(3, width, 1)
    top, left = _whole(draws, 2 * padding + 1).T
    return windows[torch.arange(count, device=images.device), :, top, left]


def random_flip(images: Tensor, draws: Tensor) -> Tensor:
    """Mirror each image (N, C, H, W) left to right if its draw, (N,) in [0, 1), is below 1/2."""
    flipped = (draws < 0.5).view(-1, 1, 1, 1)
    return torch.where(flipped, images.flip(3), images)


def random_cutout(images: Tensor, size: int, draws: Tensor) -> Tensor:
    """Blacken a square of each image (N, C, H, W), its centre anywhere in the image: near an edge it is cut off.

    Args:
        images: (N, C, H, W), any dtype.
        size: the square's height and width, in pixels.
        draws: for each image two numbers in [0, 1), (N, 2), on its device.

    Source: DeVries and Taylor, Improved Regularization of Convolutional Neural Networks with Cutout, 2017.
    """
    inside = []
    for length, column in zip(images.shape[2:], draws.T, strict=True):
        start = _whole(column, length).unsqueeze(1) - size // 2
        places = torch.arange(length, device=images.device)
        inside.append((places >= start) & (places < start + size))
    rows, columns = inside
    return images.masked_fill((rows.unsqueeze(2) & columns.unsqueeze(1)).unsqueeze(1), 0)


def random_light(images: Tensor, draws: Tensor) -> Tensor:
    """Change the brightness of each image by a factor of its own, then its contrast, both from 0.1 to 1.9.

    ``x ← b x``, then ``x ← m + c (x − m)`` with the mean ``m`` of the image; what is below 0 or above 255 is cut off.

    Args:
        images: uint8 (N, C, H, W).
        draws: for each image two numbers in [0, 1), (N, 2), on its device.
    """
    least, most = LIGHT_FACTORS
    factors = (least + (most - least) * draws).float().view(-1, 2, 1, 1, 1)
    values = (images * factors[:, 0]).clamp_(max=255)
    means = values.mean((1, 2, 3), keepdim=True)
    return values.sub_(means).mul_(factors[:, 1]).add_(means).clamp_(0, 255).round_().to(images.dtype)


def random_resized_crop(images: Tensor, size: int, draws: Tensor) -> Tensor:
    """Cut its own random rectangle out of each image and resize it, antialiased, to a square.

    A rectangle has 0.35 to 1 of the image's area and sides in a ratio of 3:4 to 4:3; both are drawn until it lies
    within the image, up to ten times, after which it is cut down to what does.

    Args:
        images: (N, C, H, W), any dtype.
        size: height and width of the result, in pixels.
        draws: for each image 22 numbers in [0, 1), (N, 22), on the CPU.

    Source: Szegedy et al., Going Deeper with Convolutions, 2015, section 6.
    """
    height, width = images.shape[2:]
    areas, ratios, place = draws.split([CROP_TRIES, CROP_TRIES, 2], dim=1)
    areas = height * width * (CROP_SCALE[0] + (CROP_SCALE[1] - CROP_SCALE[0]) * areas)
    least, most = map(math.log, CROP_RATIO)
    ratios = (least + (most - least) * ratios).exp()
    widths, heights = (areas * ratios).sqrt().round().long(), (areas / ratios).sqrt().round().long()
    first = ((widths <= width) & (heights <= height)).int().argmax(1, keepdim=True)
    widths, heights = widths.gather(1, first)[:, 0].clamp(1, width), heights.gather(1, first)[:, 0].clamp(1, height)
    tops, lefts = _whole(place[:, 0], height - heights + 1), _whole(place[:, 1], width - widths + 1)
    boxes = torch.stack([tops, lefts, heights, widths], dim=1).tolist()
    # Given the whole batch, one rectangle would be cut out of all.
    crops = (TF.resized_crop(image, *box, [size, size]) for image, box in zip(images, boxes, strict=True))
    return torch.stack(list(crops))


def augment_batch(images: Tensor, augment: Augment, size: int, keys: Tensor) -> Tensor:
    """Change training images at random, each in its own way.

    "none" leaves them as they are, "crop" shifts them by up to an eighth of their height, "crop_flip" mirrors them,
    too, "crop_flip_cutout" also blackens a square of half their height, "crop_flip_light" also changes brightness and
    contrast, and "resized_crop_flip" cuts out a rectangle, resizes it and mirrors it.

    Args:
        images: (N, C, size, size), any dtype, but uint8 for "crop_flip_light"; for "resized_crop_flip" they may be
            larger.
        augment: one of ``AUGMENTS``.
        size: height and width of the result, in pixels.
        keys: what the draws of each image follow from, int64 (N,) on the CPU.
    """
    if augment == "none":
        return images
    on_cpu = uniform(keys, DRAWS)
    # A copy for which the device need not be waited for, if the memory is pinned.
    draws = (on_cpu.pin_memory() if images.is_cuda else on_cpu).to(images.device, non_blocking=True)
    if augment == "resized_crop_flip":
        # Rectangles are cut out one by one, as the CPU says.
        images = random_resized_crop(images, size, on_cpu[:, :-1])
    else:
        images = random_shift(images, size // 8, draws[:, :2])
    if augment != "crop":
        images = random_flip(images, draws[:, -1])
    if augment == "crop_flip_light":
        return random_light(images, draws[:, 2:4])
    return random_cutout(images, size // 2, draws[:, 2:4]) if augment == "crop_flip_cutout" else images


def _whole(draws: Tensor, count: int | Tensor) -> Tensor:
    """Return for each draw from [0, 1) a whole number in 0..count-1."""
    return (draws * count).long()
