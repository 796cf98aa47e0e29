"""Images and labels, from files to batches.

Recipes and checkpoints name the data modules by the class paths that they have here, such as ``zoo.data.Digits``.
"""

from zoo.data.digits import Digits
from zoo.data.folder import ImageFolder
from zoo.data.module import ImageData
from zoo.data.registry import DATA, build_data
from zoo.data.table import ImageTable
from zoo.data.torchvision_sets import CIFAR10, CIFAR100, MNIST

__all__ = ["CIFAR10", "CIFAR100", "DATA", "MNIST", "Digits", "ImageData", "ImageFolder", "ImageTable", "build_data"]
