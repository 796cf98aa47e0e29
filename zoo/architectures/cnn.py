"""Plain CNNs: blocks of 3×3 convolutions, each block followed by max pooling."""

from collections.abc import Sequence

from torch import Tensor, nn

from zoo.architectures.network import Network, average_pool, classifier, convolution


class CNN(Network):
    """Blocks of 3×3 convolutions.

    Args:
        widths: filters of each block.
        convolutions: convolutions in each block.
        pools: how many blocks, from the first, are followed by 2×2 max pooling.
        hidden: width of a fully connected layer after the blocks; it reads every position, so the input size is fixed.
        feature_filters: number of filters of a last convolution, which covers the whole map and stands in place of the
            hidden layer: the classifier reads what they answer. The input size is fixed then, too.
            With neither, the features are averaged over all positions and any size that survives the pooling will do.
        input_size: height and width of the images, in pixels.
        batch_norm, relu: whether each layer has them; without batch normalisation, convolutions have a bias.

    Shape:
        (N, in_chans, H, W) to (N, num_classes).

    Raises:
        ValueError: images of a size that the network cannot take, or both ``hidden`` and ``feature_filters``.
    """

    def __init__(
        self,
        widths: Sequence[int],
        convolutions: int,
        *,
        pools: int,
        hidden: int | None = None,
        feature_filters: int | None = None,
        num_classes: int = 10,
        in_chans: int = 3,
        input_size: int = 32,
        batch_norm: bool = True,
        relu: bool = True,
    ) -> None:
        super().__init__()
        if hidden and feature_filters:
            raise ValueError(f"a network has hidden={hidden} or feature_filters={feature_filters}, not both")
        self.smallest_size = 2**pools
        self.takes_any_size = not (hidden or feature_filters)
        self.input_size = input_size
        self.num_classes = num_classes
        layers: list[nn.Module] = []
        channels = in_chans
        for block, width in enumerate(widths):
            for _ in range(convolutions):
                layers.append(convolution(channels, width, bias=not batch_norm))
                layers += _normalise_and_activate(nn.BatchNorm2d, width, batch_norm, relu)
                channels = width
            if block < pools:
                layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        side = input_size // 2**pools
        if feature_filters:
            self.pool = nn.Sequential(nn.Conv2d(channels, feature_filters, side, bias=False), nn.Flatten())
        elif hidden:
            self.pool = nn.Sequential(
                nn.Flatten(),
                nn.Linear(channels * side**2, hidden),
                *_normalise_and_activate(nn.BatchNorm1d, hidden, batch_norm, relu),
            )
        else:
            self.pool = average_pool()
        self.num_features = hidden or feature_filters or channels
        self.fc = classifier(self.num_features, num_classes)

    def forward_features(self, images: Tensor) -> Tensor:
        self._check_size(*images.shape[-2:])
        return self.features(images)

    def _check_size(self, height: int, width: int) -> None:
        if not self.takes_any_size and (height, width) != (self.input_size, self.input_size):
            raise ValueError(
                f"images are {height}×{width} pixels, but this network was built for "
                f"{self.input_size}×{self.input_size}; resize them (model.transform does), or build the network with "
                f"input_size={height}"
            )
        if min(height, width) < self.smallest_size:
            raise ValueError(
                f"images are {height}×{width} pixels, but this network needs at least "
                f"{self.smallest_size}×{self.smallest_size}; resize them (model.transform does)"
            )


def _normalise_and_activate(norm: type[nn.Module], width: int, batch_norm: bool, relu: bool) -> list[nn.Module]:
    return [norm(width)] * batch_norm + [nn.ReLU(inplace=True)] * relu


def cnn6(
    num_classes: int = 10,
    in_chans: int = 3,
    input_size: int = 8,
    batch_norm: bool = True,
    relu: bool = True,
    feature_filters: int | None = None,
) -> CNN:
    """Three blocks of two 3×3 convolutions, 32-64-128 filters, for small images (8×8 to 32×32); 288,000 parameters.

    ``feature_filters=2`` gives the classifier two numbers to read, which can be drawn.
    """
    return CNN(
        widths=(32, 64, 128),
        convolutions=2,
        pools=2,
        num_classes=num_classes,
        in_chans=in_chans,
        input_size=input_size,
        batch_norm=batch_norm,
        relu=relu,
        feature_filters=feature_filters,
    )


def cnn9(
    num_classes: int = 10,
    in_chans: int = 3,
    input_size: int = 32,
    batch_norm: bool = True,
    relu: bool = True,
    widths: Sequence[int] = (64, 128, 256),
    hidden: int = 512,
) -> CNN:
    """The paper's plain CNN: three blocks of three 3×3 convolutions, 64-128-256 filters, a 512-wide hidden layer."""
    return CNN(
        widths=widths,
        convolutions=3,
        pools=3,
        hidden=hidden,
        num_classes=num_classes,
        in_chans=in_chans,
        input_size=input_size,
        batch_norm=batch_norm,
        relu=relu,
    )


def cnn9_no_batchnorm(
    num_classes: int = 10,
    in_chans: int = 3,
    input_size: int = 32,
    relu: bool = True,
    widths: Sequence[int] = (64, 128, 256),
    hidden: int = 512,
) -> CNN:
    """:func:`cnn9` without batch normalisation."""
    return cnn9(num_classes, in_chans, input_size, batch_norm=False, relu=relu, widths=widths, hidden=hidden)
