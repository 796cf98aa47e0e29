"""Plain networks, written with ``nn.Conv2d``; they know nothing of operators."""

from zoo.architectures.cnn import cnn6, cnn9, cnn9_no_batchnorm
from zoo.architectures.resnet import resnet18_modified, resnet20, resnet32, resnet32_wide

__all__ = ["cnn6", "cnn9", "cnn9_no_batchnorm", "resnet18_modified", "resnet20", "resnet32", "resnet32_wide"]
