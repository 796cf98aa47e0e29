"""Image files with labels, however these are told: read, checked, and left out where they cannot be read."""

import abc
import warnings
from collections.abc import Collection, Sequence
from pathlib import Path

from torch import Tensor

from zoo.data.augmentation import Augment
from zoo.data.contents import first_ten
from zoo.data.image_files import unreadable
from zoo.data.image_sets import ImageSet
from zoo.data.module import SPLITS, ClassWeights, ImageData
from zoo.data.preflight import examine
from zoo.models.transform import ImageTransform, check_normalisation, usual_normalisation

# What the splits are called elsewhere, in small letters.
CALLED = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
}


class LabelledFiles(ImageData):
    """Image files with labels: what :class:`ImageFolder` and :class:`ImageTable` have in common.

    Without "val", a share of "train" is held out for validation. Without "test", the validation images are the test
    images too.

    Args:
        where: the folder or table that messages name.
        others: those of :class:`ImageFolder`.

    Raises:
        ValueError: a number outside its range; from reading a split, more than ``max_unreadable`` files that are no
            readable images, or a class that has no other.
    """

    def __init__(
        self,
        where: Path,
        *,
        input_size: int | None,
        in_chans: int | None,
        title: str,
        licence: str,
        mean: list[float] | None,
        std: list[float] | None,
        batch_size: int,
        val_fraction: float,
        augment: Augment | None,
        num_workers: int,
        memory_limit_mb: int,
        max_unreadable: int,
        draft: bool,
        class_weights: ClassWeights,
        predict: str | None,
        corruption: str | None,
    ) -> None:
        super().__init__(batch_size, val_fraction, augment, class_weights, predict, corruption)
        input_size = 224 if input_size is None else input_size
        in_chans = 3 if in_chans is None else in_chans
        least = {"input_size": (input_size, 1), "num_workers": (num_workers, 0), "max_unreadable": (max_unreadable, 0)}
        for name, (value, minimum) in least.items():
            if value < minimum:
                raise ValueError(f"{name} must be at least {minimum}, got {value}")
        ImageTransform(in_chans, input_size)  # refuses other channels than it knows
        self.where = where
        self.input_size = input_size
        self.in_chans = in_chans
        self.title = title
        self.licence = licence
        usual_mean, usual_std = usual_normalisation(in_chans)
        self.mean = mean or list(usual_mean)
        self.std = std or list(usual_std)
        if not len(self.mean) == len(self.std) == in_chans:
            raise ValueError(f"mean and std are {in_chans} numbers each, got {self.mean} and {self.std}")
        check_normalisation("mean", self.mean)
        check_normalisation("std", self.std)
        self.num_workers = num_workers
        self.memory_limit_mb = memory_limit_mb
        self.max_unreadable = max_unreadable
        self.draft = draft

    @abc.abstractmethod
    def has(self, split: str) -> bool:
        """Return whether there are files of "train", "val" or "test"."""

    @abc.abstractmethod
    def files_of(self, split: str) -> tuple[list[Path], Tensor]:
        """Return the files of a split that :meth:`has` told of, in order, and their labels."""

    @property
    def stored_size(self) -> int:
        return round(self.input_size * 8 / 7) if self.augment == "resized_crop_flip" else self.input_size

    def load_split(self, split: str) -> ImageSet:
        if split == "test" and not self.has("test"):
            return self.split("val")
        if split == "test" or self.has("val"):
            return self.image_set(split, *self.files_of(split))
        files, labels = self.files_of("train")
        kept, held = self.hold_out(labels)
        chosen = kept if split == "train" else held
        return self.image_set(split, [files[index] for index in chosen], labels[chosen])

    def image_set(self, split: str, files: Sequence[Path], labels: Tensor) -> ImageSet:
        """Read the images of a split, those of "train" at ``stored_size``; leave out what cannot be read, and say so.

        Raises:
            ValueError: more than ``max_unreadable`` of the files cannot be read, or none of a class can.
        """
        size = self.stored_size if split == "train" else self.input_size
        images, broken = self._read_files(files, labels, ImageTransform(self.in_chans, size, self.draft))
        if len(broken) > self.max_unreadable:
            then = (
                f"; remove or replace them (python -m zoo preflight {self.where} lists all), or let more than "
                f"{self.max_unreadable} of a split be left out (--data.max_unreadable)"
            )
            raise ValueError(unreadable(broken, len(files), then, most=10))
        left = set(images.labels.tolist())
        if lost := [name for label, name in enumerate(self.class_names) if label not in left]:
            held = split == "val" and not self.has("val")
            what = "part held out of train for validation" if held else f"{split} split"
            then = f", and the {what} has no others of the classes {first_ten(lost)}; replace or add images"
            raise ValueError(unreadable(broken, len(files), then))
        if broken:
            warnings.warn(unreadable(broken, len(files), " and are left out"), stacklevel=2)
        return images

    def survey(self) -> dict[str, tuple[Tensor, dict[Path, str]]]:
        """Return of each split that has files the labels of its images, and why some cannot be read."""
        found = {}
        for split in filter(self.has, SPLITS):
            files, labels = self.files_of(split)
            found[split] = labels, examine(files, ImageTransform(self.in_chans, self.input_size, self.draft))
        return found


def differences(place: object, names: Collection[str], other: object, theirs: Collection[str]) -> str:
    """Say which names only one of two places has; nothing if both have the same."""
    only = [(place, set(names) - set(theirs)), (other, set(theirs) - set(names))]
    return " and ".join(f"only {place} has {first_ten(sorted(extra))}" for place, extra in only if extra)
