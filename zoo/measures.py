"""What the paper's tables measure on test images, each as one number of which less is better."""

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from zoo.checkpoints import accuracy
from zoo.models import ImageModel

Batches = Sequence[tuple[Tensor, Tensor]]

# Features of so many images are enough to see their shape in a plot.
DRAWN = 1000


def error(model: ImageModel, batches: Batches) -> float:
    """Return the share of images whose class is not the likeliest, in percent."""
    return 100 * (1 - accuracy(model, batches)[0])


def top5_error(model: ImageModel, batches: Batches) -> float:
    """Return the share of images whose class is not among the five likeliest, in percent."""
    return 100 * (1 - accuracy(model, batches, top=5)[0])


def spread(model: ImageModel, batches: Batches) -> float:
    """Return how far features scatter within a class, over how far apart the classes lie.

    The mean distance of a feature to the mean of its class, averaged over classes, divided by the mean distance between
    the means of two classes. Features are what the classifier reads.
    """
    points, labels = features(model, batches)
    classes = [points[labels == label] for label in labels.unique()]
    centres = [members.mean(0) for members in classes]
    within = [(members - centre).norm(dim=1).mean() for members, centre in zip(classes, centres, strict=True)]
    return (torch.stack(within).mean() / torch.pdist(torch.stack(centres)).mean()).item()


def features(model: ImageModel, batches: Batches) -> tuple[Tensor, Tensor]:
    """Return what the classifier reads of each image, (N, num_features), and the labels (N,)."""
    network = model.network
    captured = []
    handle = network.get_classifier().register_forward_pre_hook(lambda _, inputs: captured.append(inputs[0].cpu()))
    try:
        accuracy(model, batches)
    finally:
        handle.remove()
    return torch.cat(captured), torch.cat([labels for _, labels in batches])


def sample_features(model: ImageModel, batches: Batches) -> list[list[float]]:
    """Return [feature, ..., label] of the first images, for a plot."""
    points, labels = (values[:DRAWN] for values in features(model, batches))
    return [
        [*(round(value, 3) for value in point), label]
        for point, label in zip(points.tolist(), labels.tolist(), strict=True)
    ]


@dataclasses.dataclass(frozen=True)
class Measure:
    """A measure's function and its title in a table."""

    measure: Callable[[ImageModel, Batches], float]
    title: str


MEASURES = {
    "error": Measure(error, "test error, %"),
    "top5_error": Measure(top5_error, "top-5 error, %"),
    "spread": Measure(spread, "spread within a class ÷ distance between classes"),
}
