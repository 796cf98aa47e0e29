"""Images and labels, from files to batches.

Recipes and checkpoints name the data modules by the class paths that they have here, such as ``zoo.data.Digits``.
"""

from zoo.data.module import CIFAR10, CIFAR100, DATA, MNIST, Digits, ImageData, ImageFolder, build_data

__all__ = ["CIFAR10", "CIFAR100", "DATA", "MNIST", "Digits", "ImageData", "ImageFolder", "build_data"]
