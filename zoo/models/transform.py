"""From a PIL image to the tensor that a model takes."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torchvision.transforms.v2.functional as TF
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from zoo.models.image_formats import HEIF, cure, has_image_ending, image_formats

MODES = {1: "L", 3: "RGB"}

# The mean and standard deviation of ImageNet's pixels in [0, 1].
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def usual_normalisation(in_chans: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the mean and std, for pixels in [0, 1], of images of which nothing else is known: ImageNet's for RGB."""
    return (IMAGENET_MEAN, IMAGENET_STD) if in_chans == 3 else ((0.5,) * in_chans, (0.25,) * in_chans)


def check_normalisation(what: str, values: Sequence[float]) -> None:
    """Refuse a ``"mean"`` or ``"std"`` that is not that of pixels in [0, 1].

    Raises:
        ValueError: it is not.
    """
    if not all(0 <= value <= 1 and (what == "mean" or value) for value in values):
        share = "at least 0" if what == "mean" else "more than 0"
        raise ValueError(
            f"{what} is that of pixels in [0, 1], {share} and at most 1, got {list(values)}; if it is that of bytes, "
            "divide it by 255"
        )


@dataclasses.dataclass(frozen=True)
class ImageTransform:
    """Convert a PIL image to a tensor (in_chans, input_size, input_size) of floats in [0, 1].

    The image is turned upright as its EXIF data say, laid on a white ground where it is transparent, converted to grey
    (1 channel) or RGB (3), its shorter side is resized to ``input_size`` pixels if it has another size, and the centre
    is cropped.

    Args:
        in_chans: 1 or 3.
        input_size: height and width, in pixels.
        draft: whether :meth:`read` lets the decoder scale a JPEG file down, to no less than three times ``input_size``:
            many times as fast for large photographs, and less than a level of 255 away on average.

    Raises:
        TypeError: what is no PIL image.
        ValueError: another number of channels, or an image whose pixels have no stated range (PIL's modes I and F).
    """

    in_chans: int
    input_size: int
    draft: bool = True

    def __post_init__(self) -> None:
        if self.in_chans not in MODES:
            raise ValueError(f"images are grey (1 channel) or RGB (3 channels), got in_chans={self.in_chans}")

    def __call__(self, image: Image.Image) -> Tensor:
        return self.pixels(image).to(torch.float32) / 255

    def read(self, file: Path) -> Tensor:
        """Return the pixels of an image file, uint8 (in_chans, input_size, input_size).

        Raises:
            ValueError: the file is no readable image.
        """
        try:
            if not file.stat().st_size:
                raise ValueError("the file is empty")
            with _opened(file) as image:
                most = Image.MAX_IMAGE_PIXELS
                if most is not None and image.width * image.height > most:
                    raise ValueError(
                        f"{image.width}×{image.height} pixels are more than {most:,}: a decompression bomb, or an "
                        "image to be scaled down (PIL.Image.MAX_IMAGE_PIXELS = None lifts the limit)"
                    )
                size = image.size
                if self.draft:
                    image.draft(None, (3 * self.input_size, 3 * self.input_size))
                return self._pixels(image, size)
        # PIL raises whatever the broken bytes lead to.
        except Exception as error:
            raise ValueError(f"{file} is no readable image ({error}); remove or replace it") from error

    def pixels(self, image: Image.Image) -> Tensor:
        """Return the same tensor as uint8 in 0..255."""
        if not isinstance(image, Image.Image):
            raise TypeError(
                f"expected a PIL image, got {type(image).__name__}; Image.open(file) reads one, Image.fromarray(array) "
                "makes one of bytes (H, W) or (H, W, 3), and a tensor in [0, 1], (N, C, H, W), goes into the model as "
                "it is"
            )
        return self._pixels(image, image.size)

    def _pixels(self, image: Image.Image, size: tuple[int, int]) -> Tensor:
        """Return the pixels of an image that has this size, in whatever size it was decoded."""
        image = _on_white(_eight_bits(ImageOps.exif_transpose(image), image.format)).convert(MODES[self.in_chans])
        if image.size != (self.input_size, self.input_size):
            # The longer side is that of the image as it is, for a rounded one would shift what is cropped.
            longer = int(self.input_size * max(size) / min(size))
            upright = image.height > image.width
            shape = [longer, self.input_size] if upright else [self.input_size, longer]
            image = TF.center_crop(TF.resize(image, shape), [self.input_size])
        return TF.pil_to_tensor(image)


def _opened(file: Path) -> Image.Image:
    try:
        return Image.open(file, formats=image_formats())
    # Pillow's own message has but the file's name.
    except UnidentifiedImageError as error:
        ending = file.suffix.lower()
        more = f"; {cure(ending)}" if ending in HEIF and not has_image_ending(file) else ""
        raise ValueError(f"no image of a known kind{more}") from error


def _eight_bits(image: Image.Image, form: str | None) -> Image.Image:
    """Return an image that PIL converts without loss of range: it clips pixels of more than eight bits.

    Args:
        form: the kind of file that it is from, as PIL calls it.
    """
    # The range that a PGM file states, PIL has scaled to 16 bits.
    if image.mode.startswith("I;16") or (image.mode == "I" and form == "PPM"):
        levels = np.asarray(image)
        grey = Image.fromarray((levels // 257).astype(np.uint8))
        if "transparency" not in image.info:
            return grey
        # One level of all 65,536 is transparent.
        opaque = Image.fromarray((levels != image.info["transparency"]).astype(np.uint8) * 255)
        return Image.merge("LA", (grey, opaque))
    if image.mode in ("I", "F"):
        raise ValueError(
            f"its pixels (PIL's mode {image.mode}) have no stated range; save it with 8 or 16 bits a channel"
        )
    return image


def _on_white(image: Image.Image) -> Image.Image:
    """Return the image as it looks on white: pixels that are transparent may have any colour, mostly black."""
    if not image.has_transparency_data:
        return image
    # PIL converts grey with premultiplied alpha to nothing else.
    image = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
