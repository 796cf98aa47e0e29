"""What every plain network of the zoo shares: features, then one linear classifier, by timm's names."""

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

    Shape:
        (N, in_chans, H, W) to (N, num_classes); with ``num_classes=0`` to (N, num_features).
    """

    num_classes: int
    num_features: int
    input_size: int
    pool: nn.Module
    fc: nn.Module

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
        self.fc = classifier(self.num_features, num_classes).to(old.device, old.dtype)


def average_pool() -> nn.Module:
    """Return the average over all positions, as (N, channels)."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())


def classifier(num_features: int, num_classes: int) -> nn.Module:
    return nn.Linear(num_features, num_classes) if num_classes else nn.Identity()


def convolution(in_channels: int, out_channels: int, stride: int = 1, *, bias: bool = False) -> nn.Conv2d:
    """Return a 3×3 convolution with padding 1."""
    return nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=bias)
