"""Any folder of images: ``train/CLASS/*``, ``val/CLASS/*``, ``test/CLASS/*``."""

import warnings
from collections import Counter
from pathlib import Path

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from zoo.data.augmentation import Augment
from zoo.data.contents import Contents, class_folders, first_ten, left_out, refuse_lost_link
from zoo.data.image_files import MOST_UNREADABLE
from zoo.data.labelled_files import CALLED, LabelledFiles, differences
from zoo.data.module import SPLITS, ClassWeights
from zoo.models.image_formats import has_image_ending


class ImageFolder(LabelledFiles):
    """Your own images: root/train/CLASS/**, and, if you have them, root/val/CLASS/** and root/test/CLASS/**.

    Without ``val``, a share of ``train`` is held out for validation. Without ``test``, the validation images are the
    test images too. Images are converted to grey or RGB, resized (the shorter side) and cropped in the centre; of
    several frames, the first is taken. Files whose endings are none that Pillow reads are left out, and counted in a
    warning; what is hidden (names that begin with a dot) is not looked at. Links to folders are followed.

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
            (and a black square), "crop_flip_light" (and other brightness and contrast) or "resized_crop_flip" (random
            resized crop and mirroring); "crop_flip" by default.
        num_workers: processes that read images, for a split too large for memory.
        memory_limit_mb: a split of more MiB than this, once decoded, is read from disk batch by batch.
        max_unreadable: up to so many files of a split that are no readable images are left out with a warning that
            names them; more are an error.
        draft: whether JPEG files of at least six times ``input_size`` are scaled down by the decoder, to no less than
            three times that size: faster, and less than a level of 255 away on average.
        class_weights: factors of the training loss, one for each class in the order of their names; or "auto", by
            which each class counts as much as any other however many images it has. None by default.
        predict: image file or folder for predict; the test images by default.
        corruption: what test images are changed by when the test loader reads them, as "NAME:SEVERITY", e.g. "fog:3"
            (see ``zoo.corruptions``); nothing by default.

    Raises:
        FileNotFoundError: no train folder.
        ValueError: fewer than two classes, a class without images, classes that differ between splits, two folders of
            one class, a link to a folder that it lies in, a number outside its range; from reading a split, more than
            ``max_unreadable`` files that are no readable images, or a class that has no other.
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
        draft: bool = True,
        class_weights: ClassWeights = None,
        predict: str | None = None,
        corruption: str | None = None,
    ) -> None:
        self.root = Path(root)
        super().__init__(
            self.root,
            input_size=input_size,
            in_chans=in_chans,
            title=title or self.root.resolve().name,
            licence=licence,
            mean=mean,
            std=std,
            batch_size=batch_size,
            val_fraction=val_fraction,
            augment=augment,
            num_workers=num_workers,
            memory_limit_mb=memory_limit_mb,
            max_unreadable=max_unreadable,
            draft=draft,
            class_weights=class_weights,
            predict=predict,
            corruption=corruption,
        )
        self.save_hyperparameters()
        # Lightning's command line has recorded what it was told, which may be None.
        self.hparams.update(input_size=self.input_size, in_chans=self.in_chans)
        self.contents: dict[str, dict[str, Contents]] = {}
        self.class_names = self._check_folders()

    def has(self, split: str) -> bool:
        return (self.root / split).is_dir()

    def files_of(self, split: str) -> tuple[list[Path], Tensor]:
        classes = self._contents_of(split)
        files = [file for name in self.class_names for file in classes[name].images]
        counts = [len(classes[name].images) for name in self.class_names]
        return files, torch.arange(self.num_classes).repeat_interleave(torch.tensor(counts))

    def _contents_of(self, split: str) -> dict[str, Contents]:
        """Return what is in each class folder of a split, which is looked through when first asked for."""
        if split not in self.contents:
            folders = class_folders(self.root / split)
            self.contents[split] = {name: Contents.of(folder) for name, folder in folders.items()}
        return self.contents[split]

    def _check_folders(self) -> list[str]:
        train = self.root / "train"
        for split in SPLITS:
            refuse_lost_link(self.root / split)
        if not self.has("train"):
            other = self._called_otherwise().get("train")
            hint = f" (is it {self.root / other}?)" if other else ""
            if self.root.is_file():
                hint = f", as {self.root} is a file; is it a table (--data ImageTable --data.table {self.root})?"
            raise FileNotFoundError(f"no folder {train}{hint}; images are expected in {self.root}/train/CLASS/*")
        names, problems = list(class_folders(train)), []
        if len(names) < 2:
            found = ", ".join(names) or "none"
            problems.append(f"{train} needs a folder for each of two or more classes, but has {found}")
        for split in filter(self.has, SPLITS):
            problems += self._problems_of(split, names)
        if problems:
            raise ValueError("\n".join(problems))
        for split in filter(self.has, SPLITS):
            if others := sum((contents.others for contents in self._contents_of(split).values()), Counter()):
                warnings.warn(f"{self.root / split}: {left_out(others)}", stacklevel=3)
            if loose := sum(map(_is_loose_image, (self.root / split).iterdir())):
                warnings.warn(f"{loose} images in {self.root / split} are in no class folder: left out", stacklevel=3)
        for split, name in self._called_otherwise().items():
            warnings.warn(f"{self.root / name} is not used; call it {split} if it has the {split} images", stacklevel=3)
        if not self.has("test"):
            rank_zero_info(f"{self.root} has no test folder: its validation images are its test images, too")
        return names

    def _called_otherwise(self) -> dict[str, str]:
        """Return of each split that has no folder the name of one that may be meant."""
        names = sorted(path.name for path in self.root.iterdir() if path.is_dir()) if self.root.is_dir() else []
        return {
            split: name
            for split in SPLITS
            for name in reversed(names)
            if not self.has(split) and name.lower() in CALLED[split]
        }

    def _problems_of(self, split: str, names: list[str]) -> list[str]:
        """Say what is wrong with the class folders of a split, beside those of train."""
        folder, train, problems = self.root / split, self.root / "train", []
        contents = self._contents_of(split)
        if empty := [name for name, found in contents.items() if not found.images]:
            others = sum((contents[name].others for name in empty), Counter())
            told = f" ({left_out(others)})" if others else ""
            problems.append(
                f"no image in the class folders {first_ten(empty)} of {folder}{told}; add images or remove the folders"
            )
        if told := differences(train, names, folder, contents):
            problems.append(f"{folder} and {train} must have the same class folders, but {told}; add or remove these")
        return problems


def _is_loose_image(path: Path) -> bool:
    return has_image_ending(path) and path.is_file() and not path.name.startswith(".")
