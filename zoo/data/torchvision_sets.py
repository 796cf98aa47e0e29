"""Data sets that torchvision reads as a whole: MNIST and CIFAR."""

import abc
import os
from typing import Any

import torch
from torchvision import datasets
from torchvision.datasets.vision import VisionDataset

from zoo.data.augmentation import Augment
from zoo.data.image_sets import MemoryImages
from zoo.data.module import ClassWeights, ImageData


class TorchvisionData(ImageData):
    """A data set that torchvision reads as a whole (``source``).

    Args:
        root: the folder above MNIST/raw, cifar-10-batches-py or cifar-100-python with the original files.
        batch_size: images a batch (and a device).
        val_fraction: share of the training images held out for validation, in (0, 0.5].
        augment: of training images: "none", "crop" (random shift), "crop_flip" (and mirroring), "crop_flip_cutout"
            (and a black square), "crop_flip_light" (and other brightness and contrast) or "resized_crop_flip" (random
            resized crop and mirroring); "crop" for MNIST and "crop_flip" for CIFAR by default.
        download: whether to download the data set into ``root`` if it is not there.
        class_weights: factors of the training loss, one for each class; or "auto", by which each class counts as much
            as any other however many images it has; none by default.
        predict: image file or folder for predict; the test images by default.
        corruption: what test images are changed by when the test loader reads them, as "NAME:SEVERITY", e.g. "fog:3"
            (see ``zoo.corruptions``); nothing by default.

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
        class_weights: ClassWeights = None,
        predict: str | None = None,
        corruption: str | None = None,
    ) -> None:
        super().__init__(batch_size, val_fraction, augment, class_weights, predict, corruption)
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
