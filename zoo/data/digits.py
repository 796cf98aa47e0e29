"""The handwritten digits that come with scikit-learn."""

import numpy as np
import torch
from sklearn.datasets import load_digits

from zoo.data.augmentation import Augment
from zoo.data.image_sets import MemoryImages
from zoo.data.module import ClassWeights, ImageData, stratified_split


class Digits(ImageData):
    """The 1,797 handwritten digits that come with scikit-learn: grey, 8×8. Nothing is downloaded.

    A fixed fifth (360 images, each digit in its share) is the test split.

    Source: Alpaydin and Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository.

    Args:
        batch_size: images a batch (and a device).
        val_fraction: share of the training images held out for validation, in (0, 0.5].
        augment: of training images: "none", "crop" (random shift), "crop_flip" (and mirroring), "crop_flip_cutout"
            (and a black square), "crop_flip_light" (and other brightness and contrast) or "resized_crop_flip" (random
            resized crop and mirroring); "crop" by default.
        class_weights: factors of the training loss, one for each class; or "auto", by which each class counts as much
            as any other however many images it has; none by default.
        predict: image file or folder for predict; the test images by default.
        corruption: what test images are changed by when the test loader reads them, as "NAME:SEVERITY", e.g. "fog:3"
            (see ``zoo.corruptions``); nothing by default.
    """

    class_names = [str(digit) for digit in range(10)]
    in_chans = 1
    input_size = 8
    mean = [0.3053]
    std = [0.3760]
    title = "Digits"
    licence = "CC-BY-4.0"
    default_augment = "crop"

    def __init__(
        self,
        batch_size: int = 64,
        val_fraction: float = 0.1,
        augment: Augment | None = None,
        class_weights: ClassWeights = None,
        predict: str | None = None,
        corruption: str | None = None,
    ) -> None:
        super().__init__(batch_size, val_fraction, augment, class_weights, predict, corruption)
        self.save_hyperparameters()

    def load_split(self, split: str) -> MemoryImages:
        digits = load_digits()
        # The original grey levels are 0..16.
        images = torch.from_numpy(np.round(digits.images * 255 / 16).astype(np.uint8)).unsqueeze(1)
        labels = torch.from_numpy(digits.target).long()
        rest, chosen = stratified_split(labels, 360)
        if split != "test":
            kept, held = self.hold_out(labels[rest])
            chosen = rest[kept if split == "train" else held]
        return MemoryImages(images[chosen], labels[chosen])
