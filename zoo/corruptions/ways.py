"""All ways in which test images are changed to see what a network makes of them."""

import functools
from collections.abc import Callable

from torch import Tensor

from zoo.corruptions.corruption import CORRUPTIONS, SEVERITIES, corrupted
from zoo.corruptions.kinds import scaled_brightness, scaled_contrast

CLEAN = "clean"
# By what contrast and brightness are multiplied; at 1 an image is as it was.
FACTORS = (0.75, 0.5, 0.35, 0.25, 0.15, 0.1, 0.05)
SCALES: dict[str, Callable[[Tensor, float], Tensor]] = {"contrast": scaled_contrast, "brightness": scaled_brightness}

# Images, uint8 (N, C, H, W), and what all that is drawn for each follows from, int64 (N,), to floats in [0, 1].
Way = Callable[[Tensor, Tensor], Tensor]


def severity_key(name: str, severity: int) -> str:
    """Return the key of a corruption at a severity."""
    return f"{name}:{severity}"


def scale_key(scale: str, factor: float) -> str:
    """Return the key of images whose contrast or brightness is multiplied by a factor."""
    return CLEAN if factor == 1 else f"{scale} x {factor}"


def _unchanged(images: Tensor, keys: Tensor) -> Tensor:
    return images.float() / 255


def _corrupted(name: str, severity: int, images: Tensor, keys: Tensor) -> Tensor:
    return corrupted(images, name, severity, keys).float() / 255


def _scaled(scale: str, factor: float, images: Tensor, keys: Tensor) -> Tensor:
    return SCALES[scale](images.float() / 255, factor)


# Contrast or brightness lowered, by the key that stands in results.
SCALED: dict[str, Way] = {
    scale_key(scale, factor): functools.partial(_scaled, scale, factor) for scale in SCALES for factor in FACTORS
}
# Likewise all ways.
WAYS: dict[str, Way] = {
    CLEAN: _unchanged,
    **{
        severity_key(name, severity): functools.partial(_corrupted, name, severity)
        for name in CORRUPTIONS
        for severity in SEVERITIES
    },
    **SCALED,
}
