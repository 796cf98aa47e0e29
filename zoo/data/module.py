"""Lightning data modules: scikit-learn's digits, MNIST, CIFAR, and any folder of images.

Images travel as uint8 and become floats in [0, 1] on the device, where they are augmented batch by batch. A set that is
small enough lies there as one tensor, and no worker process is needed.
"""

import abc
import contextlib
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
import torchvision.transforms.v2.functional as TF
from lightning.pytorch.utilities import rank_zero_info
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import datasets
from torchvision.datasets.vision import VisionDataset

from operators.lookup import look_up, unknown_name
from zoo.data.augmentation import AUGMENTS, Augment, augment_batch, to_float
from zoo.data.image_files import (
    MOST_UNREADABLE,
    DiskImages,
    class_folders,
    decode_each,
    empty_folders,
    empty_images,
    evenly_spaced,
    find_images,
    images_in,
    is_image,
    some_of,
    unreadable,
)
from zoo.data.loaders import Loader, MemoryImages, Share, TrainingLoader, as_it_is
from zoo.data.preflight import examine
from zoo.models.transform import ImageTransform
from zoo.randomness import run_seed

# Images to predict on are read later, when it is known what the network takes.
STAGES = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": ()}

SPLITS = ("train", "val", "test")

# Arguments that say how images are used, not which they are.
USES = ("batch_size", "augment", "predict")

# Held-out images never depend on the global seed, so that accuracies of different runs compare.
SPLIT_SEED = 0
# The label of an image whose class nobody has told.
UNLABELLED = -1


ImageSet = MemoryImages | DiskImages


