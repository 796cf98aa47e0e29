"""What every plain network of the zoo shares: features, then one linear classifier, by timm's names."""

import torch
from torch import Tensor, nn


class Network(nn.Module):
    """Features followed by ``self.fc``, with the methods timm's networks have.

    A subclass defines ``forward_features`` and sets the attributes below.

    Attributes:
        num_classes: number of logits; 0 if there is no classifier.
        num_features: width of what the classifier reads.
        input_size: height and width of the images that the network was made for, in pixels.
        pool: from feature maps to what the classifier reads, (N, num_features): pooling, or a hidden layer.
        fc: the classifier.
        classifier_bias: whether the classifier adds a bias.

    Shape:
        (N, in_chans, H, W) to (N, num_classes); with ``num_classes=0`` to (N, num_features).
    """

    num_classes: int
    num_features: int
    input_size: int
    pool: nn.Module
    fc: nn.Module
    classifier_bias = True

    def forward_features(self, images: Tensor) -> Tensor:
        """Return the feature maps (N, channels, h, w)."""
        raise NotImplementedError

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Return the logits, or with ``pre_logits`` the features that the classifier reads."""
        features = self.pool(features)
        return features if pre_logits else self.fc(features)

    def forward(self, images: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(images))

    def get_classifier(self) -> nn.Module:
        return self.fc

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the classifier by a fresh one; ``num_classes=0`` removes it."""
        old = next(self.parameters())
        self.num_classes = num_classes
        self.fc = classifier(self.num_features, num_classes, self.classifier_bias).to(old.device, old.dtype)


def average_pool() -> nn.Module:
    """Return the average over all positions, as (N, channels)."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())


def classifier(num_features: int, num_classes: int, bias: bool = True) -> nn.Module:
    return nn.Linear(num_features, num_classes, bias) if num_classes else nn.Identity()


def convolution(in_channels: int, out_channels: int, stride: int = 1, *, bias: bool = False) -> nn.Conv2d:
    """Return a 3×3 convolution with padding 1."""
    return nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=bias)


class UncentredBatchNorm2d(nn.Module):
    """Batch normalisation that neither subtracts the mean nor adds a bias: ``γ x / sqrt(E[x²] + eps)``.

    ``E[x²]`` of each channel is the batch's in training, computed in at least float32, and its moving average in
    evaluation. Without biases, a network of such layers is ``W(x) · x`` for every image ``x``. What is made for torch's
    BatchNorm, such as its calibration, its folding or synchronised statistics, leaves this layer as it is.

    Args:
        channels: of the input.
        eps: added to ``E[x²]``, in the square of the input's unit.
        momentum: the share of the batch's mean square in each step of the moving average.

    Shape:
        (N, channels, H, W) to the same.

    Source: Böhle et al., B-cos Alignment for Inherently Interpretable CNNs and Vision Transformers, 2023, section 4;
        there the variance takes the place of ``E[x²]``.
    """

    mean_square: Tensor

    def __init__(self, channels: int, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__()
        self.eps = eps
        self.momentum = momentum
        self.weight = nn.Parameter(torch.ones(channels))
        self.register_buffer("mean_square", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        mean_square = self.mean_square
        if self.training:
            mean_square = x.to(torch.promote_types(x.dtype, torch.float32)).square().mean((0, 2, 3))
            self.mean_square.lerp_(mean_square.detach().to(self.mean_square.dtype), self.momentum)
        scale = self.weight * (mean_square + self.eps).rsqrt()
        return x * scale.to(x.dtype).view(-1, 1, 1)
