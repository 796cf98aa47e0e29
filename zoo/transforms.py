"""From a PIL image to the tensor that a model takes."""

import dataclasses

import torch
import torchvision.transforms.v2.functional as TF
from PIL import Image
from torch import Tensor

MODES = {1: "L", 3: "RGB"}


@dataclasses.dataclass(frozen=True)
class ImageTransform:
    """Convert a PIL image to a tensor (in_chans, input_size, input_size) of floats in [0, 1].

    The image is converted to grey (1 channel) or RGB (3), its shorter side is resized to ``input_size`` pixels if it
    has another size, and the centre is cropped.

    Args:
        in_chans: 1 or 3.
        input_size: height and width, in pixels.

    Raises:
        ValueError: another number of channels.
    """

    in_chans: int
    input_size: int

    def __post_init__(self) -> None:
        if self.in_chans not in MODES:
            raise ValueError(f"images are grey (1 channel) or RGB (3 channels), got in_chans={self.in_chans}")

    def __call__(self, image: Image.Image) -> Tensor:
        return self.pixels(image).to(torch.float32) / 255

    def pixels(self, image: Image.Image) -> Tensor:
        """Return the same tensor as uint8 in 0..255."""
        image = image.convert(MODES[self.in_chans])
        if image.size != (self.input_size, self.input_size):
            image = TF.center_crop(TF.resize(image, [self.input_size]), [self.input_size])
        return TF.pil_to_tensor(image)
