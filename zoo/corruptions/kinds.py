"""Noise, blurs and digital corruptions of images, as Hendrycks and Dietterich define them; snow, frost and fog are in
``zoo.corruptions.weather``, water and mud in ``zoo.corruptions.spatter``.

A function takes the images as levels (float64 in 0..255, (N, C, H, W) with C = 1 or 3), a key for each (int64 (N,)),
from which all that is drawn follows, and the setting of its severity. It returns levels in the same shape, perhaps
outside of 0..255. Lengths are in pixels.

Source: Hendrycks and Dietterich, Benchmarking Neural Network Robustness to Common Corruptions and Perturbations, ICLR
2019, and the scripts that made ImageNet-C and CIFAR-10-C (hendrycks/robustness), which have what the paper leaves open.
"""

import io
from collections.abc import Callable

import numpy
import torch
import torch.nn.functional as F
from PIL import Image
from scipy import ndimage, signal, special
from torch import Tensor

from zoo.corruptions.helpers import (
    antialiased_disk,
    centre,
    enlarged,
    gaussian,
    motion_blurred,
    normal_like,
    uniform_like,
    zoomed_lengths,
)
from zoo.randomness import uniform


def gaussian_noise(images: Tensor, keys: Tensor, deviation: float) -> Tensor:
    """``x + deviation · 255 · n``, n standard normal for each value."""
    return images + 255 * deviation * normal_like(images, keys)


def shot_noise(images: Tensor, keys: Tensor, photons: float) -> Tensor:
    """Count photons: ``255 k / photons``, k Poisson with mean ``photons · x / 255``, for each value.

    A count is the least k whose cumulative probability exceeds the draw.
    """
    # Sixteen deviations above the mean, nothing is left that a draw of 53 bits could tell from 1.
    counts = numpy.arange(int(photons + 16 * photons**0.5 + 40))
    means = photons * numpy.arange(256)[:, None] / 255
    cumulative = torch.from_numpy(special.pdtr(counts, means)).clamp_max_(1)
    # One search for all levels: each has an interval of its own on the line, (level, level + 1].
    line = (cumulative + torch.arange(256).unsqueeze(1)).flatten()
    found = torch.searchsorted(line, images + uniform_like(images, keys), right=True)
    return 255 * (found - len(counts) * images) / photons


def impulse_noise(images: Tensor, keys: Tensor, share: float) -> Tensor:
    """Make half of a ``share`` of all values black and the other half white (salt and pepper)."""
    draws = uniform_like(images, keys)
    return images.masked_fill(draws < share, 255).masked_fill_(draws < share / 2, 0)


def speckle_noise(images: Tensor, keys: Tensor, deviation: float) -> Tensor:
    """``x + x · deviation · n``, n standard normal for each value."""
    return images + images * deviation * normal_like(images, keys)


def gaussian_blur(images: Tensor, keys: Tensor, sigma: float) -> Tensor:
    """Blur by a Gaussian of ``sigma``; beyond the edge the edge's pixels go on."""
    return gaussian(images, sigma)


def glass_blur(images: Tensor, keys: Tensor, setting: tuple[float, int, int]) -> Tensor:
    """Blur, replace each pixel by a near one, and blur again.

    From bottom right to top left each pixel is replaced by one drawn from up to ``reach`` rows and columns before and
    ``reach - 1`` after it, as it then is. The paper says that the two are swapped, and the scripts mean to, but what
    they do, and what the published images show, is that the first is overwritten.

    Args:
        setting: sigma, reach, and how many times all pixels are replaced.
    """
    sigma, reach, times = setting
    count, _, height, width = images.shape
    # The images come last, so that the pixels of all of them at one place lie together.
    pixels = gaussian(images, sigma).add_(1e-6).byte().permute(2, 3, 0, 1).contiguous().numpy()
    rows, columns = height - 2 * reach, width - 2 * reach
    draws = (uniform(keys, 2 * times * rows * columns) * 2 * reach).long() - reach
    draws = draws.view(count, times, rows, columns, 2).permute(1, 2, 3, 4, 0).contiguous().numpy()
    every = numpy.arange(count)
    for moves in draws:
        for row in range(height - reach, reach, -1):
            for column in range(width - reach, reach, -1):
                down, right = moves[row - reach - 1, column - reach - 1]
                pixels[row, column] = pixels[row + down, column + right, every]
    return gaussian(torch.from_numpy(pixels).permute(2, 3, 0, 1).double(), sigma)


