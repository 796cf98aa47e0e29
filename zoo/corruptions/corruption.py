"""Corrupted images: the fifteen corruptions of Hendrycks and Dietterich and their four spare ones, at five severities.

Small images are corrupted as those of CIFAR-10-C, large ones as those of ImageNet-C. A new corruption is one function
and one row of ``CORRUPTIONS``.

Source: Hendrycks and Dietterich, Benchmarking Neural Network Robustness to Common Corruptions and Perturbations, ICLR
2019, and the scripts that made ImageNet-C and CIFAR-10-C (hendrycks/robustness), whose numbers these are.
"""

import dataclasses
import zlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from operators.lookup import look_up
from zoo.corruptions import kinds, spatter, weather
from zoo.randomness import key_of

SEVERITIES = (1, 2, 3, 4, 5)
# Of what is drawn for test images.
SEED = 0
# Images whose shorter side has no more pixels are small.
LARGEST_SMALL = 64
LEAST_SIDE = 8
# So many values are changed at a time: more would only need more memory.
CHUNK = 1 << 22


@dataclasses.dataclass(frozen=True)
class Corruption:
    """One way to corrupt images.

    Args:
        function: takes levels, keys and a setting and returns levels, see ``zoo.corruptions.kinds``.
        small: the settings of the five severities for images of up to 64 pixels.
        large: those for larger images.
        spare: whether it is one of the four that are for choosing hyperparameters and not in the mean of the fifteen.
    """

    function: Callable[[Tensor, Tensor, Any], Tensor]
    small: tuple[Any, ...]
    large: tuple[Any, ...]
    spare: bool = False


# The published code says 244 pixels where it means the image's 224.
PUBLISHED_SCALE = 244 / 224

