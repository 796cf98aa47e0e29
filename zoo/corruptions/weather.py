"""Snow, frost and fog on images, as Hendrycks and Dietterich define them.

What the functions take and return, and where they come from, is said in ``zoo.corruptions.kinds``.
"""

import functools
import importlib.util
import math
from pathlib import Path

import numpy
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from zoo.corruptions.helpers import enlarged, grey, motion_blurred, normal, zoomed_lengths
from zoo.randomness import key_of, uniform

# There is a sixth photograph that the published scripts never draw.
FROST = ("frost1.png", "frost2.png", "frost3.png", "frost4.jpg", "frost5.jpg")


def snow(images: Tensor, keys: Tensor, setting: tuple[float, float, float, float, int, float, float]) -> Tensor:
    """Whiten the image and let flakes fall: normal noise, enlarged, only its peaks, blurred along a line.

    The blurred flakes are added twice, once turned by 180°. The image becomes
    ``keep · x + (1 - keep) · max(x, 1.5 g + 127.5)`` with g its grey. The line is drawn from -135° to -45°.

    Args:
        setting: mean and deviation of the noise, the factor of its enlargement, the least noise that is kept (all of
            white), radius and sigma of the blur, and ``keep``.
    """
    mean, deviation, factor, least, radius, sigma, keep = setting
    count, _, height, width = images.shape
    # Only the middle of the noise is enlarged, so nothing else of it is drawn.
    sides = [zoomed_lengths(length, factor)[0] for length in (height, width)]
    noise = normal(key_of(keys, 1), sides[0] * sides[1]).view(count, 1, *sides)
    flakes = enlarged(mean + deviation * noise, factor, height, width)
    flakes = (255 * flakes.masked_fill(flakes < least, 0).clamp(0, 1)).floor_()
    flakes = motion_blurred(flakes, radius, sigma, 90 * uniform(key_of(keys, 2), 1)[:, 0] - 135)
    whiter = torch.maximum(images, 1.5 * grey(images) + 127.5)
    return keep * images + (1 - keep) * whiter + flakes + flakes.flip(2, 3)


def frost(images: Tensor, keys: Tensor, setting: tuple[float, float, int]) -> Tensor:
    """Add a random piece of one of five photographs of frost: ``keep · x + strength · frost``.

    A photograph that is smaller than the images is enlarged.

    Args:
        setting: keep, strength, and the divisor of the photographs' sides.

    Raises:
        ImportError: the photographs are not installed.
    """
    keep, strength, divisor = setting
    height, width = images.shape[2:]
    pieces = []
    for kind, *place in uniform(keys, 3).tolist():
        photograph = _photograph(FROST[int(kind * len(FROST))], divisor, height, width)
        # The published scripts leave the last piece out.
        spare = (photograph.shape[1] - height, photograph.shape[2] - width)
        top, left = (int(draw * max(1, length)) for draw, length in zip(place, spare, strict=True))
        pieces.append(photograph[:, top : top + height, left : left + width])
    pieces = torch.stack(pieces).double()
    return keep * images + strength * (grey(pieces) if images.shape[1] == 1 else pieces)


def fog(images: Tensor, keys: Tensor, setting: tuple[float, float]) -> Tensor:
    """Add a random fractal f of 0..1: ``(x + 255 s f) · m / (m + 255 s)``, m an image's largest level.

    Args:
        setting: the strength s, and by what the fractal's roughness is divided from step to step.
    """
    strength, decay = 255 * setting[0], setting[1]
    height, width = images.shape[2:]
    size = 1 << (max(height, width) - 1).bit_length()
    clouds = plasma(keys, size, decay)[:, None, :height, :width]
    largest = images.amax((1, 2, 3), keepdim=True)
    return (images + strength * clouds) * largest / (largest + strength)


def plasma(keys: Tensor, size: int, decay: float) -> Tensor:
    """Return random heights in 0..1 for each key, (N, size, size), by the diamond-square algorithm on a torus.

    Each new point is the mean of four old ones plus ``w²`` times a draw from (-1, 1); w is 100 at first, and divided by
    ``decay`` whenever the points are twice as dense.

    Args:
        size: a power of two.

    Source: Fournier, Fussell and Carpenter, Computer Rendering of Stochastic Models, 1982.
    """
    heights = torch.zeros(len(keys), size, size, dtype=torch.float64)
    draws, used = uniform(keys, size**2) * 2 - 1, 0
    step, roughness = size, 100.0

    def displaced(total: Tensor) -> Tensor:
        nonlocal used
        used += total[0].numel()
        return total / 4 + roughness**2 * draws[:, used - total[0].numel() : used].view(total.shape)

    while step >= 2:
        half = step // 2
        corners = heights[:, ::step, ::step]
        rows, columns = corners + corners.roll(-1, 1), corners + corners.roll(-1, 2)
        centres = displaced(rows + rows.roll(-1, 2))
        heights[:, half::step, half::step] = centres
        heights[:, ::step, half::step] = displaced(centres + centres.roll(1, 1) + columns)
        heights[:, half::step, ::step] = displaced(centres + centres.roll(1, 2) + rows)
        step, roughness = half, roughness / decay
    heights -= heights.amin((1, 2), keepdim=True)
    return heights / heights.amax((1, 2), keepdim=True)


def require_photographs() -> Path:
    """Return the folder of the photographs of frost.

    Raises:
        ImportError: the package that has them is not installed.
    """
    # Only its files are wanted: what it imports is slow and may not be there.
    package = importlib.util.find_spec("imagecorruptions")
    if package is None:
        raise ImportError('frost needs the photographs of imagecorruptions: pip install "decoupled-zoo[corruptions]"')
    return Path(package.submodule_search_locations[0]) / "frost"


@functools.cache
def _photograph(name: str, divisor: int, height: int, width: int) -> Tensor:
    """Return a photograph of frost, uint8 (3, H, W), shrunk by ``divisor`` and no smaller than (height, width).

    Raises:
        ImportError: the package that has it is not installed.
    """
    with Image.open(require_photographs() / name) as file:
        photograph = torch.from_numpy(numpy.array(file.convert("RGB"))).permute(2, 0, 1)
    sides = [int(length / divisor + 0.5) for length in photograph.shape[1:]]
    # Shrunk bilinearly by an odd number, each pixel is the one in the middle of its area.
    shrunk = photograph[:, divisor // 2 :: divisor, divisor // 2 :: divisor][:, : sides[0], : sides[1]]
    factor = max(height / shrunk.shape[1], width / shrunk.shape[2])
    if factor <= 1:
        return shrunk
    size = [math.ceil(length * factor) for length in shrunk.shape[1:]]
    return F.interpolate(shrunk[None].float(), size=size, mode="bilinear").round().byte()[0]