def defocus_blur(images: Tensor, keys: Tensor, setting: tuple[float, float]) -> Tensor:
    """Blur by a disk, the images mirrored at their outermost pixels.

    Args:
        setting: the disk's radius, and the sigma of the Gaussian that smooths it.
    """
    kernel = antialiased_disk(*setting)
    half = len(kernel) // 2
    mirrored = F.pad(images, [half] * 4, mode="reflect").numpy()
    # The kernel is symmetric, so that convolution and correlation are one.
    return torch.from_numpy(signal.fftconvolve(mirrored, kernel[None, None], mode="valid", axes=(2, 3)))


def motion_blur(images: Tensor, keys: Tensor, setting: tuple[int, float]) -> Tensor:
    """Blur along a line that is drawn from -45° to 45° for each image.

    Args:
        setting: radius and sigma of ``motion_blurred``.
    """
    return motion_blurred(images, *setting, 90 * uniform(keys, 1)[:, 0] - 45)


def zoom_blur(images: Tensor, keys: Tensor, setting: tuple[float, float]) -> Tensor:
    """Return the mean of an image and its middle enlarged by 1, 1 + step, 1 + 2 step, ...: itself counts twice.

    Args:
        setting: where the factors stop, and the step between them. As numpy rounds, some stop just behind.
    """
    stop, step = setting
    height, width = images.shape[2:]
    factors, total = numpy.arange(1, stop, step), images.clone()
    for factor in factors:
        kept = [zoomed_lengths(length, factor)[0] for length in (height, width)]
        total += enlarged(centre(images, *kept), factor, height, width)
    return total / (len(factors) + 1)


def brightness(images: Tensor, keys: Tensor, more: float) -> Tensor:
    """Add ``more · 255`` to the value V of HSV, up to 255; V is the largest of a pixel's levels, or its grey.

    Hue and saturation stay, so that all levels grow by the same factor; black becomes grey.
    """
    value = images.amax(1, keepdim=True)
    brighter = (value + 255 * more).clamp_max_(255)
    return torch.where(value > 0, images * brighter / value.clamp_min(1), brighter)


def saturate(images: Tensor, keys: Tensor, setting: tuple[float, float]) -> Tensor:
    """Make the saturation S of HSV ``factor · S + more``, in 0..1. Grey images stay as they are.

    A grey pixel of an RGB image has the hue 0, so that ``more`` makes it reddish.

    Args:
        setting: the factor, and what is added.
    """
    if images.shape[1] == 1:
        return images
    factor, more = setting
    value = images.amax(1, keepdim=True)
    spread = value - images.amin(1, keepdim=True)
    saturation = (spread / value.clamp_min(1) * factor + more).clamp_(0, 1)
    # How far a level lies below the value, as a share of how far the least one does.
    share = torch.where(spread > 0, (value - images) / spread.clamp_min(1), images.new_tensor([0, 1, 1]).view(3, 1, 1))
    return value * (1 - saturation * share)


def contrast(images: Tensor, keys: Tensor, factor: float) -> Tensor:
    """Bring the levels nearer to their mean, see ``scaled_contrast``."""
    return 255 * scaled_contrast(images / 255, factor)


def scaled_contrast(images: Tensor, factor: float) -> Tensor:
    """Return ``m + factor (x - m)`` in [0, 1], m the mean of each image's channel; images are floats (N, C, H, W)."""
    mean = images.mean((2, 3), keepdim=True)
    return (mean + factor * (images - mean)).clamp(0, 1)


