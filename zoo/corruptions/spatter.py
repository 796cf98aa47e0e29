"""Water and mud on the lens, as Hendrycks and Dietterich define them: lit drops need what OpenCV has for edges and
distances.

What ``spatter`` takes and returns, and where it comes from, is said in ``zoo.corruptions.kinds``. On grey images water
and mud are as bright as their colours.
"""

import itertools
import math

import numpy
import torch
from scipy import ndimage
from torch import Tensor

from zoo.corruptions.helpers import coloured, gaussian, normal_like

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