class ImageData(L.LightningDataModule, abc.ABC):
    """Square images with class labels: what every data module of the zoo has.

    Batches are (images, labels): float32 in [0, 1], (N, in_chans, input_size, input_size), and int64 (N,). Prediction
    batches are the images alone; ``predict_files`` then names them, in order, without those that cannot be read, whose
    reasons ``unreadable_files`` tells. Validation images are always held out of
    the training images, never taken from the test images.

    Attributes:
        class_names: the name of each label.
        in_chans: 1 (grey) or 3 (RGB).
        input_size: height and width, in pixels.
        mean, std: of each channel, for pixels in [0, 1].
        title: the data set's name as shown beside results.
        licence: the terms on which the images are to be had.
        default_augment: what training images get unless told otherwise.

    Args:
        batch_size: images a batch (and a device).
        val_fraction: share of the training images held out for validation.
        augment: of training images: "none", "crop" (random shift), "crop_flip" (and mirroring), "crop_flip_cutout"
            (and a black square) or "resized_crop_flip" (random resized crop and mirroring); ``default_augment`` by
            default.
        predict: image file or folder for predict; the test images by default.

    Raises:
        ValueError: a number outside its range, an unknown ``augment``, or no image under ``predict``.
        FileNotFoundError: ``predict`` does not exist.
    """

    class_names: list[str]
    in_chans: int
    input_size: int
    mean: list[float]
    std: list[float]
    title: str
    licence: str
    default_augment: Augment = "crop_flip"

    def __init__(self, batch_size: int, val_fraction: float, augment: Augment | None, predict: str | None) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if not 0 < val_fraction <= 0.5:
            raise ValueError(f"val_fraction is a share in (0, 0.5] of the training images, got {val_fraction}")
        augment = augment or self.default_augment
        if augment not in AUGMENTS:
            raise ValueError(unknown_name("augment", augment, AUGMENTS))
        self.batch_size = batch_size
        self.val_fraction = val_fraction
        self.augment = augment
        self.num_workers = 0
        self.memory_limit_mb = 2048
        self.predict_files = [] if predict is None else [str(file) for file in find_images(Path(predict))]
        self.unreadable_files: dict[Path, str] = {}
        self._sets: dict[str, ImageSet] = {}

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def stored_size(self) -> int:
        """Height and width at which training images are kept, from which the augmentation makes ``input_size``."""
        return self.input_size

    def describe(self) -> dict[str, Any]:
        """Return what :func:`build_data` makes this data module of again: its name and arguments."""
        return {"name": type(self).__name__, "arguments": given_arguments(self.hparams)}

    @abc.abstractmethod
    def load_split(self, split: str) -> ImageSet:
        """Read "train", "val" or "test"."""

    def split(self, split: str) -> ImageSet:
        """Return "train", "val", "test" or "predict", which is read when first asked for and then kept."""
        if split not in self._sets:
            self._sets[split] = self._load_predict() if split == "predict" else self.load_split(split)
        return self._sets[split]

    def share_images(self, other: "ImageData") -> None:
        """Take over the splits that ``other`` has read, if this module would read the same."""
        mine, theirs = ({**data.hparams, **dict.fromkeys(USES)} for data in (self, other))
        if type(self) is type(other) and mine == theirs and self.stored_size == other.stored_size:
            self._sets.update({name: images for name, images in other._sets.items() if name != "predict"})

    def setup(self, stage: str) -> None:
        # Images on disk are examined by one process of each machine, and the others read what it has found.
        with first_alone(self.trainer):
            for split in STAGES[stage]:
                self.split(split)

    def train_dataloader(self) -> TrainingLoader:
        return self._loader("train")

    def val_dataloader(self) -> Loader:
        return self._loader("val")

    def test_dataloader(self) -> Loader:
        return self._loader("test")

    def predict_dataloader(self) -> DataLoader:
        images = self.split("predict")
        if images.in_memory:
            # Lightning asks for workers, but a worker would only copy what is in memory already.
            warnings.filterwarnings("ignore", message=".*does not have many workers")
        workers = 0 if images.in_memory else self.num_workers
        # Lightning tells the table of predictions which images a batch has, if the loader is torch's own.
        return DataLoader(images, batch_size=self.batch_size, num_workers=workers, collate_fn=as_it_is)

    def transfer_batch_to_device(self, batch: tuple[Tensor, ...], device: torch.device, dataloader_idx: int) -> Any:
        # Keys stay on the CPU, where what follows from them is drawn.
        images, labels, *keys = batch
        return *super().transfer_batch_to_device((images, labels), device, dataloader_idx), *keys

    def on_after_batch_transfer(self, batch: tuple[Tensor, ...], dataloader_idx: int) -> Any:
        images, labels, *keys = batch
        if self.trainer.training:
            images = augment_batch(images, self.augment, self.input_size, *keys)
        images = to_float(images)
        return images if self.trainer.predicting else (images, labels)

    def evaluation_batches(self, split: str) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield each batch of "train", "val" or "test" as it is evaluated, in order, without a trainer.

        Training images that are kept larger (``stored_size``) are resized, so they may differ by rounding from what
        a file read at ``input_size`` would give.

        Raises:
            ValueError: an unknown split.
        """
        if split not in SPLITS:
            raise ValueError(unknown_name("split", split, SPLITS))
        self.prepare_data()
        for images, labels in DataLoader(self.split(split), self.batch_size, collate_fn=as_it_is):
            yield self._as_evaluated(images), labels

    def sample(self, count: int) -> Tensor:
        """Return up to ``count`` training images as they are evaluated, evenly spaced over the training set.

        They are float32 in [0, 1], (N, in_chans, input_size, input_size), and the same in every run and process. Where
        the images are sorted by class, as those of a folder are, no class is left out that has its share.

        Raises:
            ValueError: ``count`` is below 1.
        """
        return self.evenly_spaced("train", count)[0]

    def evenly_spaced(self, split: str, count: int) -> tuple[Tensor, Tensor]:
        """Return up to ``count`` images and labels of "train", "val" or "test", as :meth:`sample` does.

        Raises:
            ValueError: ``count`` is below 1.
        """
        if count < 1:
            raise ValueError(f"count must be at least 1, got {count}")
        images, labels = self.split(split).__getitems__(evenly_spaced(count, len(self.split(split))))
        return self._as_evaluated(images), labels

    def hold_out(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the indices kept for training and those held out for validation, each class in its share."""
        for label, count in enumerate(torch.bincount(labels, minlength=self.num_classes).tolist()):
            if count < 2:
                raise ValueError(
                    f"class {self.class_names[label]!r} of {self.title} has {count} training image, too few to hold "
                    "one out for validation; add images to it, or give the data a validation split of its own"
                )
        kept, held = stratified_split(labels, max(self.num_classes, round(self.val_fraction * len(labels))))
        # The share of a rare class can round to no image.
        for label in set(range(self.num_classes)) - set(labels[held].tolist()):
            moved = kept[labels[kept] == label][:1]
            kept, held = kept[kept != moved], torch.cat([held, moved])
        return kept, held

    def _as_evaluated(self, images: Tensor) -> Tensor:
        return to_float(TF.resize(images, [self.input_size, self.input_size]))

    def _read_files(
        self, files: Sequence[Path], labels: Tensor, transform: ImageTransform
    ) -> tuple[ImageSet, dict[Path, str]]:
        """Decode ``files`` into memory, or leave them on disk where that takes more than ``memory_limit_mb``.

        Returns:
            The readable images, and why each of the other files cannot be read.
        """
        in_memory = len(files) * transform.in_chans * transform.input_size**2 <= self.memory_limit_mb * 2**20
        images = empty_images(len(files) if in_memory else 0, transform)
        broken = decode_each(files, transform, images.__setitem__) if in_memory else examine(files, transform)
        if broken:
            readable = [index for index, file in enumerate(files) if file not in broken]
            files, labels = [files[index] for index in readable], labels[readable]
            images = images[readable] if in_memory else images
        if not in_memory:
            return DiskImages(files, labels, transform), broken
        return MemoryImages(torch.from_numpy(images), labels, files), broken

    def _load_predict(self) -> ImageSet:
        if not self.predict_files:
            test = self.split("test")
            self.predict_files = [str(file) for file in test.files] or [f"test image {i}" for i in range(len(test))]
            return test
        files = [Path(file) for file in self.predict_files]
        # The network that predicts may have been trained on other images than these.
        model = self.trainer.lightning_module.model if self.trainer else None
        transform = model.transform if model else ImageTransform(self.in_chans, self.input_size)
        images, broken = self._read_files(files, torch.full((len(files),), UNLABELLED), transform)
        if len(broken) == len(files):
            raise ValueError(unreadable(broken, len(files)))
        if broken:
            warnings.warn(f"{len(broken)} of {len(files)} images cannot be read and are left out", stacklevel=2)
        self.predict_files, self.unreadable_files = [str(file) for file in images.files], broken
        return images

    def _loader(self, split: str) -> Loader:
        images, trainer, shuffle = self.split(split), self.trainer, split == "train"
        processes = trainer.world_size if trainer else 1
        share = Share(
            len(images),
            self.batch_size,
            shuffle=shuffle,
            # A last batch of one image has no variance for BatchNorm.
            drop_last=shuffle and len(images) >= self.batch_size * processes,
            processes=processes,
            rank=trainer.global_rank if trainer else 0,
            seed=run_seed(),
        )
        kind = TrainingLoader if shuffle else Loader
        device = trainer.strategy.root_device if trainer else "cpu"
        return kind(images, share, device=device, workers=self.num_workers)


