"""Snow, frost, fog and spatter on images, as Hendrycks and Dietterich define them.

What the functions take and return, and where they come from, is said in ``zoo.corruptions.kinds``. On grey images
what is coloured is as bright as its colour.
"""

import functools
import importlib.util
import itertools
import math
from pathlib import Path

import numpy
import torch
import torch.nn.functional as F
from PIL import Image
from scipy import ndimage
from torch import Tensor

from zoo.corruptions.helpers import (
    coloured,
    enlarged,
    gaussian,
    grey,
    motion_blurred,
    normal,
    normal_like,
    zoomed_lengths,
)
from zoo.randomness import key_of, uniform

# There is a sixth photograph that the published scripts never draw.
FROST = ("frost1.png", "frost2.png", "frost3.png", "frost4.jpg", "frost5.jpg")
# Colours of water (pale turquoise) and mud.
WATER, MUD = (175, 238, 238), (63, 42, 20)
# The tangent of 22.5°; that of 67.5° is larger by 2.
TAN_22 = math.sqrt(2) - 1
# The lengths of steps over so many rows and columns that OpenCV has for its mask of 5 × 5: to the eight neighbours, and
# a knight's moves.
STEPS = {
    (down, right): {1: 1.0, 2: 1.4, 5: 2.1969}[down**2 + right**2]
    for down, right in itertools.product(range(-2, 3), repeat=2)
    if down**2 + right**2 in (1, 2, 5)
}
# The kernel that lights the drops from one side.
RELIEF = numpy.array([[-2, -1, 0], [-1, 1, 1], [0, 1, 2]])


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


def spatter(images: Tensor, keys: Tensor, setting: tuple[float, float, float, float, float, int]) -> Tensor:
    """Spatter the lens with water, which is added, or with mud, which covers.

    Both lie where smoothed normal noise is at least ``least``.

    Args:
        setting: mean and deviation of the noise, sigma of its smoothing, ``least``, the strength of the water or the
            sigma that smooths the mud, and 0 for water or 1 for mud.
    """
    mean, deviation, smoothing, least, amount, muddy = setting
    liquid = gaussian(mean + deviation * normal_like(images[:, :1], keys), smoothing)
    liquid = liquid.masked_fill(liquid < least, 0)
    if not muddy:
        water = amount * _drops((255 * liquid).clamp_(0, 255).byte())
        return images + coloured(water, WATER, images.shape[1])
    mud = gaussian((liquid > least).double(), amount)
    mud = mud.masked_fill(mud < 0.8, 0)
    return images * (1 - mud) + coloured(mud, MUD, images.shape[1])


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


def _drops(liquid: Tensor) -> Tensor:
    """Return how much water is seen at each pixel, 0..1 (N, 1, H, W), of the liquid in uint8 (N, 1, H, W).

    The distance from the drops' edges, up to 20 pixels, is spread evenly over 0..255, lit from one side, and multiplied
    by the liquid; the most in an image is 1. Without any drop there is nothing to see.
    """
    layers = liquid[:, 0].numpy()
    edges = canny(layers, 50, 150)
    # A few images at a time, so that what is gone through again and again stays in the processor's cache.
    parts = [_distances(edges[first : first + 16], 20) for first in range(0, len(edges), 16)]
    near = ndimage.uniform_filter(numpy.concatenate(parts), (0, 3, 3), mode="mirror")
    # Whole means, of which there are many, may have become less by the rounding of floats, and would lose 1.
    smooth = (near + 1e-6).astype(numpy.uint8)
    even = numpy.stack([_equalised(layer) for layer in smooth])
    lit = ndimage.correlate(even.astype(float), RELIEF[None], mode="mirror").clip(0, 255)
    seen = ndimage.uniform_filter(lit, (0, 3, 3), mode="mirror").round() * layers
    most = seen.max((1, 2), keepdims=True)
    return torch.from_numpy(seen / numpy.maximum(most, 1)).unsqueeze(1)


def canny(layers: numpy.ndarray, low: float, high: float) -> numpy.ndarray:
    """Return where the edges of images (N, H, W) are, as bool of that shape.

    An edge is where the gradient (of Sobel; ``|x| + |y|``) is above ``low`` and largest across the edge, its direction
    rounded to 45°, and which is connected to where it is also above ``high``.

    Source: Canny, A Computational Approach to Edge Detection, 1986.
    """
    layers = layers.astype(float)
    gradients = []
    for axis in (2, 1):
        smooth = ndimage.correlate1d(layers, [1, 2, 1], 3 - axis, mode="nearest")
        gradients.append(ndimage.correlate1d(smooth, [-1, 0, 1], axis, mode="nearest"))
    across, down = gradients
    strength = abs(across) + abs(down)
    _, height, width = layers.shape
    framed = numpy.pad(strength, ((0, 0), (1, 1), (1, 1)))

    def beside(rows: int, columns: int) -> numpy.ndarray:
        """Return the strength that many rows down and columns to the right, 0 beyond the edge."""
        return framed[:, 1 + rows : 1 + rows + height, 1 + columns : 1 + columns + width]

    # 22.5° and 67.5° lie between one direction and the next. Of two that are equal, the first is the edge.
    flat, steep = abs(down) < TAN_22 * abs(across), abs(down) > (TAN_22 + 2) * abs(across)
    largest = numpy.select(
        [flat, steep, across * down < 0],
        [
            (strength > beside(0, -1)) & (strength >= beside(0, 1)),
            (strength > beside(-1, 0)) & (strength >= beside(1, 0)),
            (strength > beside(-1, 1)) & (strength > beside(1, -1)),
        ],
        (strength > beside(-1, -1)) & (strength > beside(1, 1)),
    )
    possible = largest & (strength > low)
    # Pixels touch their eight neighbours, but none in other images.
    touching = numpy.zeros((3, 3, 3), dtype=bool)
    touching[1] = True
    lines, number = ndimage.label(possible, touching)
    sure = numpy.zeros(number + 1, dtype=bool)
    sure[lines[possible & (strength > high)]] = True
    return sure[lines]


def _distances(edges: numpy.ndarray, most: int) -> numpy.ndarray:
    """Return the distance of each pixel from the nearest edge of its image (N, H, W), in pixels, at most ``most``.

    A distance is the length of a path of steps to neighbours, diagonal ones and knight's moves, as OpenCV measures it.

    Source: Borgefors, Distance Transformations in Digital Images, 1986.
    """
    _, height, width = edges.shape
    framed = numpy.pad(numpy.where(edges, 0.0, most), ((0, 0), (2, 2), (2, 2)), constant_values=most)
    distances = framed[:, 2:-2, 2:-2]
    shorter = True
    while shorter:
        before = distances.sum()
        for (down, right), length in STEPS.items():
            beside = framed[:, 2 + down : 2 + down + height, 2 + right : 2 + right + width]
            numpy.minimum(distances, beside + length, out=distances)
        shorter = distances.sum() < before
    return distances


def _equalised(layer: numpy.ndarray) -> numpy.ndarray:
    """Spread the levels of an image (H, W), uint8, evenly over 0..255: the least becomes 0, and the largest 255."""
    counts = numpy.bincount(layer.ravel(), minlength=256)
    least = counts[layer.min()]
    if least == layer.size:
        return layer
    return numpy.rint((counts.cumsum() - least) * (255 / (layer.size - least))).clip(0).astype(numpy.uint8)[layer]