CORRUPTIONS: dict[str, Corruption] = {
    "gaussian_noise": Corruption(kinds.gaussian_noise, (0.04, 0.06, 0.08, 0.09, 0.1), (0.08, 0.12, 0.18, 0.26, 0.38)),
    "shot_noise": Corruption(kinds.shot_noise, (500, 250, 100, 75, 50), (60, 25, 12, 5, 3)),
    "impulse_noise": Corruption(kinds.impulse_noise, (0.01, 0.02, 0.03, 0.05, 0.07), (0.03, 0.06, 0.09, 0.17, 0.27)),
    "defocus_blur": Corruption(
        kinds.defocus_blur,
        ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
        ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),
    ),
    "glass_blur": Corruption(
        kinds.glass_blur,
        ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)),
        ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)),
    ),
    "motion_blur": Corruption(
        kinds.motion_blur,
        ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),
        ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)),
    ),
    "zoom_blur": Corruption(
        kinds.zoom_blur,
        ((1.06, 0.01), (1.11, 0.01), (1.16, 0.01), (1.21, 0.01), (1.26, 0.01)),
        ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03)),
    ),
    "snow": Corruption(
        weather.snow,
        (
            (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
            (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
            (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
            (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
            (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
        ),
        (
            (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
            (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
            (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
            (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
            (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
        ),
    ),
    "frost": Corruption(
        weather.frost,
        ((1, 0.2, 5), (1, 0.3, 5), (0.9, 0.4, 5), (0.85, 0.4, 5), (0.75, 0.45, 5)),
        ((1, 0.4, 1), (0.8, 0.6, 1), (0.7, 0.7, 1), (0.65, 0.7, 1), (0.6, 0.75, 1)),
    ),
    "fog": Corruption(
        weather.fog,
        ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)),
        ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)),
    ),
    "brightness": Corruption(kinds.brightness, (0.05, 0.1, 0.15, 0.2, 0.3), (0.1, 0.2, 0.3, 0.4, 0.5)),
    "contrast": Corruption(kinds.contrast, (0.75, 0.5, 0.4, 0.3, 0.15), (0.4, 0.3, 0.2, 0.1, 0.05)),
    "elastic_transform": Corruption(
        kinds.elastic_transform,
        ((0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03)),
        tuple(
            tuple(PUBLISHED_SCALE * share for share in setting)
            for setting in ((2, 0.7, 0.1), (2, 0.08, 0.2), (0.05, 0.01, 0.02), (0.07, 0.01, 0.02), (0.12, 0.01, 0.02))
        ),
    ),
    "pixelate": Corruption(kinds.pixelate, (0.95, 0.9, 0.85, 0.75, 0.65), (0.6, 0.5, 0.4, 0.3, 0.25)),
    "jpeg_compression": Corruption(kinds.jpeg_compression, (80, 65, 58, 50, 40), (25, 18, 15, 10, 7)),
    "speckle_noise": Corruption(
        kinds.speckle_noise, (0.06, 0.1, 0.12, 0.16, 0.2), (0.15, 0.2, 0.35, 0.45, 0.6), spare=True
    ),
    "gaussian_blur": Corruption(kinds.gaussian_blur, (0.4, 0.6, 0.7, 0.8, 1), (1, 2, 3, 4, 6), spare=True),
    "spatter": Corruption(
        spatter.spatter,
        (
            (0.62, 0.1, 0.7, 0.7, 0.5, 0),
            (0.65, 0.1, 0.8, 0.7, 0.5, 0),
            (0.65, 0.3, 1, 0.69, 0.5, 0),
            (0.65, 0.1, 0.7, 0.69, 0.6, 1),
            (0.65, 0.1, 0.5, 0.68, 0.6, 1),
        ),
        (
            (0.65, 0.3, 4, 0.69, 0.6, 0),
            (0.65, 0.3, 3, 0.68, 0.6, 0),
            (0.65, 0.3, 2, 0.68, 0.5, 0),
            (0.65, 0.3, 1, 0.65, 1.5, 1),
            (0.67, 0.4, 1, 0.65, 1.5, 1),
        ),
        spare=True,
    ),
    "saturate": Corruption(
        kinds.saturate,
        ((0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2)),
        ((0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (20, 0.2)),
        spare=True,
    ),
}


def corrupted(images: Tensor, name: str, severity: int, keys: Tensor) -> Tensor:
    """Corrupt images, each in its own way: what is drawn for it follows from its key, the name and the severity alone.

    As published, levels outside of 0..255 are clipped and the others rounded down to whole ones.

    Args:
        images: uint8 (N, C, H, W) on the CPU, grey (C = 1) or RGB (C = 3).
        name: a key of ``CORRUPTIONS``.
        severity: 1 (weak) to 5 (strong).
        keys: int64 (N,), see ``zoo.randomness``.

    Returns:
        the corrupted images, uint8 (N, C, H, W).

    Raises:
        ValueError: an unknown name or severity, or images or keys of another kind.
        ImportError: frost without its photographs, see the extra ``corruptions``.
    """
    corruption = look_up(CORRUPTIONS, name, "corruption")
    if severity not in SEVERITIES:
        raise ValueError(f"the severity of {name} must be 1 to 5, got {severity!r}")
    _check(images, keys)
    settings = corruption.small if min(images.shape[2:]) <= LARGEST_SMALL else corruption.large
    own_keys = key_of(keys, zlib.crc32(name.encode()), severity)
    results = torch.empty_like(images)
    chunk = max(1, CHUNK // max(1, images[:1].numel()))
    for start in range(0, len(images), chunk):
        some = slice(start, start + chunk)
        levels = corruption.function(images[some].double().contiguous(), own_keys[some], settings[severity - 1])
        # Whole levels may have become less by the rounding of floats, and would lose 1.
        results[some] = (levels + 1e-6).clamp_(0, 255).byte()
    return results


def corruption_keys(indices: Tensor) -> Tensor:
    """Return the keys of test images, by their places in the test split, int64 (N,): the same in every measurement."""
    return key_of(SEED, indices)


def parse_corruption(text: str) -> tuple[str, int]:
    """Return the name and the severity of a corruption that is written as ``NAME:SEVERITY``, such as ``fog:3``.

    Raises:
        ValueError: it is not written so, or there is no such corruption or severity.
    """
    name, colon, severity = text.partition(":")
    look_up(CORRUPTIONS, name, "corruption")
    if not colon:
        raise ValueError(f"{text!r} has no severity: write NAME:SEVERITY with 1 to 5, such as {name}:3")
    if severity not in map(str, SEVERITIES):
        raise ValueError(f"the severity of {name} must be 1 to 5, got {severity!r}")
    return name, int(severity)


def _check(images: Tensor, keys: Tensor) -> None:
    """Raise ValueError unless images and keys are what ``corrupted`` takes."""
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3) or images.device.type != "cpu":
        raise ValueError(
            "images are uint8 (N, C, H, W) with C = 1 or 3 on the CPU, "
            f"got {images.dtype} {tuple(images.shape)} on {images.device.type}"
        )
    if min(images.shape[2:]) < LEAST_SIDE:
        raise ValueError(f"images to corrupt have sides of at least {LEAST_SIDE} pixels, got {tuple(images.shape[2:])}")
    if keys.dtype != torch.int64 or keys.shape != images.shape[:1]:
        raise ValueError(f"keys are int64 ({len(images)},), one for each image, got {keys.dtype} {tuple(keys.shape)}")