def scaled_brightness(images: Tensor, factor: float) -> Tensor:
    """Return ``factor x`` in [0, 1]; images are floats in [0, 1]."""
    return (factor * images).clamp(0, 1)


def elastic_transform(images: Tensor, keys: Tensor, setting: tuple[float, float, float]) -> Tensor:
    """Move three points of each image at random and the image with them, then each pixel by a smooth random field.

    The points are the centre of the image plus (s, s), (s, -s) and (-s, -s), s a third of the shorter side, and go to a
    place drawn up to ``jitter`` away. Fields are of uniform draws from (-1, 1), smoothed, times ``scale``.

    Args:
        setting: scale, sigma of the smoothing, and jitter, as shares of the shorter side.
    """
    scale, sigma, jitter = (share * min(images.shape[2:]) for share in setting)
    count, _, height, width = images.shape
    draws = uniform(keys, 6 + 2 * height * width) * 2 - 1
    third = min(height, width) // 3
    corners = torch.tensor([[third, third], [third, -third], [-third, -third]], dtype=torch.float64)
    points = corners + torch.tensor([width // 2, height // 2])
    moved = points + jitter * draws[:, :6].view(count, 3, 2)
    # The affine map that takes each moved point back: (x, y, 1) times it is where the pixel comes from.
    back = torch.linalg.solve(torch.cat([moved, torch.ones(count, 3, 1)], dim=2), points.expand(count, 3, 2))
    down, right = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    places = torch.stack([right, down], dim=2).double()
    images = _sampled(images, places @ back[:, None, :2] + back[:, None, None, 2], mirrored_at="pixels")
    smoothers = [
        torch.from_numpy(ndimage.gaussian_filter(numpy.eye(side), (sigma, 0), mode="reflect", truncate=3))
        for side in (height, width)
    ]
    fields = smoothers[0] @ draws[:, 6:].view(count, 2, height, width) @ smoothers[1].T
    return _sampled(images, places + scale * fields.permute(0, 2, 3, 1), mirrored_at="edges")


def pixelate(images: Tensor, keys: Tensor, share: float) -> Tensor:
    """Shrink both sides to a ``share`` of them, each new pixel the mean of its area, and enlarge them again."""
    height, width = images.shape[2:]

    def pixelated(image: Image.Image) -> Image.Image:
        small = image.resize((int(width * share), int(height * share)), Image.Resampling.BOX)
        return small.resize((width, height), Image.Resampling.BOX)

    return _by_pillow(images, pixelated)


def jpeg_compression(images: Tensor, keys: Tensor, quality: int) -> Tensor:
    """Write as a JPEG of Pillow's ``quality``, and read."""

    def compressed(image: Image.Image) -> Image.Image:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=quality)
        return Image.open(file)

    return _by_pillow(images, compressed)


def _sampled(images: Tensor, places: Tensor, mirrored_at: str) -> Tensor:
    """Return the images at places (N, H, W, 2), (x, y) in pixels, bilinearly.

    Args:
        mirrored_at: where the images are mirrored: at the middle of their outermost "pixels", or at their "edges".
    """
    size = torch.tensor([images.shape[3], images.shape[2]])
    corners = mirrored_at == "pixels"
    grid = 2 * places / (size - 1) - 1 if corners else (2 * places + 1) / size - 1
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=corners)


def _by_pillow(images: Tensor, change: Callable[[Image.Image], Image.Image]) -> Tensor:
    """Change images of whole levels one by one, as Pillow's."""
    changed = []
    for image in images.byte().permute(0, 2, 3, 1).numpy():
        picture = Image.fromarray(image if image.shape[2] == 3 else image[:, :, 0])
        changed.append(numpy.atleast_3d(numpy.asarray(change(picture))))
    return torch.from_numpy(numpy.stack(changed)).permute(0, 3, 1, 2).double()
