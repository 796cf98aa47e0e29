"""The data modules by name."""

from typing import Any

from operators.lookup import look_up
from zoo.data.digits import Digits
from zoo.data.folder import ImageFolder
from zoo.data.module import ImageData
from zoo.data.table import ImageTable
from zoo.data.torchvision_sets import CIFAR10, CIFAR100, MNIST

DATA = {
    "Digits": Digits,
    "MNIST": MNIST,
    "CIFAR10": CIFAR10,
    "CIFAR100": CIFAR100,
    "ImageFolder": ImageFolder,
    "ImageTable": ImageTable,
}


def build_data(name: str, **arguments: Any) -> ImageData:
    """Return the data module of that name, e.g. ``build_data("MNIST", root="data")``.

    Raises:
        ValueError: an unknown name; the message lists the legal ones.
    """
    return look_up(DATA, name, "data set")(**arguments)
