"""The data modules by name."""

from collections.abc import Mapping
from typing import Any

from operators.lookup import look_up
from zoo.data.digits import Digits
from zoo.data.folder import ImageFolder
from zoo.data.labelled_files import LabelledFiles
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


def recorded_arguments(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a data module as :meth:`ImageData.describe` recorded them, in this or an earlier version.

    Raises:
        ValueError: an unknown data set.
    """
    arguments = dict(record["arguments"])
    if issubclass(look_up(DATA, record["name"], "data set"), LabelledFiles):
        # Before there was this argument, no file was scaled down.
        arguments.setdefault("draft", False)
    return arguments


def build_data(name: str, **arguments: Any) -> ImageData:
    """Return the data module of that name, e.g. ``build_data("MNIST", root="data")``.

    Raises:
        ValueError: an unknown name; the message lists the legal ones.
    """
    return look_up(DATA, name, "data set")(**arguments)
