"""Plain networks, written with ``nn.Conv2d``; they know nothing of operators."""

from zoo.architectures.cnn import cnn6, cnn9
from zoo.architectures.resnet import resnet18_modified, resnet20, resnet32, resnet32_wide

__all__ = ["cnn6", "cnn9", "resnet18_modified", "resnet20", "resnet32", "resnet32_wide"]
