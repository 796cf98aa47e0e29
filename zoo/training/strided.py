"""Strided 1×1 convolutions of few channels, whose gradient torch gets wrong on CPUs."""

import torch.nn.functional as F
from torch import Tensor, nn

from operators.functional import subsample

# oneDNN (torch 2.14.1) gathers the pixels of strided channels_last images in a buffer for their channels alone, while
# its kernel for the gradient of 1×1 filters takes blocks of so many (of 8 without AVX-512): with fewer channels, one
# group, no padding, and a stride that divides height and width, it crashes, or is wrong without a word.
BLOCK = 16


class SubsampledConv2d(nn.Conv2d):
    """A 1×1 convolution whose stride is taken before it: what ``nn.Conv2d`` computes, to rounding."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv2d(subsample(input, self.stride), weight, bias)


def avoid_wrong_gradients(network: nn.Module) -> None:
    """Make the plain convolutions that torch trains wrongly subsample first; their filters stay as they are.

    Decoupled convolutions do so themselves.
    """
    for layer in network.modules():
        if type(layer) is nn.Conv2d and _is_trained_wrongly(layer):
            layer.__class__ = SubsampledConv2d


def undo(network: nn.Module) -> None:
    """Make plain convolutions of those that subsample, as they were."""
    for layer in network.modules():
        if type(layer) is SubsampledConv2d:
            layer.__class__ = nn.Conv2d


def _is_trained_wrongly(layer: nn.Conv2d) -> bool:
    pointwise = layer.kernel_size == (1, 1) and layer.padding in ((0, 0), "valid")
    return pointwise and layer.stride != (1, 1) and layer.groups == 1 and layer.in_channels < BLOCK
