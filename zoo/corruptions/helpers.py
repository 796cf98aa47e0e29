"""What several image corruptions are made of: random numbers, blurs, zooms and grey.

Images are levels, float64 in 0..255, (N, C, H, W).
"""

import math

import numpy
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor

from zoo.randomness import uniform

# How much of red, green and blue is seen as brightness (ITU-R BT.601).
LUMA = (0.299, 0.587, 0.114)


def uniform_like(images: Tensor, keys: Tensor) -> Tensor:
    """Return a draw from [0, 1) for each value of the images, in their shape; keys are (N,)."""
    return uniform(keys, images[0].numel()).view(images.shape)


def normal(keys: Tensor, count: int) -> Tensor:
    """Return ``count`` draws from the standard normal distribution for each of the keys (N,): float64 (N, count).

    Source: Box and Muller, A Note on the Generation of Random Normal Deviates, 1958.
    """
    radii, turns = uniform(keys, count + count % 2).chunk(2, dim=1)
    # The draw may be 0, but is never 1.
    radii, turns = (-2 * torch.log1p(-radii)).sqrt_(), 2 * math.pi * turns
    return torch.cat([radii * turns.cos(), radii * turns.sin()], dim=1)[:, :count]


def normal_like(images: Tensor, keys: Tensor) -> Tensor:
    """Return a standard normal draw for each value of the images, in their shape; keys are (N,)."""
    return normal(keys, images[0].numel()).view(images.shape)


def gaussian(images: Tensor, sigma: float, mode: str = "nearest", truncate: float = 4.0) -> Tensor:
    """Blur (..., H, W) by a Gaussian of ``sigma`` pixels, cut off at ``truncate`` of them.

    Args:
        mode: what lies beyond the edge, in scipy's words; the default is scikit-image's.
    """
    sigmas = (0,) * (images.ndim - 2) + (sigma, sigma)
    return torch.from_numpy(ndimage.gaussian_filter(images.numpy(), sigmas, mode=mode, truncate=truncate))


def zoomed_lengths(length: int, factor: float) -> tuple[int, int]:
    """Return how many pixels of a side ``length`` are enlarged, and how many they become: ``length`` or some more."""
    kept = math.ceil(length / factor)
    return kept, round(kept * factor)


def enlarged(middle: Tensor, factor: float, height: int, width: int) -> Tensor:
    """Enlarge (N, C, h, w) bilinearly, corner pixels on corner pixels, and cut (height, width) out of the middle.

    Its sides must be those that ``zoomed_lengths`` keeps of height and width.
    """
    size = [zoomed_lengths(length, factor)[1] for length in (height, width)]
    large = F.interpolate(middle, size=size, mode="bilinear", align_corners=True)
    return centre(large, height, width)


def centre(images: Tensor, height: int, width: int) -> Tensor:
    """Cut (height, width) out of the middle of images; an odd pixel is left at the bottom and the right."""
    top, left = (images.shape[2] - height) // 2, (images.shape[3] - width) // 2
    return images[:, :, top : top + height, left : left + width]


def motion_blurred(images: Tensor, radius: int, sigma: float, degrees: Tensor) -> Tensor:
    """Blur each image along a line, as ImageMagick's ``MotionBlurImage`` does, and round to whole levels.

    The pixel at p becomes the mean of those at p + i (cos a, sin a), rounded to whole pixels, for i = 0..2 radius, with
    weights exp(-i² / 2 sigma²). Beyond the edge the edge's pixels go on.

    Args:
        radius: half the line's length, in pixels.
        sigma: how fast the weights fall, in pixels.
        degrees: a, for each image (N,); 0 is to the right and 90 is down.
    """
    count, channels, height, width = images.shape
    steps = torch.arange(2 * radius + 1, dtype=torch.float64)
    weights = (-(steps**2) / (2 * sigma**2)).exp()
    weights /= weights.sum()
    angles = degrees.deg2rad().unsqueeze(1)
    right, down = (torch.ceil(steps * part - 0.5).long() for part in (angles.cos(), angles.sin()))
    reach = 2 * radius
    windows = F.pad(images, [reach] * 4, mode="replicate").unfold(2, height, 1).unfold(3, width, 1)
    every, total = torch.arange(count), torch.zeros_like(images)
    for step, weight in enumerate(weights.tolist()):
        total += weight * windows[every, :, down[:, step] + reach, right[:, step] + reach]
    return total.round_()


def grey(images: Tensor) -> Tensor:
    """Return the brightness of RGB images as (N, 1, H, W); grey ones are their own."""
    if images.shape[1] == 1:
        return images
    return (images * images.new_tensor(LUMA).view(3, 1, 1)).sum(1, keepdim=True)


def coloured(layer: Tensor, colour: tuple[int, int, int], channels: int) -> Tensor:
    """Return a layer (N, 1, H, W) in a colour of levels (R, G, B), or with one channel in that colour's grey."""
    levels = torch.tensor(colour, dtype=torch.float64).view(1, 3, 1, 1)
    return layer * (grey(levels) if channels == 1 else levels)


def antialiased_disk(radius: float, sigma: float) -> numpy.ndarray:
    """Return the kernel of a lens out of focus: a disk of 0 or 1 over its sum, blurred by a small Gaussian.

    Args:
        radius: of the disk, in pixels.
        sigma: of the Gaussian, in pixels; it is 3 pixels wide, and 5 for a radius above 8.
    """
    reach, half = (8, 1) if radius <= 8 else (math.floor(radius), 2)
    places = numpy.arange(-reach, reach + 1)
    disk = (places**2 + places[:, None] ** 2 <= radius**2).astype(float)
    disk /= disk.sum()
    weights = numpy.exp(-(numpy.arange(-half, half + 1) ** 2) / (2 * sigma**2))
    for axis in (0, 1):
        disk = ndimage.correlate1d(disk, weights / weights.sum(), axis, mode="mirror")
    # A border of zeros would only cost time, and need larger images.
    empty = disk.any(1).argmax()
    return disk[empty : len(disk) - empty, empty : len(disk) - empty]
