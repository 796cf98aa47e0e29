"""Plain CNNs: blocks of 3×3 convolutions, each block followed by max pooling."""

from torch import Tensor, nn

from zoo.architectures.network import Network, average_pool, classifier, convolution


class CNN(Network):
    """Blocks of 3×3 convolutions.

    Args:
        widths: filters of each block.
        convolutions: convolutions in each block.
        pools: how many blocks, from the first, are followed by 2×2 max pooling.
        hidden: width of a fully connected layer after the blocks; it reads every position, so the input size is fixed.
            Without it, the features are averaged over all positions and any size that survives the pooling will do.
        input_size: height and width of the images, in pixels.
        batch_norm, relu: whether each layer has them; without batch normalisation, convolutions have a bias.

    Shape:
        (N, in_chans, H, W) to (N, num_classes).

    Raises:
        ValueError: images of a size that the network cannot take.
    """

    def __init__(
        self,
        widths: tuple[int, ...],
        convolutions: int,
        *,
        pools: int,
        hidden: int | None = None,
        num_classes: int = 10,
        in_chans: int = 3,
        input_size: int = 32,
        batch_norm: bool = True,
        relu: bool = True,
    ) -> None:
        super().__init__()
        self.smallest_size = 2**pools
        self.takes_any_size = hidden is None
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
        if hidden:
            positions = (input_size // 2**pools) ** 2
            self.pool = nn.Sequential(
                nn.Flatten(),
                nn.Linear(channels * positions, hidden),
                *_normalise_and_activate(nn.BatchNorm1d, hidden, batch_norm, relu),
            )
        else:
            self.pool = average_pool()
        self.num_features = hidden or channels
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
    num_classes: int = 10, in_chans: int = 3, input_size: int = 8, batch_norm: bool = True, relu: bool = True
) -> CNN:
    """Three blocks of two 3×3 convolutions, 32-64-128 filters, for small images (8×8 to 32×32); 288,000 parameters."""
    return CNN(
        widths=(32, 64, 128),
        convolutions=2,
        pools=2,
        num_classes=num_classes,
        in_chans=in_chans,
        input_size=input_size,
        batch_norm=batch_norm,
        relu=relu,
    )


def cnn9(
    num_classes: int = 10, in_chans: int = 3, input_size: int = 32, batch_norm: bool = True, relu: bool = True
) -> CNN:
    """The paper's plain CNN: three blocks of three 3×3 convolutions, 64-128-256 filters, a 512-wide hidden layer."""
    return CNN(
        widths=(64, 128, 256),
        convolutions=3,
        pools=3,
        hidden=512,
        num_classes=num_classes,
        in_chans=in_chans,
        input_size=input_size,
        batch_norm=batch_norm,
        relu=relu,
    )
