"""Any folder of images: ``train/CLASS/*``, ``val/CLASS/*``, ``test/CLASS/*``."""

import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from zoo.data.augmentation import Augment
from zoo.data.image_files import (
    MOST_UNREADABLE,
    class_folders,
    empty_folders,
    first_ten,
    images_in,
    is_image,
    unreadable,
)
from zoo.data.image_sets import ImageSet
from zoo.data.module import SPLITS, ImageData
from zoo.data.preflight import examine
from zoo.models.transform import ImageTransform, usual_normalisation


class ImageFolder(ImageData):
    """Your own images: root/train/CLASS/**, and, if you have them, root/val/CLASS/** and root/test/CLASS/**.

    Without ``val``, a share of ``train`` is held out for validation. Without ``test``, the validation images are the
    test images too. Images are converted to grey or RGB, resized (the shorter side) and cropped in the centre; files
    that do not end as images do (.jpg, .png, ...) are ignored.

    Each image of a split is read before the split is used, whether it then stays in memory or not, so that no file
    stops a run half way; one that stays on disk but once, as long as it does not change. The few that cannot be read
    are left out; those held out of train for validation are chosen before that, so that the choice does not depend on
    what is readable.

    With the augmentation "resized_crop_flip", training images are kept at 8/7 of ``input_size`` (256 pixels for 224),
    so that a crop loses little resolution.

    Args:
        root: the folder that holds train.
        input_size: height and width that the network sees, in pixels; by default those that the network one starts
            from (``--model.init_from``) was trained on, else 224.
        in_chans: 3 (RGB) or 1 (grey); by default as the network one starts from takes them, else 3.
        title: the data set's name as shown beside results; the folder's by default.
        licence: the terms on which the images are to be had.
        mean: of each channel for pixels in [0, 1]; ImageNet's for RGB and 0.5 for grey by default.
        std: of each channel for pixels in [0, 1]; ImageNet's for RGB and 0.25 for grey by default.
        batch_size: images a batch (and a device).
        val_fraction: share of train held out for validation if there is no val folder, in (0, 0.5].
        augment: of training images: "none", "crop" (random shift), "crop_flip" (and mirroring), "crop_flip_cutout"
            (and a black square) or "resized_crop_flip" (random resized crop and mirroring); "crop_flip" by default.
        num_workers: processes that read images, for a split too large for memory.
        memory_limit_mb: a split of more MiB than this, once decoded, is read from disk batch by batch.
        max_unreadable: up to so many files of a split that are no readable images are left out with a warning that
            names them; more are an error.
        predict: image file or folder for predict; the test images by default.

    Raises:
        FileNotFoundError: no train folder.
        ValueError: fewer than two classes, a class without images, classes that differ between splits, a number
            outside its range; from reading a split, more than ``max_unreadable`` files that are no readable images,
            or a class that has no other.
    """

    def __init__(
        self,
        root: str,
        input_size: int | None = None,
        in_chans: int | None = None,
        title: str | None = None,
        licence: str = "not stated",
        mean: list[float] | None = None,
        std: list[float] | None = None,
        batch_size: int = 64,
        val_fraction: float = 0.1,
        augment: Augment | None = None,
        num_workers: int = 0,
        memory_limit_mb: int = 2048,
        max_unreadable: int = MOST_UNREADABLE,
        predict: str | None = None,
    ) -> None:
        super().__init__(batch_size, val_fraction, augment, predict)
        input_size = 224 if input_size is None else input_size
        in_chans = 3 if in_chans is None else in_chans
        least = {"input_size": (input_size, 1), "num_workers": (num_workers, 0), "max_unreadable": (max_unreadable, 0)}
        for name, (value, minimum) in least.items():
            if value < minimum:
                raise ValueError(f"{name} must be at least {minimum}, got {value}")
        self.save_hyperparameters()
        # Lightning's command line has recorded what it was told, which may be None.
        self.hparams.update(input_size=input_size, in_chans=in_chans)
        self.root = Path(root)
        ImageTransform(in_chans, input_size)  # refuses other channels than it knows
        self.input_size = input_size
        self.in_chans = in_chans
        self.title = title or self.root.resolve().name
        self.licence = licence
        usual_mean, usual_std = usual_normalisation(in_chans)
        self.mean = mean or list(usual_mean)
        self.std = std or list(usual_std)
        if not len(self.mean) == len(self.std) == in_chans or not all(value > 0 for value in self.std):
            raise ValueError(f"mean and std are {in_chans} numbers each (std above 0), got {self.mean} and {self.std}")
        self.num_workers = num_workers
        self.memory_limit_mb = memory_limit_mb
        self.max_unreadable = max_unreadable
        self.class_names = self._check_folders()

    @property
    def stored_size(self) -> int:
        return round(self.input_size * 8 / 7) if self.augment == "resized_crop_flip" else self.input_size

    def load_split(self, split: str) -> ImageSet:
        if split == "test" and not self._has("test"):
            return self.split("val")
        if split == "test" or self._has("val"):
            return self.image_set(split, *self._list(split))
        files, labels = self._list("train")
        kept, held = self.hold_out(labels)
        chosen = kept if split == "train" else held
        return self.image_set(split, [files[index] for index in chosen], labels[chosen])

    def image_set(self, split: str, files: Sequence[Path], labels: Tensor) -> ImageSet:
        """Read the images of a split, those of "train" at ``stored_size``; leave out what cannot be read, and say so.

        Raises:
            ValueError: more than ``max_unreadable`` of the files cannot be read, or none of a class can.
        """
        size = self.stored_size if split == "train" else self.input_size
        images, broken = self._read_files(files, labels, ImageTransform(self.in_chans, size))
        if len(broken) > self.max_unreadable:
            then = (
                f"; remove or replace them (python -m zoo preflight {self.root} lists all), or let more than "
                f"{self.max_unreadable} of a split be left out (--data.max_unreadable)"
            )
            raise ValueError(unreadable(broken, len(files), then, most=10))
        left = set(images.labels.tolist())
        if lost := [name for label, name in enumerate(self.class_names) if label not in left]:
            held = split == "val" and not self._has("val")
            what = "part held out of train for validation" if held else f"{split} split"
            then = f", and the {what} has no others of the classes {first_ten(lost)}; replace or add images"
            raise ValueError(unreadable(broken, len(files), then))
        if broken:
            warnings.warn(unreadable(broken, len(files), " and are left out"), stacklevel=2)
        return images

    def _has(self, split: str) -> bool:
        return (self.root / split).is_dir()

    def survey(self) -> dict[str, tuple[Tensor, dict[Path, str]]]:
        """Return of each split that has a folder the labels of its images, and why some cannot be read."""
        found = {}
        for split in filter(self._has, SPLITS):
            files, labels = self._list(split)
            found[split] = labels, examine(files, ImageTransform(self.in_chans, self.input_size))
        return found

    def _list(self, split: str) -> tuple[list[Path], Tensor]:
        classes = [sorted(images_in(self.root / split / name)) for name in self.class_names]
        files = [file for images in classes for file in images]
        return files, torch.arange(self.num_classes).repeat_interleave(
            torch.tensor([len(images) for images in classes])
        )

    def _check_folders(self) -> list[str]:
        train = self.root / "train"
        if not self._has("train"):
            raise FileNotFoundError(f"no folder {train}; images are expected in {self.root}/train/CLASS/*")
        names, problems = class_folders(train), []
        if len(names) < 2:
            found = ", ".join(names) or "none"
            problems.append(f"{train} needs a folder for each of two or more classes, but has {found}")
        for folder in (self.root / split for split in filter(self._has, SPLITS)):
            if empty := empty_folders(folder):
                problems.append(
                    f"no image in the class folders {first_ten(empty)} of {folder}; add images or remove the folders"
                )
            if (theirs := class_folders(folder)) != names:
                only = {train: set(names) - set(theirs), folder: set(theirs) - set(names)}
                told = " and ".join(
                    f"only {place} has {first_ten(sorted(extra))}" for place, extra in only.items() if extra
                )
                problems.append(
                    f"{folder} and {train} must have the same class folders, but {told}; add or remove these"
                )
        if problems:
            raise ValueError("\n".join(problems))
        for split in filter(self._has, SPLITS):
            if loose := sum(map(is_image, (self.root / split).iterdir())):
                warnings.warn(f"{loose} images in {self.root / split} are in no class folder: left out", stacklevel=3)
        if not self._has("test"):
            rank_zero_info(f"{self.root} has no test folder: its validation images are its test images, too")
        return names
