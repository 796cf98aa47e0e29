"""Plain networks, written with ``nn.Conv2d``; they know nothing of operators."""

from collections.abc import Callable

from torch import nn

from zoo.architectures.cnn import cnn6, cnn9, cnn9_no_batchnorm
from zoo.architectures.resnet import resnet18_modified, resnet20, resnet32, resnet32_wide

ARCHITECTURES: dict[str, Callable[..., nn.Module]] = {
    "cnn6": cnn6,
    "cnn9": cnn9,
    "cnn9_no_batchnorm": cnn9_no_batchnorm,
    "resnet18_modified": resnet18_modified,
    "resnet20": resnet20,
    "resnet32": resnet32,
    "resnet32_wide": resnet32_wide,
}
