"""The accuracy of each class, where some classes have many more images than others."""

from collections.abc import Mapping, Sequence

import torch
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor
from torchmetrics import Metric

# Beyond so many times as many images in one class as in another, training is told of class weights.
UNEVEN = 5

# The table on the screen has so many classes at most, those that fare worst.
MOST_ROWS = 20


class ClassAccuracy(Metric):
    """Count the images of each class, and those of them that are named rightly, over all processes.

    Args:
        classes: how many there are.
    """

    correct: Tensor
    total: Tensor

    def __init__(self, classes: int) -> None:
        super().__init__()
        for name in ("correct", "total"):
            self.add_state(name, torch.zeros(classes, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, logits: Tensor, labels: Tensor) -> None:
        right = labels[logits.argmax(1) == labels]
        self.correct += torch.bincount(right, minlength=len(self.correct))
        self.total += torch.bincount(labels, minlength=len(self.total))

    def compute(self) -> tuple[Tensor, Tensor]:
        """Return how many images of each class are named rightly, and how many there are, int64 (classes,) each."""
        return self.correct, self.total


def balanced(correct: Tensor, total: Tensor) -> Tensor:
    """Return the balanced accuracy: the mean over the classes that have images of each class's own accuracy."""
    return (correct / total)[total > 0].mean()


@rank_zero_only
def show_class_accuracies(counts: Mapping[str, tuple[int, int]]) -> None:
    """Show the accuracy of each class, the lowest first, on the screen.

    Args:
        counts: of each class how many images are named rightly, and how many there are.
    """
    rows = sorted((right / number, name, number) for name, (right, number) in counts.items() if number)
    shown = rows[:MOST_ROWS]
    table = Table("class", "accuracy", "images", caption=f"{len(shown)} of {len(rows)} classes, the lowest first")
    for share, name, number in shown:
        table.add_row(Text(name), f"{share:.4f}", f"{number:,}")
    Console().print(table)


def told_weights(names: Sequence[str], weights: Tensor | None, labels: Tensor) -> str | None:
    """Return what a person is to know of class weights before a training; None if nothing.

    Args:
        labels: of the training images.
    """
    if weights is not None:
        told = [f"{name} {weight:.3g}" for name, weight in zip(names, weights.tolist(), strict=True)]
        return f"class weights of the training loss: {', '.join(told[:MOST_ROWS])}{', ...' * (len(told) > MOST_ROWS)}"
    counts = torch.bincount(labels, minlength=len(names))
    most, fewest = int(counts.argmax()), int(counts.argmin())
    if counts[most] <= UNEVEN * counts[fewest]:
        return None
    return (
        f"classes are uneven: {names[most]} has {counts[most]:,} training images, {names[fewest]} {counts[fewest]:,}; "
        "--data.class_weights auto lets each class count the same, and --checkpoint.monitor val_balanced_accuracy "
        "chooses the best epoch so"
    )