class Digits(ImageData):
    """The 1,797 handwritten digits that come with scikit-learn: grey, 8×8. Nothing is downloaded.

    A fixed fifth (360 images, each digit in its share) is the test split.

    Source: Alpaydin and Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository.

    Args:
        batch_size: images a batch (and a device).
        val_fraction: share of the training images held out for validation, in (0, 0.5].
        augment: of training images: "none", "crop" (random shift), "crop_flip" (and mirroring), "crop_flip_cutout"
            (and a black square) or "resized_crop_flip" (random resized crop and mirroring); "crop" by default.
        predict: image file or folder for predict; the test images by default.
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
        predict: str | None = None,
    ) -> None:
        super().__init__(batch_size, val_fraction, augment, predict)
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


class TorchvisionData(ImageData):
    """A data set that torchvision reads as a whole (``source``).

    Args:
        root: the folder above MNIST/raw, cifar-10-batches-py or cifar-100-python with the original files.
        batch_size: images a batch (and a device).
        val_fraction: share of the training images held out for validation, in (0, 0.5].
        augment: of training images: "none", "crop" (random shift), "crop_flip" (and mirroring), "crop_flip_cutout"
            (and a black square) or "resized_crop_flip" (random resized crop and mirroring); "crop" for MNIST and
            "crop_flip" for CIFAR by default.
        download: whether to download the data set into ``root`` if it is not there.
        predict: image file or folder for predict; the test images by default.

    Raises:
        FileNotFoundError: from reading a split whose files are missing, damaged or cannot be downloaded.
    """

    def __init__(
        self,
        root: str = "data",
        batch_size: int = 64,
        val_fraction: float = 0.1,
        augment: Augment | None = None,
        download: bool = False,
        predict: str | None = None,
    ) -> None:
        super().__init__(batch_size, val_fraction, augment, predict)
        self.save_hyperparameters()
        self.root = root
        self.download = download

    @property
    @abc.abstractmethod
    def source(self) -> type[VisionDataset]:
        """The class of torchvision.datasets."""

    def prepare_data(self) -> None:
        if self.download:
            self._read(train=True, download=True)

    def load_split(self, split: str) -> MemoryImages:
        read = self._read(train=split != "test", download=False)
        images, labels = torch.as_tensor(read.data), torch.as_tensor(read.targets)
        # MNIST has no channel dimension, CIFAR has it last.
        images = images.unsqueeze(1) if images.ndim == 3 else images.permute(0, 3, 1, 2).contiguous()
        shape = (len(labels), self.in_chans, self.input_size, self.input_size)
        if images.shape != shape or labels.min() < 0 or labels.max() >= self.num_classes:
            raise FileNotFoundError(
                f"the {split} files of {self.title} under {os.path.abspath(self.root)} do not fit together: images "
                f"{tuple(images.shape)}, {len(labels)} labels from {labels.min()} to {labels.max()}; fetch them again"
            )
        if split == "test":
            return MemoryImages(images, labels)
        kept, held = self.hold_out(labels)
        chosen = kept if split == "train" else held
        return MemoryImages(images[chosen], labels[chosen])

    def _read(self, train: bool, download: bool) -> Any:
        try:
            return self.source(self.root, train=train, download=download)
        # torchvision has no error of its own: a short file fails wherever its content runs out.
        except Exception as error:
            raise FileNotFoundError(
                f"no complete {self.title} under {os.path.abspath(self.root)} ({error}); name the folder that has it "
                "(--data.root of train.py, --root of python -m zoo verify and export), let train.py download it "
                "(--data.download true), or, if you have the images as files, use --data ImageFolder"
            ) from error


class MNIST(TorchvisionData):
    """MNIST: 60,000 + 10,000 handwritten digits, grey, 28×28."""

    source = datasets.MNIST
    class_names = [str(digit) for digit in range(10)]
    in_chans = 1
    input_size = 28
    mean = [0.1307]
    std = [0.3081]
    title = "MNIST"
    licence = "CC-BY-SA-3.0"
    default_augment = "crop"


class CIFAR10(TorchvisionData):
    """CIFAR-10: 50,000 + 10,000 photographs of ten classes, RGB, 32×32."""

    source = datasets.CIFAR10
    class_names = "airplane automobile bird cat deer dog frog horse ship truck".split()
    in_chans = 3
    input_size = 32
    mean = [0.4914, 0.4822, 0.4465]
    std = [0.2470, 0.2435, 0.2616]
    title = "CIFAR-10"
    licence = "no licence stated; published for research (Krizhevsky, 2009)"


class CIFAR100(CIFAR10):
    """CIFAR-100: 50,000 + 10,000 photographs of a hundred classes, RGB, 32×32."""

    source = datasets.CIFAR100
    class_names = (
        "apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can "
        "castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin "
        "elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster "
        "man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck "
        "pine_tree plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk "
        "skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone television tiger "
        "tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm"
    ).split()
    mean = [0.5071, 0.4865, 0.4409]
    std = [0.2673, 0.2564, 0.2762]
    title = "CIFAR-100"


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
        self.mean = mean or ([0.485, 0.456, 0.406] if in_chans == 3 else [0.5])
        self.std = std or ([0.229, 0.224, 0.225] if in_chans == 3 else [0.25])
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
            then = f", and the {what} has no others of the classes {some_of(lost)}; replace or add images"
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
                    f"no image in the class folders {some_of(empty)} of {folder}; add images or remove the folders"
                )
            if (theirs := class_folders(folder)) != names:
                only = {train: set(names) - set(theirs), folder: set(theirs) - set(names)}
                told = " and ".join(
                    f"only {place} has {some_of(sorted(extra))}" for place, extra in only.items() if extra
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


def stratified_split(labels: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the indices of the rest and of ``count`` chosen ones, each class in its share, the same in every run."""
    indices = np.arange(len(labels))
    rest, chosen = train_test_split(indices, test_size=count, stratify=labels.numpy(), random_state=SPLIT_SEED)
    return torch.from_numpy(np.sort(rest)), torch.from_numpy(np.sort(chosen))


@contextlib.contextmanager
def first_alone(trainer: L.Trainer | None) -> Iterator[None]:
    """Let the first process of each machine go through alone, and then, whether it failed or not, all others."""
    several = trainer is not None and trainer.world_size > 1
    if several and trainer.local_rank:
        trainer.strategy.barrier()
    try:
        yield
    finally:
        if several and not trainer.local_rank:
            trainer.strategy.barrier()


def build_data(name: str, **arguments: Any) -> ImageData:
    """Return the data module of that name, e.g. ``build_data("MNIST", root="data")``.

    Raises:
        ValueError: an unknown name; the message lists the legal ones.
    """
    return look_up(DATA, name, "data set")(**arguments)


def given_arguments(hparams: Mapping[str, Any]) -> dict[str, Any]:
    """Return hyperparameters without those that Lightning adds for itself."""
    return {name: value for name, value in hparams.items() if not name.startswith("_")}


DATA = {"Digits": Digits, "MNIST": MNIST, "CIFAR10": CIFAR10, "CIFAR100": CIFAR100, "ImageFolder": ImageFolder}
