"""What every data module of the zoo has: splits, loaders, augmentation and prediction."""

import abc
import contextlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import lightning as L
import numpy as np
import torch
import torchvision.transforms.v2.functional as TF
from lightning.pytorch.utilities import rank_zero_info
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.utils.data import DataLoader

from operators.lookup import unknown_name
from zoo.corruptions.corruption import parse_corruption
from zoo.data.augmentation import AUGMENTS, Augment, augment_batch, to_float
from zoo.data.contents import first_ten
from zoo.data.image_files import decode_each, empty_images, find_images, unreadable
from zoo.data.image_sets import CorruptedImages, DiskImages, ImageSet, MemoryImages
from zoo.data.loaders import DistributedBatchSampler, Loader, TrainingLoader, collate_unchanged
from zoo.data.preflight import examine
from zoo.models.transform import ImageTransform
from zoo.randomness import run_seed
from zoo.statistics import evenly_spaced

# Images to predict on are read later, when it is known what the network takes.
STAGES = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": ()}
SPLITS = ("train", "val", "test")

# Arguments that say how images are used, not which they are.
USES = ("batch_size", "augment", "class_weights", "predict", "corruption")

# Held-out images never depend on the global seed, so that accuracies of different runs compare.
SPLIT_SEED = 0

# Factors of the training loss, as a data module is given them.
ClassWeights = list[float] | Literal["auto"] | None

# The label of an image whose class nobody has told.
UNLABELLED = -1


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
            (and a black square), "crop_flip_light" (and other brightness and contrast) or "resized_crop_flip" (random
            resized crop and mirroring); ``default_augment`` by default.
        class_weights: factors of the training loss, one for each class; or "auto", by which each class counts as much
            as any other however many images it has (inverse frequency); none by default.
        predict: image file or folder for predict; the test images by default.
        corruption: what test images are changed by when the test loader reads them, as "NAME:SEVERITY", e.g. "fog:3"
            (see ``zoo.corruptions``); nothing by default.

    Raises:
        ValueError: a number outside its range, an unknown ``augment`` or ``corruption``, or no image under ``predict``.
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

    def __init__(
        self,
        batch_size: int,
        val_fraction: float,
        augment: Augment | None,
        class_weights: ClassWeights,
        predict: str | None,
        corruption: str | None,
    ) -> None:
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
        self.class_weights = class_weights
        self.corruption = None if corruption is None else parse_corruption(corruption)
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

    def loss_weights(self) -> Tensor | None:
        """Return the factor ``a_k`` of each class in the training loss, float32 (num_classes,); None for all the same.

        The loss of a batch is the sum of ``a_k`` times each image's own loss, by the number of images. ``"auto"`` gives
        ``a_k = N / (K · N_k)``: with ``N_k`` of ``N`` training images in the ``k``-th of ``K`` classes, all classes
        count the same, and the mean of the factors over the images is 1. A list is scaled to that mean, too.

        Raises:
            ValueError: another number of weights than of classes, or one that is not more than 0 and finite.
        """
        if self.class_weights is None:
            return None
        if self.class_weights == "auto":
            counts = torch.bincount(self.split("train").labels, minlength=self.num_classes)
            return counts.sum() / (self.num_classes * counts)
        weights = torch.tensor(self.class_weights, dtype=torch.float32)
        if len(weights) != self.num_classes or not (weights > 0).all() or not weights.isfinite().all():
            raise ValueError(
                f'class_weights is "auto", or a number more than 0 for each of the {self.num_classes} classes, in this '
                f"order: {first_ten(self.class_names)}; got {self.class_weights}"
            )
        return weights / weights[self.split("train").labels].mean()

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
        if self.corruption and stage != "test":
            raise ValueError(f"corruption changes test images, and {stage} uses none; leave it out (--data.corruption)")
        if self.corruption:
            rank_zero_info("test images are corrupted: {}, severity {}".format(*self.corruption))
        # Images on disk are examined by one process of each machine, and the others read what it has found.
        with first_alone(self.trainer):
            for split in STAGES[stage]:
                self.split(split)
        if stage == "fit":
            # Weights that do not fit are told before a run has a folder.
            self.loss_weights()

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
        return DataLoader(images, batch_size=self.batch_size, num_workers=workers, collate_fn=collate_unchanged)

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
        for images, labels in DataLoader(self.split(split), self.batch_size, collate_fn=collate_unchanged):
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
        if split == "test" and self.corruption:
            images = CorruptedImages(images, *self.corruption)
        processes = trainer.world_size if trainer else 1
        sampler = DistributedBatchSampler(
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
        return kind(images, sampler, device=device, workers=self.num_workers)


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


def given_arguments(hparams: Mapping[str, Any]) -> dict[str, Any]:
    """Return hyperparameters without those that Lightning adds for itself."""
    return {name: value for name, value in hparams.items() if not name.startswith("_")}
