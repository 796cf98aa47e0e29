"""Residual networks: He et al.'s for CIFAR, and the authors' modified ResNet-18 for ImageNet."""

from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from zoo.architectures.network import Network, UncentredBatchNorm2d, average_pool, classifier, convolution


class BasicBlock(nn.Module):
    """Two 3×3 convolutions beside a shortcut without parameters: strided, and padded with zero channels."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        relu: bool = True,
        norm: Callable[[int], nn.Module] = nn.BatchNorm2d,
    ) -> None:
        super().__init__()
        self.conv1 = convolution(in_channels, out_channels, stride)
        self.bn1 = norm(out_channels)
        self.act1 = _activation(relu)
        self.conv2 = convolution(out_channels, out_channels)
        self.bn2 = norm(out_channels)
        self.act2 = _activation(relu)
        self.stride = stride
        self.extra_channels = out_channels - in_channels

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x[..., :: self.stride, :: self.stride] if self.stride > 1 else x
        if self.extra_channels:
            before = self.extra_channels // 2
            shortcut = F.pad(shortcut, (0, 0, 0, 0, before, self.extra_channels - before))
        x = self.act1(self.bn1(self.conv1(x)))
        return self.act2(self.bn2(self.conv2(x)) + shortcut)


class CIFARResNet(Network):
    """He et al.'s residual network for 32×32 images, depth ``6 · units + 2``.

    Args:
        units: residual units in each of the three stages.
        widths: filters of each stage.
        relu: whether the network has its activations; without them, only the operators are not linear.
        batch_norm_bias: whether BatchNorm subtracts a mean and adds a bias, and the classifier adds one; without, see
            :class:`UncentredBatchNorm2d`.

    Shape:
        (N, in_chans, H, W) to (N, num_classes), for any H and W.

    Source: He et al., Deep Residual Learning for Image Recognition, CVPR 2016, section 4.2 (shortcut A).
    """

    input_size = 32

    def __init__(
        self,
        units: int,
        widths: Sequence[int] = (16, 32, 64),
        *,
        num_classes: int = 10,
        in_chans: int = 3,
        relu: bool = True,
        batch_norm_bias: bool = True,
    ) -> None:
        super().__init__()
        norm = nn.BatchNorm2d if batch_norm_bias else UncentredBatchNorm2d
        self.num_classes = num_classes
        self.conv1 = convolution(in_chans, widths[0])
        self.bn1 = norm(widths[0])
        self.act1 = _activation(relu)
        blocks: list[nn.Module] = []
        channels = widths[0]
        for stage, width in enumerate(widths):
            for unit in range(units):
                blocks.append(BasicBlock(channels, width, 2 if stage and not unit else 1, relu, norm))
                channels = width
        self.blocks = nn.Sequential(*blocks)
        self.pool = average_pool()
        self.num_features = channels
        self.classifier_bias = batch_norm_bias
        self.fc = classifier(channels, num_classes, batch_norm_bias)

    def forward_features(self, images: Tensor) -> Tensor:
        return self.blocks(self.act1(self.bn1(self.conv1(images))))


class PReLUUnit(nn.Module):
    """A residual unit of two 3×3 convolutions with PReLU, at constant width and resolution."""

    def __init__(self, channels: int, batch_norm: bool) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *_prelu_layer(convolution(channels, channels, bias=not batch_norm), batch_norm),
            *_prelu_layer(convolution(channels, channels, bias=not batch_norm), batch_norm),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class ModifiedResNet18(Network):
    """The authors' ImageNet network: each change of width is a plain stride-2 convolution, not a projection shortcut.

    A 7×7 stem of 128 filters with stride 2 and 3×3 max pooling; then 1, 2, 3, 1 residual units at 128, 256, 512 and
    1024 filters, joined by 3×3 stride-2 convolutions; PReLU throughout.

    Args:
        batch_norm: whether each convolution is followed by batch normalisation; without it, it has a bias.

    Shape:
        (N, in_chans, H, W) to (N, num_classes), for H and W of at least 32.

    Source: the authors' TensorFlow code.
    """

    input_size = 224

    def __init__(self, *, num_classes: int = 1000, in_chans: int = 3, batch_norm: bool = True) -> None:
        super().__init__()
        self.num_classes = num_classes
        widths, units = (128, 256, 512, 1024), (1, 2, 3, 1)
        stem = nn.Conv2d(in_chans, widths[0], 7, stride=2, padding=3, bias=not batch_norm)
        self.stem = nn.Sequential(*_prelu_layer(stem, batch_norm), nn.MaxPool2d(3, stride=2, padding=1))
        blocks: list[nn.Module] = []
        channels = widths[0]
        for width, count in zip(widths, units, strict=True):
            if width != channels:
                blocks += _prelu_layer(convolution(channels, width, 2, bias=not batch_norm), batch_norm)
                channels = width
            blocks += [PReLUUnit(width, batch_norm) for _ in range(count)]
        self.blocks = nn.Sequential(*blocks)
        self.pool = average_pool()
        self.num_features = channels
        self.fc = classifier(channels, num_classes)

    def forward_features(self, images: Tensor) -> Tensor:
        return self.blocks(self.stem(images))


def _activation(relu: bool) -> nn.Module:
    return nn.ReLU(inplace=True) if relu else nn.Identity()


def _prelu_layer(layer: nn.Conv2d, batch_norm: bool) -> list[nn.Module]:
    width = layer.out_channels
    return [layer, *([nn.BatchNorm2d(width)] if batch_norm else []), nn.PReLU(width)]


def resnet20(
    num_classes: int = 10,
    in_chans: int = 3,
    widths: Sequence[int] = (16, 32, 64),
    relu: bool = True,
    batch_norm_bias: bool = True,
) -> CIFARResNet:
    """ResNet-20 for CIFAR: three units a stage, 16-32-64 filters; about 270,000 parameters."""
    return CIFARResNet(
        3, widths, num_classes=num_classes, in_chans=in_chans, relu=relu, batch_norm_bias=batch_norm_bias
    )


def resnet32(
    num_classes: int = 10,
    in_chans: int = 3,
    widths: Sequence[int] = (16, 32, 64),
    relu: bool = True,
) -> CIFARResNet:
    """ResNet-32 for CIFAR: five units a stage, 16-32-64 filters; about 460,000 parameters."""
    return CIFARResNet(5, widths, num_classes=num_classes, in_chans=in_chans, relu=relu)


def resnet32_wide(num_classes: int = 10, in_chans: int = 3, relu: bool = True) -> CIFARResNet:
    """The authors' CIFAR network: ResNet-32 with 96-192-384 filters; about 17 million parameters."""
    return CIFARResNet(5, (96, 192, 384), num_classes=num_classes, in_chans=in_chans, relu=relu)


def resnet18_modified(num_classes: int = 1000, in_chans: int = 3, batch_norm: bool = True) -> ModifiedResNet18:
    """The authors' modified ResNet-18 for ImageNet (see :class:`ModifiedResNet18`)."""
    return ModifiedResNet18(num_classes=num_classes, in_chans=in_chans, batch_norm=batch_norm)
